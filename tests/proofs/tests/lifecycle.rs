//! The life of a cluster through the public API: databases come and go, keys are rotated, destroyed and wrapped anew, and
//! at no point, however it is interrupted, is a key lost that somebody needs, or left that somebody was told is gone.

mod common;
#[path = "common/house.rs"]
mod house;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{copy_directory, generation};
use house::{
    Filled, House, Recorder, all_of, append, contains, generation_of, kind, opens, quick, read, seal, small_file,
    traces,
};
use pageseal::{
    Cluster, ClusterOptions, Database, ErrorKind, Generation, Hierarchy, KeyPayload, KeyWrapper, KmsClass, KmsError,
    MasterKeyId, PageError, PageFileOptions, Progress, WrapContext, WrappedKey, Wrappers,
};
use pageseal_proofs::score;

const HIERARCHIES: [Hierarchy; 2] = [Hierarchy::Direct, Hierarchy::ClusterKey];
const QUIET: &dyn Fn(Progress) = &|_| {};

fn start(hierarchy: Hierarchy) -> (House, Recorder, Cluster) {
    let (house, key) = (House::new(), Recorder::new("k"));
    let cluster = house.create(quick().hierarchy(hierarchy), &key);
    (house, key, cluster)
}

/// Calls itself as a cluster key's wrappings are called in the keystore.
struct Impostor;

impl KeyWrapper for Impostor {
    fn id(&self) -> MasterKeyId {
        MasterKeyId::new("pageseal", "cluster-key")
    }

    fn wrap_key(&self, _: &KeyPayload, _: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        panic!("it was asked to wrap")
    }

    fn unwrap_key(&self, _: &WrappedKey, _: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        panic!("it was asked to unwrap")
    }
}

#[test]
fn a_master_key_that_could_be_taken_for_the_cluster_key_is_refused_everywhere() {
    let (house, _, cluster) = start(Hierarchy::ClusterKey);
    let impostor = || Wrappers::one(Impostor);
    let elsewhere = house.directory().join("elsewhere");
    assert_eq!(kind(Cluster::create(&elsewhere, quick(), impostor())), ErrorKind::Misconfigured);
    assert_eq!(kind(house.open_with(impostor())), ErrorKind::Misconfigured);
    assert_eq!(kind(cluster.use_wrappers(impostor())), ErrorKind::Misconfigured);
    assert_eq!(kind(cluster.rewrap(impostor(), QUIET)), ErrorKind::Misconfigured);
    cluster.check_master_key().unwrap();
}

#[test]
fn a_renamed_database_keeps_its_handles_its_files_and_its_id() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let database = cluster.create_database("old").unwrap();
        cluster.create_database("other").unwrap();
        let file = small_file(&database, "f");
        append(&file, 5).unwrap();
        assert_eq!(kind(cluster.rename_database("old", "other")), ErrorKind::AlreadyExists);
        assert_eq!(kind(cluster.rename_database("none", "new")), ErrorKind::NotFound);
        assert_eq!(kind(cluster.rename_database("old", "")), ErrorKind::Invalid);
        cluster.rename_database("old", "old").unwrap();
        cluster.rename_database("old", "new").unwrap();
        assert_eq!(cluster.databases().unwrap(), ["new", "other"]);
        assert_eq!(kind(cluster.database("old")), ErrorKind::NotFound);
        append(&file, 6).unwrap();
        assert_eq!(database.name(), "old", "the name under which it was opened");
        drop(file);
        let again = cluster.database("new").unwrap();
        assert_eq!((again.id(), again.name()), (database.id(), "new"));
        assert_ne!(cluster.create_database("old").unwrap().id(), database.id());
        drop((database, again, cluster));
        let cluster = house.open(&key).unwrap();
        assert_eq!(cluster.databases().unwrap(), ["new", "old", "other"]);
        let file = cluster.database("new").unwrap().page_file("f").unwrap();
        assert_eq!([read(&file, 0).unwrap(), read(&file, 1).unwrap()], [5, 6]);
    }
}

#[test]
fn no_name_is_in_clear_in_any_file_nor_is_any_file_named_by_it() {
    let names = ["customers-of-Westphalia", "renamed-to-Rhineland", "invoices-unpaid-2026"];
    for hierarchy in HIERARCHIES {
        let (house, _, cluster) = start(hierarchy);
        let database = cluster.create_database(names[0]).unwrap();
        append(&small_file(&database, names[2]), 1).unwrap();
        cluster.rename_database(names[0], names[1]).unwrap();
        cluster.replace_cluster_key().unwrap();
        assert_eq!(cluster.databases().unwrap(), [names[1]]);
        let export = house.0.join("export");
        cluster.export(&export).unwrap();
        copy_directory(&house.directory(), &house.0.join("copy"));
        fs::rename(export, house.directory().join("export")).unwrap();
        for name in names {
            for piece in name.as_bytes().windows(8) {
                assert!(house.holding(piece).is_empty(), "{name:?} is in {:?}", house.holding(piece));
            }
            assert!(!contains(format!("{:?}", house.holding(&[])).as_bytes(), name.as_bytes()));
        }
        fs::write(house.directory().join("control"), names[0]).unwrap();
        assert_eq!(house.holding(&names[0].as_bytes()[3..11]).len(), 1, "nothing can be found this way");
    }
}

