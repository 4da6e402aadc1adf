//! [`PageFile`]: a file of sealed pages that is appended to in bulk and read through a memory map.
//!
//! So far it only grows: pages are appended, made durable, and then published by a header write. Pages that were published
//! never change, so readers need no lock and no copy can be torn.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use arc_swap::ArcSwapOption;

use crate::aead::AesBackend;
use crate::env::Env;
use crate::error::{Error, ErrorKind, PageError, Result};
use crate::format::derive::Label;
use crate::format::file_header::{
    BODY_LEN, CLEAR_LEN, ClearHeader, HeaderBody, SLOT_LEN, SLOTS, check_page_size, page_offset, unknown_version,
};
use crate::format::page::{NONCE_LEN, OVERHEAD, PageContext, SALT_LEN, SubkeyName, Trailer};
use crate::ids::{ClusterId, DatabaseId, FileId};
use crate::page::batch::{NoTokens, PageJob, share_out};
use crate::page::cipher::{PageCipher, or_zeros};
use crate::page::pool::Pool;
use crate::storage::disk::make_directories;
use crate::storage::map::ReadMap;

/// How much is sealed before it is written. Large enough for all threads, small enough to stay in the cache.
const CHUNK: usize = 4 << 20;

/// How a page file is laid out. Fixed when it is created.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PageFileOptions {
    page_size: u32,
}

impl PageFileOptions {
    /// Pages of 16 KiB on disk.
    pub fn new() -> Self {
        Self { page_size: 16 * 1024 }
    }

    /// Pages of `bytes` on disk, [`OVERHEAD`] of which are the trailer: a multiple of 512, at most 1 MiB.
    pub fn page_size(mut self, bytes: u32) -> Self {
        self.page_size = bytes;
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_page_size(self.page_size)
            .map_err(|_| Error::invalid(format!("page size {} is not a multiple of 512 up to 1 MiB", self.page_size)))
    }
}

impl Default for PageFileOptions {
    fn default() -> Self {
        Self::new()
    }
}

/// What was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Read {
    /// The page's payload.
    Page,
    /// Nothing was ever written there; the buffer holds zeros. Not the same as a page that was tampered with.
    NeverWritten,
}

/// One page of a [`PageFile::read_many`], and what became of it.
pub struct ReadJob<'a> {
    page: u64,
    buf: &'a mut [u8],
    result: Result<Read, PageError>,
}

impl<'a> ReadJob<'a> {
    /// Reads page `page` into `buf`, which must have [`PageFile::payload_len`] bytes.
    pub fn new(page: u64, buf: &'a mut [u8]) -> Self {
        Self { page, buf, result: Err(PageError::NotRun) }
    }

    /// What became of it; [`PageError::NotRun`] before.
    pub fn result(&self) -> Result<Read, PageError> {
        self.result
    }

    /// The page's number.
    pub fn page(&self) -> u64 {
        self.page
    }
}

impl std::fmt::Debug for ReadJob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ReadJob").field("page", &self.page).field("result", &self.result).finish_non_exhaustive()
    }
}

/// A file of sealed pages. A handle: cloning it is cheap.
///
/// This first form appends in bulk and reads. Commits that rewrite pages, durably and atomically, come with the log; until
/// then a published page never changes. One process at a time.
#[derive(Clone)]
pub struct PageFile(Arc<Inner>);

pub(crate) struct Inner {
    cipher: PageCipher,
    backend: AesBackend,
    env: Env,
    path: PathBuf,
    file: File,
    clear: ClearHeader,
    /// The keystore's, as it grows.
    keystore_sequence: Arc<AtomicU64>,
    /// Readers look no further than this.
    written: AtomicU64,
    map: ArcSwapOption<ReadMap>,
    writer: Mutex<Writer>,
}

struct Writer {
    header: HeaderBody,
    /// A write or a sync failed: what is on disk is unknown until the file is opened again.
    failed: bool,
}

/// Where a page file belongs, and what it is opened with.
pub(crate) struct Place {
    pub(crate) cluster: ClusterId,
    pub(crate) database: DatabaseId,
    pub(crate) file: FileId,
    pub(crate) directory: PathBuf,
    pub(crate) cipher: PageCipher,
    pub(crate) backend: AesBackend,
    pub(crate) env: Env,
    /// The sequence of the cluster's keystore, as it grows.
    pub(crate) keystore_sequence: Arc<AtomicU64>,
}

