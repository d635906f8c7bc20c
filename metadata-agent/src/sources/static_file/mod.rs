//! Ports that the operator writes down: the most trusted source, for hosts and ports that no other source covers.
//!
//! One JSON file. `id`, `instance` and `project` are required, all else may be left out:
//!
//! ```json
//! {
//!   "ports": [
//!     {
//!       "id": "3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01",
//!       "device": "tap3f2a9d10-77",
//!       "instance": "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10",
//!       "project": "9c1b7f0e6a3d4f4bb0f6a3c7d2e5a890",
//!       "network": "b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f",
//!       "mac": "fa:16:3e:11:22:33",
//!       "fixed_ips": ["10.0.0.5", "2001:db8::5"],
//!       "allowed_addresses": ["10.0.0.100"],
//!       "subports": [
//!         {
//!           "id": "aa06d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f",
//!           "vlan": 5,
//!           "network": "c7d8e9f0-1b2c-4d3e-8f4a-5b6c7d8e9fa0",
//!           "mac": "fa:16:3e:11:22:34",
//!           "fixed_ips": ["10.5.0.5"],
//!           "allowed_addresses": []
//!         }
//!       ]
//!     }
//!   ]
//! }
//! ```
//!
//! `device` is the kernel interface; left out, it is `tap` and the first eleven characters of `id`.
//! `subports` are the other ports of a trunk whose parent the port is; of each, `id` and `vlan` are required.
//! `allowed_addresses` are those of Neutron's allowed-address-pairs: addresses and CIDRs. A field that is not
//! in the example is an error, and so is a port or a device that stands there twice: a misspelt `fixed_ip` that is
//! silently skipped would show as a guest without metadata much later. Errors name line, column and port.
//!
//! The directory of the file is watched, not the file, so it may be written in place, replaced by a rename, or be
//! a symlink that Kubernetes turns (`..data` of a ConfigMap). A change that cannot be read or understood, and that
//! includes the removal of the file, leaves the last good content in force and shows in state and log; to withdraw
//! all ports write `{"ports": []}`. Until the file is there for the first time the source is not ready.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::file::{self, FileError, Symlinks};
use super::watch::DirectoryWatch;
use super::{Reporter, blocking};
use crate::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId, VlanId};
use crate::inventory::{AddressPrefix, DeviceName, Event, Port, PortRecord, SourceKind, TrunkBinding};

/// The largest file that is read; a port takes about 400 bytes.
pub const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;

/// Why the file's content is not taken.
#[derive(Debug, thiserror::Error)]
pub enum StaticFileError {
    /// It is not there.
    #[error("does not exist")]
    Missing,
    /// It cannot be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is not JSON of the documented form.
    #[error("{}{source}", InPort(*.port))]
    Json {
        /// Which of the ports, counted from 0; `None` outside of them.
        port: Option<usize>,
        /// What, and at which line and column.
        source: serde_json::Error,
    },
    /// Two entries have the same id.
    #[error("ports[{port}]: id {id} stands there twice")]
    PortTwice {
        /// The second of them, counted from 0.
        port: usize,
        /// The id.
        id: PortId,
    },
    /// Two subports of one port have the same VLAN id.
    #[error("ports[{port}]: VLAN {vlan} stands there twice")]
    VlanTwice {
        /// The port, counted from 0.
        port: usize,
        /// The VLAN id.
        vlan: VlanId,
    },
    /// Two entries have the same device.
    #[error("ports[{port}]: device {device} stands there twice")]
    DeviceTwice {
        /// The second of them, counted from 0.
        port: usize,
        /// The device.
        device: DeviceName,
    },
}

struct InPort(Option<usize>);

impl fmt::Display for InPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |port| write!(f, "ports[{port}]: "))
    }
}

/// Sends what the file says, until cancelled or until nobody listens.
pub async fn run(path: PathBuf, events: mpsc::Sender<Event>, reporter: Reporter, cancel: CancellationToken) {
    let follow = follow(path, events, reporter);
    // Nothing is lost by stopping anywhere: the next start reads the file again.
    let _stopped = cancel.run_until_cancelled_owned(follow).await;
}

async fn follow(path: PathBuf, events: mpsc::Sender<Event>, reporter: Reporter) -> Option<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut watch = DirectoryWatch::new(directory.to_owned());
    let key = path.display().to_string();
    let mut in_force: Option<Vec<PortRecord>> = None;
    loop {
        // Whatever changed there may be what the path leads through.
        let _changes = watch.changed(reporter.recheck()).await;
        let file = path.clone();
        let mut faults = BTreeMap::new();
        match blocking(move || load(&file)).await? {
            Ok(ports) if in_force.as_ref() == Some(&ports) => {}
            Ok(ports) => {
                in_force = Some(ports.clone());
                events.send(Event { source: SourceKind::StaticFile, key: key.clone(), ports }).await.ok()?;
            }
            Err(error) => {
                faults.insert(key.clone(), error.to_string());
            }
        }
        if let Some(error) = watch.fault() {
            faults.insert(directory.display().to_string(), error.to_string());
        }
        reporter.report(in_force.is_some(), in_force.as_ref().map_or(0, Vec::len), 0, faults);
    }
}

