//! Notices and warnings.

use super::*;

#[test]
fn a_probable_mistake_is_a_warning() {
    let host = TestHost::new()
        .flag("nova_metadata_protocol", "https")
        .env("METADATA_AGENT_NOVA_METADATA_INSECURE", "yes")
        .env("METADATA_AGENT_METADATA_PROXY_SHARED_SECRET", "s");
    assert_eq!(host.load().unwrap().warnings(), [ConfigWarning::CertificateNotChecked]);
}

#[test]
fn serving_haproxies_without_neutron_is_a_warning() {
    let served = "[metadata_agent]\nserve_metadata_proxy_socket = true\n";
    let warnings = |neutron: &str| {
        let secret = "[DEFAULT]\nmetadata_proxy_shared_secret = s\n";
        TestHost::new().file("a.ini", format!("{secret}{served}{neutron}")).load().unwrap().warnings()
    };
    assert_eq!(warnings(""), [ConfigWarning::HaproxyWithoutNeutron]);
    let neutron = "neutron_auth_type = none\nneutron_endpoint_override = http://neutron:9696\n";
    assert_eq!(warnings(neutron), []);
}

#[test]
fn haproxy_timeouts_stand_in_unless_ours_are_set() {
    let ini = "[metadata_haproxy]\ntimeout_connect = 30\ntimeout_client = 33\ntimeout_server = 20\n\
               timeout_http_request = 31\ntimeout_http_keep_alive = 34\n";
    let host = TestHost::new().file("a.ini", ini);
    let config = host.load().unwrap();
    let times = |config: &Config| {
        [
            config.nova_connect_timeout,
            config.guest_write_timeout,
            config.nova_response_timeout,
            config.request_head_timeout,
            config.keep_alive_timeout,
        ]
        .map(|time| time.as_secs())
    };
    assert_eq!(times(&config), [30, 33, 32, 31, 34]);
    let notice = config.notices()[0].to_string();
    assert_eq!(config.notices().len(), 1, "{:?}", config.notices());
    let path = host.path("a.ini").display().to_string();
    assert_eq!(
        notice,
        format!(
            "[metadata_haproxy] timeout_server ({path}:4) stands in for nova_response_timeout, which becomes 32"
        )
    );
    let ours = "[metadata_agent]\nnova_connect_timeout = 1\nguest_write_timeout = 2\nnova_response_timeout = 40\n\
                request_head_timeout = 3\nkeep_alive_timeout = 4\n";
    let config = host.file("b.ini", ours).load().unwrap();
    assert_eq!((times(&config), config.notices().len()), ([1, 2, 40, 3, 4], 0));
    let errors = TestHost::new().file("a.ini", "[metadata_haproxy]\ntimeout_client = soon\n").errors();
    assert!(errors[0].starts_with("guest_write_timeout: \"soon\" is not accepted"), "{errors:?}");
}

#[test]
fn each_option_without_effect_gets_one_notice() {
    let ini = "[DEFAULT]\ntransport_url = rabbit://neutron:hunter2-xyzzy@mq\nlog_file = a\nlog_file = b\n\
               rpc_response_max_timeout = 600\nnova_metadata_ip = 10.0.0.1\nmetadata_proxy_user = nobody\n\
               metadata_proxy_socket_mode = group\ncore_plugin = ml2\n\
               [AGENT]\nkill_scripts_path = /x\ncheck_child_processes_interval = 60\nreport_interval = 15\n\
               [cache]\nenabled = true\nbackend = x\n[metadata_rate_limiting]\nrate_limit_enabled = true\n";
    let host = TestHost::new().file("a.ini", ini);
    let config = host.load().unwrap();
    assert_eq!(
        (config.metadata_proxy_socket_mode, config.report_interval.as_secs()),
        (SocketMode::Group, 15)
    );
    let named: Vec<_> = config.notices().iter().map(|n| (n.group, n.name, n.is_warning())).collect();
    assert_eq!(
        named,
        [
            ("DEFAULT", "transport_url", false),
            ("DEFAULT", "rpc_response_max_timeout", false),
            ("DEFAULT", "log_file", false),
            ("AGENT", "check_child_processes_interval", false),
            ("AGENT", "kill_scripts_path", false),
            ("cache", "*", false),
            ("DEFAULT", "nova_metadata_ip", true),
            ("DEFAULT", "metadata_proxy_socket_mode", false),
            ("DEFAULT", "metadata_proxy_user", false),
            ("agent", "report_interval", true),
            ("metadata_rate_limiting", "rate_limit_enabled", true),
        ]
    );
    let json = serde_json::to_value(config.notices()).unwrap();
    let path = host.path("a.ini").display().to_string();
    assert_eq!(json[2]["origin"], format!("{path}:4"), "the assignment that would win");
    assert_eq!((&json[2]["effect"], &json[6]["effect"]), (&"none".into(), &"replaced".into()));
    let shown = format!("{json} {:?}", config.notices());
    assert!(!shown.contains("hunter2"), "{shown}");
    let off =
        TestHost::new().file("a.ini", "[metadata_rate_limiting]\nrate_limit_enabled = no\n").load().unwrap();
    assert!(off.notices().is_empty());
}

#[test]
fn a_rate_limit_that_breaks_a_boot_gets_a_notice() {
    let notices = |limits: &str| {
        let ini = format!("[metadata_rate_limiting]\nrate_limit_enabled = true\n{limits}");
        let config = TestHost::new().file("a.ini", &ini).load().unwrap();
        config.notices().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    for limits in [
        "",
        "base_query_rate_limit = 100\n",
        "base_query_rate_limit = 27\nburst_query_rate_limit = 28\n",
        "base_query_rate_limit = 28\nburst_query_rate_limit = 27\n",
    ] {
        let found = notices(limits);
        assert!(
            matches!(&found[..], [one] if one.contains("raise base_query_rate_limit")),
            "{limits}: {found:?}"
        );
    }
    assert_eq!(notices("base_query_rate_limit = 28\nburst_query_rate_limit = 28\n"), [""; 0]);
}

#[test]
fn haproxy_options_have_an_effect_once_served() {
    let ini = "[DEFAULT]\nmetadata_proxy_socket = /a\nmetadata_proxy_socket_mode = all\nmetadata_proxy_user = nobody\n";
    let named = |own: &str| {
        let host = TestHost::new().file("a.ini", format!("{ini}[metadata_agent]\n{own}\n"));
        host.load().unwrap().notices().iter().map(|notice| notice.name).collect::<Vec<_>>()
    };
    let unserved = ["metadata_proxy_socket", "metadata_proxy_socket_mode", "metadata_proxy_user"];
    assert_eq!(named(""), unserved);
    assert_eq!(named("upstream = ovn-agent"), unserved[1..], "it is where that agent listens");
    assert!(named("serve_metadata_proxy_socket = true").is_empty());
}
