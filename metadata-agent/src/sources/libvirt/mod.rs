//! Ports of the domains that libvirt runs on this host, from libvirt's XML files.
//!
//! Input is the directory of running domains, `/run/libvirt/qemu`. libvirt writes `<name>.xml` when
//! a domain starts and at each change (as `<name>.xml.new`, which it renames), and removes it when
//! the domain ends. libvirtd is never called. Entries without the suffix `.xml` are skipped. Each
//! file is one key of the inventory ([`domain`]). Domains without Nova's metadata are ignored and
//! counted.
//!
//! An unreadable or invalid file is withdrawn at once: it may belong to another instance by now. An
//! unknown port costs a guest a retry, but serving the old instance would leak one tenant's secrets
//! to another. libvirt renames complete files into place, so an incomplete file is seen only if
//! other software writes there, and its completion is a new event. If the directory cannot be
//! listed, the known files are read one by one.
//!
//! Files are opened without following symlinks and without waiting for the writer of a pipe, and
//! read up to [`MAX_DOMAIN_BYTES`]. Depth, namespaces and attributes are bounded before the parser
//! sees the text ([`document_limits`]). An invalid file is reported by name and does not affect the
//! others. Texts chosen by tenants, such as the instance's name, are not read.

mod document_limits;
mod domain;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Reporter;
use super::directory_watch::{DirectoryChange, DirectoryWatch};
use super::text_file::{self, FileError, Symlinks};
use crate::inventory::{Event, Port, PortRecord, SourceKind};
use crate::process::blocking::blocking;

pub(crate) use domain::{DomainError, parse_domain};

/// Largest accepted domain XML.
pub(crate) const MAX_DOMAIN_BYTES: u64 = 4 * 1024 * 1024;

/// The directory of running domains.
#[derive(Clone, Debug)]
pub(crate) struct DomainDirectory {
    pub path: PathBuf,
    /// False for the default. A host without libvirt does not have it, or not yet.
    pub is_configured: bool,
}

/// Unreadable or invalid domain file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DomainFileError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("file name is not UTF-8")]
    NameNotUtf8,
    #[error(transparent)]
    Domain(#[from] DomainError),
}

/// Content of one file.
enum DomainFile {
    Missing,
    Foreign,
    Ports(Vec<Port>),
    Invalid(DomainFileError),
}

/// Last known state of one file.
#[derive(Debug, PartialEq, Eq)]
enum FileState {
    Foreign,
    Ports(usize),
    Invalid(String),
}

/// Sends the ports of the domains in `directory` until cancelled or until the receiver is dropped.
pub(crate) async fn run(
    directory: DomainDirectory,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let follow = follow(directory, events, reporter);
    // Cancelling at any point is safe: the next start reads all files.
    let _stopped = cancel.run_until_cancelled_owned(follow).await;
}

/// Summary of a directory of domains.
#[derive(Debug, Default)]
pub(crate) struct DomainSummary {
    /// Domains created by Nova.
    pub domains: usize,
    pub ports: usize,
    /// Other domains.
    pub others: usize,
    /// Unreadable or invalid files by name.
    pub errors: Vec<(String, DomainFileError)>,
}

/// Reads all domains once.
///
/// # Errors
/// The directory cannot be listed.
pub(crate) fn probe(directory: &Path) -> Result<DomainSummary, io::Error> {
    let mut summary = DomainSummary::default();
    let (files_read, listed) = read_changed(directory, DirectoryChange::All, Vec::new());
    listed?;
    for (name, file) in files_read {
        match file {
            DomainFile::Missing => {}
            DomainFile::Foreign => summary.others += 1,
            DomainFile::Invalid(error) => summary.errors.push((name.to_string_lossy().into_owned(), error)),
            DomainFile::Ports(ports) => {
                summary.domains += 1;
                summary.ports += ports.len();
            }
        }
    }
    Ok(summary)
}

