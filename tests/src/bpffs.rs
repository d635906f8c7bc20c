//! A private BPF file system. Pins in it cannot collide with others and vanish with it.

use std::fs;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A mounted BPF file system. It is unmounted on drop, which removes its pins.
#[derive(Debug)]
pub struct Bpffs {
    path: PathBuf,
}

impl Bpffs {
    /// Creates `path` and mounts a BPF file system there.
    pub fn mount(path: &Path) -> Self {
        fs::create_dir_all(path).unwrap_or_else(|e| panic!("make {}: {e}", path.display()));
        mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|e| panic!("mount a BPF file system at {}: {e}", path.display()));
        Self { path: path.to_owned() }
    }

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
