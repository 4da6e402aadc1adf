//! Nothing that is stored reaches the disk in clear: no page, no name, no key; not in a temporary file, and not after the
//! process was killed at any moment.
//!
//! A *victim* process works on a cluster whose every page holds a canary, and tells its parent the keys. The parent searches
//! every file for pieces of the canary, for names, and for key bytes, raw, in hex and in base64. The master key's file, which
//! lies elsewhere, is the only place where a key may be.

#[path = "key_memory/channel.rs"]
#[allow(dead_code)]
mod channel;
#[path = "key_memory/patterns.rs"]
#[allow(dead_code)]
mod patterns;
#[path = "key_memory/subject.rs"]
#[allow(dead_code)]
mod subject;

use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageseal::testing::hkdf_expand;
use pageseal::{
    Cluster, Database, ErrorKind, FileId, Inline, OVERHEAD, PageContext, PageFileOptions, PageJob, Pool, Threads,
    Wrappers,
};
use pageseal_proofs::score;

use channel::{Channel, Message, Victim, send_trailer};
use patterns::Patterns;
use subject::{Subject, backend_of, kinds, suite_of};

/// In every page, at every offset. No eight bytes of it are the same.
const CANARY: &[u8; 48] = b"Quick zephyrs blow, vexing daft Jim: 0123456789.";
/// Begin the names of all databases and files.
const DATABASE: &str = "customers-of-Westphalia";
const FILE: &str = "invoices-unpaid-2026";
const PAGE: usize = 4096;
const KILLS_A_KIND: u64 = 6;

/// Not a test: what the other test starts this binary for.
#[test]
#[ignore = "the other test starts it, as a process of its own"]
fn victim_process() {
    if let Some((role, folder, channel)) = channel::victim() {
        let (role, kind) = role.split_once(' ').expect("role and kind");
        work(&Subject::new(kind, &folder), role == "forever", channel);
    }
}

