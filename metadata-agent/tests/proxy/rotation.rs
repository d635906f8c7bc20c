//! Rotation of the shared secret, first on either side, without failed requests.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use hmac::{Hmac, KeyInit, Mac};
use metadata_agent::directory::{Binding, BindingChanges, Credentials, Directory, Owner};
use metadata_agent::ids::{IfIndex, MacAddress, NetworkOrRouter};
use metadata_agent::inventory::{Port, PortAddressing};
use metadata_agent::proxy::{
    ClientDirectory, ClientLookup, ClientQuery, LookupFuture, LookupOutcome, LookupState, ProxyConfig,
    SecretStatus,
};
use metadata_agent::secrets::{SecretFiles, Signer};
use metadata_ebpf::identity::ClientAddress;
use sha2::Sha256;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::rig::*;

const FORBIDDEN: &str = "HTTP/1.1 403 Forbidden\r\nContent-Length: 2\r\n\r\nno";

/// Checks signatures as Nova does, with a secret that can change.
struct CheckingNova {
    nova: Nova,
    secret: Arc<Mutex<String>>,
}

impl CheckingNova {
    async fn with(secret: &str) -> Self {
        let secret = Arc::new(Mutex::new(secret.to_owned()));
        let own = Arc::clone(&secret);
        let nova = Nova::start(move |_, _, request| {
            let head = &request[..find(request, b"\r\n\r\n").unwrap() + 4];
            let signed = header(head, "x-instance-id").unwrap();
            let mut mac = Hmac::<Sha256>::new_from_slice(own.lock().unwrap().as_bytes()).unwrap();
            mac.update(signed.as_bytes());
            let hex = header(head, "x-instance-id-signature").unwrap();
            let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
            let signature: Vec<u8> = (0..hex.len()).step_by(2).map(byte).collect();
            let taken = mac.verify_slice(&signature).is_ok();
            Act::Say(if taken { OK.into() } else { FORBIDDEN.into() })
        })
        .await;
        Self { nova, secret }
    }

    fn change(&self, secret: &str) {
        secret.clone_into(&mut self.secret.lock().unwrap());
    }

    /// Returns the requests since the last call.
    fn requests(&mut self) -> Vec<String> {
        std::iter::from_fn(|| self.nova.seen.try_recv().ok())
            .map(|(_, request)| String::from_utf8(request).unwrap())
            .collect()
    }
}

fn signer(secrets: &[&str]) -> Signer {
    let signer = Signer::new("".into());
    signer.replace(secrets.iter().map(|secret| (*secret).into()).collect());
    signer
}

/// Returns a directory that knows the guest of an attachment of its own.
fn directory(signer: &Signer) -> Arc<Directory> {
    let addressing =
        PortAddressing { fixed_ips: vec!["10.0.0.5".parse().unwrap()], ..PortAddressing::default() };
    let (instance, project) = (INSTANCE.parse().unwrap(), "acme".parse().unwrap());
    let owner = Owner::Known(Arc::new(Port { id: None, device: None, instance, project, addressing }));
    let (interface, since) = ("tap7".to_owned(), Instant::now());
    let binding = Binding { interface, index: IfIndex(7), vlan: None, since, unknown_since: since, owner };
    let updated = vec![(CLIENT().attachment, Arc::new(binding))];
    let directory = Directory::new(Credentials::Signed(signer.clone()));
    directory.publish(&BindingChanges { updated, ..BindingChanges::default() });
    Arc::new(directory)
}

async fn agent(nova: &CheckingNova, signer: &Signer) -> Agent {
    Agent::with(ProxyConfig::default(), upstream(nova.nova.port), directory(signer).clients().clone()).await
}

#[tokio::test]
async fn an_accepted_second_secret_becomes_the_first() {
    let mut nova = CheckingNova::with("old").await;
    let agent = agent(&nova, &signer(&["new", "old"])).await;
    for requests in [2, 1, 1] {
        assert_status(&agent.ask(GET).await, 200);
        assert_eq!(nova.requests().len(), requests);
    }
    // Nova gets the new secret: one request is sent twice.
    nova.change("new");
    for requests in [2, 1] {
        assert_status(&agent.ask(GET).await, 200);
        assert_eq!(nova.requests().len(), requests);
    }
    agent.assert_counted("metadata_upstream_forbidden_total 2");
}

#[tokio::test]
async fn a_post_is_repeated_with_its_body() {
    let mut nova = CheckingNova::with("old").await;
    let agent = agent(&nova, &signer(&["new", "old"])).await;
    let post = "POST /openstack/2013-04-04/password HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc";
    assert_status(&agent.ask(post).await, 200);
    let requests = nova.requests();
    assert_eq!(requests.len(), 2);
    for request in requests {
        assert!(request.starts_with("POST /openstack/2013-04-04/password "), "{request}");
        assert!(request.ends_with("\r\n\r\nabc"), "{request}");
    }
}

