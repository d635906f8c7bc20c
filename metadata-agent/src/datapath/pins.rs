//! The bpffs directory: location and life of each pin, and its lock.
//!
//! Opening the directory takes its lock until the value is dropped, so two agents, or an agent and
//! `detach`, never work on the same pins. The kernel releases the lock of a process that dies. The
//! directory may be shared with other programs: only files with our names are ever removed.
//!
//! | name | meaning |
//! |---|---|
//! | `MD_*` | maps |
//! | `portal` | the link of `md_to_guest` |
//! | `guest-<ifindex>` | the link of `md_from_guest` there, by TCX |
//! | `filter-<ifindex>` | a directory: `md_from_guest` is there as a filter |
//! | `clsact-<ifindex>` | a directory: we created the qdisc that the filter is on |
//! | `netns-<inode>` | a directory: the same, without maps, for the namespace with this inode |

use std::collections::BTreeMap;
use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use metadata_ebpf::from_guest::METADATA_MAC;
use metadata_ebpf::identity::ClientAddress;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::maps::{ClientRecord, Counters, Heartbeat};
use super::{DatapathError, programs};
use crate::ids::IfIndex;
use crate::net::probe_pair::GUEST_MAC;

const PORTAL: &str = "portal";
const GUEST: &str = "guest-";
const FILTER: &str = "filter-";
const CLSACT: &str = "clsact-";
const NETNS: &str = "netns-";
/// Prefix of our maps' names in every ABI version.
const MAP: &str = "MD_";

/// The pins of one namespace, locked.
#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
    /// `None` for the pins of another namespace: the lock of the parent directory covers them.
    lock: Option<File>,
    /// The recorded filters, in case the directory is removed externally.
    records: Mutex<BTreeMap<IfIndex, FilterRecord>>,
}

/// Record of our filter on a guest's interface, in the namespace of the pins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FilterRecord {
    pub index: IfIndex,
    /// True if we created its qdisc.
    pub owns_qdisc: bool,
}

impl Pins {
    /// Opens the directory and creates it if it is missing.
    pub(crate) fn open(directory: &Path) -> Result<Self, DatapathError> {
        let failed = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        if !is_on_bpffs(directory).map_err(failed)? {
            return Err(failed(io::Error::new(io::ErrorKind::Unsupported, "not on a BPF file system")));
        }
        loop {
            DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
            if let Some(pins) = Self::lock(directory)? {
                return Ok(pins);
            }
        }
    }

    /// Opens the directory if it exists.
    pub(crate) fn find(directory: &Path) -> Result<Option<Self>, DatapathError> {
        let failed = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        if directory.try_exists().map_err(failed)? && is_on_bpffs(directory).map_err(failed)? {
            Self::lock(directory)
        } else {
            Ok(None)
        }
    }

    /// Returns `None` if the directory was removed before it was locked.
    fn lock(directory: &Path) -> Result<Option<Self>, DatapathError> {
        let failed = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        let lock = match File::open(directory) {
            Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(failed)?,
        };
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(DatapathError::InUse { path: directory.to_owned() });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let pins = Self::new(directory.to_owned(), Some(lock));
        if !pins.are_there() {
            return Ok(None);
        }
        pins.read_records()?;
        Ok(Some(pins))
    }

    fn new(directory: PathBuf, lock: Option<File>) -> Self {
        Self { directory, lock, records: Mutex::default() }
    }

    /// Returns false if the directory was removed or replaced after it was opened.
    pub(crate) fn are_there(&self) -> bool {
        let Ok(now) = fs::metadata(&self.directory) else { return false };
        let opened = self.lock.as_ref().map(File::metadata);
        opened.is_none_or(|opened| {
            opened.is_ok_and(|opened| (opened.dev(), opened.ino()) == (now.dev(), now.ino()))
        })
    }

    /// Returns the directory that was opened, if it still exists although its path leads elsewhere:
    /// another mount hides it.
    pub(crate) fn hidden(&self) -> Option<Self> {
        let lock = self.lock.as_ref().filter(|_| !self.are_there())?.try_clone().ok()?;
        let is_removed = lock.metadata().is_ok_and(|metadata| metadata.nlink() == 0);
        let path = PathBuf::from(format!("/proc/self/fd/{}", lock.as_raw_fd()));
        (!is_removed).then(|| Self::new(path, Some(lock)))
    }

