//! How close pageseal comes to the ciphers under it.
//!
//! ```text
//! cargo run --release --features rustcrypto,aegis,test-util --example limits
//! ```
//!
//! Each figure compares two loops that take turns within a fraction of a millisecond, so that both see the same machine;
//! medians of many rounds are printed. `ratio` is the raw cipher's time over pageseal's: 1.00 means free. The raw cipher is
//! a key that was set up once, detached, in place, with a counter for a nonce and 32 bytes of associated data, over the
//! same payloads. `speedup` is one thread's time over that of the pool, the caller being outside of it, in a stream of eight
//! batches; `first` is the speedup of the first of them, for which the pool's threads had to be woken.
//!
//! `cost` is the time of what is measured over that of its reference, 1.00 meaning as much: of a cipher that a cluster can
//! close over one that nobody can; of the 10,000th database over the 100th, in processor time, with the keystore on a
//! simulated disk: where all of them stay open (`open=all`), and where each is closed again.

use std::hint::black_box;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Instant;

use pageseal::testing::{Broken, SimulatedDisk, stray_cipher};
use pageseal::{
    AesBackend, AesHardware, Cluster, ClusterOptions, Database, FileId, Hierarchy, Inline, LocalKeyFile, OVERHEAD,
    PageCipher, PageContext, PageJob, Pool, ScriptedWrapper, Suite, Threads, Wrappers,
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

fn measure(directory: &Path) -> Result<(), Box<dyn std::error::Error>> {
    keystores(directory)?;
    let cipher = |suite: Suite| -> Result<PageCipher, pageseal::Error> {
        let place = directory.join(format!("{suite:?}"));
        std::fs::create_dir(&place).map_err(|_| pageseal::PageError::NotRun)?;
        let key = LocalKeyFile::create(place.join("master.key"))?;
        let cluster = Cluster::create(&place.join("cluster"), ClusterOptions::new().suite(suite), Wrappers::one(key))?;
        cluster.create_database("limits")?.cipher()
    };
    let aes = cipher(Suite::Aes256Gcm)?;
    let chacha = cipher(Suite::ChaCha20Poly1305)?;
    gate(&aes)?;
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

/// A cipher whose cluster can close it, and looks after it from a thread of its own, against one that nobody can close.
fn gate(gated: &PageCipher) -> Result<(), pageseal::Error> {
    let stray = stray_cipher(Suite::Aes256Gcm, AesBackend::default())?;
    let pages = 16;
    let mut buffers = vec![vec![0x5a; 4096 - OVERHEAD]; pages];
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for round in 0..10 * ROUNDS {
        // Each on the same memory: what the caches do to it is no part of this.
        let time = |cipher: &PageCipher, buffers: &mut [Vec<u8>]| {
            let (sealing, opening) = time_ours(cipher, buffers);
            sealing + opening
        };
        if round.is_multiple_of(2) {
            with.push(time(gated, &mut buffers));
            without.push(time(&stray, &mut buffers));
        } else {
            without.push(time(&stray, &mut buffers));
            with.push(time(gated, &mut buffers));
        }
    }
    let (with, without) = (median(&mut with), median(&mut without));
    let (ours, theirs) = (with / (2 * pages) as f64, without / (2 * pages) as f64);
    println!("a 4 KiB page sealed or opened: {ours:.1} ns in a cluster, {theirs:.1} ns outside of one");
    println!("LIMIT op=gate size=4096 cost={:.3}", with / without);
    Ok(())
}

/// How many databases are many.
const MANY: usize = 10_000;

fn keystores(directory: &Path) -> Result<(), pageseal::Error> {
    for (name, hierarchy) in [("direct", Hierarchy::Direct), ("cluster-key", Hierarchy::ClusterKey)] {
        let mut many = Place::create(directory.join(format!("many-closed-{name}")), hierarchy, false)?;
        creations(directory, name, &mut many)?;
        let mut many = Place::create(directory.join(format!("many-{name}")), hierarchy, true)?;
        creations(directory, name, &mut many)?;
        verifications(name, &many, "appended")?;
        // What drops a database writes the keystore anew.
        many.cluster.drop_database(&(many.cluster.databases()?[0].clone()))?;
        verifications(name, &many, "compacted")?;
    }
    Ok(())
}

/// A cluster whose keystore is in memory, and those of its databases that are open.
struct Place {
    path: PathBuf,
    disk: SimulatedDisk,
    key: ScriptedWrapper,
    hierarchy: Hierarchy,
    cluster: Cluster,
    keeps_open: bool,
    open: Vec<Database>,
    created: usize,
}

impl Place {
    fn create(path: PathBuf, hierarchy: Hierarchy, keeps_open: bool) -> Result<Self, pageseal::Error> {
        let (disk, key) = (SimulatedDisk::new(Broken::No), ScriptedWrapper::new("limits"));
        let options = ClusterOptions::new().hierarchy(hierarchy).keystore_disk(&disk).watched(false);
        let cluster = Cluster::create(&path, options, Wrappers::one(key.clone()))?;
        Ok(Self { path, disk, key, hierarchy, cluster, keeps_open, open: Vec::new(), created: 0 })
    }

    /// Processor time, in nanoseconds.
    fn create_database(&mut self) -> Result<f64, pageseal::Error> {
        let name = format!("database {}", self.created);
        let start = processor_time();
        let database = self.cluster.create_database(&name)?;
        let took = processor_time() - start;
        self.created += 1;
        if self.keeps_open {
            self.open.push(database);
        }
        Ok(took)
    }

    fn fill(&mut self, databases: usize) -> Result<(), pageseal::Error> {
        while self.created < databases {
            self.create_database()?;
        }
        Ok(())
    }

    fn open(&self) -> Result<Cluster, pageseal::Error> {
        let options = ClusterOptions::new().hierarchy(self.hierarchy).keystore_disk(&self.disk).watched(false);
        Cluster::open(&self.path, options.expected_id(self.cluster.id()), Wrappers::one(self.key.clone()))
    }
}

/// Creations around the 100th and around the 10,000th, in turn. After the 150th, the next cluster is filled up to the 50th.
fn creations(directory: &Path, name: &str, many: &mut Place) -> Result<(), pageseal::Error> {
    const AROUND: usize = 50;
    const TIMES: usize = 5;
    let open = if many.keeps_open { "all" } else { "none" };
    many.fill(MANY - AROUND * TIMES)?;
    let (mut early, mut late) = (Vec::new(), Vec::new());
    for time in 0..TIMES {
        let path = directory.join(format!("few-{name}-{open}-{time}"));
        let mut few = Place::create(path, many.hierarchy, many.keeps_open)?;
        few.fill(100 - AROUND)?;
        for _ in 0..2 * AROUND {
            early.push(few.create_database()?);
            late.push(many.create_database()?);
        }
    }
    let (early, late) = (median(&mut early), median(&mut late));
    println!(
        "creating a database, {name}, {open} open: the 100th {:.1} µs, the 10,000th {:.1} µs",
        early / 1e3,
        late / 1e3
    );
    println!("LIMIT op=create-database n={MANY} hierarchy={name} open={open} cost={:.2}", late / early);
    Ok(())
}

/// Processor time of opening a cluster. Its own keys are unwrapped on another thread, which is not counted.
fn verifications(name: &str, many: &Place, layout: &str) -> Result<(), pageseal::Error> {
    let mut times = Vec::new();
    for _ in 0..21 {
        let start = processor_time();
        let cluster = black_box(many.open()?);
        times.push((processor_time() - start) / 1e6);
        drop(cluster);
    }
    let records = many.cluster.databases()?.len();
    let millis = median(&mut times);
    println!("LIMIT op=verify-keystore n={records} hierarchy={name} layout={layout} millis={millis:.1}");
    Ok(())
}

/// What this thread has used of the processor, in nanoseconds.
#[allow(unsafe_code)]
fn processor_time() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes the time to where it is told.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
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
