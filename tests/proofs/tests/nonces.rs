//! No key and nonce ever meet two different inputs: in one process, over the end of a session, in copied files and in cloned
//! machines.

mod common;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex};

use common::{
    CIPHERS, Dice, GlassWrapper, Method, TempDir, copy_directory, is_zero, open_stray, salt_and_nonce, stray_key,
};
use pageseal::testing::simulation::{Core, Drawn, Taken};
use pageseal::testing::stray::StrayDatabase;
use pageseal::testing::{set_session_counter, stray_cipher};
use pageseal::{
    AesBackend, Cluster, ClusterOptions, Database, Entropy, FileId, Inline, NoRandomness, OVERHEAD, PageCipher,
    PageContext, PageError, PageFileOptions, PageJob, Suite, Wrappers,
};
use pageseal_proofs::score;

const MAX_SEALS: u32 = 1 << 28;

fn at(page: u64) -> PageContext {
    PageContext::page(FileId::new(1), page)
}

/// Bits that no machine and no clone of it draws again, from seeded dice: what the processor's source is for the real thing.
struct FreshBits(Mutex<Dice>);

impl Entropy for FreshBits {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        self.0.lock().unwrap().fill(out);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok(self.0.lock().unwrap().next().to_le_bytes())
    }
}

/// Bits that were drawn before, for the broken variant.
struct Stale([u8; 8]);

impl Entropy for Stale {
    fn fill(&self, _: &mut [u8]) -> Result<(), NoRandomness> {
        Err(NoRandomness)
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok(self.0)
    }
}

/// The order of the two halves of a call.
#[derive(Clone, Copy, PartialEq)]
enum Order {
    /// The crate's.
    TakeThenDraw,
    /// The broken variant's.
    DrawThenTake,
}

/// What a call seals: the payload and associated data of page `i` are input `first + i`, which no other call has.
#[derive(Clone, Copy)]
struct Input {
    first: u64,
    pages: u32,
}

/// Where a thread stands in its call. A clone of the machine copies it.
enum Step {
    Idle,
    /// The call has begun: its input is decided.
    Begun(Input),
    /// The broken variant only.
    DrawnTooEarly(Input, [u8; 8]),
    Taken(Input, u64, Taken),
    Drawn(Input, u64, Drawn, u32),
}

impl Step {
    fn cloned_machine(&self) -> Self {
        match self {
            Self::Idle => Self::Idle,
            Self::Begun(input) => Self::Begun(*input),
            Self::DrawnTooEarly(input, bits) => Self::DrawnTooEarly(*input, *bits),
            Self::Taken(input, salt, taken) => Self::Taken(*input, *salt, taken.cloned_machine()),
            Self::Drawn(input, salt, drawn, sealed) => Self::Drawn(*input, *salt, drawn.cloned_machine(), *sealed),
        }
    }
}

/// A machine: threads in the middle of their calls, and the session that they share.
struct Machine {
    salt: u64,
    core: Core,
    threads: Vec<Step>,
}

impl Machine {
    fn cloned_machine(&self) -> Self {
        let threads = self.threads.iter().map(Step::cloned_machine).collect();
        Self { salt: self.salt, core: self.core.cloned_machine(), threads }
    }
}

/// Every use of a key and nonce, by all machines.
#[derive(Default)]
struct Uses {
    by_nonce: HashMap<(u64, [u8; 12]), u64>,
    checked: u64,
    /// The same key and nonce over another input: what must not happen.
    shared: u64,
    /// The same key and nonce over the same input: a clone that repeats what the original did, by design.
    repeated: u64,
}

impl Uses {
    fn seal(&mut self, salt: u64, nonce: [u8; 12], input: u64) {
        self.checked += 1;
        match self.by_nonce.insert((salt, nonce), input) {
            None => {}
            Some(before) if before == input => self.repeated += 1,
            Some(_) => self.shared += 1,
        }
    }
}

/// A world of machines that were one, stepped and cloned as the dice say.
struct World {
    dice: Dice,
    order: Order,
    fresh: FreshBits,
    machines: Vec<Machine>,
    next_input: u64,
    uses: Uses,
    clones: u64,
    rollovers: u64,
}

