//! [`KeyWrapper`], the one trait that a user implements: a master key that wraps and unwraps key payloads.

use std::time::Instant;

use crate::error::KmsError;
use crate::format::wrapped::{CONTEXT_LEN, Purpose, context_bytes};
use crate::ids::{ClusterId, DatabaseId, Generation, MasterKeyId};
use crate::secret::KeyPayload;

/// A master key in a key service.
///
/// Calls are synchronous and come on threads of ours: when a cluster or database is opened or created, when keys are
/// rotated or rewrapped, and when the key is validated; never while a page is sealed, and while one is opened only if it
/// names a data key that another process has just made. A call that has not returned at [`WrapContext::deadline`] is
/// abandoned and counts as unreachable, so a hanging service stops nothing. Calls are repeated for the wrapper until the deadline where it answers [`Throttled`](crate::KmsClass::Throttled), and once where it
/// answers [`Unreachable`](crate::KmsClass::Unreachable): it need not repeat any itself.
///
/// An implementation classifies its failures, because only it knows its service ([`KmsClass`](crate::KmsClass)), and keeps
/// no copy of a payload.
pub trait KeyWrapper: Send + Sync + 'static {
    /// Which master key this is. Always the same answer, without a call to the service.
    fn id(&self) -> MasterKeyId;

    /// Encrypts the payload's 128 bytes under the master key, bound to `cx` where the service takes associated data.
    ///
    /// # Errors
    /// The service's failure, classified.
    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError>;

    /// Decrypts what [`KeyWrapper::wrap_key`] returned, under the key version that it names. (Not called `unwrap`: that
    /// would hide `Result::unwrap` from lints.)
    ///
    /// # Errors
    /// The service's failure, classified. [`KmsClass::BadCiphertext`](crate::KmsClass::BadCiphertext) only if the service
    /// answered that the ciphertext is wrong.
    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError>;

    /// Wraps the payload of `key` under this master key's current version. Called with what [`KeyWrapper::can_rewrap`] takes
    /// only, and what it returns is unwrapped before it counts. Services that can do this without handing the payload out
    /// (AWS ReEncrypt) override it.
    ///
    /// # Errors
    /// The service's failure, classified.
    fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.wrap_key(&self.unwrap_key(key, cx)?, cx)
    }

    /// Whether [`KeyWrapper::rewrap_key`] takes this wrapped key, decided without a call to the service. By default what this
    /// master key wrapped. A service that re-encrypts from one of its keys to another (AWS ReEncrypt) may take other keys of
    /// its own, if it overrides [`KeyWrapper::rewrap_key`] too. Keys that are not taken are unwrapped by the master key that
    /// wrapped them, and wrapped by this one.
    fn can_rewrap(&self, key: &WrappedKey) -> bool {
        key.master_key == self.id()
    }

    /// Finds out whether the master key can be used, by unwrapping a stored probe. Wrapping proves nothing: some services
    /// wrap with a disabled key.
    ///
    /// # Errors
    /// The service's failure, classified.
    fn check(&self, probe: &WrappedKey, cx: &WrapContext<'_>) -> Result<(), KmsError> {
        self.unwrap_key(probe, cx).map(drop)
    }

    /// True where a public key suffices to wrap (RSA). Then anybody can make a keystore that opens, so
    /// `Cluster::open` demands the expected cluster id.
    fn wrapping_is_public(&self) -> bool {
        false
    }
}

/// What a wrap is for. Everything but `deadline` and `label` must be bound to the wrapped key where the service allows it.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct WrapContext<'a> {
    /// The cluster that the key belongs to.
    pub cluster: ClusterId,
    /// The database, for data keys.
    pub database: Option<DatabaseId>,
    /// The key's generation.
    pub generation: Generation,
    /// What the key is for.
    pub purpose: Purpose,
    /// When the caller stops waiting. Give the service no longer than this.
    pub deadline: Instant,
    /// The ids in hex, for the service's audit log. Never bound, and never a name.
    pub label: &'a str,
}

impl WrapContext<'_> {
    /// The context as 48 bytes of associated data, for services that take bytes (docs/FORMAT.md, "Context").
    pub fn associated_data(&self) -> [u8; CONTEXT_LEN] {
        context_bytes(self.purpose, self.generation, self.cluster, self.database)
    }
}

/// A key payload wrapped by a master key: public, and stored in the keystore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WrappedKey {
    /// The master key that wrapped it.
    pub master_key: MasterKeyId,
    /// The version of the master key, as the service names it; empty if it has none. At most 255 bytes.
    pub key_version: String,
    /// What the service returned. At most 4,096 bytes.
    pub blob: Vec<u8>,
}
