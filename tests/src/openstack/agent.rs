//! neutron-metadata-agent as its package runs it. It queries neutron-server through RabbitMQ for
//! each request.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;

use tempfile::TempDir;

use super::process::Process;
use super::{rabbitmq, write};
use crate::netns::Netns;

/// The options that differ between benches.
#[derive(Clone, Copy, Debug, Default)]
pub struct MetadataAgentOptions {
    /// `metadata_workers`. The default is half the number of cores.
    pub workers: Option<usize>,
    /// Caches responses of neutron-server in the memory of each worker.
    pub cache: bool,
}

/// A running agent. Fields are in drop order.
#[derive(Debug)]
pub struct MetadataAgent {
    process: Process,
    _folder: TempDir,
}

impl MetadataAgent {
    /// Serves this socket in a namespace. RabbitMQ and Nova are reachable at Nova's address.
    #[must_use]
    pub fn start(
        netns: &Netns,
        socket: &Path,
        nova: SocketAddr,
        secret: &str,
        options: MetadataAgentOptions,
    ) -> Self {
        let folder = tempfile::Builder::new().prefix("neutron-").tempdir();
        let folder = folder.unwrap_or_else(|e| panic!("create a folder for Neutron's agent: {e}"));
        let config = folder.path().join("metadata_agent.ini");
        let at = folder.path().display();
        let mut text = format!(
            "[DEFAULT]\nstate_path = {at}\ntransport_url = rabbit://guest:guest@{address}:{}/\n\
             nova_metadata_host = {address}\nnova_metadata_port = {}\nmetadata_proxy_shared_secret = {secret}\n\
             metadata_proxy_socket = {}\nmetadata_proxy_socket_mode = all\n",
            rabbitmq::PORT,
            nova.port(),
            socket.display(),
            address = nova.ip(),
        );
        let written = options
            .workers
            .map_or(Ok(()), |workers| writeln!(text, "metadata_workers = {workers}"))
            .and_then(|()| writeln!(text, "[oslo_concurrency]\nlock_path = {at}"))
            .and_then(|()| if options.cache { writeln!(text, "{CACHE}") } else { Ok(()) });
        written.unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
        write(&config, &text);
        let mut command = netns.command("/usr/bin/neutron-metadata-agent");
        // Otherwise the package's configuration would be read as well.
        command.arg("--config-file").arg(&config).arg("--config-dir").arg(folder.path());
        let listens = || UnixStream::connect(socket).is_ok();
        let log = folder.path().join("log");
        let process = Process::start("neutron-metadata-agent", command, log, listens);
        Self { process, _folder: folder }
    }

    /// Returns the ids of its process and of its workers.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        self.process.with_children()
    }
}

/// Five seconds, as with `cache_url = memory://?default_ttl=5`, the former default.
const CACHE: &str = "[cache]\nenabled = true\nbackend = oslo_cache.dict\nexpiration_time = 5";
