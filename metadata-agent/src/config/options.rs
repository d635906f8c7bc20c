//! The table of all options. `Config`, the reader, the environment, the flags and the help are made of it.
//!
//! Options in `[metadata_agent]` are ours; all others are Neutron's, with Neutron's names, defaults and meaning
//! (neutron/conf/agent/metadata/config.py and the configuration of the L3, DHCP and OVN agents). What Neutron knows and
//! has no effect here is in [`super::notices`].

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use ovsdb_client::{Host, Remote};
use secrecy::SecretString;

use super::notice::Notice;
use super::raw::DEFAULT;
use super::resolver::Resolver;
use super::rule::{
    AbsolutePath, Added, AnyPath, FileName, Line, ListOf, Mark, Number, NumberOr, OneOf, ReadableFile, Rule,
    Seconds, Secret, SocketPath, Switch, Unset,
};
use super::rules::{HostName, OvsdbServer, Pattern, SecretFile, Web};
use super::setting::Setting;
use super::spec::{Access, OptionSpec, Table};
use super::value::{IpVersion, NeutronAuthType, SocketMode, Upstream};
use crate::admin::logging::LogFormat;
use crate::attach::{LinkKind, SourceCheck};
use crate::datapath::AttachMode;
use crate::net::name_pattern::NamePattern;
use crate::proxy::Scheme;
use crate::sources::neutron::{HttpUrl, NeutronAccess, NeutronInterface};

/// Our own section.
pub const OWN: &str = "metadata_agent";
/// Where the OVS agent's own metadata path has the options that are in `DEFAULT` elsewhere
/// (neutron/conf/plugins/ml2/drivers/ovs_conf.py).
const OVS_AGENT: &str = "metadata";
/// The time-outs of the haproxy that we replace.
const HAPROXY: &str = "metadata_haproxy";
/// The rate limit of the haproxy that we replace.
const RATE: &str = "metadata_rate_limiting";
/// How the agent reports to Neutron.
const AGENT: &str = "agent";
/// The databases of OVN.
const OVN: &str = "ovn";

/// Neutron's section for the Open vSwitch of this host.
const OVS: &str = "ovs";

/// The name in files: the key, unless another section has an option of the same name.
const fn file_name(key: &'static str, written: &[&'static str]) -> &'static str {
    match written {
        [written, ..] => written,
        [] => key,
    }
}

