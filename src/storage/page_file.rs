//! [`PageFile`]: a file of sealed pages that is appended to in bulk and read through a memory map.
//!
//! So far it only grows: pages are appended, made durable, and then published by a header write. Pages that were published
//! never change, so readers need no lock and no copy can be torn.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};

use arc_swap::ArcSwapOption;

use crate::error::{Error, ErrorKind, PageError, Result};
use crate::format::file_header::{ClearHeader, HeaderBody, SLOT_LEN, SLOTS, check_page_size, page_offset};
use crate::format::page::{OVERHEAD, PageContext, Trailer};
use crate::ids::{FileId, Generation};
use crate::keys::keyring::{DataKey, OpenKeys};
use crate::page::batch::{NoTokens, share_out};
use crate::page::cipher::or_zeros;
use crate::page::pool::Pool;
use crate::storage::appender::Appender;
use crate::storage::map::ReadMap;
use crate::storage::place::{Place, publish, write_new};

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
pub struct PageFile(pub(super) Arc<Inner>);

pub(crate) struct Inner {
    pub(super) place: Place,
    path: PathBuf,
    pub(super) file: File,
    clear: ClearHeader,
    /// Readers look no further than this.
    pub(super) written: AtomicU64,
    map: ArcSwapOption<ReadMap>,
    writer: Mutex<Writer>,
}

pub(super) struct Writer {
    pub(super) header: HeaderBody,
    /// A write or a sync failed: what is on disk is unknown until the file is opened again.
    pub(super) failed: bool,
}

impl PageFile {
    /// Makes the file: whole and durable under a temporary name, then `register`ed, then under its own. An interrupted
    /// making is finished by [`PageFile::open`] if it was registered; otherwise what is left belongs to nobody.
    pub(crate) fn create(
        place: Place,
        options: &PageFileOptions,
        register: impl FnOnce(Generation) -> Result<()>,
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
        let current = place.cipher.current_key()?;
        let oldest_generation = current.key.generation;
        let header = HeaderBody { sequence: 1, written: 0, oldest_generation, seen: place.history.now() };
        let first = HeaderBody { sequence: 0, ..header };
        let seal = |slot, body| place.seal_slot(&current.key, &ClearHeader { slot, ..clear }, body);
        let slots = [seal(0, &first)?, seal(1, &header)?];
        let io = |error| Error::io(format!("creating {}", path.display()), error);
        let file = write_new(&place.unregistered(), &slots.concat()).map_err(io)?;
        register(oldest_generation)?;
        publish(&place.unregistered(), &path).map_err(io)?;
        Ok(Self::new(place, path, file, clear, header))
    }

    pub(crate) fn open(place: Place) -> Result<Self> {
        // Before anything is touched; and what has begun ends whole.
        let current = place.cipher.current_key()?;
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
        let (clear, header) = place.read_header(&file, &path)?;
        place.check_keystore(&header, &path)?;
        let page_file = Self::new(place, path, file, clear, header);
        if header.written > 0 {
            page_file.remap(header.written)?;
        }
        // Always: after a sync that failed, the kernel shows a header that may not be on the disk, and nothing tells. Then
        // what is shown is durable, and both slots say the same, whatever a crash or damage left of one.
        let header = page_file.write_both_slots(&current.key, header)?;
        page_file.0.writer.lock().unwrap_or_else(PoisonError::into_inner).header = header;
        Ok(page_file)
    }

    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(crate) fn into_inner(self) -> Arc<Inner> {
        self.0
    }

