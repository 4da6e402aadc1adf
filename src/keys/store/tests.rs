use super::*;
use crate::storage::disk::simulated::{Broken, Fault, SimulatedDisk};

/// A store on a simulated disk, with a real lock file.
struct Place {
    directory: PathBuf,
    disk: SimulatedDisk,
    store: FileStore,
}

impl Place {
    fn new(name: &str) -> Self {
        let directory = std::env::temp_dir().join(format!("pageseal-store-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let disk = SimulatedDisk::new(Broken::No);
        let store = Self::store_in(&directory, &disk);
        Self { directory, disk, store }
    }

    fn store_in(directory: &Path, disk: &SimulatedDisk) -> FileStore {
        let locks = LockFile::open(&directory.join("lock")).unwrap();
        FileStore::new(Arc::new(disk.clone()), directory, locks)
    }

    /// As another process has it.
    fn another(&self) -> FileStore {
        Self::store_in(&self.directory, &self.disk)
    }

    fn path(&self, copy: usize) -> PathBuf {
        self.directory.join(FILE_NAMES[copy])
    }

    fn seen(&self) -> [Vec<u8>; 2] {
        [0, 1].map(|copy| self.disk.seen(&self.path(copy)).unwrap())
    }

    /// The second copy on each disk that a power cut may leave.
    fn second_after_power_cuts(&self) -> Vec<Vec<u8>> {
        self.disk.power_cuts_all(64).iter().map(|cut| cut.seen(&self.path(1)).unwrap()).collect()
    }

    /// The syncs of files and of directories that `f` causes.
    fn syncs<R>(&self, f: impl FnOnce(&FileStore) -> R) -> ((usize, usize), R) {
        let before = (self.disk.syncs(), self.disk.dir_syncs());
        let done = f(&self.store);
        ((self.disk.syncs() - before.0, self.disk.dir_syncs() - before.1), done)
    }

    fn is_marked(&self) -> bool {
        self.another().is_unfinished().unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[test]
fn an_append_costs_one_sync_or_two_and_making_files_anew_two_of_files_and_two_of_names() {
    let place = Place::new("syncs");
    let (cost, created) = place.syncs(|store| store.create(b"created").unwrap());
    assert_eq!(cost, (2, 2));
    let (cost, one) = place.syncs(|store| store.append(&created, b" one", Durability::One).unwrap());
    assert_eq!(cost, (1, 0));
    let (cost, both) = place.syncs(|store| store.append(&one, b" both", Durability::Both).unwrap());
    assert_eq!(cost, (2, 0));
    let (cost, _) = place.syncs(|store| store.replace(&both, b"anew").unwrap());
    assert_eq!(cost, (2, 2));
    let (cost, _) = place.syncs(|store| (store.versions().unwrap(), store.read(0).unwrap(), store.is_unfinished()));
    assert_eq!(cost, (0, 0));
    assert_eq!(place.seen(), [b"anew", b"anew"]);
}

#[test]
fn both_copies_have_the_same_bytes_and_what_is_read_has_its_version() {
    let place = Place::new("reads");
    assert_eq!(place.store.versions().unwrap(), [None, None]);
    assert_eq!(place.store.read(0).unwrap(), None);
    let created = place.store.create(b"created").unwrap();
    let appended = place.store.append(&created, b" and more", Durability::One).unwrap();
    assert_eq!(appended, place.store.versions().unwrap());
    for copy in [0, 1] {
        assert_eq!(place.store.read(copy).unwrap(), Some((appended[copy].unwrap(), b"created and more".to_vec())));
        assert!(place.store.name(copy).ends_with(FILE_NAMES[copy]));
    }
    assert_eq!(place.store.read_from(7).unwrap(), b" and more");
    assert_eq!(place.store.read_from(99).unwrap(), b"");
    let refused = place.store.create(b"again").unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
    place.disk.lose(&place.path(0));
    assert_eq!(place.store.create(b"again").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
    let alone = place.store.versions().unwrap();
    assert_eq!(place.store.append(&alone, b"x", Durability::Both).unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn neither_append_nor_replace_touches_what_is_not_the_expected_version() {
    let place = Place::new("swap");
    let created = place.store.create(b"created").unwrap();
    let appended = place.another().append(&created, b" by another", Durability::Both).unwrap();
    for _ in 0..2 {
        assert!(place.store.append(&created, b" by us", Durability::Both).is_err());
        assert!(place.store.replace(&created, b"by us").is_err());
        assert!(place.store.replace(&[appended[0], None], b"by us").is_err());
        assert!(place.store.replace(&[None, None], b"by us").is_err());
    }
    assert_eq!(place.seen(), [b"created by another", b"created by another"]);
    // Files of the same length that were put in their place are others.
    let replaced = place.another().replace(&appended, b"created BY another").unwrap();
    assert!(place.store.append(&appended, b" by us", Durability::One).is_err());
    assert!(place.store.replace(&appended, b"by us").is_err());
    assert_eq!(place.seen(), [b"created BY another", b"created BY another"]);
    place.store.append(&replaced, b" by us", Durability::One).unwrap();
}

#[test]
fn what_the_second_copy_was_not_synced_for_is_written_again_with_its_next_sync() {
    let place = Place::new("again");
    let mut versions = place.store.create(b"0").unwrap();
    for part in [b"1", b"2", b"3"] {
        versions = place.store.append(&versions, part, Durability::One).unwrap();
    }
    // The write-back fails, and the next sync would hide it.
    place.disk.fail_write_back(&place.path(1));
    assert!(place.second_after_power_cuts().iter().any(|second| second != b"0123"));
    let written = place.disk.bytes_written();
    versions = place.store.append(&versions, b"4", Durability::Both).unwrap();
    assert_eq!(place.disk.bytes_written() - written, 1 + 4);
    assert!(place.second_after_power_cuts().iter().all(|second| second == b"01234"));
    // Once synced, it is not written again.
    let written = place.disk.bytes_written();
    place.store.append(&versions, b"5", Durability::Both).unwrap();
    assert_eq!(place.disk.bytes_written() - written, 2);
    assert_eq!(place.seen(), [b"012345", b"012345"]);
}

#[test]
fn what_was_not_synced_is_forgotten_when_another_appended_or_the_files_were_made_anew() {
    let place = Place::new("forgotten");
    let created = place.store.create(b"0").unwrap();
    let ours = place.store.append(&created, b"1", Durability::One).unwrap();
    let theirs = place.another().append(&ours, b"2", Durability::One).unwrap();
    let written = place.disk.bytes_written();
    let both = place.store.append(&theirs, b"3", Durability::Both).unwrap();
    assert_eq!(place.disk.bytes_written() - written, 2);
    let one = place.store.append(&both, b"4", Durability::One).unwrap();
    let anew = place.store.replace(&one, b"anew").unwrap();
    let written = place.disk.bytes_written();
    place.store.append(&anew, b"5", Durability::Both).unwrap();
    assert_eq!(place.disk.bytes_written() - written, 2);
    assert_eq!(place.seen(), [b"anew5", b"anew5"]);
}

#[test]
fn not_more_than_64_kib_of_the_second_copy_wait_for_a_sync() {
    let place = Place::new("bound");
    let mut versions = place.store.create(b"0").unwrap();
    let mut syncs = Vec::new();
    for _ in 0..5 {
        let (cost, appended) =
            place.syncs(|store| store.append(&versions, &[7; MOST_UNSYNCED / 2], Durability::One).unwrap());
        versions = appended;
        syncs.push(cost.0);
    }
    assert_eq!(syncs, [1, 1, 2, 1, 1]);
    assert_eq!(place.seen()[0], place.seen()[1]);
}

#[test]
fn a_write_that_does_not_come_to_its_end_leaves_a_mark_and_the_next_whole_one_takes_it_away() {
    for durability in [Durability::One, Durability::Both] {
        for at in 0.. {
            let place = Place::new("mark");
            let created = place.store.create(b"created").unwrap();
            assert!(!place.is_marked());
            place.disk.arm(at, Fault::Once);
            let appended = place.store.append(&created, b" more", durability);
            place.disk.heal();
            assert_eq!(appended.is_err(), place.is_marked(), "step {at}");
            if appended.is_ok() {
                assert!(at >= 2 + usize::from(durability == Durability::Both));
                break;
            }
            place.store.replace(&place.store.versions().unwrap(), b"anew").unwrap();
            assert!(!place.is_marked());
        }
    }
}

#[test]
fn a_replacement_that_does_not_come_to_its_end_leaves_each_copy_whole_old_or_new() {
    for fault in [Fault::Once, Fault::Forever, Fault::Crash] {
        for at in 0.. {
            let place = Place::new("replace");
            let created = place.store.create(b"old").unwrap();
            place.disk.arm(at, fault);
            let replaced = place.store.replace(&created, b"anew");
            place.disk.heal();
            for cut in place.disk.power_cuts_all(64).into_iter().chain([place.disk.kill()]) {
                for copy in [0, 1] {
                    let seen = cut.seen(&place.path(copy)).unwrap();
                    let new = replaced.is_ok() && seen == b"anew";
                    assert!(new || replaced.is_err() && (seen == b"old" || seen == b"anew"), "step {at}: {seen:?}");
                }
            }
            if replaced.is_ok() {
                break;
            }
        }
    }
}

#[test]
fn what_is_kept_aside_replaces_nothing_and_is_removed_with_the_left_overs_and_nothing_else() {
    let place = Place::new("aside");
    let versions = place.store.create(b"created").unwrap();
    let ((_, no_syncs), ()) = place.syncs(|store| store.remove_strays().unwrap());
    assert_eq!(no_syncs, 0);
    for bytes in [b"first", b"other", b"first"] {
        place.store.keep_aside(bytes, Aside::Damaged, 7).unwrap();
    }
    place.store.keep_aside(b"first", Aside::Damaged, 8).unwrap();
    place.store.keep_aside(b"first", Aside::Replaced, 8).unwrap();
    let kept: Vec<_> = ["7-1", "7-2", "8-1"].map(|n| place.directory.join(format!("keystore.damaged-{n}"))).into();
    let replaced = place.directory.join("keystore.replaced-8-1");
    let both = vec![place.path(0), place.path(1)];
    assert_eq!(place.disk.paths(), [both, kept.clone(), vec![replaced.clone()]].concat());
    assert_eq!(place.store.kept(Aside::Damaged).unwrap(), kept);
    assert_eq!(place.disk.seen(&kept[1]).unwrap(), b"other");
    // Durable, even if the machine stops now.
    let all_kept = || kept.iter().chain([&replaced]);
    assert!(place.disk.power_cuts_all(64).iter().all(|cut| all_kept().all(|path| cut.seen(path).is_some())));
    let foreign = ["settings", "keystore.backup", "other.tmp"].map(|name| place.directory.join(name));
    foreign.iter().for_each(|path| place.disk.set(path, b"not ours"));
    [0, 1].iter().for_each(|&copy| place.disk.set(&beside(&place.path(copy)), b"left over"));
    place.store.remove_strays().unwrap();
    assert_eq!(place.store.kept(Aside::Replaced).unwrap(), std::slice::from_ref(&replaced));
    let mut left = [place.path(0), place.path(1), replaced].into_iter().chain(foreign).collect::<Vec<_>>();
    left.sort();
    assert_eq!(place.disk.paths(), left);
    assert!(place.disk.power_cuts_all(64).iter().all(|cut| cut.paths() == left));
    assert_eq!(place.store.versions().unwrap(), versions);
}

#[test]
fn the_store_in_memory_keeps_the_same_promises() {
    let store = MemoryStore::default();
    assert_eq!(store.read(0).unwrap(), None);
    let created = store.create(b"created").unwrap();
    assert!(store.create(b"again").is_err());
    let appended = store.append(&created, b" more", Durability::One).unwrap();
    assert!(store.append(&created, b" more", Durability::One).is_err());
    assert!(store.replace(&created, b"anew").is_err());
    assert_eq!(store.read(1).unwrap(), Some((appended[1].unwrap(), b"created more".to_vec())));
    assert_eq!(store.read_from(8).unwrap(), b"more");
    assert_eq!(store.read_from(99).unwrap(), b"");
    let replaced = store.replace(&appended, b"created MORE").unwrap();
    assert_ne!(replaced, appended, "equal versions have equal bytes");
}

#[test]
fn what_cannot_be_read_is_moved_to_a_free_name_durably_and_what_is_kept_later_goes_beside_it() {
    let place = Place::new("moved");
    let versions = place.store.create(b"created").unwrap();
    let named = |number: &str| place.directory.join(format!("keystore.damaged-{number}"));
    place.store.keep_aside(b"kept", Aside::Damaged, 7).unwrap();
    place.disk.fail_reads(&place.path(1));
    let error = place.store.read(1).unwrap_err();
    assert!(is_about_the_copy(&error), "{error}");
    assert_eq!(place.store.versions().unwrap(), versions);
    place.store.move_aside(1, Aside::Damaged, 7).unwrap();
    assert_eq!(place.store.versions().unwrap(), [versions[0], None]);
    assert!(place.disk.power_cuts_all(64).iter().all(|cut| cut.seen(&named("7-2")).unwrap() == b"created"));
    // Among them is a file that cannot be compared.
    place.store.keep_aside(b"created", Aside::Damaged, 7).unwrap();
    let kept = ["7-1", "7-2", "7-3"].map(named);
    assert_eq!(place.store.kept(Aside::Damaged).unwrap(), kept);
    place.store.replace(&[versions[0], None], b"anew").unwrap();
    assert_eq!(place.seen(), [b"anew", b"anew"]);
    place.store.remove_strays().unwrap();
    assert!(place.store.kept(Aside::Damaged).unwrap().is_empty());
}
