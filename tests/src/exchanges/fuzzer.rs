//! Runs exchanges of several guests at once until a limit or a violation: on taps over both
//! families, or through Neutron's haproxies and directly on the socket for them.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::Exchange;
use super::corpus;
use super::leaks::Resources;
use super::oracle::{KnownGuest, Oracle};
use super::reduction::reduce;
use super::worker::{Haproxies, Worker};
use crate::agent::{Agent, AgentProcess};
use crate::guest::Guest;
use crate::nova::{Instance, NovaStandIn};
use crate::topology::{Host, Network};
use crate::two_tenants::assert_served_v6;

/// Exchanges after which the stand-in forgets its requests.
const FORGET_EVERY: u64 = 1_000;
/// Exchanges after which the agent's resources count as usual.
const WARM_UP: u64 = 1_000;

/// Limits of a run.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub exchanges: u64,
    pub time: Duration,
}

/// Result of a run without a violation.
#[derive(Clone, Copy, Debug)]
pub struct Summary {
    pub exchanges: u64,
    pub time: Duration,
    pub before: Resources,
    pub after: Resources,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { exchanges, time, before, after } = self;
        write!(f, "{exchanges} exchanges in {time:?}\nbefore: {before:?}\nafter:  {after:?}")
    }
}

/// Two networks with two guests each, which have the same addresses, behind an agent. Fields are in
/// drop order.
#[derive(Debug)]
pub struct FuzzedHost {
    pub process: AgentProcess,
    pub agent: Agent,
    haproxies: Option<Haproxies>,
    guests: Vec<Guest>,
    known: Vec<KnownGuest>,
    oracle: Oracle,
    nova: NovaStandIn,
    _host: Host,
}

impl FuzzedHost {
    /// The guests are on taps.
    #[must_use]
    pub fn on_taps() -> Self {
        Self::new(|_| None)
    }

    /// The guests of each network are behind a haproxy, with each of Neutron's drivers.
    #[must_use]
    pub fn behind_haproxies() -> Self {
        let host = Self::new(|networks| Some(Haproxies::new(networks)));
        host.guests.iter().for_each(assert_served_v6);
        host
    }

    fn new(haproxies: impl FnOnce(&[Network; 2]) -> Option<Haproxies>) -> Self {
        let host = Host::new();
        let oracle = Oracle::default();
        let observer = oracle.clone();
        let nova = NovaStandIn::start_observed(host.netns(), move |request, answer| {
            observer.observe(request, answer)
        });
        let networks = [host.network(), host.network()];
        let guests: Vec<Guest> = networks
            .iter()
            .flat_map(|network| [[10, 0, 0, 5], [10, 0, 0, 6]].map(|address| network.guest(address)))
            .collect();
        let known: Vec<_> = guests.iter().map(|guest| KnownGuest::from_port(&guest.port)).collect();
        // Time-outs that a run can wait for.
        let mut agent = ["request_head_timeout", "request_body_timeout", "keep_alive_timeout"]
            .iter()
            .fold(Agent::on(&host, &nova), |agent, option| agent.set("metadata_agent", option, "2"));
        for (guest, known) in guests.iter().zip(&known) {
            nova.add(Instance::from_port(&guest.port));
            oracle.add(known.clone());
            agent = agent.port(&guest.port);
            // A guest that closes first would run out of ports within a minute.
            guest.netns().run(&["sysctl", "-q", "-w", "net.ipv4.tcp_tw_reuse=1"]);
            guest.netns().run(&["sysctl", "-q", "-w", "net.ipv4.ip_local_port_range=1024 65535"]);
        }
        let haproxies = haproxies(&networks);
        let agent = match &haproxies {
            Some(haproxies) => haproxies.serve(agent),
            None => agent,
        };
        let agent = agent.install();
        let process = agent.start();
        Self { process, agent, haproxies, guests, known, oracle, nova, _host: host }
    }

