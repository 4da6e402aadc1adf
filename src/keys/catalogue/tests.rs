use super::*;
use crate::format::record::tests::{cluster_record, data_record, wrapping};

fn id(database: u8) -> DatabaseId {
    DatabaseId::from_bytes([database; 16])
}

fn generation(number: u32) -> Generation {
    Generation::new(number).unwrap()
}

fn name(byte: u8) -> SealedName {
    SealedName { lookup: [byte; 32], sealed: vec![byte; 20] }
}

fn database(byte: u8, by_name: u8) -> Operation {
    Operation::Database { database: id(byte), name: name(by_name) }
}

fn key(byte: u8, number: u32) -> Operation {
    Operation::Generation(data_record(byte, number))
}

fn state(byte: u8, number: u32, state: KeyState) -> Operation {
    Operation::State { database: id(byte), generation: generation(number), state }
}

fn rename(byte: u8, to: u8) -> Operation {
    Operation::Rename { database: id(byte), name: name(to) }
}

fn drop_database(byte: u8) -> Operation {
    Operation::Drop { database: id(byte) }
}

fn rewrapped(byte: u8, number: u32) -> Record {
    Record { wrappings: vec![wrapping("other", "key", "v9", &[9])], ..data_record(byte, number) }
}

fn key_use(byte: u8, kind: OwnerKind, owner: u8, oldest: u32) -> KeyUse {
    let name = (kind != OwnerKind::External).then(|| name(owner));
    KeyUse { kind, owner: OwnerId([owner; 16]), database: id(byte), oldest: generation(oldest), name }
}

fn used(byte: u8, owner: u8, oldest: u32) -> Operation {
    Operation::KeyUseAdd(key_use(byte, OwnerKind::PageFile, owner, oldest))
}

fn raise(byte: u8, owner: u8, oldest: u32) -> Operation {
    let (kind, owner) = (OwnerKind::PageFile, OwnerId([owner; 16]));
    Operation::KeyUseRaise { kind, owner, database: id(byte), oldest: generation(oldest) }
}

fn release(byte: u8, owner: u8) -> Operation {
    Operation::KeyUseRelease { kind: OwnerKind::PageFile, owner: OwnerId([owner; 16]), database: id(byte) }
}

/// A catalogue that is the sum of these.
fn sum(operations: Vec<Operation>) -> Catalogue {
    let mut catalogue = Catalogue::default();
    catalogue.apply(operations).unwrap();
    catalogue.keep();
    catalogue
}

/// Two databases: one with three generations and two users, one with one of each.
fn two() -> Catalogue {
    sum(vec![
        Operation::Probe(cluster_record(Purpose::Probe)),
        database(1, 1),
        key(1, 1),
        key(1, 2),
        key(1, 3),
        used(1, 7, 1),
        used(1, 8, 2),
        database(2, 2),
        key(2, 1),
        Operation::KeyUseAdd(key_use(2, OwnerKind::External, 0, 1)),
    ])
}

/// The same content, in tables of its own.
fn copy(catalogue: &Catalogue) -> Catalogue {
    Catalogue {
        databases: copy_table(&catalogue.databases),
        names: copy_table(&catalogue.names),
        generations: copy_table(&catalogue.generations),
        locks: copy_table(&catalogue.locks),
        probe: copy_table(&catalogue.probe),
        key_uses: copy_table(&catalogue.key_uses),
        key_use_names: copy_table(&catalogue.key_use_names),
    }
}

fn copy_table<K, V, M: Clone>(table: &Table<K, V, M>) -> Table<K, V, M> {
    Table { map: table.map.clone(), replaced: Vec::new() }
}

/// Refused for this reason, and without a trace.
fn refused(catalogue: &mut Catalogue, operations: Vec<Operation>) -> ErrorKind {
    let before = copy(catalogue);
    let text = format!("{operations:?}");
    let conflict = catalogue.apply(operations).expect_err(&text);
    assert!(*catalogue == before, "{text} left something behind");
    assert!(!conflict.to_string().is_empty());
    conflict.kind
}

