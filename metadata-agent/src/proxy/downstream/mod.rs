//! The clients' side: accepts and admits connections, and enforces their time-outs and rate limits.

mod activity;
mod admission;
mod connection;
mod listener;
mod rate;
mod request_line;

pub(super) use activity::ConnectionActivity;
pub use connection::ClientStream;
pub use listener::{serve_guests, serve_haproxies};
pub(super) use rate::{PortRate, PortRates};
pub use rate::{RateLimit, RateWindow};
