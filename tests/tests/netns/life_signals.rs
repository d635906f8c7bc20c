//! Signals that operators' tools send to Neutron's agents do not end this one.

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

const HARMLESS: [Signal; 10] = [
    Signal::SIGHUP,
    Signal::SIGUSR1,
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
        for signal in HARMLESS.into_iter().filter(|signal| *signal != LAST) {
            tenants.process.signal(signal);
            wait_until_logged(&tenants.process, signal);
        }
        for signal in HARMLESS {
            tenants.process.signal(signal);
        }
        wait_until_logged(&tenants.process, LAST);
        for signal in HARMLESS {
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
    for signal in HARMLESS {
        process.signal(signal);
    }
    drop(writer);
    process.wait_ready();
    tenants.assert_served();
    for signal in HARMLESS {
        wait_until_logged(&process, signal);
    }
    assert_eq!(process.stop().code(), Some(0));
}
