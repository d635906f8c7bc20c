//! Defaults, and the order in which flags, environment and files override each other.

use std::fmt::Write as _;
use std::num::NonZero;
use std::time::Duration;

use secrecy::ExposeSecret;

use super::*;
use crate::attach::{LinkKind, SourceCheck};
use crate::datapath::AttachMode;

#[test]
fn without_settings_the_defaults_apply() {
    let config = TestHost::new().load().unwrap();
    assert_eq!(endpoints(&config), ["http://127.0.0.1:8775"]);
    assert_eq!(config.client_certificate(), None);
    assert_eq!((config.metadata_workers, config.metadata_backlog, config.debug), (None, 4096, false));
    assert_eq!(config.libvirt_dir.as_deref(), Some(Path::new("/run/libvirt/qemu")));
    assert!(!config.libvirt().unwrap().is_configured, "a host without libvirt is not an error");
    assert_eq!(config.static_inventory, None);
    assert!(config.guest_interfaces.iter().any(|pattern| pattern.matches("tap3f2a9d10-77")));
    assert_eq!(config.guest_link_kinds, [LinkKind::Tun]);
    assert_eq!((config.attach_mode, config.source_check), (AttachMode::Auto, SourceCheck::Strict));
    assert_eq!((config.portal_namespace.as_str(), config.portal_mtu), ("metadata-portal", 1500));
    assert_eq!((config.syn_rate_limit, config.syn_burst), (NonZero::new(2000), 4000));
    assert_eq!((config.connections_per_guest, config.connections), (128, 1024));
    assert_eq!((config.request_head_limit, config.request_body_limit), (32768, 65536));
    let times =
        [config.heartbeat_stale_after, config.identity_hold, config.identity_grace, config.drain_timeout];
    assert_eq!(times, [2, 5, 120, 10].map(Duration::from_secs));
    assert_eq!(config.nova_response_timeout, Duration::from_mins(1));
    assert_eq!(config.admin_socket, Path::new("/run/metadata-agent/admin.sock"));
    assert_eq!(config.settings().len(), OPTIONS.len());
    assert!(config.settings().iter().all(|setting| setting.origin == Origin::Default));
    assert_eq!(config.warnings(), [ConfigWarning::EmptySecret]);
    assert!(config.notices().is_empty());
    assert_eq!(config.metadata_proxy_socket, Path::new("/var/lib/neutron/metadata_proxy"));
    assert_eq!(
        (config.rate_limit_enabled, config.rate_limit_ip_versions.as_slice()),
        (false, &[IpVersion::V4][..])
    );
    assert_eq!(
        (config.metadata_port, config.metadata_access_mark, config.enable_metadata_proxy),
        (9697, 1, true)
    );
    assert_eq!(
        config.ovn_sb_connection.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["tcp:127.0.0.1:6642"]
    );
    assert_eq!(config.guest_write_timeout, Duration::from_secs(32));
    assert!(!config.host_name().is_empty());
}

#[test]
fn flag_overrides_environment_overrides_file() {
    let host = TestHost::new().file("a.ini", "[DEFAULT]\nnova_metadata_port = 1001\n");
    let port = |host: &TestHost| {
        let config = host.load().unwrap();
        (config.nova_metadata_port, config.origin("nova_metadata_port").unwrap().to_string())
    };
    assert_eq!(port(&host), (1001, format!("{}:2", host.path("a.ini").display())));
    let host = host.env("METADATA_AGENT_NOVA_METADATA_PORT", "1002");
    assert_eq!(port(&host), (1002, "environment METADATA_AGENT_NOVA_METADATA_PORT".to_owned()));
    let host = host.flag("nova_metadata_port", "1003");
    assert_eq!(port(&host), (1003, "--nova-metadata-port".to_owned()));
}

#[test]
fn every_option_can_be_set_by_its_variable() {
    let defaults = TestHost::new().load().unwrap();
    for (spec, default) in OPTIONS.iter().zip(defaults.settings()) {
        let value = if spec.is_secret() { "" } else { &default.value };
        let host = TestHost::new().env(&spec.env(), value);
        let config = host.load().unwrap_or_else(|errors| panic!("{}: {errors}", spec.key));
        assert_eq!(config.origin(spec.key), Some(&Origin::Env { var: spec.env() }), "{}", spec.key);
    }
}

