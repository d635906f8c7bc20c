//! Watches the entries of a directory with inotify.
//!
//! The directory may be missing, and it may be removed, created or replaced at any time. While it
//! is missing, its nearest existing ancestor is watched. If inotify overflows, is not available (no
//! instances or watches left) or is silent for long, the result is [`DirectoryChange::All`]. So a
//! watch never fails; at worst, it polls slowly.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::time;

use crate::process::blocking::blocking;

const BUFFER: usize = 16 * 1024;
/// Maximum number of inotify events per result.
const MAX_BATCH: usize = 4096;

/// inotify is not available.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error("cannot create an inotify instance (see fs.inotify.max_user_instances): {0}")]
    Instance(#[source] io::Error),
    #[error("cannot watch {path:?} (see fs.inotify.max_user_watches): {source}")]
    Add { path: PathBuf, source: io::Error },
}

/// Entries to read again.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DirectoryChange {
    /// The whole directory.
    All,
    /// These entries, which may have been removed.
    Entries(BTreeSet<OsString>),
}

/// Watch on one directory.
pub(super) struct DirectoryWatch {
    directory: PathBuf,
    watch: Watch,
}

enum Watch {
    /// Before the first result, and after the watched directory was replaced.
    None,
    Armed(Armed),
    Unavailable(WatchError),
}

struct Armed {
    stream: EventStream<Vec<u8>>,
    /// Set while the directory is missing: the entry that is awaited in its nearest existing
    /// ancestor.
    awaited: Option<OsString>,
}

/// Meaning of one inotify event.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Irrelevant,
    Entry(OsString),
    /// The watch must be created again.
    Stale,
}

impl DirectoryWatch {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, watch: Watch::None }
    }

    /// Returns the reason for polling instead of watching.
    pub(super) fn error(&self) -> Option<&WatchError> {
        match &self.watch {
            Watch::Unavailable(error) => Some(error),
            Watch::None | Watch::Armed(_) => None,
        }
    }

    /// Waits for a change. The first result, and the result after `recheck` without a change, is
    /// the whole directory.
    pub(super) async fn changed(&mut self, recheck: Duration) -> DirectoryChange {
        let deadline = time::Instant::now() + recheck;
        let found = match &mut self.watch {
            Watch::None => None,
            Watch::Armed(armed) => {
                time::timeout_at(deadline, armed.entries(&self.directory)).await.ok().flatten()
            }
            Watch::Unavailable(_) => {
                time::sleep_until(deadline).await;
                None
            }
        };
        if let Some(entries) = found {
            return DirectoryChange::Entries(entries);
        }
        // Watch before reading: later changes are reported, earlier ones are read.
        let directory = self.directory.clone();
        self.watch = match blocking(move || arm(&directory)).await {
            Some(Ok(armed)) => Watch::Armed(armed),
            Some(Err(error)) => Watch::Unavailable(error),
            None => Watch::None,
        };
        DirectoryChange::All
    }
}

impl Armed {
    /// Waits for changed entries; `None` if the watch must be created again.
    async fn entries(&mut self, directory: &Path) -> Option<BTreeSet<OsString>> {
        let mut entries = BTreeSet::new();
        let mut events = 0;
        loop {
            let event = if entries.is_empty() {
                self.stream.next().await
            } else {
                match self.stream.next().now_or_never() {
                    Some(event) if events < MAX_BATCH => event,
                    _ => return Some(entries),
                }
            };
            let event = event?.ok()?;
            events += 1;
            match meaning(self.awaited.as_deref(), event.name) {
                Meaning::Irrelevant => {}
                Meaning::Stale => return None,
                Meaning::Entry(name)
                    if event.mask.contains(EventMask::CREATE) && is_incomplete(&directory.join(&name)) => {}
                Meaning::Entry(name) => {
                    entries.insert(name);
                }
            }
        }
    }
}

fn meaning(awaited: Option<&OsStr>, name: Option<OsString>) -> Meaning {
    match (name, awaited) {
        // The directory itself was removed, moved, unmounted or got other permissions, or the queue
        // overflowed.
        (None, _) => Meaning::Stale,
        (Some(name), None) => Meaning::Entry(name),
        (Some(name), Some(awaited)) if *awaited == name => Meaning::Stale,
        (Some(_), Some(_)) => Meaning::Irrelevant,
    }
}

/// Returns true for a regular file that was just created: it is still being written, and
/// CLOSE_WRITE will follow. A symlink or another hard link is complete at once and gets no further
/// event.
fn is_incomplete(path: &Path) -> bool {
    path.symlink_metadata().is_ok_and(|metadata| metadata.is_file() && metadata.nlink() == 1)
}