impl World {
    fn new(seed: u64, order: Order) -> Self {
        let mut dice = Dice::new(seed);
        let fresh = FreshBits(Mutex::new(Dice::new(dice.next())));
        let threads = (0..1 + dice.below(4)).map(|_| Step::Idle).collect();
        // Half of the worlds stand just before the end of a session.
        let left = 1 + dice.below(600) as u32;
        let core = if dice.below(2) == 0 { Core::new() } else { Core::at(MAX_SEALS - left, 0) };
        let machines = vec![Machine { salt: dice.next(), core, threads }];
        Self { dice, order, fresh, machines, next_input: 0, uses: Uses::default(), clones: 0, rollovers: 0 }
    }

    fn step(&mut self) {
        if self.dice.below(60) == 0 {
            self.clone_a_machine();
        }
        let machine = self.dice.below(self.machines.len());
        let machine = &mut self.machines[machine];
        let thread = self.dice.below(machine.threads.len());
        let step = std::mem::replace(&mut machine.threads[thread], Step::Idle);
        let next = match step {
            Step::Idle => {
                // Each begun call seals data that no other call seals, in this machine or another.
                let input = Input { first: self.next_input, pages: 1 + self.dice.below(6) as u32 };
                self.next_input += u64::from(input.pages);
                Step::Begun(input)
            }
            Step::Begun(input) if self.order == Order::DrawThenTake => {
                Step::DrawnTooEarly(input, self.fresh.fresh().unwrap())
            }
            Step::Begun(input) => match machine.core.take(input.pages, 4096) {
                Some(taken) => Step::Taken(input, machine.salt, taken),
                None => {
                    (machine.salt, machine.core) = (next_salt(&self.fresh), Core::new());
                    self.rollovers += 1;
                    Step::Begun(input)
                }
            },
            Step::DrawnTooEarly(input, bits) => match machine.core.take(input.pages, 4096) {
                Some(taken) => Step::Drawn(input, machine.salt, taken.draw(&Stale(bits)).unwrap(), 0),
                None => {
                    (machine.salt, machine.core) = (next_salt(&self.fresh), Core::new());
                    Step::DrawnTooEarly(input, bits)
                }
            },
            Step::Taken(input, salt, taken) => Step::Drawn(input, salt, taken.draw(&self.fresh).unwrap(), 0),
            // A call that fails or panics here leaves its range unused.
            Step::Drawn(..) if self.dice.below(200) == 0 => Step::Idle,
            Step::Drawn(input, salt, drawn, page) => {
                self.uses.seal(salt, drawn.nonce(page), input.first + u64::from(page));
                if page + 1 == input.pages { Step::Idle } else { Step::Drawn(input, salt, drawn, page + 1) }
            }
        };
        machine.threads[thread] = next;
    }

    fn clone_a_machine(&mut self) {
        let original = self.dice.below(self.machines.len());
        let clone = self.machines[original].cloned_machine();
        self.machines.push(clone);
        self.clones += 1;
        if self.machines.len() > 6 {
            let gone = self.dice.below(self.machines.len());
            self.machines.swap_remove(gone);
        }
    }
}

fn next_salt(fresh: &FreshBits) -> u64 {
    let mut salt = [0; 8];
    fresh.fill(&mut salt).unwrap();
    u64::from_le_bytes(salt)
}

#[test]
fn cloned_machines_never_seal_two_inputs_under_one_nonce() {
    let mut dice = Dice::printed("cloned machines");
    let (mut checked, mut shared, mut repeated, mut clones, mut rollovers, mut broken) = (0, 0, 0, 0, 0, 0);
    while checked < 1_200_000 {
        let seed = dice.next();
        let mut world = World::new(seed, Order::TakeThenDraw);
        (0..5_000).for_each(|_| world.step());
        if world.uses.shared > 0 {
            println!("world of seed {seed}: {} nonces are shared", world.uses.shared);
        }
        checked += world.uses.checked;
        shared += world.uses.shared;
        repeated += world.uses.repeated;
        (clones, rollovers) = (clones + world.clones, rollovers + world.rollovers);
        if seed.is_multiple_of(8) {
            let mut world = World::new(seed, Order::DrawThenTake);
            (0..5_000).for_each(|_| world.step());
            broken += world.uses.shared;
        }
    }
    let control = broken > 0;
    score(&format!(
        "nonces checked={checked} shared={shared} repeated={repeated} clones={clones} rollovers={rollovers} \
         shared_if_drawn_first={broken} control={}",
        u8::from(control)
    ));
    assert!(control, "bits drawn before the range was taken shared no nonce: the simulation sees nothing");
    assert_eq!(shared, 0);
    assert!(repeated > 0 && clones > 1_000 && rollovers > 100, "the simulation did not reach what it is for");
}

