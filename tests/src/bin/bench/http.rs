//! Requests per second and latencies: through the agent and past it, turn by turn.

use std::collections::BTreeMap;
use std::time::Duration;

use metadata_tests::load::{Failure, Load, Style, Tally};
use serde::Serialize;

use super::arena::{Arena, PATH};
use super::machine::{CpuMeter, CpuUse};

/// Bytes of the answer.
pub const ANSWER: usize = 1024;
/// Load that is not counted, before the first counted one.
const WARM_UP: Duration = Duration::from_millis(200);

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Kind {
    pub connections: usize,
    pub keep_alive: bool,
}

/// In the order they are shown.
pub const KINDS: [Kind; 4] = [
    Kind { connections: 1, keep_alive: true },
    Kind { connections: 64, keep_alive: true },
    Kind { connections: 1, keep_alive: false },
    Kind { connections: 64, keep_alive: false },
];

/// From the guest to Nova.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    Agent,
    Straight,
}

/// One load, and what came of it.
#[derive(Debug, Serialize)]
pub struct Run {
    pub kind: Kind,
    pub way: Way,
    pub repetition: u32,
    /// Right answers, and per second.
    pub answers: u64,
    pub rate: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub longest_us: f64,
    pub failed: u64,
    pub failures: BTreeMap<Failure, u64>,
    pub first_failure: Option<String>,
    /// What load generator and agent used of a CPU.
    pub generator_cpu_us: u64,
    pub agent_cpu_us: u64,
    /// The share of the machine that neither bench nor agent took.
    pub others: f64,
}

/// Measures every kind, both ways in turn so that what disturbs the machine disturbs both.
pub fn measure(arena: &Arena, duration: Duration, repetitions: u32) -> anyhow::Result<Vec<Run>> {
    let body: Vec<u8> = (b'a'..=b'z').cycle().take(ANSWER).collect();
    arena.answer_all_with(&body);
    let mut runs = Vec::new();
    for kind in KINDS {
        let load = |way: Way, duration| Load {
            target: match way {
                Way::Agent => arena.guest.metadata_ipv4(),
                Way::Straight => arena.nova_directly(),
            },
            path: PATH.to_owned(),
            body: body.clone(),
            connections: kind.connections,
            style: if kind.keep_alive { Style::KeepAlive } else { Style::NewConnection },
            duration,
        };
        for way in [Way::Agent, Way::Straight] {
            drop(load(way, WARM_UP).run(arena.guest.netns()));
        }
        for repetition in 0..repetitions {
            for way in [Way::Agent, Way::Straight] {
                let meter = CpuMeter::start(arena.agent_pid())?;
                let tally = load(way, duration).run(arena.guest.netns());
                runs.push(Run::new(kind, way, repetition, duration, tally, meter.stop()?));
            }
        }
    }
    Ok(runs)
}

impl Run {
    fn new(kind: Kind, way: Way, repetition: u32, duration: Duration, tally: Tally, cpu: CpuUse) -> Self {
        let us = |latency: Duration| latency.as_secs_f64() * 1e6;
        Self {
            kind,
            way,
            repetition,
            answers: tally.in_time,
            rate: tally.rate(duration),
            p50_us: us(tally.quantile(0.5)),
            p99_us: us(tally.quantile(0.99)),
            longest_us: us(tally.quantile(1.0)),
            failed: tally.failed(),
            failures: tally.failures,
            first_failure: tally.first_failure,
            generator_cpu_us: u64::try_from(tally.cpu.as_micros()).unwrap_or(u64::MAX),
            agent_cpu_us: cpu.agent_us,
            others: cpu.others,
        }
    }
}
