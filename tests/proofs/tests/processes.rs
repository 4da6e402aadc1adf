//! Several processes on one cluster: each sees what the others change, none takes a key away that another may seal under,
//! and one that is killed or stopped in the middle of anything blocks nobody for ever and loses nothing.

#[path = "processes/child.rs"]
mod child;
mod common;
#[path = "processes/model.rs"]
mod model;
#[path = "processes/schedule.rs"]
mod schedule;
#[path = "processes/worker.rs"]
mod worker;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use child::Process;
use common::{Dice, TempDir};
use pageseal::{
    Cluster, ClusterOptions, Database, ErrorKind, FileId, Generation, Hierarchy, KeyPayload, KeyWrapper, KmsError,
    LocalKeyFile, MasterKeyId, PageContext, PageError, Purpose, WrapContext, WrappedKey, Wrappers,
};
use schedule::{Kind, Tally, fast_directory};
use worker::{Home, Worker};

const AT: PageContext = PageContext::page(FileId::new(1), 1);

/// The other side of every proof below.
#[test]
fn child() {
    child::serve();
}

struct Place {
    home: Home,
    _directory: TempDir,
}

impl Place {
    fn new(hierarchy: Hierarchy) -> Self {
        let directory = TempDir::new();
        Self { home: Home::make(&directory.join("home"), hierarchy), _directory: directory }
    }

    /// Here, as a process of its own to all locks; sees what others do only when it looks.
    fn here(&self) -> Worker {
        Worker::new(&self.home, false)
    }

    fn child(&self) -> Process {
        Process::start(&self.home, false)
    }
}

trait Peer {
    fn call(&mut self, line: &str) -> String;

    fn must(&mut self, line: &str) -> String {
        let answer = self.call(line);
        match answer.strip_prefix("ok") {
            Some(value) => value.trim_start().to_owned(),
            None => panic!("{line}: {answer}"),
        }
    }

    fn must_not(&mut self, line: &str, kind: &str) -> String {
        let answer = self.call(line);
        assert!(answer.starts_with(&format!("err {kind}")), "{line}: {answer}");
        answer
    }
}

impl Peer for Worker {
    fn call(&mut self, line: &str) -> String {
        self.answer(line)
    }
}

impl Peer for Process {
    fn call(&mut self, line: &str) -> String {
        self.ask(line)
    }
}

fn until(patience: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + patience;
    while !holds() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// The words of a `seal` answer: database, generation, page.
fn sealed(answer: &str) -> (String, u32, String) {
    let words: Vec<_> = answer.split(' ').collect();
    (words[0].to_owned(), words[1].parse().unwrap(), words[2].to_owned())
}

#[test]
fn another_process_sees_a_database_a_rename_and_a_drop_at_once_and_a_rotation_within_two_seconds() {
    let place = Place::new(Hierarchy::Direct);
    let mut here = place.here();
    let mut child = Process::start(&place.home, true);
    let id = here.must("create a");
    assert_eq!(child.must("open a"), id);
    assert_eq!(here.must("rotate a"), "2");
    assert!(until(Duration::from_secs(2), || child.must("generation a") == "2"), "the rotation was not seen");
    here.must("create b");
    assert_eq!(child.must("list"), "a,b");
    here.must("rename b c");
    assert_eq!(child.must("list"), "a,c");
    child.must_not("open b", "NotFound");
    here.must("drop c");
    assert_eq!(child.must("list"), "a");
    child.must_not("open c", "NotFound");
    // Without the watch's help: who opens it sees the newest.
    assert_eq!(here.must("rotate a"), "3");
    assert_eq!(child.must("look a"), format!("{id} 3"));
}

#[test]
fn a_page_opens_in_every_process_also_under_generations_that_it_has_not_seen() {
    for hierarchy in [Hierarchy::Direct, Hierarchy::ClusterKey] {
        let place = Place::new(hierarchy);
        let (mut here, mut child) = (place.here(), place.child());
        here.must("create a");
        child.must("open a");
        // One after the other, faster than any watch: a page is not refused because another one was new before.
        for number in 1..=4 {
            let (_, generation, page) = sealed(&here.must(&format!("seal a {number}")));
            assert_eq!(generation, number);
            assert_eq!(child.call(&format!("unseal-held a {number} {page}")), "ok");
            here.must("rotate a");
        }
        let (_, generation, page) = sealed(&child.must("seal a 9"));
        assert_eq!(generation, 5);
        assert_eq!(here.call(&format!("unseal-held a 9 {page}")), "ok");
    }
}

#[test]
fn a_forged_generation_does_not_keep_a_new_one_from_being_found() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut other) = (place.here(), place.here());
    here.must("create a");
    other.must("open a");
    let (_, _, mut forged) = sealed(&here.must("seal a 1"));
    // The generation's lowest byte, in hex: 4 bytes before the end.
    let at = forged.len() - 8;
    forged.replace_range(at..at + 2, "63");
    other.must_not(&format!("unseal-held a 1 {forged}"), "UnknownGeneration");
    here.must("rotate a");
    let (_, _, page) = sealed(&here.must("seal a 2"));
    assert_eq!(other.call(&format!("unseal-held a 2 {page}")), "ok");
}

