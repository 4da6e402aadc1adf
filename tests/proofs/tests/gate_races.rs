//! Disabling a cluster, and bringing it back, while operations are in the middle of a call to the key service: the cluster
//! is disabled only when nobody has a key any more, and no database is left behind closed.

mod common;
#[path = "common/house.rs"]
mod house;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use house::{AT, Hooked, House, Recorder, kind, quick, seal};
use pageseal::{
    Cluster, Error, ErrorKind, Hierarchy, Inline, KeyWrapper, KmsClass, OVERHEAD, PageError, PageJob, Pool, Wrappers,
};

/// A cluster with an open database `a` and one that is not open, `b`.
struct Scene {
    house: House,
    key: Hooked,
    /// A second master key, which was not there when the keys were made.
    late: Recorder,
    cluster: Cluster,
}

impl Scene {
    fn new(hierarchy: Hierarchy) -> Self {
        let (house, key, late) = (House::new(), Hooked::new("one"), Recorder::new("two"));
        late.fail_after(0, KmsClass::Unreachable);
        let both: [Arc<dyn KeyWrapper>; 2] = [Arc::new(key.clone()), Arc::new(late.clone())];
        let wrappers = Wrappers::any_of(both).unwrap();
        let cluster = Cluster::create(&house.directory(), quick().hierarchy(hierarchy), wrappers).unwrap();
        cluster.create_database("b").unwrap();
        late.mend();
        Self { house, key, late, cluster }
    }

    fn hint(&self) -> Option<Vec<u8>> {
        std::fs::read(self.house.directory().join("hint")).ok()
    }

    /// Disables the cluster on another thread, and comes back when its gate is closed, but nobody was waited for yet.
    fn disable_beside(cluster: &Cluster, hint: impl Fn() -> Option<Vec<u8>>) -> JoinHandle<Result<(), Error>> {
        let before = hint();
        let cluster = cluster.clone();
        let disabling = std::thread::spawn(move || cluster.disable());
        let begun = Instant::now();
        while hint() == before {
            assert!(begun.elapsed() < Duration::from_secs(10), "the gate does not close");
            std::thread::sleep(Duration::from_millis(1));
        }
        disabling
    }
}

type Operation = (&'static str, Hierarchy, fn(&Scene) -> Result<(), Error>);

const OPERATIONS: [Operation; 9] = [
    ("create_database", Hierarchy::Direct, |scene| scene.cluster.create_database("new").map(drop)),
    ("database", Hierarchy::Direct, |scene| scene.cluster.database("b").map(drop)),
    ("open_databases", Hierarchy::Direct, |scene| scene.cluster.open_databases().map(drop)),
    ("rotate", Hierarchy::Direct, |scene| scene.cluster.database("a")?.rotate().map(drop)),
    ("rewrap", Hierarchy::Direct, |scene| scene.cluster.rewrap(Wrappers::one(scene.late.clone()), &|_| {})),
    ("to cluster key", Hierarchy::Direct, |scene| scene.cluster.set_hierarchy(Hierarchy::ClusterKey, &|_| {})),
    ("to direct", Hierarchy::ClusterKey, |scene| scene.cluster.set_hierarchy(Hierarchy::Direct, &|_| {})),
    ("replace_cluster_key", Hierarchy::ClusterKey, |scene| scene.cluster.replace_cluster_key()),
    ("maintain", Hierarchy::Direct, |scene| scene.cluster.maintain().map(drop)),
];

#[test]
fn a_cluster_is_disabled_only_when_no_operation_has_keys_in_its_hands() {
    for (name, hierarchy, operation) in OPERATIONS {
        let scene = Scene::new(hierarchy);
        let database = scene.cluster.create_database("a").unwrap();
        let early = Arc::new(AtomicBool::new(false));
        let disabling = Arc::new(Mutex::new(None));
        scene.key.arm({
            let (cluster, early, disabling) = (scene.cluster.clone(), Arc::clone(&early), Arc::clone(&disabling));
            let hint = scene.house.directory().join("hint");
            move || {
                let closing = Scene::disable_beside(&cluster, || std::fs::read(&hint).ok());
                std::thread::sleep(Duration::from_millis(50));
                early.store(closing.is_finished(), Ordering::SeqCst);
                *disabling.lock().unwrap() = Some(closing);
            }
        });
        let outcome = operation(&scene);
        assert!(!scene.key.is_armed(), "{name}: no key service was asked");
        assert!(!early.load(Ordering::SeqCst), "{name}: keys are in memory, and the cluster counts as disabled");
        disabling.lock().unwrap().take().unwrap().join().unwrap().unwrap();
        assert_eq!(kind(outcome), ErrorKind::Closed, "{name}");
        scene.cluster.retry().unwrap();
        seal(&database.cipher().unwrap(), 1);
        seal(&scene.cluster.database("b").unwrap().cipher().unwrap(), 1);
    }
}

#[test]
fn a_cluster_is_disabled_only_when_calls_with_a_key_that_nobody_waits_for_any_more_have_returned() {
    let mut waited = 0;
    for (name, hierarchy, operation) in OPERATIONS {
        let scene = Scene::new(hierarchy);
        scene.cluster.create_database("a").unwrap();
        let returned = Arc::new(AtomicBool::new(false));
        scene.key.arm_for_wrap({
            let returned = Arc::clone(&returned);
            move || {
                std::thread::sleep(Duration::from_millis(1_000));
                returned.store(true, Ordering::SeqCst);
            }
        });
        let _ = operation(&scene);
        if scene.key.is_armed() {
            continue; // It wraps nothing under this master key.
        }
        let slow = returned.load(Ordering::SeqCst);
        scene.cluster.disable().unwrap();
        assert!(returned.load(Ordering::SeqCst), "{name}: a call still has keys, and the cluster counts as disabled");
        assert!(!slow, "{name}: it was waited for anyway, which proves nothing");
        waited += 1;
    }
    assert!(waited >= 4, "{waited}");
}

#[test]
fn a_key_service_that_hangs_keeps_no_cluster_from_being_disabled_if_it_has_no_key() {
    let scene = Scene::new(Hierarchy::Direct);
    let (let_go, held) = std::sync::mpsc::channel::<()>();
    scene.key.arm(move || _ = held.recv());
    assert_eq!(kind(scene.cluster.database("b")), ErrorKind::Unreachable);
    let begun = Instant::now();
    scene.cluster.disable().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5));
    drop(let_go);
}

