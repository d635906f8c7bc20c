//! Guests that do not read their answers take nothing of a bystander's.

use metadata_tests::hostile::{Attack, Position, assert_bystander_served};

const ATTACKS: [Attack; 3] = [Attack::Unread64k, Attack::Unread1m, Attack::Trickled];

#[test]
fn unread_answers_leave_guests_on_taps_served() {
    for attack in ATTACKS {
        assert_bystander_served(attack, Position::Tap);
    }
}

#[test]
fn unread_answers_leave_the_same_interface_served() {
    for attack in ATTACKS {
        assert_bystander_served(attack, Position::SameInterface);
    }
}

#[test]
fn unread_answers_leave_other_interfaces_served() {
    for position in [Position::SameNetwork, Position::OtherNetwork] {
        assert_bystander_served(Attack::Unread64k, position);
    }
}
