//! The gate: a database that is closed refuses every operation of every handle, lets those in flight end whole, and wipes
//! its keys; opened again, the same handles work.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use common::{CIPHERS, Dice, GlassWrapper, Method, TempDir, generation, is_zero, open_stray, stray_key};
use pageseal::testing::stray::{StrayDatabase, StrayKey, add_generation, close_gate, forget_generation, open_gate};
use pageseal::{
    AesBackend, Cluster, ClusterOptions, Entropy, ErrorKind, FileId, Inline, NoRandomness, OVERHEAD, PageCipher,
    PageContext, PageError, PageFileOptions, PageJob, Pool, Read, ReadJob, Suite, Threads, Trailer, Wrappers,
};

fn at(page: u64) -> PageContext {
    PageContext::page(FileId::new(1), page)
}

#[test]
fn a_closed_database_refuses_every_way_in_and_out_and_the_same_handles_work_again() {
    for (suite, backend) in CIPHERS {
        let keys = [stray_key(suite, 1)];
        let database = open_stray(&keys, backend);
        let clone = database.cipher.clone();
        let pages: Vec<_> =
            Method::ALL.iter().map(|method| method.seal(&database.cipher, &at(1), &[7; 500]).unwrap()).collect();
        assert!(close_gate(&database.cipher, false), "keys are left");
        for cipher in [&database.cipher, &clone] {
            for (method, page) in Method::ALL.into_iter().zip(&pages) {
                assert_eq!(method.seal(cipher, &at(1), &[7; 500]), Err(PageError::Disabled), "{method:?}");
                let (outcome, left) = method.open(cipher, &at(1), page);
                assert_eq!(outcome, Err(PageError::Disabled), "{method:?}");
                assert!(is_zero(&left));
            }
            assert_eq!(cipher.generation(), generation(1));
        }
        open_gate(&clone, &keys).unwrap();
        for (method, page) in Method::ALL.into_iter().zip(&pages) {
            assert_eq!(method.open(&database.cipher, &at(1), page), (Ok(()), vec![7; 500]), "{method:?}");
            method.seal(&clone, &at(1), &[7; 500]).unwrap();
        }
        assert!(close_gate(&clone, true));
        assert_eq!(Method::Into.open(&database.cipher, &at(1), &pages[0]).0, Err(PageError::Dropped));
        assert_eq!(open_gate(&clone, &keys).unwrap_err().kind(), ErrorKind::NotFound);
    }
}

#[test]
fn a_refused_in_place_page_is_left_as_it_was_and_a_refused_copy_holds_zeros() {
    let database = open_stray(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring);
    assert!(close_gate(&database.cipher, false));
    let mut page = [3; 100 + OVERHEAD];
    assert!(database.cipher.seal_in_place(&at(1), &mut page).is_err());
    assert_eq!(page[..100], [3; 100]);
    let mut jobs = [PageJob::in_place(at(1), &mut page)];
    assert_eq!(database.cipher.seal_batch(&Inline, &mut jobs), 1);
    assert_eq!(page[..100], [3; 100]);
    let mut out = [3; 100 + OVERHEAD];
    assert!(database.cipher.seal_into(&at(1), &[3; 100], &mut out).is_err());
    assert!(is_zero(&out));
}

/// How often the gate is closed and opened under load.
const ROUNDS: u64 = 1_000;
const WORKERS: u64 = 4;

/// What the threads of the race see of the gate. An operation counts as "while closed" if the number is odd and the same
/// before and after it: the gate was closed before it began, and not opened before it ended.
struct Race<'r> {
    cipher: &'r PageCipher,
    gate: AtomicU64,
    done: AtomicBool,
    sealed: Mutex<Vec<Vec<u8>>>,
    while_closed: AtomicU64,
    succeeded: AtomicU64,
}

