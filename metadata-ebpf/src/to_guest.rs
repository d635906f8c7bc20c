//! to_guest
