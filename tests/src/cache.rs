//! Images and databases that take long to build, kept between runs and shared by parallel runs.
//!
//! An entry is a directory named after its inputs. It is built aside and renamed into place, so
//! that an entry is always complete. The cache directory is `METADATA_TEST_CACHE` or
//! `target/test-cache`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

use crate::vm::hex;

/// The inputs of an entry: recipe, file contents, package versions.
pub struct Key(Sha256);

impl Key {
    pub fn new() -> Self {
        Self(Sha256::new())
    }

    pub fn with(mut self, ingredient: &str) -> Self {
        // The length distinguishes ("ab", "c") from ("a", "bc").
        self.0.update(ingredient.len().to_be_bytes());
        self.0.update(ingredient);
        self
    }

    fn name(self) -> String {
        hex::encode(&self.0.finalize()[..8])
    }
}

/// Returns the entry `name` for `key`. If it does not exist, `build` fills a new directory.
pub fn entry(name: &str, key: Key, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    entry_in(&directory(), name, key, build)
}

fn directory() -> PathBuf {
    std::env::var_os("METADATA_TEST_CACHE")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/test-cache"), PathBuf::from)
}

fn entry_in(cache: &Path, name: &str, key: Key, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    fs::create_dir_all(cache).with_context(|| format!("create {}", cache.display()))?;
    let cache = cache.canonicalize().with_context(|| format!("resolve {}", cache.display()))?;
    let entry = cache.join(format!("{name}-{}", key.name()));

    let lock = cache.join(format!("{name}.lock"));
    let lock = File::create(&lock).with_context(|| format!("create {}", lock.display()))?;
    lock.lock().with_context(|| format!("lock the cache of {name}"))?;
    if entry.is_dir() {
        return Ok(entry);
    }

    // Under the lock, a directory with this name was left by a killed build.
    let unfinished = cache.join(format!("{name}.unfinished"));
    if unfinished.exists() {
        fs::remove_dir_all(&unfinished).with_context(|| format!("remove {}", unfinished.display()))?;
    }
    fs::create_dir(&unfinished).with_context(|| format!("create {}", unfinished.display()))?;
    build(&unfinished).with_context(|| format!("build {}", entry.display()))?;
    fs::rename(&unfinished, &entry).with_context(|| format!("put {} into place", entry.display()))?;
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn key() -> Key {
        Key::new().with("recipe").with("1")
    }

    #[test]
    fn concurrent_requests_build_an_entry_once() {
        let cache = tempfile::tempdir().unwrap();
        let built = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let entry = entry_in(cache.path(), "image", key(), |dir| {
                        built.fetch_add(1, Ordering::SeqCst);
                        Ok(fs::write(dir.join("content"), "whole")?)
                    });
                    assert_eq!(fs::read_to_string(entry.unwrap().join("content")).unwrap(), "whole");
                });
            }
        });
        assert_eq!(built.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_failed_build_leaves_nothing_in_the_cache() {
        let cache = tempfile::tempdir().unwrap();
        let failed = entry_in(cache.path(), "image", key(), |dir| {
            fs::write(dir.join("half"), "")?;
            anyhow::bail!("mirror gone")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("mirror gone"));
        let entry = entry_in(cache.path(), "image", key(), |_| Ok(())).unwrap();
        assert!(!entry.join("half").exists());
    }

    #[test]
    fn another_key_is_another_entry() {
        assert_ne!(Key::new().with("ab").with("c").name(), Key::new().with("a").with("bc").name());
    }
}
