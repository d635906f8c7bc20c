//! Starting other programs, always in sight: each is printed as it could be typed, and its failure names it.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// One program with its arguments and additions to the environment, at the workspace's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    words: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Invocation {
    /// A program and its arguments.
    pub fn new<I: IntoIterator<Item: Into<String>>>(words: I) -> Self {
        Self { words: words.into_iter().map(Into::into).collect(), environment: Vec::new() }
    }

    /// The cargo that runs this tool.
    pub fn cargo<I: IntoIterator<Item: Into<String>>>(arguments: I) -> Self {
        Self::new(["cargo"]).args(arguments)
    }

    /// Adds arguments.
    pub fn args<I: IntoIterator<Item: Into<String>>>(mut self, arguments: I) -> Self {
        self.words.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Adds one variable to the environment.
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Prints it and runs it to its end.
    ///
    /// # Errors
    /// When the program cannot be started or does not exit with 0.
    pub fn run(&self) -> Result<()> {
        eprintln!("+ {self}");
        let status = self.command()?.status().with_context(|| format!("start `{self}`"))?;
        if !status.success() {
            bail!("`{self}` failed: {status}");
        }
        Ok(())
    }

    /// Runs it to its end without printing it, and returns what it wrote to its standard output.
    ///
    /// # Errors
    /// When the program cannot be started or does not exit with 0.
    pub fn output(&self) -> Result<String> {
        let output = self
            .command()?
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("start `{self}`"))?;
        if !output.status.success() {
            bail!("`{self}` failed: {}", output.status);
        }
        String::from_utf8(output.stdout).with_context(|| format!("read the output of `{self}`"))
    }

    /// Prints it and becomes it, so that signals go straight to the program.
    ///
    /// # Errors
    /// Returns only when the program cannot be started.
    pub fn exec(&self) -> Result<()> {
        eprintln!("+ {self}");
        Err(self.command()?.exec()).with_context(|| format!("start `{self}`"))
    }

    fn command(&self) -> Result<Command> {
        let [program, arguments @ ..] = self.words.as_slice() else { bail!("an empty command") };
        let mut command = match program.as_str() {
            "cargo" => cargo(),
            _ => Command::new(program),
        };
        command.args(arguments).current_dir(workspace_root());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

/// As a shell would take it.
impl fmt::Display for Invocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.environment {
            write!(f, "{name}={} ", quoted(value))?;
        }
        for (position, word) in self.words.iter().enumerate() {
            let gap = if position == 0 { "" } else { " " };
            write!(f, "{gap}{}", quoted(word))?;
        }
        Ok(())
    }
}

/// The folder of the workspace's `Cargo.toml`.
pub fn workspace_root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_path_buf()
}

/// Where cargo puts what it builds, seen from the workspace's root or absolute.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

/// The cargo that started this tool, without what cargo told us about this very package: a `build.rs` or a
/// second toolchain further down would take it for its own.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").as_deref().unwrap_or(OsStr::new("cargo")));
    for (name, _) in std::env::vars_os() {
        if name.to_str().is_some_and(|name| name.starts_with("CARGO_PKG_") || name == "CARGO_MANIFEST_DIR") {
            command.env_remove(name);
        }
    }
    command
}

fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_as_one_would_type_it() {
        let invocation = Invocation::cargo(["build", "--target", "x"]).env("RUSTFLAGS", "-C a=b");
        assert_eq!(invocation.to_string(), "RUSTFLAGS='-C a=b' cargo build --target x");
        assert_eq!(Invocation::new(["echo", "it's", ""]).to_string(), r"echo 'it'\''s' ''");
    }

    #[test]
    fn a_failure_names_the_command() {
        let error = Invocation::new(["sh", "-c", "exit 3"]).output().unwrap_err().to_string();
        assert!(error.contains("sh -c 'exit 3'") && error.contains('3'), "{error}");
    }

    #[test]
    fn additions_to_the_environment_reach_the_program() {
        let invocation = Invocation::new(["sh", "-c", "printf %s \"$MD_XTASK\""]).env("MD_XTASK", "here");
        assert_eq!(invocation.output().unwrap(), "here");
    }
}
