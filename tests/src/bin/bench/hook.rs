//! The cost of the hook itself for a packet that does not concern us: TC against XDP, on both kinds
//! of interface that face guests.
//!
//! Frames are written to a tap or sent through a veth. Each path is timed with nothing on the hook,
//! an empty TC program, our program, and an empty XDP program, in turn. An XDP program that decides
//! anything costs more than the empty one. If the empty one is slower than our program, no XDP
//! version of the early decision can be faster.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::time::Instant;

use anyhow::Context as _;
use aya::programs::{LinkOrder, SchedClassifier, TcAttachType, XdpMode, tc::TcAttachOptions};
use aya::{Ebpf, EbpfLoader};
use etherparse::PacketBuilder;
use metadata_agent::datapath::OBJECT;
use metadata_ebpf::abi::names;
use metadata_tests::tiny_program::{TinyProgram, TinyXdp, Verdict};
use metadata_tests::{Host, PacketSocket};

use super::statistics::Spread;

const TAP: &str = "tapbench000-00";
const VETH: &str = "tapbench000-01";
/// The guest's end of the veth.
const PEER: &str = "guest0";
/// The number of frames in one measurement.
const SMALL_FRAMES: u32 = 40_000;
const LARGE_FRAMES: u32 = 4_000;
const GUEST_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0, 0, 5];
const ROUTER_MAC: [u8; 6] = [0xfa, 0x16, 0x3e, 0xff, 0, 1];
const MSS: u16 = 1448;
/// `struct virtio_net_hdr` (virtio 1.1, 5.1.6) of a frame without offloads.
const PLAIN: [u8; 10] = [0; 10];

/// The program on the hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hook {
    Nothing,
    EmptyTcx,
    Ours,
    EmptyXdp,
    EmptyXdpGeneric,
}

const HOOKS: [(Hook, &str); 5] = [
    (Hook::Nothing, "nothing"),
    (Hook::EmptyTcx, "TCX, empty"),
    (Hook::Ours, "TCX, md_from_guest"),
    (Hook::EmptyXdp, "driver XDP, empty"),
    (Hook::EmptyXdpGeneric, "generic XDP, empty"),
];

/// The measurements of all paths.
pub struct Measured(Vec<Row>);

/// The measurements of one path.
struct Row {
    way: &'static str,
    /// Nanoseconds per frame in the order of [`HOOKS`], one for each repetition.
    runs: [Vec<f64>; HOOKS.len()],
}

/// A path and the code that sends a frame on it.
struct Way<'a> {
    name: &'static str,
    interface: &'static str,
    frames: u32,
    send: &'a dyn Fn() -> anyhow::Result<()>,
}

/// Measures everything in its own namespace.
pub fn measure(repetitions: u32) -> anyhow::Result<Measured> {
    let host = Host::new();
    host.tap(TAP);
    host.netns().ip(&format!(
        "link add {VETH} type veth peer name {PEER} address fa:16:3e:00:00:05\n\
         link set {VETH} up\nlink set {PEER} up"
    ));
    let tap = host.netns().enter(open_tap).context("open the tap")?;
    let wire = PacketSocket::open(host.netns(), PEER);
    let (small, large) = (small_frame()?, large_frame()?);
    let write = |bytes: &[u8]| -> anyhow::Result<()> { Ok((&tap).write_all(bytes)?) };
    let into_tap = [&PLAIN[..], &small].concat();
    let large_into_tap = [&offloaded()[..], &large].concat();
    let ways = [
        Way { name: "tap, 98 bytes", interface: TAP, frames: SMALL_FRAMES, send: &|| write(&into_tap) },
        Way {
            name: "tap, 64 KiB with segmentation offload",
            interface: TAP,
            frames: LARGE_FRAMES,
            send: &|| write(&large_into_tap),
        },
        Way {
            name: "veth, 98 bytes",
            interface: VETH,
            frames: SMALL_FRAMES,
            send: &|| {
                wire.send(&small);
                Ok(())
            },
        },
    ];
    let mut rows: Vec<Row> = ways.iter().map(|way| Row { way: way.name, runs: Default::default() }).collect();
    let pins = host.bpffs().to_owned();
    for _ in 0..repetitions {
        for (way, row) in ways.iter().zip(&mut rows) {
            for ((hook, _), runs) in HOOKS.iter().zip(&mut row.runs) {
                let attached = host.netns().enter(|| Attached::on(way.interface, *hook, &pins))?;
                let began = Instant::now();
                for _ in 0..way.frames {
                    (way.send)()?;
                }
                runs.push(began.elapsed().as_secs_f64() * 1e9 / f64::from(way.frames));
                drop(attached);
            }
        }
    }
    Ok(Measured(rows))
}

