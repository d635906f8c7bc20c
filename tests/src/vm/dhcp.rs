//! The DHCP server of a network: dnsmasq with one fixed lease, as Neutron's DHCP agent runs it.

use std::io::{BufRead, BufReader};
use std::net::Ipv4Addr;
use std::process::{Child, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::netns::Netns;
use crate::port::Port;
use crate::topology::Network;

const START: Duration = Duration::from_mins(1);

/// A running DHCP server. It is killed on drop.
pub struct Dhcp {
    process: Child,
}

impl Dhcp {
    /// Offers the port its address and, with option 121, routes through the network's gateway, also
    /// to 169.254.169.254. It runs in `netns`, whose `eth0` must be on the network with its own
    /// address.
    ///
    /// # Errors
    /// Returns dnsmasq's log if it does not start.
    pub fn serve(netns: &Netns, network: &Network, port: &Port) -> Result<Self> {
        let &Network { gateway, prefix, .. } = network;
        let mac = port.mac;
        let address = port.ipv4().context("a lease is an IPv4 address")?;
        let bits = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        let (netmask, subnet) = (Ipv4Addr::from(bits), Ipv4Addr::from(u32::from(gateway) & bits));
        let mut command = netns.command("/usr/sbin/dnsmasq");
        command
            .args([
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--log-facility=-",
                "--log-dhcp",
                "--pid-file=",
            ])
            .args(["--port=0", "--leasefile-ro", "--bind-interfaces", "--except-interface=lo"])
            .arg("--interface=eth0")
            .arg(format!("--dhcp-range={subnet},static,{netmask},1h"))
            .arg(format!("--dhcp-host={mac},{address}"))
            .arg(format!("--dhcp-option=option:router,{gateway}"))
            .arg(format!("--dhcp-option=121,169.254.169.254/32,{gateway},0.0.0.0/0,{gateway}"))
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
        let mut log = String::new();
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                // The last step of its start, after the sockets are bound.
                Ok(line) if line.contains("static leases only") => return Ok(server),
                Ok(line) => log.extend([&line, "\n"]),
                Err(RecvTimeoutError::Disconnected) => bail!("dnsmasq exited:\n{log}"),
                Err(RecvTimeoutError::Timeout) => bail!("dnsmasq did not come up:\n{log}"),
            }
        }
    }
}

impl Drop for Dhcp {
    fn drop(&mut self) {
        // Both fail only if it has already exited.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
