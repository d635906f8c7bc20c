//! Finds the compiler for the BPF programs.
//!
//! The BPF target has no prebuilt `core`, so the compiler needs the source of its standard library.
//! rustup's stable toolchain lacks it by default, and aya-build always prefers rustup.

use std::path::{Path, PathBuf};
use std::process::Command;

/// A cargo and a rustc of the same release, with the source of `core`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BpfToolchain {
    pub cargo: PathBuf,
    pub rustc: PathBuf,
}

/// Environment variables that select another pair.
pub const OVERRIDES: [&str; 2] = ["METADATA_BPF_CARGO", "METADATA_BPF_RUSTC"];

/// Finds a pair with the source of `core`: Debian's rustc-web with rust-web-src, or else a rustup
/// nightly with rust-src. If [`OVERRIDES`] select a pair, no other is considered.
pub fn find() -> Option<BpfToolchain> {
    candidates().into_iter().find(|toolchain| has_core_source(&toolchain.rustc))
}

fn candidates() -> Vec<BpfToolchain> {
    let [cargo, rustc] = OVERRIDES.map(|name| std::env::var_os(name).map(PathBuf::from));
    if let (Some(cargo), Some(rustc)) = (cargo, rustc) {
        return vec![BpfToolchain { cargo, rustc }];
    }
    let debian = BpfToolchain { cargo: "/usr/bin/cargo".into(), rustc: "/usr/bin/rustc".into() };
    let nightly = ["cargo", "rustc"].map(|tool| {
        output(Command::new("rustup").args(["which", "--toolchain", "nightly", tool])).map(PathBuf::from)
    });
    let [cargo, rustc] = nightly;
    let nightly = cargo.zip(rustc).map(|(cargo, rustc)| BpfToolchain { cargo, rustc });
    std::iter::once(debian).chain(nightly).collect()
}

fn has_core_source(rustc: &Path) -> bool {
    let sysroot = output(Command::new(rustc).args(["--print", "sysroot"]));
    sysroot.is_some_and(|root| Path::new(&root).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists())
}

fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}
