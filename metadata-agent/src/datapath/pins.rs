//! The bpffs directory: where each pin is, how it goes, and who may change it.
//!
//! Whoever opens the directory holds its lock until the value is dropped, so two agents, or an agent and `detach`, never
//! work on the same pins; the kernel frees the lock of a process that dies. The directory may be somebody else's as
//! well: only what bears one of our names is ever removed.
//!
//! | name | what it is |
//! |---|---|
//! | `MD_*` | maps |
//! | `portal` | the link of `md_to_guest` |
//! | `guest-<ifindex>` | the link of `md_from_guest` there, by TCX |
//! | `filter-<ifindex>` | a directory: `md_from_guest` is there as a filter |
//! | `clsact-<ifindex>` | a directory: the qdisc there, whose hook the filter is on, was made by us |
//! | `netns-<inode>` | a directory: the same, but for maps, of the network namespace with this inode |

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::DatapathError;
use crate::ids::IfIndex;

const PORTAL: &str = "portal";
const GUEST: &str = "guest-";
const FILTER: &str = "filter-";
const CLSACT: &str = "clsact-";
const NETNS: &str = "netns-";
/// What the names of our maps begin with, in every version.
const MAP: &str = "MD_";

/// The pins, locked.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    /// That of a namespace's pins is held with the directory above.
    _lock: Option<File>,
}

/// A filter of ours on a guest's interface, in the namespace of whoever tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilterRecord {
    /// The interface's index.
    pub index: IfIndex,
    /// Whether its qdisc was made by us.
    pub owns_qdisc: bool,
}