#[test]
fn every_option_can_be_set_under_each_of_its_names() {
    let defaults = TestHost::new().load().unwrap();
    for (spec, default) in OPTIONS.iter().zip(defaults.settings()) {
        let value = if spec.is_secret() { "" } else { &default.value };
        let mut ini = String::new();
        for (line, (group, name)) in spec.places().collect::<Vec<_>>().into_iter().rev().enumerate() {
            writeln!(ini, "[{group}]\n{name} = {value}").unwrap();
            let host = TestHost::new().file("a.ini", &ini);
            let config = host.load().unwrap_or_else(|errors| panic!("{}: {errors}", spec.key));
            let (path, line) = (host.path("a.ini"), 2 * line + 2);
            let want = if (group, name) == (spec.group, spec.name) {
                Origin::File { path, line }
            } else {
                Origin::Fallback { group, name, path, line }
            };
            assert_eq!(config.origin(spec.key), Some(&want));
            assert_eq!(
                config.settings().iter().find(|one| one.key == spec.key).unwrap().value,
                default.value
            );
        }
    }
}

#[test]
fn neutrons_files_are_read_unless_others_are_named() {
    let host = TestHost::new()
        .write("neutron.conf", "[DEFAULT]\nnova_metadata_port = 1\nmetadata_workers = 3\ncore_plugin = ml2\n")
        .write(
            "neutron_ovn_metadata_agent.ini",
            "[DEFAULT]\nnova_metadata_port = 2\n[ovs]\novsdb_timeout = 10\n",
        );
    let config = host.load().unwrap();
    assert_eq!((config.nova_metadata_port, config.metadata_workers), (2, NonZero::new(3)));
    // The file of neutron-ovn-agent, with its metadata extension.
    let host = host.write("plugins/ml2/ovn_agent.ini", "[DEFAULT]\nnova_metadata_port = 4\n");
    assert_eq!(host.load().unwrap().nova_metadata_port, 4);
    let config = host.file("other.ini", "[metadata_agent]\nportal_mtu = 9000\n").load().unwrap();
    assert_eq!((config.nova_metadata_port, config.metadata_workers, config.portal_mtu), (8775, None, 9000));
}

#[test]
fn files_and_directories_merge_in_command_line_order() {
    let host = TestHost::new()
        .file("first.ini", "[DEFAULT]\nnova_metadata_port = 1\nmetadata_backlog = 11\n")
        .write("d/20.conf", "[DEFAULT]\nnova_metadata_port = 20\n")
        .write("d/10.conf", "[DEFAULT]\nnova_metadata_port = 10\nmetadata_workers = 7\n")
        .write("d/30.ini", "[DEFAULT]\nnova_metadata_port = 30\n")
        .write("d/.40.conf", "[DEFAULT]\nnova_metadata_port = 40\n");
    let dir = ConfigSource::Dir(host.path("d"));
    let host = host.source(dir);
    let config = host.load().unwrap();
    assert_eq!((config.nova_metadata_port, config.metadata_backlog), (20, 11));
    assert_eq!(config.metadata_workers, NonZero::new(7));
    let config = host.file("last.ini", "[DEFAULT]\nnova_metadata_port = 2\n").load().unwrap();
    assert_eq!(config.nova_metadata_port, 2);
}

#[test]
fn references_are_replaced_only_in_files() {
    let ini = "[DEFAULT]\nbase = /srv\nmetadata_proxy_shared_secret = a$$b\n\
               [metadata_agent]\nstatic_inventory = ${base}/$metadata_agent.portal_namespace-${nova_metadata_port}.json\n\
               libvirt_dir = $state_path\n";
    let host = TestHost::new()
        .file("a.ini", ini)
        .flag("portal_namespace", "p$x")
        .env("METADATA_AGENT_BPFFS_DIR", "/sys/fs/bpf/$x");
    let config = host.load().unwrap();
    assert_eq!(config.static_inventory.as_deref(), Some(Path::new("/srv/p$x-8775.json")));
    assert_eq!(config.libvirt_dir.as_deref(), Some(Path::new("/var/lib/neutron")));
    assert!(config.libvirt().unwrap().is_configured);
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), "a$b");
    assert_eq!(config.bpffs_dir, Path::new("/sys/fs/bpf/$x"));
    let config = host.env("METADATA_AGENT_METADATA_PROXY_SHARED_SECRET", "c$d").load().unwrap();
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), "c$d");
}

