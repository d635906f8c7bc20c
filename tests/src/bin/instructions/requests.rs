//! One request through the agent's own proxy in steady state: from the guest's bytes in its socket
//! to the response's bytes in the guest's socket.
//!
//! Proxy, directory and upstream are the agent's, on real sockets and one thread, so that the order
//! is always the same. Guest and Nova act outside the counted sections.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, ensure};
use metadata_agent::directory::{Binding, BindingChanges, Credentials, Directory, Owner};
use metadata_agent::ids::IfIndex;
use metadata_agent::inventory::{Port, PortAddressing};
use metadata_agent::nova_access::{self, NovaTls};
use metadata_agent::proxy::metrics::Metrics;
use metadata_agent::proxy::{
    ClientLookup, ClientQuery, Endpoint, LookupFuture, LookupOutcome, Proxy, ProxyConfig, Scheme, Upstream,
    UpstreamConfig,
};
use metadata_agent::secrets::Signer;
use metadata_ebpf::identity::{AttachmentId, ClientAddress};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::meter::{Performance, Subject};

/// A request of cloud-init.
const KEPT: &str = "GET /openstack/2018-08-27/meta_data.json HTTP/1.1\r\nHost: 169.254.169.254\r\n\
    User-Agent: Cloud-Init/24.4\r\nAccept: */*\r\n\r\n";
const NEW: &str = "GET /openstack/2018-08-27/meta_data.json HTTP/1.1\r\nHost: 169.254.169.254\r\n\
    User-Agent: Cloud-Init/24.4\r\nAccept: */*\r\nConnection: close\r\n\r\n";
/// A response of Nova with a body of one KiB.
const HEAD: &str = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1024\r\n\
    Date: Mon, 02 Mar 2026 10:00:00 GMT\r\nServer: Apache/2.4.62 (Debian)\r\n\r\n";
const BODY: usize = 1024;
/// The number of other attachments.
const OTHERS: u32 = 99;
/// The number of rounds after which every pool and every buffer exists.
const WARM_UP: usize = 50;
const ROUNDS: usize = 200;

pub fn perform() -> anyhow::Result<Vec<Subject>> {
    Ok(vec![kept()?, new()?])
}

/// Counts requests on a kept connection.
fn kept() -> anyhow::Result<Subject> {
    let mut line = Line::lay()?;
    let (guest, server) = line.connect()?;
    line.runtime.spawn(line.serve(server));
    let mut performance = Performance::begin("");
    for _ in 0..WARM_UP {
        line.ask(&mut performance, &guest, KEPT)?;
    }
    let mut performance = Performance::begin("request: on a kept connection");
    for _ in 0..ROUNDS {
        performance.round();
        line.ask(&mut performance, &guest, KEPT)?;
    }
    Ok(performance.end())
}

/// Counts requests on new connections, from accept to close.
fn new() -> anyhow::Result<Subject> {
    let mut line = Line::lay()?;
    let mut performance = Performance::begin("");
    for _ in 0..WARM_UP {
        line.ask_anew(&mut performance)?;
    }
    let mut performance = Performance::begin("request: on a new connection");
    for _ in 0..ROUNDS {
        performance.round();
        line.ask_anew(&mut performance)?;
    }
    Ok(performance.end())
}

/// Finds no client: no attachment here is shared.
#[derive(Debug)]
struct NoLookup;

impl ClientLookup for NoLookup {
    fn find<'a>(&'a self, _: &'a ClientQuery) -> LookupFuture<'a> {
        Box::pin(std::future::ready(LookupOutcome::NotFound))
    }
}

/// The agent between a guest and a Nova.
struct Line {
    runtime: Runtime,
    proxy: Arc<Proxy>,
    client: ClientAddress,
    listener: TcpListener,
    /// Nova's end of the proxy's connection.
    nova: Option<TcpStream>,
    answer: Vec<u8>,
    cancel: CancellationToken,
}

