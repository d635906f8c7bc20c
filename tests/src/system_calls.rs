//! Counts the system calls of a process, with strace.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

use crate::wait::{self, PATIENCE};

/// Calls by their name.
pub type SystemCalls = BTreeMap<String, u64>;

/// Counts the system calls of all threads of a process while `work` runs.
#[must_use]
pub fn count(pid: u32, work: impl FnOnce()) -> SystemCalls {
    let strace = Strace::attach(pid);
    work();
    strace.detach()
}

/// A running strace. It is killed on drop, which detaches it.
struct Strace {
    child: Child,
    table: NamedTempFile,
}

impl Strace {
    fn attach(pid: u32) -> Self {
        let table = NamedTempFile::new().expect("a file for the counts");
        let child = Command::new("strace")
            .args(["--follow-forks", "--summary-only", "--summary-columns=calls,name", "--quiet=all"])
            .arg(format!("--output={}", table.path().display()))
            .arg(format!("--attach={pid}"))
            .stdin(Stdio::null())
            .spawn()
            .expect("run strace");
        let mut strace = Self { child, table };
        wait::until("strace follows every thread", PATIENCE, || {
            let exited = strace.child.try_wait().expect("wait for strace");
            assert_eq!(exited, None, "strace exited");
            let traced = threads(pid).iter().all(|status| is_traced_by(status, strace.child.id()));
            traced.then_some(())
        });
        strace
    }

    fn detach(mut self) -> SystemCalls {
        let pid = Pid::from_raw(self.child.id().try_into().expect("a process id"));
        kill(pid, Signal::SIGINT).expect("interrupt strace");
        self.child.wait().expect("wait for strace");
        let table = fs::read_to_string(self.table.path()).expect("read the counts");
        assert!(table.contains("syscall"), "strace wrote no table:\n{table}");
        parse(&table)
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        // Fails if it has exited.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns the `status` files of all threads.
fn threads(pid: u32) -> Vec<PathBuf> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("list the threads");
    tasks.map(|task| task.expect("a thread").path().join("status")).collect()
}

/// A thread that has ended needs no tracer.
fn is_traced_by(status: &Path, tracer: u32) -> bool {
    let line = format!("TracerPid:\t{tracer}");
    fs::read_to_string(status).map_or(true, |status| status.lines().any(|found| found == line))
}

/// Reads the table that strace prints.
fn parse(table: &str) -> SystemCalls {
    let row = |line: &str| {
        let (calls, name) = line.trim().split_once(' ')?;
        Some((name.trim().to_owned(), calls.parse().ok()?))
    };
    table.lines().filter_map(row).filter(|(name, _)| name != "total").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_strace_is_read() {
        let table = "    calls syscall\n--------- ----------------\n     2001 recvfrom\n        1 close\n\
                     --------- ----------------\n     2002 total\n";
        assert_eq!(parse(table), SystemCalls::from([("recvfrom".to_owned(), 2001), ("close".to_owned(), 1)]));
        assert_eq!(parse(""), SystemCalls::new());
    }

    #[test]
    fn the_calls_of_a_process_are_counted() {
        let mut reader =
            Command::new("cat").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("run cat");
        let (mut to, mut from) =
            (reader.stdin.take().expect("a pipe"), reader.stdout.take().expect("a pipe"));
        let counted = count(reader.id(), || {
            for byte in 0..100_u8 {
                std::io::Write::write_all(&mut to, &[byte]).expect("write");
                std::io::Read::read_exact(&mut from, &mut [0]).expect("read it again");
            }
        });
        drop(to);
        reader.wait().expect("wait for cat");
        assert_eq!(counted["write"], 100, "{counted:?}");
    }
}