#[test]
fn a_database_comes_with_a_name_and_a_key_and_both_are_its_own() {
    let mut catalogue = Catalogue::default();
    assert_eq!(refused(&mut catalogue, vec![database(1, 1)]), ErrorKind::Invalid);
    assert_eq!(refused(&mut catalogue, vec![key(1, 1), database(1, 1)]), ErrorKind::NotFound);
    assert_eq!(refused(&mut catalogue, vec![database(1, 1), key(1, 2)]), ErrorKind::Invalid);
    catalogue.apply(vec![database(1, 1), key(1, 1)]).unwrap();
    catalogue.keep();
    assert_eq!(catalogue.find_database(&[1; 32]), Some(id(1)));
    assert_eq!((catalogue.database_name(id(1)), catalogue.database_name(id(2))), (Some(&name(1)), None));
    assert_eq!(refused(&mut catalogue, vec![database(1, 2), key(1, 2)]), ErrorKind::AlreadyExists);
    assert_eq!(refused(&mut catalogue, vec![database(2, 1), key(2, 1)]), ErrorKind::AlreadyExists);
    // Made and gone in one group: it needs no key.
    catalogue.apply(vec![database(2, 2), drop_database(2)]).unwrap();
    assert_eq!(catalogue.databases().count(), 1);
}

#[test]
fn a_renamed_database_is_found_under_its_new_name_only() {
    let mut catalogue = two();
    catalogue.apply(vec![rename(1, 5)]).unwrap();
    assert_eq!((catalogue.find_database(&[5; 32]), catalogue.find_database(&[1; 32])), (Some(id(1)), None));
    assert_eq!(refused(&mut sum(vec![]), vec![rename(1, 5)]), ErrorKind::NotFound);
    catalogue.keep();
    assert_eq!(refused(&mut catalogue, vec![rename(1, 2)]), ErrorKind::AlreadyExists);
    // To its own name, sealed anew; and two that change names by way of a third.
    let sealed_anew = SealedName { sealed: vec![3; 3], ..name(5) };
    catalogue.apply(vec![Operation::Rename { database: id(1), name: sealed_anew.clone() }]).unwrap();
    assert_eq!(catalogue.database_name(id(1)), Some(&sealed_anew));
    catalogue.apply(vec![rename(1, 9), rename(2, 5), rename(1, 2)]).unwrap();
    assert_eq!((catalogue.find_database(&[5; 32]), catalogue.find_database(&[2; 32])), (Some(id(2)), Some(id(1))));
    assert_eq!(catalogue.find_database(&[9; 32]), None);
}

#[test]
fn a_dropped_database_takes_its_keys_users_and_names_with_it_and_nothing_else() {
    let mut catalogue = two();
    catalogue.apply(vec![drop_database(1)]).unwrap();
    catalogue.keep();
    let rest = sum(vec![
        Operation::Probe(cluster_record(Purpose::Probe)),
        database(2, 2),
        key(2, 1),
        Operation::KeyUseAdd(key_use(2, OwnerKind::External, 0, 1)),
    ]);
    assert!(catalogue == rest);
    assert_eq!(refused(&mut catalogue, vec![drop_database(1)]), ErrorKind::NotFound);
    // Its name, and those of its users, are free.
    catalogue.apply(vec![database(3, 1), key(3, 1), used(3, 7, 1)]).unwrap();
}

#[test]
fn generations_follow_each_other_and_the_last_is_the_newest() {
    let mut catalogue = two();
    for wrong in [1, 2, 3, 5, 1 << 20] {
        assert_eq!(refused(&mut catalogue, vec![key(1, wrong)]), ErrorKind::Invalid);
    }
    assert_eq!(refused(&mut catalogue, vec![key(9, 1)]), ErrorKind::NotFound);
    catalogue.apply(vec![key(1, 4), key(1, 5)]).unwrap();
    let numbers: Vec<_> = catalogue.generations(id(1)).map(|record| record.generation.get()).collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5]);
    assert_eq!(catalogue.generation(id(1), generation(5)), Some(&data_record(1, 5)));
    assert_eq!(catalogue.records().count(), 6);
}

