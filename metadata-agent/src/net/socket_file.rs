//! The file of a unix socket. A new owner takes over a file without a listener, never one with a
//! listener. Only the owner removes the file.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::unistd::{Gid, chown};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::time::sleep;
use tracing::warn;

use crate::net::damage::{DamageKind, DamageReports, Effect, Part};

/// The interval at which a guard looks for the file.
const LOOK: Duration = Duration::from_secs(1);
/// Mode of the socket's directory, if it has to be created.
const DIR_MODE: u32 = 0o755;

#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketFileError {
    /// Another process accepts connections there.
    #[error("another agent answers on {}; stop it first", path.display())]
    AnotherAgent { path: PathBuf },
    /// The file at this path is not a socket, so it is not removed.
    #[error("{} exists and is not a socket", path.display())]
    NotASocket { path: PathBuf },
    #[error("cannot {step} {}: {source}", path.display())]
    Io {
        /// Failed operation, as a verb.
        step: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// The kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = i32::MAX;

/// A bound socket. Dropping it removes its file.
#[derive(Debug)]
pub(crate) struct SocketFile {
    path: PathBuf,
    mode: u32,
    group: Option<Gid>,
    /// Device and inode, which distinguish the file from that of a later owner.
    file: (u64, u64),
    listener: Option<net::UnixListener>,
}

impl SocketFile {
    /// Binds the socket with this mode, and creates its directory if necessary. From now on clients
    /// can connect and wait.
    ///
    /// # Errors
    /// Another agent listens at this path, the file there is not a socket, or a system call fails.
    pub(crate) fn bind(path: &Path, mode: u32) -> Result<Self, SocketFileError> {
        Self::bind_for_group(path, mode, None)
    }

    /// Binds the socket like [`Self::bind`], and gives it to a group.
    ///
    /// # Errors
    /// Those of [`Self::bind`], or this process is not in the group.
    pub(crate) fn bind_for_group(
        path: &Path,
        mode: u32,
        group: Option<Gid>,
    ) -> Result<Self, SocketFileError> {
        let failed = |step| move |source| SocketFileError::Io { step, path: path.to_owned(), source };
        if let Some(dir) = path.parent() {
            let created = DirBuilder::new().recursive(true).mode(DIR_MODE).create(dir);
            created.map_err(|source| SocketFileError::Io {
                step: "make directory",
                path: dir.to_owned(),
                source,
            })?;
        }
        remove_stale(path)?;
        let socket = Socket::new(Domain::UNIX, Type::STREAM, None).map_err(failed("open"))?;
        SockAddr::unix(path).and_then(|address| socket.bind(&address)).map_err(failed("bind"))?;
        // Before `listen`, so that no process can connect while the umask decides the mode.
        if let Some(group) = group {
            let given = chown(path, None, Some(group)).map_err(io::Error::from);
            given.map_err(failed("set the group (is the agent in it?) of"))?;
        }
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of"))?;
        socket.listen(BACKLOG).map_err(failed("listen on"))?;
        let listener = net::UnixListener::from(socket);
        let metadata = fs::symlink_metadata(path).map_err(failed("inspect"))?;
        listener.set_nonblocking(true).map_err(failed("set up"))?;
        let file = (metadata.dev(), metadata.ino());
        Ok(Self { path: path.to_owned(), mode, group, file, listener: Some(listener) })
    }

    /// Waits until other software has removed or replaced the file, and binds the socket again.
    /// Then [`Self::listener`] returns the new listener.
    pub(crate) async fn restored(&mut self, part: Part, reports: &DamageReports) {
        loop {
            sleep(LOOK).await;
            if self.is_there() {
                reports.clear(part);
                continue;
            }
            let path = self.path.display();
            if !reports.is_damaged(part) {
                reports.count(DamageKind::Socket);
            }
            // The former file's inode is in use until the former listener is closed, so the new
            // file has another one.
            match Self::bind_for_group(&self.path, self.mode, self.group) {
                Ok(bound) => {
                    warn!(%path, "socket was removed externally; bound again");
                    *self = bound;
                    return reports.clear(part);
                }
                Err(error) => {
                    if !reports.is_damaged(part) {
                        warn!(%path, %error, "socket was removed externally and cannot be bound; retrying");
                    }
                    reports.report(part, vec![error.to_string()], Effect::Served);
                }
            }
        }
    }

    /// Returns true if the path still leads to this socket.
    fn is_there(&self) -> bool {
        fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file)
    }

    /// Returns the listener, once for each time that the socket is bound.
    pub(crate) fn listener(&mut self) -> net::UnixListener {
        let Some(listener) = self.listener.take() else { unreachable!("the listener is taken once") };
        listener
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.is_there()
            && let Err(error) = fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Checks that a socket can be bound at this path. Changes nothing.
///
/// # Errors
/// Another process listens there, the file there is not a socket, or a system call fails.
pub(crate) fn is_available(path: &Path) -> Result<(), SocketFileError> {
    find_stale(path).map(drop)
}

/// The file at the path of a socket that is to be bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Occupant {
    None,
    /// A socket without a listener.
    StaleSocket,
}

fn find_stale(path: &Path) -> Result<Occupant, SocketFileError> {
    let failed = |step, source| Err(SocketFileError::Io { step, path: path.to_owned(), source });
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(SocketFileError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Occupant::None),
        Err(error) => return failed("inspect", error),
    }
    match connect(path) {
        Ok(()) => Err(SocketFileError::AnotherAgent { path: path.to_owned() }),
        // The backlog is full, so there is a listener.
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(SocketFileError::AnotherAgent { path: path.to_owned() })
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(Occupant::StaleSocket),
        Err(error) => failed("connect to", error),
    }
}

/// Removes a socket without a listener.
fn remove_stale(path: &Path) -> Result<(), SocketFileError> {
    if find_stale(path)? == Occupant::None {
        return Ok(());
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != ErrorKind::NotFound => {
            Err(SocketFileError::Io { step: "remove stale", path: path.to_owned(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Connects without waiting for room in the backlog.
fn connect(path: &Path) -> io::Result<()> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)
}
