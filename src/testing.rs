//! For tests, of this crate and of its users (feature `test-util`): the cipher path over keys and nonces of the caller's
//! choice, as published test vectors need it. Never seal data with it: it takes a nonce.

use crate::aead::{self, AeadKey, AesBackend};
use crate::error::{PageError, Result};
use crate::format::page::Suite;
use crate::secret::Locked;

/// Seals `data` in place through the crate's own cipher path, and returns the tag.
///
/// # Errors
/// As [`crate::PageCipher`]; [`crate::ErrorKind::Unsupported`] for a suite that this build or machine lacks.
pub fn seal_raw(
    suite: Suite,
    backend: AesBackend,
    key: &[u8; 32],
    nonce: [u8; 12],
    salt: &[u8; 16],
    aad: &[u8],
    data: &mut [u8],
) -> Result<[u8; 16]> {
    Ok(raw_key(suite, backend, key)?.get()?.seal(nonce, salt, aad, data))
}

/// Opens `data` in place through the crate's own cipher path; false if it failed authentication.
///
/// # Errors
/// As [`seal_raw`].
#[allow(clippy::too_many_arguments)]
pub fn open_raw(
    suite: Suite,
    backend: AesBackend,
    key: &[u8; 32],
    nonce: [u8; 12],
    salt: &[u8; 16],
    aad: &[u8],
    data: &mut [u8],
    tag: &[u8; 16],
) -> Result<bool> {
    Ok(raw_key(suite, backend, key)?.get()?.open(nonce, salt, aad, data, tag).is_ok())
}

/// HKDF-Expand-SHA256 as every key derivation here uses it; false if `out` is longer than 255 blocks of 32 bytes.
pub fn hkdf_expand(parent: &[u8; 32], info: &[u8], out: &mut [u8]) -> bool {
    aead::expand_into(parent, info, out).is_some()
}

fn raw_key(suite: Suite, backend: AesBackend, key: &[u8; 32]) -> Result<Locked<AeadKey>> {
    aead::check_suite(suite)?;
    Ok(Locked::new_with(|| AeadKey::set_up(key, suite, backend).map_err(|error: PageError| error))?)
}
