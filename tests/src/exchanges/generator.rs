//! Makes exchanges from a seed: valid requests, whose answers are known, and mutated ones.

use fastrand::Rng;

use super::{Ending, Exchange, Expected, ExpectedAnswer, Mark, Step};

/// Paths that Nova knows, and some that it does not.
const PATHS: [&str; 14] = [
    "/",
    "/healthcheck",
    "/latest/meta-data/hostname",
    "/latest/meta-data/",
    "/latest/user-data",
    "/2009-04-04/meta-data/local-ipv4",
    "/openstack/latest/meta_data.json",
    "/openstack/latest/network_data.json",
    "/openstack/latest/vendor_data.json",
    "/openstack/latest/password",
    "/openstack",
    "/latest//meta-data/./../%2e%2e/",
    "/no/such/document",
    "/%00%ff~!$&()*+,;=:@",
];

/// Methods without a body. The agent forwards all of them.
const METHODS: [&str; 8] = ["GET", "GET", "GET", "GET", "HEAD", "OPTIONS", "TRACE", "BREW"];

/// Headers that a guest may send, some of which it must not be believed.
const HEADERS: [&str; 22] = [
    "User-Agent: fuzzer",
    "Accept: */*",
    "Accept-Encoding: gzip, br",
    "X-Instance-ID: 3b0e5c6e-9a1f-4d0a-8f0b-1c2d3e4f5a6b",
    "X-Tenant-ID: other",
    "X-Instance-ID-Signature: 00",
    "X-Forwarded-For: 10.0.0.6",
    "X-Metadata-Provider: x",
    "X-Neutron-Network-ID: b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f",
    "X-OVN-Network-ID: b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f",
    "Forwarded: for=10.0.0.6",
    "Connection: keep-alive, X-Instance-ID, Content-Length",
    "Proxy-Connection: close",
    "Keep-Alive: timeout=0",
    "TE: trailers",
    "Trailer: X-Instance-ID",
    "Upgrade: h2c",
    "Range: bytes=0-1",
    "Cookie: a=b",
    "If-None-Match: *",
    "Date:",
    "X:\t  spaces \t",
];

/// Texts that matter to a parser of HTTP, or of a haproxy's headers.
const DICTIONARY: [&str; 52] = [
    "\r\n",
    "\n",
    "\r",
    "\r\n\r\n",
    "\n\n",
    "\0",
    " ",
    "\t",
    "\u{b}",
    ":",
    "/",
    "?",
    "#",
    "%",
    "\u{fc}",
    "Content-Length: 0\r\n",
    "Content-Length: 5\r\n",
    "Content-Length: +5\r\n",
    "Content-Length: 5, 5\r\n",
    "Content-Length: 18446744073709551616\r\n",
    "content-length:5\r\n",
    "Content-Length : 5\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Transfer-Encoding: identity, chunked\r\n",
    "Transfer-Encoding:\u{b}chunked\r\n",
    "Transfer-Encoding: xchunked\r\n",
    " folded\r\n",
    "0\r\n\r\n",
    "5\r\nabcde\r\n",
    "ffffffffffffffff\r\n",
    "-1\r\n",
    ";ext=\"\r\n\"",
    "Host: a\r\n",
    "Connection: close\r\n",
    "Expect: 100-continue\r\n",
    "HTTP/1.0",
    "HTTP/1.1",
    "HTTP/2.0",
    "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "GET / HTTP/1.1\r\n\r\n",
    "CONNECT a:80 HTTP/1.1\r\n\r\n",
    "\u{16}\u{3}\u{1}",
    "PROXY TCP4 10.0.0.6 169.254.169.254 1 80\r\n",
    "\r\n\r\n\0\r\nQUIT\n",
    "X-Forwarded-For: 10.0.0.6\r\n",
    "X-Forwarded-For: \r\n",
    "x-forwarded-for: ::1,\r\n",
    ", ::ffff:10.0.0.6",
    "X-Neutron-Network-ID: \r\n",
    "X-Neutron-Router-ID: b6c7d8e9-0a1b-4c2d-8e3f-4a5b6c7d8e9f\r\n",
    "X-OVN-Network-ID: \u{fc}\r\n",
    "%eth0",
];

/// Starts of the headers of which a haproxy adds one.
const NAMES_A_NETWORK: [&str; 2] = ["X-Neutron-", "X-OVN-"];

const MAX_REQUESTS: usize = 6;
const MAX_MUTATIONS: usize = 4;

/// A guest whose requests are made.
#[derive(Clone, Debug)]
pub struct Sender {
    pub mark: Mark,
    /// The lines that its haproxy adds at the end of each head. Without a haproxy there are none.
    pub added: String,
}

/// Headers with which a guest claims to be another one.
#[derive(Clone, Debug, Default)]
pub struct Claims {
    /// Those that change nothing.
    pub ignored: Vec<String>,
    /// Those for which the agent refuses a request.
    pub refused: Vec<String>,
}

