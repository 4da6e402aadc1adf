//! A forked child holds no keys: it is told so by every call, at whatever instruction it was forked, and the parent goes on.

mod common;

use std::ffi::{c_int, c_void};
use std::io::{Read, Write};
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr::{null_mut, slice_from_raw_parts_mut};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use common::{CIPHERS, Dice, Method, TempDir, is_zero, open_stray, salt_and_nonce, stray_key};
use pageseal::testing::stray::StrayDatabase;
use pageseal::{
    AesBackend, Cluster, ClusterOptions, Database, Entropy, ErrorKind, FileId, Inline, LocalKeyFile, NoRandomness,
    OVERHEAD, PageCipher, PageContext, PageError, PageFile, PageFileOptions, PageJob, Pool, Suite, Threads, Wrappers,
};
use pageseal_proofs::score;

fn at(page: usize) -> PageContext {
    PageContext::page(FileId::new(1), page as u64)
}

/// One test forks at a time: a child of two tests at once would have threads of the other in the middle of anything.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a child ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    Exit(c_int),
    Signal(c_int),
    /// Killed after [`PATIENCE_MS`].
    Hang,
}

/// Children here run for a millisecond.
const PATIENCE_MS: c_int = 10_000;

/// Waits for a child. Only system calls: signal handlers use it too.
fn wait_for(child: libc::pid_t) -> End {
    // SAFETY: waits for a child of ours that nobody else waits for; all pointers are to live locals.
    unsafe {
        let handle = libc::syscall(libc::SYS_pidfd_open, child, 0) as c_int;
        let mut poll = libc::pollfd { fd: handle, events: libc::POLLIN, revents: 0 };
        let mut ready = -1;
        while ready < 0 {
            ready = libc::poll(&mut poll, 1, PATIENCE_MS);
        }
        if ready == 0 {
            libc::kill(child, libc::SIGKILL);
        }
        libc::close(handle);
        let mut status = 0;
        while libc::waitpid(child, &mut status, 0) < 0 {}
        match ready {
            0 => End::Hang,
            _ if libc::WIFSIGNALED(status) => End::Signal(libc::WTERMSIG(status)),
            _ => End::Exit(libc::WEXITSTATUS(status)),
        }
    }
}

/// Exit code of a child in which an assertion failed.
const PANICKED: c_int = 101;

/// Ends a child without running what the parent registered for its own end.
fn exit(code: c_int) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Ends a child, after `check` of what it sees.
fn exit_after(check: impl FnOnce()) -> ! {
    exit(if catch_unwind(AssertUnwindSafe(check)).is_ok() { 0 } else { PANICKED })
}

/// Forks; the child runs `check` and exits.
fn in_a_child(check: impl FnOnce()) -> End {
    // SAFETY: the child runs our own code only, which takes none of the locks that other threads may have held.
    match unsafe { libc::fork() } {
        0 => exit_after(check),
        child => {
            assert!(child > 0, "fork failed");
            wait_for(child)
        }
    }
}

fn pools() -> Vec<Box<dyn Pool>> {
    let ours = Threads::new(NonZero::new(3).unwrap()).unwrap();
    let callers = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    let pools: Vec<Box<dyn Pool>> = vec![Box::new(Inline), Box::new(ours), Box::new(callers)];
    // Its threads are running when the fork comes.
    pools.iter().for_each(|pool| pool.run(3, &|_| {}));
    pools
}

/// Every call says `Forked` and leaves nothing that could be taken for a page or a payload.
fn check_forked(cipher: &PageCipher, sealed: &[u8], pools: &[Box<dyn Pool>]) {
    for method in Method::ALL {
        assert_eq!(method.seal(cipher, &at(0), &[1; 64]), Err(PageError::Forked), "{method:?}");
        let (outcome, left) = method.open(cipher, &at(0), sealed);
        assert_eq!(outcome, Err(PageError::Forked), "{method:?}");
        assert!(is_zero(&left), "{method:?}");
    }
    let (mut page, mut out) = ([1; 112], [0xa5; 112]);
    assert_eq!(cipher.seal_in_place(&at(0), &mut page), Err(PageError::Forked));
    assert!(page == [1; 112] || is_zero(&page[..64]));
    assert_eq!(cipher.seal_into(&at(0), &[1; 64], &mut out), Err(PageError::Forked));
    assert_eq!(out, [0; 112]);
    for pool in pools {
        let mut pages = vec![vec![1; 4096 + OVERHEAD]; 300];
        let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
        assert_eq!(cipher.seal_batch(&**pool, &mut jobs), 300);
        assert!(jobs.iter().all(|job| job.result() == Err(PageError::Forked)));
        assert_eq!(cipher.open_batch(&**pool, &mut jobs), 300);
        assert!(jobs.iter().all(|job| job.result() == Err(PageError::Forked)));
        let sealed = pages;
        let mut pages = vec![vec![0xa5; 4096]; 300];
        let mut jobs: Vec<_> =
            sealed.iter().zip(&mut pages).map(|(page, out)| PageJob::between(at(0), page, out)).collect();
        assert_eq!(cipher.open_batch(&**pool, &mut jobs), 300);
        assert!(pages.iter().all(|page| is_zero(page)));
    }
}

