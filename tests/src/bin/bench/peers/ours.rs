//! `ours`: the agent of this project, and its programs on every guest's tap. The limits per port
//! are off, because a few guests stand for all guests of a host.

use std::path::PathBuf;

use anyhow::ensure;
use metadata_tests::nova::SECRET;
use metadata_tests::{Agent, AgentProcess, Guest, Host, Network, Port};

use super::super::upstream::Upstream;
use super::haproxy::plug;
use super::{Caller, Crowd, Peer};

/// Fields are in drop order.
pub struct Ours {
    pub process: AgentProcess,
    pub agent: Agent,
    pub guests: Vec<Guest>,
    pub networks: Vec<Network>,
    pub host: Host,
}

impl Ours {
    pub fn start(upstream: &Upstream, crowd: Crowd, others: usize) -> anyhow::Result<Self> {
        let host = Host::new();
        let server = upstream.cable(host.netns());
        let (networks, guests) = plug(&host, crowd);
        upstream.introduce(networks.iter().map(|network| network.id), guests.iter().map(|guest| &guest.port));
        let mut installer = Agent::forwarding_to(&host, server, SECRET)
            .set("metadata_agent", "syn_rate_limit", "0")
            .set("metadata_agent", "connections_per_guest", "65536");
        for guest in &guests {
            installer = installer.port(&guest.port);
        }
        for _ in 0..others {
            installer = installer.port(&Port::new(networks[0].id, [10, 0, 0, 4].into()));
        }
        let agent = installer.install();
        let process = agent.start();
        process.wait_for_attachments(guests.iter().map(|guest| guest.tap.as_str()));
        let answer = guests[0].get("/openstack");
        ensure!(answer.status == 200, "the first guest gets {}", answer.status_line);
        Ok(Self { process, agent, guests, networks, host })
    }

    /// Returns the folder with the agent's pinned maps.
    pub fn pins(&self) -> PathBuf {
        self.agent.pins()
    }
}

impl Peer for Ours {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(Caller::of).collect()
    }

    fn processes(&self) -> Vec<u32> {
        self.process.pids()
    }
}