macro_rules! options {
    ($(
        $(#[doc = $doc:literal])+
        $access:ident $group:ident $name:ident $(($written:literal))?: $kind:ty = $default:literal, $rule:expr
            $(, else $other_group:ident $other_name:ident)*;
    )+) => {
        #[expect(non_upper_case_globals, reason = "named as the options are")]
        pub(super) mod spec {
            use super::*;

            $(pub(in super::super) static $name: OptionSpec = OptionSpec {
                group: $group,
                name: file_name(stringify!($name), &[$($written)?]),
                key: stringify!($name),
                fallbacks: &[$(($other_group, stringify!($other_name)),)*],
                default: $default,
                doc: concat!($($doc),+).trim_ascii(),
                access: Access::$access,
                accepts: || Rule::<$kind>::accepts(&$rule),
            };)+
        }

        /// Every option, in the order of the documentation.
        pub static OPTIONS: Table = &[$(&spec::$name,)+];

        /// The value of every option, each checked.
        #[derive(Clone, Debug)]
        pub struct Config {
            $($(#[doc = $doc])+ pub $name: $kind,)+
            pub(super) settings: Vec<Setting>,
            pub(super) notices: Vec<Notice>,
            pub(super) neutron: Option<NeutronAccess>,
        }

        impl Config {
            /// Reads every option, so that the resolver collects the faults of all; `None` if one has a fault.
            pub(super) fn read(resolver: &mut Resolver<'_>) -> Option<Self> {
                $(let $name: Option<$kind> = resolver.read(&spec::$name, &$rule);)+
                let settings = resolver.take_settings();
                Some(Self { $($name: $name?,)+ settings, notices: Vec::new(), neutron: None })
            }
        }
    };
}

// Access, section, key ("name in files", if it differs): type = default, rule, else section name;
options! {
    /// Host of Nova's metadata service. Of several, separated by commas, the first that can be reached is used until it
    /// cannot. An IPv6 address may stand in brackets.
    Flag DEFAULT nova_metadata_host: Vec<Host> = "127.0.0.1", ListOf(HostName),
        else OVS_AGENT nova_metadata_host;
    /// TCP port of Nova's metadata service.
    Flag DEFAULT nova_metadata_port: u16 = "8775", Number(1..=65535),
        else OVS_AGENT nova_metadata_port;
    /// Whether Nova's metadata service is spoken to over TLS.
    Flag DEFAULT nova_metadata_protocol: Scheme = "http", OneOf,
        else OVS_AGENT nova_metadata_protocol;
    /// Whether to accept any certificate of Nova's metadata service. Whoever can pose as Nova then learns and
    /// forges the guests' metadata.
    File DEFAULT nova_metadata_insecure: bool = "false", Switch,
        else OVS_AGENT nova_metadata_insecure;
    /// Certificates of the authorities that may sign Nova's certificate, PEM.
    File DEFAULT auth_ca_cert: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "the system's own" },
        else OVS_AGENT auth_ca_cert;
    /// Our certificate for Nova's metadata service, PEM. Needs nova_client_priv_key.
    File DEFAULT nova_client_cert: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "none" },
        else OVS_AGENT nova_client_cert;
    /// The private key of nova_client_cert, PEM.
    File DEFAULT nova_client_priv_key: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "none" },
        else OVS_AGENT nova_client_priv_key;
    /// The secret that signs instance ids; the same as metadata_proxy_shared_secret in Nova's section neutron. In a
    /// file a dollar sign is written `$$`. There is no flag for it: the process list would show it.
    Secret DEFAULT metadata_proxy_shared_secret: SecretString = "", Secret,
        else OVS_AGENT metadata_proxy_shared_secret;
    /// Threads that serve guests.
    File DEFAULT metadata_workers: Option<NonZero<u32>> = "0",
        NumberOr { max: 1024, zero: "as many as there are processors" };
    /// Connections that may wait to be accepted. The kernel caps it at net.core.somaxconn.
    File DEFAULT metadata_backlog: i32 = "4096", Number(1..=i32::MAX);
    /// Whether to log at level debug. RUST_LOG, where set, decides instead.
    Toggle DEFAULT debug: bool = "false", Switch;
    /// The name under which Neutron knows this host.
    File DEFAULT host: Option<String> = "", Unset { or: FileName, meaning: "the system's own" };
    /// The unix socket on which haproxy reaches Neutron's metadata agent, or us with serve_metadata_proxy_socket.
    File DEFAULT metadata_proxy_socket: PathBuf = "$state_path/metadata_proxy", SocketPath;
    /// Who may use metadata_proxy_socket while we serve it: our user (mode 0644), our user and group (0664), everybody
    /// (0666), or deduce: our user if metadata_proxy_user is root or ours, our group if metadata_proxy_group is ours, else
    /// everybody. Whoever may use it can read the metadata of any guest.
    File DEFAULT metadata_proxy_socket_mode: SocketMode = "deduce", OneOf;
    /// The user, by name or number, as whom haproxies run. Only metadata_proxy_socket_mode asks.
    File DEFAULT metadata_proxy_user: Option<String> = "", Unset { or: FileName, meaning: "that of the agents that start them" };
    /// The group, by name or number, as which haproxies run. Only metadata_proxy_socket_mode asks.
    File DEFAULT metadata_proxy_group: Option<String> = "", Unset { or: FileName, meaning: "that of the agents that start them" };
    /// The L3 agent's: the port to which a router redirects metadata requests.
    File DEFAULT metadata_port: u16 = "9697", Number(1..=65535);
    /// The L3 agent's: whether routers redirect metadata requests.
    File DEFAULT enable_metadata_proxy: bool = "true", Switch;
    /// The L3 agent's: the mark by which a router knows a redirected packet.
    File DEFAULT metadata_access_mark: u32 = "0x1", Mark;
    /// The DHCP agent's: whether it serves metadata on networks without a router.
    File DEFAULT enable_isolated_metadata: bool = "false", Switch;
    /// The DHCP agent's: whether it serves metadata on every network.
    File DEFAULT force_metadata: bool = "false", Switch;
    /// The DHCP agent's: whether it serves metadata by a network of its own.
    File DEFAULT enable_metadata_network: bool = "false", Switch;

    /// The database of this host's Open vSwitch, from which ports and instances are learnt.
    File OVS ovsdb_connection: Option<Remote> = "", Unset { or: OvsdbServer, meaning: "the first of the usual sockets that is there" };
    /// How long it may take to connect to that database and read it.
    File OVS ovsdb_connection_timeout: Duration = "180", Seconds(1.0..=3600.0);
    /// Our private key for ssl: in ovsdb_connection, PEM. This and the two below are read at each connection.
    File OVS ovs_ssl_key_file ("ssl_key_file"): Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Our certificate for ssl: in ovsdb_connection, PEM.
    File OVS ovs_ssl_cert_file ("ssl_cert_file"): Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Certificates of the authorities that may sign the certificate of that server, PEM. The name in it does not matter,
    /// as it does not to Open vSwitch's own clients.
    File OVS ovs_ssl_ca_cert_file ("ssl_ca_cert_file"): Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };

    /// Seconds between two reports to Neutron.
    File AGENT report_interval: Duration = "30", Seconds(0.0..=86_400.0);
    /// Whether each report to Neutron is logged.
    File AGENT log_agent_heartbeats: bool = "false", Switch;

    /// Whether guests' requests are limited: those of each port, in two windows that hold at once. What is too much is
    /// answered with 429, and does not count; cloud-init's first question with 503.
    File RATE rate_limit_enabled: bool = "false", Switch;
    /// Of which IP versions requests are limited. If both are named, they are counted together.
    File RATE rate_limit_ip_versions ("ip_versions"): Vec<IpVersion> = "4", ListOf(OneOf);
    /// Seconds of the base window.
    File RATE rate_limit_base_window ("base_window_duration"): u32 = "10", Number(1..=86_400);
    /// Requests that each port may make in the base window. One boot of cloud-init makes some 28.
    File RATE rate_limit_base_requests ("base_query_rate_limit"): u32 = "10", Number(1..=1_000_000);
    /// Seconds of the burst window.
    File RATE rate_limit_burst_window ("burst_window_duration"): u32 = "10", Number(1..=86_400);
    /// Requests that each port may make in the burst window.
    File RATE rate_limit_burst_requests ("burst_query_rate_limit"): u32 = "10", Number(1..=1_000_000);

    /// Servers of OVN's Southbound database, from which ports and instances are learnt; of a cluster, its members. Where
    /// nobody sets it, no Southbound database is asked: at Neutron's default address most hosts have nothing.
    File OVN ovn_sb_connection: Vec<Remote> = "tcp:127.0.0.1:6642", ListOf(OvsdbServer);
    /// Our private key for ssl: in ovn_sb_connection, PEM. This and the two below are read at each connection.
    File OVN ovn_sb_private_key: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Our certificate for ssl: in ovn_sb_connection, PEM.
    File OVN ovn_sb_certificate: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Certificates of the authorities that may sign the servers' certificates, PEM. The names in those do not matter, as
    /// they do not to OVN's own clients.
    File OVN ovn_sb_ca_cert: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// How long it may take to connect to a server and read the rows of this host's ports.
    File OVN ovn_ovsdb_connection_timeout ("ovsdb_connection_timeout"): Duration = "180", Seconds(1.0..=3600.0);
    /// The longest pause after no server could be reached. Above 8 seconds it has no effect: guests wait for it.
    File OVN ovn_ovsdb_retry_max_interval ("ovsdb_retry_max_interval"): Duration = "180", Seconds(1.0..=3600.0);
    /// Milliseconds of silence after which a server is asked whether it is there, and after as many more given up; 0 for
    /// never.
    File OVN ovn_ovsdb_probe_interval ("ovsdb_probe_interval"): u32 = "60000", Number(0..=86_400_000);
    /// Whether Neutron makes a metadata port in each network.
    File OVN ovn_metadata_enabled: bool = "false", Switch;

    /// Who is asked for metadata: Nova, or the metadata agent that Neutron still runs on this host. That one is told what its
    /// haproxies would tell it, the network and the address of the guest, and asks Nova in turn; so only haproxy goes
    /// away. `neutron-agent` is the one beside the L3 and DHCP agents, `ovn-agent` OVN's. The options of Nova and the shared
    /// secret have no effect then, but for the time-outs.
    File OWN upstream: Upstream = "nova", OneOf;
    /// The unix socket of the metadata agent of `upstream`.
    File OWN neutron_agent_socket: PathBuf = "$metadata_proxy_socket", SocketPath;
    /// Requests that may wait for that agent's answer at once; others wait nova_connect_timeout for their turn, and get 503
    /// after that. Its accept queue holds five connections, and it may work on one alone.
    File OWN neutron_agent_requests: usize = "6", Number(1..=1024);
    /// Whether haproxies that still run are answered by us, on metadata_proxy_socket, where Neutron's metadata agent must not
    /// run any more. They say whose request it is, and whoever may use the socket is believed.
    Flag OWN serve_metadata_proxy_socket: bool = "false", Switch;
    /// Files with further shared secrets, one each; the line end behind it does not count. A Nova that refuses
    /// metadata_proxy_shared_secret is asked again with these. A changed file is noticed without a restart; replace it by
    /// renaming, so that it is never seen half-written. Given several times, all count.
    File OWN shared_secret_files: Vec<PathBuf> = "", Added(SecretFile);
    /// A file that names ports, for clouds and tests without another source.
    Flag OWN static_inventory: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Where libvirt keeps the state of running domains, from which ports, instances and projects are learnt.
    Flag OWN libvirt_dir: Option<PathBuf> = "/run/libvirt/qemu", Unset { or: AbsolutePath, meaning: "no libvirt" };
    /// Where Keystone is, such as https://controller:5000/v3: by it Neutron's API is found and asked about ports that no
    /// local source knows. Without it Neutron is not asked.
    File OWN neutron_auth_url: Option<HttpUrl> = "", Unset { or: Web, meaning: "not to ask Neutron" };
    /// What Keystone is shown: name and password of a user, an application credential, or nothing at all, for a Neutron
    /// without Keystone at neutron_endpoint_override. Either needs the role admin or service: to others Neutron does not
    /// tell on which host a port is.
    File OWN neutron_auth_type: NeutronAuthType = "password", OneOf;
    /// The user.
    File OWN neutron_username: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The user's password. In a file a dollar sign is written `$$`.
    Secret OWN neutron_password: SecretString = "", Secret;
    /// The name of the user's domain.
    File OWN neutron_user_domain_name: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The id of the user's domain. It wins over the name.
    File OWN neutron_user_domain_id: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The project in which the user has the role.
    File OWN neutron_project_name: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The name of the project's domain.
    File OWN neutron_project_domain_name: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The id of the project's domain. It wins over the name.
    File OWN neutron_project_domain_id: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The id of the application credential.
    File OWN neutron_application_credential_id: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// The secret of the application credential. In a file a dollar sign is written `$$`.
    Secret OWN neutron_application_credential_secret: SecretString = "", Secret;
    /// The region of Keystone's catalogue in which Neutron is looked for.
    File OWN neutron_region_name: Option<String> = "", Unset { or: Line, meaning: "the only one" };
    /// Which of Neutron's interfaces in Keystone's catalogue is used.
    File OWN neutron_interface: NeutronInterface = "internal", OneOf;
    /// Where Neutron is, such as https://controller:9696, in place of what Keystone's catalogue says.
    File OWN neutron_endpoint_override: Option<HttpUrl> = "", Unset { or: Web, meaning: "as the catalogue says" };
    /// Certificates of the authorities that may sign Keystone's and Neutron's certificates, PEM.
    File OWN neutron_cafile: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "the system's own" };
    /// Whether to accept any certificate of Keystone and Neutron. Whoever can pose as them then learns the password and
    /// decides which guest is which.
    File OWN neutron_insecure: bool = "false", Switch;
    /// How long Keystone and Neutron may take to answer.
    File OWN neutron_timeout: Duration = "20", Seconds(1.0..=600.0);
    /// Which interfaces may face guests, by name.
    Flag OWN guest_interfaces: Vec<NamePattern> = "tap*", ListOf(Pattern);
    /// Which interfaces may face guests, by kind.
    Flag OWN guest_link_kinds: Vec<LinkKind> = "tun", ListOf(OneOf);
    /// Network namespaces of routers and DHCP servers, under /run/netns, whose guests are served there: those whose names fit
    /// a pattern and are `qrouter-` or `qdhcp-` with an id, such as `qrouter-*,qdhcp-*`. In a router the program is on its
    /// interfaces `qr-*`, beside a DHCP server on `tap*`; who asks is told by the network or router and the guest's address.
    /// Empty for none.
    Flag OWN namespaces: Option<Vec<NamePattern>> = "", Unset { or: ListOf(Pattern), meaning: "none" };
    /// Whether packets for the metadata service are dropped in a router of `namespaces` where neither we serve nor a process
    /// listens on metadata_port: they would leave by the external gateway.
    File OWN confine_routers: bool = "true", Switch;
    /// How programs are attached: TCX (Linux 6.6), clsact, or TCX where there is TCX.
    Flag OWN attach_mode: AttachMode = "auto", OneOf;
    /// What of a guest packet's source must be its port's: MAC and IPv4 address, MAC address alone, nothing.
    Flag OWN source_check: SourceCheck = "strict", OneOf;
    /// Name of the network namespace in which guest connections end, under /run/netns.
    Flag OWN portal_namespace: String = "metadata-portal", FileName;
    /// MTU of the portal's interfaces, and so the limit of what guests are told to send.
    File OWN portal_mtu: u16 = "1500", Number(1280..=65535);
    /// Directory on a BPF file system for pinned links and maps.
    Flag OWN bpffs_dir: PathBuf = "/sys/fs/bpf/metadata-agent", AbsolutePath;
    /// Unix socket for health, metrics and state.
    Flag OWN admin_socket: PathBuf = "/run/metadata-agent/admin.sock", SocketPath;
    /// New connections that each port may open per second.
    File OWN syn_rate_limit: Option<NonZero<u32>> = "2000", NumberOr { max: 1_000_000, zero: "no limit" };
    /// New connections that each port may open at once before syn_rate_limit holds it back.
    File OWN syn_burst: u32 = "4000", Number(1..=1_000_000);
    /// Connections that each port may hold open. What is more is closed.
    File OWN connections_per_port: u32 = "128", Number(1..=65_536);
    /// Connections that all ports may hold open together. The first four of each port do not count, so that nobody
    /// can keep another one out; and the fewer are left, the fewer more a single port may take.
    File OWN connections: u32 = "16384", Number(0..=1_000_000);
    /// Age of the agent's last sign of life at which the programs leave guests to the host's own path.
    File OWN heartbeat_stale_after: Duration = "2.0", Seconds(0.5..=60.0);
    /// How long a request waits for its port's identity before it is answered with 503.
    File OWN identity_hold: Duration = "5", Seconds(0.0..=60.0);
    /// How long after a port appeared its unknown identity is answered with 503 and not with 404.
    File OWN identity_grace: Duration = "120", Seconds(0.0..=3600.0);
    /// Bytes of a guest's request line and headers; more is answered with 431.
    File OWN request_head_limit: usize = "32768", Number(16_384..=1_048_576);
    /// Bytes of a guest's request body; more is answered with 413.
    File OWN request_body_limit: usize = "65536", Number(1024..=16_777_216);
    /// How long a guest may take for a request's headers.
    File OWN request_head_timeout: Duration = "30", Seconds(1.0..=600.0),
        else HAPROXY timeout_http_request;
    /// How long a guest's connection may be idle between requests.
    File OWN keep_alive_timeout: Duration = "30", Seconds(1.0..=600.0),
        else HAPROXY timeout_http_keep_alive;
    /// How long a guest may leave its answer unread.
    File OWN guest_write_timeout: Duration = "32", Seconds(1.0..=600.0),
        else HAPROXY timeout_client;
    /// How long connecting to Nova may take.
    File OWN nova_connect_timeout: Duration = "5", Seconds(0.1..=60.0),
        else HAPROXY timeout_connect;
    /// How long Nova may take to answer. Dynamic vendor data makes it slow, hence the lower bound.
    File OWN nova_response_timeout: Duration = "60", Seconds(32.0..=600.0),
        else HAPROXY timeout_server;
    /// How long requests in flight may take to end after the agent was told to stop.
    File OWN drain_timeout: Duration = "10", Seconds(0.0..=600.0);
    /// What log lines look like.
    Flag OWN log_format: LogFormat = "text", OneOf;
}