fn arm(directory: &Path) -> Result<Armed, WatchError> {
    let mask = WatchMask::ATTRIB
        | WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::DELETE_SELF
        | WatchMask::MOVE
        | WatchMask::MOVE_SELF
        | WatchMask::ONLYDIR;
    let directory = std::path::absolute(directory)
        .map_err(|source| WatchError::Add { path: directory.into(), source })?;
    loop {
        let inotify = Inotify::init().map_err(WatchError::Instance)?;
        let mut awaited: Option<&Path> = None;
        for path in directory.ancestors() {
            match inotify.watches().add(path, mask) {
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::NotFound => awaited = Some(path),
                Err(source) => return Err(WatchError::Add { path: path.into(), source }),
            }
        }
        // An entry that was created between the two calls caused no event.
        if awaited.is_some_and(Path::exists) {
            continue;
        }
        let awaited = awaited.and_then(Path::file_name).map(OsStr::to_owned);
        let stream = inotify.into_event_stream(vec![0; BUFFER]).map_err(WatchError::Instance)?;
        return Ok(Armed { stream, awaited });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// Longer than any test takes.
    const NEVER: Duration = Duration::from_hours(1);
    const SOON: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn complete_entries_are_reported_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = DirectoryWatch::new(folder.path().into());
        assert_eq!(changed(&mut watch).await, DirectoryChange::All);

        let writer = fs::File::create(folder.path().join("half")).unwrap();
        fs::write(folder.path().join("a"), "1").unwrap();
        symlink("a", folder.path().join("link")).unwrap();
        assert_eq!(changed(&mut watch).await, entries(["a", "link"]));
        drop(writer);
        assert_eq!(changed(&mut watch).await, entries(["half"]));
        fs::rename(folder.path().join("a"), folder.path().join("b")).unwrap();
        assert_eq!(changed(&mut watch).await, entries(["a", "b"]));
        fs::remove_file(folder.path().join("b")).unwrap();
        assert_eq!(changed(&mut watch).await, entries(["b"]));
    }

    #[tokio::test]
    async fn a_directory_may_appear_disappear_and_return() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("run/qemu");
        let mut watch = DirectoryWatch::new(directory.clone());
        assert_eq!(changed(&mut watch).await, DirectoryChange::All);
        for _ in 0..2 {
            fs::write(folder.path().join("unrelated"), "").unwrap();
            fs::create_dir_all(&directory).unwrap();
            // One result for each level, unless both existed before the first one.
            until(&mut watch, &directory, "whole.xml").await;
            fs::remove_dir_all(folder.path().join("run")).unwrap();
            while changed(&mut watch).await != DirectoryChange::All {}
        }
        fs::create_dir_all(&directory).unwrap();
        until(&mut watch, &directory, "whole.xml").await;
        fs::rename(&directory, folder.path().join("run/old")).unwrap();
        fs::create_dir(&directory).unwrap();
        while changed(&mut watch).await != DirectoryChange::All {}
        until(&mut watch, &directory, "again.xml").await;
    }

    /// Waits until the watch reports single entries of the directory.
    async fn until(watch: &mut DirectoryWatch, directory: &Path, name: &str) {
        while matches!(&watch.watch, Watch::Armed(armed) if armed.awaited.is_some()) {
            assert_eq!(changed(watch).await, DirectoryChange::All);
        }
        fs::write(directory.join(name), "").unwrap();
        assert_eq!(changed(watch).await, entries([name]));
    }

    #[tokio::test]
    async fn a_queue_overflow_reports_the_whole_directory() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = DirectoryWatch::new(folder.path().into());
        assert_eq!(changed(&mut watch).await, DirectoryChange::All);
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&a, "").unwrap();
        // Two events each.
        for _ in 0..=limit.trim().parse::<u32>().unwrap() / 4 {
            fs::rename(&a, &b).unwrap();
            fs::rename(&b, &a).unwrap();
        }
        while changed(&mut watch).await != DirectoryChange::All {}
        fs::write(&b, "").unwrap();
        assert_eq!(changed(&mut watch).await, entries(["b"]));
    }

    #[tokio::test]
    async fn silence_or_missing_inotify_causes_a_periodic_recheck() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let mut silent = DirectoryWatch::new(folder.path().into());
        let mut unavailable = DirectoryWatch::new(file.clone());
        for _ in 0..3 {
            assert_eq!(silent.changed(SOON).await, DirectoryChange::All);
            assert!(silent.error().is_none());
            assert_eq!(unavailable.changed(SOON).await, DirectoryChange::All);
            assert!(matches!(unavailable.error(), Some(WatchError::Add { path, .. }) if *path == file));
        }
    }

    async fn changed(watch: &mut DirectoryWatch) -> DirectoryChange {
        let changes = watch.changed(NEVER);
        time::timeout(Duration::from_secs(10), changes).await.expect("the change was not reported")
    }

    fn entries<const N: usize>(names: [&str; N]) -> DirectoryChange {
        DirectoryChange::Entries(names.map(OsString::from).into())
    }
}