impl Race<'_> {
    fn run<T>(&self, operation: impl FnOnce() -> Result<T, PageError>) -> Option<T> {
        let before = self.gate.load(Ordering::SeqCst);
        let outcome = operation();
        let closed = before % 2 == 1 && self.gate.load(Ordering::SeqCst) == before;
        self.while_closed.fetch_add(u64::from(closed), Ordering::Relaxed);
        match outcome {
            Ok(made) => {
                assert!(!closed, "an operation succeeded while the gate was closed");
                self.succeeded.fetch_add(1, Ordering::Relaxed);
                Some(made)
            }
            Err(error) => {
                assert_eq!(error, PageError::Disabled);
                None
            }
        }
    }

    fn work(&self, mut dice: Dice) {
        while !self.done.load(Ordering::SeqCst) {
            let method = Method::ALL[dice.below(5)];
            if dice.below(3) == 0 {
                self.batch();
            }
            let Some(page) = self.run(|| method.seal(self.cipher, &at(1), &[9; 256])) else { continue };
            self.run(|| method.open(self.cipher, &at(1), &page).0);
            let mut sealed = self.sealed.lock().unwrap();
            if sealed.len() < 20_000 {
                sealed.push(page);
            }
        }
    }

    /// A batch on threads ends whole: all of its pages are sealed, or none, and the same for opening them.
    fn batch(&self) {
        let mut pages = vec![vec![5; 16 * 1024 + OVERHEAD]; 24];
        let sealed = self.run(|| whole(&mut pages, |jobs| self.cipher.seal_batch(Threads::shared(), jobs)));
        if sealed.is_some() {
            self.run(|| whole(&mut pages, |jobs| self.cipher.open_batch(Threads::shared(), jobs)));
        }
    }
}

fn whole(pages: &mut [Vec<u8>], run: impl FnOnce(&mut [PageJob<'_>]) -> usize) -> Result<(), PageError> {
    let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(at(1), page)).collect();
    let failed = run(&mut jobs);
    assert!(failed == 0 || failed == jobs.len(), "{failed} of {} pages were refused: the batch was cut", jobs.len());
    jobs[0].result()
}

#[test]
fn while_the_gate_closes_and_opens_under_load_nothing_slips_through_and_nothing_is_lost() {
    let mut dice = Dice::printed("gate");
    let keys = [stray_key(Suite::Aes256Gcm, 1)];
    let database = open_stray(&keys, AesBackend::Ring);
    let race = Race {
        cipher: &database.cipher,
        gate: AtomicU64::new(0),
        done: AtomicBool::new(false),
        sealed: Mutex::default(),
        while_closed: AtomicU64::new(0),
        succeeded: AtomicU64::new(0),
    };
    std::thread::scope(|scope| {
        for worker in 0..WORKERS {
            let (race, dice) = (&race, Dice::new(dice.next() ^ worker));
            scope.spawn(move || race.work(dice));
        }
        let mut wiped = 0;
        for _ in 0..ROUNDS {
            pause(dice.below(200));
            wiped += u64::from(close_gate(&database.cipher, false));
            race.gate.fetch_add(1, Ordering::SeqCst);
            pause(dice.below(100));
            race.gate.fetch_add(1, Ordering::SeqCst);
            open_gate(&database.cipher, &keys).unwrap();
        }
        race.done.store(true, Ordering::SeqCst);
        assert_eq!(wiped, ROUNDS, "keys outlived a closing");
    });
    let sealed = race.sealed.into_inner().unwrap();
    for page in &sealed {
        assert_eq!(Method::Into.open(&database.cipher, &at(1), page), (Ok(()), vec![9; 256]));
    }
    let (refused, succeeded) = (race.while_closed.into_inner(), race.succeeded.into_inner());
    println!("gate: {refused} operations refused while closed, {succeeded} succeeded, {} pages kept", sealed.len());
    assert!(refused > ROUNDS && succeeded > ROUNDS, "the race was none");
}

fn pause(microseconds: usize) {
    std::thread::sleep(std::time::Duration::from_micros(microseconds as u64));
}

#[test]
fn seals_that_begin_after_a_rotation_carry_the_new_generation() {
    let database = open_stray(&[key_of(1)], AesBackend::Ring);
    let (cipher, newest, done) = (&database.cipher, AtomicU64::new(1), AtomicBool::new(false));
    let pages = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for worker in 0..WORKERS as usize {
            let (newest, done, pages) = (&newest, &done, &pages);
            scope.spawn(move || {
                for number in worker.. {
                    if done.load(Ordering::SeqCst) {
                        break;
                    }
                    let expected = newest.load(Ordering::SeqCst);
                    let page = Method::ALL[number % 5].seal(cipher, &at(1), &[8; 64]).unwrap();
                    let carried = u64::from(Trailer(*page.last_chunk().unwrap()).generation().unwrap().get());
                    assert!(carried >= expected, "sealed under {carried} after the rotation to {expected}");
                    assert_eq!(Method::Into.open(cipher, &at(1), &page).0, Ok(()));
                    if number % 50 == worker {
                        pages.lock().unwrap().push(page);
                    }
                }
            });
        }
        for number in 2..=200 {
            add_generation(cipher, &key_of(number)).unwrap();
            newest.store(u64::from(number), Ordering::SeqCst);
            pause(100);
        }
        done.store(true, Ordering::SeqCst);
    });
    for page in pages.into_inner().unwrap() {
        assert_eq!(Method::Into.open(cipher, &at(1), &page), (Ok(()), vec![8; 64]));
    }
}

