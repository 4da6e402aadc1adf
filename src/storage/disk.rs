//! The file operations that durable state needs, behind a trait, so that tests decide which of them fails and where a
//! crash tears them.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

#[cfg(any(test, feature = "test-util"))]
#[cfg_attr(not(feature = "test-util"), allow(dead_code, unreachable_pub))] // exported by `testing` with the feature
pub(crate) mod simulated;

/// Which file lies at a path, and how long it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Stat {
    /// Another one for a file that was put in place of this one.
    pub(crate) file: u64,
    pub(crate) len: u64,
}

impl Stat {
    fn of(metadata: &Metadata) -> Self {
        // With the time of birth, where the file system keeps it: the number of a removed file is given again.
        let born = metadata.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let born = born.map_or(0, |since| since.as_secs().wrapping_mul(1 << 30) ^ u64::from(since.subsec_nanos()));
        Self { file: metadata.ino() ^ born.rotate_left(17), len: metadata.len() }
    }

    /// Refuses `found` if it is not this file, with this length.
    fn expect(self, found: Stat) -> io::Result<()> {
        if found.file != self.file {
            return Err(io::Error::other("somebody else replaced the file"));
        }
        if found.len != self.len {
            return Err(io::Error::other("somebody else changed the file's length"));
        }
        Ok(())
    }
}

/// A file system. What is written is durable only when the operation says so; after any error, nothing is known about
/// what the failed operation left behind, and it must not be repeated: after a failed sync the kernel may call a page
/// clean that never reached the disk.
pub(crate) trait Disk: Send + Sync {
    /// Which file lies at `path`, and how long it is; `None` if there is none. Links are followed; one that leads
    /// nowhere is something, too. Equal answers do not prove that nothing happened between: file systems round the time
    /// of birth.
    fn stat(&self, path: &Path) -> io::Result<Option<Stat>>;

    /// Whether there is something at `path`.
    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.stat(path)?.is_some())
    }

    /// The whole file, if it is no longer than `max`; [`io::ErrorKind::FileTooLarge`] before reading it otherwise.
    fn read(&self, path: &Path, max: u64) -> io::Result<Vec<u8>> {
        self.read_from(path, 0, max)
    }

    /// Whether the file has these bytes, and nothing else, read a piece at a time.
    fn holds(&self, path: &Path, bytes: &[u8]) -> io::Result<bool>;

    /// The file from `at` to its end, if that is no more than `max`; nothing if it ends before `at`.
    fn read_from(&self, path: &Path, at: u64, max: u64) -> io::Result<Vec<u8>>;

    /// Makes a new file, in place of whatever lay at `path`, writes `bytes` and syncs them. The file's name is not
    /// synced.
    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()>;

    /// Moves a file over another within a directory, in one step. Not synced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Makes the names in a directory durable: made, renamed and removed ones.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Writes `bytes` at `at` of the file that must be `expected`, and with `sync` makes them durable, with all that
    /// was written to this file before: one write, one fdatasync, through one descriptor, because only that one is sure
    /// to learn of a failed write-back. Without `sync`, nobody may ever learn of it.
    fn write_at(&self, path: &Path, expected: Stat, at: u64, bytes: &[u8], sync: bool) -> io::Result<()>;

    /// Removes a file, if there is one. Not synced.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// The paths of the files in a directory, sorted, without directories; none if there is no such directory.
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>>;

    /// Puts a file with these bytes at `path`, whole or not at all, durably.
    fn replace(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        let beside = beside(path);
        self.write_new(&beside, bytes)?;
        self.rename(&beside, path)?;
        self.sync_dir(directory_of(path))
    }
}

/// The directory that a file lies in; empty for the working directory.
pub(crate) fn directory_of(path: &Path) -> &Path {
    path.parent().unwrap_or(Path::new(""))
}

/// Where a file is written before it takes its name: `NAME.tmp`.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".tmp");
    name.into()
}

/// How much of a file is compared at a time: little enough to stay in the processor's cache.
const PIECE: usize = 64 * 1024;

/// Opens a plain file, without waiting for a writer if somebody put a pipe there, and says how long it is.
fn open_plain(path: &Path) -> io::Result<(File, u64)> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_file() {
        return Ok((file, metadata.len()));
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file"))
}

