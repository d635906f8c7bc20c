//! The file of a unix socket: taken over from a process that is gone, never from one that answers, and removed by its owner
//! alone.

use std::fs::{self, DirBuilder, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net;
use std::path::{Path, PathBuf};

/// Of the socket's directory, where it has to be made.
const DIR_MODE: u32 = 0o755;

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum SocketFileError {
    /// Somebody answers there.
    #[error("another agent answers on {}; stop it first", path.display())]
    AnotherAgent {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket, which is not ours to remove.
    #[error("{} is there and is no socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// A step towards the socket failed.
    #[error("cannot {step} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        step: &'static str,
        /// What it was tried on.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A bound socket. Dropping it removes its file.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode of the file, by which it is told from a successor's.
    file: (u64, u64),
    listener: Option<net::UnixListener>,
}

impl SocketFile {
    /// Binds the socket, with its directory if need be, and lets those use it that `mode` says. Clients can connect from
    /// here on, and wait to be served.
    ///
    /// # Errors
    /// Another agent answers at this path, something that is no socket is there, or the system refuses.
    pub fn bind(path: &Path, mode: u32) -> Result<Self, SocketFileError> {
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
        let listener = net::UnixListener::bind(path).map_err(failed("bind"))?;
        fs::set_permissions(path, Permissions::from_mode(mode)).map_err(failed("set the mode of"))?;
        let metadata = fs::symlink_metadata(path).map_err(failed("look at"))?;
        listener.set_nonblocking(true).map_err(failed("set up"))?;
        let file = (metadata.dev(), metadata.ino());
        Ok(Self { path: path.to_owned(), file, listener: Some(listener) })
    }

    /// The listener, for the runtime that this is called in. It can be taken once.
    ///
    /// # Errors
    /// The runtime does not take it.
    pub fn listener(&mut self) -> Result<tokio::net::UnixListener, SocketFileError> {
        let Some(listener) = self.listener.take() else { unreachable!("the listener is taken once") };
        tokio::net::UnixListener::from_std(listener).map_err(|source| SocketFileError::Io {
            step: "poll",
            path: self.path.clone(),
            source,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|now| (now.dev(), now.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

/// Removes a socket on which nobody listens any more.
fn remove_stale(path: &Path) -> Result<(), SocketFileError> {
    let failed = |step, source| Err(SocketFileError::Io { step, path: path.to_owned(), source });
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.file_type().is_socket() => {}
        Ok(_) => return Err(SocketFileError::NotASocket { path: path.to_owned() }),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return failed("look at", error),
    }
    match connect(path) {
        Ok(()) => Err(SocketFileError::AnotherAgent { path: path.to_owned() }),
        // A full backlog: somebody listens, however busy.
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            Err(SocketFileError::AnotherAgent { path: path.to_owned() })
        }
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => failed("remove stale", error),
            Ok(()) | Err(_) => Ok(()),
        },
        Err(error) => failed("connect to", error),
    }
}

/// Connects without waiting for room in the backlog.
fn connect(path: &Path) -> io::Result<()> {
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    socket.set_nonblocking(true)?;
    socket.connect(&socket2::SockAddr::unix(path)?)
}