fn key_of(number: u32) -> StrayKey {
    StrayKey { generation: generation(number), ..stray_key(Suite::Aes256Gcm, u64::from(number)) }
}

#[test]
fn a_generation_that_is_let_go_of_opens_nothing_more() {
    let database = open_stray(&[key_of(1)], AesBackend::Ring);
    let old = Method::Into.seal(&database.cipher, &at(1), &[1; 64]).unwrap();
    add_generation(&database.cipher, &key_of(2)).unwrap();
    let new = Method::Into.seal(&database.cipher, &at(1), &[2; 64]).unwrap();
    assert_eq!(Method::Into.open(&database.cipher, &at(1), &old).0, Ok(()));
    assert!(forget_generation(&database.cipher, generation(1)).unwrap(), "the key is still alive");
    let refused = Err(PageError::UnknownGeneration(generation(1)));
    assert_eq!(Method::Into.open(&database.cipher, &at(1), &old).0, refused);
    assert_eq!(Method::Into.open(&database.cipher, &at(1), &new).0, Ok(()));
}

#[test]
fn a_closed_page_file_is_as_it_was_and_goes_on_once_it_is_open() {
    let (directory, glass) = (TempDir::new(), GlassWrapper::default());
    let cluster = Cluster::create(&directory.join("c"), ClusterOptions::new(), Wrappers::one(glass.clone())).unwrap();
    let database = cluster.create_database("orders").unwrap();
    let (cipher, keys) = (database.cipher().unwrap(), glass.data_keys());
    let file = database.create_page_file("table", PageFileOptions::new()).unwrap();
    let payloads = vec![6; 3 * file.payload_len()];
    let append = |pages: usize| {
        let mut appender = file.append()?;
        appender.write(&Inline, &payloads[..pages * file.payload_len()])?;
        appender.finish()
    };
    assert_eq!(append(2).unwrap(), 2);

    let begun = file.append().map(|mut appender| {
        appender.write(&Inline, &payloads).unwrap();
        appender
    });
    assert!(close_gate(&cipher, false), "a page file keeps keys");
    assert_eq!(begun.unwrap().finish().unwrap_err().kind(), ErrorKind::Closed);
    refuses_everything(&file);
    assert_eq!(database.create_page_file("other", PageFileOptions::new()).unwrap_err().kind(), ErrorKind::Closed);

    open_gate(&cipher, &keys).unwrap();
    assert_eq!(file.pages(), 2);
    let mut appender = file.append().unwrap();
    assert!(close_gate(&cipher, false));
    assert_eq!(appender.write(&Inline, &payloads).unwrap_err().kind(), ErrorKind::Closed);
    open_gate(&cipher, &keys).unwrap();
    assert_eq!(appender.write(&Inline, &payloads[..file.payload_len()]).unwrap(), 2);
    assert_eq!(appender.finish().unwrap(), 3);
    let mut buf = vec![0; file.payload_len()];
    for page in 0..3 {
        assert_eq!(file.read(page, &mut buf).unwrap(), Read::Page);
        assert!(buf.iter().all(|byte| *byte == 6));
    }
    assert_eq!(file.read(3, &mut buf).unwrap(), Read::NeverWritten);
}