#[test]
fn a_dropped_database_is_in_no_file_any_more_and_every_handle_of_it_refuses() {
    let (mut searched, mut left) = (0, 0);
    let mut control = true;
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let others = Filled::new(&cluster, 2);
        let database = cluster.create_database("shredded").unwrap();
        let cipher = database.cipher().unwrap();
        let page = seal(&cipher, 1);
        database.rotate().unwrap();
        let newer = seal(&cipher, 2);
        let (file, closed) = (small_file(&database, "open"), small_file(&database, "closed"));
        append(&file, 3).unwrap();
        append(&closed, 4).unwrap();
        let paths = [file.path().to_path_buf(), closed.path().to_path_buf()];
        drop(closed);
        cluster.rename_database("shredded", "gone").unwrap();
        let mut pieces = traces(&house.keystore()[0], database.id());
        let blobs = key.wrappings().into_iter().filter(|it| it.database == Some(database.id()));
        pieces.extend(blobs.map(|wrapping| wrapping.blob));
        assert!(pieces.len() > 10);
        // The control: before, all of it is found in both copies.
        control &= pieces.iter().all(|piece| house.keystore().iter().all(|copy| contains(copy, piece)));

        let mut appender = file.append().unwrap();
        let shredded = cluster.drop_database("gone").unwrap();
        assert_eq!(shredded.database, database.id());
        assert_eq!(shredded.generations, [generation(1), generation(2)]);
        let mut named = shredded.files.clone();
        named.sort();
        let mut expected = paths.to_vec();
        expected.sort();
        assert_eq!(named, expected);
        assert_eq!((shredded.external, shredded.left.len()), (true, 0));
        // Under a cluster key, too: copies of that are wrapped by the master key.
        let (provider, version) = ("scripted:k", "0");
        let wrapped_by: Vec<_> =
            shredded.wrapped_by.iter().map(|(id, version)| (id.to_string(), version.as_str())).collect();
        assert_eq!(wrapped_by, [(provider.to_owned(), version)]);
        assert!(shredded.to_string().contains(provider), "{shredded}");

        searched += pieces.len();
        left += house.left_of(&pieces);
        assert!(paths.iter().all(|path| !path.exists()) && !paths[0].parent().unwrap().exists());
        assert_eq!(opens(&cipher, &page, 1), Err(PageError::Dropped));
        assert_eq!(opens(&cipher, &newer, 2), Err(PageError::Dropped));
        assert_eq!(cipher.seal_in_place(&house::AT, &mut [0; 512]), Err(PageError::Dropped));
        let payload = vec![0; file.payload_len()];
        assert_eq!(kind(appender.write(&pageseal::Inline, &payload)), ErrorKind::NotFound);
        assert_eq!(kind(appender.finish()), ErrorKind::NotFound);
        assert_eq!(kind(read(&file, 0)), ErrorKind::NotFound);
        assert_eq!(kind(append(&file, 0)), ErrorKind::NotFound);
        for outcome in [
            database.rotate().map(drop),
            database.cipher().map(drop),
            database.page_file("open").map(drop),
            database.create_page_file("more", PageFileOptions::new()).map(drop),
            database.remove_page_file("open"),
            database.release_external(generation(2)),
            database.destroy_generation(generation(1)).map(drop),
            cluster.database("gone").map(drop),
            cluster.drop_database("gone").map(drop),
        ] {
            assert_eq!(kind(outcome), ErrorKind::NotFound);
        }
        others.check(&cluster).unwrap();
        let new = cluster.create_database("gone").unwrap();
        assert_ne!(new.id(), shredded.database);
        assert_eq!(opens(&new.cipher().unwrap(), &page, 1), Err(PageError::Authentication));
        drop((cluster, database, cipher, file, new));
        let cluster = house.open(&key).unwrap();
        assert_eq!(cluster.databases().unwrap(), ["d0", "d1", "gone"]);
        others.check(&cluster).unwrap();
    }
    score(&format!("shredded searched={searched} left={left} control={}", u8::from(control)));
    assert_eq!(left, 0, "pieces of a dropped database are left in the files");
    assert!(control, "what is there was not found");
}

#[test]
fn a_database_that_another_handle_has_open_is_not_dropped() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    cluster.create_database("d").unwrap();
    let other = house.open(&key).unwrap();
    let database = other.database("d").unwrap();
    let page = seal(&database.cipher().unwrap(), 1);
    assert_eq!(kind(cluster.drop_database("d")), ErrorKind::InUse);
    opens(&cluster.database("d").unwrap().cipher().unwrap(), &page, 1).unwrap();
    drop((database, other));
    cluster.drop_database("d").unwrap();
    // And one that looks only now.
    let other = house.open(&key).unwrap();
    assert_eq!(kind(other.database("d")), ErrorKind::NotFound);
}

#[test]
fn after_a_rotation_old_pages_open_and_new_seals_carry_the_new_generation_in_every_handle() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let database = cluster.create_database("d").unwrap();
        let same = cluster.database("d").unwrap();
        let other = house.open(&key).unwrap();
        let (cipher, beside) = (database.cipher().unwrap(), other.database("d").unwrap().cipher().unwrap());
        let file = small_file(&database, "f");
        append(&file, 1).unwrap();
        let mut pages = vec![seal(&cipher, 1)];
        for number in 2..=4 {
            assert_eq!(database.rotate().unwrap(), generation(number));
            assert_eq!(cipher.generation(), generation(number));
            assert_eq!(same.generation(), generation(number));
            pages.push(seal(&cipher, number as u8));
            append(&file, number as u8).unwrap();
            let sealed = fs::read(file.path()).unwrap();
            let at = file.page_offset(u64::from(number) - 1).unwrap() as usize;
            assert_eq!(generation_of(&sealed[at..at + 512]), generation(number));
            // The other handle may seal under the generation before until it has looked.
            assert_eq!(beside.generation(), generation(number - 1));
            other.maintain().unwrap();
            assert_eq!(generation_of(&seal(&beside, 0)), generation(number));
        }
        assert_eq!(other.database("d").unwrap().rotate().unwrap(), generation(5));
        assert_eq!(database.rotate().unwrap(), generation(6), "a rotation by another handle was not taken over");
        // A page of a generation that a handle does not know yet makes it look, by itself.
        let newest = seal(&cipher, 9);
        opens(&beside, &newest, 9).unwrap();
        assert_eq!(beside.generation(), generation(6));
        for (page, number) in pages.iter().zip(1..) {
            assert_eq!(generation_of(page), generation(number));
            opens(&cipher, page, number as u8).unwrap();
            opens(&beside, page, number as u8).unwrap();
            assert_eq!(read(&file, u64::from(number) - 1).unwrap(), number as u8);
        }
        drop((cluster, other, database, same, cipher, beside, file));
        let database = house.open(&key).unwrap().database("d").unwrap();
        let cipher = database.cipher().unwrap();
        assert_eq!(cipher.generation(), generation(6));
        pages.iter().zip(1..).for_each(|(page, number)| opens(&cipher, page, number).unwrap());
        assert_eq!(read(&database.page_file("f").unwrap(), 3).unwrap(), 4);
    }
}

#[test]
fn a_failed_rotation_leaves_everything_as_it_was() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    let database = cluster.create_database("d").unwrap();
    let cipher = database.cipher().unwrap();
    let before = house.keystore();
    for calls in 0..2 {
        key.fail_after(calls, KmsClass::Denied);
        assert_eq!(kind(database.rotate()), ErrorKind::Denied);
        assert!(key.mend());
    }
    assert_eq!(house.keystore(), before);
    assert_eq!(generation_of(&seal(&cipher, 1)), Generation::FIRST);
    assert_eq!(database.rotate().unwrap(), generation(2));
}

