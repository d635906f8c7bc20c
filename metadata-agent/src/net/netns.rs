//! Network namespaces: the only module that names `setns`.
//!
//! A named namespace is one created like `ip netns add` does: a bind mount of its nsfs file under
//! `/run/netns`. Every function here enters namespaces on a thread of its own, so no other thread
//! changes its namespace.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs};

/// Directory of named namespaces, the same as that of `ip netns`.
pub(crate) const NAMED: &str = "/run/netns";

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("cannot {operation} network namespace {name}: {source}")]
    Io { operation: &'static str, name: String, source: io::Error },
    /// The thread inside the namespace panicked.
    #[error("the thread in network namespace {name} panicked")]
    Panicked { name: String },
}

/// An open network namespace. It stays alive at least as long as this handle.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// Opens a named namespace. Returns `None` if there is no file, or if the file is left over
    /// from a namespace that is gone.
    ///
    /// # Errors
    /// The file cannot be opened or inspected.
    pub fn named(name: &str) -> Result<Option<Self>, NetnsError> {
        let netns = match Self::open_path(name, &path_of(name)) {
            Err(NetnsError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            opened => opened?,
        };
        let kind = fstatfs(&netns.file).map_err(|errno| failed("inspect", name, errno))?;
        Ok((kind.filesystem_type() == NSFS_MAGIC).then_some(netns))
    }

    /// Creates a named namespace, reusing the file of a namespace that is gone.
    ///
    /// # Errors
    /// `CAP_SYS_ADMIN` is missing, or `/run/netns` is not writable.
    pub(crate) fn create(name: &str) -> Result<Self, NetnsError> {
        let path = create_file(name)?;
        in_own_thread(name, || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed("create", name, errno))?;
            let own = "/proc/thread-self/ns/net";
            mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|errno| failed("mount", name, errno))
        })??;
        Self::open_path(name, &path)
    }

    /// Creates a namespace without a name. The kernel removes it, with the links in it, once its
    /// handle is dropped or the process ends.
    ///
    /// # Errors
    /// `CAP_SYS_ADMIN` is missing.
    pub(crate) fn unnamed(label: &str) -> Result<Self, NetnsError> {
        in_own_thread(label, || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed("create", label, errno))?;
            Self::open_path(label, Path::new("/proc/thread-self/ns/net"))
        })?
    }

    /// Removes the name of a namespace, if it exists. The namespace itself is freed with its last
    /// user.
    ///
    /// # Errors
    /// The mount or the file cannot be removed.
    pub(crate) fn remove(name: &str) -> Result<(), NetnsError> {
        let path = path_of(name);
        while Self::named(name)?.is_some() {
            umount2(&path, MntFlags::MNT_DETACH).map_err(|errno| failed("unmount", name, errno))?;
        }
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_failed("remove", name, source)),
            _ => Ok(()),
        }
    }

    /// Gives the namespace its name again. Whatever else has the name loses it.
    ///
    /// # Errors
    /// The name is in use by a directory, or the mount fails.
    pub(crate) fn restore_name(&self) -> Result<(), NetnsError> {
        let name = self.name.as_str();
        Self::remove(name)?;
        let path = create_file(name)?;
        let own = format!("/proc/self/fd/{}", self.as_raw_fd());
        mount(Some(own.as_str()), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .map_err(|errno| failed("mount", name, errno))
    }

    /// Runs `work` inside the namespace, on a thread of its own.
    ///
    /// # Errors
    /// `CAP_SYS_ADMIN` is missing, or `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        in_own_thread(&self.name, || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| failed("enter", &self.name, errno))?;
            Ok(work())
        })?
    }

    /// Runs `work` in one namespace after the other, all on one thread: a thread for each would
    /// cost more than the work.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub(crate) fn run_in_each<'a, S: Send, T: Send>(
        items: impl Iterator<Item = (&'a Self, S)> + Send,
        work: impl Fn(S) -> T + Sync,
    ) -> Result<Vec<T>, NetnsError> {
        in_own_thread("(several)", || {
            let visit = |(netns, item): (&Self, S)| {
                setns(&netns.file, CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| failed("enter", &netns.name, errno))?;
                Ok(work(item))
            };
            items.map(visit).collect()
        })?
    }

    /// Returns the inode of the nsfs file, which identifies the namespace as long as it lives. The
    /// kernel allocates it from 32 bits (fs/nsfs.c, `ns_alloc_inum`).
    ///
    /// # Errors
    /// The file cannot be inspected.
    pub(crate) fn inode(&self) -> Result<u32, NetnsError> {
        let inode = self.file.metadata().map_err(|source| io_failed("inspect", &self.name, source))?.ino();
        u32::try_from(inode).map_err(|_| io_failed("number", &self.name, io::ErrorKind::InvalidData.into()))
    }

    #[must_use]
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Returns all names in the directory, including files that are not namespaces.
    ///
    /// # Errors
    /// The directory cannot be read. A missing directory is not an error.
    pub(crate) fn names() -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(NAMED) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        Ok(names.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// Returns the named namespace with this inode, if there is one.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub(crate) fn by_inode(inode: u32) -> Result<Option<Self>, NetnsError> {
        let names = Self::names().map_err(|source| io_failed("list", "of any name", source))?;
        // A namespace that cannot be opened is of no use to the caller.
        let mut candidates = names.iter().filter_map(|name| Self::named(name).ok().flatten());
        Ok(candidates.find(|netns| netns.inode().is_ok_and(|found| found == inode)))
    }

    /// Returns the file descriptor, for netlink messages that refer to a namespace.
    #[must_use]
    pub(crate) fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn open_path(name: &str, path: &Path) -> Result<Self, NetnsError> {
        let file = File::open(path).map_err(|source| io_failed("open", name, source))?;
        Ok(Self { name: name.to_owned(), file })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn path_of(name: &str) -> PathBuf {
    Path::new(NAMED).join(name)
}

/// Creates the file that a namespace is mounted on, unless it exists.
fn create_file(name: &str) -> Result<PathBuf, NetnsError> {
    share_directory().map_err(|source| io_failed("prepare /run/netns for", name, source))?;
    let path = path_of(name);
    let file = OpenOptions::new().create(true).append(true).open(&path);
    file.map_err(|source| io_failed("create the file of", name, source))?;
    Ok(path)
}

/// Makes the directory a shared mount of its own, as `ip netns add` does (iproute2 ip/ipnetns.c,
/// `create_netns_dir` and its caller). So names appear in mount namespaces that receive its mount
/// events.
fn share_directory() -> io::Result<()> {
    std::fs::create_dir_all(NAMED)?;
    let share =
        || mount(None::<&str>, NAMED, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    if share().is_ok() {
        return Ok(());
    }
    mount(Some(NAMED), NAMED, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    Ok(share()?)
}

fn in_own_thread<T: Send>(name: &str, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
    thread::scope(|scope| scope.spawn(work).join())
        .map_err(|_| NetnsError::Panicked { name: name.to_owned() })
}

fn failed(operation: &'static str, name: &str, errno: nix::Error) -> NetnsError {
    io_failed(operation, name, errno.into())
}

fn io_failed(operation: &'static str, name: &str, source: io::Error) -> NetnsError {
    NetnsError::Io { operation, name: name.to_owned(), source }
}
