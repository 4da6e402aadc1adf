//! What handles promise: changes, those of others, rewrites, exports.

use std::time::Duration;

use super::*;

fn two_handles(store: &Arc<Watched>) -> [Keystore; 2] {
    [open_store(store.clone()).unwrap(), open_store(store.clone()).unwrap()]
}

fn same(a: &Keystore, b: &Keystore) -> bool {
    a.catalogue() == b.catalogue() && a.position() == b.position() && a.tags == b.tags && a.versions == b.versions
}

#[test]
fn catching_up_reads_only_what_was_appended() {
    let store = Watched::with(both(&File::new(history()).bytes));
    let [mut ours, mut theirs] = two_handles(&store);
    assert!(!ours.is_behind().unwrap());
    assert!(!ours.catch_up(&MAC).unwrap());
    for byte in 2..6 {
        theirs.append(&MAC, new_database(byte)).unwrap();
    }
    let whole_reads = store.whole_reads.load(Ordering::Relaxed);
    assert!(ours.is_behind().unwrap());
    assert!(ours.catch_up(&MAC).unwrap());
    assert!(same(&ours, &theirs) && ours.is_settled() && !ours.is_behind().unwrap());
    assert_eq!(store.whole_reads.load(Ordering::Relaxed), whole_reads);
    ours.append(&MAC, new_database(7)).unwrap();
    assert!(theirs.catch_up(&MAC).unwrap());
    assert!(same(&ours, &theirs));
    assert!(same(&ours, &open_store(store).unwrap()));
}

#[test]
fn catching_up_after_a_rewrite_reads_all_and_believes_what_was_before_it() {
    let store = Watched::with(both(&File::new(history()).bytes));
    let [mut ours, mut theirs] = two_handles(&store);
    let seen = ours.position();
    theirs.append(&MAC, new_database(2)).unwrap();
    let other = theirs.position();
    theirs.rewrite(&MAC, vec![Operation::Drop { database: id(1) }], None).unwrap();
    theirs.append(&MAC, new_database(3)).unwrap();
    assert!(ours.catch_up(&MAC).unwrap());
    assert!(same(&ours, &theirs) && ours.is_settled());
    assert!(ours.has(seen.0, &seen.1) && ours.has(other.0, &other.1));
    let (now, tag) = ours.position();
    assert!(ours.has(now, &tag) && !ours.has(now, &[0; 16]) && !ours.has(now + 1, &tag));
    assert!(ours.has(now - 1, ours.tag_of(now - 1).unwrap()) && !ours.has(now - 1, &tag));
}

#[test]
fn a_first_copy_that_cannot_be_followed_is_caught_up_from_the_second() {
    let file = File::new(history());
    let store = Watched::with(both(&file.bytes[..file.ends[2]]));
    let mut keystore = open_store(store.clone()).unwrap();
    let damaged = file.flipped(file.ends[2] + 200, 1);
    *store.inner.write().unwrap() = MemoryStore::with([Some(damaged), Some(file.bytes.clone())]);
    assert!(keystore.catch_up(&MAC).unwrap());
    assert_eq!(file.position(keystore.catalogue()), Some(4));
    assert!(matches!(keystore.copies()[0], CopyState::Damaged(_)) && !keystore.is_settled());
    keystore.append(&MAC, new_database(2)).unwrap();
    assert!(read(&*store)[0].as_ref().unwrap().starts_with(&file.bytes));
}

#[test]
fn an_older_pair_put_back_under_a_running_handle_is_stale_until_the_newest_is_back() {
    let file = File::new(every_kind());
    let mut fork = history();
    fork[3] = new_database(9);
    let mut longer_fork = every_kind();
    longer_fork.truncate(10);
    longer_fork.insert(3, vec![Operation::Probe(cluster_record(Purpose::Probe))]);
    longer_fork.push(new_database(7));
    let forks = [fork, longer_fork].map(|groups| File::new(groups).bytes);
    let older = (0..file.groups()).map(|index| file.bytes[..file.ends[index]].to_vec());
    for put_back in older.chain(forks) {
        let scratch = Scratch::new("stale");
        let disk = disk_with(both(&file.bytes), Broken::No);
        let mut keystore = open_store(scratch.store(&disk)).unwrap();
        (0..2).for_each(|which| disk.set(&path(which), &put_back));
        assert!(keystore.is_behind().unwrap());
        let error = error_of(keystore.catch_up(&MAC));
        assert_eq!(error.kind(), ErrorKind::KeystoreStale, "{error}");
        assert_eq!(file.position(keystore.catalogue()), Some(file.groups()), "what was put back was taken over");
        assert_eq!(error_of(keystore.append(&MAC, new_database(6))).kind(), ErrorKind::Io);
        assert_eq!(error_of(keystore.catch_up(&MAC)).kind(), ErrorKind::KeystoreStale);
        assert_eq!(disk.seen(&path(0)), Some(put_back));
        (0..2).for_each(|which| disk.set(&path(which), &file.bytes));
        assert!(keystore.catch_up(&MAC).unwrap());
        keystore.append(&MAC, new_database(6)).unwrap();
    }
}

