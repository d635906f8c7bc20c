//! What `md_from_guest` costs a packet, by `BPF_PROG_TEST_RUN` on the agent's own maps.
//!
//! A packet that is none of ours comes out as it went in, so one call runs the program many times. A metadata packet is rewritten, and
//! must come in anew for each run: those are timed one by one, with the clock's own cost in every figure. The empty
//! program is measured in the same way each time, and is what to subtract.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use etherparse::PacketBuilder;
use metadata_agent::datapath::OBJECT;
use metadata_ebpf::abi::names;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use metadata_tests::wait::PATIENCE;
use nix::net::if_::if_nametoindex;
use serde::Serialize;

use super::arena::Arena;
use super::empty_program::EmptyProgram;
use super::statistics::Spread;

/// Runs of one call, for packets that stay as they are.
const REPEAT: u32 = 1_000_000;
/// Calls of one run each, for packets that do not.
const CALLS: usize = 5_000;
/// `bpf_prog_test_run_skb` needs a frame's payload to begin with.
const PAYLOAD: [u8; 32] = [0x5a; 32];
/// Of a connection that stays open meanwhile.
const CONNECTED_PORT: u16 = 40_001;
const NEW_PORT: u16 = 40_002;
const GATEWAY: [u8; 4] = [10, 0, 0, 1];

/// As linux/pkt_cls.h numbers them.
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_REDIRECT: i32 = 7;

/// One kind of packet, run by run.
#[derive(Debug, Serialize)]
pub struct Cost {
    pub packet: &'static str,
    /// Whether it is for 169.254.169.254, and led into the portal.
    pub metadata: bool,
    pub program_ns: Vec<f64>,
    /// The empty program on the same frame.
    pub empty_ns: Vec<f64>,
}

impl Cost {
    /// What our program costs more than one that does nothing.
    pub fn added(&self) -> Spread {
        Spread::of(self.program_ns.iter().zip(&self.empty_ns).map(|(program, empty)| program - empty))
    }
}

struct Packet {
    name: &'static str,
    frame: Vec<u8>,
    metadata: bool,
}

/// Measures each kind of packet, ours and the empty program in turn.
pub fn measure(arena: &Arena, repetitions: u32) -> anyhow::Result<Vec<Cost>> {
    let source: SocketAddr =
        (arena.guest.port.ipv4().context("the guest has an address")?, CONNECTED_PORT).into();
    let _connection = arena.guest.dial(arena.guest.metadata_ipv4(), Some(source), PATIENCE)?;
    let packets = packets(arena)?;
    arena.host.netns().enter(|| {
        let mut bench = Bench::load(arena)?;
        let mut costs: Vec<Cost> = packets
            .iter()
            .map(|packet| Cost {
                packet: packet.name,
                metadata: packet.metadata,
                program_ns: Vec::new(),
                empty_ns: Vec::new(),
            })
            .collect();
        for _ in 0..repetitions {
            for (packet, cost) in packets.iter().zip(&mut costs) {
                let (program, empty) = bench.time(packet)?;
                cost.program_ns.push(program);
                cost.empty_ns.push(empty);
            }
        }
        Ok(costs)
    })
}

struct Bench {
    ours: Ebpf,
    empty: EmptyProgram,
    /// `struct __sk_buff` up to `ifindex`, which makes the frames come in by the guest's interface.
    context: [u8; 44],
}

impl Bench {
    fn load(arena: &Arena) -> anyhow::Result<Self> {
        // The maps are pinned: a second copy of the programs shares them with the agent's own.
        let mut ours = EbpfLoader::new()
            .default_map_pin_directory(arena.pins())
            .load(OBJECT)
            .context("load the programs a second time")?;
        from_guest(&mut ours)?.load()?;
        let mut context = [0; 44];
        let index = if_nametoindex(arena.guest.tap.as_str())?;
        context[40..].copy_from_slice(&index.to_ne_bytes());
        Ok(Self { ours, empty: EmptyProgram::load()?, context })
    }

    /// Nanoseconds of our program and of the empty one.
    fn time(&mut self, packet: &Packet) -> anyhow::Result<(f64, f64)> {
        let (ours, empty) = (from_guest(&mut self.ours)?, self.empty.program()?);
        let (context, frame) = (&self.context[..], &packet.frame[..]);
        let (ours, empty) = if packet.metadata {
            (
                one_by_one(ours, context, frame, TC_ACT_REDIRECT),
                one_by_one(empty, context, frame, TC_ACT_UNSPEC),
            )
        } else {
            (many(ours, context, frame), many(empty, context, frame))
        };
        Ok((ours.context(packet.name)?, empty.context(packet.name)?))
    }
}

