//! Stores a real file as sealed pages, reads it back from disk, shows what that cost beside the raw cipher, and then tries
//! to cheat in four ways.
//!
//! ```text
//! cargo run --release --example quickstart [FILE]
//! ```
//!
//! Without FILE it takes the first 64 MB of the largest file in the Rust toolchain's library folder.

use std::cell::Cell;
use std::error::Error as StdError;
use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use pageseal::{
    AesHardware, Cluster, ClusterId, ClusterOptions, Database, Error, ErrorKind, FileId, LocalKeyFile, PageCipher,
    PageContext, PageFile, PageFileOptions, ReadJob, Threads, Wrappers,
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

type Outcome<T> = Result<T, Box<dyn StdError>>;

const DEFAULT_LIMIT: u64 = 64_000_000;
const PAGE_SIZE: u32 = 16 * 1024;

fn main() -> Outcome<()> {
    let (source, limit) = match std::env::args_os().nth(1) {
        Some(path) => (PathBuf::from(path), u64::MAX),
        None => (largest_toolchain_file()?, DEFAULT_LIMIT),
    };
    let mut original = Vec::new();
    File::open(&source)?.take(limit).read_to_end(&mut original)?;
    println!("input        {} ({} bytes)", source.display(), original.len());
    println!("AES hardware {:?}, {} threads", AesHardware::detect(), Threads::shared().threads());

    let place = TemporaryDirectory::new()?;
    let store = Store { cluster: place.0.join("cluster"), key: place.0.join("master.key") };
    let id = store.write(&original)?;
    // Everything that `write` had is dropped: what follows comes from the disk and the key file.
    let read_back = store.read(id)?;
    if read_back != original {
        return Err("what was read back differs from what was stored".into());
    }
    println!("read back    {} bytes, the same as the input", read_back.len());

    let refusals = store.show_refusals(id)?;
    let restored = store.show_recovery(id, &original)?;
    println!(
        "SCORE quickstart bytes={} sha256={} refusals={refusals} restored={}",
        read_back.len(),
        hex(ring::digest::digest(&ring::digest::SHA256, &read_back).as_ref()),
        u8::from(restored),
    );
    if refusals == 4 && restored { Ok(()) } else { Err("not everything held".into()) }
}

/// Where the cluster and its master key lie.
struct Store {
    cluster: PathBuf,
    key: PathBuf,
}

impl Store {
    /// Makes a cluster, a database and a page file, and stores `original` in it.
    fn write(&self, original: &[u8]) -> Outcome<ClusterId> {
        // A key file beside the data is for trying things out. In production the master key stays in a key service.
        let master = LocalKeyFile::create(&self.key)?;
        let cluster = Cluster::create(&self.cluster, ClusterOptions::new(), Wrappers::one(master))?;
        let database = cluster.create_database("quickstart")?;
        let file = database.create_page_file("data", PageFileOptions::new().page_size(PAGE_SIZE))?;

        let pages = to_pages(original, file.payload_len());
        let start = Instant::now();
        let mut appender = file.append()?;
        appender.write(Threads::shared(), &pages)?;
        let count = appender.finish()?;
        let took = start.elapsed();
        println!("stored       {count} pages of {PAGE_SIZE} bytes, {} with write and fsync", speed(pages.len(), took));

        show_page(&pages[..file.payload_len()], &file)?;
        compare_with_raw(&database, &pages, file.payload_len())?;
        Ok(cluster.id())
    }

    fn open(&self, id: ClusterId, key: &Path) -> Result<(Cluster, PageFile), Error> {
        let options = ClusterOptions::new().expected_id(id);
        let cluster = Cluster::open(&self.cluster, options, Wrappers::one(LocalKeyFile::new(key)))?;
        let file = cluster.database("quickstart")?.page_file("data")?;
        Ok((cluster, file))
    }

    fn read(&self, id: ClusterId) -> Outcome<Vec<u8>> {
        let (_cluster, file) = self.open(id, &self.key)?;
        let mut pages = Vec::new();
        let mut buffer = vec![0; 256 * file.payload_len()];
        let mut took = Duration::ZERO;
        while let left @ 1.. = file.pages() - (pages.len() / file.payload_len()) as u64 {
            let buffer = &mut buffer[..usize::try_from(left.min(256))? * file.payload_len()];
            let first = (pages.len() / file.payload_len()) as u64;
            let bufs = buffer.chunks_exact_mut(file.payload_len());
            let mut jobs: Vec<_> = (first..).zip(bufs).map(|(page, buf)| ReadJob::new(page, buf)).collect();
            let start = Instant::now();
            if file.read_many(Threads::shared(), &mut jobs) > 0 {
                let failed = jobs.iter().find(|job| job.result().is_err());
                return Err(format!("reading failed: {failed:?}").into());
            }
            took += start.elapsed();
            drop(jobs);
            pages.extend_from_slice(buffer);
        }
        println!("read         {} through the memory map", speed(pages.len(), took));
        from_pages(&pages)
    }

    /// Four attempts that must fail. Returns how many did, with the right kind of error.
    fn show_refusals(&self, id: ClusterId) -> Outcome<usize> {
        let mut refusals = 0;
        let mut refused = |what: &str, expected: ErrorKind, outcome: Result<(), Error>| {
            match &outcome {
                Err(error) if error.kind() == expected => refusals += 1,
                _ => eprintln!("NOT REFUSED AS EXPECTED: {what}"),
            }
            println!("{what:<12} {}", outcome.err().map_or("accepted".to_owned(), |error| error.to_string()));
        };

        let (cluster, file) = self.open(id, &self.key)?;
        let mut buf = vec![0; file.payload_len()];
        let mut read = |page| file.read(page, &mut buf).map(drop);
        let last = file.pages() - 1;
        let (from, to) = (page_at(&file, 0)?, page_at(&file, last)?);
        let first_page = raw_page(&file, from)?;
        refused("moved page", ErrorKind::Authentication, with_bytes(&file, to, &first_page, || read(last))?);
        let mut flipped = first_page;
        flipped[1234] ^= 0x10;
        refused("flipped bit", ErrorKind::Authentication, with_bytes(&file, from, &flipped, || read(0))?);
        read(0)?;
        read(last)?;
        drop((cluster, file));

        // A master key of the same name, but another one.
        let other = self.key.with_file_name("other").join("master.key");
        fs::create_dir_all(other.with_file_name(""))?;
        LocalKeyFile::create(&other)?;
        refused("wrong key", ErrorKind::BadCiphertext, self.open(id, &other).map(drop));

        LocalKeyFile::new(&self.key).disable()?;
        refused("disabled key", ErrorKind::Disabled, self.open(id, &self.key).map(drop));
        Ok(refusals)
    }

    /// Enabling the master key brings everything back.
    fn show_recovery(&self, id: ClusterId, original: &[u8]) -> Outcome<bool> {
        LocalKeyFile::new(&self.key).enable()?;
        let restored = self.read(id)? == original;
        println!("enabled      {}", if restored { "the same bytes again" } else { "DIFFERENT BYTES" });
        Ok(restored)
    }
}

/// Times pageseal and raw ring over the same buffers, in turn, on one thread. A turn is short, so that both see the same
/// machine; the medians are shown.
fn compare_with_raw(database: &Database, pages: &[u8], payload_len: usize) -> Outcome<()> {
    const TURN: usize = 64;
    let cipher = database.cipher()?;
    let raw = RawRing::new()?;
    let mut buffer = vec![0; TURN * payload_len];
    let mut times = Vec::new();
    for (index, turn) in pages.chunks_exact(TURN.min(pages.len() / payload_len) * payload_len).enumerate() {
        let buffer = &mut buffer[..turn.len()];
        let mut time = |ours: bool| {
            buffer.copy_from_slice(turn);
            let taken = if ours { time_ours(&cipher, buffer, payload_len)? } else { raw.time(buffer, payload_len)? };
            assert!(buffer == turn, "what was opened differs from what was sealed");
            Ok::<_, Box<dyn StdError>>(taken)
        };
        // Who goes first alternates, because the second finds the memory warm.
        times.push(if index % 2 == 0 { (time(true)?, time(false)?) } else { swap((time(false)?, time(true)?)) });
    }
    let bytes = TURN.min(pages.len() / payload_len) * payload_len;
    for (what, pick) in [("seal", (|times: &Times| times.seal) as fn(&Times) -> Duration), ("open", |times| times.open)]
    {
        let ours = median(times.iter().map(|(ours, _)| pick(ours).as_secs_f64()));
        let raw = median(times.iter().map(|(_, raw)| pick(raw).as_secs_f64()));
        let ratio = median(times.iter().map(|(ours, raw)| pick(raw).as_secs_f64() / pick(ours).as_secs_f64()));
        let speed = |seconds| speed(bytes, Duration::from_secs_f64(seconds));
        println!("{what:<12} {}; raw ring {}; ratio {ratio:.3} (1.00 = free)", speed(ours), speed(raw));
    }
    Ok(())
}

/// How long sealing and opening one turn's pages took.
struct Times {
    seal: Duration,
    open: Duration,
}

fn time_ours(cipher: &PageCipher, buffer: &mut [u8], payload_len: usize) -> Outcome<Times> {
    let context = |index: usize| PageContext::page(FileId::new(1), index as u64);
    let mut trailers = Vec::with_capacity(buffer.len() / payload_len);
    let start = Instant::now();
    for (index, page) in buffer.chunks_exact_mut(payload_len).enumerate() {
        trailers.push(cipher.seal_detached(&context(index), page)?);
    }
    let seal = start.elapsed();
    let start = Instant::now();
    for ((index, page), trailer) in buffer.chunks_exact_mut(payload_len).enumerate().zip(&trailers) {
        cipher.open_detached(&context(index), page, trailer)?;
    }
    Ok(Times { seal, open: start.elapsed() })
}

/// The cipher alone: a key built once, a counter for a nonce, 32 bytes of associated data.
struct RawRing {
    key: LessSafeKey,
    counter: Cell<u64>,
}

impl RawRing {
    fn new() -> Outcome<Self> {
        let key = LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &[7; 32]).map_err(|_| "ring refused its key")?);
        Ok(Self { key, counter: Cell::new(0) })
    }

    fn time(&self, buffer: &mut [u8], payload_len: usize) -> Outcome<Times> {
        let nonce = |counter: u64| {
            let mut nonce = [0; 12];
            nonce[..8].copy_from_slice(&counter.to_le_bytes());
            Nonce::assume_unique_for_key(nonce)
        };
        let first = self.counter.get();
        let mut tags = Vec::with_capacity(buffer.len() / payload_len);
        let start = Instant::now();
        for page in buffer.chunks_exact_mut(payload_len) {
            let counter = self.counter.replace(self.counter.get() + 1);
            let sealed = self.key.seal_in_place_separate_tag(nonce(counter), Aad::from([1; 32]), page);
            tags.push(sealed.map_err(|_| "ring did not seal")?);
        }
        let seal = start.elapsed();
        let start = Instant::now();
        for ((page, tag), counter) in buffer.chunks_exact_mut(payload_len).zip(&tags).zip(first..) {
            let opened = self.key.open_in_place_separate_tag(nonce(counter), Aad::from([1; 32]), *tag, page, 0..);
            opened.map_err(|_| "ring did not open")?;
        }
        Ok(Times { seal, open: start.elapsed() })
    }
}