#[test]
fn optional_features_can_be_turned_off() {
    let config = TestHost::new()
        .file("a.ini", "[metadata_agent]\nsyn_rate_limit = 0\nlibvirt_dir =\n[DEFAULT]\nmetadata_workers =\n")
        .load()
        .unwrap();
    assert_eq!((config.syn_rate_limit, config.libvirt_dir, config.metadata_workers), (None, None, None));
}

#[test]
fn the_admin_socket_needs_no_files_if_a_flag_sets_it() {
    let host =
        TestHost::new().file("a.ini", "[metadata_agent]\nadmin_socket = /a.sock\n[DEFAULT]\ndebug = maybe\n");
    assert_eq!(host.admin_socket().unwrap(), Path::new("/a.sock"), "faults of other options do not matter");
    let host = host.write("a.ini", "broken");
    host.admin_socket().unwrap_err();
    assert_eq!(host.flag("admin_socket", "/b.sock").admin_socket().unwrap(), Path::new("/b.sock"));
}

#[test]
fn each_of_several_hosts_is_an_endpoint() {
    let ini = "[DEFAULT]\nnova_metadata_host = nova-1, [fd00::1] ,192.0.2.1\nnova_metadata_port = 80\n";
    let config = TestHost::new().file("a.ini", ini).load().unwrap();
    assert_eq!(endpoints(&config), ["http://nova-1:80", "http://[fd00::1]:80", "http://192.0.2.1:80"]);
    let errors = TestHost::new().file("a.ini", "[DEFAULT]\nnova_metadata_host = nova-1,,nova-2\n").errors();
    assert_eq!(errors.len(), 1, "{errors:?}");
}

#[test]
fn the_last_list_counts_except_for_secret_files() {
    let host = TestHost::new().write("one", "1").write("two", "2").write("three", "3");
    let [one, two, three] = ["one", "two", "three"].map(|name| host.path(name));
    let lines = |files: [&str; 2]| {
        let files = files.map(|file| format!("shared_secret_files = {file}\n"));
        format!("[metadata_agent]\n{}guest_interfaces = tap*\n", files.concat())
    };
    let first = lines([&format!("{}, {},", one.display(), two.display()), ""]);
    let host = host.file("a.ini", format!("[x]\ndir = /\n{first}guest_interfaces = eth0,eth1\n"));
    let host = host.file("b.ini", format!("[metadata_agent]\nshared_secret_files = {}\n", three.display()));
    let config = host.load().unwrap();
    assert_eq!(config.shared_secret_files, [one.clone(), two, three]);
    assert_eq!(config.guest_interfaces.len(), 2);
    let (a, b) = (host.path("a.ini"), host.path("b.ini"));
    let origin = config.origin("shared_secret_files").unwrap();
    assert_eq!(origin.to_string(), format!("{0}:4, {0}:5, {1}:2", a.display(), b.display()));
    assert_eq!(config.warnings(), [], "an empty metadata_proxy_shared_secret does not matter then");

    let host = host.env("METADATA_AGENT_SHARED_SECRET_FILES", one.as_os_str());
    assert_eq!(host.load().unwrap().shared_secret_files, [one], "the environment adds nothing, it wins");
}

#[test]
fn options_of_the_ovs_agent_stand_in_for_default() {
    let ini = format!(
        "[METADATA]\nnova_metadata_host = $region-nova\nregion = eu\nnova_metadata_port = 1\n\
         metadata_proxy_shared_secret = {SECRET}\nprovider_cidr = 240.0.0.0/16\n[DEFAULT]\nnova_metadata_port = 2\n"
    );
    let host = TestHost::new().file("a.ini", ini);
    let config = host.load().unwrap();
    assert_eq!(endpoints(&config), ["http://eu-nova:2"]);
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), SECRET);
    let path = host.path("a.ini").display().to_string();
    let origin = config.origin("nova_metadata_host").unwrap().to_string();
    assert_eq!(origin, format!("{path}:2, [metadata] nova_metadata_host"));
    let notices: Vec<_> = config.notices().iter().map(ToString::to_string).collect();
    assert_eq!(
        notices,
        [format!(
            "[METADATA] provider_cidr ({path}:6) has no effect: guests are identified by their interface, \
             without addresses of a provider network"
        )]
    );
    let config = host.env("METADATA_AGENT_NOVA_METADATA_HOST", "other").load().unwrap();
    assert_eq!(endpoints(&config), ["http://other:2"]);
}
