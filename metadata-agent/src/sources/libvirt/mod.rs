//! Ports of the domains that libvirt runs on this host, from the XML that it keeps of them.
//!
//! Input is the directory of live domains, `/run/libvirt/qemu`: libvirt writes `<name>.xml` there when a domain
//! starts and at each change (as `<name>.xml.new`, which it renames), and removes it when the domain is gone. No
//! call to libvirtd is made. Entries whose names do not end in `.xml` are not looked at. Each file is one key of
//! the inventory; [`domain`] tells what is read from it. Domains without Nova's metadata are ignored and counted.
//!
//! A file that cannot be read or understood says nothing: whatever it said before is withdrawn at once. It might
//! by now be another instance's, and an unknown port costs a guest a retry, but the old instance's answers would
//! hand one tenant the secrets of another. As libvirt renames whole files into place, a half-written one is seen
//! only if somebody else writes there, and its completion is an event that brings it back. Where the directory
//! cannot be listed, the files known from before are looked at one by one.
//!
//! Files are opened without following symlinks and without waiting for a pipe's writer, and read up to
//! [`MAX_DOMAIN_BYTES`]; a faulty file is named in the state and does not touch the others. Tenants choose the
//! instance's name and other texts inside: none of them is read, let alone trusted.

mod domain;

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::file::{self, FileError, Symlinks};
use super::watch::{Changes, DirectoryWatch};
use super::{Reporter, blocking};
use crate::inventory::{Event, Port, PortRecord, SourceKind};

pub use domain::{DomainError, parse_domain};

/// The largest domain XML that is read.
pub const MAX_DOMAIN_BYTES: u64 = 4 * 1024 * 1024;

/// Why a domain file says nothing.
#[derive(Debug, thiserror::Error)]
pub enum DomainFileError {
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its path is not text.
    #[error("has a name that is not UTF-8")]
    NameNotUtf8,
    /// It cannot be understood.
    #[error(transparent)]
    Domain(#[from] DomainError),
}

/// What became of one file.
enum Finding {
    Gone,
    NotNovas,
    Ports(Vec<Port>),
    Fault(DomainFileError),
}

/// What stands of one file since it was last looked at.
#[derive(Debug, PartialEq, Eq)]
enum Standing {
    NotNovas,
    Ports(usize),
    Fault(String),
}

/// Sends what the domain files in `directory` say, until cancelled or until nobody listens.
pub async fn run(
    directory: PathBuf,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let follow = follow(directory, events, reporter);
    // Nothing is lost by stopping anywhere: the next start looks at everything.
    let _stopped = cancel.run_until_cancelled_owned(follow).await;
}

/// What a directory of domains holds.
#[derive(Debug, Default)]
pub struct Census {
    /// Nova's domains.
    pub domains: usize,
    /// Their ports.
    pub ports: usize,
    /// Domains that are not Nova's.
    pub others: usize,
    /// Files that say nothing, and why.
    pub faults: Vec<(String, DomainFileError)>,
}

/// Looks at all domains once.
///
/// # Errors
/// The directory cannot be listed.
pub fn probe(directory: &Path) -> Result<Census, io::Error> {
    let mut census = Census::default();
    let (findings, listed) = look(directory, Changes::Everything, Vec::new());
    listed?;
    for (name, finding) in findings {
        match finding {
            Finding::Gone => {}
            Finding::NotNovas => census.others += 1,
            Finding::Fault(error) => census.faults.push((name.to_string_lossy().into_owned(), error)),
            Finding::Ports(ports) => {
                census.domains += 1;
                census.ports += ports.len();
            }
        }
    }
    Ok(census)
}

async fn follow(directory: PathBuf, events: mpsc::Sender<Event>, reporter: Reporter) -> Option<()> {
    let mut watch = DirectoryWatch::new(directory.clone());
    let mut files: BTreeMap<OsString, Standing> = BTreeMap::new();
    let mut ready = false;
    loop {
        let changes = watch.changed(reporter.recheck()).await;
        let known: Vec<OsString> = files.keys().cloned().collect();
        let folder = directory.clone();
        let (findings, listed) = blocking(move || look(&folder, changes, known)).await?;
        for (name, finding) in findings {
            let (ports, standing) = match finding {
                Finding::Gone => (Vec::new(), None),
                Finding::NotNovas => (Vec::new(), Some(Standing::NotNovas)),
                Finding::Fault(error) => (Vec::new(), Some(Standing::Fault(error.to_string()))),
                Finding::Ports(ports) => {
                    let standing = Standing::Ports(ports.len());
                    (ports, Some(standing))
                }
            };
            match standing {
                Some(standing) => files.insert(name.clone(), standing),
                None => files.remove(&name),
            };
            let key = name.to_string_lossy().into_owned();
            let ports = ports.into_iter().map(PortRecord::from).collect();
            events.send(Event { source: SourceKind::Libvirt, key, ports }).await.ok()?;
        }
        ready |= listed.is_ok();

        let mut faults: BTreeMap<String, String> = BTreeMap::new();
        let place = directory.display().to_string();
        if let Some(error) = watch.fault() {
            faults.insert(place.clone(), error.to_string());
        }
        if let Err(error) = listed {
            faults.insert(place, format!("cannot be listed: {error}"));
        }
        let (mut ports, mut ignored) = (0, 0);
        for (name, standing) in &files {
            match standing {
                Standing::NotNovas => ignored += 1,
                Standing::Ports(count) => ports += count,
                Standing::Fault(error) => {
                    faults.insert(name.to_string_lossy().into_owned(), error.clone());
                }
            }
        }
        reporter.report(ready, ports, ignored, faults);
    }
}

/// Looks at what changed, and, if that is everything, also at what is gone since.
fn look(
    directory: &Path,
    changes: Changes,
    known: Vec<OsString>,
) -> (Vec<(OsString, Finding)>, Result<(), io::Error>) {
    let (names, listed) = match changes {
        Changes::Entries(names) => (names, Ok(())),
        Changes::Everything => {
            let (mut names, listed) = match list(directory) {
                Ok(names) => (names, Ok(())),
                Err(error) => (BTreeSet::new(), Err(error)),
            };
            names.extend(known);
            (names, listed)
        }
    };
    let domains = names.into_iter().filter(|name| Path::new(name).extension() == Some(OsStr::new("xml")));
    let findings = domains.map(|name| {
        let finding = find(&directory.join(&name));
        (name, finding)
    });
    (findings.collect(), listed)
}

fn list(directory: &Path) -> Result<BTreeSet<OsString>, io::Error> {
    fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.file_name())).collect()
}

fn find(path: &Path) -> Finding {
    // Two such names could look alike as keys.
    if path.to_str().is_none() {
        return Finding::Fault(DomainFileError::NameNotUtf8);
    }
    let text = match file::read(path, Symlinks::Refuse, MAX_DOMAIN_BYTES) {
        Ok(Some(text)) => text,
        Ok(None) => return Finding::Gone,
        Err(error) => return Finding::Fault(error.into()),
    };
    match parse_domain(&text) {
        Ok(ports) => Finding::Ports(ports),
        Err(DomainError::NotNovas) => Finding::NotNovas,
        Err(error) => Finding::Fault(error.into()),
    }
}

#[cfg(test)]
mod tests;