#[test]
fn a_generation_is_destroyed_once_nobody_needs_it_and_before_all_who_do_are_named() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let database = cluster.create_database("d").unwrap();
        let cipher = database.cipher().unwrap();
        let file = small_file(&database, "ledger of 2026");
        append(&file, 1).unwrap();
        let page = seal(&cipher, 1);
        let refused = |number| {
            let error = database.destroy_generation(generation(number)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
            error.to_string()
        };
        for (holder, told) in
            [("page file", "ledger of 2026"), ("ciphers", "release_external"), ("new seals", "rotate first")]
        {
            assert!(refused(1).contains(holder) && refused(1).contains(told), "{}", refused(1));
        }
        assert_eq!(database.rotate().unwrap(), generation(2));
        assert!(!refused(1).contains("new seals"), "{}", refused(1));
        let newer = seal(&cipher, 2);
        database.release_external(generation(2)).unwrap();
        assert!(!refused(1).contains("release_external"), "{}", refused(1));
        assert_eq!(kind(database.remove_page_file("ledger of 2026")), ErrorKind::InUse, "it is open");
        drop(file);
        database.remove_page_file("ledger of 2026").unwrap();
        assert_eq!(kind(database.page_file("ledger of 2026")), ErrorKind::NotFound);
        // Another handle that has not seen the rotation may still seal under it.
        let gone = key.blobs_of(database.id(), generation(1));
        assert_eq!(house.left_of(&gone), gone.len());
        let shredded = database.destroy_generation(generation(1)).unwrap();
        assert_eq!((shredded.generations, shredded.external), (vec![generation(1)], false));
        assert_eq!(house.left_of(&gone), 0, "the wrapping of a destroyed key is left");
        assert!(key.blobs_of(database.id(), generation(2)).iter().all(|blob| house.holding(blob).len() == 2));
        assert_eq!(opens(&cipher, &page, 1), Err(PageError::UnknownGeneration(generation(1))));
        opens(&cipher, &newer, 2).unwrap();
        assert_eq!(kind(database.destroy_generation(generation(1))), ErrorKind::Invalid);
        assert_eq!(kind(database.destroy_generation(generation(7))), ErrorKind::NotFound);
        assert_eq!(kind(database.release_external(generation(1))), ErrorKind::Invalid);
        drop((cluster, database, cipher));
        let cipher = house.open(&key).unwrap().database("d").unwrap().cipher().unwrap();
        opens(&cipher, &newer, 2).unwrap();
        assert_eq!(opens(&cipher, &page, 1), Err(PageError::UnknownGeneration(generation(1))));
        assert_eq!(generation_of(&seal(&cipher, 3)), generation(2));
    }
}

#[test]
fn a_generation_that_another_handle_may_seal_under_is_not_destroyed_until_it_followed() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    let database = cluster.create_database("d").unwrap();
    let other = house.open(&key).unwrap();
    let beside = other.database("d").unwrap().cipher().unwrap();
    assert_eq!(database.generations_in_flight().unwrap(), []);
    database.rotate().unwrap();
    assert_eq!(database.generations_in_flight().unwrap(), [generation(1)]);
    // The engine may have searched for old pages before the other handle sealed its last one.
    let late = seal(&beside, 1);
    assert_eq!(generation_of(&late), generation(1));
    for error in
        [database.release_external(generation(2)).map(drop), database.destroy_generation(generation(1)).map(drop)]
    {
        assert_eq!(kind(error), ErrorKind::InUse);
    }
    other.maintain().unwrap();
    assert_eq!(database.generations_in_flight().unwrap(), []);
    // What it sealed late is released: the engine's word.
    database.release_external(generation(2)).unwrap();
    database.destroy_generation(generation(1)).unwrap();
    other.maintain().unwrap();
    assert_eq!(opens(&beside, &late, 1), Err(PageError::UnknownGeneration(generation(1))));
}

/// A move to other master keys: under what the cluster is, under what it shall be, and which of the two must not open it.
struct Move {
    name: &'static str,
    old: Recorder,
    from: Wrappers,
    to: Wrappers,
    /// What the old key alone gives afterwards; `None` where it is the same key.
    refused: bool,
    prepare: fn(&Recorder),
}

fn moves() -> Vec<Move> {
    let [a, b, c] = ["a", "b", "c"].map(Recorder::new);
    let to_another = Move {
        name: "another key",
        from: Wrappers::one(a.clone()),
        to: Wrappers::one(b.clone()),
        old: a,
        refused: true,
        prepare: |_| {},
    };
    let [a, b] = ["a", "b"].map(Recorder::new);
    let to_a_version = Move {
        name: "a new version",
        from: Wrappers::one(a.clone()),
        to: Wrappers::one(a.clone()),
        old: a,
        refused: false,
        prepare: |key| key.key.rotate(),
    };
    let one = Recorder::new("one");
    let to_two = Move {
        name: "two providers",
        from: Wrappers::one(one.clone()),
        to: all_of(&[&b, &c]),
        old: one,
        refused: true,
        prepare: |_| {},
    };
    vec![to_another, to_a_version, to_two]
}

#[test]
fn after_a_rewrap_no_old_wrapping_is_left_and_the_old_master_key_alone_opens_nothing() {
    for hierarchy in HIERARCHIES {
        for Move { name, old, from, to, refused, prepare } in moves() {
            let house = House::new();
            let cluster = Cluster::create(&house.directory(), quick().hierarchy(hierarchy), from.clone()).unwrap();
            let filled = Filled::new(&cluster, 3);
            cluster.database("d0").unwrap().rotate().unwrap();
            let olds = old.blobs();
            assert!(house.left_of(&olds) >= 2);
            prepare(&old);
            let seen = AtomicU64::new(0);
            let progress = |progress: Progress| {
                assert!(progress.done <= progress.total && progress.total <= 4, "{progress:?}");
                seen.fetch_add(1, Ordering::Relaxed);
            };
            cluster.rewrap(to.clone(), &progress).unwrap();
            assert!(seen.into_inner() > 0);
            assert_eq!(house.left_of(&olds), 0, "{name}, {hierarchy:?}: old wrappings are left");
            filled.check(&cluster).unwrap();
            cluster.check_master_key().unwrap();
            cluster.create_database("later").unwrap();
            drop(cluster);
            if refused {
                assert_eq!(kind(house.open_with(from)), ErrorKind::Misconfigured, "{name}");
                old.key.delete();
            }
            filled.check(&house.open_with(to).unwrap()).unwrap();
        }
    }
}

