//! What the bytes of a keystore promise: the chain, the MACs, and what is refused. Mostly of one copy alone, because
//! another whole one would repair what is tried here.

use super::*;
use crate::aead::sha256;
use crate::format::group::{self, HEAD_LEN, Head};
use crate::format::keystore::HEADER_MAC_LEN;
use crate::format::page::NONCE_LEN;
use crate::keys::chain::MAX_BODY_LEN;

/// A group with these fields, under the right key. Written here once more, to write what the code never would.
fn forge(head: Head, segment: u64, body: &[u8]) -> Vec<u8> {
    let cluster = header().cluster.to_bytes();
    let body_prefix = group::body_prefix(&cluster, segment, head.seq);
    let tag = |parts: &[&[u8]]| chain::first_bytes(&MAC.with(|hmac| hmac.sign(parts)).unwrap());
    let bytes = Head { body_tag: tag(&[&body_prefix, body]), ..head }.encode();
    let head_tag = tag(&[&group::head_prefix(&cluster, segment), group::covered_and_tag(&bytes).0]);
    group::assemble(bytes, &head_tag, body)
}

/// The head that belongs behind this keystore's last group.
fn next_head(keystore: &Keystore, length: u32) -> Head {
    Head {
        length,
        sealed_length: 0,
        end: false,
        seq: keystore.tip.seq + 1,
        synced: keystore.tip.seq,
        previous: keystore.tip.tag,
        body_nonce: [0; NONCE_LEN],
        body_tag: [0; 16],
        head_nonce: [0; NONCE_LEN],
    }
}

fn next_group(keystore: &Keystore, body: &[u8]) -> Vec<u8> {
    forge(next_head(keystore, u32::try_from(body.len()).unwrap()), SEQUENCE, body)
}

/// A keystore whose second group has this body, under the right key.
fn with_body(body: &[u8]) -> Vec<u8> {
    let file = File::new(vec![new_database(1)]);
    let keystore = open(alone(&file.bytes)).unwrap();
    [file.bytes, next_group(&keystore, body)].concat()
}

fn is_torn(keystore: &Keystore) -> bool {
    keystore.copies()[0] == CopyState::Torn
}

#[test]
fn what_was_appended_is_there_after_reopening() {
    let file = File::new(history());
    let keystore = open(both(&file.bytes)).unwrap();
    let catalogue = keystore.catalogue();
    assert!(keystore.is_settled());
    assert_eq!(keystore.position().0, SEQUENCE + 4);
    assert_eq!(keystore.cluster_record(), &header().record);
    assert_eq!(keystore.hierarchy(), Hierarchy::Direct);
    assert_eq!(catalogue.probe(), Some(&cluster_record(Purpose::Probe)));
    assert_eq!(catalogue.find_database(&[1; 32]), Some(id(1)));
    assert_eq!(catalogue.databases().collect::<Vec<_>>(), [(id(1), &name(1))]);
    let generations: Vec<_> = catalogue.generations(id(1)).cloned().collect();
    assert_eq!(generations, [data_record(1, 1), data_record(1, 2)]);
    let owners: Vec<_> = catalogue.key_uses(id(1)).map(|key_use| key_use.owner).collect();
    assert_eq!(owners, [OwnerId([9; 16]), OwnerId([0; 16])]);
    assert!(catalogue.find_key_use(id(1), OwnerKind::PageFile, &[0x51; 32]).is_some());
    assert!(catalogue.find_key_use(id(1), OwnerKind::Log, &[0x51; 32]).is_none());
}

/// The fingerprints were computed by another program (Python's hmac and struct): header, groups and operations 1, 4, 7 and
/// 8 from `docs/FORMAT.md`; the others, which it does not describe yet, from their layout in `format::keystore`.
#[test]
fn golden_fingerprint_of_a_whole_keystore() {
    let fingerprint = |bytes: &[u8]| sha256(bytes).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let file = File::new(every_kind());
    assert_eq!((file.bytes.len(), fingerprint(&file.bytes)), (GOLDEN.0, GOLDEN.1.to_owned()));
    // Written as a whole, as a rewrite does: the header says up to where.
    let store = Arc::new(MemoryStore::default());
    create(store.clone(), history().concat()).unwrap();
    let whole = read(&*store)[0].clone().unwrap();
    assert_eq!((whole.len(), fingerprint(&whole)), (GOLDEN_WHOLE.0, GOLDEN_WHOLE.1.to_owned()));
}

