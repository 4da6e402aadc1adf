//! Many pages in one call, in parallel where that pays.

use std::sync::{Arc, Mutex, TryLockError};

use arc_swap::Guard;

use crate::error::PageError;
use crate::format::page::{OVERHEAD, PageContext, Trailer};
use crate::keys::keyring::OpenKeys;
use crate::page::cipher::{CipherInner, PageCipher, check_payload, or_zeros, seal_page, split_sealed};
use crate::page::pool::Pool;
use crate::page::session::{Leased, Nonces, Session, units};
use crate::secret::scoped;

/// Below this many bytes a batch stays on the calling thread. Measured by the `limits` example: from here on, a pool whose
/// threads sleep costs nothing, and one whose threads are awake is 1.6 times as fast; at half of this, waking costs a third.
const INLINE_BYTES: usize = 256 * 1024;
/// The least that a thread takes at a time, so that taking costs nothing beside working.
const LEAST_BYTES: usize = 16 * 1024;
/// The most pages under one range of a session's counter. Bounds what an interrupted batch throws away; and pages of the
/// greatest length stay below what one session may seal.
const MAX_RANGE: usize = 1 << 14;
/// The most pages under one draw of fresh bits. They are copied first and sealed from the cache.
const MAX_DRAW: usize = 16;

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

    /// Checks the lengths and reads the source, before any nonce is drawn. `Ok` means: ready to be sealed in place. The
    /// job's own result says [`PageError::NotRun`] until it is.
    fn prepare(&mut self) -> Result<(), PageError> {
        let payload_len = self.dst.len().checked_sub(OVERHEAD).ok_or(PageError::Length)?;
        check_payload(payload_len)?;
        if let Some(src) = self.src {
            if src.len() != payload_len {
                return Err(PageError::Length);
            }
            self.dst[..payload_len].copy_from_slice(src);
        }
        Ok(())
    }

    fn seal(&mut self, session: &Session, nonces: &Nonces, index: u32) -> Result<(), PageError> {
        let aad = self.context.associated_data();
        let (payload, trailer) = split_sealed(self.dst)?;
        trailer.copy_from_slice(&seal_page(&session.subkey, nonces.nonce(index), &aad, payload)?.0);
        Ok(())
    }

    fn open(&mut self, cipher: &CipherInner, keys: &OpenKeys) -> Result<(), PageError> {
        or_zeros(self.dst, |dst| {
            if let Some(src) = self.src {
                let (payload, trailer) = src.split_last_chunk().ok_or(PageError::Length)?;
                if payload.len() != dst.len() {
                    return Err(PageError::Length);
                }
                dst.copy_from_slice(payload);
                return cipher.open_within(Some(keys), &self.context, dst, &Trailer(*trailer));
            }
            let (payload, trailer) = split_sealed(dst)?;
            cipher.open_within(Some(keys), &self.context, payload, &Trailer(*trailer))
        })
    }

    /// Ends a sealing. What a source-to-destination job wrote must not be taken for a page, nor be left as plaintext; an
    /// in-place page that was not sealed is the engine's only copy, and stays.
    fn end_sealing(&mut self, result: Result<(), PageError>) {
        self.result = result;
        if result.is_err() && self.src.is_some() {
            self.dst.fill(0);
        }
    }

    /// Ends an opening: no byte of a page that did not open is left.
    fn end_opening(&mut self, result: Result<(), PageError>) {
        self.result = result;
        if result.is_err() {
            self.dst.fill(0);
        }
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
    /// A batch takes one range of the session's counter, and its threads draw fresh bits for 16 pages at a time, after
    /// those pages' sources were read. It ends whole if the cluster is disabled meanwhile. If the pool panics, so does this; jobs that were not reached say
    /// [`PageError::NotRun`].
    #[must_use = "a job that failed was not sealed: its page may still be plaintext"]
    pub fn seal_batch(&self, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> usize {
        self.seal_batch_within(&mut Begun::default(), pool, jobs)
    }

    /// As [`PageCipher::seal_batch`], as a part of the call that `begun` stands for.
    #[must_use = "a job that failed was not sealed: its page may still be plaintext"]
    pub(crate) fn seal_batch_within(&self, begun: &mut Begun, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> usize {
        jobs.iter_mut().for_each(|job| job.result = Err(PageError::NotRun));
        for range in jobs.chunks_mut(MAX_RANGE) {
            if let Err(error) = self.seal_range(begun, pool, range).and_then(|()| self.0.check_fork()) {
                range.iter_mut().for_each(|job| job.end_sealing(Err(error)));
            }
        }
        count_failed(jobs)
    }

    /// Opens every job, on `pool` and the calling thread, and returns how many failed; each job has its own result.
    #[must_use = "a job that failed was not opened"]
    pub fn open_batch(&self, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> usize {
        jobs.iter_mut().for_each(|job| job.result = Err(PageError::NotRun));
        let opened = self.0.enter().and_then(|keys| {
            let alive = || self.0.check_fork().is_ok();
            share_out(pool, jobs, average_len(jobs), NoTokens, &alive, &|NoTokens, chunk| {
                chunk.iter_mut().for_each(|job| job.result = job.open(&self.0, &keys));
            });
            self.0.check_fork()
        });
        if let Err(error) = opened {
            jobs.iter_mut().for_each(|job| job.end_opening(Err(error)));
        }
        count_failed(jobs)
    }

    fn seal_range(&self, begun: &mut Begun, pool: &dyn Pool, jobs: &mut [PageJob<'_>]) -> Result<(), PageError> {
        // Before the pool: its threads do not exist in a forked child.
        self.0.check_fork()?;
        let pages = u32::try_from(jobs.len()).expect("a range has at most MAX_RANGE pages");
        let units = jobs.iter().map(|job| units(job.dst.len().saturating_sub(OVERHEAD))).sum();
        let (session, leased) = begun.lease(&self.0, pages, units)?;
        let alive = || self.0.check_fork().is_ok();
        share_out(pool, jobs, average_len(jobs), leased, &alive, &|mut leased: Leased, chunk: &mut [PageJob<'_>]| {
            for draw in chunk.chunks_mut(MAX_DRAW) {
                self.seal_draw(session, leased.split_to(draw.len() as u32), draw);
            }
        });
        Ok(())
    }

    /// Seals the jobs of one draw: all sources are read first, because fresh bits must not outlive a read of input.
    fn seal_draw(&self, session: &Session, leased: Leased, jobs: &mut [PageJob<'_>]) {
        // Also if the source of randomness panics: no plaintext is left where a page was to be.
        struct Unsealed<'u, 'j>(&'u mut [PageJob<'j>]);
        impl Drop for Unsealed<'_, '_> {
            fn drop(&mut self) {
                self.0.iter_mut().filter(|job| job.result.is_err()).for_each(|job| job.end_sealing(job.result));
            }
        }
        let jobs = Unsealed(jobs);
        for job in jobs.0.iter_mut() {
            if let Err(error) = job.prepare() {
                job.result = Err(error);
            }
        }
        let nonces = leased.draw(self.0.entropy());
        let ready = (0..).zip(jobs.0.iter_mut()).filter(|(_, job)| job.result == Err(PageError::NotRun));
        for (index, job) in ready {
            job.result = match &nonces {
                Ok(nonces) => job.seal(session, nonces, index),
                Err(_) => Err(PageError::Randomness),
            };
        }
    }
}

/// A call of several ranges, of one batch or more, that has begun: it ends whole, whatever is closed meanwhile. It seals
/// under the session that there is, and once there is none, under the last one that it saw.
#[derive(Default)]
pub(crate) struct Begun(Option<Arc<Session>>);

impl Begun {
    fn lease(&mut self, cipher: &CipherInner, pages: u32, units: u64) -> Result<(&Session, Leased), PageError> {
        let leased = match cipher.lease(pages, units) {
            Ok((session, leased)) => {
                self.0 = Guard::into_inner(session);
                Some(leased)
            }
            Err(error @ (PageError::Disabled | PageError::Dropped)) => {
                let last = self.0.as_deref().ok_or(error)?;
                Some(cipher.lease_of(last, pages, units).ok_or(error)?)
            }
            Err(error) => return Err(error),
        };
        // `None` cannot be: a lease comes with its session.
        self.0.as_deref().zip(leased).ok_or(PageError::Forked)
    }
}

/// What goes with each job of a batch, and is split as the jobs are.
pub(crate) trait Tokens: Send {
    fn split_to(&mut self, jobs: u32) -> Self;
}

impl Tokens for Leased {
    fn split_to(&mut self, jobs: u32) -> Self {
        Leased::split_to(self, jobs)
    }
}

/// For jobs that need nothing.
pub(crate) struct NoTokens;

impl Tokens for NoTokens {
    fn split_to(&mut self, _: u32) -> Self {
        Self
    }
}

/// The jobs that no thread has taken yet, and their tokens.
struct Queue<'q, J, T> {
    jobs: &'q mut [J],
    tokens: T,
}

impl<'q, J, T: Tokens> Queue<'q, J, T> {
    /// Takes the next jobs: a share of what is left that shrinks towards the end, so that all threads end together.
    fn take(&mut self, threads: usize, least: usize) -> Option<(T, &'q mut [J])> {
        if self.jobs.is_empty() {
            return None;
        }
        let share = (self.jobs.len() / (4 * threads)).max(least).min(self.jobs.len());
        let (taken, rest) = std::mem::take(&mut self.jobs).split_at_mut(share);
        self.jobs = rest;
        Some((self.tokens.split_to(share as u32), taken))
    }
}

/// Gives every job, of about `job_len` bytes, to exactly one call of `work`, with its tokens. Which thread gets which is
/// decided here and not by the pool, so a pool that repeats or drops tasks cannot make a page be sealed twice. `alive` is false in a forked child.
pub(crate) fn share_out<J: Send, T: Tokens>(
    pool: &dyn Pool,
    jobs: &mut [J],
    job_len: usize,
    tokens: T,
    alive: &(dyn Fn() -> bool + Sync),
    work: &(dyn Fn(T, &mut [J]) + Sync),
) {
    let bytes = jobs.len().saturating_mul(job_len);
    let threads = if bytes < INLINE_BYTES { 1 } else { pool.threads().clamp(1, bytes / LEAST_BYTES) };
    if threads == 1 {
        return scoped(|| work(tokens, jobs));
    }
    let least = LEAST_BYTES.div_ceil(job_len.max(1));
    let queue = Mutex::new(Queue { jobs, tokens });
    let task = |_| {
        scoped(|| {
            let mut waited = 0;
            loop {
                // Never waits for the lock, which in a process cloned meanwhile a thread may hold that does not exist.
                let taken = match queue.try_lock() {
                    Ok(mut queue) => queue.take(threads, least),
                    Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().take(threads, least),
                    Err(TryLockError::WouldBlock) if alive() => {
                        wait_a_moment(&mut waited);
                        continue;
                    }
                    Err(TryLockError::WouldBlock) => break,
                };
                let Some((tokens, chunk)) = taken else { break };
                work(tokens, chunk);
            }
        })
    };
    pool.run(threads, &task);
    task(0);
}

/// For a lock that is held for nanoseconds, unless its holder was put to sleep: then it must be let run.
fn wait_a_moment(waited: &mut u32) {
    const SPINS: u32 = 64;
    if *waited < SPINS {
        *waited += 1;
        std::hint::spin_loop();
    } else {
        std::thread::yield_now();
    }
}

/// The average length of the sealed pages: how much work a job is.
fn average_len(jobs: &[PageJob<'_>]) -> usize {
    let len = |job: &PageJob<'_>| job.dst.len().max(job.src.map_or(0, <[u8]>::len));
    jobs.iter().map(len).fold(0, usize::saturating_add).checked_div(jobs.len()).unwrap_or(0)
}

fn count_failed(jobs: &[PageJob<'_>]) -> usize {
    jobs.iter().filter(|job| job.result.is_err()).count()
}
