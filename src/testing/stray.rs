//! Databases that no keystore knows, over data keys of the test's choice: two ciphers over one key, one cipher over several
//! generations, a stock cipher over the same key.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::aead::{self, AesBackend};
use crate::env::{Entropy, Env};
use crate::error::Result;
use crate::format::page::Suite;
use crate::ids::{DatabaseId, Generation, SealId};
use crate::keys::in_memory::KeysInMemory;
use crate::keys::keyring::{Closed, DataKey, Keyring, LiveKey};
use crate::page::cipher::PageCipher;
use crate::page::subkeys::SubkeyCache;
use crate::secret::SecretKey;

/// One generation's data key. The key's bytes are in ordinary memory: for tests only.
#[derive(Clone, Copy)]
pub struct StrayKey {
    /// Its generation.
    pub generation: Generation,
    /// The suite of its pages.
    pub suite: Suite,
    /// The seal id that its pages bind.
    pub seal: SealId,
    /// The key.
    pub key: [u8; 32],
}

/// A database without a keystore: its cipher, and the means to begin a new session.
pub struct StrayDatabase {
    /// Seals and opens its pages.
    pub cipher: PageCipher,
    resumes: Arc<AtomicU64>,
}

impl StrayDatabase {
    /// A database over `keys`, in ascending order of generation, with the system's randomness unless `entropy` is given.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for a suite that this build or machine lacks; no locked memory; no key.
    pub fn open(keys: &[StrayKey], backend: AesBackend, entropy: Option<Arc<dyn Entropy>>) -> Result<Self> {
        Self::open_with_cache(keys, backend, entropy, 1024)
    }

    /// As [`StrayDatabase::open`], with room for `subkeys` cached subkeys.
    ///
    /// # Errors
    /// As [`StrayDatabase::open`].
    pub fn open_with_cache(
        keys: &[StrayKey],
        backend: AesBackend,
        entropy: Option<Arc<dyn Entropy>>,
        subkeys: usize,
    ) -> Result<Self> {
        let mut env = Env::system();
        env.entropy = entropy.unwrap_or(env.entropy);
        let keyring =
            Keyring::new(DatabaseId::from_bytes(env.random()?), data_keys(keys)?, None, &KeysInMemory::default())?;
        let (subkeys, resumes) = (Arc::new(SubkeyCache::new(subkeys)), Arc::default());
        let cipher = PageCipher::new(keyring, backend, subkeys, Arc::clone(&resumes), env, None);
        Ok(Self { cipher, resumes })
    }

    /// As `Cluster::resumed`: seals from now on use new sessions.
    pub fn resumed(&self) {
        self.resumes.fetch_add(1, Ordering::Relaxed);
    }
}

fn data_keys(keys: &[StrayKey]) -> Result<Vec<DataKey>> {
    keys.iter().map(data_key).collect()
}

fn data_key(stray: &StrayKey) -> Result<DataKey> {
    aead::check_suite(stray.suite)?;
    let key = SecretKey::fill_with(|out| {
        *out = stray.key;
        Ok::<(), crate::Error>(())
    })?;
    Ok(DataKey { generation: stray.generation, suite: stray.suite, seal: stray.seal, key })
}

/// Closes the gate of all handles of this cipher's database, as disabling its cluster does, or dropping the database;
/// whether all operations in flight ended and all keys were wiped within ten seconds.
pub fn close_gate(cipher: &PageCipher, dropped: bool) -> bool {
    let keys = live_keys(cipher);
    cipher.0.close(if dropped { Closed::Dropped } else { Closed::Disabled });
    are_wiped(&keys)
}

fn live_keys(cipher: &PageCipher) -> Vec<Weak<LiveKey>> {
    cipher.0.enter().map(|open| open.live_keys()).unwrap_or_default()
}

fn still_held(cipher: &PageCipher, key: &Weak<LiveKey>) -> bool {
    live_keys(cipher).iter().any(|held| held.ptr_eq(key))
}

fn are_wiped(keys: &[Weak<LiveKey>]) -> bool {
    let start = Instant::now();
    while keys.iter().any(|key| key.strong_count() > 0) {
        if start.elapsed() > Duration::from_secs(10) {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// Opens it again, as recovering does, with `keys` in ascending order of generation.
///
/// # Errors
/// [`crate::ErrorKind::NotFound`] if the database was dropped; as [`StrayDatabase::open`].
pub fn open_gate(cipher: &PageCipher, keys: &[StrayKey]) -> Result<()> {
    cipher.0.open_with(data_keys(keys)?, None)
}

/// Rotates: seals from now on use `key`.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] unless it is newer than the newest; [`crate::ErrorKind::Closed`] while the gate is closed.
pub fn add_generation(cipher: &PageCipher, key: &StrayKey) -> Result<()> {
    cipher.0.add_generation(data_key(key)?, None)
}

/// Lets go of an older generation; whether its key was wiped within ten seconds.
///
/// # Errors
/// [`crate::ErrorKind::Invalid`] for the newest; [`crate::ErrorKind::Closed`] while the gate is closed.
pub fn forget_generation(cipher: &PageCipher, generation: Generation) -> Result<bool> {
    let keys = live_keys(cipher);
    cipher.0.forget_generation(generation)?;
    let gone: Vec<_> = keys.into_iter().filter(|key| !still_held(cipher, key)).collect();
    Ok(!gone.is_empty() && are_wiped(&gone))
}
