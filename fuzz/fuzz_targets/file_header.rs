//! The header of a page file, of any bytes: what reads is written back as it was; a changed file is refused, or says what its
//! last good header said; a header that was sealed with the right key and says anything is refused or holds.

#![no_main]

mod changes;

use std::sync::LazyLock;

use changes::change;
use libfuzzer_sys::fuzz_target;
use pageseal::testing::fuzzing::{KnownFile, Structure, page_offset};
use pageseal::{ErrorKind, Inline, PageFile, Read};

/// Set by `tests/run` to see this target fail: then a changed header is sealed anew, as if its tag were not checked.
static BROKEN: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PAGESEAL_FUZZ_BROKEN").is_some());

const SLOT: usize = 4096;
/// How many pages there are as the slots say, of which slot 0 is the newer.
const PAGES: [u64; 2] = [3, 2];

thread_local! {
    // Thread locals of the main thread are dropped at exit, and their files with them.
    static FILE: KnownFile = KnownFile::new().unwrap();
}

fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    match kind % 4 {
        0 => what_reads_is_written_back(rest),
        1 => offsets_do_not_wrap(rest),
        2 => FILE.with(|known| a_changed_file_is_refused_or_an_earlier_one(known, rest)),
        _ => FILE.with(|known| what_the_key_holder_wrote_holds(known, rest)),
    }
});

fn what_reads_is_written_back(bytes: &[u8]) {
    for structure in [Structure::FileHeader, Structure::FileHeaderBody] {
        // A body is long: the input is its beginning.
        let mut bytes = bytes.to_vec();
        bytes.resize(SLOT, 0);
        if let Some((read, written)) = structure.recode(&bytes) {
            assert!(written == bytes[..read], "{structure:?} is written otherwise than it was read");
        }
    }
}

fn offsets_do_not_wrap(bytes: &[u8]) {
    let (Some(size), Some(page)) = (bytes.first_chunk(), bytes.last_chunk()) else { return };
    let (size, page) = (u32::from_le_bytes(*size), u64::from_le_bytes(*page));
    let exact = u128::from(size.max(8192)) + u128::from(size) * u128::from(page);
    assert_eq!(page_offset(size, page), exact.try_into().ok());
}

fn a_changed_file_is_refused_or_an_earlier_one(known: &KnownFile, changes: &[u8]) {
    let mut file = known.bytes().to_vec();
    change_slots(known, &mut file, changes, *BROKEN);
    let intact = |slot: usize| {
        let range = SLOT * slot..SLOT * (slot + 1);
        file.get(range.clone()) == Some(&known.bytes()[range])
    };
    let expected = (0..2).find(|&slot| intact(slot)).map(|slot| PAGES[slot]);
    match known.open(&file) {
        Ok(opened) => {
            assert_eq!(Some(opened.pages()), expected, "the number of pages");
            assert_eq!(opened.page_size(), KnownFile::PAGE_SIZE as usize);
            for page in 0..=PAGES[0] {
                let authentic = opened.page_offset(page).is_some_and(|at| {
                    let range = at as usize..at as usize + opened.page_size();
                    file.get(range.clone()).is_some_and(|page| Some(page) == known.bytes().get(range))
                });
                check_page(&opened, page, authentic);
            }
            append_and_reopen(known, opened);
        }
        Err(error) => {
            let end = expected.and_then(|pages| page_offset(KnownFile::PAGE_SIZE, pages));
            let cut = end.is_some_and(|end| (file.len() as u64) < end);
            let newer = error.kind() == ErrorKind::Unsupported;
            assert!(expected.is_none() || cut || newer, "a file with a good header is refused: {error}");
            assert!(is_verdict(error.kind()), "{error:?}");
        }
    }
}

/// Whether an error is about what was read, and not about this machine.
fn is_verdict(kind: ErrorKind) -> bool {
    use ErrorKind::*;
    matches!(kind, Damaged | Authentication | WrongIdentity | Unsupported | KeystoreStale)
}

fn check_page(opened: &PageFile, page: u64, authentic: bool) {
    let mut payload = vec![0xee; opened.payload_len()];
    let outcome = opened.read(page, &mut payload).map_err(|error| error.kind());
    let expected = match (page < opened.pages(), authentic) {
        (false, _) => Ok(Read::NeverWritten),
        (true, true) => Ok(Read::Page),
        (true, false) => Err(ErrorKind::Authentication),
    };
    assert_eq!(outcome, expected, "page {page}");
    let byte = if expected == Ok(Read::Page) { page as u8 } else { 0 };
    assert!(payload.iter().all(|&found| found == byte), "page {page}");
}

/// A file that opened takes another page, at its end as it says.
fn append_and_reopen(known: &KnownFile, opened: PageFile) {
    let pages = opened.pages();
    let mut appender = opened.append().unwrap();
    appender.write(&Inline, &vec![pages as u8; opened.payload_len()]).unwrap();
    assert_eq!(appender.finish().unwrap(), pages + 1);
    let bytes = std::fs::read(opened.path()).unwrap();
    drop(opened);
    let again = known.open(&bytes).unwrap();
    assert_eq!(again.pages(), pages + 1);
    check_page(&again, pages, true);
}

fn what_the_key_holder_wrote_holds(known: &KnownFile, changes: &[u8]) {
    let mut file = known.bytes().to_vec();
    change_slots(known, &mut file, changes, true);
    match known.open(&file) {
        Ok(opened) => {
            let end = page_offset(opened.page_size() as u32, opened.pages());
            assert!(opened.pages() == 0 || end.is_some_and(|end| end <= file.len() as u64), "pages behind the end");
            for page in (0..4).chain([opened.pages().wrapping_sub(1), opened.pages(), u64::MAX]) {
                let mut payload = vec![0xee; opened.payload_len()];
                if opened.read(page, &mut payload).is_err() {
                    assert!(payload.iter().all(|&byte| byte == 0), "a refused page left something");
                }
            }
        }
        Err(error) => {
            assert!(is_verdict(error.kind()), "{error:?}");
        }
    }
}

/// Changes the file; with `sealed`, the changes are made to what the slots say, which is then sealed anew.
fn change_slots(known: &KnownFile, file: &mut Vec<u8>, changes: &[u8], sealed: bool) {
    if sealed {
        each_slot(file, |slot| known.open_slot(slot).unwrap());
    }
    let before = file.clone();
    change(file, changes);
    if sealed {
        // A slot that nobody touched keeps its bytes.
        let mut number = 0;
        each_slot(file, |slot| {
            let range = SLOT * number..SLOT * (number + 1);
            number += 1;
            match before.get(range.clone()) {
                Some(opened) if opened == slot => slot.copy_from_slice(&known.bytes()[range]),
                _ => known.seal_slot(slot).unwrap(),
            }
        });
    }
}

fn each_slot(file: &mut [u8], f: impl FnMut(&mut [u8; SLOT])) {
    file.as_chunks_mut().0.iter_mut().take(2).for_each(f);
}
