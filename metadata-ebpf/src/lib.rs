//! The contract between the BPF programs and the agent, and the decisions of the programs.
//!
//! * [`abi`]: keys and values of the maps, byte for byte. [`identity`]: the address under which the
//!   agent sees a guest. [`reason`]: the reasons for verdicts.
//! * [`from_guest`] and [`to_guest`]: the two programs, written against [`skb::Skb`] and
//!   [`world::World`]. The kernel build passes a real `sk_buff` and real maps. The host build
//!   passes a byte vector and hash tables, so tests run the same code as the kernel.
//!
//! Nothing here allocates, blocks, or depends on the agent.
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
