//! The BPF objects of an agent in the kernel, to detect leaks.
//!
//! The kernel never reuses ids while the machine is up, so an object that is no longer loaded is
//! gone for good. Objects of other hosts' agents are not counted: ours use maps that are pinned on
//! this host.

use std::collections::BTreeSet;
use std::fs;

use aya::maps::{MapInfo, loaded_maps};
use aya::programs::{loaded_links, loaded_programs};

use crate::topology::Host;
use crate::wait::{self, PATIENCE};

/// The ids of maps, programs and links.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelObjects {
    pub maps: BTreeSet<u32>,
    pub programs: BTreeSet<u32>,
    /// Links of those programs. There are none with clsact.
    pub links: BTreeSet<u32>,
}

impl KernelObjects {
    /// Number of `MD_*` maps of an agent that serves no namespaces.
    pub const MAPS: usize = 10;

    /// Collects the objects that use the maps pinned on this host.
    #[must_use]
    pub fn from_host(host: &Host) -> Self {
        let folder = host.bpffs().join("metadata");
        let pins =
            fs::read_dir(&folder).unwrap_or_else(|e| panic!("list the pins of {}: {e}", folder.display()));
        let maps = pins.flatten().filter(|pin| pin.file_name().to_string_lossy().starts_with("MD_"));
        let maps: BTreeSet<u32> =
            maps.filter_map(|pin| Some(MapInfo::from_pin(pin.path()).ok()?.id())).collect();
        // An object may vanish during the scan and then does not count.
        let uses = |ids: Option<Vec<u32>>| ids.is_some_and(|ids| ids.iter().any(|id| maps.contains(id)));
        let programs: BTreeSet<u32> = loaded_programs()
            .flatten()
            .filter(|program| uses(program.map_ids().ok().flatten()))
            .map(|program| program.id())
            .collect();
        let links = loaded_links().flatten();
        let links =
            links.filter(|link| programs.contains(&link.program_id())).map(|link| link.id()).collect();
        Self { maps, programs, links }
    }

    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        (self.maps.len(), self.programs.len(), self.links.len())
    }

    /// Waits for these counts, because the kernel frees unused objects asynchronously.
    pub fn wait_for_counts(host: &Host, counts: (usize, usize, usize)) -> Self {
        let mut last = Self::default();
        wait::poll(PATIENCE, || {
            last = Self::from_host(host);
            (last.counts() == counts).then_some(())
        })
        .unwrap_or_else(|| panic!("maps, programs and links are {last:?}, expected {counts:?}"));
        last
    }

    /// Waits until none of them is loaded any more.
    pub fn wait_until_gone(&self) {
        let mut left = Self::default();
        wait::poll(PATIENCE, || {
            left = self.loaded();
            (left == Self::default()).then_some(())
        })
        .unwrap_or_else(|| panic!("still in the kernel: {left:?}"));
    }

    fn loaded(&self) -> Self {
        let maps: BTreeSet<u32> = loaded_maps().flatten().map(|map| map.id()).collect();
        let programs: BTreeSet<u32> = loaded_programs().flatten().map(|program| program.id()).collect();
        let links: BTreeSet<u32> = loaded_links().flatten().map(|link| link.id()).collect();
        Self { maps: &self.maps & &maps, programs: &self.programs & &programs, links: &self.links & &links }
    }
}
