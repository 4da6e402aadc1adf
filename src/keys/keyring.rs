//! The keyring: the unwrapped data keys of one open database.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::aead::{AeadKey, AesBackend};
use crate::error::{Error, ErrorKind, PageError};
use crate::format::derive::{Info, Label};
use crate::format::page::{SALT_LEN, Suite};
use crate::ids::{DatabaseId, Generation, SealId};
use crate::page::subkeys::Owner;
use crate::secret::{Locked, SecretKey};

/// One generation of a database's data key.
pub(crate) struct DataKey {
    pub(crate) generation: Generation,
    pub(crate) suite: Suite,
    pub(crate) seal: SealId,
    pub(crate) key: SecretKey,
}

impl DataKey {
    /// Derives the key for one use of this data key, named by label and salt, ready for its suite.
    pub(crate) fn derive(
        &self,
        label: Label,
        salt: &[u8; SALT_LEN],
        backend: AesBackend,
    ) -> Result<Locked<AeadKey>, PageError> {
        let info = Info::data(label, self.seal, salt, self.generation, self.suite);
        AeadKey::derive(&self.key, &info, self.suite, backend)
    }
}

/// All data keys of one open database, oldest first.
pub(crate) struct Keyring {
    pub(crate) database: DatabaseId,
    pub(crate) owner: Owner,
    keys: ArcSwap<Vec<Arc<DataKey>>>,
}

impl Keyring {
    /// `keys` must hold each generation once, in ascending order.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if there is none.
    pub(crate) fn new(database: DatabaseId, keys: Vec<DataKey>) -> Result<Self, Error> {
        if keys.is_empty() {
            return Err(Error::new(ErrorKind::Damaged, format!("database {database} has no data key")));
        }
        let keys = keys.into_iter().map(Arc::new).collect();
        Ok(Self { database, owner: Owner::next(), keys: ArcSwap::from_pointee(keys) })
    }

    /// The generation that new seals use: the newest.
    pub(crate) fn current(&self) -> Arc<DataKey> {
        let keys = self.keys.load();
        Arc::clone(keys.last().expect("a keyring is made with at least one key and never loses its last"))
    }

    pub(crate) fn find(&self, generation: Generation) -> Option<Arc<DataKey>> {
        let keys = self.keys.load();
        let at = keys.binary_search_by_key(&generation, |key| key.generation).ok()?;
        Some(Arc::clone(&keys[at]))
    }
}
