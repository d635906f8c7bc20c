//! RabbitMQ with its own home, cookie and port mapper.

use std::fs;
use std::net::TcpStream;
use std::path::Path;

use super::process::Process;
use super::{local, write};
use crate::netns::Netns;

pub(super) const PORT: u16 = 5672;
/// The port of Erlang's port mapper.
const MAPPER_PORT: u16 = 4369;
/// Not the wrapper on the PATH, which becomes another user.
const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// The server. Fields are in drop order.
#[derive(Debug)]
pub(super) struct RabbitMq {
    server: Process,
    _mapper: Process,
}

impl RabbitMq {
    /// Starts it on every address of the namespace, with the user `guest`.
    pub(super) fn start(netns: &Netns, folder: &Path) -> Self {
        let folder = folder.join("rabbitmq");
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        write(&folder.join("rabbitmq.conf"), &format!("loopback_users = none\nlisteners.tcp.1 = {PORT}\n"));
        write(&folder.join("enabled_plugins"), "[].\n");
        let listens = |port| netns.enter(|| TcpStream::connect(local(port)).is_ok());
        // Otherwise the server would start a port mapper that is never stopped.
        let mapper = netns.command("/usr/bin/epmd");
        let mapper = Process::start("epmd", mapper, folder.join("epmd.log"), || listens(MAPPER_PORT));
        let mut server = netns.command(SERVER);
        server.env("HOME", &folder);
        for (name, file) in [
            ("CONF_ENV_FILE", "none"),
            ("CONFIG_FILE", "rabbitmq"),
            ("ENABLED_PLUGINS_FILE", "enabled_plugins"),
            ("LOG_BASE", "log"),
            ("MNESIA_BASE", "mnesia"),
            ("PID_FILE", "pid"),
        ] {
            server.env(format!("RABBITMQ_{name}"), folder.join(file));
        }
        server.env("RABBITMQ_NODENAME", "rabbit@localhost").env("RABBITMQ_LOGS", "-");
        // With this variable the script executes the server and does not wait for it as a child.
        server.env("RUNNING_UNDER_SYSTEMD", "true");
        let server = Process::start("RabbitMQ", server, folder.join("rabbitmq.log"), || listens(PORT));
        Self { server, _mapper: mapper }
    }

    pub(super) fn pid(&self) -> u32 {
        self.server.pid()
    }
}