#[test]
fn a_keys_state_goes_forward_only_and_destroying_takes_its_wrappings() {
    use KeyState::*;
    let mut catalogue = two();
    catalogue.apply(vec![raise(1, 7, 3), raise(1, 8, 3)]).unwrap();
    catalogue.keep();
    assert_eq!(refused(&mut catalogue, vec![state(1, 1, Active)]), ErrorKind::Invalid);
    assert_eq!(refused(&mut catalogue, vec![state(1, 4, Retired)]), ErrorKind::NotFound);
    assert_eq!(refused(&mut catalogue, vec![state(9, 1, Retired)]), ErrorKind::NotFound);
    catalogue.apply(vec![state(1, 1, Retired)]).unwrap();
    catalogue.keep();
    for wrong in [Active, Retired] {
        assert_eq!(refused(&mut catalogue, vec![state(1, 1, wrong)]), ErrorKind::Invalid);
    }
    catalogue.apply(vec![state(1, 1, Destroyed), state(1, 2, Destroyed)]).unwrap();
    catalogue.keep();
    for number in [1, 2] {
        let record = catalogue.generation(id(1), generation(number)).unwrap();
        assert_eq!((record.state, record.wrappings.len()), (Destroyed, 0));
        for wrong in [Active, Retired, Destroyed] {
            assert_eq!(refused(&mut catalogue, vec![state(1, number, wrong)]), ErrorKind::Invalid);
        }
    }
}

#[test]
fn a_key_that_somebody_needs_or_that_new_seals_use_is_not_destroyed() {
    let destroyed = KeyState::Destroyed;
    let mut catalogue = two();
    assert_eq!(refused(&mut catalogue, vec![state(1, 3, destroyed)]), ErrorKind::InUse);
    assert_eq!(refused(&mut catalogue, vec![state(1, 1, destroyed)]), ErrorKind::InUse);
    // The other user needs generation 2 and newer ones, so both are in the way of 2, and none of 1.
    catalogue.apply(vec![raise(1, 7, 2), state(1, 1, destroyed)]).unwrap();
    catalogue.keep();
    let conflict = catalogue.apply(vec![state(1, 2, destroyed)]).unwrap_err();
    assert!(conflict.to_string().contains("2 still use generation 2"), "{conflict}");
    catalogue.apply(vec![raise(1, 7, 3), release(1, 8), state(1, 2, destroyed)]).unwrap();
    assert_eq!(refused(&mut two(), vec![state(2, 1, destroyed)]), ErrorKind::InUse);
}

#[test]
fn wrapping_anew_changes_the_wrappings_of_that_key_and_of_nothing_else() {
    let mut catalogue = two();
    catalogue.apply(vec![Operation::Wrapping(rewrapped(1, 2))]).unwrap();
    catalogue.keep();
    assert_eq!(catalogue.generation(id(1), generation(2)), Some(&rewrapped(1, 2)));
    assert_eq!(catalogue.generation(id(1), generation(1)), Some(&data_record(1, 1)));
    let probe = Record { wrappings: rewrapped(1, 1).wrappings, ..cluster_record(Purpose::Probe) };
    catalogue.apply(vec![Operation::Wrapping(probe.clone())]).unwrap();
    catalogue.keep();
    assert_eq!(catalogue.probe(), Some(&probe));
    let known = rewrapped(1, 2);
    for other in [
        Record { generation: generation(4), ..known.clone() },
        Record { database: id(3), ..known.clone() },
        Record { created: 1, ..known.clone() },
        Record { commitment: [1; 32], ..known.clone() },
        Record { state: KeyState::Retired, ..known.clone() },
        Record { suite: crate::Suite::Aes256Gcm, ..known.clone() },
        Record { seal: crate::ids::SealId::from_bytes([1; 16]), ..known },
        Record { created: 1, ..probe.clone() },
    ] {
        assert_eq!(refused(&mut catalogue, vec![Operation::Wrapping(other)]), ErrorKind::Invalid);
    }
    let mut without = sum(vec![database(1, 1), key(1, 1), key(1, 2), state(1, 1, KeyState::Destroyed)]);
    assert_eq!(refused(&mut without, vec![Operation::Wrapping(probe)]), ErrorKind::Invalid);
    assert_eq!(refused(&mut without, vec![Operation::Wrapping(rewrapped(1, 1))]), ErrorKind::Invalid);
}

