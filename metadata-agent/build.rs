//! Builds the BPF objects and copies them to `OUT_DIR`, where `datapath/programs.rs` finds them.

#[path = "build/bpf_toolchain.rs"]
mod bpf_toolchain;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "bpfel-unknown-none";
/// Objects that `datapath/programs.rs` embeds.
const OBJECTS: [&str; 2] = ["datapath", "dispatcher"];

fn main() -> Result<(), Box<dyn Error>> {
    let package = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let workspace = package.parent().ok_or("the package has no parent folder")?;
    for path in ["metadata-ebpf/src", "metadata-ebpf/Cargo.toml", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(path).display());
    }
    println!("cargo::rerun-if-changed=build");
    for name in bpf_toolchain::OVERRIDES {
        println!("cargo::rerun-if-env-changed={name}");
    }

    let out = PathBuf::from(env::var("OUT_DIR")?);
    let folder = build_objects(workspace, &out)?;
    for object in OBJECTS {
        fs::copy(folder.join(object), out.join(object).with_extension("o"))?;
    }
    Ok(())
}

/// Builds the objects and returns their folder.
fn build_objects(workspace: &Path, out: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let toolchain = bpf_toolchain::find().ok_or(
        "no compiler with the source of `core` for the BPF target (Debian: rustc-web, cargo-web, rust-web-src): \
         run `cargo xtask setup`",
    )?;
    let features = if env::var_os("CARGO_FEATURE_TRACE_LOG").is_some() { "trace-log" } else { "program" };
    let mut cargo = Command::new(&toolchain.cargo);
    // Remove the variables that cargo set for this build script: they describe another compiler and
    // another target.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let is_from_cargo =
            ["CARGO_", "RUSTC", "RUSTFLAGS", "RUSTDOC"].iter().any(|prefix| text.starts_with(prefix));
        if is_from_cargo && text != "CARGO_HOME" {
            cargo.env_remove(&name);
        }
    }
    let status = cargo
        .current_dir(workspace)
        .env("RUSTC", &toolchain.rustc)
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", "-Clinker=bpf-linker\x1f-Cdebuginfo=2\x1f-Clink-arg=--btf")
        .args(["build", "--quiet", "--locked", "--package", "metadata-ebpf", "--bins"])
        .args(["--profile", "bpf", "--target", TARGET, "-Zbuild-std=core"])
        .args(["--features", features, "--target-dir"])
        .arg(out.join("bpf-target"))
        .status()?;
    if !status.success() {
        return Err(format!(
            "{} could not build the BPF programs ({status}). If bpf-linker is missing, run `cargo xtask setup`",
            toolchain.cargo.display()
        )
        .into());
    }
    Ok(out.join("bpf-target").join(TARGET).join("bpf"))
}
