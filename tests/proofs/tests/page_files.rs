//! What a page file promises: what was published is there, where it was written, or an error says so.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use pageseal::{
    Cluster, ClusterOptions, Database, Error, ErrorKind, Inline, PageError, PageFile, PageFileOptions, Pool, Read,
    ReadJob, ScriptedWrapper, Suite, Threads, Wrappers,
};

struct Store {
    directory: PathBuf,
    key: ScriptedWrapper,
    cluster: Option<Cluster>,
}

impl Store {
    fn new(suite: Suite) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = std::env::temp_dir().join(format!("pageseal-files-{}-{number}", std::process::id()));
        let key = ScriptedWrapper::new("k");
        let options = ClusterOptions::new().suite(suite);
        let cluster = Cluster::create(&directory, options, Wrappers::one(key.clone())).unwrap();
        cluster.create_database("d").unwrap();
        cluster.create_database("other").unwrap();
        Self { directory, key, cluster: Some(cluster) }
    }

    fn database(&self, name: &str) -> Database {
        self.cluster.as_ref().unwrap().database(name).unwrap()
    }

    fn reopen(&mut self) {
        self.cluster = None;
        let wrappers = Wrappers::one(self.key.clone());
        self.cluster = Some(Cluster::open(&self.directory, ClusterOptions::new(), wrappers).unwrap());
    }

    fn file(&self) -> Result<PageFile, Error> {
        self.database("d").page_file("f")
    }

    /// A file of `pages` small pages, each filled with its number.
    fn filled(&self, pages: u8) -> PageFile {
        let file = self.database("d").create_page_file("f", PageFileOptions::new().page_size(512)).unwrap();
        append(&file, 0..pages);
        file
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn append(file: &PageFile, numbers: std::ops::Range<u8>) {
    let payloads: Vec<u8> = numbers.flat_map(|number| vec![number; file.payload_len()]).collect();
    let mut appender = file.append().unwrap();
    appender.write(&Inline, &payloads).unwrap();
    appender.finish().unwrap();
}

fn read(file: &PageFile, page: u64) -> Result<Option<Vec<u8>>, Error> {
    let mut buf = vec![0xee; file.payload_len()];
    let outcome = file.read(page, &mut buf);
    if outcome.is_err() {
        assert!(buf.iter().all(|&byte| byte == 0), "a refused page left bytes behind");
    }
    Ok(match outcome? {
        Read::Page => Some(buf),
        Read::NeverWritten => None,
    })
}

fn kind<T>(outcome: Result<T, Error>) -> ErrorKind {
    outcome.err().expect("it should have been refused").kind()
}

/// Writes over bytes of the file, as an attacker or a bad disk does.
fn overwrite(file: &PageFile, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(file.path()).unwrap().write_all_at(bytes, offset).unwrap();
}

fn raw(file: &PageFile) -> Vec<u8> {
    fs::read(file.path()).unwrap()
}

#[test]
fn pages_come_back_after_reopening_whatever_the_suite_the_size_and_the_pool() {
    for suite in [Suite::Aes256Gcm, Suite::ChaCha20Poly1305, Suite::Aegis256X2] {
        let mut store = Store::new(suite);
        for size in [512, 4096, 12288, 16384, 1 << 20] {
            let name = size.to_string();
            let file = store.database("d").create_page_file(&name, PageFileOptions::new().page_size(size)).unwrap();
            let page =
                move |number: u64| (0..u64::from(size) - 48).map(move |at| (at * 7 + number) as u8).collect::<Vec<_>>();
            for (pool, numbers) in [(&Inline as &dyn Pool, 0..3), (Threads::shared(), 3..9)] {
                let payloads: Vec<u8> = numbers.flat_map(page).collect();
                let mut appender = file.append().unwrap();
                appender.write(pool, &payloads).unwrap();
                appender.finish().unwrap();
            }
            drop(file);
            store.reopen();
            let file = store.database("d").page_file(&name).unwrap();
            assert_eq!(file.pages(), 9);
            let mut buffers = vec![vec![0; file.payload_len()]; 9];
            let mut jobs: Vec<_> = (0..).zip(&mut buffers).map(|(page, buf)| ReadJob::new(page, buf)).collect();
            assert_eq!(file.read_many(Threads::shared(), &mut jobs), 0);
            drop(jobs);
            for (number, buffer) in (0..).zip(buffers) {
                assert!(buffer == page(number), "{suite:?} {size} page {number}");
                assert!(read(&file, number).unwrap().unwrap() == buffer);
            }
        }
    }
}

#[test]
fn nothing_is_visible_or_survives_before_the_append_is_finished() {
    let mut store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(2);
    let mut appender = file.append().unwrap();
    assert_eq!(appender.write(&Inline, &vec![9; 2 * file.payload_len()]).unwrap(), 2);
    assert_eq!(file.pages(), 2);
    assert_eq!(read(&file, 2).unwrap(), None);
    drop(appender);
    drop(file);
    store.reopen();
    let file = store.file().unwrap();
    assert_eq!(file.pages(), 2);
    assert_eq!(read(&file, 2).unwrap(), None);
    append(&file, 2..4);
    assert_eq!(read(&file, 3).unwrap().unwrap()[0], 3);
}

#[test]
fn one_appender_at_a_time_and_only_whole_pages() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(1);
    let mut first = file.append().unwrap();
    assert_eq!(kind(file.clone().append()), ErrorKind::InUse);
    assert_eq!(kind(first.write(&Inline, &[1, 2, 3])), ErrorKind::Invalid);
    drop(first);
    drop(file.append().unwrap());
}

