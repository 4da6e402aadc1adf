//! Stores a real file as sealed pages, reads it back from disk, shows what that cost beside the raw cipher, and then tries
//! to cheat in four ways.
//!
//! ```text
//! cargo run --release --example quickstart -- [--kms file|aws|azure|gcp|vault] [FILE]
//! ```
//!
//! Without FILE it takes the first 64 MB of the largest file in the Rust toolchain's library folder.
//!
//! Without `--kms` the master key is a key file, made for this run. The others are the customer's own: each needs the feature
//! of its name (`--features aws`) and the environment variables that docs/KMS.md lists. A master key in a service is used and
//! never changed, so the run does not disable it.

use std::cell::Cell;
use std::error::Error as StdError;
use std::fs::{self, File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pageseal::{
    AesHardware, Cluster, ClusterId, ClusterOptions, Database, Error, ErrorKind, FileId, KeyWrapper, LocalKeyFile,
    PageCipher, PageContext, PageFile, PageFileOptions, ReadJob, Threads, Wrappers,
};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

type Outcome<T> = Result<T, Box<dyn StdError>>;

const DEFAULT_LIMIT: u64 = 64_000_000;
const PAGE_SIZE: u32 = 16 * 1024;

fn main() -> Outcome<()> {
    let arguments = Arguments::parse()?;
    let (source, limit) = match arguments.file {
        Some(path) => (path, u64::MAX),
        None => (largest_toolchain_file()?, DEFAULT_LIMIT),
    };
    let mut original = Vec::new();
    File::open(&source)?.take(limit).read_to_end(&mut original)?;
    println!("input        {} ({} bytes)", source.display(), original.len());
    println!("AES hardware {:?}, {} threads", AesHardware::detect(), Threads::shared().threads());

    let place = TemporaryDirectory::new()?;
    let key = place.0.join("master.key");
    let master = Master::choose(&arguments.kms, &key)?;
    println!("master key   {}", master.wrapper.id());
    let store = Store { cluster: place.0.join("cluster"), master };
    let id = store.write(&original)?;
    // Everything that `write` had is dropped: what follows comes from the disk and the master key.
    let read_back = store.read(id)?;
    if read_back != original {
        return Err("what was read back differs from what was stored".into());
    }
    println!("read back    {} bytes, the same as the input", read_back.len());

    let refusals = store.show_refusals(id)?;
    let restored = store.show_recovery(id, &original)?;
    println!(
        "SCORE quickstart kms={} bytes={} sha256={} refusals={refusals} restored={}",
        arguments.kms,
        read_back.len(),
        hex(ring::digest::digest(&ring::digest::SHA256, &read_back).as_ref()),
        u8::from(restored),
    );
    let expected = if store.master.file.is_some() { 4 } else { 3 };
    if refusals == expected && restored { Ok(()) } else { Err("not everything held".into()) }
}

struct Arguments {
    kms: String,
    file: Option<PathBuf>,
}

impl Arguments {
    fn parse() -> Outcome<Self> {
        let mut parsed = Self { kms: "file".into(), file: None };
        let mut given = std::env::args_os().skip(1);
        while let Some(argument) = given.next() {
            if argument == "--kms" {
                let kms = given.next().ok_or("--kms needs one of file, aws, azure, gcp, vault")?;
                parsed.kms = kms.to_string_lossy().into_owned();
            } else if parsed.file.replace(argument.into()).is_some() {
                return Err("usage: quickstart [--kms file|aws|azure|gcp|vault] [FILE]".into());
            }
        }
        Ok(parsed)
    }
}

/// The master key that the run uses.
struct Master {
    wrapper: Arc<dyn KeyWrapper>,
    /// The key file, if it is one.
    file: Option<LocalKeyFile>,
}

impl Master {
    fn choose(kms: &str, path: &Path) -> Outcome<Self> {
        if kms != "file" {
            return Ok(Self { wrapper: Self::in_service(kms)?, file: None });
        }
        // A key file beside the data is for trying things out. In production the master key stays in a key service.
        let file = LocalKeyFile::create(path)?;
        Ok(Self { wrapper: Arc::new(file.clone()), file: Some(file) })
    }

    fn in_service(kms: &str) -> Outcome<Arc<dyn KeyWrapper>> {
        match kms {
            #[cfg(feature = "aws")]
            "aws" => Ok(Arc::new(pageseal::AwsKms::from_env()?)),
            #[cfg(feature = "azure")]
            "azure" => Ok(Arc::new(pageseal::AzureKeyVault::from_env()?)),
            #[cfg(feature = "gcp")]
            "gcp" => Ok(Arc::new(pageseal::GoogleKms::from_env()?)),
            #[cfg(feature = "vault")]
            "vault" => Ok(Arc::new(pageseal::VaultTransit::from_env()?)),
            #[allow(unreachable_patterns)] // Those whose feature is on.
            "aws" | "azure" | "gcp" | "vault" => {
                let run = format!("cargo run --release --features {kms} --example quickstart -- --kms {kms}");
                Err(format!("this build is without the feature {kms}; try: {run}").into())
            }
            _ => Err(format!("--kms {kms}: there is file, aws, azure, gcp and vault").into()),
        }
    }

    fn wrappers(&self) -> Result<Wrappers, Error> {
        Wrappers::any_of([Arc::clone(&self.wrapper)])
    }
}

/// Where the cluster lies, and its master key.
struct Store {
    cluster: PathBuf,
    master: Master,
}

impl Store {
    /// Makes a cluster, a database and a page file, and stores `original` in it.
    fn write(&self, original: &[u8]) -> Outcome<ClusterId> {
        let cluster = Cluster::create(&self.cluster, ClusterOptions::new(), self.master.wrappers()?)?;
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

    fn open(&self, id: ClusterId) -> Result<(Cluster, PageFile), Error> {
        self.open_with(id, self.master.wrappers()?)
    }

    fn open_with(&self, id: ClusterId, wrappers: Wrappers) -> Result<(Cluster, PageFile), Error> {
        let options = ClusterOptions::new().expected_id(id);
        let cluster = Cluster::open(&self.cluster, options, wrappers)?;
        let file = cluster.database("quickstart")?.page_file("data")?;
        Ok((cluster, file))
    }

    fn read(&self, id: ClusterId) -> Outcome<Vec<u8>> {
        let (_cluster, file) = self.open(id)?;
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

    /// Attempts that must fail, four with a key file. Returns how many did, with the right kind of error.
    fn show_refusals(&self, id: ClusterId) -> Outcome<usize> {
        let mut refusals = 0;
        let mut refused = |what: &str, expected: ErrorKind, outcome: Result<(), Error>| {
            match &outcome {
                Err(error) if error.kind() == expected => refusals += 1,
                _ => eprintln!("NOT REFUSED AS EXPECTED: {what}"),
            }
            println!("{what:<12} {}", outcome.err().map_or("accepted".to_owned(), |error| error.to_string()));
        };

        let (cluster, file) = self.open(id)?;
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

        // Another master key; where the first is a file, one of the same name.
        let other = self.cluster.with_file_name("other").join("master.key");
        fs::create_dir_all(other.with_file_name(""))?;
        let other = Wrappers::one(LocalKeyFile::create(&other)?);
        let expected = if self.master.file.is_some() { ErrorKind::BadCiphertext } else { ErrorKind::Misconfigured };
        refused("wrong key", expected, self.open_with(id, other).map(drop));

        if let Some(file) = &self.master.file {
            file.disable()?;
            refused("disabled key", ErrorKind::Disabled, self.open(id).map(drop));
        }
        Ok(refusals)
    }

    /// Enabling the master key, where it is ours, brings everything back.
    fn show_recovery(&self, id: ClusterId, original: &[u8]) -> Outcome<bool> {
        if let Some(file) = &self.master.file {
            file.enable()?;
        }
        let restored = self.read(id)? == original;
        println!("opened again {}", if restored { "the same bytes again" } else { "DIFFERENT BYTES" });
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