#[test]
fn disabling_one_process_disables_the_others_if_the_key_is_revoked_and_only_then() {
    let place = Place::new(Hierarchy::Direct);
    let mut first = Process::start(&place.home, true);
    let mut second = Process::start(&place.home, true);
    first.must("create a");
    second.must("open a");
    first.must("disable");
    assert!(!until(Duration::from_secs(3), || second.must("disabled") == "true"), "a hint was believed");
    second.must("seal a 1");
    first.must("retry");
    place.home.key("one").disable().unwrap();
    first.must("disable");
    assert!(until(Duration::from_secs(15), || second.must("disabled") == "true"), "the others never learned of it");
    second.must_not("seal-held a 1", "Disabled");
    first.must_not("retry", "Disabled");
    place.home.key("one").enable().unwrap();
    second.must("retry");
    second.must("seal-held a 1");
}

#[test]
fn a_hint_is_heeded_also_if_the_key_service_was_out_of_reach_when_it_came() {
    let place = Place::new(Hierarchy::Direct);
    let mut first = Process::start(&place.home, true);
    let mut second = Process::start(&place.home, true);
    second.must("create a");
    let (key, away) = (place.home.0.join("one"), place.home.0.join("away"));
    fs::rename(&key, &away).unwrap();
    // A link to itself can be neither read nor said to be gone.
    std::os::unix::fs::symlink("one", &key).unwrap();
    first.must("disable");
    assert!(!until(Duration::from_secs(3), || second.must("disabled") == "true"), "an outage is no verdict");
    fs::rename(&away, &key).unwrap();
    place.home.key("one").disable().unwrap();
    assert!(until(Duration::from_secs(15), || second.must("disabled") == "true"), "the hint was forgotten");
}

#[test]
fn a_generation_is_destroyed_only_when_no_other_process_may_seal_under_it() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut child) = (place.here(), place.child());
    for name in ["a", "b"] {
        here.must(&format!("create {name}"));
        child.must(&format!("open {name}"));
        assert_eq!(here.must(&format!("rotate {name}")), "2");
        let told = here.must_not(&format!("destroy {name} 1"), "InUse");
        assert!(told.contains("another process"), "{told}");
    }
    child.must("maintain");
    assert_eq!(child.must("generation a"), "2");
    here.must("destroy a 1");

    // One that did not catch up may seal under it until it is killed.
    here.must("rotate a");
    here.must_not("destroy a 2", "InUse");
    child.kill();
    here.must("destroy a 2");
    here.must("destroy b 1");
}

#[test]
fn who_learns_of_a_rotation_while_destroying_lets_go_of_the_older_generation_itself() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut other) = (place.here(), place.here());
    here.must("create a");
    other.must("open a");
    let database = here.cluster.database("a").unwrap();
    assert_eq!(other.must("rotate a"), "2");
    // By a handle that it has, without opening anything.
    database.destroy_generation(pageseal::Generation::FIRST).unwrap();
}