async fn follow(directory: DomainDirectory, events: mpsc::Sender<Event>, reporter: Reporter) -> Option<()> {
    let DomainDirectory { path: directory, is_configured } = directory;
    let mut was_listed = false;
    let mut watch = DirectoryWatch::new(directory.clone());
    let mut files: BTreeMap<OsString, FileState> = BTreeMap::new();
    let mut ready = false;
    loop {
        let change = watch.changed(reporter.recheck()).await;
        let known: Vec<OsString> = files.keys().cloned().collect();
        let folder = directory.clone();
        // Read what changed, and send it.
        let (files_read, listed) = blocking(move || read_changed(&folder, change, known)).await?;
        for (name, file) in files_read {
            let (ports, state) = match file {
                DomainFile::Missing => (Vec::new(), None),
                DomainFile::Foreign => (Vec::new(), Some(FileState::Foreign)),
                DomainFile::Invalid(error) => (Vec::new(), Some(FileState::Invalid(error.to_string()))),
                DomainFile::Ports(ports) => {
                    let state = FileState::Ports(ports.len());
                    (ports, Some(state))
                }
            };
            match state {
                Some(state) => files.insert(name.clone(), state),
                None => files.remove(&name),
            };
            let key = name.to_string_lossy().into_owned();
            let ports = ports.into_iter().map(PortRecord::from).collect();
            events.send(Event { source: SourceKind::Libvirt, key, ports }).await.ok()?;
        }
        was_listed |= listed.is_ok();
        let is_missing = listed.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
        // The host has no libvirt. If the directory appears, it is read.
        let is_absent = is_missing && !is_configured && !was_listed;
        ready |= listed.is_ok() || is_absent;

        // Report the state of all files.
        let mut faults: BTreeMap<String, String> = BTreeMap::new();
        let place = directory.display().to_string();
        if let Some(error) = watch.error() {
            faults.insert(place.clone(), error.to_string());
        }
        if let Err(error) = listed
            && !is_absent
        {
            faults.insert(place, format!("cannot list directory: {error}"));
        }
        let (mut ports, mut ignored) = (0, 0);
        for (name, state) in &files {
            match state {
                FileState::Foreign => ignored += 1,
                FileState::Ports(count) => ports += count,
                FileState::Invalid(error) => {
                    faults.insert(name.to_string_lossy().into_owned(), error.clone());
                }
            }
        }
        reporter.report(ready, ports, ignored, faults);
    }
}

/// Reads the changed files. After a change of the whole directory, also returns known files that no
/// longer exist.
fn read_changed(
    directory: &Path,
    change: DirectoryChange,
    known: Vec<OsString>,
) -> (Vec<(OsString, DomainFile)>, Result<(), io::Error>) {
    let (names, listed) = match change {
        DirectoryChange::Entries(names) => (names, Ok(())),
        DirectoryChange::All => {
            let (mut names, listed) = match list(directory) {
                Ok(names) => (names, Ok(())),
                Err(error) => (BTreeSet::new(), Err(error)),
            };
            names.extend(known);
            (names, listed)
        }
    };
    let domains = names.into_iter().filter(|name| Path::new(name).extension() == Some(OsStr::new("xml")));
    let files_read = domains.map(|name| {
        let file = read_domain(&directory.join(&name));
        (name, file)
    });
    (files_read.collect(), listed)
}

fn list(directory: &Path) -> Result<BTreeSet<OsString>, io::Error> {
    fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

fn read_domain(path: &Path) -> DomainFile {
    // Two such names could result in the same key.
    if path.to_str().is_none() {
        return DomainFile::Invalid(DomainFileError::NameNotUtf8);
    }
    let text = match text_file::read(path, Symlinks::Refuse, MAX_DOMAIN_BYTES) {
        Ok(Some(text)) => text,
        Ok(None) => return DomainFile::Missing,
        Err(error) => return DomainFile::Invalid(error.into()),
    };
    match parse_domain(&text) {
        Ok(ports) => DomainFile::Ports(ports),
        Err(DomainError::NotNova) => DomainFile::Foreign,
        Err(error) => DomainFile::Invalid(error.into()),
    }
}

#[cfg(test)]
mod tests;
