//! Slow requests through one haproxy keep no guest out: behind it, behind another haproxy, or on a
//! tap.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

#[test]
fn slow_posts_through_a_haproxy_leave_guests_on_taps_alone() {
    assert_bystander_served(Attack::SlowPosts, Position::Tap);
}

#[test]
fn slow_posts_through_a_haproxy_leave_other_networks_alone() {
    assert_bystander_served(Attack::SlowPosts, Position::OtherNetwork);
}

#[test]
fn slow_posts_through_a_haproxy_leave_its_network_alone() {
    assert_bystander_served(Attack::SlowPosts, Position::SameNetwork);
}

#[test]
fn refused_posts_through_a_haproxy_leave_bystanders_alone() {
    for position in [Position::SameNetwork, Position::OtherNetwork, Position::Tap] {
        assert_bystander_served(Attack::RefusedPosts, position);
    }
}
