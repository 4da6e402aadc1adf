//! The only file that names a cipher crate. Ciphers, key derivation, MACs and comparison, over raw bytes; it knows nothing
//! of pages, contexts or records.

#[cfg(feature = "rustcrypto")]
use aes_gcm::aead::AeadInOut;
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};
use ring::{hkdf, hmac};

use crate::error::{Error, ErrorKind, PageError};
use crate::format::derive::Info;
use crate::format::page::{AAD_LEN, NONCE_LEN, SALT_LEN, Suite, TAG_LEN};
#[cfg(feature = "rustcrypto")]
use crate::secret::scoped_to;
use crate::secret::{Forked, Locked, SecretKey, scoped, scoped_call, wipe_vector_registers};

/// Which implementation of AES-256-GCM a cluster uses. The bytes are the same; one opens what the other sealed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
#[non_exhaustive]
pub enum AesBackend {
    /// ring: assembly, three times as fast.
    #[default]
    Ring,
    /// The `aes-gcm` crate: Rust only.
    #[cfg(feature = "rustcrypto")]
    RustCrypto,
}

/// What the processor has for AES.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum AesHardware {
    /// None: use [`Suite::ChaCha20Poly1305`]; AES would be slow, and AEGIS is refused.
    None,
    /// AES-NI and PCLMULQDQ.
    AesNi,
    /// VAES and VPCLMULQDQ: two blocks an instruction or more.
    Vaes,
}

impl AesHardware {
    /// Asks the processor that this runs on.
    pub fn detect() -> Self {
        if !is_x86_feature_detected!("aes") || !is_x86_feature_detected!("pclmulqdq") {
            Self::None
        } else if is_x86_feature_detected!("vaes") && is_x86_feature_detected!("vpclmulqdq") {
            Self::Vaes
        } else {
            Self::AesNi
        }
    }
}

/// Whether this build, on this machine, can use the suite.
///
/// # Errors
/// [`ErrorKind::Unsupported`] with what is missing: a feature, or AES hardware.
pub(crate) fn check_suite(suite: Suite) -> Result<(), Error> {
    match suite {
        Suite::Aes256Gcm | Suite::ChaCha20Poly1305 => Ok(()),
        Suite::Aegis256X2 if !cfg!(feature = "aegis") => {
            Err(Error::new(ErrorKind::Unsupported, "suite AEGIS-256X2 is not in this build; enable feature `aegis`"))
        }
        Suite::Aegis256X2 if AesHardware::detect() == AesHardware::None => Err(Error::new(
            ErrorKind::Unsupported,
            "suite AEGIS-256X2 needs AES hardware, which this processor lacks; choose ChaCha20-Poly1305",
        )),
        Suite::Aegis256X2 => Ok(()),
    }
}

/// The bytes did not open: wrong key, nonce, associated data or tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct OpenFailed;

/// A cipher with its key schedule, ready for use. Lives in [`Locked`] memory only: ring wipes nothing itself.
pub(crate) enum AeadKey {
    /// Keeps its key in registers; nothing of it is found on the stack.
    AesRing(LessSafeKey),
    ChaChaRing(LessSafeKey),
    #[cfg(feature = "rustcrypto")]
    AesRustCrypto(aes_gcm::Aes256Gcm),
    /// AEGIS has no key schedule: the key itself, absorbed anew with each nonce.
    #[cfg(feature = "aegis")]
    Aegis([u8; 32]),
}

/// How far down the stack each cipher spills its key in one call, with room to spare. Found by looking for the key below
/// the caller's frame; `tests/proofs/tests/key_memory.rs` looks for it from another process.
const CHACHA_SPILL: usize = 2 * 1024;
#[cfg(feature = "rustcrypto")]
const RUSTCRYPTO_SPILL: usize = 12 * 1024;
#[cfg(feature = "aegis")]
const AEGIS_SPILL: usize = 640;

impl AeadKey {
    /// Derives the key named by `info` from `parent` and sets the cipher up, in locked memory.
    pub(crate) fn derive(
        parent: &SecretKey,
        info: &Info,
        suite: Suite,
        backend: AesBackend,
    ) -> Result<Locked<Self>, PageError> {
        parent.with(|parent| {
            Locked::new_with(|| {
                let mut key = [0; 32];
                expand(parent, info, &mut key);
                Self::set_up(&key, suite, backend)
            })
        })?
    }

