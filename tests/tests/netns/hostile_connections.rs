//! A guest that takes all connections and requests that it can get takes none of a bystander's.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

const ALL: [Position; 4] =
    [Position::SameNetwork, Position::SameInterface, Position::OtherNetwork, Position::Tap];

#[test]
fn idle_connections_leave_guests_on_other_interfaces_alone() {
    for position in [Position::SameNetwork, Position::OtherNetwork, Position::Tap] {
        assert_bystander_served(Attack::IdleConnections, position);
    }
}

#[test]
fn idle_connections_leave_guests_on_the_same_interface_alone() {
    assert_bystander_served(Attack::IdleConnections, Position::SameInterface);
}

#[test]
fn a_guest_over_the_request_rate_limits_only_itself() {
    for position in ALL {
        assert_bystander_served(Attack::RequestRate, position);
    }
}
