//! The proxy between raw-byte guests and a raw-byte Nova, on loopback: the bytes that go in on one
//! side and come out on the other.

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
