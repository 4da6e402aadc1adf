//! Key bytes are nowhere but in locked memory while a cluster is open, and nowhere at all afterwards.
//!
//! A *victim* process uses pageseal with every suite and implementation; the *hunter*, its parent, learns the key payloads
//! from the victim's key wrapper, derives everything that stands for a key ([`patterns`]), and searches the victim: its whole
//! memory, a core dump with the registers, the stacks of its signal handlers, a forked child.

#[path = "key_memory/channel.rs"]
mod channel;
#[path = "key_memory/hunt.rs"]
mod hunt;
#[path = "key_memory/patterns.rs"]
mod patterns;
#[path = "key_memory/subject.rs"]
mod subject;
#[path = "key_memory/victim.rs"]
mod victim;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use pageseal::testing::hkdf_expand;
use pageseal::{AesBackend, DatabaseId, Suite};
use pageseal_proofs::{score, skipped};

use channel::{Message, Victim};
use hunt::{Findings, Hit, describe};
use patterns::Patterns;
use subject::{backend_of, kinds, suite_of};

/// Not a test: what the other tests start this binary for.
#[test]
#[ignore = "the other tests start it, as a process of its own"]
fn victim_process() {
    if let Some((role, folder, channel)) = channel::victim() {
        victim::run(&role, &folder, channel);
    }
}

#[test]
fn the_patterns_are_those_of_the_published_examples() {
    // FIPS 197, appendix C.3, and SP 800-38D, test case 14 (key 0).
    let key = std::array::from_fn(|at| at as u8);
    let block = std::array::from_fn(|at| at as u8 * 0x11);
    let sealed = u128::from_be_bytes(patterns::aes::encrypt(&patterns::aes::round_keys(&key), block));
    assert_eq!(sealed, 0x8ea2_b7ca_5167_45bf_eafc_4990_4b49_6089);
    let powers = patterns::aes::powers_of_hash_key(&patterns::aes::round_keys(&[0; 32]), 2);
    assert_eq!(u128::from_be_bytes(powers[0]), 0xdc95_c078_a240_8989_ad48_a214_9284_2087);
    // What ring keeps for a key consists of these patterns, but for sums that speed up its multiplication.
    let digest = ring::digest::digest(&ring::digest::SHA256, b"any key");
    let key: [u8; 32] = digest.as_ref().try_into().unwrap();
    let mut known = Patterns::default();
    known.add_cipher_key("key", &key, Suite::Aes256Gcm, AesBackend::RustCrypto);
    let image = patterns::image(&key, |key| {
        ring::aead::LessSafeKey::new(ring::aead::UnboundKey::new(&ring::aead::AES_256_GCM, key).unwrap())
    });
    let mut of_both = 0;
    image.iter().for_each(|word| {
        known.search(word, |_, _| of_both += 1);
    });
    assert!(image.len() >= 34, "only {} words of ring's key depend on the key", image.len());
    assert!(of_both >= 34, "only {of_both} of {} words of ring's key are known", image.len());
}

/// What the victim has told so far.
#[derive(Default)]
struct Told {
    payloads: Vec<[u8; 128]>,
    /// Database, and salt, generation and suite, of each session that was seen.
    sessions: BTreeSet<([u8; 16], [u8; 20])>,
    /// The nonces of pages of each session.
    nonces: BTreeMap<[u8; 20], Vec<[u8; 32]>>,
    forked: Option<u32>,
    signal_stack: Option<(u64, u64)>,
    signals: u64,
    notes: Vec<String>,
}

/// One victim and what is to be found in it.
struct Hunt {
    kind: &'static str,
    victim: Victim,
    told: Told,
    folder: PathBuf,
    places: u64,
    patterns: usize,
    found: usize,
    failures: Vec<String>,
}

/// What all hunts together did.
#[derive(Default)]
struct Total {
    places: u64,
    patterns: usize,
    found: usize,
    failures: Vec<String>,
}

/// Everything that stands for a key of a victim.
#[derive(Default)]
struct Secrets {
    patterns: Patterns,
    raw: Vec<Raw>,
    /// The subkey of each session.
    subkeys: Vec<Vec<u32>>,
}

/// A key, and how many copies of it there may be while the cluster is open.
struct Raw {
    name: String,
    patterns: Vec<u32>,
    copies: std::ops::RangeInclusive<usize>,
}

