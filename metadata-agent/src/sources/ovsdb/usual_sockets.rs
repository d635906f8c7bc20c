//! Finds the server of the host's Open vSwitch if none is configured.
//!
//! The socket may appear after the agent has started, and an upgrade or another package may put it
//! elsewhere. A server that was killed leaves its socket behind. So the next usual socket that is
//! there is tried after each failure.

use std::path::{Path, PathBuf};

use ovsdb_client::Remote;

/// The usual sockets in the order of preference, and the one in use.
#[derive(Debug)]
pub(super) struct UsualSockets {
    paths: Vec<PathBuf>,
    /// Index of the path that was tried last.
    last: Option<usize>,
}

impl UsualSockets {
    pub(super) fn new(paths: impl IntoIterator<Item = impl AsRef<Path>>) -> Self {
        Self { paths: paths.into_iter().map(|path| path.as_ref().to_owned()).collect(), last: None }
    }

    /// Returns the next socket that exists, or `None` if there is none.
    pub(super) fn next(&mut self) -> Option<Remote> {
        let start = self.last.map_or(0, |last| last + 1);
        let order = (start..self.paths.len()).chain(0..start.min(self.paths.len()));
        let found = order.into_iter().find(|index| self.paths[*index].exists())?;
        self.last = Some(found);
        Some(Remote::Unix(self.paths[found].clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn the_next_existing_socket_is_tried() {
        let folder = tempfile::tempdir().unwrap();
        let paths = ["a", "b", "c"].map(|name| folder.path().join(name));
        let [a, b, c] = paths.clone().map(Remote::Unix);
        let mut sockets = UsualSockets::new(&paths);
        assert_eq!(sockets.next(), None);
        fs::write(&paths[1], "").unwrap();
        assert_eq!([sockets.next(), sockets.next()], [Some(b.clone()), Some(b.clone())]);
        fs::write(&paths[0], "").unwrap();
        fs::write(&paths[2], "").unwrap();
        assert_eq!([sockets.next(), sockets.next(), sockets.next()], [Some(c), Some(a), Some(b)]);
        for path in &paths {
            fs::remove_file(path).unwrap();
        }
        assert_eq!(sockets.next(), None);
    }
}
