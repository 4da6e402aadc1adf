//! [`KeystoreStore`]: where a keystore lies. Two copies, read whole, appended to and replaced by compare-and-swap.
//!
//! [`FileStore`] keeps them in two files of the cluster's directory. An object store can hold them later: what is asked of
//! it is a version for each object, and writes that fail if the version is another one.

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::{Error, Result};
use crate::format::keystore::Operation;
use crate::keys::chain::MAX_FILE_LEN;
use crate::storage::disk::{Disk, Stat, beside};
use crate::storage::locks::LockFile;

/// The names of the two copies. They have the same bytes.
pub(crate) const FILE_NAMES: [&str; 2] = ["keystore", "keystore.copy"];
/// So much may be written to the second copy without a sync before it is synced all the same.
const MOST_UNSYNCED: usize = 64 * 1024;

/// Which state of a copy was read or written. Equal versions have equal bytes.
pub(crate) type Version = Stat;

/// The versions of both copies; `None` for one that is missing.
pub(crate) type Versions = [Option<Version>; 2];

/// How durable an append must be when it returns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Durability {
    /// In one copy: the change can be made again, or its loss does no harm.
    One,
    /// In both: it adds a key, or somebody who needs one.
    Both,
}

impl Durability {
    /// What a change needs. Part of the format: whoever reads a change knows from this whether both copies had it when it was
    /// acknowledged.
    pub(crate) fn of(change: &[Operation]) -> Self {
        use Operation::{KeyUseRaise, KeyUseRelease, Rename};
        let in_one =
            |operation: &Operation| matches!(operation, Rename { .. } | KeyUseRaise { .. } | KeyUseRelease { .. });
        if change.iter().all(in_one) { Self::One } else { Self::Both }
    }
}

/// Why a copy is kept aside. Each has names of its own.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Aside {
    /// It was damaged, and made anew from the other copy.
    Damaged,
    /// An import put another keystore in its place, which may lack keys that it has.
    Replaced,
}

impl Aside {
    /// What its files are called, up to the numbers.
    fn prefix(self) -> &'static str {
        match self {
            Self::Damaged => "keystore.damaged-",
            Self::Replaced => "keystore.replaced-",
        }
    }

    /// Whether this is one of its files.
    fn kept(self, path: &Path) -> bool {
        path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with(self.prefix()))
    }
}

/// Two copies of a keystore. What is read is believed only after its MACs.
///
/// The caller keeps changes apart (a lock on the cluster, or the store's own compare-and-swap).
pub(crate) trait KeystoreStore: Send + Sync {
    /// What the copy is called in messages.
    fn name(&self, copy: usize) -> String;

    /// The versions of both, without reading them.
    fn versions(&self) -> io::Result<Versions>;

    /// One copy, whole, and its version. `None` if it is missing. If [`is_about_the_copy`] is true of the error, the other
    /// one may be readable.
    fn read(&self, copy: usize) -> io::Result<Option<(Version, Vec<u8>)>>;

    /// The copy's version, if it has just these bytes. `None` if not, or if that cannot be told: then it is read.
    fn holds(&self, copy: usize, bytes: &[u8]) -> Option<Version>;

    /// What the first copy has from byte `at` on.
    fn read_from(&self, at: u64) -> io::Result<Vec<u8>>;

    /// Makes both copies where there is none.
    fn create(&self, bytes: &[u8]) -> io::Result<Versions>;

    /// Adds to both copies, which must still be `expected`.
    fn append(&self, expected: &Versions, bytes: &[u8], durability: Durability) -> io::Result<Versions>;

    /// Puts these bytes in the place of both copies, which must still be `expected`: each whole or not at all, and durably.
    fn replace(&self, expected: &Versions, bytes: &[u8]) -> io::Result<Versions>;

    /// Keeps the bytes of a copy that goes, for whoever wants to know what was in it.
    fn keep_aside(&self, bytes: &[u8], why: Aside, number: u64) -> io::Result<()>;

