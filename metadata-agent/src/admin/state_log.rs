//! Logs the state for operators who ask for it with SIGUSR1: one record per topic, each with the
//! numbers to look at first. `status` shows everything.
//!
//! The records are made from what the admin socket would answer, and may be written on any thread.

use serde_json::Value;
use tracing::info;

use super::AdminState;

/// Writes the records.
pub(crate) fn log(state: &dyn AdminState) {
    let (now, metrics) = (state.state(), state.metrics());
    let waiting_for = texts(&now["waiting_for"]);
    info!(ready = waiting_for.is_empty(), waiting_for = ?waiting_for, uptime_seconds = %now["uptime_seconds"], "state: readiness");

    let Guests { known, on_network, unknown, disputed, shared, refused } = Guests::count(&now["attachments"]);
    let failed = items(&now["failed"]).len();
    info!(known, on_network, unknown, disputed, shared, refused, failed, "state: guest interfaces");

    let namespaces = &now["namespaces"];
    let (idle, failed) = (items(&namespaces["idle"]).len(), items(&namespaces["failed"]).len());
    info!(served = namespaces["served"].as_u64().unwrap_or(0), idle, failed, "state: namespaces");

    for source in items(&now["sources"]) {
        let faults = source["faults"].as_object().map_or(0, serde_json::Map::len);
        let name = source["source"].as_str().unwrap_or_default();
        info!(source = name, ready = %source["ready"], ports = %source["ports"], faults, "state: source");
    }

    let damage = &now["damage"];
    let found: u64 = damage["found"].as_object().into_iter().flatten().filter_map(|(_, n)| n.as_u64()).sum();
    info!(found, unrepaired = ?texts(&damage["unrepaired"]), "state: damage");

    let age = now["heartbeat_seconds_ago"].as_f64();
    info!(live = %now["live"], age_seconds = age.map(tracing::field::display), "state: heartbeat");

    let number = |name| sample(&metrics, name);
    info!(
        open = number("metadata_connections_open"),
        accepted = number("metadata_connections_total"),
        to_nova = number("metadata_upstream_connections_total"),
        "state: connections"
    );
}

/// Attached guest interfaces by what is known of their guest.
#[derive(Debug, Default, PartialEq, Eq)]
struct Guests {
    known: usize,
    on_network: usize,
    unknown: usize,
    disputed: usize,
    /// Interfaces in namespaces, each with several guests behind it.
    shared: usize,
    /// Those with packets that were refused.
    refused: usize,
}

impl Guests {
    fn count(attachments: &Value) -> Self {
        let mut guests = Self::default();
        for attachment in items(attachments) {
            match attachment["identity"].as_str() {
                Some("known") => guests.known += 1,
                Some("on_network") => guests.on_network += 1,
                Some("disputed") => guests.disputed += 1,
                Some("shared") => guests.shared += 1,
                _ => guests.unknown += 1,
            }
            guests.refused += usize::from(!attachment["refused"].is_null());
        }
        guests
    }
}

fn items(list: &Value) -> &[Value] {
    list.as_array().map_or(&[], Vec::as_slice)
}

fn texts(list: &Value) -> Vec<&str> {
    items(list).iter().filter_map(Value::as_str).collect()
}

/// Returns the value of a series without labels, or 0 if it has not been counted.
fn sample(metrics: &str, series: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok();
    metrics.lines().find_map(value).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn guests_are_counted_by_identity() {
        let attachments = json!([
            { "identity": "known", "refused": null },
            { "identity": "known", "refused": { "packets": {} } },
            { "identity": "unknown", "refused": null },
            { "identity": "shared", "refused": null },
        ]);
        let guests = Guests { known: 2, unknown: 1, shared: 1, refused: 1, ..Guests::default() };
        assert_eq!(Guests::count(&attachments), guests);
        assert_eq!(Guests::count(&Value::Null), Guests::default());
    }

    #[test]
    fn a_series_is_found_by_its_whole_name() {
        let metrics = "# TYPE open gauge\nopen_now 7\nopen{a=\"b\"} 5\nopen 3\n";
        assert_eq!((sample(metrics, "open"), sample(metrics, "absent")), (3, 0));
    }
}
