//! The memory that guests can tie up fits the memory limit of the DaemonSet.

use metadata_agent::net::portal::SOCKET_MEMORY;
use metadata_agent::proxy::{LARGE_BUFFERS_MEMORY, ProxyConfig};

const DAEMONSET: &str = include_str!("../../deploy/daemonset.yaml");

const MIB: usize = 1 << 20;

/// Ports on the host, and interfaces or haproxies that guests share (docs/operations.md).
const PORTS: usize = 128;
const GROUPS: usize = 8;

/// Everything else: programs' maps, inventory, runtimes and idle connections to Nova.
const BASE: usize = 96 * MIB;

#[test]
fn all_connections_fit_into_the_memory_limit() {
    let config = ProxyConfig::default();
    let connections = config.most_connections(PORTS, GROUPS);
    let each = SOCKET_MEMORY + config.connection_memory();
    let most = BASE + LARGE_BUFFERS_MEMORY + connections * each;
    let (_, limits) = DAEMONSET.split_once("limits:").expect("limits");
    let (_, memory) = limits.split_once("memory: ").expect("a memory limit");
    let mib = memory.lines().next().and_then(|line| line.strip_suffix("Mi")).expect("MiB");
    let limit = mib.parse::<usize>().expect("a number") * MIB;
    assert!(most <= limit, "{connections} connections of {each} bytes need {} MiB", most / MIB);
    assert!(2 * most > limit, "the documented figures are far from the limit");
}