#[test]
fn a_pair_from_before_a_rewrite_is_stale_too_and_one_old_copy_is_not() {
    let file = File::new(history());
    let scratch = Scratch::new("stale-rewrite");
    let disk = disk_with(both(&file.bytes), Broken::No);
    let mut keystore = open_store(scratch.store(&disk)).unwrap();
    keystore.rewrite(&MAC, new_database(2), None).unwrap();
    let new = disk.seen(&path(0)).unwrap();
    disk.set(&path(1), &file.bytes);
    assert!(keystore.catch_up(&MAC).unwrap());
    assert_eq!(*keystore.copies(), [CopyState::Intact, CopyState::Older]);
    keystore.settle(&MAC).unwrap();
    assert_eq!(disk.seen(&path(1)), Some(new));
    (0..2).for_each(|which| disk.set(&path(which), &file.bytes));
    assert_eq!(error_of(keystore.catch_up(&MAC)).kind(), ErrorKind::KeystoreStale);
    (0..2).for_each(|which| disk.lose(&path(which)));
    assert_eq!(error_of(keystore.catch_up(&MAC)).kind(), ErrorKind::NotFound);
}

#[test]
fn a_mark_of_an_unfinished_change_leads_to_a_rewrite_before_the_next() {
    let file = File::new(history());
    let scratch = Scratch::new("unfinished");
    let disk = disk_with(both(&file.bytes), Broken::No);
    let mut running = open_store(scratch.store(&disk)).unwrap();
    assert!(running.is_settled());
    scratch.locks().set_dirty(true).unwrap();
    // Both who opens now and who runs already must not build on what may not be on the disk.
    let opened = open_store(scratch.store(&disk)).unwrap();
    assert!(!opened.is_settled() && *opened.copies() == [CopyState::Intact, CopyState::Intact]);
    assert!(running.is_behind().unwrap() && running.catch_up(&MAC).unwrap());
    assert!(!running.is_settled() && !running.catch_up(&MAC).unwrap());
    let syncs = disk.syncs();
    running.append(&MAC, new_database(2)).unwrap();
    assert_eq!(disk.syncs() - syncs, 4, "both files anew, then the group in both");
    assert!(running.is_settled() && !scratch.locks().is_dirty().unwrap());
    let syncs = disk.syncs();
    running.append(&MAC, new_database(3)).unwrap();
    assert_eq!(disk.syncs() - syncs, 2);
}

#[test]
fn a_keystore_is_made_once() {
    let store = Watched::with([None, None]);
    assert_eq!(error_of(open_store(store.clone())).kind(), ErrorKind::NotFound);
    let scratch = Scratch::new("once");
    let disk = SimulatedDisk::new(Broken::No);
    create(scratch.store(&disk), new_database(1)).unwrap();
    let bytes = disk.seen(&path(0)).unwrap();
    for lost in [0, 1] {
        assert_eq!(error_of(create(scratch.store(&disk), new_database(3))).kind(), ErrorKind::AlreadyExists);
        disk.lose(&path(lost));
        assert_eq!(error_of(create(scratch.store(&disk), new_database(3))).kind(), ErrorKind::AlreadyExists);
        disk.set(&path(lost), &bytes);
    }
    let misfit = create(Watched::with([None, None]), vec![Operation::Drop { database: id(1) }]);
    assert_eq!(error_of(misfit).kind(), ErrorKind::NotFound);
}

