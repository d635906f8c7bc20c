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

/// The kernel's neighbour table, which all namespaces share, must not fill either.
#[test]
fn a_tenant_with_33_networks_locks_out_no_guest() {
    for position in [Position::SameInterface, Position::OtherNetwork, Position::Tap] {
        assert_bystander_served(Attack::ClientMap, position);
    }
}

#[test]
fn made_up_ipv4_addresses_lock_out_no_guest() {
    use Position::{OtherNetwork, SameInterface, SameNetwork, Tap};
    for position in [SameInterface, OtherNetwork, SameNetwork, Tap] {
        assert_bystander_served(Attack::MadeUpIpv4, position);
    }
}
