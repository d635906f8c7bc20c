//! The signature that proves an instance id to Nova: lower-case hex of HMAC-SHA256 with a shared
//! secret over the id's text (neutron/common/utils.py, `sign_instance_id`). Only this
//! file uses a secret to sign.
//!
//! During a rotation there are several secrets. Nova first gets a signature by the secret that it
//! accepted last; if it answers 403, it gets one by each of the others, once. A request
//! signs only after the secrets were replaced: each client identity keeps its signatures.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use arc_swap::ArcSwap;
use hmac::{Hmac, KeyInit, Mac};
use hyper::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;
use tokio::sync::Notify;

use crate::ids::InstanceId;

/// Signs instance ids with the shared secrets. An empty secret signs too, as in Neutron. Clones
/// share the secrets.
#[derive(Clone, Debug)]
pub struct Signer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    keys: ArcSwap<Keys>,
    refused: Notify,
}

/// The secrets in force. Never empty.
#[derive(Debug)]
struct Keys {
    secrets: Vec<SecretString>,
    /// Index of the secret that Nova accepted last.
    preferred: AtomicUsize,
}

impl Signer {
    /// Signs with the `metadata_proxy_shared_secret`.
    #[must_use]
    pub fn new(secret: SecretString) -> Self {
        let keys = ArcSwap::from_pointee(Keys { secrets: vec![secret], preferred: AtomicUsize::new(0) });
        Self { shared: Arc::new(Shared { keys, refused: Notify::new() }) }
    }

    /// Puts other secrets in force for requests that begin from now on.
    ///
    /// The secret that Nova accepted last stays the first to be tried, if it is among them. An
    /// empty list changes nothing.
    pub fn replace(&self, secrets: Vec<SecretString>) {
        let before = self.shared.keys.load();
        let accepted = before.preferred.load(Ordering::Relaxed);
        let accepted = before.secrets.get(accepted).map(ExposeSecret::expose_secret);
        let preferred =
            secrets.iter().position(|secret| Some(secret.expose_secret()) == accepted).unwrap_or(0);
        if !secrets.is_empty() {
            self.shared.keys.store(Arc::new(Keys { secrets, preferred: AtomicUsize::new(preferred) }));
        }
    }

    /// Waits until Nova has refused all of the secrets. The caller then looks for new ones.
    pub(crate) async fn refused(&self) {
        self.shared.refused.notified().await;
    }

    /// Signs with each secret in force.
    pub(super) fn sign(&self, instance: &InstanceId) -> Signatures {
        let keys = self.shared.keys.load_full();
        let text = instance.to_string();
        let values = keys.secrets.iter().map(|secret| sign_text(secret, &text)).collect();
        Signatures { keys, values }
    }

    /// Returns whether these signatures were made with the secrets in force.
    pub(super) fn made(&self, signatures: &Signatures) -> bool {
        Arc::ptr_eq(&self.shared.keys.load(), &signatures.keys)
    }

    /// Reports that Nova accepted none of the secrets.
    pub(super) fn all_refused(&self) {
        self.shared.refused.notify_one();
    }
}

/// One signature of an instance id for each secret.
#[derive(Debug)]
pub(crate) struct Signatures {
    keys: Arc<Keys>,
    values: Vec<HeaderValue>,
}

impl Signatures {
    /// Returns the signature to send first, made with the secret that Nova accepted last, and its
    /// index.
    pub(crate) fn first(&self) -> (usize, &HeaderValue) {
        let number = self.keys.preferred.load(Ordering::Relaxed);
        (number, &self.values[number])
    }

    /// Returns all signatures but one, to try next.
    pub(crate) fn others(&self, refused: usize) -> impl Iterator<Item = (usize, &HeaderValue)> {
        self.values.iter().enumerate().filter(move |(number, _)| *number != refused)
    }