fn refuses_everything(file: &pageseal::PageFile) {
    assert_eq!(file.append().unwrap_err().kind(), ErrorKind::Closed);
    for page in [0, 1, 2, 9] {
        let mut buf = vec![0xa5; file.payload_len()];
        assert_eq!(file.read(page, &mut buf).unwrap_err().kind(), ErrorKind::Closed, "page {page}");
        assert!(is_zero(&buf));
    }
    let mut buffers = vec![vec![0xa5; file.payload_len()]; 4];
    let mut jobs: Vec<_> = (0..).zip(&mut buffers).map(|(page, buf)| ReadJob::new(page, buf)).collect();
    assert_eq!(file.read_many(&Inline, &mut jobs), 4);
    assert!(jobs.iter().all(|job| job.result() == Err(PageError::Disabled)));
    assert!(buffers.iter().all(|buf| is_zero(buf)));
}

/// Closes the gate in the middle of the first batch that runs on it, and goes on when it is closed.
struct ClosesTheGate(PageCipher, Mutex<Option<JoinHandle<bool>>>);

impl ClosesTheGate {
    fn new(cipher: &PageCipher) -> Self {
        Self(cipher.clone(), Mutex::default())
    }

    /// Whether the keys were wiped once the batch had ended.
    fn closed(self) -> bool {
        self.1.into_inner().unwrap().expect("the batch ran on the pool").join().unwrap()
    }
}

impl Pool for ClosesTheGate {
    fn threads(&self) -> usize {
        2
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let mut closer = self.1.lock().unwrap();
        if closer.is_none() {
            let cipher = self.0.clone();
            *closer = Some(std::thread::spawn(move || close_gate(&cipher, false)));
            while Method::Into.seal(&self.0, &at(0), &[0; 16]).is_ok() {
                std::thread::yield_now();
            }
            pause(1_000);
            assert!(!closer.as_ref().unwrap().is_finished(), "the keys were wiped under a call in flight");
        }
        (0..tasks).for_each(f);
    }
}

#[test]
fn a_batch_in_flight_ends_whole_however_many_ranges_it_takes() {
    let keys = [stray_key(Suite::Aes256Gcm, 1)];
    let database = open_stray(&keys, AesBackend::Ring);
    // More than one range of a session's counter.
    let mut pages = vec![vec![5; 64 + OVERHEAD]; 40_000];
    let pool = ClosesTheGate::new(&database.cipher);
    assert_eq!(whole(&mut pages, |jobs| database.cipher.seal_batch(&pool, jobs)), Ok(()));
    assert!(pool.closed());
    assert_eq!(whole(&mut pages.clone(), |jobs| database.cipher.open_batch(&Inline, jobs)), Err(PageError::Disabled));
    open_gate(&database.cipher, &keys).unwrap();
    let pool = ClosesTheGate::new(&database.cipher);
    assert_eq!(whole(&mut pages, |jobs| database.cipher.open_batch(&pool, jobs)), Ok(()));
    assert!(pages.iter().all(|page| page[..64] == [5; 64]));
    assert!(pool.closed());
}

