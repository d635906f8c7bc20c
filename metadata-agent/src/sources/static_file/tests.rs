//! The format of the file, and the source against a changing file.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::Duration;

use tokio::time;

use super::*;

#[test]
fn the_documented_example_is_parsed() {
    let source = include_str!("mod.rs");
    let lines = source.lines().skip_while(|line| *line != "//! ```json").skip(1);
    let example: String = lines.take_while(|line| *line != "//! ```").map(|line| &line[3..]).collect();
    let wanted = Port {
        id: Some("3f2a9d10-77c1-4e55-9d0c-2b6f4f1f0a01".parse().unwrap()),
        device: Some("tap3f2a9d10-77".parse().unwrap()),
        instance: "7d3c6e2e-5e0b-4f0e-8a44-0d4e6c7b1f10".parse().unwrap(),
        project: "9c1b7f0e6a3d4f4bb0f6a3c7d2e5a890".parse().unwrap(),
        addressing: PortAddressing {
            network: Some("b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f".parse().unwrap()),
            mac: Some("fa:16:3e:11:22:33".parse().unwrap()),
            fixed_ips: vec!["10.0.0.5".parse().unwrap(), "2001:db8::5".parse().unwrap()],
            allowed_sources: only(&[
                ("fa:16:3e:11:22:33", "10.0.0.5"),
                ("fa:16:3e:11:22:33", "2001:db8::5"),
                ("fa:16:3e:11:22:33", "10.0.0.100"),
                ("00:00:5e:00:01:33", "10.0.0.116"),
            ]),
            ..PortAddressing::default()
        },
    };
    let subport = PortRecord {
        id: Some("aa06d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f".parse().unwrap()),
        trunk: Some(TrunkBinding { parent: wanted.id.unwrap(), vlan: VlanId::try_from(5).unwrap() }),
        addressing: PortAddressing {
            network: Some("c7d8e9f0-1b2c-4d3e-8f4a-5b6c7d8e9fa0".parse().unwrap()),
            mac: Some("fa:16:3e:11:22:34".parse().unwrap()),
            fixed_ips: vec!["10.5.0.5".parse().unwrap()],
            allowed_sources: only(&[("fa:16:3e:11:22:34", "10.5.0.5")]),
            ..PortAddressing::default()
        },
        ..PortRecord::default()
    };
    assert_eq!(parse(&example).unwrap(), [wanted.into(), subport]);
}

