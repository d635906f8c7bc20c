//! Ports from a file written by the operator: the most trusted source, for hosts and ports that no
//! other source covers.
//!
//! The file is JSON. `id`, `instance` and `project` are required, everything else is optional:
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
//!       "port_security_enabled": true,
//!       "allowed_addresses": ["10.0.0.100"],
//!       "allowed_address_pairs": [
//!         {"ip_address": "10.0.0.116", "mac_address": "00:00:5e:00:01:33"}
//!       ],
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
//! `device` is the kernel interface; the default is `tap` and the first eleven characters of `id`.
//! `subports` are the subports of a trunk whose parent is this port; `id` and `vlan` of each are
//! required. `allowed_addresses` are addresses and CIDRs that the guest may use with the port's MAC
//! address. `allowed_address_pairs` are the same with another one, in Neutron's form. With
//! `port_security_enabled` false the guest may use any address. A port without `mac` says nothing
//! about this, and one without `fixed_ips` may use any address with its own MAC address.
//!
//! Unknown fields and duplicate ports or devices are errors: a misspelt `fixed_ip` that was
//! silently skipped would only show much later, as a guest without metadata. Errors name line,
//! column and port.
//!
//! The directory of the file is watched, not the file, so the file may be written in place,
//! replaced by a rename, or be a symlink that Kubernetes switches (`..data` of a ConfigMap). If the
//! file is unreadable, invalid or removed, the last valid content stays in force and the error is
//! reported. To withdraw all ports, write `{"ports": []}`. The source is not ready until the file
//! was read once.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Reporter;
use super::directory_watch::DirectoryWatch;
use super::text_file::{self, FileError, Symlinks};
use crate::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId, VlanId};
use crate::inventory::{
    AddressPrefix, AllowedSource, DeviceName, Event, Port, PortAddressing, PortRecord, SourceKind,
    SourcePolicy, TrunkBinding,
};
use crate::process::blocking::blocking;

/// Largest accepted file. A port takes about 400 bytes.
pub(crate) const MAX_FILE_BYTES: u64 = 64 * 1024 * 1024;

/// Unreadable or invalid file.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StaticFileError {
    #[error("does not exist")]
    Missing,
    #[error(transparent)]
    File(#[from] FileError),
    /// `port` is the index of the port; `None` outside of the list.
    #[error("{}{source}", InPort(*.port))]
    Json { port: Option<usize>, source: serde_json::Error },
    #[error("ports[{port}]: duplicate id {id}")]
    DuplicatePort { port: usize, id: PortId },
    #[error("ports[{port}]: duplicate VLAN {vlan}")]
    DuplicateVlan { port: usize, vlan: VlanId },
    #[error("ports[{port}]: duplicate device {device}")]
    DuplicateDevice { port: usize, device: DeviceName },
}

struct InPort(Option<usize>);

impl fmt::Display for InPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |port| write!(f, "ports[{port}]: "))
    }
}

/// Sends the ports of the file until cancelled or until the receiver is dropped.
pub(crate) async fn run(
    path: PathBuf,
    events: mpsc::Sender<Event>,
    reporter: Reporter,
    cancel: CancellationToken,
) {
    let follow = follow(path, events, reporter);
    // Cancelling at any point is safe: the next start reads the file again.
    let _stopped = cancel.run_until_cancelled_owned(follow).await;
}

async fn follow(path: PathBuf, events: mpsc::Sender<Event>, reporter: Reporter) -> Option<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut watch = DirectoryWatch::new(directory.to_owned());
    let key = path.display().to_string();
    let mut in_force: Option<Vec<PortRecord>> = None;
    loop {
        // Any entry may be part of the path to the file, so every change counts.
        let _change = watch.changed(reporter.recheck()).await;
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
        if let Some(error) = watch.error() {
            faults.insert(directory.display().to_string(), error.to_string());
        }
        reporter.report(in_force.is_some(), in_force.as_ref().map_or(0, Vec::len), 0, faults);
    }
}

/// Counts the ports and subports of a file.
///
/// # Errors
/// The file is unreadable, or any part of it is invalid.
pub(crate) fn probe(path: &Path) -> Result<usize, StaticFileError> {
    Ok(load(path)?.len())
}

fn load(path: &Path) -> Result<Vec<PortRecord>, StaticFileError> {
    let text = text_file::read(path, Symlinks::Follow, MAX_FILE_BYTES)?.ok_or(StaticFileError::Missing)?;
    parse(&text)
}

