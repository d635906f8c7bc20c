//! What sources say: a port, and the event that carries it.

use std::borrow::Borrow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::{InstanceId, MacAddress, NetworkId, PortId, ProjectId};

/// Not usable as the name of a kernel interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an interface name: 1 to 15 visible ASCII characters without `/` and `:`")]
pub struct DeviceNameError {
    /// What was given.
    pub text: String,
}

/// The name of a kernel interface. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(Arc<str>);

impl DeviceName {
    /// The tap that Nova makes for a port: `tap` and the first eleven characters of the port id.
    #[must_use]
    pub fn tap_of(port: &PortId) -> Self {
        Self(format!("tap{}", port.device_suffix()).into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = DeviceNameError;
    fn from_str(text: &str) -> Result<Self, DeviceNameError> {
        // dev_valid_name() of the kernel, narrowed to ASCII that can be printed.
        let fits = (1..=15).contains(&text.len()) && text != "." && text != "..";
        if fits && text.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':') {
            Ok(Self(text.into()))
        } else {
            Err(DeviceNameError { text: text.to_owned() })
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = DeviceNameError;
    fn try_from(text: String) -> Result<Self, DeviceNameError> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.0.as_ref().to_owned()
    }
}

impl Borrow<str> for DeviceName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A port of an instance. Whose it is, is always known; a source that cannot tell says nothing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Port {
    /// Neutron's id. `None` if the source knows the port by its device alone.
    pub id: Option<PortId>,
    /// The kernel interface, where the source knows it.
    pub device: Option<DeviceName>,
    /// The instance behind the port.
    pub instance: InstanceId,
    /// The project that owns the instance.
    pub project: ProjectId,
    /// The network of the port, where the source knows it.
    pub network: Option<NetworkId>,
    /// The guest's MAC address, where the source knows it.
    pub mac: Option<MacAddress>,
    /// The port's own addresses; empty where the source does not know them.
    pub fixed_ips: Vec<IpAddr>,
    /// Further addresses that the guest may send from (Neutron's allowed-address-pairs).
    pub allowed_addresses: Vec<IpAddr>,
}

/// Who says it. The order of the variants is the order of trust: where sources differ on a field, the first
/// that knows it is believed. A new source takes its place in that order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// The file that the operator writes.
    StaticFile,
    /// The XML of the domains that libvirt runs.
    Libvirt,
}

impl SourceKind {
    /// Every source, the most trusted first.
    pub const ALL: &'static [Self] = &[Self::StaticFile, Self::Libvirt];

    /// The label in metrics and in `status`.
    #[must_use]
    pub const fn label(self) -> &'static str {
        match self {
            Self::StaticFile => "static_file",
            Self::Libvirt => "libvirt",
        }
    }
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}

/// All that a source knows under one key (a file, a domain) is now this.
///
/// An event replaces what the source said under that key before, so per key the last one holds, and between
/// keys and between sources the order is of no consequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Who says it.
    pub source: SourceKind,
    /// About what, in the source's own terms.
    pub key: String,
    /// What is so now; empty when the key is gone.
    pub ports: Vec<Port>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_is_what_the_kernel_takes() {
        assert_eq!("tap3f2a9d10-77".parse::<DeviceName>().unwrap().as_str(), "tap3f2a9d10-77");
        for bad in ["", ".", "..", "a/b", "a:1", "a b", "a\n", "0123456789abcdef", "\u{fc}"] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn sources_are_listed_in_order_of_trust_and_labelled_as_they_are_dumped() {
        assert!(SourceKind::ALL.is_sorted());
        for kind in SourceKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.label());
        }
    }
}
