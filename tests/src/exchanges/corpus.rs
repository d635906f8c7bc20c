//! Exchanges in text files: those of guests, and those on the socket for haproxies.
//!
//! ```text
//! # The preface of HTTP/2
//! > PRI * HTTP/2.0\r\n
//! > \r\nSM\r\n\r\n
//! = 400
//! ```
//!
//! `>` sends a segment, with the escapes of Rust, and with [`Names`] such as `{mark}` for the
//! guest's mark. `=` lists the answers: a status for the agent's own, `nova` for Nova's to the next
//! target, `nova-head` for one to HEAD. Without this line only the rules for all exchanges apply.
//! `!` is the ending, and `finish` by default.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use super::{Ending, Exchange, Expected, ExpectedAnswer, Mark, Step, contains};

/// The file of exchanges between a guest and the agent.
pub const OF_GUESTS: &str = "fixtures/exchanges.txt";
/// The file of exchanges between a haproxy and the agent.
pub const OF_HAPROXIES: &str = "fixtures/exchanges-haproxy.txt";

/// Names of the endings in the file.
const ENDINGS: [(&str, Ending); 4] = [
    ("finish", Ending::Finish),
    ("wait", Ending::Wait),
    ("abandon", Ending::Abandon),
    ("reset", Ending::Reset),
];

/// Texts that differ in each run, and their names in a file. A longer text comes before those that
/// it contains.
#[derive(Clone, Debug)]
pub struct Names(Vec<(&'static str, String)>);

impl Names {
    /// Returns the only name in exchanges of a guest.
    #[must_use]
    pub fn from_mark(mark: &Mark) -> Self {
        Self(Vec::new()).with("{mark}", mark.as_str())
    }

    #[must_use]
    pub fn with(mut self, name: &'static str, text: &str) -> Self {
        self.0.push((name, text.escape_default().to_string()));
        self
    }
}

/// Reads the exchanges of a file, with their titles.
#[must_use]
pub fn read(file: &str, names: &Names) -> Vec<(String, Exchange)> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("read {}: {e}", path.display()));
    parse(&text, names)
}

fn parse(text: &str, names: &Names) -> Vec<(String, Exchange)> {
    let mut exchanges = Vec::new();
    for block in text.split("\n\n").filter(|block| !block.trim().is_empty()) {
        let mut exchange = Exchange { steps: Vec::new(), ending: Ending::Finish, expected: None };
        let (mut title, mut answers) = (String::new(), None);
        for line in block.lines().filter(|line| !line.is_empty()) {
            let (kind, rest) = line.split_at_checked(2).unwrap_or((line, ""));
            match kind {
                "# " => title.push_str(rest),
                "> " => {
                    let replace = |line: String, (name, text): &(&str, String)| line.replace(name, text);
                    let line = names.0.iter().fold(rest.to_owned(), replace);
                    exchange.steps.push(Step::Send(unescape(&line)));
                }
                "= " => answers = Some(rest),
                "! " => exchange.ending = ending(rest),
                _ => panic!("a line of {title:?} starts with neither of `#>=!`: {line}"),
            }
        }
        exchange.expected = answers.map(|answers| expected(answers, &exchange, &title));
        if !exchange.steps.is_empty() {
            exchanges.push((title, exchange));
        }
    }
    exchanges
}

fn ending(name: &str) -> Ending {
    let found = ENDINGS.iter().find(|(known, _)| *known == name);
    found.unwrap_or_else(|| panic!("unknown ending {name:?}")).1
}

/// Nova's answers belong to the targets with a number, in order: `?t={mark}.1`.
fn expected(answers: &str, exchange: &Exchange, title: &str) -> Vec<Expected> {
    let sent: Vec<u8> = exchange.steps.iter().flat_map(sent).copied().collect();
    let sent = String::from_utf8_lossy(&sent);
    let mut targets = sent
        .split(['\r', '\n'])
        .filter_map(|line| line.split(' ').nth(1))
        .filter(|target| contains(target.as_bytes(), "?t="));
    let expected = answers.split_whitespace().map(|answer| match answer {
        "nova" | "nova-head" => {
            let target = targets.next().unwrap_or_else(|| panic!("{title}: too few targets"));
            let path = target.find("//").map_or(target, |_| target.trim_start_matches("http://x"));
            let target = format!("/{}", path.trim_start_matches('/'));
            Expected { is_head: answer == "nova-head", answer: ExpectedAnswer::Nova { target } }
        }
        status => {
            let status = status.parse().unwrap_or_else(|e| panic!("{title}: {status:?}: {e}"));
            Expected { is_head: false, answer: ExpectedAnswer::Agent { status } }
        }
    });
    expected.collect()
}

fn sent(step: &Step) -> &[u8] {
    match step {
        Step::Send(bytes) => bytes,
        Step::Receive => &[],
    }
}

/// Writes an exchange as it would stand in the file.
#[must_use]
pub fn write(exchange: &Exchange, names: &Names) -> String {
    let mut text = String::new();
    for step in exchange.steps.iter().map(sent).filter(|bytes| !bytes.is_empty()) {
        let replace = |line: String, (name, text): &(&str, String)| line.replace(text, name);
        let line = names.0.iter().fold(step.escape_ascii().to_string(), replace);
        writeln!(text, "> {line}").unwrap_or_else(|_| unreachable!("writing to a String cannot fail"));
    }
    let name =
        ENDINGS.iter().find(|(_, ending)| *ending == exchange.ending).map_or("finish", |(name, _)| name);
    text + "! " + name + "\n"
}

fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.chars();
    while let Some(next) = rest.next() {
        if next != '\\' {
            bytes.extend(next.to_string().as_bytes());
            continue;
        }
        match rest.next() {
            Some('r') => bytes.push(b'\r'),
            Some('n') => bytes.push(b'\n'),
            Some('t') => bytes.push(b'\t'),
            Some('x') => {
                let code: String = rest.by_ref().take(2).collect();
                let byte = u8::from_str_radix(&code, 16);
                bytes.push(byte.unwrap_or_else(|e| panic!("\\x{code} in {text:?}: {e}")));
            }
            Some(plain @ ('\\' | '\'' | '"')) => bytes.extend(plain.to_string().as_bytes()),
            other => panic!("unknown escape {other:?} in {text:?}"),
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_read_and_written_back() {
        let names = Names::from_mark(&Mark::new()).with("{haproxy}", "X-Forwarded-For: ::1\r\n");
        for file in [OF_GUESTS, OF_HAPROXIES] {
            let exchanges = read(file, &names);
            assert!(exchanges.len() > 20, "{}", exchanges.len());
            for (title, exchange) in exchanges {
                assert!(!title.is_empty(), "{exchange:?}");
                let again = parse(&write(&exchange, &names), &names).remove(0).1;
                assert_eq!((again.steps, again.ending), (exchange.steps, exchange.ending), "{title}");
            }
        }
    }

    #[test]
    fn escapes_stand_for_bytes() {
        assert_eq!(unescape(r"a\r\n\t\x00\xff\\\'"), b"a\r\n\t\x00\xff\\'");
    }
}
