//! [`LockFile`]: how several processes share a cluster. Each lock is one byte of a file that is never renamed or
//! removed, so that all processes lock the same; which byte stands for what is said at [`generation_byte`] and
//! [`file_byte`].
//!
//! The kernel looks at all locks of a file for each that is taken, but joins those on neighbouring bytes that one process
//! has. The locks of generations are therefore on bytes that follow each other (the keystore numbers them): ten thousand
//! open databases are one lock. Those of page files, which are named at random, are spread over [`SPREAD_OVER`] more files,
//! opened when they are first needed: `lock.0`, `lock.1` and so on.
//!
//! The locks belong to the descriptor, of which a process has one for each file. What the threads of a process would all
//! have at once is therefore told apart here, in the process.
//!
//! A killed process holds nothing: the kernel frees its locks. A forked child shares the descriptor and so the locks:
//! they stay until the child, too, has closed it, by dropping the inherited handles, by exec or by its end. In the
//! child, whatever takes a lock is [`ErrorKind::Forked`], and dropping a guard frees nothing, because the parent goes on.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, PageError, Result};
use crate::format::record::Record;
use crate::ids::{DatabaseId, FileId};
use crate::secret::ForkDetector;
use crate::storage::ofd;

/// The locks of one cluster, through one descriptor for each file. See the [module](self).
pub(crate) struct LockFile {
    file: File,
    /// Those with the bytes of page files.
    spread: [OnceLock<File>; SPREAD_OVER],
    path: PathBuf,
    fork: ForkDetector,
    /// Whether a thread of this process has, or waits for, byte 0.
    busy: Mutex<bool>,
    freed: Condvar,
    table: Mutex<Table>,
}

/// Which bytes this process has locked, byte 0 aside. A byte is locked and unlocked under the mutex of its table only.
#[derive(Default)]
struct Table {
    /// Locked shared.
    held: HashMap<u64, Held>,
    /// Locked exclusively; none of them is in `held`.
    owned: HashSet<u64>,
}

#[derive(Default)]
struct Held {
    /// How many [`GenerationHold`]s were not dropped. Two or more, while the last handle of one waits for the mutex in
    /// its drop and somebody holds the generation anew.
    live: usize,
    newest: Weak<GenerationHold>,
}

/// Who keeps a generation from being destroyed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Holder {
    /// This process: it may seal under the generation, or another thread is destroying it already.
    ThisProcess,
    /// Another process, which one the kernel does not tell.
    AnotherProcess,
}

impl LockFile {
    /// Opens the lock file, and makes it if there is none. Two handles of one file act as two processes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Resources`] if there is no memory for noticing forks.
    pub(crate) fn open(path: &Path) -> Result<Arc<Self>> {
        let file = open(path).map_err(|error| Error::io(format!("opening the lock file {}", path.display()), error))?;
        let fork = ForkDetector::new().map_err(|error| {
            Error::with_source(ErrorKind::Resources, format!("no memory for noticing forks: {error}"), error)
        })?;
        Ok(Arc::new(Self {
            file,
            spread: [const { OnceLock::new() }; SPREAD_OVER],
            path: path.to_owned(),
            fork,
            busy: Mutex::default(),
            freed: Condvar::new(),
            table: Mutex::default(),
        }))
    }