    /// Gives a copy that cannot be read another name; there is no such copy then.
    fn move_aside(&self, copy: usize, why: Aside, number: u64) -> io::Result<()>;

    /// Removes what may still hold an older state: what was kept of damaged copies, and the left-overs of crashes. Not what
    /// an import replaced: it may hold keys that are nowhere else.
    fn remove_strays(&self) -> io::Result<()>;

    /// Whether somebody began to write and did not come to the end: then what is read may not be durable.
    fn is_unfinished(&self) -> Result<bool>;
}

/// The two files of a cluster's directory.
pub(crate) struct FileStore {
    disk: Arc<dyn Disk>,
    directory: PathBuf,
    paths: [PathBuf; 2],
    locks: Arc<LockFile>,
    unsynced: Mutex<Unsynced>,
}

/// What was appended to the second copy since its last sync: written again with the next change that syncs it, because a
/// write-back that failed meanwhile may be reported to nobody.
#[derive(Default)]
struct Unsynced {
    /// The copy as it was left. If another process appended since, that one answers for its bytes.
    left: Option<Version>,
    bytes: Vec<u8>,
}

impl Unsynced {
    fn add(&mut self, copy: Version, bytes: &[u8]) {
        if self.left != Some(copy) {
            self.bytes.clear();
        }
        self.bytes.extend_from_slice(bytes);
        self.left = Some(grown(copy, bytes));
    }
}

fn grown(version: Version, bytes: &[u8]) -> Version {
    Version { len: version.len + bytes.len() as u64, ..version }
}

impl FileStore {
    pub(crate) fn new(disk: Arc<dyn Disk>, directory: &Path, locks: Arc<LockFile>) -> Self {
        let paths = FILE_NAMES.map(|name| directory.join(name));
        Self { disk, directory: directory.to_path_buf(), paths, locks, unsynced: Mutex::default() }
    }

    /// Does `write`, between two marks in the lock file: if it does not come to its end, the next one who changes the
    /// keystore writes both files anew.
    fn marked<R>(&self, write: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        self.locks.set_dirty(true).map_err(io::Error::other)?;
        let written = write()?;
        self.locks.set_dirty(false).map_err(io::Error::other)?;
        Ok(written)
    }

    /// The names under which a copy may be kept aside, in the order in which they are taken.
    fn names_aside(&self, why: Aside, number: u64) -> impl Iterator<Item = PathBuf> {
        (1..=u32::MAX).map(move |again| self.directory.join(format!("{}{number}-{again}", why.prefix())))
    }

    /// The files that were kept aside for this reason.
    pub(crate) fn kept(&self, why: Aside) -> io::Result<Vec<PathBuf>> {
        Ok(self.disk.list(&self.directory)?.into_iter().filter(|path| why.kept(path)).collect())
    }

    fn expect(&self, expected: &Versions) -> io::Result<()> {
        if self.versions()? == *expected {
            return Ok(());
        }
        Err(io::Error::other("somebody else changed the keystore, without taking its lock"))
    }
}

/// Whether reading a copy failed because of what lies there, and not because this process lacks something that reading the
/// other copy needs, too.
pub(crate) fn is_about_the_copy(error: &io::Error) -> bool {
    match error.raw_os_error() {
        Some(code) => [libc::EIO, libc::EUCLEAN, libc::EBADMSG, libc::ENODATA, libc::EISDIR].contains(&code),
        // Our own: it is longer than a keystore can be, or no plain file.
        None => matches!(error.kind(), io::ErrorKind::FileTooLarge | io::ErrorKind::InvalidInput),
    }
}

fn no_name_left() -> io::Error {
    io::Error::other("too many files were kept aside; move them away")
}

fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "a copy of the keystore is missing")
}

impl KeystoreStore for FileStore {
    fn name(&self, copy: usize) -> String {
        self.paths[copy].display().to_string()
    }

