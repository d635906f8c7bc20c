//! from_guest