/// Bits that run out of life: after the clone both machines would draw the same, if they drew from memory.
struct Stuck;

impl Entropy for Stuck {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.fill(3);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok([0; 8])
    }
}

#[test]
fn a_page_rewritten_again_and_again_never_repeats_a_nonce_or_a_keystream() {
    for (suite, backend) in CIPHERS {
        let rewrites = if backend == AesBackend::RustCrypto { 20_000 } else { 100_000 };
        rewrite_one_zero_page(&stray_cipher(suite, backend).unwrap(), rewrites);
        // Within a session the counter alone is enough, should the random source be stuck.
        let stuck = StrayDatabase::open(&[stray_key(suite, 1)], backend, Some(Arc::new(Stuck)));
        rewrite_one_zero_page(&stuck.unwrap().cipher, 5_000);
    }
}

fn rewrite_one_zero_page(cipher: &PageCipher, rewrites: usize) {
    let mut seen = HashSet::new();
    let mut keystreams = HashSet::new();
    let mut last = vec![0; 512 + OVERHEAD];
    for rewrite in 0..rewrites {
        let method = Method::ALL[rewrite % 5];
        let page = method.seal(cipher, &at(7), &[0; 512]).unwrap();
        assert!(seen.insert(salt_and_nonce(&page)), "rewrite {rewrite} repeats a nonce");
        let xor: Vec<_> = page[..512].iter().zip(&last).map(|(new, old)| new ^ old).collect();
        // The sealed zeros are the keystream. No 16 bytes of it may return: not even one block of the counter mode.
        assert!(xor.chunks(16).all(|block| !is_zero(block)), "rewrite {rewrite} repeats its predecessor's keystream");
        assert!(keystreams.insert(<[u8; 16]>::try_from(&page[..16]).unwrap()), "rewrite {rewrite} repeats a keystream");
        last = page;
    }
}

#[test]
fn each_opening_and_each_resume_seals_under_a_salt_of_its_own() {
    let key = stray_key(Suite::Aes256Gcm, 1);
    let mut salts = HashSet::new();
    for _opening in 0..100 {
        let database = open_stray(&[key], AesBackend::Ring);
        let clone = database.cipher.clone();
        for _resume in 0..10 {
            let pages: Vec<_> =
                Method::ALL.iter().map(|method| method.seal(&database.cipher, &at(7), &[1; 64]).unwrap()).collect();
            let late = Method::Into.seal(&clone, &at(7), &[1; 64]).unwrap();
            let salt = salt_and_nonce(&late).0;
            assert!(
                pages.iter().all(|page| salt_and_nonce(page).0 == salt),
                "one session, one salt, for all clones of a handle"
            );
            assert!(salts.insert(salt), "two sessions share a salt");
            database.resumed();
        }
    }
    assert_eq!(salts.len(), 1_000);
}

/// Seals on 64 threads at once, `calls` calls each of `pages` pages; checks that all pages open and that all nonces differ,
/// and returns the number of pages by salt.
fn storm(cipher: &PageCipher, calls: usize, pages: usize, len: usize) -> HashMap<[u8; 16], usize> {
    const THREADS: usize = 64;
    let together = Barrier::new(THREADS);
    let sealed = std::thread::scope(|scope| {
        let seal = |thread: usize| {
            let together = &together;
            move || {
                together.wait();
                let mut sealed = Vec::with_capacity(calls * pages);
                for call in 0..calls {
                    let number = (thread * calls + call) as u64;
                    let mut batch = vec![vec![thread as u8; len + OVERHEAD]; pages];
                    if pages == 1 {
                        cipher.seal_in_place(&at(number), &mut batch[0]).unwrap();
                    } else {
                        let mut jobs: Vec<_> =
                            batch.iter_mut().map(|page| PageJob::in_place(at(number), page)).collect();
                        assert_eq!(cipher.seal_batch(&Inline, &mut jobs), 0);
                    }
                    sealed.extend(batch.into_iter().map(|page| (number, page)));
                }
                sealed
            }
        };
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(seal(thread))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
    });
    let nonces: HashSet<_> = sealed.iter().map(|(_, page)| salt_and_nonce(page)).collect();
    assert_eq!(nonces.len(), sealed.len(), "two pages share a salt and nonce");
    let mut by_salt = HashMap::new();
    for (number, page) in &sealed {
        assert_eq!(Method::InPlace.open(cipher, &at(*number), page).0, Ok(()));
        *by_salt.entry(salt_and_nonce(page).0).or_default() += 1;
    }
    by_salt
}

