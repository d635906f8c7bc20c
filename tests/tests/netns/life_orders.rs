//! The services that the agent depends on may start after it, in any order.

use std::fs;

use metadata_tests::nova::Instance;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Agent, AgentProcess, Guest, Host, NovaStandIn, Ovsdb, Plug, Southbound, domain};
use serde_json::json;

/// A service that has a part of what the agent must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Service {
    OpenVswitch,
    Southbound,
    Libvirt,
}

const ORDERS: [[Service; 3]; 6] = {
    use Service::{Libvirt as L, OpenVswitch as V, Southbound as S};
    [[V, S, L], [V, L, S], [S, V, L], [S, L, V], [L, V, S], [L, S, V]]
};

/// A host whose services have data and do not run.
struct World {
    ovsdb: Ovsdb,
    southbound: Southbound,
    agent: Agent,
    guest: Guest,
    _nova: NovaStandIn,
}

impl World {
    fn new() -> Self {
        let host = Host::new();
        let nova = NovaStandIn::start(host.netns());
        let guest = host.network().guest([10, 0, 0, 5]);
        nova.add(Instance::from_port(&guest.port));
        let (mut ovsdb, mut southbound) = (Ovsdb::start(), Southbound::start());
        ovsdb.plug(&guest.port, Plug::Direct);
        southbound.bind(&guest.port);
        ovsdb.stop();
        southbound.servers()[0].stop();
        for socket in [ovsdb.socket(), southbound.servers()[0].socket()] {
            // A server that was killed leaves it behind; a host that boots has none.
            fs::remove_file(socket).expect("remove the socket");
        }
        let agent = Agent::on(&host, &nova)
            .set("ovs", "ovsdb_connection", &ovsdb.remote())
            .set("ovn", "ovn_sb_connection", &southbound.remotes())
            .set("metadata_agent", "static_inventory", "")
            .set("metadata_agent", "identity_hold", "0.2")
            .install();
        fs::remove_dir(agent.libvirt_dir()).expect("remove libvirt's directory");
        Self { ovsdb, southbound, agent, guest, _nova: nova }
    }

    fn start(&mut self, service: Service) {
        match service {
            Service::OpenVswitch => self.ovsdb.restart(),
            Service::Southbound => {
                self.southbound.servers()[0].start(None);
            }
            Service::Libvirt => {
                fs::create_dir(self.agent.libvirt_dir()).expect("create libvirt's directory");
                domain::write(&self.agent.libvirt_dir(), &self.guest.port);
            }
        }
    }

    fn is_known(&self, process: &AgentProcess) -> bool {
        let state = process.state();
        let attachments = state["attachments"].as_array().cloned().unwrap_or_default();
        attachments.iter().any(|one| one["interface"] == *self.guest.tap && one["identity"] == "known")
    }
}

#[test]
fn services_may_start_after_the_agent_in_any_order() {
    for order in ORDERS {
        let mut world = World::new();
        let process = world.agent.spawn(&[]);
        wait::until("the agent runs without any service", PATIENCE, || {
            process.try_admin("/live").is_ok_and(|answer| answer.status == 200).then_some(())
        });
        assert_eq!(world.guest.get("/").status, 503, "{order:?}");
        for service in order {
            assert_ne!(process.try_admin("/ready").expect("an answer").status, 200, "{order:?}");
            world.start(service);
        }
        process.wait_ready();
        wait::until("the guest is known", PATIENCE, || world.is_known(&process).then_some(()));
        assert_eq!(world.guest.get("/latest/meta-data/hostname").status, 200, "{order:?}");
        let sources = process.state()["sources"].as_array().cloned().unwrap_or_default();
        assert!(sources.iter().all(|source| source["faults"] == json!({})), "{order:?}: {sources:?}");
        assert_eq!(process.stop().code(), Some(0), "{order:?}");
    }
}

/// Each database goes away and comes back; the guest does not notice.
#[test]
fn databases_may_restart_in_any_order() {
    use Service::{OpenVswitch, Southbound};
    let mut world = World::new();
    for service in ORDERS[0] {
        world.start(service);
    }
    let process = world.agent.start();
    wait::until("the guest is known", PATIENCE, || world.is_known(&process).then_some(()));
    let assert_served = |world: &World, when: &str| {
        assert_eq!(world.guest.get("/latest/meta-data/hostname").status, 200, "{when}: {}", process.output());
    };
    let until_faults = |wanted: f64, sources: &[&str]| {
        for source in sources {
            wait::until("the source has reported it", PATIENCE, || {
                let faults = process.metric(&format!("metadata_source_faults{{source=\"{source}\"}}"));
                ((faults - wanted).abs() < f64::EPSILON).then_some(())
            });
        }
    };
    for (going, coming) in [
        ([OpenVswitch, Southbound], [OpenVswitch, Southbound]),
        ([Southbound, OpenVswitch], [OpenVswitch, Southbound]),
        ([OpenVswitch, Southbound], [Southbound, OpenVswitch]),
    ] {
        for service in going {
            let source = match service {
                OpenVswitch => {
                    world.ovsdb.stop();
                    "ovsdb"
                }
                Southbound | Service::Libvirt => {
                    world.southbound.servers()[0].stop();
                    "ovn_southbound"
                }
            };
            until_faults(1.0, &[source]);
            assert_served(&world, "while a database is away");
        }
        for service in coming {
            world.start(service);
            assert_served(&world, "while a database returns");
        }
        until_faults(0.0, &["ovsdb", "ovn_southbound"]);
        assert_served(&world, "afterwards");
        assert!(world.is_known(&process));
    }
    assert_eq!(process.stop().code(), Some(0));
}