#[test]
fn a_rewrap_that_is_interrupted_at_any_call_loses_nothing_and_goes_on() {
    let (mut interruptions, mut lost) = (0, 0);
    for hierarchy in HIERARCHIES {
        for class in [KmsClass::Denied, KmsClass::Unclassified] {
            for side in 0..2 {
                for calls in 0.. {
                    let house = House::new();
                    let keys = [Recorder::new("a"), Recorder::new("b")];
                    let cluster = house.create(quick().hierarchy(hierarchy), &keys[0]);
                    let filled = Filled::new(&cluster, 2);
                    keys[side].fail_after(calls, class);
                    let outcome = cluster.rewrap(Wrappers::one(keys[1].clone()), QUIET);
                    if !keys[side].mend() {
                        outcome.unwrap();
                        assert!(calls > 1);
                        break;
                    }
                    assert_eq!(kind(outcome), class_kind(class), "call {calls} of side {side}");
                    interruptions += 1;
                    // Whoever opens it now needs the old master key only; then the same call goes on.
                    let reopened = house.open(&keys[0]);
                    lost += u64::from(filled.check(&cluster).is_err());
                    lost += u64::from(reopened.and_then(|cluster| filled.check(&cluster)).is_err());
                    cluster.rewrap(Wrappers::one(keys[1].clone()), QUIET).unwrap();
                    assert_eq!(house.left_of(&keys[0].blobs()), 0);
                    lost += u64::from(filled.check(&cluster).is_err());
                    lost += u64::from(house.open(&keys[1]).and_then(|cluster| filled.check(&cluster)).is_err());
                }
            }
        }
    }
    // The control: an old master key that goes away in the middle, and not at the end, is noticed by the same check.
    let house = House::new();
    let keys = [Recorder::new("a"), Recorder::new("b")];
    let cluster = house.create(quick(), &keys[0]);
    let filled = Filled::new(&cluster, 2);
    keys[1].fail_after(3, KmsClass::Denied);
    assert!(cluster.rewrap(Wrappers::one(keys[1].clone()), QUIET).is_err());
    keys[1].mend();
    keys[0].key.delete();
    let control = house.open(&keys[0]).and_then(|cluster| filled.check(&cluster)).is_err()
        && house.open(&keys[1]).and_then(|cluster| filled.check(&cluster)).is_err();
    score(&format!("rewrap-interrupted tried={interruptions} lost={lost} control={}", u8::from(control)));
    assert_eq!(lost, 0, "an interrupted rewrap lost something");
    assert!(control, "what is lost was not noticed");
}

fn class_kind(class: KmsClass) -> ErrorKind {
    match class {
        KmsClass::Denied => ErrorKind::Denied,
        KmsClass::Unclassified => ErrorKind::Unclassified,
        other => panic!("no proof uses {other:?}"),
    }
}

/// Sets a state of a master key.
type SetState = fn(&Recorder);

#[test]
fn a_rewrap_is_refused_while_the_old_or_the_new_master_key_is_revoked_and_changes_nothing() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let filled = Filled::new(&cluster, 2);
        let new = Recorder::new("new");
        let before = house.keystore();
        let states: [(SetState, ErrorKind); 4] = [
            (|key| key.key.disable(), ErrorKind::Disabled),
            (|key| key.key.delete(), ErrorKind::Deleted),
            (|key| key.key.deny(), ErrorKind::Denied),
            (|key| key.key.unreachable(), ErrorKind::Unreachable),
        ];
        for (set, expected) in states {
            for revoked in [&key, &new] {
                set(revoked);
                assert_eq!(kind(cluster.rewrap(Wrappers::one(new.clone()), QUIET)), expected);
                // The old one beside it does not help: nobody shakes a revoked master key off.
                if expected != ErrorKind::Unreachable {
                    assert_eq!(kind(cluster.rewrap(all_of(&[&key, &new]), QUIET)), expected);
                }
                revoked.key.restore();
            }
        }
        assert_eq!(house.keystore(), before, "a refused rewrap changed the keystore");
        assert_eq!(house.left_of(&new.blobs()), 0);
        filled.check(&cluster).unwrap();
    }
}

#[test]
fn a_handle_beside_a_rewrap_works_on_and_uses_the_new_master_key_when_it_is_told() {
    for hierarchy in HIERARCHIES {
        let (house, old, cluster) = start(hierarchy);
        let filled = Filled::new(&cluster, 2);
        let new = Recorder::new("new");
        let beside = house.open(&old).unwrap();
        let open = beside.database("d0").unwrap().cipher().unwrap();
        cluster.rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
        opens(&open, &filled.pages[0], 0).unwrap();
        let stranger = Recorder::new("stranger");
        assert_eq!(kind(beside.use_wrappers(Wrappers::one(stranger))), ErrorKind::Misconfigured);
        new.key.disable();
        assert_eq!(kind(beside.use_wrappers(Wrappers::one(new.clone()))), ErrorKind::Disabled);
        new.key.restore();
        if hierarchy == Hierarchy::Direct {
            assert_eq!(kind(beside.database("d1")), ErrorKind::Misconfigured);
        }
        beside.use_wrappers(Wrappers::one(new.clone())).unwrap();
        filled.check(&beside).unwrap();
        beside.create_database("later").unwrap();
        beside.check_master_key().unwrap();
        assert_eq!(cluster.databases().unwrap().len(), 3);
    }
}

/// Ends the threads of a test.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_hierarchy_is_converted_both_ways_while_databases_are_sealed_under_created_rotated_and_dropped() {
    for (from, to) in [(HIERARCHIES[0], HIERARCHIES[1]), (HIERARCHIES[1], HIERARCHIES[0])] {
        let (house, key, cluster) = start(from);
        let filled = Filled::new(&cluster, 20);
        let rotating = cluster.create_database("rotating").unwrap();
        let (stop, made) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let sealing = scope.spawn(|| {
                let cipher = rotating.cipher().unwrap();
                let mut pages = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    pages.push(seal(&cipher, 7));
                    rotating.rotate().unwrap();
                    // Faster than anybody rotates; but a conversion never ends if there is always one more key.
                    std::thread::sleep(Duration::from_millis(5));
                }
                pages
            });
            let creating = scope.spawn(|| {
                let other = house.open(&key).unwrap();
                let mut pages = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let name = format!("new{}", pages.len());
                    pages.push(seal(&other.create_database(&name).unwrap().cipher().unwrap(), 8));
                    made.fetch_add(1, Ordering::Relaxed);
                    other.create_database("short-lived").unwrap();
                    other.drop_database("short-lived").unwrap();
                    std::thread::sleep(Duration::from_millis(5));
                }
                pages
            });
            // Also if something below fails: else nobody would learn of it.
            let _stop = StopOnDrop(&stop);
            for round in 0..3 {
                let before = made.load(Ordering::Relaxed);
                cluster.set_hierarchy(to, QUIET).unwrap();
                assert_eq!(cluster.hierarchy(), to);
                cluster.set_hierarchy(to, QUIET).unwrap();
                filled.check(&cluster).unwrap();
                if round < 2 {
                    cluster.set_hierarchy(from, QUIET).unwrap();
                }
                while made.load(Ordering::Relaxed) == before {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            stop.store(true, Ordering::Relaxed);
            let (sealed, created) = (sealing.join().unwrap(), creating.join().unwrap());
            let reopened = house.open(&key).unwrap();
            assert_eq!(reopened.hierarchy(), to);
            for cluster in [&cluster, &reopened] {
                filled.check(cluster).unwrap();
                let cipher = cluster.database("rotating").unwrap().cipher().unwrap();
                sealed.iter().for_each(|page| opens(&cipher, page, 7).unwrap());
                for (number, page) in created.iter().enumerate() {
                    opens(&cluster.database(&format!("new{number}")).unwrap().cipher().unwrap(), page, 8).unwrap();
                }
            }
        });
        // What the old hierarchy wrapped has left the files, and the new one needs no more calls than it says.
        let data: Vec<_> = key.wrappings().into_iter().filter(|it| it.database.is_some()).map(|it| it.blob).collect();
        let calls = key.key.calls();
        let reopened = house.open(&key).unwrap();
        filled.check(&reopened).unwrap();
        match to {
            Hierarchy::ClusterKey => {
                assert_eq!(house.left_of(&data), 0, "wrappings by the key service are left");
                assert_eq!(key.key.calls() - calls, 1, "a cluster key takes one call");
            }
            _ => assert!(key.key.calls() - calls >= 21),
        }
    }
}

