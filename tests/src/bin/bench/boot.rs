//! Workload: guests that boot at the same moment. Each sends the requests of cloud-init
//! (`DataSourceOpenStack`) in sequence on separate connections, with its time-outs and retries.

use std::collections::BTreeMap;
use std::io;
use std::net::TcpStream;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use metadata_agent::ids::InstanceId;
use metadata_tests::{Connection, Response};

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

/// Nova's `metadata_cache_expiration` and one second more, because a booting guest is not in its
/// cache.
const FORGOTTEN: Duration = Duration::from_secs(16);

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

/// The outcome of one guest's boot.
#[derive(Debug, Default)]
struct Boot {
    took: Duration,
    answers: u64,
    failures: BTreeMap<String, u64>,
}

/// The correct responses.
#[derive(Clone, Copy, Debug)]
enum Expected<'a> {
    /// This body for every request.
    Body(&'a [u8]),
    /// Any response of Nova, but `meta_data.json` must be that of this instance.
    Of(Option<InstanceId>),
}

/// Measures every storm, with the peers in turn.
pub fn measure(upstream: &Upstream, kinds: &[Kind], plan: &Plan) -> anyhow::Result<Vec<Run>> {
    let crowd =
        Crowd { guests: plan.storms.iter().copied().max().unwrap_or(1), networks: plan.storm_networks };
    let mut peers = Vec::new();
    for kind in kinds {
        interrupt::check()?;
        peers.push((kind.to_string(), Entry::alone(*kind).start(upstream, crowd)?));
    }
    let nova = upstream.wants_identity();
    let body = upstream::body(SIZES[0]);
    let expected = (!nova).then_some(&*body);
    let workload = if nova { Workload::BootNova } else { Workload::Boot };
    let mut asked = vec![Instant::now(); peers.len()];
    let mut runs = Vec::new();
    for guests in &plan.storms {
        for (_, peer) in &peers {
            boot(&peer.callers()[..1], expected);
        }
        asked.fill(Instant::now());
        for repetition in 0..plan.repetitions {
            for ((name, peer), asked) in peers.iter().zip(&mut asked) {
                interrupt::check()?;
                if nova {
                    pass(*asked + FORGOTTEN);
                }
                let boots = boot(&peer.callers()[..*guests], expected);
                *asked = Instant::now();
                runs.push(run(workload, name, repetition, boots));
            }
        }
    }
    Ok(runs)
}

fn pass(end: Instant) {
    while let Some(left) = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        thread::park_timeout(left);
    }
}

/// Boots all guests at once.
fn boot(callers: &[Caller<'_>], body: Option<&[u8]>) -> Vec<Boot> {
    let start = Barrier::new(callers.len());
    thread::scope(|scope| {
        let start = &start;
        let boots = callers.iter().map(|caller| {
            scope.spawn(move || {
                let expected = body.map_or(Expected::Of(caller.instance), Expected::Body);
                caller.netns.enter(|| {
                    start.wait();
                    boot_one(caller, expected)
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

fn boot_one(caller: &Caller<'_>, expected: Expected<'_>) -> Boot {
    let mut boot = Boot::default();
    let began = Instant::now();
    for path in SEQUENCE {
        for attempt in 0..=RETRIES {
            if attempt > 0 {
                thread::park_timeout(PAUSE);
            }
            let fault = match get(caller, path) {
                Ok(answer) if answer.status != 200 => answer.status_line,
                Ok(answer) if expected.is_met(path, &answer.body) => {
                    boot.answers += 1;
                    break;
                }
                Ok(_) => "a wrong body".to_owned(),
                Err(e) => e.kind().to_string(),
            };
            *boot.failures.entry(fault).or_default() += 1;
        }
    }
    boot.took = began.elapsed();
    boot
}

fn get(caller: &Caller<'_>, path: &str) -> io::Result<Response> {
    let stream = TcpStream::connect_timeout(&caller.target, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nHost: 169.254.169.254\r\nUser-Agent: Cloud-Init/24.4\r\nAccept: */*\r\n\
         {}Connection: close\r\n\r\n",
        caller.signed
    );
    let mut connection = Connection::new(stream);
    connection.send(request)?;
    connection.receive()
}

impl Expected<'_> {
    fn is_met(self, path: &str, answer: &[u8]) -> bool {
        match self {
            Self::Body(body) => answer == body,
            Self::Of(instance) if path.ends_with("/meta_data.json") => {
                let document: Option<serde_json::Value> = serde_json::from_slice(answer).ok();
                let document = document.as_ref().and_then(|document| document.get("uuid")?.as_str());
                document.is_some_and(|uuid| instance.is_some_and(|instance| uuid == instance.to_string()))
            }
            Self::Of(_) => true,
        }
    }
}

fn run(workload: Workload, peer: &str, repetition: u32, boots: Vec<Boot>) -> Run {
    let case = if boots.len() == 1 { "1 guest".to_owned() } else { format!("{} guests", boots.len()) };
    let took = Spread::new(boots.iter().map(|boot| boot.took.as_secs_f64() * 1e3));
    let mut run = Run::new(workload, &case, precise(boots.len() as u64), peer, repetition)
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
    fn an_answer_is_checked_by_body_or_by_instance() {
        assert!(Expected::Body(b"body").is_met("/openstack", b"body"));
        assert!(!Expected::Body(b"body").is_met("/openstack", b"bod"));
        let [one, other] = [1, 2].map(|number| InstanceId::new(uuid::Uuid::from_u128(number)));
        let about = format!("{{\"uuid\": \"{one}\"}}");
        let is_met = |instance, path| Expected::Of(instance).is_met(path, about.as_bytes());
        let path = "/openstack/latest/meta_data.json";
        assert!(is_met(Some(one), path) && !is_met(Some(other), path) && !is_met(None, path));
        assert!(is_met(Some(other), "/latest/meta-data/hostname"));
    }

    #[test]
    fn the_worst_guest_is_the_last_one() {
        let boot = |ms, failed| Boot {
            took: Duration::from_millis(ms),
            answers: 28,
            failures: BTreeMap::from([("HTTP/1.1 503".to_owned(), failed)]),
        };
        let run = run(Workload::Boot, "ours", 0, vec![boot(5, 1), boot(9, 2), boot(6, 0)]);
        assert_eq!((run.figures[&Figure::LastMs], run.figures[&Figure::MedianMs]), (9.0, 6.0));
        assert_eq!((run.answers, run.failed, run.case.as_str()), (84, 3, "3 guests"));
    }
}
