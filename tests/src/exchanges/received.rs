//! Judges the bytes that a player received.

use std::io::Cursor;

use super::oracle::{INSTANCE, KnownGuest, TARGET};
use super::{Expected, ExpectedAnswer, Violation, contains};
use crate::http::{Connection, Response};

/// Checks that no byte is another guest's, and that each marked answer is one of the clients'.
pub(super) fn check_owner(
    bytes: &[u8],
    clients: &[KnownGuest],
    others: &[KnownGuest],
) -> Result<(), Violation> {
    for other in others {
        if let Some(secret) = other.secrets.iter().find(|secret| contains(bytes, secret)) {
            return Err(Violation(format!("{} got {secret} of {}", names(clients), other.instance)));
        }
    }
    let text = String::from_utf8_lossy(bytes);
    let header = format!("\r\n{INSTANCE}: ");
    for answer in text.split(&header).skip(1) {
        let instance = answer.split("\r\n").next().unwrap_or_default();
        // The last answer may be incomplete.
        if !clients.iter().any(|client| client.instance.starts_with(instance)) {
            return Err(Violation(format!("{} got an answer to {instance}", names(clients))));
        }
    }
    Ok(())
}

/// Checks that the agent answered in its protocol. haproxy has others, such as HTTP/2.
pub(super) fn check_protocol(bytes: &[u8]) -> Result<(), Violation> {
    if bytes.starts_with(b"HTTP/1.") || b"HTTP/1.".starts_with(bytes) {
        Ok(())
    } else {
        Err(Violation("the answer is not HTTP".to_owned()))
    }
}

fn names(clients: &[KnownGuest]) -> String {
    let instances: Vec<_> = clients.iter().map(|client| client.instance.as_str()).collect();
    instances.join(" or ")
}

/// Returns the length of the first complete answer, without interim ones.
pub(super) fn first_answer(bytes: &[u8], is_head: bool) -> Option<(Response, usize)> {
    let mut stream = Connection::new(Fixed(Cursor::new(bytes)));
    loop {
        let answer = if is_head { stream.receive_head() } else { stream.receive() }.ok()?;
        if answer.status >= 200 {
            let rest = stream.receive_rest().ok()?;
            return Some((answer, bytes.len() - rest.len()));
        }
    }
}

/// Checks that exactly the expected answers arrived, in order, each with its own client's bytes.
pub(super) fn check_answers(
    bytes: &[u8],
    expected: &[Expected],
    clients: &[KnownGuest],
) -> Result<(), Violation> {
    let mut rest = bytes;
    for (number, expected) in expected.iter().enumerate() {
        let Some((answer, length)) = first_answer(rest, expected.is_head) else {
            let rest = rest.escape_ascii();
            return Err(Violation(format!("answer {number} is missing or incomplete: {rest}")));
        };
        let (instance, target) = (answer.header(INSTANCE), answer.header(TARGET));
        let is_right = match &expected.answer {
            ExpectedAnswer::Nova { target: wanted } => {
                // The mark in the target shows whose request it was.
                let client = clients.iter().find(|client| wanted.contains(client.mark.as_str()));
                instance.is_some()
                    && instance == client.map(|client| client.instance.as_str())
                    && target == Some(wanted.escape_default().to_string().as_str())
            }
            ExpectedAnswer::Agent { status } => instance.is_none() && answer.status == *status,
        };
        if !is_right {
            let line = &answer.status_line;
            return Err(Violation(format!("answer {number} is {line} to {target:?}, not {expected:?}")));
        }
        let others = clients.iter().filter(|client| Some(client.instance.as_str()) != instance);
        if let Some(secret) =
            others.flat_map(|client| &client.secrets).find(|secret| contains(&rest[..length], secret))
        {
            return Err(Violation(format!("answer {number} contains {secret} of another client")));
        }
        rest = &rest[length..];
    }
    if rest.is_empty() {
        Ok(())
    } else {
        Err(Violation(format!("more than {} answers: {}", expected.len(), rest.escape_ascii())))
    }
}

/// Received bytes as a stream.
struct Fixed<'a>(Cursor<&'a [u8]>);

impl std::io::Read for Fixed<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.0.read(buffer)
    }
}

impl std::io::Write for Fixed<'_> {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::Port;
    use uuid::Uuid;

    fn guests() -> [KnownGuest; 2] {
        [5, 6].map(|number| {
            let network = Uuid::new_v4().to_string().parse().expect("a network");
            KnownGuest::from_port(&Port::new(network, [10, 0, 0, number].into()))
        })
    }

    fn answer(instance: &str, target: &str, body: &str) -> String {
        let length = body.len();
        format!(
            "HTTP/1.1 200 OK\r\n{INSTANCE}: {instance}\r\n{TARGET}: {target}\r\ncontent-length: {length}\r\n\r\n{body}"
        )
    }

    fn nova(target: &str) -> Expected {
        Expected { is_head: false, answer: ExpectedAnswer::Nova { target: target.to_owned() } }
    }

    #[test]
    fn a_foreign_byte_is_noticed_wherever_it_stands() {
        let [own, other] = guests();
        let check =
            |bytes: &[u8]| check_owner(bytes, std::slice::from_ref(&own), std::slice::from_ref(&other));
        let own_answer = answer(&own.instance, "/", "x");
        assert_eq!(check(own_answer.as_bytes()), Ok(()));
        assert_eq!(check(&own_answer.as_bytes()[..70]), Ok(()), "cut short");
        for secret in &other.secrets {
            assert!(check(answer(&own.instance, "/", secret).as_bytes()).is_err());
        }
        assert!(check(answer("unknown", "/", "").as_bytes()).is_err());
        assert!(check_protocol(b"x").is_err());
        assert!([&b""[..], b"HT", b"HTTP/1.1 "].iter().all(|bytes| check_protocol(bytes).is_ok()));
    }

    #[test]
    fn answers_that_are_not_the_expected_ones_are_noticed() {
        let [own, other] = guests();
        let [one, two] = ["1", "2"].map(|number| format!("/?t={}.{number}", own.mark.as_str()));
        let both = answer(&own.instance, &one, "a") + &answer(&own.instance, &two, "b");
        let check =
            |expected: &[Expected]| check_answers(both.as_bytes(), expected, std::slice::from_ref(&own));
        assert_eq!(check(&[nova(&one), nova(&two)]), Ok(()));
        assert!(check(&[nova(&two), nova(&one)]).is_err(), "in another order");
        assert!(check(&[nova(&one)]).is_err(), "one more");
        assert!(check(&[nova(&one), nova(&two), nova(&two)]).is_err(), "one less");
        let agent = Expected { is_head: false, answer: ExpectedAnswer::Agent { status: 200 } };
        assert!(check(&[nova(&one), agent]).is_err(), "of Nova instead of the agent");

        let clients = [own, other];
        let check = |answer: String| check_answers(answer.as_bytes(), &[nova(&one)], &clients);
        let [own, other] = &clients;
        assert_eq!(check(answer(&own.instance, &one, "a")), Ok(()), "two clients on a connection");
        assert!(check(answer(&other.instance, &one, "a")).is_err(), "as the other client");
        assert!(check(answer(&own.instance, &one, &other.instance)).is_err(), "the other's bytes");
    }
}
