//! What a disk does to the files: crashes at every step with any torn write, and calls that fail.

use super::*;
use crate::storage::disk::simulated::{Errno, Fault};

/// What is tried, and what went wrong, over all crashes or failures.
#[derive(Default, Debug)]
struct Tally {
    tried: usize,
    /// An acknowledged change is not there.
    lost: usize,
    /// The keystore does not open, or shows a state that never was.
    neither: usize,
}

/// How many disks that a power cut may leave are looked at, for each crash.
const POWER_CUTS: usize = 12;

/// One change of the scenario. The states before and after it are told apart by the catalogue.
#[derive(Clone)]
enum Change {
    Append(Vec<Operation>),
    Shred(Vec<Operation>),
}

impl Change {
    fn make(&self, keystore: &mut Keystore) -> Result<()> {
        match self.clone() {
            Self::Append(operations) => keystore.append(&MAC, operations),
            Self::Shred(operations) => keystore.shred(&MAC, operations, None),
        }
    }
}

/// Appends of both kinds, a group of six sectors, and two rewrites.
fn changes() -> Vec<Change> {
    let mut wide = data_record(1, 2);
    wide.wrappings[0].blob = vec![0xbb; 2000];
    let (database, kind, owner) = (id(1), OwnerKind::PageFile, OwnerId([9; 16]));
    vec![
        Change::Append(vec![Operation::KeyUseAdd(key_use(1, 9, 1))]),
        Change::Append(vec![Operation::Generation(wide)]),
        Change::Append(vec![Operation::KeyUseRaise { kind, owner, database, oldest: generation(2) }]),
        Change::Shred(vec![Operation::State { database, generation: generation(1), state: KeyState::Destroyed }]),
        Change::Append(new_database(2)),
        Change::Append(vec![Operation::KeyUseRelease { kind, owner, database }]),
        Change::Shred(vec![Operation::Drop { database: id(1) }]),
    ]
}

/// The catalogues before and after each change.
fn states() -> Vec<Catalogue> {
    let mut keystore = create(Arc::new(MemoryStore::default()), new_database(1)).unwrap();
    let mut states = vec![copy(keystore.catalogue())];
    for change in changes() {
        change.make(&mut keystore).unwrap();
        states.push(copy(keystore.catalogue()));
    }
    states
}

/// What the scenario begins with: whole copies, or such as an earlier crash left.
fn starts() -> Vec<Copies> {
    let store = Arc::new(MemoryStore::default());
    create(store.clone(), new_database(1)).unwrap();
    let bytes = read(&*store)[0].clone().unwrap();
    let torn = |tail: &[u8]| Some([&bytes[..], tail].concat());
    let mut damaged = bytes.clone();
    damaged[700] ^= 1;
    vec![
        both(&bytes),
        [torn(&[0; 1024]), Some(bytes.clone())],
        [torn(&[0xaa; 300]), torn(&[0xaa; 300])],
        [None, Some(bytes.clone())],
        [Some(damaged), Some(bytes)],
    ]
}

struct Scenario {
    scratch: Scratch,
    states: Vec<Catalogue>,
    tally: Tally,
}

impl Scenario {
    fn new(name: &str) -> Self {
        Self { scratch: Scratch::new(name), states: states(), tally: Tally::default() }
    }

    fn store(&self, disk: &SimulatedDisk) -> Arc<FileStore> {
        self.scratch.store(disk)
    }

    /// Makes the changes from `from` on until one fails. Returns how many were acknowledged in all.
    fn run(&self, keystore: &mut Keystore, from: usize) -> usize {
        let mut acknowledged = from;
        for change in &changes()[from..] {
            if change.make(keystore).is_err() {
                break;
            }
            acknowledged += 1;
        }
        acknowledged
    }

    /// A disk that may be found later: at least `acknowledged` changes must be there, and at most one more. Then it is
    /// changed again, which must work and be durable. Changes with one durable copy may be missing while that is all
    /// that can be known, which `states` counts as lost: on these disks files are not damaged, so they are there.
    fn judge(&mut self, disk: &SimulatedDisk, acknowledged: usize) {
        self.tally.tried += 1;
        let Ok(mut keystore) = open_store(self.store(disk)) else {
            self.tally.neither += 1;
            return;
        };
        match self.states.iter().position(|state| state == keystore.catalogue()) {
            None => self.tally.neither += 1,
            Some(found) if found < acknowledged => self.tally.lost += 1,
            Some(found) => {
                assert!(found <= acknowledged + 1, "{found} changes, of {acknowledged}");
                keystore.append(&MAC, new_database(0xee)).unwrap();
                self.expect_exactly(disk, keystore.catalogue());
            }
        }
    }

