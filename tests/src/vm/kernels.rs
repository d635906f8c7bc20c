//! Kernels on which the programs must load: Debian's own packages, booted without a disk or a
//! network card to run the calling test program inside.
//!
//! Debian 12 provides 6.1 and 6.12. Linux 5.10, the oldest with `bpf_redirect_peer`, is from Debian
//! 11. Its packages are looked up in separate lists, and the machine's package sources stay
//! unchanged.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::cpio::Archive;
use super::debian::{self, Suite};
use super::guest::Kernel;
use super::qemu::{Machine, Qemu};
use crate::agent;
use crate::cache::{self, Key};

const INIT: &str = include_str!("../../vm/kernel-init");
/// To be incremented when this file changes the result.
const RECIPE: &str = "1";

/// In load order: each depends only on earlier ones.
const MODULES: &[&str] = &[
    "net/llc/llc",
    "net/802/stp",
    "net/bridge/bridge",
    "drivers/net/veth",
    "drivers/net/tun",
    "net/sched/sch_ingress",
    "net/sched/cls_bpf",
];

/// Programs of this machine that the rig runs.
const TOOLS: &[&str] = &["/usr/sbin/ip", "/usr/sbin/ethtool", "/usr/bin/nsenter"];

/// Emulated, on a machine with busy cores.
const RUN: Duration = Duration::from_mins(6);

pub struct KernelUnderTest {
    kernel: Kernel,
    package: String,
}

impl KernelUnderTest {
    /// Prepares the kernel of a metapackage of Debian 12 or, with `bullseye`, of Debian 11.
    ///
    /// # Errors
    /// Returns an error if the package cannot be downloaded.
    pub fn prepare(metapackage: &str, bullseye: bool) -> Result<Self> {
        let suite = if bullseye { Suite::bullseye()? } else { Suite::of_this_machine() };
        let package = suite.first_dependency(metapackage)?;
        let key = Key::new().with(RECIPE).with(INIT).with(&package).with(&suite.candidate(&package)?);
        let key = key.with(&debian::candidate("busybox-static")?);
        let entry = cache::entry(metapackage, key, |dir| build(&suite, &package, dir))?;
        let kernel = Kernel { image: entry.join("vmlinuz"), initramfs: entry.join("initramfs") };
        Ok(Self { kernel, package })
    }

    /// Boots the kernel, runs the current test program inside with these arguments, and returns its
    /// output. The output is also kept in `target/vm-kernels`, with the verifier's log for a
    /// rejected program.
    ///
    /// # Errors
    /// Returns an error if the program fails or takes longer than six minutes.
    pub fn run_this_test(&self, arguments: &str) -> Result<String> {
        let work = tempfile::tempdir().context("create a directory for the initramfs")?;
        // An initramfs may consist of several archives.
        let mut image = read(&self.kernel.initramfs)?;
        image.extend(rig(work.path(), arguments)?);
        let initramfs = work.path().join("initramfs");
        fs::write(&initramfs, image).with_context(|| format!("write {}", initramfs.display()))?;

        let kernel = Kernel { image: self.kernel.image.clone(), initramfs };
        let qemu =
            Qemu::start(&kernel, None, &Machine { memory_mib: 1024, boot: "rdinit=/init", extra: &[] })?;
        let deadline = Instant::now() + RUN;
        let mut output = String::new();
        let ended = loop {
            match qemu.line(deadline) {
                Ok(Some(line)) => output.extend([line.as_str(), "\n"]),
                Ok(None) => break Ok(()),
                Err(silent) => break Err(silent),
            }
        };
        let log = log_folder()?.join(format!("{}.log", self.package));
        fs::write(&log, &output).with_context(|| format!("write {}", log.display()))?;
        ended.with_context(|| output.clone())?;
        if output.lines().last() == Some("exit 0") {
            return Ok(output);
        }
        Err(qemu.fault(&format!("{}: the test failed, see {}:\n{output}", self.package, log.display())))
    }
}

fn log_folder() -> Result<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/vm-kernels");
    fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
    Ok(folder)
}

fn build(suite: &Suite, package: &str, dir: &Path) -> Result<()> {
    let tree = suite.unpack(package, dir)?;
    let busybox = debian::unpack("busybox-static", dir)?;
    let release = package.trim_start_matches("linux-image-");
    fs::copy(tree.join(format!("boot/vmlinuz-{release}")), dir.join("vmlinuz")).context("copy the kernel")?;

    let mut archive = Archive::default();
    for path in ["bin", "dev", "modules", "proc", "run", "sys", "tmp", "var"] {
        archive.directory(path);
    }
    archive.program("bin/busybox", &read(&busybox.join("bin/busybox"))?);
    archive.program("init", INIT.as_bytes());
    let mut order = String::new();
    for module in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        let file = tree.join(format!("lib/modules/{release}/kernel/{module}.ko"));
        archive.file(&format!("modules/{name}.ko"), &read_module(&file)?);
        order.extend([name, "\n"]);
    }
    archive.file("modules/order", order.as_bytes());
    fs::write(dir.join("initramfs"), archive.finish())?;
    fs::remove_dir_all(tree)?;
    fs::remove_dir_all(busybox)?;
    Ok(())
}

/// Debian compresses modules since 6.11.
fn read_module(file: &Path) -> Result<Vec<u8>> {
    if file.exists() {
        return read(file);
    }
    let compressed = file.with_extension("ko.xz");
    debian::run(Command::new("xz").arg("--decompress").arg(&compressed))?;
    read(file)
}

/// Builds the second archive: this program, the agent, the tools that both run, and the libraries
/// that the loader finds for them.
fn rig(work: &Path, arguments: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    let mut folders = Vec::new();
    let mut add = |archive: &mut Archive, from: &Path, to: &Path| -> Result<()> {
        let mut above: Vec<&Path> = to.ancestors().skip(1).filter(|path| *path != Path::new("/")).collect();
        above.reverse();
        for folder in above {
            if !folders.contains(&folder.to_owned()) {
                archive.directory(&name_of(folder)?);
                folders.push(folder.to_owned());
            }
        }
        archive.program(&name_of(to)?, &read(from)?);
        Ok(())
    };
    let test = std::env::current_exe().context("path of this executable")?;
    let agent = agent::binary();
    let mut libraries = Vec::new();
    for (program, to) in [(test.as_path(), "/rig/test"), (agent.as_path(), "/rig/metadata-agent")] {
        let stripped = work.join("stripped");
        debian::run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(program))?;
        add(&mut archive, &stripped, Path::new(to))?;
        libraries.extend(libraries_of(program)?);
    }
    for tool in TOOLS {
        add(&mut archive, Path::new(tool), Path::new(tool))?;
        libraries.extend(libraries_of(Path::new(tool))?);
    }
    libraries.sort();
    libraries.dedup();
    for library in &libraries {
        add(&mut archive, library, library)?;
    }
    archive.file("rig/arguments", arguments.as_bytes());
    Ok(archive.finish())
}

fn name_of(path: &Path) -> Result<String> {
    let name = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(name.trim_start_matches('/').to_owned())
}

/// Returns the paths that `ldd` lists: libraries and the loader itself.
fn libraries_of(program: &Path) -> Result<Vec<PathBuf>> {
    let listing = debian::run(Command::new("ldd").arg(program))?;
    let paths = listing.split_whitespace().filter(|word| word.starts_with('/'));
    let paths: Vec<PathBuf> = paths.map(|word| PathBuf::from(OsStr::new(word))).collect();
    ensure!(!paths.is_empty(), "ldd lists no library of {}: {listing}", program.display());
    Ok(paths)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}