fn salt_in_use(cipher: &PageCipher) -> [u8; 16] {
    salt_and_nonce(&Method::Into.seal(cipher, &at(0), &[]).unwrap()).0
}

#[test]
fn sixty_four_threads_pass_the_end_of_a_session_and_lose_nothing() {
    for (suite, backend) in [CIPHERS[0], CIPHERS[3]] {
        // (pages a call, pages that fit before the end)
        for (pages, fit) in [(1, 5_000), (8, 5_000), (7, 714 * 7)] {
            let cipher = stray_cipher(suite, backend).unwrap();
            let old = salt_in_use(&cipher);
            set_session_counter(&cipher, MAX_SEALS - 5_000, 0).unwrap();
            let by_salt = storm(&cipher, 16_000 / (64 * pages), pages, 32);
            assert_eq!(by_salt.get(&old), Some(&fit), "{pages} pages a call: seals under the old salt");
            assert_eq!(by_salt.len(), 2, "{pages} pages a call: sessions");
            // Not the thirty-two bit counter itself, which would come round.
            assert_ne!(salt_in_use(&cipher), old);
        }
    }
}

/// A source that lets everybody else run while it draws a salt, and counts the salts.
#[derive(Default)]
struct Leisurely(AtomicU64);

impl Entropy for Leisurely {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        Dice::new(self.0.fetch_add(1, Ordering::Relaxed)).fill(out);
        (0..2_000).for_each(|_| std::thread::yield_now());
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok([1; 8])
    }
}

#[test]
fn threads_that_meet_at_the_end_of_a_session_open_one_new_one() {
    let leisurely = Arc::new(Leisurely::default());
    let key = stray_key(Suite::Aes256Gcm, 1);
    let database = StrayDatabase::open(&[key], AesBackend::Ring, Some(leisurely.clone())).unwrap();
    for end in 0..5 {
        let before = leisurely.0.load(Ordering::Relaxed);
        let by_salt = storm(&database.cipher, 2, 1, 32);
        assert_eq!(leisurely.0.load(Ordering::Relaxed) - before, 1, "salts drawn at end {end}");
        assert_eq!(by_salt.len(), 1);
        set_session_counter(&database.cipher, MAX_SEALS, 0).unwrap();
    }
}

#[test]
fn a_session_ends_at_one_tebibyte_on_64_threads_too() {
    const MAX_UNITS: u32 = 1 << 31;
    for (calls, pages, fit) in [(10, 1, 100), (4, 3, 99)] {
        let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
        let old = salt_in_use(&cipher);
        // 4,096 bytes are 8 units of 512: 100 such pages fit, and not 101. A batch may count the trailer too.
        let spare = if pages == 1 { 7 } else { 100 };
        set_session_counter(&cipher, 10, MAX_UNITS - 800 - spare).unwrap();
        let by_salt = storm(&cipher, calls, pages, 4_096);
        let fitted = by_salt.get(&old).copied().unwrap_or(0);
        assert!(fitted == fit || pages > 1 && (fit..fit + 13).contains(&fitted), "{fitted} of {fit} pages");
        assert_eq!(by_salt.len(), 2);
    }
}

#[test]
fn no_thread_seals_under_the_old_salt_after_a_resume_was_reported() {
    let database = open_stray(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring);
    let (resumes, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    // For each salt, the numbers of resumes that were complete before a call that used it began.
    let seen = Mutex::new(HashMap::<[u8; 16], (u64, u64)>::new());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    let before = resumes.load(Ordering::Acquire);
                    let salt = salt_in_use(&database.cipher);
                    let after = resumes.load(Ordering::Acquire);
                    let mut seen = seen.lock().unwrap();
                    let (first, last) = seen.entry(salt).or_insert((after, before));
                    (*first, *last) = ((*first).min(after), (*last).max(before));
                }
            });
        }
        let goal = 300;
        while resumes.load(Ordering::Relaxed) < goal {
            database.resumed();
            resumes.fetch_add(1, Ordering::Release);
            salt_in_use(&database.cipher);
        }
        stop.store(true, Ordering::Release);
    });
    // A salt whose earliest use ended when `first` resumes were reported must not be used by a call that began after more.
    for (first, last) in seen.into_inner().unwrap().into_values() {
        assert!(last <= first + 1, "a salt of resume {first} was used after resume {last} was reported");
    }
}