    /// Waits, at most for `patience`, until nobody else changes or reads the keystore, and keeps them out. One thread
    /// of a process at a time: who calls it while having a guard waits for itself.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] after `patience`; [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    pub(crate) fn change(&self, patience: Duration) -> Result<ChangeGuard<'_>> {
        self.take_turn(ofd::try_exclusive, patience).map(ChangeGuard)
    }

    /// Waits, at most for `patience`, until nobody else changes the keystore, and keeps changes out. Other processes
    /// may read meanwhile, other threads of this one may not.
    ///
    /// # Errors
    /// As for [`LockFile::change`].
    pub(crate) fn look(&self, patience: Duration) -> Result<LookGuard<'_>> {
        self.take_turn(ofd::try_shared, patience).map(LookGuard)
    }

    /// Says, as long as this handle lives, that somebody has the cluster open. Waits, at most for `patience`, for one who is
    /// alone with it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] after `patience`; [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    pub(crate) fn join(&self, patience: Duration) -> Result<()> {
        self.check_fork()?;
        self.wait_for(ofd::try_shared, OPEN, Instant::now(), patience)
    }

    /// Keeps everybody else from opening the cluster, until [`LockFile::join`] or the end of this handle; false if somebody
    /// has it open.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    pub(crate) fn try_be_alone(&self) -> Result<bool> {
        self.check_fork()?;
        self.ask(ofd::try_exclusive, OPEN)
    }

    /// The lease of the one who sends notifications for the cluster; `None` while somebody has it, here or elsewhere.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    #[allow(dead_code)] // taken by whoever sends notifications, which nobody does yet
    pub(crate) fn try_lease(self: &Arc<Self>) -> Result<Option<Lease>> {
        self.check_fork()?;
        Ok(self.try_own(&mut self.table(), LEASE)?.map(Lease))
    }

    /// Keeps a generation from being destroyed as long as the hold lives. Whoever may seal under it has a hold; those
    /// of one process share it. Another process may have destroyed the generation just before: look in the keystore
    /// after this call, not only before.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while somebody is destroying it; [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    pub(crate) fn hold(self: &Arc<Self>, key: &Record) -> Result<Arc<GenerationHold>> {
        self.check_fork()?;
        let byte = generation_byte(key);
        let mut table = self.table();
        if let Some(hold) = table.held.get(&byte).and_then(|held| held.newest.upgrade()) {
            return Ok(hold);
        }
        if table.owned.contains(&byte) || !self.ask(ofd::try_shared, byte)? {
            let (database, generation) = (key.database, key.generation);
            let message = format!("generation {generation} of database {database} is being destroyed; try again");
            return Err(Error::new(ErrorKind::InUse, message));
        }
        let hold = Arc::new(GenerationHold { file: Arc::clone(self), byte });
        let held = table.held.entry(byte).or_default();
        held.live += 1;
        held.newest = Arc::downgrade(&hold);
        Ok(hold)
    }

    /// Keeps everybody from holding a generation, without waiting, or says who holds it. To be taken before the
    /// keystore says that the generation is gone, and kept until that is durable.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    pub(crate) fn try_destroy(self: &Arc<Self>, key: &Record) -> Result<Result<Destroying, Holder>> {
        self.check_fork()?;
        let byte = generation_byte(key);
        let mut table = self.table();
        // Asked first: our own lock would not be in the way, it would become an exclusive one.
        if table.held.contains_key(&byte) || table.owned.contains(&byte) {
            return Ok(Err(Holder::ThisProcess));
        }
        Ok(self.try_own(&mut table, byte)?.map(Destroying).ok_or(Holder::AnotherProcess))
    }

    /// As [`LockFile::try_destroy`], but holds of this process are not in the way: the caller refuses those who have them.
    ///
    /// # Errors
    /// As [`LockFile::try_destroy`].
    pub(crate) fn try_take_from_others(self: &Arc<Self>, key: &Record) -> Result<Result<Destroying, Holder>> {
        self.check_fork()?;
        let mut table = self.table();
        let byte = generation_byte(key);
        if table.owned.contains(&byte) {
            return Ok(Err(Holder::ThisProcess));
        }
        // A shared lock of our own becomes an exclusive one, in one step.
        Ok(self.try_own(&mut table, byte)?.map(Destroying).ok_or(Holder::AnotherProcess))
    }

    /// Makes the caller the one who writes a page file; `None` if somebody does already, here or elsewhere.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Forked`].
    pub(crate) fn try_own_file(self: &Arc<Self>, database: DatabaseId, file: FileId) -> Result<Option<FileOwner>> {
        self.check_fork()?;
        Ok(self.try_own(&mut self.table(), file_byte(database, file))?.map(FileOwner))
    }

    /// Whether a process may have ended in the middle of a change. To be called under a guard of [`LockFile::change`]
    /// or [`LockFile::look`].
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn is_dirty(&self) -> Result<bool> {
        let mut mark = [CLEAN];
        match self.file.read_exact_at(&mut mark, DIRTY_AT) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(error) => Err(Error::io(format!("reading {}", self.path.display()), error)),
            Ok(()) => Ok(mark != [CLEAN]),
        }
    }

    /// Marks that a change begins (`true`) or is complete. To be called under a guard of [`LockFile::change`].
    ///
    /// Not synced, because the mark has to outlive a process, not the machine: after a restart nobody reads what the
    /// kernel had and the disk has not, which is what the mark is about.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn set_dirty(&self, dirty: bool) -> Result<()> {
        let mark = if dirty { [DIRTY] } else { [CLEAN] };
        let written = self.file.write_all_at(&mark, DIRTY_AT);
        written.map_err(|error| Error::io(format!("writing {}", self.path.display()), error))
    }

    fn take_turn(&self, attempt: fn(&File, u64) -> io::Result<bool>, patience: Duration) -> Result<Turn<'_>> {
        self.check_fork()?;
        let begun = Instant::now();
        let turn = self.wait_for_threads(patience)?;
        self.wait_for(attempt, CHANGE, begun, patience)?;
        Ok(turn)
    }

    fn wait_for(
        &self,
        attempt: fn(&File, u64) -> io::Result<bool>,
        byte: u64,
        begun: Instant,
        patience: Duration,
    ) -> Result<()> {
        let mut pauses = Pauses::new();
        while !self.ask(attempt, byte)? {
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(self.busy_for("another process has", begun.elapsed(), "if it hangs, end it"));
            }
            std::thread::sleep(pauses.next().min(left));
        }
        Ok(())
    }

    fn wait_for_threads(&self, patience: Duration) -> Result<Turn<'_>> {
        let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_timeout_while(busy, patience, |busy| *busy);
        let (mut busy, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        if timeout.timed_out() {
            return Err(self.busy_for("other threads of this process have", patience, "try again"));
        }
        *busy = true;
        Ok(Turn(self))
    }

    fn busy_for(&self, who: &str, waited: Duration, advice: &str) -> Error {
        let cluster = self.path.parent().unwrap_or(&self.path).display();
        let message = format!("{who} been changing the keystore of {cluster} for {waited:.1?}; {advice}");
        Error::new(ErrorKind::InUse, message)
    }

    fn try_own(self: &Arc<Self>, table: &mut Table, byte: u64) -> Result<Option<OwnedByte>> {
        if table.owned.contains(&byte) || !self.ask(ofd::try_exclusive, byte)? {
            return Ok(None);
        }
        table.owned.insert(byte);
        Ok(Some(OwnedByte { file: Arc::clone(self), byte }))
    }

    /// What cannot be unlocked stays locked until the process ends. That keeps others out, and lets nobody in.
    fn unlock(&self, byte: u64) {
        let _ = self.file_with(byte).and_then(|file| ofd::unlock(file, byte));
    }

    fn ask(&self, lock: fn(&File, u64) -> io::Result<bool>, byte: u64) -> Result<bool> {
        self.file_with(byte).and_then(|file| lock(file, byte)).map_err(|error| self.failed(error))
    }

    /// The file whose byte this is. What is opened twice at once is closed again before anything of it is locked.
    fn file_with(&self, byte: u64) -> io::Result<&File> {
        if byte < FIRST_FILE {
            return Ok(&self.file);
        }
        let number = (byte % SPREAD_OVER as u64) as usize;
        if let Some(file) = self.spread[number].get() {
            return Ok(file);
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!(".{number}"));
        let file = open(Path::new(&path))?;
        Ok(self.spread[number].get_or_init(|| file))
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In a forked child the mutexes may be locked by threads that do not exist there: asked before each of them.
    fn check_fork(&self) -> Result<()> {
        if self.fork.forked() { Err(PageError::Forked.into()) } else { Ok(()) }
    }

    fn failed(&self, error: io::Error) -> Error {
        Error::io(format!("locking {}", self.path.display()), error)
    }
}

