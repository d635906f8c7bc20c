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
fn link_local_syns_leave_guests_on_other_interfaces_alone() {
    for position in OTHER_INTERFACES {
        assert_bystander_served(Attack::LinkLocalSyns, position);
        assert_bystander_served(Attack::LinkLocalMacs, position);
    }
}