impl Place {
    fn path(&self) -> PathBuf {
        self.directory.join(self.file.to_string())
    }

    /// Where a file lies between its making and its registration.
    fn unregistered(&self) -> PathBuf {
        self.path().with_extension("new")
    }

    fn check(&self, clear: &ClearHeader, path: &Path) -> Result<()> {
        if (clear.cluster, clear.database, clear.file) == (self.cluster, self.database, self.file) {
            return Ok(());
        }
        let message = format!(
            "{} is file {} of database {} in cluster {}, not file {} of database {} in cluster {}; put the right file back",
            path.display(),
            clear.file,
            clear.database,
            clear.cluster,
            self.file,
            self.database,
            self.cluster
        );
        Err(Error::new(ErrorKind::WrongIdentity, message))
    }
}

impl PageFile {
    /// Makes the file: whole and durable under a temporary name, then `register`ed, then under its own. An interrupted
    /// making is finished by [`PageFile::open`] if it was registered; otherwise what is left belongs to nobody.
    pub(crate) fn create(
        place: Place,
        options: &PageFileOptions,
        register: impl FnOnce() -> Result<()>,
    ) -> Result<Self> {
        options.check()?;
        let path = place.path();
        let clear = ClearHeader {
            page_size: options.page_size,
            cluster: place.cluster,
            database: place.database,
            file: place.file,
            slot: 0,
        };
        let oldest_generation = place.cipher.generation();
        let keystore_sequence = place.keystore_sequence.load(Ordering::Acquire);
        let header = HeaderBody { sequence: 1, written: 0, oldest_generation, keystore_sequence };
        let first = HeaderBody { sequence: 0, ..header };
        let slots = [place.seal_slot(&clear, &first)?, place.seal_slot(&ClearHeader { slot: 1, ..clear }, &header)?];
        let io = |error| Error::io(format!("creating {}", path.display()), error);
        let file = write_new(&place.unregistered(), &slots.concat()).map_err(io)?;
        register()?;
        publish(&place.unregistered(), &path).map_err(io)?;
        Ok(Self::new(place, path, file, clear, header))
    }