/// Not through a link: whoever may write the directory must not make us create or lock a file elsewhere.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    let file = options.custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    if file.metadata()?.is_file() {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidInput,
        "it is not a regular file; remove it while nobody has the cluster open",
    ))
}

/// Nobody else changes or reads the keystore as long as this lives.
#[must_use]
pub(crate) struct ChangeGuard<'a>(#[allow(dead_code)] Turn<'a>); // kept for its drop

/// Nobody changes the keystore as long as this lives.
#[must_use]
pub(crate) struct LookGuard<'a>(#[allow(dead_code)] Turn<'a>); // kept for its drop

/// The turn of one thread at byte 0, locked or about to be.
struct Turn<'a>(&'a LockFile);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if self.0.fork.forked() {
            return;
        }
        // Both under the mutex: the next thread's lock must not be freed by us.
        let mut busy = self.0.busy.lock().unwrap_or_else(PoisonError::into_inner);
        self.0.unlock(CHANGE);
        *busy = false;
        drop(busy);
        self.0.freed.notify_one();
    }
}

/// A generation that nobody can destroy: see [`LockFile::hold`].
#[must_use]
pub(crate) struct GenerationHold {
    file: Arc<LockFile>,
    byte: u64,
}

impl Drop for GenerationHold {
    fn drop(&mut self) {
        if self.file.fork.forked() {
            return;
        }
        let mut table = self.file.table();
        let Some(held) = table.held.get_mut(&self.byte) else { return };
        held.live -= 1;
        if held.live == 0 {
            table.held.remove(&self.byte);
            // Unless it is locked exclusively meanwhile: then its owner unlocks it.
            if !table.owned.contains(&self.byte) {
                self.file.unlock(self.byte);
            }
        }
    }
}