#[test]
fn a_page_never_written_is_told_from_a_page_that_was_zeroed() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(3);
    assert_eq!(read(&file, 3).unwrap(), None);
    assert_eq!(read(&file, u64::MAX).unwrap(), None);
    overwrite(&file, file.page_offset(1).unwrap(), &[0; 512]);
    let error = read(&file, 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Authentication);
    let text = error.to_string();
    let names = [file.id().to_string(), store.database("d").id().to_string(), "page 1".to_owned()];
    assert!(names.iter().all(|name| text.contains(name)), "{text}");
    assert_eq!(read(&file, 2).unwrap().unwrap()[0], 2);
}

#[test]
fn a_moved_page_is_refused_alone_and_in_a_batch() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(4);
    let bytes = raw(&file);
    let at = |page| file.page_offset(page).unwrap();
    overwrite(&file, at(3), &bytes[at(0) as usize..][..512]);
    let mut buffers = vec![vec![0xee; file.payload_len()]; 4];
    let mut jobs: Vec<_> = (0..).zip(&mut buffers).map(|(page, buf)| ReadJob::new(page, buf)).collect();
    assert_eq!(file.read_many(&Inline, &mut jobs), 1);
    assert_eq!(jobs[3].result(), Err(PageError::Authentication));
    assert!((0..3).all(|page| jobs[page].result() == Ok(Read::Page)));
    drop(jobs);
    assert!(buffers[3].iter().all(|&byte| byte == 0));
}

#[test]
fn any_damage_to_one_header_slot_loses_nothing_and_damage_to_both_is_an_error() {
    let mut store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(3);
    let path = file.path().to_path_buf();
    let good = raw(&file);
    drop(file);
    let write = |bytes: &[u8]| fs::write(&path, bytes).unwrap();
    for at in (0..8192).step_by(13).chain(0..64).chain(4096..4160).chain(4040..4096).chain(8136..8192) {
        let mut bytes = good.clone();
        bytes[at] ^= 0x40;
        write(&bytes);
        match store.file() {
            Ok(file) => assert_eq!(file.pages(), 3, "byte {at}"),
            // The version digit: a newer version may have written this slot last. Refused, and nothing is changed.
            Err(error) => assert_eq!((at % 4096, error.kind()), (7, ErrorKind::Unsupported), "byte {at}: {error}"),
        }
        bytes[(at + 4096) % 8192] ^= 0x01;
        write(&bytes);
        let error = store.file().expect_err("both slots are damaged");
        assert!(
            matches!(
                error.kind(),
                ErrorKind::Authentication | ErrorKind::Damaged | ErrorKind::WrongIdentity | ErrorKind::Unsupported
            ),
            "byte {at}: {error}"
        );
    }
    write(&good);
    store.reopen();
    assert_eq!(store.file().unwrap().pages(), 3);
}

