use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::num::NonZero;
use std::time::Duration;

use proptest::prelude::*;
use secrecy::ExposeSecret;
use tempfile::TempDir;

use super::*;
use crate::attach::{LinkKind, SourceCheck};
use crate::datapath::AttachMode;
use crate::proxy::ClientCertificate;
use crate::sources::neutron::{Credentials, Domain, NeutronAuth};

const SECRET: &str = "hunter2-xyzzy";

/// A host of its own: files, environment and flags.
struct Site {
    dir: TempDir,
    args: ConfigArgs,
    env: BTreeMap<String, OsString>,
}

impl Site {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), args: ConfigArgs::default(), env: BTreeMap::new() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Writes a file where Neutron would look for it.
    fn write(self, name: &str, text: impl AsRef<[u8]>) -> Self {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), text).unwrap();
        self
    }

    fn source(mut self, source: ConfigSource) -> Self {
        self.args.sources.push(source);
        self
    }

    fn file(self, name: &str, text: impl AsRef<[u8]>) -> Self {
        let path = self.path(name);
        self.write(name, text).source(ConfigSource::File(path))
    }

    fn env(mut self, var: &str, value: impl Into<OsString>) -> Self {
        self.env.insert(var.to_owned(), value.into());
        self
    }

    fn flag(mut self, name: &'static str, value: &str) -> Self {
        self.args.flags.insert(name, value.to_owned());
        self
    }

    fn load(&self) -> Result<Config, ConfigFaults> {
        Config::load_from(&self.args, &|var| self.env.get(var).cloned(), self.dir.path())
    }

    fn faults(&self) -> Vec<String> {
        let faults = self.load().unwrap_err();
        faults.0.iter().map(|f| f.to_string().replace(self.dir.path().to_str().unwrap(), "")).collect()
    }

    fn admin_socket(&self) -> Result<PathBuf, ConfigFaults> {
        admin_socket_from(&self.args, &|var| self.env.get(var).cloned(), self.dir.path())
    }
}

fn endpoints(config: &Config) -> Vec<String> {
    config.nova_endpoints().map(|endpoint| endpoint.to_string()).collect()
}

