//! The measurements and their duration: all of them within half an hour, or most of them within
//! three minutes.

use std::fmt;
use std::time::Duration;

use super::requests::{Ask, Case};
use super::upstream::SIZES;

/// The parameters of a bench.
#[derive(Clone, Debug)]
pub struct Plan {
    pub name: &'static str,
    pub repetitions: u32,
    /// The duration of one load.
    pub duration: Duration,
    /// The minimum duration for peers whose responses can take a second.
    pub slow_duration: Duration,
    pub cases: Vec<Case>,
    /// Other instances that host-haproxy knows. The first number is for its main figure.
    pub instances: Vec<usize>,
    /// Other ports that our agent knows, besides none.
    pub known_ports: Vec<usize>,
    /// Guests that boot at once, and the number of their networks.
    pub storms: Vec<usize>,
    pub storm_networks: usize,
    /// Networks with one port each.
    pub densities: Vec<usize>,
    /// Additional interfaces at each density.
    pub appearances: usize,
}

impl Plan {
    pub fn full() -> Self {
        let concurrency = [1, 8, 64, 256];
        let mut cases: Vec<Case> = [true, false]
            .into_iter()
            .flat_map(|keep_alive| concurrency.map(|connections| Case::get(connections, keep_alive)))
            .collect();
        for ask in [Ask::Get(SIZES[1]), Ask::Get(SIZES[2]), Ask::Post(SIZES[0])] {
            cases.extend([true, false].map(|keep_alive| Case { ask, ..Case::get(64, keep_alive) }));
        }
        Self {
            name: "full",
            repetitions: 5,
            duration: Duration::from_secs(2),
            slow_duration: Duration::from_secs(10),
            cases,
            instances: vec![19, 199, 999, 3999],
            known_ports: vec![999, 3999],
            storms: vec![1, 50, 200],
            storm_networks: 10,
            densities: vec![1, 100, 1000],
            appearances: 100,
        }
    }

    pub fn quick() -> Self {
        let mut cases: Vec<Case> = [1, 64]
            .into_iter()
            .flat_map(|connections| [true, false].map(|k| Case::get(connections, k)))
            .collect();
        cases.push(Case::get(256, false));
        cases.push(Case { ask: Ask::Get(SIZES[2]), ..Case::get(64, true) });
        Self {
            name: "quick",
            repetitions: 3,
            duration: Duration::from_millis(700),
            slow_duration: Duration::from_secs(5),
            cases,
            instances: vec![19, 999],
            known_ports: vec![3999],
            storms: vec![1, 50],
            densities: vec![1, 20],
            appearances: 10,
            ..Self::full()
        }
    }

    /// Returns minimal, meaningless measurements for the bench's own test.
    pub fn rehearsal() -> Self {
        Self {
            name: "rehearsal: these figures are meaningless",
            repetitions: 1,
            duration: Duration::from_millis(50),
            slow_duration: Duration::from_secs(2),
            cases: vec![
                Case::get(2, true),
                Case::get(64, false),
                Case { ask: Ask::Post(SIZES[0]), ..Case::get(2, false) },
            ],
            instances: vec![1, 3],
            known_ports: vec![5],
            storms: vec![1, 3],
            storm_networks: 2,
            densities: vec![1, 2],
            appearances: 2,
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}; {} repetitions of {:?} each, peers in turn",
            self.name, self.repetitions, self.duration
        )
    }
}
