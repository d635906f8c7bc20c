//! `direct`: each guest has a cable to the upstream.

use std::net::SocketAddr;

use metadata_tests::Netns;

use super::super::upstream::Upstream;
use super::{Caller, Crowd, Peer};

pub struct Direct {
    guests: Vec<(Netns, SocketAddr)>,
}

impl Direct {
    pub fn start(upstream: &Upstream, crowd: Crowd) -> Self {
        let guest = |_| {
            let netns = Netns::new("direct");
            let target = upstream.cable(&netns);
            (netns, target)
        };
        Self { guests: (0..crowd.guests).map(guest).collect() }
    }
}

impl Peer for Direct {
    fn callers(&self) -> Vec<Caller<'_>> {
        self.guests.iter().map(|(netns, target)| Caller { netns, target: *target }).collect()
    }

    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }
}
