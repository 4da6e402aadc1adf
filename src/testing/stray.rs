//! Databases that no keystore knows, over data keys of the test's choice: two ciphers over one key, one cipher over several
//! generations, a stock cipher over the same key.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::aead::{self, AesBackend};
use crate::env::{Entropy, Env};
use crate::error::Result;
use crate::format::page::Suite;
use crate::ids::{DatabaseId, Generation, SealId};
use crate::keys::keyring::{DataKey, Keyring};
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
        let data_key = |stray: &StrayKey| {
            aead::check_suite(stray.suite)?;
            let key = SecretKey::fill_with(|out| {
                *out = stray.key;
                Ok::<(), crate::Error>(())
            })?;
            Ok(DataKey { generation: stray.generation, suite: stray.suite, seal: stray.seal, key })
        };
        let keys = keys.iter().map(data_key).collect::<Result<Vec<_>>>()?;
        let keyring = Keyring::new(DatabaseId::from_bytes(env.random()?), keys)?;
        let (subkeys, resumes) = (Arc::new(SubkeyCache::new(subkeys)), Arc::default());
        let cipher = PageCipher::new(keyring, backend, subkeys, Arc::clone(&resumes), env, None);
        Ok(Self { cipher, resumes })
    }

    /// As `Cluster::resumed`: seals from now on use new sessions.
    pub fn resumed(&self) {
        self.resumes.fetch_add(1, Ordering::Relaxed);
    }
}