const GOLDEN: (usize, &str) = (7168, "d11f68ae3f2a33b3badb1808f2099b941ae712a13d3a6bf1d5138ef157db45e5");
const GOLDEN_WHOLE: (usize, &str) = (2048, "bd0e0a7d22c64ba1b34f75675c91b6e5fd4a1b3a2f6a66f74193972244afce04");

#[test]
fn every_changed_byte_is_refused_or_drops_the_last_group() {
    let file = File::new(every_kind());
    let last = file.ends[file.groups() - 1];
    let (mut tried, mut refused, mut dropped) = (0, 0, 0);
    for at in 0..file.bytes.len() {
        for change in [1, 0x80, 0xff, file.bytes[at]] {
            if change == 0 {
                continue;
            }
            tried += 1;
            match open(alone(&file.flipped(at, change))) {
                Err(_) => refused += 1,
                Ok(keystore) => {
                    dropped += 1;
                    assert!(at >= last, "byte {at} is acknowledged and its change went unnoticed");
                    assert_eq!(file.position(keystore.catalogue()), Some(file.groups() - 1), "byte {at}");
                    assert!(is_torn(&keystore));
                }
            }
        }
    }
    println!("flips of a copy that is alone: tried={tried} refused={refused} last-group-dropped={dropped} accepted=0");
}

#[test]
fn every_cut_leaves_a_beginning_of_the_history() {
    let file = File::new(history());
    for len in 0..=file.bytes.len() {
        for copies in [alone(&file.bytes[..len]), both(&file.bytes[..len])] {
            let opened = open(copies);
            let Some(groups) = file.ends.iter().rposition(|&end| end <= len) else {
                assert_eq!(error_of(opened).kind(), ErrorKind::Damaged, "length {len}");
                continue;
            };
            let keystore = opened.unwrap_or_else(|error| panic!("length {len}: {error}"));
            assert_eq!(file.position(keystore.catalogue()), Some(groups), "length {len}");
            assert_eq!(is_torn(&keystore), len != file.ends[groups], "length {len}");
        }
    }
}

#[test]
fn moved_repeated_and_missing_groups_are_refused() {
    let file = File::new(history());
    let count = file.groups();
    let mut orders = Vec::new();
    for a in 0..count {
        for b in 0..count {
            for c in 0..count {
                orders.extend([
                    vec![a],
                    vec![a, b],
                    vec![a, b, c],
                    vec![a, b, c, 0],
                    vec![0, 1, 2, 3, a],
                    vec![a, b, c, 3],
                ]);
            }
        }
    }
    for order in orders {
        let mut bytes = file.header().to_vec();
        order.iter().for_each(|&index| bytes.extend(file.group(index)));
        let in_order = order.iter().enumerate().all(|(at, &index)| at == index);
        for copies in [alone(&bytes), both(&bytes)] {
            match open(copies) {
                Ok(keystore) => {
                    assert!(in_order, "{order:?}");
                    assert_eq!(file.position(keystore.catalogue()), Some(order.len()));
                }
                Err(error) => {
                    assert!(!in_order, "{order:?}: {error}");
                    assert_eq!(error.kind(), ErrorKind::Damaged);
                }
            }
        }
    }
}

#[test]
fn damage_before_a_synced_group_names_its_byte_and_a_torn_tail_is_no_damage() {
    let file = File::new(history());
    for index in 0..3 {
        let error = error_of(open(alone(&file.flipped(file.ends[index] + HEAD_LEN + 3, 1))));
        assert_eq!(error.kind(), ErrorKind::Damaged);
        let text = error.to_string();
        assert!(text.contains("copy 0") && text.contains(&format!("byte {}:", file.ends[index])), "{text}");
    }
    // Zeros or anything else where an append was about to go: no head there is ours.
    for tail in [vec![0; 512], vec![0; 5000], vec![0xaa; 777], group::MAGIC.repeat(300)] {
        let keystore = open(alone(&[file.bytes.clone(), tail].concat())).unwrap();
        assert_eq!(file.position(keystore.catalogue()), Some(4));
        assert!(is_torn(&keystore));
    }
}

