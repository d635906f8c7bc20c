//! Names of kernel interfaces, and the name that Nova gives the tap of a port.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::ids::PortId;

/// The text is not a valid name of a kernel interface.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not an interface name: 1 to 15 visible ASCII characters without `/` and `:`")]
pub struct DeviceNameError {
    pub text: String,
}

/// The name of a kernel interface. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(Arc<str>);

impl DeviceName {
    /// Returns the name of the tap that Nova creates for a port: `tap` and the first eleven
    /// characters of the port id.
    #[must_use]
    pub fn from_port_id(port: &PortId) -> Self {
        Self(format!("tap{}", port.device_suffix()).into())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = DeviceNameError;
    fn from_str(text: &str) -> Result<Self, DeviceNameError> {
        // Like the kernel's dev_valid_name(), but limited to printable ASCII.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_name_is_one_that_the_kernel_accepts() {
        assert_eq!("tap3f2a9d10-77".parse::<DeviceName>().unwrap().as_str(), "tap3f2a9d10-77");
        for bad in ["", ".", "..", "a/b", "a:1", "a b", "a\n", "0123456789abcdef", "\u{fc}"] {
            assert!(bad.parse::<DeviceName>().is_err(), "{bad:?}");
        }
    }
}
