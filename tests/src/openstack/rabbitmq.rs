//! RabbitMQ, with a home, a cookie and a port mapper of its own.

use std::fs;
use std::net::TcpStream;
use std::path::Path;

use super::process::Process;
use super::{local, write};
use crate::netns::Netns;

pub(super) const PORT: u16 = 5672;
/// Erlang's port mapper.
const MAPPER_PORT: u16 = 4369;
/// Not the wrapper on the PATH, which becomes another user.
const SERVER: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// The server. In the order they go.
#[derive(Debug)]
pub(super) struct RabbitMq {
    server: Process,
    _mapper: Process,
}

impl RabbitMq {
    /// On every address of the namespace, with the user `guest`.
    pub(super) fn start(netns: &Netns, folder: &Path) -> Self {
        let folder = folder.join("rabbitmq");
        fs::create_dir(&folder).unwrap_or_else(|e| panic!("make {}: {e}", folder.display()));
        write(&folder.join("rabbitmq.conf"), &format!("loopback_users = none\nlisteners.tcp.1 = {PORT}\n"));
        write(&folder.join("enabled_plugins"), "[].\n");
        let listens = |port| netns.enter(|| TcpStream::connect(local(port)).is_ok());
        // Else the server would start one that nobody stops.
        let mapper = netns.command("epmd");
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
        // Then its script becomes the server, and starts no second process that waits for it.
        server.env("RUNNING_UNDER_SYSTEMD", "true");
        let server = Process::start("RabbitMQ", server, folder.join("rabbitmq.log"), || listens(PORT));
        Self { server, _mapper: mapper }
    }

    pub(super) fn pid(&self) -> u32 {
        self.server.pid()
    }
}