#[test]
fn every_call_in_a_child_says_forked_and_the_parent_goes_on() {
    let _alone = alone();
    for (suite, backend) in CIPHERS {
        let key = stray_key(suite, 1);
        let pools = pools();
        let used = open_stray(&[key], backend);
        let sealed = Method::Into.seal(&used.cipher, &at(0), &[1; 64]).unwrap();
        // One that has no session yet, one that would begin a new session, and one that must look at a foreign session.
        let unused = open_stray(&[key], backend);
        let resumed = open_stray(&[key], backend);
        Method::Into.seal(&resumed.cipher, &at(0), &[1; 64]).unwrap();
        resumed.resumed();
        let end = in_a_child(|| {
            for database in [&used, &unused, &resumed] {
                check_forked(&database.cipher, &sealed, &pools);
            }
            drop((unused, resumed, used.cipher.clone()));
            anew_in_the_child(key, backend, &sealed, &pools);
            drop((used, pools));
        });
        assert_eq!(end, End::Exit(0), "{suite:?} {backend:?}");
    }
}

/// The child opens the database for itself, seals, opens what its parent sealed, and is itself the parent of a fork.
fn anew_in_the_child(
    key: pageseal::testing::stray::StrayKey,
    backend: AesBackend,
    sealed: &[u8],
    pools: &[Box<dyn Pool>],
) {
    let own = open_stray(&[key], backend).cipher;
    assert_eq!(Method::Into.open(&own, &at(0), sealed), (Ok(()), vec![1; 64]));
    let threads = Threads::new(NonZero::new(2).unwrap()).unwrap();
    pools[1].run(3, &|_| {});
    // The inherited pool of ours works on the calling thread; the caller's own pool is the caller's business.
    for pool in [&threads, &*pools[1], Threads::shared()] {
        let mut pages = vec![vec![1; 4096 + OVERHEAD]; 300];
        let mut jobs: Vec<_> = pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
        assert_eq!(own.seal_batch(pool, &mut jobs), 0);
        assert_eq!(own.open_batch(pool, &mut jobs), 0);
    }
    let page = Method::Into.seal(&own, &at(0), &[2; 64]).unwrap();
    assert_eq!(in_a_child(|| check_forked(&own, &page, &[])), End::Exit(0));
    assert_eq!(Method::Into.open(&own, &at(0), &page).0, Ok(()));
}

/// What the parent has open, and the child inherits.
struct Handles {
    cluster: Cluster,
    database: Database,
    cipher: PageCipher,
    file: PageFile,
}

