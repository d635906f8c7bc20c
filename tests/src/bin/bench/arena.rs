//! Where the race is run: one guest, one Nova, and two ways from the one to the other.
//!
//! ```text
//! guest namespace            host namespace
//!   eth0  --- veth, md_from_guest, portal --- agent --- loopback ---+
//!   bare0 --- veth -------------------------------------------------+--- stand-in for Nova
//! ```

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use metadata_tests::{Agent, AgentProcess, Guest, Host, Instance, Mode, NovaStandIn, nova};
use serde::Serialize;

/// What is asked for.
pub const PATH: &str = "/openstack/latest/meta_data.json";
const GUEST: [u8; 4] = [10, 0, 0, 5];
const BARE_HOST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const BARE_GUEST: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

/// In the order they go.
pub struct Arena {
    process: AgentProcess,
    agent: Agent,
    pub guest: Guest,
    pub nova: NovaStandIn,
    pub host: Host,
}

/// What the agent takes of the machine.
#[derive(Debug, Serialize)]
pub struct AgentFootprint {
    pub resident_kib: u64,
    pub peak_resident_kib: u64,
    pub threads: u64,
}

impl Arena {
    /// Sets everything up, and lets the guest fetch a document of its own: what is measured is a path that works.
    pub fn set_up() -> anyhow::Result<Self> {
        let host = Host::new();
        let nova = NovaStandIn::start_with(host.netns(), (Ipv4Addr::UNSPECIFIED, 0).into(), nova::SECRET);
        let guest = host.network().guest(GUEST);
        connect_bare(&host, &guest);
        nova.add(Instance::of(&guest.port));
        let agent = Agent::on(&host, &nova)
            .set("DEFAULT", "nova_metadata_host", &Ipv4Addr::LOCALHOST.to_string())
            // One guest stands for all guests of a host.
            .set("metadata_agent", "syn_rate_limit", "0")
            .port(&guest.port)
            .install();
        let process = agent.start();
        let document = guest.get(PATH);
        ensure!(
            document.status == 200 && document.text().contains(&guest.port.instance.to_string()),
            "the guest got no metadata of its own: {}",
            document.status_line
        );
        Ok(Self { process, agent, guest, nova, host })
    }

    /// Lets the stand-in give everybody the same answer, at as little cost as it can.
    pub fn answer_all_with(&self, body: &[u8]) {
        self.nova.set_mode(Mode::Static(body.to_vec().into()));
    }

    /// The stand-in, over the bare veth.
    pub fn nova_directly(&self) -> SocketAddr {
        (BARE_HOST, self.nova.address().port()).into()
    }

    /// Where the agent pins its maps.
    pub fn pins(&self) -> PathBuf {
        self.agent.pins()
    }

    /// The agent's process.
    pub fn agent_pid(&self) -> u32 {
        self.process.pid()
    }

    /// What the agent takes now.
    pub fn agent_process(&self) -> anyhow::Result<AgentFootprint> {
        let status = self.proc("status")?;
        let number = |name: &str| -> anyhow::Result<u64> {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let value = value.and_then(|value| value.split_whitespace().next());
            value.with_context(|| format!("{name} of the agent"))?.parse().context(name.to_owned())
        };
        Ok(AgentFootprint {
            resident_kib: number("VmRSS")?,
            peak_resident_kib: number("VmHWM")?,
            threads: number("Threads")?,
        })
    }

    fn proc(&self, file: &str) -> anyhow::Result<String> {
        let path = format!("/proc/{}/{file}", self.process.pid());
        std::fs::read_to_string(&path).with_context(|| format!("read {path}"))
    }
}

/// A second cable from the guest to the host, of which the agent knows nothing.
fn connect_bare(host: &Host, guest: &Guest) {
    let inside = guest.netns();
    host.netns().ip(&format!(
        "link add bare type veth peer name bare0 netns {}\n\
         address add {BARE_HOST}/30 dev bare\n\
         link set bare up",
        inside.name()
    ));
    inside.ip(&format!("address add {BARE_GUEST}/30 dev bare0\nlink set bare0 up"));
    inside.sysctl("ipv4/ip_local_port_range", "1024 65535");
}
