//! Workload: guests that boot at the same moment, each asking what cloud-init asks (`DataSourceOpenStack`), one request after
//! the other on connections of their own, with its patience and its retries.

use std::collections::BTreeMap;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use super::interrupt;
use super::peers::{Caller, Crowd, Entry, Kind};
use super::plan::Plan;
use super::results::{Figure, Run, Workload};
use super::statistics::{Spread, precise};
use super::upstream::{self, SIZES, Upstream};

/// `readurl` of cloudinit/url_helper.py, as the data source calls it.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_secs(1);
const RETRIES: u32 = 5;

/// In this order.
const SEQUENCE: [&str; 28] = [
    "/openstack",
    "/openstack",
    "/openstack/2018-08-27/meta_data.json",
    "/openstack/2018-08-27/user_data",
    "/openstack/2018-08-27/vendor_data.json",
    "/openstack/2018-08-27/vendor_data2.json",
    "/openstack/2018-08-27/network_data.json",
    "/latest/meta-data/",
    "/latest/meta-data/ami-id",
    "/latest/meta-data/ami-launch-index",
    "/latest/meta-data/ami-manifest-path",
    "/latest/meta-data/block-device-mapping/",
    "/latest/meta-data/block-device-mapping/ami",
    "/latest/meta-data/block-device-mapping/root",
    "/latest/meta-data/hostname",
    "/latest/meta-data/instance-action",
    "/latest/meta-data/instance-id",
    "/latest/meta-data/instance-type",
    "/latest/meta-data/local-hostname",
    "/latest/meta-data/local-ipv4",
    "/latest/meta-data/placement/",
    "/latest/meta-data/placement/availability-zone",
    "/latest/meta-data/public-hostname",
    "/latest/meta-data/public-ipv4",
    "/latest/meta-data/public-keys/",
    "/latest/meta-data/public-keys/0/openssh-key",
    "/latest/meta-data/reservation-id",
    "/latest/meta-data/security-groups",
];

/// What came of one guest's boot.
#[derive(Debug, Default)]
struct Boot {
    took: Duration,
    answers: u64,
    failures: BTreeMap<String, u64>,
}

/// Measures every storm, peers in turn.
pub fn measure(upstream: &Upstream, kinds: &[Kind], plan: &Plan) -> anyhow::Result<Vec<Run>> {
    let crowd =
        Crowd { guests: plan.storms.iter().copied().max().unwrap_or(1), networks: plan.storm_networks };
    let mut peers = Vec::new();
    for kind in kinds {
        interrupt::check()?;
        peers.push((kind.to_string(), Entry::alone(*kind).start(upstream, crowd)?));
    }
    let mut runs = Vec::new();
    for guests in &plan.storms {
        for (_, peer) in &peers {
            boot(&peer.callers()[..1]);
        }
        for repetition in 0..plan.repetitions {
            for (name, peer) in &peers {
                interrupt::check()?;
                let boots = boot(&peer.callers()[..*guests]);
                runs.push(run(name, repetition, boots));
            }
        }
    }
    Ok(runs)
}

/// Lets all of them boot at once.
fn boot(callers: &[Caller<'_>]) -> Vec<Boot> {
    let start = Barrier::new(callers.len());
    thread::scope(|scope| {
        let start = &start;
        let boots = callers.iter().map(|caller| {
            scope.spawn(move || {
                caller.netns.enter(|| {
                    start.wait();
                    boot_one(caller.target)
                })
            })
        });
        let boots: Vec<_> = boots.collect();
        boots
            .into_iter()
            .map(|boot| boot.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn boot_one(target: SocketAddr) -> Boot {
    let expected = upstream::body(SIZES[0]);
    let mut boot = Boot::default();
    let began = Instant::now();
    for path in SEQUENCE {
        for attempt in 0..=RETRIES {
            if attempt > 0 {
                thread::park_timeout(PAUSE);
            }
            let fault = match get(target, path) {
                Ok(answer) if is_right(&answer, &expected) => {
                    boot.answers += 1;
                    break;
                }
                Ok(answer) => String::from_utf8_lossy(&answer).lines().next().unwrap_or("nothing").to_owned(),
                Err(e) => e.kind().to_string(),
            };
            *boot.failures.entry(fault).or_default() += 1;
        }
    }
    boot.took = began.elapsed();
    boot
}

fn get(target: SocketAddr, path: &str) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect_timeout(&target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: Cloud-Init/24.4\r\nAccept: */*\r\n\
         Connection: close\r\n\r\n"
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    Ok(answer)
}

fn is_right(answer: &[u8], body: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.1 200 ")
        && answer.strip_suffix(body).is_some_and(|head| head.ends_with(b"\r\n\r\n"))
}

fn run(peer: &str, repetition: u32, boots: Vec<Boot>) -> Run {
    let case = if boots.len() == 1 { "1 guest".to_owned() } else { format!("{} guests", boots.len()) };
    let took = Spread::of(boots.iter().map(|boot| boot.took.as_secs_f64() * 1e3));
    let mut run = Run::new(Workload::Boot, &case, precise(boots.len() as u64), peer, repetition)
        .with(Figure::LastMs, took.highest)
        .with(Figure::MedianMs, took.median);
    for boot in boots {
        run.answers += boot.answers;
        for (fault, count) in boot.failures {
            run.failed += count;
            *run.failures.entry(fault).or_default() += count;
        }
    }
    run.first_failure = run.failures.keys().next().cloned();
    run
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_whole_body_after_a_head_is_right() {
        assert!(is_right(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nbody", b"body"));
        for wrong in
            ["HTTP/1.1 503 X\r\n\r\nbody", "HTTP/1.1 200 OK\r\n\r\nbod", "HTTP/1.1 200 OK\r\n\r\nxbody", ""]
        {
            assert!(!is_right(wrong.as_bytes(), b"body"), "{wrong}");
        }
    }

    #[test]
    fn the_worst_guest_is_the_last_one() {
        let boot = |ms, failed| Boot {
            took: Duration::from_millis(ms),
            answers: 28,
            failures: BTreeMap::from([("HTTP/1.1 503".to_owned(), failed)]),
        };
        let run = run("ours", 0, vec![boot(5, 1), boot(9, 2), boot(6, 0)]);
        assert_eq!((run.figures[&Figure::LastMs], run.figures[&Figure::MedianMs]), (9.0, 6.0));
        assert_eq!((run.answers, run.failed, run.case.as_str()), (84, 3, "3 guests"));
    }
}