#[test]
fn no_page_name_or_key_is_on_disk_in_clear() {
    let mut total = Total::default();
    let mut control = true;
    for kind in kinds() {
        let folder = std::env::temp_dir().join(format!("pageseal-disk-scan-{}-{kind}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        let mut told = Told::default();
        run(&folder, "once", kind, &mut told, None);
        total.scan(&folder, &told.patterns(kind, &folder), "closed");
        for _ in 0..KILLS_A_KIND {
            // From the first system calls to the third round of work.
            let delay = Duration::from_micros(RandomState::new().hash_one(kind) % 150_000);
            run(&folder, "forever", kind, &mut told, Some(delay));
            total.kills += 1;
            total.scan(&folder, &told.patterns(kind, &folder), &format!("killed after {delay:?}"));
        }
        // What the kills left behind opens again, and is closed well.
        run(&folder, "once", kind, &mut told, None);
        let patterns = told.patterns(kind, &folder);
        total.scan(&folder, &patterns, "closed after kills");
        assert!(told.keys.len() >= 6 && !told.sessions.is_empty(), "the victim told next to nothing");
        control &= leaks_are_found(&folder, &patterns, &told);
        fs::remove_dir_all(&folder).expect("the folder is ours");
    }
    let Total { files, bytes, kills, found, failures } = total;
    score(&format!("disk-scan files={files} bytes={bytes} kills={kills} found={found} control={}", u8::from(control)));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(control, "what was written in clear was not found");
}

/// Runs a victim to its end, or kills it after `delay`, and notes what it tells.
fn run(folder: &Path, role: &str, kind: &str, told: &mut Told, delay: Option<Duration>) {
    fs::create_dir_all(folder).expect("the temporary folder can be used");
    let mut victim = Victim::start("victim_process", &format!("{role} {kind}"), folder);
    if let Some(delay) = delay {
        let process = victim.id();
        std::thread::spawn(move || {
            std::thread::sleep(delay);
            // SAFETY: no memory is involved; the victim is not waited for before it is dead.
            unsafe { libc::kill(process as i32, libc::SIGKILL) };
        });
    }
    while let Ok(message) = victim.next_or_end() {
        match message {
            Message::Payload(payload) => {
                told.payloads.insert(payload);
                told.keys.insert(payload[64..96].try_into().expect("32 bytes"));
                // Beside a data key lies its commitment, which is public; beside a cluster key, the identity key.
                if payload[5] == 2 {
                    told.keys.insert(payload[96..].try_into().expect("32 bytes"));
                }
            }
            Message::Trailer { database, trailer } => {
                told.sessions.insert((database, trailer[28..].try_into().expect("20 bytes")));
            }
            _ => {}
        }
    }
    if delay.is_none() {
        victim.finish();
    }
}

/// What the victims told.
#[derive(Default)]
struct Told {
    payloads: BTreeSet<[u8; 128]>,
    keys: BTreeSet<[u8; 32]>,
    sessions: BTreeSet<([u8; 16], [u8; 20])>,
}

impl Told {
    /// What must not be on disk.
    fn patterns(&self, kind: &str, folder: &Path) -> Patterns {
        let mut patterns = Patterns::default();
        let texts = [
            ("the canary", &CANARY[..]),
            ("a database's name", DATABASE.as_bytes()),
            ("a file's name", FILE.as_bytes()),
        ];
        for (name, text) in texts {
            for piece in text.windows(8) {
                assert_eq!(patterns.add_bytes(name, piece).len(), 1, "a piece of {name} is not unusual enough");
            }
        }
        for key in &self.keys {
            patterns.add_hmac_key("a key", key);
        }
        if let Ok(master) = fs::read(subject::master_key(folder)) {
            patterns.add_hmac_key("the master key", &master.try_into().expect("a master key has 32 bytes"));
        }
        for payload in self.payloads.iter().filter(|payload| payload[5] == 1) {
            for (_, session) in self.sessions.iter().filter(|(database, _)| database[..] == payload[32..48]) {
                let info = [&b"pgseal1.page"[..], &payload[48..64], session].concat();
                let mut subkey = [0; 32];
                assert!(hkdf_expand(payload[64..96].try_into().expect("32 bytes"), &info, &mut subkey));
                patterns.add_cipher_key("a subkey", &subkey, suite_of(kind), backend_of(kind));
            }
        }
        patterns
    }
}

#[derive(Default)]
struct Total {
    files: u64,
    bytes: u64,
    kills: u64,
    found: usize,
    failures: Vec<String>,
}

impl Total {
    /// Searches all files below `folder`, and their names.
    fn scan(&mut self, folder: &Path, patterns: &Patterns, when: &str) {
        for path in files(folder) {
            self.files += 1;
            // A file that somebody removed meanwhile is no longer on disk; but nobody is left who could.
            let bytes = fs::read(&path).expect("the victim's files can be read");
            self.bytes += bytes.len() as u64;
            let below = path.strip_prefix(folder).expect("it is below").to_string_lossy().into_owned();
            let found = search(&bytes, patterns).into_iter().chain(search(below.as_bytes(), patterns));
            for (at, form, pattern) in found {
                self.found += 1;
                self.failures.push(format!("{when}, {below}, byte {at} ({form}): {}", patterns.name(pattern)));
            }
        }
    }
}

/// All files below `folder`, except the master key's.
fn files(folder: &Path) -> Vec<PathBuf> {
    let (mut files, mut folders) = (Vec::new(), vec![folder.to_path_buf()]);
    while let Some(next) = folders.pop() {
        for entry in fs::read_dir(next).expect("the victim's folders can be read") {
            let path = entry.expect("the victim's folders can be read").path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    files.retain(|path| *path != subject::master_key(folder));
    files
}

/// Everything in `bytes` that matches, as it is or written in hex or base64: where, in which form, and what.
fn search(bytes: &[u8], patterns: &Patterns) -> Vec<(usize, &'static str, u32)> {
    let mut found = Vec::new();
    patterns.search(bytes, |at, pattern| found.push((at, "raw", pattern)));
    for (form, bits, digit) in [("hex", 4, hex_digit as fn(u8) -> Option<u8>), ("base64", 6, base64_digit)] {
        let mut start = 0;
        for run in bytes.split(|byte| digit(*byte).is_none()) {
            // Eight bytes are at least eleven digits. The first digit may be any of a group of four.
            if run.len() >= 11 {
                for skipped in 0..4 {
                    let decoded = decode(&run[skipped..], bits, digit);
                    patterns
                        .search(&decoded, |at, pattern| found.push((start + skipped + at * 8 / bits, form, pattern)));
                }
            }
            start += run.len() + 1;
        }
    }
    found
}

fn decode(digits: &[u8], bits: usize, digit: fn(u8) -> Option<u8>) -> Vec<u8> {
    let (mut sum, mut have, mut out) = (0u32, 0, Vec::new());
    for value in digits.iter().filter_map(|byte| digit(*byte)) {
        sum = sum << bits | u32::from(value);
        have += bits;
        if have >= 8 {
            have -= 8;
            out.push((sum >> have) as u8);
        }
    }
    out
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).map(|digit| digit as u8)
}

fn base64_digit(byte: u8) -> Option<u8> {
    match byte {
        b'A'..=b'Z' => Some(byte - b'A'),
        b'a'..=b'z' => Some(byte - b'a' + 26),
        b'0'..=b'9' => Some(byte - b'0' + 52),
        b'+' | b'-' => Some(62),
        b'/' | b'_' => Some(63),
        _ => None,
    }
}

/// The control: each way to write something in clear, one file each, is found in that file.
fn leaks_are_found(folder: &Path, patterns: &Patterns, told: &Told) -> bool {
    let key = told.keys.first().expect("the victim told its keys");
    let hex: String = key.iter().map(|byte| format!("{byte:02X}")).collect();
    let digits: Vec<u8> = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/".to_vec();
    let base64: String = key
        .chunks_exact(3)
        .map(|three| u32::from_be_bytes([0, three[0], three[1], three[2]]))
        .flat_map(|sum| [18, 12, 6, 0].map(|shift| char::from(digits[(sum >> shift & 63) as usize])))
        .collect();
    let noise = [0x80; 1001];
    let leaks: [(&str, Vec<u8>); 5] = [
        ("piece", [&noise[..], &CANARY[13..21], &noise].concat()),
        ("key", [&noise[..], &key[8..16], &noise].concat()),
        ("hex", format!("key {hex} of nobody").into_bytes()),
        ("base64", format!("key {base64} of nobody").into_bytes()),
        (DATABASE, noise.to_vec()),
    ];
    leaks.into_iter().all(|(name, content)| {
        let path = folder.join("tmp").join(name);
        fs::write(&path, content).expect("the folder is ours");
        let mut total = Total::default();
        total.scan(folder, patterns, "control");
        fs::remove_file(&path).expect("the file is ours");
        total.found > 0 && total.failures.iter().all(|failure| failure.contains(name))
    })
}

/// The victim: makes databases and files and uses them, once or until it is killed.
fn work(subject: &Subject, forever: bool, _channel: Channel) {
    let pool = Threads::new(NonZero::new(2).expect("not zero")).expect("a process may have threads");
    for round in 0.. {
        let cluster = open(subject);
        let name = |what: &str| format!("{what}/{}/{round}", std::process::id());
        let database = cluster.create_database(&name(DATABASE)).expect("the name is new");
        write_file(&database, &name(FILE), &pool);
        write_own_pages(subject, &database, &pool);
        drop((database, cluster));
        let cluster = open(subject);
        let names = cluster.databases().expect("all names open");
        assert!(names.iter().all(|name| name.starts_with(DATABASE)));
        let database = cluster.database(&name(DATABASE)).expect("it was made before");
        read_file(&database, &name(FILE), &pool);
        // What fails must not leave anything either.
        assert!(cluster.create_database(&name(DATABASE)).is_err());
        assert!(database.create_page_file(&name(FILE), PageFileOptions::new()).is_err());
        let second = cluster.create_database(&name(DATABASE).replace('/', " ")).expect("the name is new");
        write_file(&second, &name(FILE), &Inline);
        cluster.check_master_key().expect("the master key is there");
        if !forever && round == 1 {
            break;
        }
    }
}

fn open(subject: &Subject) -> Cluster {
    match subject.cluster() {
        // Killed between making the folder and its keystore.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let wrappers = Wrappers::one(subject.wrapper());
            Cluster::create(&subject.cluster_folder(), subject.options(), wrappers).expect("there is no cluster yet")
        }
        outcome => outcome.expect("the cluster opens"),
    }
}

fn write_file(database: &Database, name: &str, pool: &dyn Pool) {
    let file = database.create_page_file(name, PageFileOptions::new().page_size(PAGE as u32)).expect("the name is new");
    let payloads: Vec<u8> = CANARY.iter().copied().cycle().take(40 * file.payload_len()).collect();
    for _ in 0..2 {
        let mut appender = file.append().expect("nobody else appends");
        appender.write(pool, &payloads).expect("the disk has room");
        appender.finish().expect("the disk has room");
    }
    // An appender that is dropped has written pages that nobody will read.
    file.append().expect("nobody else appends").write(pool, &payloads).expect("the disk has room");
}

fn read_file(database: &Database, name: &str, pool: &dyn Pool) {
    let file = database.page_file(name).expect("it was made before");
    let mut pages = vec![0; 80 * file.payload_len()];
    let len = file.payload_len();
    let mut jobs: Vec<_> =
        (0..).zip(pages.chunks_mut(len)).map(|(page, buf)| pageseal::ReadJob::new(page, buf)).collect();
    assert_eq!(file.read_many(pool, &mut jobs), 0);
    assert!(pages.starts_with(CANARY));
}

/// What an engine with files of its own does: it seals in memory and writes what it was given.
fn write_own_pages(subject: &Subject, database: &Database, pool: &dyn Pool) {
    let cipher = database.cipher().expect("the keystore takes a note");
    let page: Vec<u8> = CANARY.iter().copied().cycle().take(PAGE).collect();
    let mut pages = vec![page; 40];
    let context = |number| PageContext::page(FileId::new(1), number);
    let mut jobs: Vec<_> = (0..).zip(&mut pages).map(|(at, page)| PageJob::in_place(context(at), page)).collect();
    assert_eq!(cipher.seal_batch(pool, &mut jobs), 0);
    send_trailer(&cipher, &pages[0]);
    let path = subject.cluster_folder().with_file_name(format!("engine-{}", std::process::id()));
    fs::write(&path, pages.concat()).expect("the disk has room");
    let mut sealed = fs::read(&path).expect("it was written before");
    let first = &mut sealed[..PAGE];
    cipher.open_in_place(&context(0), first).expect("it was sealed before");
    assert_eq!(first[..PAGE - OVERHEAD][..CANARY.len()], CANARY[..]);
}
