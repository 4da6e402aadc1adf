//! A keystore and the wrapped keys in it, of any bytes: a structure that reads is written back as it was; a keystore, of which
//! one copy or both are changed, is refused, or is a beginning of its own history and takes another change; a changed wrapped
//! key is refused. What somebody with the MAC key wrote is refused or makes sense.

#![no_main]

mod changes;

use std::sync::LazyLock;

use changes::change;
use libfuzzer_sys::fuzz_target;
use pageseal::testing::fuzzing::{KnownKeys, KnownKeystore, Structure, authenticate};
use pageseal::{ErrorKind, KmsClass};

/// Set by `tests/run` to see this target fail: then the MACs of a changed keystore are written anew, as if nobody checked them.
static BROKEN: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PAGESEAL_FUZZ_BROKEN").is_some());

thread_local! {
    // Thread locals of the main thread are dropped at exit, and their files with them.
    static KEYSTORE: KnownKeystore = KnownKeystore::new().unwrap();
    static KEYS: KnownKeys = KnownKeys::new().unwrap();
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    match kind % 6 {
        0 => what_reads_is_written_back(rest),
        1 => KEYSTORE.with(|known| a_changed_keystore_is_refused_or_a_beginning(known, rest)),
        2 => KEYSTORE.with(|known| {
            let file = known.followed_by(rest).unwrap();
            what_the_key_holder_wrote_makes_sense(known, &file, None);
            what_the_key_holder_wrote_makes_sense(known, known.bytes(), Some(&file));
        }),
        3 => KEYSTORE.with(|known| {
            let Some((mut first, mut second)) = changed_copies(known, rest) else { return };
            [Some(&mut first), second.as_mut()].into_iter().flatten().for_each(|file| authenticate(file).unwrap());
            what_the_key_holder_wrote_makes_sense(known, &first, second.as_deref());
        }),
        4 => KEYS.with(|known| only_the_right_payload_is_accepted(known, rest)),
        _ => KEYS.with(|known| a_changed_blob_does_not_unwrap(known, rest)),
    }
});

fn what_reads_is_written_back(bytes: &[u8]) {
    for structure in Structure::ALL {
        if let Some((read, written)) = structure.recode(bytes) {
            assert!(written == bytes[..read], "{structure:?} is written otherwise than it was read");
        }
    }
}

/// Both copies of a keystore, changed as `input` says: the first byte says which, and the second how much of the changes is
/// the first copy's where each has its own. The other copy is as it was, or missing.
fn changed_copies(known: &KnownKeystore, input: &[u8]) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let (&[which, share], changes) = input.split_first_chunk()?;
    let whole = || known.bytes().to_vec();
    let changed = |changes: &[u8]| {
        let mut file = whole();
        change(&mut file, changes);
        file
    };
    let (for_first, for_second) = changes.split_at((4 * usize::from(share)).min(changes.len()));
    Some(match which % 5 {
        0 => (changed(changes), Some(whole())),
        1 => (whole(), Some(changed(changes))),
        2 => (changed(changes), Some(changed(changes))),
        3 => (changed(for_first), Some(changed(for_second))),
        _ => (changed(changes), None),
    })
}

fn a_changed_keystore_is_refused_or_a_beginning(known: &KnownKeystore, input: &[u8]) {
    let Some((mut first, mut second)) = changed_copies(known, input) else { return };
    if *BROKEN {
        [Some(&mut first), second.as_mut()].into_iter().flatten().for_each(|file| authenticate(file).unwrap());
    }
    let files: Vec<_> = [Some(&first), second.as_ref()].into_iter().flatten().collect();
    match known.open(&first, second.as_deref()) {
        Ok(opened) => {
            let groups = opened.groups().expect("a changed keystore says what was never written");
            let ends = known.ends();
            let parts = std::iter::once(0..ends[0]).chain(ends.windows(2).map(|ends| ends[0]..ends[1]));
            for part in parts.take(groups + 1) {
                let authentic = |file: &&Vec<u8>| file.get(part.clone()) == Some(&known.bytes()[part.clone()]);
                assert!(files.iter().any(authentic), "bytes {part:?} came from nowhere");
            }
            assert!(opened.change().unwrap(), "a change after {groups} groups was not read back");
        }
        Err(error) => {
            let cut = |file: &Vec<u8>| known.bytes().starts_with(file) && file.len() >= known.ends()[0];
            assert!(!files.iter().all(|file| cut(file)), "the history, cut short as by a crash, is refused: {error}");
            let whole = |file: &&Vec<u8>| *file == known.bytes();
            let newer = error.kind() == ErrorKind::Unsupported;
            assert!(newer || !files.iter().any(whole), "one copy is whole, and yet it is refused: {error}");
            assert!(is_verdict(error.kind()), "{error:?}");
        }
    }
}

fn what_the_key_holder_wrote_makes_sense(known: &KnownKeystore, first: &[u8], second: Option<&[u8]>) {
    match known.open(first, second) {
        Ok(opened) => {
            assert!(opened.is_consistent(), "its operations contradict each other");
            match opened.change() {
                Ok(read_back) => assert!(read_back, "a change was not read back"),
                // After the last sequence number there is no other.
                Err(error) => assert_eq!(error.kind(), ErrorKind::Invalid, "{error}"),
            }
        }
        Err(error) => assert!(is_verdict(error.kind()), "{error:?}"),
    }
}

/// Whether an error is about what was read, and not about this machine.
fn is_verdict(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Damaged | ErrorKind::Authentication | ErrorKind::Unsupported)
}

/// The fields of a record that the commitment covers: generation, suite and seal id; purpose; commitment.
fn committed_fields(record: &[u8], data: bool) -> [&[u8]; 3] {
    // A cluster key's suite and seal id are always the same.
    [if data { &record[16..36] } else { &record[16..19] }, &record[37..38], &record[48..80]]
}

/// The payload that a record asks for. The database is not committed to: it is whichever the record says, and the
/// keystore's MAC is what keeps a record from saying another.
fn payload_for(record: &[u8], right: &[u8], data: bool) -> Vec<u8> {
    let mut payload = right.to_vec();
    if data && record.len() >= 80 {
        payload[32..48].copy_from_slice(&record[..16]);
    }
    payload
}

fn only_the_right_payload_is_accepted(known: &KnownKeys, input: &[u8]) {
    let Some((&[choice, in_record], changes)) = input.split_first_chunk() else { return };
    let data = choice & 1 == 1;
    let (right_payload, right_record) = (known.payload(data), known.record(data));
    let (mut payload, mut record) = (right_payload.to_vec(), right_record.clone());
    let (in_record, in_payload) = changes.split_at((4 * usize::from(in_record)).min(changes.len()));
    change(&mut record, in_record);
    change(&mut payload, in_payload);
    let mut right = payload == payload_for(&record, &right_payload, data)
        && record.len() >= 80
        && committed_fields(&record, data) == committed_fields(&right_record, data);
    match known.accept(payload, &record) {
        Ok(()) => assert!(right, "a payload was taken for a key that it is not"),
        Err(error) => {
            right &= record == right_record || error.kind() != ErrorKind::Invalid;
            assert!(!right, "the right payload is refused: {error}");
        }
    }
}

fn a_changed_blob_does_not_unwrap(known: &KnownKeys, changes: &[u8]) {
    let mut blob = known.blob().to_vec();
    change(&mut blob, changes);
    let expected = if blob == known.blob() { Ok(known.payload(true)) } else { Err(KmsClass::BadCiphertext) };
    assert_eq!(known.unwrap_blob(&blob), expected);
}