    /// Remembers that Nova accepted a signature.
    pub(crate) fn accepted(&self, number: usize) {
        self.keys.preferred.store(number, Ordering::Relaxed);
    }
}

fn sign_text(secret: &SecretString, text: &str) -> HeaderValue {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.expose_secret().as_bytes()) else {
        unreachable!("HMAC takes keys of any length")
    };
    mac.update(text.as_bytes());
    let mut hex = [0; 64];
    for (pair, byte) in hex.chunks_exact_mut(2).zip(mac.finalize().into_bytes()) {
        pair[0] = hex_digit(byte >> 4);
        pair[1] = hex_digit(byte & 15);
    }
    let Ok(mut value) = HeaderValue::from_bytes(&hex) else { unreachable!("hex digits are visible ASCII") };
    // Debug output then hides the value.
    value.set_sensitive(true);
    value
}

const fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSTANCE: &str = "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b";

    fn secrets(names: &[&str]) -> Vec<SecretString> {
        names.iter().map(|name| (*name).into()).collect()
    }

    fn order(signer: &Signer) -> Vec<usize> {
        let signatures = signer.sign(&INSTANCE.parse().unwrap());
        let (first, _) = signatures.first();
        std::iter::once(first).chain(signatures.others(first).map(|(number, _)| number)).collect()
    }

    #[test]
    fn signatures_are_those_of_neutron() {
        for (secret, text, want) in [
            ("secret", "foo", "773ba44693c7553d6ee20f61ea5d2757a9a4f4a44d2841ae4e95b52e4cd62db4"),
            ("foo", "foo", "08ba357e274f528065766c770a639abf6809b39ccfd37c2a3157c7f51954da0a"),
            ("secret", INSTANCE, "8030f3b14d8b9256158b93785c622be3b4c20daf8bbc1deacd3051b3fedbdf90"),
            ("", INSTANCE, "641949555b1f64905dcf07afb9b4efdeb63dc9af8f6aa5b5612ec33046732670"),
        ] {
            assert_eq!(sign_text(&secret.into(), text), want, "{secret:?} over {text:?}");
        }
    }

    #[test]
    fn an_id_is_signed_in_its_canonical_text() {
        let signer = Signer::new("secret".into());
        let shouted: InstanceId = INSTANCE.to_uppercase().parse().unwrap();
        let signatures = signer.sign(&shouted);
        assert_eq!(signatures.first().1, sign_text(&"secret".into(), INSTANCE));
    }

    #[test]
    fn the_secret_that_nova_accepted_last_is_tried_first() {
        let signer = Signer::new("a".into());
        signer.replace(secrets(&["a", "b", "c"]));
        assert_eq!(order(&signer), [0, 1, 2]);
        signer.sign(&INSTANCE.parse().unwrap()).accepted(1);
        assert_eq!(order(&signer), [1, 0, 2]);
        signer.replace(secrets(&["d", "c", "b"]));
        assert_eq!(order(&signer), [2, 0, 1], "b is the third now");
        signer.replace(secrets(&["d", "e"]));
        assert_eq!(order(&signer), [0, 1], "b is gone");
        signer.replace(Vec::new());
        assert_eq!(order(&signer), [0, 1], "no secret at all is nothing to sign with");
    }

    #[test]
    fn signatures_last_until_the_secrets_are_replaced() {
        let signer = Signer::new("a".into());
        let signatures = signer.sign(&INSTANCE.parse().unwrap());
        assert!(signer.clone().made(&signatures));
        signer.replace(secrets(&["b"]));
        assert!(!signer.made(&signatures));
    }

    #[test]
    fn neither_secrets_nor_signatures_are_printed() {
        let signer = Signer::new("hunter2".into());
        let signatures = signer.sign(&INSTANCE.parse().unwrap());
        let printed = format!("{signer:?} {signatures:?}");
        let signature = signatures.values[0].to_str().unwrap();
        assert!(!printed.contains("hunter2") && !printed.contains(signature), "{printed}");
    }
}
