//! What can go wrong with the kernel side, always with the object that it went wrong with.

use crate::ids::IfIndex;
use crate::net::netns::NetnsError;

/// What can go wrong with the kernel side. Always with the object that it went wrong with.
#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The pin directory cannot be used.
    #[error("cannot use {} for pins: {source} (is a bpf file system mounted there? mount -t bpf bpf /sys/fs/bpf)", path.display())]
    PinDirectory {
        /// The directory.
        path: std::path::PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Somebody else holds the lock.
    #[error("{} is in use by another agent, or by detach", path.display())]
    InUse {
        /// The directory.
        path: std::path::PathBuf,
    },
    /// The object was refused, by aya or by the kernel's verifier.
    #[error("cannot load the BPF programs: {source}")]
    Load {
        /// Why.
        source: Box<aya::EbpfError>,
    },
    /// The object lacks a program or map that this agent knows.
    #[error("the BPF object has no {name}")]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// A program was refused.
    #[error("cannot {operation} {program} on {interface}: {source}")]
    Program {
        /// What was tried.
        operation: &'static str,
        /// The program.
        program: &'static str,
        /// The interface, or `the kernel`.
        interface: String,
        /// Why not.
        source: Box<aya::programs::ProgramError>,
    },
    /// A link cannot be pinned.
    #[error("cannot pin the link of {interface} at {}: {source}", path.display())]
    Pin {
        /// The interface.
        interface: String,
        /// The pin.
        path: std::path::PathBuf,
        /// Why not.
        source: Box<aya::pin::PinError>,
    },
    /// The interface went away, or its name to another one, while the program was attached.
    #[error("interface {interface} vanished while it was attached")]
    Vanished {
        /// Its name.
        interface: String,
    },
    /// A VLAN was to be attached on an interface that is not.
    #[error("interface {index} is not attached")]
    NotAttached {
        /// Its index.
        index: IfIndex,
    },
    /// The namespace cannot be worked in.
    #[error(transparent)]
    Netns(#[from] NetnsError),
    /// A map refused.
    #[error("cannot {operation} {map}: {source}")]
    Map {
        /// What was tried.
        operation: &'static str,
        /// The map.
        map: &'static str,
        /// Why not.
        source: Box<aya::maps::MapError>,
    },
}
