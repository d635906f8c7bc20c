//! The cross-tenant matrix: every field that a guest controls, in every mode, with every
//! `source_check`, against victims in every relation. No byte of another guest's metadata may
//! arrive, and no request may reach Nova in another guest's name.
//!
//! The cases are generated from their number, so a failure names all that is needed to repeat it.

mod case;
mod cloud;

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Guest, Instance};

use case::{Case, Outcome};
use cloud::{Cloud, Mode};

/// Cases that run at the same time.
const WORKERS: usize = 12;
/// Time for the handshake of a victim, and for each read.
const VICTIMS_PATIENCE: Duration = Duration::from_secs(2);

#[test]
fn nova_as_upstream_gives_no_guest_foreign_metadata() {
    run(Mode::Nova, 1000);
}

#[test]
fn neutrons_agent_gives_no_guest_foreign_metadata() {
    run(Mode::NeutronAgent, 600);
}

#[test]
fn ovns_agent_gives_no_guest_foreign_metadata() {
    run(Mode::OvnAgent, 600);
}

#[test]
fn haproxies_as_clients_give_no_guest_foreign_metadata() {
    run(Mode::Haproxies, 200);
}

/// Runs this number of cases in one scene for each `source_check`.
fn run(mode: Mode, cases: usize) {
    let cloud = Cloud::new(mode);
    for (scene, source_check) in ["strict", "mac", "off"].into_iter().enumerate() {
        let agent = cloud.agent(source_check);
        let process = agent.start();
        await_service(&cloud);
        let first = scene * cases;
        let outcomes = attack(&cloud, first..first + cases);
        judge(&cloud, &outcomes, &format!("{mode:?} {source_check}"));
        // The cases met a service that works, and did not break it.
        await_service(&cloud);
        assert!(process.stop().success());
    }
}

/// Waits until each victim is answered as itself.
fn await_service(cloud: &Cloud) {
    for guest in &cloud.victims {
        wait::until("the victim is served", PATIENCE, || own_hostname(guest).ok());
    }
}

/// Runs the cases while the victims send requests of their own.
fn attack(cloud: &Cloud, numbers: std::ops::Range<usize>) -> BTreeMap<usize, (Case, Outcome)> {
    let (next, is_over) = (AtomicUsize::new(numbers.start), AtomicBool::new(false));
    let outcomes = Mutex::new(BTreeMap::new());
    thread::scope(|scope| {
        let victims = scope.spawn(|| {
            for guest in cloud.victims.iter().cycle() {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                // It may get no answer: on a shared link others can take its place.
                if let Err(foreign) = own_hostname(guest) {
                    assert!(foreign.is_empty(), "{} was answered {foreign}", guest.tap);
                }
            }
        });
        let workers: Vec<_> = (0..WORKERS)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= numbers.end {
                            return;
                        }
                        let case = Case::generate(number, cloud);
                        let outcome = case.run(cloud);
                        outcomes.lock().expect("no worker panics").insert(number, (case, outcome));
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().expect("a worker");
        }
        is_over.store(true, Ordering::Relaxed);
        victims.join().expect("no victim gets foreign bytes");
    });
    outcomes.into_inner().expect("no worker panics")
}

/// Sends one request of a victim. An error is the text of an answer that is not its own, or empty
/// without a complete answer.
fn own_hostname(guest: &Guest) -> Result<(), String> {
    let path = format!("{HOSTNAME}?by={}", guest.port.instance);
    let connection = guest.dial(guest.metadata_ipv4(), None, VICTIMS_PATIENCE);
    let answer = connection.and_then(|mut open| open.request("GET", &path, &[("Connection", "close")], b""));
    let answer = answer.map_err(|_| String::new())?;
    match answer.status {
        200 if answer.text() == Instance::from_port(&guest.port).hostname() => Ok(()),
        200 => Err(answer.text().to_owned()),
        _ => Err(String::new()),
    }
}

/// Asserts that no case received or sent anything of another guest.
fn judge(cloud: &Cloud, outcomes: &BTreeMap<usize, (Case, Outcome)>, scene: &str) {
    let foreign: Vec<_> = outcomes.iter().filter(|(_, (_, outcome))| outcome.foreign.is_some()).collect();
    assert!(foreign.is_empty(), "{scene}: foreign bytes in {} cases: {foreign:#?}", foreign.len());

    // Each request names its sender in its query.
    for request in cloud.nova.requests() {
        let Some((_, sender)) = request.path.rsplit_once("by=") else { continue };
        let instance = request.header("x-instance-id");
        assert_eq!(instance.as_deref(), Some(sender), "{scene}: {request:?}");
    }
    cloud.nova.forget();
    for guest in &cloud.victims {
        assert_eq!(cloud.nova.password(guest.port.instance), None, "{scene}: {}", guest.tap);
    }

    // Without answers the cases would prove nothing.
    for thief in 0..cloud.thieves.len() {
        let mine: Vec<_> = outcomes.values().filter(|(case, _)| case.thief == thief).collect();
        let served = mine.iter().filter(|(_, outcome)| outcome.is_served).count();
        let mut first_lines = BTreeMap::<&str, usize>::new();
        for (_, outcome) in &mine {
            *first_lines.entry(&outcome.first_line).or_default() += 1;
        }
        assert!(served > 0, "{scene}: thief {thief} was never served: {first_lines:?}");
    }
}