/// Nanoseconds a run, of many on one frame that stays as it is. Timed around the call, as the kernel tells whole
/// nanoseconds.
fn many(program: &SchedClassifier, context: &[u8], frame: &[u8]) -> anyhow::Result<f64> {
    let began = Instant::now();
    run(program, context, frame, REPEAT, TC_ACT_UNSPEC)?;
    Ok(began.elapsed().as_secs_f64() * 1e9 / f64::from(REPEAT))
}

/// Nanoseconds a run, the median of many calls that bring the frame anew.
fn one_by_one(program: &SchedClassifier, context: &[u8], frame: &[u8], verdict: i32) -> anyhow::Result<f64> {
    let once = |_| Ok(run(program, context, frame, 1, verdict)?.as_secs_f64() * 1e9);
    let figures: anyhow::Result<Vec<f64>> = (0..CALLS).map(once).collect();
    Ok(Spread::of(figures?).median)
}

/// Lets the program decide, and hands back how long it took by the kernel's clock.
fn run(
    program: &SchedClassifier,
    context: &[u8],
    frame: &[u8],
    repeat: u32,
    verdict: i32,
) -> anyhow::Result<Duration> {
    let options =
        TestRunOptions { data_in: Some(frame), ctx_in: Some(context), repeat, ..TestRunOptions::default() };
    let result = program.test_run(options)?;
    let got = result.return_value.cast_signed();
    ensure!(got == verdict, "the verdict is {got} instead of {verdict}");
    Ok(result.duration)
}

fn from_guest(ebpf: &mut Ebpf) -> anyhow::Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut(names::FROM_GUEST).context(names::FROM_GUEST)?.try_into()?)
}

fn packets(arena: &Arena) -> anyhow::Result<Vec<Packet>> {
    let guest = &arena.guest.port;
    let (mac, address) = (guest.mac.0, guest.ipv4().context("the guest has an address")?.octets());
    let gateway_mac = [0xfa, 0x16, 0x3f, 0, 0, 1];
    let other = [192, 0, 2, 77];
    let ipv4 = |to| PacketBuilder::ethernet2(mac, gateway_mac).ipv4(address, to, 64);
    let ipv6 = |to: &str| -> anyhow::Result<_> {
        let from: std::net::Ipv6Addr = "2001:db8::5".parse()?;
        let to: std::net::Ipv6Addr = to.parse()?;
        Ok(PacketBuilder::ethernet2(mac, gateway_mac).ipv6(from.octets(), to.octets(), 64))
    };
    let tcp = |step: etherparse::PacketBuilderStep<etherparse::TcpHeader>| -> anyhow::Result<Vec<u8>> {
        let mut frame = Vec::new();
        step.write(&mut frame, &PAYLOAD)?;
        Ok(frame)
    };
    let mut udp = Vec::new();
    ipv4(other).udp(5353, 53).write(&mut udp, &PAYLOAD)?;
    let mut syn = Vec::new();
    ipv4(METADATA_IPV4).tcp(NEW_PORT, METADATA_PORT, 1, 64_240).syn().write(&mut syn, &[])?;
    let bystander = |name, frame| Packet { name, frame, metadata: false };
    let ours = |name, frame| Packet { name, frame, metadata: true };
    Ok(vec![
        bystander("IPv4 TCP to another address", tcp(ipv4(other).tcp(NEW_PORT, 80, 1, 502).ack(1))?),
        bystander("IPv4 UDP to another address", udp),
        bystander("ARP for another address", arp(mac, address, GATEWAY)),
        bystander(
            "IPv6 TCP to another address",
            tcp(ipv6("2001:db8::77")?.tcp(NEW_PORT, 80, 1, 502).ack(1))?,
        ),
        bystander("IPv6 to a link-local address", tcp(ipv6("fe80::1")?.tcp(NEW_PORT, 80, 1, 502).ack(1))?),
        bystander(
            "IPv4 TCP to 169.254.169.254:443",
            tcp(ipv4(METADATA_IPV4).tcp(NEW_PORT, 443, 1, 502).ack(1))?,
        ),
        ours("metadata: a SYN", syn),
        ours(
            "metadata: a segment of a connection",
            tcp(ipv4(METADATA_IPV4).tcp(CONNECTED_PORT, METADATA_PORT, 1, 502).ack(1))?,
        ),
    ])
}

fn arp(mac: [u8; 6], sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    [&[0xff; 6][..], &mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &mac, &sender, &[0; 6], &target, &[0; 18]]
        .concat()
}