#[test]
fn a_failed_seal_gives_its_nonce_to_nobody() {
    struct EverySecondFails(AtomicU64);
    impl Entropy for EverySecondFails {
        fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
            out.fill(3);
            Ok(())
        }
        fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
            // The same bits always: only the counter can tell the nonces apart.
            if self.0.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) { Err(NoRandomness) } else { Ok([1; 8]) }
        }
    }
    let entropy = Arc::new(EverySecondFails(AtomicU64::new(0)));
    let key = stray_key(Suite::Aes256Gcm, 1);
    let database = StrayDatabase::open(&[key], AesBackend::Ring, Some(entropy)).unwrap();
    let mut counters = Vec::new();
    for round in 0..100 {
        match Method::ALL[round % 5].seal(&database.cipher, &at(1), &[1; 32]) {
            Ok(page) => counters.push(u32::from_le_bytes(salt_and_nonce(&page).1[..4].try_into().unwrap())),
            Err(error) => assert_eq!(error, PageError::Randomness),
        }
    }
    assert_eq!(counters, (0..50).map(|pair| 2 * pair + 1).collect::<Vec<_>>(), "a dead range was used again");
}

/// A copy of a cluster's directory, as a backup or a clone of a disk makes it, in use beside the original.
struct Copy {
    cluster: Cluster,
    database: Database,
}

const APPENDED: u64 = 500;

impl Copy {
    fn open(directory: &Path, master: &GlassWrapper) -> Self {
        let cluster = Cluster::open(directory, ClusterOptions::new(), Wrappers::one(master.clone())).unwrap();
        let database = cluster.database("orders").unwrap();
        Self { cluster, database }
    }

    /// Seals the same places with the same payloads, by every method, and returns what it used.
    fn write(&self, pages: u64) -> Vec<([u8; 16], [u8; 12])> {
        let cipher = self.database.cipher().unwrap();
        let seal = |page: u64| Method::ALL[page as usize % 5].seal(&cipher, &at(page), &[page as u8; 128]).unwrap();
        let mut used: Vec<_> = (0..pages).map(|page| salt_and_nonce(&seal(page))).collect();
        used.extend(self.append());
        used
    }

    /// Appends to the page file and returns what the new pages used, read from the file's raw bytes.
    fn append(&self) -> Vec<([u8; 16], [u8; 12])> {
        let file = self.database.page_file("table").unwrap();
        let payloads = vec![7; file.payload_len() * APPENDED as usize];
        let mut appender = file.append().unwrap();
        let first = appender.write(&Inline, &payloads).unwrap();
        appender.finish().unwrap();
        let raw = fs::read(file.path()).unwrap();
        let page = |number| {
            let at = usize::try_from(file.page_offset(number).unwrap()).unwrap();
            salt_and_nonce(&raw[at..at + file.page_size()])
        };
        (first..first + APPENDED).map(page).collect()
    }
}

#[test]
fn copies_of_a_directory_that_are_all_written_share_no_salt() {
    let (dir, master) = (TempDir::new(), GlassWrapper::default());
    let origin = dir.join("origin");
    let cluster = Cluster::create(&origin, ClusterOptions::new(), Wrappers::one(master.clone())).unwrap();
    let database = cluster.create_database("orders").unwrap();
    database.create_page_file("table", PageFileOptions::new()).unwrap();
    let running = Copy { cluster, database };
    let mut used = running.write(1_000);
    // While the original runs, in the middle of its session, and a copy of that copy.
    copy_directory(&origin, &dir.join("live"));
    let live = Copy::open(&dir.join("live"), &master);
    copy_directory(&dir.join("live"), &dir.join("second"));
    let second = Copy::open(&dir.join("second"), &master);
    for copy in [&running, &live, &second] {
        used.extend(copy.write(10_000));
    }
    // And when the original was closed and is opened again, beside an old copy of it.
    drop((running, live, second));
    copy_directory(&origin, &dir.join("cold"));
    for name in ["origin", "cold", "live"] {
        let copy = Copy::open(&dir.join(name), &master);
        used.extend(copy.write(1_000));
        copy.cluster.resumed();
        used.extend(copy.write(1_000));
    }
    let distinct: HashSet<_> = used.iter().collect();
    assert_eq!(distinct.len(), used.len(), "two pages share a salt and nonce");
    // running; live; second; then two for each of the three that were opened again.
    let salts: HashSet<_> = used.iter().map(|(salt, _)| salt).collect();
    assert_eq!(salts.len(), 3 + 6, "an opening or a resume did not begin a session, or began more than one");
}
