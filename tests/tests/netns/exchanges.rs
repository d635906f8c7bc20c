//! Whole HTTP exchanges of guests and haproxies, from the corpus and from the generator: each
//! answer reaches its own guest only, nothing panics and nothing leaks.
//!
//! `EXCHANGES`, `EXCHANGE_SECONDS` and `EXCHANGE_SEED` change their number, the time limit and the
//! seed. A fault is printed as an entry for the corpus, `tests/fixtures/exchanges*.txt`.

use std::env;
use std::time::Duration;

use metadata_tests::exchanges::fuzzer::{FuzzedHost, Limits, Summary};

const EXCHANGES: u64 = 20_000;
const SECONDS: u64 = 25;
/// An arbitrary value.
const SEED: u64 = 0x6d65_7461;

#[test]
fn the_corpus_gets_its_answers() {
    FuzzedHost::on_taps().replay();
}

#[test]
fn generated_exchanges_reach_their_own_guest_only() {
    eprintln!("{}", fuzz(&FuzzedHost::on_taps()));
}

#[test]
fn the_corpus_gets_its_answers_through_haproxies() {
    FuzzedHost::behind_haproxies().replay();
}

#[test]
fn exchanges_through_haproxies_reach_their_own_guest_only() {
    eprintln!("{}", fuzz(&FuzzedHost::behind_haproxies()));
}

fn fuzz(host: &FuzzedHost) -> Summary {
    let limits = Limits {
        exchanges: from_env("EXCHANGES", EXCHANGES),
        time: Duration::from_secs(from_env("EXCHANGE_SECONDS", SECONDS)),
    };
    let summary = host.fuzz(limits, from_env("EXCHANGE_SEED", SEED));
    let answered = host.process.count("metadata_requests_total{code=\"200\"}");
    assert!(answered > summary.exchanges / 4, "only {answered} requests were answered");
    summary
}

fn from_env(name: &str, default: u64) -> u64 {
    env::var(name)
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}
