//! `cargo xtask test`: the stages of testing, their requirements and their cargo commands.

use anyhow::Result;
use clap::ValueEnum;

use crate::command::{Invocation, target_dir, workspace_root};
use crate::lint;
use crate::preflight;
use crate::requirements::Scope;
use crate::setup::{Report, setup};

/// The stages that a command line selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Selection {
    /// Lints and the tests beside the code; needs no privilege
    Unit,
    /// Instructions and allocations per packet and per request; `-- --record` writes them down
    Instructions,
    /// The BPF programs, packet by packet, in the running kernel
    Packets,
    /// Scenarios with the agent in network namespaces
    Netns,
    /// Other kernels and real guests in virtual machines
    Vm,
    /// The unit, the manifest and the image
    Deploy,
    /// All of these
    All,
}

/// One stage of testing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Unit,
    Instructions,
    Packets,
    Netns,
    Vm,
    Deploy,
}

impl Stage {
    const ALL: [Self; 6] =
        [Self::Unit, Self::Instructions, Self::Packets, Self::Netns, Self::Vm, Self::Deploy];

    /// Returns the test target of `metadata-tests`, a folder of that name in `tests/tests`.
    const fn target(self) -> Option<&'static str> {
        match self {
            Self::Unit | Self::Instructions => None,
            Self::Packets => Some("packets"),
            Self::Netns => Some("netns"),
            Self::Vm => Some("vm"),
            Self::Deploy => Some("deploy"),
        }
    }

    /// Returns how many tests run at a time. Scenarios mostly wait. A virtual machine uses one
    /// processor. Image builds use all of the host by themselves.
    const fn threads(self) -> &'static str {
        match self {
            Self::Netns => "3",
            Self::Unit | Self::Instructions | Self::Packets | Self::Vm => "2",
            Self::Deploy => "1",
        }
    }

    /// Returns true if the stage loads BPF programs or creates namespaces.
    const fn is_privileged(self) -> bool {
        !matches!(self, Self::Unit | Self::Instructions)
    }
}

impl Selection {
    fn stages(self) -> Vec<Stage> {
        match self {
            Self::Unit => vec![Stage::Unit],
            Self::Instructions => vec![Stage::Instructions],
            Self::Packets => vec![Stage::Packets],
            Self::Netns => vec![Stage::Netns],
            Self::Vm => vec![Stage::Vm],
            Self::Deploy => vec![Stage::Deploy],
            Self::All => Stage::ALL.to_vec(),
        }
    }
}

/// Runs the stages in order and stops at the first that fails. `args` go to the test programs.
///
/// # Errors
/// Returns an error if something is missing, or if a check, a build or a test fails.
pub fn test(selection: Selection, release: bool, args: &[String]) -> Result<()> {
    let stages = selection.stages();
    if stages == [Stage::Unit] {
        setup(Scope::Build, Report::OnlyChanges)?;
    } else {
        setup(Scope::Test, Report::OnlyChanges)?;
    }
    if stages.iter().any(|stage| stage.is_privileged()) {
        preflight::check()?;
    }
    for stage in stages {
        match stage {
            Stage::Unit => {
                lint::lint()?;
                unit_tests(args).run()?;
            }
            // In `all`, the arguments are for the test programs.
            Stage::Instructions if selection == Selection::Instructions => instructions(args).run()?,
            Stage::Instructions => instructions(&[]).run()?,
            Stage::Packets | Stage::Netns | Stage::Vm | Stage::Deploy => {
                let agent = build_agent(release)?;
                scenario_tests(stage, release, args).env("METADATA_AGENT_BIN", agent).run()?;
            }
        }
    }
    Ok(())
}

fn unit_tests(args: &[String]) -> Invocation {
    let tests = ["test", "--workspace", "--exclude", "metadata-tests", "--no-fail-fast"];
    passed_on(Invocation::cargo(tests), args)
}

/// Counts the release build, as it is shipped: other builds have other counts. The bench's
/// libraries are left out because optimising them takes minutes.
fn instructions(args: &[String]) -> Invocation {
    let run = ["run", "--quiet", "--release", "--package", "metadata-tests", "--no-default-features"];
    passed_on(Invocation::cargo(run).args(["--bin", "instructions"]), args)
}

fn build_agent(release: bool) -> Result<String> {
    let build =
        Invocation::cargo(["build", "--quiet", "--package", "metadata-agent", "--bin", "metadata-agent"]);
    let (build, profile) = if release { (build.args(["--release"]), "release") } else { (build, "debug") };
    build.run()?;
    let agent = workspace_root().join(target_dir()).join(profile).join("metadata-agent");
    Ok(agent.display().to_string())
}

fn scenario_tests(stage: Stage, release: bool, args: &[String]) -> Invocation {
    let mut tests = Invocation::cargo(["test", "--package", "metadata-tests", "--no-fail-fast"]);
    if release {
        tests = tests.args(["--release"]);
    }
    if stage == Stage::Netns {
        // The rig's own tests need what its scenarios need.
        tests = tests.args(["--lib", "--bins"]);
    }
    if let Some(target) = stage.target() {
        tests = tests.args(["--test", target]);
    }
    let threads = format!("--test-threads={}", stage.threads());
    tests.args(["--", &threads]).args(args)
}

fn passed_on(tests: Invocation, args: &[String]) -> Invocation {
    if args.is_empty() { tests } else { tests.args(["--"]).args(args) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_folder_of_tests_belongs_to_one_stage() {
        let folder = workspace_root().join("tests/tests");
        let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut entries: Vec<_> = entries.map(|name| name.into_string().unwrap()).collect();
        let mut targets: Vec<_> = Stage::ALL.into_iter().filter_map(Stage::target).collect();
        entries.sort();
        targets.sort_unstable();
        assert_eq!(entries, targets, "no stage runs a file beside the stages' folders");
    }

    #[test]
    fn every_file_of_a_stage_is_one_of_its_modules() {
        for target in Stage::ALL.into_iter().filter_map(Stage::target) {
            let folder = workspace_root().join("tests/tests").join(target);
            let main = fs::read_to_string(folder.join("main.rs")).unwrap();
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                let module = path.file_stem().unwrap().to_str().unwrap();
                let declared = main.lines().any(|line| line == format!("mod {module};"));
                assert!(declared || module == "main", "{target}/main.rs does not declare {module}");
            }
        }
    }

    #[test]
    fn all_is_every_stage() {
        assert_eq!(Selection::All.stages(), Stage::ALL);
    }

    #[test]
    fn counting_needs_no_privilege() {
        assert!(!Stage::Instructions.is_privileged() && Stage::Packets.is_privileged());
        assert_eq!(
            instructions(&["--record".to_owned()]).to_string(),
            "cargo run --quiet --release --package metadata-tests --no-default-features --bin instructions -- --record"
        );
    }

    #[test]
    fn images_are_built_one_at_a_time() {
        let tests = scenario_tests(Stage::Deploy, false, &["image".to_owned()]);
        assert_eq!(
            tests.to_string(),
            "cargo test --package metadata-tests --no-fail-fast --test deploy -- --test-threads=1 image"
        );
    }

    #[test]
    fn unit_tests_leave_out_what_needs_root() {
        assert_eq!(
            unit_tests(&[]).to_string(),
            "cargo test --workspace --exclude metadata-tests --no-fail-fast"
        );
    }
}
