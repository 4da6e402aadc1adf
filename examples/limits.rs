//! How close pageseal comes to the ciphers under it.
//!
//! ```text
//! cargo run --release --all-features --example limits
//! ```
//!
//! Each figure compares two loops that take turns within a fraction of a millisecond, so that both see the same machine;
//! medians of many rounds are printed. `ratio` is the raw cipher's time over pageseal's: 1.00 means free. The raw cipher is
//! a key that was set up once, detached, in place, with a counter for a nonce and 32 bytes of associated data, over the
//! same payloads. `speedup` is one thread's time over that of the pool, the caller being outside of it, in a stream of eight
//! batches; `first` is the speedup of the first of them, for which the pool's threads had to be woken.

use std::hint::black_box;
use std::num::NonZero;
use std::time::Instant;

use pageseal::{
    AesHardware, Cluster, ClusterOptions, FileId, Inline, LocalKeyFile, OVERHEAD, PageCipher, PageContext, PageJob,
    Pool, Suite, Threads, Wrappers,
};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

const SIZES: [usize; 5] = [4, 8, 16, 32, 64];
const ROUNDS: usize = 301;
/// Bytes a loop works through in one round: some tens of microseconds.
const TURN: usize = 256 * 1024;
const CONTEXT: PageContext = PageContext::page(FileId::new(1), 1);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("AES hardware: {:?}", AesHardware::detect());
    let directory = std::env::temp_dir().join(format!("pageseal-limits-{}", std::process::id()));
    std::fs::create_dir(&directory)?;
    let outcome = measure(&directory);
    std::fs::remove_dir_all(&directory)?;
    outcome
}

fn measure(directory: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    let cipher = |suite: Suite| -> Result<PageCipher, pageseal::Error> {
        let place = directory.join(format!("{suite:?}"));
        std::fs::create_dir(&place).map_err(|_| pageseal::PageError::NotRun)?;
        let key = LocalKeyFile::create(place.join("master.key"))?;
        let cluster = Cluster::create(&place.join("cluster"), ClusterOptions::new().suite(suite), Wrappers::one(key))?;
        cluster.create_database("limits")?.cipher()
    };
    let aes = cipher(Suite::Aes256Gcm)?;
    let chacha = cipher(Suite::ChaCha20Poly1305)?;
    for size in SIZES.map(|kib| kib * 1024) {
        one_suite("aes256gcm", size, &aes, &Ring::new(&AES_256_GCM), None);
        one_suite("chacha20poly1305", size, &chacha, &Ring::new(&CHACHA20_POLY1305), None);
    }
    #[cfg(feature = "aegis")]
    {
        let aegis = cipher(Suite::Aegis256X2)?;
        for size in SIZES.map(|kib| kib * 1024) {
            one_suite("aegis256x2", size, &aegis, &Aegis, Some(&aes));
        }
    }
    let threads = std::thread::available_parallelism()?;
    for (size, batches) in [(4096, [16, 32, 64, 128, 256, 1024].as_slice()), (16384, &[4, 8, 16, 32, 64, 256])] {
        for &batch in batches {
            one_batch(&aes, size, batch, threads);
        }
    }
    Ok(())
}

/// The cipher alone.
trait Raw {
    fn seal(&self, counter: u64, page: &mut [u8]) -> [u8; 16];
    fn open(&self, counter: u64, page: &mut [u8], tag: &[u8; 16]);
}

struct Ring(LessSafeKey);

impl Ring {
    fn new(algorithm: &'static Algorithm) -> Self {
        Self(LessSafeKey::new(UnboundKey::new(algorithm, &[7; 32]).expect("both algorithms have keys of 32 bytes")))
    }
}

impl Raw for Ring {
    fn seal(&self, counter: u64, page: &mut [u8]) -> [u8; 16] {
        let tag = self.0.seal_in_place_separate_tag(nonce(counter), Aad::from([1; 32]), page);
        tag.expect("pages are short").as_ref().try_into().expect("tags have 16 bytes")
    }

    fn open(&self, counter: u64, page: &mut [u8], tag: &[u8; 16]) {
        let opened = self.0.open_in_place_separate_tag(nonce(counter), Aad::from([1; 32]), (*tag).into(), page, 0..);
        opened.expect("it was sealed so");
    }
}

fn nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

#[cfg(feature = "aegis")]
struct Aegis;

#[cfg(feature = "aegis")]
impl Aegis {
    fn cipher(counter: u64) -> aegis::aegis256x2::Aegis256X2<16> {
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&counter.to_le_bytes());
        aegis::aegis256x2::Aegis256X2::new(&[7; 32], &nonce)
    }
}

#[cfg(feature = "aegis")]
impl Raw for Aegis {
    fn seal(&self, counter: u64, page: &mut [u8]) -> [u8; 16] {
        Self::cipher(counter).encrypt_in_place(page, &[1; 32])
    }

    fn open(&self, counter: u64, page: &mut [u8], tag: &[u8; 16]) {
        Self::cipher(counter).decrypt_in_place(page, tag, &[1; 32]).expect("it was sealed so");
    }
}