/// Makes exchanges. Requests whose answers are known are from all senders in turn, as a haproxy may
/// forward them. Those that are mutated are from the first one.
#[derive(Debug)]
pub struct Generator<'a> {
    rng: Rng,
    senders: &'a [Sender],
    claims: &'a Claims,
    /// Bases for mutations, beside those that it makes.
    corpus: &'a [Exchange],
    /// Gives each request a number of its own.
    number: u64,
}

impl<'a> Generator<'a> {
    #[must_use]
    pub fn new(seed: u64, senders: &'a [Sender], claims: &'a Claims, corpus: &'a [Exchange]) -> Self {
        Self { rng: Rng::with_seed(seed), senders, claims, corpus, number: 0 }
    }

    /// Makes the next exchange.
    pub fn next_exchange(&mut self) -> Exchange {
        if self.rng.u8(..) < 96 {
            return self.valid(self.senders, self.claims);
        }
        let base = match self.rng.choice(self.corpus) {
            Some(base) if self.rng.u8(..) < 96 => base.clone(),
            // Without a haproxy's line, a claim would be the last one, and so count.
            _ => self.valid(&self.senders[..1], &Claims::default()),
        };
        self.mutated(&base)
    }

    /// Makes an exchange whose answers are all known.
    fn valid(&mut self, senders: &[Sender], claims: &Claims) -> Exchange {
        let count = 1 + self.rng.usize(..MAX_REQUESTS);
        let is_pipelined = self.rng.bool();
        let (mut steps, mut unsent, mut expected) = (Vec::new(), Vec::new(), Vec::new());
        for last in (0..count).map(|number| number + 1 == count) {
            let (request, answer) = self.request(senders, claims, last);
            unsent.extend(request);
            expected.push(answer);
            if !is_pipelined {
                self.cut(&std::mem::take(&mut unsent), &mut steps);
                steps.push(Step::Receive);
            }
        }
        self.cut(&unsent, &mut steps);
        let ending = match self.rng.u8(..) {
            0..10 => Ending::Abandon,
            10..20 => Ending::Reset,
            // The agent closes an idle connection, but only after a while.
            20 if self.rng.u8(..) < 16 => Ending::Wait,
            _ => Ending::Finish,
        };
        Exchange { steps, ending, expected: Some(expected) }
    }

    /// Makes a valid request and its answer.
    fn request(&mut self, senders: &[Sender], claims: &Claims, is_last: bool) -> (Vec<u8>, Expected) {
        let sender = &senders[self.rng.usize(..senders.len())];
        let has_body = self.rng.u8(..) < 64;
        let method = if has_body { "POST" } else { METHODS[self.rng.usize(..METHODS.len())] };
        self.number += 1;
        let path = PATHS[self.rng.usize(..PATHS.len())];
        let target = format!("{path}?t={}.{}", sender.mark.as_str(), self.number);
        let host = ["169.254.169.254", "x", "", "[fe80::a9fe:a9fe%25eth0]"][self.rng.usize(..4)];
        // Nova gets the target without its host, and without repeated slashes at its start.
        let prefix = match self.rng.u8(..) {
            0..16 => "//",
            16..32 if host == "x" => "http://x",
            _ => "",
        };
        let end = if self.rng.u8(..) < 16 { "\n" } else { "\r\n" };
        let mut head = format!("{method} {prefix}{target} HTTP/1.1{end}Host: {host}{end}");
        for _ in 0..self.rng.usize(..8) {
            let header = HEADERS[self.rng.usize(..HEADERS.len())];
            // A repeated header is valid as well, but for a haproxy's own.
            if sender.added.is_empty() || !NAMES_A_NETWORK.iter().any(|name| header.starts_with(name)) {
                head.extend([header, end]);
            }
        }
        for claim in &claims.ignored {
            if self.rng.u8(..) < 40 {
                head.extend([claim.as_str(), end]);
            }
        }
        let refused = if is_last && !has_body && self.rng.u8(..) < 48 {
            self.rng.choice(&claims.refused)
        } else {
            None
        };
        if let Some(refused) = refused {
            head.extend([refused.as_str(), end]);
        }
        if self.rng.u8(..) < 8 {
            let length = self.rng.usize(..20_000);
            head.extend(["X-Long: ", &"x".repeat(length), end]);
        }
        if is_last && self.rng.bool() {
            head.extend(["Connection: close", end]);
        }
        head.push_str(&sender.added);
        let mut request = if self.rng.u8(..) < 8 { b"\r\n".to_vec() } else { Vec::new() };
        let body = if has_body { self.body(&sender.mark, senders) } else { Vec::new() };
        if has_body && self.rng.bool() {
            head.extend(["Transfer-Encoding: chunked", end, end]);
            request.extend(head.as_bytes());
            self.chunk(&body, claims, &mut request);
        } else {
            if has_body {
                head.extend(["Content-Length: ", &body.len().to_string(), end]);
            }
            head.push_str(end);
            request.extend(head.as_bytes());
            request.extend(body);
        }
        let target = target.strip_prefix('/').map(|rest| format!("/{}", rest.trim_start_matches('/')));
        let answer = match refused {
            Some(_) => ExpectedAnswer::Agent { status: 400 },
            None => ExpectedAnswer::Nova { target: target.unwrap_or_default() },
        };
        (request, Expected { is_head: method == "HEAD", answer })
    }

