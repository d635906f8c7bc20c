//! Starts with the state of an earlier agent: the new one adopts what is intact, removes what is
//! stale, rebuilds what is broken, and leaves the host as it was before the first of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use aya::maps::{Array, HashMap, Map, MapData};
use metadata_ebpf::abi::{Port, PortKey, Settings, names};
use metadata_tests::two_tenants::assert_served;
use metadata_tests::{Agent, AgentProcess, GuestSpec, HostState, KernelObjects, NextHop, TwoTenants};

/// The host end of the portal's veth pair.
const PORTAL_LINK: &str = "md-portal";

/// A change of the host while no agent runs.
type HostChange<'a> = &'a dyn Fn(&Crashed);

/// Two tenants whose agent was killed while it served them.
struct Crashed {
    tenants: TwoTenants,
    before: HostState,
    agent: Agent,
    ids: [u64; 2],
    objects: KernelObjects,
}

impl Crashed {
    fn under(attach_mode: &str) -> Self {
        let tenants = TwoTenants::new();
        let agent =
            tenants.agent().set("metadata_agent", "attach_mode", attach_mode).without_probes().install();
        let before = HostState::capture(&tenants.host);
        let process = agent.start();
        tenants.assert_served();
        let ids = tenants.guests.each_ref().map(|guest| process.attachments()[&guest.tap]);
        let objects = KernelObjects::from_host(&tenants.host);
        process.kill9();
        Self { tenants, before, agent, ids, objects }
    }

    /// Asserts that the next agent serves both guests, then stops and leaves nothing of either
    /// agent.
    fn assert_next_serves_and_leaves_nothing(&self, process: AgentProcess) {
        self.tenants.assert_served();
        let objects = KernelObjects::from_host(&self.tenants.host);
        self.assert_next_leaves_nothing(process);
        objects.wait_until_gone();
    }

    fn assert_next_leaves_nothing(&self, process: AgentProcess) {
        assert_eq!(process.stop().code(), Some(0));
        self.before.assert_same(&HostState::capture(&self.tenants.host));
        self.objects.wait_until_gone();
    }

    fn next_with(&self, option: &str, value: &str) -> AgentProcess {
        let process = self.agent.spawn(&[option.to_owned(), value.to_owned()]);
        process.wait_ready();
        process
    }

    fn pin(&self, name: &str) -> PathBuf {
        self.tenants.host.bpffs().join("metadata").join(name)
    }

    /// Returns the interfaces with a pinned link and those with an entry in `MD_PORTS`.
    fn traces(&self) -> (BTreeSet<u32>, BTreeSet<u32>) {
        let pins = fs::read_dir(self.pin("")).expect("list the pins").flatten();
        let pinned = pins.filter_map(|pin| pin.file_name().to_str()?.strip_prefix("guest-")?.parse().ok());
        let ports = MapData::from_pin(self.pin(names::PORTS)).expect("open MD_PORTS");
        let ports = HashMap::<_, PortKey, Port>::try_from(Map::HashMap(ports)).expect("read MD_PORTS");
        (pinned.collect(), ports.keys().map(|key| key.expect("a key of MD_PORTS").ifindex).collect())
    }

    fn ifindex(&self, interface: &str) -> u32 {
        let index = format!("/sys/class/net/{interface}/ifindex");
        let read = self.tenants.host.netns().run(&["ip", "-json", "link", "show", interface]);
        let links: serde_json::Value = serde_json::from_str(&read).expect("JSON");
        links[0]["ifindex"].as_u64().and_then(|found| found.try_into().ok()).expect(&index)
    }
}

#[test]
fn existing_interfaces_are_adopted() {
    for (mode, links) in [("tcx", 3), ("clsact", 0)] {
        let crashed = Crashed::under(mode);
        let process = crashed.agent.start();
        let attachments = process.attachments();
        let ids = crashed.tenants.guests.each_ref().map(|guest| attachments[&guest.tap]);
        assert_eq!(ids, crashed.ids, "{mode}: attachment ids are kept");
        let objects = KernelObjects::wait_for_counts(&crashed.tenants.host, (KernelObjects::MAPS, 2, links));
        assert_eq!(objects.maps, crashed.objects.maps, "{mode}: maps are kept");
        assert_eq!(objects.links, crashed.objects.links, "{mode}: links are kept");
        assert!(objects.programs.is_disjoint(&crashed.objects.programs), "{mode}: programs are replaced");
        crashed.assert_next_serves_and_leaves_nothing(process);
    }
}

