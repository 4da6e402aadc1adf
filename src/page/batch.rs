//! Many pages in one call, in parallel where that pays.

use std::sync::{Mutex, PoisonError};

use crate::error::PageError;
use crate::format::page::{OVERHEAD, PageContext};
use crate::page::cipher::{PageCipher, check_payload, or_zeros, seal_page, split_sealed, subkey_of};
use crate::page::pool::Pool;
use crate::page::session::{Nonces, Session, units};
use crate::secret::scoped;

/// Below this many bytes a batch stays on the calling thread: waking another costs more than it gains (docs of the
/// `limits` example; measured with `benches/`).
const INLINE_BYTES: usize = 128 * 1024;
/// The least that a thread takes at a time, so that taking costs nothing beside working.
const LEAST_BYTES: usize = 16 * 1024;
/// The most pages under one range of a session's counter. Bounds what an interrupted batch throws away.
const MAX_RANGE: usize = 1 << 16;

/// One page of a batch, and what became of it.
pub struct PageJob<'a> {
    context: PageContext,
    src: Option<&'a [u8]>,
    dst: &'a mut [u8],
    result: Result<(), PageError>,
}

impl<'a> PageJob<'a> {
    /// Seals or opens `page` where it is; see [`PageCipher::seal_in_place`] and [`PageCipher::open_in_place`].
    pub fn in_place(context: PageContext, page: &'a mut [u8]) -> Self {
        Self { context, src: None, dst: page, result: Err(PageError::NotRun) }
    }

    /// Seals or opens `src` into `dst`; see [`PageCipher::seal_into`] and [`PageCipher::open_into`].
    pub fn between(context: PageContext, src: &'a [u8], dst: &'a mut [u8]) -> Self {
        Self { context, src: Some(src), dst, result: Err(PageError::NotRun) }
    }

    /// What became of this page; [`PageError::NotRun`] before the batch.
    pub fn result(&self) -> Result<(), PageError> {
        self.result
    }

    /// The bytes that the job writes.
    pub fn bytes(&self) -> &[u8] {
        self.dst
    }

    fn seal(&mut self, session: &Session, nonces: &Nonces, index: u32) -> Result<(), PageError> {
        let aad = self.context.associated_data();
        let seal = |dst: &mut [u8]| {
            let (payload, trailer) = split_sealed(dst)?;
            trailer.copy_from_slice(&seal_page(&session.subkey, nonces.nonce(index), &aad, payload)?.0);
            Ok(())
        };
        let Some(src) = self.src else {
            check_payload(self.dst.len().saturating_sub(OVERHEAD))?;
            return seal(self.dst);
        };
        or_zeros(self.dst, |dst| {
            if dst.len().checked_sub(OVERHEAD) != Some(src.len()) {
                return Err(PageError::Length);
            }
            check_payload(src.len())?;
            dst[..src.len()].copy_from_slice(src);
            seal(dst)
        })
    }

    fn open(&mut self, cipher: &PageCipher) -> Result<(), PageError> {
        match self.src {
            Some(src) => cipher.open_into(&self.context, src, self.dst),
            None => cipher.open_in_place(&self.context, self.dst),
        }
    }

    /// The longer of the two slices is the sealed one; it decides how much work the job is.
    fn len(&self) -> usize {
        self.dst.len().max(self.src.map_or(0, <[u8]>::len))
    }
}

impl std::fmt::Debug for PageJob<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageJob").field("context", &self.context).field("result", &self.result).finish_non_exhaustive()
    }
}

