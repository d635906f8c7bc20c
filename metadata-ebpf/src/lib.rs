//! What the BPF programs and the agent agree upon, and the decisions of the programs themselves.
//!
//! * [`abi`]: keys and values of the maps, byte for byte. [`identity`]: the address under which the agent
//!   sees a guest. [`reason`]: why a packet went where it went.
//! * [`from_guest`] and [`to_guest`]: the two programs, written against [`skb::Skb`] and [`world::World`]. The
//!   kernel build hands them a real `sk_buff` and real maps; the host build hands them a byte vector and a
//!   hash table, so the tests run the very code that the kernel runs.
//!
//! Nothing here allocates, blocks, or knows the agent.
#![cfg_attr(target_arch = "bpf", no_std)]

pub mod abi;
pub mod from_guest;
#[cfg(not(target_arch = "bpf"))]
pub mod host;
pub mod identity;
pub mod rate;
pub mod reason;
pub mod skb;
pub mod to_guest;
pub mod wire;
pub mod world;
