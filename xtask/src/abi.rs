//! Checks that a change of the kernel ABI comes with a new `ABI_VERSION`. Otherwise a new agent
//! would adopt the maps of an old one and misread them.
//!
//! `xtask/abi.lock` records a fingerprint of the code that defines the ABI. Comments, white space
//! and tests do not count.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};

use crate::command::workspace_root;
use crate::terminal::note;
use crate::tokens;

/// The files that define the contents of maps.
const SOURCES: [&str; 3] =
    ["metadata-ebpf/src/abi.rs", "metadata-ebpf/src/identity.rs", "metadata-ebpf/src/reason.rs"];

/// A version and the fingerprint of its code. The lock file holds `<version> <16 hex digits>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Abi {
    version: u32,
    fingerprint: u64,
}

/// Compares the sources with the lock file.
///
/// # Errors
/// Fails if they differ, and names the remedy.
pub fn check() -> Result<()> {
    note(format_args!("+ check ABI_VERSION against {}", lock_file().display()));
    compare(current()?, recorded()?)
}

/// Records the ABI of a version that is newer than the recorded one.
///
/// # Errors
/// Fails if the ABI changed and the version did not increase.
pub fn record() -> Result<()> {
    let (current, recorded) = (current()?, recorded()?);
    if current.version <= recorded.version && current != recorded {
        compare(current, recorded)?;
    }
    fs::write(lock_file(), current.line()).with_context(|| format!("write {}", lock_file().display()))
}

fn compare(current: Abi, recorded: Abi) -> Result<()> {
    if current == recorded {
        Ok(())
    } else if current.version > recorded.version {
        bail!("ABI_VERSION is {} now: run `cargo xtask lint --record-abi`", current.version)
    } else {
        bail!(
            "the kernel ABI changed, but ABI_VERSION is still {}: increment it in {} and run `cargo xtask \
             lint --record-abi`. Only if no agent was released with this version, write `{}` to {} instead",
            current.version,
            SOURCES[0],
            current.line().trim(),
            lock_file().display()
        )
    }
}

fn current() -> Result<Abi> {
    let mut texts = Vec::new();
    for source in SOURCES {
        let path = workspace_root().join(source);
        texts.push(fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?);
    }
    Abi::from_sources(&texts).with_context(|| format!("find ABI_VERSION in {}", SOURCES[0]))
}

fn recorded() -> Result<Abi> {
    let path = lock_file();
    let text = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    Abi::parse(&text).with_context(|| format!("{} is not `<version> <fingerprint>`", path.display()))
}

fn lock_file() -> PathBuf {
    workspace_root().join("xtask/abi.lock")
}

impl Abi {
    fn from_sources(sources: &[String]) -> Option<Self> {
        let tokens: Vec<_> = sources.iter().flat_map(|source| tokens::read(without_tests(source))).collect();
        let declared = ["ABI_VERSION", ":", "u32", "="];
        let at = tokens.windows(declared.len()).position(|w| w.iter().map(|t| t.text).eq(declared))?;
        let version = tokens.get(at + declared.len())?.text.parse().ok()?;
        Some(Self { version, fingerprint: fnv1a(tokens.iter().map(|token| token.text)) })
    }

    fn parse(line: &str) -> Option<Self> {
        let (version, fingerprint) = line.trim().split_once(' ')?;
        Some(Self { version: version.parse().ok()?, fingerprint: u64::from_str_radix(fingerprint, 16).ok()? })
    }

    fn line(self) -> String {
        format!("{} {:016x}\n", self.version, self.fingerprint)
    }
}

fn without_tests(source: &str) -> &str {
    source.find("#[cfg(test)]").map_or(source, |at| &source[..at])
}

/// FNV-1a with 64 bits. It protects against accidents, not against intent.
fn fnv1a<'a>(words: impl Iterator<Item = &'a str>) -> u64 {
    let bytes = words.flat_map(|word| word.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn abi(text: &str) -> Abi {
        Abi::from_sources(&[format!("pub const ABI_VERSION: u32 = 7;\n{text}")]).unwrap()
    }

    #[test]
    fn fields_count_and_comments_and_tests_do_not() {
        let plain = abi("pub struct Port { pub flags: u32 }");
        assert_eq!(
            plain,
            abi("/// One port.\npub struct Port {\n    pub flags: u32 } // x\n#[cfg(test)]\nmod x {}")
        );
        assert_ne!(plain, abi("pub struct Port { pub flags: u64 }"));
        assert_eq!(plain.version, 7);
    }

    #[test]
    fn a_change_needs_a_new_version_that_is_recorded() {
        let old = Abi { version: 2, fingerprint: 1 };
        assert!(compare(old, old).is_ok());
        let changed = compare(Abi { fingerprint: 9, ..old }, old).unwrap_err().to_string();
        assert!(changed.contains("still 2"), "{changed}");
        let raised = compare(Abi { version: 3, fingerprint: 9 }, old).unwrap_err().to_string();
        assert!(raised.contains("--record-abi"), "{raised}");
    }

    #[test]
    fn the_lock_line_reads_back() {
        let abi = Abi { version: 12, fingerprint: 0xab };
        assert_eq!(Abi::parse(&abi.line()), Some(abi));
        assert_eq!(Abi::parse("12"), None);
    }
}
