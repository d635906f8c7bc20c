//! The data plane's confinement, seen from inside: system calls are put into the running process.

use std::fs;
use std::os::unix::net::UnixListener;

use metadata_tests::injection::{Injection, Text};
use metadata_tests::{ServedTenants, processes};
use nix::errno::Errno;
use nix::libc;

fn status(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/status")).expect("its status")
}

fn field<'a>(status: &'a str, name: &str) -> &'a str {
    let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
    value.unwrap_or_else(|| panic!("{name} in {status}"))
}

#[test]
fn the_data_plane_has_no_privilege_in_any_thread() {
    let tenants = ServedTenants::new();
    tenants.red.assert_hostname_served();
    let data_plane = tenants.process.data_plane();
    let tasks = fs::read_dir(format!("/proc/{data_plane}/task")).expect("its threads");
    let mut threads = 0;
    for task in tasks {
        let status = fs::read_to_string(task.expect("a thread").path().join("status")).expect("its status");
        for name in ["Uid", "Gid"] {
            let ids: Vec<&str> = field(&status, name).split_whitespace().collect();
            assert!(ids.iter().all(|id| *id == ids[0] && *id != "0"), "{status}");
        }
        assert_eq!(field(&status, "Groups").trim(), "");
        for name in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(&status, name), "0000000000000000", "{name}");
        }
        assert_eq!((field(&status, "NoNewPrivs"), field(&status, "Seccomp")), ("1", "2"));
        threads += 1;
    }
    assert!(threads > 1, "{threads}");
    let control = status(tenants.process.pid());
    assert_ne!(field(&control, "CapEff"), "0000000000000000", "the control process has privileges");
    let output = tenants.process.output();
    assert!(!output.contains("less confined"), "{output}");
}

/// It holds the sockets that it serves, and nothing of the host: no file, no map but the heartbeat.
#[test]
fn the_data_plane_holds_no_file_of_the_host() {
    let tenants = ServedTenants::new();
    tenants.red.assert_hostname_served();
    let folder = format!("/proc/{}/fd", tenants.process.data_plane());
    for descriptor in fs::read_dir(&folder).expect("its descriptors") {
        let path = descriptor.expect("a descriptor").path();
        let target = fs::read_link(&path).expect("its target").display().to_string();
        let number = path.file_name().expect("a number").to_string_lossy().into_owned();
        let is_output = number == "1" || number == "2";
        let is_expected = ["socket:", "anon_inode:[eventpoll]", "anon_inode:[eventfd]"]
            .iter()
            .any(|kind| target.starts_with(kind));
        assert!(is_output || is_expected, "{number}: {target}");
    }
}

#[test]
fn forbidden_system_calls_fail_inside_the_data_plane() {
    let tenants = ServedTenants::new();
    tenants.red.assert_hostname_served();
    let process = &tenants.process;
    let (control, data_plane) = (process.pid(), process.data_plane());
    let socket = tenants.host.folder().join("other.sock");
    let _listener = UnixListener::bind(&socket).expect("listen");
    let mut inside = Injection::into(data_plane);

    // The injection itself works: an allowed call succeeds.
    assert_eq!(inside.call(libc::SYS_getpid, &[]), Ok(i64::from(data_plane)));
    let shadow = Text::new("/etc/shadow");
    let denied: [(&str, i64, Vec<u64>, Option<&Text>); 14] = [
        ("open /etc/shadow", libc::SYS_openat, vec![at_fdcwd(), 0, 0, 0], Some(&shadow)),
        ("bpf", libc::SYS_bpf, vec![0, 0, 0], None),
        ("setns", libc::SYS_setns, vec![0, 0], None),
        ("unshare", libc::SYS_unshare, vec![u64::try_from(libc::CLONE_NEWUSER).expect("a flag")], None),
        ("ptrace the control process", libc::SYS_ptrace, vec![16, u64::from(control), 0, 0], None),
        ("read its memory", libc::SYS_process_vm_readv, vec![u64::from(control), 0, 0, 0, 0, 0], None),
        ("signal it", libc::SYS_kill, vec![u64::from(control), 9], None),
        ("signal its thread", libc::SYS_tgkill, vec![u64::from(control), u64::from(control), 9], None),
        ("execute", libc::SYS_execve, vec![0, 0, 0], Some(&shadow)),
        ("fork", libc::SYS_clone, vec![17, 0, 0, 0, 0], None),
        ("connect to a unix socket", libc::SYS_socket, vec![1, 1, 0], None),
        ("netlink", libc::SYS_socket, vec![16, 3, 0], None),
        ("mount", libc::SYS_mount, vec![0, 0, 0, 0, 0], None),
        ("map code", libc::SYS_mmap, vec![0, 4096, 5, 0x22, u64::MAX, 0], None),
    ];
    for (what, call, arguments, text) in denied {
        let found = inside.call_with(call, &arguments, text);
        assert_eq!(found, Err(Errno::EPERM), "{what}");
    }
    assert_eq!(inside.call(libc::SYS_clone3, &[0, 0]), Err(Errno::ENOSYS));
    drop(inside);
    tenants.red.assert_hostname_served();
    assert!(processes::runs(control) && process.data_plane() == data_plane);
}

fn at_fdcwd() -> u64 {
    i64::from(libc::AT_FDCWD).cast_unsigned()
}