#[test]
fn whoever_disables_a_cluster_that_is_being_brought_back_is_not_overruled() {
    for hierarchy in [Hierarchy::Direct, Hierarchy::ClusterKey] {
        let scene = Scene::new(hierarchy);
        let cipher = scene.cluster.create_database("a").unwrap().cipher().unwrap();
        scene.cluster.disable().unwrap();
        let disabling = Arc::new(Mutex::new(None));
        scene.key.arm({
            let (cluster, disabling) = (scene.cluster.clone(), Arc::clone(&disabling));
            let hint = scene.house.directory().join("hint");
            move || {
                let closing = Scene::disable_beside(&cluster, || std::fs::read(&hint).ok());
                *disabling.lock().unwrap() = Some(closing);
            }
        });
        assert_eq!(kind(scene.cluster.retry()), ErrorKind::Closed);
        assert!(scene.cluster.is_disabled());
        disabling.lock().unwrap().take().unwrap().join().unwrap().unwrap();
        assert_eq!(cipher.seal_in_place(&AT, &mut [0; 100]), Err(PageError::Disabled));
        scene.cluster.retry().unwrap();
        seal(&cipher, 1);
    }
}

#[test]
fn a_database_that_was_being_opened_while_the_cluster_was_disabled_and_brought_back_is_never_dead() {
    for together in [false, true] {
        let scene = Arc::new(Scene::new(Hierarchy::Direct));
        let disabling = Arc::new(Mutex::new(None));
        scene.key.arm({
            let (inner, disabling) = (Arc::clone(&scene), Arc::clone(&disabling));
            move || {
                *disabling.lock().unwrap() = Some(Scene::disable_beside(&inner.cluster, || inner.hint()));
                inner.cluster.retry().unwrap();
            }
        });
        let opened = match together {
            false => scene.cluster.database("b"),
            true => scene.cluster.open_databases().map(|mut databases| databases.remove(0)),
        };
        assert!(!scene.key.is_armed() && !scene.cluster.is_disabled());
        // It was brought back before the last operation had ended.
        let disabled = disabling.lock().unwrap().take().unwrap().join().unwrap();
        assert_eq!(kind(disabled), ErrorKind::InUse);
        let database = opened.or_else(|_| scene.cluster.database("b")).unwrap();
        seal(&database.cipher().unwrap(), 1);
    }
}

/// A pool that does its work when it is let go.
struct Held(Mutex<std::sync::mpsc::Receiver<()>>, AtomicU64);

impl Pool for Held {
    fn threads(&self) -> usize {
        2
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        self.1.fetch_add(1, Ordering::SeqCst);
        self.0.lock().unwrap().recv().unwrap();
        Inline.run(tasks, f);
    }
}

#[test]
fn disabling_waits_for_operations_on_a_database_that_was_dropped_before() {
    let scene = Scene::new(Hierarchy::ClusterKey);
    let cipher = scene.cluster.create_database("a").unwrap().cipher().unwrap();
    let (let_go, held) = std::sync::mpsc::channel();
    let pool = Held(Mutex::new(held), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let batch = scope.spawn(|| {
            let mut pages = vec![vec![1; 16_384 + OVERHEAD]; 64];
            let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(AT, page)).collect();
            cipher.seal_batch(&pool, &mut jobs)
        });
        while pool.1.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        scene.cluster.drop_database("a").unwrap();
        let disabling = Scene::disable_beside(&scene.cluster, || scene.hint());
        std::thread::sleep(Duration::from_millis(20));
        let early = disabling.is_finished();
        let_go.send(()).unwrap();
        assert_eq!(batch.join().unwrap(), 0, "what was in flight did not end whole");
        disabling.join().unwrap().unwrap();
        assert!(!early, "the keys of a dropped database are in memory, and the cluster counts as disabled");
    });
}
