//! Copy-on-write map: copies share the shards that are equal.
//!
//! Readers keep an immutable copy while the writer continues. A copy costs one reference per shard,
//! and a later change copies only the affected shard. With the maximum of 16384 ports on a host, a
//! shard has about 64 entries.

use std::borrow::Borrow;
use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;

const SHARDS: usize = 256;

#[derive(Clone, Debug)]
pub(crate) struct Shards<K, V> {
    shards: Box<[Arc<HashMap<K, V>>]>,
    hasher: RandomState,
}

impl<K, V> Default for Shards<K, V> {
    fn default() -> Self {
        Self { shards: (0..SHARDS).map(|_| Arc::default()).collect(), hasher: RandomState::new() }
    }
}

impl<K: Hash + Eq + Clone, V: Clone> Shards<K, V> {
    pub(crate) fn get<Q: Hash + Eq + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        self.shards[self.position(key)].get(key)
    }

    /// Sets or removes the value of a key, and returns the previous value.
    pub(crate) fn put(&mut self, key: &K, value: Option<V>) -> Option<V> {
        let shard = &mut self.shards[self.position(key)];
        match value {
            Some(value) => Arc::make_mut(shard).insert(key.clone(), value),
            None if shard.contains_key(key) => Arc::make_mut(shard).remove(key),
            None => None,
        }
    }

    /// Sets or removes the value of a key; `None` if the value is already as given.
    pub(crate) fn set(&mut self, key: &K, value: Option<V>) -> Option<Replaced<V>>
    where
        V: PartialEq,
    {
        let differs = self.get(key) != value.as_ref();
        differs.then(|| Replaced { before: self.put(key, value) })
    }

    pub(crate) fn len(&self) -> usize {
        self.shards.iter().map(|shard| shard.len()).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.shards.iter().flat_map(|shard| shard.iter())
    }

    fn position<Q: Hash + ?Sized>(&self, key: &Q) -> usize {
        // One octet selects one of the 256 shards.
        let [octet, ..] = self.hasher.hash_one(key).to_ne_bytes();
        usize::from(octet)
    }
}

/// Previous value of a key that was changed.
pub(crate) struct Replaced<V> {
    pub(crate) before: Option<V>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_keeps_its_values_and_shares_other_shards() {
        let mut map: Shards<u32, u32> = Shards::default();
        for key in 0..1000 {
            assert!(map.set(&key, Some(key)).is_some_and(|change| change.before.is_none()));
        }
        let copy = map.clone();
        assert_eq!(map.set(&7, Some(70)).and_then(|change| change.before), Some(7));
        assert_eq!(map.set(&8, None).and_then(|change| change.before), Some(8));
        assert!(
            map.set(&8, None).is_none() && map.set(&9, Some(9)).is_none(),
            "equal values are not a change"
        );

        assert_eq!((map.get(&7), map.get(&8)), (Some(&70), None));
        assert_eq!((copy.get(&7), copy.get(&8)), (Some(&7), Some(&8)));
        assert_eq!((map.iter().count(), copy.iter().count()), (999, 1000));
        assert_eq!((map.len(), copy.len()), (999, 1000));
        let copied = map.shards.iter().zip(&copy.shards).filter(|(a, b)| !Arc::ptr_eq(a, b)).count();
        assert!((1..=2).contains(&copied), "{copied} shards were copied for two keys");
    }
}
