//! `cargo xtask test`: the stages of testing, what each needs, and the cargo commands that each is.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::command::{Invocation, target_dir, workspace_root};
use crate::lint;
use crate::preflight;
use crate::requirements::Scope;
use crate::setup::{Report, setup};

/// What the user asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Selection {
    /// Lints and the tests beside the code; needs no privilege
    Unit,
    /// How many instructions and allocations a packet and a request take; `-- --record` writes them down
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

    /// The stage of `tests/tests/<target>.rs`, by the target's name. What fits no other stage is a scenario, so
    /// no file is left out.
    fn of_target(target: &str) -> Self {
        let begins = |names: &[&str]| names.iter().any(|name| target.starts_with(name));
        if begins(&["packet", "datapath", "verifier"]) {
            Self::Packets
        } else if begins(&["vm"]) {
            Self::Vm
        } else if begins(&["deploy"]) {
            Self::Deploy
        } else {
            Self::Netns
        }
    }

    /// How many tests of one binary run at a time: virtual machines and image builds fill the host by themselves.
    const fn threads(self) -> &'static str {
        match self {
            Self::Unit | Self::Instructions | Self::Packets | Self::Netns => "2",
            Self::Vm | Self::Deploy => "1",
        }
    }

    /// Whether it loads programs, or makes namespaces.
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
/// When something is missing, a check or a build fails, or a test does.
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
            // Its arguments are none of a test program's.
            Stage::Instructions if selection == Selection::Instructions => instructions(args).run()?,
            Stage::Instructions => instructions(&[]).run()?,
            Stage::Packets | Stage::Netns | Stage::Vm | Stage::Deploy => {
                let targets = targets(stage, &test_targets()?);
                let agent = build_agent(release)?;
                scenario_tests(stage, &targets, release, args)?
                    .env("METADATA_AGENT_BIN", agent)
                    .env("REQUIRE_PRIVILEGED", "1")
                    .run()?;
            }
        }
    }
    Ok(())
}

fn unit_tests(args: &[String]) -> Invocation {
    let tests = ["test", "--workspace", "--exclude", "metadata-tests", "--no-fail-fast"];
    passed_on(Invocation::cargo(tests), args)
}

/// Of the code as it is shipped: other code is counted in other builds.
fn instructions(args: &[String]) -> Invocation {
    let run = ["run", "--quiet", "--release", "--package", "metadata-tests", "--bin", "instructions"];
    passed_on(Invocation::cargo(run), args)
}

fn build_agent(release: bool) -> Result<String> {
    let build =
        Invocation::cargo(["build", "--quiet", "--package", "metadata-agent", "--bin", "metadata-agent"]);
    let (build, profile) = if release { (build.args(["--release"]), "release") } else { (build, "debug") };
    build.run()?;
    let agent = workspace_root().join(target_dir()).join(profile).join("metadata-agent");
    Ok(agent.display().to_string())
}

fn scenario_tests(stage: Stage, targets: &[String], release: bool, args: &[String]) -> Result<Invocation> {
    if targets.is_empty() {
        bail!("no file in tests/tests belongs to the stage {stage:?}");
    }
    let mut tests = Invocation::cargo(["test", "--package", "metadata-tests", "--no-fail-fast"]);
    if release {
        tests = tests.args(["--release"]);
    }
    if stage == Stage::Netns {
        // The rig's own tests, which need what its scenarios need.
        tests = tests.args(["--lib", "--bins"]);
    }
    for target in targets {
        tests = tests.args(["--test", target]);
    }
    let threads = format!("--test-threads={}", stage.threads());
    Ok(tests.args(["--", &threads]).args(args))
}

fn passed_on(tests: Invocation, args: &[String]) -> Invocation {
    if args.is_empty() { tests } else { tests.args(["--"]).args(args) }
}

/// Those of the test targets that belong to a stage.
fn targets(stage: Stage, all: &BTreeSet<String>) -> Vec<String> {
    all.iter().filter(|target| Stage::of_target(target) == stage).cloned().collect()
}

/// The test targets of `metadata-tests`: cargo makes one of each file in `tests/tests` and of each folder in it
/// with a `main.rs`.
fn test_targets() -> Result<BTreeSet<String>> {
    let folder = workspace_root().join("tests/tests");
    let mut targets = BTreeSet::new();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        targets.extend(target_of(&entry?.path()));
    }
    Ok(targets)
}

fn target_of(path: &Path) -> Option<String> {
    let is_target =
        path.extension().is_some_and(|extension| extension == "rs") || path.join("main.rs").is_file();
    is_target.then(|| path.file_stem()?.to_str().map(str::to_owned))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_target_belongs_to_one_stage() {
        let all: BTreeSet<_> = ["packets", "verifier", "netns_identity", "restart", "vm_kernels", "deploy"]
            .map(String::from)
            .into();
        let mut found: Vec<_> = Stage::ALL.iter().flat_map(|stage| targets(*stage, &all)).collect();
        assert_eq!([Stage::Unit, Stage::Instructions].map(|stage| targets(stage, &all)), [[""; 0]; 2]);
        assert_eq!(targets(Stage::Netns, &all), ["netns_identity", "restart"]);
        assert_eq!(targets(Stage::Vm, &all), ["vm_kernels"]);
        found.sort();
        assert!(found.iter().eq(&all), "{found:?}");
    }

    #[test]
    fn all_is_every_stage() {
        assert_eq!(Selection::All.stages(), Stage::ALL);
    }

    #[test]
    fn to_count_takes_no_rights() {
        assert!(!Stage::Instructions.is_privileged() && Stage::Packets.is_privileged());
        assert_eq!(
            instructions(&["--record".to_owned()]).to_string(),
            "cargo run --quiet --release --package metadata-tests --bin instructions -- --record"
        );
    }

    #[test]
    fn virtual_machines_run_one_at_a_time() {
        let tests = scenario_tests(Stage::Vm, &["vm".to_owned()], false, &["boots".to_owned()]).unwrap();
        assert_eq!(
            tests.to_string(),
            "cargo test --package metadata-tests --no-fail-fast --test vm -- --test-threads=1 boots"
        );
    }

    #[test]
    fn a_stage_without_tests_fails() {
        assert!(scenario_tests(Stage::Packets, &[], false, &[]).is_err());
    }

    #[test]
    fn unit_tests_leave_out_what_needs_root() {
        assert_eq!(
            unit_tests(&[]).to_string(),
            "cargo test --workspace --exclude metadata-tests --no-fail-fast"
        );
    }

    #[test]
    fn folders_without_main_are_helpers() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/boundaries");
        assert_eq!(target_of(&folder), None);
        assert_eq!(target_of(Path::new("tests/tests/vm.rs")), Some("vm".to_owned()));
        assert_eq!(target_of(Path::new("tests/tests/notes.md")), None);
    }
}
