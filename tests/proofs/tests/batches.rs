//! Batches: each job has its own result, and each page is sealed once under a nonce of its own, whatever the pool does.

mod common;

use std::collections::HashSet;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use common::{CIPHERS, Dice, Method, is_zero, open_stray, salt_and_nonce, stray_key};
use pageseal::testing::stray::StrayDatabase;
use pageseal::testing::stray_cipher;
use pageseal::{
    AesBackend, Entropy, FileId, Inline, MAX_PAYLOAD, NoRandomness, OVERHEAD, PageCipher, PageContext, PageError,
    PageJob, Pool, Suite, Threads,
};

fn at(page: usize) -> PageContext {
    PageContext::page(FileId::new(1), page as u64)
}

/// A pool that does not keep its promises.
#[derive(Clone, Copy, Debug)]
enum Hostile {
    RunsAllTwice,
    RunsNone,
    RunsInOtherOrder,
    RunsOnOtherThreadsOnly,
    RunsTasksThatDoNotExist,
    SaysItHasNoThreads,
    SaysItHasEndlessThreads,
    PanicsBefore,
    PanicsAfterOne,
    PanicsOnAnotherThread,
}

impl Hostile {
    const ALL: [Self; 10] = [
        Self::RunsAllTwice,
        Self::RunsNone,
        Self::RunsInOtherOrder,
        Self::RunsOnOtherThreadsOnly,
        Self::RunsTasksThatDoNotExist,
        Self::SaysItHasNoThreads,
        Self::SaysItHasEndlessThreads,
        Self::PanicsBefore,
        Self::PanicsAfterOne,
        Self::PanicsOnAnotherThread,
    ];

    fn panics(self) -> bool {
        matches!(self, Self::PanicsBefore | Self::PanicsAfterOne | Self::PanicsOnAnotherThread)
    }
}

impl Pool for Hostile {
    fn threads(&self) -> usize {
        match self {
            Self::SaysItHasNoThreads => 0,
            Self::SaysItHasEndlessThreads => usize::MAX,
            _ => 3,
        }
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        match self {
            Self::RunsAllTwice => std::thread::scope(|scope| {
                (0..2 * tasks).for_each(|task| drop(scope.spawn(move || f(task % tasks))));
            }),
            Self::RunsNone => {}
            Self::RunsInOtherOrder => (0..tasks).rev().for_each(f),
            Self::RunsOnOtherThreadsOnly => std::thread::scope(|scope| {
                (0..tasks).for_each(|task| drop(scope.spawn(move || f(task))));
            }),
            Self::RunsTasksThatDoNotExist => [usize::MAX, tasks, 0].into_iter().for_each(f),
            Self::SaysItHasNoThreads | Self::SaysItHasEndlessThreads => f(0),
            Self::PanicsBefore => panic!("the pool panics, as this test wants it to"),
            Self::PanicsAfterOne => {
                f(0);
                panic!("the pool panics, as this test wants it to");
            }
            Self::PanicsOnAnotherThread => std::thread::scope(|scope| {
                scope.spawn(|| f(1));
                scope.spawn(|| panic!("the pool panics, as this test wants it to"));
            }),
        }
    }
}

fn friendly_pools() -> Vec<Box<dyn Pool>> {
    let threads = |count| Threads::new(NonZero::new(count).unwrap()).unwrap();
    let callers = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    vec![Box::new(Inline), Box::new(threads(1)), Box::new(threads(2)), Box::new(threads(5)), Box::new(callers)]
}

/// Checks that every page opens at its place with its payload and that no two share a nonce.
fn check_sealed(cipher: &PageCipher, pages: &[Vec<u8>], payload: impl Fn(usize) -> Vec<u8>) {
    let nonces: HashSet<_> = pages.iter().map(|page| salt_and_nonce(page)).collect();
    assert_eq!(nonces.len(), pages.len(), "two pages share a nonce");
    for (number, page) in pages.iter().enumerate() {
        assert_eq!(Method::Into.open(cipher, &at(number), page), (Ok(()), payload(number)), "page {number}");
    }
}

fn payload_of(number: usize) -> Vec<u8> {
    Dice::new(number as u64).bytes(900 + number % 300)
}

#[test]
fn a_batch_seals_and_opens_what_single_calls_do_on_every_pool() {
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        for pool in friendly_pools() {
            // From one page through the limit for going parallel (128 KiB) to 1 MiB.
            for count in [0, 1, 2, 3, 100, 120, 140, 1000] {
                seal_and_open_on(&cipher, &*pool, count);
            }
        }
    }
}

