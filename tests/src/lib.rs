//! The rig: a hypervisor, its networks, its guests and its Nova, all inside network namespaces that belong to one
//! test and die with it.
//!
//! A scenario reads top-down: a [`Host`], a [`Network`] or two on it, guests plugged into them, a [`NovaStandIn`],
//! and an [`Agent`] between. Nothing touches the machine's own namespace, ports are the kernel's choice and names
//! carry the process id, so scenarios run beside each other.
//!
//! What goes wrong in the rig panics with its context: a test has nothing better to do with it. Waiting has a
//! deadline everywhere.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a rig that cannot do its part fails the test at once"
)]
#![expect(clippy::missing_panics_doc, reason = "every function here panics when the machine refuses")]
#![expect(clippy::print_stderr, reason = "what a failed test has to tell goes to its output")]

pub mod agent;
pub mod bpffs;
pub mod cloud_init;
pub mod control_plane;
pub mod deploy;
pub mod domain;
pub mod gateway;
pub mod guest;
pub mod haproxy;
pub mod http;
pub mod http_server;
pub mod kernel_objects;
pub mod leftovers;
pub mod legacy;
pub mod libvirt;
pub mod load;
pub mod netns;
pub mod neutron_agent;
pub mod nova;
pub mod observe;
pub mod openstack;
pub mod ovsdb;
pub mod packet_socket;
pub mod packets;
pub mod pki;
pub mod port;
pub mod privileges;
pub mod python;
pub mod routed;
pub mod router;
pub mod southbound;
pub mod tenants;
pub mod tiny_program;
pub mod topology;
pub mod twins;
pub mod vm;
pub mod vswitch;
pub mod wait;

pub use agent::{Agent, AgentProcess};
pub use control_plane::{Binding, ControlPlane};
pub use gateway::Gateway;
pub use guest::Guest;
pub use haproxy::Haproxy;
pub use http::{Connection, Response};
pub use http_server::{Answer, HttpServer, Mode, Recorded};
pub use kernel_objects::KernelObjects;
pub use legacy::Legacy;
pub use netns::Netns;
pub use neutron_agent::NeutronAgent;
pub use nova::{Instance, NovaStandIn};
pub use observe::HostState;
pub use openstack::OpenStack;
pub use ovsdb::{Ovsdb, Plug};
pub use packet_socket::PacketSocket;
pub use pki::Pki;
pub use port::{Port, Subport};
pub use routed::Routed;
pub use router::Router;
pub use southbound::Southbound;
pub use tenants::{Tenant, Tenants};
pub use tiny_program::TinyProgram;
pub use topology::{GuestSpec, Host, Network, NextHop};
pub use twins::Twins;
pub use vswitch::Vswitch;
