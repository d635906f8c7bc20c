//! The databases of both services and the keys of Keystone, created once and copied for each
//! control plane. Creating them takes longer than starting both services.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use super::{Keystone, Neutron};
use crate::cache::{self, Key};
use crate::netns::output_of;

/// To be incremented when the code of this module changes the result.
const RECIPE: &str = "1";
/// The packages that contain the schemas.
const PACKAGES: [&str; 2] = ["python3-keystone", "python3-neutron"];

/// Copies the files into a folder.
pub(super) fn copy(folder: &Path) {
    output_of(Command::new("cp").args(["--archive", "--no-target-directory"]).arg(prepare()).arg(folder));
}

/// Returns the folder of the files. They are created if another version of the packages is
/// installed than before.
fn prepare() -> PathBuf {
    let versions =
        output_of(Command::new("dpkg-query").args(["--show", "--showformat=${Version} "]).args(PACKAGES));
    let entry = cache::entry("control-plane", Key::new().with(RECIPE).with(&versions), |folder| {
        // Each spends most of its time on loading Python modules.
        thread::scope(|scope| {
            scope.spawn(|| Neutron::prepare(folder));
            Keystone::prepare(folder);
        });
        Ok(())
    });
    entry.unwrap_or_else(|e| panic!("create the databases of a control plane: {e:#}"))
}

/// Switches the database to write-ahead logging (`PRAGMA journal_mode`), so that writers do not
/// wait for readers. Otherwise a write fails while a reading transaction is open. neutron-server is
/// single-threaded, so that transaction could not even end in the meantime. The setting is stored
/// in the file.
pub(super) fn let_readers_be(database: &Path) {
    let script = "import sqlite3, sys\n\
         mode, = sqlite3.connect(sys.argv[1]).execute('PRAGMA journal_mode = WAL').fetchone()\n\
         sys.exit(0 if mode == 'wal' else f'journal mode {mode}')\n";
    let mut python = Command::new("/usr/bin/python3");
    output_of(python.args(["-c", script]).arg(database));
}
