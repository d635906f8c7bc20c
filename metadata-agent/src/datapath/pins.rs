//! The bpffs directory: where each pin is, and how it goes.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::DatapathError;
use crate::ids::IfIndex;

const PORTAL: &str = "portal";
const GUEST: &str = "guest-";

#[derive(Debug)]
pub(super) struct Pins {
    directory: PathBuf,
}

impl Pins {
    /// Makes the directory if need be.
    pub fn open(directory: &Path) -> Result<Self, DatapathError> {
        let fault = |source| DatapathError::PinDirectory { path: directory.to_owned(), source };
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(fault)?;
        let kind = statfs(directory).map_err(|errno| fault(errno.into()))?.filesystem_type();
        if kind != BPF_FS_MAGIC {
            // The directory was made on some other file system, and must not stay there.
            fs::remove_dir(directory).map_err(fault)?;
            return Err(fault(io::Error::new(io::ErrorKind::Unsupported, "not on a bpf file system")));
        }
        Ok(Self { directory: directory.to_owned() })
    }

    /// The directory if it is there.
    pub fn find(directory: &Path) -> Result<Option<Self>, DatapathError> {
        match directory.try_exists() {
            Ok(true) => Ok(Some(Self { directory: directory.to_owned() })),
            Ok(false) => Ok(None),
            Err(source) => Err(DatapathError::PinDirectory { path: directory.to_owned(), source }),
        }
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
        let index = |path: &Path| path.file_name()?.to_str()?.strip_prefix(GUEST)?.parse().ok().map(IfIndex);
        Ok(self.all()?.into_iter().filter_map(|path| index(&path).map(|index| (index, path))).collect())
    }

    /// Removes one pin; fine if there is none.
    pub fn remove(pin: &Path) -> Result<(), DatapathError> {
        match fs::remove_file(pin) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(DatapathError::PinDirectory { path: pin.to_owned(), source })
            }
            _ => Ok(()),
        }
    }

    /// Removes every pin: links detach and maps go as their last holders do.
    pub fn clear(&self) -> Result<(), DatapathError> {
        for pin in self.all()? {
            Self::remove(&pin)?;
        }
        Ok(())
    }

    /// Removes every pin and the directory.
    pub fn remove_all(&self) -> Result<(), DatapathError> {
        self.clear()?;
        fs::remove_dir(&self.directory)
            .map_err(|source| DatapathError::PinDirectory { path: self.directory.clone(), source })
    }

    fn all(&self) -> Result<Vec<PathBuf>, DatapathError> {
        let entries =
            || fs::read_dir(&self.directory)?.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>();
        entries().map_err(|source| DatapathError::PinDirectory { path: self.directory.clone(), source })
    }
}