#[test]
fn a_child_opens_the_cluster_anew_beside_its_parent_and_a_page_file_once_the_parent_closed_it() {
    let _alone = alone();
    let dir = TempDir::new();
    let (directory, key_file) = (dir.join("cluster"), dir.join("master.key"));
    let master = Wrappers::one(LocalKeyFile::create(&key_file).unwrap());
    let cluster = Cluster::create(&directory, ClusterOptions::new(), master).unwrap();
    let database = cluster.create_database("orders").unwrap();
    let file = database.create_page_file("table", PageFileOptions::new()).unwrap();
    let payload = vec![9; file.payload_len()];
    let mut appender = file.append().unwrap();
    appender.write(&Inline, &payload).unwrap();
    appender.finish().unwrap();
    let cipher = database.cipher().unwrap();
    let sealed = Method::Into.seal(&cipher, &at(0), &[1; 64]).unwrap();
    let handles = Handles { cluster, database, cipher, file };
    let (mut closed, mut close) = std::io::pipe().unwrap();
    let (mut tell, mut told) = std::io::pipe().unwrap();
    // SAFETY: as in `in_a_child`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        exit_after(|| {
            drop((close, tell));
            check_forked(&handles.cipher, &sealed, &[]);
            let forked = |error: pageseal::Error| assert_eq!(error.kind(), ErrorKind::Forked, "{error}");
            forked(handles.cluster.create_database("more").unwrap_err());
            forked(handles.cluster.database("orders").unwrap_err());
            forked(handles.cluster.databases().unwrap_err());
            forked(handles.cluster.check_master_key().unwrap_err());
            forked(handles.database.cipher().unwrap_err());
            forked(handles.database.page_file("table").unwrap_err());
            forked(handles.file.append().and_then(|mut appender| appender.write(&Inline, &payload)).unwrap_err());
            let mut read = vec![0xa5; payload.len()];
            forked(handles.file.read(0, &mut read).unwrap_err());
            assert!(is_zero(&read));
            let open = || {
                let master = Wrappers::one(LocalKeyFile::new(&key_file));
                Cluster::open(&directory, ClusterOptions::new(), master)
            };
            // Without the inherited handles going first.
            let cluster = open().unwrap();
            let database = cluster.database("orders").unwrap();
            let own = database.cipher().unwrap();
            assert_eq!(Method::Into.open(&own, &at(0), &sealed), (Ok(()), vec![1; 64]));
            assert_ne!(
                salt_and_nonce(&Method::Into.seal(&own, &at(0), &[1; 64]).unwrap()).0,
                salt_and_nonce(&sealed).0
            );
            cluster.create_database("more").unwrap();
            assert_eq!(database.page_file("table").unwrap_err().kind(), ErrorKind::InUse, "the parent still has it");
            drop(handles);
            assert_eq!(
                database.page_file("table").unwrap_err().kind(),
                ErrorKind::InUse,
                "the child freed its parent's"
            );
            told.write_all(&[1]).unwrap();
            // Until the parent has closed it too, which closes the pipe.
            assert_eq!(closed.read(&mut [0]).unwrap(), 0);
            let outcome = database.page_file("table").unwrap().read(0, &mut read).unwrap();
            assert_eq!((outcome, &read), (pageseal::Read::Page, &payload));
        })
    }
    drop(told);
    assert_eq!(tell.read(&mut [0]).unwrap(), 1, "the child failed");
    assert_eq!(handles.cluster.databases().unwrap(), ["more", "orders"], "the parent sees what its child made");
    let page = Method::Into.seal(&handles.cipher, &at(1), &[2; 64]).unwrap();
    assert_eq!(Method::Into.open(&handles.cipher, &at(1), &page).0, Ok(()), "the parent goes on");
    drop(handles);
    close.flush().unwrap();
    drop((close, closed));
    assert_eq!(wait_for(child), End::Exit(0));
    let master = Wrappers::one(LocalKeyFile::new(&key_file));
    let cluster = Cluster::open(&directory, ClusterOptions::new(), master).unwrap();
    assert_eq!(cluster.databases().unwrap(), ["more", "orders"]);
}

#[test]
fn a_parent_seals_and_opens_while_it_forks() {
    let _alone = alone();
    let key = stray_key(Suite::Aes256Gcm, 1);
    let database = open_stray(&[key], AesBackend::Ring);
    // More sessions than the cache holds: those who read their pages hold its locks most of the time.
    let foreign: Vec<_> = (0..2_000)
        .map(|_| {
            database.resumed();
            Method::Into.seal(&database.cipher, &at(0), &[1; 64]).unwrap()
        })
        .collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for reader in 0..2 {
            let (database, foreign, stop) = (&database, &foreign, &stop);
            scope.spawn(move || {
                let mut dice = Dice::new(reader);
                while !stop.load(Ordering::Relaxed) {
                    let page = &foreign[dice.below(foreign.len())];
                    assert_eq!(Method::InPlace.open(&database.cipher, &at(0), page), (Ok(()), vec![1; 64]));
                }
            });
        }
        scope.spawn(|| {
            let pool = Threads::new(NonZero::new(2).unwrap()).unwrap();
            let mut pages = vec![vec![1; 4096 + OVERHEAD]; 100];
            while !stop.load(Ordering::Relaxed) {
                database.resumed();
                let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(at(7), page)).collect();
                assert_eq!(database.cipher.seal_batch(&pool, &mut jobs), 0);
                assert_eq!(database.cipher.open_batch(&pool, &mut jobs), 0);
            }
        });
        let child = |_| {
            in_a_child(|| {
                for page in &foreign {
                    assert_eq!(Method::InPlace.open(&database.cipher, &at(0), page).0, Err(PageError::Forked));
                }
                assert_eq!(Method::InPlace.seal(&database.cipher, &at(0), &[1; 64]), Err(PageError::Forked));
                let own = open_stray(&[key], AesBackend::Ring);
                assert_eq!(Method::InPlace.open(&own.cipher, &at(0), &foreign[0]).0, Ok(()));
            })
        };
        // The first that does not end well ends it all: each that hangs takes its time.
        let bad = (0..150).map(child).find(|end| *end != End::Exit(0));
        stop.store(true, Ordering::Relaxed);
        assert_eq!(bad, None);
    });
}