    fn new(place: Place, path: PathBuf, file: File, clear: ClearHeader, header: HeaderBody) -> Self {
        Self(Arc::new(Inner {
            place,
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
    /// [`ErrorKind::Authentication`] if the page is not what was written there; [`ErrorKind::Closed`] while the cluster is
    /// disabled; `buf` then holds zeros.
    pub fn read(&self, page: u64, buf: &mut [u8]) -> Result<Read> {
        self.read_page(None, page, buf).map_err(|error| self.page_error(error, page))
    }

    /// Reads every job, on `pool` and the calling thread, and returns how many failed; each job has its own result.
    #[must_use = "a job that failed holds no page"]
    pub fn read_many(&self, pool: &dyn Pool, jobs: &mut [ReadJob<'_>]) -> usize {
        jobs.iter_mut().for_each(|job| job.result = Err(PageError::NotRun));
        let read = self.0.place.cipher.0.enter().and_then(|keys| {
            self.populate(jobs);
            let alive = || self.0.place.cipher.0.check_fork().is_ok();
            share_out(pool, jobs, self.payload_len(), NoTokens, &alive, &|NoTokens, chunk: &mut [ReadJob<'_>]| {
                for job in chunk {
                    job.result = self.read_page(Some(&keys), job.page, job.buf);
                }
            });
            self.0.place.cipher.0.check_fork()
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
    /// again; [`ErrorKind::Closed`] while the cluster is disabled.
    pub fn append(&self) -> Result<Appender<'_>> {
        self.0.place.cipher.0.check_open()?;
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
        Ok(Appender::new(self, writer))
    }

    pub(super) fn check_writer(&self, writer: &Writer) -> Result<()> {
        if !writer.failed {
            return Ok(());
        }
        let message =
            format!("a write to {} failed before; drop all its handles and open it again", self.0.path.display());
        Err(Error::new(ErrorKind::Io, message))
    }

    /// `keys` if this is a part of a call that was let in, and ends whole.
    fn read_page(&self, keys: Option<&OpenKeys>, page: u64, buf: &mut [u8]) -> Result<Read, PageError> {
        let cipher = &self.0.place.cipher.0;
        if page >= self.pages() {
            buf.fill(0);
            match keys {
                Some(_) => cipher.check_fork()?,
                None => cipher.check_open()?,
            }
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
            cipher.open_within(keys, &PageContext::page(self.id(), page), buf, &Trailer(trailer))
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

    pub(super) fn remap(&self, written: u64) -> Result<()> {
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

    pub(super) fn page_error(&self, error: PageError, page: u64) -> Error {
        Error::page(error, self.0.clear.database, self.id(), page)
    }

    pub(super) fn io_error(&self, what: &str, error: std::io::Error) -> Error {
        Error::io(format!("{what} {}", self.0.path.display()), error)
    }
}

impl std::fmt::Debug for PageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageFile").field("path", &self.0.path).field("pages", &self.pages()).finish_non_exhaustive()
    }
}

impl PageFile {
    /// Writes the header into one slot and then, once that is safe, into the other: a write that is torn leaves one slot,
    /// and a slot that is damaged later takes no pages with it. Returns what was written last.
    pub(super) fn write_both_slots(&self, key: &DataKey, mut header: HeaderBody) -> Result<HeaderBody> {
        for _ in 0..SLOTS {
            let next = header.sequence.checked_add(1);
            header.sequence = next.ok_or_else(|| Error::damaged(format!("{} is at its end", self.0.path.display())))?;
            self.write_header(key, &header)?;
            self.sync("syncing the header of")?;
        }
        Ok(header)
    }

    pub(super) fn sync(&self, what: &str) -> Result<()> {
        self.0.file.sync_data().map_err(|error| self.io_error(what, error))
    }

    /// Writes the header into the slot that does not hold the last one.
    fn write_header(&self, key: &DataKey, header: &HeaderBody) -> Result<()> {
        let slot = (header.sequence % SLOTS as u64) as u32;
        let bytes = self.0.place.seal_slot(key, &ClearHeader { slot, ..self.0.clear }, header)?;
        let offset = u64::from(slot) * SLOT_LEN as u64;
        self.0.file.write_all_at(&bytes, offset).map_err(|error| self.io_error("writing the header of", error))
    }
}
