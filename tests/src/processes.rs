//! Processes of this machine, as /proc shows them.

use std::fs;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::wait::{self, PATIENCE};

/// Returns the children of a process, whichever of its threads started them.
#[must_use]
pub fn children(pid: u32) -> Vec<u32> {
    let all = thread_ids(pid).into_iter().map(|thread| {
        // It may have ended meanwhile.
        fs::read_to_string(format!("/proc/{pid}/task/{thread}/children")).unwrap_or_default()
    });
    all.flat_map(|line| line.split_whitespace().map(number).collect::<Vec<_>>()).collect()
}

/// Returns a process and its descendants.
#[must_use]
pub fn with_children(pid: u32) -> Vec<u32> {
    children(pid).into_iter().fold(vec![pid], |mut all, child| {
        all.extend(with_children(child));
        all
    })
}

/// Returns the threads of a process that have this name.
#[must_use]
pub fn threads(pid: u32, name: &str) -> Vec<u32> {
    let mut all = thread_ids(pid);
    all.retain(|thread| {
        let comm = fs::read_to_string(format!("/proc/{pid}/task/{thread}/comm"));
        comm.is_ok_and(|comm| comm.trim_end() == name)
    });
    all
}

/// Returns whether a process runs. One that has ended, but was not waited for, does not.
#[must_use]
pub fn runs(pid: u32) -> bool {
    states(pid).first().is_some_and(|state| *state != 'Z' && *state != 'X')
}

/// Stops a process, and waits until every thread has stopped.
pub fn stop(pid: u32) {
    kill(raw(pid), Signal::SIGSTOP).unwrap_or_else(|e| panic!("stop process {pid}: {e}"));
    wait::until(&format!("process {pid} stops"), PATIENCE, || {
        states(pid).into_iter().all(|state| state == 'T').then_some(())
    });
}

/// Lets a process go on, if it runs.
pub fn go_on(pid: u32) {
    match kill(raw(pid), Signal::SIGCONT) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => panic!("let process {pid} go on: {error}"),
    }
}

/// Returns the number as system calls take it.
#[must_use]
pub fn raw(pid: u32) -> Pid {
    Pid::from_raw(pid.try_into().unwrap_or_else(|_| unreachable!("process id {pid}")))
}

fn thread_ids(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    tasks.filter_map(|task| task.file_name().to_str()?.parse().ok()).collect()
}

/// Returns the state of each thread, the main thread first.
fn states(pid: u32) -> Vec<char> {
    let state = |thread: u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat")).ok()?;
        // The name may contain spaces and parentheses.
        stat.rsplit_once(") ")?.1.chars().next()
    };
    thread_ids(pid).into_iter().filter_map(state).collect()
}

fn number(text: &str) -> u32 {
    text.parse().unwrap_or_else(|e| panic!("process id {text:?}: {e}"))
}
