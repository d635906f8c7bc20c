//! The clients' side: accepts and admits connections, and enforces their time-outs and rate limits.

mod activity;
mod admission;
mod connection;
mod haproxy_users;
mod listener;
mod own_request;
mod rate;
mod request_line;

pub(super) use activity::ConnectionActivity;
pub(super) use admission::{AWAITED_HEADS, Admission, AdmissionError, GROUP_RESERVED, RESERVED, Ticket};
pub use connection::ClientStream;
pub use haproxy_users::HaproxyUsers;
pub use listener::{serve_guests, serve_haproxies};
pub(crate) use own_request::expected_body;
pub(super) use rate::{GuestRate, GuestRates};
pub use rate::{RateLimit, RateWindow};
