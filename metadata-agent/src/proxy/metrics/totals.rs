//! The metrics of all proxies of this host, summed up: of those that run, and of those that have
//! ended.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;

use super::exposition::{self, Shape};
use super::{FAMILIES, LEN, Metrics};

/// Sums for scrapes. No counter ever falls, whichever proxy ends.
#[derive(Debug)]
pub(crate) struct MetricsTotals {
    proxies: Mutex<Proxies>,
}

#[derive(Debug)]
struct Proxies {
    running: Vec<Arc<Metrics>>,
    /// The sums of those that ended.
    ended: Vec<u64>,
}

impl MetricsTotals {
    /// Registers the sums with the prefix `metadata`.
    #[must_use]
    pub(crate) fn register(registry: &mut Registry) -> Arc<Self> {
        let proxies = Mutex::new(Proxies { running: Vec::new(), ended: vec![0; LEN] });
        let totals = Arc::new(Self { proxies });
        let registry = registry.sub_registry_with_prefix("metadata");
        registry.register_collector(Box::new(MetricsCollector(Arc::clone(&totals))));
        totals
    }

    /// Adds the metrics of a proxy that starts.
    pub(crate) fn add(&self, metrics: Arc<Metrics>) {
        self.proxies().running.push(metrics);
    }

    /// Keeps what a proxy has counted, now that it has ended. What existed in it does not exist any
    /// more.
    pub(crate) fn end(&self, metrics: &Arc<Metrics>) {
        let mut proxies = self.proxies();
        proxies.running.retain(|running| !Arc::ptr_eq(running, metrics));
        let mut ended = proxies.ended.iter_mut().zip(metrics.values());
        for family in FAMILIES {
            for (sum, value) in ended.by_ref().take(family.shape.len()) {
                if !matches!(family.shape, Shape::Gauge) {
                    *sum = sum.wrapping_add(value);
                }
            }
        }
    }

    /// Returns the values of all metrics in their order.
    fn values(&self) -> Vec<u64> {
        let proxies = self.proxies();
        let mut sums = proxies.ended.clone();
        for metrics in &proxies.running {
            for (sum, value) in sums.iter_mut().zip(metrics.values()) {
                *sum = sum.wrapping_add(value);
            }
        }
        sums
    }

    fn proxies(&self) -> MutexGuard<'_, Proxies> {
        self.proxies.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the sums at each scrape.
#[derive(Debug)]
struct MetricsCollector(Arc<MetricsTotals>);

impl Collector for MetricsCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        exposition::encode(FAMILIES, &self.0.values(), &mut encoder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxy::metrics::METRICS_LEN;
    use crate::sys::SharedWords;
    use std::os::fd::AsFd as _;

    /// The end of a process must not take back what it counted, nor leave open what it had open.
    #[test]
    fn counters_outlive_the_proxy_and_open_connections_do_not() {
        let mut registry = Registry::default();
        let totals = MetricsTotals::register(&mut registry);
        let scrape = || {
            let mut text = String::new();
            prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
            let value = |name: &str| {
                let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                line.trim().parse::<u64>().unwrap()
            };
            (value("metadata_connections_total"), value("metadata_connections_open"))
        };
        // The other process has a mapping of its own.
        let (memory, words) = SharedWords::create("test", 1 + METRICS_LEN).unwrap();
        let other = SharedWords::map_memory(memory.as_fd(), 1 + METRICS_LEN).unwrap();
        let (first, counting) = (Arc::new(Metrics::shared(words, 1)), Arc::new(Metrics::shared(other, 1)));
        totals.add(Arc::clone(&first));
        let open = [counting.connection_opened(), counting.connection_opened()];
        let second = Arc::new(Metrics::default());
        totals.add(Arc::clone(&second));
        let third = second.connection_opened();
        assert_eq!(scrape(), (3, 3));
        totals.end(&first);
        assert_eq!(scrape(), (3, 1));
        drop(open);
        assert_eq!(scrape(), (3, 1));
        drop(third);
        assert_eq!(scrape(), (3, 0));
    }
}
