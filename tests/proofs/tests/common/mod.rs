//! What the proofs of the page path share: ciphers over known keys, the ways to seal and to open, and seeded dice.
// Each test binary uses a part of it.
#![allow(dead_code)]

use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::{env, fs, process};

use pageseal::testing::stray::{StrayDatabase, StrayKey};
use pageseal::{
    AesBackend, Generation, Inline, KeyPayload, KeyWrapper, KmsClass, KmsError, MasterKeyId, OVERHEAD, PageCipher,
    PageContext, PageError, PageJob, Purpose, SealId, Suite, Trailer, WrapContext, WrappedKey,
};

/// Every suite by every implementation.
pub const CIPHERS: [(Suite, AesBackend); 4] = [
    (Suite::Aes256Gcm, AesBackend::Ring),
    (Suite::Aes256Gcm, AesBackend::RustCrypto),
    (Suite::ChaCha20Poly1305, AesBackend::Ring),
    (Suite::Aegis256X2, AesBackend::Ring),
];

pub fn generation(number: u32) -> Generation {
    Generation::new(number).expect("the test uses generations that exist")
}

/// A data key of generation 1, as good as random, the same for the same `number`.
pub fn stray_key(suite: Suite, number: u64) -> StrayKey {
    let mut dice = Dice::new(number);
    let mut seal = [0; 16];
    dice.fill(&mut seal);
    let mut key = [0; 32];
    dice.fill(&mut key);
    StrayKey { generation: Generation::FIRST, suite, seal: SealId::from_bytes(seal), key }
}

pub fn open_stray(keys: &[StrayKey], backend: AesBackend) -> StrayDatabase {
    StrayDatabase::open(keys, backend, None).expect("this machine has AES hardware and locked memory")
}

pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.iter().all(|byte| *byte == 0)
}

/// Salt and nonce of a sealed page: what must never meet other data again.
pub fn salt_and_nonce(page: &[u8]) -> ([u8; 16], [u8; 12]) {
    let trailer = page.last_chunk::<OVERHEAD>().expect("a sealed page ends with a trailer");
    (trailer[28..44].try_into().expect("16 bytes"), trailer[16..28].try_into().expect("12 bytes"))
}

/// The ways into and out of a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Method {
    Into,
    InPlace,
    Detached,
    BatchBetween,
    BatchInPlace,
}

impl Method {
    pub const ALL: [Self; 5] = [Self::Into, Self::InPlace, Self::Detached, Self::BatchBetween, Self::BatchInPlace];

    /// Seals `payload`; the page comes back as one piece, whatever the method.
    pub fn seal(self, cipher: &PageCipher, context: &PageContext, payload: &[u8]) -> Result<Vec<u8>, PageError> {
        let mut page = payload.to_vec();
        page.resize(payload.len() + OVERHEAD, 0xa5);
        match self {
            Self::Into => cipher.seal_into(context, payload, &mut page)?,
            Self::InPlace => cipher.seal_in_place(context, &mut page)?,
            Self::Detached => {
                let (payload, trailer) = page.split_at_mut(payload.len());
                trailer.copy_from_slice(&cipher.seal_detached(context, payload)?.0);
            }
            Self::BatchBetween => {
                let mut jobs = [PageJob::between(*context, payload, &mut page)];
                let _ = cipher.seal_batch(&Inline, &mut jobs);
                jobs[0].result()?;
            }
            Self::BatchInPlace => {
                let mut jobs = [PageJob::in_place(*context, &mut page)];
                let _ = cipher.seal_batch(&Inline, &mut jobs);
                jobs[0].result()?;
            }
        }
        Ok(page)
    }

