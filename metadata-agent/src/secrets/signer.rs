//! The signature that proves an instance id to Nova: HMAC-SHA256 with a shared secret over the id's
//! text (neutron/common/utils.py, `sign_instance_id`). Only this file uses a secret to sign.
//!
//! An identity is signed when it is made, and again when the secrets are replaced. A request of a
//! guest's tap never waits for a signature.

use std::sync::Arc;

use hmac::{Hmac, KeyInit, Mac};
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;
use tokio::sync::watch;

use crate::ids::InstanceId;
use crate::proxy::{SecretStatus, Signatures};

/// Signs instance ids with the shared secrets. An empty secret signs too, as in Neutron. Clones
/// share the secrets.
#[derive(Clone, Debug)]
pub struct Signer {
    keys: Arc<watch::Sender<Keys>>,
    status: Arc<SecretStatus>,
}

/// The secrets in force. Never empty.
#[derive(Debug)]
struct Keys {
    generation: u32,
    secrets: Vec<SecretString>,
}

impl Signer {
    /// Signs with the `metadata_proxy_shared_secret`.
    #[must_use]
    pub fn new(secret: SecretString) -> Self {
        let keys = watch::Sender::new(Keys { generation: 0, secrets: vec![secret] });
        Self { keys: Arc::new(keys), status: Arc::default() }
    }

    /// Puts other secrets in force. An empty list changes nothing.
    ///
    /// The secret that Nova accepted last becomes the first to be tried, if it is among them.
    pub fn replace(&self, mut secrets: Vec<SecretString>) {
        if secrets.is_empty() {
            return;
        }
        self.keys.send_modify(|keys| {
            let accepted = keys.secrets.get(self.status.preferred(keys.generation));
            let accepted = accepted.map(ExposeSecret::expose_secret);
            let again = secrets.iter().position(|secret| Some(secret.expose_secret()) == accepted);
            if let Some(again) = again {
                secrets[..=again].rotate_right(1);
            }
            *keys = Keys { generation: keys.generation.wrapping_add(1), secrets };
            // Requests may learn of the new generation only once it can sign.
            self.status.begin(keys.generation);
        });
    }

    /// Returns what the proxy knows of the secrets.
    #[must_use]
    pub(crate) fn status(&self) -> Arc<SecretStatus> {
        Arc::clone(&self.status)
    }

    /// Returns the generation of the secrets in force.
    #[must_use]
    pub(crate) fn generation(&self) -> u32 {
        self.keys.borrow().generation
    }

    /// Waits until the secrets in force are others than those of this generation.
    pub(crate) async fn replaced(&self, generation: u32) {
        let mut keys = self.keys.subscribe();
        let Ok(_) = keys.wait_for(|keys| keys.generation != generation).await else {
            unreachable!("this value holds the sender itself")
        };
    }

    /// Waits until Nova has refused all of the secrets. The caller then looks for new ones.
    pub(crate) async fn refused(&self) {
        self.status.refused().await;
    }

    /// Signs with each secret in force.
    #[must_use]
    pub fn sign(&self, instance: &InstanceId) -> Signatures {
        let text = instance.to_string();
        let keys = self.keys.borrow();
        Signatures::new(keys.generation, keys.secrets.iter().map(|secret| sign_text(secret, &text)))
    }
}

fn sign_text(secret: &SecretString, text: &str) -> [u8; 32] {
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(secret.expose_secret().as_bytes()) else {
        unreachable!("HMAC takes keys of any length")
    };
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSTANCE: &str = "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b";

    fn secrets(names: &[&str]) -> Vec<SecretString> {
        names.iter().map(|name| (*name).into()).collect()
    }

    /// Returns the secrets in the order in which they are tried.
    fn order(signer: &Signer) -> Vec<String> {
        let status = signer.status();
        let keys = signer.keys.borrow();
        let signatures = signer.sign(&INSTANCE.parse().unwrap());
        let (first, _) = signatures.first(&status);
        let numbers = std::iter::once(first).chain(signatures.others(first).map(|(number, _)| number));
        numbers.map(|number| keys.secrets[number].expose_secret().to_owned()).collect()
    }

    #[test]
    fn signatures_are_those_of_neutron() {
        for (secret, text, want) in [
            ("secret", "foo", "773ba44693c7553d6ee20f61ea5d2757a9a4f4a44d2841ae4e95b52e4cd62db4"),
            ("foo", "foo", "08ba357e274f528065766c770a639abf6809b39ccfd37c2a3157c7f51954da0a"),
            ("secret", INSTANCE, "8030f3b14d8b9256158b93785c622be3b4c20daf8bbc1deacd3051b3fedbdf90"),
            ("", INSTANCE, "641949555b1f64905dcf07afb9b4efdeb63dc9af8f6aa5b5612ec33046732670"),
        ] {
            let signatures = Signatures::new(0, [sign_text(&secret.into(), text)]);
            let (_, value) = signatures.first(&SecretStatus::default());
            assert_eq!(value, want, "{secret:?} over {text:?}");
        }
    }

    #[test]
    fn an_id_is_signed_in_its_canonical_text() {
        let signer = Signer::new("secret".into());
        let shouted: InstanceId = INSTANCE.to_uppercase().parse().unwrap();
        let signatures = signer.sign(&shouted);
        let canonical = Signatures::new(0, [sign_text(&"secret".into(), INSTANCE)]);
        let status = signer.status();
        assert_eq!(signatures.first(&status), canonical.first(&status));
    }

    #[test]
    fn the_secret_that_nova_accepted_last_is_tried_first() {
        let signer = Signer::new("a".into());
        signer.replace(secrets(&["a", "b", "c"]));
        assert_eq!(order(&signer), ["a", "b", "c"]);
        signer.status().accepted(signer.generation(), 1);
        assert_eq!(order(&signer), ["b", "a", "c"]);
        signer.replace(secrets(&["d", "c", "b"]));
        assert_eq!(order(&signer), ["b", "d", "c"]);
        signer.replace(secrets(&["d", "e"]));
        assert_eq!(order(&signer), ["d", "e"], "b is gone");
        signer.replace(Vec::new());
        assert_eq!(order(&signer), ["d", "e"], "no secret at all is nothing to sign with");
    }

    #[tokio::test]
    async fn signatures_last_until_the_secrets_are_replaced() {
        let signer = Signer::new("a".into());
        let signatures = signer.sign(&INSTANCE.parse().unwrap());
        assert!(signer.status().is_in_force(signatures.generation()));
        signer.clone().replace(secrets(&["b"]));
        assert!(!signer.status().is_in_force(signatures.generation()));
        signer.replaced(signatures.generation()).await;
        assert_eq!(signer.sign(&INSTANCE.parse().unwrap()).generation(), signer.generation());
    }

    #[test]
    fn no_secret_is_printed() {
        let printed = format!("{:?}", Signer::new("hunter2".into()));
        assert!(!printed.contains("hunter2"), "{printed}");
    }
}