    /// After an acknowledged append every possible disk has this catalogue, in either copy.
    fn expect_exactly(&mut self, disk: &SimulatedDisk, catalogue: &Catalogue) {
        for cut in disk.power_cuts_all(2) {
            for lost in [None, Some(0), Some(1)] {
                let cut = cut.power_cut(0);
                if let Some(lost) = lost {
                    cut.lose(&path(lost));
                }
                self.tally.tried += 1;
                match open_store(self.store(&cut)) {
                    Ok(keystore) if keystore.catalogue() == catalogue => {}
                    Ok(_) => self.tally.lost += 1,
                    Err(_) => self.tally.neither += 1,
                }
            }
        }
    }

    /// Stops the machine in each step of the changes, again in each step of the first change after that, and judges.
    fn crash_while_changing(&mut self, broken: Broken, start: &Copies) {
        for at in 0.. {
            // After a restart the mark is not believed to be there.
            self.scratch.locks().set_dirty(false).unwrap();
            let disk = disk_with(start.clone(), broken);
            disk.arm(at, Fault::Crash);
            let opened = open_store(self.store(&disk));
            let acknowledged = opened.map_or(0, |mut keystore| self.run(&mut keystore, 0));
            self.scratch.locks().set_dirty(false).unwrap();
            for cut in disk.power_cuts_all(POWER_CUTS) {
                self.judge(&cut, acknowledged);
            }
            if broken == Broken::No && at % 3 == 0 {
                self.crash_again(&disk.power_cut(at as u64), acknowledged);
            }
            if acknowledged == changes().len() {
                assert!(broken != Broken::No || at >= 30, "fewer steps than expected");
                return;
            }
        }
    }

    /// Stops the machine in each step of the repair after a crash.
    fn crash_again(&mut self, found: &SimulatedDisk, acknowledged: usize) {
        for at in 0.. {
            let disk = found.kill();
            disk.arm(at, Fault::Crash);
            let repaired = open_store(self.store(&disk)).and_then(|mut keystore| keystore.settle(&MAC)).is_ok();
            self.scratch.locks().set_dirty(false).unwrap();
            for cut in disk.power_cuts_all(2) {
                self.judge(&cut, acknowledged);
            }
            if repaired {
                return;
            }
        }
    }

    fn crash_while_creating(&mut self, broken: Broken) {
        for at in 0.. {
            self.scratch.locks().set_dirty(false).unwrap();
            let disk = SimulatedDisk::new(broken);
            disk.arm(at, Fault::Crash);
            let created = create(self.store(&disk), new_database(1)).is_ok();
            self.scratch.locks().set_dirty(false).unwrap();
            for cut in disk.power_cuts_all(POWER_CUTS) {
                // It has its first group or does not exist.
                if [0, 1].iter().any(|&which| cut.seen(&path(which)).is_some()) {
                    self.judge(&cut, 0);
                } else {
                    self.tally.tried += 1;
                    self.tally.lost += usize::from(created);
                    create(self.store(&cut), new_database(1)).expect("left-overs do not prevent another try");
                }
            }
            if created {
                assert!(broken != Broken::No || at >= 10, "fewer steps than expected");
                return;
            }
        }
    }

    /// Lets each step fail, once or for good, and goes on with the same handle and with a new one.
    fn fail_while_changing(&mut self, start: &Copies, fault: Fault, errno: Errno) {
        for at in 0.. {
            self.scratch.locks().set_dirty(false).unwrap();
            let disk = disk_with(start.clone(), Broken::No);
            disk.arm_with(at, fault, errno);
            let opened = open_store(self.store(&disk)).ok();
            let Some(mut keystore) = opened else {
                disk.heal();
                self.judge(&disk, 0);
                continue;
            };
            let acknowledged = self.run(&mut keystore, 0);
            let stumbled = disk.steps() > at;
            disk.heal();
            // What a power cut would show now, and what another process of the same system finds.
            let marked = self.scratch.locks().is_dirty().unwrap();
            self.scratch.locks().set_dirty(false).unwrap();
            for cut in disk.power_cuts_all(8) {
                self.judge(&cut, acknowledged);
            }
            self.scratch.locks().set_dirty(marked).unwrap();
            self.judge(&disk.kill(), acknowledged);
            self.scratch.locks().set_dirty(marked).unwrap();
            self.go_on(&disk, keystore, acknowledged);
            if !stumbled {
                assert!(at >= 30, "fewer steps than expected");
                return;
            }
        }
    }

    /// The same handle makes the changes that are left, and shows what is on the disk.
    fn go_on(&mut self, disk: &SimulatedDisk, mut keystore: Keystore, acknowledged: usize) {
        self.tally.tried += 1;
        keystore.catch_up(&MAC).unwrap();
        match self.states.iter().position(|state| state == keystore.catalogue()) {
            None => self.tally.neither += 1,
            Some(found) if found < acknowledged => self.tally.lost += 1,
            Some(found) => {
                keystore.settle(&MAC).unwrap();
                assert_eq!(self.run(&mut keystore, found), changes().len(), "it does not go on without reopening");
                keystore.append(&MAC, new_database(0xee)).unwrap();
                assert!(keystore.is_settled());
                self.expect_exactly(disk, keystore.catalogue());
            }
        }
    }
}

