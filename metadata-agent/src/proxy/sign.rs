//! The signature that proves to Nova who names the instance: lower-case hex of HMAC-SHA256 with the shared secret
//! over the instance id's text (neutron/common/utils.py, `sign_instance_id`). The secret stays in here.

use hmac::{Hmac, KeyInit, Mac};
use hyper::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use sha2::Sha256;

use crate::ids::InstanceId;

/// Signs instance ids with the shared secret. An empty secret signs as well, as Neutron's does.
#[derive(Debug)]
pub struct Signer {
    secret: SecretString,
}

impl Signer {
    /// Takes the `metadata_proxy_shared_secret`.
    #[must_use]
    pub fn new(secret: SecretString) -> Self {
        Self { secret }
    }

    /// The value of `X-Instance-ID-Signature`.
    #[must_use]
    pub fn sign(&self, instance: &InstanceId) -> HeaderValue {
        self.sign_text(&instance.to_string())
    }

    fn sign_text(&self, text: &str) -> HeaderValue {
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(self.secret.expose_secret().as_bytes()) else {
            unreachable!("HMAC takes keys of any length")
        };
        mac.update(text.as_bytes());
        let mut hex = [0; 64];
        for (pair, byte) in hex.chunks_exact_mut(2).zip(mac.finalize().into_bytes()) {
            pair[0] = hex_digit(byte >> 4);
            pair[1] = hex_digit(byte & 15);
        }
        let Ok(value) = HeaderValue::from_bytes(&hex) else { unreachable!("hex digits are visible ASCII") };
        value
    }
}

const fn hex_digit(nibble: u8) -> u8 {
    if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const INSTANCE: &str = "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b";

    #[test]
    fn signatures_are_those_of_neutron() {
        for (secret, text, want) in [
            ("secret", "foo", "773ba44693c7553d6ee20f61ea5d2757a9a4f4a44d2841ae4e95b52e4cd62db4"),
            ("foo", "foo", "08ba357e274f528065766c770a639abf6809b39ccfd37c2a3157c7f51954da0a"),
            ("secret", INSTANCE, "8030f3b14d8b9256158b93785c622be3b4c20daf8bbc1deacd3051b3fedbdf90"),
            ("", INSTANCE, "641949555b1f64905dcf07afb9b4efdeb63dc9af8f6aa5b5612ec33046732670"),
        ] {
            assert_eq!(Signer::new(secret.into()).sign_text(text), want, "{secret:?} over {text:?}");
        }
    }

    #[test]
    fn an_id_is_signed_in_its_canonical_text() {
        let signer = Signer::new("secret".into());
        let shouted: InstanceId = INSTANCE.to_uppercase().parse().unwrap();
        assert_eq!(signer.sign(&shouted), signer.sign_text(INSTANCE));
    }

    #[test]
    fn a_signer_does_not_print_its_secret() {
        let printed = format!("{:?}", Signer::new("hunter2".into()));
        assert!(!printed.contains("hunter2"), "{printed}");
    }
}
