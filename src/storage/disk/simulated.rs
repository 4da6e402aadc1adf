//! A disk in memory that fails where it is told to, and shows every state that a crash can leave.
//!
//! After a power cut, as it is modelled here: of each 512-byte sector that was written since it was last synced, any of
//! the contents that it had since; any length between the synced and the seen one; of the changes of names in each
//! directory since its last sync, in order, the first so many. Files and directories have nothing to do with each
//! other. A failed sync leaves pages clean that the disk does not have: programs see them, no later sync writes them, a
//! power cut shows it. Not modelled: old bytes of other files in a file that grew, and sectors that are written in
//! part.

mod choice;
mod file;
mod names;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use self::choice::{AllNew, AllOld, Choose, Seeded, every};
use self::file::Inode;
use self::names::Directories;
use super::{Disk, Stat, directory_of};

/// What happens at the step that is counted down to. A write and its sync are two steps, and a new file is one before
/// them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// This step fails, the following ones work. A write is cut in half.
    Once,
    /// This step and all following ones fail.
    Forever,
    /// The machine stops in this step, which may have been done wholly, in part or not; all following ones fail.
    Crash,
}

/// With which error a step fails.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Errno {
    /// EIO, of every operation.
    Io,
    /// ENOSPC, of what needs space: not when looking, reading, listing or removing. A write is cut in half before it
    /// fails.
    NoSpace,
}

/// A deliberate mistake, to see that tests would notice it.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum Broken {
    /// None.
    #[default]
    No,
    /// New files are renamed without having been synced.
    NewFilesAreNotSynced,
    /// What was written once is not written again.
    IgnoresOverwrites,
    /// Writes to files that are there are not synced.
    AppendsAreNotSynced,
    /// Names are never synced.
    RenamesAreLost,
    /// Writes go to whatever lies at the path now.
    WritesToAnyFile,
}

/// The disk. Clones are handles to the same disk.
#[derive(Clone, Default)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

/// What a crash leaves of the disk is made of this.
#[derive(Clone, Default)]
struct State {
    inodes: Vec<Inode>,
    names: Directories,
    /// Files of which no byte can be read.
    unreadable: BTreeSet<usize>,
    broken: Broken,
    fault: Option<Armed>,
    counted: Counted,
}

#[derive(Clone, Copy)]
struct Armed {
    at: usize,
    fault: Fault,
    errno: Errno,
}

#[derive(Clone, Copy, Default)]
struct Counted {
    steps: usize,
    bytes_written: usize,
    syncs: usize,
    dir_syncs: usize,
}

/// How much of a failing step is done.
#[derive(Clone, Copy)]
enum Done {
    /// Nothing; of a sync, the pages are clean all the same.
    Nothing,
    /// Half, if it can be halved: a write. Nothing else.
    Half,
    /// All of it, but nobody is told. What reached the disk is decided by the power cut.
    Unknown,
}

struct Failure(Done, Errno);

impl From<Failure> for io::Error {
    fn from(Failure(_, errno): Failure) -> Self {
        io::Error::from_raw_os_error(match errno {
            Errno::Io => libc::EIO,
            Errno::NoSpace => libc::ENOSPC,
        })
    }
}

/// The tests' side: what is on the disk, and what happens to it.
impl SimulatedDisk {
    /// An empty disk.
    pub fn new(broken: Broken) -> Self {
        Self::of(State { broken, ..State::default() })
    }

    /// A disk that holds one file, durably.
    pub fn with_file(path: &Path, bytes: &[u8], broken: Broken) -> Self {
        let disk = Self::new(broken);
        disk.set(path, bytes);
        disk
    }

    /// From here on, the `at`th step (from 0) has this fault, with [`Errno::Io`].
    pub fn arm(&self, at: usize, fault: Fault) {
        self.arm_with(at, fault, Errno::Io);
    }

    /// From here on, the `at`th step (from 0) has this fault and error.
    pub fn arm_with(&self, at: usize, fault: Fault, errno: Errno) {
        self.with(|state| {
            state.counted.steps = 0;
            state.fault = Some(Armed { at, fault, errno });
        });
    }

