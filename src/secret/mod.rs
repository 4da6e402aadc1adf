//! Raw key bytes: the only module that owns any.
//!
//! A key lives once, in memory that is locked (never swapped), left out of core dumps, zeroed by the kernel in a forked
//! child, and wiped when it is dropped or a panic unwinds past it. Nothing secret implements `Debug`, `Clone` or
//! `PartialEq`. What code below us left on the stack or in registers is wiped by [`scoped`].
//!
//! Not covered, and said in SECURITY.md: copies that a provider's SDK makes, and an attacker who can read this process's
//! memory while the key is in use.

mod locked;
mod wipe;

pub(crate) use locked::{ForkDetector, Forked, Locked, LockedMemoryError, ThisProcess};
#[cfg(feature = "rustcrypto")]
pub(crate) use wipe::scoped_to;
pub(crate) use wipe::{scoped, scoped_call, scoped_deep, wipe_vector_registers};

use zeroize::Zeroize;

use crate::error::{Error, ErrorKind, PageError};
use crate::format::wrapped::{PAYLOAD_KEY_AT, PAYLOAD_LEN, PAYLOAD_SECOND_AT};

/// A 256-bit key: a data key, a cluster key, an identity key, or a key derived from one of them.
pub(crate) type SecretKey = Locked<[u8; 32]>;

/// The 128 bytes that a master key wraps. Opaque to a [`KeyWrapper`](crate::KeyWrapper): whatever it wraps, it must return
/// unchanged when it unwraps. Held in locked memory and wiped on drop.
pub struct KeyPayload(Locked<[u8; PAYLOAD_LEN]>);

impl KeyPayload {
    /// The length of every payload, in bytes.
    pub const LEN: usize = PAYLOAD_LEN;

    /// Takes an unwrapped payload over into locked memory, and wipes `bytes`, whatever the outcome.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] unless there are exactly [`KeyPayload::LEN`] bytes; [`ErrorKind::Resources`] without locked
    /// memory.
    pub fn from_bytes(bytes: &mut [u8]) -> Result<Self, Error> {
        let outcome = match <&[u8; PAYLOAD_LEN]>::try_from(&*bytes) {
            Ok(payload) => Self::fill_with(|out| out.copy_from_slice(payload)),
            Err(_) => Err(Error::invalid(format!("a key payload has {PAYLOAD_LEN} bytes, not {}", bytes.len()))),
        };
        bytes.zeroize();
        wipe_vector_registers();
        outcome
    }

    /// Lends the 128 bytes to `f`, to be wrapped. They must not be kept: a copy that `f` makes is `f`'s to wipe.
    ///
    /// # Errors
    /// [`ErrorKind::Forked`] in a forked child, where the bytes are gone.
    pub fn with_bytes<R>(&self, f: impl FnOnce(&[u8; PAYLOAD_LEN]) -> R) -> Result<R, Error> {
        Ok(self.0.with(f)?)
    }

    pub(crate) fn fill_with(f: impl FnOnce(&mut [u8; PAYLOAD_LEN])) -> Result<Self, Error> {
        Ok(Self(Locked::fill_with(|out| {
            f(out);
            Ok::<(), Error>(())
        })?))
    }

    /// Copies the key at bytes 64..96 into a key of its own.
    pub(crate) fn key(&self) -> Result<SecretKey, Error> {
        self.part(PAYLOAD_KEY_AT)
    }

    /// Copies the second half (identity key or commitment), bytes 96..128.
    pub(crate) fn second(&self) -> Result<SecretKey, Error> {
        self.part(PAYLOAD_SECOND_AT)
    }

    fn part(&self, at: usize) -> Result<SecretKey, Error> {
        self.0.with(|bytes| {
            SecretKey::fill_with(|out| {
                out.copy_from_slice(&bytes[at..at + 32]);
                Ok(())
            })
        })?
    }
}

impl From<Forked> for PageError {
    fn from(_: Forked) -> Self {
        Self::Forked
    }
}

impl From<LockedMemoryError> for PageError {
    fn from(error: LockedMemoryError) -> Self {
        match error {
            LockedMemoryError::Forked => Self::Forked,
            LockedMemoryError::Exhausted => Self::LockedMemory,
        }
    }
}

impl From<Forked> for Error {
    fn from(_: Forked) -> Self {
        PageError::Forked.into()
    }
}

impl From<LockedMemoryError> for Error {
    fn from(error: LockedMemoryError) -> Self {
        match error {
            LockedMemoryError::Forked => PageError::Forked.into(),
            LockedMemoryError::Exhausted => Error::new(
                ErrorKind::Resources,
                "no locked memory is left for a key; raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK)",
            ),
        }
    }
}