#[test]
fn the_last_probe_counts() {
    let mut catalogue = two();
    let probe = Record { created: 9, ..cluster_record(Purpose::Probe) };
    catalogue.apply(vec![Operation::Probe(probe.clone())]).unwrap();
    assert_eq!(catalogue.probe(), Some(&probe));
    catalogue.take_back();
    assert_eq!(catalogue.probe(), Some(&cluster_record(Purpose::Probe)));
}

#[test]
fn a_user_is_one_of_its_kind_owner_and_name_and_needs_a_key_that_is_there() {
    let mut catalogue = two();
    let add = |key_use| vec![Operation::KeyUseAdd(key_use)];
    let file = key_use(1, OwnerKind::PageFile, 7, 1);
    assert_eq!(refused(&mut catalogue, add(file.clone())), ErrorKind::AlreadyExists);
    assert_eq!(refused(&mut catalogue, add(KeyUse { name: Some(name(9)), ..file.clone() })), ErrorKind::AlreadyExists);
    let namesake = KeyUse { owner: OwnerId([9; 16]), ..file.clone() };
    assert_eq!(refused(&mut catalogue, add(namesake.clone())), ErrorKind::AlreadyExists);
    assert_eq!(refused(&mut catalogue, vec![used(1, 9, 4)]), ErrorKind::NotFound);
    assert_eq!(refused(&mut catalogue, vec![used(3, 9, 1)]), ErrorKind::NotFound);
    // The same owner and name as a log, or in another database, is another user.
    catalogue.apply(add(KeyUse { kind: OwnerKind::Log, ..file.clone() })).unwrap();
    catalogue.apply(add(KeyUse { database: id(2), ..file.clone() })).unwrap();
    catalogue.keep();
    assert_eq!(catalogue.key_uses(id(1)).count(), 3);
    assert_eq!(catalogue.find_key_use(id(1), OwnerKind::PageFile, &[7; 32]), Some(&file));
    assert_eq!(catalogue.find_key_use(id(1), OwnerKind::Adapter, &[7; 32]), None);
    // All owners are found, whatever their bytes.
    for kind in [OwnerKind::PageFile, OwnerKind::External] {
        for owner in [0, 0xff] {
            catalogue.apply(add(key_use(1, kind, owner, 3))).unwrap();
        }
    }
    assert_eq!(catalogue.key_uses(id(1)).count(), 7);
    let mut destroyed = sum(vec![database(1, 1), key(1, 1), key(1, 2), state(1, 1, KeyState::Destroyed)]);
    assert_eq!(refused(&mut destroyed, vec![used(1, 7, 1)]), ErrorKind::Invalid);
    destroyed.apply(vec![used(1, 7, 2)]).unwrap();
}

#[test]
fn what_a_user_needs_only_grows_less_and_a_released_one_is_gone() {
    let mut catalogue = two();
    catalogue.apply(vec![raise(1, 7, 2), raise(1, 7, 2)]).unwrap();
    catalogue.keep();
    assert_eq!(catalogue.find_key_use(id(1), OwnerKind::PageFile, &[7; 32]).unwrap().oldest, generation(2));
    assert_eq!(refused(&mut catalogue, vec![raise(1, 7, 1)]), ErrorKind::Invalid);
    assert_eq!(refused(&mut catalogue, vec![raise(1, 7, 4)]), ErrorKind::NotFound);
    assert_eq!(refused(&mut catalogue, vec![raise(1, 9, 2)]), ErrorKind::NotFound);
    assert_eq!(refused(&mut catalogue, vec![release(1, 9)]), ErrorKind::NotFound);
    assert_eq!(refused(&mut catalogue, vec![release(2, 7)]), ErrorKind::NotFound);
    catalogue.apply(vec![release(1, 7)]).unwrap();
    catalogue.keep();
    assert_eq!(catalogue.find_key_use(id(1), OwnerKind::PageFile, &[7; 32]), None);
    assert_eq!(refused(&mut catalogue, vec![raise(1, 7, 3)]), ErrorKind::NotFound);
    catalogue.apply(vec![used(1, 7, 1)]).unwrap();
}