/// Blocks the thread that opens a session, in the middle of it.
struct Gate {
    armed: AtomicBool,
    inside: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl Entropy for Gate {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        if self.armed.swap(false, Ordering::Relaxed) {
            self.inside.lock().unwrap().send(()).unwrap();
            self.go_on.lock().unwrap().recv().unwrap();
        }
        Dice::new(out.len() as u64).fill(out);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok([1; 8])
    }
}

#[test]
fn a_lock_that_another_thread_held_at_the_fork_stops_no_child() {
    let _alone = alone();
    let (inside, entered) = channel();
    let (release, go_on) = channel();
    let gate = Arc::new(Gate { armed: AtomicBool::new(false), inside: Mutex::new(inside), go_on: Mutex::new(go_on) });
    let key = stray_key(Suite::Aes256Gcm, 1);
    let database = StrayDatabase::open(&[key], AesBackend::Ring, Some(gate.clone())).unwrap();
    let foreign = Method::Into.seal(&open_stray(&[key], AesBackend::Ring).cipher, &at(0), &[1; 64]).unwrap();
    gate.armed.store(true, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let opener = scope.spawn(|| Method::Into.seal(&database.cipher, &at(0), &[1; 64]));
        entered.recv().unwrap();
        // The opener holds the lock of new sessions now.
        let end = in_a_child(|| {
            check_forked(&database.cipher, &foreign, &[]);
            drop(open_stray(&[key], AesBackend::Ring));
        });
        release.send(()).unwrap();
        let page = opener.join().unwrap().unwrap();
        assert_eq!(Method::Into.open(&database.cipher, &at(0), &page).0, Ok(()));
        assert_eq!(end, End::Exit(0));
    });
}