#[tokio::test]
async fn a_403_passes_after_each_secret_was_tried() {
    let mut nova = CheckingNova::with("other").await;
    let agent = agent(&nova, &signer(&["a", "b", "c"])).await;
    for _ in 0..2 {
        let answer = agent.ask(GET).await;
        assert_status(&answer, 403);
        assert!(answer.ends_with("\r\n\r\nno"), "{answer}");
        assert_eq!(nova.requests().len(), 3);
    }
}

#[tokio::test]
async fn with_one_secret_no_request_is_repeated() {
    let mut nova = CheckingNova::with("other").await;
    let agent = agent(&nova, &signer(&["a"])).await;
    assert_status(&agent.ask(GET).await, 403);
    assert_eq!(nova.requests().len(), 1);
}

/// Neither a 403 for the path nor an error of the server proves that a secret is right.
#[tokio::test]
async fn a_failing_nova_does_not_make_a_secret_preferred() {
    let mut nova = Nova::start(|_, _, request| {
        let first = header(request, "x-instance-id-signature").as_deref() == Some(SIGNATURE);
        Act::Say(if first { FORBIDDEN } else { "HTTP/1.1 500 Oops\r\nContent-Length: 0\r\n\r\n" }.into())
    })
    .await;
    let directory = directory(&signer(&["secret", "other"]));
    let agent = Agent::with(ProxyConfig::default(), upstream(nova.port), directory.clients().clone()).await;
    for _ in 0..2 {
        assert_status(&agent.ask(GET).await, 500);
        for tried_first in [true, false] {
            assert_eq!(nova.next_text().await.contains(SIGNATURE), tried_first);
        }
    }
}

#[tokio::test]
async fn a_changed_secret_file_needs_no_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("secret");
    fs::write(&path, "one\n").unwrap();
    let files = SecretFiles::open("".into(), std::slice::from_ref(&path)).unwrap();
    let signer = files.signer();
    let nova = CheckingNova::with("one").await;
    let directory = directory(&signer);
    let config = upstream(nova.nova.port);
    let agent = Agent::with(ProxyConfig::default(), config, directory.clients().clone()).await;
    let mut guest = agent.guest().await;
    guest.send(GET).await;
    assert_status(&guest.answer().await, 200);

    let stop = CancellationToken::new();
    let (_own, own) = watch::channel("".into());
    let kept = tokio::spawn(files.keep(own, signer, stop.clone()));
    let token = stop.clone();
    let followed = tokio::spawn(async move { directory.follow_secrets(token).await });
    nova.change("two");
    fs::write(folder.path().join("new"), "two\n").unwrap();
    fs::rename(folder.path().join("new"), &path).unwrap();
    soon("the new secret", async { while !agent.ask(GET).await.starts_with("HTTP/1.1 200 ") {} }).await;
    guest.send(GET).await;
    assert_status(&guest.answer().await, 200);
    stop.cancel();
    soon("the end", kept).await.unwrap();
    soon("the end", followed).await.unwrap();
}

/// One attachment that guests share. A look-up signs, and counts.
#[derive(Debug)]
struct SharedAttachment {
    signer: Signer,
    secrets: Arc<SecretStatus>,
    lookups: watch::Sender<usize>,
}

impl ClientDirectory for SharedAttachment {
    fn lookup(&self, _: &ClientAddress) -> LookupState {
        LookupState::Shared(NetworkOrRouter::Network(INSTANCE.parse().unwrap()))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        watch::Sender::new(0).subscribe()
    }

    fn guest_mac(&self, _: &ClientAddress) -> Option<MacAddress> {
        Some(MacAddress([0xfa, 0x16, 0x3e, 0, 0, 1]))
    }

    fn secrets(&self) -> Arc<SecretStatus> {
        Arc::clone(&self.secrets)
    }
}

impl ClientLookup for SharedAttachment {
    fn find<'a>(&'a self, _: &'a ClientQuery) -> LookupFuture<'a> {
        self.lookups.send_modify(|lookups| *lookups += 1);
        Box::pin(std::future::ready(LookupOutcome::Identified(Arc::new(identity(&self.signer)))))
    }
}

#[tokio::test]
async fn a_kept_connection_of_a_shared_attachment_gets_the_new_secret() {
    let nova = CheckingNova::with("one").await;
    let signer = signer(&["one"]);
    let secrets = directory(&signer).clients().secrets();
    let shared =
        Arc::new(SharedAttachment { signer: signer.clone(), secrets, lookups: watch::Sender::new(0) });
    let (directory, lookup) = (Arc::clone(&shared), Arc::clone(&shared));
    let config = upstream(nova.nova.port);
    let agent = Agent::with_lookup(ProxyConfig::default(), config, directory, lookup).await;
    let mut guest = agent.guest().await;
    for secret in ["one", "two"] {
        nova.change(secret);
        signer.replace(vec![secret.into()]);
        let before = *shared.lookups.borrow();
        for _ in 0..3 {
            guest.send(GET).await;
            assert_status(&guest.answer().await, 200);
        }
        assert_eq!(*shared.lookups.borrow(), before + 1, "the guest is looked up once for {secret}");
    }
}