#[test]
fn a_handle_does_not_write_over_what_another_changed_without_the_lock() {
    let scratch = Scratch::new("swap");
    let disk = SimulatedDisk::new(Broken::No);
    let mut ours = create(scratch.store(&disk), new_database(1)).unwrap();
    let mut theirs = open_store(scratch.store(&disk)).unwrap();
    theirs.append(&MAC, new_database(2)).unwrap();
    assert_eq!(error_of(ours.append(&MAC, new_database(3))).kind(), ErrorKind::Io);
    theirs.catch_up(&MAC).unwrap();
    assert_eq!(error_of(ours.rewrite(&MAC, new_database(3), None)).kind(), ErrorKind::Io);
    assert!(ours.catch_up(&MAC).unwrap());
    assert!(ours.catalogue() == theirs.catalogue());
    ours.append(&MAC, new_database(3)).unwrap();
    assert_eq!(open_store(scratch.store(&disk)).unwrap().catalogue().databases().count(), 3);
}

#[test]
fn a_change_after_a_refused_one_works_without_reopening() {
    let store = Watched::with(both(&File::new(history()).bytes));
    let mut keystore = open_store(store.clone()).unwrap();
    let before = copy(keystore.catalogue());
    store.refusing.store(true, Ordering::Relaxed);
    assert_eq!(error_of(keystore.append(&MAC, new_database(2))).kind(), ErrorKind::Io);
    assert!(*keystore.catalogue() == before && !keystore.is_settled() && keystore.is_behind().unwrap());
    assert_eq!(error_of(keystore.rewrite(&MAC, new_database(2), None)).kind(), ErrorKind::Io);
    assert!(*keystore.catalogue() == before);
    store.refusing.store(false, Ordering::Relaxed);
    keystore.append(&MAC, new_database(2)).unwrap();
    keystore.rewrite(&MAC, new_database(3), None).unwrap();
    assert!(keystore.catalogue() == open_store(store).unwrap().catalogue());
    assert_eq!(keystore.catalogue().databases().count(), 3);
}

#[test]
fn what_is_shredded_has_left_both_files_and_what_is_kept_is_the_same() {
    let mut secret = data_record(1, 1);
    secret.wrappings[0].blob = b"the wrapping that must be gone".to_vec();
    let database = |byte| Operation::Database { database: id(byte), name: name(byte) };
    let scratch = Scratch::new("rewrite");
    let disk = SimulatedDisk::new(Broken::No);
    let first = vec![database(1), Operation::Generation(secret.clone())];
    let mut keystore = create(scratch.store(&disk), first).unwrap();
    keystore.append(&MAC, new_database(2)).unwrap();
    // Also from what was kept of a damaged copy, and from what a crash left.
    disk.set(&dir().join("keystore.tmp"), &secret.wrappings[0].blob);
    disk.flip(&path(1), 700, 1);
    let mut keystore = open_store(scratch.store(&disk)).unwrap_or_else(|_| {
        keystore.catch_up(&MAC).unwrap();
        keystore
    });
    keystore.settle(&MAC).unwrap();
    assert!(disk.scan(&secret.wrappings[0].blob) >= 3);
    let under = Some((Hierarchy::ClusterKey, Record { created: 77, ..cluster_record(Purpose::Cluster) }));
    keystore.shred(&MAC, vec![Operation::Drop { database: id(1) }], under).unwrap();
    assert_eq!(disk.scan(&secret.wrappings[0].blob), 0);
    assert_eq!(disk.paths(), [path(0), path(1)]);
    assert_eq!((keystore.hierarchy(), keystore.cluster_record().created), (Hierarchy::ClusterKey, 77));
    let reopened = open_store(scratch.store(&disk)).unwrap();
    assert!(reopened.is_settled() && reopened.catalogue() == keystore.catalogue());
    assert_eq!(reopened.catalogue().databases().map(|(id, _)| id).collect::<Vec<_>>(), [id(2)]);
    assert_eq!((reopened.hierarchy(), reopened.cluster_record().created), (Hierarchy::ClusterKey, 77));
}