/// A program on an interface, detached on drop.
enum Attached {
    Nothing,
    Ours { _ebpf: Box<Ebpf> },
    Empty { _program: Box<TinyProgram> },
    Xdp { _program: Box<TinyXdp> },
}

impl Attached {
    fn on(interface: &str, hook: Hook, pins: &std::path::Path) -> anyhow::Result<Self> {
        let tcx = |program: &mut SchedClassifier| {
            let options = TcAttachOptions::TcxOrder(LinkOrder::first());
            program.attach_with_options(interface, TcAttachType::Ingress, options).map(drop)
        };
        let xdp = |mode| -> anyhow::Result<Self> {
            let mut program = TinyXdp::load();
            program.attach(interface, mode).with_context(|| format!("XDP on {interface}"))?;
            Ok(Self::Xdp { _program: Box::new(program) })
        };
        match hook {
            Hook::Nothing => Ok(Self::Nothing),
            Hook::EmptyTcx => {
                let mut program = TinyProgram::load("md_empty", Verdict::Next);
                tcx(program.program())?;
                Ok(Self::Empty { _program: Box::new(program) })
            }
            Hook::Ours => {
                let mut ebpf = EbpfLoader::new().default_map_pin_directory(pins).load(OBJECT)?;
                let program: &mut SchedClassifier =
                    ebpf.program_mut(names::FROM_GUEST).context(names::FROM_GUEST)?.try_into()?;
                program.load()?;
                tcx(program)?;
                Ok(Self::Ours { _ebpf: Box::new(ebpf) })
            }
            Hook::EmptyXdp => xdp(XdpMode::Driver),
            Hook::EmptyXdpGeneric => xdp(XdpMode::Skb),
        }
    }
}

/// Opens the tap as QEMU does: with a virtio header in front of each frame, and all offloads.
fn open_tap() -> anyhow::Result<File> {
    const IFF_TAP: i16 = 0x0002;
    const IFF_NO_PI: i16 = 0x1000;
    const IFF_VNET_HDR: i16 = 0x4000;
    nix::ioctl_write_ptr_bad!(set_interface, nix::request_code_write!(b'T', 202, size_of::<i32>()), [u8; 40]);
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun")?;
    let mut request = [0; 40];
    request[..TAP.len()].copy_from_slice(TAP.as_bytes());
    request[16..18].copy_from_slice(&(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR).to_ne_bytes());
    #[expect(unsafe_code, reason = "an ioctl of linux/if_tun.h")]
    // SAFETY: `request` is a `struct ifreq`, which the kernel reads and writes back.
    unsafe {
        set_interface(file.as_raw_fd(), &raw const request)?;
    }
    Ok(file)
}

fn small_frame() -> anyhow::Result<Vec<u8>> {
    let step = PacketBuilder::ethernet2(GUEST_MAC, ROUTER_MAC).ipv4([10, 0, 0, 5], [10, 0, 0, 9], 64);
    let mut frame = Vec::new();
    step.udp(5000, 5001).write(&mut frame, &[0x5a; 56])?;
    Ok(frame)
}

fn large_frame() -> anyhow::Result<Vec<u8>> {
    let step = PacketBuilder::ethernet2(GUEST_MAC, ROUTER_MAC).ipv4([10, 0, 0, 5], [10, 0, 0, 9], 64);
    let mut frame = Vec::new();
    step.tcp(5000, 5001, 1, 64_240).ack(1).write(&mut frame, &vec![0x5a; 65_000])?;
    Ok(frame)
}

/// Returns the virtio header of [`large_frame`]: segmentation and checksums are left to the kernel.
fn offloaded() -> [u8; 10] {
    const NEEDS_CSUM: u8 = 1;
    const GSO_TCPV4: u8 = 1;
    let words = |value: u16| value.to_ne_bytes();
    let [h0, h1] = words(54);
    let [g0, g1] = words(MSS);
    let [s0, s1] = words(34);
    let [o0, o1] = words(16);
    [NEEDS_CSUM, GSO_TCPV4, h0, h1, g0, g1, s0, s1, o0, o1]
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "Nanoseconds per received frame, and the part of the hook; medians (lowest..highest).\n"
        )?;
        writeln!(f, "| path | hook | ns per frame | added |\n|---|---|---|---|")?;
        for Row { way, runs } in &self.0 {
            let [bare, ..] = runs;
            for ((_, hook), runs) in HOOKS.iter().zip(runs) {
                let added = Spread::new(runs.iter().zip(bare).map(|(with, without)| with - without));
                writeln!(f, "| {way} | {hook} | {:.0} | {added:.0} |", Spread::new(runs.iter().copied()))?;
            }
        }
        Ok(())
    }
}