    /// Makes a body, which often looks like a request, also one that is another sender's.
    fn body(&mut self, mark: &Mark, senders: &[Sender]) -> Vec<u8> {
        let (mark, added) = (mark.as_str(), &senders[self.rng.usize(..senders.len())].added);
        match self.rng.u8(..) {
            0..128 => format!("GET /smuggled?t={mark} HTTP/1.1\r\nHost: x\r\n{added}\r\n").into_bytes(),
            128..144 => (0..self.rng.usize(..60_000)).map(|at| at.to_le_bytes()[0]).collect(),
            144..160 => Vec::new(),
            _ => (0..self.rng.usize(..200)).map(|_| self.rng.u8(..)).collect(),
        }
    }

    fn chunk(&mut self, body: &[u8], claims: &Claims, request: &mut Vec<u8>) {
        let mut rest = body;
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(1 + self.rng.usize(..rest.len()));
            let extension = if self.rng.u8(..) < 32 { ";a=b" } else { "" };
            request.extend(format!("{:x}{extension}\r\n", chunk.len()).as_bytes());
            request.extend(chunk);
            request.extend(b"\r\n");
            rest = after;
        }
        request.extend(b"0\r\n");
        if self.rng.u8(..) < 32 {
            let claim = self.rng.choice(&claims.ignored).map_or("X-Instance-ID: trailer", String::as_str);
            request.extend(format!("{claim}\r\n").as_bytes());
        }
        request.extend(b"\r\n");
    }

    /// Cuts bytes into segments.
    fn cut(&mut self, bytes: &[u8], steps: &mut Vec<Step>) {
        let mut rest = bytes;
        let mut cuts = if self.rng.bool() { 0 } else { self.rng.usize(..6) };
        while !rest.is_empty() {
            let length = if cuts == 0 { rest.len() } else { 1 + self.rng.usize(..rest.len()) };
            let (segment, after) = rest.split_at(length);
            steps.push(Step::Send(segment.to_vec()));
            (rest, cuts) = (after, cuts.saturating_sub(1));
        }
    }

    fn mutated(&mut self, base: &Exchange) -> Exchange {
        let mut bytes: Vec<u8> = base
            .steps
            .iter()
            .flat_map(|step| match step {
                Step::Send(bytes) => bytes.as_slice(),
                Step::Receive => &[],
            })
            .copied()
            .collect();
        for _ in 0..=self.rng.usize(..MAX_MUTATIONS) {
            self.mutate(&mut bytes);
        }
        let mut steps = Vec::new();
        self.cut(&bytes, &mut steps);
        let ending = match self.rng.u8(..) {
            0..16 => Ending::Abandon,
            16..32 => Ending::Reset,
            _ => Ending::Finish,
        };
        Exchange { steps, ending, expected: None }
    }

    fn mutate(&mut self, bytes: &mut Vec<u8>) {
        let at = self.rng.usize(..=bytes.len());
        let word = DICTIONARY[self.rng.usize(..DICTIONARY.len())].bytes();
        match self.rng.u8(..8) {
            0 | 1 => drop(bytes.splice(at..at, word)),
            2 => {
                // At the start of a line, where a header would be.
                let lines: Vec<_> = (0..bytes.len()).filter(|at| bytes[*at] == b'\n').collect();
                let at = self.rng.choice(lines).map_or(at, |line| line + 1);
                drop(bytes.splice(at..at, word));
            }
            3 => {
                let end = bytes.len().min(at + word.len());
                drop(bytes.splice(at..end, word));
            }
            4 => {
                let end = bytes.len().min(at + self.rng.usize(..40));
                drop(bytes.drain(at..end));
            }
            5 => {
                let end = bytes.len().min(at + self.rng.usize(..200));
                let copy = bytes[at..end].to_vec();
                let to = self.rng.usize(..=bytes.len());
                drop(bytes.splice(to..to, copy));
            }
            6 => bytes.truncate(at),
            _ => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << self.rng.u8(..8);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_always_makes_the_same_exchanges() {
        let senders = ["", "X-Forwarded-For: 10.0.0.5\r\n"]
            .map(|added| Sender { mark: Mark::new(), added: added.to_owned() });
        let claims = Claims { ignored: vec!["A: b".to_owned()], refused: vec!["C: d".to_owned()] };
        let make = || {
            let mut generator = Generator::new(7, &senders, &claims, &[]);
            (0..100).map(|_| generator.next_exchange()).collect::<Vec<_>>()
        };
        assert_eq!(make(), make());
        assert!(make().iter().any(|exchange| exchange.expected.is_none()));
        assert!(make().iter().any(|exchange| exchange.expected.is_some()));
        let refused = ExpectedAnswer::Agent { status: 400 };
        let mut answers = make().into_iter().filter_map(|exchange| exchange.expected).flatten();
        assert!(answers.any(|expected| expected.answer == refused));
    }
}