#[test]
fn nothing_given_means_the_defaults() {
    let config = Site::new().load().unwrap();
    assert_eq!(endpoints(&config), ["http://127.0.0.1:8775"]);
    assert_eq!(config.client_certificate(), None);
    assert_eq!((config.metadata_workers, config.metadata_backlog, config.debug), (None, 4096, false));
    assert_eq!(config.libvirt_dir.as_deref(), Some(Path::new("/run/libvirt/qemu")));
    assert_eq!(config.static_inventory, None);
    assert!(config.guest_interfaces.iter().any(|pattern| pattern.matches("tap3f2a9d10-77")));
    assert_eq!(config.guest_link_kinds, [LinkKind::Tun]);
    assert_eq!((config.attach_mode, config.source_check), (AttachMode::Auto, SourceCheck::Strict));
    assert_eq!((config.portal_namespace.as_str(), config.portal_mtu), ("metadata-portal", 1500));
    assert_eq!((config.syn_rate_limit, config.syn_burst), (NonZero::new(2000), 4000));
    assert_eq!((config.connections_per_port, config.connections), (128, 16_384));
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
fn flag_beats_environment_beats_file_beats_default() {
    let site = Site::new().file("a.ini", "[DEFAULT]\nnova_metadata_port = 1001\n");
    let port = |site: &Site| {
        let config = site.load().unwrap();
        (config.nova_metadata_port, config.origin("nova_metadata_port").unwrap().to_string())
    };
    assert_eq!(port(&site), (1001, format!("{}:2", site.path("a.ini").display())));
    let site = site.env("METADATA_AGENT_NOVA_METADATA_PORT", "1002");
    assert_eq!(port(&site), (1002, "environment METADATA_AGENT_NOVA_METADATA_PORT".to_owned()));
    let site = site.flag("nova_metadata_port", "1003");
    assert_eq!(port(&site), (1003, "--nova-metadata-port".to_owned()));
}

#[test]
fn every_option_can_be_set_by_its_variable() {
    let defaults = Site::new().load().unwrap();
    for (spec, default) in OPTIONS.iter().zip(defaults.settings()) {
        let value = if spec.is_secret() { "" } else { &default.value };
        let site = Site::new().env(&spec.env(), value);
        let config = site.load().unwrap_or_else(|faults| panic!("{}: {faults}", spec.key));
        assert_eq!(config.origin(spec.key), Some(&Origin::Env { var: spec.env() }), "{}", spec.key);
    }
}

#[test]
fn every_option_can_be_set_in_each_of_its_places_and_the_first_place_wins() {
    let defaults = Site::new().load().unwrap();
    for (spec, default) in OPTIONS.iter().zip(defaults.settings()) {
        let value = if spec.is_secret() { "" } else { &default.value };
        let mut ini = String::new();
        for (line, (group, name)) in spec.places().collect::<Vec<_>>().into_iter().rev().enumerate() {
            writeln!(ini, "[{group}]\n{name} = {value}").unwrap();
            let site = Site::new().file("a.ini", &ini);
            let config = site.load().unwrap_or_else(|faults| panic!("{}: {faults}", spec.key));
            let (path, line) = (site.path("a.ini"), 2 * line + 2);
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
fn neutrons_own_files_are_read_unless_others_are_named() {
    let site = Site::new()
        .write("neutron.conf", "[DEFAULT]\nnova_metadata_port = 1\nmetadata_workers = 3\ncore_plugin = ml2\n")
        .write(
            "neutron_ovn_metadata_agent.ini",
            "[DEFAULT]\nnova_metadata_port = 2\n[ovs]\novsdb_timeout = 10\n",
        );
    let config = site.load().unwrap();
    assert_eq!((config.nova_metadata_port, config.metadata_workers), (2, NonZero::new(3)));
    let config = site.file("other.ini", "[metadata_agent]\nportal_mtu = 9000\n").load().unwrap();
    assert_eq!((config.nova_metadata_port, config.metadata_workers, config.portal_mtu), (8775, None, 9000));
}

#[test]
fn files_and_directories_merge_in_the_order_of_the_command_line() {
    let site = Site::new()
        .file("first.ini", "[DEFAULT]\nnova_metadata_port = 1\nmetadata_backlog = 11\n")
        .write("d/20.conf", "[DEFAULT]\nnova_metadata_port = 20\n")
        .write("d/10.conf", "[DEFAULT]\nnova_metadata_port = 10\nmetadata_workers = 7\n")
        .write("d/30.ini", "[DEFAULT]\nnova_metadata_port = 30\n")
        .write("d/.40.conf", "[DEFAULT]\nnova_metadata_port = 40\n");
    let dir = ConfigSource::Dir(site.path("d"));
    let site = site.source(dir);
    let config = site.load().unwrap();
    assert_eq!((config.nova_metadata_port, config.metadata_backlog), (20, 11));
    assert_eq!(config.metadata_workers, NonZero::new(7));
    let config = site.file("last.ini", "[DEFAULT]\nnova_metadata_port = 2\n").load().unwrap();
    assert_eq!(config.nova_metadata_port, 2);
}

#[test]
fn references_are_replaced_in_files_but_not_in_flags_and_environment() {
    let ini = "[DEFAULT]\nbase = /srv\nmetadata_proxy_shared_secret = a$$b\n\
               [metadata_agent]\nstatic_inventory = ${base}/$metadata_agent.portal_namespace-${nova_metadata_port}.json\n\
               libvirt_dir = $state_path\n";
    let site = Site::new()
        .file("a.ini", ini)
        .flag("portal_namespace", "p$x")
        .env("METADATA_AGENT_BPFFS_DIR", "/sys/fs/bpf/$x");
    let config = site.load().unwrap();
    assert_eq!(config.static_inventory.as_deref(), Some(Path::new("/srv/p$x-8775.json")));
    assert_eq!(config.libvirt_dir.as_deref(), Some(Path::new("/var/lib/neutron")));
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), "a$b");
    assert_eq!(config.bpffs_dir, Path::new("/sys/fs/bpf/$x"));
    let config = site.env("METADATA_AGENT_METADATA_PROXY_SHARED_SECRET", "c$d").load().unwrap();
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), "c$d");
}

