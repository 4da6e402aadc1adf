//! The file operations that durable state needs, behind a trait, so that tests decide which of them fails and where a
//! crash tears them.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// A file system. What is written is durable only when the operation says so; after any error, nothing is known about
/// what the failed operation left behind, and it must not be repeated: after a failed sync the kernel may call a page
/// clean that never reached the disk.
pub(crate) trait Disk: Send + Sync {
    /// Whether there is something at `path`.
    fn exists(&self, path: &Path) -> io::Result<bool>;

    /// The whole file, if it is no longer than `max`; [`io::ErrorKind::FileTooLarge`] before reading it otherwise.
    fn read(&self, path: &Path, max: u64) -> io::Result<Vec<u8>>;

    /// Makes a new file, in place of whatever lay at `path`, writes `bytes` and syncs them. The file's name is not synced.
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Moves a file over another within a directory, in one step. Not synced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Writes `bytes` at `at` of a file that must have `len` bytes, and syncs them: one write, one fdatasync, through one
    /// descriptor, because only that one is sure to learn of a failed write-back.
    fn write_at(&self, path: &Path, len: u64, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Puts a file with these bytes at `path`, whole or not at all, durably.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let beside = beside(path);
        self.write_new(&beside, bytes)?;
        self.rename(&beside, path)?;
        self.sync_dir(path.parent().unwrap_or(Path::new("")))
    }
}

/// Where a file is written before it takes its name: `NAME.tmp`.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// The operating system's files.
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn exists(&self, path: &Path) -> io::Result<bool> {
        // Not `try_exists`: a dangling link is something that must not be overwritten, too.
        match fs::symlink_metadata(path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn read(&self, path: &Path, max: u64) -> io::Result<Vec<u8>> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file"));
        }
        if metadata.len() > max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // The file may grow while it is read: bounded again.
        let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
        let read = file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
        if read as u64 > max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        // Removed and made anew, so that the left-over of a crash lends neither its mode nor, if it is a link, its target.
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        File::open(dir)?.sync_all()
    }

    fn write_at(&self, path: &Path, len: u64, at: u64, bytes: &[u8]) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        if file.metadata()?.len() != len {
            return Err(io::Error::other("somebody else changed the file's length"));
        }
        file.write_all_at(bytes, at)?;
        file.sync_data()
    }
}

