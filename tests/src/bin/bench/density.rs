//! Workload: many networks with one idle port each. Measures the memory, the start time, and the
//! time from the appearance of one more port's interface to the first byte of its first response.
//!
//! For `haproxy`, an interface, a network and a namespace already exist, and only the process
//! starts: the minimum that Neutron's agents have to do.

use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use metadata_agent::ids::NetworkId;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use metadata_tests::agent::Installer;
use metadata_tests::haproxy::rendered;
use metadata_tests::nova::SECRET;
use metadata_tests::{Agent, Gateway, Haproxy, Host, Netns, Port, wait};
use nix::net::if_::if_nametoindex;

use super::interrupt;
use super::machine::{self, Memory};
use super::peers::{IdleHaproxies, Kind, identity};
use super::plan::Plan;
use super::results::{Absent, Figure, Run, Workload};
use super::statistics::{Spread, precise};
use super::upstream::Upstream;

/// The memory limit of one haproxy, and the memory left to everything else.
const HAPROXY_MIB: u64 = 12;
const RESERVE_MIB: u64 = 2048;
const START: Duration = Duration::from_mins(2);
/// The time limit of one connection attempt, which bounds the error of a measured time.
const ATTEMPT: Duration = Duration::from_millis(1);
const APPEARANCE: Duration = Duration::from_secs(20);

/// Measures every density, one peer after the other, because a thousand networks are not kept
/// twice.
pub fn measure(
    upstream: &Upstream,
    kinds: &[Kind],
    plan: &Plan,
    absent: &mut Vec<Absent>,
) -> anyhow::Result<Vec<Run>> {
    let mut runs = Vec::new();
    for networks in &plan.densities {
        interrupt::check()?;
        if kinds.contains(&Kind::Haproxy) {
            let needed = HAPROXY_MIB * *networks as u64 + RESERVE_MIB;
            if machine::available_mib()? > needed {
                runs.push(haproxies(upstream, *networks, plan.appearances)?);
            } else {
                absent.push(Absent {
                    what: format!("haproxy with {networks} networks"),
                    why: format!("{needed} MiB of free memory are needed"),
                });
            }
        }
        if kinds.contains(&Kind::Ours) {
            runs.push(ours(upstream, *networks, plan.appearances)?);
        }
    }
    Ok(runs)
}

fn run(peer: Kind, networks: usize, processes: &[u32], started: Duration) -> anyhow::Result<Run> {
    let case = if networks == 1 { "1 network".to_owned() } else { format!("{networks} networks") };
    let Memory { resident_kib, proportional_kib } = Memory::of_processes(processes)?;
    Ok(Run::new(Workload::Density, &case, precise(networks as u64), &peer.to_string(), 0)
        .with(Figure::ResidentMib, precise(resident_kib) / 1024.0)
        .with(Figure::ProportionalMib, precise(proportional_kib) / 1024.0)
        .with(Figure::Processes, precise(processes.len() as u64))
        .with(Figure::StartMs, started.as_secs_f64() * 1e3))
}

fn with_appearances(run: Run, took: &mut [Duration]) -> Run {
    took.sort_unstable();
    let ms: Vec<f64> = took.iter().map(|took| took.as_secs_f64() * 1e3).collect();
    let Spread { median, highest, .. } = Spread::new(ms.iter().copied());
    // Of fewer than a hundred, the slowest.
    let p99 = ms.get((ms.len() * 99).div_ceil(100).saturating_sub(1)).copied().unwrap_or(highest);
    run.with(Figure::FirstByteMs, median).with(Figure::FirstByteP99Ms, p99)
}

fn haproxies(upstream: &Upstream, networks: usize, appearances: usize) -> anyhow::Result<Run> {
    let began = Instant::now();
    let idle = IdleHaproxies::start(networks)?;
    let run = run(Kind::Haproxy, networks, &idle.processes(), began.elapsed())?;
    let mut took = Vec::new();
    for _ in 0..appearances {
        interrupt::check()?;
        let host = Host::new();
        let network = host.network();
        let guest = network.guest([10, 0, 0, 5]);
        let gateway = Gateway::plug(&network);
        let server = upstream.cable(gateway.netns()).to_string();
        let config = rendered(&network.id.to_string(), &server, &identity(&guest.port));
        let began = Instant::now();
        let haproxy = Haproxy::spawn(gateway.netns(), &config);
        took.push(first_byte(guest.netns())?.duration_since(began));
        drop(haproxy);
    }
    Ok(with_appearances(run, &mut took))
}