#[test]
fn all_faults_are_reported_at_once_each_with_its_place_and_what_is_accepted() {
    let ini = "[DEFAULT]\nnova_metadata_host = http://nova\nno separator\nauth_ca_cert = /nonexistent/ca\n\
               [metadata_agent]\nportal_mtu = $mtu\nlibvirt_dir = $nope/x\nportal_mtu = 12\n";
    let site = Site::new()
        .file("a.ini", ini)
        .env("METADATA_AGENT_ATTACH_MODE", "xdp")
        .flag("guest_link_kinds", "tun,bridge");
    let gone = ConfigSource::File(site.path("gone.ini"));
    let gone_dir = ConfigSource::Dir(site.path("gone.d"));
    assert_eq!(
        site.source(gone).source(gone_dir).faults(),
        [
            "/a.ini:3: neither `=` nor `:` in what should be `option = value`",
            "cannot read configuration /gone.ini: No such file or directory (os error 2)",
            "cannot read configuration /gone.d: No such file or directory (os error 2)",
            "nova_metadata_host: \"http://nova\" is not accepted (/a.ini:2); accepted is a list separated by commas, each a host name, an IPv4 address or an IPv6 address",
            "auth_ca_cert: cannot read \"/nonexistent/ca\" (/a.ini:4): No such file or directory (os error 2); accepted is the path of a readable file, or nothing for the system's own",
            "libvirt_dir: `$nope` names no option; a dollar sign itself is written `$$` (/a.ini:7)",
            "guest_link_kinds: \"tun,bridge\" is not accepted (--guest-link-kinds); accepted is a list separated by commas, each one of tun, veth",
            "attach_mode: \"xdp\" is not accepted (environment METADATA_AGENT_ATTACH_MODE); accepted is one of auto, tcx, clsact",
            "portal_mtu: \"12\" is not accepted (/a.ini:8); accepted is a whole number from 1280 to 65535",
        ]
    );
}

#[test]
fn a_client_certificate_needs_its_key() {
    let site = Site::new().write("crt", "x").write("key", "x");
    let (crt, key) = (site.path("crt"), site.path("key"));
    let site = site.env("METADATA_AGENT_NOVA_CLIENT_CERT", &crt);
    assert_eq!(
        site.faults(),
        [
            "nova_client_cert is set (environment METADATA_AGENT_NOVA_CLIENT_CERT) but nova_client_priv_key is not; accepted is both or neither"
        ]
    );
    let config = site.env("METADATA_AGENT_NOVA_CLIENT_PRIV_KEY", &key).load().unwrap();
    assert_eq!(config.client_certificate(), Some(ClientCertificate { certificate: crt, key }));
    assert!(config.warnings().contains(&ConfigWarning::TlsUnused));
}