#[test]
fn a_torn_tail_leaves_the_files_with_the_next_append_and_not_before() {
    let file = File::new(history());
    let torn = [&file.bytes[..], &[0xaa; 700]].concat();
    let store = Watched::with([Some(torn.clone()), Some(file.bytes.clone())]);
    let mut keystore = open_store(store.clone()).unwrap();
    assert_eq!(read(&*store)[0], Some(torn.clone()));
    keystore.append(&MAC, new_database(2)).unwrap();
    assert!(keystore.is_settled());
    assert!(store.kept.lock().unwrap().is_empty(), "a crash leaves such a tail, and the other copy is whole");
    let [first, second] = read(&*store);
    let first = first.unwrap();
    assert_eq!((first.len(), Some(&first)), (keystore.tip.end, second.as_ref()));
    assert_eq!(first[..file.bytes.len()], file.bytes);
    assert!(open(both(&first)).unwrap().catalogue() == keystore.catalogue());
    // Both copies with a bad end: that is no crash, and nothing is thrown away.
    let store = Watched::with(both(&torn));
    open_store(store.clone()).unwrap().append(&MAC, new_database(2)).unwrap();
    // Once, because they are the same.
    assert!(*store.kept.lock().unwrap() == [torn]);
}

#[test]
fn another_key_cluster_or_segment_is_refused() {
    let file = File::new(history());
    let unverified = UnverifiedKeystore::read(Arc::new(MemoryStore::with(both(&file.bytes)))).unwrap();
    let error = error_of(unverified.verify(&mac_key(8)));
    assert_eq!(error.kind(), ErrorKind::Authentication);
    // Of the same key, but another cluster, or rewritten at another sequence: its groups do not fit this header.
    for other in [
        Header { sequence: SEQUENCE + 1, ..header() },
        Header { cluster: ClusterId::from_bytes([0xc2; 16]), ..header() },
    ] {
        let store = Arc::new(MemoryStore::default());
        Keystore::create(store.clone(), other, new_database(1), &MAC).unwrap();
        let foreign = read(&*store)[0].clone().unwrap().split_off(512);
        let keystore = open(alone(&[file.header(), &foreign].concat())).unwrap();
        assert_eq!(file.position(keystore.catalogue()), Some(0), "a foreign group was accepted");
        let mixed = [file.header(), file.group(0), &foreign, file.group(2), file.group(3)].concat();
        assert_eq!(error_of(open(both(&mixed))).kind(), ErrorKind::Damaged);
    }
}

#[test]
fn groups_of_a_fork_of_the_history_are_refused() {
    let mut fork = history();
    fork[1] = new_database(3);
    fork.truncate(2);
    let (file, fork) = (File::new(history()), File::new(fork));
    let spliced = [file.header(), file.group(0), fork.group(1), file.group(2), file.group(3)].concat();
    let error = error_of(open(alone(&spliced)));
    assert!(error.to_string().contains("another history"), "{error}");
    // Two copies that went different ways: neither way is believed as far as the other goes on.
    let error = error_of(open([Some(spliced), Some(file.bytes[..file.ends[1]].to_vec())]));
    assert!(error.to_string().contains("another history"), "{error}");
}

#[test]
fn a_group_that_lies_about_what_was_synced_or_has_reserved_fields_is_refused() {
    let file = File::new(history());
    let keystore = open(alone(&file.bytes)).unwrap();
    let mut body = Vec::new();
    new_database(2).iter().for_each(|operation| operation.encode(&mut body).unwrap());
    let length = u32::try_from(body.len()).unwrap();
    let head = next_head(&keystore, length);
    let kind_with = |head: Head| open(alone(&[&file.bytes[..], &forge(head, SEQUENCE, &body)].concat()));
    assert_eq!(kind_with(head.clone()).unwrap().position().0, SEQUENCE + 5);
    for synced in [0, SEQUENCE, head.synced - 1, head.seq, u64::MAX] {
        let error = error_of(kind_with(Head { synced, ..head.clone() }));
        assert!(error.to_string().contains("synced"), "{error}");
    }
    for lying in [
        Head { sealed_length: 1, ..head.clone() },
        Head { body_nonce: [1; NONCE_LEN], ..head.clone() },
        Head { length: 0, end: true, ..head.clone() },
    ] {
        let opened = kind_with(lying.clone());
        assert_eq!(opened.err().map(|error| error.kind()), Some(ErrorKind::Damaged), "{lying:?}");
    }
    // No tag covers the head's own nonce.
    let opened = kind_with(Head { head_nonce: [1; NONCE_LEN], ..head }).unwrap();
    assert!(is_torn(&opened) && opened.position().0 == SEQUENCE + 4);
}

