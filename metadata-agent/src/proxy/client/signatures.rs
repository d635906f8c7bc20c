//! The signatures that prove an instance id to Nova, and the state of the shared secrets.
//!
//! The proxy never has a secret. Its [`ClientDirectory`](super::ClientDirectory) hands out an
//! identity with one signature for each secret in force. Secrets that were replaced together form a
//! generation.
//!
//! During a rotation there are several secrets. Nova first gets a signature by the secret that it
//! accepted last; if it answers 403, it gets one by each of the others, once.

use std::sync::atomic::{AtomicU64, Ordering};

use hyper::header::{HeaderValue, InvalidHeaderValue};
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;

/// One signature of an instance id for each shared secret of a generation.
#[derive(Clone, Debug)]
pub struct Signatures {
    generation: u32,
    /// Never empty.
    values: Vec<HeaderValue>,
}

impl Signatures {
    /// Writes signatures as Nova reads them. The first one is sent first until Nova accepts
    /// another. There must be at least one.
    #[must_use]
    pub fn new(generation: u32, signatures: impl IntoIterator<Item = [u8; 32]>) -> Self {
        let values: Vec<_> = signatures.into_iter().map(hex_value).collect();
        debug_assert!(!values.is_empty(), "there is always a secret, if only an empty one");
        Self { generation, values }
    }

    /// Returns the generation of the secrets that made the signatures.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Returns the signature to send first, made with the secret that Nova accepted last, and its
    /// index.
    pub(crate) fn first(&self, secrets: &SecretStatus) -> (usize, &HeaderValue) {
        let preferred = secrets.preferred(self.generation);
        self.values.get(preferred).map_or_else(|| (0, &self.values[0]), |value| (preferred, value))
    }

    /// Returns all signatures but one, to try next.
    pub(crate) fn others(&self, refused: usize) -> impl Iterator<Item = (usize, &HeaderValue)> {
        self.values.iter().enumerate().filter(move |(number, _)| *number != refused)
    }
}

/// [`Signatures`] in a message.
#[derive(Deserialize, Serialize)]
pub(super) struct SignaturesRecord {
    generation: u32,
    /// Hex digits.
    values: Vec<String>,
}

impl From<&Signatures> for SignaturesRecord {
    fn from(signatures: &Signatures) -> Self {
        let text = |value: &HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        Self { generation: signatures.generation, values: signatures.values.iter().map(text).collect() }
    }
}

impl TryFrom<SignaturesRecord> for Signatures {
    type Error = InvalidHeaderValue;

    fn try_from(record: SignaturesRecord) -> Result<Self, InvalidHeaderValue> {
        let value = |text: String| {
            let mut value = HeaderValue::try_from(text)?;
            value.set_sensitive(true);
            Ok(value)
        };
        let values = record.values.into_iter().map(value).collect::<Result<_, _>>()?;
        Ok(Self { generation: record.generation, values })
    }
}

/// State of the shared secrets that signer and proxy have in common: the generation in force, and
/// what Nova thinks of it. Contains no secret.
#[derive(Debug, Default)]
pub struct SecretStatus {
    /// The generation in force in the upper half; in the lower half, the index of the secret that
    /// Nova accepted last. One number, so that an index never meets another generation.
    state: AtomicU64,
    refused: Notify,
    preference: Notify,
}

impl SecretStatus {
    /// Puts another generation of secrets in force. Its first secret is tried first.
    pub fn begin(&self, generation: u32) {
        self.state.store(u64::from(generation) << 32, Ordering::Relaxed);
    }

    /// Returns the generation in force.
    pub(crate) fn generation(&self) -> u32 {
        u32::try_from(self.state.load(Ordering::Relaxed) >> 32).unwrap_or(u32::MAX)
    }

    /// Returns whether the secrets of this generation are in force.
    pub(crate) fn is_in_force(&self, generation: u32) -> bool {
        self.generation() == generation
    }