#[test]
fn every_truncation_is_an_error_and_never_fewer_pages() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(3);
    let (path, good) = (file.path().to_path_buf(), raw(&file));
    drop(file);
    for length in (0..good.len()).step_by(61).chain([0, 1, 63, 64, 4095, 4096, 8191, 8192, good.len() - 1]) {
        fs::write(&path, &good[..length]).unwrap();
        let error = store.file().expect_err("the file is cut short");
        assert_eq!(error.kind(), ErrorKind::Damaged, "length {length}: {error}");
    }
    fs::write(&path, &good).unwrap();
    store.file().unwrap();
}

#[test]
fn a_file_of_another_name_or_database_or_an_older_slot_copied_over_is_refused() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(2);
    let options = PageFileOptions::new().page_size(512);
    let same_database = store.database("d").create_page_file("g", options.clone()).unwrap();
    let other_database = store.database("other").create_page_file("f", options).unwrap();
    append(&same_database, 0..2);
    append(&other_database, 0..2);
    let (path, good) = (file.path().to_path_buf(), raw(&file));
    drop(file);
    for other in [&same_database, &other_database] {
        fs::write(&path, raw(other)).unwrap();
        assert_eq!(kind(store.file()), ErrorKind::WrongIdentity);
        // Even with the clear part made to fit.
        let mut forged = raw(other);
        for slot in [0, 4096] {
            forged[slot..slot + 64].copy_from_slice(&good[slot..slot + 64]);
        }
        fs::write(&path, &forged).unwrap();
        assert_eq!(kind(store.file()), ErrorKind::Authentication);
        // A page of the other file, at the same place.
        fs::write(&path, &good).unwrap();
        let opened = store.file().unwrap();
        let at = opened.page_offset(1).unwrap();
        overwrite(&opened, at, &raw(other)[at as usize..][..512]);
        assert_eq!(kind(read(&opened, 1)), ErrorKind::Authentication);
        fs::write(&path, &good).unwrap();
    }
    // Slot 0 in the place of slot 1, and the other way round.
    let mut swapped = good.clone();
    swapped[..4096].copy_from_slice(&good[4096..8192]);
    swapped[4096..8192].copy_from_slice(&good[..4096]);
    fs::write(&path, &swapped).unwrap();
    assert_eq!(kind(store.file()), ErrorKind::Damaged);
}

#[test]
fn sizes_that_cannot_be_are_refused_before_anything_is_noted() {
    let store = Store::new(Suite::Aes256Gcm);
    let database = store.database("d");
    let keystore = || fs::metadata(store.directory.join("keystore")).unwrap().len();
    let before = keystore();
    for size in [0, 48, 511, 513, (1 << 20) + 512, u32::MAX] {
        let outcome = database.create_page_file("f", PageFileOptions::new().page_size(size));
        assert_eq!(kind(outcome), ErrorKind::Invalid, "{size}");
    }
    assert_eq!(kind(database.create_page_file("", PageFileOptions::new())), ErrorKind::Invalid);
    assert_eq!(keystore(), before);
}

