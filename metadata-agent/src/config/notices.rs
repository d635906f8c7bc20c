//! Notices about options that are set without the effect that they have in Neutron.
//!
//! Input: the files and the options read from them. Output: one [`Notice`] for each such option, to
//! be logged once. Nothing here is an error: Neutron's files are meant to be used as they are.

use std::fmt;

use oslo_config::{DEFAULT, Files, Fitted, Origin, Resolver, Setting};
use serde::Serialize;

use super::options::Config;
use super::value::UpstreamKind;

/// An option that is set, and its effect.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Notice {
    pub group: &'static str,
    /// Name of the option, or `*` for the whole section.
    pub name: &'static str,
    pub origin: Origin,
    #[serde(flatten)]
    pub effect: Effect,
}

/// The effect of an option.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case", tag = "effect")]
pub(crate) enum Effect {
    /// No effect, because the agent does not have the feature that it configures.
    None { reason: &'static str },
    /// No effect yet.
    NotYet { reason: &'static str },
    /// An effect that harms guests.
    Harms { reason: &'static str },
    /// Neutron removed the option. Another one has its meaning.
    Replaced { by: &'static str },
    /// The option stands in for one of ours, whose limits are narrower. `value` is what is used.
    Fitted { key: &'static str, value: String },
}

impl Notice {
    /// Reports whether an operator should change something.
    #[must_use]
    pub(crate) fn is_warning(&self) -> bool {
        match self.effect {
            Effect::NotYet { .. } | Effect::Harms { .. } | Effect::Replaced { .. } => true,
            Effect::None { .. } | Effect::Fitted { .. } => false,
        }
    }
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}] {} ({}) ", self.group, self.name, self.origin)?;
        match &self.effect {
            Effect::None { reason } => write!(f, "has no effect: {reason}"),
            Effect::NotYet { reason } => write!(f, "has no effect yet: {reason}"),
            Effect::Harms { reason } => write!(f, "harms guests: {reason}"),
            Effect::Replaced { by } => write!(f, "was removed from Neutron and has no effect; set {by}"),
            Effect::Fitted { key, value } => write!(f, "stands in for {key}, which becomes {value}"),
        }
    }
}

/// Neutron's options for one feature that the agent does not have.
struct Unused {
    group: &'static str,
    names: &'static [&'static str],
    reason: &'static str,
}

const NO_RPC: &str = "the agent does not use RPC";
const NO_CHILDREN: &str = "the agent has no child processes";
const STDERR: &str = "log lines go to stderr; log_format and RUST_LOG control them";
const NO_PROVIDER: &str = "guests are identified by their interface, without addresses of a provider network";

static UNUSED: &[Unused] = &[
    Unused {
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
    Unused {
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
    Unused {
        group: "AGENT",
        names: &["check_child_processes_interval", "check_child_processes_action", "kill_scripts_path"],
        reason: NO_CHILDREN,
    },
    Unused {
        group: "METADATA",
        names: &["provider_cidr", "provider_vlan_id", "provider_base_mac", "host_proxy_listen_port"],
        reason: NO_PROVIDER,
    },
];

/// Options, by key, whose feature is not implemented yet.
static NOT_YET: &[(&str, &str)] = &[
    ("report_interval", "the agent does not report to Neutron"),
    ("log_agent_heartbeats", "the agent does not report to Neutron"),
];

/// Options that matter only if the agent serves haproxies.
static FOR_HAPROXIES: [&str; 3] =
    ["metadata_proxy_socket_mode", "metadata_proxy_user", "metadata_proxy_group"];
const NO_HAPROXIES: &str = "haproxies are not served unless serve_metadata_proxy_socket is on";

/// Requests of one boot of cloud-init. Even Neutron's defaults are below it.
const REQUESTS_OF_A_BOOT: u32 = 28;
const RATE_LIMIT: &str = "one boot sends about 28 requests within seconds, and some of them will be rejected; \
                          raise base_query_rate_limit and burst_query_rate_limit";

/// Returns a notice for each option that is set without its effect in Neutron.
pub(super) fn notices(resolver: &mut Resolver<'_>, config: &Config) -> Vec<Notice> {
    let mut notices = fitted(resolver);
    notices.extend(unused(resolver.files()));
    notices.extend(without_effect(config));
    notices
}

/// Values of Neutron's options that were fitted to the limits of ours.
fn fitted(resolver: &mut Resolver<'_>) -> Vec<Notice> {
    let notice = |Fitted { group, name, origin, key, value }| Notice {
        group,
        name,
        origin,
        effect: Effect::Fitted { key, value },
    };
    resolver.take_fitted().into_iter().map(notice).collect()
}

/// Options of Neutron that the agent does not have.
fn unused(files: &Files) -> Vec<Notice> {
    let mut notices = Vec::new();
    for Unused { group, names, reason } in UNUSED {
        for name in *names {
            if let Some(assignment) = files.last(group, name) {
                let origin = Origin::from_assignment(assignment);
                notices.push(Notice { group, name, origin, effect: Effect::None { reason } });
            }
        }
    }
    if let Some(assignment) = files.any("cache") {
        let effect = Effect::None { reason: "nothing is cached; Neutron does not use it either" };
        let origin = Origin::from_assignment(assignment);
        notices.push(Notice { group: "cache", name: "*", origin, effect });
    }
    for group in [DEFAULT, "METADATA"] {
        if let Some(assignment) = files.last(group, "nova_metadata_ip") {
            let effect = Effect::Replaced { by: "nova_metadata_host" };
            let origin = Origin::from_assignment(assignment);
            notices.push(Notice { group, name: "nova_metadata_ip", origin, effect });
        }
    }
    notices
}

/// Options of the agent that are set but have no effect together with others, or a harmful one.
fn without_effect(config: &Config) -> Vec<Notice> {
    // Without haproxies, their options have no effect. `metadata_proxy_socket` still has one if it
    // names the socket of Neutron's agent.
    let for_haproxies = if config.serve_metadata_proxy_socket { &[][..] } else { &FOR_HAPROXIES[..] };
    let socket = (!config.serve_metadata_proxy_socket && config.upstream == UpstreamKind::Nova)
        .then_some(&"metadata_proxy_socket");
    let no_haproxies = socket.into_iter().chain(for_haproxies);
    let no_haproxies = no_haproxies.map(|key| (*key, Effect::None { reason: NO_HAPROXIES }));

    let requests = config.rate_limit_base_requests.min(config.rate_limit_burst_requests);
    let rate_limit = (config.rate_limit_enabled && requests < REQUESTS_OF_A_BOOT)
        .then_some(("rate_limit_enabled", Effect::Harms { reason: RATE_LIMIT }));
    let not_yet = NOT_YET.iter().map(|(key, reason)| (*key, Effect::NotYet { reason }));

    // A notice only for options that are set.
    let effects = no_haproxies.chain(not_yet).chain(rate_limit);
    let notice = |(key, effect)| {
        let setting = config.settings().iter().find(|setting| setting.key == key)?;
        let Setting { group, name, origin, .. } = setting;
        (*origin != Origin::Default).then(|| Notice { group, name, origin: origin.clone(), effect })
    };
    effects.filter_map(notice).collect()
}
