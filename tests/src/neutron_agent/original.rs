//! Neutron's own metadata agent, as Debian packages it: its handler, its server and its requests to
//! Nova. Only the queries to neutron-server are replaced.

use std::net::SocketAddr;
use std::path::Path;

use serde_json::json;

use super::script::{self, PYTHON, Script};
use crate::netns::Netns;
use crate::nova::NovaStandIn;
use crate::port::Port;

const SCRIPT: &str = include_str!("original.py");

/// A running metadata agent of Neutron.
#[derive(Debug)]
pub struct OriginalAgent {
    script: Script,
}

impl OriginalAgent {
    /// Serves this socket in a namespace with these ports and forwards to this Nova.
    #[must_use]
    pub fn start<'a>(
        netns: &Netns,
        socket: &Path,
        ports: impl IntoIterator<Item = &'a Port>,
        nova: &NovaStandIn,
    ) -> Self {
        Self::forwarding_to(netns, socket, ports, nova.address(), nova.secret())
    }

    /// Serves this socket and forwards to a Nova at this address with this secret.
    #[must_use]
    pub fn forwarding_to<'a>(
        netns: &Netns,
        socket: &Path,
        ports: impl IntoIterator<Item = &'a Port>,
        nova: SocketAddr,
        secret: &str,
    ) -> Self {
        let ports: Vec<_> = ports.into_iter().map(as_neutron_has_it).collect();
        let config = format!(
            "[DEFAULT]\ntransport_url = fake:/\nnova_metadata_host = {}\nnova_metadata_port = {}\n\
             metadata_proxy_shared_secret = {}\n",
            nova.ip(),
            nova.port(),
            secret
        );
        let files = [("agent.py", SCRIPT), ("agent.ini", &config), ("ports.json", &json!(ports).to_string())];
        let mut command = netns.command(PYTHON);
        command.arg("agent.py").arg(socket).args(["ports.json", "agent.ini"]);
        Self { script: Script::start(script::folder(), &files, command, socket) }
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.script.pid()
    }
}

fn as_neutron_has_it(port: &Port) -> serde_json::Value {
    json!({
        "id": port.id,
        "network_id": port.network,
        "mac_address": port.mac,
        "fixed_ips": port.fixed_ips.iter().map(|ip| json!({ "ip_address": ip })).collect::<Vec<_>>(),
        "device_id": port.instance,
        "tenant_id": port.project,
    })
}
