//! A state of the table as the host build's world, and the initial values of both builds.

use metadata_ebpf::abi::{
    ABI_VERSION, AttachmentState, Client, ClientKey, GUEST_RATES, GuestShares, MacWord, NetnsContext,
    PortKey, Refusals, Settings,
};
use metadata_ebpf::host::HostWorld;
use metadata_ebpf::identity::{ClientAddress, ClientMac};

use super::{
    ATTACHMENT, CONNECTED_PORT, DERIVED_IPV6, Exhausted, GUEST_MAC, PORTAL_MAC, ROUTER_MAC, State, identity,
    identity_at, identity_v6, port,
};

/// The loopback interface, on which `BPF_PROG_TEST_RUN` lets frames arrive. It stands for the
/// guest's interface.
pub const IFINDEX: u32 = 1;
/// The target of frames for the portal. No interface has this index, and `BPF_PROG_TEST_RUN` does
/// not redirect.
pub const PORTAL_IFINDEX: u32 = 4242;
/// The target in a router's namespace, which distinguishes it from the host's.
const UPLINK_IFINDEX: u32 = 4243;
const ROUTER_NETNS: u32 = 4_026_532_000;
/// Far more than a test takes, so that no verdict depends on the time.
const BURST_NS: u64 = STALE_AFTER_NS;
/// The maximum age of a heartbeat.
pub const STALE_AFTER_NS: u64 = 3_600_000_000_000;

/// Returns `MD_CONFIG[0]` for a state. Without an exhausted rate limit there is no limit at all, so
/// that no verdict depends on the time.
#[must_use]
pub fn settings(state: &State, nsid: u32) -> Settings {
    Settings {
        abi_version: ABI_VERSION,
        portal_ifindex: PORTAL_IFINDEX,
        portal_nsid: nsid,
        next_attachment: 1,
        stale_after_ns: STALE_AFTER_NS,
        syn_interval_ns: if state.exhausted == Exhausted::Nothing { 0 } else { 1_000_000 },
        syn_burst_ns: BURST_NS,
        hash_keys: [0x9e37_79b9_7f4a_7c15, 0xc2b2_ae3d_27d4_eb4f],
        portal_mac: PORTAL_MAC,
        _pad: [0; 2],
    }
}

/// Returns `MD_HEARTBEAT[DATA]`.
#[must_use]
pub fn heartbeat(state: &State, now: u64) -> u64 {
    if state.alive { now } else { 0 }
}

/// Returns the guest's entry of `MD_ATTACH`. If the client is known, it has sent SYNs before.
#[must_use]
pub fn attachment_state(state: &State, now: u64) -> AttachmentState {
    let interface_mac = if state.routed { MacWord::new(ROUTER_MAC) } else { MacWord(0) };
    let mut attachment = AttachmentState::new(&port_key(state.routed), interface_mac);
    if state.exhausted == Exhausted::Guest {
        attachment.syn_tat_ns = now + 2 * BURST_NS;
    }
    if state.client_known {
        attachment.metadata_mac = MacWord::new(ROUTER_MAC);
        if let Some(ClientMac::Slot(slot)) =
            ClientAddress::from_identity(identity_v6()).map(|client| client.mac)
        {
            attachment.put_mac(slot, MacWord::new(GUEST_MAC));
        }
    }
    attachment
}

/// Returns the guest's entry of `MD_SHARES`.
#[must_use]
pub fn guest_shares(state: &State, now: u64) -> GuestShares {
    let (three_quarters, all) = (now + BURST_NS / 4 * 3, now + 2 * BURST_NS);
    let unused = GuestShares::UNUSED;
    match state.exhausted {
        Exhausted::Nothing => unused,
        Exhausted::Guest => GuestShares { guests: [all; GUEST_RATES], ..unused },
        Exhausted::HalfAndReserve => {
            GuestShares { total_tat_ns: three_quarters, reserve_tat_ns: all, ..unused }
        }
        Exhausted::Total => GuestShares { total_tat_ns: all, ..unused },
        Exhausted::All => GuestShares { total_tat_ns: all, reserve_tat_ns: all, ..unused },
    }
}

/// Returns the identity addresses of a recorded client.
#[must_use]
pub fn known() -> [[u8; 16]; 3] {
    [identity(), identity_v6(), identity_at(DERIVED_IPV6)]
}

/// Returns `MD_NETNS` of a router's namespace or of the host.
#[must_use]
pub fn netns_context(routed: bool, nsid: u32) -> NetnsContext {
    if routed {
        let (netns, portal_ifindex) = (ROUTER_NETNS, UPLINK_IFINDEX);
        NetnsContext { netns, portal_ifindex, portal_nsid: nsid, legacy_port: 9697 }
    } else {
        NetnsContext::default()
    }
}

/// Returns the key of the interface on which the guest's frames enter.
#[must_use]
pub fn port_key(routed: bool) -> PortKey {
    PortKey { netns: netns_context(routed, 0).netns, ifindex: IFINDEX, vlan: 0 }
}

/// Returns the client record.
#[must_use]
pub fn client() -> Client {
    Client {
        network: [0; 16],
        first_seen_ns: 1,
        last_seen_ns: 1,
        connections: 3,
        guest_mac: GUEST_MAC,
        metadata_mac: ROUTER_MAC,
        _pad: [0; 4],
    }
}

/// Returns the maps, clock and sockets of a state.
#[must_use]
pub fn host_world(state: &State) -> HostWorld {
    let now = 2 * STALE_AFTER_NS;
    let mut world = HostWorld {
        now_ns: now,
        netns_context: netns_context(state.routed, 0),
        settings: Some(settings(state, 0)),
        heartbeat_ns: heartbeat(state, now),
        listening: state.listening,
        ..HostWorld::default()
    };
    if state.attached {
        world.ports.insert(port_key(state.routed), port(state));
    }
    world.attachments.borrow_mut().insert(ATTACHMENT, attachment_state(state, now));
    world.refusals.borrow_mut().insert(ATTACHMENT, Refusals::NONE);
    world.shares.borrow_mut().insert(ATTACHMENT, guest_shares(state, now));
    if state.interface_there {
        world.devices.insert(ATTACHMENT, IFINDEX);
    }
    if state.client_known {
        world.clients.borrow_mut().extend(known().map(|identity| (ClientKey { identity }, client())));
    }
    if state.listening {
        world.connections.extend(known().map(|identity| (identity, CONNECTED_PORT)));
    }
    world
}
