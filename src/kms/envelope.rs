//! How a key that we hold ourselves wraps a payload, be it a local master key or a cluster key: as a sealed page of 128
//! bytes, under a subkey of its own.
//!
//! `ciphertext 128 | tag 16 | nonce 12 | salt 16 | generation u24 | suite u8`. Salt and nonce are both random, so no two
//! wraps share a subkey, and nothing has to be counted. A payload is encrypted and decrypted in locked memory.

use crate::aead::{AeadKey, AesBackend, derive_public};
use crate::env::Env;
use crate::error::{Error, KmsClass, KmsError};
use crate::format::derive::{Info, Label};
use crate::format::page::{NONCE_LEN, OVERHEAD, SALT_LEN, SubkeyName, Suite, Trailer};
use crate::format::wrapped::PAYLOAD_LEN;
use crate::ids::{ClusterId, Generation};
use crate::keys::wrapper::WrapContext;
use crate::secret::{KeyPayload, Locked, SecretKey};

/// The length of every blob.
pub(crate) const BLOB_LEN: usize = PAYLOAD_LEN + OVERHEAD;

const SUITE: Suite = Suite::Aes256Gcm;

/// A key that wraps here, and how subkeys are derived from it.
#[derive(Clone, Copy)]
pub(crate) enum WrappingKey<'a> {
    /// The key of a key file, or of a test.
    Local(&'a SecretKey),
    /// A cluster key, of this cluster and generation.
    Cluster(&'a SecretKey, ClusterId, Generation),
}

impl WrappingKey<'_> {
    fn subkey(&self, salt: &[u8; SALT_LEN]) -> Result<Locked<AeadKey>, KmsError> {
        let (key, info) = match *self {
            Self::Local(key) => (key, Info::local(Label::Local, salt)),
            Self::Cluster(key, cluster, own) => (key, Info::cluster_key(Label::Wrap, cluster, salt, own)),
        };
        Ok(AeadKey::derive(key, &info, SUITE, AesBackend::Ring).map_err(Error::from)?)
    }

    /// What the blob's trailer says: the generation that entered the subkey, or else the context's.
    fn generation(&self, cx: &WrapContext<'_>) -> Generation {
        match *self {
            Self::Local(_) => cx.generation,
            Self::Cluster(_, _, own) => own,
        }
    }
}

/// Encrypts `payload` under `key`, bound to `cx`.
pub(crate) fn seal_payload(
    key: WrappingKey<'_>,
    env: &Env,
    payload: &KeyPayload,
    cx: &WrapContext<'_>,
) -> Result<Vec<u8>, KmsError> {
    let salt: [u8; SALT_LEN] = env.random().map_err(Error::from)?;
    let nonce: [u8; NONCE_LEN] = env.random().map_err(Error::from)?;
    let subkey = key.subkey(&salt)?;
    let mut sealed = Ok([0; 16]);
    let ciphertext = payload.with_bytes(|plain| {
        KeyPayload::fill_with(|out| {
            out.copy_from_slice(plain);
            sealed = subkey.with(|cipher| cipher.seal(nonce, &salt, &cx.associated_data(), out));
        })
    })??;
    let tag = sealed.map_err(Error::from)?;
    let trailer = Trailer::new(&tag, &nonce, &SubkeyName::new(&salt, key.generation(cx), SUITE));
    let mut blob = Vec::with_capacity(BLOB_LEN);
    ciphertext.with_bytes(|ciphertext| blob.extend_from_slice(ciphertext))?;
    blob.extend_from_slice(&trailer.0);
    Ok(blob)
}

