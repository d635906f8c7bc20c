//! The cost of a large host's inventory: ports that several sources describe in parts, from their
//! events to the published snapshot.
//!
//! It measures the agent's own library, fed as by the sources: through the bounded event queue,
//! with the publisher on its own thread. There is nothing to measure of control planes, because no
//! request queries one. The scenario `source_neutron` verifies this with a real neutron-server over
//! a thousand requests.

use std::collections::VecDeque;
use std::fmt;
use std::fs;
use std::hint::black_box;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use metadata_agent::ids::{InstanceId, MacAddress, NetworkId, PortId};
use metadata_agent::inventory::{
    DeviceName, Entry, Event, Inventory, PortAddressing, PortRecord, SourceKind, Tenant,
};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike as _;
use serde::Serialize;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::machine::Machine;
use super::statistics::{Spread, precise};

/// More than Open vSwitch has on any host.
const PORTS: u32 = 10_000;
/// Changes per second, and for how long.
const RATE: u32 = 1000;
const SECONDS: u32 = 3;
/// As in the agent.
const EVENT_QUEUE: usize = 1024;
/// The number of look-ups timed together, because reading the clock costs as much as one.
const TOGETHER: usize = 100;
/// The number of look-ups per port.
const ROUNDS: usize = 20;
/// The limit for a change to be published before the bench gives up.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Serialize)]
pub struct Figures {
    machine: Machine,
    ports: u32,
    events: u32,
    load_ms: f64,
    resident_growth_kib: u64,
    lookup_ns: Vec<f64>,
    changes_per_second: f64,
    latency_us: Vec<f64>,
    cpu_percent: f64,
}

/// Measures with a new inventory.
pub fn measure() -> anyhow::Result<Figures> {
    let machine = Machine::describe()?;
    let runtime = runtime()?;
    let (inventory, publisher) = Inventory::new();
    let (events, queue) = mpsc::channel(EVENT_QUEUE);
    let cancel = CancellationToken::new();
    let publishing = {
        let (runtime, cancel) = (self::runtime()?, cancel.clone());
        thread::spawn(move || runtime.block_on(publisher.run(queue, cancel)))
    };

    let resident = resident_kib()?;
    let begin = Instant::now();
    runtime.block_on(load(&inventory, &events))?;
    let load_ms = begin.elapsed().as_secs_f64() * 1e3;
    let resident_growth_kib = resident_kib()?.saturating_sub(resident);
    let lookup_ns = look_up(&inventory)?;
    let cpu = cpu_us()?;
    let begin = Instant::now();
    let latency_us = runtime.block_on(change(&inventory, &events))?;
    let took = begin.elapsed();
    let cpu_percent = 100.0 * (cpu_us()? - cpu) / (took.as_secs_f64() * 1e6);
    let changes_per_second = f64::from(RATE * SECONDS) / took.as_secs_f64();
    drop(events);
    ensure!(publishing.join().is_ok(), "the publisher panicked");
    Ok(Figures {
        machine,
        ports: PORTS,
        events: 2 * PORTS,
        load_ms,
        resident_growth_kib,
        lookup_ns,
        changes_per_second,
        latency_us,
        cpu_percent,
    })
}

fn runtime() -> anyhow::Result<Runtime> {
    Builder::new_current_thread().enable_all().build().context("start a runtime")
}

/// Sends every port in two parts and waits until all of them are known.
async fn load(inventory: &Inventory, events: &mpsc::Sender<Event>) -> anyhow::Result<()> {
    let mut version = inventory.subscribe();
    for number in 0..PORTS {
        for (source, record) in
            [(SourceKind::Ovsdb, interface(number, 0)), (SourceKind::Neutron, port(number))]
        {
            let event = Event { source, key: number.to_string(), ports: vec![record] };
            events.send(event).await.context("the publisher has stopped")?;
        }
    }
    while inventory.load().counts().ports < PORTS as usize {
        timeout(PATIENCE, version.changed()).await.context("the ports were never published")??;
    }
    Ok(())
}

fn look_up(inventory: &Arc<Inventory>) -> anyhow::Result<Vec<f64>> {
    let names: Vec<DeviceName> =
        (0..PORTS).map(|number| DeviceName::from_port_id(&port_id(number))).collect();
    let mut figures = Vec::new();
    for _ in 0..ROUNDS {
        for some in names.chunks(TOGETHER) {
            let begin = Instant::now();
            let known = some.iter().filter(|name| {
                matches!(black_box(inventory.load().find(name.as_str(), None)), Ok(Some(Entry::Agreed(_))))
            });
            let known = known.count();
            let took = begin.elapsed();
            ensure!(known == some.len(), "a port is not known");
            figures.push(took.as_secs_f64() * 1e9 / precise(some.len() as u64));
        }
    }
    Ok(figures)
}

