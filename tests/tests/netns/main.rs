//! Scenarios with the agent, its guests and its neighbours in network namespaces.
//!
//! To run the scenarios of one module: `cargo test -p metadata-tests --test netns --
//! life_restart::`

#![expect(clippy::expect_used, clippy::panic, reason = "a helper that fails, fails its test")]

mod bench;
mod cli;
mod cli_check;
mod cli_output;
mod exchanges;
mod guests_cloud_init;
mod guests_elsewhere;
mod guests_identity;
mod guests_ipv6;
mod guests_load;
mod guests_memory;
mod guests_mtu;
mod guests_network;
mod guests_nova;
mod guests_nova_share;
mod guests_packets;
mod guests_rate;
mod guests_requests;
mod guests_secret;
mod guests_shares;
mod guests_sources;
mod haproxies;
mod hostile_connections;
mod hostile_haproxies;
mod hostile_host;
mod hostile_kernel;
mod hostile_memory;
mod hostile_nova;
mod hostile_packets;
mod lab;
mod life_absence;
mod life_clients;
mod life_drain;
mod life_hang;
mod life_hung_agent;
mod life_interfaces;
mod life_neighbours;
mod life_pins;
mod life_process;
mod life_ready;
mod life_restart;
mod life_signals;
mod life_stop;
mod load;
mod matrix;
mod namespaces_boot;
mod namespaces_guests;
mod namespaces_life;
mod namespaces_lost;
mod neighbours;
mod neutron_agent;
mod nova_stand_in;
mod rig;
mod source_disputes;
mod source_libvirt;
mod source_neutron;
mod source_ovn;
mod source_ovsdb;
mod source_vswitch;
mod upstream_reuse;
mod upstream_silence;