#[test]
fn what_was_kept_of_a_damaged_copy_goes_only_where_something_must_leave_and_after_the_files_are_written() {
    let mut damaged = File::new(history());
    damaged.bytes[600] ^= 1;
    let store = Watched::with([Some(damaged.bytes.clone()), Some(File::new(history()).bytes)]);
    let mut keystore = open_store(store.clone()).unwrap();
    keystore.settle(&MAC).unwrap();
    let is_kept = || *store.kept.lock().unwrap() == std::slice::from_ref(&damaged.bytes);
    keystore.rewrite(&MAC, Vec::new(), None).unwrap();
    keystore.rewrite_with(&MAC, None, |_, _| Ok(())).unwrap();
    assert!(is_kept(), "a rewrite that takes nothing away removed it");
    let shred =
        |keystore: &mut Keystore, byte| keystore.shred(&MAC, vec![Operation::Drop { database: id(byte) }], None);
    store.refusing.store(true, Ordering::Relaxed);
    assert_eq!(error_of(shred(&mut keystore, 1)).kind(), ErrorKind::Io);
    assert!(is_kept(), "it is gone, and nothing left the files");
    store.refusing.store(false, Ordering::Relaxed);
    keystore.catch_up(&MAC).unwrap();
    shred(&mut keystore, 1).unwrap();
    assert!(store.kept.lock().unwrap().is_empty());
}

#[test]
fn what_left_the_files_is_known_where_removing_what_was_kept_failed() {
    let scratch = Scratch::new("strays");
    let disk = disk_with(both(&File::new(history()).bytes), Broken::No);
    let kept = dir().join("keystore.damaged-1-1");
    disk.set(&kept, b"kept");
    let mut keystore = open_store(scratch.store(&disk)).unwrap();
    let mut at = 0;
    let error = loop {
        let before = disk.kill();
        let mut keystore = open_store(scratch.store(&before)).unwrap();
        before.arm(at, crate::storage::disk::simulated::Fault::Once);
        let outcome = keystore.shred(&MAC, vec![Operation::Drop { database: id(1) }], None);
        before.heal();
        scratch.locks().set_dirty(false).unwrap();
        match outcome {
            Err(error) if keystore.catalogue().databases().count() == 0 => {
                assert!(keystore.is_behind().unwrap() && keystore.catch_up(&MAC).unwrap());
                assert_eq!(keystore.catalogue().databases().count(), 0);
                keystore.append(&MAC, new_database(2)).unwrap();
                break error;
            }
            Err(_) => assert!(before.seen(&kept).is_some(), "step {at}: it is gone, and the files are as they were"),
            Ok(()) => panic!("no step fails behind the files"),
        }
        at += 1;
    };
    assert!(error.to_string().contains("keystore.damaged-"), "{error}");
    keystore.shred(&MAC, Vec::new(), None).unwrap();
    assert_eq!(disk.paths(), [path(0), path(1)]);
}

#[test]
fn names_sealed_anew_in_a_rewrite_are_in_the_files_and_a_failure_half_way_changes_nothing() {
    let store = Watched::with(both(&File::new(history()).bytes));
    let mut keystore = open_store(store.clone()).unwrap();
    let before = copy(keystore.catalogue());
    let mut left = 1;
    let failed = keystore.rewrite_with(&MAC, None, |catalogue, _| {
        catalogue.reseal_names(|_, _, _| {
            left -= 1;
            if left < 0 { Err(Error::invalid("no more")) } else { Ok(vec![9; 9]) }
        })
    });
    assert_eq!(error_of(failed).kind(), ErrorKind::Invalid);
    assert!(*keystore.catalogue() == before && keystore.is_settled());
    keystore
        .rewrite_with(&MAC, None, |catalogue, _| {
            catalogue.reseal_names(|scope, owner, sealed| {
                Ok::<_, Error>([&[u8::from(scope.is_some())], &owner[..1], sealed].concat())
            })
        })
        .unwrap();
    let reopened = open_store(store).unwrap();
    assert!(reopened.catalogue() == keystore.catalogue());
    let database = reopened.catalogue().database_name(id(1)).unwrap();
    assert_eq!(database.sealed, [&[0, 1][..], &[1; 20]].concat());
    let file = reopened.catalogue().find_key_use(id(1), OwnerKind::PageFile, &[0x51; 32]).unwrap();
    assert_eq!(file.name.as_ref().unwrap().sealed, [&[1, 9][..], &[0x52; 500]].concat());
}