#[test]
fn neutron_is_asked_only_with_all_that_belongs_together() {
    let set = |options: &[(&str, &str)]| {
        options.iter().fold(Site::new(), |site, (name, value)| {
            site.env(&format!("METADATA_AGENT_NEUTRON_{name}"), value)
        })
    };
    assert!(Site::new().load().unwrap().neutron().is_none());

    let url = ("AUTH_URL", "http://controller:5000");
    let password = [
        url,
        ("USERNAME", "agent"),
        ("USER_DOMAIN_NAME", "Default"),
        ("USER_DOMAIN_ID", "default"),
        ("PASSWORD", SECRET),
        ("PROJECT_NAME", "service"),
        ("PROJECT_DOMAIN_NAME", "Default"),
    ];
    let config = set(&password).load().unwrap();
    let NeutronAuth::Keystone { url: at, credentials } = &config.neutron().unwrap().auth else { panic!() };
    assert_eq!(at.as_str(), "http://controller:5000");
    let Credentials::Password { user, user_domain, password: secret, .. } = credentials else { panic!() };
    assert_eq!((user.as_str(), secret.expose_secret()), ("agent", SECRET));
    assert_eq!(*user_domain, Domain::Id("default".to_owned()));
    assert!(!format!("{config:?}").contains(SECRET));

    let credential = ("AUTH_TYPE", "v3applicationcredential");
    let nobody = ("AUTH_TYPE", "none");
    for (options, present, missing) in [
        (&[url][..], "auth_url", "username"),
        (&password[..3], "auth_url", "password"),
        (&password[..6], "auth_url", "project_domain_name"),
        (&password[1..], "username", "auth_url"),
        (&[url, credential], "auth_url", "application_credential_id"),
        (&[url, credential, ("APPLICATION_CREDENTIAL_ID", "x")], "auth_url", "application_credential_secret"),
        (&[("ENDPOINT_OVERRIDE", "http://a:9696")], "endpoint_override", "auth_url"),
        (&[nobody], "auth_type", "endpoint_override"),
    ] {
        let origin = format!("environment METADATA_AGENT_NEUTRON_{}", present.to_ascii_uppercase());
        assert_eq!(
            set(options).faults(),
            [format!("neutron_{present} is set ({origin}) but neutron_{missing}, which it needs, is not")]
        );
    }
    let config = set(&[nobody, ("ENDPOINT_OVERRIDE", "http://a:9696/"), ("INSECURE", "on")]).load().unwrap();
    assert!(
        matches!(&config.neutron().unwrap().auth, NeutronAuth::Nobody { endpoint } if endpoint.as_str() == "http://a:9696")
    );
    assert!(config.warnings().contains(&ConfigWarning::NeutronNotChecked));
}

#[test]
fn what_is_hardly_meant_is_a_warning() {
    let site = Site::new()
        .flag("nova_metadata_protocol", "https")
        .env("METADATA_AGENT_NOVA_METADATA_INSECURE", "yes")
        .env("METADATA_AGENT_METADATA_PROXY_SHARED_SECRET", "s");
    assert_eq!(site.load().unwrap().warnings(), [ConfigWarning::CertificateNotChecked]);
}

#[test]
fn options_that_can_be_switched_off_are() {
    let config = Site::new()
        .file("a.ini", "[metadata_agent]\nsyn_rate_limit = 0\nlibvirt_dir =\n[DEFAULT]\nmetadata_workers =\n")
        .load()
        .unwrap();
    assert_eq!((config.syn_rate_limit, config.libvirt_dir, config.metadata_workers), (None, None, None));
}

#[test]
fn the_secret_is_never_shown() {
    let config = Site::new()
        .file("a.ini", format!("[DEFAULT]\nmetadata_proxy_shared_secret = {SECRET}\n"))
        .load()
        .unwrap();
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), SECRET);
    let json = serde_json::to_string(config.settings()).unwrap();
    assert!(json.contains("\"value\":\"(set)\""), "{json}");
    let shown = format!("{config:?} {config:#?} {:?} {json} {:?}", config.settings(), config.warnings());
    assert!(!shown.contains(SECRET), "{shown}");
}

