//! What an operator set that has not the effect it has in Neutron, each with the reason.
//!
//! In: the files and the options read from them. Out: a [`Notice`] for each such option that somebody set, to be logged
//! once. Nothing here is a fault: Neutron's files are meant to be used as they are.

use super::notice::{Effect, Notice};
use super::options::Config;
use super::raw::{DEFAULT, RawConfig};
use super::setting::Origin;
use super::value::Upstream;

/// What Neutron's options of one kind were for.
struct Spent {
    group: &'static str,
    names: &'static [&'static str],
    reason: &'static str,
}

const NO_RPC: &str = "the agent asks Neutron nothing over RPC";
const NO_CHILDREN: &str = "there are no child processes to look after";
const STDERR: &str = "log lines go to stderr; log_format and RUST_LOG govern them";
const NO_PROVIDER: &str = "guests are told apart by their interface, without addresses of a provider network";

static SPENT: &[Spent] = &[
    Spent {
        group: DEFAULT,
        names: &[
            "transport_url",
            "rpc_response_timeout",
            "rpc_response_max_timeout",
            "rpc_conn_pool_size",
            "executor_thread_pool_size",
            "control_exchange",
        ],
        reason: NO_RPC,
    },
    Spent {
        group: DEFAULT,
        names: &[
            "log_file",
            "log_dir",
            "log_config_append",
            "use_syslog",
            "use_journal",
            "use_eventlog",
            "use_json",
            "use_stderr",
            "syslog_log_facility",
            "watch_log_file",
            "default_log_levels",
        ],
        reason: STDERR,
    },
    Spent {
        group: "AGENT",
        names: &["check_child_processes_interval", "check_child_processes_action", "kill_scripts_path"],
        reason: NO_CHILDREN,
    },
    Spent {
        group: "METADATA",
        names: &["provider_cidr", "provider_vlan_id", "provider_base_mac", "host_proxy_listen_port"],
        reason: NO_PROVIDER,
    },
];

/// Options without a feature so far, by their keys. What is left at the default is not worth a line.
static NOT_YET: &[(&str, &str)] = &[
    ("report_interval", "the agent does not report to Neutron"),
    ("log_agent_heartbeats", "the agent does not report to Neutron"),
];

/// What only matters to haproxies that we answer.
static FOR_HAPROXIES: [&str; 3] =
    ["metadata_proxy_socket_mode", "metadata_proxy_user", "metadata_proxy_group"];
const NO_HAPROXIES: &str = "haproxies are not answered unless serve_metadata_proxy_socket is on";

/// What one boot of cloud-init asks for. Even Neutron's defaults are below it.
const REQUESTS_OF_A_BOOT: u32 = 28;
const RATE_LIMIT: &str = "one boot makes some 28 requests within seconds, and some of them will be refused; \
                          raise base_query_rate_limit and burst_query_rate_limit";

/// Everything worth a line.
pub(super) fn of(raw: &RawConfig, config: &Config) -> Vec<Notice> {
    let mut notices = Vec::new();
    for Spent { group, names, reason } in SPENT {
        for name in *names {
            if let Some(assignment) = raw.last(group, name) {
                let origin = Origin::of(assignment);
                notices.push(Notice { group, name, origin, effect: Effect::None { reason } });
            }
        }
    }
    if let Some(assignment) = raw.any("cache") {
        let effect = Effect::None { reason: "nothing is cached; neither does Neutron use it" };
        notices.push(Notice { group: "cache", name: "*", origin: Origin::of(assignment), effect });
    }
    for group in [DEFAULT, "METADATA"] {
        if let Some(assignment) = raw.last(group, "nova_metadata_ip") {
            let effect = Effect::Replaced { by: "nova_metadata_host" };
            notices.push(Notice { group, name: "nova_metadata_ip", origin: Origin::of(assignment), effect });
        }
    }
    let unserved = if config.serve_metadata_proxy_socket { &[][..] } else { &FOR_HAPROXIES[..] };
    let unused = (!config.serve_metadata_proxy_socket && config.upstream == Upstream::Nova)
        .then_some(&"metadata_proxy_socket");
    let idle = unused.into_iter().chain(unserved).map(|key| (*key, Effect::None { reason: NO_HAPROXIES }));
    let requests = config.rate_limit_base_requests.min(config.rate_limit_burst_requests);
    let rate_limit = (config.rate_limit_enabled && requests < REQUESTS_OF_A_BOOT)
        .then_some(("rate_limit_enabled", Effect::Harms { reason: RATE_LIMIT }));
    let not_yet = NOT_YET.iter().map(|(key, reason)| (*key, Effect::NotYet { reason }));
    for (key, effect) in idle.chain(not_yet).chain(rate_limit) {
        let setting = config.settings().iter().find(|setting| setting.key == key);
        if let Some(setting) = setting.filter(|setting| setting.origin != Origin::Default) {
            let (group, name, origin) = (setting.group, setting.name, setting.origin.clone());
            notices.push(Notice { group, name, origin, effect });
        }
    }
    notices
}
