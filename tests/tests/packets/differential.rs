//! Millions of generated frames, through the kernel and through the host build.
//! `DIFFERENTIAL_FRAMES` and `DIFFERENTIAL_SEED` change their number and the seed.

use std::env;

use metadata_tests::packets::differential::decide_alike;

const FRAMES: u64 = 5_000_000;
/// An arbitrary value.
const SEED: u64 = 0x6d65_7461;

#[test]
fn the_kernel_and_the_host_build_decide_alike() {
    eprintln!(
        "{}",
        decide_alike(from_env("DIFFERENTIAL_FRAMES", FRAMES), from_env("DIFFERENTIAL_SEED", SEED))
    );
}

fn from_env(name: &str, default: u64) -> u64 {
    env::var(name)
        .map_or(default, |value| value.parse().unwrap_or_else(|_| panic!("{name} is not a number: {value}")))
}