fn seal_and_open_on(cipher: &PageCipher, pool: &dyn Pool, count: usize) {
    let payloads: Vec<_> = (0..count).map(payload_of).collect();
    let mut pages: Vec<_> = payloads.iter().map(|payload| vec![0xa5; payload.len() + OVERHEAD]).collect();
    let between = payloads.iter().zip(&mut pages).enumerate();
    let mut jobs: Vec<_> = between.map(|(n, (payload, page))| PageJob::between(at(n), payload, page)).collect();
    assert_eq!(cipher.seal_batch(pool, &mut jobs), 0);
    assert!(jobs.iter().all(|job| job.result() == Ok(())));
    check_sealed(cipher, &pages, payload_of);

    let mut opened: Vec<_> = payloads.iter().map(|payload| vec![0xa5; payload.len()]).collect();
    let between = pages.iter().zip(&mut opened).enumerate();
    let mut jobs: Vec<_> = between.map(|(n, (page, out))| PageJob::between(at(n), page, out)).collect();
    assert_eq!(cipher.open_batch(pool, &mut jobs), 0);
    assert!(opened == payloads);

    let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
    assert_eq!(cipher.open_batch(pool, &mut jobs), 0);
    assert_eq!(cipher.seal_batch(pool, &mut jobs), 0, "the same jobs, sealed again");
    check_sealed(cipher, &pages, payload_of);
}

#[test]
fn a_batch_inside_the_callers_own_pool_ends() {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
    pool.install(|| rayon::join(|| seal_and_open_on(&cipher, &pool, 500), || seal_and_open_on(&cipher, &pool, 500)));
}

#[test]
fn each_job_has_its_own_result() {
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        for pool in friendly_pools() {
            for count in [7, 700] {
                mixed_seals(&cipher, &*pool, count);
                mixed_opens(&cipher, &*pool, count);
            }
        }
    }
}

/// Every third job cannot be sealed: a destination that is too short or too long, or a page too short for a trailer.
fn mixed_seals(cipher: &PageCipher, pool: &dyn Pool, count: usize) {
    let payloads: Vec<_> = (0..count).map(payload_of).collect();
    let len_of = |number: usize| match number % 12 {
        0 => payloads[number].len() + OVERHEAD - 1,
        3 => payloads[number].len() + OVERHEAD + 1,
        6 => OVERHEAD - 1,
        9 => 0,
        _ => payloads[number].len() + OVERHEAD,
    };
    let mut pages: Vec<_> = (0..count).map(|number| vec![0xa5; len_of(number)]).collect();
    let between = payloads.iter().zip(&mut pages).enumerate();
    let mut jobs: Vec<_> = between
        .map(|(number, (payload, page))| match number % 12 {
            6 | 9 => PageJob::in_place(at(number), page),
            _ => PageJob::between(at(number), payload, page),
        })
        .collect();
    let failed = cipher.seal_batch(pool, &mut jobs);
    assert_eq!(failed, jobs.iter().filter(|job| job.result().is_err()).count());
    assert_eq!(failed, count.div_ceil(3));
    for (number, job) in jobs.iter().enumerate() {
        match number % 12 {
            0 | 3 => assert!(job.result() == Err(PageError::Length) && is_zero(job.bytes())),
            6 | 9 => assert!(job.result() == Err(PageError::Length) && job.bytes().iter().all(|byte| *byte == 0xa5)),
            _ => {
                let opened = Method::Into.open(cipher, &at(number), job.bytes());
                assert_eq!((job.result(), opened), (Ok(()), (Ok(()), payload_of(number))));
            }
        }
    }
}

/// Every third page does not open: damaged, moved, of an unknown generation, or cut.
fn mixed_opens(cipher: &PageCipher, pool: &dyn Pool, count: usize) {
    let mut pages: Vec<_> =
        (0..count).map(|number| Method::InPlace.seal(cipher, &at(number), &payload_of(number)).unwrap()).collect();
    for (number, page) in pages.iter_mut().enumerate() {
        match number % 12 {
            0 => page[13] ^= 1,
            3 => page.swap(20, 21),
            6 => *page.iter_mut().rev().nth(3).unwrap() ^= 0x40,
            9 => drop(page.split_off(40)),
            _ => {}
        }
    }
    // A swap of two equal bytes damages nothing.
    let expected = |number: usize, page: &[u8]| match number % 12 {
        0 => Err(PageError::Authentication),
        3 if page[20] != page[21] => Err(PageError::Authentication),
        6 => Err(PageError::UnknownGeneration(common::generation(0x41))),
        9 => Err(PageError::Length),
        _ => Ok(()),
    };
    let expected: Vec<_> = pages.iter().enumerate().map(|(number, page)| expected(number, page)).collect();
    let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
    let failed = cipher.open_batch(pool, &mut jobs);
    assert_eq!(failed, expected.iter().filter(|result| result.is_err()).count());
    for (number, (job, expected)) in jobs.iter().zip(expected).enumerate() {
        assert_eq!(job.result(), expected, "job {number}");
        match expected {
            Ok(()) => assert_eq!(job.bytes()[..job.bytes().len() - OVERHEAD], payload_of(number)),
            Err(_) => assert!(is_zero(job.bytes()), "job {number} left something"),
        }
    }
}