fn one_suite(name: &str, size: usize, ours: &PageCipher, raw: &dyn Raw, aes: Option<&PageCipher>) {
    let pages = (TURN / size).max(1);
    let mut buffers = vec![vec![0x5a; size - OVERHEAD]; pages];
    let mut seal = Figures::default();
    let mut open = Figures::default();
    for round in 0..ROUNDS {
        in_turn(
            round,
            || {
                let (sealing, opening) = time_ours(ours, &mut buffers.clone());
                seal.ours.push(sealing);
                open.ours.push(opening);
            },
            || {
                let (sealing, opening) = time_raw(raw, &mut buffers.clone());
                seal.raw.push(sealing);
                open.raw.push(opening);
            },
        );
        if let Some(aes) = aes {
            let (sealing, opening) = time_ours(aes, &mut buffers);
            seal.aes.push(sealing);
            open.aes.push(opening);
        }
    }
    for (op, mut figures) in [("seal", seal), ("open", open)] {
        let bytes = (pages * (size - OVERHEAD)) as f64;
        let (ours, raw) = (median(&mut figures.ours), median(&mut figures.raw));
        println!("{op} {name:<16} {size:>5}: pageseal {:.2} GB/s, raw {:.2} GB/s", bytes / ours, bytes / raw);
        let over_aes = match figures.aes.is_empty() {
            true => String::new(),
            false => format!(" over_aes={:.2}", median(&mut figures.aes) / ours),
        };
        println!("LIMIT op={op} suite={name} size={size} ratio={:.3}{over_aes}", raw / ours);
    }
}

/// Nanoseconds of each round.
#[derive(Default)]
struct Figures {
    ours: Vec<f64>,
    raw: Vec<f64>,
    aes: Vec<f64>,
}

fn time_ours(cipher: &PageCipher, buffers: &mut [Vec<u8>]) -> (f64, f64) {
    let mut trailers = Vec::with_capacity(buffers.len());
    let start = Instant::now();
    for page in buffers.iter_mut() {
        trailers.push(cipher.seal_detached(black_box(&CONTEXT), page).expect("sealing works"));
    }
    let sealing = nanos(start);
    let start = Instant::now();
    for (page, trailer) in buffers.iter_mut().zip(&trailers) {
        cipher.open_detached(black_box(&CONTEXT), page, trailer).expect("it was sealed so");
    }
    (sealing, nanos(start))
}

fn time_raw(raw: &dyn Raw, buffers: &mut [Vec<u8>]) -> (f64, f64) {
    let mut tags = Vec::with_capacity(buffers.len());
    let start = Instant::now();
    for (counter, page) in (0..).zip(buffers.iter_mut()) {
        tags.push(raw.seal(black_box(counter), page));
    }
    let sealing = nanos(start);
    let start = Instant::now();
    for ((counter, page), tag) in (0..).zip(buffers.iter_mut()).zip(&tags) {
        raw.open(black_box(counter), page, tag);
    }
    (sealing, nanos(start))
}

fn one_batch(cipher: &PageCipher, size: usize, batch: usize, threads: NonZero<usize>) {
    /// Batches come in streams: in the first the pool's threads have to wake up, in the others they are awake.
    const STREAM: usize = 8;
    let Ok(pool) = Threads::new(threads) else { return };
    let mut pages = vec![0x5a; size * batch];
    let mut time = |pool: &dyn Pool, open: bool| {
        let mut jobs: Vec<_> = pages.chunks_exact_mut(size).map(|page| PageJob::in_place(CONTEXT, page)).collect();
        let start = Instant::now();
        let failed = if open { cipher.open_batch(pool, &mut jobs) } else { cipher.seal_batch(pool, &mut jobs) };
        let took = nanos(start);
        assert_eq!(failed, 0);
        took
    };
    let mut alone = [Vec::new(), Vec::new()];
    let mut together = [Vec::new(), Vec::new()];
    let mut woken = Vec::new();
    for _ in 0..ROUNDS / 3 {
        for (times, pool) in [(&mut alone, &Inline as &dyn Pool), (&mut together, &pool)] {
            let mut stream = [0.0, 0.0];
            for index in 0..STREAM {
                let (sealing, opening) = (time(pool, false), time(pool, true));
                if index == 0 && pool.threads() > 1 {
                    woken.push(sealing);
                }
                stream = [stream[0] + sealing, stream[1] + opening];
            }
            times[0].push(stream[0] / STREAM as f64);
            times[1].push(stream[1] / STREAM as f64);
        }
    }
    for (index, op) in ["seal", "open"].into_iter().enumerate() {
        let alone = median(&mut alone[index]);
        let speedup = alone / median(&mut together[index]);
        let first = if index == 0 { format!(" first={:.2}", alone / median(&mut woken)) } else { String::new() };
        println!("LIMIT op={op} batch={batch} size={size} threads={threads} speedup={speedup:.2}{first}");
    }
}

/// Runs both, in an order that alternates.
fn in_turn(round: usize, a: impl FnOnce(), b: impl FnOnce()) {
    if round.is_multiple_of(2) {
        a();
        b();
    } else {
        b();
        a();
    }
}

fn nanos(start: Instant) -> f64 {
    start.elapsed().as_nanos() as f64
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