#[test]
fn optional_fields_may_be_omitted() {
    let [port] = &parse(&file(&[&short(1)])).unwrap()[..] else { panic!("one port") };
    assert_eq!((&port.device, &port.addressing), (&None, &PortAddressing::default()));
    assert!(parse(r#"{"ports": []}"#).unwrap().is_empty());
}

#[test]
fn port_security_is_stated_by_the_mac_address_or_switched_off() {
    let allowed = |fields: &str| {
        let port = short(1).replace("\"id\"", &format!("{fields}\"id\""));
        parse(&file(&[&port])).unwrap().remove(0).addressing.allowed_sources
    };
    let mac = "\"mac\": \"fa:16:3e:00:00:01\", ";
    let pair = "\"allowed_address_pairs\": [{\"ip_address\": \"10.0.0.0/24\", \"mac_address\": \"00:00:5e:00:01:33\"}], ";
    let own = ["0.0.0.0/0", "::/0"].map(|prefix| ("fa:16:3e:00:00:01", prefix));
    let both = [own[0], own[1], ("00:00:5e:00:01:33", "10.0.0.0/24")];
    assert_eq!(allowed("\"fixed_ips\": [\"10.0.0.5\"], "), None, "without a MAC address");
    assert_eq!(allowed(mac), only(&own), "without fixed addresses");
    assert_eq!(allowed(&format!("{mac}{pair}")), only(&both));
    let off = allowed(&format!("{mac}{pair}\"port_security_enabled\": false, "));
    assert_eq!(off, Some(SourcePolicy::Any));
}

#[expect(clippy::unnecessary_wraps, reason = "it stands for a field that is optional")]
fn only(sources: &[(&str, &str)]) -> Option<SourcePolicy> {
    let source = |(mac, prefix): &(&str, &str)| AllowedSource {
        mac: mac.parse().unwrap(),
        prefix: prefix.parse().unwrap(),
    };
    Some(SourcePolicy::Only(sources.iter().map(source).collect()))
}

#[test]
fn an_error_names_its_location() {
    let with = |field: &str| file(&[&short(1), &short(2).replace("\"id\"", &format!("{field}, \"id\""))]);
    for (text, wanted) in [
        (String::new(), "EOF while parsing a value at line 1 column 0"),
        ("[]".into(), "expected an object with `ports` at line 1"),
        ("{}".into(), "missing field `ports` at line 1"),
        (r#"{"port": []}"#.into(), "unknown field `port`"),
        (r#"{"ports": [], "ports": []}"#.into(), "duplicate field `ports`"),
        (r#"{"ports": []} {"#.into(), "trailing characters at line 1 column 15"),
        (file(&[&short(1), "{}"]), "ports[1]: missing field `id` at line 3 column 2"),
        (file(&[&short(1), &short(2).replace("project", "tenant")]), "ports[1]: unknown field `tenant`"),
        (with("\"fixed_ip\": \"10.0.0.5\""), "ports[1]: unknown field `fixed_ip`"),
        (with("\"mac\": \"fa:16:3e\""), "ports[1]: `fa:16:3e` is not a MAC address"),
        (
            with("\"allowed_addresses\": [\"10.0.0.0/33\"]"),
            "ports[1]: \"10.0.0.0/33\" is neither an IP address nor a CIDR at line 3",
        ),
        (
            with("\"allowed_address_pairs\": [{\"ip_address\": \"10.0.0.9\"}]"),
            "ports[1]: missing field `mac_address` at line 3",
        ),
        (with("\"device\": \"a/b\""), "ports[1]: \"a/b\" is not an interface name"),
        (file(&[&short(1), &short(2), &short(1)]), "ports[2]: duplicate id 00000001-"),
        (with(&subports(&[(1, 5)])), "ports[1]: duplicate id 00000001-"),
        (with(&subports(&[(3, 5), (4, 5)])), "ports[1]: duplicate VLAN 5"),
        (with(&subports(&[(3, 0)])), "ports[1]: 0 is not a VLAN id"),
    ] {
        let error = parse(&text).expect_err(&text).to_string();
        assert!(error.contains(wanted), "{text}: {error}");
    }
    let twice = [short(1), short(2)].map(|port| port.replace("\"id\"", "\"device\": \"tap0\", \"id\""));
    let error = parse(&file(&[&twice[0], &twice[1]])).unwrap_err();
    assert!(matches!(error, StaticFileError::DuplicateDevice { port: 1, .. }), "{error}");
}

#[tokio::test]
async fn the_last_valid_content_stays_in_force() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("etc/ports.json");
    let (mut events, reporter, cancel) = channels();
    let (reporter, mut state) = reporter;
    let source = tokio::spawn(run(path.clone(), events.0, reporter, cancel.clone()));

    let first = until(&mut state, |state| !state.faults.is_empty()).await;
    assert_eq!((first.ready, first.fault().map(|(_, error)| error)), (false, Some("does not exist")));
    fs::create_dir(folder.path().join("etc")).unwrap();
    fs::write(&path, file(&[&short(1)])).unwrap();
    assert_eq!(next(&mut events.1).await, [1]);
    let loaded = until(&mut state, |state| state.ready).await;
    assert_eq!((loaded.ports, loaded.fault()), (1, None));

    for spoil in [|path: &Path| fs::write(path, "{").unwrap(), |path: &Path| fs::remove_file(path).unwrap()] {
        spoil(&path);
        let faulty = until(&mut state, |state| !state.faults.is_empty()).await;
        assert_eq!((faulty.ready, faulty.ports), (true, 1));
        assert!(events.1.try_recv().is_err(), "nothing is withdrawn");
        let new = folder.path().join("etc/.ports.json.swp");
        fs::write(&new, file(&[&short(2), &short(3)])).unwrap();
        fs::rename(new, &path).unwrap();
        while next(&mut events.1).await != [2, 3] {}
        until(&mut state, |state| state.faults.is_empty() && state.ports == 2).await;
        fs::write(&path, file(&[&short(1)])).unwrap();
        while next(&mut events.1).await != [1] {}
        until(&mut state, |state| state.faults.is_empty() && state.ports == 1).await;
    }
    cancel.cancel();
    time::timeout(Duration::from_secs(10), source).await.expect("the source did not stop").unwrap();
}

#[tokio::test]
async fn a_config_map_is_followed_through_its_symlinks() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (version, port) in [("..1", 1), ("..2", 2)] {
        fs::create_dir(path(version)).unwrap();
        fs::write(path(version).join("ports.json"), file(&[&short(port)])).unwrap();
    }
    symlink("..1", path("..data")).unwrap();
    symlink("..data/ports.json", path("ports.json")).unwrap();

    let (mut events, (reporter, _state), cancel) = channels();
    let source = tokio::spawn(run(path("ports.json"), events.0, reporter, cancel.clone()));
    assert_eq!(next(&mut events.1).await, [1]);
    fs::write(path("unrelated"), "").unwrap();
    symlink("..2", path("..data_tmp")).unwrap();
    fs::rename(path("..data_tmp"), path("..data")).unwrap();
    assert_eq!(next(&mut events.1).await, [2], "the previous content is not sent again");
    cancel.cancel();
    time::timeout(Duration::from_secs(10), source).await.expect("the source did not stop").unwrap();
}

type StateReceiver = tokio::sync::watch::Receiver<super::super::SourceState>;
type Channels = ((mpsc::Sender<Event>, mpsc::Receiver<Event>), (Reporter, StateReceiver), CancellationToken);

fn channels() -> Channels {
    (mpsc::channel(64), Reporter::new(SourceKind::StaticFile), CancellationToken::new())
}

/// Returns the numbers of the ports of the next event.
async fn next(events: &mut mpsc::Receiver<Event>) -> Vec<u8> {
    let event =
        time::timeout(Duration::from_secs(10), events.recv()).await.expect("no event was sent").unwrap();
    assert_eq!(event.source, SourceKind::StaticFile);
    event.ports.iter().map(|port| port.id.unwrap().octets()[3]).collect()
}

async fn until(
    state: &mut StateReceiver,
    fits: impl Fn(&super::super::SourceState) -> bool,
) -> super::super::SourceState {
    let found = time::timeout(Duration::from_secs(10), state.wait_for(fits)).await;
    found.expect("the state was not reached").unwrap().clone()
}

/// Returns the field with subports of these ids and VLAN ids.
fn subports(all: &[(u32, u32)]) -> String {
    let subport = |(id, vlan): &(u32, u32)| {
        format!(r#"{{"id": "{id:08x}-0000-4000-8000-000000000000", "vlan": {vlan}}}"#)
    };
    format!("\"subports\": [{}]", all.iter().map(subport).collect::<Vec<_>>().join(", "))
}

/// Returns a file with one port on each line, starting at line 2.
fn file(ports: &[&str]) -> String {
    format!("{{\"ports\": [\n{}]}}", ports.join(",\n"))
}

fn short(n: u8) -> String {
    format!(
        r#"{{"id": "{n:08x}-0000-4000-8000-000000000000", "instance": "{n:08x}-0000-4000-9000-000000000000", "project": "acme"}}"#
    )
}