/// What a child that was forked out of its parent's call writes down, for the parent to check: one shared mapping.
struct Notes {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is written by children, one at a time, and read when they have ended.
unsafe impl Sync for Notes {}

impl Notes {
    fn new(len: usize) -> Self {
        // SAFETY: a new anonymous mapping touches no memory of ours.
        let start = unsafe {
            let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
            libc::mmap(null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(start, libc::MAP_FAILED);
        Self { start: start.cast(), len }
    }

    #[allow(clippy::mut_from_ref)]
    fn bytes(&self) -> &mut [u8] {
        // SAFETY: mapped as long as `self` lives; one process at a time uses it.
        unsafe { &mut *slice_from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// A secret as the crate keeps it: a canary and a value, both zeroed by the kernel in a child. For the broken variant.
struct WipedOnFork(*mut u64);

impl WipedOnFork {
    fn new() -> Self {
        // SAFETY: a new anonymous mapping touches no memory of ours, and is long enough for two words.
        unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
            assert_ne!(at, libc::MAP_FAILED);
            assert_eq!(libc::madvise(at, 4096, libc::MADV_WIPEONFORK), 0);
            let words: *mut u64 = at.cast();
            words.write_volatile(1);
            words.add(1).write_volatile(0x0123_4567_89ab_cdef);
            Self(words)
        }
    }

    fn intact(&self) -> bool {
        // SAFETY: mapped as long as `self` lives.
        unsafe { self.0.read_volatile() == 1 }
    }

    fn secret(&self) -> u64 {
        // SAFETY: as above.
        unsafe { self.0.add(1).read_volatile() }
    }
}

impl Drop for WipedOnFork {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// Forks where it is told to, in the middle of a call; in the child it notes that.
#[derive(Default)]
struct ForkingHere {
    child: AtomicI32,
    in_child: AtomicBool,
}

impl ForkingHere {
    fn fork(&self) {
        // SAFETY: as in `in_a_child`.
        let child = unsafe { libc::fork() };
        self.in_child.store(child == 0, Ordering::Relaxed);
        self.child.store(child, Ordering::Relaxed);
    }

    /// In the parent, how the child ended; the child runs `check` and exits.
    fn end(&self, check: impl FnOnce()) -> End {
        if self.in_child.load(Ordering::Relaxed) {
            exit_after(check)
        } else {
            wait_for(self.child.load(Ordering::Relaxed))
        }
    }
}

/// A caller's pool that forks, in `run`: before all tasks, or after the first call of a task has done its part.
struct ForkingPool<'a> {
    here: &'a ForkingHere,
    after_task: bool,
}

impl Pool for ForkingPool<'_> {
    fn threads(&self) -> usize {
        2
    }
    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        if self.after_task {
            f(0);
        }
        self.here.fork();
        (1..tasks).for_each(f);
    }
}

#[test]
fn a_fork_inside_the_pool_in_the_middle_of_a_batch_leaves_forked_results() {
    let _alone = alone();
    for (suite, backend) in CIPHERS {
        for after_task in [false, true] {
            let database = open_stray(&[stray_key(suite, 1)], backend);
            let here = ForkingHere::default();
            let payload = vec![7; 4096];
            let mut pages = vec![vec![0xa5; 4096 + OVERHEAD]; 200];
            let mut jobs: Vec<_> =
                pages.iter_mut().enumerate().map(|(n, page)| PageJob::between(at(n), &payload, page)).collect();
            let failed = database.cipher.seal_batch(&ForkingPool { here: &here, after_task }, &mut jobs);
            let end = here.end(|| {
                // What was sealed before the fork may be handed out or not; what was not is `Forked`.
                assert!(after_task || failed == 200);
                assert!(jobs.iter().all(|job| match job.result() {
                    Ok(()) => !is_zero(&job.bytes()[4096..]),
                    result => result == Err(PageError::Forked) && is_zero(job.bytes()),
                }));
            });
            assert_eq!((end, failed), (End::Exit(0), 0));
            let here = ForkingHere::default();
            let mut jobs: Vec<_> =
                pages.iter_mut().enumerate().map(|(n, page)| PageJob::in_place(at(n), page)).collect();
            let failed = database.cipher.open_batch(&ForkingPool { here: &here, after_task: false }, &mut jobs);
            let end = here.end(|| {
                assert!(jobs.iter().all(|job| job.result() == Err(PageError::Forked) && is_zero(job.bytes())));
            });
            assert_eq!((end, failed), (End::Exit(0), 0));
            assert!(pages.iter().all(|page| page[..4096] == payload));
        }
    }
}

/// A source that forks at its `n`-th call: between the range of the counter and the seal, or in the middle of a new session.
struct ForkingSource {
    here: ForkingHere,
    until_fork: AtomicI32,
}

impl ForkingSource {
    fn called(&self) {
        if self.until_fork.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.here.fork();
        }
    }
}

impl Entropy for ForkingSource {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.fill(4);
        self.called();
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        self.called();
        Ok([1; 8])
    }
}

#[test]
fn a_fork_in_the_middle_of_a_call_leaves_forked_in_the_child() {
    let _alone = alone();
    for (suite, backend) in CIPHERS {
        for (call, method) in (1..=2).flat_map(|call| Method::ALL.map(|method| (call, method))) {
            let source = Arc::new(ForkingSource { here: ForkingHere::default(), until_fork: AtomicI32::new(0) });
            let database = StrayDatabase::open(&[stray_key(suite, 1)], backend, Some(source.clone())).unwrap();
            source.until_fork.store(call, Ordering::Relaxed);
            let sealed = method.seal(&database.cipher, &at(0), &[1; 64]);
            let end = source.here.end(|| assert_eq!(sealed, Err(PageError::Forked)));
            assert_eq!(end, End::Exit(0), "{suite:?} {method:?}, call {call}");
            assert_eq!(method.open(&database.cipher, &at(0), &sealed.unwrap()).0, Ok(()));
        }
    }
}

/// What the signal handlers below and the code that they interrupt tell each other.
static ACTIVE: AtomicBool = AtomicBool::new(false);
static IN_CHILD: AtomicBool = AtomicBool::new(false);
static STEPS: AtomicUsize = AtomicUsize::new(0);
static STRIDE: AtomicUsize = AtomicUsize::new(1);
/// The ends of cloned children, by kind.
static ENDS: [AtomicUsize; 5] = [const { AtomicUsize::new(0) }; 5];

/// What became of a child that was cloned in the middle of a call and went on from there. The number is its exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// The call said `Forked` and left nothing.
    Forked = 0,
    /// The call was done with the key already: the page (or the payload) is the parent's, to the byte.
    Same = 1,
    /// The cipher stumbled over its wiped key: ring's assembly runs off the end of a key schedule of 0 rounds. Nothing came
    /// out of it. POSIX lets nobody fork in a signal handler and then return from it, and a child that does is not saved.
    Died = 2,
    Hung = 3,
    /// Anything else: a page of a wrong key, a dirty buffer, another error.
    Wrong = 4,
}

