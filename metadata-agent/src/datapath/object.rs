//! The BPF object that the build script left, and whether pinned maps speak its ABI.

use aya::maps::{Array, Map, MapData};
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};
use metadata_ebpf::abi::{ABI_VERSION, Settings, names};

use super::DatapathError;
use super::pins::Pins;

/// The programs and maps as the build script compiled them, for who loads them by other means.
pub static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/datapath.o"));

/// Loads maps and programs; maps that are pinned already are used as they are.
pub(super) fn load(pins: &Pins) -> Result<Ebpf, DatapathError> {
    let mut loader = EbpfLoader::new();
    loader.default_map_pin_directory(pins.directory());
    loader.load(OBJECT).map_err(|source| DatapathError::Load { source: Box::new(source) })
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