/// How many ports a file names, subports included.
///
/// # Errors
/// [`StaticFileError`], if it cannot be read or a single thing in it is wrong.
pub fn probe(path: &Path) -> Result<usize, StaticFileError> {
    Ok(load(path)?.len())
}

fn load(path: &Path) -> Result<Vec<PortRecord>, StaticFileError> {
    let text = file::read(path, Symlinks::Follow, MAX_FILE_BYTES)?.ok_or(StaticFileError::Missing)?;
    parse(&text)
}

/// Reads the ports of a file's content.
///
/// # Errors
/// [`StaticFileError`], if a single thing in it is wrong.
pub fn parse(text: &str) -> Result<Vec<PortRecord>, StaticFileError> {
    let position = Cell::new(None);
    let mut json = serde_json::Deserializer::from_str(text);
    let ports = FileSeed(&position).deserialize(&mut json);
    let ports = ports.and_then(|ports| json.end().map(|()| ports));
    let ports = ports.map_err(|source| StaticFileError::Json { port: position.get(), source })?;

    let (mut ids, mut devices) = (BTreeSet::new(), BTreeSet::new());
    for (position, port) in ports.iter().enumerate() {
        if !ids.insert(port.id) {
            return Err(StaticFileError::PortTwice { port: position, id: port.id });
        }
        let mut tags = BTreeSet::new();
        for subport in &port.subports {
            if !ids.insert(subport.id) {
                return Err(StaticFileError::PortTwice { port: position, id: subport.id });
            }
            if !tags.insert(subport.vlan) {
                return Err(StaticFileError::VlanTwice { port: position, vlan: subport.vlan });
            }
        }
        if let Some(device) = port.device.as_ref().filter(|device| !devices.insert(*device)) {
            return Err(StaticFileError::DeviceTwice { port: position, device: device.clone() });
        }
    }
    Ok(ports.into_iter().flat_map(WrittenPort::facts).collect())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenPort {
    id: PortId,
    #[serde(default)]
    device: Option<DeviceName>,
    instance: InstanceId,
    project: ProjectId,
    #[serde(default)]
    network: Option<NetworkId>,
    #[serde(default)]
    mac: Option<MacAddress>,
    #[serde(default)]
    fixed_ips: Vec<IpAddr>,
    #[serde(default)]
    allowed_addresses: Vec<AddressPrefix>,
    #[serde(default)]
    subports: Vec<WrittenSubport>,
}

/// A VLAN on the port's interface, which is a port of its own on another network.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenSubport {
    id: PortId,
    vlan: VlanId,
    #[serde(default)]
    network: Option<NetworkId>,
    #[serde(default)]
    mac: Option<MacAddress>,
    #[serde(default)]
    fixed_ips: Vec<IpAddr>,
    #[serde(default)]
    allowed_addresses: Vec<AddressPrefix>,
}

impl WrittenPort {
    fn facts(self) -> impl Iterator<Item = PortRecord> {
        let Self { id, device, instance, project, network, mac, fixed_ips, allowed_addresses, subports } =
            self;
        let port =
            Port { id: Some(id), device, instance, project, network, mac, fixed_ips, allowed_addresses };
        let subports = subports.into_iter().map(move |subport| {
            let WrittenSubport { id: own, vlan, network, mac, fixed_ips, allowed_addresses } = subport;
            let seat = Some(TrunkBinding { parent: id, vlan });
            PortRecord {
                id: Some(own),
                seat,
                network,
                mac,
                fixed_ips,
                allowed_addresses,
                ..PortRecord::default()
            }
        });
        std::iter::once(PortRecord::from(port)).chain(subports)
    }
}

/// Reads the file and notes which port it is at, so that an error can tell.
struct FileSeed<'a>(&'a Cell<Option<usize>>);

impl<'de> DeserializeSeed<'de> for FileSeed<'_> {
    type Value = Vec<WrittenPort>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FileSeed<'_> {
    type Value = Vec<WrittenPort>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with `ports`")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut ports = None;
        while let Some(field) = map.next_key::<String>()? {
            if field != "ports" {
                return Err(serde::de::Error::unknown_field(&field, &["ports"]));
            }
            if ports.replace(map.next_value_seed(PortsSeed(self.0))?).is_some() {
                return Err(serde::de::Error::duplicate_field("ports"));
            }
        }
        ports.ok_or_else(|| serde::de::Error::missing_field("ports"))
    }
}

struct PortsSeed<'a>(&'a Cell<Option<usize>>);

impl<'de> DeserializeSeed<'de> for PortsSeed<'_> {
    type Value = Vec<WrittenPort>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for PortsSeed<'_> {
    type Value = Vec<WrittenPort>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of ports")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut ports = Vec::new();
        loop {
            self.0.set(Some(ports.len()));
            let Some(port) = seq.next_element()? else { break };
            ports.push(port);
        }
        self.0.set(None);
        Ok(ports)
    }
}

#[cfg(test)]
mod tests;
