//! The host is as it was after every kind of exit: after a signal, after `detach`, with TCX and
//! with clsact.

use std::process::Output;

use metadata_tests::wait::PATIENCE;
use metadata_tests::{Agent, AgentProcess, Host, HostState, KernelObjects, TwoTenants};
use nix::sys::signal::Signal;

const MODES: [&str; 2] = ["tcx", "clsact"];

/// A host on which an agent has served both tenants, and its state before that.
struct Served {
    tenants: TwoTenants,
    before: HostState,
    agent: Agent,
    process: AgentProcess,
    objects: KernelObjects,
}

impl Served {
    fn by(attach_mode: &str) -> Self {
        Self::after(attach_mode, |_| {})
    }

    /// `prepare` changes the host before the agent starts.
    fn after(attach_mode: &str, prepare: impl FnOnce(&TwoTenants)) -> Self {
        let tenants = TwoTenants::new();
        prepare(&tenants);
        let agent = tenants.agent().set("metadata_agent", "attach_mode", attach_mode).install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        tenants.assert_served();
        let objects = KernelObjects::from_host(&tenants.host);
        assert_eq!((objects.maps.len(), objects.programs.len()), (KernelObjects::MAPS, 2), "{objects:?}");
        Self { tenants, before, agent, process, objects }
    }

    fn assert_as_before(&self) {
        self.before.assert_same(&HostState::capture(&self.tenants.host));
        self.objects.wait_until_gone();
    }
}

fn detach(agent: &Agent) -> Output {
    agent.command("detach").output().expect("run detach")
}

fn text_of(output: &Output) -> String {
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
fn detach_after_a_crash_restores_the_host_and_is_idempotent() {
    for mode in MODES {
        let served = Served::by(mode);
        served.process.signal(Signal::SIGKILL);
        served.process.wait_exit(PATIENCE);
        for _ in 0..2 {
            let output = detach(&served.agent);
            assert_eq!(output.status.code(), Some(0), "{mode}: {}", text_of(&output));
            served.assert_as_before();
        }
    }
}

#[test]
fn detach_on_a_clean_host_changes_nothing() {
    let tenants = TwoTenants::new();
    let before = HostState::capture(&tenants.host);
    let output = detach(&tenants.agent().install());
    assert_eq!(output.status.code(), Some(0), "{}", text_of(&output));
    before.assert_same(&HostState::capture(&tenants.host));
}

#[test]
fn detach_refuses_while_an_agent_runs() {
    let served = Served::by("tcx");
    let running = HostState::capture(&served.tenants.host);
    let output = detach(&served.agent);
    assert_eq!(output.status.code(), Some(1));
    let socket = served.agent.admin_socket();
    assert!(
        text_of(&output).contains(&format!("an agent answers on {}", socket.display())),
        "{}",
        text_of(&output)
    );
    running.assert_same(&HostState::capture(&served.tenants.host));
    served.tenants.assert_served();
}

#[test]
fn another_owners_qdisc_and_filter_stay() {
    for qdisc in ["clsact", "ingress"] {
        for crashes in [false, true] {
            let served = Served::after("clsact", |tenants| {
                for guest in &tenants.guests {
                    tc(&tenants.host, &["qdisc", "add", "dev", &guest.tap, qdisc]);
                }
                let add = ["filter", "add", "dev", &tenants.guests[0].tap, "ingress", "prio", "3"];
                tc(&tenants.host, &[&add[..], &["bpf", "bytecode", "1,6 0 0 0"]].concat());
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
