//! Which entries of a directory changed: the inotify part that the file sources share.
//!
//! The directory may be missing, be removed, come back, or be replaced by another of the same name; while it is
//! missing, the nearest directory above it is watched for its coming. Where inotify lost count (queue overflow),
//! is not to be had (no instances or watches left) or has been silent for long, the answer is "look at
//! everything", so a watch never fails: at worst it is a slow poll.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::{FutureExt, StreamExt};
use inotify::{EventMask, EventStream, Inotify, WatchMask};
use tokio::time;

const BUFFER: usize = 16 * 1024;
/// Events that make one answer, at most.
const MAX_BATCH: usize = 4096;

/// Why changes are not told as they happen.
#[derive(Debug, thiserror::Error)]
pub(super) enum WatchError {
    #[error("cannot make an inotify instance (see fs.inotify.max_user_instances): {0}")]
    Instance(#[source] io::Error),
    #[error("cannot watch {path:?} (see fs.inotify.max_user_watches): {source}")]
    Add { path: PathBuf, source: io::Error },
}

/// What to look at again.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Changes {
    /// The directory as a whole.
    Everything,
    /// These entries. They may exist or not.
    Entries(BTreeSet<OsString>),
}

/// A watch on one directory.
pub(super) struct DirectoryWatch {
    directory: PathBuf,
    ears: Ears,
}

enum Ears {
    /// Before the first look, and whenever what was watched is no longer what should be.
    None,
    Open(Armed),
    /// inotify is not to be had.
    Deaf(WatchError),
}

struct Armed {
    stream: EventStream<Vec<u8>>,
    /// The directory is missing; what is watched is the nearest one above it, for this entry.
    awaited: Option<OsString>,
}

/// What one event means.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Nothing,
    Entry(OsString),
    Lost,
}

impl DirectoryWatch {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, ears: Ears::None }
    }

    /// Why it polls, if it does.
    pub(super) fn fault(&self) -> Option<&WatchError> {
        match &self.ears {
            Ears::Deaf(error) => Some(error),
            Ears::None | Ears::Open(_) => None,
        }
    }

    /// Waits for a change; the first answer, and the one after `recheck` without a change, is everything.
    pub(super) async fn changed(&mut self, recheck: Duration) -> Changes {
        let deadline = time::Instant::now() + recheck;
        let found = match &mut self.ears {
            Ears::None => None,
            Ears::Open(armed) => {
                time::timeout_at(deadline, armed.entries(&self.directory)).await.ok().flatten()
            }
            Ears::Deaf(_) => {
                time::sleep_until(deadline).await;
                None
            }
        };
        if let Some(entries) = found {
            return Changes::Entries(entries);
        }
        // A fresh instance before the look: what happens after this is heard, what happened before is seen.
        self.ears = match arm(&self.directory) {
            Ok(armed) => Ears::Open(armed),
            Err(error) => Ears::Deaf(error),
        };
        Changes::Everything
    }
}

impl Armed {
    /// Waits for entries that changed; `None` when the watch has lost its hold.
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
                Meaning::Nothing => {}
                Meaning::Lost => return None,
                Meaning::Entry(name)
                    if event.mask.contains(EventMask::CREATE) && half(&directory.join(&name)) => {}
                Meaning::Entry(name) => {
                    entries.insert(name);
                }
            }
        }
    }
}

fn meaning(awaited: Option<&OsStr>, name: Option<OsString>) -> Meaning {
    match (name, awaited) {
        // Of the directory itself, which was removed, moved, unmounted or given other permissions; or of the
        // queue, which ran over.
        (None, _) => Meaning::Lost,
        (Some(name), None) => Meaning::Entry(name),
        (Some(name), Some(awaited)) if *awaited == name => Meaning::Lost,
        (Some(_), Some(_)) => Meaning::Nothing,
    }
}

/// A regular file that was just created is being written; its CLOSE_WRITE follows. A symlink or another hard link
/// is whole at once and gets no further event.
fn half(path: &Path) -> bool {
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
        // Whoever came between the two looks has made no event.
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

    /// Long enough never to pass by itself.
    const NEVER: Duration = Duration::from_hours(1);
    const SOON: Duration = Duration::from_millis(1);

    #[tokio::test]
    async fn entries_are_told_by_name_when_they_are_whole() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = DirectoryWatch::new(folder.path().into());
        assert_eq!(changed(&mut watch).await, Changes::Everything);

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
    async fn a_directory_may_come_go_and_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("run/qemu");
        let mut watch = DirectoryWatch::new(directory.clone());
        assert_eq!(changed(&mut watch).await, Changes::Everything);
        for _ in 0..2 {
            fs::write(folder.path().join("unrelated"), "").unwrap();
            fs::create_dir_all(&directory).unwrap();
            // One look for each level, unless both were made before the first look.
            until(&mut watch, &directory, "whole.xml").await;
            fs::remove_dir_all(folder.path().join("run")).unwrap();
            while changed(&mut watch).await != Changes::Everything {}
        }
        fs::create_dir_all(&directory).unwrap();
        until(&mut watch, &directory, "whole.xml").await;
        fs::rename(&directory, folder.path().join("run/old")).unwrap();
        fs::create_dir(&directory).unwrap();
        while changed(&mut watch).await != Changes::Everything {}
        until(&mut watch, &directory, "again.xml").await;
    }

    /// Waits until the watch hears of single entries of the directory.
    async fn until(watch: &mut DirectoryWatch, directory: &Path, name: &str) {
        while matches!(&watch.ears, Ears::Open(armed) if armed.awaited.is_some()) {
            assert_eq!(changed(watch).await, Changes::Everything);
        }
        fs::write(directory.join(name), "").unwrap();
        assert_eq!(changed(watch).await, entries([name]));
    }

    #[tokio::test]
    async fn a_queue_that_ran_over_means_everything() {
        let folder = tempfile::tempdir().unwrap();
        let mut watch = DirectoryWatch::new(folder.path().into());
        assert_eq!(changed(&mut watch).await, Changes::Everything);
        let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&a, "").unwrap();
        // Two events each.
        for _ in 0..=limit.trim().parse::<u32>().unwrap() / 4 {
            fs::rename(&a, &b).unwrap();
            fs::rename(&b, &a).unwrap();
        }
        while changed(&mut watch).await != Changes::Everything {}
        fs::write(&b, "").unwrap();
        assert_eq!(changed(&mut watch).await, entries(["b"]));
    }

    #[tokio::test]
    async fn silence_and_a_deaf_watch_mean_everything_after_a_while() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "").unwrap();
        let mut silent = DirectoryWatch::new(folder.path().into());
        let mut deaf = DirectoryWatch::new(file.clone());
        for _ in 0..3 {
            assert_eq!(silent.changed(SOON).await, Changes::Everything);
            assert!(silent.fault().is_none());
            assert_eq!(deaf.changed(SOON).await, Changes::Everything);
            assert!(matches!(deaf.fault(), Some(WatchError::Add { path, .. }) if *path == file));
        }
    }

    async fn changed(watch: &mut DirectoryWatch) -> Changes {
        let changes = watch.changed(NEVER);
        time::timeout(Duration::from_secs(10), changes).await.expect("the change was never heard of")
    }

    fn entries<const N: usize>(names: [&str; N]) -> Changes {
        Changes::Entries(names.map(OsString::from).into())
    }
}
