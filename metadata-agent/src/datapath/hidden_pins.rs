//! Moves pins from a directory that another mount hides. They are alive there, but the next agent
//! would not find them, and a stop would not remove them.

use aya::programs::links::{FdLink, PinnedLink};

use super::DatapathError;
use super::pins::Pins;

/// Moves the links and records of all namespaces, and removes everything else. The maps are pinned
/// at the new place already.
pub(super) fn move_pins(hidden: &Pins, to: &Pins) -> Result<(), DatapathError> {
    move_links(hidden, to)?;
    forget_filters(hidden)?;
    for inode in hidden.netns()? {
        let hidden = Pins::of_netns(hidden.directory(), inode)?;
        let to = Pins::of_netns(to.directory(), inode)?;
        move_links(&hidden, &to)?;
        hidden.filters()?.into_iter().try_for_each(|record| to.record_filter(record))?;
        forget_filters(&hidden)?;
    }
    hidden.clear()
}

fn move_links(hidden: &Pins, to: &Pins) -> Result<(), DatapathError> {
    for name in hidden.links()? {
        // Nothing is lost with a link that cannot be opened: its program is attached again.
        let Ok(link) = PinnedLink::from_pin(hidden.directory().join(&name)) else { continue };
        let path = to.directory().join(&name);
        Pins::remove(&path)?;
        let pinned = FdLink::from(link).pin(&path);
        pinned.map_err(|source| DatapathError::Pin { interface: name, path, source: Box::new(source) })?;
    }
    Ok(())
}

fn forget_filters(pins: &Pins) -> Result<(), DatapathError> {
    pins.filters()?.into_iter().try_for_each(|record| pins.forget_filter(record.index))
}
