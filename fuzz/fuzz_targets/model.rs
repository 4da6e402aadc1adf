//! Any sequence of seals, opens and tampering, on ciphers of one database before and after a rotation and on a foreign one,
//! against a model that knows every page that was sealed: that one opens, as what it was and where it was sealed, under a
//! key that it was sealed under; everything else is refused, with the error that it deserves, and leaves zeros.

#![no_main]

use std::collections::{HashMap, HashSet};
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use pageseal::testing::set_session_counter;
use pageseal::testing::stray::{StrayDatabase, StrayKey};
use pageseal::{
    AesBackend, Entropy, FileId, Generation, Inline, NoRandomness, OVERHEAD, PageCipher, PageContext, PageError,
    PageJob, Pool, SealId, Suite, Threads, Trailer,
};

/// Set by `tests/run` to see this target fail: then the ciphers seal and open every page without a location.
static BROKEN: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PAGESEAL_FUZZ_BROKEN").is_some());
static THREADS: LazyLock<Threads> = LazyLock::new(|| Threads::new(NonZero::new(2).unwrap()).unwrap());

/// Each step of a sequence is read from this many bytes.
const STEP: usize = 8;
const MOST_STEPS: usize = 48;
const MOST_PAGES: usize = 512;
/// Few, so that some are let go of.
const SUBKEYS: usize = 8;
/// In a batch. With pages of 8 KiB, enough to be shared out.
const MOST_JOBS: usize = 17;
const LENGTHS: [usize; 12] = [0, 1, 15, 16, 17, 464, 512, 513, 976, 4048, 4096, 8144];
/// A session's limits, as in docs/FORMAT.md.
const MAX_SEALS: u32 = 1 << 28;
const MAX_UNITS: u32 = 1 << 31;

fuzz_target!(|input: &[u8]| {
    let Some((&first, steps)) = input.split_first() else { return };
    let mut model = Model::new(first);
    for step in steps.as_chunks::<STEP>().0.iter().take(MOST_STEPS) {
        model.step(step);
    }
});

/// A page as it lies in the engine's storage, and where the engine keeps it.
#[derive(Clone)]
struct Stored {
    image: Vec<u8>,
    context: PageContext,
}

/// What was sealed, and the bytes that it became.
struct Sealed {
    key: usize,
    context: PageContext,
    payload: Vec<u8>,
    image: Vec<u8>,
}

struct Cipher {
    database: StrayDatabase,
    /// Which of the keys it has; it seals under the last.
    keys: &'static [usize],
}

struct Model {
    ciphers: [Cipher; 3],
    storage: Vec<Stored>,
    /// By the trailer. There are no two alike, because no nonce comes twice.
    sealed: HashMap<[u8; OVERHEAD], Sealed>,
    /// Nonces and subkey names, with the key.
    nonces: HashSet<(usize, Vec<u8>)>,
}

