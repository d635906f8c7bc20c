//! The list of all that the data plane may do. It reads what guests send, so it must gain nothing
//! but what its own guests may read, whatever they make of it.
//!
//! - A user of its own, without capabilities. It cannot gain any (no_new_privs).
//! - No access to the file system, no listening on a port, no abstract sockets and signals of
//!   others (Landlock, since Linux 5.13 or as much of it as the kernel has).
//! - The system calls in [`ALLOWED`] and [`allowed_with`] alone (seccomp). All others fail with
//!   `EPERM`.
//!
//! What it needs of the host is opened by the control process, which hands over descriptors.

use std::collections::BTreeMap;
use std::fmt;

use caps::CapSet;
use landlock::{
    ABI, Access as _, AccessFs, AccessNet, Ruleset, RulesetAttr as _, RulesetError, RulesetStatus, Scope,
};
use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::unistd::{Gid, Uid, getpid, setgroups, setresgid, setresuid};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::messages::UserId;

/// Newest version of Landlock whose restrictions are known here.
const LANDLOCK: ABI = ABI::V6;

/// A restriction that this kernel or the service manager does not permit.
#[derive(Debug, thiserror::Error)]
pub(super) enum SandboxGap {
    #[error("cannot change to user {}: {source}; it needs CAP_SETUID and CAP_SETGID", user.user)]
    User { user: UserId, source: Errno },
    #[error("cannot give up capabilities: {0}")]
    Capabilities(caps::errors::CapsError),
    #[error("cannot forbid core dumps: {0}")]
    Dumpable(Errno),
    #[error("Landlock: {0}")]
    Landlock(RulesetError),
    #[error("Landlock: the kernel has {0}")]
    LandlockPart(LandlockPart),
    #[error("seccomp: {0}")]
    Seccomp(#[from] seccompiler::Error),
    #[error("seccomp: {0}")]
    Filter(#[from] BackendError),
}

/// How much of Landlock a kernel lacks.
#[derive(Clone, Copy, Debug)]
pub(super) enum LandlockPart {
    Some,
    None,
}

impl fmt::Display for LandlockPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Some => "an older version, without rules for all of: files, ports, signals",
            Self::None => "none, or it is not enabled (lsm=)",
        })
    }
}

/// Restricts this thread, and those that it will start, for ever. Returns the restrictions that are
/// not possible here; the others apply.
pub(super) fn enter(user: UserId) -> Vec<SandboxGap> {
    // The filter comes last, because it forbids what the others need.
    let steps = [restrict_access(), change_user(user), filter_system_calls()];
    steps.into_iter().filter_map(Result::err).collect()
}

fn change_user(user: UserId) -> Result<(), SandboxGap> {
    let (uid, gid) = (Uid::from_raw(user.user), Gid::from_raw(user.group));
    let changed = if Uid::effective() == uid {
        Ok(())
    } else {
        setgroups(&[]).and_then(|()| setresgid(gid, gid, gid)).and_then(|()| setresuid(uid, uid, uid))
    };
    // Another user has none. This user may have kept them.
    for set in [CapSet::Ambient, CapSet::Inheritable, CapSet::Effective, CapSet::Permitted] {
        caps::clear(None, set).map_err(SandboxGap::Capabilities)?;
    }
    // A change of the user makes a process dumpable again if fs.suid_dumpable says so.
    prctl::set_dumpable(false).map_err(SandboxGap::Dumpable)?;
    changed.map_err(|source| SandboxGap::User { user, source })
}

fn restrict_access() -> Result<(), SandboxGap> {
    let restrict = || {
        Ruleset::default()
            .handle_access(AccessFs::from_all(LANDLOCK))?
            .handle_access(AccessNet::BindTcp)?
            .scope(Scope::from_all(LANDLOCK))?
            .create()?
            .restrict_self()
    };
    match restrict().map_err(SandboxGap::Landlock)?.ruleset {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => Err(SandboxGap::LandlockPart(LandlockPart::Some)),
        RulesetStatus::NotEnforced => Err(SandboxGap::LandlockPart(LandlockPart::None)),
    }
}