#[test]
fn an_older_keystore_that_was_put_back_and_rewritten_is_not_taken_for_what_became_of_a_newer_one() {
    type Later = fn(&mut Keystore) -> Result<()>;
    let destroyed =
        |number| vec![Operation::State { database: id(1), generation: generation(number), state: KeyState::Destroyed }];
    let another_key = || {
        let mut record = data_record(1, 3);
        record.seal = crate::ids::SealId::from_bytes([0x77; 16]);
        vec![Operation::Generation(record)]
    };
    let changes: [(Vec<Operation>, Later); 4] = [
        // It lacks the newest key.
        (vec![Operation::Generation(data_record(1, 3))], |_| Ok(())),
        // It has another key in its place.
        (another_key(), |theirs| theirs.append(&MAC, vec![Operation::Generation(data_record(1, 3))])),
        // It has a key that was destroyed.
        (destroyed(1), |_| Ok(())),
        // It has another cluster key's generation below ours.
        (Vec::new(), |_| Ok(())),
    ];
    for (which, (change, later)) in changes.into_iter().enumerate() {
        let store = Watched::with(both(&File::new(history()).bytes));
        let mut ours = open_store(store.clone()).unwrap();
        let export = ours.export(&MAC).unwrap();
        if change.is_empty() {
            let record = Record { generation: generation(9), ..ours.cluster_record().clone() };
            ours.rewrite(&MAC, Vec::new(), Some((Hierarchy::Direct, record))).unwrap();
        } else {
            let release =
                Operation::KeyUseRelease { kind: OwnerKind::PageFile, owner: OwnerId([9; 16]), database: id(1) };
            ours.append(&MAC, [vec![release], change].concat()).unwrap();
        }
        let mut theirs = UnverifiedKeystore::exported(store.clone(), export).unwrap().verify(&MAC).unwrap();
        theirs.install(&MAC, 0, 0).unwrap();
        later(&mut theirs).unwrap();
        let error = error_of(ours.catch_up(&MAC));
        assert_eq!(error.kind(), ErrorKind::KeystoreStale, "case {which}: {error}");
    }
}

#[test]
fn a_database_that_is_dropped_takes_its_keys_along_and_that_is_not_going_back() {
    let store = Watched::with(both(&File::new(history()).bytes));
    let [mut ours, mut theirs] = two_handles(&store);
    theirs.rewrite(&MAC, vec![Operation::Drop { database: id(1) }], None).unwrap();
    assert!(ours.catch_up(&MAC).unwrap() && same(&ours, &theirs));
}

#[test]
fn what_a_killed_process_left_unsynced_may_be_gone_when_it_is_read_again() {
    let file = File::new(history());
    let shorter = |groups: usize| both(&file.bytes[..file.ends[groups]]);
    let store = Watched::with(shorter(3));
    let mut keystore = open_store(store.clone()).unwrap();
    // One more change is seen in memory, whose writer ended before it was synced.
    *store.inner.write().unwrap() = MemoryStore::with(shorter(4));
    store.unfinished.store(true, Ordering::Relaxed);
    assert!(keystore.catch_up(&MAC).unwrap());
    assert_eq!(file.position(keystore.catalogue()), Some(4));
    *store.inner.write().unwrap() = MemoryStore::with(shorter(3));
    keystore.settle(&MAC).unwrap();
    assert_eq!(file.position(keystore.catalogue()), Some(3));
    // What was durable is another matter.
    *store.inner.write().unwrap() = MemoryStore::with(shorter(2));
    assert_eq!(error_of(keystore.catch_up(&MAC)).kind(), ErrorKind::KeystoreStale);
}

#[test]
fn an_import_is_newer_than_what_was_there_and_than_an_earlier_one() {
    let store = Watched::with(both(&File::new(history()).bytes));
    let export = open_store(store.clone()).unwrap().export(&MAC).unwrap();
    let import = |there, now| {
        let mut imported = UnverifiedKeystore::exported(store.clone(), export.clone()).unwrap().verify(&MAC).unwrap();
        imported.install(&MAC, there, now).unwrap();
        imported.append(&MAC, new_database(2)).unwrap();
        imported.position().0
    };
    let first = import(0, 1_700_000_000);
    assert!(import(0, 1_700_000_001) > first + 1_000_000);
    let far = first + (1 << 40);
    assert!(import(far, 1_700_000_002) > far);
    // Without a clock, at least newer than the export; with a mad one, there is room left.
    assert!(import(0, 0) > 1 << 32);
    assert!(import(u64::MAX, u64::MAX) < 1 << 63);
}

