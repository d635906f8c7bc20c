//! SYNs that a guest sends in any number, from any address, do not keep a bystander out.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

const OTHER_INTERFACES: [Position; 3] = [Position::SameNetwork, Position::OtherNetwork, Position::Tap];

#[test]
fn a_syn_flood_leaves_guests_on_other_interfaces_alone() {
    for position in OTHER_INTERFACES {
        assert_bystander_served(Attack::SynFlood, position);
    }
}

#[test]
fn a_syn_flood_leaves_guests_on_the_same_interface_alone() {
    assert_bystander_served(Attack::SynFlood, Position::SameInterface);
}

#[test]
fn made_up_link_local_addresses_lock_out_no_new_guest() {
    assert_bystander_served(Attack::LinkLocalSyns, Position::SameInterface);
}

#[test]
fn made_up_mac_addresses_lock_out_no_new_guest() {
    assert_bystander_served(Attack::LinkLocalMacs, Position::SameInterface);
}

#[test]
fn link_local_syns_leave_guests_on_other_interfaces_alone() {
    for position in OTHER_INTERFACES {
        assert_bystander_served(Attack::LinkLocalSyns, position);
        assert_bystander_served(Attack::LinkLocalMacs, position);
    }
}

// Behind a router, the kernel's neighbour table decides as well, which all namespaces of the
// machine share. So the positions there are measured by the bench only (SECURITY.md, "The
// neighbour table").

#[test]
fn a_tenant_with_33_networks_locks_out_no_guest_on_a_tap() {
    assert_bystander_served(Attack::ClientMap, Position::Tap);
}

#[test]
fn made_up_ipv4_addresses_lock_out_no_guest_on_a_tap() {
    for position in [Position::SameNetwork, Position::Tap] {
        assert_bystander_served(Attack::MadeUpIpv4, position);
    }
}