    pub(crate) fn open(place: Place) -> Result<Self> {
        let path = place.path();
        if !path.exists() && place.unregistered().exists() {
            let finished = publish(&place.unregistered(), &path);
            finished.map_err(|error| Error::io(format!("finishing the creation of {}", path.display()), error))?;
        }
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Error::with_source(
                ErrorKind::NotFound,
                format!("{} is registered in the keystore but not there; restore it from a backup", path.display()),
                error,
            ),
            _ => Error::io(format!("opening {}", path.display()), error),
        })?;
        let (clear, header, settled) = place.read_header(&file, &path)?;
        place.check_keystore(&header, &path)?;
        let page_file = Self::new(place, path, file, clear, header);
        if header.written > 0 {
            page_file.remap(header.written)?;
        }
        if !settled {
            // A crash between the slots, damage to one, or a sync that failed unseen: make both say the same, durably.
            page_file.sync("syncing")?;
            let header = page_file.write_both_slots(header)?;
            page_file.0.writer.lock().unwrap_or_else(PoisonError::into_inner).header = header;
        }
        Ok(page_file)
    }

    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(crate) fn downgrade(&self) -> Weak<Inner> {
        Arc::downgrade(&self.0)
    }

    fn new(place: Place, path: PathBuf, file: File, clear: ClearHeader, header: HeaderBody) -> Self {
        Self(Arc::new(Inner {
            cipher: place.cipher,
            backend: place.backend,
            env: place.env,
            keystore_sequence: place.keystore_sequence,
            path,
            file,
            clear,
            written: AtomicU64::new(header.written),
            map: ArcSwapOption::empty(),
            writer: Mutex::new(Writer { header, failed: false }),
        }))
    }

    /// The bytes of one page's payload.
    pub fn payload_len(&self) -> usize {
        self.page_size() - OVERHEAD
    }

    /// The bytes of one page on disk.
    pub fn page_size(&self) -> usize {
        self.0.clear.page_size as usize
    }

    /// How many pages were written and published: pages 0 to one below.
    pub fn pages(&self) -> u64 {
        self.0.written.load(Ordering::Acquire)
    }

    /// The file's id, which its pages are bound to.
    pub fn id(&self) -> FileId {
        self.0.clear.file
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Where page `page` begins in the file.
    pub fn page_offset(&self, page: u64) -> Option<u64> {
        page_offset(self.0.clear.page_size, page)
    }

    /// Reads page `page` into `buf`, which must have [`PageFile::payload_len`] bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Authentication`] if the page is not what was written there; `buf` then holds zeros.
    pub fn read(&self, page: u64, buf: &mut [u8]) -> Result<Read> {
        self.read_page(page, buf).map_err(|error| self.page_error(error, page))
    }

    /// Reads every job, on `pool` and the calling thread, and returns how many failed; each job has its own result.
    #[must_use = "a job that failed holds no page"]
    pub fn read_many(&self, pool: &dyn Pool, jobs: &mut [ReadJob<'_>]) -> usize {
        jobs.iter_mut().for_each(|job| job.result = Err(PageError::NotRun));
        let read = self.0.cipher.0.check_fork().and_then(|()| {
            self.populate(jobs);
            share_out(pool, jobs, self.payload_len(), NoTokens, &|NoTokens, chunk: &mut [ReadJob<'_>]| {
                for job in chunk {
                    job.result = self.read_page(job.page, job.buf);
                }
            });
            self.0.cipher.0.check_fork()
        });
        if let Err(error) = read {
            for job in jobs.iter_mut() {
                job.buf.fill(0);
                job.result = Err(error);
            }
        }
        jobs.iter().filter(|job| job.result.is_err()).count()
    }

    /// Begins to append pages. One writer at a time.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while another writer exists; [`ErrorKind::Io`] after a failed write, until the file is opened
    /// again.
    pub fn append(&self) -> Result<Appender<'_>> {
        self.0.cipher.0.check_fork()?;
        let writer = match self.0.writer.try_lock() {
            Ok(writer) => writer,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!("{} has a writer; finish it first", self.0.path.display()),
                ));
            }
        };
        self.check_writer(&writer)?;
        let next = writer.header.written;
        Ok(Appender { file: self, writer, next, sealed: Vec::new() })
    }

    fn check_writer(&self, writer: &Writer) -> Result<()> {
        if !writer.failed {
            return Ok(());
        }
        let message = format!("a write to {} failed before; close it and open it again", self.0.path.display());
        Err(Error::new(ErrorKind::Io, message))
    }

    fn read_page(&self, page: u64, buf: &mut [u8]) -> Result<Read, PageError> {
        if page >= self.pages() {
            buf.fill(0);
            self.0.cipher.0.check_fork()?;
            return if buf.len() == self.payload_len() { Ok(Read::NeverWritten) } else { Err(PageError::Length) };
        }
        or_zeros(buf, |buf| {
            if buf.len() != self.payload_len() {
                return Err(PageError::Length);
            }
            let offset = self.page_offset(page).ok_or(PageError::Length)?;
            let mut trailer = [0; OVERHEAD];
            let map = self.0.map.load();
            // The map reaches as far as `pages`: it is replaced before that number grows.
            let copied = map
                .as_ref()
                .is_some_and(|map| map.copy(offset, buf) && map.copy(offset + buf.len() as u64, &mut trailer));
            if !copied {
                return Err(PageError::Authentication);
            }
            self.0.cipher.open_detached(&PageContext::page(self.id(), page), buf, &Trailer(trailer))
        })?;
        Ok(Read::Page)
    }

    /// Lets the kernel read a dense run of pages in at once, instead of one page fault after the other.
    fn populate(&self, jobs: &[ReadJob<'_>]) {
        let written = self.pages();
        let pages = jobs.iter().map(|job| job.page).filter(|&page| page < written);
        let Some((low, high)) = pages.clone().zip(pages).fold(None, |range: Option<(u64, u64)>, (page, _)| {
            Some(range.map_or((page, page), |(low, high)| (low.min(page), high.max(page))))
        }) else {
            return;
        };
        let dense = high - low < 2 * jobs.len() as u64;
        if let (true, Some(start), Some(end), Some(map)) =
            (dense, self.page_offset(low), self.page_offset(high + 1), &*self.0.map.load())
        {
            map.populate(start, usize::try_from(end - start).unwrap_or(0));
        }
    }

    fn remap(&self, written: u64) -> Result<()> {
        let end = self.page_offset(written).and_then(|end| usize::try_from(end).ok());
        let end =
            end.ok_or_else(|| Error::damaged(format!("{} says it has {written} pages", self.0.path.display())))?;
        let map = ReadMap::new(&self.0.file, end).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => Error::with_source(
                ErrorKind::Damaged,
                format!(
                    "{} is cut short: it should hold {written} pages; restore it from a backup",
                    self.0.path.display()
                ),
                error,
            ),
            _ => Error::io(format!("mapping {}", self.0.path.display()), error),
        })?;
        self.0.map.store(Some(Arc::new(map)));
        Ok(())
    }

    fn page_error(&self, error: PageError, page: u64) -> Error {
        Error::page(error, self.0.clear.database, self.id(), page)
    }

    fn io_error(&self, what: &str, error: std::io::Error) -> Error {
        Error::io(format!("{what} {}", self.0.path.display()), error)
    }
}