impl Model {
    fn new(choice: u8) -> Self {
        let suite = |bit: u8| [Suite::Aes256Gcm, Suite::ChaCha20Poly1305, Suite::Aegis256X2][usize::from(bit % 3)];
        let backend = if choice & 0x80 == 0 { AesBackend::Ring } else { AesBackend::RustCrypto };
        let keys = [(1, choice, 1), (2, choice / 3, 1), (1, choice, 2)].map(|(generation, bits, key)| StrayKey {
            generation: Generation::new(generation).unwrap(),
            suite: suite(bits),
            seal: SealId::from_bytes([key; 16]),
            key: [key + 16 * generation as u8; 32],
        });
        let entropy: Arc<dyn Entropy> = Arc::new(Dice::default());
        let cipher = |indices: &'static [usize], backend| {
            let keys: Vec<_> = indices.iter().map(|&index| keys[index]).collect();
            let entropy = Some(Arc::clone(&entropy));
            let database = StrayDatabase::open_with_cache(&keys, backend, entropy, SUBKEYS).unwrap();
            Cipher { database, keys: indices }
        };
        let ciphers = [cipher(&[0], AesBackend::Ring), cipher(&[0, 1], backend), cipher(&[2], AesBackend::Ring)];
        Self { ciphers, storage: Vec::new(), sealed: HashMap::new(), nonces: HashSet::new() }
    }

    fn step(&mut self, &[kind, by, how, place, version, a, b, c]: &[u8; STEP]) {
        let by = usize::from(by) % self.ciphers.len();
        let (context, how) = (context(place, version), How::of(how));
        let (page, other) = (self.pick(a), self.pick(b));
        match kind % 12 {
            0 | 1 => self.seal(by, how, context, payload(a, b)),
            2 => self.seal_batch(by, how, context, usize::from(a) % (MOST_JOBS + 1), b, c),
            3 => self.for_page(page, |model, page| {
                let Stored { image, context } = model.storage[page].clone();
                model.open(by, how, context, &image);
            }),
            4 => self.for_page(page, |model, page| {
                let image = model.storage[page].image.clone();
                model.open(by, how, context, &image);
            }),
            5 => self.open_batch(by, how, context, [a, b, c]),
            6 => self.for_page(page, |model, page| {
                let bits = 8 * model.storage[page].image.len();
                let bit = usize::from(u16::from_le_bytes([b, c]));
                if bits > 0 {
                    // The trailer is hit as often as the payload.
                    let bit = if c & 1 == 0 { bit % bits } else { bits - 1 - bit % bits.min(8 * OVERHEAD) };
                    model.storage[page].image[bit / 8] ^= 1 << (bit % 8);
                }
            }),
            7 => self.for_page(page, |model, page| model.swap(page, other.unwrap_or(page), c)),
            8 => self.for_page(page, |model, page| {
                let len = model.storage[page].image.len() + 8;
                model.storage[page].image.resize(len.saturating_sub(usize::from(b) % 64), c);
            }),
            9 => self.ciphers[by].database.resumed(),
            10 => {
                // In a session of its own, so that this test turns no counter back.
                self.ciphers[by].database.resumed();
                let (seals, units) = (MAX_SEALS - u32::from(a), MAX_UNITS - 4 * u32::from(b));
                set_session_counter(&self.ciphers[by].database.cipher, seals, units).unwrap();
            }
            _ => self.for_page(page, |model, page| model.storage[page].context = context),
        }
    }

    fn pick(&self, choice: u8) -> Option<usize> {
        usize::from(choice).checked_rem(self.storage.len())
    }

    fn for_page(&mut self, page: Option<usize>, f: impl FnOnce(&mut Self, usize)) {
        if let Some(page) = page {
            f(self, page);
        }
    }

    fn cipher(&self, by: usize) -> PageCipher {
        self.ciphers[by].database.cipher.clone()
    }

    fn seal(&mut self, by: usize, how: How, context: PageContext, payload: Vec<u8>) {
        let image = how.seal(&self.cipher(by), context, &payload);
        self.keep(by, context, payload, image);
    }

    /// Enters a page that was sealed.
    fn keep(&mut self, by: usize, context: PageContext, payload: Vec<u8>, image: Vec<u8>) {
        assert_eq!(image.len(), payload.len() + OVERHEAD);
        let key = *self.ciphers[by].keys.last().unwrap();
        let trailer = image.last_chunk::<OVERHEAD>().unwrap();
        assert!(self.nonces.insert((key, trailer[16..].to_vec())), "a nonce came twice");
        let counter = u32::from_le_bytes(trailer[16..20].try_into().unwrap());
        assert!(counter < MAX_SEALS, "a session sealed too much");
        assert_eq!(Trailer(*trailer).generation(), Some(self.ciphers[by].database.cipher.generation()));
        self.sealed.insert(*trailer, Sealed { key, context, payload, image: image.clone() });
        if self.storage.len() < MOST_PAGES {
            self.storage.push(Stored { image, context });
        }
    }

    /// What must become of these bytes, opened here.
    fn expected(&self, by: usize, context: PageContext, image: &[u8]) -> Result<&[u8], PageError> {
        let keys = self.ciphers[by].keys;
        let trailer = image.last_chunk::<OVERHEAD>().ok_or(PageError::Length)?;
        if let Some(sealed) = self.sealed.get(trailer)
            && sealed.image == image
            && keys.contains(&sealed.key)
            && sealed.context == context
        {
            return Ok(&sealed.payload);
        }
        match Trailer(*trailer).generation() {
            Some(unknown) if unknown.get() as usize > keys.len() => Err(PageError::UnknownGeneration(unknown)),
            _ => Err(PageError::Authentication),
        }
    }

    fn open(&self, by: usize, how: How, context: PageContext, image: &[u8]) {
        // The trailer of a page shorter than it cannot be given apart.
        let how = if image.len() < OVERHEAD { How::InPlace } else { how };
        let opened = how.open(&self.cipher(by), context, image);
        self.check(by, context, image, opened);
    }

    /// Compares an outcome, and what it left in the buffer, with the model.
    fn check(&self, by: usize, context: PageContext, image: &[u8], (outcome, left): (Result<(), PageError>, Vec<u8>)) {
        let expected = self.expected(by, context, image);
        assert_eq!(outcome, expected.map(|_| ()), "{context:?}");
        match expected {
            Ok(payload) => assert!(left == payload, "another payload came out"),
            Err(_) => assert!(left.iter().all(|&byte| byte == 0), "a refused page left something"),
        }
    }

    /// Seals pages side by side; bits of `odd` make pages of them that cannot be sealed.
    fn seal_batch(&mut self, by: usize, how: How, first: PageContext, count: usize, len: u8, odd: u8) {
        let pages: Vec<_> = (0..count)
            .map(|index| {
                let context = first.with_version(index as u64);
                let payload = payload(len, index as u8);
                let wrong = odd >> (index % 8) & 1 == 1 && index.is_multiple_of(3);
                // Sealed in place, a page without room for its trailer; else a destination that is too short.
                let short = if how.is_in_place() { payload.len() + 1 } else { 1 };
                let len = payload.len() + OVERHEAD - if wrong { short } else { 0 };
                (context, payload, vec![0xee; len])
            })
            .collect();
        let mut buffers: Vec<_> = pages.iter().map(|(.., buffer)| buffer.clone()).collect();
        let mut jobs = Vec::new();
        for ((context, payload, _), buffer) in pages.iter().zip(&mut buffers) {
            let context = subject(*context);
            if how.is_in_place() {
                let fits = payload.len().min(buffer.len());
                buffer[..fits].copy_from_slice(&payload[..fits]);
                jobs.push(PageJob::in_place(context, buffer));
            } else {
                jobs.push(PageJob::between(context, payload, buffer));
            }
        }
        let failed = self.cipher(by).seal_batch(how.pool(), &mut jobs);
        let results: Vec<_> = jobs.iter().map(PageJob::result).collect();
        assert_eq!(results.iter().filter(|result| result.is_err()).count(), failed);
        for (((context, payload, before), image), result) in pages.into_iter().zip(buffers).zip(results) {
            if before.len() == payload.len() + OVERHEAD {
                assert_eq!(result, Ok(()));
                self.keep(by, context, payload, image);
            } else {
                assert_eq!(result, Err(PageError::Length));
                assert!(how.is_in_place() || image.iter().all(|&byte| byte == 0), "a refused page left something");
            }
        }
    }

    /// Opens stored pages side by side, some of them at a place that is not theirs.
    fn open_batch(&self, by: usize, how: How, elsewhere: PageContext, [first, count, moved]: [u8; 3]) {
        let Some(first) = self.pick(first) else { return };
        let picked = self.storage.iter().cycle().skip(first).take(usize::from(count) % (MOST_JOBS + 1));
        let pages: Vec<_> = picked
            .enumerate()
            .map(|(index, stored)| {
                let there = moved >> (index % 8) & 1 == 0;
                (if there { stored.context } else { elsewhere }, &stored.image)
            })
            .collect();
        let mut buffers: Vec<_> = pages
            .iter()
            .map(|(_, image)| match how.is_in_place() {
                true => image.to_vec(),
                false => vec![0xee; image.len().saturating_sub(OVERHEAD)],
            })
            .collect();
        let mut jobs = Vec::new();
        for ((context, image), buffer) in pages.iter().zip(&mut buffers) {
            jobs.push(match how.is_in_place() {
                true => PageJob::in_place(subject(*context), buffer),
                false => PageJob::between(subject(*context), image, buffer),
            });
        }
        let failed = self.cipher(by).open_batch(how.pool(), &mut jobs);
        let results: Vec<_> = jobs.iter().map(PageJob::result).collect();
        assert_eq!(results.iter().filter(|result| result.is_err()).count(), failed);
        for (((context, image), mut buffer), result) in pages.into_iter().zip(buffers).zip(results) {
            if result.is_ok() {
                buffer.truncate(image.len() - OVERHEAD);
            }
            self.check(by, context, image, (result, buffer));
        }
    }

    /// Swaps two pages, or parts of them, between their places.
    fn swap(&mut self, one: usize, other: usize, part: u8) {
        let mut images = [one, other].map(|page| self.storage[page].image.clone());
        let [a, b] = &mut images;
        let shorter = a.len().min(b.len());
        let part = match part % 4 {
            0 => 0..shorter,
            1 => 0..shorter.saturating_sub(OVERHEAD),
            2 => 0..16.min(shorter),
            _ => 0..0,
        };
        a[part.clone()].swap_with_slice(&mut b[part.clone()]);
        if part.is_empty() {
            // Only the trailers, which stand at the ends.
            if let (Some(a), Some(b)) = (a.last_chunk_mut::<OVERHEAD>(), b.last_chunk_mut()) {
                std::mem::swap(a, b);
            }
        }
        let [a, b] = images;
        if one != other {
            self.storage[one].image = a;
            self.storage[other].image = b;
        }
    }
}