#[test]
fn what_a_process_seals_before_it_knows_of_a_rotation_is_not_destroyed_behind_its_back() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut late) = (place.here(), place.here());
    here.must("create a");
    late.must("open a");
    here.must("rotate a");
    // The note that ciphers were given out says from generation 2 on.
    here.must("seal a 1");
    let (_, generation, page) = sealed(&late.must("seal-held a 7"));
    late.must("maintain");
    let destroyed = here.call("destroy a 1");
    let opened = here.call(&format!("unseal-held a 7 {page}"));
    assert_eq!(opened, "ok", "sealed under generation {generation}; destroying 1: {destroyed}");
}

#[test]
fn older_generations_are_released_only_when_no_process_may_seal_under_them() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut late) = (place.here(), place.here());
    here.must("create a");
    late.must("open a");
    late.must("seal-held a 1");
    here.must("rotate a");
    let released = here.call("release a 2");
    let (_, generation, page) = sealed(&late.must("seal-held a 7"));
    late.must("maintain");
    let destroyed = here.call("destroy a 1");
    let opened = here.call(&format!("unseal-held a 7 {page}"));
    assert_eq!(opened, "ok", "sealed under {generation}; releasing: {released}; destroying: {destroyed}");
    assert!(released.starts_with("err InUse"), "{released}");
    here.must("release a 2");
    here.must("destroy a 1");
}

#[test]
fn a_page_file_is_written_under_no_older_generation_than_it_is_noted_to_need() {
    for appends in [false, true] {
        let place = Place::new(Hierarchy::Direct);
        let (mut here, mut late) = (place.here(), place.here());
        here.must("create a");
        late.must("open a");
        let database = late.cluster.database("a").unwrap();
        here.must("rotate a");
        here.must("new-file a f");
        here.must("close-file f");
        // By a handle that was opened before the rotation. Opening it writes its header.
        let file = database.page_file("f").unwrap();
        if appends {
            let mut appender = file.append().unwrap();
            appender.write(&pageseal::Inline, &vec![5; file.payload_len()]).unwrap();
            appender.finish().unwrap();
        }
        drop(file);
        late.must("maintain");
        here.must("destroy a 1");
        assert_eq!(here.must("open-file a f"), u32::from(appends).to_string());
        assert_eq!(here.must("read f 0"), appends.to_string());
    }
}

#[test]
fn a_database_is_not_dropped_while_another_process_has_it_open() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut child) = (place.here(), place.child());
    for name in ["a", "b"] {
        here.must(&format!("create {name}"));
        child.must(&format!("open {name}"));
    }
    here.must_not("drop a", "InUse");
    // Also if that process knows an older generation only.
    here.must("rotate a");
    here.must_not("drop a", "InUse");
    child.must("seal-held a 1");
    child.must("close a");
    here.must("drop a");
    here.must_not("open a", "NotFound");
    child.kill();
    here.must("drop b");
}

#[test]
fn a_page_file_has_one_process_at_a_time_and_is_free_when_that_is_killed() {
    let place = Place::new(Hierarchy::Direct);
    let (mut here, mut child) = (place.here(), place.child());
    here.must("create a");
    child.must("new-file a f");
    assert_eq!(child.must("append f"), "1");
    here.must_not("open-file a f", "InUse");
    here.must_not("new-file a f", "AlreadyExists");
    child.kill();
    assert_eq!(here.must("open-file a f"), "1");
    assert_eq!(here.must("read f 0"), "true");
    let mut next = place.child();
    next.must_not("open-file a f", "InUse");
    here.must("close-file f");
    assert_eq!(next.must("open-file a f"), "1");
}

#[test]
fn a_page_file_that_saw_changes_which_this_process_has_not_is_opened_all_the_same() {
    let place = Place::new(Hierarchy::Direct);
    let mut here = place.here();
    here.must("create a");
    here.must("new-file a f");
    here.must("close-file f");
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut other = place.here();
            for number in 0..300 {
                // What it changes after the reader's look, the file has seen.
                if other.call("open-file a f").starts_with("ok") {
                    other.must(&format!("create x{number}"));
                    other.must("append f");
                    other.must("close-file f");
                }
            }
            done.store(true, Ordering::Relaxed);
        });
        while !done.load(Ordering::Relaxed) {
            let answer = here.call("open-file a f");
            assert!(answer.starts_with("ok") || answer.starts_with("err InUse"), "{answer}");
            here.must("close-file f");
        }
    });
    here.must("create last");
}

