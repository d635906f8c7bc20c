//! Interfaces by name. A name belongs to the interface that took it last, and an interface has one
//! name.

use std::collections::{BTreeMap, HashMap};

use crate::ids::IfIndex;

/// Interfaces and their names, both ways.
#[derive(Debug, Default)]
pub(super) struct Names {
    interfaces: HashMap<String, IfIndex>,
    names: BTreeMap<IfIndex, String>,
}

impl Names {
    /// Sets the name of an interface, which takes it from any other interface.
    pub(super) fn set(&mut self, index: IfIndex, name: &str) {
        if self.names.get(&index).is_some_and(|before| before == name) {
            return;
        }
        self.forget(index);
        if let Some(before) = self.interfaces.insert(name.to_owned(), index) {
            self.names.remove(&before);
        }
        self.names.insert(index, name.to_owned());
    }

    pub(super) fn forget(&mut self, index: IfIndex) {
        if let Some(name) = self.names.remove(&index) {
            self.interfaces.remove(&name);
        }
    }

    pub(super) fn interface(&self, name: &str) -> Option<IfIndex> {
        self.interfaces.get(name).copied()
    }

    /// Returns all interfaces that have a name.
    pub(super) fn all(&self) -> impl Iterator<Item = IfIndex> {
        self.names.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_belongs_to_the_interface_that_took_it_last() {
        let mut names = Names::default();
        let all = |names: &Names| names.all().map(|index| index.0).collect::<Vec<_>>();
        names.set(IfIndex(5), "tap-a");
        names.set(IfIndex(7), "tap-b");
        names.set(IfIndex(5), "swap");
        names.set(IfIndex(7), "tap-a");
        names.set(IfIndex(5), "tap-b");
        assert_eq!(names.interface("tap-a"), Some(IfIndex(7)));
        assert_eq!(names.interface("tap-b"), Some(IfIndex(5)));
        assert_eq!((names.interface("swap"), all(&names)), (None, vec![5, 7]));

        names.set(IfIndex(9), "tap-a");
        assert_eq!((names.interface("tap-a"), all(&names)), (Some(IfIndex(9)), vec![5, 9]));
        names.forget(IfIndex(7));
        names.forget(IfIndex(5));
        assert_eq!((names.interface("tap-a"), names.interface("tap-b")), (Some(IfIndex(9)), None));
    }
}