    /// No more faults.
    pub fn heal(&self) {
        self.with(|state| state.fault = None);
    }

    /// The number of steps since the disk was made or armed.
    pub fn steps(&self) -> usize {
        self.with(|state| state.counted.steps)
    }

    /// How many bytes were written to files.
    pub fn bytes_written(&self) -> usize {
        self.with(|state| state.counted.bytes_written)
    }

    /// How many times a file was to be synced.
    pub fn syncs(&self) -> usize {
        self.with(|state| state.counted.syncs)
    }

    /// How many times a directory was to be synced.
    pub fn dir_syncs(&self) -> usize {
        self.with(|state| state.counted.dir_syncs)
    }

    /// What a program sees at `path` now.
    pub fn seen(&self, path: &Path) -> Option<Vec<u8>> {
        self.with(|state| Some(state.inodes[*state.names.seen().get(path)?].seen().to_vec()))
    }

    /// All files that a program sees.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.with(|state| state.names.seen().keys().cloned().collect())
    }

    /// Puts a new file at `path`, durably. All names in its directory become durable.
    pub fn set(&self, path: &Path, bytes: &[u8]) {
        self.with(|state| {
            state.inodes.push(Inode::durable(bytes.to_vec()));
            state.names.create(path, state.inodes.len() - 1);
            state.names.sync(directory_of(path));
        });
    }

    /// Removes the file at `path`, durably. All names in its directory become durable.
    pub fn lose(&self, path: &Path) {
        self.with(|state| {
            state.names.remove(path);
            state.names.sync(directory_of(path));
        });
    }

    /// The disk's sectors under the file at `path` went bad: it cannot be read any more, under whatever name. Other calls work.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn fail_reads(&self, path: &Path) {
        let done = self.with(|state| {
            let file = state.names.seen().get(path).copied();
            file.is_some_and(|file| state.unreadable.insert(file))
        });
        assert!(done, "there is no readable file {}", path.display());
    }

    /// Bit rot: changes one byte, for programs and on the disk.
    ///
    /// # Panics
    /// If the file has no such byte.
    pub fn flip(&self, path: &Path, at: usize, xor: u8) {
        self.damage(path, at, 1, |bytes| bytes[0] ^= xor);
    }

    /// A write that was meant for another place: changes bytes, for programs and on the disk.
    ///
    /// # Panics
    /// If the file has no such bytes.
    pub fn misdirect(&self, path: &Path, at: usize, written: &[u8]) {
        self.damage(path, at, written.len(), |bytes| bytes.copy_from_slice(written));
    }

    fn damage(&self, path: &Path, at: usize, len: usize, change: impl Fn(&mut [u8])) {
        let done = self.with(|state| {
            let file = state.names.seen().get(path).copied();
            file.is_some_and(|file| state.inodes[file].damage(at, change, len))
        });
        assert!(done, "{} has no bytes {at} to {}", path.display(), at + len);
    }

    /// The kernel fails to write back what was not synced of the file at `path`, and tells nobody: as after a failed
    /// sync, programs see it and no later sync writes it.
    pub fn fail_write_back(&self, path: &Path) {
        self.with(|state| {
            if let Some(&file) = state.names.seen().get(path) {
                state.inodes[file].fail_sync();
            }
        });
    }

    /// How often these bytes occur in all files, as seen and, where that is different, as durable; also in files that
    /// only a power cut would bring back.
    ///
    /// # Panics
    /// If there are no bytes to look for.
    pub fn scan(&self, needle: &[u8]) -> usize {
        self.with(|state| state.names.files().into_iter().map(|file| state.inodes[file].count(needle)).sum())
    }

    /// The disk as the next process finds it after this one was killed: the system runs on, and shows what was written,
    /// also what a failed sync did not bring to the disk. A disk of its own, without faults.
    pub fn kill(&self) -> Self {
        self.with(|state| Self::of(State { fault: None, counted: Counted::default(), ..state.clone() }))
    }

    /// The disk as one power cut, chosen by `seed`, may leave it. A disk of its own, without faults.
    pub fn power_cut(&self, seed: u64) -> Self {
        Self::of(self.with(|state| state.after_power_cut(&mut Seeded::new(seed))))
    }

    /// All disks that a power cut may leave, if there are at most `limit`, not counting those where names became
    /// durable out of order; otherwise `limit` of them, at least two: nothing unsynced is there, all of it is, and by
    /// the seeds 0, 1 and so on.
    pub fn power_cuts_all(&self, limit: usize) -> Vec<Self> {
        let state = self.with(|state| state.clone());
        let states = every(limit, |choose| state.after_power_cut(choose)).unwrap_or_else(|| {
            let ends = [state.after_power_cut(&mut AllOld), state.after_power_cut(&mut AllNew)];
            let seeds = 0..limit.saturating_sub(2) as u64;
            ends.into_iter().chain(seeds.map(|seed| state.after_power_cut(&mut Seeded::new(seed)))).collect()
        });
        states.into_iter().map(Self::of).collect()
    }

    /// Everything that may lie at `path` after a power cut, whatever becomes of other files.
    ///
    /// # Panics
    /// If that is too much to try.
    pub fn after_crash(&self, path: &Path) -> BTreeSet<Option<Vec<u8>>> {
        let images = self.with(|state| {
            every(1 << 18, |choose| {
                let file = state.names.after_power_cut(choose).get(path).copied();
                file.map(|file| state.inodes[file].after_power_cut(choose))
            })
        });
        images.expect("few enough sectors were written since the last sync to try all").into_iter().collect()
    }

    fn of(state: State) -> Self {
        Self { state: Arc::new(Mutex::new(state)) }
    }

    fn with<R>(&self, f: impl FnOnce(&mut State) -> R) -> R {
        // A panic in a test that is caught leaves a disk that is as good as before.
        f(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for SimulatedDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimulatedDisk").field("paths", &self.paths()).finish_non_exhaustive()
    }
}