#[test]
fn a_catalogue_is_made_anew_from_its_operations_with_each_database_and_its_first_key_in_one_part() {
    let mut catalogue = two();
    catalogue.apply(vec![raise(1, 7, 3), raise(1, 8, 3), state(1, 1, KeyState::Destroyed)]).unwrap();
    catalogue.keep();
    assert!(sum(catalogue.operations().flatten().collect()) == catalogue);
    // Each part fits by itself, in its turn: that is what lets a group end between any two.
    let mut anew = Catalogue::default();
    for part in catalogue.operations() {
        anew.apply(part).unwrap();
        anew.keep();
    }
    assert!(anew == catalogue);
    assert_eq!(catalogue.len(), 2 + 4 + 3);
    let parts: Vec<_> = catalogue.operations().collect();
    assert!(parts.iter().all(|part| part.len() == 1 + usize::from(matches!(part[0], Operation::Database { .. }))));
}

/// Numbers that are the same in every run.
struct Seeded(u64);

impl Seeded {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    fn byte(&mut self, bound: u64) -> u8 {
        self.below(bound) as u8 + 1
    }

    /// Any operation, about few enough things that many fit and many do not.
    fn operation(&mut self) -> Operation {
        let (byte, other) = (self.byte(3), self.byte(5));
        let number = self.below(4) as u32 + 1;
        let kind = [OwnerKind::PageFile, OwnerKind::Log, OwnerKind::External][self.below(3) as usize];
        let owner = OwnerId([other; 16]);
        let database_id = id(byte);
        match self.below(14) {
            0 => database(byte, other),
            1 => rename(byte, other),
            2 => drop_database(byte),
            3..=5 => key(byte, number),
            6 => state(byte, number, KeyState::Retired),
            7 => state(byte, number, KeyState::Destroyed),
            8 => Operation::Wrapping(rewrapped(byte, number)),
            9 => Operation::Probe(Record { created: self.below(9), ..cluster_record(Purpose::Probe) }),
            10 | 11 => Operation::KeyUseAdd(key_use(byte, kind, other, number)),
            12 => Operation::KeyUseRaise { kind, owner, database: database_id, oldest: generation(number) },
            _ => Operation::KeyUseRelease { kind, owner, database: database_id },
        }
    }

    fn group(&mut self) -> Vec<Operation> {
        let byte = self.byte(3);
        match self.below(3) {
            0 => vec![database(byte, self.byte(5)), key(byte, 1), self.operation()],
            _ => (0..=self.below(4)).map(|_| self.operation()).collect(),
        }
    }
}

/// What holds for every catalogue, however it came about.
fn check_rules(catalogue: &Catalogue) {
    for (database, name) in catalogue.databases() {
        assert_eq!(catalogue.find_database(&name.lookup), Some(database));
        let numbers: Vec<_> = catalogue.generations(database).map(|record| record.generation.get()).collect();
        assert!(!numbers.is_empty() && numbers.iter().zip(1..).all(|(&number, expected)| number == expected));
        assert_ne!(catalogue.generations(database).next_back().unwrap().state, KeyState::Destroyed);
        for user in catalogue.key_uses(database) {
            assert_ne!(catalogue.generation(database, user.oldest).unwrap().state, KeyState::Destroyed);
            if let Some(name) = &user.name {
                assert_eq!(catalogue.find_key_use(database, user.kind, &name.lookup), Some(user));
            }
        }
    }
    let databases = catalogue.databases().count();
    assert_eq!(catalogue.names.map.len(), databases);
    let users: Vec<_> = catalogue.key_uses.map.values().collect();
    assert!(users.iter().all(|user| catalogue.has_database(user.database)));
    assert_eq!(catalogue.key_use_names.map.len(), users.iter().filter(|user| user.name.is_some()).count());
    assert!(catalogue.records().all(|record| catalogue.has_database(record.database)));
    assert!(catalogue.records().all(|record| record.wrappings.is_empty() == (record.state == KeyState::Destroyed)));
    assert!(sum(catalogue.operations().flatten().collect()) == *catalogue);
}

