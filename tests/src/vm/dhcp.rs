//! The DHCP server of a network: dnsmasq with one fixed lease, as Neutron's DHCP agent runs it.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use metadata_agent::ids::MacAddress;

use super::Place;

const START: Duration = Duration::from_secs(20);

/// What one guest gets.
#[derive(Clone, Copy, Debug)]
pub struct Lease {
    /// The guest's MAC address.
    pub mac: MacAddress,
    /// Its address.
    pub address: Ipv4Addr,
    /// Length of the subnet's prefix. The serving interface must have an address in that subnet.
    pub prefix: u8,
    /// Next hop of the default route.
    pub gateway: Ipv4Addr,
    /// Next hop to 169.254.169.254, by option 121.
    pub metadata_via: Ipv4Addr,
}

/// A running DHCP server. Dropped, it is killed.
pub struct Dhcp {
    process: Child,
}

impl Dhcp {
    /// Serves `lease` on `interface` of the namespace, from now on.
    ///
    /// # Errors
    /// When dnsmasq cannot be started or does not come up; the error holds its log.
    pub fn serve(place: Place<'_>, interface: &str, lease: &Lease) -> Result<Self> {
        let Lease { mac, address, prefix, gateway, metadata_via } = *lease;
        let bits = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        let (netmask, network) = (Ipv4Addr::from(bits), Ipv4Addr::from(u32::from(address) & bits));
        let mut command = place("dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--log-facility=-",
                "--log-dhcp",
                "--pid-file=",
            ])
            .args(["--port=0", "--leasefile-ro", "--bind-interfaces", "--except-interface=lo"])
            .arg(format!("--interface={interface}"))
            .arg(format!("--dhcp-range={network},static,{netmask},1h"))
            .arg(format!("--dhcp-host={mac},{address}"))
            .arg(format!("--dhcp-option=option:router,{gateway}"))
            .arg(format!("--dhcp-option=121,169.254.169.254/32,{metadata_via},0.0.0.0/0,{gateway}"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = command.spawn().with_context(|| format!("start {command:?}"))?;
        let Some(log) = process.stderr.take() else { unreachable!("it was asked for as a pipe") };
        let server = Self { process };

        // Read to the end, or dnsmasq would block on a full pipe.
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(log).lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let deadline = Instant::now() + START;
        let mut said = String::new();
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                // The last step of its start: the sockets are bound by then.
                Ok(line) if line.contains("static leases only") => return Ok(server),
                Ok(line) => said.extend([&line, "\n"]),
                Err(RecvTimeoutError::Disconnected) => bail!("dnsmasq ended:\n{said}"),
                Err(RecvTimeoutError::Timeout) => bail!("dnsmasq did not come up:\n{said}"),
            }
        }
    }
}

impl Drop for Dhcp {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