/// Makes a directory and those above it, with mode 0700, each durable in the one above.
pub(crate) fn make_directories(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let above = path.parent().filter(|above| !above.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_directories(above)?;
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    File::open(above)?.sync_all()
}

#[cfg(test)]
pub(crate) mod faulty {
    //! A disk in memory that fails where it is told to, and shows every state that a crash can leave.

    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::Mutex;

    use super::*;

    const SECTOR: usize = 512;

    /// What happens at the step that is counted down to. A write and its sync are two steps.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) enum Fault {
        /// This step fails, the following ones work.
        Once,
        /// This step and all following ones fail.
        Forever,
        /// The machine stops in this step; all following ones fail.
        Crash,
    }

    /// A deliberate mistake, to see that the tests would notice it.
    #[derive(Clone, Copy, PartialEq, Eq, Debug)]
    pub(crate) enum Broken {
        No,
        /// New files are renamed without having been synced.
        NewFilesAreNotSynced,
        /// What was written once is not written again.
        IgnoresOverwrites,
        /// `write_at` does not sync.
        AppendsAreNotSynced,
    }

    /// A file: what programs see, what is on the disk for sure, and which sectors the next sync will write. After a failed
    /// sync a sector is not dirty any more, though the disk may not have it; so Linux does it.
    #[derive(Clone, Default)]
    struct Inode {
        seen: Vec<u8>,
        durable: Vec<u8>,
        dirty: BTreeSet<usize>,
    }

    #[derive(Default)]
    struct State {
        inodes: Vec<Inode>,
        names: BTreeMap<PathBuf, usize>,
        durable_names: BTreeMap<PathBuf, usize>,
        steps: usize,
        fault: Option<(usize, Fault)>,
        bytes_written: usize,
    }

    pub(crate) struct FaultyDisk {
        state: Mutex<State>,
        broken: Broken,
    }

    impl FaultyDisk {
        pub(crate) fn new(broken: Broken) -> Self {
            Self { state: Mutex::default(), broken }
        }

        /// A disk that holds one file, durably.
        pub(crate) fn with_file(path: &Path, bytes: &[u8], broken: Broken) -> Self {
            let disk = Self::new(broken);
            disk.with(|state| {
                state.inodes.push(Inode { seen: bytes.to_vec(), durable: bytes.to_vec(), dirty: BTreeSet::new() });
                state.names.insert(path.to_owned(), 0);
                state.durable_names = state.names.clone();
            });
            disk
        }

        /// From here on, the `at`th step (from 0) has this fault.
        pub(crate) fn arm(&self, at: usize, fault: Fault) {
            self.with(|state| {
                state.steps = 0;
                state.fault = Some((at, fault));
            });
        }

        /// No more faults.
        pub(crate) fn heal(&self) {
            self.with(|state| state.fault = None);
        }

        /// The number of steps since [`FaultyDisk::arm`].
        pub(crate) fn steps(&self) -> usize {
            self.with(|state| state.steps)
        }

        pub(crate) fn bytes_written(&self) -> usize {
            self.with(|state| state.bytes_written)
        }

        /// What a program sees at `path` now.
        pub(crate) fn seen(&self, path: &Path) -> Option<Vec<u8>> {
            self.with(|state| state.names.get(path).map(|&inode| state.inodes[inode].seen.clone()))
        }

        /// Every file that may lie at `path` after a crash now: with the old or the new names, and of each sector that
        /// differs the old or the new bytes, and any length between the old and the new.
        pub(crate) fn after_crash(&self, path: &Path) -> BTreeSet<Option<Vec<u8>>> {
            self.with(|state| {
                let mut images = BTreeSet::new();
                for names in [&state.names, &state.durable_names] {
                    match names.get(path) {
                        None => {
                            images.insert(None);
                        }
                        Some(&inode) => images.extend(state.inodes[inode].after_crash().into_iter().map(Some)),
                    }
                }
                images
            })
        }

        fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
            f(&mut self.state.lock().unwrap())
        }
    }

    impl Inode {
        fn after_crash(&self) -> Vec<Vec<u8>> {
            let sectors = self.seen.len().max(self.durable.len()).div_ceil(SECTOR);
            let differing: Vec<_> =
                (0..sectors).filter(|&at| sector(&self.seen, at) != sector(&self.durable, at)).collect();
            assert!(differing.len() <= 12, "too many states to try: {differing:?}");
            let (short, long) = (self.durable.len().min(self.seen.len()), self.durable.len().max(self.seen.len()));
            let mut lengths: Vec<_> = (short..long).filter(|len| len.is_multiple_of(SECTOR)).collect();
            lengths.extend([short, long]);
            let mut images = Vec::new();
            for chosen in 0..1u32 << differing.len() {
                let mut image = self.durable.clone();
                image.resize(long, 0);
                for (bit, &at) in differing.iter().enumerate() {
                    if chosen >> bit & 1 == 1 {
                        copy_sector(&self.seen, &mut image, at);
                    }
                }
                images.extend(lengths.iter().map(|&len| image[..len].to_vec()));
            }
            images
        }

        fn write(&mut self, at: usize, bytes: &[u8]) {
            let end = at + bytes.len();
            self.seen.resize(self.seen.len().max(end), 0);
            self.seen[at..end].copy_from_slice(bytes);
            self.dirty.extend(at / SECTOR..end.div_ceil(SECTOR));
        }

        fn sync(&mut self) {
            self.durable.resize(self.seen.len(), 0);
            for at in std::mem::take(&mut self.dirty) {
                copy_sector(&self.seen, &mut self.durable, at);
            }
        }
    }

    fn sector(bytes: &[u8], at: usize) -> &[u8] {
        let end = bytes.len().min((at + 1) * SECTOR);
        bytes.get(at * SECTOR..end).unwrap_or_default()
    }

    fn copy_sector(from: &[u8], to: &mut [u8], at: usize) {
        let bytes = sector(from, at);
        to[at * SECTOR..at * SECTOR + bytes.len()].copy_from_slice(bytes);
    }

    impl State {
        /// Counts a step. An error means that it fails, and `Crash` that it may have been half done.
        fn step(&mut self) -> Result<(), Fault> {
            let now = self.steps;
            self.steps += 1;
            match self.fault {
                Some((at, fault)) if now == at => Err(fault),
                Some((at, Fault::Forever | Fault::Crash)) if now > at => Err(Fault::Forever),
                _ => Ok(()),
            }
        }

        fn find(&self, path: &Path) -> io::Result<usize> {
            self.names.get(path).copied().ok_or(io::ErrorKind::NotFound.into())
        }

        fn write(&mut self, inode: usize, at: usize, bytes: &[u8]) -> io::Result<()> {
            let (done, outcome) = match self.step() {
                Ok(()) => (bytes.len(), Ok(())),
                // All of it: which sectors the disk got is decided by `after_crash`.
                Err(Fault::Crash) => (bytes.len(), Err(injected())),
                // A short write, as a full disk makes it.
                Err(Fault::Once) => (bytes.len() / 2, Err(injected())),
                Err(Fault::Forever) => (0, Err(injected())),
            };
            self.inodes[inode].write(at, &bytes[..done]);
            self.bytes_written += done;
            outcome
        }

        fn sync(&mut self, inode: usize) -> io::Result<()> {
            match self.step() {
                Ok(()) => {
                    self.inodes[inode].sync();
                    Ok(())
                }
                Err(Fault::Crash) => Err(injected()),
                Err(_) => {
                    self.inodes[inode].dirty.clear();
                    Err(injected())
                }
            }
        }
    }

    fn injected() -> io::Error {
        io::Error::other("injected failure")
    }

    impl Disk for FaultyDisk {
        fn exists(&self, path: &Path) -> io::Result<bool> {
            self.with(|state| {
                state.step().map_err(|_| injected())?;
                Ok(state.names.contains_key(path))
            })
        }

        fn read(&self, path: &Path, max: u64) -> io::Result<Vec<u8>> {
            self.with(|state| {
                state.step().map_err(|_| injected())?;
                let bytes = state.inodes[state.find(path)?].seen.clone();
                if bytes.len() as u64 > max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
            })
        }

        fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
            self.with(|state| {
                state.step().map_err(|_| injected())?;
                let inode = state.inodes.len();
                state.inodes.push(Inode::default());
                state.names.insert(path.to_owned(), inode);
                state.write(inode, 0, bytes)?;
                if self.broken == Broken::NewFilesAreNotSynced { Ok(()) } else { state.sync(inode) }
            })
        }

        fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
            self.with(|state| {
                let outcome = state.step();
                if !matches!(outcome, Ok(()) | Err(Fault::Crash)) {
                    return Err(injected());
                }
                let inode = state.find(from)?;
                state.names.remove(from);
                state.names.insert(to.to_owned(), inode);
                outcome.map_err(|_| injected())
            })
        }

        fn sync_dir(&self, _: &Path) -> io::Result<()> {
            self.with(|state| {
                state.step().map_err(|_| injected())?;
                state.durable_names = state.names.clone();
                Ok(())
            })
        }

        fn write_at(&self, path: &Path, len: u64, at: u64, bytes: &[u8]) -> io::Result<()> {
            self.with(|state| {
                let inode = state.find(path)?;
                if state.inodes[inode].seen.len() as u64 != len {
                    return Err(io::Error::other("somebody else changed the file's length"));
                }
                if self.broken == Broken::IgnoresOverwrites && at < len {
                    return Ok(());
                }
                state.write(inode, usize::try_from(at).unwrap(), bytes)?;
                if self.broken == Broken::AppendsAreNotSynced { Ok(()) } else { state.sync(inode) }
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of this test's own, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("pageseal-disk-{name}-{}", std::process::id()));
            fs::create_dir_all(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_file_is_replaced_whole_and_leaves_nothing_beside_it() {
        let scratch = Scratch::new("replace");
        let path = scratch.0.join("file");
        fs::write(beside(&path), b"left over from a crash, and longer").unwrap();
        RealDisk.replace(&path, b"old").unwrap();
        RealDisk.replace(&path, b"new").unwrap();
        assert_eq!(RealDisk.read(&path, 3).unwrap(), b"new");
        assert!(!RealDisk.exists(&beside(&path)).unwrap());
    }

    #[test]
    fn the_left_over_of_a_crash_is_not_followed_if_it_is_a_link() {
        let scratch = Scratch::new("link");
        let (path, victim) = (scratch.0.join("file"), scratch.0.join("victim"));
        fs::write(&victim, b"precious").unwrap();
        std::os::unix::fs::symlink(&victim, beside(&path)).unwrap();
        RealDisk.replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
        assert_eq!(fs::read(&path).unwrap(), b"new");
    }

    #[test]
    fn a_file_longer_than_the_bound_is_not_read() {
        let scratch = Scratch::new("bound");
        let path = scratch.0.join("file");
        File::create(&path).unwrap().set_len(1 << 40).unwrap();
        assert_eq!(RealDisk.read(&path, 1 << 30).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(RealDisk.read(&scratch.0, 1 << 30).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        assert_eq!(RealDisk.read(&scratch.0.join("none"), 1).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_file_that_somebody_else_lengthened_is_not_written() {
        let scratch = Scratch::new("length");
        let path = scratch.0.join("file");
        fs::write(&path, b"abcd").unwrap();
        assert!(RealDisk.write_at(&path, 3, 3, b"xy").is_err());
        RealDisk.write_at(&path, 4, 3, b"xy").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcxy");
    }
}
