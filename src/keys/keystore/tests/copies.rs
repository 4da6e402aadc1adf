//! What two copies promise: what one has lost, the other repairs.

use super::*;
use crate::format::group::HEAD_LEN;
use crate::keys::wrapper::WrappedKey;

/// Numbers that are the same in every run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }
}

/// These copies verify as `file` to its end, and are made whole again.
fn expect_repaired(file: &File, copies: Copies, what: &str) -> [CopyState; 2] {
    let store = Watched::with(copies);
    let mut keystore = open_store(store.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(file.position(keystore.catalogue()), Some(file.groups()), "{what}");
    let states = keystore.copies().clone();
    keystore.settle(&MAC).unwrap();
    assert!(keystore.is_settled());
    assert_eq!(read(&*store), both(&file.bytes), "{what}");
    states
}

fn swapped<T>([a, b]: [T; 2]) -> [T; 2] {
    [b, a]
}

#[test]
fn damage_at_any_byte_of_one_copy_is_repaired_from_the_other_and_kept_aside() {
    let file = File::new(every_kind());
    let mut tried = 0;
    for at in 0..file.bytes.len() {
        for change in [1, 0xff] {
            let damaged = file.flipped(at, change);
            for which in [0, 1] {
                let mut copies = both(&file.bytes);
                copies[which] = Some(damaged.clone());
                let store = Watched::with(copies);
                let mut keystore = open_store(store.clone()).unwrap_or_else(|error| panic!("byte {at}: {error}"));
                assert_eq!(file.position(keystore.catalogue()), Some(file.groups()), "byte {at}");
                assert!(
                    matches!(keystore.copies()[which], CopyState::Damaged(_)),
                    "byte {at}: {:?}",
                    keystore.copies()
                );
                assert_eq!(keystore.copies()[1 - which], CopyState::Intact);
                assert!(!keystore.is_settled());
                keystore.settle(&MAC).unwrap();
                assert_eq!(read(&*store), both(&file.bytes), "byte {at}");
                assert_eq!(*store.kept.lock().unwrap(), std::slice::from_ref(&damaged));
                tried += 1;
            }
        }
    }
    println!("damage to one copy: tried={tried} repaired={tried}");
}

#[test]
fn a_copy_that_is_cut_anywhere_missing_or_rubbish_is_repaired_from_the_other() {
    let file = File::new(history());
    for len in 0..file.bytes.len() {
        let cut = [Some(file.bytes[..len].to_vec()), Some(file.bytes.clone())];
        let [state, other] = expect_repaired(&file, cut.clone(), "cut");
        assert_eq!(other, CopyState::Intact);
        assert_ne!(state, CopyState::Intact, "length {len}");
        expect_repaired(&file, swapped(cut), "cut");
    }
    for rubbish in [Some(vec![0; 4096]), Some(vec![0xaa; 100]), Some(vec![b'P'; 70_000]), None] {
        let copies = [rubbish, Some(file.bytes.clone())];
        expect_repaired(&file, copies.clone(), "rubbish");
        expect_repaired(&file, swapped(copies), "rubbish");
    }
    let missing = open([None, Some(file.bytes.clone())]).unwrap();
    assert_eq!(*missing.copies(), [CopyState::Missing, CopyState::Intact]);
}

/// A byte of each copy is changed. What must come of it follows from where they lie.
fn expect_of_two_flips(file: &File, at: [usize; 2]) {
    let copies = at.map(|at| Some(file.flipped(at, 0x10)));
    let part = at.map(|at| file.part_of(at));
    if part[0] != part[1] {
        expect_repaired(file, copies, &format!("bytes {at:?}"));
        return;
    }
    let opened = open(copies);
    if part[0] == file.groups() {
        // Nothing tells it from the torn tail of an append.
        let keystore = opened.unwrap_or_else(|error| panic!("bytes {at:?}: {error}"));
        assert_eq!(file.position(keystore.catalogue()), Some(file.groups() - 1), "bytes {at:?}");
        return;
    }
    let error = error_of(opened);
    let named = match part[0] {
        0 => "byte".to_owned(),
        part => format!("byte {}:", file.ends[part - 1]),
    };
    assert!(error.to_string().contains(&named), "bytes {at:?}: {error}");
    assert!(matches!(error.kind(), ErrorKind::Damaged | ErrorKind::Authentication | ErrorKind::Unsupported));
}

#[test]
fn damage_in_different_places_of_both_copies_is_repaired_and_in_the_same_place_it_is_named() {
    let file = File::new(history());
    let mut seeded = Seeded(0x9e37_79b9_7f4a_7c15);
    for at in 0..file.bytes.len() {
        expect_of_two_flips(&file, [at, at]);
        expect_of_two_flips(&file, [at, seeded.below(file.bytes.len())]);
        expect_of_two_flips(&file, [seeded.below(file.bytes.len()), at]);
    }
}

#[test]
fn a_damaged_header_of_one_copy_and_a_damaged_group_of_the_other_are_both_repaired() {
    let file = File::new(history());
    for header_at in [0, 7, 9, 12, 20, 35, 44, 60, file.ends[0] - 1] {
        for group in 0..file.groups() {
            let copies = [file.flipped(header_at, 0x40), file.flipped(file.ends[group] + HEAD_LEN, 1)].map(Some);
            expect_repaired(&file, copies.clone(), &format!("header byte {header_at}, group {group}"));
            expect_repaired(&file, swapped(copies), &format!("header byte {header_at}, group {group}"));
        }
    }
}

#[test]
fn a_cut_copy_and_a_damaged_one_lose_only_what_both_have_lost() {
    let file = File::new(history());
    for index in 0..file.groups() {
        for damaged in 0..file.groups() {
            let cut = file.bytes[..file.ends[index]].to_vec();
            let copies = [Some(cut), Some(file.flipped(file.ends[damaged] + 5, 1))];
            match open(copies) {
                Ok(keystore) if damaged < index => {
                    assert_eq!(file.position(keystore.catalogue()), Some(file.groups()));
                }
                Ok(keystore) => {
                    assert_eq!(damaged, file.groups() - 1, "cut after {index}, group {damaged} damaged");
                    assert_eq!(file.position(keystore.catalogue()), Some(file.groups() - 1));
                }
                Err(error) => {
                    assert!(damaged >= index && damaged < file.groups() - 1, "{index} {damaged}: {error}");
                    assert!(error.to_string().contains(&format!("byte {}:", file.ends[damaged])), "{error}");
                }
            }
        }
    }
}

/// A state before and after a rewrite that takes a database away.
struct Rewritten {
    old: Vec<u8>,
    new: Vec<u8>,
    before: Catalogue,
    after: Catalogue,
}

fn rewritten() -> Rewritten {
    let store = Arc::new(MemoryStore::default());
    let mut keystore = create(store.clone(), Vec::new()).unwrap();
    for operations in [history(), vec![new_database(2)]].concat() {
        keystore.append(&MAC, operations).unwrap();
    }
    let (old, before) = (read(&*store)[0].clone().unwrap(), copy(keystore.catalogue()));
    keystore.rewrite(&MAC, vec![Operation::Drop { database: id(2) }], None).unwrap();
    Rewritten { old, new: read(&*store)[0].clone().unwrap(), before, after: copy(keystore.catalogue()) }
}

#[test]
fn an_interrupted_rewrite_leaves_the_new_state_in_either_copy_and_is_finished() {
    let Rewritten { old, new, after, .. } = rewritten();
    for copies in [[Some(new.clone()), Some(old.clone())], [Some(old), Some(new.clone())]] {
        let store = Watched::with(copies);
        let mut keystore = open_store(store.clone()).unwrap();
        assert!(*keystore.catalogue() == after);
        assert!(keystore.copies().contains(&CopyState::Older) && keystore.copies().contains(&CopyState::Intact));
        keystore.append(&MAC, new_database(3)).unwrap();
        let [first, second] = read(&*store);
        assert_eq!(first, second);
        assert!(first.unwrap().starts_with(&new));
        assert!(store.kept.lock().unwrap().is_empty(), "the old state was kept, with the key that was to go");
    }
}

#[test]
fn damage_to_either_side_of_an_interrupted_rewrite_leaves_the_other_side() {
    let Rewritten { old, new, before, after } = rewritten();
    let flip = |bytes: &[u8], at: usize| {
        let mut bytes = bytes.to_vec();
        bytes[at] ^= 0x20;
        bytes
    };
    let expect = |damaged: Vec<u8>, whole: &[u8], catalogue: &Catalogue, what: &str| {
        let copies = [Some(damaged), Some(whole.to_vec())];
        for copies in [copies.clone(), swapped(copies)] {
            let store = Watched::with(copies);
            let mut keystore = open_store(store.clone()).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(keystore.catalogue() == catalogue, "{what}");
            keystore.settle(&MAC).unwrap();
            assert_eq!(read(&*store), both(whole), "{what}");
        }
    };
    for at in 0..new.len() {
        expect(flip(&new, at), &old, &before, &format!("new, byte {at}"));
        expect(new[..at].to_vec(), &old, &before, &format!("new, cut at {at}"));
    }
    for at in 0..old.len() {
        expect(flip(&old, at), &new, &after, &format!("old, byte {at}"));
        expect(old[..at].to_vec(), &new, &after, &format!("old, cut at {at}"));
    }
}

#[test]
fn a_damaged_rewrite_that_was_built_on_does_not_bring_the_old_state_back() {
    let Rewritten { old, new, .. } = rewritten();
    let store = Arc::new(MemoryStore::with(both(&new)));
    open_store(store.clone()).unwrap().append(&MAC, new_database(3)).unwrap();
    let mut built_on = read(&*store)[0].clone().unwrap();
    built_on[600] ^= 1;
    let error = error_of(open([Some(built_on), Some(old.clone())]));
    assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
    // Nor does an old state that is not the last before the rewrite.
    let mut damaged = new;
    damaged[600] ^= 1;
    let older = old[..old.len() - 512].to_vec();
    assert_eq!(error_of(open([Some(damaged), Some(older)])).kind(), ErrorKind::Damaged);
}

/// A keystore that was exported and went on: its bytes, the export, and the catalogue.
struct GoneOn {
    live: Vec<u8>,
    export: Vec<u8>,
    catalogue: Catalogue,
}

/// `changes` new databases after an export, which itself is `bodies` groups long.
fn gone_on(bodies: usize, changes: u8) -> GoneOn {
    let store = Arc::new(MemoryStore::default());
    let mut keystore = create(store.clone(), history().concat()).unwrap();
    for byte in 0..40 * (bodies as u8 - 1) {
        let mut wide = data_record(2 + byte, 1);
        wide.wrappings = vec![WrappedKey { blob: vec![0xbb; 4096], ..wide.wrappings[0].clone() }; 8];
        let database = Operation::Database { database: id(2 + byte), name: name(2 + byte) };
        keystore.append(&MAC, vec![database, Operation::Generation(wide)]).unwrap();
    }
    let export = keystore.export(&MAC).unwrap();
    let groups = open(alone(&export)).unwrap().tags.len() - 1;
    assert_eq!(groups, bodies, "the export has another number of groups than the test wants");
    for byte in 0..changes {
        keystore.append(&MAC, new_database(0x80 + byte)).unwrap();
    }
    GoneOn { live: read(&*store)[0].clone().unwrap(), export, catalogue: copy(keystore.catalogue()) }
}

#[test]
fn an_export_put_in_the_place_of_one_copy_does_not_beat_the_other_which_went_on() {
    // Also if its own groups lead it to a higher number than the keystore has come to meanwhile.
    for (bodies, changes) in [(1, 9), (1, 1), (1, 0), (3, 1)] {
        let GoneOn { live, export, catalogue } = gone_on(bodies, changes);
        for at in [0, 1] {
            let mut copies = both(&live);
            copies[at] = Some(export.clone());
            let store = Watched::with(copies);
            let mut keystore = open_store(store.clone()).unwrap();
            let what = format!("{bodies} bodies, {changes} changes, copy {at}");
            assert!(*keystore.catalogue() == catalogue, "{what}: acknowledged changes are gone");
            assert_eq!(keystore.copies()[1 - at], CopyState::Intact, "{what}");
            let CopyState::Damaged(told) = &keystore.copies()[at] else { panic!("{what}: {:?}", keystore.copies()) };
            let last = keystore.position().0;
            assert!(told.contains("put back") && told.ends_with(&format!("to change {last}")), "{what}: {told}");
            keystore.settle(&MAC).unwrap();
            assert!(read(&*store) == both(&live), "{what}");
            assert!(*store.kept.lock().unwrap() == std::slice::from_ref(&export), "{what}");
        }
    }
}

#[test]
fn an_export_put_in_the_place_of_one_copy_beside_a_running_handle_is_put_right() {
    let GoneOn { live, export, catalogue } = gone_on(1, 5);
    let store = Watched::with(both(&live));
    let mut keystore = open_store(store.clone()).unwrap();
    *store.inner.write().unwrap() = MemoryStore::with([Some(export), Some(live)]);
    assert!(keystore.catch_up(&MAC).unwrap());
    assert!(*keystore.catalogue() == catalogue);
    keystore.append(&MAC, new_database(3)).unwrap();
    let [first, second] = read(&*store);
    assert_eq!(first, second);
    assert!(open_store(store).unwrap().catalogue() == keystore.catalogue());
}

#[test]
fn of_two_copies_that_both_went_on_the_longer_counts_and_the_other_is_kept_aside() {
    let GoneOn { live, export, .. } = gone_on(1, 5);
    for more in [2, 9] {
        let forked = Arc::new(MemoryStore::with(both(&export)));
        let mut fork = open_store(forked.clone()).unwrap();
        (0..more).for_each(|byte| fork.append(&MAC, new_database(0xc0 + byte)).unwrap());
        let fork = read(&*forked)[0].clone().unwrap();
        let (longer, shorter) = if more > 5 { (&fork, &live) } else { (&live, &fork) };
        for copies in [[longer.clone(), shorter.clone()], [shorter.clone(), longer.clone()]] {
            let store = Watched::with(copies.map(Some));
            let mut keystore = open_store(store.clone()).unwrap();
            keystore.settle(&MAC).unwrap();
            assert!(read(&*store) == both(longer), "{more} more");
            assert!(*store.kept.lock().unwrap() == std::slice::from_ref(shorter), "{more} more");
        }
    }
}

#[test]
fn a_longer_copy_that_is_damaged_is_never_written_over_from_an_export_in_the_other() {
    let GoneOn { live, export, catalogue } = gone_on(1, 5);
    let header_len = File::new(Vec::new()).bytes.len();
    let mut refused = 0;
    for at in header_len..live.len() {
        let mut damaged = live.clone();
        damaged[at] ^= 1;
        for which in [0, 1] {
            let mut copies = both(&export);
            copies[which] = Some(damaged.clone());
            let store = Watched::with(copies.clone());
            match open_store(store.clone()) {
                // The last change is taken for a torn append; without it the longer one is still the longer one.
                Ok(keystore) => {
                    assert!(keystore.catalogue().databases().count() + 1 >= catalogue.databases().count(), "byte {at}");
                }
                Err(error) => {
                    refused += 1;
                    let text = error.to_string();
                    assert_eq!(error.kind(), ErrorKind::Damaged, "byte {at}: {text}");
                    assert!(text.contains(&store.name(which)), "byte {at} of copy {which}: {text}");
                    assert!(text.contains("longer") && text.contains("restore"), "byte {at}: {text}");
                    assert!(read(&*store) == copies);
                }
            }
        }
    }
    assert!(refused > live.len() / 2, "{refused} of {}", live.len());
}

#[test]
fn a_damaged_export_in_one_copy_leaves_the_other_which_went_on() {
    let GoneOn { live, export, catalogue } = gone_on(1, 2);
    for at in 0..export.len() {
        let mut damaged = export.clone();
        damaged[at] ^= 1;
        let mut keystore = open([Some(damaged), Some(live.clone())]).unwrap();
        assert!(*keystore.catalogue() == catalogue, "byte {at}");
        assert!(matches!(keystore.copies()[0], CopyState::Damaged(_)), "byte {at}: {:?}", keystore.copies());
        keystore.settle(&MAC).unwrap();
    }
}

#[test]
fn what_a_rewrite_left_in_one_copy_is_kept_aside_if_any_of_it_does_not_verify() {
    let Rewritten { old, new, after, .. } = rewritten();
    let mut damaged = old.clone();
    damaged[600] ^= 1;
    // Perhaps changes that the other copy never had, of which no head is whole.
    let shorter = old[..old.len() - 512].to_vec();
    let cut = [&shorter[..], &[7; 1024]].concat();
    for kept in [damaged, cut] {
        let store = Watched::with([Some(new.clone()), Some(kept.clone())]);
        let mut keystore = open_store(store.clone()).unwrap();
        assert!(*keystore.catalogue() == after);
        assert!(matches!(keystore.copies()[1], CopyState::Damaged(_)), "{:?}", keystore.copies());
        keystore.settle(&MAC).unwrap();
        assert!(*store.kept.lock().unwrap() == [kept]);
    }
    // What was torn off the very change before the rewrite, and what was to leave with it, is not.
    let behind = [&old[..], &[7; 1024]].concat();
    let store = Watched::with([Some(new), Some(behind)]);
    let mut keystore = open_store(store.clone()).unwrap();
    assert_eq!(keystore.copies()[1], CopyState::Older);
    keystore.settle(&MAC).unwrap();
    assert!(store.kept.lock().unwrap().is_empty());
}

const OF_ONE_COPY: [ReadError; 6] = [
    || io::Error::from_raw_os_error(libc::EIO),
    || io::Error::from_raw_os_error(libc::EUCLEAN),
    || io::Error::from_raw_os_error(libc::EBADMSG),
    || io::Error::from_raw_os_error(libc::EISDIR),
    || io::ErrorKind::FileTooLarge.into(),
    || io::Error::new(io::ErrorKind::InvalidInput, "it is not a plain file"),
];

impl Watched {
    fn unreadable(copies: Copies, which: &[usize], error: ReadError) -> Arc<Self> {
        let store = Self::with(copies);
        which.iter().for_each(|&which| store.read_errors.lock().unwrap()[which] = Some(error));
        store
    }
}

#[test]
fn a_copy_that_cannot_be_read_is_repaired_from_the_other_and_moved_aside() {
    let file = File::new(history());
    for error in OF_ONE_COPY {
        for which in [0, 1] {
            let store = Watched::unreadable(both(&file.bytes), &[which], error);
            let mut keystore = open_store(store.clone()).unwrap_or_else(|refused| panic!("{}: {refused}", error()));
            assert_eq!(file.position(keystore.catalogue()), Some(file.groups()));
            assert_eq!(keystore.copies()[which], CopyState::Unreadable(error().to_string()));
            assert_eq!(keystore.copies()[1 - which], CopyState::Intact);
            assert!(!keystore.is_settled() && !keystore.is_behind().unwrap());
            assert!(store.moved.lock().unwrap().is_empty(), "looking changed something");
            keystore.append(&MAC, new_database(2)).unwrap();
            assert_eq!(*store.moved.lock().unwrap(), [(which, Aside::Damaged)]);
            let [first, second] = read(&*store);
            assert!(first == second && first.unwrap().starts_with(&file.bytes));
            assert!(keystore.is_settled() && open_store(store).unwrap().catalogue() == keystore.catalogue());
        }
    }
}

#[test]
fn what_this_process_lacks_is_not_blamed_on_a_copy() {
    let file = File::new(history());
    let lacks: [ReadError; 4] = [
        || io::Error::from_raw_os_error(libc::EMFILE),
        || io::Error::from_raw_os_error(libc::EACCES),
        || io::Error::from_raw_os_error(libc::ENOMEM),
        || io::ErrorKind::OutOfMemory.into(),
    ];
    for error in lacks {
        for which in [0, 1] {
            let store = Watched::unreadable(both(&file.bytes), &[which], error);
            let refused = error_of(open_store(store.clone()));
            assert_eq!(refused.kind(), ErrorKind::Io);
            assert!(refused.to_string().contains(&store.name(which)), "{refused}");
        }
    }
}

#[test]
fn a_keystore_of_which_no_copy_can_be_read_is_an_error_that_names_it() {
    let file = File::new(history());
    for error in OF_ONE_COPY {
        let expected = if error().kind() == io::ErrorKind::FileTooLarge { ErrorKind::Damaged } else { ErrorKind::Io };
        for copies in [both(&file.bytes), alone(&file.bytes)] {
            let unreadable: &[usize] = if copies[1].is_some() { &[0, 1] } else { &[0] };
            let store = Watched::unreadable(copies, unreadable, error);
            let refused = error_of(open_store(store.clone()));
            assert_eq!(refused.kind(), expected, "{refused}");
            assert!(refused.to_string().contains(&store.name(0)), "{refused}");
        }
        // What the other one lacks or had is not made up.
        let store = Watched::unreadable(both(&file.flipped(file.ends[1] + 5, 1)), &[0], error);
        let refused = error_of(open_store(store.clone()));
        assert_eq!(refused.kind(), ErrorKind::Damaged, "{refused}");
        assert!(refused.to_string().contains(&store.name(1)), "{refused}");
        assert!(store.moved.lock().unwrap().is_empty());
    }
}

#[test]
fn a_copy_that_becomes_unreadable_under_a_running_handle_stops_it_from_nothing() {
    for which in [0, 1] {
        let store = Watched::with(both(&File::new(history()).bytes));
        let [mut ours, mut theirs] = [open_store(store.clone()).unwrap(), open_store(store.clone()).unwrap()];
        theirs.append(&MAC, new_database(2)).unwrap();
        store.read_errors.lock().unwrap()[which] = Some(OF_ONE_COPY[0]);
        assert!(ours.catch_up(&MAC).unwrap());
        assert!(ours.catalogue() == theirs.catalogue());
        ours.append(&MAC, new_database(3)).unwrap();
        assert!(open_store(store.clone()).unwrap().catalogue() == ours.catalogue());
        // The second copy is not read as long as the first can be followed.
        let moved = store.moved.lock().unwrap().len();
        assert_eq!(moved, usize::from(which == 0));
    }
}

#[test]
fn an_import_moves_aside_what_cannot_be_read() {
    let GoneOn { live, export, .. } = gone_on(1, 2);
    for which in [0, 1] {
        let store = Watched::unreadable(both(&live), &[which], OF_ONE_COPY[0]);
        let mut keystore = UnverifiedKeystore::exported(store.clone(), export.clone()).unwrap().verify(&MAC).unwrap();
        keystore.install(&MAC, 0, 0).unwrap();
        assert_eq!(*store.moved.lock().unwrap(), [(which, Aside::Replaced)]);
        assert!(*store.replaced.lock().unwrap() == std::slice::from_ref(&live));
        let reopened = open_store(store).unwrap();
        assert!(reopened.is_settled() && reopened.catalogue() == keystore.catalogue());
    }
}
