//! Guests that keep a slow Nova busy do not make a bystander's requests fail.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

#[test]
fn four_busy_guests_leave_a_bystander_served() {
    assert_bystander_served(Attack::FourBusy, Position::Tap);
}