/// Decrypts what [`seal_payload`] returned under the same key and context; anything else is
/// [`KmsClass::BadCiphertext`].
pub(crate) fn open_payload(key: WrappingKey<'_>, blob: &[u8], cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
    let blob: &[u8; BLOB_LEN] =
        blob.try_into().map_err(|_| bad(format!("the blob has {} bytes, not {BLOB_LEN}", blob.len())))?;
    let (ciphertext, trailer) = blob.split_at(PAYLOAD_LEN);
    let mut copy = Trailer([0; OVERHEAD]);
    copy.0.copy_from_slice(trailer);
    let trailer = copy;
    // Neither enters the subkey or the cipher here, so neither may say anything but what is expected.
    if trailer.suite() != Some(SUITE) || trailer.generation() != Some(key.generation(cx)) {
        return Err(bad("the blob is of another generation or format"));
    }
    let salt = trailer.subkey_name().salt();
    let subkey = key.subkey(&salt)?;
    let mut opened = Ok(Ok(()));
    let payload = KeyPayload::fill_with(|out| {
        out.copy_from_slice(ciphertext);
        opened = subkey.with(|cipher| cipher.open(trailer.nonce(), &salt, &cx.associated_data(), out, &trailer.tag()));
    })?;
    // On failure the payload holds anything; dropping it wipes it.
    opened.map_err(Error::from)?.map(|()| payload).map_err(|_| bad("it does not open under this key and context"))
}

/// A public name for the key: 32 hex digits that change with it and tell nothing about it.
pub(crate) fn fingerprint(key: &SecretKey) -> Result<String, KmsError> {
    let digest = derive_public(key, &Info::local(Label::LocalVersion, &[0; SALT_LEN]))?;
    Ok(digest[..16].iter().map(|byte| format!("{byte:02x}")).collect())
}

