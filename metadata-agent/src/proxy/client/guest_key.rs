//! The guest that a limit counts for, and the group of guests that it shares a way in with.
//!
//! Every limit of the proxy counts by [`GuestKey`]. The instance is the best key, because it covers
//! all ports, trunk subports and addresses of a guest. While it is not known, the key is derived
//! from what the kernel saw, or from the headers of a haproxy.
//!
//! A guest cannot multiply an attachment of its own. It can multiply a MAC address or an address
//! behind a shared attachment, unless port security prevents it. So such guests also count for
//! their [`GuestGroup`], of which the operator controls the number.

use std::fmt;
use std::net::IpAddr;

use metadata_ebpf::identity::{AttachmentId, ClientAddress};

use super::identity::ClientIdentity;
use super::lookup::{ClientQuery, guest_ip};
use crate::ids::{InstanceId, MacAddress, NetworkOrRouter};

/// Identifies a guest for limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum GuestKey {
    Instance(InstanceId),
    /// The guest of an attachment whose instance is not known.
    Attachment(AttachmentId),
    /// A guest behind a shared attachment. All of its addresses count together.
    Mac(AttachmentId, MacAddress),
    /// A guest behind a shared attachment whose MAC address the kernel did not record.
    Address(AttachmentId, IpAddr),
    /// A client on whose behalf a haproxy forwards.
    Forwarded(NetworkOrRouter, IpAddr),
}

/// Guests that enter by the same shared attachment, or by the haproxies of one network or router.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum GuestGroup {
    Attachment(AttachmentId),
    Haproxies(NetworkOrRouter),
}

/// A guest as limits see it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LimitedGuest {
    pub(crate) key: GuestKey,
    /// `None` for the guest of an attachment of its own.
    pub(crate) group: Option<GuestGroup>,
}

impl LimitedGuest {
    /// Returns the guest of an attachment of its own.
    pub(super) fn on_own_attachment(attachment: AttachmentId, identity: Option<&ClientIdentity>) -> Self {
        let guest = Self { key: GuestKey::Attachment(attachment), group: None };
        identity.map_or(guest, |identity| guest.identified(identity))
    }

    /// Returns a guest behind a shared attachment.
    pub(super) fn on_shared_attachment(client: &ClientAddress, mac: Option<MacAddress>) -> Self {
        let attachment = client.attachment;
        let key = match mac {
            Some(mac) => GuestKey::Mac(attachment, mac),
            None => GuestKey::Address(attachment, guest_ip(client)),
        };
        Self { key, group: Some(GuestGroup::Attachment(attachment)) }
    }

    /// Returns the client of a haproxy.
    pub(super) fn forwarded(query: &ClientQuery) -> Self {
        let key = GuestKey::Forwarded(query.scope, query.address);
        Self { key, group: Some(GuestGroup::Haproxies(query.scope)) }
    }

    /// Returns the same guest, counted by its instance if the identity shows it.
    pub(super) fn identified(self, identity: &ClientIdentity) -> Self {
        Self { key: identity.instance().map_or(self.key, GuestKey::Instance), ..self }
    }
}

impl fmt::Display for GuestKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Instance(instance) => write!(f, "instance {instance}"),
            Self::Attachment(attachment) => write!(f, "the guest of attachment {attachment}"),
            Self::Mac(attachment, mac) => write!(f, "{mac} on attachment {attachment}"),
            Self::Address(attachment, address) => write!(f, "{address} on attachment {attachment}"),
            Self::Forwarded(NetworkOrRouter::Network(network), address) => {
                write!(f, "{address} on network {network}")
            }
            Self::Forwarded(NetworkOrRouter::Router(router), address) => {
                write!(f, "{address} behind router {router}")
            }
        }
    }
}

/// Guests for tests of limits.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    pub(crate) fn attachment(id: u32) -> AttachmentId {
        AttachmentId::new(id).unwrap()
    }

    /// Returns the guest of an attachment of its own.
    pub(crate) fn guest(id: u32) -> LimitedGuest {
        LimitedGuest { key: GuestKey::Attachment(attachment(id)), group: None }
    }

    /// Returns a guest behind the shared attachment 1.
    pub(crate) fn neighbour(id: u32) -> LimitedGuest {
        let [a, b, c, d] = id.to_be_bytes();
        let key = GuestKey::Mac(attachment(1), MacAddress([0xfa, 0x16, a, b, c, d]));
        LimitedGuest { key, group: Some(GuestGroup::Attachment(attachment(1))) }
    }
}