impl std::fmt::Debug for PageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageFile").field("path", &self.0.path).field("pages", &self.pages()).finish_non_exhaustive()
    }
}

/// Appends pages to a [`PageFile`]. Nothing is visible, and nothing survives a crash, before [`Appender::finish`] returned;
/// dropping it before leaves the file as it was.
#[must_use = "appended pages are lost unless `finish` is called"]
pub struct Appender<'a> {
    file: &'a PageFile,
    writer: MutexGuard<'a, Writer>,
    next: u64,
    sealed: Vec<u8>,
}

impl Appender<'_> {
    /// Seals the pages of `payloads`, on `pool` and the calling thread, writes them behind the last ones, and returns the
    /// number of the first. `payloads` is any number of pages of [`PageFile::payload_len`] bytes, one after the other.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not, with nothing written; else what sealing or writing failed with. After a failed
    /// write the file takes no more until it is opened again.
    pub fn write(&mut self, pool: &dyn Pool, payloads: &[u8]) -> Result<u64> {
        self.file.check_writer(&self.writer)?;
        let payload_len = self.file.payload_len();
        if !payloads.len().is_multiple_of(payload_len) {
            return Err(Error::invalid(format!("{} bytes are not whole pages of {payload_len} bytes", payloads.len())));
        }
        let first = self.next;
        let pages_a_chunk = (CHUNK / self.file.page_size()).max(1);
        for chunk in payloads.chunks(pages_a_chunk * payload_len) {
            self.write_chunk(pool, chunk)?;
        }
        Ok(first)
    }

    /// Makes everything durable, publishes it, and returns how many pages the file has now.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; whether the pages are there is then unknown until the file is opened again.
    pub fn finish(mut self) -> Result<u64> {
        self.file.check_writer(&self.writer)?;
        // Until all of it succeeded: a sync that failed must never be tried again, for the kernel forgets what it lost.
        self.writer.failed = true;
        self.file.sync("syncing the pages of")?;
        let keystore_sequence = self.file.0.keystore_sequence.load(Ordering::Acquire);
        let header = HeaderBody { written: self.next, keystore_sequence, ..self.writer.header };
        self.writer.header = self.file.write_both_slots(header)?;
        self.file.remap(self.next)?;
        self.file.0.written.store(self.next, Ordering::Release);
        self.writer.failed = false;
        Ok(self.next)
    }

    fn write_chunk(&mut self, pool: &dyn Pool, payloads: &[u8]) -> Result<()> {
        let (page_size, payload_len) = (self.file.page_size(), self.file.payload_len());
        let count = payloads.len() / payload_len;
        let too_large = || Error::invalid("the file would grow past what a file can hold");
        let offset = self.file.page_offset(self.next).ok_or_else(too_large)?;
        self.file.page_offset(self.next + count as u64).ok_or_else(too_large)?;
        self.sealed.resize(count * page_size, 0);
        let sealed = self.sealed.chunks_exact_mut(page_size);
        let pages = (self.next..).zip(payloads.chunks_exact(payload_len)).zip(sealed);
        let mut jobs: Vec<_> = pages
            .map(|((page, payload), sealed)| PageJob::between(PageContext::page(self.file.id(), page), payload, sealed))
            .collect();
        if self.file.0.cipher.seal_batch(pool, &mut jobs) > 0 {
            let failed = jobs.iter().zip(self.next..).find_map(|(job, page)| Some((job.result().err()?, page)));
            let (error, page) = failed.unwrap_or((PageError::NotRun, self.next));
            return Err(self.file.page_error(error, page));
        }
        let written = self.file.0.file.write_all_at(&self.sealed, offset);
        if let Err(error) = written {
            self.writer.failed = true;
            return Err(self.file.io_error("appending pages to", error));
        }
        self.next += count as u64;
        Ok(())
    }
}