#[cfg(test)]
mod tests {
    use super::super::spec::{find, is_secret};
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn keys_are_unique_across_groups_because_the_environment_has_no_groups() {
        let names: HashSet<_> = OPTIONS.iter().map(|spec| spec.env()).collect();
        assert_eq!(names.len(), OPTIONS.len());
    }

    #[test]
    fn every_option_has_a_sentence_of_documentation() {
        for spec in OPTIONS {
            assert!(spec.doc.ends_with('.') && !spec.doc.starts_with(' '), "{}: {:?}", spec.name, spec.doc);
        }
    }

    #[test]
    fn a_place_in_a_file_means_one_option() {
        let mut places = HashSet::new();
        for spec in OPTIONS {
            for place in spec.places() {
                assert!(places.insert(place), "{place:?}");
                assert!(place.0 == DEFAULT || place.0 == place.0.to_lowercase(), "{place:?}");
            }
        }
        let probe = find(OPTIONS, "ovn", "ovsdb_probe_interval").unwrap();
        assert_eq!(probe.env(), "METADATA_AGENT_OVN_OVSDB_PROBE_INTERVAL");
    }

    #[test]
    fn the_secret_is_one_in_each_of_its_places() {
        assert!(is_secret(OPTIONS, DEFAULT, "metadata_proxy_shared_secret"));
        assert!(is_secret(OPTIONS, "metadata", "metadata_proxy_shared_secret"));
        assert!(!is_secret(OPTIONS, DEFAULT, "nova_metadata_host"));
    }

    #[test]
    fn the_secret_has_no_flag() {
        let secret = find(OPTIONS, DEFAULT, "metadata_proxy_shared_secret").unwrap();
        assert!(secret.is_secret());
        assert_eq!(secret.flag(), None);
        assert_eq!(secret.env(), "METADATA_AGENT_METADATA_PROXY_SHARED_SECRET");
    }
}
