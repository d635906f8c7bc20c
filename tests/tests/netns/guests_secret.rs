//! The secret that the agent shares with Nova appears in no output.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use metadata_tests::http_server::Mode;
use metadata_tests::nova::signature;
use metadata_tests::two_tenants::HOSTNAME;
use metadata_tests::wait::{self, PATIENCE};
use metadata_tests::{Host, NovaStandIn, ServedTenants, TwoTenants};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Does not occur by chance, and is escaped differently in a configuration file, a log and JSON.
const SECRET: &str = "s3cret-\u{fc}%$\"x\\y 7f1d";

/// Returns all spellings of the secret.
fn spellings() -> Vec<String> {
    let bytes = SECRET.as_bytes();
    let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("a String takes all");
        hex
    });
    let list = format!("{bytes:?}");
    let json = serde_json::to_string(SECRET).expect("JSON");
    let debug = format!("{SECRET:?}");
    let quoted = |text: &str| text.trim_matches('"').to_owned();
    let list = list.trim_matches(['[', ']']).to_owned();
    let begin_and_end = ["s3cret-", "y 7f1d"].map(str::to_owned);
    [vec![SECRET.to_owned(), hex, list, quoted(&json), quoted(&debug)], begin_and_end.to_vec()].concat()
}

#[test]
fn the_shared_secret_is_in_no_output() {
    let host = Host::new();
    let nova = NovaStandIn::start_with(host.netns(), (Ipv4Addr::LOCALHOST, 0).into(), SECRET);
    let tenants = TwoTenants::on(host, nova, |spec| spec).serve(|installer, red, _| {
        let installer = installer.port(&red.port).set("metadata_agent", "identity_hold", "0.1");
        installer.set("DEFAULT", "debug", "true").env("RUST_LOG", "trace")
    });
    let ServedTenants { process, agent, nova, red, blue, .. } = &tenants;
    red.assert_hostname_served();
    assert_eq!(red.post("/openstack/2013-10-17/password", b"password").status, 200);
    assert_eq!(blue.get(HOSTNAME).status, 503);
    nova.set_mode(Mode::Refuse);
    assert_eq!(red.get(HOSTNAME).status, 503);
    let config = std::fs::read_to_string(agent.config_file()).expect("the configuration");
    assert!(config.contains(&SECRET.replace('$', "$$")), "{config}");

    let state = process.state().to_string();
    let (status, check) = (agent.query("status", &["--json"]), agent.query("check", &["--json"]));
    let mut outputs = vec![("state", state), ("metrics", process.metrics())];
    for (name, output) in [("status", status), ("check", check)] {
        let stdout = String::from_utf8(output.stdout).expect("text");
        serde_json::from_str::<Value>(&stdout).expect("JSON");
        outputs.push((name, stdout));
        outputs.push((name, String::from_utf8(output.stderr).expect("text")));
    }
    process.signal(Signal::SIGTERM);
    process.wait_exit(PATIENCE);
    wait::until("its output has ended", PATIENCE, || process.output().contains("stopping").then_some(()));
    let log = process.output();
    assert!(log.contains(" TRACE ") && log.contains(&red.port.instance.to_string()), "{log}");
    outputs.push(("log", log));

    for (name, text) in &outputs {
        for spelling in spellings() {
            // Not printed, because the text that contains it may be large.
            assert!(!text.contains(&spelling), "{spelling:?} is in the {name}");
        }
    }
    // The agent does know the secret.
    let own = signature(SECRET, &red.port.instance.to_string());
    assert_eq!(nova.requests()[0].header("x-instance-id-signature"), Some(own));
}
