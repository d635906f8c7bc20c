//! The proxy against guests and Novas of raw bytes, on loopback: what goes in on one side, what comes out on the other.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "test code outside test functions"
)]

mod answers;
mod forwarding;
mod guests;
mod haproxies;
mod probe;
mod rate;
mod rig;
mod rotation;
mod tls;
mod tls_nova;
mod upstream;
