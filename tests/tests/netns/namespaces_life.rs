//! Namespaces that appear and vanish while the agent runs, unrelated files beside them, and routers
//! without an agent.

use std::fs;
use std::io::ErrorKind;
use std::time::{Duration, Instant};

use metadata_tests::two_tenants::assert_served;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, Guest, Host, HostState, Instance, Netns, NovaStandIn, Routed, Router};
use uuid::Uuid;

/// Time to wait for a response that must not come.
const SILENCE: Duration = Duration::from_millis(1500);

fn text(guest: &Guest) -> Result<String, ErrorKind> {
    let mut connection = guest.dial(guest.metadata_ipv4(), None, SILENCE).map_err(|error| error.kind())?;
    let answer = connection.request("GET", "/", &[("Connection", "close")], b"");
    Ok(answer.map_err(|error| error.kind())?.text().to_owned())
}

/// Without that path nothing leaves the router.
#[test]
fn without_an_agent_the_routers_own_path_serves() {
    for mode in ["tcx", "clsact"] {
        let routed = Routed::new();
        let agent = routed.agent().set("metadata_agent", "attach_mode", mode).install();
        let _outside = routed.router.outside("leaked");
        let process = agent.start();
        assert_served(&routed.guest);
        process.kill9();
        assert_eq!(text(&routed.guest), Err(ErrorKind::TimedOut), "{mode}");
        let legacy = routed.router.legacy("legacy");
        assert_eq!(text(&routed.guest).as_deref(), Ok("legacy"), "{mode}");
        drop(legacy);
        // Adopted, and served as before.
        let process = agent.start();
        assert_served(&routed.guest);
        assert_eq!(process.stop().code(), Some(0), "{mode}");
    }
}

#[test]
fn stop_and_detach_leave_a_router_as_it_was() {
    for mode in ["tcx", "clsact"] {
        for crashes in [false, true] {
            let routed = Routed::new();
            let agent = routed.agent().set("metadata_agent", "attach_mode", mode).install();
            let links = || routed.router.netns().run(&["ip", "-o", "link"]);
            let qdiscs = || routed.router.netns().run(&["tc", "qdisc", "show"]);
            let before = (links(), qdiscs(), HostState::capture(&routed.host));
            let process = agent.start();
            assert_served(&routed.guest);
            if crashes {
                process.kill9();
                agent.detach();
            } else {
                assert_eq!(process.stop().code(), Some(0), "{mode}");
            }
            // The kernel removes the portal and its veth pairs asynchronously.
            wait::until("the router is as it was", PATIENCE, || {
                (links() == before.0 && qdiscs() == before.1).then_some(())
            });
            before.2.assert_same(&HostState::capture(&routed.host));
        }
    }
}

/// They are served as they appear and released as they vanish, whatever lies beside them.
#[test]
fn namespaces_are_served_while_they_exist() {
    let tag = Uuid::new_v4().to_string();
    let prefix = &tag[..23];
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let network = host.network();
    let guest = network.guest([10, 0, 0, 5]);
    nova.add(Instance::from_port(&guest.port));
    let name = format!("qdhcp-{}", network.id);
    // A stale file, a name that is not a router's, and an unrelated namespace.
    let stale = format!("/run/netns/qrouter-{prefix}-000000000000");
    let foreign = Netns::named(&format!("qrouter-{prefix}-x"));
    fs::write(&stale, b"").expect("a stale file");
    let rules = format!("{name},qrouter-{prefix}*");
    let agent = Agent::on(&host, &nova).only_in(&rules).port(&guest.port).install();
    let process = agent.start();
    assert_eq!(process.state()["namespaces"]["passed_over"], 2);
    for _ in 0..2 {
        let server = Router::dhcp(&network);
        wait::until("the DHCP server's namespace is served", PATIENCE, || {
            (process.state()["namespaces"]["served"] == 1).then_some(())
        });
        wait::until("its interface is attached", PATIENCE, || {
            process.state()["attachments"].as_array().filter(|all| all.len() == 1).map(|_| ())
        });
        assert_served(&guest);
        drop(server);
        wait::until("the namespace is released", PATIENCE, || {
            (process.state()["namespaces"]["served"] == 0).then_some(())
        });
    }
    fs::remove_file(&stale).expect("remove the stale file");
    drop(foreign);
    assert_eq!(process.stop().code(), Some(0));
}

/// `NAMESPACES=1000` measures a large host; the default is a tenth of that.
#[test]
fn many_namespaces_are_served_in_time() {
    let count: u32 = std::env::var("NAMESPACES").map_or(100, |text| text.parse().expect("a number"));
    let host = Host::new();
    let nova = NovaStandIn::start(host.netns());
    let prefix = Uuid::new_v4().to_string()[..23].to_owned();
    let routers: Vec<Netns> = (0..count)
        .map(|number| {
            let netns = Netns::named(&format!("qrouter-{prefix}-{number:012x}"));
            netns.ip("link add qr-00000000-00 type bridge\naddress add 10.0.0.1/24 dev qr-00000000-00");
            netns
        })
        .collect();
    let agent = Agent::on(&host, &nova).only_in(&format!("qrouter-{prefix}*")).install();
    let began = Instant::now();
    let process = agent.spawn(&[]);
    process.ready_within(Duration::from_mins(5)).expect("the agent is ready");
    let took = began.elapsed();
    let state = process.state();
    assert_eq!(state["namespaces"]["served"], count);
    assert_eq!(state["attachments"].as_array().map(Vec::len), Some(count as usize));
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).expect("the agent lives");
    let resident = status.lines().find(|line| line.starts_with("VmRSS")).unwrap_or_default();
    println!("{count} namespaces: ready after {took:?}, {resident}");
    assert!(took < Duration::from_mins(2) * count.max(100) / 100, "{took:?}");
    assert_eq!(process.stop().code(), Some(0));
    drop(routers);
}
