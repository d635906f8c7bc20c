//! Network namespaces: the only module that names `setns`.
//!
//! A named namespace is what `ip netns` makes of one: a bind mount of its nsfs file under `/run/netns`. Nothing here
//! ever changes the namespace of a thread that does anything else.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, fstatfs};

/// Where `ip netns` keeps named namespaces.
pub const NAMED: &str = "/run/netns";

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

/// What can go wrong with a namespace.
#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    /// A system call failed.
    #[error("cannot {operation} network namespace {name}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The namespace.
        name: String,
        /// Why not.
        source: io::Error,
    },
    /// The thread that works inside the namespace ended before its work.
    #[error("the thread in network namespace {name} panicked")]
    Panicked {
        /// The namespace.
        name: String,
    },
}

/// An open network namespace. It lives at least as long as this.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: File,
}

impl Netns {
    /// The namespace of the calling thread.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> Result<Self, NetnsError> {
        Self::open_path("of this thread", Path::new("/proc/thread-self/ns/net"))
    }

    /// The named namespace, or `None` if there is none: no file, or a file left over from a namespace that is gone.
    ///
    /// # Errors
    /// The file cannot be opened or looked at.
    pub fn named(name: &str) -> Result<Option<Self>, NetnsError> {
        let netns = match Self::open_path(name, &path_of(name)) {
            Err(NetnsError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            opened => opened?,
        };
        let kind = fstatfs(&netns.file).map_err(|errno| failed("look at", name, errno))?;
        Ok((kind.filesystem_type() == NSFS_MAGIC).then_some(netns))
    }

    /// Makes a named namespace, on the file of a namespace that is gone if need be.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`, or when `/run/netns` cannot be written.
    pub fn create(name: &str) -> Result<Self, NetnsError> {
        share_directory().map_err(|source| io_failed("prepare /run/netns for", name, source))?;
        let path = path_of(name);
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(|source| io_failed("create the file of", name, source))?;
        in_own_thread(name, || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| failed("create", name, errno))?;
            let own = "/proc/thread-self/ns/net";
            mount(Some(own), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                .map_err(|errno| failed("mount", name, errno))
        })??;
        Self::open_path(name, &path)
    }

    /// Removes a named namespace; fine if there is none. The namespace itself goes when nobody holds it open any more.
    ///
    /// # Errors
    /// The mount or the file cannot be removed.
    pub fn remove(name: &str) -> Result<(), NetnsError> {
        let path = path_of(name);
        while Self::named(name)?.is_some() {
            umount2(&path, MntFlags::MNT_DETACH).map_err(|errno| failed("unmount", name, errno))?;
        }
        match std::fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => Err(io_failed("remove", name, source)),
            _ => Ok(()),
        }
    }

    /// Runs `work` on a thread of its own inside the namespace.
    ///
    /// # Errors
    /// Without `CAP_SYS_ADMIN`, or when `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        in_own_thread(&self.name, || {
            setns(&self.file, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| failed("enter", &self.name, errno))?;
            Ok(work())
        })?
    }

    /// Runs `work` in one namespace after the other, all on one thread: a thread for each would cost more than the work.
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_in_each<'a, S: Send, T: Send>(
        stops: impl Iterator<Item = (&'a Self, S)> + Send,
        work: impl Fn(S) -> T + Sync,
    ) -> Result<Vec<T>, NetnsError> {
        in_own_thread("of many", || {
            let visit = |(netns, stop): (&Self, S)| {
                setns(&netns.file, CloneFlags::CLONE_NEWNET)
                    .map_err(|errno| failed("enter", &netns.name, errno))?;
                Ok(work(stop))
            };
            stops.map(visit).collect()
        })?
    }

    /// What tells it from every other namespace for as long as it lives: the inode of its nsfs file, which the kernel
    /// draws from 32 bits (fs/nsfs.c, `ns_alloc_inum`).
    ///
    /// # Errors
    /// The file cannot be looked at.
    pub fn inode(&self) -> Result<u32, NetnsError> {
        let inode = self.file.metadata().map_err(|source| io_failed("look at", &self.name, source))?.ino();
        u32::try_from(inode).map_err(|_| io_failed("number", &self.name, io::ErrorKind::InvalidData.into()))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The names that there are, of namespaces or of whatever else somebody has left there.
    ///
    /// # Errors
    /// The directory cannot be read; none at all is no error.
    pub fn names() -> io::Result<Vec<String>> {
        let entries = match std::fs::read_dir(NAMED) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        Ok(names.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
    }

    /// The named namespace with this inode, if there is one.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn by_inode(inode: u32) -> Result<Option<Self>, NetnsError> {
        let names = Self::names().map_err(|source| io_failed("list", "of any name", source))?;
        // What cannot be opened is not one that an agent could work in either.
        let mut candidates = names.iter().filter_map(|name| Self::named(name).ok().flatten());
        Ok(candidates.find(|netns| netns.inode().is_ok_and(|found| found == inode)))
    }

    /// The file descriptor, for netlink messages that name a namespace.
    #[must_use]
    pub fn as_raw_fd(&self) -> RawFd {
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

/// As `ip netns add` does (iproute2 ip/ipnetns.c, `create_netns_dir` and its caller): the directory is a shared mount of
/// its own, so that names appear in mount namespaces that follow this one.
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
