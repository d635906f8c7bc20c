//! The proxy against guests and Novas of raw bytes, on loopback: what goes in on one side, what comes out on the other.

mod answers;
mod guests;
mod rig;
mod secrets;
mod tls;
mod upstream;