/// Every way that comes to mind in which a fault could quote the secret.
#[test]
fn no_fault_shows_the_secret() {
    let mut not_utf8 = SECRET.as_bytes().to_vec();
    not_utf8.push(0xff);
    let os_string = <OsString as std::os::unix::ffi::OsStringExt>::from_vec(not_utf8.clone());
    let secret = |text: &str| format!("[DEFAULT]\nmetadata_proxy_shared_secret = {text}\n");
    let sites = [
        Site::new().file("a", secret(&format!("pa${}", SECRET.replace('-', "_")))),
        Site::new().file("a", secret(&format!("{SECRET}$metadata_proxy_shared_secret"))),
        Site::new()
            .file("a", format!("{}nova_metadata_host = $metadata_proxy_shared_secret\n", secret(SECRET))),
        Site::new()
            .file("a", format!("{}x = $metadata_proxy_shared_secret\nauth_ca_cert = /$x\n", secret(SECRET))),
        Site::new().file("a", format!("[DEFAULT]\npassword = {SECRET}\nnova_metadata_host = $password/\n")),
        Site::new().file("a", format!("[METADATA]\nmetadata_proxy_shared_secret = pa${}", SECRET.replace('-', "_"))),
        Site::new().file(
            "a",
            format!("[metadata]\nmetadata_proxy_shared_secret = {SECRET}\n[DEFAULT]\nhost = ${{METADATA.metadata_proxy_shared_secret}}\n"),
        ),
        Site::new().file("a", "[DEFAULT]\npassword = a$hunter2_xyzzy\nnova_metadata_host = $password\n"),
        Site::new().file("a", format!("[DEFAULT]\nmetadata_proxy_shared_secret {SECRET}\n")),
        Site::new().file("a", format!("metadata_proxy_shared_secret = {SECRET}\n")),
        Site::new().file("a", [secret("").as_bytes(), &not_utf8].concat()),
        Site::new().env("METADATA_AGENT_METADATA_PROXY_SHARED_SECRET", os_string),
    ];
    for (number, site) in sites.iter().enumerate() {
        let faults = site.load().unwrap_err();
        let shown = format!("{faults} {faults:?} {faults:#?}");
        assert!(!shown.contains("hunter2"), "case {number}: {shown}");
    }
}

#[test]
fn the_admin_socket_alone_needs_no_files_where_it_is_set_outside_them() {
    let site =
        Site::new().file("a.ini", "[metadata_agent]\nadmin_socket = /a.sock\n[DEFAULT]\ndebug = maybe\n");
    assert_eq!(site.admin_socket().unwrap(), Path::new("/a.sock"), "faults of other options do not matter");
    let site = site.write("a.ini", "broken");
    site.admin_socket().unwrap_err();
    assert_eq!(site.flag("admin_socket", "/b.sock").admin_socket().unwrap(), Path::new("/b.sock"));
}

proptest! {
    #[test]
    fn no_file_makes_it_panic(text in "(\\[DEFAULT\\]|\\[metadata_agent\\])\n((nova_metadata_host|portal_mtu|guest_interfaces|identity_hold)=[ -~\u{e9}]{0,12}\n){0,4}") {
        let _ = Site::new().file("a.ini", text).load();
    }
}

#[test]
fn of_several_hosts_each_is_an_endpoint() {
    let ini = "[DEFAULT]\nnova_metadata_host = nova-1, [fd00::1] ,192.0.2.1\nnova_metadata_port = 80\n";
    let config = Site::new().file("a.ini", ini).load().unwrap();
    assert_eq!(endpoints(&config), ["http://nova-1:80", "http://[fd00::1]:80", "http://192.0.2.1:80"]);
    let faults = Site::new().file("a.ini", "[DEFAULT]\nnova_metadata_host = nova-1,,nova-2\n").faults();
    assert_eq!(faults.len(), 1, "{faults:?}");
}

#[test]
fn of_lists_the_last_counts_but_where_all_do() {
    let site = Site::new().write("one", "1").write("two", "2").write("three", "3");
    let [one, two, three] = ["one", "two", "three"].map(|name| site.path(name));
    let lines = |files: [&str; 2]| {
        let files = files.map(|file| format!("shared_secret_files = {file}\n"));
        format!("[metadata_agent]\n{}guest_interfaces = tap*\n", files.concat())
    };
    let first = lines([&format!("{}, {},", one.display(), two.display()), ""]);
    let site = site.file("a.ini", format!("[x]\ndir = /\n{first}guest_interfaces = eth0,eth1\n"));
    let site = site.file("b.ini", format!("[metadata_agent]\nshared_secret_files = {}\n", three.display()));
    let config = site.load().unwrap();
    assert_eq!(config.shared_secret_files, [one.clone(), two, three]);
    assert_eq!(config.guest_interfaces.len(), 2);
    let (a, b) = (site.path("a.ini"), site.path("b.ini"));
    let origin = config.origin("shared_secret_files").unwrap();
    assert_eq!(origin.to_string(), format!("{0}:4, {0}:5, {1}:2", a.display(), b.display()));
    assert_eq!(config.warnings(), [], "an empty metadata_proxy_shared_secret does not matter then");

    let site = site.env("METADATA_AGENT_SHARED_SECRET_FILES", one.as_os_str());
    assert_eq!(site.load().unwrap().shared_secret_files, [one], "the environment adds nothing, it wins");
}

