//! Rotation of the shared secret, first on either side, without failed requests.

use std::fs;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use hmac::{Hmac, KeyInit, Mac};
use metadata_agent::proxy::{ProxyConfig, Signer};
use metadata_agent::secrets::SecretFiles;
use sha2::Sha256;
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

async fn agent(nova: &CheckingNova, signer: &Signer) -> Agent {
    Agent::with(ProxyConfig::default(), upstream(nova.nova.port), FakeDirectory::new(known_by(signer))).await
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
    let directory = FakeDirectory::new(known_by(&signer(&["secret", "other"])));
    let agent = Agent::with(ProxyConfig::default(), upstream(nova.port), directory).await;
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
    let agent = agent(&nova, &signer).await;
    assert_status(&agent.ask(GET).await, 200);

    let stop = CancellationToken::new();
    let kept = tokio::spawn(files.keep(signer, stop.clone()));
    nova.change("two");
    fs::write(folder.path().join("new"), "two\n").unwrap();
    fs::rename(folder.path().join("new"), &path).unwrap();
    soon("the new secret", async { while !agent.ask(GET).await.starts_with("HTTP/1.1 200 ") {} }).await;
    stop.cancel();
    soon("the end", kept).await.unwrap();
}
