//! [`Registry`]: what is open now, once each.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use crate::error::Result;

/// The things of one kind that are in use, by their ids. There is never more than one of each, and several callers who want
/// the same one while it is being opened wait for the first, whose failure is its own: the next tries anew.
pub(crate) struct Registry<K, T> {
    entries: Mutex<Entries<K, T>>,
}

struct Entries<K, T> {
    map: HashMap<K, Entry<T>>,
    /// Entries of things that are gone are removed when there are so many entries.
    sweep_at: usize,
}

struct Entry<T> {
    open: Weak<T>,
    opening: Weak<Mutex<()>>,
}

const FIRST_SWEEP: usize = 64;

impl<K: Copy + Eq + Hash, T> Registry<K, T> {
    pub(crate) fn new() -> Self {
        Self { entries: Mutex::new(Entries { map: HashMap::new(), sweep_at: FIRST_SWEEP }) }
    }

    /// The thing, if it is open.
    pub(crate) fn get(&self, key: K) -> Option<Arc<T>> {
        self.entries().map.get(&key)?.open.upgrade()
    }

    /// All that are open.
    pub(crate) fn all(&self) -> Vec<(K, Arc<T>)> {
        let entries = self.entries();
        entries.map.iter().filter_map(|(key, entry)| Some((*key, entry.open.upgrade()?))).collect()
    }

    /// The thing that is open, or what `open` opens.
    ///
    /// # Errors
    /// Those of `open`.
    pub(crate) fn get_or_open(&self, key: K, open: impl FnOnce() -> Result<Arc<T>>) -> Result<Arc<T>> {
        let turn = match self.turn(key) {
            Turn::Open(thing) => return Ok(thing),
            Turn::Wait(turn) => turn,
        };
        let _mine = turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(thing) = self.get(key) {
            return Ok(thing);
        }
        let thing = open()?;
        // With the same turn: whoever still waits for it, and whoever comes when the thing is gone, take turns, too.
        self.entries().put(key, Entry { open: Arc::downgrade(&thing), opening: Arc::downgrade(&turn) });
        Ok(thing)
    }

    fn turn(&self, key: K) -> Turn<T> {
        let mut entries = self.entries();
        let entry = entries.map.get(&key);
        if let Some(thing) = entry.and_then(|entry| entry.open.upgrade()) {
            return Turn::Open(thing);
        }
        if let Some(turn) = entry.and_then(|entry| entry.opening.upgrade()) {
            return Turn::Wait(turn);
        }
        let turn = Arc::default();
        entries.put(key, Entry { open: Weak::new(), opening: Arc::downgrade(&turn) });
        Turn::Wait(turn)
    }

    fn entries(&self) -> MutexGuard<'_, Entries<K, T>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Turn<T> {
    Open(Arc<T>),
    Wait(Arc<Mutex<()>>),
}

impl<K: Eq + Hash, T> Entries<K, T> {
    fn put(&mut self, key: K, entry: Entry<T>) {
        if self.map.len() >= self.sweep_at {
            self.map.retain(|_, entry| entry.open.strong_count() > 0 || entry.opening.strong_count() > 0);
            self.sweep_at = FIRST_SWEEP.max(2 * self.map.len());
        }
        self.map.insert(key, entry);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::error::Error;

    #[test]
    fn callers_who_want_the_same_thing_share_one_opening() {
        let (registry, opened) = (Registry::new(), AtomicUsize::new(0));
        let things = std::thread::scope(|scope| {
            let open = || {
                registry.get_or_open(7, || {
                    opened.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    Ok(Arc::new(()))
                })
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(opened.load(Ordering::Relaxed), 1);
        assert!(things.iter().all(|thing| Arc::ptr_eq(thing, &things[0])));
        assert_eq!(registry.all().len(), 1);
        drop(things);
        assert!(registry.get(7).is_none(), "the registry keeps things alive");
    }

    #[test]
    fn a_failed_opening_is_not_remembered() {
        let registry = Registry::new();
        assert!(registry.get_or_open(1, || Err(Error::invalid("no"))).is_err());
        assert!(registry.get_or_open(1, || Ok(Arc::new(5))).is_ok());
    }

    #[test]
    fn entries_of_what_is_gone_do_not_pile_up() {
        let registry = Registry::new();
        for key in 0..10_000 {
            registry.get_or_open(key, || Ok(Arc::new(key))).unwrap();
        }
        assert!(registry.entries().map.len() <= 2 * FIRST_SWEEP);
    }
}
