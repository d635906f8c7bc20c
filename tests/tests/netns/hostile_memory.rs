//! Guests that do not read their answers take nothing of a bystander's.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

#[test]
fn unread_answers_leave_guests_on_taps_served() {
    for attack in [Attack::Unread64k, Attack::Trickled] {
        assert_bystander_served(attack, Position::Tap);
    }
}

#[test]
fn unread_answers_leave_the_same_interface_served() {
    assert_bystander_served(Attack::Unread1m, Position::SameInterface);
}
