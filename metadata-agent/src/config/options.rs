//! The table of all options. [`Config`], the reader, the environment, the flags, `--help`, the
//! sample file and the reference page are made from it.
//!
//! Options in `[metadata_agent]` are the agent's own. All others are Neutron's, with Neutron's
//! names, defaults and meaning (neutron/conf/agent/metadata/config.py and the configuration of the
//! L3, DHCP and OVN agents). [`super::notices`] lists Neutron's options that have no effect here.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use oslo_config::rule::{
    AbsolutePath, Added, AnyPath, FileName, Line, ListOf, Mark, Number, NumberOr, OneOf, ReadableFile,
    Seconds, Secret, SocketPath, Switch, Unset,
};
use oslo_config::{Access, DEFAULT, OptionSpec, Resolver, Rule, Setting, Table};
use ovsdb_client::{Host, Remote};
use secrecy::SecretString;

use super::notices::Notice;
use super::rules::{HostName, OvsdbServer, Pattern, SecretFile, Web};
use super::value::{IpVersion, NeutronAuthType, SocketMode, UpstreamKind};
use crate::admin::logging::LogFormat;
use crate::attach::{LinkKind, SourceCheck};
use crate::datapath::AttachMode;
use crate::net::name_pattern::NamePattern;
use crate::proxy::Scheme;
use crate::sources::neutron::{HttpUrl, NeutronAccess, NeutronInterface};

/// The agent's own section.
pub const OWN: &str = "metadata_agent";
/// Section of the OVS agent's own metadata path. It has some options that others have in `DEFAULT`
/// (neutron/conf/plugins/ml2/drivers/ovs_conf.py).
const OVS_AGENT: &str = "metadata";
/// Timeouts of Neutron's haproxy.
const HAPROXY: &str = "metadata_haproxy";
/// Rate limit of Neutron's haproxy.
const RATE: &str = "metadata_rate_limiting";
/// Reports to Neutron.
const AGENT: &str = "agent";
const OVN: &str = "ovn";
const OVS: &str = "ovs";

/// Start of the name of every environment variable.
const ENV_PREFIX: &str = "METADATA_AGENT_";