/// Every database that the children acknowledged before they were killed, in all copies and in every process.
#[test]
fn a_process_killed_anywhere_in_its_changes_blocks_nobody_and_loses_nothing_that_it_acknowledged() {
    const KILLS: usize = 40;
    let place = Place::new(Hierarchy::Direct);
    let mut here = place.here();
    let mut dice = Dice::printed("kills");
    let mut acknowledged = BTreeSet::new();
    for round in 0..KILLS {
        let mut child = place.child();
        child.tell(&format!("create-for-ever k{round}-"));
        let first = child.next();
        std::thread::sleep(Duration::from_micros(dice.below(20_000) as u64));
        child.kill();
        let mut answers = vec![first];
        answers.extend(std::iter::from_fn(|| child.next_if_any()));
        for answer in &answers {
            let words: Vec<_> = answer.split(' ').collect();
            match words[..] {
                ["ok", _, name] => drop(acknowledged.insert(name.to_owned())),
                ["dropping", name] => drop(acknowledged.remove(name)),
                _ => panic!("{answer}"),
            }
        }
        let begun = Instant::now();
        here.must(&format!("create here{round}"));
        acknowledged.insert(format!("here{round}"));
        assert!(begun.elapsed() < Duration::from_secs(5), "a killed process blocks others");
        here.must(&format!("close here{round}"));
        let listed = here.must("list");
        let listed: BTreeSet<_> = listed.split(',').collect();
        assert!(acknowledged.iter().all(|name| listed.contains(name.as_str())), "round {round}");
    }
    for name in &acknowledged {
        here.must(&format!("look {name}"));
    }
    drop(here);
    schedule::verify(&place.home).unwrap();
    let mut again = place.child();
    for name in &acknowledged {
        again.must(&format!("look {name}"));
    }
    assert!(acknowledged.len() > KILLS, "the children never came to anything");
}

/// Whether somebody else has byte 0 of the lock file.
fn is_locked(lock: &Path) -> bool {
    let file = File::options().read(true).write(true).open(lock).unwrap();
    let mut asked = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 1,
        l_pid: 0,
    };
    // SAFETY: the descriptor is open, and the kernel writes to a live local.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut asked) }, 0);
    asked.l_type != libc::F_UNLCK as libc::c_short
}

#[test]
fn a_stopped_process_that_holds_the_lock_costs_the_others_an_error_after_their_patience() {
    let place = Place::new(Hierarchy::Direct);
    let here = place.home.open(false);
    here.create_database("a").unwrap();
    let mut child = place.child();
    child.tell("create-for-ever c");
    child.next();
    let lock = place.home.cluster().join("lock");
    let stopped = until(Duration::from_secs(20), || {
        child.signal(libc::SIGSTOP);
        std::thread::sleep(Duration::from_millis(2));
        let held = is_locked(&lock);
        if !held {
            child.signal(libc::SIGCONT);
        }
        held
    });
    assert!(stopped, "the child was never stopped in the middle of a change");
    let begun = Instant::now();
    // All at once: no thread waits for the patience of another.
    std::thread::scope(|scope| {
        for name in ["x", "y", "z"] {
            let here = &here;
            scope.spawn(move || {
                let error = here.create_database(name).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InUse, "{error}");
                assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
            });
        }
    });
    assert!(begun.elapsed() >= Duration::from_secs(25), "nobody had patience");
    child.signal(libc::SIGCONT);
    here.create_database("x").unwrap();
}

