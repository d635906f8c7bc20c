//! The rig: a hypervisor, its networks, its guests and its Nova, in network namespaces that belong
//! to one test and are removed with it.
//!
//! A scenario reads top-down: a [`Host`], one or two [`Network`]s on it, guests plugged into them,
//! a [`NovaStandIn`], and an [`Agent`] between. Scenarios can run in parallel: nothing changes the
//! machine's own namespace, the kernel chooses ports, and names contain the process id.
//!
//! Failures in the rig panic with their context, and every wait has a deadline.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a rig that cannot do its part fails the test at once"
)]
#![expect(clippy::missing_panics_doc, reason = "every function here panics when the machine refuses")]
#![expect(clippy::print_stderr, reason = "details of failures go to the output of the test")]

pub mod agent;
pub mod bpffs;
mod cache;
pub mod cloud_init;
pub mod control_plane;
pub mod deploy;
pub mod domain;
pub mod exchanges;
pub mod faulty_nova;
pub mod gateway;
pub mod guest;
pub mod haproxy;
pub mod hostile;
pub mod http;
pub mod http_server;
pub mod injection;
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
pub mod processes;
pub mod python;
pub mod raw_tcp;
pub mod routed;
pub mod router;
pub mod southbound;
pub mod system_calls;
pub mod terminal;
pub mod tiny_program;
pub mod topology;
pub mod two_tenants;
pub mod vm;
pub mod vswitch;
pub mod wait;

pub use agent::{Agent, AgentProcess};
pub use control_plane::{Binding, ControlPlane};
pub use faulty_nova::{Fault, FaultyNova};
pub use gateway::Gateway;
pub use guest::Guest;
pub use haproxy::Haproxy;
pub use http::{Connection, Response};
pub use http_server::{Answer, HttpServer, Mode, Pace, Recorded};
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
pub use port::{AddressPair, Port, Subport};
pub use routed::Routed;
pub use router::Router;
pub use southbound::Southbound;
pub use tiny_program::TinyProgram;
pub use topology::{GuestSpec, Host, Network, NextHop};
pub use two_tenants::{ServedTenants, Tenant, TwoTenants};
pub use vswitch::Vswitch;