/// Parses the content of a file.
///
/// # Errors
/// Any part of the content is invalid.
pub(crate) fn parse(text: &str) -> Result<Vec<PortRecord>, StaticFileError> {
    let position = Cell::new(None);
    let mut json = serde_json::Deserializer::from_str(text);
    let ports = FileSeed(&position).deserialize(&mut json);
    let ports = ports.and_then(|ports| json.end().map(|()| ports));
    let ports = ports.map_err(|source| StaticFileError::Json { port: position.get(), source })?;

    // Reject duplicates.
    let (mut ids, mut devices) = (BTreeSet::new(), BTreeSet::new());
    for (position, port) in ports.iter().enumerate() {
        if !ids.insert(port.id) {
            return Err(StaticFileError::DuplicatePort { port: position, id: port.id });
        }
        let mut tags = BTreeSet::new();
        for subport in &port.subports {
            if !ids.insert(subport.id) {
                return Err(StaticFileError::DuplicatePort { port: position, id: subport.id });
            }
            if !tags.insert(subport.vlan) {
                return Err(StaticFileError::DuplicateVlan { port: position, vlan: subport.vlan });
            }
        }
        if let Some(device) = port.device.as_ref().filter(|device| !devices.insert(*device)) {
            return Err(StaticFileError::DuplicateDevice { port: position, device: device.clone() });
        }
    }
    Ok(ports.into_iter().flat_map(FilePort::into_records).collect())
}

/// Port in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePort {
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
    allowed_address_pairs: Vec<FilePair>,
    #[serde(default = "enabled")]
    port_security_enabled: bool,
    #[serde(default)]
    subports: Vec<FileSubport>,
}

/// Subport: a VLAN on the port's interface.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileSubport {
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
    #[serde(default)]
    allowed_address_pairs: Vec<FilePair>,
    #[serde(default = "enabled")]
    port_security_enabled: bool,
}

/// Allowed address pair, as Neutron writes it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FilePair {
    ip_address: AddressPrefix,
    mac_address: MacAddress,
}

const fn enabled() -> bool {
    true
}

impl FilePort {
    fn into_records(self) -> impl Iterator<Item = PortRecord> {
        let security = PortSecurity {
            is_enabled: self.port_security_enabled,
            addresses: self.allowed_addresses,
            pairs: self.allowed_address_pairs,
        };
        let Self { id, device, instance, project, network, mac, fixed_ips, subports, .. } = self;
        let addressing = security.addressing(network, mac, fixed_ips);
        let port = Port { id: Some(id), device, instance, project, addressing };
        let subports = subports.into_iter().map(move |subport| subport.into_record(id));
        std::iter::once(PortRecord::from(port)).chain(subports)
    }
}

impl FileSubport {
    fn into_record(self, parent: PortId) -> PortRecord {
        let security = PortSecurity {
            is_enabled: self.port_security_enabled,
            addresses: self.allowed_addresses,
            pairs: self.allowed_address_pairs,
        };
        let trunk = Some(TrunkBinding { parent, vlan: self.vlan });
        let addressing = security.addressing(self.network, self.mac, self.fixed_ips);
        PortRecord { id: Some(self.id), trunk, addressing, ..PortRecord::default() }
    }
}

/// Port security of a port or a subport.
struct PortSecurity {
    is_enabled: bool,
    addresses: Vec<AddressPrefix>,
    pairs: Vec<FilePair>,
}

impl PortSecurity {
    fn addressing(
        &self,
        network: Option<NetworkId>,
        mac: Option<MacAddress>,
        fixed_ips: Vec<IpAddr>,
    ) -> PortAddressing {
        let allowed_sources = self.allowed_sources(mac, &fixed_ips);
        PortAddressing { network, mac, fixed_ips, allowed_sources, ..PortAddressing::default() }
    }

    fn allowed_sources(&self, mac: Option<MacAddress>, fixed_ips: &[IpAddr]) -> Option<SourcePolicy> {
        if !self.is_enabled {
            return Some(SourcePolicy::Any);
        }
        let mac = mac?;
        let own = self.addresses.iter().map(|prefix| AllowedSource { mac, prefix: *prefix });
        let pairs =
            self.pairs.iter().map(|pair| AllowedSource { mac: pair.mac_address, prefix: pair.ip_address });
        Some(SourcePolicy::secured(mac, fixed_ips, own.chain(pairs)))
    }
}

/// Deserializes the file and tracks the index of the current port for errors.
struct FileSeed<'a>(&'a Cell<Option<usize>>);

impl<'de> DeserializeSeed<'de> for FileSeed<'_> {
    type Value = Vec<FilePort>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FileSeed<'_> {
    type Value = Vec<FilePort>;
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
    type Value = Vec<FilePort>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for PortsSeed<'_> {
    type Value = Vec<FilePort>;
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
