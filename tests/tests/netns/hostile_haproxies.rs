//! Slow requests through one haproxy do not keep guests on taps out. For other networks see
//! `haproxies`, and SECURITY.md for what is not promised.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

#[test]
fn slow_posts_through_a_haproxy_leave_guests_on_taps_alone() {
    assert_bystander_served(Attack::SlowPosts, Position::Tap);
}
