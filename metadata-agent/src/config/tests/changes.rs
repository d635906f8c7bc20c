//! Changes between two readings of the configuration.

use secrecy::ExposeSecret as _;

use super::*;

const OLD: &str =
    "[DEFAULT]\ndebug = false\nnova_metadata_host = a\nmetadata_proxy_shared_secret = hunter1\n";
const NEW: &str = "[DEFAULT]\ndebug = true\nnova_metadata_host = b\nmetadata_proxy_shared_secret = hunter2\n";

fn config(text: &str) -> Config {
    TestHost::new().file("a.conf", text).load().unwrap()
}

fn changed(old: &str, new: &str) -> Vec<(&'static str, bool)> {
    let changed = config(old).changed_options(&config(new));
    changed.into_iter().map(|option| (option.name, option.at_run_time.is_some())).collect()
}

#[test]
fn changed_options_are_named_even_secrets() {
    let expected = [("nova_metadata_host", false), ("metadata_proxy_shared_secret", true), ("debug", true)];
    assert_eq!(changed(OLD, NEW), expected);
    let password = |password: &str| format!("[metadata_agent]\nneutron_password = {password}\n");
    assert_eq!(changed(&password("a"), &password("b")), [("neutron_password", false)]);
    let shown = format!("{:?}", config(OLD).changed_options(&config(NEW)));
    assert!(!shown.contains("hunter1") && !shown.contains("hunter2"), "{shown}");
}

#[test]
fn a_default_that_is_written_out_is_no_change() {
    assert_eq!(changed("", "[DEFAULT]\ndebug = false\nnova_metadata_port = 8775\n"), []);
    // Except where it matters that the option is set.
    let explicit = "[metadata_agent]\nlibvirt_dir = /run/libvirt/qemu\n";
    assert_eq!(changed("", explicit), [("libvirt_dir", false)]);
}

#[test]
fn only_adopted_options_are_in_force() {
    let (mut in_force, new) = (config(OLD), config(NEW));
    for option in in_force.changed_options(&new).into_iter().filter_map(|option| option.at_run_time) {
        in_force.adopt(option, &new);
    }
    assert!(in_force.debug);
    assert_eq!(in_force.metadata_proxy_shared_secret.expose_secret(), "hunter2");
    let left: Vec<_> = in_force.changed_options(&new).into_iter().map(|option| option.name).collect();
    assert_eq!(left, ["nova_metadata_host"]);
    let shown = in_force.settings().iter().find(|setting| setting.key == "debug").unwrap();
    assert_eq!(shown.value, "true");
}
