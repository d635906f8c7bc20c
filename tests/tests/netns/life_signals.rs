//! Signals that operators' tools send to Neutron's agents do not end this one. SIGUSR1 logs the
//! state.

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::thread;

use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, Mode, ServedTenants, TwoTenants};
use nix::fcntl::OFlag;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode as FileMode;
use nix::unistd::mkfifo;

const IGNORED: [Signal; 8] = [
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGIO,
    Signal::SIGSTKFLT,
    Signal::SIGXFSZ,
    LAST,
];
/// The kernel delivers pending signals in the order of their numbers, and this one has the highest.
const LAST: Signal = Signal::SIGPWR;

/// The beginnings of the records that SIGUSR1 logs.
const STATE: [&str; 7] = [
    "state: readiness ready=true waiting_for=[] uptime_seconds=",
    "state: guest interfaces known=2 on_network=0 unknown=0 disputed=0 shared=0 refused=0 failed=0",
    "state: namespaces served=0 idle=0 failed=0",
    "state: source source=\"static_file\" ready=true ports=2 faults=0",
    "state: damage found=0 unrepaired=[]",
    "state: heartbeat live=true age_seconds=0.",
    "state: connections open=",
];

/// Returns how often SIGUSR1 logged this record.
fn records(process: &AgentProcess, record: &str) -> usize {
    process.output().lines().filter(|line| line.contains(record)).count()
}

fn wait_for_state(process: &AgentProcess, times: usize) {
    wait::until("the state is logged", PATIENCE, || {
        assert!(process.exited().is_none(), "SIGUSR1 ended the agent: {}", process.output());
        STATE.iter().all(|record| records(process, record) == times).then_some(())
    });
}

fn wait_for_reload(process: &AgentProcess) {
    wait::until("the configuration is read again", PATIENCE, || {
        assert!(process.exited().is_none(), "SIGHUP ended the agent: {}", process.output());
        (records(process, "configuration reloaded applied=[]") > 0).then_some(())
    });
}

fn lines(process: &AgentProcess, signal: Signal) -> usize {
    let is_about =
        |line: &&str| line.contains("signal ignored") && line.ends_with(&format!("signal={signal}"));
    process.output().lines().filter(is_about).count()
}

fn wait_until_logged(process: &AgentProcess, signal: Signal) {
    wait::until("the signal is logged", PATIENCE, || {
        assert!(process.exited().is_none(), "{signal} ended the agent: {}", process.output());
        (lines(process, signal) > 0).then_some(())
    });
}

#[test]
fn harmless_signals_interrupt_no_request() {
    let tenants = ServedTenants::new();
    tenants.nova.set_mode(Mode::Hold);
    thread::scope(|scope| {
        let in_flight = scope.spawn(|| assert_served(&tenants.red.guest));
        tenants.nova.wait_for(1, PATIENCE);
        tenants.process.signal(Signal::SIGUSR1);
        wait_for_state(&tenants.process, 1);
        tenants.process.signal(Signal::SIGHUP);
        wait_for_reload(&tenants.process);
        for signal in IGNORED.into_iter().filter(|signal| *signal != LAST) {
            tenants.process.signal(signal);
            wait_until_logged(&tenants.process, signal);
        }
        for signal in IGNORED {
            tenants.process.signal(signal);
        }
        wait_until_logged(&tenants.process, LAST);
        for signal in IGNORED {
            assert_eq!(lines(&tenants.process, signal), 1, "{signal}: {}", tenants.process.output());
        }
        tenants.nova.set_mode(Mode::Serve);
        in_flight.join().expect("the request in flight is served");
    });
    let ServedTenants { process, .. } = tenants;
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn harmless_signals_do_not_interrupt_the_start() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().install();
    // The agent waits for the writer of this configuration file.
    let config = tenants.host.folder().join("config");
    mkfifo(&config, FileMode::S_IRWXU).expect("create a FIFO");
    let process = agent.spawn(&["--config-file".to_owned(), config.display().to_string()]);
    let writer = wait::until("the agent opens it", PATIENCE, || {
        OpenOptions::new().write(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&config).ok()
    });
    for signal in [Signal::SIGUSR1, Signal::SIGUSR2] {
        process.signal(signal);
    }
    for signal in IGNORED {
        process.signal(signal);
    }
    drop(writer);
    process.wait_ready();
    tenants.assert_served();
    for signal in IGNORED {
        wait_until_logged(&process, signal);
    }
    assert_eq!(process.stop().code(), Some(0));
}

#[test]
fn sigusr1_logs_the_state_each_time() {
    let tenants = ServedTenants::new();
    assert_served(&tenants.red.guest);
    for times in 1..=2 {
        tenants.process.signal(Signal::SIGUSR1);
        wait_for_state(&tenants.process, times);
    }
    tenants.agent.set_ports([&tenants.red.guest.port]);
    wait::until("one guest is unknown", PATIENCE, || {
        tenants.process.signal(Signal::SIGUSR1);
        tenants.process.output().contains("known=1 on_network=0 unknown=1").then_some(())
    });
    let secret = tenants.nova.secret();
    assert!(!tenants.process.output().contains(secret), "the secret is in the log");
    let ServedTenants { process, .. } = tenants;
    assert_eq!(process.stop().code(), Some(0));
}

/// The state is needed most while something hangs.
#[test]
fn sigusr1_logs_the_state_of_an_agent_that_hangs() {
    let tenants = ServedTenants::new();
    for threads in ["metadata-agent", "md-data"] {
        let frozen = tenants.process.freeze_threads(threads);
        let before = records(&tenants.process, "state: connections open=");
        tenants.process.signal(Signal::SIGUSR1);
        wait::until("the state is logged", PATIENCE, || {
            (records(&tenants.process, "state: connections open=") > before).then_some(())
        });
        drop(frozen);
    }
    let ServedTenants { process, .. } = tenants;
    assert_eq!(process.stop().code(), Some(0));
}