impl Fate {
    const ALL: [Self; 5] = [Self::Forked, Self::Same, Self::Died, Self::Hung, Self::Wrong];

    fn exit(self) -> ! {
        exit(self as c_int)
    }
}

/// Counts by fate.
#[derive(Clone, Copy, Default, Debug)]
struct Fates([usize; 5]);

impl Fates {
    fn take() -> Self {
        Self(Fate::ALL.map(|fate| ENDS[fate as usize].swap(0, Ordering::Relaxed)))
    }

    fn of(&self, fate: Fate) -> usize {
        self.0[fate as usize]
    }

    fn all(&self) -> usize {
        self.0.iter().sum()
    }

    fn add(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, count)| *sum += count);
    }
}

/// Clones the process as fork(2) does, but without what the C library runs around a fork; returns true in the child. The
/// parent waits for the child's end here.
fn clone_in_handler() -> bool {
    // SAFETY: without CLONE_VM the child has its own copy of this stack and returns on it. Only system calls are made.
    unsafe {
        let errno = *libc::__errno_location();
        let child = libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as libc::pid_t;
        if child == 0 {
            IN_CHILD.store(true, Ordering::Relaxed);
            // Rust's handlers would tell a long story about it.
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
            libc::signal(libc::SIGBUS, libc::SIG_DFL);
            libc::close(2);
            return true;
        }
        let fate = match wait_for(child) {
            End::Exit(code) => Fate::ALL.into_iter().find(|fate| *fate as c_int == code).unwrap_or(Fate::Wrong),
            End::Signal(libc::SIGSEGV | libc::SIGBUS | libc::SIGABRT) => Fate::Died,
            End::Signal(_) => Fate::Wrong,
            End::Hang => Fate::Hung,
        };
        ENDS[fate as usize].fetch_add(1, Ordering::Relaxed);
        *libc::__errno_location() = errno;
        false
    }
}

/// The processor's trap flag: a SIGTRAP after each instruction.
const TRAP_FLAG: i64 = 0x100;

extern "C" fn on_step(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes the interrupted thread's registers, which are ours to change.
    let flags = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs[libc::REG_EFL as usize] };
    // A child that hung took its time; there must not be thousands of them.
    let hung = ENDS[Fate::Hung as usize].load(Ordering::Relaxed) > 0;
    let step = STEPS.fetch_add(1, Ordering::Relaxed);
    let active = ACTIVE.load(Ordering::Relaxed) && !hung;
    if !active || step.is_multiple_of(STRIDE.load(Ordering::Relaxed)) && clone_in_handler() {
        *flags &= !TRAP_FLAG;
    }
}

/// One clone each time that the timer interrupts what it is meant to.
extern "C" fn on_timer(_: c_int, _: *mut libc::siginfo_t, _: *mut c_void) {
    if ACTIVE.swap(false, Ordering::Relaxed) {
        clone_in_handler();
    }
}

fn handle(signal: c_int, handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void)) {
    // SAFETY: installs a handler of the right type that makes system calls and uses atomics only.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        assert_eq!(libc::sigaction(signal, &action, null_mut()), 0);
    }
}

/// Runs `call` with the means of cloning that `start` sets going; a child that panics in it exits.
fn interrupted<R>(start: impl FnOnce(), call: impl FnOnce() -> R) -> R {
    ACTIVE.store(true, Ordering::Relaxed);
    start();
    let outcome = catch_unwind(AssertUnwindSafe(call));
    ACTIVE.store(false, Ordering::Relaxed);
    match outcome {
        Ok(outcome) => outcome,
        Err(_) if IN_CHILD.load(Ordering::Relaxed) => Fate::Died.exit(),
        Err(panic) => resume_unwind(panic),
    }
}

/// Runs `call` one instruction at a time, with a clone of the process at every `stride`-th.
fn stepping<R>(stride: usize, call: impl FnOnce() -> R) -> R {
    handle(libc::SIGTRAP, on_step);
    STRIDE.store(stride, Ordering::Relaxed);
    STEPS.store(0, Ordering::Relaxed);
    // SAFETY: sets the trap flag; the handler clears it once `ACTIVE` is false.
    interrupted(|| unsafe { std::arch::asm!("pushfq", "or qword ptr [rsp], 0x100", "popfq") }, call)
}

/// A payload that takes the cipher's code for whole groups of blocks as well as that for what is left over.
const STEPPED: usize = 300;
/// More instructions than a call of that length takes.
const MOST_STEPS: usize = 1 << 16;

