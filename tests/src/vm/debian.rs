//! Debian packages as material for images: downloaded and unpacked, never installed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::cache::{self, Key};

/// Runs a tool to its end and returns its standard output. An error contains its output.
pub fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("start {command:?}"))?;
    let errors = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} failed ({}):\n{}", output.status, errors.trim_end());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns a command that is killed after five minutes, for example if a mirror stalls.
pub fn limited(program: &str) -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=5", "300", program]);
    command
}

/// Returns the version of `package` that apt would install here.
pub fn candidate(package: &str) -> Result<String> {
    Suite::of_this_machine().candidate(package)
}

/// Returns the first dependency of `package`, which is the package behind a metapackage.
pub fn first_dependency(package: &str) -> Result<String> {
    Suite::of_this_machine().first_dependency(package)
}

/// Downloads `package` into `dir`, unpacks it there and returns the tree.
pub fn unpack(package: &str, dir: &Path) -> Result<PathBuf> {
    Suite::of_this_machine().unpack(package, dir)
}

/// Package sources, as options of apt.
pub struct Suite(Vec<String>);

impl Suite {
    /// Returns the sources that this machine is configured for.
    pub fn of_this_machine() -> Self {
        Self(Vec::new())
    }

    /// Returns Debian 11 with our own package lists, which are fetched once. Its packages will move
    /// from the mirrors to the archive.
    pub fn bullseye() -> Result<Self> {
        const MIRRORS: [&[&str]; 2] = [
            &["deb.debian.org/debian bullseye main", "deb.debian.org/debian-security bullseye-security main"],
            &["archive.debian.org/debian bullseye main"],
        ];
        let entry = cache::entry("apt-bullseye", Key::new().with("1"), |dir| {
            for folder in ["lists/partial", "cache/archives/partial"] {
                std::fs::create_dir_all(dir.join(folder))?;
            }
            let mut fault = None;
            for mirror in MIRRORS {
                let source = |line: &&str| {
                    format!("deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://{line}\n")
                };
                std::fs::write(dir.join("sources.list"), mirror.iter().map(source).collect::<String>())?;
                // The lists of an archive have expired.
                let strict =
                    ["-o", "APT::Update::Error-Mode=any", "-o", "Acquire::Check-Valid-Until=false", "-q"];
                let update = run(limited("apt-get").args(&Self::in_folder(dir).0).args(strict).arg("update"));
                match update {
                    Ok(_) => return Ok(()),
                    Err(error) => fault = Some(error),
                }
            }
            fault.map_or(Ok(()), |fault| {
                Err(fault.context("no mirror offers Debian 11, whose kernel is 5.10"))
            })
        })?;
        Ok(Self::in_folder(&entry))
    }

    fn in_folder(folder: &Path) -> Self {
        let folder = folder.display();
        let options = [
            format!("Dir::Etc::SourceList={folder}/sources.list"),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            "Dir::State::status=/dev/null".to_owned(),
            format!("Dir::State::Lists={folder}/lists"),
            format!("Dir::Cache={folder}/cache"),
            "APT::Sandbox::User=root".to_owned(),
        ];
        Self(options.into_iter().flat_map(|option| ["-o".to_owned(), option]).collect())
    }

    /// Returns the version of `package` that apt would install.
    pub fn candidate(&self, package: &str) -> Result<String> {
        let policy = run(self.command("apt-cache").args(["policy", package]))?;
        let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "));
        match version {
            None | Some("(none)") => {
                bail!("apt does not know the package {package}; `apt-get update` may help")
            }
            Some(version) => Ok(version.to_owned()),
        }
    }

    /// Returns the first dependency of `package`, which is the package behind a metapackage.
    pub fn first_dependency(&self, package: &str) -> Result<String> {
        let depends = run(self.command("apt-cache").args(["depends", package]))?;
        let dependency = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(dependency.with_context(|| format!("{package} has no dependency: {depends}"))?.to_owned())
    }

    /// Downloads `package` into `dir`, unpacks it there and returns the tree.
    pub fn unpack(&self, package: &str, dir: &Path) -> Result<PathBuf> {
        let tree = dir.join(package);
        std::fs::create_dir(&tree).with_context(|| format!("create {}", tree.display()))?;
        // apt's sandbox user cannot write here and reports it at length.
        let sandbox = ["-o", "APT::Sandbox::User=root", "-q"];
        run(limited("apt-get").args(&self.0).args(sandbox).args(["download", package]).current_dir(&tree))?;
        let archive = std::fs::read_dir(&tree)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension() == Some(OsStr::new("deb")))
            .with_context(|| format!("apt-get downloaded no archive of {package}"))?;
        run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&tree))?;
        std::fs::remove_file(&archive).with_context(|| format!("remove {}", archive.display()))?;
        Ok(tree)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.args(&self.0).env("LC_ALL", "C");
        command
    }
}
