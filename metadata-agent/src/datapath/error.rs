//! Errors of the kernel side. Each names the object that it concerns.

use crate::ids::IfIndex;
use crate::net::netns::NetnsError;

#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// The pin directory cannot be used.
    #[error("cannot use {} for pins: {source} (is a bpf file system mounted there? mount -t bpf bpf /sys/fs/bpf)", path.display())]
    PinDirectory { path: std::path::PathBuf, source: std::io::Error },
    /// Another process holds the lock.
    #[error("{} is in use by another agent, or by detach", path.display())]
    InUse { path: std::path::PathBuf },
    /// aya or the kernel's verifier rejected the object.
    #[error("cannot load the BPF programs: {source}")]
    Load { source: Box<aya::EbpfError> },
    /// The object lacks a program or map that this agent needs.
    #[error("the BPF object has no {name}")]
    Missing { name: &'static str },
    /// An operation on a program failed.
    #[error("cannot {operation} {program} on {interface}: {source}")]
    Program {
        operation: &'static str,
        program: &'static str,
        /// Name of the interface, or `the kernel`.
        interface: String,
        source: Box<aya::programs::ProgramError>,
    },
    #[error("cannot pin the link of {interface} at {}: {source}", path.display())]
    Pin { interface: String, path: std::path::PathBuf, source: Box<aya::pin::PinError> },
    #[error("cannot open the pinned map {}: {source}", path.display())]
    OpenPin { path: std::path::PathBuf, source: Box<aya::maps::MapError> },
    #[error("cannot pin a map at {}: {source}", path.display())]
    PinMap { path: std::path::PathBuf, source: Box<aya::pin::PinError> },
    /// While the program was attached, the interface was removed or its name moved to another
    /// interface.
    #[error("interface {interface} vanished while it was attached")]
    Vanished { interface: String },
    /// The interface of an attachment cannot be recorded.
    #[error("cannot record interface {index} in MD_DEVICES: {source}")]
    Device { index: IfIndex, source: Box<aya::maps::xdp::XdpMapError> },
    /// The interface of an attachment was removed, and another one has its index.
    #[error("interface {index} was replaced by another one")]
    Replaced { index: IfIndex },
    /// The operation requires an attached interface.
    #[error("interface {index} is not attached")]
    NotAttached { index: IfIndex },
    #[error("cannot watch the ring buffer of refused packets: {source}")]
    WatchRefusals { source: std::io::Error },
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error("cannot map {map} into memory: {source}")]
    Mmap { map: &'static str, source: nix::errno::Errno },
    #[error("cannot hand over {map}: {source}")]
    Descriptor { map: &'static str, source: std::io::Error },
    /// An operation on a map failed.
    #[error("cannot {operation} {map}: {source}")]
    Map { operation: &'static str, map: &'static str, source: Box<aya::maps::MapError> },
}