/// The operating system's files.
pub(crate) struct RealDisk;

impl Disk for RealDisk {
    fn stat(&self, path: &Path) -> io::Result<Option<Stat>> {
        let found = match fs::metadata(path) {
            // A dangling link is something that must not be overwritten, too.
            Err(error) if error.kind() == io::ErrorKind::NotFound => fs::symlink_metadata(path),
            found => found,
        };
        match found {
            Ok(metadata) => Ok(Some(Stat::of(&metadata))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn holds(&self, path: &Path, bytes: &[u8]) -> io::Result<bool> {
        let (mut file, len) = open_plain(path)?;
        if len != bytes.len() as u64 {
            return Ok(false);
        }
        let mut piece = vec![0; PIECE];
        for bytes in bytes.chunks(PIECE) {
            let piece = &mut piece[..bytes.len()];
            match file.read_exact(piece) {
                Ok(()) if *piece == *bytes => {}
                Ok(()) => return Ok(false),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn read_from(&self, path: &Path, at: u64, max: u64) -> io::Result<Vec<u8>> {
        let (mut file, len) = open_plain(path)?;
        let rest = len.saturating_sub(at);
        if rest > max {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        file.seek(SeekFrom::Start(at))?;
        // The file may grow while it is read: bounded again.
        let mut bytes = Vec::with_capacity(usize::try_from(rest).unwrap_or(0));
        let read = file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
        if read as u64 > max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(bytes) }
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        // Removed and made anew, so that the left-over of a crash lends neither its mode nor, if it is a link, its
        // target.
        self.remove(path)?;
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(or_working(dir))?.sync_all()
    }

    fn write_at(&self, path: &Path, expected: Stat, at: u64, bytes: &[u8], sync: bool) -> io::Result<()> {
        let file = OpenOptions::new().write(true).open(path)?;
        expected.expect(Stat::of(&file.metadata()?))?;
        file.write_all_at(bytes, at)?;
        if sync { file.sync_data() } else { Ok(()) }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = match fs::read_dir(or_working(dir)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut files = Vec::new();
        for entry in entries {
            let entry = entry?;
            if !entry.file_type()?.is_dir() {
                files.push(dir.join(entry.file_name()));
            }
        }
        files.sort();
        Ok(files)
    }
}

fn or_working(dir: &Path) -> &Path {
    if dir.as_os_str().is_empty() { Path::new(".") } else { dir }
}

/// Makes a directory and those above it, with mode 0700, each durable in the one above.
pub(crate) fn make_directories(path: &Path) -> io::Result<()> {
    make_directories_with(path, &|dir| File::open(dir)?.sync_all())
}

fn make_directories_with(path: &Path, sync: &dyn Fn(&Path) -> io::Result<()>) -> io::Result<()> {
    if path.is_dir() {
        // Who made it may have crashed before the sync; all above it was synced before it was made. `..`, because the
        // path may be a link or end in dots.
        return match sync(&path.join("..")) {
            // What we may not read, we did not make.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
            synced => synced,
        };
    }
    let above = or_working(directory_of(path));
    make_directories_with(above, sync)?;
    match DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    sync(above)
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
    fn a_file_holds_these_bytes_only_if_every_one_of_them_is_there_and_nothing_else() {
        let scratch = Scratch::new("holds");
        let path = scratch.0.join("file");
        let bytes: Vec<u8> = (0..2 * PIECE + 100).map(|at| (at % 251) as u8).collect();
        fs::write(&path, &bytes).unwrap();
        assert!(RealDisk.holds(&path, &bytes).unwrap());
        for at in [0, PIECE - 1, PIECE, 2 * PIECE, bytes.len() - 1] {
            let mut other = bytes.clone();
            other[at] ^= 1;
            assert!(!RealDisk.holds(&path, &other).unwrap(), "byte {at}");
        }
        for len in [0, PIECE, bytes.len() - 1] {
            assert!(!RealDisk.holds(&path, &bytes[..len]).unwrap(), "length {len}");
        }
        assert!(!RealDisk.holds(&path, &[&bytes[..], &[0]].concat()).unwrap());
        assert_eq!(RealDisk.holds(&scratch.0, &bytes).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_file_that_somebody_else_lengthened_is_not_written() {
        let scratch = Scratch::new("length");
        let path = scratch.0.join("file");
        fs::write(&path, b"abcd").unwrap();
        let stat = RealDisk.stat(&path).unwrap().unwrap();
        assert!(RealDisk.write_at(&path, Stat { len: 3, ..stat }, 3, b"xy", true).is_err());
        RealDisk.write_at(&path, stat, 3, b"xy", true).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"abcxy");
        RealDisk.write_at(&path, Stat { len: 5, ..stat }, 5, b"z", false).unwrap();
        assert_eq!(RealDisk.read_from(&path, 3, 3).unwrap(), b"xyz");
    }

    #[test]
    fn a_file_that_somebody_else_replaced_is_not_written() {
        let scratch = Scratch::new("replaced");
        let path = scratch.0.join("file");
        RealDisk.replace(&path, b"abcd").unwrap();
        let old = RealDisk.stat(&path).unwrap().unwrap();
        RealDisk.replace(&path, b"efgh").unwrap();
        let new = RealDisk.stat(&path).unwrap().unwrap();
        assert_ne!(old, new);
        assert!(RealDisk.write_at(&path, old, 0, b"x", true).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"efgh");
        RealDisk.write_at(&path, new, 0, b"x", true).unwrap();
    }

    #[test]
    fn a_file_that_takes_the_number_of_a_removed_one_is_another() {
        let scratch = Scratch::new("number");
        let path = scratch.0.join("file");
        fs::write(&path, b"a").unwrap();
        if fs::metadata(&path).unwrap().created().is_err() {
            return; // This file system keeps no time of birth.
        }
        let old = RealDisk.stat(&path).unwrap().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        fs::remove_file(&path).unwrap();
        fs::write(&path, b"b").unwrap();
        assert_ne!(old, RealDisk.stat(&path).unwrap().unwrap());
    }

    #[test]
    fn a_file_is_read_from_any_place_to_its_end() {
        let scratch = Scratch::new("from");
        let path = scratch.0.join("file");
        fs::write(&path, b"abcdef").unwrap();
        assert_eq!(RealDisk.read_from(&path, 4, 2).unwrap(), b"ef");
        assert_eq!(RealDisk.read_from(&path, 4, 1).unwrap_err().kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(RealDisk.read_from(&path, 7, 1).unwrap(), b"");
    }

    #[test]
    fn files_are_listed_and_removed_and_it_does_not_matter_if_they_are_gone() {
        let scratch = Scratch::new("list");
        let [one, two] = ["1", "2"].map(|name| scratch.0.join(name));
        fs::create_dir(scratch.0.join("directory")).unwrap();
        fs::write(&two, b"").unwrap();
        std::os::unix::fs::symlink("nowhere", &one).unwrap();
        assert!(RealDisk.exists(&one).unwrap());
        assert_eq!(RealDisk.list(&scratch.0).unwrap(), [one.clone(), two.clone()]);
        RealDisk.remove(&one).unwrap();
        RealDisk.remove(&one).unwrap();
        assert!(!RealDisk.exists(&one).unwrap());
        assert_eq!(RealDisk.list(&scratch.0).unwrap(), [two]);
        assert!(RealDisk.list(&scratch.0.join("none")).unwrap().is_empty());
    }

    #[test]
    fn a_directory_that_a_crashed_process_left_is_made_durable_too() {
        let scratch = Scratch::new("directories");
        let synced = std::sync::Mutex::new(Vec::new());
        let record = |dir: &Path| {
            synced.lock().unwrap().push(fs::canonicalize(dir)?);
            Ok(())
        };
        let root = fs::canonicalize(&scratch.0).unwrap();
        let (left, made) = (root.join("left"), root.join("left/made"));
        fs::create_dir(&left).unwrap();
        make_directories_with(&made, &record).unwrap();
        assert_eq!(*synced.lock().unwrap(), [root.clone(), left.clone()]);
        synced.lock().unwrap().clear();
        make_directories_with(&made, &record).unwrap();
        assert_eq!(*synced.lock().unwrap(), [left]);
        make_directories_with(&made, &|_| Err(io::ErrorKind::PermissionDenied.into())).unwrap();
        assert!(make_directories_with(&made, &|_| Err(io::ErrorKind::Other.into())).is_err());
    }
}
