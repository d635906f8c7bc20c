//! A demonstration cloud on one machine: two tenant networks with the same addresses, four guests,
//! a Nova that verifies signatures, and the real agent between them. Everything runs in namespaces
//! and is removed afterwards.

use std::net::Ipv4Addr;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use clap::Parser;
use metadata_tests::agent::{self, AgentProcess, NotReady};
use metadata_tests::terminal::print;
use metadata_tests::{Agent, Guest, Host, Instance, NovaStandIn, leftovers};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, timeout};

/// Network, name in the lab, address. Each address occurs twice.
const GUESTS: [(&str, &str, [u8; 4]); 4] = [
    ("red", "red-1", [10, 0, 0, 5]),
    ("red", "red-2", [10, 0, 0, 6]),
    ("blue", "blue-1", [10, 0, 0, 5]),
    ("blue", "blue-2", [10, 0, 0, 6]),
];
const DOCUMENT: &str = "/openstack/latest/meta_data.json";
const READY_WITHIN: Duration = Duration::from_mins(1);

/// Runs the metadata agent on a hypervisor made of network namespaces until Ctrl-C.
#[derive(Parser)]
#[command(name = "lab")]
struct Args {
    /// Part of the names of all namespaces.
    #[arg(long, default_value = "lab")]
    name: String,
    /// The agent's binary; default: the one beside this program.
    #[arg(long, value_name = "PATH")]
    agent: Option<PathBuf>,
    /// Further arguments for `metadata-agent run`.
    #[arg(last = true, value_name = "ARG")]
    further: Vec<String>,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    ensure!(
        nix::unistd::geteuid().is_root(),
        "the lab creates network namespaces and loads BPF programs: run it as root"
    );
    let binary = args.agent.unwrap_or_else(agent::binary);
    ensure!(binary.is_file(), "{} is not a file; build the agent or use --agent", binary.display());
    // From here on both signals only wake this task, so that everything is dropped in order.
    let stop = Stop {
        interrupt: signal(SignalKind::interrupt()).context("handle SIGINT")?,
        terminate: signal(SignalKind::terminate()).context("handle SIGTERM")?,
    };
    let names = Names { lab: args.name };
    let _lock = names.lock()?;
    names.clean_up();
    run(&names, binary, &args.further, stop).await
}

struct Stop {
    interrupt: Signal,
    terminate: Signal,
}

impl Stop {
    async fn asked(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// The names of the lab's objects on this machine.
struct Names {
    lab: String,
}

impl Names {
    fn host(&self) -> String {
        format!("metadata-{}", self.lab)
    }

    fn guest(&self, guest: &str) -> String {
        format!("{}-{guest}", self.lab)
    }

    /// An abstract socket cannot be left behind. It keeps a second lab from using the same names.
    fn lock(&self) -> anyhow::Result<UnixListener> {
        let address = SocketAddr::from_abstract_name(self.host()).context("name the lab's lock")?;
        UnixListener::bind_addr(&address).context("another lab runs on this machine")
    }

    fn clean_up(&self) {
        let mut namespaces = vec![self.host(), agent::portal_of(&self.host())];
        namespaces.extend(GUESTS.map(|(_, guest, _)| self.guest(guest)));
        for what in leftovers::remove(&self.host(), &namespaces) {
            print(format_args!("removed a leftover of an earlier lab: {what}"));
        }
    }
}

async fn run(names: &Names, binary: PathBuf, agent_args: &[String], mut stop: Stop) -> anyhow::Result<()> {
    let host = Host::named(&names.host());
    let nova = NovaStandIn::start(host.netns());
    let guests = plug(names, &host, &nova);
    let install = Agent::on(&host, &nova).binary(binary).pass_output();
    let agent = guests.iter().fold(install, |install, guest| install.port(&guest.port)).install();
    let process = agent.spawn(agent_args);
    if !ready(&process, &mut stop).await? {
        return Ok(());
    }

    print(format_args!(
        "\nThe lab is up: four guests, two networks, each address twice. Nova is {}.",
        nova.address()
    ));
    for guest in &guests {
        print(format_args!(
            "\n  ip netns exec {} curl -s http://169.254.169.254{DOCUMENT}",
            guest.netns().name()
        ));
        print(format_args!("    {}", summary(guest)));
    }
    print("\nNova's requests are shown below. Press Ctrl-C to stop the lab.\n");
    let ended = watch(&nova, &process, &mut stop).await;
    if ended.is_ok() {
        print("\nStopping the agent and removing everything.");
        let status = process.stop();
        ensure!(status.success(), "the agent exited with {status}");
    }
    ended
}

/// Waits for the agent. Returns false if interrupted.
async fn ready(process: &AgentProcess, stop: &mut Stop) -> anyhow::Result<bool> {
    let deadline = Instant::now() + READY_WITHIN;
    loop {
        match process.ready_within(Duration::from_millis(100)) {
            Ok(()) => return Ok(true),
            Err(NotReady::Late { .. }) if Instant::now() < deadline => {}
            Err(e) => return Err(e.into()),
        }
        if timeout(Duration::from_millis(10), stop.asked()).await.is_ok() {
            return Ok(false);
        }
    }
}

fn plug(names: &Names, host: &Host, nova: &NovaStandIn) -> Vec<Guest> {
    let red = host.network();
    let blue = host.network();
    let plug = |(network, name, address): (&str, &str, [u8; 4])| {
        let network = if network == "red" { &red } else { &blue };
        let mut spec = network.spec(Ipv4Addr::from(address));
        spec.namespace = Some(names.guest(name));
        let guest = network.plug(spec);
        nova.add(Instance { name: name.to_owned(), ..Instance::from_port(&guest.port) });
        guest
    };
    GUESTS.into_iter().map(plug).collect()
}

/// Returns a guest's identity as the metadata service reports it.
fn summary(guest: &Guest) -> String {
    let response = match guest.try_get(DOCUMENT) {
        Ok(response) => response,
        Err(e) => return format!("no response: {e}"),
    };
    let document: serde_json::Value = serde_json::from_slice(&response.body).unwrap_or_default();
    match (document["hostname"].as_str(), document["uuid"].as_str()) {
        (Some(hostname), Some(uuid)) => format!("{hostname} {uuid}"),
        _ => response.status_line,
    }
}

/// Prints a line per request until interrupted or until the agent exits.
async fn watch(nova: &NovaStandIn, process: &AgentProcess, stop: &mut Stop) -> anyhow::Result<()> {
    let mut requests = nova.subscribe();
    // The standard library cannot wait for a child and another event at once.
    let mut look = interval(Duration::from_millis(500));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.asked() => return Ok(()),
            _ = look.tick() => {
                if let Some(status) = process.exited() {
                    bail!("the agent exited: {status}");
                }
            }
            Some(request) = requests.recv() => {
                let header = |name| request.header(name).unwrap_or_else(|| "-".to_owned());
                print(format_args!(
                    "{} {} instance {} project {} for {}",
                    request.method,
                    request.path,
                    header("x-instance-id"),
                    header("x-tenant-id"),
                    header("x-forwarded-for"),
                ));
            }
        }
    }
}
