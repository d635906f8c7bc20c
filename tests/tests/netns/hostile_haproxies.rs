//! Slow requests through one haproxy keep neither other networks nor guests on taps out.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

#[test]
fn slow_posts_through_a_haproxy_leave_guests_on_taps_alone() {
    assert_bystander_served(Attack::SlowPosts, Position::Tap);
}

#[test]
fn slow_posts_through_a_haproxy_leave_other_haproxies_alone() {
    assert_bystander_served(Attack::SlowPosts, Position::OtherNetwork);
}