impl PageCipher {
    /// Seals every job, on `pool` and the calling thread, and returns how many failed; each job has its own result.
    ///
    /// The counter range and the fresh bits of the nonces are drawn here, on the calling thread, so a batch pays for them
    /// once. If the pool panics, so does this; jobs that were not reached say [`PageError::NotRun`].
    pub fn seal_batch(&self, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> usize {
        jobs.chunks_mut(MAX_RANGE).map(|range| self.seal_range(pool, range)).sum()
    }

    /// Opens every job, on `pool` and the calling thread, and returns how many failed; each job has its own result.
    pub fn open_batch(&self, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> usize {
        if let Err(error) = self.0.check_fork() {
            return fail_all(jobs, error);
        }
        share_out(pool, jobs, average_len(jobs), &|_, chunk| {
            chunk.iter_mut().for_each(|job| job.result = job.open(self))
        });
        count_failed(jobs)
    }

    fn seal_range(&self, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> usize {
        let pages = u32::try_from(jobs.len()).expect("a range has at most MAX_RANGE pages");
        let units = jobs.iter().map(|job| units(job.len())).sum();
        let (session, leased) = match self.0.check_fork().and_then(|()| self.0.lease(pages, units)) {
            Ok(leased) => leased,
            Err(error) => return fail_all(jobs, error),
        };
        let session = match subkey_of(&session) {
            Ok(session) => session,
            Err(error) => return fail_all(jobs, error),
        };
        let Ok(nonces) = leased.draw(self.0.entropy()) else {
            return fail_all(jobs, PageError::Randomness);
        };
        share_out(pool, jobs, average_len(jobs), &|first, chunk| {
            for (index, job) in (first..).zip(chunk) {
                job.result = job.seal(session, &nonces, index);
            }
        });
        count_failed(jobs)
    }
}

/// The jobs that no thread has taken yet.
struct Queue<'q, J> {
    rest: &'q mut [J],
    next: u32,
}

impl<'q, J> Queue<'q, J> {
    /// Takes the next jobs: a share of what is left that shrinks towards the end, so that all threads end together.
    fn take(&mut self, threads: usize, least: usize) -> Option<(u32, &'q mut [J])> {
        if self.rest.is_empty() {
            return None;
        }
        let share = (self.rest.len() / (4 * threads)).max(least).min(self.rest.len());
        let (taken, rest) = std::mem::take(&mut self.rest).split_at_mut(share);
        let first = self.next;
        self.rest = rest;
        self.next += share as u32;
        Some((first, taken))
    }
}

/// Gives every job, of about `job_len` bytes, to exactly one call of `work`, with the index of the first job of its chunk.
/// Which thread gets which is decided here and not by the pool, so a pool that repeats or drops tasks cannot make a page be
/// sealed twice.
pub(crate) fn share_out<J: Send>(
    pool: &dyn Pool,
    jobs: &mut [J],
    job_len: usize,
    work: &(dyn Fn(u32, &mut [J]) + Sync),
) {
    let bytes = jobs.len() * job_len;
    let threads = if bytes < INLINE_BYTES { 1 } else { pool.threads().clamp(1, bytes / LEAST_BYTES) };
    if threads == 1 {
        return scoped(|| work(0, jobs));
    }
    let least = LEAST_BYTES.div_ceil(job_len.max(1));
    let queue = Mutex::new(Queue { rest: jobs, next: 0 });
    let task = |_| {
        scoped(|| {
            loop {
                // A guard in the condition of `while let` would be held while working.
                let taken = queue.lock().unwrap_or_else(PoisonError::into_inner).take(threads, least);
                let Some((first, chunk)) = taken else { break };
                work(first, chunk);
            }
        })
    };
    pool.run(threads, &task);
    task(0);
}

/// What the jobs have in common: their average length.
fn average_len(jobs: &[PageJob<'_>]) -> usize {
    jobs.iter().map(PageJob::len).sum::<usize>().checked_div(jobs.len()).unwrap_or(0)
}

fn fail_all(jobs: &mut [PageJob<'_>], error: PageError) -> usize {
    for job in jobs.iter_mut() {
        job.result = Err(error);
        // What a source-to-destination job would have written must not be taken for a page. An in-place page that was to
        // be sealed is the engine's only copy: it stays.
        if job.src.is_some() {
            job.dst.fill(0);
        }
    }
    jobs.len()
}

fn count_failed(jobs: &[PageJob<'_>]) -> usize {
    jobs.iter().filter(|job| job.result.is_err()).count()
}
