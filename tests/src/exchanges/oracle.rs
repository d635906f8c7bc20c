//! Nova's side: checks each request, and marks each answer.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Mark, Violation, contains};
use crate::http_server::{Answer, Recorded};
use crate::nova::Instance;
use crate::port::Port;

/// Headers of an answer: its instance, and the target of its request.
pub const INSTANCE: &str = "x-oracle-instance";
pub const TARGET: &str = "x-oracle-target";

/// Headers that the agent may send.
const ALLOWED: [&str; 9] = [
    "accept",
    "connection",
    "content-length",
    "content-type",
    "host",
    "x-forwarded-for",
    "x-instance-id",
    "x-instance-id-signature",
    "x-tenant-id",
];

/// A guest whose requests are checked.
#[derive(Clone, Debug)]
pub struct KnownGuest {
    pub mark: Mark,
    pub instance: String,
    /// Texts in its documents that are in no other guest's.
    pub secrets: Vec<String>,
    /// The addresses that the agent may forward.
    addresses: Vec<IpAddr>,
}

impl KnownGuest {
    #[must_use]
    pub fn from_port(port: &Port) -> Self {
        let [a, b, c, d, e, f] = port.mac.0;
        // The link-local address that the kernel of the guest derives (RFC 4291, appendix A).
        let octets = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f];
        let mark = Mark::new();
        let name = Instance::from_port(port).name;
        Self {
            secrets: vec![mark.as_str().to_owned(), port.instance.to_string(), name],
            mark,
            instance: port.instance.to_string(),
            addresses: port.fixed_ips.iter().copied().chain([IpAddr::from(octets)]).collect(),
        }
    }
}

/// Checks what arrives at Nova.
#[derive(Clone, Debug, Default)]
pub struct Oracle {
    guests: Arc<Mutex<HashMap<String, KnownGuest>>>,
    /// The instance of each connection, or nothing after its last request.
    connections: Arc<Mutex<HashMap<u64, Option<String>>>>,
    violations: Arc<Mutex<Vec<Violation>>>,
}

impl Oracle {
    pub fn add(&self, guest: KnownGuest) {
        lock(&self.guests).insert(guest.instance.clone(), guest);
    }

    /// Takes the violations up to now.
    #[must_use]
    pub fn violations(&self) -> Vec<Violation> {
        std::mem::take(&mut lock(&self.violations))
    }

    /// Checks a request, and marks the answer to it.
    pub fn observe(&self, request: &Recorded, mut answer: Answer) -> Answer {
        let instance = request.header("x-instance-id").unwrap_or_default();
        if let Err(fault) = self.check(&instance, request, &answer) {
            let Recorded { method, path, headers, body, .. } = request;
            let body = body.escape_ascii();
            let request = format!("{method} {path}\n{headers:?}\n{body}");
            lock(&self.violations).push(Violation(format!("Nova got a wrong request: {fault}\n{request}")));
        }
        answer.headers.push((INSTANCE.to_owned(), instance));
        // The parser accepts bytes in a target that a header cannot have.
        answer.headers.push((TARGET.to_owned(), request.path.escape_default().to_string()));
        answer
    }

