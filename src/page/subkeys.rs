//! Subkeys, and the bounded cache of those that pages were opened under.
//!
//! Reading a page that another session sealed needs that session's subkey: 2 to 3 µs to derive, 4 ns to find here. A hit
//! takes no lock and writes nothing shared. Misses of one set take turns, so that no subkey is ever alive twice.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::{ArcSwapOption, Guard};

use crate::aead::AeadKey;
use crate::error::PageError;
use crate::format::page::{SALT_LEN, SubkeyName};
use crate::keys::keyring::LiveKey;
use crate::secret::Locked;

const WAYS: usize = 8;

/// A session's key, ready for use. `owner` and `name` stand for the whole derivation input: a database's set of data keys
/// has one owner number in this process, and its generation decides the seal id and the suite.
pub(crate) struct Subkey {
    pub(crate) owner: Owner,
    pub(crate) name: SubkeyName,
    pub(crate) salt: [u8; SALT_LEN],
    pub(crate) key: Locked<AeadKey>,
    /// What it was derived from. Declared after the key, so that a data key that is gone has no subkey left.
    pub(crate) parent: Arc<LiveKey>,
}

/// Numbers the key rings of this process. Two handles never share one, even for copies of the same database, so a subkey
/// found here was derived from the finder's own data key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Owner(u64);

impl Owner {
    pub(crate) fn next() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// A subkey held for the length of one call: it is not wiped before the guard is gone.
pub(crate) type SubkeyGuard = Guard<Option<Arc<Subkey>>>;

/// A set-associative cache; the second-chance (clock) rule picks what goes.
pub(crate) struct SubkeyCache {
    sets: Box<[Set]>,
    /// Where [`SubkeyCache::shrink`] looks next.
    hand: AtomicUsize,
}

#[derive(Default)]
struct Set {
    /// Eight salt bytes of each entry, to look at before its pointer. May be stale: the entry decides.
    tags: [AtomicU64; WAYS],
    used: [AtomicBool; WAYS],
    entries: [ArcSwapOption<Subkey>; WAYS],
    /// Held by the one thread that fills the set; holds the clock's hand.
    filling: Mutex<usize>,
}

impl SubkeyCache {
    /// Room for `capacity` subkeys of about 600 bytes of locked memory each, rounded up to a power of two, at least 8.
    pub(crate) fn new(capacity: usize) -> Self {
        let sets = capacity.div_ceil(WAYS).next_power_of_two();
        Self { sets: std::iter::repeat_with(Set::default).take(sets).collect(), hand: AtomicUsize::new(0) }
    }

    /// The subkey, if it is here.
    #[inline]
    pub(crate) fn find(&self, owner: Owner, name: &SubkeyName) -> Option<SubkeyGuard> {
        let (set, tag) = self.place(name);
        set.find(tag, owner, name)
    }

    /// Finds the subkey, or makes it with `make`, uses it with `open`, and keeps it if that succeeded: a subkey is cached
    /// only after a page opened under it, so that forged pages cannot fill the cache. And only if `may_keep`, which is
    /// asked under the lock that [`SubkeyCache::forget_if`] takes: what it forgot does not come back.
    ///
    /// Takes a lock: the caller has checked that it is not in a forked child.
    pub(crate) fn find_or_make<R>(
        &self,
        owner: Owner,
        name: &SubkeyName,
        make: impl FnOnce() -> Result<Arc<Subkey>, PageError>,
        may_keep: impl FnOnce(&Subkey) -> bool,
        open: impl FnOnce(&Subkey) -> Result<R, PageError>,
    ) -> Result<R, PageError> {
        let (set, tag) = self.place(name);
        let mut hand = set.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = set.find(tag, owner, name)
            && let Some(subkey) = &*found
        {
            drop(hand);
            return open(subkey);
        }
        let subkey = make()?;
        let opened = open(&subkey)?;
        if may_keep(&subkey) {
            set.insert(tag, subkey, &mut hand);
        }
        Ok(opened)
    }

    /// Keeps a subkey that this process made itself.
    pub(crate) fn insert(&self, subkey: Arc<Subkey>) {
        let (set, tag) = self.place(&subkey.name);
        let mut hand = set.filling.lock().unwrap_or_else(PoisonError::into_inner);
        if set.find(tag, subkey.owner, &subkey.name).is_none() {
            set.insert(tag, subkey, &mut hand);
        }
    }

    /// Lets go of one subkey, to make room in locked memory; false if there is none left.
    pub(crate) fn shrink(&self) -> bool {
        (0..self.sets.len()).any(|_| {
            let at = self.hand.fetch_add(1, Ordering::Relaxed) % self.sets.len();
            self.sets[at].entries.iter().any(|entry| entry.swap(None).is_some())
        })
    }

    /// Lets go of `which` subkeys of `owner`. Waits for those who fill the cache: the caller has checked that it is not in a
    /// forked child, and has made sure that they find that they may keep none of these.
    pub(crate) fn forget_if(&self, owner: Owner, which: impl Fn(&Subkey) -> bool) {
        for set in &self.sets {
            let _filling = set.filling.lock().unwrap_or_else(PoisonError::into_inner);
            set.forget(|subkey| subkey.owner == owner && which(subkey));
        }
    }

    /// Lets go of every subkey of `owner`, who makes no more. Takes no lock: also in a forked child.
    pub(crate) fn forget(&self, owner: Owner) {
        self.sets.iter().for_each(|set| set.forget(|subkey| subkey.owner == owner));
    }

    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.sets.iter().flat_map(|set| &set.entries).filter(|entry| entry.load().is_some()).count()
    }

