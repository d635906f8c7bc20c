//! However the agent goes, the host is as it was: after a signal, after `detach`, with TCX and with clsact.

use std::process::Output;

use metadata_tests::wait::PATIENCE;
use metadata_tests::{Agent, AgentProcess, Host, HostState, KernelObjects, Twins};
use nix::sys::signal::Signal;

const MODES: [&str; 2] = ["tcx", "clsact"];

/// A host on which an agent has served both twins, and what it was before.
struct Served {
    twins: Twins,
    before: HostState,
    agent: Agent,
    process: AgentProcess,
    objects: KernelObjects,
}

impl Served {
    fn by(attach_mode: &str) -> Self {
        Self::after(attach_mode, |_| {})
    }

    /// `prepare` changes the host before the agent comes.
    fn after(attach_mode: &str, prepare: impl FnOnce(&Twins)) -> Self {
        let twins = Twins::new();
        prepare(&twins);
        let agent = twins.agent().set("metadata_agent", "attach_mode", attach_mode).install();
        let before = HostState::capture(&twins.host);
        let process = agent.start();
        twins.assert_served();
        let objects = KernelObjects::of(&twins.host);
        assert_eq!((objects.maps.len(), objects.programs.len()), (6, 2), "{objects:?}");
        Self { twins, before, agent, process, objects }
    }

    fn assert_as_before(&self) {
        self.before.assert_same(&HostState::capture(&self.twins.host));
        self.objects.wait_until_gone();
    }
}

fn detach(agent: &Agent) -> Output {
    agent.command("detach").output().expect("run detach")
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn tc(host: &Host, command: &[&str]) {
    host.netns().run(&[&["tc"], command].concat());
}

#[test]
fn a_signal_leaves_the_host_as_it_was() {
    for mode in MODES {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let served = Served::by(mode);
            served.process.signal(signal);
            let status = served.process.wait_exit(PATIENCE);
            assert_eq!(status.code(), Some(0), "{mode} {signal}: {}", served.process.output());
            served.assert_as_before();
        }
    }
}

#[test]
fn detach_after_a_crash_leaves_the_host_as_it_was_however_often_it_runs() {
    for mode in MODES {
        let served = Served::by(mode);
        served.process.signal(Signal::SIGKILL);
        served.process.wait_exit(PATIENCE);
        for _ in 0..2 {
            let output = detach(&served.agent);
            assert_eq!(output.status.code(), Some(0), "{mode}: {}", said(&output));
            served.assert_as_before();
        }
    }
}

#[test]
fn detach_on_a_host_without_traces_of_an_agent_changes_nothing() {
    let twins = Twins::new();
    let before = HostState::capture(&twins.host);
    let output = detach(&twins.agent().install());
    assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    before.assert_same(&HostState::capture(&twins.host));
}

#[test]
fn detach_refuses_while_an_agent_runs() {
    let served = Served::by("tcx");
    let running = HostState::capture(&served.twins.host);
    let output = detach(&served.agent);
    assert_eq!(output.status.code(), Some(1));
    let socket = served.agent.admin_socket();
    assert!(
        said(&output).contains(&format!("an agent answers on {}", socket.display())),
        "{}",
        said(&output)
    );
    running.assert_same(&HostState::capture(&served.twins.host));
    served.twins.assert_served();
}

#[test]
fn a_classifier_of_somebody_else_stays_with_its_filter() {
    for qdisc in ["clsact", "ingress"] {
        for crashes in [false, true] {
            let served = Served::after("clsact", |twins| {
                for guest in &twins.guests {
                    tc(&twins.host, &["qdisc", "add", "dev", &guest.tap, qdisc]);
                }
                let add = ["filter", "add", "dev", &twins.guests[0].tap, "ingress", "prio", "3"];
                tc(&twins.host, &[&add[..], &["bpf", "bytecode", "1,6 0 0 0"]].concat());
            });
            served.process.signal(if crashes { Signal::SIGKILL } else { Signal::SIGTERM });
            served.process.wait_exit(PATIENCE);
            if crashes {
                served.agent.detach();
            }
            served.assert_as_before();
        }
    }
}
