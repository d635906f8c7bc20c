//! Guests that keep a slow Nova busy do not make a bystander's requests fail.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

#[test]
fn a_busy_guest_before_a_slow_nova_leaves_a_bystander_served() {
    assert_bystander_served(Attack::Busy20ms, Position::SameInterface);
}

#[test]
fn a_busy_guest_before_a_slower_nova_leaves_a_bystander_served() {
    assert_bystander_served(Attack::Busy200ms, Position::Tap);
}

#[test]
fn four_busy_guests_before_a_slow_nova_leave_a_bystander_served() {
    assert_bystander_served(Attack::FourBusy20ms, Position::Tap);
}

#[test]
fn four_busy_guests_leave_a_bystander_served() {
    assert_bystander_served(Attack::FourBusy, Position::Tap);
}