    /// Returns the index of the secret that Nova accepted last. Of a generation that is not in
    /// force, it is the first.
    pub(crate) fn preferred(&self, generation: u32) -> usize {
        let state = self.state.load(Ordering::Relaxed);
        let is_in_force = state >> 32 == u64::from(generation);
        usize::try_from(state & u64::from(u32::MAX)).ok().filter(|_| is_in_force).unwrap_or(0)
    }

    /// Remembers that Nova accepted a signature, if its generation is still in force.
    pub(crate) fn accepted(&self, generation: u32, number: usize) {
        let generation = u64::from(generation);
        let accepted = generation << 32 | number as u64;
        // The signature of an earlier generation proves nothing about the secrets in force.
        let next = |state: u64| (state >> 32 == generation && state != accepted).then_some(accepted);
        if self.state.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok() {
            self.preference.notify_one();
        }
    }

    /// Waits until Nova has accepted another secret than before. Returns the generation in force
    /// and the index of that secret.
    pub(crate) async fn preference(&self) -> (u32, usize) {
        self.preference.notified().await;
        let generation = self.generation();
        (generation, self.preferred(generation))
    }

    /// Reports that Nova accepted none of the secrets in force.
    pub(crate) fn all_refused(&self, generation: u32) {
        if self.is_in_force(generation) {
            self.refused.notify_one();
        }
    }

    /// Waits until Nova has refused all of the secrets. The caller then looks for new ones.
    pub(crate) async fn refused(&self) {
        self.refused.notified().await;
    }
}

fn hex_value(signature: [u8; 32]) -> HeaderValue {
    let mut hex = [0; 64];
    for (pair, byte) in hex.chunks_exact_mut(2).zip(signature) {
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

/// Signatures for tests in which no Nova checks them.
#[cfg(test)]
pub(crate) mod samples {
    use super::*;

    pub(crate) fn signatures(generation: u32) -> Signatures {
        Signatures::new(generation, [[0xab; 32]])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(signatures: &Signatures, secrets: &SecretStatus) -> Vec<usize> {
        let (first, _) = signatures.first(secrets);
        std::iter::once(first).chain(signatures.others(first).map(|(number, _)| number)).collect()
    }

    #[test]
    fn the_signature_that_nova_accepted_last_is_sent_first() {
        let secrets = SecretStatus::default();
        let of = |generation| Signatures::new(generation, [[1; 32], [2; 32], [3; 32]]);
        assert_eq!(order(&of(0), &secrets), [0, 1, 2]);
        secrets.accepted(0, 1);
        assert_eq!(order(&of(0), &secrets), [1, 0, 2]);
        secrets.begin(1);
        assert_eq!(order(&of(1), &secrets), [0, 1, 2], "other secrets");
        secrets.accepted(0, 2);
        assert_eq!(order(&of(1), &secrets), [0, 1, 2], "a late response to an earlier signature");
        secrets.accepted(1, 2);
        assert_eq!(order(&of(1), &secrets), [2, 0, 1]);
        assert_eq!(order(&of(0), &secrets), [0, 1, 2], "an index counts in its own generation");
        assert_eq!(order(&Signatures::new(1, [[1; 32]]), &secrets), [0], "it has no third");
    }

    #[tokio::test]
    async fn only_a_refusal_of_the_secrets_in_force_is_reported() {
        let secrets = SecretStatus::default();
        secrets.begin(1);
        secrets.all_refused(0);
        assert!(futures_util::FutureExt::now_or_never(secrets.refused()).is_none(), "already replaced");
        secrets.all_refused(1);
        secrets.refused().await;
    }

    #[test]
    fn a_signature_is_lower_case_hex_and_never_printed() {
        let mut bytes = [0; 32];
        bytes[..3].copy_from_slice(&[0x00, 0x9a, 0xff]);
        let signatures = Signatures::new(0, [bytes]);
        let value = signatures.values[0].to_str().unwrap();
        assert_eq!(value, format!("009aff{}", "00".repeat(29)));
        let printed = format!("{signatures:?}");
        assert!(!printed.contains(value) && !printed.contains("9a"), "{printed}");
    }
}