#[test]
fn a_conversion_that_is_interrupted_at_any_call_leaves_the_old_hierarchy_whole_and_goes_on() {
    let (mut interruptions, mut lost) = (0, 0);
    for (from, to) in [(HIERARCHIES[0], HIERARCHIES[1]), (HIERARCHIES[1], HIERARCHIES[0])] {
        for calls in 0.. {
            let (house, key, cluster) = start(from);
            let filled = Filled::new(&cluster, 3);
            key.fail_after(calls, KmsClass::Denied);
            let outcome = cluster.set_hierarchy(to, QUIET);
            if !key.mend() {
                outcome.unwrap();
                assert!(calls > 2);
                break;
            }
            interruptions += 1;
            assert_eq!(kind(outcome), ErrorKind::Denied);
            assert_eq!(cluster.hierarchy(), from);
            lost += u64::from(filled.check(&cluster).is_err());
            lost += u64::from(house.open(&key).and_then(|cluster| filled.check(&cluster)).is_err());
            cluster.set_hierarchy(to, QUIET).unwrap();
            lost += u64::from(filled.check(&cluster).is_err());
            lost += u64::from(house.open(&key).and_then(|cluster| filled.check(&cluster)).is_err());
        }
    }
    // The control: where the one master key is gone, the same check notices.
    let (house, key, cluster) = start(Hierarchy::Direct);
    let filled = Filled::new(&cluster, 1);
    key.key.delete();
    let control = house.open(&key).and_then(|cluster| filled.check(&cluster)).is_err();
    score(&format!("conversion-interrupted tried={interruptions} lost={lost} control={}", u8::from(control)));
    assert_eq!(lost, 0);
    assert!(control);
}

/// Interrupts a conversion when each key has both wrappings, just before the hierarchy changes.
fn convert_almost(cluster: &Cluster, to: Hierarchy) {
    let interrupted = catch_unwind(AssertUnwindSafe(|| {
        cluster.set_hierarchy(to, &|progress| assert!(progress.done < progress.total, "interrupted on purpose"))
    }));
    assert!(interrupted.is_err());
    assert_ne!(cluster.hierarchy(), to);
}

#[test]
fn what_an_interrupted_conversion_left_does_not_survive_a_rewrap_nor_pass_for_done() {
    for (from, to) in [(HIERARCHIES[0], HIERARCHIES[1]), (HIERARCHIES[1], HIERARCHIES[0])] {
        let (house, old, cluster) = start(from);
        let filled = Filled::new(&cluster, 2);
        convert_almost(&cluster, to);
        filled.check(&cluster).unwrap();
        let new = Recorder::new("new");
        cluster.rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
        assert_eq!(house.left_of(&old.blobs()), 0, "the old master key still wraps data keys, from {from:?}");
        old.key.delete();
        filled.check(&cluster).unwrap();
        cluster.set_hierarchy(to, QUIET).unwrap();
        filled.check(&cluster).unwrap();
        filled.check(&house.open(&new).unwrap()).expect("the new master key does not open every database");
    }
}

#[test]
fn a_conversion_that_goes_on_under_other_master_keys_wraps_what_those_have_not() {
    let (house, [a, b]) = (House::new(), ["a", "b"].map(Recorder::new));
    let both = all_of(&[&a, &b]);
    let cluster = Cluster::create(&house.directory(), quick().hierarchy(Hierarchy::ClusterKey), both).unwrap();
    let filled = Filled::new(&cluster, 2);
    cluster.use_wrappers(Wrappers::one(a.clone())).unwrap();
    convert_almost(&cluster, Hierarchy::Direct);
    cluster.use_wrappers(Wrappers::one(b.clone())).unwrap();
    a.key.delete();
    cluster.set_hierarchy(Hierarchy::Direct, QUIET).unwrap();
    filled.check(&house.open(&b).unwrap()).expect("a conversion ended with keys that no configured master key wraps");
}

#[test]
fn a_cluster_key_that_is_replaced_in_the_middle_of_a_conversion_leaves_no_key_behind() {
    for (from, to) in [(HIERARCHIES[0], HIERARCHIES[1]), (HIERARCHIES[1], HIERARCHIES[0])] {
        let (house, key, cluster) = start(from);
        let filled = Filled::new(&cluster, 2);
        convert_almost(&cluster, to);
        cluster.replace_cluster_key().unwrap();
        filled.check(&house.open(&key).unwrap()).unwrap();
        cluster.set_hierarchy(to, QUIET).unwrap();
        cluster.replace_cluster_key().unwrap();
        filled.check(&house.open(&key).unwrap()).unwrap();
    }
}

/// A clock that the test moves, in days since 1970.
#[derive(Clone)]
struct Days(Arc<AtomicU64>);

impl Days {
    fn set(&self, days: u64) {
        self.0.store(days, Ordering::Relaxed);
    }

    fn options(&self) -> ClusterOptions {
        let days = Arc::clone(&self.0);
        quick().clock(move || Duration::from_secs(days.load(Ordering::Relaxed) * 86_400))
    }
}