impl Line {
    fn lay() -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("start a runtime")?;
        let listener = runtime.block_on(TcpListener::bind(("127.0.0.1", 0))).context("listen")?;
        let endpoint = Endpoint::new(Scheme::Http, "127.0.0.1", listener.local_addr()?.port())?;
        let metrics = Arc::new(Metrics::default());
        let upstream = UpstreamConfig::new(vec![endpoint]);
        let (access, _) = nova_access::open(&upstream, NovaTls::default())?;
        let upstream = Upstream::new(upstream, access, Arc::clone(&metrics), TaskTracker::new())?;
        let attachment = AttachmentId::new(1).context("attachments count from 1")?;
        let directory = Arc::clone(directory()?.clients());
        let proxy =
            Proxy::new(directory, Arc::new(NoLookup), Arc::new(upstream), ProxyConfig::default(), metrics);
        let client = ClientAddress::ipv4(attachment, [10, 0, 0, 5]);
        let answer = [HEAD.as_bytes(), &[b'x'; BODY]].concat();
        Ok(Self { runtime, proxy, client, listener, nova: None, answer, cancel: CancellationToken::new() })
    }

    fn connect(&self) -> io::Result<(UnixStream, UnixStream)> {
        let _entered = self.runtime.enter();
        UnixStream::pair()
    }

    fn serve(&self, server: UnixStream) -> impl Future<Output = ()> + use<> {
        Arc::clone(&self.proxy).serve_connection(server, self.client, self.cancel.clone())
    }

    fn ask_anew(&mut self, performance: &mut Performance) -> anyhow::Result<()> {
        let (guest, server) = self.connect()?;
        let task = performance.count(|| self.runtime.spawn(self.serve(server)));
        self.ask(performance, &guest, NEW)?;
        drop(guest);
        let ended = performance.count(|| task.map(|task| self.runtime.block_on(task)));
        ended.flatten().context("nothing was counted")?.context("the connection's task")
    }

    fn ask(
        &mut self,
        performance: &mut Performance,
        guest: &UnixStream,
        question: &str,
    ) -> anyhow::Result<()> {
        ensure!(
            guest.try_write(question.as_bytes())? == question.len(),
            "the socket does not accept a whole request"
        );
        let nova = match self.nova.take() {
            Some(nova) => nova,
            None => self.runtime.block_on(self.listener.accept()).context("accept the proxy")?.0,
        };
        let mut read = Vec::with_capacity(4096);
        while !read.ends_with(b"\r\n\r\n") {
            performance.count(|| self.runtime.block_on(nova.readable())).context("nothing was counted")??;
            take(|buffer| nova.try_read(buffer), &mut read)?;
        }
        ensure!(
            nova.try_write(&self.answer)? == self.answer.len(),
            "the socket does not accept a whole response"
        );
        self.nova = Some(nova);
        read.clear();
        while !is_whole(&read) {
            performance
                .count(|| self.runtime.block_on(guest.readable()))
                .context("nothing was counted")??;
            take(|buffer| guest.try_read(buffer), &mut read)?;
        }
        ensure!(read.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&read));
        Ok(())
    }
}

/// Reads all available bytes, so that the runtime sees the next ones as a new event.
fn take(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>, into: &mut Vec<u8>) -> anyhow::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match read(&mut buffer) {
            Ok(0) => ensure!(is_whole(into), "closed after {}", String::from_utf8_lossy(into)),
            Ok(some) => into.extend_from_slice(&buffer[..some]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e).context("read"),
        }
        if is_whole(into) {
            return Ok(());
        }
    }
}

fn is_whole(answer: &[u8]) -> bool {
    let head = answer.windows(4).position(|end| end == b"\r\n\r\n");
    head.is_some_and(|head| answer.len() >= head + 4 + BODY)
}

/// Returns a directory with the guest and the other attachments.
fn directory() -> anyhow::Result<Directory> {
    let mut change = BindingChanges::default();
    for number in 1..=OTHERS + 1 {
        let attachment = AttachmentId::new(number).context("attachments count from 1")?;
        let port = Port {
            id: None,
            device: None,
            instance: "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b".parse().context("an instance")?,
            project: "acme".parse().context("a project")?,
            addressing: PortAddressing { fixed_ips: vec![[10, 0, 0, 5].into()], ..PortAddressing::default() },
        };
        let owner = Owner::Known(Arc::new(port));
        let interface = format!("tap{number}");
        let (index, since) = (IfIndex(number), Instant::now());
        let binding = Binding { interface, index, vlan: None, since, unknown_since: since, owner };
        change.updated.push((attachment, Arc::new(binding)));
    }
    let directory = Directory::new(Credentials::Signed(Signer::new("secret".into())));
    directory.publish(&change);
    Ok(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_is_answered_and_counted() {
        for subject in perform().expect("both") {
            assert_eq!(subject.rounds, ROUNDS as u64, "{subject:?}");
            assert!(subject.calls >= 2 * subject.rounds, "{subject:?}");
        }
    }
}
