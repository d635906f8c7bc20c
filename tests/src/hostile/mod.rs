//! Attacks of guests on what others share with them, and what a bystander notices of an attack.
//!
//! A [`Scene`] is a host with attackers and bystanders, which are in one [`Position`] to each
//! other. A bystander sends requests at fixed times while nothing else happens, while the
//! [`Attack`] runs, and while the same attack hits a server that is not ours. The last is the
//! control: on a small machine an attack costs everyone CPU time, whatever its target.
//!
//! An attack ends with its value, and by itself after a minute and a half.

use std::time::Duration;

use clap::ValueEnum;

use crate::http_server::{Mode, Pace};

mod connections;
mod flood;
mod running;
mod scene;
mod tcp_memory;

pub use scene::{Condition, Observation, Scene};

/// An attack. The names are those of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Attack {
    /// 128 connections on which nothing is sent
    IdleConnections,
    /// 10,000 SYNs per second from one guest
    SynFlood,
    /// 7,000 SYNs from made-up link-local addresses
    LinkLocalSyns,
    /// 7,000 SYNs from made-up MAC addresses and the link-local addresses derived from them
    LinkLocalMacs,
    /// 10,000 SYNs per second from made-up IPv4 addresses of one network
    #[value(name = "made-up-ipv4")]
    MadeUpIpv4,
    /// 33 networks of one router fill the client map, then keep it full with 220 SYNs per second
    ClientMap,
    /// 128 connections that read 8 MB, pipeline 400 requests for 64 KiB and stop reading
    #[value(name = "unread-64k")]
    Unread64k,
    /// The same with answers of 1 MiB
    #[value(name = "unread-1m")]
    Unread1m,
    /// The same with answers of 64 KiB, read at 10 KiB per second
    Trickled,
    /// 120 busy connections of one guest
    Busy,
    /// The same to a Nova that answers 4 requests at once, in 20 ms each
    #[value(name = "busy-20ms")]
    Busy20ms,
    /// The same to a Nova that answers 8 requests at once, in 200 ms each
    #[value(name = "busy-200ms")]
    Busy200ms,
    /// 120 busy connections of four guests each
    FourBusy,
    /// The same to a Nova that answers 4 requests at once, in 20 ms each
    #[value(name = "four-busy-20ms")]
    FourBusy20ms,
    /// 100 slow POSTs through one haproxy to an agent with 64 shared connections
    SlowPosts,
    /// 300 slow POSTs through one haproxy that the agent refuses, because they name another network
    RefusedPosts,
    /// 8 busy connections over the request rate limit
    RequestRate,
}

/// The position of the bystander to the attackers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Position {
    /// On the attackers' network, each on a tap of its own; or behind the attackers' haproxy
    SameNetwork,
    /// Behind the interface of the router that the attackers are behind
    SameInterface,
    /// Behind another interface of the router, or behind another haproxy
    OtherNetwork,
    /// On a tap; the attackers are behind a router or a haproxy
    Tap,
}

impl Attack {
    /// Returns its positions, the worst first.
    #[must_use]
    pub const fn positions(self) -> &'static [Position] {
        use Position::{OtherNetwork, SameInterface, SameNetwork, Tap};
        match self {
            Self::IdleConnections
            | Self::SynFlood
            | Self::LinkLocalSyns
            | Self::LinkLocalMacs
            | Self::Unread64k
            | Self::Unread1m
            | Self::Trickled
            | Self::RequestRate => &[SameInterface, Tap, OtherNetwork, SameNetwork],
            Self::MadeUpIpv4 => &[Tap, SameInterface, OtherNetwork, SameNetwork],
            Self::ClientMap => &[Tap, SameInterface, OtherNetwork],
            Self::Busy | Self::Busy20ms | Self::Busy200ms | Self::FourBusy | Self::FourBusy20ms => {
                &[SameInterface, Tap]
            }
            Self::SlowPosts | Self::RefusedPosts => &[SameNetwork, OtherNetwork, Tap],
        }
    }

    /// Returns the number of attacking guests on each of their networks.
    const fn attackers(self) -> u8 {
        if matches!(self, Self::FourBusy | Self::FourBusy20ms) { 4 } else { 1 }
    }

    /// Returns the number of the attackers' networks.
    const fn networks(self) -> u8 {
        if matches!(self, Self::ClientMap) { 33 } else { 1 }
    }

    /// Returns true if the attackers are behind a haproxy.
    const fn is_through_haproxy(self) -> bool {
        matches!(self, Self::SlowPosts | Self::RefusedPosts)
    }

    /// Returns the behaviour of Nova, and of the server in its place.
    fn mode(self) -> Mode {
        let paced = |workers, millis| Mode::Paced(Pace::new(workers, Duration::from_millis(millis)));
        if matches!(self, Self::Busy20ms | Self::FourBusy20ms) {
            paced(4, 20)
        } else if self == Self::Busy200ms {
            paced(8, 200)
        } else {
            Mode::Serve
        }
    }

    /// Returns the options of the agent.
    const fn options(self) -> &'static [(&'static str, &'static str, &'static str)] {
        const RATE: &str = "metadata_rate_limiting";
        if matches!(self, Self::SlowPosts) {
            &[("metadata_agent", "connections", "64")]
        } else if matches!(self, Self::RequestRate) {
            // Twice the rate of a bystander.
            &[
                (RATE, "rate_limit_enabled", "true"),
                (RATE, "base_window_duration", "10"),
                (RATE, "base_query_rate_limit", "400"),
                (RATE, "burst_window_duration", "1"),
                (RATE, "burst_query_rate_limit", "40"),
            ]
        } else {
            &[]
        }
    }

    /// Returns the size of an attacker's answers.
    const fn answer(self) -> usize {
        match self {
            Self::Unread1m => 1 << 20,
            Self::Unread64k | Self::Trickled => 64 << 10,
            Self::IdleConnections
            | Self::SynFlood
            | Self::LinkLocalSyns
            | Self::LinkLocalMacs
            | Self::MadeUpIpv4
            | Self::ClientMap
            | Self::Busy
            | Self::Busy20ms
            | Self::Busy200ms
            | Self::FourBusy
            | Self::FourBusy20ms
            | Self::SlowPosts
            | Self::RefusedPosts
            | Self::RequestRate => 64,
        }
    }
}

/// Panics unless every request of a bystander that was not served before is answered during the
/// attack.
pub fn assert_bystander_served(attack: Attack, position: Position) {
    const REQUESTS: u32 = 60;
    let scene = Scene::new(attack, position);
    let tally = scene.observe(Condition::Attacked, REQUESTS).tally;
    let served = u32::try_from(tally.latencies.len()).unwrap_or(u32::MAX);
    assert_eq!(
        served,
        REQUESTS,
        "{}, bystander on {}: {:?}, first {:?}; {}",
        name(&attack),
        name(&position),
        tally.failures,
        tally.first_failure,
        scene.rejections()
    );
}

/// Returns the name of an attack or of a position.
pub fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}
