//! Network primitives of the host: netlink, network namespaces, the portal, sockets.

pub mod name_pattern;
pub mod netlink;
pub mod netns;
pub mod portal;
pub mod socket;
pub mod socket_file;
