//! One file: what programs see of it, what the disk has for sure, and what it may have.

use std::collections::{BTreeMap, BTreeSet};
use std::mem;

use super::choice::Choose;

/// What a disk writes whole or not at all.
const SECTOR: usize = 512;

/// After a failed sync a sector is not dirty any more, though the disk may not have it; so Linux does it.
#[derive(Clone, Default)]
pub(super) struct Inode {
    seen: Vec<u8>,
    durable: Vec<u8>,
    /// What the next sync will write.
    dirty: BTreeSet<usize>,
    /// What sectors held after they were last durable and before what is seen: the kernel may have written any of it.
    between: BTreeMap<usize, Vec<Vec<u8>>>,
}

impl Inode {
    pub(super) fn durable(bytes: Vec<u8>) -> Self {
        Self { seen: bytes.clone(), durable: bytes, ..Self::default() }
    }

    pub(super) fn seen(&self) -> &[u8] {
        &self.seen
    }

    pub(super) fn write(&mut self, at: usize, bytes: &[u8]) {
        let end = at + bytes.len();
        let sectors = at.min(self.seen.len()) / SECTOR..end.div_ceil(SECTOR);
        for number in sectors.clone() {
            self.remember(number);
        }
        self.seen.resize(self.seen.len().max(end), 0);
        self.seen[at..end].copy_from_slice(bytes);
        self.dirty.extend(sectors);
    }

    fn remember(&mut self, number: usize) {
        let old = sector(&self.seen, number);
        if old != sector(&self.durable, number) {
            self.between.entry(number).or_default().push(old.to_vec());
        }
    }

    pub(super) fn sync(&mut self) {
        self.durable.resize(self.seen.len(), 0);
        for number in mem::take(&mut self.dirty) {
            put_sector(&mut self.durable, number, sector(&self.seen, number));
            self.between.remove(&number);
        }
    }

    /// The kernel could not write the file back. It calls its pages clean all the same.
    pub(super) fn fail_sync(&mut self) {
        self.dirty.clear();
    }

    /// Changes bytes for programs and on the disk alike. False if not all of them are there.
    pub(super) fn damage(&mut self, at: usize, change: impl Fn(&mut [u8]), len: usize) -> bool {
        let Some(bytes) = at.checked_add(len).and_then(|end| self.seen.get_mut(at..end)) else {
            return false;
        };
        change(bytes);
        if let Some(bytes) = self.durable.get_mut(at..at + len) {
            change(bytes);
        }
        true
    }

    /// How often `needle` occurs in what is seen, and in what is durable where that is something else.
    pub(super) fn count(&self, needle: &[u8]) -> usize {
        let durable = if self.durable == self.seen { 0 } else { occurrences(&self.durable, needle) };
        occurrences(&self.seen, needle) + durable
    }

    /// The file after a power cut: of any length between the durable and the seen, each sector as it was at any time
    /// since it was durable.
    pub(super) fn after_power_cut(&self, choose: &mut dyn Choose) -> Vec<u8> {
        choose.next_subject();
        let lengths = self.lengths();
        let len = lengths[choose.choose(lengths.len())];
        let mut image = self.durable.clone();
        image.resize(len, 0);
        for number in 0..len.div_ceil(SECTOR) {
            let versions = self.versions(number, len);
            put_sector(&mut image, number, versions[choose.choose(versions.len())]);
        }
        image
    }

    /// From the durable to the seen: both, and the ends of all sectors between.
    fn lengths(&self) -> Vec<usize> {
        let (durable, seen) = (self.durable.len(), self.seen.len());
        let (short, long) = (durable.min(seen), durable.max(seen));
        let whole = (short + 1..long).filter(|len| len.is_multiple_of(SECTOR));
        let mut lengths: Vec<_> = [short].into_iter().chain(whole).chain([long]).collect();
        if durable > seen {
            lengths.reverse();
        }
        lengths.dedup();
        lengths
    }

    /// From the durable to the seen: everything that a sector may be on the disk, of a file of `len` bytes.
    fn versions(&self, number: usize, len: usize) -> Vec<&[u8]> {
        let room = len - number * SECTOR;
        let mut versions = vec![first(sector(&self.durable, number), room)];
        let later = self.between.get(&number).into_iter().flatten().map(Vec::as_slice);
        for version in later.chain([sector(&self.seen, number)]) {
            let version = first(version, room);
            if !versions.contains(&version) {
                versions.push(version);
            }
        }
        versions
    }
}

fn occurrences(bytes: &[u8], needle: &[u8]) -> usize {
    assert!(!needle.is_empty(), "nothing occurs everywhere");
    bytes.windows(needle.len()).filter(|window| *window == needle).count()
}

fn first(bytes: &[u8], len: usize) -> &[u8] {
    bytes.get(..len).unwrap_or(bytes)
}

fn sector(bytes: &[u8], number: usize) -> &[u8] {
    let end = bytes.len().min((number + 1) * SECTOR);
    bytes.get(number * SECTOR..end).unwrap_or_default()
}

/// Puts a version of a sector, as much of it as `bytes` has room for, and zeros behind it.
fn put_sector(bytes: &mut [u8], number: usize, version: &[u8]) {
    let start = number * SECTOR;
    let end = bytes.len().min(start + SECTOR);
    let len = version.len().min(end - start);
    bytes[start..start + len].copy_from_slice(&version[..len]);
    bytes[start + len..end].fill(0);
}