/// Returns the name in files: the key, unless another section has an option of the same name.
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
                env_prefix: ENV_PREFIX,
                fallbacks: &[$(($other_group, stringify!($other_name)),)*],
                default: $default,
                doc: concat!($($doc),+).trim_ascii(),
                access: Access::$access,
                accepts: || Rule::<$kind>::accepts(&$rule),
            };)+
        }

        /// Every option, in the order of the documentation.
        pub static OPTIONS: Table = &[$(&spec::$name,)+];

        /// The valid value of every option.
        #[derive(Clone, Debug)]
        #[expect(dead_code, reason = "a notice shows some options of Neutron, and nothing else uses them")]
        pub struct Config {
            $($(#[doc = $doc])+ pub(crate) $name: $kind,)+
            pub(super) settings: Vec<Setting>,
            pub(super) notices: Vec<Notice>,
            pub(super) neutron: Option<NeutronAccess>,
        }

        impl Config {
            /// Reads every option, so that the resolver collects the errors of all. Returns `None`
            /// if one has an error.
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
    /// Host of Nova's metadata API. Of several hosts, separated by commas, the agent uses the first
    /// that it can reach, until it cannot reach it any more. An IPv6 address may be in brackets.
    Flag DEFAULT nova_metadata_host: Vec<Host> = "127.0.0.1", ListOf(HostName),
        else OVS_AGENT nova_metadata_host;
    /// TCP port of Nova's metadata API.
    Flag DEFAULT nova_metadata_port: u16 = "8775", Number(1..=65535),
        else OVS_AGENT nova_metadata_port;
    /// Protocol of Nova's metadata API: plain HTTP, or HTTP over TLS.
    Flag DEFAULT nova_metadata_protocol: Scheme = "http", OneOf,
        else OVS_AGENT nova_metadata_protocol;
    /// Accept any certificate from Nova's metadata API. An attacker who can impersonate Nova can
    /// then read and forge the metadata of guests.
    File DEFAULT nova_metadata_insecure: bool = "false", Switch,
        else OVS_AGENT nova_metadata_insecure;
    /// PEM file of certificate authorities that may sign Nova's certificate, or that certificate
    /// itself. A replaced file applies to new connections within a second.
    File DEFAULT auth_ca_cert: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "the system's own" },
        else OVS_AGENT auth_ca_cert;
    /// PEM file of the agent's client certificate for Nova's metadata API. Needs
    /// nova_client_priv_key.
    File DEFAULT nova_client_cert: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "none" },
        else OVS_AGENT nova_client_cert;
    /// PEM file of the private key of nova_client_cert.
    File DEFAULT nova_client_priv_key: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "none" },
        else OVS_AGENT nova_client_priv_key;
    /// Secret that signs instance ids. It must equal metadata_proxy_shared_secret in section
    /// neutron of Nova's configuration. In a file, write a dollar sign as `$$`. There is no flag,
    /// because the process list would show it. SIGHUP applies a change in a file.
    Secret DEFAULT metadata_proxy_shared_secret: SecretString = "", Secret,
        else OVS_AGENT metadata_proxy_shared_secret;
    /// Number of threads that serve guests.
    File DEFAULT metadata_workers: Option<NonZero<u32>> = "0",
        NumberOr { max: 1024, zero: "as many as there are processors" };
    /// Number of connections that may wait to be accepted. The kernel limits it to
    /// net.core.somaxconn.
    File DEFAULT metadata_backlog: i32 = "4096", Number(1..=i32::MAX);
    /// Log at level debug. RUST_LOG overrides this option. SIGHUP applies a change.
    Toggle DEFAULT debug: bool = "false", Switch;
    /// Name of this host in Neutron.
    File DEFAULT host: Option<String> = "", Unset { or: FileName, meaning: "the system's own" };
    /// Unix socket on which haproxy reaches Neutron's metadata agent, or this agent with
    /// serve_metadata_proxy_socket.
    File DEFAULT metadata_proxy_socket: PathBuf = "$state_path/metadata_proxy", SocketPath;
    /// Access to metadata_proxy_socket while this agent serves it: `user` (mode 0644) for the
    /// agent's user, `group` (0664) for its user and for metadata_proxy_group or its own group,
    /// `all` (0666) for every user. `deduce` permits root, the agent's user and
    /// metadata_proxy_user. The agent checks the user of each connection, because the mode of the
    /// file must be 0666 if metadata_proxy_user is another user and the agent is not in
    /// metadata_proxy_group. A user with access can read the metadata of any guest.
    File DEFAULT metadata_proxy_socket_mode: SocketMode = "deduce", OneOf;
    /// User of the haproxy processes, by name or number. Only metadata_proxy_socket_mode uses it.
    /// Neutron's agents start them as their own user unless this option is set. In a container
    /// that does not know the user `neutron`, set the number.
    File DEFAULT metadata_proxy_user: Option<String> = "", Unset { or: FileName, meaning: "neutron, if it exists, and the agent's own" };
    /// Group of the haproxy processes, by name or number. The agent gives it metadata_proxy_socket
    /// if metadata_proxy_socket_mode is `group` or `deduce`, and must be in it itself
    /// (SupplementaryGroups= in a drop-in of the systemd unit).
    File DEFAULT metadata_proxy_group: Option<String> = "", Unset { or: FileName, meaning: "not known" };
    /// Option of the L3 agent: port to which a router redirects metadata requests.
    File DEFAULT metadata_port: u16 = "9697", Number(1..=65535);
    /// Option of the L3 agent: routers redirect metadata requests.
    File DEFAULT enable_metadata_proxy: bool = "true", Switch;
    /// Option of the L3 agent: packet mark of redirected metadata requests.
    File DEFAULT metadata_access_mark: u32 = "0x1", Mark;
    /// Option of the DHCP agent: it serves metadata on networks without a router.
    File DEFAULT enable_isolated_metadata: bool = "false", Switch;
    /// Option of the DHCP agent: it serves metadata on every network.
    File DEFAULT force_metadata: bool = "false", Switch;
    /// Option of the DHCP agent: it serves metadata through a separate network.
    File DEFAULT enable_metadata_network: bool = "false", Switch;

    /// OVSDB server of the Open vSwitch on this host. It is a source of ports and instances.
    File OVS ovsdb_connection: Option<Remote> = "", Unset { or: OvsdbServer, meaning: "the first of the usual sockets that is there" };
    /// Time limit for connecting to that server and reading its database.
    File OVS ovsdb_connection_timeout: Duration = "180", Seconds(1.0..=3600.0);
    /// PEM file of the agent's private key for an ssl: ovsdb_connection. This file and the two
    /// below are read again for each connection.
    File OVS ovs_ssl_key_file ("ssl_key_file"): Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// PEM file of the agent's certificate for an ssl: ovsdb_connection.
    File OVS ovs_ssl_cert_file ("ssl_cert_file"): Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// PEM file of certificate authorities that may sign that server's certificate. The name in the
    /// certificate is not checked, as in Open vSwitch's own clients.
    File OVS ovs_ssl_ca_cert_file ("ssl_ca_cert_file"): Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };

    /// Seconds between two reports to Neutron.
    File AGENT report_interval: Duration = "30", Seconds(0.0..=86_400.0);
    /// Log each report to Neutron.
    File AGENT log_agent_heartbeats: bool = "false", Switch;

    /// Limit the requests of guests. Two windows per guest apply at the same time. All ports of an
    /// instance count together. Guests that share an interface also share windows of 256 times the
    /// size. Requests over the limit get status 429 and do not count. The first request of
    /// cloud-init gets 503 instead.
    File RATE rate_limit_enabled: bool = "false", Switch;
    /// IP versions whose requests are limited. If both are named, their requests are counted
    /// together.
    File RATE rate_limit_ip_versions ("ip_versions"): Vec<IpVersion> = "4", ListOf(OneOf);
    /// Length of the base window in seconds.
    File RATE rate_limit_base_window ("base_window_duration"): u32 = "10", Number(1..=86_400);
    /// Requests per guest in the base window. One boot of cloud-init sends about 28.
    File RATE rate_limit_base_requests ("base_query_rate_limit"): u32 = "10", Number(1..=1_000_000);
    /// Length of the burst window in seconds.
    File RATE rate_limit_burst_window ("burst_window_duration"): u32 = "10", Number(1..=86_400);
    /// Requests per guest in the burst window.
    File RATE rate_limit_burst_requests ("burst_query_rate_limit"): u32 = "10", Number(1..=1_000_000);

    /// Servers of OVN's Southbound database: the members of the cluster. It is a source of ports
    /// and instances. Unless this option is set, the agent uses no Southbound database: on most
    /// hosts there is none at Neutron's default address.
    File OVN ovn_sb_connection: Vec<Remote> = "tcp:127.0.0.1:6642", ListOf(OvsdbServer);
    /// PEM file of the agent's private key for ssl: servers in ovn_sb_connection. This file and the
    /// two below are read again for each connection.
    File OVN ovn_sb_private_key: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// PEM file of the agent's certificate for ssl: servers in ovn_sb_connection.
    File OVN ovn_sb_certificate: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// PEM file of certificate authorities that may sign the certificates of those servers. The
    /// names in the certificates are not checked, as in OVN's own clients.
    File OVN ovn_sb_ca_cert: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Time limit for connecting to a server and reading the rows of this host's ports.
    File OVN ovn_ovsdb_connection_timeout ("ovsdb_connection_timeout"): Duration = "180", Seconds(1.0..=3600.0);
    /// Longest pause after no server could be reached. Values above 8 seconds have no effect,
    /// because guests wait for the connection.
    File OVN ovn_ovsdb_retry_max_interval ("ovsdb_retry_max_interval"): Duration = "180", Seconds(1.0..=3600.0);
    /// Milliseconds of silence after which the agent probes a server. After the same time again
    /// without an answer it closes the connection. 0 turns probes off.
    File OVN ovn_ovsdb_probe_interval ("ovsdb_probe_interval"): u32 = "60000", Number(0..=86_400_000);
    /// Neutron creates a metadata port in each network.
    File OVN ovn_metadata_enabled: bool = "false", Switch;

    /// Service that answers metadata requests: Nova (`nova`), or the metadata agent that Neutron
    /// still runs on this host (`neutron-agent` beside the L3 and DHCP agents, `ovn-agent` for
    /// OVN). The agent sends to Neutron's agent what its haproxy would send: the network and an
    /// address of the port, which is never one that the guest chose. Neutron's agent then sends the
    /// request to Nova, so this mode replaces haproxy only. The options of Nova and the shared
    /// secret have no effect then, except the timeouts.
    File OWN upstream: UpstreamKind = "nova", OneOf;
    /// Unix socket of the metadata agent that `upstream` names.
    File OWN neutron_agent_socket: PathBuf = "$metadata_proxy_socket", SocketPath;
    /// Limit of concurrent requests to that agent. More requests wait up to nova_connect_timeout
    /// and then get status 503; the guests take turns. The accept queue of that agent holds five
    /// connections, and it may handle one request at a time.
    File OWN neutron_agent_requests: usize = "6", Number(1..=1024);
    /// Serve haproxy processes on metadata_proxy_socket. Neutron's metadata agent must not run
    /// then. The headers of haproxy name the guest, and the agent trusts every user that can use
    /// the socket.
    Flag OWN serve_metadata_proxy_socket: bool = "false", Switch;
    /// Files with more shared secrets, one secret per file. A line end after the secret is ignored.
    /// If Nova rejects metadata_proxy_shared_secret, the agent repeats the request with these
    /// secrets. It notices a changed file without a restart. Replace a file by renaming, so that it
    /// is never read half-written. If the option is set several times, all files count.
    File OWN shared_secret_files: Vec<PathBuf> = "", Added(SecretFile);
    /// File that lists ports, for clouds and tests without another source.
    Flag OWN static_inventory: Option<PathBuf> = "", Unset { or: AnyPath, meaning: "none" };
    /// Directory in which libvirt keeps the state of running domains. It is a source of ports,
    /// instances and projects. If the default directory does not exist, there is no such source
    /// until it appears.
    Flag OWN libvirt_dir: Option<PathBuf> = "/run/libvirt/qemu", Unset { or: AbsolutePath, meaning: "no libvirt" };
    /// URL of Keystone, such as https://controller:5000/v3. Keystone's catalog names Neutron's API,
    /// which the agent queries about ports that no local source knows. Without this URL the agent
    /// does not query Neutron, unless neutron_auth_type is none.
    File OWN neutron_auth_url: Option<HttpUrl> = "", Unset { or: Web, meaning: "not to ask Neutron" };
    /// Type of the credentials for Keystone: name and password of a user, an application
    /// credential, or none for a Neutron without Keystone at neutron_endpoint_override. Credentials
    /// need the role admin or service, because Neutron shows the host of a port only to these
    /// roles.
    File OWN neutron_auth_type: NeutronAuthType = "password", OneOf;
    /// Name of the user.
    File OWN neutron_username: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Password of the user. In a file, write a dollar sign as `$$`.
    Secret OWN neutron_password: SecretString = "", Secret;
    /// Name of the user's domain.
    File OWN neutron_user_domain_name: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Id of the user's domain. It overrides the name.
    File OWN neutron_user_domain_id: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Project in which the user has the role.
    File OWN neutron_project_name: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Name of the project's domain.
    File OWN neutron_project_domain_name: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Id of the project's domain. It overrides the name.
    File OWN neutron_project_domain_id: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Id of the application credential.
    File OWN neutron_application_credential_id: Option<String> = "", Unset { or: Line, meaning: "none" };
    /// Secret of the application credential. In a file, write a dollar sign as `$$`.
    Secret OWN neutron_application_credential_secret: SecretString = "", Secret;
    /// Region of Neutron in Keystone's catalog.
    File OWN neutron_region_name: Option<String> = "", Unset { or: Line, meaning: "the only one" };
    /// Interface of Neutron in Keystone's catalog.
    File OWN neutron_interface: NeutronInterface = "internal", OneOf;
    /// URL of Neutron's API, such as https://controller:9696. It overrides Keystone's catalog.
    File OWN neutron_endpoint_override: Option<HttpUrl> = "", Unset { or: Web, meaning: "as the catalogue says" };
    /// PEM file of certificate authorities that may sign the certificates of Keystone and Neutron.
    File OWN neutron_cafile: Option<PathBuf> = "", Unset { or: ReadableFile, meaning: "the system's own" };
    /// Accept any certificate from Keystone and Neutron. An attacker who can impersonate them can
    /// then read the password and decide the identity of guests.
    File OWN neutron_insecure: bool = "false", Switch;
    /// Time limit for responses of Keystone and Neutron.
    File OWN neutron_timeout: Duration = "20", Seconds(1.0..=600.0);
    /// Name patterns of interfaces that face guests.
    Flag OWN guest_interfaces: Vec<NamePattern> = "tap*", ListOf(Pattern);
    /// Kinds of interfaces that face guests. A veth that leads to a namespace of Neutron's or OVN's
    /// agents is never taken for a guest's.
    Flag OWN guest_link_kinds: Vec<LinkKind> = "tun", ListOf(OneOf);
    /// Name patterns of network namespaces under /run/netns in which the agent serves guests. A
    /// name must also be `qrouter-` or `qdhcp-` with an id; an example is `qrouter-*,qdhcp-*`. In a
    /// router's namespace the program is attached to the interfaces `qr-*`, in a DHCP server's
    /// namespace to `tap*` and `ns-*`. The client is identified by the network or router and its
    /// address. Empty for none.
    Flag OWN namespaces: Option<Vec<NamePattern>> = "", Unset { or: ListOf(Pattern), meaning: "none" };
    /// Drop packets for the metadata service in a router of `namespaces` if neither the agent nor a
    /// process on metadata_port serves them. They would leave through the external gateway.
    File OWN confine_routers: bool = "true", Switch;
    /// Hook for the programs: TCX (Linux 6.6), clsact, or TCX with clsact as the fallback.
    Flag OWN attach_mode: AttachMode = "auto", OneOf;
    /// Check of the source of guest packets against the fixed addresses and address pairs of their
    /// port: MAC and IPv4 address, MAC address only, or none. Only OVN, Neutron and the static
    /// inventory state all of them, so other ports are not checked.
    Flag OWN source_check: SourceCheck = "strict", OneOf;
    /// Name of the network namespace under /run/netns in which guest connections end.
    Flag OWN portal_namespace: String = "metadata-portal", FileName;
    /// MTU of the portal's interfaces. It limits the size of packets from guests.
    File OWN portal_mtu: u16 = "1500", Number(1280..=65535);
    /// Directory on a BPF file system for pinned links and maps.
    Flag OWN bpffs_dir: PathBuf = "/sys/fs/bpf/metadata-agent", AbsolutePath;
    /// Unix socket for health, metrics and state.
    Flag OWN admin_socket: PathBuf = "/run/metadata-agent/admin.sock", SocketPath;
    /// New connections per second of an interface. Guests that share one have a quarter each.
    File OWN syn_rate_limit: Option<NonZero<u32>> = "2000", NumberOr { max: 1_000_000, zero: "no limit" };
    /// New connections that a port may open at once before syn_rate_limit applies.
    File OWN syn_burst: u32 = "4000", Number(1..=1_000_000);
    /// Open connections per guest. Connections over the limit are closed. All ports of an instance
    /// count together. Behind an interface that guests share, a guest is a MAC address until its
    /// instance is known. Behind a haproxy, it is an address on a network.
    File OWN connections_per_guest: u32 = "128", Number(1..=65_536);
    /// Open connections of all guests together. Some do not count, so that no guest can lock out
    /// another: the first four of each guest that has an interface of its own, and the first 32 of
    /// the guests that share an interface, or the haproxies of a network. The fewer connections are
    /// left, the fewer a single guest, or the guests of one such interface, may open. Each
    /// connection may use two thirds of a MiB of memory.
    File OWN connections: u32 = "1024", Number(0..=1_000_000);
    /// Requests of one guest that may be in flight at once to Nova, or to the agent that `upstream`
    /// names. While other guests of the host are served too, a third of it applies, or a fifth
    /// while more of the guest's requests wait than that. These wait up to nova_connect_timeout and
    /// then get status 503.
    File OWN requests_per_guest: usize = "16", Number(1..=1024);
    /// Age of the agent's last heartbeat at which the programs leave guests to the host's own
    /// metadata path.
    File OWN heartbeat_stale_after: Duration = "2.0", Seconds(0.5..=60.0);
    /// Seconds between two requests that the agent sends to itself through the datapath, from an
    /// interface of its own. If three in a row fail, the agent is not ready.
    File OWN data_path_interval: Option<NonZero<u32>> = "10", NumberOr { max: 3600, zero: "no such requests" };
    /// Time for which a request waits for the identity of its port. After that it gets status 503.
    File OWN identity_hold: Duration = "5", Seconds(0.0..=60.0);
    /// Time after a port appears, or after its identity is lost, during which its requests get
    /// status 503 instead of 404.
    File OWN identity_grace: Duration = "120", Seconds(0.0..=3600.0);
    /// Size limit of a request line with headers, in bytes. Larger requests get status 431.
    File OWN request_head_limit: usize = "32768", Number(16_384..=1_048_576);
    /// Size limit of a request body, in bytes. Larger requests get status 413.
    File OWN request_body_limit: usize = "65536", Number(1024..=16_777_216);
    /// Time limit for a guest to send the headers of a request.
    File OWN request_head_timeout: Duration = "30", Seconds(1.0..=600.0),
        else HAPROXY timeout_http_request;
    /// Time for which a guest's connection may be idle between requests.
    File OWN keep_alive_timeout: Duration = "30", Seconds(1.0..=600.0),
        else HAPROXY timeout_http_keep_alive;
    /// Time for which a guest may leave its response unread. A guest that reads fewer than 16 kB
    /// per second uses up this time as well.
    File OWN guest_write_timeout: Duration = "32", Seconds(1.0..=600.0),
        else HAPROXY timeout_client;
    /// Time limit for connecting to Nova, and for its host to acknowledge what was sent.
    File OWN nova_connect_timeout: Duration = "5", Seconds(0.1..=60.0),
        else HAPROXY timeout_connect;
    /// Time limit for a response from Nova. Dynamic vendor data makes Nova slow, hence the lower
    /// bound.
    File OWN nova_response_timeout: Duration = "60", Seconds(32.0..=600.0),
        else HAPROXY timeout_server;
    /// Time for which requests in flight may continue after the agent is asked to stop.
    File OWN drain_timeout: Duration = "10", Seconds(0.0..=600.0);
    /// Format of log lines.
    Flag OWN log_format: LogFormat = "text", OneOf;
}

#[cfg(test)]
mod tests {
    use super::*;
    use oslo_config::{find, is_secret};
    use std::collections::HashSet;

    #[test]
    fn keys_are_unique_across_sections() {
        let names: HashSet<_> = OPTIONS.iter().map(|spec| spec.env()).collect();
        assert_eq!(names.len(), OPTIONS.len(), "the environment has no sections");
    }

    #[test]
    fn every_option_has_a_sentence_of_documentation() {
        for spec in OPTIONS {
            assert!(spec.doc.ends_with('.') && !spec.doc.starts_with(' '), "{}: {:?}", spec.name, spec.doc);
        }
    }

    #[test]
    fn each_section_and_name_belongs_to_one_option() {
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
    fn the_secret_is_recognised_under_each_of_its_names() {
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