impl Pins {
    /// Makes the directory if need be.
    pub fn open(directory: &Path) -> Result<Self, DatapathError> {
        let fault = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        if !is_on_bpffs(directory).map_err(fault)? {
            return Err(fault(io::Error::new(io::ErrorKind::Unsupported, "not on a BPF file system")));
        }
        loop {
            DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fault)?;
            if let Some(pins) = Self::lock(directory)? {
                return Ok(pins);
            }
        }
    }

    /// The directory if it is there.
    pub fn find(directory: &Path) -> Result<Option<Self>, DatapathError> {
        let fault = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        if directory.try_exists().map_err(fault)? && is_on_bpffs(directory).map_err(fault)? {
            Self::lock(directory)
        } else {
            Ok(None)
        }
    }

    /// `None` if the directory went away before it was locked.
    fn lock(directory: &Path) -> Result<Option<Self>, DatapathError> {
        let fault = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        let lock = match File::open(directory) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(fault)?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DatapathError::InUse { path: directory.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(fault(source)),
        }
        let inode = lock.metadata().map_err(fault)?.ino();
        let is_there = fs::metadata(directory).is_ok_and(|now| now.ino() == inode);
        Ok(is_there.then(|| Self { directory: directory.to_owned(), _lock: Some(lock) }))
    }

    /// The pins of another network namespace, beside those of the host's own; made if need be.
    pub fn of_netns(directory: &Path, inode: u32) -> Result<Self, DatapathError> {
        let path = directory.join(format!("{NETNS}{inode}"));
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(DatapathError::PinDirectory { path, source })
            }
            _ => Ok(Self { directory: path, _lock: None }),
        }
    }

    /// To look at them, while somebody else holds the lock.
    pub fn unlocked(directory: &Path) -> Self {
        Self { directory: directory.to_owned(), _lock: None }
    }

    /// The network namespaces that there are pins of.
    pub fn netns(&self) -> Result<Vec<u32>, DatapathError> {
        Ok(self.ours()?.iter().filter_map(|name| name.strip_prefix(NETNS)?.parse().ok()).collect())
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub fn portal(&self) -> PathBuf {
        self.directory.join(PORTAL)
    }

    pub fn guest(&self, index: IfIndex) -> PathBuf {
        self.directory.join(format!("{GUEST}{index}"))
    }

    /// All pinned guest links.
    pub fn guests(&self) -> Result<Vec<(IfIndex, PathBuf)>, DatapathError> {
        let names = self.ours()?;
        let guests = names.iter().filter_map(|name| index_in(name, GUEST));
        Ok(guests.map(|index| (index, self.guest(index))).collect())
    }

    /// Notes a filter before it is made, and a qdisc of ours that goes with it.
    pub fn record_filter(&self, mark: FilterRecord) -> Result<(), DatapathError> {
        self.make(FILTER, mark.index)?;
        if mark.owns_qdisc { self.make(CLSACT, mark.index) } else { Ok(()) }
    }

    /// All filters noted.
    pub fn filters(&self) -> Result<Vec<FilterRecord>, DatapathError> {
        let names = self.ours()?;
        let marked = names.iter().filter_map(|name| index_in(name, FILTER));
        Ok(marked
            .map(|index| FilterRecord { index, owns_qdisc: names.contains(&format!("{CLSACT}{index}")) })
            .collect())
    }

    /// The filter noted for an interface.
    pub fn filter(&self, index: IfIndex) -> Option<FilterRecord> {
        let is_marked = |prefix| self.directory.join(format!("{prefix}{index}")).is_dir();
        is_marked(FILTER).then(|| FilterRecord { index, owns_qdisc: is_marked(CLSACT) })
    }

    /// Forgets a filter that is gone; fine if it was not noted. The qdisc goes first: it is only looked for with the filter.
    pub fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.disown_qdisc(index)?;
        self.unmake(FILTER, index)
    }

    /// Notes that the qdisc on an interface is not ours, or not any more.
    pub fn disown_qdisc(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.unmake(CLSACT, index)
    }

    /// Removes one pin; fine if there is none.
    pub fn remove(pin: &Path) -> Result<(), DatapathError> {
        absent_is_fine(fs::remove_file(pin), pin.to_owned())
    }

    /// Removes maps and links: links detach, and maps go as their last holders do. Notes of filters stay.
    pub fn clear(&self) -> Result<(), DatapathError> {
        let is_note = |name: &str| name.starts_with(FILTER) || name.starts_with(CLSACT);
        for inode in self.netns()? {
            Self::of_netns(&self.directory, inode)?.remove_all()?;
        }
        let is_file = |name: &&String| !is_note(name) && !name.starts_with(NETNS);
        for name in self.ours()?.iter().filter(is_file) {
            Self::remove(&self.directory.join(name))?;
        }
        Ok(())
    }

    /// Removes maps and links, and the directory unless something is left in it: a note, or what is somebody else's.
    pub fn remove_all(self) -> Result<(), DatapathError> {
        self.clear()?;
        match fs::remove_dir(&self.directory) {
            Err(source)
                if matches!(
                    source.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy | io::ErrorKind::NotFound
                ) =>
            {
                Ok(())
            }
            removed => {
                removed.map_err(|source| DatapathError::PinDirectory { path: self.directory.clone(), source })
            }
        }
    }

    fn make(&self, prefix: &str, index: IfIndex) -> Result<(), DatapathError> {
        let path = self.directory.join(format!("{prefix}{index}"));
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(DatapathError::PinDirectory { path, source })
            }
            _ => Ok(()),
        }
    }

    fn unmake(&self, prefix: &str, index: IfIndex) -> Result<(), DatapathError> {
        let path = self.directory.join(format!("{prefix}{index}"));
        absent_is_fine(fs::remove_dir(&path), path)
    }

    /// The names in the directory that can be ours.
    fn ours(&self) -> Result<Vec<String>, DatapathError> {
        let is_ours = |name: &String| {
            let numbered = [GUEST, FILTER, CLSACT].iter().any(|prefix| index_in(name, prefix).is_some());
            let netns = name.strip_prefix(NETNS).is_some_and(|inode| inode.parse::<u32>().is_ok());
            name == PORTAL || name.starts_with(MAP) || numbered || netns
        };
        let names = || {
            let entries = fs::read_dir(&self.directory)?;
            let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
            names.collect::<io::Result<Vec<Option<String>>>>()
        };
        let names =
            names().map_err(|source| DatapathError::PinDirectory { path: self.directory.clone(), source })?;
        Ok(names.into_iter().flatten().filter(is_ours).collect())
    }
}

fn index_in(name: &str, prefix: &str) -> Option<IfIndex> {
    name.strip_prefix(prefix)?.parse().ok().map(IfIndex)
}

/// Whether a path is on a BPF file system, or would be once it is made.
fn is_on_bpffs(path: &Path) -> io::Result<bool> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    Ok(statfs(existing)?.filesystem_type() == BPF_FS_MAGIC)
}

fn absent_is_fine(removed: io::Result<()>, path: PathBuf) -> Result<(), DatapathError> {
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::PinDirectory { path, source })
        }
        _ => Ok(()),
    }
}