    pub(crate) fn set_up(key: &[u8; 32], suite: Suite, backend: AesBackend) -> Result<Self, PageError> {
        Ok(match (suite, backend) {
            #[cfg(feature = "rustcrypto")]
            (Suite::Aes256Gcm, AesBackend::RustCrypto) => {
                use aes_gcm::KeyInit;
                Self::AesRustCrypto(aes_gcm::Aes256Gcm::new(key.into()))
            }
            (Suite::Aes256Gcm, _) => Self::AesRing(ring_key(&AES_256_GCM, key)),
            (Suite::ChaCha20Poly1305, _) => Self::ChaChaRing(ring_key(&CHACHA20_POLY1305, key)),
            #[cfg(feature = "aegis")]
            (Suite::Aegis256X2, _) => Self::Aegis(*key),
            #[cfg(not(feature = "aegis"))]
            (Suite::Aegis256X2, _) => return Err(PageError::Authentication),
        })
    }

    /// Encrypts `data` in place and returns the tag. Wipes the vector registers, and the stack where the cipher used it.
    ///
    /// `salt` only enters AEGIS's longer nonce; the other suites have it in their key.
    #[inline]
    pub(crate) fn seal(
        &self,
        nonce: [u8; NONCE_LEN],
        salt: &[u8; SALT_LEN],
        aad: &[u8],
        data: &mut [u8],
    ) -> [u8; TAG_LEN] {
        let _ = salt;
        let tag = match self {
            Self::AesRing(key) => ring_seal(key, nonce, aad, data),
            Self::ChaChaRing(key) => scoped_call::<CHACHA_SPILL, _>(|| ring_seal(key, nonce, aad, data)),
            #[cfg(feature = "rustcrypto")]
            Self::AesRustCrypto(key) => scoped_to::<RUSTCRYPTO_SPILL, _>(|| {
                let tag = key.encrypt_inout_detached(&nonce.into(), aad, data.into());
                tag.expect("a payload is shorter than the 64 GiB limit of GCM").into()
            }),
            #[cfg(feature = "aegis")]
            Self::Aegis(key) => {
                scoped_call::<AEGIS_SPILL, _>(|| Aegis::new(key, &aegis_nonce(nonce, salt)).encrypt_in_place(data, aad))
            }
        };
        wipe_vector_registers();
        tag
    }

    /// Decrypts `data` in place if the tag is right. Otherwise `data` holds anything: the caller zeroes it. Wipes as
    /// [`AeadKey::seal`] does.
    #[inline]
    pub(crate) fn open(
        &self,
        nonce: [u8; NONCE_LEN],
        salt: &[u8; SALT_LEN],
        aad: &[u8],
        data: &mut [u8],
        tag: &[u8; TAG_LEN],
    ) -> Result<(), OpenFailed> {
        let _ = salt;
        let outcome = match self {
            Self::AesRing(key) => ring_open(key, nonce, aad, data, tag),
            Self::ChaChaRing(key) => scoped_call::<CHACHA_SPILL, _>(|| ring_open(key, nonce, aad, data, tag)),
            #[cfg(feature = "rustcrypto")]
            Self::AesRustCrypto(key) => scoped_to::<RUSTCRYPTO_SPILL, _>(|| {
                key.decrypt_inout_detached(&nonce.into(), aad, data.into(), tag.into()).map_err(|_| OpenFailed)
            }),
            #[cfg(feature = "aegis")]
            Self::Aegis(key) => scoped_call::<AEGIS_SPILL, _>(|| {
                let cipher = Aegis::new(key, &aegis_nonce(nonce, salt));
                cipher.decrypt_in_place(data, tag, aad).map_err(|_| OpenFailed)
            }),
        };
        wipe_vector_registers();
        outcome
    }
}

fn ring_key(algorithm: &'static Algorithm, key: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(algorithm, key).expect("32 bytes are the key length of both algorithms"))
}

#[inline]
fn ring_seal(key: &LessSafeKey, nonce: [u8; NONCE_LEN], aad: &[u8], data: &mut [u8]) -> [u8; TAG_LEN] {
    let tag = key.seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), data);
    let tag = tag.expect("a payload is shorter than the 64 GiB limit of GCM");
    let mut out = [0; TAG_LEN];
    out.copy_from_slice(tag.as_ref());
    out
}

#[inline]
fn ring_open(
    key: &LessSafeKey,
    nonce: [u8; NONCE_LEN],
    aad: &[u8],
    data: &mut [u8],
    tag: &[u8; TAG_LEN],
) -> Result<(), OpenFailed> {
    let nonce = Nonce::assume_unique_for_key(nonce);
    let opened = key.open_in_place_separate_tag(nonce, Aad::from(aad), (*tag).into(), data, 0..);
    opened.map(|_| ()).map_err(|_| OpenFailed)
}

#[cfg(feature = "aegis")]
type Aegis = ::aegis::aegis256x2::Aegis256X2<TAG_LEN>;