    /// Creates the directory again, with the records of filters. The directory of another namespace
    /// waits until that of the host is back.
    pub(crate) fn restore(&mut self) -> Result<(), DatapathError> {
        if self.lock.is_some() {
            self.lock = Self::open(&self.directory)?.lock;
        } else if self.directory.parent().is_some_and(Path::is_dir) {
            create_directory(&self.directory)?;
        } else {
            return Ok(());
        }
        let records: Vec<_> = self.records().values().copied().collect();
        records.into_iter().try_for_each(|record| self.record_filter(record))
    }

    fn read_records(&self) -> Result<(), DatapathError> {
        let found = self.filters()?;
        self.records().extend(found.into_iter().map(|record| (record.index, record)));
        Ok(())
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<IfIndex, FilterRecord>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens the pins of another network namespace, below those of the host; creates the directory
    /// if it is missing.
    pub(crate) fn of_netns(directory: &Path, inode: u32) -> Result<Self, DatapathError> {
        let path = directory.join(format!("{NETNS}{inode}"));
        create_directory(&path)?;
        let pins = Self::new(path, None);
        pins.read_records()?;
        Ok(pins)
    }

    /// Opens the pins for reading while another handle holds the lock.
    pub(crate) fn unlocked(directory: &Path) -> Self {
        Self::new(directory.to_owned(), None)
    }

    /// Returns the inodes of the network namespaces that have pins.
    pub(crate) fn netns(&self) -> Result<Vec<u32>, DatapathError> {
        Ok(self.own_names()?.iter().filter_map(|name| name.strip_prefix(NETNS)?.parse().ok()).collect())
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(crate) fn map(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    pub(crate) fn portal(&self) -> PathBuf {
        self.directory.join(PORTAL)
    }

    pub(crate) fn guest(&self, index: IfIndex) -> PathBuf {
        self.directory.join(format!("{GUEST}{index}"))
    }

    /// Returns all pinned guest links.
    pub(crate) fn guests(&self) -> Result<Vec<(IfIndex, PathBuf)>, DatapathError> {
        let names = self.own_names()?;
        let guests = names.iter().filter_map(|name| index_in(name, GUEST));
        Ok(guests.map(|index| (index, self.guest(index))).collect())
    }

    /// Records a filter, and its qdisc if we create it, before either is created.
    pub(crate) fn record_filter(&self, record: FilterRecord) -> Result<(), DatapathError> {
        self.records().entry(record.index).or_insert(record).owns_qdisc |= record.owns_qdisc;
        self.create_record(FILTER, record.index)?;
        if record.owns_qdisc { self.create_record(CLSACT, record.index) } else { Ok(()) }
    }

    /// Returns the names of all pinned links.
    pub(crate) fn links(&self) -> Result<Vec<String>, DatapathError> {
        let is_link = |name: &String| name == PORTAL || name.starts_with(GUEST);
        Ok(self.own_names()?.into_iter().filter(is_link).collect())
    }

    /// Returns all recorded filters.
    pub(crate) fn filters(&self) -> Result<Vec<FilterRecord>, DatapathError> {
        let names = self.own_names()?;
        let recorded = names.iter().filter_map(|name| index_in(name, FILTER));
        Ok(recorded
            .map(|index| FilterRecord { index, owns_qdisc: names.contains(&format!("{CLSACT}{index}")) })
            .collect())
    }

    /// Returns the recorded filter of an interface.
    pub(crate) fn filter(&self, index: IfIndex) -> Option<FilterRecord> {
        let is_recorded = |prefix| self.directory.join(format!("{prefix}{index}")).is_dir();
        is_recorded(FILTER).then(|| FilterRecord { index, owns_qdisc: is_recorded(CLSACT) })
    }

    /// Removes the record of a filter, if there is one. The record of the qdisc goes first, because
    /// it is only looked up together with the filter.
    pub(crate) fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.disown_qdisc(index)?;
        self.records().remove(&index);
        self.remove_record(FILTER, index)
    }

    /// Records that the qdisc on an interface is not ours, or no longer ours.
    pub(crate) fn disown_qdisc(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.records().entry(index).and_modify(|record| record.owns_qdisc = false);
        self.remove_record(CLSACT, index)
    }

    /// Removes one pin, if it exists.
    pub(crate) fn remove(pin: &Path) -> Result<(), DatapathError> {
        ignore_absent(fs::remove_file(pin), pin.to_owned())
    }

    /// Removes maps and links. Links detach, and maps are freed with their last user. Records of
    /// filters stay.
    pub(crate) fn clear(&self) -> Result<(), DatapathError> {
        let is_record = |name: &str| name.starts_with(FILTER) || name.starts_with(CLSACT);
        for inode in self.netns()? {
            Self::of_netns(&self.directory, inode)?.remove_all()?;
        }
        let is_file = |name: &&String| !is_record(name) && !name.starts_with(NETNS);
        for name in self.own_names()?.iter().filter(is_file) {
            Self::remove(&self.directory.join(name))?;
        }
        Ok(())
    }

    /// Removes maps and links, and the directory unless it still contains a record of a filter or
    /// files of another program.
    pub(crate) fn remove_all(self) -> Result<(), DatapathError> {
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

    fn create_record(&self, prefix: &str, index: IfIndex) -> Result<(), DatapathError> {
        create_directory(&self.directory.join(format!("{prefix}{index}")))
    }

    fn remove_record(&self, prefix: &str, index: IfIndex) -> Result<(), DatapathError> {
        let path = self.directory.join(format!("{prefix}{index}"));
        ignore_absent(fs::remove_dir(&path), path)
    }

    /// Returns the pinned maps by path.
    pub(crate) fn maps(&self) -> Result<Vec<PathBuf>, DatapathError> {
        let names = self.own_names()?.into_iter().filter(|name| name.starts_with(MAP));
        Ok(names.map(|name| self.directory.join(name)).collect())
    }

    /// Returns the names in the directory that can be ours.
    fn own_names(&self) -> Result<Vec<String>, DatapathError> {
        let is_own = |name: &String| {
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
        Ok(names.into_iter().flatten().filter(is_own).collect())
    }
}

/// Creates a directory unless it exists.
fn create_directory(path: &Path) -> Result<(), DatapathError> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
            Err(DatapathError::PinDirectory { path: path.to_owned(), source })
        }
        _ => Ok(()),
    }
}

fn index_in(name: &str, prefix: &str) -> Option<IfIndex> {
    name.strip_prefix(prefix)?.parse().ok().map(IfIndex)
}

/// Returns true if a path is on a BPF file system, or would be once it is created.
fn is_on_bpffs(path: &Path) -> io::Result<bool> {
    let existing = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    Ok(statfs(existing)?.filesystem_type() == BPF_FS_MAGIC)
}

fn ignore_absent(removed: io::Result<()>, path: PathBuf) -> Result<(), DatapathError> {
    match removed {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::PinDirectory { path, source })
        }
        _ => Ok(()),
    }
}