#[test]
fn random_changes_are_applied_whole_or_not_at_all_and_taken_back_exactly() {
    let (mut applied, mut refused, mut taken_back) = (0, 0, 0);
    for seed in 1..=40 {
        let mut seeded = Seeded(0x9e37_79b9_7f4a_7c15 ^ seed);
        let mut catalogue = Catalogue::default();
        for _ in 0..500 {
            let before = copy(&catalogue);
            let group = seeded.group();
            let kept = match catalogue.apply(group.clone()) {
                Err(_) => {
                    refused += 1;
                    false
                }
                Ok(()) if seeded.below(3) == 0 => {
                    // Several groups can be taken back together.
                    let _ = catalogue.apply(seeded.group());
                    catalogue.take_back();
                    taken_back += 1;
                    false
                }
                Ok(()) => {
                    catalogue.keep();
                    applied += 1;
                    true
                }
            };
            assert!(kept || catalogue == before, "seed {seed}: {group:?} left something behind");
            check_rules(&catalogue);
        }
    }
    assert!(applied > 1000 && refused > 1000 && taken_back > 500, "{applied} {refused} {taken_back}");
}

#[test]
fn names_sealed_anew_are_taken_back_like_any_change() {
    let mut catalogue = two();
    let before = copy(&catalogue);
    let mut seen = Vec::new();
    let resealed = catalogue.reseal_names(|scope, owner, sealed| {
        seen.push((scope, owner[0], sealed.len()));
        Ok::<_, ()>(vec![owner[0]; 2])
    });
    resealed.unwrap();
    assert_eq!(seen, [(None, 1, 20), (None, 2, 20), (Some(id(1)), 7, 20), (Some(id(1)), 8, 20)]);
    assert_eq!(catalogue.database_name(id(2)).unwrap(), &SealedName { sealed: vec![2; 2], ..name(2) });
    assert_eq!(catalogue.find_database(&[2; 32]), Some(id(2)));
    catalogue.take_back();
    assert!(catalogue == before);
    let mut left = 2;
    let failed = catalogue.reseal_names(|_, _, _| {
        left -= 1;
        if left < 0 { Err("no more") } else { Ok(Vec::new()) }
    });
    assert_eq!(failed, Err("no more"));
    catalogue.take_back();
    assert!(catalogue == before);
}

#[test]
fn every_key_has_a_lock_of_its_own_and_the_next_one_follows_the_last() {
    let mut catalogue = Catalogue::default();
    assert_eq!(catalogue.next_lock(), Some(1));
    let with_lock = |byte, number, lock| Operation::Generation(Record { lock, ..data_record(byte, number) });
    catalogue
        .apply([database(1, 1), with_lock(1, 1, 1), with_lock(1, 2, 2), database(2, 2), with_lock(2, 1, 3)])
        .unwrap();
    catalogue.keep();
    assert_eq!(catalogue.next_lock(), Some(4));
    for taken in 1..=3 {
        assert_eq!(refused(&mut catalogue, vec![with_lock(2, 2, taken)]), ErrorKind::Invalid);
    }
    // A destroyed key keeps its lock, a dropped database gives them back.
    catalogue
        .apply([with_lock(2, 2, 9), state(1, 1, KeyState::Destroyed), Operation::Drop { database: id(2) }])
        .unwrap();
    assert_eq!(catalogue.next_lock(), Some(3));
    assert_eq!(refused(&mut copy(&catalogue), vec![with_lock(1, 3, 1)]), ErrorKind::Invalid);
    catalogue.take_back();
    assert_eq!(catalogue.next_lock(), Some(4), "a change that was taken back left its locks");
    catalogue.apply([with_lock(2, 2, u32::MAX)]).unwrap();
    assert_eq!(catalogue.next_lock(), None);
}

#[test]
fn nobody_is_noted_to_need_keys_of_which_a_later_one_is_gone() {
    let mut catalogue = Catalogue::default();
    catalogue.apply([database(1, 1), key(1, 1), key(1, 2), key(1, 3), state(1, 2, KeyState::Destroyed)]).unwrap();
    catalogue.keep();
    for oldest in 1..=2 {
        assert_eq!(refused(&mut catalogue, vec![used(1, 7, oldest)]), ErrorKind::Invalid);
    }
    catalogue.apply([used(1, 7, 3)]).unwrap();
}