#[test]
fn a_write_and_a_read_of_many_pages_in_flight_end_whole() {
    let (directory, glass) = (TempDir::new(), GlassWrapper::default());
    let cluster = Cluster::create(&directory.join("c"), ClusterOptions::new(), Wrappers::one(glass.clone())).unwrap();
    let database = cluster.create_database("orders").unwrap();
    let (cipher, keys) = (database.cipher().unwrap(), glass.data_keys());
    let file = database.create_page_file("table", PageFileOptions::new()).unwrap();
    // More than one chunk of 4 MiB.
    let payloads = vec![6; 600 * file.payload_len()];
    let mut appender = file.append().unwrap();
    let pool = ClosesTheGate::new(&cipher);
    assert_eq!(appender.write(&pool, &payloads).unwrap(), 0);
    assert!(pool.closed());
    open_gate(&cipher, &keys).unwrap();
    assert_eq!(appender.finish().unwrap(), 600);

    let mut read = vec![0; payloads.len()];
    let mut jobs: Vec<_> =
        (0..).zip(read.chunks_exact_mut(file.payload_len())).map(|(page, buf)| ReadJob::new(page, buf)).collect();
    let pool = ClosesTheGate::new(&cipher);
    assert_eq!(file.read_many(&pool, &mut jobs), 0);
    assert!(pool.closed());
    assert_eq!(read, payloads);
}

/// Gives no bytes while it is stopped: whoever opens a session waits, and holds its lock.
#[derive(Default)]
struct Stoppable {
    stopped: AtomicBool,
    waiting: AtomicBool,
}

impl Entropy for Stoppable {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        while self.stopped.load(Ordering::SeqCst) {
            self.waiting.store(true, Ordering::SeqCst);
            pause(100);
        }
        out.fill(0x3c);
        Ok(())
    }

    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok([0x3c; 8])
    }
}

#[test]
fn a_child_is_told_that_it_is_one_though_the_gate_is_closed() {
    let keys = [stray_key(Suite::Aes256Gcm, 1)];
    let database = open_stray(&keys, AesBackend::Ring);
    let page = Method::Into.seal(&database.cipher, &at(1), &[7; 64]).unwrap();
    assert!(close_gate(&database.cipher, false));
    assert!(in_a_child(|| says_forked(&database.cipher, &page, &keys)));
    open_gate(&database.cipher, &keys).unwrap();
    assert!(in_a_child(|| says_forked(&database.cipher, &page, &keys)));
    assert_eq!(Method::Into.open(&database.cipher, &at(1), &page).0, Ok(()));
}

#[test]
fn a_child_that_closes_the_gate_waits_for_no_thread_of_its_parent() {
    let (keys, entropy) = ([stray_key(Suite::Aes256Gcm, 1)], Arc::new(Stoppable::default()));
    let database = StrayDatabase::open(&keys, AesBackend::Ring, Some(entropy.clone())).unwrap();
    let page = Method::Into.seal(&database.cipher, &at(1), &[7; 64]).unwrap();
    database.resumed();
    entropy.stopped.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let sealing = scope.spawn(|| Method::Into.seal(&database.cipher, &at(1), &[7; 64]));
        while !entropy.waiting.load(Ordering::SeqCst) {
            pause(100);
        }
        let told = in_a_child(|| says_forked(&database.cipher, &page, &keys));
        entropy.stopped.store(false, Ordering::SeqCst);
        assert!(sealing.join().unwrap().is_ok());
        assert!(told, "the child hangs, or was not told");
    });
}

/// Runs `check` in a forked child, which is killed after a while.
fn in_a_child(check: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child calls what a child may call of this crate, and leaves by `_exit` or the alarm.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: only ends this child.
        unsafe { libc::alarm(20) };
        let passed = check();
        // SAFETY: ends the child without running what the parent registered.
        unsafe { libc::_exit(if passed { 0 } else { 1 }) };
    }
    let mut status = -1;
    // SAFETY: `status` is writable.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    status == 0
}

fn says_forked(cipher: &PageCipher, page: &[u8], keys: &[StrayKey]) -> bool {
    let refused = Method::ALL.iter().all(|method| {
        method.seal(cipher, &at(1), &[7; 64]) == Err(PageError::Forked)
            && method.open(cipher, &at(1), page).0 == Err(PageError::Forked)
    });
    let unchanged = open_gate(cipher, keys).is_err_and(|error| error.kind() == ErrorKind::Forked);
    refused && unchanged && close_gate(cipher, false)
}