impl std::fmt::Debug for Appender<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Appender").field("file", self.file).field("next", &self.next).finish_non_exhaustive()
    }
}

impl PageFile {
    /// Writes the header into one slot and then, once that is safe, into the other: a write that is torn leaves one slot,
    /// and a slot that is damaged later takes no pages with it. Returns what was written last.
    fn write_both_slots(&self, mut header: HeaderBody) -> Result<HeaderBody> {
        for _ in 0..SLOTS {
            let next = header.sequence.checked_add(1);
            header.sequence = next.ok_or_else(|| Error::damaged(format!("{} is at its end", self.0.path.display())))?;
            self.write_header(&header)?;
            self.sync("syncing the header of")?;
        }
        Ok(header)
    }

    fn sync(&self, what: &str) -> Result<()> {
        self.0.file.sync_data().map_err(|error| self.io_error(what, error))
    }

    /// Writes the header into the slot that does not hold the last one.
    fn write_header(&self, header: &HeaderBody) -> Result<()> {
        let slot = (header.sequence % SLOTS as u64) as u32;
        let clear = ClearHeader { slot, ..self.0.clear };
        let bytes = seal_slot(&self.0.cipher, self.0.backend, &self.0.env, &clear, header)?;
        let offset = u64::from(slot) * SLOT_LEN as u64;
        self.0.file.write_all_at(&bytes, offset).map_err(|error| self.io_error("writing the header of", error))
    }
}

impl Place {
    fn seal_slot(&self, clear: &ClearHeader, body: &HeaderBody) -> Result<[u8; SLOT_LEN]> {
        seal_slot(&self.cipher, self.backend, &self.env, clear, body)
    }

    /// The newest slot that opens, and whether the other says the same. A torn write spoils one slot at most.
    fn read_header(&self, file: &File, path: &Path) -> Result<(ClearHeader, HeaderBody, bool)> {
        match [self.read_slot(file, path, 0), self.read_slot(file, path, 1)] {
            [Ok((clear, a)), Ok((_, b))] => {
                let (old, new) = if a.sequence < b.sequence { (a, b) } else { (b, a) };
                let settled = HeaderBody { sequence: new.sequence, ..old } == new && new.sequence - old.sequence == 1;
                Ok((clear, new, settled))
            }
            [Ok((clear, body)), Err(_)] | [Err(_), Ok((clear, body))] => Ok((clear, body, false)),
            [Err(error), Err(_)] => Err(error),
        }
    }

    /// The keystore only grows: one that is older than what a file saw was put back from a copy.
    fn check_keystore(&self, header: &HeaderBody, path: &Path) -> Result<()> {
        let have = self.keystore_sequence.load(Ordering::Acquire);
        if header.keystore_sequence <= have {
            return Ok(());
        }
        let message = format!(
            "the keystore is older than {}: it stands at change {have}, the file has seen change {}; put the newest \
             keystore back",
            path.display(),
            header.keystore_sequence
        );
        Err(Error::new(ErrorKind::KeystoreStale, message))
    }

