use std::fs;
use std::num::NonZero;
use std::time::Duration;

use proptest::prelude::*;
use secrecy::ExposeSecret;
use tempfile::TempDir;

use super::*;

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

#[test]
fn nothing_given_means_the_defaults() {
    let config = Site::new().load().unwrap();
    assert_eq!(config.nova_endpoint().to_string(), "http://127.0.0.1:8775");
    assert_eq!(config.client_identity(), None);
    assert_eq!((config.metadata_workers, config.metadata_backlog, config.debug), (None, 4096, false));
    assert_eq!(config.libvirt_dir.as_deref(), Some(Path::new("/run/libvirt/qemu")));
    assert_eq!(config.static_inventory, None);
    assert!(config.guest_interfaces.iter().any(|pattern| pattern.matches("tap3f2a9d10-77")));
    assert_eq!(config.guest_link_kinds, [LinkKind::Tun]);
    assert_eq!((config.attach_mode, config.source_check), (AttachMode::Auto, SourceCheck::Strict));
    assert_eq!((config.portal_namespace.as_str(), config.portal_mtu), ("metadata-portal", 1500));
    assert_eq!((config.syn_rate_limit, config.syn_burst), (NonZero::new(2000), 4000));
    assert_eq!((config.request_head_limit, config.request_body_limit), (32768, 65536));
    let times =
        [config.heartbeat_stale_after, config.identity_hold, config.identity_grace, config.drain_timeout];
    assert_eq!(times, [2, 5, 120, 10].map(Duration::from_secs));
    assert_eq!(config.nova_response_timeout, Duration::from_mins(1));
    assert_eq!(config.admin_socket, Path::new("/run/metadata-agent/admin.sock"));
    assert_eq!(config.settings().len(), OPTIONS.len());
    assert!(config.settings().iter().all(|setting| setting.origin == Origin::Default));
    assert_eq!(config.warnings(), [ConfigWarning::EmptySecret]);
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
    for spec in OPTIONS {
        let site = Site::new().env(&spec.env(), spec.default);
        let config = site.load().unwrap_or_else(|faults| panic!("{}: {faults}", spec.name));
        assert_eq!(config.origin(spec.name), Some(&Origin::Env { var: spec.env() }), "{}", spec.name);
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
            "nova_metadata_host: \"http://nova\" is not accepted (/a.ini:2); accepted is a host name, an IPv4 address or an IPv6 address",
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
    assert_eq!(config.client_identity(), Some(ClientIdentity { certificate: &crt, private_key: &key }));
    assert!(config.warnings().contains(&ConfigWarning::TlsUnused));
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
