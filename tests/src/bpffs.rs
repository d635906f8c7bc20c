//! A BPF file system of one's own, so that pins of a test are nobody else's and vanish with it.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted BPF file system; unmounted on drop, which drops what was pinned there.
#[derive(Debug)]
pub struct Bpffs {
    path: PathBuf,
}

impl Bpffs {
    /// Mounts one at `path`, which is made for it.
    pub fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap_or_else(|e| panic!("make {}: {e}", path.display()));
        mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|e| panic!("mount a BPF file system at {}: {e}", path.display()));
        Self { path: path.to_owned() }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        if let Err(e) = umount2(&self.path, MntFlags::MNT_DETACH) {
            eprintln!("unmount {}: {e}", self.path.display());
        }
    }
}
