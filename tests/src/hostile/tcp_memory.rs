//! The kernel memory of TCP sockets.

use std::fs;
use std::process::Command;

use crate::netns::{self, DIRECTORY, Netns};

/// A line of `/proc/net/sockstat`.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Sockstat {
    /// The connections of the namespace in TIME-WAIT.
    pub time_wait: u64,
    /// The memory of all TCP sockets of the machine, in pages. The kernel does not count it for
    /// each namespace.
    pub pages: u64,
}

impl Sockstat {
    pub fn read(netns: &Netns) -> Self {
        let text = netns.enter(|| fs::read_to_string("/proc/thread-self/net/sockstat"));
        Self::parse(&text.unwrap_or_else(|e| panic!("read sockstat of {}: {e}", netns.name())))
    }

    fn parse(text: &str) -> Self {
        let line = text.lines().find_map(|line| line.strip_prefix("TCP: ")).unwrap_or_default();
        let words: Vec<&str> = line.split_whitespace().collect();
        let value = |name: &str| {
            let pair = words.chunks(2).find(|pair| pair[0] == name);
            pair.and_then(|pair| pair.get(1)?.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
        };
        Self { time_wait: value("tw"), pages: value("mem") }
    }
}

/// Returns the memory in bytes that the TCP sockets of a namespace hold: unread and unsent data
/// with their overhead, and what is allocated ahead.
pub(super) fn of_sockets(namespace: &str) -> u64 {
    let mut ss = Command::new("nsenter");
    ss.arg(format!("--net={DIRECTORY}/{namespace}")).args(["ss", "-tmnH"]);
    sum(&netns::output_of(&mut ss))
}

fn sum(text: &str) -> u64 {
    let sockets = text.split("skmem:(").skip(1).filter_map(|rest| rest.split_once(')'));
    let figures = sockets.flat_map(|(figures, _)| figures.split(','));
    figures
        .filter_map(|figure| {
            // Each figure is a name and a number; `rb` and `tb` are limits.
            let digits = figure.find(|c: char| c.is_ascii_digit())?;
            let (name, number) = figure.split_at(digits);
            ["r", "f", "w"].contains(&name).then(|| number.parse::<u64>().ok())?
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_what_sockets_hold_and_not_their_limits() {
        let text = "ESTAB 0 0 [::1]:80 [::1]:9\n\t skmem:(r1,rb131072,t0,tb87040,f20,w300,o7,bl0,d5)\n\
                    ESTAB 0 0 [::1]:80 [::1]:8\n\t skmem:(r4000,rb131072,t0,tb87040,f0,w0,o0,bl0,d0)\n";
        assert_eq!(sum(text), 4321);
        assert_eq!(sum(""), 0);
    }

    #[test]
    fn sockstat_counts_pages_and_time_wait() {
        let text = "sockets: used 9\nTCP: inuse 1 orphan 0 tw 12 alloc 3 mem 45\nUDP: inuse 0 mem 1\n";
        let Sockstat { time_wait, pages } = Sockstat::parse(text);
        assert_eq!((time_wait, pages), (12, 45));
    }
}