/// System calls that are allowed with any arguments.
const ALLOWED: &[i64] = &[
    // Connections.
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Connects to nothing else. The runtime uses a pair.
    libc::SYS_socketpair,
    // Descriptors.
    libc::SYS_close,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads. `clone3` fails with ENOSYS, see `without_clone3`.
    libc::SYS_clone3,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_rseq,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    // Time, randomness, signals, the end.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
];

/// Calls that newer architectures do not have.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_set_tid_address];
#[cfg(not(target_arch = "x86_64"))]
const ALLOWED_HERE: &[i64] = &[libc::SYS_set_tid_address];

/// Conditions that hold together.
type Conditions = Vec<SeccompCondition>;

/// System calls that are allowed with some arguments, with the alternatives of each.
fn allowed_with() -> Result<Vec<(i64, Vec<Conditions>)>, BackendError> {
    let argument =
        |number, operator, value| SeccompCondition::new(number, SeccompCmpArgLen::Dword, operator, value);
    let is = |number, value: i32| argument(number, SeccompCmpOp::Eq, bits(value));
    let has =
        |number, mask: i32, value: i32| argument(number, SeccompCmpOp::MaskedEq(bits(mask)), bits(value));
    let (stream, threads) = (libc::SOCK_STREAM, libc::CLONE_THREAD | libc::CLONE_VM);
    Ok(vec![
        // TCP alone. Sockets of other kinds come from the control process.
        (
            libc::SYS_socket,
            vec![
                vec![is(0, libc::AF_INET)?, has(1, 0xf, stream)?],
                vec![is(0, libc::AF_INET6)?, has(1, 0xf, stream)?],
            ],
        ),
        // No code but the program's own.
        (libc::SYS_mmap, vec![vec![has(2, libc::PROT_EXEC, 0)?]]),
        (libc::SYS_mprotect, vec![vec![has(2, libc::PROT_EXEC, 0)?]]),
        // Threads, not processes.
        (libc::SYS_clone, vec![vec![has(0, threads, threads)?]]),
        (libc::SYS_prctl, vec![vec![is(0, libc::PR_SET_NAME)?]]),
        (libc::SYS_ioctl, vec![vec![argument(1, SeccompCmpOp::Eq, libc::FIONBIO)?]]),
        // An abort signals its own process.
        (libc::SYS_tgkill, vec![vec![is(0, getpid().as_raw())?]]),
    ])
}

/// Returns the value of an argument that the kernel reads as 32 bits.
fn bits(value: i32) -> u64 {
    u64::from(value.cast_unsigned())
}

fn filter_system_calls() -> Result<(), SandboxGap> {
    let arch: TargetArch = std::env::consts::ARCH.try_into()?;
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(ALLOWED_HERE).map(|call| (*call, Vec::new())).collect();
    for (call, alternatives) in allowed_with()? {
        let alternatives = alternatives.into_iter().map(SeccompRule::new).collect::<Result<_, _>>()?;
        rules.insert(call, alternatives);
    }
    let denied = SeccompAction::Errno(bits_of(Errno::EPERM));
    let allow_list: BpfProgram = SeccompFilter::new(rules, denied, SeccompAction::Allow, arch)?.try_into()?;
    // In the opposite order, the first one would forbid the second one.
    apply_filter(&without_clone3(arch)?)?;
    Ok(apply_filter(&allow_list)?)
}

/// Makes `clone3` fail as in old kernels, so that the C library uses `clone`. Its arguments are in
/// memory, which a filter cannot read.
fn without_clone3(arch: TargetArch) -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let missing = SeccompAction::Errno(bits_of(Errno::ENOSYS));
    SeccompFilter::new(rules, SeccompAction::Allow, missing, arch)?.try_into()
}

fn bits_of(error: Errno) -> u32 {
    (error as i32).cast_unsigned()
}
