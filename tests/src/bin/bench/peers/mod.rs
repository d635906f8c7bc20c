//! The compared paths from a guest to the upstream. Each peer is started by one call and stopped by
//! its drop.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use clap::ValueEnum;
use metadata_agent::ids::InstanceId;
use metadata_tests::neutron_agent::OvnRelease;
use metadata_tests::{Guest, Netns, OpenStack};

use super::machine;
use super::upstream::Upstream;

mod direct;
mod haproxy;
mod host_haproxy;
mod legacy;
mod neutron_agent;
mod ours;
mod ovn;

pub use haproxy::{Idle as IdleHaproxies, identity};
pub use ours::Ours;

/// A path to the upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// From the guest to the upstream over a bare veth: the limit
    Direct,
    /// Haproxy as Neutron's agents run it, straight to the upstream with precomputed headers
    Haproxy,
    /// One haproxy per host with an ACL and a backend per instance, as the OVS agent's
    /// metadata_path extension runs it
    HostHaproxy,
    /// This project's agent and programs
    Ours,
    /// Haproxy in front of Neutron's own metadata agent, whose queries to neutron-server are
    /// answered from memory
    NeutronAgent,
    /// Haproxy in front of the proxy of neutron-ovn-metadata-agent, with its replica of a
    /// Southbound database
    Ovn,
    /// The same with current Neutron, as shipped
    OvnCurrent,
    /// The same with two workers
    OvnCurrentWorkers,
    /// Haproxy in front of Neutron's own metadata agent, with RabbitMQ, neutron-server and MariaDB,
    /// by network, as shipped
    Legacy,
    /// The same with one agent worker per core
    LegacyWorkers,
    /// The same behind a router's haproxy, for whose requests neutron-server is queried twice
    LegacyRouter,
    /// By network, with the cache that the agent once had by default
    LegacyCache,
}

/// A peer, and its load besides the requesting guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    pub kind: Kind,
    /// The number of other configured instances or known ports.
    pub others: usize,
}

/// The number of guests and of their networks.
#[derive(Clone, Copy, Debug)]
pub struct Crowd {
    pub guests: usize,
    pub networks: usize,
}

impl Crowd {
    pub const ONE: Self = Self { guests: 1, networks: 1 };
}

/// A guest: the namespace of its requests, and their target.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    pub netns: &'a Netns,
    pub target: SocketAddr,
    /// Its instance, for peers that identify guests.
    pub instance: Option<InstanceId>,
    /// Header lines with its identity, for peers that do not.
    pub signed: &'a str,
}

impl<'a> Caller<'a> {
    fn of(guest: &'a Guest) -> Self {
        let instance = Some(guest.port.instance);
        Self { netns: guest.netns(), target: guest.metadata_ipv4(), instance, signed: "" }
    }
}

/// A running peer.
pub trait Peer {
    fn callers(&self) -> Vec<Caller<'_>>;
    /// Returns the peer's own processes.
    fn processes(&self) -> Vec<u32>;
}

impl Entry {
    pub const fn alone(kind: Kind) -> Self {
        Self { kind, others: 0 }
    }

    /// Starts the peer.
    pub fn start(self, upstream: &Upstream, crowd: Crowd) -> anyhow::Result<Box<dyn Peer>> {
        Ok(match self.kind {
            Kind::Direct => Box::new(direct::Direct::start(upstream, crowd)),
            Kind::Haproxy => Box::new(haproxy::PerNetwork::start(upstream, crowd)),
            Kind::HostHaproxy => Box::new(host_haproxy::HostHaproxy::start(upstream, crowd, self.others)),
            Kind::Ours => Box::new(Ours::start(upstream, crowd, self.others)?),
            Kind::Ovn => Box::new(ovn::Ovn::start(upstream, crowd, &OvnRelease::Debian)?),
            Kind::OvnCurrent => Box::new(ovn::Ovn::start(upstream, crowd, &current(None)?)?),
            Kind::OvnCurrentWorkers => Box::new(ovn::Ovn::start(upstream, crowd, &current(Some(2))?)?),
            Kind::NeutronAgent => Box::new(neutron_agent::Original::start(upstream, crowd)?),
            Kind::Legacy | Kind::LegacyWorkers | Kind::LegacyRouter | Kind::LegacyCache => {
                Box::new(legacy::Legacy::start(upstream, crowd, self.kind.variant())?)
            }
        })
    }
}