#[test]
fn a_secret_file_must_hold_a_secret() {
    let site = Site::new().write("empty", "");
    let path = site.path("empty");
    let faults = site.env("METADATA_AGENT_SHARED_SECRET_FILES", path).faults();
    assert!(faults[0].contains("\"/empty\"") && faults[0].contains("it is empty"), "{faults:?}");
}

#[test]
fn the_ovs_agents_group_is_asked_where_default_says_nothing() {
    let ini = format!(
        "[METADATA]\nnova_metadata_host = $region-nova\nregion = eu\nnova_metadata_port = 1\n\
         metadata_proxy_shared_secret = {SECRET}\nprovider_cidr = 240.0.0.0/16\n[DEFAULT]\nnova_metadata_port = 2\n"
    );
    let site = Site::new().file("a.ini", ini);
    let config = site.load().unwrap();
    assert_eq!(endpoints(&config), ["http://eu-nova:2"]);
    assert_eq!(config.metadata_proxy_shared_secret.expose_secret(), SECRET);
    let path = site.path("a.ini").display().to_string();
    let origin = config.origin("nova_metadata_host").unwrap().to_string();
    assert_eq!(origin, format!("{path}:2, [metadata] nova_metadata_host"));
    let notices: Vec<_> = config.notices().iter().map(ToString::to_string).collect();
    assert_eq!(
        notices,
        [format!(
            "[METADATA] provider_cidr ({path}:6) has no effect: guests are told apart by their interface, \
             without addresses of a provider network"
        )]
    );
    let config = site.env("METADATA_AGENT_NOVA_METADATA_HOST", "other").load().unwrap();
    assert_eq!(endpoints(&config), ["http://other:2"]);
}

#[test]
fn haproxys_timeouts_stand_for_ours_unless_ours_are_set() {
    let ini = "[metadata_haproxy]\ntimeout_connect = 30\ntimeout_client = 33\ntimeout_server = 20\n\
               timeout_http_request = 31\ntimeout_http_keep_alive = 34\n";
    let site = Site::new().file("a.ini", ini);
    let config = site.load().unwrap();
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
    let path = site.path("a.ini").display().to_string();
    assert_eq!(
        notice,
        format!(
            "[metadata_haproxy] timeout_server ({path}:4) stands for nova_response_timeout, which becomes 32"
        )
    );
    let ours = "[metadata_agent]\nnova_connect_timeout = 1\nguest_write_timeout = 2\nnova_response_timeout = 40\n\
                request_head_timeout = 3\nkeep_alive_timeout = 4\n";
    let config = site.file("b.ini", ours).load().unwrap();
    assert_eq!((times(&config), config.notices().len()), ([1, 2, 40, 3, 4], 0));
    let faults = Site::new().file("a.ini", "[metadata_haproxy]\ntimeout_client = soon\n").faults();
    assert!(faults[0].starts_with("guest_write_timeout: \"soon\" is not accepted"), "{faults:?}");
}

#[test]
fn what_has_no_effect_is_named_once_where_it_is_set() {
    let ini = "[DEFAULT]\ntransport_url = rabbit://neutron:hunter2-xyzzy@mq\nlog_file = a\nlog_file = b\n\
               rpc_response_max_timeout = 600\nnova_metadata_ip = 10.0.0.1\nmetadata_proxy_user = nobody\n\
               metadata_proxy_socket_mode = group\ncore_plugin = ml2\n\
               [AGENT]\nkill_scripts_path = /x\ncheck_child_processes_interval = 60\nreport_interval = 15\n\
               [cache]\nenabled = true\nbackend = x\n[metadata_rate_limiting]\nrate_limit_enabled = true\n";
    let site = Site::new().file("a.ini", ini);
    let config = site.load().unwrap();
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
    let path = site.path("a.ini").display().to_string();
    assert_eq!(json[2]["origin"], format!("{path}:4"), "the assignment that would win");
    assert_eq!((&json[2]["effect"], &json[6]["effect"]), (&"none".into(), &"replaced".into()));
    let shown = format!("{json} {:?}", config.notices());
    assert!(!shown.contains("hunter2"), "{shown}");
    let off =
        Site::new().file("a.ini", "[metadata_rate_limiting]\nrate_limit_enabled = no\n").load().unwrap();
    assert!(off.notices().is_empty());
}