#[test]
fn the_cluster_key_replaces_itself_after_90_days_and_no_page_is_rewritten() {
    for hierarchy in HIERARCHIES {
        let (house, key, days) = (House::new(), Recorder::new("k"), Days(Arc::new(AtomicU64::new(20_000))));
        let cluster = house.create(days.options().hierarchy(hierarchy), &key);
        let filled = Filled::new(&cluster, 3);
        let file = small_file(&cluster.database("d0").unwrap(), "f");
        append(&file, 1).unwrap();
        let beside = Cluster::open(&house.directory(), days.options(), Wrappers::one(key.clone())).unwrap();
        let open = beside.database("d1").unwrap().cipher().unwrap();
        let sealed = fs::read(file.path()).unwrap();
        let replaced = |cluster: &Cluster| cluster.maintain().unwrap().cluster_key_replaced;
        let old = cluster_blobs(&key);
        days.set(20_089);
        assert!(!replaced(&cluster));
        days.set(20_090);
        let (wraps, unwraps) = (key.key.wraps(), key.key.unwraps());
        assert!(replaced(&cluster), "90 days are over");
        assert_eq!(
            (key.key.wraps() - wraps, key.key.unwraps() - unwraps),
            (1, 2),
            "one wrap, verified, and one unwrap"
        );
        assert!(!replaced(&cluster) && !replaced(&beside));
        assert_eq!(house.left_of(&old), 0, "the old cluster key is left");
        assert_eq!(fs::read(file.path()).unwrap(), sealed, "a page was rewritten");
        // A clock that is wrong for a while neither stops the replacing nor makes it go on and on.
        days.set(19_000);
        assert!(replaced(&cluster), "the age of a key from the future is not known");
        assert!(!replaced(&cluster));
        days.set(20_091);
        assert!(replaced(&beside), "the other handle does it as well");
        assert!(!replaced(&beside) && !replaced(&cluster));
        // An hour back is no reason: clocks are corrected all the time.
        days.set(20_090);
        assert!(!replaced(&cluster));
        filled.check(&cluster).unwrap();
        filled.check(&beside).unwrap();
        opens(&open, &filled.pages[1], 1).unwrap();
        assert_eq!(read(&file, 0).unwrap(), 1);
        cluster.create_database("later").unwrap();
        drop((cluster, beside, file, open));
        let cluster = house.open(&key).unwrap();
        filled.check(&cluster).unwrap();
        assert_eq!(read(&cluster.database("d0").unwrap().page_file("f").unwrap(), 0).unwrap(), 1);
    }
}

/// What the master key made of cluster keys.
fn cluster_blobs(key: &Recorder) -> Vec<Vec<u8>> {
    key.wrappings().into_iter().filter(|it| it.purpose == pageseal::Purpose::Cluster).map(|it| it.blob).collect()
}

#[test]
fn a_replacement_of_the_cluster_key_that_is_interrupted_changes_nothing() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let filled = Filled::new(&cluster, 2);
        let before = house.keystore();
        for calls in 0..3 {
            key.fail_after(calls, KmsClass::Denied);
            assert_eq!(kind(cluster.replace_cluster_key()), ErrorKind::Denied, "call {calls}");
            assert!(key.mend());
            assert_eq!(house.keystore(), before);
            filled.check(&cluster).unwrap();
        }
        key.fail_after(3, KmsClass::Denied);
        cluster.replace_cluster_key().unwrap();
        key.mend();
        filled.check(&house.open(&key).unwrap()).unwrap();
    }
}

#[test]
fn a_wrapping_that_was_missing_is_made_later_and_then_either_master_key_opens_everything() {
    for hierarchy in HIERARCHIES {
        let (house, [a, b]) = (House::new(), ["a", "b"].map(Recorder::new));
        b.key.unreachable();
        let cluster = Cluster::create(&house.directory(), quick().hierarchy(hierarchy), all_of(&[&a, &b])).unwrap();
        let filled = Filled::new(&cluster, 3);
        let lacking = if hierarchy == Hierarchy::Direct { 5 } else { 2 };
        let before = house.keystore();
        let told = cluster.maintain().unwrap();
        assert_eq!((told.wrappings_repaired, told.wrappings_missing), (0, lacking), "{told:?}");
        assert_eq!(house.keystore(), before);
        assert_eq!(kind(house.open(&b)), ErrorKind::Misconfigured);
        b.key.restore();
        let told = cluster.maintain().unwrap();
        assert_eq!((told.wrappings_repaired, told.wrappings_missing), (lacking, 0), "{told:?}");
        let told = cluster.maintain().unwrap();
        assert_eq!((told.wrappings_repaired, told.wrappings_missing), (0, 0), "{told:?}");
        for key in [&a, &b] {
            filled.check(&house.open(key).unwrap()).unwrap();
        }
        // And one that is added to the configuration.
        let c = Recorder::new("c");
        cluster.use_wrappers(all_of(&[&a, &b, &c])).unwrap();
        assert_eq!(cluster.maintain().unwrap().wrappings_repaired, lacking);
        filled.check(&house.open(&c).unwrap()).unwrap();
        c.key.disable();
        assert_eq!(kind(house.open_with(all_of(&[&a, &b, &c]))), ErrorKind::Disabled, "the new one has no say");
    }
}

/// Loses or damages the keystore.
type Harm = fn(&House);

#[test]
fn an_exported_keystore_brings_the_cluster_back_after_both_copies_are_lost_or_damaged() {
    let harms: [Harm; 4] = [
        |house| house.copies().iter().for_each(|path| fs::remove_file(path).unwrap()),
        |house| house.put_keystore(&house.keystore().map(|bytes| vec![0; bytes.len()])),
        |house| house.put_keystore(&house.keystore().map(|bytes| flipped(bytes, 40))),
        |house| house.put_keystore(&house.keystore().map(|bytes| flipped(bytes, 600))),
    ];
    for hierarchy in HIERARCHIES {
        for harm in harms {
            let (house, key, cluster) = start(hierarchy);
            let filled = Filled::new(&cluster, 2);
            let file = small_file(&cluster.database("d0").unwrap(), "f");
            append(&file, 1).unwrap();
            let export = house.0.join("export");
            cluster.export(&export).unwrap();
            assert_eq!(kind(cluster.export(&export)), ErrorKind::AlreadyExists);
            // The file sees changes that the export does not have.
            cluster.create_database("after").unwrap();
            append(&file, 2).unwrap();
            drop((file, cluster));
            harm(&house);
            let before = fs::read(&export).unwrap();
            assert!(matches!(
                kind(house.open(&key)),
                ErrorKind::NotFound | ErrorKind::Damaged | ErrorKind::Authentication | ErrorKind::BadCiphertext
            ));
            let import = || Cluster::import(&house.directory(), &export, quick(), Wrappers::one(key.clone()));
            let cluster = import().unwrap();
            filled.check(&cluster).unwrap();
            assert_eq!(cluster.databases().unwrap(), ["d0", "d1"]);
            let file = cluster.database("d0").unwrap().page_file("f").unwrap();
            assert_eq!([read(&file, 0).unwrap(), read(&file, 1).unwrap()], [1, 2]);
            append(&file, 3).unwrap();
            cluster.create_database("new").unwrap();
            assert_eq!(fs::read(&export).unwrap(), before, "the export was changed");
            assert_eq!(kind(import()), ErrorKind::AlreadyExists, "an older export replaced a newer keystore");
            drop((file, cluster));
            assert_eq!(kind(import()), ErrorKind::AlreadyExists);
            assert_eq!(house.open(&key).unwrap().databases().unwrap(), ["d0", "d1", "new"]);
        }
    }
}

fn flipped(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
    bytes[at] ^= 1;
    bytes
}

