//! Names on disk: an HMAC to look them up by, and a sealed copy to show. A name never reaches the disk in clear.

use crate::aead::{AeadKey, AesBackend, hmac_sha256};
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::format::derive::{Info, Label};
use crate::format::page::{NONCE_LEN, OVERHEAD, SALT_LEN, SubkeyName, Suite, Trailer};
use crate::ids::{ClusterId, Generation};
use crate::secret::SecretKey;

/// The longest name, in bytes of UTF-8.
pub(crate) const MAX_NAME: usize = 255;
/// Sealed names are padded to a multiple of this, so that their lengths say little.
const PAD: usize = 64;

/// What a name names: the 16-byte scope keeps a file's name in one database apart from the same name in another.
pub(crate) type Scope = [u8; 16];

/// The scope of database names.
pub(crate) const CLUSTER_SCOPE: Scope = [0; 16];

/// The keys that names are stored under.
pub(crate) struct NameKeys {
    pub(crate) cluster: ClusterId,
    pub(crate) look_up: SecretKey,
    pub(crate) cluster_key: SecretKey,
    pub(crate) generation: Generation,
}

impl NameKeys {
    /// The look-up value of a name: `HMAC-SHA256(name key, scope ‖ name)`.
    pub(crate) fn look_up(&self, scope: &Scope, name: &str) -> Result<[u8; 32]> {
        hmac_sha256(&self.look_up, &[scope, name.as_bytes()])
    }

    /// Seals `length u16 | name | zeros` under a salt of its own, bound to scope and owner.
    pub(crate) fn seal(&self, env: &Env, scope: &Scope, owner: &[u8; 16], name: &str) -> Result<Vec<u8>> {
        let len = u16::try_from(name.len()).map_err(|_| too_long())?;
        let mut sealed = vec![0; (2 + name.len()).next_multiple_of(PAD)];
        sealed[..2].copy_from_slice(&len.to_le_bytes());
        sealed[2..2 + name.len()].copy_from_slice(name.as_bytes());
        let salt: [u8; SALT_LEN] = env.random()?;
        let nonce: [u8; NONCE_LEN] = env.random()?;
        let key = self.key(&salt, self.generation)?;
        let tag = key.with(|key| key.seal(nonce, &salt, &associated_data(scope, owner), &mut sealed))?;
        let trailer = Trailer::new(&tag, &nonce, &SubkeyName::new(&salt, self.generation, Suite::Aes256Gcm));
        sealed.extend(trailer.0);
        Ok(sealed)
    }

    /// Opens a sealed name.
    pub(crate) fn open(&self, scope: &Scope, owner: &[u8; 16], sealed: &[u8]) -> Result<String> {
        let failed =
            || Error::new(ErrorKind::Authentication, "a name in the keystore failed authentication; restore it");
        let (body, trailer) = sealed.split_last_chunk::<OVERHEAD>().ok_or_else(failed)?;
        let trailer = Trailer(*trailer);
        if trailer.suite() != Some(Suite::Aes256Gcm) || trailer.generation() != Some(self.generation) {
            return Err(failed());
        }
        let salt = trailer.subkey_name().salt();
        let mut name = body.to_vec();
        let key = self.key(&salt, self.generation)?;
        let aad = associated_data(scope, owner);
        let opened = key.with(|key| key.open(trailer.nonce(), &salt, &aad, &mut name, &trailer.tag()))?;
        opened.map_err(|_| failed())?;
        let (len, rest) = name.split_first_chunk::<2>().ok_or_else(failed)?;
        let name = rest.get(..usize::from(u16::from_le_bytes(*len))).ok_or_else(failed)?;
        String::from_utf8(name.to_vec()).map_err(|_| failed())
    }

    fn key(&self, salt: &[u8; SALT_LEN], generation: Generation) -> Result<crate::secret::Locked<AeadKey>> {
        let info = Info::cluster_key(Label::Wrap, self.cluster, salt, generation);
        Ok(AeadKey::derive(&self.cluster_key, &info, Suite::Aes256Gcm, AesBackend::Ring)?)
    }
}

/// Refuses names that cannot be: empty, over 255 bytes, or with control characters.
pub(crate) fn check_name(what: &str, name: &str) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid(format!("the name of a {what} cannot be empty")));
    }
    if name.len() > MAX_NAME {
        return Err(too_long());
    }
    if name.chars().any(char::is_control) {
        return Err(Error::invalid(format!("the name of a {what} cannot have control characters")));
    }
    Ok(())
}

fn too_long() -> Error {
    Error::invalid(format!("a name has at most {MAX_NAME} bytes"))
}

/// `"name" | scope 16 | owner 16`.
fn associated_data(scope: &Scope, owner: &[u8; 16]) -> [u8; 36] {
    let mut out = [0; 36];
    out[..4].copy_from_slice(b"name");
    out[4..20].copy_from_slice(scope);
    out[20..].copy_from_slice(owner);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::payload::random_key;

    fn keys(env: &Env) -> NameKeys {
        NameKeys {
            cluster: ClusterId::from_bytes([1; 16]),
            look_up: random_key(env).unwrap(),
            cluster_key: random_key(env).unwrap(),
            generation: Generation::FIRST,
        }
    }

    #[test]
    fn a_sealed_name_opens_only_where_it_was_sealed_and_unchanged() {
        let env = Env::system();
        let keys = keys(&env);
        let sealed = keys.seal(&env, &[1; 16], &[2; 16], "orders").unwrap();
        assert_eq!(keys.open(&[1; 16], &[2; 16], &sealed).unwrap(), "orders");
        assert!(keys.open(&[9; 16], &[2; 16], &sealed).is_err());
        assert!(keys.open(&[1; 16], &[9; 16], &sealed).is_err());
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 0x10;
            assert!(keys.open(&[1; 16], &[2; 16], &changed).is_err(), "byte {at}");
            assert!(keys.open(&[1; 16], &[2; 16], &sealed[..at]).is_err(), "length {at}");
        }
    }

    #[test]
    fn a_sealed_name_shows_neither_itself_nor_its_length() {
        let env = Env::system();
        let keys = keys(&env);
        let short = keys.seal(&env, &CLUSTER_SCOPE, &[2; 16], "a").unwrap();
        let long = keys.seal(&env, &CLUSTER_SCOPE, &[2; 16], &"customer".repeat(7)).unwrap();
        assert_eq!(short.len(), long.len());
        assert!(!long.windows(8).any(|window| window == b"customer"));
    }

    #[test]
    fn the_longest_name_is_255_bytes() {
        assert!(check_name("database", &"x".repeat(255)).is_ok());
        for wrong in ["", "a\0b", "a\n", &"x".repeat(256)] {
            assert!(check_name("database", wrong).is_err(), "{wrong:?}");
        }
        let env = Env::system();
        let keys = keys(&env);
        let name = "\u{e9}".repeat(127);
        let sealed = keys.seal(&env, &CLUSTER_SCOPE, &[2; 16], &name).unwrap();
        assert!(sealed.len() <= 512);
        assert_eq!(keys.open(&CLUSTER_SCOPE, &[2; 16], &sealed).unwrap(), name);
    }
}