#[test]
fn page_files_note_only_changes_that_both_copies_have() {
    let store = Watched::with([None, None]);
    let mut keystore = create(store.clone(), new_database(1)).unwrap();
    let settled = keystore.position();
    assert_eq!(keystore.durable_position(), settled);
    keystore.append(&MAC, vec![Operation::Rename { database: id(1), name: name(3) }]).unwrap();
    assert_eq!(keystore.durable_position(), settled, "a power cut and a damaged copy would take it away");
    assert_ne!(keystore.position(), settled);
    let another = open_store(store.clone()).unwrap();
    assert_eq!(another.durable_position(), settled, "who reads it cannot know more");
    let mut follower = open_store(store.clone()).unwrap();
    keystore.append(&MAC, new_database(2)).unwrap();
    assert_eq!(keystore.durable_position(), keystore.position());
    follower.catch_up(&MAC).unwrap();
    assert_eq!(follower.durable_position(), keystore.position());
    let both = keystore.position();
    keystore.append(&MAC, vec![Operation::Rename { database: id(1), name: name(4) }]).unwrap();
    follower.catch_up(&MAC).unwrap();
    assert_eq!([follower.durable_position(), keystore.durable_position()], [both, both]);
    keystore.rewrite(&MAC, Vec::new(), None).unwrap();
    assert_eq!(keystore.durable_position(), keystore.position());
    assert_eq!(open_store(store).unwrap().durable_position(), keystore.position());
}

#[test]
fn a_keystore_of_many_superseded_changes_is_compacted_to_what_it_holds() {
    let store = Watched::with([None, None]);
    let mut keystore = create(store.clone(), new_database(1)).unwrap();
    let mut changes = 0;
    while !keystore.is_wasteful() {
        keystore.append(&MAC, vec![Operation::Probe(cluster_record(Purpose::Probe))]).unwrap();
        changes += 1;
        assert!(changes < 2000, "it is never compacted");
    }
    assert!(changes > SPARE_GROUPS);
    let (before, position) = (copy(keystore.catalogue()), keystore.position());
    let long = keystore.tip.end;
    keystore.rewrite(&MAC, Vec::new(), None).unwrap();
    assert!(!keystore.is_wasteful() && *keystore.catalogue() == before && keystore.tip.end * 100 < long);
    assert!(keystore.position().0 > position.0 && keystore.has(position.0, &position.1));
    assert!(open_store(store).unwrap().catalogue() == keystore.catalogue());
}

#[test]
fn an_exported_keystore_is_whole_and_installing_it_is_the_newest_change_of_all() {
    let file = File::new(every_kind());
    let exporter = open(both(&file.bytes)).unwrap();
    let bytes = exporter.export(&MAC).unwrap();
    let seen = exporter.position();
    for len in 0..bytes.len() {
        let store = Watched::with([None, None]);
        let cut = UnverifiedKeystore::exported(store, bytes[..len].to_vec()).and_then(|cut| cut.verify(&MAC));
        assert_eq!(error_of(cut).kind(), ErrorKind::Damaged, "length {len}");
    }
    let older = File::new(history()).bytes;
    let store = Watched::with([Some(older.clone()), Some(vec![1, 2, 3])]);
    let exported = UnverifiedKeystore::exported(store.clone(), bytes).unwrap();
    let mut keystore = exported.verify(&MAC).unwrap();
    assert!(keystore.catalogue() == exporter.catalogue());
    keystore.install(&MAC, 0, 0).unwrap();
    assert_eq!(*store.replaced.lock().unwrap(), [older, vec![1, 2, 3]]);
    assert!(keystore.is_settled() && keystore.catalogue() == exporter.catalogue());
    assert!(keystore.position().0 > seen.0 + (1 << 32), "files that have seen a later change would not open");
    assert!(keystore.has(seen.0, &seen.1) && keystore.has(seen.0 + 1000, &[7; 16]));
    keystore.append(&MAC, new_database(3)).unwrap();
    assert!(open_store(store).unwrap().catalogue() == keystore.catalogue());
}

