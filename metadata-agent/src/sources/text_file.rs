//! Safe reading of a small text file at a path that may lead to something else.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::OFlag;

/// Error while reading a file. The message does not contain the path.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    #[error("cannot open: {0}")]
    Open(#[source] io::Error),
    #[error("cannot stat: {0}")]
    Stat(#[source] io::Error),
    #[error("cannot read: {0}")]
    Read(#[source] io::Error),
    #[error("is a symlink, which is not followed")]
    Symlink,
    /// The path leads to a directory, a pipe or a device.
    #[error("is not a regular file")]
    NotRegular,
    #[error("is larger than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("is not UTF-8 at byte {offset}")]
    NotUtf8 {
        /// Offset of the first invalid byte.
        offset: usize,
    },
}

/// Treatment of a symlink as the last component of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Symlinks {
    Follow,
    Refuse,
}

/// Reads a regular file of at most `limit` bytes. `None` if the file does not exist.
pub(super) fn read(path: &Path, symlinks: Symlinks, limit: u64) -> Result<Option<String>, FileError> {
    // Without O_NONBLOCK, opening a pipe would wait for a writer.
    let mut flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    if symlinks == Symlinks::Refuse {
        flags |= OFlag::O_NOFOLLOW;
    }
    let file = match OpenOptions::new().read(true).custom_flags(flags.bits()).open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if symlinks == Symlinks::Refuse && error.raw_os_error() == Some(Errno::ELOOP as i32) => {
            return Err(FileError::Symlink);
        }
        Err(error) => return Err(FileError::Open(error)),
    };
    let metadata = file.metadata().map_err(FileError::Stat)?;
    if !metadata.is_file() {
        return Err(FileError::NotRegular);
    }
    if metadata.len() > limit {
        return Err(FileError::TooLarge { limit });
    }
    read_text(file, limit).map(Some)
}

fn read_text(file: File, limit: u64) -> Result<String, FileError> {
    let mut bytes = Vec::new();
    // The file may have grown since its size was checked.
    let length = file.take(limit + 1).read_to_end(&mut bytes).map_err(FileError::Read)?;
    if length as u64 > limit {
        return Err(FileError::TooLarge { limit });
    }
    String::from_utf8(bytes).map_err(|error| FileError::NotUtf8 { offset: error.utf8_error().valid_up_to() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::sys::stat::Mode;

    #[test]
    fn only_a_regular_text_file_within_the_limit_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("full"), "12345678").unwrap();
        fs::write(path("over"), "123456789").unwrap();
        fs::write(path("latin"), b"ab\xfc").unwrap();
        fs::create_dir(path("folder")).unwrap();
        symlink("full", path("link")).unwrap();
        nix::unistd::mkfifo(&path("pipe"), Mode::S_IRWXU).unwrap();
        let read = |name: &str, symlinks| read(&path(name), symlinks, 8);

        assert_eq!(read("full", Symlinks::Refuse).unwrap().as_deref(), Some("12345678"));
        assert_eq!(read("link", Symlinks::Follow).unwrap().as_deref(), Some("12345678"));
        assert!(read("none", Symlinks::Refuse).unwrap().is_none());
        assert!(matches!(read("over", Symlinks::Refuse), Err(FileError::TooLarge { limit: 8 })));
        assert!(matches!(read("latin", Symlinks::Refuse), Err(FileError::NotUtf8 { offset: 2 })));
        assert!(matches!(read("folder", Symlinks::Refuse), Err(FileError::NotRegular)));
        assert!(matches!(read("link", Symlinks::Refuse), Err(FileError::Symlink)));
        assert!(matches!(read("pipe", Symlinks::Refuse), Err(FileError::NotRegular)));
        assert!(matches!(read("full/deeper", Symlinks::Refuse), Err(FileError::Open(_))));
    }
}
