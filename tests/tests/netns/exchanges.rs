//! Whole HTTP exchanges of guests, from the corpus and from the generator: each answer reaches its
//! own guest only, nothing panics and nothing leaks.
//!
//! `EXCHANGES`, `EXCHANGE_SECONDS` and `EXCHANGE_SEED` change their number, the time limit and the
//! seed. A fault is printed as an entry for `tests/fixtures/exchanges.txt`.

use std::env;
use std::time::Duration;

use metadata_tests::exchanges::fuzzer::{FuzzedHost, Limits};

const EXCHANGES: u64 = 20_000;
const SECONDS: u64 = 60;
/// An arbitrary value.
const SEED: u64 = 0x6d65_7461;

#[test]
fn the_corpus_gets_its_answers() {
    FuzzedHost::new().replay();
}

#[test]
fn generated_exchanges_reach_their_own_guest_only() {
    let limits = Limits {
        exchanges: from_env("EXCHANGES", EXCHANGES),
        time: Duration::from_secs(from_env("EXCHANGE_SECONDS", SECONDS)),
    };
    eprintln!("{}", FuzzedHost::new().fuzz(limits, from_env("EXCHANGE_SEED", SEED)));
}

fn from_env(name: &str, default: u64) -> u64 {
    env::var(name)
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}
