//! Restores the pin directory if other software removes it while the agent runs.
//!
//! With the pins, TCX links go, and programs with them; they are reattached like all that were
//! detached externally. The maps live on as long as this process has them open. They must be pinned
//! again: a program that is loaded later, and the next agent, find them by their pins.
//!
//! If another BPF file system is mounted over the directory, its pins are hidden, but alive. They
//! move to the new directory, so that the next agent finds them there, and a stop removes them.

use std::path::PathBuf;

use aya::maps::MapData;

use super::hidden_pins::move_pins;
use super::pins::Pins;
use super::{Datapath, DatapathError};

/// The pinned maps, held open.
#[derive(Debug, Default)]
pub(super) struct PinnedMaps(Vec<(PathBuf, MapData)>);

/// The state of the pin directory before it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PinState {
    Intact,
    /// It lacked something, which is back now.
    Restored,
}

impl PinnedMaps {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        let open = |pin: PathBuf| match MapData::from_pin(&pin) {
            Ok(map) => Ok((pin, map)),
            Err(source) => Err(DatapathError::OpenPin { path: pin, source: Box::new(source) }),
        };
        Ok(Self(pins.maps()?.into_iter().map(open).collect::<Result<_, _>>()?))
    }

    fn missing(&self) -> impl Iterator<Item = &(PathBuf, MapData)> {
        self.0.iter().filter(|(pin, _)| !pin.exists())
    }

    fn restore(&self) -> Result<(), DatapathError> {
        self.missing().try_for_each(|(pin, map)| {
            map.pin(pin)
                .map_err(|source| DatapathError::PinMap { path: pin.clone(), source: Box::new(source) })
        })
    }
}

impl Datapath {
    /// Creates what is missing of the pin directory: itself, the pins of maps, and the records of
    /// filters. Links are pinned when their programs are reattached.
    ///
    /// # Errors
    /// The BPF file system is gone or full, or another agent uses the directory.
    pub(crate) fn restore_pins(&mut self) -> Result<PinState, DatapathError> {
        let are_there = self.pins.are_there();
        if are_there && self.pinned_maps.missing().next().is_none() {
            return Ok(PinState::Intact);
        }
        if !are_there {
            let hidden = self.pins.hidden();
            self.pins.restore()?;
            self.pinned_maps.restore()?;
            if let Some(hidden) = hidden {
                move_pins(&hidden, &self.pins)?;
            }
        }
        self.pinned_maps.restore()?;
        Ok(if self.pins.are_there() { PinState::Restored } else { PinState::Intact })
    }
}
