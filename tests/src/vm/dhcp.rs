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

/// A running DHCP server. Dropped, it is killed.
pub struct Dhcp {
    process: Child,
}

impl Dhcp {
    /// Serves the port its address and, by option 121, the network's gateway as next hop to everything and to
    /// 169.254.169.254, from now on and from inside `netns`, whose `eth0` is in the network with an address of its
    /// own.
    ///
    /// # Errors
    /// When dnsmasq cannot be started or does not come up; the error holds its log.
    pub fn serve(netns: &Netns, network: &Network, port: &Port) -> Result<Self> {
        let &Network { gateway, prefix, .. } = network;
        let mac = port.mac;
        let address = port.ipv4().context("a lease is an IPv4 address")?;
        let bits = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
        let (netmask, subnet) = (Ipv4Addr::from(bits), Ipv4Addr::from(u32::from(gateway) & bits));
        let mut command = netns.command("dnsmasq");
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