impl State {
    /// Files keep their numbers.
    fn after_power_cut(&self, choose: &mut dyn Choose) -> Self {
        let names = self.names.after_power_cut(choose);
        let mut inodes = vec![Inode::default(); self.inodes.len()];
        let files: BTreeSet<_> = names.values().copied().collect();
        for file in files {
            inodes[file] = Inode::durable(self.inodes[file].after_power_cut(choose));
        }
        let unreadable = self.unreadable.clone();
        Self { inodes, names: Directories::durable(names), unreadable, broken: self.broken, ..Self::default() }
    }

    /// Counts a step that a full disk does not hinder.
    fn look(&mut self) -> Result<(), Failure> {
        match self.step() {
            Err(Failure(_, Errno::NoSpace)) => Ok(()),
            outcome => outcome,
        }
    }

    /// Counts a step, and says whether it fails.
    fn step(&mut self) -> Result<(), Failure> {
        let now = self.counted.steps;
        self.counted.steps += 1;
        match self.fault {
            Some(Armed { at, fault, errno }) if now == at => Err(match (fault, errno) {
                (Fault::Crash, _) => Failure(Done::Unknown, Errno::Io),
                (Fault::Forever, Errno::Io) => Failure(Done::Nothing, errno),
                (Fault::Once, _) | (_, Errno::NoSpace) => Failure(Done::Half, errno),
            }),
            Some(Armed { at, fault: Fault::Forever, errno }) if now > at => Err(Failure(Done::Nothing, errno)),
            Some(Armed { at, fault: Fault::Crash, .. }) if now > at => Err(Failure(Done::Nothing, Errno::Io)),
            _ => Ok(()),
        }
    }

    /// Changes names, unless the step failed in a way that leaves them as they are.
    fn change(&mut self, outcome: Result<(), Failure>, change: impl FnOnce(&mut Self)) -> io::Result<()> {
        if matches!(outcome, Ok(()) | Err(Failure(Done::Unknown, _))) {
            change(self);
        }
        Ok(outcome?)
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        self.names.seen().get(path).copied().ok_or(io::ErrorKind::NotFound.into())
    }