#[test]
fn an_interface_removed_meanwhile_is_forgotten() {
    for mode in ["tcx", "clsact"] {
        let crashed = Crashed::under(mode);
        let [first, second] = &crashed.tenants.guests;
        let kept = BTreeSet::from([crashed.ifindex(&second.tap)]);
        crashed.tenants.host.netns().run(&["ip", "link", "del", &first.tap]);

        let process = crashed.agent.start();
        assert!(process.attachments().keys().eq([&second.tap]));
        let pinned = if mode == "tcx" { kept.clone() } else { BTreeSet::new() };
        assert_eq!(crashed.traces(), (pinned, kept), "{mode}");
        assert_served(second);
        assert_eq!(process.stop().code(), Some(0));
        crashed.objects.wait_until_gone();
    }
}

#[test]
fn an_interface_recreated_meanwhile_is_a_new_attachment() {
    for mode in ["tcx", "clsact"] {
        let mut crashed = Crashed::under(mode);
        let [first, second] = crashed.tenants.guests;
        let (port, tap) = (first.port.clone(), first.tap.clone());
        drop(first);
        let spec = GuestSpec { port, next_hop: NextHop::Gateway, namespace: None };
        let first = crashed.tenants.networks[0].plug(spec);
        assert_eq!(first.tap, tap);
        crashed.tenants.guests = [first, second];

        let process = crashed.agent.start();
        let attachments = process.attachments();
        let [first, second] = crashed.tenants.guests.each_ref().map(|guest| attachments[&guest.tap]);
        assert!(first > crashed.ids[1] && second == crashed.ids[1], "{mode}: {attachments:?}");
        crashed.tenants.assert_served();
        assert_eq!(process.stop().code(), Some(0));
        crashed.objects.wait_until_gone();
    }
}

#[test]
fn a_reused_index_is_not_taken_for_the_old_interface() {
    for mode in ["tcx", "clsact"] {
        let crashed = Crashed::under(mode);
        let [first, _] = &crashed.tenants.guests;
        let (index, host) = (crashed.ifindex(&first.tap), crashed.tenants.host.netns());
        host.run(&["ip", "link", "del", &first.tap]);
        host.ip(&format!("link add tapstranger index {index} type veth peer name other"));

        let process = crashed.agent.start();
        let attachments = process.attachments();
        assert!(attachments["tapstranger"] > crashed.ids[1], "{mode}: {attachments:?}");
        assert!(!attachments.contains_key(&first.tap), "{mode}: {attachments:?}");
        assert_eq!(process.stop().code(), Some(0));
        crashed.objects.wait_until_gone();
    }
}

