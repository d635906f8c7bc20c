//! Workload: traffic of a guest that is unrelated to metadata, over a tap with our programs and
//! over one without, in turn.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use metadata_tests::{Gateway, Guest, Host};

use super::interrupt;
use super::peers::Ours;
use super::plan::Plan;
use super::results::{Figure, Run, Workload};
use super::statistics::precise;

/// The only other address on a guest's network that responds.
const SINK: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const CHUNK: usize = 256 * 1024;
const DATAGRAM: [u8; 1400] = [0x5a; 1400];
/// The silence after which no more traffic is expected.
const SILENCE: Duration = Duration::from_millis(200);

/// The names of both in the results.
pub const WITH: &str = "tap with our programs";
pub const WITHOUT: &str = "tap without programs";

pub fn measure(ours: &Ours, plan: &Plan) -> anyhow::Result<Vec<Run>> {
    let host = Host::new();
    let network = host.network();
    let guest = network.guest([10, 0, 0, 5]);
    let sides = [
        (WITH, &ours.guests[0], Gateway::plug(&ours.networks[0])),
        (WITHOUT, &guest, Gateway::plug(&network)),
    ];
    let mut runs = Vec::new();
    for repetition in 0..plan.repetitions {
        for (name, guest, sink) in &sides {
            interrupt::check()?;
            let run = Run::new(Workload::Bystander, "one stream", 1.0, name, repetition)
                .with(Figure::TcpMbit, tcp(guest, sink, plan.duration)?)
                .with(Figure::UdpMbit, udp(guest, sink, plan.duration)?);
            runs.push(run);
        }
    }
    Ok(runs)
}

fn tcp(guest: &Guest, sink: &Gateway, duration: Duration) -> io::Result<f64> {
    let listener = sink.netns().enter(|| TcpListener::bind((SINK, 0)))?;
    let target = listener.local_addr()?;
    thread::scope(|scope| {
        let received = scope.spawn(move || -> io::Result<f64> {
            let (mut stream, _) = listener.accept()?;
            let (mut buffer, mut total, began) = (vec![0; CHUNK], 0, Instant::now());
            loop {
                match stream.read(&mut buffer)? {
                    0 => return Ok(mbit(total, began.elapsed())),
                    read => total += read as u64,
                }
            }
        });
        let mut stream = guest.netns().enter(|| TcpStream::connect(target))?;
        let (chunk, end) = (vec![0x5a; CHUNK], Instant::now() + duration);
        while Instant::now() < end {
            stream.write_all(&chunk)?;
        }
        drop(stream);
        received.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Measures what arrives; lost traffic does not count.
fn udp(guest: &Guest, sink: &Gateway, duration: Duration) -> io::Result<f64> {
    let receiver = sink.netns().enter(|| UdpSocket::bind((SINK, 0)))?;
    receiver.set_read_timeout(Some(SILENCE))?;
    let target = receiver.local_addr()?;
    thread::scope(|scope| {
        let sum = scope.spawn(move || {
            let (mut buffer, mut total) = ([0; 2048], 0);
            while let Ok(read) = receiver.recv(&mut buffer) {
                total += read as u64;
            }
            total
        });
        let socket =
            guest.netns().enter(|| UdpSocket::bind::<SocketAddr>((Ipv4Addr::UNSPECIFIED, 0).into()))?;
        socket.connect(target)?;
        let end = Instant::now() + duration;
        while Instant::now() < end {
            socket.send(&DATAGRAM)?;
        }
        let total = sum.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        Ok(mbit(total, duration))
    })
}

fn mbit(bytes: u64, took: Duration) -> f64 {
    precise(bytes) * 8.0 / 1e6 / took.as_secs_f64()
}