impl Hunt {
    fn start(role: &str, kind: &'static str) -> Self {
        let folder = std::env::temp_dir().join(format!("pageseal-key-memory-{}-{role}-{kind}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).expect("the temporary folder can be used");
        // Some victims give up being root.
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o777)).expect("the folder is ours");
        let victim = Victim::start("victim_process", &format!("{role} {kind}"), &folder);
        Self { kind, victim, told: Told::default(), folder, places: 0, patterns: 0, found: 0, failures: Vec::new() }
    }

    /// Reads what the victim tells until it waits at checkpoint `name`.
    fn wait_for(&mut self, name: &str) {
        loop {
            if let Message::Checkpoint(reached) = self.next() {
                assert_eq!(reached, name);
                break;
            }
        }
        self.wait_until_idle();
    }

    fn wait_for_note(&mut self, text: &str) {
        while !matches!(self.next(), Message::Note(note) if note == text) {}
        std::thread::sleep(Duration::from_millis(100));
    }

    /// The thread that the victim's test runs on.
    fn sealing_thread(&self) -> u32 {
        hunt::busiest_thread(self.victim.id())
    }

    fn next(&mut self) -> Message {
        let message = self.victim.next();
        match &message {
            Message::Payload(payload) => self.told.payloads.push(*payload),
            Message::Trailer { database, trailer } => {
                let session = trailer[28..].try_into().expect("a trailer ends with 20 such bytes");
                self.told.sessions.insert((*database, session));
                let mut nonce = [0; 32];
                nonce[..28].copy_from_slice(&trailer[16..44]);
                self.told.nonces.entry(session).or_default().push(nonce);
            }
            Message::Forked(child) => self.told.forked = Some(*child),
            Message::SignalStack { start, len } => self.told.signal_stack = Some((*start, *len)),
            Message::Signal => self.told.signals += 1,
            Message::Note(note) => self.told.notes.push(note.clone()),
            Message::Checkpoint(_) => {}
        }
        message
    }

