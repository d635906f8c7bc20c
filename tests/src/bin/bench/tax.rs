//! The cost of `md_from_guest` per packet, measured with `BPF_PROG_TEST_RUN` on the agent's own
//! maps.
//!
//! A packet that does not concern us is not changed, so one call runs the program many times. A
//! metadata packet is rewritten and must be supplied again for each run. Those runs are timed one
//! by one, and each figure includes the cost of reading the clock. The empty program is measured in
//! the same way and must be subtracted.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use etherparse::PacketBuilder;
use metadata_agent::datapath::OBJECT;
use metadata_ebpf::abi::names;
use metadata_ebpf::identity::{METADATA_IPV4, METADATA_PORT};
use metadata_tests::Guest;
use metadata_tests::tiny_program::{TinyProgram, Verdict};
use metadata_tests::wait::PATIENCE;
use nix::net::if_::if_nametoindex;

use super::interrupt;
use super::peers::Ours;
use super::results::{Figure, Run, Workload};
use super::statistics::Spread;

/// Calls for an unchanged packet, each short enough to be mostly undisturbed.
const CALLS: usize = 25;
/// Runs in each such call.
const REPEAT: u32 = 40_000;
/// Calls with one run each for a packet that is changed.
const SINGLE_RUNS: usize = 5_000;
const PAYLOAD: [u8; 32] = [0x5a; 32];
/// The source port of a connection that stays open.
const CONNECTED_PORT: u16 = 40_001;
const NEW_PORT: u16 = 40_002;
const GATEWAY: [u8; 4] = [10, 0, 0, 1];

/// As in linux/pkt_cls.h.
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_REDIRECT: i32 = 7;

struct Packet {
    name: &'static str,
    frame: Vec<u8>,
    metadata: bool,
}

/// Measures each kind of packet, with our program and the empty one in turn.
pub fn measure(ours: &Ours, repetitions: u32) -> anyhow::Result<Vec<Run>> {
    let guest = &ours.guests[0];
    let source: SocketAddr = (guest.port.ipv4().context("the guest has an address")?, CONNECTED_PORT).into();
    let _connection = guest.dial(guest.metadata_ipv4(), Some(source), PATIENCE)?;
    let packets = packets(guest)?;
    ours.host.netns().enter(|| {
        let mut bench = Bench::load(ours)?;
        let mut runs = Vec::new();
        for repetition in 0..repetitions {
            interrupt::check()?;
            for packet in &packets {
                let (program, empty) = bench.time(packet)?;
                let run = Run::new(Workload::Tax, packet.name, 1.0, "ours", repetition);
                runs.push(run.with(Figure::ProgramNs, program).with(Figure::AddedNs, program - empty));
            }
        }
        Ok(runs)
    })
}

struct Bench {
    ours: Ebpf,
    empty: TinyProgram,
    /// `struct __sk_buff` up to `ifindex`, which lets frames arrive on the guest's interface.
    context: [u8; 44],
}

impl Bench {
    fn load(ours: &Ours) -> anyhow::Result<Self> {
        // The maps are pinned, so a second copy of the programs shares them with the agent's own.
        let mut programs = EbpfLoader::new()
            .default_map_pin_directory(ours.pins())
            .load(OBJECT)
            .context("load the programs a second time")?;
        from_guest(&mut programs)?.load()?;
        let mut context = [0; 44];
        let index = if_nametoindex(ours.guests[0].tap.as_str())?;
        context[40..].copy_from_slice(&index.to_ne_bytes());
        Ok(Self { ours: programs, empty: TinyProgram::load("md_empty", Verdict::Next), context })
    }

    /// Returns the nanoseconds of our program and of the empty one: medians of alternating calls.
    fn time(&mut self, packet: &Packet) -> anyhow::Result<(f64, f64)> {
        let (ours, empty) = (from_guest(&mut self.ours)?, self.empty.program());
        let (calls, verdict) =
            if packet.metadata { (SINGLE_RUNS, TC_ACT_REDIRECT) } else { (CALLS, TC_ACT_UNSPEC) };
        let call = |program: &_, verdict| {
            let nanoseconds = call(program, &self.context, packet, verdict);
            nanoseconds.context(packet.name)
        };
        let (mut of_ours, mut of_empty) = (Vec::new(), Vec::new());
        for _ in 0..calls {
            of_ours.push(call(ours, verdict)?);
            of_empty.push(call(empty, TC_ACT_UNSPEC)?);
        }
        Ok((Spread::new(of_ours).median, Spread::new(of_empty).median))
    }
}

/// Runs a program on a packet and returns the nanoseconds per run. Many runs are timed around the
/// call, because the kernel reports whole nanoseconds; a single run is timed by the kernel.
fn call(program: &SchedClassifier, context: &[u8], packet: &Packet, verdict: i32) -> anyhow::Result<f64> {
    let repeat = if packet.metadata { 1 } else { REPEAT };
    let began = Instant::now();
    let result = program.test_run(TestRunOptions {
        data_in: Some(&packet.frame),
        ctx_in: Some(context),
        repeat,
        ..TestRunOptions::default()
    })?;
    let elapsed = began.elapsed();
    let got = result.return_value.cast_signed();
    ensure!(got == verdict, "the verdict is {got} instead of {verdict}");
    let each =
        if repeat == 1 { result.duration.as_secs_f64() } else { elapsed.as_secs_f64() / f64::from(repeat) };
    Ok(each * 1e9)
}

fn from_guest(ebpf: &mut Ebpf) -> anyhow::Result<&mut SchedClassifier> {
    Ok(ebpf.program_mut(names::FROM_GUEST).context(names::FROM_GUEST)?.try_into()?)
}

fn packets(guest: &Guest) -> anyhow::Result<Vec<Packet>> {
    let guest = &guest.port;
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
    let mut advertisement = Vec::new();
    ipv6("fe80::1")?.icmpv6_raw(136, 0, [0x60, 0, 0, 0]).write(&mut advertisement, &PAYLOAD[..16])?;
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
        bystander(
            "IPv6 TCP to a link-local address",
            tcp(ipv6("fe80::1")?.tcp(NEW_PORT, 80, 1, 502).ack(1))?,
        ),
        bystander("IPv6 neighbour advertisement", advertisement),
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
