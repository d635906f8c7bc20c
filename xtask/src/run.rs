//! `cargo xtask run`: starts the agent on this host if there is a configuration for it, and in a
//! lab otherwise.

use std::path::Path;

use anyhow::Result;

use crate::command::{Invocation, target_dir};
use crate::requirements::Scope;
use crate::setup::{Report, setup};
use crate::terminal::note;

/// The files that the agent reads if the command line names none.
const NEUTRON_FILES: [&str; 4] = [
    "/etc/neutron/neutron.conf",
    "/etc/neutron/metadata_agent.ini",
    "/etc/neutron/neutron_ovn_metadata_agent.ini",
    "/etc/neutron/plugins/ml2/ovn_agent.ini",
];

/// The program that `run` starts.
#[derive(Debug, PartialEq, Eq)]
enum Target {
    /// The agent on this host, with these arguments after `run`.
    Agent(Vec<String>),
    /// The lab around the agent, with these arguments for the agent.
    Lab(Vec<String>),
}

/// Builds a program and replaces this process by it. cargo reports the progress of the builds.
///
/// # Errors
/// Fails if the set-up or a build fails, or the program cannot be started.
pub fn run(args: Vec<String>) -> Result<()> {
    setup(Scope::Build, Report::OnlyChanges)?;
    let release = target_dir().join("release");
    let agent = release.join("metadata-agent").display().to_string();
    let build = |package, binary| {
        let build = ["build", "--release", "--package", package, "--no-default-features"];
        Invocation::cargo(build).args(["--bin", binary]).run()
    };
    build("metadata-agent", "metadata-agent")?;
    match target(args, Path::exists) {
        Target::Agent(args) => Invocation::new([agent.as_str(), "run"]).args(args).exec(),
        Target::Lab(args) => {
            note("no --config-file, and no Neutron configuration in /etc/neutron: starting the lab");
            build("metadata-tests", "lab")?;
            let lab = Invocation::new([release.join("lab").display().to_string()]).args(["--agent", &agent]);
            if args.is_empty() { lab.exec() } else { lab.args(["--"]).args(args).exec() }
        }
    }
}

fn target(args: Vec<String>, exists: impl Fn(&Path) -> bool) -> Target {
    let names_config = |arg: &String| {
        ["--config-file", "--config-dir"]
            .iter()
            .any(|flag| arg.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('=')))
    };
    if args.iter().any(names_config) || NEUTRON_FILES.map(Path::new).into_iter().any(exists) {
        Target::Agent(args)
    } else {
        Target::Lab(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_named_configuration_means_the_agent() {
        for args in ["--config-file a.ini --x", "--x --config-dir=/d"] {
            assert_eq!(target(words(args), |_| false), Target::Agent(words(args)));
        }
    }

    #[test]
    fn a_neutron_file_means_the_agent() {
        let ovn = |path: &Path| path.ends_with("neutron_ovn_metadata_agent.ini");
        assert_eq!(target(words("--x"), ovn), Target::Agent(words("--x")));
    }

    #[test]
    fn no_configuration_means_the_lab() {
        assert_eq!(target(words("--config-filer x"), |_| false), Target::Lab(words("--config-filer x")));
    }
}
