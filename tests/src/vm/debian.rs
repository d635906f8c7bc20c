//! Debian packages as material for images: looked up and unpacked, never installed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

/// Runs a tool to its end and gives its standard output; an error holds what it said.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed ({}):\n{}", output.status, said.trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A command that is ended when it takes longer than five minutes, which a stalled mirror does.
pub fn limited(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "300", program]);
    command
}

/// The version of `package` that apt would install.
pub fn candidate(package: &str) -> Result<String> {
    let policy = run(Command::new("apt-cache").args(["policy", package]).env("LC_ALL", "C"))?;
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
    match version {
        None | Some("(none)") => bail!("apt knows no package {package}; `apt-get update` may help"),
        Some(version) => Ok(version.to_owned()),
    }
}

/// The first dependency of `package`: what a metapackage stands for.
pub fn first_dependency(package: &str) -> Result<String> {
    let depends = run(Command::new("apt-cache").args(["depends", package]).env("LC_ALL", "C"))?;
    let dependency = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    Ok(dependency.with_context(|| format!("{package} depends on nothing: {depends}"))?.to_owned())
}

/// Downloads `package` into `dir` and unpacks it there; gives the tree.
pub fn unpack(package: &str, dir: &Path) -> Result<PathBuf> {
    let tree = dir.join(package);
    std::fs::create_dir(&tree).with_context(|| format!("create {}", tree.display()))?;
    // The sandbox user of apt may not write here, and says so at length.
    let sandbox = ["-o", "APT::Sandbox::User=root", "-q"];
    run(limited("apt-get").args(sandbox).args(["download", package]).current_dir(&tree))?;
    let archive = std::fs::read_dir(&tree)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension() == Some(OsStr::new("deb")))
        .with_context(|| format!("apt-get left no archive of {package}"))?;
    run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&tree))?;
    std::fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
    Ok(tree)
}
