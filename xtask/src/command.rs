//! Starts other programs. Each is printed as a user could type it, and a failure names it.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use crate::terminal::note;
use anyhow::{Context, Result, bail};

/// A program with its arguments and additional environment variables. It runs in the workspace
/// root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    words: Vec<String>,
    environment: Vec<(String, String)>,
}

impl Invocation {
    pub fn new<I: IntoIterator<Item: Into<String>>>(words: I) -> Self {
        Self { words: words.into_iter().map(Into::into).collect(), environment: Vec::new() }
    }

    /// Starts the same cargo that started this tool.
    pub fn cargo<I: IntoIterator<Item: Into<String>>>(arguments: I) -> Self {
        Self::new(["cargo"]).args(arguments)
    }

    pub fn args<I: IntoIterator<Item: Into<String>>>(mut self, arguments: I) -> Self {
        self.words.extend(arguments.into_iter().map(Into::into));
        self
    }

    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.environment.push((name.to_owned(), value.into()));
        self
    }

    /// Prints the command line and waits for the program to exit.
    ///
    /// # Errors
    /// Fails if the program cannot be started or does not exit with 0.
    pub fn run(&self) -> Result<()> {
        note(format_args!("+ {self}"));
        let status = self.command()?.status().with_context(|| format!("start `{self}`"))?;
        self.succeeded(status)
    }

    /// Waits for the program to exit. The command line and all output go to `log`.
    ///
    /// # Errors
    /// Fails if the log cannot be written, or the program cannot be started or does not exit with
    /// 0.
    pub fn run_logged(&self, mut log: &File) -> Result<()> {
        writeln!(log, "+ {self}").context("write the log")?;
        let status = self
            .command()?
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("share the log")?)
            .stderr(log.try_clone().context("share the log")?)
            .status()
            .with_context(|| format!("start `{self}`"))?;
        self.succeeded(status)
    }

    /// Waits for the program to exit and returns its standard output. Prints nothing.
    ///
    /// # Errors
    /// Fails if the program cannot be started, does not exit with 0 or prints invalid UTF-8.
    pub fn output(&self) -> Result<String> {
        let output = self
            .command()?
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("start `{self}`"))?;
        self.succeeded(output.status)?;
        String::from_utf8(output.stdout).with_context(|| format!("read the output of `{self}`"))
    }

    /// Prints the command line and replaces this process by the program, which then receives all
    /// signals itself.
    ///
    /// # Errors
    /// Returns only if the program cannot be started.
    pub fn exec(&self) -> Result<()> {
        note(format_args!("+ {self}"));
        Err(self.command()?.exec()).with_context(|| format!("start `{self}`"))
    }

    fn succeeded(&self, status: ExitStatus) -> Result<()> {
        if !status.success() {
            bail!("`{self}` failed: {status}");
        }
        Ok(())
    }

    fn command(&self) -> Result<Command> {
        let [program, arguments @ ..] = self.words.as_slice() else { bail!("an empty command") };
        let mut command = match program.as_str() {
            "cargo" => cargo(),
            _ => Command::new(lint_tool(program).as_deref().unwrap_or(Path::new(program))),
        };
        command.args(arguments).current_dir(workspace_root());
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }
}

/// Formats the command line with the quotes that a shell needs.
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

/// Folder of the workspace's `Cargo.toml`.
pub fn workspace_root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_path_buf()
}

/// Folder for cargo's output: absolute, or relative to the workspace root.
pub fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| PathBuf::from("target"), PathBuf::from)
}

/// Folder for everything that this tool itself installs and writes. `cargo clean` removes it.
pub fn tool_dir() -> PathBuf {
    workspace_root().join(target_dir()).join("xtask")
}

/// Virtual environment of the lint tools that come from PyPI.
pub fn lint_tools_dir() -> PathBuf {
    tool_dir().join("lint-tools")
}

/// Path of a program in [`lint_tools_dir`], if it is installed there. It takes precedence over a
/// program on the PATH, which may have another version.
pub fn lint_tool(program: &str) -> Option<PathBuf> {
    let path = lint_tools_dir().join("bin").join(program);
    (!program.contains('/') && path.is_file()).then_some(path)
}

/// Starts the cargo that started this tool, without the variables that describe this package. A
/// build script or a second toolchain would take them for its own.
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
    fn a_command_line_is_printed_as_typed() {
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
    fn a_log_holds_the_command_line_and_its_output() {
        let path = std::env::temp_dir().join(format!("xtask-run-logged-{}", std::process::id()));
        let log = File::create(&path).unwrap();
        Invocation::new(["sh", "-c", "echo out; echo err >&2"]).run_logged(&log).unwrap();
        assert!(Invocation::new(["sh", "-c", "exit 3"]).run_logged(&log).is_err());
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(text, "+ sh -c 'echo out; echo err >&2'\nout\nerr\n+ sh -c 'exit 3'\n");
    }

    #[test]
    fn lint_tools_are_found_by_name_alone() {
        assert_eq!(lint_tool("no-such-tool-here"), None);
        assert_eq!(lint_tool("/bin/sh"), None);
    }

    #[test]
    fn environment_variables_reach_the_program() {
        let invocation = Invocation::new(["sh", "-c", "printf %s \"$MD_XTASK\""]).env("MD_XTASK", "here");
        assert_eq!(invocation.output().unwrap(), "here");
    }
}