    fn versions(&self) -> io::Result<Versions> {
        Ok([self.disk.stat(&self.paths[0])?, self.disk.stat(&self.paths[1])?])
    }

    fn read(&self, copy: usize) -> io::Result<Option<(Version, Vec<u8>)>> {
        let path = &self.paths[copy];
        let Some(version) = self.disk.stat(path)? else { return Ok(None) };
        let bytes = self.disk.read(path, MAX_FILE_LEN as u64)?;
        // A file that grows meanwhile is read up to where it was.
        Ok(Some((Version { len: bytes.len() as u64, ..version }, bytes)))
    }

    fn holds(&self, copy: usize, bytes: &[u8]) -> Option<Version> {
        let path = &self.paths[copy];
        let version = self.disk.stat(path).ok()??;
        self.disk.holds(path, bytes).is_ok_and(|same| same).then_some(Version { len: bytes.len() as u64, ..version })
    }

    fn read_from(&self, at: u64) -> io::Result<Vec<u8>> {
        self.disk.read_from(&self.paths[0], at, MAX_FILE_LEN as u64)
    }

    fn create(&self, bytes: &[u8]) -> io::Result<Versions> {
        if self.versions()?.iter().any(Option::is_some) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.replace(&[None, None], bytes)
    }

    fn append(&self, expected: &Versions, bytes: &[u8], durability: Durability) -> io::Result<Versions> {
        let [Some(first), Some(second)] = *expected else { return Err(missing()) };
        let mut unsynced = self.unsynced.lock().unwrap_or_else(PoisonError::into_inner);
        self.marked(|| {
            self.disk.write_at(&self.paths[0], first, first.len, bytes, true)?;
            unsynced.add(second, bytes);
            if durability == Durability::One && unsynced.bytes.len() <= MOST_UNSYNCED {
                return self.disk.write_at(&self.paths[1], second, second.len, bytes, false);
            }
            let at = grown(second, bytes).len - unsynced.bytes.len() as u64;
            self.disk.write_at(&self.paths[1], second, at, &unsynced.bytes, true)?;
            *unsynced = Unsynced::default();
            Ok(())
        })?;
        Ok([Some(grown(first, bytes)), Some(grown(second, bytes))])
    }

    fn replace(&self, expected: &Versions, bytes: &[u8]) -> io::Result<Versions> {
        self.expect(expected)?;
        self.marked(|| {
            self.disk.replace(&self.paths[0], bytes)?;
            self.disk.replace(&self.paths[1], bytes)
        })?;
        *self.unsynced.lock().unwrap_or_else(PoisonError::into_inner) = Unsynced::default();
        self.versions()
    }

    fn keep_aside(&self, bytes: &[u8], why: Aside, number: u64) -> io::Result<()> {
        // Under a name of its own: what was kept earlier is not replaced.
        for path in self.names_aside(why, number) {
            if !self.disk.exists(&path)? {
                self.disk.write_new(&path, bytes)?;
                return self.disk.sync_dir(&self.directory);
            }
            // What was moved there may be unreadable; then it has other bytes.
            if self.disk.read(&path, MAX_FILE_LEN as u64).is_ok_and(|kept| kept == bytes) {
                return Ok(());
            }
        }
        Err(no_name_left())
    }

    fn move_aside(&self, copy: usize, why: Aside, number: u64) -> io::Result<()> {
        for path in self.names_aside(why, number) {
            if !self.disk.exists(&path)? {
                self.disk.rename(&self.paths[copy], &path)?;
                return self.disk.sync_dir(&self.directory);
            }
        }
        Err(no_name_left())
    }

    fn remove_strays(&self) -> io::Result<()> {
        let is_left_over = |path: &PathBuf| self.paths.iter().any(|copy| *path == beside(copy));
        let is_stray = |path: &PathBuf| Aside::Damaged.kept(path) || is_left_over(path);
        let strays: Vec<_> = self.disk.list(&self.directory)?.into_iter().filter(is_stray).collect();
        if strays.is_empty() {
            return Ok(());
        }
        strays.iter().try_for_each(|path| self.disk.remove(path))?;
        self.disk.sync_dir(&self.directory)
    }