#[test]
fn an_import_is_refused_over_another_cluster_and_of_anything_but_a_whole_export_of_this_one() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    let (other, _, foreign) = start(Hierarchy::Direct);
    let filled = Filled::new(&cluster, 1);
    let export = house.0.join("export");
    cluster.export(&export).unwrap();
    let import = |house: &House, key: &Recorder, options: ClusterOptions| {
        Cluster::import(&house.directory(), &export, options, Wrappers::one(key.clone()))
    };
    let theirs = other.keystore();
    assert_eq!(kind(import(&other, &key, quick())), ErrorKind::WrongIdentity);
    assert_eq!(other.keystore(), theirs, "another cluster's keystore was touched");
    assert_eq!(kind(import(&house, &key, quick().expected_id(foreign.id()))), ErrorKind::WrongIdentity);
    assert_eq!(kind(import(&house, &key, quick())), ErrorKind::AlreadyExists, "the keystore there is the same");
    cluster.rename_database("d0", "d0").unwrap();
    assert_eq!(
        kind(import(&house, &key, quick())),
        ErrorKind::AlreadyExists,
        "the keystore there is newer by one change"
    );
    let empty = House::new();
    let stranger = Recorder::new("stranger");
    assert_eq!(kind(import(&empty, &stranger, quick())), ErrorKind::Misconfigured);
    key.key.disable();
    assert_eq!(kind(import(&empty, &key, quick())), ErrorKind::Disabled);
    key.key.restore();
    let good = fs::read(&export).unwrap();
    for at in (0..good.len()).step_by(97) {
        fs::write(&export, flipped(good.clone(), at)).unwrap();
        // A byte that no MAC covers is a zero behind a group's end.
        if let Ok(cluster) = import(&empty, &key, quick()) {
            panic!("a byte flip at {at} was imported: {cluster:?}");
        }
    }
    fs::write(&export, &good[..good.len() - 600]).unwrap();
    assert!(import(&empty, &key, quick()).is_err(), "a part was imported");
    fs::remove_file(&export).unwrap();
    assert_eq!(kind(import(&empty, &key, quick())), ErrorKind::NotFound);
    assert!(!empty.copies().iter().any(|path| path.exists()), "a refused import left a keystore");
    fs::write(&export, &good).unwrap();
    let moved = import(&empty, &key, quick()).unwrap();
    filled.check(&moved).unwrap();
    filled.check(&cluster).unwrap();
}

#[test]
fn the_same_export_brings_a_cluster_back_twice_and_files_that_saw_the_first_time_open() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    let file = small_file(&cluster.create_database("d").unwrap(), "f");
    let export = house.0.join("export");
    fs::write(house.0.join("export.tmp"), b"a file of somebody's").unwrap();
    cluster.export(&export).unwrap();
    assert_eq!(fs::read(house.0.join("export.tmp")).unwrap(), b"a file of somebody's");
    assert_eq!(
        house.0.join("export").parent().unwrap().read_dir().unwrap().count(),
        3,
        "an export left something behind"
    );
    append(&file, 1).unwrap();
    drop((file, cluster));
    for time in 2..=3 {
        house.copies().iter().for_each(|copy| fs::remove_file(copy).unwrap());
        // As long as it took to lose it again, at least.
        std::thread::sleep(Duration::from_millis(1_100));
        let cluster = Cluster::import(&house.directory(), &export, quick(), Wrappers::one(key.clone())).unwrap();
        cluster.create_database(&format!("after {time}")).unwrap();
        let file = cluster.database("d").unwrap().page_file("f").unwrap();
        append(&file, time).unwrap();
        assert_eq!(read(&file, 0).unwrap(), 1);
    }
}

#[test]
fn no_older_keystore_is_imported_beside_anybody_who_has_the_cluster_open_and_newer_keys() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let database = cluster.create_database("d").unwrap();
        let [older, newer] = ["older", "newer"].map(|name| house.0.join(name));
        cluster.export(&older).unwrap();
        database.rotate().unwrap();
        let page = seal(&database.cipher().unwrap(), 7);
        house.copies().iter().for_each(|copy| fs::remove_file(copy).unwrap());
        let import = |export| Cluster::import(&house.directory(), export, quick(), Wrappers::one(key.clone()));
        assert_eq!(kind(import(&older)), ErrorKind::InUse);
        assert!(house.copies().iter().all(|copy| !copy.exists()), "a refused import left a keystore");
        // Who has it open still knows everything.
        cluster.export(&newer).unwrap();
        drop((database, cluster));
        let cluster = import(&newer).unwrap();
        opens(&cluster.database("d").unwrap().cipher().unwrap(), &page, 7).unwrap();
        assert_eq!(kind(import(&newer)), ErrorKind::AlreadyExists);
    }
}

#[test]
fn an_older_keystore_put_back_beside_a_running_process_is_noticed_and_what_it_knows_can_be_exported() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    let database = cluster.create_database("d").unwrap();
    let older = house.keystore();
    database.rotate().unwrap();
    let page = seal(&database.cipher().unwrap(), 7);
    house.put_keystore(&older);
    assert_eq!(kind(cluster.create_database("e")), ErrorKind::KeystoreStale);
    let export = house.0.join("export");
    cluster.export(&export).unwrap();
    drop((database, cluster));
    let cluster = Cluster::import(&house.directory(), &export, quick(), Wrappers::one(key.clone())).unwrap();
    opens(&cluster.database("d").unwrap().cipher().unwrap(), &page, 7).unwrap();
}

#[test]
fn an_export_copied_over_one_file_of_a_keystore_that_went_on_loses_no_key() {
    for hierarchy in HIERARCHIES {
        for which in [0, 1] {
            let (house, key, cluster) = start(hierarchy);
            let export = house.0.join("export");
            cluster.create_database("before").unwrap();
            cluster.export(&export).unwrap();
            let filled = Filled::new(&cluster, 3);
            drop(cluster);
            let good = house.keystore();
            fs::copy(&export, &house.copies()[which]).unwrap();
            let cluster = house.open(&key).unwrap();
            filled.check(&cluster).unwrap();
            let findings = cluster.keystore_findings();
            assert!(findings.len() == 1 && findings[0].contains("put back"), "{findings:?}");
            assert!(findings[0].starts_with(&house.copies()[which].display().to_string()), "{findings:?}");
            assert!(house.keystore() == good, "the copy was not made anew");
            let kept =
                house.files().into_iter().filter(|(path, _)| path.to_string_lossy().contains("keystore.damaged-"));
            let export = fs::read(&export).unwrap();
            assert!(kept.map(|(_, bytes)| bytes).eq([export]), "what was put back was not kept");
        }
    }
}