/// The ways to seal or open; each does the same.
#[derive(Clone, Copy)]
enum How {
    Into,
    InPlace,
    Detached,
    /// A batch of one, or in a batch, on the calling thread or on two.
    Batch {
        in_place: bool,
        threads: bool,
    },
}

impl How {
    fn of(byte: u8) -> Self {
        match byte % 8 {
            0 | 1 => Self::Into,
            2 => Self::InPlace,
            3 => Self::Detached,
            other => Self::Batch { in_place: other & 1 == 0, threads: other & 2 == 0 },
        }
    }

    fn is_in_place(self) -> bool {
        matches!(self, Self::InPlace | Self::Batch { in_place: true, .. })
    }

    fn pool(self) -> &'static dyn Pool {
        match self {
            Self::Batch { threads: true, .. } | Self::InPlace => &*THREADS,
            _ => &Inline,
        }
    }

    fn seal(self, cipher: &PageCipher, context: PageContext, payload: &[u8]) -> Vec<u8> {
        let context = subject(context);
        let mut image = payload.to_vec();
        if let Self::Detached = self {
            let trailer = cipher.seal_detached(&context, &mut image).unwrap();
            image.extend(trailer.0);
            return image;
        }
        image.resize(payload.len() + OVERHEAD, 0xee);
        match self {
            Self::Into => cipher.seal_into(&context, payload, &mut image).unwrap(),
            Self::InPlace => cipher.seal_in_place(&context, &mut image).unwrap(),
            _ => {
                let job = match self.is_in_place() {
                    true => PageJob::in_place(context, &mut image),
                    false => PageJob::between(context, payload, &mut image),
                };
                assert_eq!(cipher.seal_batch(self.pool(), &mut [job]), 0);
            }
        }
        image
    }

    /// The outcome, and what is in the buffer: the payload, or whatever a refusal left.
    fn open(self, cipher: &PageCipher, context: PageContext, image: &[u8]) -> (Result<(), PageError>, Vec<u8>) {
        let context = subject(context);
        let payload = image.len().saturating_sub(OVERHEAD);
        let mut buffer = match self {
            Self::Detached => image[..payload].to_vec(),
            _ if self.is_in_place() => image.to_vec(),
            _ => vec![0xee; payload],
        };
        let outcome = match self {
            Self::Into => cipher.open_into(&context, image, &mut buffer),
            Self::InPlace => cipher.open_in_place(&context, &mut buffer),
            Self::Detached => {
                let trailer = Trailer(*image.last_chunk().unwrap());
                cipher.open_detached(&context, &mut buffer, &trailer)
            }
            Self::Batch { .. } => {
                let mut job = [match self.is_in_place() {
                    true => PageJob::in_place(context, &mut buffer),
                    false => PageJob::between(context, image, &mut buffer),
                }];
                let _ = cipher.open_batch(self.pool(), &mut job);
                job[0].result()
            }
        };
        if outcome.is_ok() {
            buffer.truncate(payload);
        }
        (outcome, buffer)
    }
}

fn context(place: u8, version: u8) -> PageContext {
    let context = match place % 8 {
        0 => PageContext::unbound(),
        place => PageContext::page(FileId::new(u64::from(place / 4)), u64::from(place % 4)),
    };
    match version % 4 {
        0 => context,
        version => context.with_version(u64::from(version - 1)),
    }
}

/// The context as the ciphers get it.
fn subject(context: PageContext) -> PageContext {
    if *BROKEN { PageContext::unbound() } else { context }
}

fn payload(len: u8, seed: u8) -> Vec<u8> {
    let len = LENGTHS[usize::from(len) % LENGTHS.len()];
    (0..len).map(|index| (index as u8).wrapping_mul(31) ^ seed).collect()
}

/// Randomness that is the same in each run and never the same within one.
#[derive(Default)]
struct Dice(AtomicU64);

impl Dice {
    /// SplitMix64.
    fn next(&self) -> u64 {
        let mut z = self.0.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

impl Entropy for Dice {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]));
        Ok(())
    }

    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok(self.next().to_le_bytes())
    }
}
