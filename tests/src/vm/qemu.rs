//! A qemu process: an emulated machine with a tap device and two serial lines. The first is the
//! console and goes to a file. The second is qemu's standard input and output and carries the
//! guest's data.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

use anyhow::{Context, Error, Result, anyhow};
use metadata_agent::ids::MacAddress;
use tempfile::TempDir;

use super::guest::Kernel;
use crate::port::Port;
use crate::topology::{Host, Network};

/// The work that guest and host leave to the device: partial checksums and frames beyond the MTU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offloads {
    /// All offloads of virtio-net, with a vnet header on the tap.
    On,
    /// None, and no vnet header: complete checksums, frames of one MTU.
    Off,
}

/// The guest's network device and the tap at its other end.
#[derive(Clone, Debug)]
pub struct Nic {
    host: Host,
    tap: String,
    mac: MacAddress,
    offloads: Offloads,
}

impl Nic {
    /// Creates the port's tap and adds it to the network's bridge. It is removed with the host.
    pub fn plug(network: &Network, port: &Port, offloads: Offloads) -> Self {
        let (host, tap) = (network.host().clone(), port.tap());
        host.tap(&tap);
        network.enslave(&tap);
        Self { host, tap, mac: port.mac, offloads }
    }

    fn arguments(&self) -> [String; 4] {
        let state = match self.offloads {
            Offloads::On => "on",
            Offloads::Off => "off",
        };
        let features = [
            "csum",
            "gso",
            "guest_csum",
            "guest_tso4",
            "guest_tso6",
            "guest_ecn",
            "guest_ufo",
            "host_tso4",
            "host_tso6",
            "host_ecn",
            "host_ufo",
        ];
        let mut device = format!("virtio-net-pci,netdev=tap,romfile=,mac={}", self.mac);
        for feature in features {
            device.extend([",", feature, "=", state]);
        }
        let netdev = format!("tap,id=tap,ifname={},script=no,downscript=no,vnet_hdr={state}", self.tap);
        ["-netdev".to_owned(), netdev, "-device".to_owned(), device]
    }
}

/// The other parameters of the machine.
pub struct Machine<'a> {
    pub memory_mib: u32,
    /// Additions to the kernel's command line.
    pub boot: &'a str,
    /// Additions to qemu's command line.
    pub extra: &'a [String],
}

/// A running guest. It is killed on drop.
pub struct Qemu {
    process: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    logs: TempDir,
}

impl Qemu {
    /// Starts a guest. With `nic` it runs in the namespace of the tap.
    pub fn start(kernel: &Kernel, nic: Option<&Nic>, machine: &Machine<'_>) -> Result<Self> {
        let logs = tempfile::tempdir().context("create a directory for the guest's logs")?;
        let errors = File::create(logs.path().join("qemu")).context("create qemu's log")?;
        let boot =
            format!("console=ttyS0 loglevel=7 panic=-1 mitigations=off net.ifnames=0 {}", machine.boot);
        let qemu = "qemu-system-x86_64";
        let mut command = nic.map_or_else(|| Command::new(qemu), |nic| nic.host.netns().command(qemu));
        command
            .args([
                "-M",
                "q35,accel=tcg",
                "-cpu",
                "qemu64,+rdrand",
                "-smp",
                "1",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-display", "none", "-no-reboot", "-m", &machine.memory_mib.to_string()])
            .args(["-append", &boot, "-kernel"])
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(&kernel.initramfs)
            .arg("-serial")
            .arg(format!("file:{}", logs.path().join("console").display()))
            .args(["-chardev", "stdio,id=line,signal=off", "-serial", "chardev:line"])
            .args(nic.into_iter().flat_map(Nic::arguments))
            .args(machine.extra)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(errors);
        let mut process = command.spawn().with_context(|| format!("start {command:?}"))?;
        let (Some(input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
            unreachable!("both were asked for as pipes")
        };
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Ok(Self { process, input, lines, logs })
    }

    /// Returns the guest's next line, or `None` after it has powered off.
    pub fn line(&self, deadline: Instant) -> Result<Option<String>> {
        match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => Ok(Some(line)),
            Err(RecvTimeoutError::Disconnected) => Ok(None),
            Err(RecvTimeoutError::Timeout) => Err(self.fault("the guest kept silent beyond the deadline")),
        }
    }

    /// Sends a line to the guest.
    pub fn say(&mut self, line: &str) -> Result<()> {
        let written = writeln!(self.input, "{line}").and_then(|()| self.input.flush());
        written.map_err(|error| self.fault(&format!("the guest does not listen: {error}")))
    }

    /// Returns an error with the recent output of guest and qemu.
    pub fn fault(&self, what: &str) -> Error {
        let tail = |name: &str| tail(&self.logs.path().join(name));
        anyhow!("{what}\n-- qemu --\n{}\n-- the guest's console --\n{}", tail("qemu"), tail("console"))
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only if it has already exited.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn tail(log: &Path) -> String {
    const LINES: usize = 60;
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
