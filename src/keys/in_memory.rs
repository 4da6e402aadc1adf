//! Whether anything of a cluster's keys is in memory: what closes the gate waits until nothing is.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

/// Counts what has keys of one cluster. The count is shared by all clones, and keeps nothing alive.
#[derive(Clone, Default)]
pub(crate) struct KeysInMemory(Arc<AtomicUsize>);

/// Kept by whoever has keys, and dropped after them: a key ring, a session, an operation, a call to a key service.
#[derive(Debug)]
pub(crate) struct InMemory(Arc<AtomicUsize>);

impl KeysInMemory {
    /// To be taken before the keys are there.
    pub(crate) fn mark(&self) -> InMemory {
        self.0.fetch_add(1, Ordering::Relaxed);
        InMemory(Arc::clone(&self.0))
    }

    /// Whether no key is left.
    pub(crate) fn is_empty(&self) -> bool {
        let none = self.0.load(Ordering::Relaxed) == 0;
        // What the others did before they let go, wiping their keys, is done for whoever is told so.
        fence(Ordering::Acquire);
        none
    }

    /// Waits until no key is left; false if that took longer than `patience`, or once `given_up`.
    pub(crate) fn wait(&self, patience: Duration, given_up: impl Fn() -> bool) -> bool {
        const SPINS: u32 = 1_000;
        const NAP: Duration = Duration::from_micros(200);
        let start = Instant::now();
        let mut spins = 0;
        while !self.is_empty() {
            match spins {
                ..SPINS => std::hint::spin_loop(),
                _ if start.elapsed() < patience && !given_up() => std::thread::sleep(NAP),
                _ => return false,
            }
            spins = spins.saturating_add(1);
        }
        true
    }
}

impl Clone for InMemory {
    fn clone(&self) -> Self {
        self.0.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(&self.0))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

/// Keys, and the mark that they are in memory.
pub(crate) struct Live<T> {
    keys: T,
    // Declared after the keys, so that they are wiped when it goes.
    mark: InMemory,
}

impl<T> Live<T> {
    pub(crate) fn new(keys: T, mark: InMemory) -> Arc<Self> {
        Arc::new(Self { keys, mark })
    }

    /// A mark for whoever goes on with what came out of these keys.
    pub(crate) fn mark(&self) -> InMemory {
        self.mark.clone()
    }
}

impl<T> Deref for Live<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_keys_to_go_waits_for_every_mark_and_its_clones() {
        let keys = KeysInMemory::default();
        assert!(keys.wait(Duration::ZERO, || false));
        let first = keys.clone().mark();
        let second = first.clone();
        assert!(!keys.wait(Duration::from_millis(2), || false));
        drop(first);
        assert!(!keys.wait(Duration::from_secs(60), || true), "it was not given up");
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(5));
                drop(second);
            });
            assert!(keys.wait(Duration::from_secs(60), || false));
        });
    }

    #[test]
    fn a_mark_goes_after_the_keys_beside_it() {
        struct Keys(KeysInMemory);
        impl Drop for Keys {
            fn drop(&mut self) {
                assert!(!self.0.is_empty(), "the mark went first");
            }
        }
        let counted = KeysInMemory::default();
        let live = Live::new(Keys(counted.clone()), counted.mark());
        drop(live);
        assert!(counted.is_empty());
    }
}