#[test]
fn what_an_import_or_a_repair_kept_aside_stays_until_something_is_to_leave() {
    for hierarchy in HIERARCHIES {
        let (house, key, cluster) = start(hierarchy);
        let export = house.0.join("export");
        cluster.create_database("d").unwrap();
        cluster.export(&export).unwrap();
        // Its key is in the damaged files only.
        let lost = cluster.create_database("after").unwrap().id();
        cluster.create_database("last").unwrap();
        drop(cluster);
        let damaged = house.keystore().map(|bytes| flipped(bytes, 600));
        house.put_keystore(&damaged);
        let kept = |name: &str| {
            let named = |path: &Path| path.file_name().unwrap().to_string_lossy().starts_with(name);
            house.files().into_iter().filter(|(path, _)| named(path)).collect::<Vec<_>>()
        };
        let b = Recorder::new("b");
        let cluster = Cluster::import(&house.directory(), &export, quick(), Wrappers::one(key.clone())).unwrap();
        let replaced = kept("keystore.replaced-");
        assert!(replaced.iter().map(|(_, bytes)| bytes).eq([&damaged[0]]), "{} are kept", replaced.len());
        drop(cluster);
        // One copy is damaged, too, and made anew.
        fs::write(&house.copies()[1], flipped(house.keystore()[1].clone(), 600)).unwrap();
        let cluster = house.open(&key).unwrap();
        let aside = kept("keystore.damaged-");
        assert_eq!(aside.len(), 1);
        // What the cluster does by itself removes nothing.
        cluster.replace_cluster_key().unwrap();
        cluster.use_wrappers(all_of(&[&key, &b])).unwrap();
        assert!(cluster.maintain().unwrap().wrappings_repaired > 0);
        assert!(kept("keystore.damaged-") == aside && kept("keystore.replaced-") == replaced);
        let shredded = cluster.drop_database("d").unwrap();
        assert_eq!(kept("keystore.damaged-").len(), 0);
        assert!(kept("keystore.replaced-") == replaced, "the only bytes with a key are gone");
        assert!(replaced.iter().map(|(path, _)| path).eq(&shredded.copies), "{:?}", shredded.copies);
        let told = shredded.to_string();
        assert!(shredded.copies.iter().all(|path| told.contains(&path.display().to_string())), "{told}");
        assert!(
            key.blobs_of(lost, Generation::FIRST)
                .iter()
                .all(|blob| hierarchy == Hierarchy::ClusterKey || contains(&replaced[0].1, blob))
        );
        let database = cluster.create_database("e").unwrap();
        database.rotate().unwrap();
        assert_eq!(database.destroy_generation(Generation::FIRST).unwrap().copies, shredded.copies);
        shredded.copies.iter().for_each(|path| fs::remove_file(path).unwrap());
        let shredded = cluster.drop_database("e").unwrap();
        assert!(shredded.copies.is_empty() && !shredded.to_string().contains("replaced"), "{shredded}");
    }
}

/// Puts something in the place of a file that cannot be read as a keystore.
fn make_unreadable(path: &Path, directory: bool) {
    if directory {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
        fs::write(path.join("note"), b"not ours").unwrap();
    } else {
        fs::OpenOptions::new().write(true).open(path).unwrap().set_len((1 << 30) + 1).unwrap();
    }
}

/// What is kept aside, directories too.
fn kept_aside(house: &House, name: &str) -> Vec<std::path::PathBuf> {
    let named = |path: &std::path::PathBuf| path.file_name().unwrap().to_string_lossy().starts_with(name);
    fs::read_dir(house.directory()).unwrap().map(|entry| entry.unwrap().path()).filter(named).collect()
}

#[test]
fn one_copy_that_cannot_be_read_stops_nothing_and_is_moved_aside_and_made_anew() {
    for directory in [true, false] {
        for which in [0, 1] {
            let (house, key, cluster) = start(Hierarchy::Direct);
            let filled = Filled::new(&cluster, 2);
            let good = house.keystore();
            // Under a running process, and for the next one.
            make_unreadable(&house.copies()[which], directory);
            filled.check(&cluster).unwrap();
            cluster.export(&house.0.join("export")).unwrap();
            drop(cluster);
            let cluster = house.open(&key).unwrap();
            filled.check(&cluster).unwrap();
            let findings = cluster.keystore_findings();
            let named = format!("{} cannot be read", house.copies()[which].display());
            assert!(findings.len() == 1 && findings[0].starts_with(&named), "{findings:?}");
            assert!(house.keystore() == good, "it was not made anew");
            let [aside] = kept_aside(&house, "keystore.damaged-").try_into().unwrap();
            assert_eq!(aside.is_dir(), directory);
            assert!(!directory || fs::read(aside.join("note")).unwrap() == b"not ours");
            cluster.drop_database("d1").unwrap();
            drop(cluster);
            assert_eq!(house.open(&key).unwrap().keystore_findings(), [""; 0]);
        }
    }
}

#[test]
fn copies_that_cannot_be_read_do_not_prevent_an_export_by_who_has_it_in_memory_nor_an_import() {
    for directory in [true, false] {
        let (house, key, cluster) = start(Hierarchy::Direct);
        let filled = Filled::new(&cluster, 2);
        make_unreadable(&house.copies()[0], directory);
        fs::write(&house.copies()[1], b"rubbish").unwrap();
        let export = house.0.join("export");
        cluster.export(&export).unwrap();
        house.copies().iter().for_each(|copy| drop(fs::remove_file(copy)));
        fs::create_dir_all(&house.copies()[0]).unwrap();
        fs::create_dir_all(&house.copies()[1]).unwrap();
        cluster.export(&house.0.join("again")).unwrap();
        drop(cluster);
        assert_eq!(kind(house.open(&key)), ErrorKind::Io);
        let import = || Cluster::import(&house.directory(), &export, quick(), Wrappers::one(key.clone()));
        // Whether a newer one is there nobody can tell.
        let error = import().unwrap_err();
        assert!(error.kind() == ErrorKind::Io && error.to_string().contains("move both files away"), "{error}");
        fs::remove_dir(&house.copies()[1]).unwrap();
        fs::write(&house.copies()[1], b"rubbish").unwrap();
        let cluster = import().unwrap();
        filled.check(&cluster).unwrap();
        assert_eq!(kept_aside(&house, "keystore.replaced-").len(), 2);
        drop(cluster);
        filled.check(&house.open(&key).unwrap()).unwrap();
    }
}

#[test]
fn a_dropped_database_is_not_in_an_export_made_after_it_and_is_in_one_made_before() {
    let (house, key, cluster) = start(Hierarchy::Direct);
    let database: Database = cluster.create_database("d").unwrap();
    let [before, after] = ["before", "after"].map(|name| house.0.join(name));
    cluster.export(&before).unwrap();
    let blobs = key.blobs_of(database.id(), Generation::FIRST);
    cluster.drop_database("d").unwrap();
    cluster.export(&after).unwrap();
    assert!(contains(&fs::read(before).unwrap(), &blobs[0]));
    assert!(!contains(&fs::read(after).unwrap(), &blobs[0]));
}