#[test]
fn readers_go_on_while_pages_are_appended() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(1);
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    while file.pages() < 60 {
                        for page in 0..file.pages() {
                            assert_eq!(read(&file, page).unwrap().unwrap(), vec![page as u8; file.payload_len()]);
                        }
                    }
                })
            })
            .collect();
        for number in 1..60 {
            append(&file, number..number + 1);
        }
        readers.into_iter().for_each(|reader| reader.join().unwrap());
    });
}

#[test]
fn a_buffer_of_the_wrong_length_is_refused() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(1);
    for length in [0, 1, 463, 465, 512] {
        for page in [0, 7] {
            let mut buf = vec![0xee; length];
            assert_eq!(kind(file.read(page, &mut buf)), ErrorKind::Invalid, "{length}");
            assert!(buf.iter().all(|&byte| byte == 0));
        }
    }
}

#[test]
fn all_handles_of_a_file_share_one_writer_and_one_view() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(1);
    let again = store.file().unwrap();
    let appender = file.append().unwrap();
    assert_eq!(kind(again.append()), ErrorKind::InUse);
    drop(appender);
    append(&again, 1..3);
    assert_eq!(read(&file, 2).unwrap().unwrap()[0], 2);
    append(&file, 3..4);
    assert_eq!(read(&again, 3).unwrap().unwrap()[0], 3);
    assert_eq!(read(&again, 2).unwrap().unwrap()[0], 2);
}

#[test]
fn a_slot_left_behind_by_a_crash_is_brought_up_when_the_file_is_opened() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(2);
    let older = raw(&file);
    append(&file, 2..3);
    let (path, good) = (file.path().to_path_buf(), raw(&file));
    drop(file);
    for slot in [0, 4096] {
        // A crash between the two header writes leaves one slot as it was.
        let mut bytes = good.clone();
        bytes[slot..slot + 4096].copy_from_slice(&older[slot..slot + 4096]);
        fs::write(&path, &bytes).unwrap();
        assert_eq!(store.file().unwrap().pages(), 3);
        // From then on either slot may go.
        let settled = fs::read(&path).unwrap();
        for lost in [0, 4096] {
            let mut bytes = settled.clone();
            bytes[lost..lost + 4096].fill(0);
            fs::write(&path, &bytes).unwrap();
            assert_eq!(store.file().unwrap().pages(), 3, "slot {slot} was behind, slot at {lost} was lost");
        }
    }
}

#[test]
fn a_file_of_a_newer_format_is_told_from_a_damaged_one() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(1);
    let (path, mut bytes) = (file.path().to_path_buf(), raw(&file));
    drop(file);
    (bytes[7], bytes[4096 + 7]) = (b'2', b'2');
    fs::write(&path, &bytes).unwrap();
    assert_eq!(kind(store.file()), ErrorKind::Unsupported);
}

#[test]
fn an_append_of_nothing_is_finished_and_changes_nothing() {
    let store = Store::new(Suite::Aes256Gcm);
    for size in [512, 8192, 16384, 1 << 20] {
        let options = PageFileOptions::new().page_size(size);
        let file = store.database("d").create_page_file(&size.to_string(), options).unwrap();
        assert_eq!(file.append().unwrap().finish().unwrap(), 0);
        append(&file, 0..1);
        assert_eq!(file.append().unwrap().finish().unwrap(), 1);
        assert_eq!(read(&file, 0).unwrap().unwrap()[0], 0);
    }
}

#[test]
fn opening_a_file_makes_durable_what_it_shows() {
    let store = Store::new(Suite::Aes256Gcm);
    let file = store.filled(2);
    let (path, before) = (file.path().to_path_buf(), raw(&file));
    drop(file);
    let file = store.file().unwrap();
    let after = raw(&file);
    for slot in [0, 4096] {
        // A header that a failed sync left in the kernel only is written anew, whether or not it looks well.
        assert_ne!(before[slot..slot + 4096], after[slot..slot + 4096]);
    }
    assert_eq!(before[8192..], after[8192..]);
    drop(file);
    assert_eq!(store.file().unwrap().pages(), 2);
    assert!(path.exists());
}