/// While one process moves the cluster to other keys, another makes databases, opens and rotates them.
fn move_and_create(hierarchy: Hierarchy, moves: &[&str], with: impl Fn(&mut Worker)) {
    let place = Place::new(hierarchy);
    LocalKeyFile::create(place.home.0.join("two")).unwrap();
    let mut child = place.child();
    child.must("create first");
    let mut here = place.here();
    with(&mut here);
    let done = AtomicBool::new(false);
    let created = std::thread::scope(|scope| {
        let creating = scope.spawn(|| {
            let mut number = 0;
            while !done.load(Ordering::Relaxed) || number < 20 {
                let name = format!("d{number}");
                child.must(&format!("create {name}"));
                let (id, _, page) = sealed(&child.must(&format!("seal {name} 1")));
                child.must(&format!("rotate {name}"));
                child.must(&format!("close {name}"));
                child.must(&format!("unseal {name} {id} 1 {page}"));
                child.must(&format!("close {name}"));
                number += 1;
            }
            number
        });
        for line in moves.iter().cycle().take(24) {
            here.must(line);
        }
        done.store(true, Ordering::Relaxed);
        creating.join().unwrap()
    });
    let mut after = place.here();
    for number in 0..created {
        assert!(after.must(&format!("look d{number}")).ends_with(" 2"));
    }
    drop((here, child));
    schedule::verify(&place.home).unwrap();
}

#[test]
fn databases_are_made_while_another_process_replaces_the_cluster_key_under_direct() {
    move_and_create(Hierarchy::Direct, &["replace"], |_| ());
}

#[test]
fn databases_are_made_while_another_process_replaces_the_cluster_key_under_cluster_key() {
    move_and_create(Hierarchy::ClusterKey, &["replace"], |_| ());
}

#[test]
fn databases_are_made_while_another_process_changes_the_hierarchy() {
    move_and_create(Hierarchy::Direct, &["hierarchy cluster", "replace", "hierarchy direct", "replace"], |_| ());
}

#[test]
fn databases_are_made_while_another_process_moves_to_other_master_keys() {
    for hierarchy in [Hierarchy::Direct, Hierarchy::ClusterKey] {
        move_and_create(hierarchy, &["rewrap one", "rewrap two"], |_| ());
    }
}

#[test]
fn databases_are_opened_while_another_process_moves_them_to_other_keys() {
    let place = Place::new(Hierarchy::ClusterKey);
    let mut here = place.here();
    let names: Vec<_> = (0..20).map(|number| format!("d{number}")).collect();
    names.iter().for_each(|name| drop(here.must(&format!("create {name}"))));
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for together in [false, true] {
            let (place, names, done) = (&place, &names, &done);
            scope.spawn(move || {
                let cluster = place.home.open(false);
                let mut worker = place.here();
                while !done.load(Ordering::Relaxed) {
                    match together {
                        false => names.iter().for_each(|name| drop(worker.must(&format!("look {name}")))),
                        true => assert_eq!(cluster.open_databases().unwrap().len(), names.len()),
                    }
                }
            });
        }
        for _ in 0..40 {
            let moved = here.call("replace");
            done.store(!moved.starts_with("ok"), Ordering::Relaxed);
            assert_eq!(moved, "ok");
        }
        for to in ["direct", "cluster"].iter().cycle().take(10) {
            here.must(&format!("hierarchy {to}"));
        }
        done.store(true, Ordering::Relaxed);
    });
}

/// What a master key is asked for.
#[derive(Clone, Copy, PartialEq)]
enum Call {
    Wrap,
    Unwrap,
}

/// A master key that does something before it answers.
struct Slow {
    key: LocalKeyFile,
    before: Arc<dyn Fn(Call, Purpose) + Send + Sync>,
}

impl KeyWrapper for Slow {
    fn id(&self) -> MasterKeyId {
        self.key.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        (self.before)(Call::Wrap, cx.purpose);
        self.key.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        (self.before)(Call::Unwrap, cx.purpose);
        self.key.unwrap_key(key, cx)
    }
}

impl Place {
    /// A cluster whose master key does `before` at each call.
    fn slow(&self, before: impl Fn(Call, Purpose) + Send + Sync + 'static) -> Cluster {
        let slow = Slow { key: self.home.key("one"), before: Arc::new(before) };
        let options = ClusterOptions::new().watched(false);
        Cluster::open(&self.home.cluster(), options, Wrappers::one(slow)).unwrap()
    }
}