/// `nonce 12 | salt 16 | 0^4`.
#[cfg(feature = "aegis")]
fn aegis_nonce(nonce: [u8; NONCE_LEN], salt: &[u8; SALT_LEN]) -> [u8; 32] {
    let mut out = [0; 32];
    out[..12].copy_from_slice(&nonce);
    out[12..28].copy_from_slice(salt);
    out
}

const _: () =
    assert!(AAD_LEN.is_multiple_of(16), "ring hashes associated data in blocks of 16; a part block costs as much");

/// Derives a secret key in locked memory: HKDF-Expand-SHA256(parent, info, 32), RFC 5869 section 2.3. Parents are uniform
/// keys, so HKDF-Extract would add nothing.
pub(crate) fn derive_key(parent: &SecretKey, info: &Info) -> Result<SecretKey, Error> {
    parent.with(|parent| {
        SecretKey::fill_with(|out| {
            expand(parent, info, out);
            Ok(())
        })
    })?
}

/// Derives a public value (an id or a commitment) in the same way.
pub(crate) fn derive_public(parent: &SecretKey, info: &Info) -> Result<[u8; 32], Error> {
    let mut out = [0; 32];
    parent.with(|parent| scoped(|| expand(parent, info, &mut out)))?;
    Ok(out)
}

/// Leaves key material on the stack: call it inside [`scoped`] or a constructor of [`Locked`].
fn expand(parent: &[u8; 32], info: &Info, out: &mut [u8; 32]) {
    expand_into(parent, &info.0, out).expect("32 bytes are below the limit of 255 blocks");
}

/// HKDF-Expand of any length; `None` above 255 blocks of 32 bytes.
pub(crate) fn expand_into(parent: &[u8; 32], info: &[u8], out: &mut [u8]) -> Option<()> {
    struct Length(usize);
    impl hkdf::KeyType for Length {
        fn len(&self) -> usize {
            self.0
        }
    }
    let parent = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, parent);
    parent.expand(&[info], Length(out.len())).and_then(|okm| okm.fill(out)).ok()
}

/// HMAC-SHA256 (RFC 2104) over the parts, one after the other.
pub(crate) fn hmac_sha256(key: &SecretKey, parts: &[&[u8]]) -> Result<[u8; 32], Error> {
    let mut out = [0; 32];
    key.with(|key| {
        scoped(|| {
            let mut context = hmac::Context::with_key(&hmac::Key::new(hmac::HMAC_SHA256, key));
            parts.iter().for_each(|part| context.update(part));
            out.copy_from_slice(context.sign().as_ref());
        })
    })?;
    Ok(out)
}

/// How far down the stack an HMAC leaves its states, with room to spare: two hash contexts, and ring's frames.
const HMAC_SPILL: usize = 3 * 1024;

/// The key of many HMACs, set up once. What it takes to wipe the registers, and the stack far down, is paid once for all MACs
/// made in one [`HmacKey::with`].
pub(crate) struct HmacKey(Locked<hmac::Key>);

impl HmacKey {
    /// Takes `key` over.
    pub(crate) fn new(key: &SecretKey) -> Result<Self, Error> {
        let locked = key.with(|key| Locked::new_with(|| Ok::<_, Error>(hmac::Key::new(hmac::HMAC_SHA256, key))))??;
        Ok(Self(locked))
    }

    /// Lends the key for any number of MACs, then wipes the stack below and the registers.
    ///
    /// # Errors
    /// Forked, in a child that was forked before or meanwhile: what was computed must not be believed.
    pub(crate) fn with<R>(&self, f: impl FnOnce(&Hmac<'_>) -> R) -> Result<R, Forked> {
        self.0.with(|key| scoped(|| f(&Hmac(key))))
    }
}

/// HMAC-SHA256 (RFC 2104) under a key that was set up before.
pub(crate) struct Hmac<'a>(&'a hmac::Key);

impl Hmac<'_> {
    /// Over the parts, one after the other. Wipes its own frames at once: whoever goes on moves values whose unused bytes are
    /// what lay on the stack, also to the heap.
    pub(crate) fn sign(&self, parts: &[&[u8]]) -> [u8; 32] {
        scoped_call::<HMAC_SPILL, _>(|| {
            let mut context = hmac::Context::with_key(self.0);
            parts.iter().for_each(|part| context.update(part));
            let mut out = [0; 32];
            out.copy_from_slice(context.sign().as_ref());
            out
        })
    }
}

/// SHA-256 (FIPS 180-4), for fingerprints of public bytes.
#[cfg(test)]
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    out.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    out
}

/// Whether two strings of public length are the same, in a time that does not tell where they differ.
pub(crate) fn constant_time_eq(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let difference = a.iter().zip(b).fold(0, |difference, (x, y)| difference | (x ^ y));
    std::hint::black_box(difference) == 0
}