    fn workers(&self) -> Vec<Worker<'_>> {
        let all = self.guests.iter().enumerate();
        let workers = all.flat_map(|(number, guest)| match &self.haproxies {
            None => [guest.metadata_ipv4(), guest.metadata_ipv6()]
                .map(|target| Worker::on_tap(guest, target, &self.known, number)),
            Some(haproxies) => [
                Worker::through_haproxy(guest, &self.known, number),
                haproxies.worker(&self.guests, &self.known, number),
            ],
        });
        workers.collect()
    }

    /// Plays the corpus for each guest, one exchange after the other, and for all guests at once.
    /// Panics at a violation.
    pub fn replay(&self) {
        thread::scope(|scope| {
            for worker in self.workers() {
                scope.spawn(move || worker.guest.netns().enter(|| self.replay_for(&worker)));
            }
        });
    }

    fn replay_for(&self, worker: &Worker<'_>) {
        for (title, exchange) in worker.corpus() {
            if let Err(violation) = worker.player(&exchange).play(&exchange) {
                panic!("{title}, at {}: {violation}", worker.entrance);
            }
            self.assert_sound(&title);
        }
    }

    /// Plays generated exchanges, of all guests at once. Panics at a violation and at a leak.
    #[must_use]
    pub fn fuzz(&self, limits: Limits, seed: u64) -> Summary {
        self.run(Limits { exchanges: WARM_UP, ..limits }, seed);
        let before = Resources::at_rest(&self.process);
        let began = Instant::now();
        let exchanges = self.run(limits, seed.wrapping_add(0x1_0000));
        let time = began.elapsed();
        let after = Resources::at_rest(&self.process);
        after.assert_no_leak(&before);
        Summary { exchanges, time, before, after }
    }

    fn run(&self, limits: Limits, seed: u64) -> u64 {
        let (played, stop, fault) = (AtomicU64::new(0), AtomicBool::new(false), Mutex::new(None));
        let began = Instant::now();
        let workers = self.workers();
        thread::scope(|scope| {
            for (number, worker) in workers.iter().enumerate() {
                let seed = seed.wrapping_add(number as u64);
                let (played, stop, fault) = (&played, &stop, &fault);
                scope.spawn(move || {
                    worker.guest.netns().enter(|| {
                        let bases = worker.bases();
                        let mut generator = worker.generator(seed, &bases);
                        while !stop.load(Ordering::Relaxed) && began.elapsed() < limits.time {
                            let count = played.fetch_add(1, Ordering::Relaxed);
                            if count >= limits.exchanges {
                                break;
                            }
                            if count.is_multiple_of(FORGET_EVERY) {
                                self.nova.forget();
                            }
                            let Some(exchange) = worker.prepare(generator.next_exchange()) else {
                                continue;
                            };
                            if let Err(report) = self.try_exchange(worker, &exchange) {
                                stop.store(true, Ordering::Relaxed);
                                let mut fault = fault.lock().unwrap_or_else(PoisonError::into_inner);
                                fault.get_or_insert(format!("seed {seed}: {report}"));
                            }
                        }
                    });
                });
            }
        });
        if let Some(report) = fault.into_inner().unwrap_or_else(PoisonError::into_inner) {
            panic!("{report}\n--- output of the agent\n{}", self.process.output());
        }
        self.assert_sound("the last exchanges");
        played.into_inner().min(limits.exchanges)
    }

    fn try_exchange(&self, worker: &Worker<'_>, exchange: &Exchange) -> Result<(), String> {
        let player = worker.player(exchange);
        let violation = match player.play(exchange) {
            Ok(()) => return self.soundness(),
            Err(violation) => violation,
        };
        // A fault that depends on what other guests did at the time may not appear again.
        let least = reduce(exchange, |candidate| player.play(candidate).is_err());
        let least = corpus::write(&least, &worker.names);
        Err(format!("{violation}, at {}, after\n{least}", worker.entrance))
    }

    /// Checks what the player cannot see: Nova's side and the agent's process.
    fn soundness(&self) -> Result<(), String> {
        if let Some(violation) = self.oracle.violations().first() {
            return Err(violation.to_string());
        }
        match self.process.exited() {
            Some(status) => Err(format!("the agent has ended: {status}")),
            None => Ok(()),
        }
    }

    fn assert_sound(&self, after: &str) {
        if let Err(report) = self.soundness() {
            panic!("after {after}: {report}");
        }
        // A panic of one task does not end the process.
        assert!(!self.process.output().contains("panicked at"), "after {after}: {}", self.process.output());
    }
}