/// Changes the MAC addresses of ports in turn, at the given rate, and returns the time until each
/// was published.
async fn change(inventory: &Inventory, events: &mpsc::Sender<Event>) -> anyhow::Result<Vec<f64>> {
    let mut version = inventory.subscribe();
    let mut beat = interval(Duration::from_secs(1) / RATE);
    beat.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut left = 0..RATE * SECONDS;
    let mut hidden = VecDeque::new();
    let mut latencies = Vec::new();
    while !(left.is_empty() && hidden.is_empty()) {
        tokio::select! {
            biased;
            changed = version.changed() => {
                changed.context("the publisher has stopped")?;
                let (snapshot, now) = (inventory.load(), Instant::now());
                while let Some((number, sent)) = hidden.front() {
                    let tap = DeviceName::from_port_id(&port_id(*number));
                    let Ok(Some(Entry::Agreed(port))) = snapshot.find(tap.as_str(), None) else { break };
                    if port.addressing.mac != Some(mac(*number, 1)) {
                        break;
                    }
                    latencies.push(now.duration_since(*sent).as_secs_f64() * 1e6);
                    hidden.pop_front();
                }
            }
            _ = beat.tick(), if !left.is_empty() => {
                let Some(number) = left.next() else { continue };
                let ports = vec![interface(number, 1)];
                hidden.push_back((number, Instant::now()));
                let event = Event { source: SourceKind::Ovsdb, key: number.to_string(), ports };
                events.send(event).await.context("the publisher has stopped")?;
            }
            () = tokio::time::sleep(PATIENCE), if left.is_empty() => {
                anyhow::bail!("{} changes were never published", hidden.len());
            }
        }
    }
    Ok(latencies)
}

/// Returns the record from Open vSwitch.
fn interface(number: u32, edition: u8) -> PortRecord {
    PortRecord {
        id: Some(port_id(number)),
        device: Some(DeviceName::from_port_id(&port_id(number))),
        tenant: Some(Tenant { instance: instance(number), project: None }),
        addressing: PortAddressing {
            network: Some(network(number)),
            mac: Some(mac(number, edition)),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    }
}

/// Returns the record from Neutron.
fn port(number: u32) -> PortRecord {
    let [.., a, b] = number.to_be_bytes();
    PortRecord {
        id: Some(port_id(number)),
        tenant: Some(Tenant { instance: instance(number), project: None }),
        port_project: format!("project{}", number % 100).parse().ok(),
        addressing: PortAddressing {
            network: Some(network(number)),
            mac: Some(mac(number, 0)),
            fixed_ips: vec![[10, 0, a, b].into()],
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    }
}

/// Returns ids with different first eleven characters, like almost all ports of a host.
fn port_id(number: u32) -> PortId {
    PortId::new(Uuid::from_fields(number, 0, 0x4000, &[0x80; 8]))
}

fn instance(number: u32) -> InstanceId {
    InstanceId::new(Uuid::from_fields(number, 1, 0x4000, &[0x80; 8]))
}

fn network(number: u32) -> NetworkId {
    NetworkId::new(Uuid::from_fields(number % 100, 2, 0x4000, &[0x80; 8]))
}

fn mac(number: u32, edition: u8) -> MacAddress {
    let [_, b, c, d] = number.to_be_bytes();
    MacAddress([0xfa, edition, 0x3e, b, c, d])
}

fn resident_kib() -> anyhow::Result<u64> {
    let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()).context("VmRSS of the bench")?;
    number.parse().context("VmRSS")
}

fn cpu_us() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF).context("read the CPU time")?;
    let both = usage.user_time() + usage.system_time();
    Ok(precise(u64::try_from(both.num_microseconds()).unwrap_or_default()))
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { processor, cores, kernel, memory_mib, .. } = &self.machine;
        let percentile = |part: usize| {
            let mut sorted = self.latency_us.clone();
            sorted.sort_by(f64::total_cmp);
            sorted
                .get((sorted.len() * part / 100).min(sorted.len().saturating_sub(1)))
                .copied()
                .unwrap_or(f64::NAN)
        };
        let lookup = Spread::new(self.lookup_ns.iter().copied());
        writeln!(f, "{processor}, {cores} cores, {memory_mib} MiB; Linux {kernel}.\n")?;
        writeln!(f, "The inventory of {} ports, each described by two sources:\n", self.ports)?;
        writeln!(
            f,
            "{:<38}{:>9.0} ms for {} events",
            "from the first event to the last port", self.load_ms, self.events
        )?;
        writeln!(
            f,
            "{:<38}{:>9} KiB, {:.0} bytes a port",
            "memory",
            self.resident_growth_kib,
            precise(self.resident_growth_kib) * 1024.0 / f64::from(self.ports)
        )?;
        writeln!(
            f,
            "{:<38}{:>9.0} ns ({:.0}..{:.0})",
            "look-up by device", lookup.median, lookup.lowest, lookup.highest
        )?;
        writeln!(f, "{:<38}{:>9.0} per second, {RATE} requested", "changes", self.changes_per_second)?;
        writeln!(
            f,
            "{:<38}{:>9.0} us p50, {:.0} us p99",
            "from a change's event to the snapshot",
            percentile(50),
            percentile(99)
        )?;
        write!(f, "{:<38}{:>9.1} % of one core", "CPU of publisher and bench", self.cpu_percent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_of_a_port_add_up() {
        let (inventory, publisher) = Inventory::new();
        let (events, queue) = mpsc::channel(8);
        let both = [(SourceKind::Ovsdb, interface(7, 0)), (SourceKind::Neutron, port(7))];
        for (source, record) in both {
            events.try_send(Event { source, key: "7".to_owned(), ports: vec![record] }).unwrap();
        }
        drop(events);
        runtime().unwrap().block_on(publisher.run(queue, CancellationToken::new()));
        let tap = DeviceName::from_port_id(&port_id(7));
        let snapshot = inventory.load();
        let Ok(Some(Entry::Agreed(known))) = snapshot.find(tap.as_str(), None) else { panic!("unknown") };
        assert_eq!((known.instance, known.addressing.mac), (instance(7), Some(mac(7, 0))));
    }
}