#[test]
fn a_broken_portal_is_rebuilt() {
    let unmount_name = |crashed: &Crashed| {
        let name = PathBuf::from("/run/netns").join(crashed.agent.portal());
        let unmounted = Command::new("umount").arg(&name).status().expect("run umount");
        assert!(unmounted.success() && name.is_file());
    };
    let damages: [(&str, HostChange<'_>); 5] = [
        ("its veth pair is deleted", &|crashed| {
            crashed.tenants.host.netns().run(&["ip", "link", "del", PORTAL_LINK]);
        }),
        ("its veth pair is down and without addresses", &|crashed| {
            crashed.tenants.host.netns().run(&["ip", "link", "set", PORTAL_LINK, "down"]);
            let inside = ["ip", "-n", crashed.agent.portal(), "address", "flush", "dev", "lo"];
            crashed.tenants.host.netns().run(&inside);
        }),
        ("its end is another interface of the name", &|crashed| {
            crashed
                .tenants
                .host
                .netns()
                .ip(&format!("link del {PORTAL_LINK}\nlink add {PORTAL_LINK} type bridge"));
        }),
        ("its namespace is deleted", &|crashed| {
            crashed.tenants.host.netns().run(&["ip", "netns", "del", crashed.agent.portal()]);
        }),
        ("its name is a plain file", &unmount_name),
    ];
    for mode in ["tcx", "clsact"] {
        for (damage, inflict) in damages {
            let crashed = Crashed::under(mode);
            inflict(&crashed);
            eprintln!("{mode}: {damage}");
            let process = crashed.agent.start();
            let attachments = process.attachments();
            let ids = crashed.tenants.guests.each_ref().map(|guest| attachments[&guest.tap]);
            assert_eq!(ids, crashed.ids, "{mode}: {damage}");
            crashed.assert_next_serves_and_leaves_nothing(process);
        }
    }
}

#[test]
fn another_attach_mode_replaces_what_the_old_one_attached() {
    for (old, new) in [("clsact", "tcx"), ("tcx", "clsact")] {
        let crashed = Crashed::under(old);
        let process = crashed.next_with("--attach-mode", new);
        crashed.tenants.assert_served();
        for guest in &crashed.tenants.guests {
            let filters =
                crashed.tenants.host.netns().run(&["tc", "filter", "show", "dev", &guest.tap, "ingress"]);
            assert_eq!(filters.contains(names::FROM_GUEST), new == "clsact", "{old} to {new}: {filters}");
        }
        crashed.assert_next_serves_and_leaves_nothing(process);
    }
}

#[test]
fn an_interface_that_is_no_longer_a_guests_is_detached() {
    for mode in ["tcx", "clsact"] {
        let crashed = Crashed::under(mode);
        let process = crashed.next_with("--guest-interfaces", "vm*");
        assert!(process.attachments().is_empty());
        assert_eq!(crashed.traces(), (BTreeSet::new(), BTreeSet::new()), "{mode}");
        crashed.assert_next_leaves_nothing(process);
    }
}

#[test]
fn pins_of_another_abi_are_rebuilt() {
    let other_version = |crashed: &Crashed| {
        let config = MapData::from_pin(crashed.pin(names::CONFIG)).expect("open MD_CONFIG");
        let mut config = Array::<_, Settings>::try_from(Map::Array(config)).expect("read MD_CONFIG");
        let settings = config.get(&0, 0).expect("its only element");
        let settings = Settings { abi_version: settings.abi_version + 1, ..settings };
        config.set(0, settings, 0).expect("write MD_CONFIG");
    };
    let other_size = |crashed: &Crashed| {
        let pin = crashed.pin(names::CONFIG);
        fs::remove_file(&pin).expect("remove a pin");
        Array::<MapData, u64>::create(1, 0).expect("create a map").pin(&pin).expect("pin it");
    };
    let no_map = |crashed: &Crashed| fs::remove_file(crashed.pin(names::CONFIG)).expect("remove a pin");
    let olds: [(&str, HostChange<'_>); 3] =
        [("other version", &other_version), ("other size", &other_size), ("no settings", &no_map)];
    for mode in ["tcx", "clsact"] {
        for (old, make) in olds {
            let crashed = Crashed::under(mode);
            make(&crashed);
            eprintln!("{mode}: {old}");
            let process = crashed.agent.start();
            KernelObjects::wait_for_counts(
                &crashed.tenants.host,
                (KernelObjects::MAPS, 2, if mode == "tcx" { 3 } else { 0 }),
            );
            crashed.assert_next_serves_and_leaves_nothing(process);
        }
    }
}

#[test]
fn detach_removes_what_an_agent_of_another_abi_left() {
    for mode in ["tcx", "clsact"] {
        let crashed = Crashed::under(mode);
        fs::remove_file(crashed.pin(names::CONFIG)).expect("remove a pin");
        crashed.agent.detach();
        crashed.before.assert_same(&HostState::capture(&crashed.tenants.host));
        crashed.objects.wait_until_gone();
    }
}