#[test]
fn a_clone_at_any_instruction_yields_no_page_of_a_wiped_key() {
    let _alone = alone();
    let notes = Notes::new(MOST_STEPS * (STEPPED + OVERHEAD));
    let (mut total, mut broken) = (Fates::default(), 0);
    for (suite, backend) in CIPHERS {
        let key = stray_key(suite, 1);
        // Once before, so that nothing is resolved lazily under the stepper.
        let warm = open_stray(&[key], backend).cipher;
        let page = Method::Into.seal(&warm, &at(0), &[7; STEPPED]).unwrap();
        assert_eq!(Method::Into.open(&open_stray(&[key], backend).cipher, &at(0), &page).0, Ok(()));

        let stride = if suite == Suite::Aegis256X2 || CIPHERS[0] == (suite, backend) { 1 } else { 5 };
        let cipher = open_stray(&[key], backend).cipher;
        // The first call of a handle derives its key: from zeros, in a child of the wrong moment.
        step_through_a_seal(&cipher, 29, &notes, &mut total, "first seal");
        let page = step_through_a_seal(&cipher, stride, &notes, &mut total, "seal");
        let reader = open_stray(&[key], backend).cipher;
        step_through_an_open(&reader, &page, 29, &mut total, "first open");
        step_through_an_open(&reader, &page, stride, &mut total, "open");
    }
    // The broken variant asks for the canary before the cipher only, as if a fork could not come in between: then a child
    // hands out what the cipher made of zeros.
    let canary = WipedOnFork::new();
    let mut made = 0u64;
    stepping(1, || {
        made = if canary.intact() { std::hint::black_box(canary.secret()).rotate_left(7) ^ 0x55 } else { 0 };
    });
    if IN_CHILD.load(Ordering::Relaxed) {
        exit(if made == 0x55 { Fate::Wrong as c_int } else { Fate::Forked as c_int });
    }
    broken += Fates::take().of(Fate::Wrong);

    let control = broken > 0;
    score(&format!(
        "fork-points tried={} forked={} same={} died={} hung={} wrong={} control={}",
        total.all(),
        total.of(Fate::Forked),
        total.of(Fate::Same),
        total.of(Fate::Died),
        total.of(Fate::Hung),
        total.of(Fate::Wrong),
        u8::from(control),
    ));
    assert!(control, "a check before the cipher alone was enough: the stepper sees nothing");
    assert_eq!((total.of(Fate::Hung), total.of(Fate::Wrong)), (0, 0));
}

fn step_through_a_seal(cipher: &PageCipher, stride: usize, notes: &Notes, total: &mut Fates, op: &str) -> Vec<u8> {
    let plain = vec![7; STEPPED + OVERHEAD];
    let mut page = plain.clone();
    let outcome = stepping(stride, || cipher.seal_in_place(&at(0), &mut page));
    if IN_CHILD.load(Ordering::Relaxed) {
        match outcome {
            Err(PageError::Forked) if page == plain || is_zero(&page[..STEPPED]) => Fate::Forked.exit(),
            Ok(()) => {
                let number = STEPS.load(Ordering::Relaxed) % MOST_STEPS;
                notes.bytes()[number * page.len()..][..page.len()].copy_from_slice(&page);
                Fate::Same.exit()
            }
            _ => Fate::Wrong.exit(),
        }
    }
    outcome.unwrap();
    assert_eq!(Method::Into.open(cipher, &at(0), &page), (Ok(()), vec![7; STEPPED]), "the parent goes on");
    // Every page that a child was given must be the one that its parent sealed.
    let handed_out = notes.bytes().chunks(page.len()).filter(|note| !is_zero(note));
    let foreign = handed_out.filter(|note| *note != page).count();
    notes.bytes().fill(0);
    report(total, foreign, op);
    page
}

fn step_through_an_open(cipher: &PageCipher, sealed: &[u8], stride: usize, total: &mut Fates, op: &str) {
    let mut page = sealed.to_vec();
    let outcome = stepping(stride, || cipher.open_in_place(&at(0), &mut page));
    if IN_CHILD.load(Ordering::Relaxed) {
        match outcome {
            Err(PageError::Forked) if is_zero(&page) => Fate::Forked.exit(),
            Ok(()) if page[..STEPPED] == [7; STEPPED] => Fate::Same.exit(),
            _ => Fate::Wrong.exit(),
        }
    }
    outcome.unwrap();
    assert_eq!((&page[..STEPPED], &page[STEPPED..]), (&[7; STEPPED][..], &sealed[STEPPED..]));
    report(total, 0, op);
}