    /// Opens `page`, and says what is left in the buffer: after an error, all that the method must have zeroed.
    pub fn open(self, cipher: &PageCipher, context: &PageContext, page: &[u8]) -> (Result<(), PageError>, Vec<u8>) {
        let payload = page.len().saturating_sub(OVERHEAD);
        let mut whole = page.to_vec();
        let mut out = vec![0xa5; payload];
        let outcome = match self {
            Self::Into => cipher.open_into(context, page, &mut out),
            Self::InPlace => cipher.open_in_place(context, &mut whole),
            Self::Detached => {
                let Some((payload, trailer)) = whole.split_last_chunk_mut() else {
                    return (Err(PageError::Length), out);
                };
                let outcome = cipher.open_detached(context, payload, &Trailer(*trailer));
                out.copy_from_slice(payload);
                outcome
            }
            Self::BatchBetween => {
                let mut jobs = [PageJob::between(*context, page, &mut out)];
                let _ = cipher.open_batch(&Inline, &mut jobs);
                jobs[0].result()
            }
            Self::BatchInPlace => {
                let mut jobs = [PageJob::in_place(*context, &mut whole)];
                let _ = cipher.open_batch(&Inline, &mut jobs);
                jobs[0].result()
            }
        };
        if matches!(self, Self::InPlace | Self::BatchInPlace) {
            // The trailer stays after success only.
            whole.truncate(if outcome.is_ok() { payload } else { whole.len() });
            out = whole;
        }
        (outcome, out)
    }
}

/// Counts attacks, and those that were refused with an error and nothing but zeros left in the buffer.
#[derive(Default, Debug)]
pub struct Refusals {
    pub tried: u64,
    pub refused: u64,
}

impl Refusals {
    pub fn count(&mut self, (outcome, left): (Result<(), PageError>, Vec<u8>)) {
        self.tried += 1;
        self.refused += u64::from(outcome.is_err() && is_zero(&left));
    }

    pub fn accepted(&self) -> u64 {
        self.tried - self.refused
    }
}

/// SplitMix64: repeatable from its seed, and good enough to decide who moves next.
#[derive(Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Another seed at each run, printed; `PAGESEAL_SEED` repeats one.
    pub fn printed(name: &str) -> Self {
        let seed = env::var("PAGESEAL_SEED").ok().and_then(|seed| seed.parse().ok());
        let seed = seed.unwrap_or_else(|| RandomState::new().hash_one(name));
        println!("{name}: PAGESEAL_SEED={seed}");
        Self(seed)
    }

    /// What it was made with, before anything was drawn.
    pub fn seed(&self) -> u64 {
        self.0
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    pub fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(8) {
            let bytes = self.next().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        self.fill(&mut out);
        out
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

/// A directory that goes when it is dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!("pageseal-proofs-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_directory(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), &target).unwrap()),
        }
    }
}

/// A key service that wraps nothing and tells everything: what it is given is its blob. It remembers the data keys.
#[derive(Clone, Default)]
pub struct GlassWrapper(Arc<Mutex<Vec<StrayKey>>>);

impl GlassWrapper {
    /// The data keys that passed through, in the order in which they were wrapped.
    pub fn data_keys(&self) -> Vec<StrayKey> {
        self.0.lock().unwrap().clone()
    }
}

impl KeyWrapper for GlassWrapper {
    fn id(&self) -> MasterKeyId {
        MasterKeyId::new("glass", "pane")
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let failed = |error| KmsError::with_source(KmsClass::Unclassified, error);
        let blob = key.with_bytes(|bytes| bytes.to_vec()).map_err(failed)?;
        if cx.purpose == Purpose::Data {
            // docs/FORMAT.md, "wrapped payload": suite at 6, generation at 8, seal id at 48, key at 64.
            self.0.lock().unwrap().push(StrayKey {
                generation: generation(u32::from_le_bytes(blob[8..12].try_into().unwrap())),
                suite: Suite::from_byte(blob[6]).unwrap(),
                seal: SealId::from_bytes(blob[48..64].try_into().unwrap()),
                key: blob[64..96].try_into().unwrap(),
            });
        }
        Ok(WrappedKey { master_key: self.id(), key_version: String::new(), blob })
    }

    fn unwrap_key(&self, key: &WrappedKey, _: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let failed = |error| KmsError::with_source(KmsClass::BadCiphertext, error);
        KeyPayload::from_bytes(&mut key.blob.clone()).map_err(failed)
    }
}