#[test]
fn operations_of_a_newer_version_are_refused_and_not_skipped() {
    for kind in [0, 11, 12, 100, 255] {
        let bytes = with_body(&[kind, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4]);
        // Also where the other copy ends before it: what is unknown may be what counts.
        let shorter = bytes[..File::new(vec![new_database(1)]).bytes.len()].to_vec();
        for copies in
            [alone(&bytes), both(&bytes), [Some(bytes.clone()), Some(shorter.clone())], [Some(shorter), Some(bytes)]]
        {
            let error = error_of(open(copies));
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains(&format!("kind {kind}")), "{error}");
            assert!(error.to_string().contains("newer"), "{error}");
        }
    }
}

#[test]
fn a_header_of_a_newer_version_is_refused_whatever_the_other_copy_says() {
    let file = File::new(history());
    let mut newer = file.bytes.clone();
    newer[7] = b'2';
    let covered = file.ends[0] - HEADER_MAC_LEN;
    let mac = MAC.with(|hmac| hmac.sign(&[&newer[..covered]])).unwrap();
    newer[covered..file.ends[0]].copy_from_slice(&mac);
    for copies in [
        alone(&newer),
        both(&newer),
        [Some(newer.clone()), Some(file.bytes.clone())],
        [Some(file.bytes.clone()), Some(newer.clone())],
        [Some(b"rubbish".to_vec()), Some(newer.clone())],
    ] {
        assert_eq!(error_of(open(copies)).kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn authentic_bodies_that_break_the_format_are_errors_at_their_byte() {
    let mut body = Vec::new();
    let at: Vec<_> = new_database(2)
        .iter()
        .map(|operation| {
            let at = body.len();
            operation.encode(&mut body).unwrap();
            at
        })
        .collect();
    let whole = open(alone(&with_body(&body))).unwrap();
    let start = whole.tip.end - group::group_len(u32::try_from(body.len()).unwrap()) + HEAD_LEN;
    for len in 0..body.len() {
        let error = error_of(open(alone(&with_body(&body[..len]))));
        assert_eq!(error.kind(), ErrorKind::Damaged, "length {len}");
        let byte = start + at.iter().rev().find(|&&at| at < len).unwrap_or(&0);
        assert!(error.to_string().contains(&format!("byte {byte}:")), "length {len}: {error}");
    }
    for byte in 0..body.len() {
        let mut changed = body.clone();
        changed[byte] ^= 0xff;
        let _ = open(both(&with_body(&changed)));
    }
}

#[test]
fn declared_lengths_are_bounded_before_they_are_used() {
    let file = File::new(vec![new_database(1)]);
    let keystore = open(alone(&file.bytes)).unwrap();
    for length in [MAX_BODY_LEN + 1, u32::MAX] {
        let group = forge(next_head(&keystore, length), SEQUENCE, b"");
        let error = error_of(open(alone(&[&file.bytes[..], &group].concat())));
        assert!(error.to_string().contains("longer than allowed"), "{error}");
    }
    // Allowed, and not there: a torn tail, found without allocating for it.
    let group = forge(next_head(&keystore, MAX_BODY_LEN), SEQUENCE, b"");
    assert!(is_torn(&open(alone(&[&file.bytes[..], &group].concat())).unwrap()));
    let bomb = [1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(error_of(open(alone(&with_body(&bomb)))).kind(), ErrorKind::Damaged);
}

/// Groups of operations that contradict what [`history`] leaves, or each other.
fn contradictions() -> Vec<(ErrorKind, Vec<Operation>)> {
    let database = |byte, by_name| Operation::Database { database: id(byte), name: name(by_name) };
    let generation = |byte, number| Operation::Generation(data_record(byte, number));
    let used = |key_use| Operation::KeyUseAdd(key_use);
    let destroyed = Record { state: KeyState::Destroyed, wrappings: Vec::new(), ..data_record(1, 3) };
    vec![
        (ErrorKind::AlreadyExists, vec![database(1, 2), generation(1, 3)]),
        (ErrorKind::AlreadyExists, vec![database(2, 1), generation(2, 1)]),
        (ErrorKind::AlreadyExists, [new_database(2), new_database(2)].concat()),
        (ErrorKind::AlreadyExists, [new_database(2), vec![database(3, 2), generation(3, 1)]].concat()),
        (ErrorKind::NotFound, vec![generation(2, 1)]),
        (ErrorKind::NotFound, vec![generation(2, 1), database(2, 2)]),
        (ErrorKind::Invalid, vec![database(2, 2)]),
        (ErrorKind::Invalid, vec![database(2, 2), generation(2, 2)]),
        (ErrorKind::Invalid, vec![generation(1, 2)]),
        (ErrorKind::Invalid, vec![generation(1, 4)]),
        (ErrorKind::Invalid, vec![generation(1, 3), generation(1, 3)]),
        (ErrorKind::NotFound, vec![used(key_use(2, 1, 1))]),
        (ErrorKind::NotFound, vec![used(key_use(1, 1, 3))]),
        (ErrorKind::Invalid, vec![Operation::Generation(destroyed), used(key_use(1, 1, 3))]),
        (ErrorKind::AlreadyExists, vec![used(KeyUse { name: Some(name(8)), ..key_use(1, 9, 1) })]),
        (
            ErrorKind::AlreadyExists,
            vec![used(KeyUse { name: Some(SealedName { lookup: [0x51; 32], ..name(1) }), ..key_use(1, 8, 1) })],
        ),
        (ErrorKind::AlreadyExists, vec![used(key_use(1, 3, 1)), used(key_use(1, 3, 1))]),
    ]
}

#[test]
fn contradictory_operations_write_nothing_and_leave_the_handle_usable() {
    let file = File::new(history());
    let store = Watched::with(both(&file.bytes));
    let mut keystore = open_store(store.clone()).unwrap();
    for (kind, operations) in contradictions() {
        let text = format!("{operations:?}");
        assert_eq!(error_of(keystore.append(&MAC, operations.clone())).kind(), kind, "{text}");
        assert_eq!(file.position(keystore.catalogue()), Some(4), "{text}");
        assert_eq!(error_of(keystore.rewrite(&MAC, operations, None)).kind(), kind, "{text}");
        assert_eq!(file.position(keystore.catalogue()), Some(4), "{text}");
        assert!(keystore.is_settled());
    }
    let too_long = Operation::Database { database: id(2), name: SealedName { sealed: vec![0; 513], ..name(2) } };
    assert_eq!(error_of(keystore.append(&MAC, vec![too_long])).kind(), ErrorKind::Invalid);
    let too_many = vec![Operation::Probe(cluster_record(Purpose::Probe)); (MAX_BODY_LEN as usize) / 100];
    assert_eq!(error_of(keystore.append(&MAC, too_many)).kind(), ErrorKind::Invalid);
    keystore.append(&MAC, Vec::new()).unwrap();
    assert_eq!(read(&*store), both(&file.bytes));
    keystore.append(&MAC, new_database(2)).unwrap();
    assert_eq!(keystore.position().0, SEQUENCE + 5);
}

#[test]
fn contradictory_operations_on_disk_are_damage() {
    let file = File::new(history());
    let keystore = open(alone(&file.bytes)).unwrap();
    for (_, operations) in contradictions() {
        let mut body = Vec::new();
        operations.iter().for_each(|operation| operation.encode(&mut body).unwrap());
        let error = error_of(open(both(&[&file.bytes[..], &next_group(&keystore, &body)].concat())));
        assert_eq!(error.kind(), ErrorKind::Damaged, "{operations:?}");
    }
}

#[test]
fn a_file_that_was_written_whole_is_damaged_wherever_it_is_cut_and_torn_only_behind() {
    let store = Arc::new(MemoryStore::default());
    let mut keystore = create(store.clone(), history().concat()).unwrap();
    let snapshot = keystore.tip.end;
    assert_eq!(keystore.header.whole, keystore.position().0);
    keystore.append(&MAC, new_database(2)).unwrap();
    let bytes = read(&*store)[0].clone().unwrap();
    for len in 0..snapshot {
        assert_eq!(error_of(open(both(&bytes[..len]))).kind(), ErrorKind::Damaged, "length {len}");
    }
    for len in snapshot..bytes.len() {
        let keystore = open(both(&bytes[..len])).unwrap();
        assert!(keystore.position().0 == SEQUENCE + 1 && keystore.catalogue().find_database(&[1; 32]).is_some());
    }
    let mut flipped = bytes[..snapshot].to_vec();
    flipped[600] ^= 1;
    let error = error_of(open(both(&flipped)));
    assert!(error.kind() == ErrorKind::Damaged && error.to_string().contains("byte 512:"), "{error}");
}
