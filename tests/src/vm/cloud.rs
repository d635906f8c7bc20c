//! A Debian guest with cloud-init: its image, its boot, and its report before it powers off.
//!
//! The image contains Debian's packages and the files of `tests/vm`, nothing of this machine. It is
//! never written to: each guest gets a temporary layer above it.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::debian;
use super::guest::Kernel;
use super::hex;
use super::qemu::{Machine, Nic, Offloads, Qemu};
use crate::cache::{self, Key};
use crate::port::Port;
use crate::topology::Network;

const SUITE: &str = "bookworm";
const PACKAGES: &[&str] =
    &["cloud-init", "dbus", "ifupdown", "iproute2", "isc-dhcp-client", "systemd-sysv", "udev"];
const REPORT: &str = include_str!("../../vm/report.sh");
const SERVICE: &str = include_str!("../../vm/report.service");
const TARGET: &str = include_str!("../../vm/report.target");
const CONFIG: &str = include_str!("../../vm/cloud.cfg");
/// To be incremented when this file changes the image.
const RECIPE: &str = "1";
const IMAGE_SIZE: &str = "1G";

/// 21 s on an idle machine with two cores.
const BOOT: Duration = Duration::from_mins(3);

/// The results of cloud-init in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CloudReport {
    /// Output of `cloud-init status --long`.
    pub status: String,
    pub hostname: String,
    pub instance_id: String,
    /// `authorized_keys` of the default user.
    pub authorized_keys: String,
    /// Content of [`CloudVm::EFFECT`].
    pub user_data_effect: String,
    /// `cloud-init.log` without debug lines: warnings, errors and milestones.
    pub log: String,
}

/// A guest that configures itself from the metadata service.
pub struct CloudVm {
    qemu: Qemu,
}

impl CloudVm {
    /// The file that user data must write for [`CloudReport::user_data_effect`].
    pub const EFFECT: &str = "/var/lib/user-data-effect";

    /// Starts the guest on its own port. It requests an address by DHCP and metadata at once, so
    /// both services must be running.
    ///
    /// # Errors
    /// Returns an error if the images cannot be built or qemu cannot be started.
    pub fn start(network: &Network, port: &Port) -> Result<Self> {
        let drive = format!("if=none,id=root,format=raw,snapshot=on,file={}", root_image()?.display());
        let extra = [
            "-drive",
            &drive,
            "-device",
            "virtio-blk-pci,drive=root",
            // cloud-init's ds-identify recognises OpenStack by the product name.
            "-smbios",
            "type=1,manufacturer=OpenStack Foundation,product=OpenStack Nova",
        ]
        .map(str::to_owned);
        let boot = "ROOT=/dev/vda rw systemd.unit=report.target";
        let nic = Nic::plug(network, port, Offloads::On);
        Ok(Self {
            qemu: Qemu::start(
                &Kernel::prepare()?,
                Some(&nic),
                &Machine { memory_mib: 512, boot, extra: &extra },
            )?,
        })
    }

    /// Waits until the guest has powered off.
    ///
    /// # Errors
    /// Returns an error if that takes longer than three minutes or the report is incomplete.
    pub fn report(self) -> Result<CloudReport> {
        let deadline = Instant::now() + BOOT;
        let mut reports = HashMap::new();
        while let Some(line) = self.qemu.line(deadline)? {
            let (name, content) = line.split_once(' ').unwrap_or((&line, ""));
            let content = hex::decode(content);
            let content =
                content.with_context(|| format!("the guest's report of {name} is not hexadecimal"))?;
            reports.insert(name.to_owned(), String::from_utf8_lossy(&content).trim_end().to_owned());
        }
        let mut take = |name: &str| {
            reports
                .remove(name)
                .ok_or_else(|| self.qemu.fault(&format!("the guest powered off without {name}")))
        };
        Ok(CloudReport {
            status: take("status")?,
            hostname: take("hostname")?,
            instance_id: take("instance-id")?,
            authorized_keys: take("authorized-keys")?,
            user_data_effect: take("user-data-effect")?,
            log: take("log")?,
        })
    }
}

/// Returns the root file system from the cache, or builds it.
pub fn root_image() -> Result<PathBuf> {
    let mut key = Key::new().with(RECIPE).with(SUITE).with(IMAGE_SIZE);
    for content in [REPORT, SERVICE, TARGET, CONFIG] {
        key = key.with(content);
    }
    for package in PACKAGES {
        key = key.with(package).with(&debian::candidate(package)?);
    }
    Ok(cache::entry("cloud-root", key, build)?.join("root.ext4"))
}

fn build(dir: &Path) -> Result<()> {
    let root = dir.join("root");
    let include = format!("--include={}", PACKAGES.join(","));
    debian::run(
        debian::limited("mmdebstrap")
            .args(["--quiet", "--mode=root", "--variant=apt", &include])
            .args(["doc", "locale", "man"].map(|tree| format!("--dpkgopt=path-exclude=/usr/share/{tree}/*")))
            .arg(SUITE)
            .arg(&root),
    )?;
    furnish(&root)?;
    debian::run(
        debian::limited("mkfs.ext4")
            .args(["-q", "-F", "-O", "^has_journal", "-d"])
            .args([&root, &dir.join("root.ext4")])
            .arg(IMAGE_SIZE),
    )?;
    fs::remove_dir_all(&root).with_context(|| format!("remove {}", root.display()))
}

fn furnish(root: &Path) -> Result<()> {
    let files = [
        ("usr/local/sbin/report", REPORT, 0o755),
        ("etc/systemd/system/report.service", SERVICE, 0o644),
        ("etc/systemd/system/report.target", TARGET, 0o644),
        ("etc/cloud/cloud.cfg.d/99-guest.cfg", CONFIG, 0o644),
        // mmdebstrap copies both from the host. With a resolver, cloud-init waits 30 s for it.
        ("etc/resolv.conf", "", 0o644),
        ("etc/hostname", "unnamed\n", 0o644),
    ];
    for (path, content, mode) in files {
        let path = root.join(path);
        fs::write(&path, content)
            .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(mode)))
            .with_context(|| format!("write {}", path.display()))?;
    }
    // They start in the middle of the boot and search the network for updates.
    for timer in ["apt-daily.timer", "apt-daily-upgrade.timer"] {
        let mask = root.join("etc/systemd/system").join(timer);
        symlink("/dev/null", &mask).with_context(|| format!("mask {}", mask.display()))?;
    }
    Ok(())
}