fn current(workers: Option<usize>) -> anyhow::Result<OvnRelease> {
    OvnRelease::current(workers).map_err(anyhow::Error::msg)
}

impl Kind {
    /// The peers that run by default.
    pub const DEFAULT: [Self; 5] = [Self::Direct, Self::Haproxy, Self::HostHaproxy, Self::Ovn, Self::Ours];

    /// Returns true if the peer needs the servers behind Neutron's metadata agent.
    pub const fn needs_openstack(self) -> bool {
        matches!(self, Self::Legacy | Self::LegacyWorkers | Self::LegacyRouter | Self::LegacyCache)
    }

    /// Returns true if the peer sends each guest's identity to Nova.
    pub const fn identifies(self) -> bool {
        !matches!(self, Self::Haproxy | Self::HostHaproxy)
    }

    fn variant(self) -> legacy::Variant {
        legacy::Variant {
            router: self == Self::LegacyRouter,
            all_cores: self == Self::LegacyWorkers,
            cache: self == Self::LegacyCache,
        }
    }

    /// Returns what this machine lacks for the peer.
    pub fn missing(self) -> Option<String> {
        let (present, what) = match self {
            Self::Direct | Self::Ours => return None,
            Self::Haproxy | Self::HostHaproxy => {
                (machine::has_program("haproxy"), "haproxy is not installed")
            }
            Self::OvnCurrent | Self::OvnCurrentWorkers => {
                return Self::Ovn.missing().or_else(|| OvnRelease::current(None).err());
            }
            Self::Ovn => (
                machine::has_program("haproxy") && machine::has_neutron_agent() && machine::has_southbound(),
                "haproxy, python3-neutron or ovn-central is not installed",
            ),
            Self::NeutronAgent => (
                machine::has_program("haproxy") && machine::has_neutron_agent(),
                "haproxy or python3-neutron is not installed",
            ),
            Self::Legacy | Self::LegacyWorkers | Self::LegacyRouter | Self::LegacyCache => (
                machine::has_program("haproxy") && OpenStack::missing().is_none(),
                "haproxy, neutron-server, nova-api, mariadb-server, rabbitmq-server or python3-pymysql is not installed \
                 (`cargo xtask setup --for bench`)",
            ),
        };
        (!present).then(|| what.to_owned())
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Direct => "direct",
            Self::Haproxy => "haproxy",
            Self::HostHaproxy => "host-haproxy",
            Self::Ours => "ours",
            Self::NeutronAgent => "neutron-agent (RPC replaced)",
            Self::Ovn => "ovn",
            Self::OvnCurrent => "ovn (current)",
            Self::OvnCurrentWorkers => "ovn (current), 2 workers",
            Self::Legacy => "legacy",
            Self::LegacyWorkers => "legacy, one worker per core",
            Self::LegacyRouter => "legacy, by router",
            Self::LegacyCache => "legacy, cache",
        })
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, others } = self;
        match kind {
            Kind::HostHaproxy if *others > 0 => write!(f, "{kind}, {} instances", others + 1),
            Kind::Ours if *others > 0 => write!(f, "{kind}, {others} more ports"),
            Kind::Direct
            | Kind::Haproxy
            | Kind::HostHaproxy
            | Kind::Ours
            | Kind::NeutronAgent
            | Kind::Ovn
            | Kind::OvnCurrent
            | Kind::OvnCurrentWorkers
            | Kind::Legacy
            | Kind::LegacyWorkers
            | Kind::LegacyRouter
            | Kind::LegacyCache => kind.fmt(f),
        }
    }
}

/// Peers chosen on the command line.
#[derive(Clone, Debug)]
pub struct Choice(pub Vec<Kind>);

impl FromStr for Choice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "all" {
            return Ok(Self(Kind::value_variants().to_vec()));
        }
        let kinds = text.split(',').map(|name| Kind::from_str(name, false));
        kinds.collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_chosen_by_name() {
        let chosen = |text: &str| text.parse::<Choice>().map(|choice| choice.0);
        assert_eq!(chosen("direct,ours"), Ok(vec![Kind::Direct, Kind::Ours]));
        assert_eq!(chosen("all").map(|kinds| kinds.len()), Ok(Kind::value_variants().len()));
        assert!(chosen("direct,unknown").is_err());
    }
}
