//! The agent serves and stops although a system call does not return, as on a dead file server.

use std::fs;
use std::path::Path;

use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{AgentProcess, HostState, TwoTenants};
use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::sys::fanotify::{EventFFlags, Fanotify, FanotifyEvent, InitFlags, MarkFlags, MaskFlags};
use nix::sys::signal::Signal;

/// A file whose use blocks until this value is dropped: the kernel asks this process for permission
/// and gets no answer.
struct BlockedFile {
    group: Fanotify,
}

impl BlockedFile {
    /// Blocks every operation of this kind from now on, such as `FAN_OPEN_PERM`.
    fn new(path: &Path, operation: MaskFlags) -> Self {
        let flags = InitFlags::FAN_CLASS_CONTENT | InitFlags::FAN_NONBLOCK | InitFlags::FAN_CLOEXEC;
        let group = Fanotify::init(flags, EventFFlags::O_RDONLY | EventFFlags::O_CLOEXEC);
        let group = group.expect("create a fanotify group");
        group.mark(MarkFlags::FAN_MARK_ADD, operation, AT_FDCWD, Some(path)).expect("mark the file");
        Self { group }
    }

    /// Waits until the process blocks.
    fn wait_for(&self, process: &AgentProcess) {
        wait::until("the agent blocks", PATIENCE, || match self.group.read_events() {
            Ok(events) => events.iter().map(FanotifyEvent::pid).any(is(process)).then_some(()),
            Err(Errno::EAGAIN) => None,
            Err(error) => panic!("read fanotify events: {error}"),
        });
    }
}

fn is(process: &AgentProcess) -> impl Fn(i32) -> bool {
    let pid = process.pid();
    move |other| u32::try_from(other) == Ok(pid)
}

#[test]
fn a_read_that_hangs_does_not_delay_the_stop() {
    for replaced in ["inventory.json", "secret"] {
        let tenants = TwoTenants::new();
        let secret = tenants.host.folder().join("secret");
        fs::write(&secret, tenants.nova.secret()).expect("write the secret");
        let files = secret.display().to_string();
        let agent = tenants.agent().set("metadata_agent", "shared_secret_files", &files).install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        let path = if replaced == "secret" { secret } else { agent.config_file().with_file_name(replaced) };

        // Only the new file blocks: this process must not open it either.
        let next = path.with_extension("next");
        fs::copy(&path, &next).expect("copy the file");
        let blocked = BlockedFile::new(&next, MaskFlags::FAN_OPEN_PERM);
        fs::rename(&next, &path).expect("replace the file");
        blocked.wait_for(&process);
        tenants.assert_served();

        process.signal(Signal::SIGTERM);
        let status = process.wait_exit(PATIENCE);
        assert_eq!(status.code(), Some(0), "{replaced}: {}", process.output());
        assert!(!process.output().contains("in time"), "{replaced}: {}", process.output());
        before.assert_same(&HostState::capture(&tenants.host));
    }
}

#[test]
fn a_main_thread_that_hangs_does_not_prevent_the_stop() {
    let tenants = TwoTenants::new();
    let agent = tenants.agent().set("metadata_agent", "drain_timeout", "0").install();
    // The main thread opens the directory of pins to lock it.
    let pins = tenants.host.bpffs().join("metadata");
    fs::create_dir(&pins).expect("create the directory of pins");
    let blocked = BlockedFile::new(&pins, MaskFlags::FAN_OPEN_PERM | MaskFlags::FAN_ONDIR);
    let process = agent.spawn(&[]);
    blocked.wait_for(&process);

    process.signal(Signal::SIGTERM);
    let status = process.wait_exit(PATIENCE);
    assert_eq!(status.code(), Some(1), "{}", process.output());
    assert!(
        process.output().contains("the stop timed out; exiting as after a crash"),
        "{}",
        process.output()
    );
}