#[test]
fn a_rate_limit_that_breaks_a_boot_is_told_and_one_that_does_not_is_not() {
    let notices = |limits: &str| {
        let ini = format!("[metadata_rate_limiting]\nrate_limit_enabled = true\n{limits}");
        let config = Site::new().file("a.ini", &ini).load().unwrap();
        config.notices().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    for limits in [
        "",
        "base_query_rate_limit = 100\n",
        "base_query_rate_limit = 27\nburst_query_rate_limit = 28\n",
        "base_query_rate_limit = 28\nburst_query_rate_limit = 27\n",
    ] {
        let told = notices(limits);
        assert!(
            matches!(&told[..], [one] if one.contains("raise base_query_rate_limit")),
            "{limits}: {told:?}"
        );
    }
    assert_eq!(notices("base_query_rate_limit = 28\nburst_query_rate_limit = 28\n"), [""; 0]);
}

#[test]
fn options_of_later_features_are_checked_already() {
    let ini = "[DEFAULT]\nhost = cmp-1\nmetadata_proxy_socket_mode = some\nmetadata_access_mark = 0xg\n\
               [OVN]\novn_sb_connection = ssl:[fd00::1]:6642,tcp:sb:6642\novsdb_probe_interval = -1\n\
               [metadata_rate_limiting]\nip_versions = 4,5\nbase_query_rate_limit = 0\n";
    let site = Site::new().file("a.ini", ini);
    let faults: Vec<_> =
        site.faults().iter().map(|fault| fault.split(':').next().unwrap().to_owned()).collect();
    assert_eq!(
        faults,
        [
            "metadata_proxy_socket_mode",
            "metadata_access_mark",
            "ip_versions",
            "base_query_rate_limit",
            "ovsdb_probe_interval"
        ]
    );
}

#[test]
fn what_haproxies_need_has_an_effect_once_they_are_answered() {
    let ini = "[DEFAULT]\nmetadata_proxy_socket = /a\nmetadata_proxy_socket_mode = all\nmetadata_proxy_user = nobody\n";
    let named = |own: &str| {
        let site = Site::new().file("a.ini", format!("{ini}[metadata_agent]\n{own}\n"));
        site.load().unwrap().notices().iter().map(|notice| notice.name).collect::<Vec<_>>()
    };
    let unserved = ["metadata_proxy_socket", "metadata_proxy_socket_mode", "metadata_proxy_user"];
    assert_eq!(named(""), unserved);
    assert_eq!(named("upstream = ovn-agent"), unserved[1..], "it is where that agent listens");
    assert!(named("serve_metadata_proxy_socket = true").is_empty());
}

#[test]
fn the_agent_cannot_ask_on_the_socket_that_it_serves() {
    let ini = "[DEFAULT]\nmetadata_proxy_socket = /a\n[metadata_agent]\nupstream = neutron-agent\n";
    let forwarding = Site::new().file("a.ini", ini).load().unwrap();
    assert_eq!(forwarding.neutron_agent_socket, Path::new("/a"), "where Neutron's agent listens");
    assert!(forwarding.warnings().is_empty(), "the secret is that agent's affair");
    let both = format!("{ini}serve_metadata_proxy_socket = true\n");
    let faults = Site::new().file("a.ini", &both).faults();
    assert_eq!(faults.len(), 1, "{faults:?}");
    assert!(faults[0].contains("would ask itself"), "{faults:?}");
    let apart = Site::new().file("a.ini", format!("{both}neutron_agent_socket = /b\n"));
    assert_eq!(apart.load().unwrap().neutron_agent_socket, Path::new("/b"));
}