fn report(total: &mut Fates, foreign: usize, op: &str) {
    let mut fates = Fates::take();
    fates.0[Fate::Same as usize] -= foreign;
    fates.0[Fate::Wrong as usize] += foreign;
    println!("{op}: {} instructions, {fates:?}", STEPS.load(Ordering::Relaxed));
    assert!(fates.of(Fate::Forked) > 0 && fates.all() > 50, "the stepper did not step");
    total.add(fates);
}

/// A timer that signals this thread once.
struct Timer(libc::timer_t);

impl Timer {
    fn of_this_thread(signal: c_int) -> Self {
        // SAFETY: the event names this thread and a signal that is handled; all pointers are to live locals.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal;
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer = null_mut();
            assert_eq!(libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer), 0);
            Self(timer)
        }
    }

    fn fire_in(&self, nanoseconds: i64) {
        let zero = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let after = libc::timespec { tv_sec: 0, tv_nsec: nanoseconds };
        let when = libc::itimerspec { it_interval: zero, it_value: after };
        // SAFETY: the timer is ours; the pointer is to a live local.
        unsafe { libc::timer_settime(self.0, 0, &when, null_mut()) };
    }
}

impl Drop for Timer {
    fn drop(&mut self) {
        // SAFETY: the timer is ours.
        unsafe { libc::timer_delete(self.0) };
    }
}

const IN_BATCH: usize = 128;

#[test]
fn a_clone_out_of_a_long_batch_yields_no_page_of_a_wiped_key_and_the_parent_goes_on() {
    let _alone = alone();
    handle(libc::SIGUSR1, on_timer);
    let timer = Timer::of_this_thread(libc::SIGUSR1);
    let mut dice = Dice::printed("clones out of a batch");
    let notes = Notes::new(IN_BATCH * (4096 + OVERHEAD));
    let threads = Threads::new(NonZero::new(2).unwrap()).unwrap();
    let pools = [("inline", &Inline as &dyn Pool), ("threads", &threads)];
    for ((suite, backend), (name, pool)) in CIPHERS.into_iter().flat_map(|cipher| pools.map(|pool| (cipher, pool))) {
        let database = open_stray(&[stray_key(suite, 1)], backend);
        let cipher = &database.cipher;
        let payload = vec![7; 4096];
        let mut pages = vec![vec![0; 4096 + OVERHEAD]; IN_BATCH];
        let mut fates = Fates::default();
        let mut longest = 100_000;
        let mut batches = 0;
        while fates.all() < 60 {
            batches += 1;
            let begun = Instant::now();
            let delay = 1 + dice.below(longest) as i64;
            let mut jobs: Vec<_> =
                pages.iter_mut().enumerate().map(|(n, page)| PageJob::between(at(n), &payload, page)).collect();
            interrupted(|| timer.fire_in(delay), || cipher.seal_batch(pool, &mut jobs));
            if IN_CHILD.load(Ordering::Relaxed) {
                note_batch(&jobs, &notes)
            }
            assert!(jobs.iter().all(|job| job.result() == Ok(())), "the parent's batch was disturbed");
            // Without a clone, this is how long a batch takes here.
            let once = Fates::take();
            if once.all() == 0 {
                longest = usize::try_from(begun.elapsed().as_nanos()).unwrap().max(1_000);
            }
            if once.of(Fate::Forked) + once.of(Fate::Same) > 0 {
                for (number, (ours, theirs)) in jobs.iter().zip(notes.bytes().chunks(4096 + OVERHEAD)).enumerate() {
                    assert!(is_zero(theirs) || theirs == ours.bytes(), "page {number} of a child is of another key");
                }
            }
            fates.add(once);
            for (number, job) in jobs.iter().enumerate() {
                assert_eq!(Method::Into.open(cipher, &at(number), job.bytes()).0, Ok(()));
            }
        }
        println!("{suite:?} {backend:?} {name}: {} clones out of {batches} batches, {fates:?}", fates.all());
        assert_eq!((fates.of(Fate::Hung), fates.of(Fate::Wrong)), (0, 0));
    }
}

/// In the child: notes the pages, if each job is done or forked and the forked ones hold zeros.
fn note_batch(jobs: &[PageJob<'_>], notes: &Notes) -> ! {
    for (job, note) in jobs.iter().zip(notes.bytes().chunks_mut(4096 + OVERHEAD)) {
        match job.result() {
            Ok(()) => note.copy_from_slice(job.bytes()),
            Err(PageError::Forked) if is_zero(job.bytes()) => note.fill(0),
            _ => Fate::Wrong.exit(),
        }
    }
    let forked = jobs.iter().any(|job| job.result().is_err());
    if forked { Fate::Forked.exit() } else { Fate::Same.exit() }
}
