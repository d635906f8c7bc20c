//! A guest with kernel and busybox that executes requests. `tests/vm/init` is the other side of the
//! protocol.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest, Sha256};

use super::guest::Kernel;
use super::hex;
use super::qemu::{Machine, Nic, Offloads, Qemu};
use crate::port::Port;
use crate::topology::{Network, NextHop};

const BOOT: Duration = Duration::from_mins(3);
/// Longer than the limit in `tests/vm/fetch`, so that its own error comes first.
const TASK: Duration = Duration::from_mins(4);

/// `VIRTIO_NET_F_CSUM`, `_GUEST_CSUM`, `_GUEST_TSO4`, `_HOST_TSO4` (virtio 1.1, 5.1.3).
const OFFLOAD_BITS: [usize; 4] = [0, 1, 7, 11];

/// A response of the metadata service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub status: u16,
    /// The length of the body. busybox does not keep the body of an error.
    pub length: u64,
    /// SHA-256 of the body in hexadecimal.
    pub sha256: String,
}

impl Answer {
    /// Returns the response that a guest reports if this body arrives unchanged.
    #[must_use]
    pub fn new(status: u16, body: &[u8]) -> Self {
        Self { status, length: body.len() as u64, sha256: hex::encode(&Sha256::digest(body)) }
    }
}

/// A small guest that is up and waits for requests.
pub struct SmallVm {
    qemu: Qemu,
}

impl SmallVm {
    /// Boots a guest on its own port and waits until it listens.
    ///
    /// # Errors
    /// Returns an error if the port does not have an IPv4 address, the images cannot be built or
    /// the guest does not come up within a minute.
    pub fn boot(network: &Network, port: &Port, offloads: Offloads, next_hop: NextHop) -> Result<Self> {
        let address = port.ipv4().context("a small guest is configured for IPv4")?;
        let gateway = match next_hop {
            NextHop::OnLink => String::new(),
            NextHop::Gateway => format!("GATEWAY={} GATEWAY_MAC={}", network.gateway, network.gateway_mac),
        };
        let boot = format!("ADDRESS={address}/{} {gateway}", network.prefix);
        let nic = Nic::plug(network, port, offloads);
        let qemu = Qemu::start(
            &Kernel::prepare()?,
            Some(&nic),
            &Machine { memory_mib: 128, boot: &boot, extra: &[] },
        )?;
        let deadline = Instant::now() + BOOT;
        match qemu.line(deadline)?.as_deref() {
            Some("ready") => Ok(Self { qemu }),
            other => Err(qemu.fault(&format!("the first line of the guest is {other:?} instead of ready"))),
        }
    }

    /// Runs one line of shell text in the guest and returns its output.
    ///
    /// # Errors
    /// Returns an error if it exits with a code other than 0 or takes longer than 90 s.
    pub fn run(&mut self, script: &str) -> Result<String> {
        ensure!(!script.contains('\n'), "`{script}` is more than one line");
        self.qemu.say(script)?;
        let deadline = Instant::now() + TASK;
        let answer = self.qemu.line(deadline).with_context(|| format!("run `{script}`"))?;
        let fault = |answer| self.qemu.fault(&format!("`{script}` answered {answer:?}"));
        let Some((code, output)) = answer.as_deref().map(|line| line.split_once(' ').unwrap_or((line, "")))
        else {
            return Err(fault("by powering off"));
        };
        let Some(output) = hex::decode(output) else { return Err(fault(output)) };
        let output = String::from_utf8_lossy(&output).into_owned();
        if code == "0" { Ok(output) } else { Err(fault(&format!("exit code {code}: {output}"))) }
    }

    /// Returns the offloads that the guest's driver and the device have negotiated.
    ///
    /// # Errors
    /// Returns an error if they have negotiated only some of them.
    pub fn offloads(&mut self) -> Result<Offloads> {
        let features = self.run("cat /sys/bus/virtio/devices/virtio0/features")?;
        let agreed = OFFLOAD_BITS.map(|bit| features.as_bytes().get(bit) == Some(&b'1'));
        match agreed {
            [true, true, true, true] => Ok(Offloads::On),
            [false, false, false, false] => Ok(Offloads::Off),
            _ => bail!("offloads in part: of the features {OFFLOAD_BITS:?} the guest has {agreed:?}"),
        }
    }

    /// Requests `path` from the metadata service.
    ///
    /// # Errors
    /// Returns an error if the response is incomplete. An error status is a response.
    pub fn get(&mut self, path: &str) -> Result<Answer> {
        let output = self.run(&format!("fetch '{path}'"))?;
        parse(&output).with_context(|| format!("GET {path} gave `{output}`"))
    }

    /// Posts the first `length` bytes of [`numbered_lines`] to `path`.
    ///
    /// # Errors
    /// Returns the errors of [`Self::get`].
    pub fn post(&mut self, path: &str, length: usize) -> Result<Answer> {
        let script =
            format!("seq {length} | head -c {length} >/tmp/post; fetch '{path}' --post-file /tmp/post");
        let output = self.run(&script)?;
        parse(&output).with_context(|| format!("POST {path} gave `{output}`"))
    }
}

fn parse(output: &str) -> Option<Answer> {
    let mut words = output.split_whitespace();
    let status = words.next()?.parse().ok()?;
    let length = words.next()?.parse().ok()?;
    Some(Answer { status, length, sha256: words.next()?.to_owned() })
}

/// Returns "1\n2\n3\n..." cut to `length` bytes, which [`SmallVm::post`] sends. No part repeats at
/// a distance at which a lost or doubled segment would go unnoticed.
pub fn numbered_lines(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 8);
    for number in 1.. {
        if bytes.len() >= length {
            break;
        }
        bytes.extend_from_slice(format!("{number}\n").as_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbered_lines_are_cut_to_length() {
        assert_eq!(numbered_lines(0), b"");
        assert_eq!(numbered_lines(20), b"1\n2\n3\n4\n5\n6\n7\n8\n9\n10");
    }

    #[test]
    fn an_answer_line_has_three_words() {
        let answer = parse("404 0 e3b0\n").unwrap();
        assert_eq!(answer, Answer { status: 404, length: 0, sha256: "e3b0".to_owned() });
        assert_eq!(parse("404 0"), None);
        assert_eq!(parse("wget: can't connect"), None);
    }
}
