//! The names of all files: what programs see, what the disk has for sure, and the changes between.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::choice::Choose;
use crate::storage::disk::directory_of;

/// Which file, by its place in the list of inodes, has which name.
pub(super) type Names = BTreeMap<PathBuf, usize>;

#[derive(Clone)]
enum Change {
    Create { path: PathBuf, file: usize },
    Remove { path: PathBuf },
    Rename { from: PathBuf, to: PathBuf, file: usize },
}

impl Change {
    fn directory(&self) -> &Path {
        match self {
            Self::Create { path, .. } | Self::Remove { path } | Self::Rename { to: path, .. } => directory_of(path),
        }
    }

    /// A rename does both of its halves whatever else is there: it is one step.
    fn apply(&self, names: &mut Names) {
        match self {
            Self::Create { path, file } => {
                names.insert(path.clone(), *file);
            }
            Self::Remove { path } => {
                names.remove(path);
            }
            Self::Rename { from, to, file } => {
                names.remove(from);
                names.insert(to.clone(), *file);
            }
        }
    }
}

#[derive(Clone, Default)]
pub(super) struct Directories {
    seen: Names,
    durable: Names,
    /// What was not synced, in order.
    journal: Vec<Change>,
}

impl Directories {
    pub(super) fn durable(names: Names) -> Self {
        Self { seen: names.clone(), durable: names, journal: Vec::new() }
    }

    pub(super) fn seen(&self) -> &Names {
        &self.seen
    }

    /// All files that have a name, or had one that may come back.
    pub(super) fn files(&self) -> BTreeSet<usize> {
        let changed = self.journal.iter().filter_map(|change| match change {
            Change::Create { file, .. } | Change::Rename { file, .. } => Some(*file),
            Change::Remove { .. } => None,
        });
        self.seen.values().chain(self.durable.values()).copied().chain(changed).collect()
    }

    pub(super) fn create(&mut self, path: &Path, file: usize) {
        self.remove(path);
        self.change(Change::Create { path: path.to_owned(), file });
    }

    pub(super) fn remove(&mut self, path: &Path) {
        if self.seen.contains_key(path) {
            self.change(Change::Remove { path: path.to_owned() });
        }
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path, file: usize) {
        self.change(Change::Rename { from: from.to_owned(), to: to.to_owned(), file });
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.seen);
        self.journal.push(change);
    }

    /// Makes the names of one directory durable. Others stay as they are, although many file systems write them too.
    pub(super) fn sync(&mut self, dir: &Path) {
        let durable = &mut self.durable;
        self.journal.retain(|change| {
            let synced = change.directory() == dir;
            if synced {
                change.apply(durable);
            }
            !synced
        });
    }

    /// The names after a power cut: of each directory the first so many changes are there, and sometimes, if `choose`
    /// reorders, any of the names that were made or removed.
    pub(super) fn after_power_cut(&self, choose: &mut dyn Choose) -> Names {
        let mut names = self.durable.clone();
        let directories: BTreeSet<_> = self.journal.iter().map(Change::directory).collect();
        for directory in directories {
            choose.next_subject();
            let changes: Vec<_> = self.journal.iter().filter(|change| change.directory() == directory).collect();
            let first = choose.choose(changes.len() + 1);
            let reorders = choose.reorders();
            for (at, change) in changes.into_iter().enumerate() {
                let ordered = !reorders || matches!(change, Change::Rename { .. });
                if if ordered { at < first } else { choose.choose(2) == 1 } {
                    change.apply(&mut names);
                }
            }
        }
        names
    }
}