#[test]
fn nobody_is_kept_waiting_while_a_process_asks_its_key_service() {
    let place = Place::new(Hierarchy::Direct);
    let other = place.home.open(false);
    let late = {
        let (other, replaced, created) = (other.clone(), AtomicBool::new(false), AtomicBool::new(false));
        place.slow(move |call, purpose| match (call, purpose) {
            // Between the look and the change: so that the new cluster key must be unwrapped in the middle of it.
            (Call::Wrap, Purpose::Data) if !replaced.swap(true, Ordering::SeqCst) => {
                other.replace_cluster_key().unwrap()
            }
            (Call::Unwrap, Purpose::Cluster)
                if replaced.load(Ordering::SeqCst) && !created.swap(true, Ordering::SeqCst) =>
            {
                let begun = Instant::now();
                other.create_database("theirs").unwrap();
                assert!(begun.elapsed() < Duration::from_secs(5), "it was kept waiting");
            }
            _ => {}
        })
    };
    late.create_database("ours").unwrap();
    assert_eq!(other.databases().unwrap(), ["ours", "theirs"]);
}

#[test]
fn nobody_comes_back_with_a_generation_that_was_destroyed_while_its_keys_were_unwrapped() {
    let place = Place::new(Hierarchy::Direct);
    let mut here = place.here();
    here.must("create a");
    let other = here.cluster.clone();
    drop(here);
    let database = other.database("a").unwrap();
    let armed = Arc::new(AtomicBool::new(false));
    let late = {
        let armed = Arc::clone(&armed);
        place.slow(move |call, purpose| {
            if (call, purpose) == (Call::Unwrap, Purpose::Data) && armed.swap(false, Ordering::SeqCst) {
                let old = database.generation();
                database.rotate().unwrap();
                // Refused or not: whoever is let in afterwards must not seal under it.
                let _ = database.destroy_generation(old);
            }
        })
    };

    armed.store(true, Ordering::SeqCst);
    let opened = late.database("a").unwrap();
    assert_eq!(opened.generation(), other.database("a").unwrap().generation(), "when it was opened");

    late.disable().unwrap();
    armed.store(true, Ordering::SeqCst);
    if late.retry().is_err() {
        late.retry().unwrap();
    }
    assert_eq!(opened.generation(), other.database("a").unwrap().generation(), "when it was brought back");
}

#[test]
fn a_key_that_is_destroyed_while_another_process_unwraps_it_does_not_stay_there() {
    type Act = fn(&Cluster) -> Database;
    let open_one: Act = |late| late.database("a").unwrap();
    let open_all: Act = |late| late.open_databases().unwrap().remove(0);
    let come_back: Act = |late| {
        let database = late.database("a").unwrap();
        late.disable().unwrap();
        late.retry().unwrap();
        database
    };
    for (which, act) in [open_one, open_all, come_back].into_iter().enumerate() {
        // The second time it was open before, and follows another rotation.
        for follows in [false, true] {
            let place = Place::new(Hierarchy::Direct);
            let other = place.home.open(false);
            let database = other.create_database("a").unwrap();
            let mut page = vec![7; 200];
            database.cipher().unwrap().seal_in_place(&AT, &mut page).unwrap();
            database.rotate().unwrap();
            let armed = Arc::new(AtomicBool::new(false));
            let late = {
                let (armed, database) = (Arc::clone(&armed), database.clone());
                place.slow(move |call, purpose| {
                    if (call, purpose) == (Call::Unwrap, Purpose::Data) && armed.swap(false, Ordering::SeqCst) {
                        database.release_external(Generation::new(2).unwrap()).unwrap();
                        database.destroy_generation(Generation::FIRST).unwrap();
                    }
                })
            };
            let before = (follows || which == 2).then(|| late.database("a").unwrap());
            if follows {
                database.rotate().unwrap();
            }
            armed.store(true, Ordering::SeqCst);
            let opened = act(&late);
            assert!(!armed.load(Ordering::SeqCst), "case {which}: no key service was asked");
            let outcome = opened.cipher().unwrap().open_in_place(&AT, &mut page);
            let gone = PageError::UnknownGeneration(Generation::FIRST);
            assert_eq!(outcome, Err(gone), "case {which}, follows: {follows}");
            drop(before);
        }
    }
}

