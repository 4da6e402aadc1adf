//! [`Appender`]: adds pages to a page file, all or none.

use std::os::unix::fs::FileExt;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

#[cfg(doc)]
use crate::error::ErrorKind;
use crate::error::{Error, PageError, Result};
use crate::format::file_header::HeaderBody;
use crate::format::page::PageContext;
use crate::page::batch::{Begun, PageJob};
use crate::page::pool::Pool;
use crate::storage::page_file::{PageFile, Writer};

/// How much is sealed before it is written. Large enough for all threads, small enough to stay in the cache.
const CHUNK: usize = 4 << 20;

/// Appends pages to a [`PageFile`]. Nothing is visible, and nothing survives a crash, before [`Appender::finish`] returned;
/// dropping it before leaves the file as it was.
#[must_use = "appended pages are lost unless `finish` is called"]
pub struct Appender<'a> {
    file: &'a PageFile,
    writer: MutexGuard<'a, Writer>,
    next: u64,
    sealed: Vec<u8>,
}

impl<'a> Appender<'a> {
    pub(super) fn new(file: &'a PageFile, writer: MutexGuard<'a, Writer>) -> Self {
        let next = writer.header.written;
        Self { file, writer, next, sealed: Vec::new() }
    }

    /// Seals the pages of `payloads`, on `pool` and the calling thread, writes them behind the last ones, and returns the
    /// number of the first. `payloads` is any number of pages of [`PageFile::payload_len`] bytes, one after the other.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it is not, [`ErrorKind::Closed`] while the cluster is disabled, with nothing appended and
    /// the appender as it was; else what sealing or writing failed with. After a failed write the file takes no more until
    /// it is opened again.
    pub fn write(&mut self, pool: &dyn Pool, payloads: &[u8]) -> Result<u64> {
        self.file.check_writer(&self.writer)?;
        let payload_len = self.file.payload_len();
        if !payloads.len().is_multiple_of(payload_len) {
            return Err(Error::invalid(format!("{} bytes are not whole pages of {payload_len} bytes", payloads.len())));
        }
        let first = self.next;
        let pages_a_chunk = (CHUNK / self.file.page_size()).max(1);
        // One call, however many chunks: it ends whole if the cluster is disabled meanwhile.
        let mut begun = Begun::default();
        for chunk in payloads.chunks(pages_a_chunk * payload_len) {
            self.write_chunk(&mut begun, pool, chunk).inspect_err(|_| self.next = first)?;
        }
        Ok(first)
    }

    /// Makes everything durable, publishes it, and returns how many pages the file has now.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] while the cluster is disabled: the file is as it was. [`ErrorKind::Io`]: whether the pages are
    /// there is then unknown until the file is opened again.
    pub fn finish(mut self) -> Result<u64> {
        self.file.check_writer(&self.writer)?;
        // Before the file is touched; with it, this ends whole.
        let current = self.file.0.place.cipher.current_key()?;
        // Until all of it succeeded: a sync that failed must never be tried again, for the kernel forgets what it lost.
        self.writer.failed = true;
        self.file.sync("syncing the pages of")?;
        let seen = self.file.0.place.history.now();
        let header = HeaderBody { written: self.next, seen, ..self.writer.header };
        self.writer.header = self.file.write_both_slots(&current.key, header)?;
        if self.next > 0 {
            self.file.remap(self.next)?;
        }
        self.file.0.written.store(self.next, Ordering::Release);
        self.writer.failed = false;
        Ok(self.next)
    }

    fn write_chunk(&mut self, begun: &mut Begun, pool: &dyn Pool, payloads: &[u8]) -> Result<()> {
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
        if self.file.0.place.cipher.seal_batch_within(begun, pool, &mut jobs) > 0 {
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