fn ours(upstream: &Upstream, networks: usize, appearances: usize) -> anyhow::Result<Run> {
    let host = Host::new();
    let server = upstream.cable(host.netns());
    // The unused ends of the veth pairs.
    let parking = Netns::new("parking");
    let ports: Vec<Port> = (0..networks).map(|_| port()).collect();
    host.netns().ip(&cables(&ports, &parking));
    let newcomers: Vec<_> = (0..appearances).map(|_| Newcomer::new()).collect();
    let known = ports.iter().chain(newcomers.iter().map(|newcomer| &newcomer.port));
    let agent = known.fold(Agent::forwarding_to(&host, server, SECRET), Installer::port).install();
    let began = Instant::now();
    let process = agent.spawn(&[]);
    process.ready_within(START)?;
    wait::poll(START, || (process.attachments().len() == networks).then_some(()))
        .context("the agent did not attach all ports")?;
    let run = run(Kind::Ours, networks, &process.pids(), began.elapsed())?;
    let mut took = Vec::new();
    for newcomer in &newcomers {
        interrupt::check()?;
        took.push(newcomer.appear(&host)?);
    }
    Ok(with_appearances(run, &mut took))
}

fn port() -> Port {
    Port::new(NetworkId::new(uuid::Uuid::new_v4()), Ipv4Addr::new(10, 0, 0, 5))
}

/// Creates a bridge and a tap for each port.
fn cables(ports: &[Port], parking: &Netns) -> String {
    let mut batch = String::new();
    for (number, port) in ports.iter().enumerate() {
        let (tap, bridge) = (port.tap(), format!("brq{}", &port.network.to_string()[..11]));
        let written = write!(
            batch,
            "link add {bridge} type bridge mcast_snooping 0\n\
             link set {bridge} up\n\
             link add {tap} type veth peer name guest{number} netns {}\n\
             link set {tap} master {bridge}\n\
             link set {tap} up\n",
            parking.name()
        );
        written.unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
    }
    batch
}

/// A guest that is ready except for the host's end of its veth pair, which is still elsewhere.
struct Newcomer {
    port: Port,
    guest: Netns,
    elsewhere: Netns,
}

impl Newcomer {
    fn new() -> Self {
        let (port, guest, elsewhere) = (port(), Netns::new("newcomer"), Netns::new("elsewhere"));
        elsewhere.ip(&format!(
            "link add {} type veth peer name eth0 address {} netns {}",
            port.tap(),
            port.mac,
            guest.name()
        ));
        guest.ip("link set eth0 up\n\
             address add 10.0.0.5/24 dev eth0\n\
             neighbour add 10.0.0.1 lladdr fa:16:3f:00:00:01 nud permanent dev eth0\n\
             route add 169.254.169.254 via 10.0.0.1");
        Self { port, guest, elsewhere }
    }

    /// Moves the interface to the host and sets it up. The time starts when the host has it.
    fn appear(&self, host: &Host) -> anyhow::Result<Duration> {
        let tap = self.port.tap();
        let (appeared, answered) = thread::scope(|scope| {
            let served = scope.spawn(|| {
                let appeared = host.netns().enter(|| until_there(&tap));
                (appeared, first_byte(&self.guest))
            });
            self.elsewhere.ip(&format!("link set {tap} netns {} up", host.netns().name()));
            served.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
        Ok(answered?.duration_since(appeared?))
    }
}

/// Polls without a pause, so that the result is exact to one poll.
fn until_there(interface: &str) -> anyhow::Result<Instant> {
    let end = Instant::now() + APPEARANCE;
    while if_nametoindex(interface).is_err() {
        ensure!(Instant::now() < end, "{interface} did not appear");
        thread::yield_now();
    }
    Ok(Instant::now())
}

/// Sends requests until there is a response, without waiting for lost packets.
fn first_byte(guest: &Netns) -> anyhow::Result<Instant> {
    let target: SocketAddr = (METADATA_IPV4, METADATA_PORT).into();
    guest.enter(|| {
        let end = Instant::now() + APPEARANCE;
        let mut last = None;
        while Instant::now() < end {
            let answer = TcpStream::connect_timeout(&target, ATTEMPT).and_then(|mut stream| {
                stream.set_read_timeout(Some(APPEARANCE))?;
                stream
                    .write_all(b"GET /1024 HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")?;
                let mut beginning = [0; 13];
                stream.read_exact(&mut beginning)?;
                Ok(beginning)
            });
            match answer {
                Ok(beginning) if beginning == *b"HTTP/1.1 200 " => return Ok(Instant::now()),
                Ok(beginning) => last = Some(String::from_utf8_lossy(&beginning).into_owned()),
                Err(e) => last = Some(e.to_string()),
            }
        }
        anyhow::bail!("no response within {APPEARANCE:?}: {}", last.unwrap_or_default())
    })
}