fn swap<A, B>((a, b): (A, B)) -> (B, A) {
    (b, a)
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The input with its length before it, filled up to whole pages.
fn to_pages(original: &[u8], payload_len: usize) -> Vec<u8> {
    let mut pages = (original.len() as u64).to_le_bytes().to_vec();
    pages.extend(original);
    // Two at least: a page cannot be moved to where it is.
    pages.resize(pages.len().next_multiple_of(payload_len).max(2 * payload_len), 0);
    pages
}

fn from_pages(pages: &[u8]) -> Outcome<Vec<u8>> {
    let (len, rest) = pages.split_first_chunk().ok_or("no pages")?;
    let len = usize::try_from(u64::from_le_bytes(*len))?;
    Ok(rest.get(..len).ok_or("the length is longer than the pages")?.to_vec())
}

fn page_at(file: &PageFile, page: u64) -> Outcome<u64> {
    Ok(file.page_offset(page).ok_or("no such page")?)
}

fn raw_page(file: &PageFile, offset: u64) -> Outcome<Vec<u8>> {
    let mut page = vec![0; file.page_size()];
    File::open(file.path())?.read_exact_at(&mut page, offset)?;
    Ok(page)
}

/// Puts `bytes` into the file, runs `f`, and puts back what was there.
fn with_bytes<T>(file: &PageFile, offset: u64, bytes: &[u8], f: impl FnOnce() -> T) -> Outcome<T> {
    let before = raw_page(file, offset)?;
    let disk = OpenOptions::new().write(true).open(file.path())?;
    disk.write_all_at(bytes, offset)?;
    let outcome = f();
    disk.write_all_at(&before, offset)?;
    Ok(outcome)
}

fn show_page(payload: &[u8], file: &PageFile) -> Outcome<()> {
    let sealed = raw_page(file, page_at(file, 0)?)?;
    println!("page 0, as the engine gave it (first 64 of {} bytes):", payload.len());
    hexdump(0, &payload[..64]);
    println!("page 0, as it lies on disk (first 64 of {} bytes, and the 48 of the trailer):", sealed.len());
    hexdump(0, &sealed[..64]);
    println!("  ...");
    hexdump(sealed.len() - 48, &sealed[sealed.len() - 48..]);
    Ok(())
}

fn hexdump(offset: usize, bytes: &[u8]) {
    for (line, chunk) in bytes.chunks(16).enumerate() {
        let digits: String = chunk.iter().map(|byte| format!("{byte:02x} ")).collect();
        let text: String =
            chunk.iter().map(|&byte| if byte.is_ascii_graphic() { char::from(byte) } else { '.' }).collect();
        println!("  {:06x}  {digits:<48} {text}", offset + line * 16);
    }
}

fn largest_toolchain_file() -> Outcome<PathBuf> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output();
    let output = output.map_err(|error| format!("asking rustc for its folder: {error}; give a FILE instead"))?;
    let library = Path::new(String::from_utf8(output.stdout)?.trim()).join("lib");
    let mut largest = None;
    for entry in fs::read_dir(&library)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        if metadata.is_file() {
            largest = largest.max(Some((metadata.len(), entry.path())));
        }
    }
    largest.map(|(_, path)| path).ok_or_else(|| format!("no file in {}; give a FILE", library.display()).into())
}

fn speed(bytes: usize, took: Duration) -> String {
    format!("{:.2} GB/s", bytes as f64 / took.as_secs_f64() / 1e9)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A new directory, removed at the end.
struct TemporaryDirectory(PathBuf);

impl TemporaryDirectory {
    fn new() -> Outcome<Self> {
        let path = std::env::temp_dir().join(format!("pageseal-quickstart-{}", std::process::id()));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