    fn read_slot(&self, file: &File, path: &Path, slot: u32) -> Result<(ClearHeader, HeaderBody)> {
        let mut bytes = [0; SLOT_LEN];
        let read = file.read_exact_at(&mut bytes, u64::from(slot) * SLOT_LEN as u64);
        read.map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged_slot(path, slot, "it is cut short"),
            _ => Error::io(format!("reading the header of {}", path.display()), error),
        })?;
        let (clear_bytes, rest) =
            bytes.split_first_chunk_mut::<CLEAR_LEN>().expect("a slot is longer than its clear part");
        if let Some(version) = unknown_version(clear_bytes) {
            let message = format!("{} has format version {version:?}; use a newer version of pageseal", path.display());
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let clear = ClearHeader::decode(clear_bytes).map_err(|why| damaged_slot(path, slot, why.0))?;
        self.check(&clear, path)?;
        if clear.slot != slot {
            return Err(damaged_slot(path, slot, "it was written for the other slot"));
        }
        let (body, trailer) = rest.split_last_chunk_mut::<OVERHEAD>().expect("a slot is longer than its trailer");
        self.open_slot(clear_bytes, body, &Trailer(*trailer), path, slot)?;
        let body = <&[u8; BODY_LEN]>::try_from(&*body).expect("clear part, body and trailer fill a slot");
        let body = HeaderBody::decode(body).map_err(|why| damaged_slot(path, slot, why.0))?;
        Ok((ClearHeader { slot: 0, ..clear }, body))
    }

    fn open_slot(&self, aad: &[u8], body: &mut [u8], trailer: &Trailer, path: &Path, slot: u32) -> Result<()> {
        let failed = || {
            let message = format!(
                "header slot {slot} of {} (database {}) failed authentication; restore the file from a backup",
                path.display(),
                self.database
            );
            Error::new(ErrorKind::Authentication, message)
        };
        let name = trailer.subkey_name();
        let key = name.generation().and_then(|generation| self.cipher.find_key(generation)).ok_or_else(failed)?;
        if name.suite() != Some(key.suite) {
            return Err(failed());
        }
        let salt = name.salt();
        let subkey = key.derive(Label::Head, &salt, self.backend)?;
        let opened = subkey.with(|key| key.open(trailer.nonce(), &salt, aad, body, &trailer.tag()))?;
        opened.map_err(|_| failed())
    }
}

fn damaged_slot(path: &Path, slot: u32, why: &str) -> Error {
    Error::damaged(format!("header slot {slot} of {}: {why}; restore the file from a backup", path.display()))
}

/// Seals a header slot, under a salt and nonce of its own.
fn seal_slot(
    cipher: &PageCipher,
    backend: AesBackend,
    env: &Env,
    clear: &ClearHeader,
    body: &HeaderBody,
) -> Result<[u8; SLOT_LEN]> {
    let key = cipher.current_key();
    let salt: [u8; SALT_LEN] = env.random()?;
    let nonce: [u8; NONCE_LEN] = env.random()?;
    let clear = clear.encode();
    let mut body = body.encode();
    let subkey = key.derive(Label::Head, &salt, backend)?;
    let tag = subkey.with(|key| key.seal(nonce, &salt, &clear, &mut body))?;
    let trailer = Trailer::new(&tag, &nonce, &SubkeyName::new(&salt, key.generation, key.suite));
    let mut slot = [0; SLOT_LEN];
    slot[..CLEAR_LEN].copy_from_slice(&clear);
    slot[CLEAR_LEN..SLOT_LEN - OVERHEAD].copy_from_slice(&body);
    slot[SLOT_LEN - OVERHEAD..].copy_from_slice(&trailer.0);
    Ok(slot)
}

/// Writes a new file and makes it durable, with its directory. What an earlier attempt left at `path` is removed.
fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<File> {
    let directory = path.parent().ok_or_else(|| std::io::Error::other("the path has no directory"))?;
    make_directories(directory)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    File::open(directory)?.sync_all()?;
    Ok(file)
}

/// Gives a new file its name. File ids are random, so none is there that it could replace.
fn publish(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::rename(from, to)?;
    let directory = to.parent().ok_or_else(|| std::io::Error::other("the path has no directory"))?;
    File::open(directory)?.sync_all()
}