    fn is_unfinished(&self) -> Result<bool> {
        self.locks.is_dirty()
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FileStore").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Both copies in memory.
#[cfg(any(test, feature = "test-util"))]
type Copies = [Option<(Version, Vec<u8>)>; 2];

/// A store in memory, for tests and fuzz targets.
#[cfg(any(test, feature = "test-util"))]
#[derive(Default)]
pub(crate) struct MemoryStore {
    copies: Mutex<Copies>,
}

#[cfg(any(test, feature = "test-util"))]
impl MemoryStore {
    /// A store with these copies.
    pub(crate) fn with(copies: [Option<Vec<u8>>; 2]) -> Self {
        let version = |bytes: &Vec<u8>| Version { file: 1, len: bytes.len() as u64 };
        Self { copies: Mutex::new(copies.map(|copy| copy.map(|bytes| (version(&bytes), bytes)))) }
    }

    fn copies(&self) -> std::sync::MutexGuard<'_, Copies> {
        self.copies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn expect(&self, expected: &Versions) -> io::Result<()> {
        if self.versions()? == *expected { Ok(()) } else { Err(io::Error::other("another version is there")) }
    }
}

#[cfg(any(test, feature = "test-util"))]
impl KeystoreStore for MemoryStore {
    fn name(&self, copy: usize) -> String {
        format!("in memory, copy {copy}")
    }

    fn versions(&self) -> io::Result<Versions> {
        Ok(self.copies().each_ref().map(|copy| copy.as_ref().map(|(version, _)| *version)))
    }

    fn read(&self, copy: usize) -> io::Result<Option<(Version, Vec<u8>)>> {
        Ok(self.copies()[copy].clone())
    }

    fn holds(&self, copy: usize, bytes: &[u8]) -> Option<Version> {
        let copies = self.copies();
        copies[copy].as_ref().filter(|(_, there)| there == bytes).map(|(version, _)| *version)
    }

    fn read_from(&self, at: u64) -> io::Result<Vec<u8>> {
        let first = self.read(0)?.ok_or_else(missing)?.1;
        Ok(usize::try_from(at).ok().and_then(|at| first.get(at..)).unwrap_or_default().to_vec())
    }

    fn create(&self, bytes: &[u8]) -> io::Result<Versions> {
        self.replace(&[None, None], bytes)
    }

    fn append(&self, expected: &Versions, bytes: &[u8], _: Durability) -> io::Result<Versions> {
        self.expect(expected)?;
        for (version, copy) in self.copies().iter_mut().flatten() {
            copy.extend_from_slice(bytes);
            version.len = copy.len() as u64;
        }
        self.versions()
    }

    fn replace(&self, expected: &Versions, bytes: &[u8]) -> io::Result<Versions> {
        self.expect(expected)?;
        for copy in self.copies().iter_mut() {
            let file = copy.as_ref().map_or(1, |(version, _)| version.file + 1);
            *copy = Some((Version { file, len: bytes.len() as u64 }, bytes.to_vec()));
        }
        self.versions()
    }

    fn keep_aside(&self, _: &[u8], _: Aside, _: u64) -> io::Result<()> {
        Ok(())
    }

    fn move_aside(&self, copy: usize, _: Aside, _: u64) -> io::Result<()> {
        self.copies()[copy] = None;
        Ok(())
    }

    fn remove_strays(&self) -> io::Result<()> {
        Ok(())
    }

    fn is_unfinished(&self) -> Result<bool> {
        Ok(false)
    }
}

/// An input or output operation on a keystore failed.
pub(crate) fn store_failed(doing: &str, name: &str, error: io::Error) -> Error {
    Error::io(format_args!("{doing} the keystore {name}"), error)
}
