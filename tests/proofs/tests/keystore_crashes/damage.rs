//! Bytes that change by themselves, and files that became short: in one copy of the keystore, and in both.

use pageseal::testing::SimulatedDisk;
use pageseal::{Error, ErrorKind};

use crate::cases::Case;
use crate::trials::{Tally, goes_on};
use crate::world::{COPIES, State};

const SECTOR: usize = 512;

#[derive(Default)]
pub struct Counts {
    pub tally: Tally,
    pub refused: u64,
    pub repaired: u64,
}

impl Counts {
    pub fn and(self, other: Self) -> Self {
        Self {
            tally: self.tally.and(other.tally),
            refused: self.refused + other.refused,
            repaired: self.repaired + other.repaired,
        }
    }
}

/// A keystore whose copies have the same bytes, and where its header and the group of its last change end and begin.
pub struct Whole {
    pub bytes: Vec<u8>,
    first_group: usize,
    last_group: usize,
}

impl Whole {
    pub fn of(case: &Case) -> Self {
        let [bytes, copy] = COPIES.map(|name| case.disk.seen(&case.world.path(name)).unwrap());
        assert!(bytes == copy, "the copies differ before anything happened");
        let mut groups = (0..bytes.len()).step_by(SECTOR).filter(|at| bytes[*at..].starts_with(b"PSGR"));
        let first_group = groups.next().unwrap();
        let last_group = groups.next_back().unwrap();
        Self { bytes, first_group, last_group }
    }
}

/// One copy is damaged: nothing is lost, somebody is told, and the copy is made anew, with the same bytes.
pub fn one_copy(case: &Case, whole: &Whole, what: &str, counts: &mut Counts, damage: impl FnOnce(&SimulatedDisk)) {
    let Counts { tally, repaired, .. } = counts;
    tally.count(what, || {
        let disk = case.start();
        damage(&disk);
        let cluster = case.world.open(&disk).map_err(|error| format!("it does not open: {error}"))?;
        if cluster.keystore_findings().is_empty() {
            return Err("nobody is told".to_owned());
        }
        if COPIES.iter().any(|name| disk.seen(&case.world.path(name)).as_ref() != Some(&whole.bytes)) {
            return Err("a copy is not what was written".to_owned());
        }
        *repaired += 1;
        Ok(())
    });
}

/// Both copies are damaged at the same place: refused with the place, unless it is the last change, which looks as if a crash
/// had interrupted it.
pub fn both_copies(case: &Case, whole: &Whole, at: usize, xor: u8, counts: &mut Counts) {
    let Counts { tally, refused, .. } = counts;
    tally.count(&format!("byte {at} of both copies"), || {
        let disk = case.start();
        COPIES.iter().for_each(|name| disk.flip(&case.world.path(name), at, xor));
        match case.world.open(&disk) {
            Err(error) => {
                *refused += 1;
                names_the_place(&error, at >= whole.first_group)
            }
            Ok(_) if at < whole.last_group => Err("it opens all the same".to_owned()),
            Ok(cluster) => {
                let seen = case.world.look(&disk, &cluster).map_err(|error| error.to_string())?;
                let state = case.states[0].as_ref().unwrap();
                if without_the_rename(state) == seen { Ok(()) } else { Err(format!("{seen:?} is not {state:?}")) }
            }
        }
    });
}

/// The last change while a case is prepared is a rename.
fn without_the_rename(state: &State) -> State {
    let mut before = state.clone();
    let renamed = before.databases.remove("two").unwrap();
    before.databases.insert("zwei".into(), renamed);
    before
}

fn names_the_place(error: &Error, behind_header: bool) -> Result<(), String> {
    use ErrorKind::*;
    let text = error.to_string();
    let told = match error.kind() {
        Damaged => text.contains("byte ") && text.contains("keystore"),
        _ if behind_header => false,
        // The header's record is believed only as far as a master key confirms it.
        Authentication | WrongIdentity | Unsupported | BadCiphertext | Misconfigured => true,
        _ => false,
    };
    if told { Ok(()) } else { Err(format!("{:?}: {text}", error.kind())) }
}

/// Both copies end at the same place. That cannot always be told from a crash: it opens as it once was, or not at all, and
/// never panics.
pub fn both_short(case: &Case, whole: &Whole, len: usize, counts: &mut Counts) {
    let Counts { tally, refused, .. } = counts;
    tally.count(&format!("both copies end at {len}"), || {
        let disk = case.start();
        COPIES.iter().for_each(|name| disk.set(&case.world.path(name), &whole.bytes[..len]));
        match case.world.open(&disk) {
            Err(error) => {
                *refused += 1;
                names_the_place(&error, false)
            }
            Ok(_) if len < whole.first_group => Err("it opens without a header".to_owned()),
            Ok(cluster) => {
                let seen = case.world.look(&disk, &cluster).map_err(|error| error.to_string())?;
                goes_on(case, &disk, &cluster, seen)
            }
        }
    });
}
