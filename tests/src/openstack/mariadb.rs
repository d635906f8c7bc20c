//! MariaDB on a unix socket, with databases that need not survive it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::process::Process;
use crate::netns::output_of;

/// It neither listens on TCP nor syncs: migrations execute thousands of statements, and each would
/// wait for the disk.
const OPTIONS: [&str; 9] = [
    "--skip-networking",
    "--skip-name-resolve",
    "--max-connections=1000",
    "--innodb-log-file-size=16M",
    "--innodb-buffer-pool-size=128M",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-flush-method=nosync",
    "--innodb-doublewrite=0",
    "--sync-frm=0",
];

#[derive(Debug)]
pub(super) struct MariaDb {
    process: Process,
    socket: PathBuf,
}

impl MariaDb {
    /// Starts the server with these empty databases.
    pub(super) fn start(folder: &Path, databases: &[&str]) -> Self {
        let (data, socket) = (folder.join("mariadb"), folder.join("mariadb.socket"));
        let to = |what: &str, path: &Path| format!("--{what}={}", path.display());
        let mut install = Command::new("/usr/bin/mariadb-install-db");
        install.args(["--no-defaults", "--user=root", "--skip-test-db"]);
        install.args(["--auth-root-authentication-method=normal", &to("datadir", &data)]).args(OPTIONS);
        output_of(&mut install);
        let mut server = Command::new("/usr/sbin/mariadbd");
        server.args(["--no-defaults", "--user=root", &to("datadir", &data), &to("socket", &socket)]);
        server.arg(to("pid-file", &folder.join("mariadb.pid"))).args(OPTIONS);
        let ready = || UnixStream::connect(&socket).is_ok();
        let process = Process::start("MariaDB", server, folder.join("mariadb.log"), ready);
        let statements: Vec<_> =
            databases.iter().map(|name| format!("CREATE DATABASE {name} CHARACTER SET utf8")).collect();
        let statements = statements.join(";");
        let mut client = Command::new("/usr/bin/mariadb");
        client.args(["--no-defaults", "--user=root", &to("socket", &socket), "--execute", &statements]);
        output_of(&mut client);
        Self { process, socket }
    }

    /// Returns the URL of a database for oslo.db.
    pub(super) fn url(&self, database: &str) -> String {
        format!("mysql+pymysql://root@localhost/{database}?unix_socket={}", self.socket.display())
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.pid()
    }
}
