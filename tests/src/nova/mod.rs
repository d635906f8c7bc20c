//! A stand-in for nova-api-metadata behind a Neutron proxy (`service_metadata_proxy=True`).
//!
//! It verifies clients as nova/api/metadata/handler.py does and responds from [`Instance`] records
//! in the wording and types of the real service. Tests compare it with recorded responses.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use hmac::{Hmac, KeyInit as _, Mac as _};
use metadata_agent::ids::InstanceId;
use sha2::Sha256;

use crate::http_server::{Answer, HttpServer, Recorded};
use crate::netns::Netns;

mod documents;
mod error_page;
mod handler;
mod instance;
mod json;
mod path;

pub use instance::Instance;

/// The default secret that the stand-in shares with agents.
pub const SECRET: &str = "rig-shared-secret";

/// A running stand-in. [`HttpServer`] provides recording and modes.
#[derive(Debug)]
pub struct NovaStandIn {
    server: HttpServer,
    secret: String,
    instances: Instances,
}

/// The instances by id, in place of Nova's database.
#[derive(Clone, Debug, Default)]
struct Instances(Arc<Mutex<HashMap<String, Instance>>>);

impl Instances {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instance>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NovaStandIn {
    /// Starts on a port of 127.0.0.1 in this namespace, without instances.
    #[must_use]
    pub fn start(netns: &Netns) -> Self {
        Self::start_with(netns, (Ipv4Addr::LOCALHOST, 0).into(), SECRET)
    }

    /// Starts at this address with this secret.
    #[must_use]
    pub fn start_with(netns: &Netns, listen: SocketAddr, secret: &str) -> Self {
        Self::launch(netns, listen, secret, |_, answer| answer)
    }

    /// Starts like [`Self::start`]. `observe` sees each request, and may change its answer.
    #[must_use]
    pub fn start_observed(
        netns: &Netns,
        observe: impl Fn(&Recorded, Answer) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::launch(netns, (Ipv4Addr::LOCALHOST, 0).into(), SECRET, observe)
    }

    fn launch(
        netns: &Netns,
        listen: SocketAddr,
        secret: &str,
        observe: impl Fn(&Recorded, Answer) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let instances = Instances::default();
        let handler = handler::Handler { secret: secret.to_owned(), instances: instances.clone() };
        let respond = move |request: &Recorded| -> Answer { observe(request, handler.answer(request)) };
        let server = HttpServer::start(netns, listen, respond);
        Self { server, secret: secret.to_owned(), instances }
    }

    /// Returns the secret with which it verifies signatures.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Adds or replaces an instance.
    pub fn add(&self, instance: Instance) {
        self.instances.lock().insert(instance.id.to_string(), instance);
    }

    pub fn remove(&self, id: InstanceId) {
        self.instances.lock().remove(&id.to_string());
    }

    /// Returns the password that an instance has posted.
    #[must_use]
    pub fn password(&self, id: InstanceId) -> Option<Vec<u8>> {
        self.instances.lock().get(&id.to_string())?.password.clone()
    }
}

impl Deref for NovaStandIn {
    type Target = HttpServer;
    fn deref(&self) -> &HttpServer {
        &self.server
    }
}

/// Returns an instance's `X-Instance-ID-Signature`: HMAC-SHA256 in lower-case hex.
#[must_use]
pub fn signature(secret: &str, instance: &str) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes())
        .unwrap_or_else(|_| unreachable!("HMAC takes a key of any length"));
    mac.update(instance.as_bytes());
    mac.finalize().into_bytes().iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
        hex
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_match_neutron() {
        assert_eq!(
            signature("secret", "foo"),
            "773ba44693c7553d6ee20f61ea5d2757a9a4f4a44d2841ae4e95b52e4cd62db4"
        );
        assert_eq!(
            signature("", "3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b"),
            "641949555b1f64905dcf07afb9b4efdeb63dc9af8f6aa5b5612ec33046732670"
        );
    }
}