#[test]
fn readers_that_meet_a_new_generation_at_once_ask_the_key_service_once() {
    let place = Place::new(Hierarchy::Direct);
    let other = place.home.open(false);
    let there = other.create_database("a").unwrap();
    let calls = Arc::new(AtomicU64::new(0));
    let late = {
        let calls = Arc::clone(&calls);
        place.slow(move |call, purpose| {
            if (call, purpose) == (Call::Unwrap, Purpose::Data) {
                calls.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_millis(50));
            }
        })
    };
    let here = late.database("a").unwrap().cipher().unwrap();
    there.rotate().unwrap();
    let mut page = vec![7; 200];
    there.cipher().unwrap().seal_in_place(&AT, &mut page).unwrap();
    calls.store(0, Ordering::SeqCst);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| here.open_in_place(&AT, &mut page.clone()).unwrap());
        }
    });
    assert_eq!(calls.load(Ordering::SeqCst), 1);
}

#[test]
fn threads_and_processes_that_rotate_one_database_at_once_all_succeed_and_all_pages_open() {
    const ROTATIONS: usize = 12;
    let place = Place::new(Hierarchy::ClusterKey);
    let clusters = [place.home.open(true), place.home.open(false)];
    clusters[0].create_database("a").unwrap();
    let pages: Vec<_> = std::thread::scope(|scope| {
        let rotating = clusters.iter().flat_map(|cluster| [cluster; 2]).map(|cluster| {
            scope.spawn(move || {
                let database = cluster.database("a").unwrap();
                let cipher = database.cipher().unwrap();
                let mut pages = Vec::new();
                for _ in 0..ROTATIONS {
                    let rotated = loop {
                        match database.rotate() {
                            Ok(rotated) => break rotated,
                            Err(error) => assert_eq!(error.kind(), ErrorKind::InUse, "{error}"),
                        }
                    };
                    assert!(database.generation() >= rotated, "new seals use an older generation");
                    let mut page = vec![7; 200];
                    cipher.seal_in_place(&AT, &mut page).unwrap();
                    pages.push(page);
                }
                pages
            })
        });
        let rotating: Vec<_> = rotating.collect();
        rotating.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    assert_eq!(pages.len(), 4 * ROTATIONS);
    for cluster in &clusters {
        let cipher = cluster.database("a").unwrap().cipher().unwrap();
        for page in &pages {
            cipher.open_in_place(&AT, &mut page.clone()).unwrap();
        }
    }
}

/// `PAGESEAL_SEED` repeats the schedule of a failure.
fn run_schedules(count: u64, kind: Kind, directory: &Path, tally: &mut Tally) {
    let mut seeds = Dice::printed("schedules");
    for number in 0..count {
        // The first is the printed one.
        let seed = if number == 0 { seeds.seed() } else { seeds.next() };
        schedule::run(seed, kind, directory, tally);
    }
}

#[test]
fn in_random_schedules_every_process_sees_and_opens_all_that_any_was_promised() {
    let (memory, disk) = (fast_directory(), TempDir::new());
    let mut tally = Tally::default();
    run_schedules(300, Kind::Handles, &memory, &mut tally);
    run_schedules(30, Kind::Handles, &disk.join("handles"), &mut tally);
    run_schedules(24, Kind::Children, &disk.join("children"), &mut tally);
    let mut broken = Tally::default();
    // About one in ten of them shows it.
    for _ in 0..50 {
        if broken.violations == 0 {
            run_schedules(10, Kind::WithoutLocks, &memory, &mut broken);
        }
    }
    let _ = fs::remove_dir_all(&memory);
    let control = u8::from(broken.violations > 0);
    let Tally { schedules, operations, kills, pages, violations, .. } = tally;
    pageseal_proofs::score(&format!(
        "processes schedules={schedules} operations={operations} kills={kills} pages={pages} violations={violations} \
         control={control}"
    ));
    if let Some(first) = tally.first {
        panic!("{first}");
    }
    assert_eq!(control, 1, "without locks nothing was noticed");
    assert!(kills > 20 && pages > 1_000, "the schedules did too little");
}
