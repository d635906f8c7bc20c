//! `cargo xtask setup`: from what is missing to the commands that provide it, and those commands run or printed.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::command::Invocation;
use crate::probe::{Host, Probe};
use crate::requirements::{Provider, Requirement, Scope, missing};

/// Whether to speak when there is nothing to do.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Report {
    /// The user asked for the set-up itself.
    Always,
    /// The set-up is the first step of something else.
    OnlyChanges,
}

/// Makes sure that this machine has what `scope` needs.
///
/// # Errors
/// When something is missing and cannot be installed from here, or an installation fails.
pub fn setup(scope: Scope, report: Report) -> Result<()> {
    let lacking = missing(scope, &Host);
    if lacking.is_empty() {
        if report == Report::Always {
            println!("setup: everything is here");
        }
        return Ok(());
    }
    eprintln!("setup: missing on this machine:");
    for row in &lacking {
        eprintln!("  {}: {}", row.what, row.why);
    }
    let commands = commands(&lacking);
    if let Some(obstacle) = obstacle(&Host) {
        eprintln!("setup: {obstacle}; as root on Debian 12 the commands are:");
        for command in &commands {
            eprintln!("  {command}");
        }
        bail!("{} of the requirements are missing", lacking.len());
    }
    eprintln!("setup: installing it:");
    for command in &commands {
        command.run()?;
    }
    let still: Vec<_> = missing(scope, &Host).iter().map(|row| row.what).collect();
    if !still.is_empty() {
        bail!("installed without an error, and still missing: {}", still.join(", "));
    }
    Ok(())
}

/// Why nothing can be installed from here.
fn obstacle(probe: &impl Probe) -> Option<&'static str> {
    if !probe.is_debian_12() {
        Some("this is not Debian 12, whose packages the project knows")
    } else if !probe.is_root() {
        Some("only root can install packages")
    } else {
        None
    }
}

/// What provides the missing things: Debian's packages in one go, then what leans on them.
fn commands(lacking: &[&Requirement]) -> Vec<Invocation> {
    let mut packages: BTreeSet<&str> = BTreeSet::new();
    let mut others = Vec::new();
    for row in lacking {
        match row.provider {
            Provider::Debian(names) => packages.extend(names),
            Provider::Rustup(component) => {
                others.push(Invocation::new(["rustup", "component", "add", component]));
            }
            Provider::Crate(arguments, environment) => {
                let install = Invocation::cargo(["install"]).args(arguments.iter().copied());
                others.push(
                    environment.iter().fold(install, |install, (name, value)| install.env(name, *value)),
                );
            }
        }
    }
    let mut commands = Vec::new();
    if !packages.is_empty() {
        let install = ["apt-get", "install", "--yes", "--no-install-recommends"];
        commands.push(Invocation::new(["apt-get", "update"]));
        let install = Invocation::new(install).args(packages).env("DEBIAN_FRONTEND", "noninteractive");
        // Servers among the packages are for the tests to start: systemctl(1) then starts nothing.
        commands.push(install.env("SYSTEMD_OFFLINE", "1"));
    }
    commands.extend(others);
    commands
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requirements::tests::{FakeProbe, complete};

    fn typed(probe: &FakeProbe, scope: Scope) -> Vec<String> {
        commands(&missing(scope, probe)).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn nothing_missing_means_nothing_done() {
        assert_eq!(typed(&complete(), Scope::Test), [""; 0]);
    }

    #[test]
    fn debian_packages_come_in_one_go_and_before_what_is_built_with_them() {
        let mut probe = complete();
        probe.answers.retain(|(words, _)| words[0] != "bpf-linker");
        probe.files.retain(|file| !file.starts_with("/usr/lib/llvm-22"));
        probe.programs.remove("ethtool");
        assert_eq!(
            typed(&probe, Scope::Test),
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
    fn apt_is_left_alone_when_no_package_is_missing() {
        let mut probe = complete();
        probe.answers.retain(|(words, _)| words[1] != "clippy");
        assert_eq!(typed(&probe, Scope::Test), ["rustup component add clippy"]);
    }

    #[test]
    fn only_root_on_debian_12_installs() {
        let machine = |debian_12, root| FakeProbe { debian_12, root, ..FakeProbe::default() };
        assert_eq!(obstacle(&machine(true, true)), None);
        assert!(obstacle(&machine(true, false)).is_some_and(|text| text.contains("root")));
        assert!(obstacle(&machine(false, true)).is_some_and(|text| text.contains("Debian 12")));
    }
}