fn bad(text: impl Into<String>) -> KmsError {
    KmsError::with_source(KmsClass::BadCiphertext, text.into())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::env::{Entropy, NoRandomness};
    use crate::format::wrapped::Purpose;
    use crate::ids::{ClusterId, DatabaseId, Generation};
    use crate::keys::calls::fixtures::payload;

    fn key(byte: u8) -> SecretKey {
        SecretKey::fill_with(|out| {
            out.fill(byte);
            Ok::<(), Error>(())
        })
        .unwrap()
    }

    fn context() -> WrapContext<'static> {
        WrapContext {
            cluster: ClusterId::from_bytes([0xc1; 16]),
            database: Some(DatabaseId::from_bytes([0xd2; 16])),
            generation: Generation::new(0x0001_0203).unwrap(),
            purpose: Purpose::Data,
            deadline: Instant::now(),
            label: "",
        }
    }

    fn class(outcome: Result<KeyPayload, KmsError>) -> Option<KmsClass> {
        outcome.err().map(|error| error.class)
    }

    #[test]
    fn a_payload_comes_back_unchanged_and_no_blob_is_like_another() {
        let (key, env, payload) = (key(7), Env::system(), payload(0x5a));
        let first = seal_payload(WrappingKey::Local(&key), &env, &payload, &context()).unwrap();
        let second = seal_payload(WrappingKey::Local(&key), &env, &payload, &context()).unwrap();
        assert_eq!((first.len(), BLOB_LEN), (176, 176));
        assert_ne!(first[..128], second[..128]);
        assert_ne!(first[144..172], second[144..172]);
        assert_eq!(first[172..], [3, 2, 1, 1], "generation and suite");
        for blob in [first, second] {
            let opened = open_payload(WrappingKey::Local(&key), &blob, &context()).unwrap();
            assert!(opened.with_bytes(|bytes| *bytes == [0x5a; 128]).unwrap());
        }
    }

    #[test]
    fn every_flipped_bit_and_every_other_length_is_refused() {
        let key = key(7);
        let blob = seal_payload(WrappingKey::Local(&key), &Env::system(), &payload(1), &context()).unwrap();
        for bit in 0..blob.len() * 8 {
            let mut flipped = blob.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(
                class(open_payload(WrappingKey::Local(&key), &flipped, &context())),
                Some(KmsClass::BadCiphertext),
                "bit {bit}"
            );
        }
        for len in (0..=BLOB_LEN + 1).filter(|&len| len != BLOB_LEN) {
            let mut other = blob.clone();
            other.resize(len, 0);
            assert_eq!(
                class(open_payload(WrappingKey::Local(&key), &other, &context())),
                Some(KmsClass::BadCiphertext),
                "length {len}"
            );
        }
        assert_eq!(class(open_payload(WrappingKey::Local(&key), &blob, &context())), None);
    }

    #[test]
    fn another_key_or_context_does_not_open_it() {
        let blob = seal_payload(WrappingKey::Local(&key(7)), &Env::system(), &payload(1), &context()).unwrap();
        assert_eq!(class(open_payload(WrappingKey::Local(&key(8)), &blob, &context())), Some(KmsClass::BadCiphertext));
        let others = [
            WrapContext { cluster: ClusterId::from_bytes([0; 16]), ..context() },
            WrapContext { database: Some(DatabaseId::from_bytes([0; 16])), ..context() },
            WrapContext { generation: Generation::FIRST, ..context() },
            WrapContext { purpose: Purpose::Probe, ..context() },
        ];
        for other in others {
            assert_eq!(
                class(open_payload(WrappingKey::Local(&key(7)), &blob, &other)),
                Some(KmsClass::BadCiphertext),
                "{other:?}"
            );
        }
        let unbound = WrapContext { deadline: Instant::now(), label: "another", ..context() };
        assert_eq!(class(open_payload(WrappingKey::Local(&key(7)), &blob, &unbound)), None);
    }

    /// The bytes that this build writes and every later one must read; the random parts come from `Counting`.
    #[test]
    fn a_blob_is_what_a_stock_aead_makes_of_the_documented_parts() {
        struct Counting;
        impl Entropy for Counting {
            fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
                (0x40..).zip(out).for_each(|(byte, out)| *out = byte);
                Ok(())
            }
            fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
                Err(NoRandomness)
            }
        }
        let env = Env { entropy: std::sync::Arc::new(Counting), ..Env::system() };
        let blob = seal_payload(WrappingKey::Local(&key(7)), &env, &payload(0x5a), &context()).unwrap();

        use ring::{aead, hkdf};
        let salt: Vec<u8> = (0x40..0x50).collect();
        let info = [b"pgseal1.locl", &[0; 16][..], &salt, &[0, 0, 0, 1]].concat();
        let parent = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &[7; 32]);
        let subkey: aead::UnboundKey = parent.expand(&[&info], &aead::AES_256_GCM).unwrap().into();
        let nonce: [u8; 12] = std::array::from_fn(|at| 0x40 + at as u8);
        let aad = [b"PSWC\x01\x01\0\0\x03\x02\x01\0\0\0\0\0", &[0xc1; 16][..], &[0xd2; 16]].concat();
        let mut expected = vec![0x5a; 128];
        let tag = aead::LessSafeKey::new(subkey).seal_in_place_separate_tag(
            aead::Nonce::assume_unique_for_key(nonce),
            aead::Aad::from(aad),
            &mut expected,
        );
        expected.extend(tag.unwrap().as_ref());
        expected.extend(nonce);
        expected.extend(salt);
        expected.extend([3, 2, 1, 1]);
        assert_eq!(blob, expected);
    }

    #[test]
    fn no_random_bytes_is_no_verdict_on_the_key() {
        struct Dry;
        impl Entropy for Dry {
            fn fill(&self, _: &mut [u8]) -> Result<(), NoRandomness> {
                Err(NoRandomness)
            }
            fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
                Err(NoRandomness)
            }
        }
        let env = Env { entropy: std::sync::Arc::new(Dry), ..Env::system() };
        let error = seal_payload(WrappingKey::Local(&key(7)), &env, &payload(1), &context()).unwrap_err();
        assert_eq!(error.class, KmsClass::Unreachable);
    }

    #[test]
    fn a_fingerprint_is_the_same_for_one_key_and_another_for_another() {
        let of = |byte| fingerprint(&key(byte)).unwrap();
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert_eq!((of(1).len(), of(1).contains("01010101")), (32, false));
    }
}