    /// Threads of a pool go on for a little while after their work is done.
    fn wait_until_idle(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !hunt::idle(self.victim.id()) {
            assert!(Instant::now() < deadline, "the victim is still busy");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn secrets(&mut self) -> Secrets {
        let secrets = secrets_of(&self.told, self.kind, &self.folder);
        self.patterns = self.patterns.max(secrets.patterns.len());
        secrets
    }

    /// Searches the memory of the victim, or of a child of it, for what must not be there.
    fn memory(&mut self, when: &str, process: u32, secrets: &Secrets, bad: impl Fn(&Hit) -> bool) -> Findings {
        let findings = hunt::search_memory(process, &secrets.patterns);
        self.judge(when, &findings, secrets, bad);
        findings
    }

    /// The same in a core dump, which must not have any key; `None` where none can be had.
    fn core(&mut self, when: &str, process: u32, secrets: &Secrets) -> Option<Findings> {
        let findings = hunt::search_core(process, &self.folder, &secrets.patterns)?;
        self.judge(&format!("{when}, core dump"), &findings, secrets, |_| true);
        Some(findings)
    }

    fn judge(&mut self, when: &str, findings: &Findings, secrets: &Secrets, bad: impl Fn(&Hit) -> bool) {
        self.places += findings.places;
        let count = findings.hits.iter().filter(|hit| bad(hit)).count();
        self.found += count;
        if count > 0 {
            let text = describe(findings.hits.iter().filter(|hit| bad(hit)), &secrets.patterns);
            self.failures.push(format!("{} {when}: {count} hits\n{text}", self.kind));
        }
    }

    /// Of each secret there is one copy, or none where it need not be kept.
    fn count_copies(&mut self, when: &str, findings: &Findings, secrets: &Secrets) {
        for raw in &secrets.raw {
            let copies = findings.copies(&raw.patterns);
            if !raw.copies.contains(&copies) {
                self.found += 1;
                self.failures
                    .push(format!("{} {when}: {copies} copies of {}, not {:?}", self.kind, raw.name, raw.copies));
            }
        }
        // All sessions are in use or in the cache, and those that are both share one.
        for (session, patterns) in secrets.subkeys.iter().enumerate() {
            let copies = findings.copies(patterns);
            if copies != 1 {
                self.found += 1;
                self.failures.push(format!("{} {when}: {copies} copies of subkey {session}, not 1", self.kind));
            }
        }
    }

    /// Adds what this hunt did to the figures.
    fn add_to(&mut self, total: &mut Total) {
        total.places += self.places;
        total.patterns += self.patterns;
        total.found += self.found;
        total.failures.append(&mut self.failures);
    }

    fn end_forked_child(&mut self) {
        if let Some(child) = self.told.forked.take() {
            // SAFETY: no memory is involved; the child only waits.
            unsafe { libc::kill(child as i32, libc::SIGKILL) };
        }
    }

    /// Waits for the end of the victim, which must be a good one.
    fn finish(mut self) {
        self.victim.finish();
    }

    /// Sends a signal to each thread, and waits until each was handled.
    fn signal_every_thread(&mut self) {
        for thread in hunt::threads(self.victim.id()) {
            let before = self.told.signals;
            signal(self.victim.id(), thread);
            while self.told.signals == before {
                self.next();
            }
        }
        self.wait_until_idle();
    }
}

impl Drop for Hunt {
    fn drop(&mut self) {
        self.end_forked_child();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

fn signal(process: u32, thread: u32) {
    // SAFETY: no memory is involved.
    let sent = unsafe { libc::syscall(libc::SYS_tgkill, process as i32, thread as i32, libc::SIGUSR1) };
    assert_eq!(sent, 0, "the thread lives");
}

#[test]
fn no_key_bytes_are_left_anywhere() {
    let mut total = Total::default();
    let mut dumped = true;
    for kind in kinds() {
        let mut hunt = Hunt::start("life", kind);
        let process = hunt.victim.id();
        hunt.wait_for("alive");
        let secrets = hunt.secrets();
        let alive = hunt.memory("alive", process, &secrets, |hit| !hit.guarded);
        hunt.count_copies("alive", &alive, &secrets);
        hunt.signal_every_thread();
        hunt.memory("alive, after a signal to each idle thread", process, &secrets, |hit| !hit.guarded);
        dumped &= hunt.core("alive", process, &secrets).is_some();
        hunt.victim.go_on();
        hunt.wait_for("forked");
        let child = hunt.told.forked.expect("the victim forked");
        hunt.memory("forked child", child, &secrets, |_| true);
        hunt.core("forked child", child, &secrets);
        hunt.end_forked_child();
        hunt.victim.go_on();
        hunt.wait_for("disabled");
        hunt.memory("disabled", process, &secrets, |_| true);
        hunt.signal_every_thread();
        hunt.memory("disabled, after a signal to each idle thread", process, &secrets, |_| true);
        hunt.core("disabled", process, &secrets);
        hunt.victim.go_on();
        hunt.wait_for("brought back");
        let secrets = hunt.secrets();
        hunt.memory("brought back", process, &secrets, |hit| !hit.guarded);
        hunt.victim.go_on();
        hunt.wait_for("dropped");
        hunt.memory("dropped", process, &secrets, |_| true);
        hunt.signal_every_thread();
        hunt.memory("dropped, after a signal to each idle thread", process, &secrets, |_| true);
        hunt.core("dropped", process, &secrets);
        hunt.victim.go_on();
        hunt.wait_for("panicked");
        let secrets = hunt.secrets();
        hunt.memory("panicked", process, &secrets, |_| true);
        hunt.core("panicked", process, &secrets);
        hunt.victim.go_on();
        hunt.add_to(&mut total);
        hunt.finish();
    }
    let control = a_leak_is_found();
    let Total { places, patterns, found, failures } = total;
    let figures = format!("places={places} patterns={patterns} found={found} control={}", u8::from(control));
    score(&format!("key-bytes-after-drop {figures}"));
    if !dumped {
        skipped("key bytes in core dumps", "gcore is not installed (package gdb)");
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(control, "key bytes that were leaked were not found");
}

/// The control: a key in the heap, as ring leaves it, and one in a register, as any cipher does.
fn a_leak_is_found() -> bool {
    let mut hunt = Hunt::start("leak", "aes-ring");
    let process = hunt.victim.id();
    hunt.wait_for("alive");
    let secrets = hunt.secrets();
    hunt.victim.go_on();
    let data_key = hunt.told.payloads.iter().find(|payload| payload[5] == 1).expect("a database was made");
    let database = data_key[32..48].try_into().expect("16 bytes");
    let sessions = hunt.told.sessions.range((database, [0; 20])..);
    let (_, session) = sessions.into_iter().next().expect("a page was sealed");
    let subkey = derive(data_key[64..96].try_into().unwrap(), b"pgseal1.page", &data_key[48..64], session);
    hunt.victim.send(&subkey);
    hunt.wait_for("leaked to the heap");
    let in_heap = hunt.memory("leaked", process, &secrets, |_| false);
    // The freed block's first words are the allocator's; all round keys but the first remain.
    let mut control = in_heap.hits.iter().filter(|hit| hit.place.contains("heap")).count() >= 28
        || in_heap.hits.iter().filter(|hit| hit.place.starts_with("anonymous")).count() >= 28;
    let core = hunt::search_core(process, &hunt.folder, &secrets.patterns);
    control &= core.is_none_or(|core| core.hits.iter().filter(|hit| !hit.place.contains("registers")).count() >= 28);
    hunt.victim.go_on();
    hunt.wait_for_note("waiting with a key in a register");
    let core = hunt::search_core(process, &hunt.folder, &secrets.patterns);
    control &= core.is_none_or(|core| core.hits.iter().any(|hit| hit.place.contains("registers")));
    let before = hunt::search_memory(process, &secrets.patterns).hits.len();
    hunt.signal_every_thread();
    control &= hunt::search_memory(process, &secrets.patterns).hits.len() > before;
    hunt.victim.go_on();
    hunt.wait_for("leaked to a register");
    hunt.victim.go_on();
    hunt.finish();
    control
}

#[test]
fn a_signal_between_calls_takes_no_key_along() {
    const SIGNALS: usize = 40;
    let (mut idle, mut idle_found, mut busy, mut busy_with_key) = (0, 0, 0, 0);
    let mut failures = Vec::new();
    for kind in kinds() {
        let mut hunt = Hunt::start("signals", kind);
        let process = hunt.victim.id();
        hunt.wait_for("idle");
        let secrets = hunt.secrets();
        let (start, len) = hunt.told.signal_stack.expect("the victim told where its signal stack is");
        for _ in 0..SIGNALS {
            hunt.signal_every_thread();
            let found = hunt::search_part(process, start, len, &secrets.patterns).hits;
            idle += 1;
            idle_found += found.len();
            if !found.is_empty() {
                failures.push(format!("{kind}, idle:\n{}", describe(found.iter(), &secrets.patterns)));
            }
        }
        hunt.victim.go_on();
        hunt.wait_for_note("sealing");
        // While the cipher works, its round keys are in registers, and the kernel puts those in the frame of the handler.
        for _ in 0..SIGNALS {
            let before = hunt.told.signals;
            signal(process, hunt.sealing_thread());
            while hunt.told.signals == before {
                hunt.next();
            }
            busy += 1;
            busy_with_key += usize::from(!hunt::search_part(process, start, len, &secrets.patterns).hits.is_empty());
        }
        hunt.victim.go_on();
        hunt.wait_for("sealed");
        // The victim now wipes the signal stack, which is its own, and drops everything.
        hunt.victim.go_on();
        hunt.wait_for("dropped");
        hunt.memory("dropped after signals in the middle of the cipher", process, &secrets, |_| true);
        hunt.victim.go_on();
        failures.append(&mut hunt.failures);
        idle_found += hunt.found;
        hunt.finish();
    }
    let control = busy_with_key > 0;
    score(&format!(
        "key-bytes-in-signal-frames between_calls={idle} found={idle_found} within_calls={busy} with_key={busy_with_key} control={}",
        u8::from(control)
    ));
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    assert!(control, "no frame of a signal in the middle of a cipher held a key, so the search proves nothing");
}

#[test]
fn with_little_locked_memory_the_cache_shrinks_and_no_key_is_kept_elsewhere() {
    let mut hunt = Hunt::start("short-of-memory", "aes-ring");
    let process = hunt.victim.id();
    hunt.wait_for("read");
    let secrets = hunt.secrets();
    let sessions = hunt.told.sessions.len();
    let locked = hunt::locked(process);
    assert!(locked > 64 * 1024 && locked <= 256 * 1024, "{locked} bytes are locked");
    let findings = hunt.memory("read 2,000 sessions", process, &secrets, |hit| !hit.guarded);
    let cached = secrets.subkeys.iter().filter(|patterns| findings.copies(patterns) == 1).count();
    assert!(cached > 50 && cached < 400, "{cached} subkeys are in 256 KiB");
    hunt.victim.go_on();
    hunt.wait_for("used");
    let used = hunt.told.notes.pop();
    hunt.victim.go_on();
    hunt.wait_for("dropped");
    hunt.memory("dropped", process, &secrets, |_| true);
    hunt.victim.go_on();
    assert_eq!(sessions, 2_000);
    assert!(hunt.failures.is_empty(), "{}", hunt.failures.join("\n"));
    assert_eq!(used.as_deref(), Some("Ok(())"), "the cache leaves no room for anything else");
    hunt.finish();
}

#[test]
fn without_locked_memory_the_error_says_so_and_no_key_is_kept_elsewhere() {
    let mut hunt = Hunt::start("exhausted-memory", "aes-ring");
    let process = hunt.victim.id();
    hunt.wait_for("exhausted");
    let refused = hunt.told.notes.pop().unwrap_or_default();
    let secrets = hunt.secrets();
    hunt.memory("exhausted", process, &secrets, |hit| !hit.guarded);
    assert!(hunt::locked(process) <= 128 * 1024);
    hunt.victim.go_on();
    hunt.wait_for("dropped");
    hunt.memory("dropped", process, &secrets, |_| true);
    hunt.victim.go_on();
    assert!(hunt.failures.is_empty(), "{}", hunt.failures.join("\n"));
    assert!(refused.starts_with("Err(Error(Resources") && refused.contains("RLIMIT_MEMLOCK"), "{refused}");
    hunt.finish();

    let mut hunt = Hunt::start("without-memory", "aes-ring");
    hunt.wait_for("refused");
    assert!(hunt.told.notes.iter().any(|note| note.contains("RLIMIT_MEMLOCK")), "{:?}", hunt.told.notes);
    assert_eq!(hunt::locked(hunt.victim.id()), 0);
    hunt.victim.go_on();
    hunt.finish();
}

/// Everything that stands for a key of the victim.
fn secrets_of(told: &Told, kind: &str, folder: &Path) -> Secrets {
    let (suite, backend) = (suite_of(kind), backend_of(kind));
    let mut secrets = Secrets::default();
    let mut keys = Keys::default();
    let master = fs::read(subject::master_key(folder)).expect("the victim made a master key");
    keys.masters.insert(master.try_into().expect("a master key has 32 bytes"));
    for payload in &told.payloads {
        let (key, second): ([u8; 32], [u8; 32]) =
            (payload[64..96].try_into().unwrap(), payload[96..].try_into().unwrap());
        match payload[5] {
            1 => keys
                .data
                .insert(
                    key,
                    Ids { database: payload[32..48].try_into().unwrap(), seal: payload[48..64].try_into().unwrap() },
                )
                .is_some(),
            2 => {
                keys.cluster.insert(key, payload[16..32].try_into().unwrap()).is_some() | !keys.identity.insert(second)
            }
            3 => !keys.probes.insert(key),
            other => panic!("a payload has purpose {other}"),
        };
    }
    // Opened once, kept once: the data keys, and the cluster key, which seals names. The others only derive.
    for (at, key) in keys.data.keys().enumerate() {
        secrets.add_parent(&format!("data key {at}"), key, 1..=1);
    }
    for key in keys.cluster.keys() {
        secrets.add_parent("cluster key", key, 1..=1);
    }
    for (key, cluster) in keys.identity.iter().zip(keys.cluster.values()) {
        secrets.add_parent("identity key", key, 0..=1);
        let public = [&cluster[..], &[0; 20]].concat();
        let (seal, rest) = public.split_at(16);
        let derived = |label| derive(key, label, seal, rest.try_into().unwrap());
        secrets.add_parent("look-up key", &derived(b"pgseal1.name"), 1..=1);
        // Itself it is not kept, but what HMAC makes of it.
        secrets.add_parent("MAC key", &derived(b"pgseal1.kmac"), 0..=0);
        let patterns = secrets.patterns.add_mac_key("MAC key", &derived(b"pgseal1.kmac"));
        secrets.raw.push(Raw { name: "the MAC key, set up".into(), patterns, copies: 1..=1 });
    }
    for key in &keys.masters {
        secrets.add_parent("master key", key, 0..=0);
    }
    for key in &keys.probes {
        let patterns = secrets.patterns.add_bytes("probe", key);
        secrets.raw.push(Raw { name: "the probe".into(), patterns, copies: 0..=0 });
    }
    for (number, (database, session)) in told.sessions.iter().enumerate() {
        let (key, seal) = keys
            .data
            .iter()
            .find(|(_, ids)| ids.database == *database)
            .map(|(key, ids)| (key, ids.seal))
            .expect("a page's database was told");
        let subkey = derive(key, b"pgseal1.page", &seal, session);
        let name = format!("subkey {number}");
        let raw = secrets.patterns.add_cipher_key(&name, &subkey, suite, backend);
        secrets.subkeys.push(raw);
        if suite == Suite::Aegis256X2 {
            let nonces = &told.nonces[session];
            nonces.iter().for_each(|nonce| secrets.patterns.add_aegis_nonce(&name, &subkey, nonce));
        }
    }
    for (key, ids) in &keys.data {
        for session in salts_in(&subject::cluster(folder).join(DatabaseId::from_bytes(ids.database).to_string()), suite)
        {
            for label in [b"pgseal1.page", b"pgseal1.head"] {
                let subkey = derive(key, label, &ids.seal, &session);
                secrets.patterns.add_cipher_key("subkey of a page file", &subkey, suite, backend);
            }
        }
    }
    for session in salts_in(&subject::cluster(folder), Suite::Aes256Gcm) {
        for (key, cluster) in &keys.cluster {
            let subkey = derive(key, b"pgseal1.wrap", cluster, &session);
            secrets.patterns.add_cipher_key("subkey of a name", &subkey, Suite::Aes256Gcm, AesBackend::Ring);
        }
        for key in &keys.masters {
            let mut local = session;
            local[16..19].fill(0);
            let subkey = derive(key, b"pgseal1.locl", &[0; 16], &local);
            secrets.patterns.add_cipher_key("subkey of a wrap", &subkey, Suite::Aes256Gcm, AesBackend::Ring);
        }
    }
    secrets
}

/// The keys of a victim, each once, with the ids that enter derivations.
#[derive(Default)]
struct Keys {
    data: BTreeMap<[u8; 32], Ids>,
    cluster: BTreeMap<[u8; 32], [u8; 16]>,
    identity: BTreeSet<[u8; 32]>,
    probes: BTreeSet<[u8; 32]>,
    masters: BTreeSet<[u8; 32]>,
}

struct Ids {
    database: [u8; 16],
    seal: [u8; 16],
}

impl Secrets {
    /// A key that others are derived from, or that authenticates.
    fn add_parent(&mut self, name: &str, key: &[u8; 32], copies: std::ops::RangeInclusive<usize>) {
        let patterns = self.patterns.add_hmac_key(name, key);
        self.raw.push(Raw { name: format!("the {name}"), patterns, copies });
    }
}

/// The salts in the files of a folder, with the generation and suite that follow each: those of file headers, of sealed
/// names and of wrapped keys. Some of what is taken for one is none, which does no harm.
fn salts_in(folder: &Path, suite: Suite) -> BTreeSet<[u8; 20]> {
    let mut sessions = BTreeSet::new();
    // A database without a page file has no folder.
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("the victim's folder can be read").path();
        if path.is_dir() {
            continue;
        }
        let bytes = fs::read(path).expect("the victim's files can be read");
        let named = bytes.windows(20).filter(|window| window[16..] == [1, 0, 0, suite.to_byte()]);
        sessions.extend(named.map(|window| <[u8; 20]>::try_from(window).expect("windows of 20")));
    }
    sessions.retain(|session| session[..16].iter().collect::<BTreeSet<_>>().len() >= 10);
    sessions
}

/// HKDF-Expand(parent, label | seal id | salt | generation | suite).
fn derive(parent: &[u8; 32], label: &[u8; 12], seal: &[u8], session: &[u8; 20]) -> [u8; 32] {
    let info = [&label[..], seal, session].concat();
    assert_eq!(info.len(), 48);
    let mut out = [0; 32];
    assert!(hkdf_expand(parent, &info, &mut out));
    out
}
