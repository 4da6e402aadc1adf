//! For tests, of this crate and of its users (feature `test-util`): the cipher path over keys and nonces of the caller's
//! choice, as published test vectors need it. Never seal data with it: it takes a nonce.

pub mod conformance;
pub mod fuzzing;
pub mod simulation;
pub mod stray;

use crate::aead::{self, AeadKey, AesBackend};
use crate::error::{PageError, Result};
use crate::format::page::Suite;
use crate::secret::Locked;

pub use crate::storage::disk::simulated::{Broken, Errno, Fault, SimulatedDisk};

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
    Ok(raw_key(suite, backend, key)?.with(|key| key.seal(nonce, salt, aad, data))?)
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
    Ok(raw_key(suite, backend, key)?.with(|key| key.open(nonce, salt, aad, data, tag).is_ok())?)
}

/// HKDF-Expand-SHA256 as every key derivation here uses it; false if `out` is longer than 255 blocks of 32 bytes.
pub fn hkdf_expand(parent: &[u8; 32], info: &[u8], out: &mut [u8]) -> bool {
    aead::expand_into(parent, info, out).is_some()
}

fn raw_key(suite: Suite, backend: AesBackend, key: &[u8; 32]) -> Result<Locked<AeadKey>> {
    aead::check_suite(suite)?;
    Ok(Locked::new_with(|| AeadKey::set_up(key, suite, backend).map_err(|error: PageError| error))?)
}

/// A cipher over a fresh data key that no keystore knows: pages sealed with it are lost with it. For tests of the page path.
///
/// # Errors
/// [`crate::ErrorKind::Unsupported`] for a suite that this build or machine lacks; no locked memory.
pub fn stray_cipher(suite: Suite, backend: AesBackend) -> Result<crate::PageCipher> {
    use crate::{
        env::Env, ids::*, keys::in_memory::KeysInMemory, keys::keyring::*, page::subkeys::SubkeyCache,
        secret::SecretKey,
    };
    aead::check_suite(suite)?;
    let env = Env::system();
    let key = SecretKey::fill_with(|out| env.entropy.fill(out).map_err(crate::Error::from))?;
    let seal = SealId::from_bytes(env.random()?);
    let keyring = Keyring::new(
        DatabaseId::from_bytes(env.random()?),
        vec![DataKey { generation: Generation::FIRST, suite, seal, key }],
        None,
        &KeysInMemory::default(),
    )?;
    let subkeys = std::sync::Arc::new(SubkeyCache::new(1024));
    Ok(crate::PageCipher::new(keyring, backend, subkeys, std::sync::Arc::default(), env, None))
}

/// Moves the running session of `cipher` to `seals` seals and `units` units of 512 bytes, to test its end.
///
/// # Errors
/// A [`PageError`] if no session could be opened.
pub fn set_session_counter(cipher: &crate::PageCipher, seals: u32, units: u32) -> Result<(), PageError> {
    cipher.set_counter(seals, units)
}
