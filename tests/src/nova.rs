//! A stand-in for nova-api-metadata behind a Neutron proxy (`service_metadata_proxy=True`).
//!
//! It checks who is asking as nova/api/metadata/handler.py does and answers from [`Instance`] records in the words
//! and types of the real one. That it does is held against recorded answers.

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

/// The secret that the stand-in shares with agents unless told otherwise.
pub const SECRET: &str = "rig-shared-secret";

/// A running stand-in. Recording and modes are those of [`HttpServer`].
#[derive(Debug)]
pub struct NovaStandIn {
    server: HttpServer,
    secret: String,
    instances: Instances,
}

/// What Nova's database is to the real one, by instance id.
#[derive(Clone, Debug, Default)]
struct Instances(Arc<Mutex<HashMap<String, Instance>>>);

impl Instances {
    fn lock(&self) -> MutexGuard<'_, HashMap<String, Instance>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl NovaStandIn {
    /// Starts on a port of 127.0.0.1 in this namespace, knowing no instance.
    #[must_use]
    pub fn start(netns: &Netns) -> Self {
        Self::start_with(netns, (Ipv4Addr::LOCALHOST, 0).into(), SECRET)
    }

    /// Starts at this address with this secret.
    #[must_use]
    pub fn start_with(netns: &Netns, listen: SocketAddr, secret: &str) -> Self {
        let instances = Instances::default();
        let handler = handler::Handler { secret: secret.to_owned(), instances: instances.clone() };
        let respond = move |request: &Recorded| -> Answer { handler.answer(request) };
        let server = HttpServer::start(netns, listen, respond);
        Self { server, secret: secret.to_owned(), instances }
    }

    /// The secret it expects signatures from.
    #[must_use]
    pub fn secret(&self) -> &str {
        &self.secret
    }

    /// Makes an instance known, or changes it.
    pub fn add(&self, instance: Instance) {
        self.instances.lock().insert(instance.id.to_string(), instance);
    }

    /// Deletes an instance.
    pub fn remove(&self, id: InstanceId) {
        self.instances.lock().remove(&id.to_string());
    }

    /// The password an instance has posted.
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

/// `X-Instance-ID-Signature` of an instance: HMAC-SHA256 in lower-case hex.
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
    fn signatures_are_those_of_neutron() {
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