#[test]
fn a_hostile_pool_cannot_make_a_page_be_sealed_twice_or_not_at_all() {
    let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
    for pool in Hostile::ALL {
        let payloads: Vec<_> = (0..600).map(payload_of).collect();
        let mut pages: Vec<_> = payloads.clone();
        pages.iter_mut().for_each(|page| page.resize(page.len() + OVERHEAD, 0));
        let before = pages.clone();
        let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| cipher.seal_batch(&pool, &mut jobs)));
        assert_eq!(outcome.is_err(), pool.panics(), "{pool:?}: the pool's panic is the caller's");
        let results: Vec<_> = jobs.iter().map(PageJob::result).collect();
        drop(jobs);
        for (number, result) in results.iter().enumerate() {
            match result {
                Ok(()) => {}
                Err(PageError::NotRun) => {
                    assert_eq!(pages[number], before[number], "{pool:?}: a page that was not run")
                }
                Err(other) => panic!("{pool:?}: page {number}: {other}"),
            }
        }
        let not_run = results.iter().filter(|result| result.is_err()).count();
        match pool {
            Hostile::PanicsBefore => assert_eq!(not_run, 600),
            _ => assert_eq!(not_run, 0, "{pool:?}"),
        }
        // What was left is sealed by a second call, under nonces of its own.
        let late = pages.iter_mut().zip(&results).enumerate().filter(|(_, (_, result))| result.is_err());
        let mut late: Vec<_> = late.map(|(number, (page, _))| PageJob::in_place(at(number), page)).collect();
        assert_eq!(cipher.seal_batch(&Inline, &mut late), 0);
        check_sealed(&cipher, &pages, payload_of);

        let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
        let outcome = catch_unwind(AssertUnwindSafe(|| cipher.open_batch(&pool, &mut jobs)));
        assert_eq!(outcome.is_err(), pool.panics(), "{pool:?}");
        for (number, job) in jobs.iter().enumerate() {
            match job.result() {
                Ok(()) => assert_eq!(job.bytes()[..job.bytes().len() - OVERHEAD], payload_of(number)),
                result => {
                    assert_eq!((result, pool.panics()), (Err(PageError::NotRun), true), "{pool:?}: page {number}")
                }
            }
        }
    }
}

/// Counts how often fresh bits are drawn, and fails from the draw that it is told to fail at.
#[derive(Default)]
struct Counting {
    draws: AtomicU32,
}

impl Entropy for Counting {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.fill(7);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        let draw = self.draws.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(u64::from(draw).to_le_bytes())
    }
}

#[test]
fn a_batch_draws_fresh_bits_once_for_sixteen_pages_or_fewer() {
    let counting = Arc::new(Counting::default());
    let key = stray_key(Suite::Aes256Gcm, 1);
    let cipher = StrayDatabase::open(&[key], AesBackend::Ring, Some(counting.clone())).unwrap().cipher;
    let pool = Threads::new(NonZero::new(2).unwrap()).unwrap();
    for count in [1, 16, 17, 500, 16_384, 16_385, 50_000, 0] {
        let before = counting.draws.load(Ordering::Relaxed);
        let mut pages = vec![vec![0; 8 + OVERHEAD]; count];
        let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
        assert_eq!(cipher.seal_batch(&pool, &mut jobs), 0);
        let draws = (counting.draws.load(Ordering::Relaxed) - before) as usize;
        // A thread's share need not be a multiple of 16, so there can be one draw more a share.
        assert!(
            draws >= count.div_ceil(16) && draws <= count.div_ceil(16) * 5 / 4 + 64,
            "{count} pages: {draws} draws"
        );
        check_sealed(&cipher, &pages, |_| vec![0; 8]);
    }
}

/// A source in a file that changes when fresh bits are drawn: what a nonce is used for must have been read before.
struct ChangesTheSource {
    file: std::fs::File,
    draws: AtomicU32,
}

impl Entropy for ChangesTheSource {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.fill(7);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        std::os::unix::fs::FileExt::write_all_at(&self.file, &[0xbb; 4096], 0).unwrap();
        Ok(u64::from(self.draws.fetch_add(1, Ordering::Relaxed)).to_le_bytes())
    }
}

