//! The kernel and initramfs of every guest: Debian's cloud kernel as plain ELF, and an initramfs
//! with busybox, the virtio modules and `tests/vm/init`.
//!
//! The kernel is decompressed here once, because the emulated processor would need seconds for it
//! at each boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::cpio::Archive;
use super::debian;
use crate::cache::{self, Key};

const INIT: &str = include_str!("../../vm/init");
const FETCH: &str = include_str!("../../vm/fetch");
/// To be incremented when this file changes the result.
const RECIPE: &str = "2";

/// In load order: each depends only on earlier ones.
const MODULES: &[&str] = &[
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "drivers/block/virtio_blk",
    "net/llc/llc",
    "net/802/stp",
    "net/802/garp",
    "net/802/mrp",
    "net/8021q/8021q",
];

/// A kernel and an initramfs to boot it with.
pub struct Kernel {
    pub image: PathBuf,
    pub initramfs: PathBuf,
}

impl Kernel {
    /// Returns both from the cache, or builds them.
    pub fn prepare() -> Result<Self> {
        let package = debian::first_dependency("linux-image-cloud-amd64")?;
        let key = Key::new().with(RECIPE).with(INIT).with(FETCH);
        let key = key.with(&package).with(&debian::candidate(&package)?);
        let key = key.with(&debian::candidate("busybox-static")?);
        let entry = cache::entry("kernel", key, |dir| build(&package, dir))?;
        Ok(Self { image: entry.join("vmlinux"), initramfs: entry.join("initramfs") })
    }
}

fn build(package: &str, dir: &Path) -> Result<()> {
    let tree = debian::unpack(package, dir)?;
    let release = package.trim_start_matches("linux-image-");
    decompress(&tree.join(format!("boot/vmlinuz-{release}")), &dir.join("vmlinux"))?;

    let modules = tree.join(format!("lib/modules/{release}/kernel"));
    let busybox = debian::unpack("busybox-static", dir)?;
    fs::write(dir.join("initramfs"), initramfs(&modules, &busybox.join("bin/busybox"))?)?;

    fs::remove_dir_all(tree)?;
    fs::remove_dir_all(busybox)?;
    Ok(())
}

fn initramfs(modules: &Path, busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for path in ["bin", "dev", "modules", "newroot", "proc", "sys", "tmp"] {
        archive.directory(path);
    }
    archive.program("bin/busybox", &read(busybox)?);
    archive.program("bin/fetch", FETCH.as_bytes());
    archive.program("init", INIT.as_bytes());
    let mut order = String::new();
    for module in MODULES {
        let file = modules.join(format!("{module}.ko"));
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.file(&format!("modules/{name}.ko"), &read(&file)?);
        order.extend([name, "\n"]);
    }
    archive.file("modules/order", order.as_bytes());
    Ok(archive.finish())
}

/// Extracts the ELF kernel from a bzImage (Documentation/arch/x86/boot.rst: `setup_sects`,
/// `payload_offset`, `payload_length`). The payload ends with its unpacked size.
fn decompress(bzimage: &Path, vmlinux: &Path) -> Result<()> {
    let image = read(bzimage)?;
    let fault = || format!("{} is not a bzImage with a payload", bzimage.display());
    let word = |at: usize| {
        let bytes = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).with_context(fault)?;
        usize::try_from(u32::from_le_bytes(bytes)).with_context(fault)
    };
    let setup_sectors = usize::from(*image.get(0x1f1).with_context(fault)?);
    let start = (setup_sectors + 1) * 512 + word(0x248)?;
    let end = start + word(0x24c)? - 4;
    let compressed = image.get(start..end).with_context(fault)?;

    let payload = vmlinux.with_extension("lz4");
    fs::write(&payload, compressed).with_context(|| format!("write {}", payload.display()))?;
    debian::run(Command::new("lz4").args(["-d", "-q"]).arg(&payload).arg(vmlinux))?;
    fs::remove_file(&payload).with_context(|| format!("remove {}", payload.display()))?;
    let size = fs::metadata(vmlinux).with_context(|| format!("stat {}", vmlinux.display()))?.len();
    let announced = u64::try_from(word(end)?)?;
    ensure!(size == announced, "{} unpacks to {size} bytes, not {announced}", bzimage.display());
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