/// The right to send notifications: see [`LockFile::try_lease`].
#[must_use]
#[allow(dead_code)]
pub(crate) struct Lease(#[allow(dead_code)] OwnedByte); // kept for its drop

/// A generation that nobody can hold: see [`LockFile::try_destroy`].
#[must_use]
pub(crate) struct Destroying(#[allow(dead_code)] OwnedByte); // kept for its drop

/// The right to write a page file: see [`LockFile::try_own_file`].
#[must_use]
pub(crate) struct FileOwner(#[allow(dead_code)] OwnedByte); // kept for its drop

/// A byte locked exclusively, by one owner in this process.
struct OwnedByte {
    file: Arc<LockFile>,
    byte: u64,
}

impl Drop for OwnedByte {
    fn drop(&mut self) {
        if self.file.fork.forked() {
            return;
        }
        let mut table = self.file.table();
        table.owned.remove(&self.byte);
        if table.held.contains_key(&self.byte) {
            // Others here held it all the time; from an exclusive lock to a shared one there is always a way.
            let _ = self.file.ask(ofd::try_shared, self.byte);
        } else {
            self.file.unlock(self.byte);
        }
    }
}

/// Growing pauses, of different length in each process and thread, so that those who wait do not all ask at once.
struct Pauses {
    next: Duration,
    dice: u32,
}

impl Pauses {
    fn new() -> Self {
        static WAITS: AtomicU32 = AtomicU32::new(0);
        let dice = std::process::id().wrapping_mul(SPREAD as u32) ^ WAITS.fetch_add(1, Ordering::Relaxed);
        Self { next: SHORTEST_PAUSE, dice }
    }

    /// Between half and all of a pause that doubles.
    fn next(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(LONGEST_PAUSE);
        // Any old generator will do; its high bits are the good ones.
        self.dice = self.dice.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        pause / 2 + pause * (self.dice >> 24) / 512
    }
}

/// The byte of a generation: 4,096 and the number of its lock, which no other generation of the cluster has.
fn generation_byte(key: &Record) -> u64 {
    FIRST_GENERATION + u64::from(key.lock)
}

/// The byte of a page file: from 2^61 up, 2^61 of them, so never that of a generation. Within a database, files whose ids
/// differ in the low 61 bits have their own byte. Databases begin at random places, so that two meet as rarely as two random
/// numbers of 61 bits; two files that do share a byte cannot be written at once.
fn file_byte(database: DatabaseId, file: FileId) -> u64 {
    FIRST_FILE + scatter(database, file.get())
}

/// 61 bits, different for numbers whose low 61 bits differ: both steps can be undone.
fn scatter(database: DatabaseId, number: u64) -> u64 {
    let [a, b, c, d, e, f, g, h, ..] = database.to_bytes();
    (u64::from_le_bytes([a, b, c, d, e, f, g, h]) ^ number.wrapping_mul(SPREAD)) & (FIRST_FILE - 1)
}

/// Locked while the keystore is changed (exclusively) or read (shared).
const CHANGE: u64 = 0;
/// Locked by the one who sends notifications.
#[allow(dead_code)]
const LEASE: u64 = 1;
/// Locked, shared, by everybody who has the cluster open; exclusively by who puts another keystore in its place.
const OPEN: u64 = 2;
/// How many files hold the locks of page files. Part of what processes agree on: another number would let them lock
/// the same byte of different files.
const SPREAD_OVER: usize = 64;
/// Bytes below are for fixed purposes.
const FIRST_GENERATION: u64 = 4096;
/// The last byte of all is 2^62 - 1, well within the kernel's signed 64 bits.
const FIRST_FILE: u64 = 1 << 61;
/// Odd, so that multiplying loses nothing: 2^64 over the golden ratio.
const SPREAD: u64 = 0x9E37_79B9_7F4A_7C15;

/// Where the mark of [`LockFile::set_dirty`] lies. Locks on a byte and what it holds have nothing to do with each
/// other.
const DIRTY_AT: u64 = 0;
const CLEAN: u8 = 0;
const DIRTY: u8 = 1;

const SHORTEST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::process::{Command, Stdio};
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::format::record::tests::data_record;

    const AT_ONCE: Duration = Duration::ZERO;
    const SOON: Duration = Duration::from_secs(20);
    const DATABASE: DatabaseId = DatabaseId::from_bytes(*b"a database's id.");
    const CHILD: &str = "PAGESEAL_LOCKS_CHILD";

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("pageseal-locks-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir(&dir).unwrap();
            Self(dir)
        }

        fn open(&self) -> Arc<LockFile> {
            LockFile::open(&self.0.join("lock")).unwrap()
        }

        /// Two handles of one file, which are to each other as two processes are.
        fn two(name: &str) -> (Self, Arc<LockFile>, Arc<LockFile>) {
            let scratch = Self::new(name);
            let (ours, theirs) = (scratch.open(), scratch.open());
            (scratch, ours, theirs)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn in_use<T>(result: Result<T>) -> String {
        let error = result.err().expect("it must be refused");
        assert_eq!(error.kind(), ErrorKind::InUse);
        assert!(error.is_retryable());
        error.to_string()
    }

    /// The record of a generation of a database.
    fn key(generation: u32) -> Record {
        data_record(0x61, generation)
    }

    fn holder(locks: &Arc<LockFile>, generation: u32) -> Option<Holder> {
        locks.try_destroy(&key(generation)).unwrap().err()
    }

    #[test]
    fn who_waits_in_vain_for_another_process_is_told_how_long_and_what_to_do() {
        let (scratch, ours, theirs) = Scratch::two("patience");
        let guard = theirs.change(AT_ONCE).unwrap();
        let begun = Instant::now();
        let text = in_use(ours.change(Duration::from_millis(60)));
        assert!(begun.elapsed() >= Duration::from_millis(60));
        assert!(text.contains("another process") && text.contains("end it"), "{text}");
        assert!(text.contains(scratch.0.to_str().unwrap()) && text.contains("s; if it hangs"), "{text}");
        in_use(ours.look(AT_ONCE));
        drop(guard);
        drop(ours.change(AT_ONCE).unwrap());
    }

    #[test]
    fn who_puts_another_keystore_in_its_place_is_alone_with_the_cluster() {
        let (_scratch, ours, theirs) = Scratch::two("alone");
        theirs.join(AT_ONCE).unwrap();
        theirs.join(AT_ONCE).unwrap();
        assert!(!ours.try_be_alone().unwrap());
        drop(theirs);
        assert!(ours.try_be_alone().unwrap());
        let late = LockFile::open(&ours.path).unwrap();
        in_use(late.join(AT_ONCE));
        ours.join(AT_ONCE).unwrap();
        late.join(AT_ONCE).unwrap();
        assert!(!ours.try_be_alone().unwrap(), "two are in");
    }

    #[test]
    fn a_lock_file_is_not_followed_if_it_is_a_link_nor_waited_for_if_it_is_a_pipe() {
        let scratch = Scratch::new("link");
        let (path, target) = (scratch.0.join("lock"), scratch.0.join("elsewhere"));
        std::os::unix::fs::symlink(&target, &path).unwrap();
        assert_eq!(LockFile::open(&path).err().unwrap().kind(), ErrorKind::Io);
        assert!(!target.exists(), "a file was made behind a link");
        std::fs::remove_file(&path).unwrap();
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        assert_eq!(LockFile::open(&path).err().unwrap().kind(), ErrorKind::Io);
    }

    #[test]
    fn readers_of_the_keystore_share_it_and_keep_changes_out() {
        let (_scratch, ours, theirs) = Scratch::two("look");
        let reading = ours.look(AT_ONCE).unwrap();
        let also = theirs.look(AT_ONCE).unwrap();
        drop(reading);
        in_use(ours.change(AT_ONCE));
        drop(also);
        drop(ours.change(AT_ONCE).unwrap());
    }

    #[test]
    fn a_thread_waits_for_another_of_its_process_within_its_patience() {
        let (_scratch, ours, _) = Scratch::two("threads");
        let guard = ours.change(AT_ONCE).unwrap();
        let text = in_use(ours.change(Duration::from_millis(5)));
        assert!(text.contains("threads of this process"), "{text}");
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| ours.change(SOON).map(drop));
            std::thread::sleep(Duration::from_millis(20));
            drop(guard);
            waiting.join().unwrap().unwrap();
        });
    }

    #[test]
    fn one_thread_of_all_processes_changes_at_a_time() {
        let (_scratch, ours, theirs) = Scratch::two("one-at-a-time");
        let total = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for locks in [&ours, &ours, &theirs, &theirs] {
                let total = &total;
                scope.spawn(move || {
                    for _ in 0..200 {
                        let _guard = locks.change(SOON).unwrap();
                        let before = total.load(Ordering::Relaxed);
                        std::thread::yield_now();
                        total.store(before + 1, Ordering::Relaxed);
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 800);
    }

    #[test]
    fn one_of_all_has_the_lease_until_it_is_dropped() {
        let (_scratch, ours, theirs) = Scratch::two("lease");
        let lease = ours.try_lease().unwrap().unwrap();
        assert!(ours.try_lease().unwrap().is_none());
        assert!(theirs.try_lease().unwrap().is_none());
        drop(lease);
        let lease = theirs.try_lease().unwrap().unwrap();
        assert!(ours.try_lease().unwrap().is_none());
        drop(lease);
        assert!(ours.try_lease().unwrap().is_some());
    }

    #[test]
    fn a_generation_is_held_until_the_last_handle_of_the_last_process_is_dropped() {
        let (_scratch, ours, theirs) = Scratch::two("hold");
        let hold = ours.hold(&key(1)).unwrap();
        let again = ours.hold(&key(1)).unwrap();
        assert!(Arc::ptr_eq(&hold, &again));
        let elsewhere = theirs.hold(&key(1)).unwrap();
        drop(hold);
        assert_eq!(holder(&theirs, 1), Some(Holder::ThisProcess));
        drop(elsewhere);
        assert_eq!(holder(&theirs, 1), Some(Holder::AnotherProcess));
        assert_eq!(holder(&ours, 1), Some(Holder::ThisProcess));
        drop(again);
        assert_eq!(holder(&ours, 1), None);
        assert_eq!(holder(&theirs, 1), None);
    }

    #[test]
    fn a_generation_being_destroyed_is_held_by_nobody_and_others_are() {
        let (_scratch, ours, theirs) = Scratch::two("destroy");
        let _next = theirs.hold(&key(2)).unwrap();
        let destroying = ours.try_destroy(&key(1)).unwrap().unwrap();
        for locks in [&ours, &theirs] {
            let text = in_use(locks.hold(&key(1)));
            assert!(text.contains("generation 1 of database 6161"), "{text}");
            drop(locks.hold(&key(2)).unwrap());
        }
        assert_eq!(holder(&ours, 1), Some(Holder::ThisProcess));
        assert_eq!(holder(&theirs, 1), Some(Holder::AnotherProcess));
        assert_eq!(holder(&ours, 2), Some(Holder::AnotherProcess));
        drop(destroying);
        drop(ours.hold(&key(1)).unwrap());
        assert_eq!(holder(&theirs, 1), None);
    }

    #[test]
    fn a_generation_is_taken_from_other_processes_in_spite_of_holds_here_which_stay_locked_afterwards() {
        let (_scratch, ours, theirs) = Scratch::two("take");
        let take = || ours.try_take_from_others(&key(1)).unwrap();
        let (hold, other) = (ours.hold(&key(1)).unwrap(), theirs.hold(&key(1)).unwrap());
        assert_eq!(take().err(), Some(Holder::AnotherProcess));
        drop(other);
        let taken = take().expect("only this process holds it");
        in_use(theirs.hold(&key(1)));
        assert_eq!(take().err(), Some(Holder::ThisProcess));
        drop(taken);
        assert_eq!(holder(&theirs, 1), Some(Holder::AnotherProcess), "the hold lost its lock");
        // The hold may go first.
        let taken = take().expect("only this process holds it");
        drop(hold);
        in_use(theirs.hold(&key(1)));
        drop(taken);
        assert_eq!(holder(&theirs, 1), None, "nobody holds it any more");
    }

    #[test]
    fn a_hold_taken_while_the_last_one_is_dropped_stays() {
        let (_scratch, ours, theirs) = Scratch::two("hold-race");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let (ours, theirs) = (&ours, &theirs);
                scope.spawn(move || {
                    for _ in 0..5_000 {
                        let _hold = ours.hold(&key(1)).unwrap();
                        assert_eq!(holder(theirs, 1), Some(Holder::AnotherProcess));
                    }
                });
            }
        });
        assert_eq!(holder(&theirs, 1), None);
    }

    #[test]
    fn a_hold_whose_drop_comes_late_does_not_free_the_one_taken_meanwhile() {
        let (_scratch, ours, theirs) = Scratch::two("late-drop");
        let first = ours.hold(&key(1)).unwrap();
        // What a new holder finds while the last handle's drop waits for the mutex.
        ours.table().held.values_mut().for_each(|held| held.newest = Weak::new());
        let second = ours.hold(&key(1)).unwrap();
        drop(first);
        assert_eq!(holder(&theirs, 1), Some(Holder::AnotherProcess));
        assert_eq!(holder(&ours, 1), Some(Holder::ThisProcess));
        drop(second);
        assert_eq!(holder(&theirs, 1), None);
    }

    #[test]
    fn the_locks_of_generations_that_follow_each_other_are_one_lock() {
        let (scratch, ours, _) = Scratch::two("joined");
        let inode = std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(scratch.0.join("lock")).unwrap());
        let locks = || {
            let all = std::fs::read_to_string("/proc/locks").unwrap();
            all.lines().filter(|line| line.contains(&format!(":{inode} "))).count()
        };
        let held: Vec<_> = (1..=500).map(|lock| ours.hold(&Record { lock, ..key(1) }).unwrap()).collect();
        assert_eq!((held.len(), locks()), (500, 1));
        drop(held);
        assert_eq!(locks(), 0);
    }

    #[test]
    fn a_page_file_has_one_writer() {
        let (_scratch, ours, theirs) = Scratch::two("files");
        let (file, other) = (FileId::new(1), FileId::new(2));
        let writer = ours.try_own_file(DATABASE, file).unwrap().unwrap();
        assert!(ours.try_own_file(DATABASE, file).unwrap().is_none());
        assert!(theirs.try_own_file(DATABASE, file).unwrap().is_none());
        assert!(theirs.try_own_file(DATABASE, other).unwrap().is_some());
        // Generation 1 of the same database is something else.
        assert_eq!(holder(&theirs, 1), None);
        drop(writer);
        assert!(theirs.try_own_file(DATABASE, file).unwrap().is_some());
    }

    #[test]
    fn all_that_can_be_locked_has_a_byte_of_its_own_that_the_kernel_can_count() {
        let mut bytes = HashSet::from([CHANGE, LEASE, OPEN]);
        let mut count = bytes.len();
        for lock in (1..=5_000).chain(u32::MAX - 5_000..=u32::MAX) {
            bytes.insert(generation_byte(&Record { lock, ..key(1) }));
            count += 1;
        }
        // In the last one, file 1 comes first of all.
        let mut lowest = [0; 16];
        lowest[..8].copy_from_slice(&SPREAD.to_le_bytes());
        for database in [[0; 16], [0xff; 16], DATABASE.to_bytes(), lowest].map(DatabaseId::from_bytes) {
            for number in (1..=5_000).chain((1 << 24) - 5_000..1 << 24) {
                bytes.insert(file_byte(database, FileId::new(number)));
                bytes.insert(file_byte(database, FileId::new(number << 36)));
                bytes.insert(file_byte(database, FileId::new((1 << 61) - number)));
                count += 3;
            }
            bytes.insert(file_byte(database, FileId::new(u64::MAX << 40)));
            count += 1;
        }
        assert_eq!(bytes.len(), count);
        assert!(bytes.iter().all(|byte| *byte < i64::MAX as u64));
        let last = 2 * FIRST_FILE - 1;
        let (_scratch, ours, theirs) = Scratch::two("last-byte");
        assert!(ours.ask(ofd::try_exclusive, last).unwrap());
        assert!(!theirs.ask(ofd::try_shared, last).unwrap());
    }

    #[test]
    fn the_mark_of_a_change_outlives_the_handle_that_set_it() {
        let (scratch, ours, theirs) = Scratch::two("dirty");
        assert!(!ours.is_dirty().unwrap());
        ours.set_dirty(true).unwrap();
        drop(ours);
        assert!(theirs.is_dirty().unwrap());
        let later = scratch.open();
        assert!(later.is_dirty().unwrap());
        later.set_dirty(false).unwrap();
        assert!(!theirs.is_dirty().unwrap());
    }

    #[test]
    fn a_forked_child_is_refused_and_frees_nothing_of_its_parents() {
        let name = "a_forked_child_is_refused_and_frees_nothing_of_its_parents";
        // In a process of its own: for a moment, the child has all descriptors that other tests think they closed.
        let scratch = Scratch::new("fork");
        if std::env::var_os(CHILD).is_none() {
            let output = test_again(name, &scratch.0.join("lock")).output().unwrap();
            return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let (ours, theirs) = (scratch.open(), scratch.open());
        let guards =
            || (ours.change(AT_ONCE).unwrap(), ours.hold(&key(1)).unwrap(), ours.try_lease().unwrap().unwrap());
        let mut guards = Some(guards());
        let table = ours.table(); // as another thread may have it at a fork
        assert!(ofd::in_forked_child(|| {
            let forked = |error: Option<Error>| error.is_some_and(|error| error.kind() == ErrorKind::Forked);
            let refused = forked(ours.change(AT_ONCE).err())
                && forked(ours.look(AT_ONCE).err())
                && forked(ours.try_lease().err())
                && forked(ours.hold(&key(1)).err())
                && forked(ours.try_destroy(&key(1)).err())
                && forked(ours.try_own_file(DATABASE, FileId::new(1)).err());
            drop(guards.take());
            refused
        }));
        drop(table);
        in_use(theirs.change(AT_ONCE));
        assert_eq!(holder(&theirs, 1), Some(Holder::AnotherProcess));
        assert!(theirs.try_lease().unwrap().is_none());
        drop(guards);
        drop(theirs.change(AT_ONCE).unwrap());
        assert_eq!(holder(&theirs, 1), None);
        assert!(theirs.try_lease().unwrap().is_some());
    }

    #[test]
    fn a_killed_process_keeps_nobody_waiting() {
        let name = "a_killed_process_keeps_nobody_waiting";
        if let Some(path) = std::env::var_os(CHILD) {
            return hold_until_killed(&LockFile::open(Path::new(&path)).unwrap());
        }
        let scratch = Scratch::new("killed");
        let ours = scratch.open();
        let mut child = test_again(name, &ours.path).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains(CHILD)), "the child never had its locks");

        in_use(ours.change(AT_ONCE));
        assert_eq!(holder(&ours, 1), Some(Holder::AnotherProcess));
        child.kill().unwrap();
        child.wait().unwrap();
        let _guard = ours.change(AT_ONCE).unwrap();
        assert_eq!(holder(&ours, 1), None);
        assert!(ours.is_dirty().unwrap());
    }

    /// Runs one of these tests in another process, to which `path` is said in [`CHILD`].
    fn test_again(name: &str, path: &Path) -> Command {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", &format!("storage::locks::tests::{name}"), "--nocapture"]).env(CHILD, path);
        command
    }

    fn hold_until_killed(locks: &Arc<LockFile>) {
        let _guard = locks.change(SOON).unwrap();
        let _hold = locks.hold(&key(1)).unwrap();
        locks.set_dirty(true).unwrap();
        println!("{CHILD}");
        std::thread::sleep(SOON);
    }
}