fn crash_everywhere(name: &str, broken: Broken) -> Tally {
    let mut scenario = Scenario::new(name);
    scenario.crash_while_creating(broken);
    // For the deliberate mistakes one beginning is enough.
    let starts = if broken == Broken::No { starts() } else { starts().split_off(4) };
    for start in starts {
        scenario.crash_while_changing(broken, &start);
    }
    scenario.tally
}

#[test]
fn a_crash_in_any_step_with_any_torn_write_leaves_the_old_or_the_new_state() {
    let tally = crash_everywhere("crashes", Broken::No);
    assert_eq!((tally.lost, tally.neither), (0, 0), "{tally:?}");
    for broken in [Broken::NewFilesAreNotSynced, Broken::AppendsAreNotSynced, Broken::RenamesAreLost] {
        let worse = crash_everywhere(&format!("crashes-{broken:?}"), broken);
        assert!(worse.lost + worse.neither > 0, "a deliberate mistake went unnoticed: {broken:?} {worse:?}");
    }
    println!("crashes: tried={} lost=0 neither=0", tally.tried);
}

#[test]
fn a_failing_call_at_any_place_is_an_error_after_which_the_handle_goes_on_and_nothing_is_lost() {
    let mut scenario = Scenario::new("failures");
    for start in starts() {
        for (fault, errno) in [
            (Fault::Once, Errno::Io),
            (Fault::Forever, Errno::Io),
            (Fault::Once, Errno::NoSpace),
            (Fault::Forever, Errno::NoSpace),
        ] {
            scenario.fail_while_changing(&start, fault, errno);
        }
    }
    let Tally { tried, lost, neither } = scenario.tally;
    assert_eq!((lost, neither), (0, 0), "of {tried}");
    println!("failing calls: tried={tried} lost=0 neither=0");
}

#[test]
fn a_failed_create_leaves_no_keystore_or_a_whole_one() {
    let scratch = Scratch::new("create");
    for fault in [Fault::Once, Fault::Forever] {
        for at in 0.. {
            scratch.locks().set_dirty(false).unwrap();
            let disk = SimulatedDisk::new(Broken::No);
            disk.arm(at, fault);
            let created = create(scratch.store(&disk), new_database(1));
            if disk.steps() <= at {
                created.unwrap();
                break;
            }
            assert_eq!(error_of(created).kind(), ErrorKind::Io);
            disk.heal();
            match open_store(scratch.store(&disk)) {
                Ok(mut keystore) => {
                    assert_eq!(keystore.catalogue().databases().count(), 1);
                    keystore.append(&MAC, new_database(2)).unwrap();
                }
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::NotFound);
                    create(scratch.store(&disk), new_database(1)).expect("left-overs do not prevent another try");
                }
            }
        }
    }
}

#[test]
fn an_addition_survives_the_loss_of_either_file_from_the_moment_it_is_acknowledged() {
    let scratch = Scratch::new("either");
    let disk = SimulatedDisk::new(Broken::No);
    let mut keystore = create(scratch.store(&disk), new_database(1)).unwrap();
    let release = Operation::KeyUseRelease { kind: OwnerKind::PageFile, owner: OwnerId([9; 16]), database: id(1) };
    keystore.append(&MAC, vec![Operation::KeyUseAdd(key_use(1, 9, 1))]).unwrap();
    keystore.append(&MAC, vec![release]).unwrap();
    // The write-back of what was not synced fails, and nobody is told.
    disk.fail_write_back(&path(1));
    keystore.append(&MAC, new_database(2)).unwrap();
    for cut in disk.power_cuts_all(64) {
        for lost in [0, 1] {
            let cut = cut.power_cut(0);
            cut.lose(&path(lost));
            assert!(open_store(scratch.store(&cut)).unwrap().catalogue() == keystore.catalogue());
        }
    }
}

#[test]
fn a_keystore_lives_in_real_files() {
    let scratch = Scratch::new("real");
    let store = || {
        let disk = Arc::new(crate::storage::disk::RealDisk);
        Arc::new(FileStore::new(disk, &scratch.0, scratch.locks()))
    };
    let mut keystore = create(store(), new_database(1)).unwrap();
    keystore.append(&MAC, new_database(2)).unwrap();
    keystore.append(&MAC, vec![Operation::KeyUseAdd(key_use(2, 3, 1))]).unwrap();
    let unverified = UnverifiedKeystore::read(store()).unwrap();
    assert_eq!(unverified.headers(), std::slice::from_ref(&keystore.header));
    let mut reopened = unverified.verify(&MAC).unwrap();
    assert!(reopened.is_settled() && reopened.catalogue() == keystore.catalogue());
    reopened.rewrite(&MAC, vec![Operation::Drop { database: id(1) }], None).unwrap();
    assert!(keystore.catch_up(&MAC).unwrap());
    assert!(reopened.catalogue() == keystore.catalogue());
}