    fn check(&self, instance: &str, request: &Recorded, answer: &Answer) -> Result<(), String> {
        let guests = lock(&self.guests);
        let guest = guests.get(instance).ok_or_else(|| format!("the instance is {instance:?}"))?;
        // The stand-in verifies the signature.
        if answer.status == 403 || request.header("x-instance-id-signature").is_none() {
            return Err("the signature is not valid".to_owned());
        }
        if let Some((name, _)) = request.headers.iter().find(|(name, _)| !ALLOWED.contains(&name.as_str())) {
            return Err(format!("the header {name} is not the agent's"));
        }
        let mut names: Vec<_> = request.headers.iter().map(|(name, _)| name).collect();
        names.sort_unstable();
        if names.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err("a header occurs twice".to_owned());
        }
        let forwarded = request.header("x-forwarded-for").unwrap_or_default();
        if !guest.addresses.iter().any(|address| address.to_string() == forwarded) {
            return Err(format!("the address {forwarded} is not the guest's"));
        }
        let is_in = |mark: &str| {
            contains(request.path.as_bytes(), mark)
                || contains(&request.body, mark)
                || request.headers.iter().any(|(_, value)| contains(value.as_bytes(), mark))
        };
        if let Some(other) =
            guests.values().find(|other| other.instance != instance && is_in(other.mark.as_str()))
        {
            return Err(format!("the request is from {}", other.instance));
        }
        self.check_connection(instance, request)
    }

    /// A connection carries requests of one instance, and nothing after one that may have a body.
    fn check_connection(&self, instance: &str, request: &Recorded) -> Result<(), String> {
        if !request.body.is_empty() && request.method != "POST" {
            return Err("a method without a body has one".to_owned());
        }
        let mut connections = lock(&self.connections);
        let known = connections.entry(request.connection).or_insert_with(|| Some(instance.to_owned()));
        if known.as_deref() != Some(instance) {
            return Err(format!("its connection was for {}", known.as_deref().unwrap_or("one request")));
        }
        let is_last = request.header("connection").as_deref() == Some("close");
        let must_be_last =
            !matches!(request.method.as_str(), "GET" | "HEAD" | "PUT" | "DELETE" | "OPTIONS" | "TRACE");
        if is_last != must_be_last {
            return Err(format!("its connection is to be closed: {is_last}"));
        }
        if is_last {
            *known = None;
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::body::Bytes;
    use uuid::Uuid;

    fn port(number: u8) -> Port {
        Port::new(Uuid::new_v4().to_string().parse().expect("a network"), [10, 0, 0, number].into())
    }

    fn request(guest: &KnownGuest, change: impl Fn(&mut Recorded)) -> Recorded {
        let headers = [("x-instance-id", guest.instance.as_str()), ("x-forwarded-for", "10.0.0.5")];
        let headers = headers.into_iter().chain([("x-instance-id-signature", "00")]);
        let mut request = Recorded {
            connection: 0,
            peer: ([127, 0, 0, 1], 1).into(),
            method: "GET".to_owned(),
            path: format!("/?t={}", guest.mark.as_str()),
            headers: headers.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            body: Bytes::new(),
        };
        change(&mut request);
        request
    }

    #[test]
    fn each_kind_of_wrong_request_is_noticed() {
        let oracle = Oracle::default();
        let [own, other] = [5, 6].map(|number| KnownGuest::from_port(&port(number)));
        oracle.add(own.clone());
        oracle.add(other.clone());
        let judge = |status, change: &dyn Fn(&mut Recorded)| {
            let answer = oracle.observe(&request(&own, change), Answer::text(status, ""));
            assert!(answer.headers.iter().any(|(name, _)| name == INSTANCE));
            oracle.violations().first().map(ToString::to_string).unwrap_or_default()
        };
        let set = |name: &'static str, value: String| {
            move |request: &mut Recorded| {
                request.headers.retain(|(known, _)| known != name);
                request.headers.push((name.to_owned(), value.clone()));
            }
        };
        assert_eq!(judge(200, &|_| {}), "");
        assert!(judge(403, &|_| {}).contains("the signature is not valid"));
        assert!(judge(200, &set("x-instance-id", String::new())).contains("the instance is \"\""));
        assert!(judge(200, &set("x-instance-id", other.instance.clone())).contains("the address 10.0.0.5"));
        assert!(judge(200, &set("x-forwarded-for", "10.0.0.6".to_owned())).contains("the address 10.0.0.6"));
        assert!(judge(200, &set("cookie", String::new())).contains("the header cookie is not"));
        // A repeated instance would be another instance.
        let twice = |request: &mut Recorded| {
            let signature = request.headers.iter().find(|(name, _)| name == "x-instance-id-signature");
            request.headers.extend(signature.cloned());
        };
        assert!(judge(200, &twice).contains("a header occurs twice"));

        let mark = other.mark.as_str().to_owned();
        assert!(judge(200, &|request| request.path.push_str(&mark)).contains("the request is from"));
        assert!(judge(200, &|request| request.body = mark.clone().into()).contains("the request is from"));
        assert!(judge(200, &set("content-type", mark.clone())).contains("the request is from"));

        let put = |request: &mut Recorded| (request.method, request.body) = ("PUT".into(), "x".into());
        assert!(judge(200, &put).contains("a method without a body"));
        assert!(judge(200, &set("connection", "close".to_owned())).contains("is to be closed: true"));
        let post = |request: &mut Recorded| request.method = "POST".to_owned();
        assert!(judge(200, &post).contains("is to be closed: false"));
        let last = |request: &mut Recorded| {
            post(request);
            set("connection", "close".to_owned())(request);
        };
        assert_eq!(judge(200, &last), "");
        assert!(judge(200, &|_| {}).contains("its connection was for one request"));
        let foreign = |request: &mut Recorded| {
            request.connection = 1;
            set("x-instance-id", other.instance.clone())(request);
            set("x-forwarded-for", "10.0.0.6".to_owned())(request);
            request.path = "/".to_owned();
        };
        assert_eq!(judge(200, &foreign), "");
        let own_there = judge(200, &|request| request.connection = 1);
        assert!(own_there.contains(&format!("its connection was for {}", other.instance)));
    }
}