#[test]
fn the_source_is_read_before_the_fresh_bits_are_drawn() {
    let path = std::env::temp_dir().join(format!("pageseal-source-{}", std::process::id()));
    let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let fill = |file: &std::fs::File| std::os::unix::fs::FileExt::write_all_at(file, &[0xaa; 4096], 0).unwrap();
    fill(&file);
    // SAFETY: a new shared mapping of a file that is 4,096 bytes long and stays so; checked below.
    let map = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0)
    };
    assert_ne!(map, libc::MAP_FAILED);
    let entropy = Arc::new(ChangesTheSource { file: file.try_clone().unwrap(), draws: AtomicU32::new(0) });
    let cipher =
        StrayDatabase::open(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring, Some(entropy)).unwrap().cipher;
    for batch in [false, true] {
        fill(&file);
        let mut sealed = vec![0; 4096 + OVERHEAD];
        // SAFETY: the mapping holds 4,096 bytes until the end of the process. They change, by the file, while the slice
        // lives: that is what is tested, and both values are bytes.
        let src = unsafe { std::slice::from_raw_parts(map.cast::<u8>(), 4096) };
        if batch {
            assert_eq!(cipher.seal_batch(&Inline, &mut [PageJob::between(at(0), src, &mut sealed)]), 0);
        } else {
            cipher.seal_into(&at(0), src, &mut sealed).unwrap();
        }
        cipher.open_in_place(&at(0), &mut sealed).unwrap();
        assert!(sealed[..4096].iter().all(|&byte| byte == 0xaa), "batch={batch}: read after the draw");
    }
}

/// Draws that panic.
struct Panics;

impl Entropy for Panics {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.fill(7);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        panic!("no fresh bits")
    }
}

#[test]
fn a_draw_that_panics_leaves_no_result_and_no_plaintext() {
    let cipher = StrayDatabase::open(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring, Some(Arc::new(Panics)));
    let cipher = cipher.unwrap().cipher;
    let src = [0x55; 4096];
    let mut sealed = vec![vec![0xee; 4096 + OVERHEAD]; 20];
    let mut jobs: Vec<_> = sealed.iter_mut().map(|dst| PageJob::between(at(0), &src, dst)).collect();
    let sealing = std::panic::AssertUnwindSafe(|| cipher.seal_batch(&Inline, &mut jobs));
    assert!(std::panic::catch_unwind(sealing).is_err());
    for job in &jobs {
        assert_eq!(job.result(), Err(PageError::NotRun));
        assert!(!job.bytes().contains(&0x55), "plaintext was left where a page was to be");
    }
}

#[test]
fn batches_of_many_threads_share_one_cipher() {
    let cipher = open_stray(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring).cipher;
    let pool = Threads::new(NonZero::new(3).unwrap()).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| (0..6).for_each(|_| seal_and_open_on(&cipher, &pool, 400)));
        }
    });
}

#[test]
fn a_job_that_a_second_batch_did_not_reach_does_not_keep_the_result_of_the_first() {
    let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
    let mut pages = vec![vec![1; 4096 + OVERHEAD]; 100];
    let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
    let run = |jobs: &mut [PageJob<'_>], open: bool, pool: &dyn Pool| {
        catch_unwind(AssertUnwindSafe(
            || if open { cipher.open_batch(pool, jobs) } else { cipher.seal_batch(pool, jobs) },
        ))
    };
    assert_eq!(run(&mut jobs, false, &Inline).unwrap(), 0);
    // Each page is sealed. What comes next is never reached: a result of `Ok` would say that the pages were opened, and
    // then that plaintext was sealed.
    for (open, pool) in [(true, &Hostile::PanicsBefore as &dyn Pool), (true, &Inline), (false, &Hostile::PanicsBefore)]
    {
        match run(&mut jobs, open, pool) {
            Err(_) => assert!(jobs.iter().all(|job| job.result() == Err(PageError::NotRun)), "a result is stale"),
            Ok(failed) => assert_eq!(failed, 0),
        }
    }
}

/// 2^16 sources that are too long for a page, 1 TiB together: more than any session may seal.
#[test]
fn a_batch_that_no_session_can_hold_ends_with_length_errors() {
    let (sender, ended) = channel();
    // Not a scoped thread: should it never end, the test must.
    std::thread::spawn(move || {
        let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
        let too_long = vec![0; MAX_PAYLOAD + 1];
        let mut nowhere = [[0; 0]; 1 << 16];
        let mut jobs: Vec<_> = nowhere.iter_mut().map(|out| PageJob::between(at(0), &too_long, out)).collect();
        let failed = cipher.seal_batch(&Inline, &mut jobs);
        let all_length = jobs.iter().all(|job| job.result() == Err(PageError::Length));
        let _ = sender.send((failed, all_length));
    });
    let outcome = ended.recv_timeout(Duration::from_secs(20));
    assert_eq!(outcome, Ok((1 << 16, true)), "the batch looks for a session that does not exist");
}