/// Everything that agents of any version left under a pin directory, for removal.
#[derive(Debug)]
pub(crate) struct StaleState(Pins);

impl StaleState {
    /// Returns `None` if there is no such directory on a BPF file system.
    ///
    /// # Errors
    /// An agent uses the directory, or it cannot be read.
    pub(crate) fn find(pin_directory: &Path) -> Result<Option<Self>, DatapathError> {
        Ok(Pins::find(pin_directory)?.map(Self))
    }

    /// Marks the agent as absent. Returns the clients that sent their last SYN to the programs' MAC
    /// address, because they reach the metadata address on their link.
    ///
    /// # Errors
    /// A map operation fails.
    pub(crate) fn abandon_clients(&self) -> Result<Vec<ClientAddress>, DatapathError> {
        if !programs::abi_matches(&self.0) {
            return Ok(Vec::new());
        }
        Heartbeat::open(&self.0)?.stop();
        let records = Counters::open(&self.0)?.clients()?;
        // Nothing becomes of the agent's own interface, so it need not learn another path.
        let is_guest = |record: &&ClientRecord| record.client.guest_mac != GUEST_MAC.0;
        let is_on_link = |record: &&ClientRecord| record.client.metadata_mac == METADATA_MAC;
        Ok(records.iter().filter(is_guest).filter(is_on_link).map(|record| record.address).collect())
    }

    /// Returns the recorded filters. A pin cannot hold a filter, so [`Self::remove`] does not
    /// remove them.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn filters(&self) -> Result<Vec<FilterRecord>, DatapathError> {
        self.0.filters()
    }

    /// Removes the record of a filter after the filter was removed.
    ///
    /// # Errors
    /// The record cannot be removed.
    pub(crate) fn forget_filter(&self, index: IfIndex) -> Result<(), DatapathError> {
        self.0.forget_filter(index)
    }

    /// Returns the state of other network namespaces by inode.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn in_namespaces(&self) -> Result<Vec<(u32, Self)>, DatapathError> {
        let of = |inode| Ok((inode, Self(Pins::of_netns(self.0.directory(), inode)?)));
        self.0.netns()?.into_iter().map(of).collect()
    }

    /// Removes every link and every pin, and the directory if nothing else is in it.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub(crate) fn remove(self) -> Result<(), DatapathError> {
        self.0.remove_all()
    }
}