    /// Salts are random, so their bytes are as good as a hash. Forged ones can only crowd a set, whose entries come from
    /// pages that opened.
    #[inline]
    fn place(&self, name: &SubkeyName) -> (&Set, u64) {
        let (low, high) = name.halves();
        (&self.sets[low as usize & (self.sets.len() - 1)], high)
    }
}

impl Set {
    #[inline]
    fn find(&self, tag: u64, owner: Owner, name: &SubkeyName) -> Option<SubkeyGuard> {
        for way in 0..WAYS {
            if self.tags[way].load(Ordering::Relaxed) != tag {
                continue;
            }
            let entry = self.entries[way].load();
            if entry.as_ref().is_some_and(|subkey| subkey.owner == owner && subkey.name == *name) {
                if !self.used[way].load(Ordering::Relaxed) {
                    self.used[way].store(true, Ordering::Relaxed);
                }
                return Some(entry);
            }
        }
        None
    }

    fn insert(&self, tag: u64, subkey: Arc<Subkey>, hand: &mut usize) {
        let way = self.victim(hand);
        self.entries[way].store(Some(subkey));
        self.tags[way].store(tag, Ordering::Relaxed);
        self.used[way].store(false, Ordering::Relaxed);
    }

    fn forget(&self, which: impl Fn(&Subkey) -> bool) {
        for entry in &self.entries {
            if entry.load().as_deref().is_some_and(&which) {
                entry.store(None);
            }
        }
    }

    /// An empty way, or the next one that was not used since the hand last passed.
    fn victim(&self, hand: &mut usize) -> usize {
        if let Some(empty) = self.entries.iter().position(|entry| entry.load().is_none()) {
            return empty;
        }
        loop {
            *hand = (*hand + 1) % WAYS;
            if !self.used[*hand].swap(false, Ordering::Relaxed) {
                return *hand;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aead::AesBackend;
    use crate::format::page::Suite;
    use crate::ids::{Generation, SealId};
    use crate::keys::in_memory::KeysInMemory;
    use crate::keys::keyring::DataKey;
    use crate::secret::SecretKey;

    fn subkey(owner: Owner, salt: [u8; 16]) -> Arc<Subkey> {
        let key = Locked::new_with(|| AeadKey::set_up(&[7; 32], Suite::Aes256Gcm, AesBackend::Ring)).unwrap();
        let name = SubkeyName::new(&salt, Generation::FIRST, Suite::Aes256Gcm);
        let data_key = SecretKey::fill_with(|_| Ok::<(), PageError>(())).unwrap();
        let (suite, seal) = (Suite::Aes256Gcm, SealId::from_bytes([0; 16]));
        let parent = DataKey { generation: Generation::FIRST, suite, seal, key: data_key };
        let parent = LiveKey::new(parent, KeysInMemory::default().mark());
        Arc::new(Subkey { owner, name, salt, key, parent })
    }

    /// A salt that looks random, as real ones are.
    fn salt(seed: u32) -> [u8; 16] {
        let digest = crate::aead::sha256(&seed.to_le_bytes());
        digest[..16].try_into().unwrap()
    }

    #[test]
    fn the_cache_never_holds_more_than_its_capacity() {
        let (cache, owner) = (SubkeyCache::new(64), Owner::next());
        for seed in 0..2_000 {
            cache.insert(subkey(owner, salt(seed)));
        }
        assert!(cache.len() <= 64);
        assert!(cache.len() >= 48, "only {} of 64 places are used", cache.len());
    }

    #[test]
    fn a_subkey_in_use_survives_those_that_are_not() {
        let (cache, owner) = (SubkeyCache::new(8), Owner::next());
        let kept = subkey(owner, salt(0));
        cache.insert(Arc::clone(&kept));
        for seed in 1..500 {
            assert!(cache.find(owner, &kept.name).is_some(), "lost after {seed}");
            cache.insert(subkey(owner, salt(seed)));
        }
    }

    #[test]
    fn another_owner_never_gets_a_subkey_of_the_same_name() {
        let (cache, owner) = (SubkeyCache::new(8), Owner::next());
        let one = subkey(owner, salt(0));
        cache.insert(Arc::clone(&one));
        assert!(cache.find(Owner::next(), &one.name).is_none());
    }

    #[test]
    fn a_subkey_is_kept_only_if_a_page_opened_under_it() {
        let (cache, owner) = (SubkeyCache::new(8), Owner::next());
        let one = subkey(owner, salt(0));
        let refused = cache.find_or_make(
            owner,
            &one.name,
            || Ok(Arc::clone(&one)),
            |_| true,
            |_| Err::<(), _>(PageError::Authentication),
        );
        assert_eq!(refused, Err(PageError::Authentication));
        assert_eq!(cache.len(), 0);
        let opened = cache.find_or_make(owner, &one.name, || Ok(Arc::clone(&one)), |_| true, |_| Ok(()));
        assert_eq!(opened, Ok(()));
        assert_eq!(cache.len(), 1);
    }

    #[test]
    fn forgetting_and_shrinking_drop_the_keys() {
        let (cache, owner, other) = (SubkeyCache::new(64), Owner::next(), Owner::next());
        let one = subkey(owner, salt(0));
        cache.insert(Arc::clone(&one));
        cache.insert(subkey(other, salt(1)));
        cache.forget(owner);
        assert_eq!(cache.len(), 1);
        assert_eq!(Arc::strong_count(&one), 1, "the cache still holds the key");
        assert!(cache.shrink());
        assert!(!cache.shrink());
        assert_eq!(cache.len(), 0);
    }
}
