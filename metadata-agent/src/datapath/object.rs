//! The BPF objects that the build script left, and whether pinned maps speak their ABI.

use std::collections::HashMap;

use aya::maps::{Array, Map, MapData};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use metadata_ebpf::abi::{ABI_VERSION, NetnsContext, Settings, names};

use super::DatapathError;
use super::pins::Pins;

/// The programs and maps as the build script compiled them, for who loads them by other means.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/datapath.o"));
/// What stands in front of the programs in other namespaces than the host's.
pub static DISPATCHER: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/dispatcher.o"));

/// Whose copy of the programs it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProgramSet {
    /// The host's own.
    Host,
    /// That of all other namespaces, which dispatchers lead to.
    Shared,
}

/// Loads programs and maps; maps that are pinned already are used as they are.
pub(super) fn load(pins: &Pins, set: ProgramSet) -> Result<Ebpf, DatapathError> {
    let dispatched = match set {
        ProgramSet::Host => 0_u32,
        ProgramSet::Shared => 1,
    };
    let loaded = loader(pins).override_global(names::DISPATCHED, &dispatched, true).load(OBJECT);
    loaded.map_err(|source| DatapathError::Load { source: Box::new(source) })
}

/// Loads dispatchers.
pub(super) struct Dispatchers {
    loader: EbpfLoader<'static>,
    /// What dispatchers were told, at most one for each way to the portal that there ever was. aya's loader wants it to live as
    /// long as itself.
    contexts: HashMap<NetnsContext, &'static NetnsContext>,
}

impl Dispatchers {
    pub(super) fn new(pins: &Pins) -> Self {
        Self { loader: loader(pins), contexts: HashMap::new() }
    }

    pub(super) fn load(&mut self, context: NetnsContext) -> Result<Ebpf, DatapathError> {
        let context = *self.contexts.entry(context).or_insert_with(|| Box::leak(Box::new(context)));
        self.loader
            .override_global(names::NETNS_CONTEXT, context, true)
            .load(DISPATCHER)
            .map_err(|source| DatapathError::Load { source: Box::new(source) })
    }
}

fn loader(pins: &Pins) -> EbpfLoader<'static> {
    let mut loader = EbpfLoader::new();
    // The kernel's own types are of use to programs that are relocated, which ours are not, and fill megabytes.
    loader.btf(None).default_map_pin_directory(pins.directory());
    loader
}

/// Whether all that is pinned was made by an agent of this ABI. Maps of another layout cannot even be read.
pub(super) fn abi_matches(pins: &Pins) -> bool {
    let version = || {
        let map = MapData::from_pin(pins.map(names::CONFIG)).ok()?;
        if usize::try_from(map.info().ok()?.value_size()).ok()? != size_of::<Settings>() {
            return None;
        }
        let config = Array::<_, Settings>::try_from(Map::Array(map)).ok()?;
        Some(config.get(&0, 0).ok()?.abi_version)
    };
    version() == Some(ABI_VERSION)
}