#[test]
fn the_sequence_does_not_wrap() {
    let last = Header { sequence: u64::MAX - 2, ..header() };
    let store = Arc::new(MemoryStore::default());
    let mut keystore = Keystore::create(store.clone(), last, new_database(1), &MAC).unwrap();
    assert_eq!(keystore.position().0, u64::MAX - 1);
    keystore.append(&MAC, new_database(2)).unwrap();
    assert_eq!(error_of(keystore.append(&MAC, new_database(3))).kind(), ErrorKind::Invalid);
    assert_eq!(error_of(keystore.rewrite(&MAC, Vec::new(), None)).kind(), ErrorKind::Invalid);
    assert_eq!(error_of(keystore.install(&MAC, 0, 0)).kind(), ErrorKind::Invalid);
    assert_eq!(open_store(store).unwrap().catalogue().databases().count(), 2);
}

/// A database of its own for each number.
fn numbered(number: u64) -> Vec<Operation> {
    let mut lookup = [0; 32];
    lookup[..8].copy_from_slice(&(number + 1).to_le_bytes());
    let database = DatabaseId::from_bytes(lookup[..16].try_into().unwrap());
    let lock = u32::try_from(number + 1).unwrap();
    let mut record = Record { database, lock, ..data_record(1, 1) };
    record.wrappings[0].blob = vec![0xbb; 176];
    let name = SealedName { lookup, sealed: vec![1; 112] };
    vec![Operation::Database { database, name }, Operation::Generation(record)]
}

/// The user of this number, with a name as long as can be.
fn numbered_user(number: u64) -> Operation {
    let mut lookup = [0; 32];
    lookup[..8].copy_from_slice(&(number + 1).to_le_bytes());
    let owner = OwnerId(lookup[..16].try_into().unwrap());
    let name = Some(SealedName { lookup, sealed: vec![1; 512] });
    Operation::KeyUseAdd(KeyUse { owner, name, ..key_use(1, 0, 1) })
}

#[test]
fn a_database_with_more_users_than_fit_in_one_group_is_rewritten_and_exported() {
    let store = Arc::new(MemoryStore::default());
    let mut keystore = create(store.clone(), new_database(1)).unwrap();
    let users: Vec<_> = (0..30_000).map(numbered_user).collect();
    let mut body = Vec::new();
    users.iter().for_each(|user| user.encode(&mut body).unwrap());
    assert!(body.len() > chain::MAX_BODY_LEN as usize, "{} bytes fit", body.len());
    for part in users.chunks(15_000) {
        keystore.append(&MAC, part.to_vec()).unwrap();
    }
    let export = keystore.export(&MAC).unwrap();
    let exported = UnverifiedKeystore::exported(store.clone(), export).unwrap().verify(&MAC).unwrap();
    assert!(exported.catalogue() == keystore.catalogue());
    keystore.rewrite(&MAC, Vec::new(), None).unwrap();
    assert!(open_store(store).unwrap().catalogue() == exported.catalogue());
}

/// How long this thread has run, whoever else wanted the processor.
fn cpu_time() -> Duration {
    let schedule = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap();
    Duration::from_nanos(schedule.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn ten_thousand_databases_cost_the_same_bytes_each_and_are_verified_at_once() {
    let store = Arc::new(MemoryStore::default());
    let mut keystore = create(store.clone(), vec![Operation::Probe(cluster_record(Purpose::Probe))]).unwrap();
    let mut costs = std::collections::BTreeSet::new();
    for number in 0..10_000 {
        let before = keystore.tip.end;
        keystore.append(&MAC, numbered(number)).unwrap();
        costs.insert(keystore.tip.end - before);
    }
    assert_eq!(costs.len(), 1, "{costs:?}");
    let verify = |store: &Arc<MemoryStore>| {
        let mut times = Vec::new();
        for _ in 0..9 {
            let unverified = UnverifiedKeystore::read(store.clone()).unwrap();
            let start = cpu_time();
            let verified = unverified.verify(&MAC).unwrap();
            times.push(cpu_time() - start);
            assert!(verified.is_settled() && verified.catalogue().databases().count() == 10_000);
        }
        times.sort();
        times[4]
    };
    let appended = verify(&store);
    keystore.rewrite(&MAC, Vec::new(), None).unwrap();
    println!("10,000 databases verified: appended {appended:?} ({costs:?} bytes each), compacted {:?}", verify(&store));
}