    fn read(&mut self, path: &Path) -> io::Result<&[u8]> {
        self.look()?;
        let file = self.find(path)?;
        if self.unreadable.contains(&file) {
            return Err(Failure(Done::Nothing, Errno::Io).into());
        }
        Ok(self.inodes[file].seen())
    }

    fn stat(&self, file: usize) -> Stat {
        Stat { file: file as u64 + 1, len: self.inodes[file].seen().len() as u64 }
    }

    fn write(&mut self, file: usize, at: usize, bytes: &[u8]) -> io::Result<()> {
        let outcome = self.step();
        let done = match outcome {
            Ok(()) | Err(Failure(Done::Unknown, _)) => bytes.len(),
            Err(Failure(Done::Half, _)) => bytes.len() / 2,
            Err(Failure(Done::Nothing, _)) => 0,
        };
        if done > 0 {
            self.inodes[file].write(at, &bytes[..done]);
            self.counted.bytes_written += done;
        }
        Ok(outcome?)
    }

    fn sync(&mut self, file: usize) -> io::Result<()> {
        self.counted.syncs += 1;
        let outcome = self.step();
        match outcome {
            Ok(()) => self.inodes[file].sync(),
            Err(Failure(Done::Unknown, _)) => {}
            Err(Failure(Done::Nothing | Done::Half, _)) => self.inodes[file].fail_sync(),
        }
        Ok(outcome?)
    }
}

impl Disk for SimulatedDisk {
    fn stat(&self, path: &Path) -> io::Result<Option<Stat>> {
        self.with(|state| {
            state.look()?;
            Ok(state.names.seen().get(path).map(|&file| state.stat(file)))
        })
    }

    fn holds(&self, path: &Path, bytes: &[u8]) -> io::Result<bool> {
        self.with(|state| Ok(state.read(path)? == bytes))
    }

    fn read_from(&self, path: &Path, at: u64, max: u64) -> io::Result<Vec<u8>> {
        self.with(|state| {
            let seen = state.read(path)?;
            let rest = usize::try_from(at).ok().and_then(|at| seen.get(at..)).unwrap_or_default();
            if rest.len() as u64 > max { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(rest.to_vec()) }
        })
    }

    fn write_new(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.with(|state| {
            let file = state.inodes.len();
            let outcome = state.step();
            state.change(outcome, |state| {
                state.inodes.push(Inode::default());
                state.names.create(path, file);
            })?;
            state.write(file, 0, bytes)?;
            if state.broken == Broken::NewFilesAreNotSynced { Ok(()) } else { state.sync(file) }
        })
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.with(|state| {
            let outcome = state.step();
            let file = state.find(from)?;
            if directory_of(from) != directory_of(to) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "renames stay within a directory"));
            }
            state.change(outcome, |state| state.names.rename(from, to, file))
        })
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.with(|state| {
            state.counted.dir_syncs += 1;
            // In a crash, too, nothing is durable for sure.
            state.step()?;
            if state.broken != Broken::RenamesAreLost {
                state.names.sync(dir);
            }
            Ok(())
        })
    }

    fn write_at(&self, path: &Path, expected: Stat, at: u64, bytes: &[u8], sync: bool) -> io::Result<()> {
        self.with(|state| {
            let file = state.find(path)?;
            if state.broken != Broken::WritesToAnyFile {
                expected.expect(state.stat(file))?;
            }
            if state.broken == Broken::IgnoresOverwrites && at < expected.len {
                return Ok(());
            }
            state.write(file, usize::try_from(at).map_err(io::Error::other)?, bytes)?;
            if sync && state.broken != Broken::AppendsAreNotSynced { state.sync(file) } else { Ok(()) }
        })
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.with(|state| {
            let outcome = state.look();
            state.change(outcome, |state| state.names.remove(path))
        })
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.with(|state| {
            state.look()?;
            Ok(state.names.seen().keys().filter(|path| directory_of(path) == dir).cloned().collect())
        })
    }
}
