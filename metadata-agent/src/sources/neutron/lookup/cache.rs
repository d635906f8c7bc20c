//! Cache with expiry and limited size.

use std::collections::HashMap;
use std::hash::Hash;

use tokio::time::Instant;

/// Maximum number of entries.
const CAPACITY: usize = 4096;

/// Values with an expiry time, at most [`CAPACITY`] of them.
#[derive(Debug)]
pub(super) struct Cache<K, V>(HashMap<K, (Instant, V)>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Copy + Eq + Hash, V> Cache<K, V> {
    pub(super) fn get(&self, key: &K, now: Instant) -> Option<&V> {
        self.0.get(key).filter(|(until, _)| now < *until).map(|(_, value)| value)
    }

    pub(super) fn put(&mut self, key: K, value: V, until: Instant, now: Instant) {
        self.0.remove(&key);
        if self.0.len() >= CAPACITY {
            self.0.retain(|_, (until, _)| now < *until);
        }
        // Evict the entry that expires first. Negative results expire early.
        if self.0.len() >= CAPACITY
            && let Some(first) = self.0.iter().min_by_key(|(_, (until, _))| *until).map(|(key, _)| *key)
        {
            self.0.remove(&first);
        }
        self.0.insert(key, (until, value));
    }

    pub(super) fn remove_if(&mut self, remove: impl Fn(&V) -> bool) {
        self.0.retain(|_, (_, value)| !remove(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(2);
    const SHORT: Duration = Duration::from_secs(1);

    #[test]
    fn a_full_cache_evicts_the_entry_that_expires_first() {
        let now = Instant::now();
        let mut cache = Cache::default();
        for key in 0..CAPACITY {
            cache.put(key, (), now + LONG, now);
        }
        cache.put(7, (), now + SHORT, now);
        cache.put(CAPACITY, (), now + LONG, now);
        assert_eq!(cache.0.len(), CAPACITY);
        assert_eq!((cache.get(&7, now), cache.get(&8, now)), (None, Some(&())));
        let later = now + LONG;
        assert_eq!(cache.get(&8, later), None);
        cache.put(CAPACITY + 1, (), later + LONG, later);
        assert_eq!(cache.0.len(), 1);
    }
}
