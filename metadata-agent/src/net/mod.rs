//! Network primitives of the host: netlink, network namespaces, the portal, sockets.

pub(crate) mod address_query;
pub(crate) mod damage;
pub(crate) mod name_pattern;
pub mod netlink;
pub mod netns;
pub mod portal;
pub(crate) mod probe_pair;
pub(crate) mod socket;
pub(crate) mod socket_file;
