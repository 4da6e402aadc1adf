//! A cluster that is moved to other master keys, another cluster key or another hierarchy, beside whatever else happens: no
//! key is left behind under a master key that is about to be retired, and none of them loses its say by the way.

mod common;
#[path = "common/house.rs"]
mod house;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};

use common::generation;
use house::{Filled, Hooked, House, Recorder, all_of, kind, opens, quick, seal};
use pageseal::{
    Cluster, DatabaseId, ErrorKind, Hierarchy, KeyPayload, KeyWrapper, KmsClass, KmsError, MasterKeyId, Progress,
    ScriptedWrapper, WrapContext, WrappedKey, Wrappers,
};

const QUIET: &dyn Fn(Progress) = &|_| ();
const HIERARCHIES: [Hierarchy; 2] = [Hierarchy::Direct, Hierarchy::ClusterKey];

fn start(hierarchy: Hierarchy, wrappers: Wrappers) -> (House, Cluster) {
    let house = House::new();
    let cluster = Cluster::create(&house.directory(), quick().hierarchy(hierarchy), wrappers).unwrap();
    (house, cluster)
}

/// Does it up to its last step, all parts of it, and no further.
fn interrupt(act: impl FnOnce(&dyn Fn(Progress)) -> Result<(), pageseal::Error>) {
    let interrupted = catch_unwind(AssertUnwindSafe(|| {
        act(&|progress| assert!(progress.done < progress.total, "interrupted on purpose"))
    }));
    assert!(interrupted.is_err());
}

#[test]
fn a_key_that_is_made_while_the_cluster_moves_to_other_master_keys_moves_too() {
    for hierarchy in HIERARCHIES {
        for rotates in [false, true] {
            let (old, new) = (Hooked::new("old"), Recorder::new("new"));
            let (house, cluster) = start(hierarchy, Wrappers::one(old.clone()));
            let database = cluster.create_database("first").unwrap();
            old.arm({
                let (cluster, new) = (cluster.clone(), new.clone());
                move || cluster.rewrap(Wrappers::one(new), QUIET).unwrap()
            });
            let database = match rotates {
                false => cluster.create_database("second").unwrap(),
                true => {
                    database.rotate().unwrap();
                    database
                }
            };
            assert_eq!(old.is_armed(), hierarchy == Hierarchy::ClusterKey);
            if old.is_armed() {
                old.arm(|| ());
                cluster.rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
            }
            let (page, name) = (seal(&database.cipher().unwrap(), 3), database.name().to_owned());
            drop((database, cluster));
            old.key.key.delete();
            let cluster = house.open(&new).unwrap();
            opens(&cluster.database(&name).unwrap().cipher().unwrap(), &page, 3).unwrap();
        }
    }
}

#[test]
fn a_process_that_was_not_told_of_other_master_keys_makes_no_key_that_they_do_not_open() {
    let (old, new) = (Recorder::new("old"), Recorder::new("new"));
    let (house, late) = start(Hierarchy::Direct, Wrappers::one(old.clone()));
    let database = late.create_database("d").unwrap();
    house.open(&old).unwrap().rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
    assert_eq!(kind(late.create_database("e")), ErrorKind::Misconfigured);
    assert_eq!(kind(database.rotate()), ErrorKind::Misconfigured);
    late.use_wrappers(Wrappers::one(new.clone())).unwrap();
    let page = seal(&late.create_database("e").unwrap().cipher().unwrap(), 1);
    database.rotate().unwrap();
    let later = seal(&database.cipher().unwrap(), 2);
    old.key.delete();
    let other = house.open(&new).unwrap();
    opens(&other.database("e").unwrap().cipher().unwrap(), &page, 1).unwrap();
    opens(&other.database("d").unwrap().cipher().unwrap(), &later, 2).unwrap();
}

#[test]
fn a_conversion_by_a_process_that_was_not_told_of_other_master_keys_is_refused() {
    let (old, new) = (Recorder::new("old"), Recorder::new("new"));
    let (house, late) = start(Hierarchy::ClusterKey, Wrappers::one(old.clone()));
    let filled = Filled::new(&late, 2);
    house.open(&old).unwrap().rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
    assert_eq!(kind(late.set_hierarchy(Hierarchy::Direct, QUIET)), ErrorKind::Misconfigured);
    old.key.delete();
    late.use_wrappers(Wrappers::one(new.clone())).unwrap();
    late.set_hierarchy(Hierarchy::Direct, QUIET).unwrap();
    filled.check(&house.open(&new).unwrap()).unwrap();
}

#[test]
fn a_process_that_was_told_both_master_keys_does_not_bring_the_old_one_back() {
    for hierarchy in HIERARCHIES {
        let (old, new) = (Recorder::new("old"), Recorder::new("new"));
        let (house, told) = start(hierarchy, Wrappers::one(old.clone()));
        let filled = Filled::new(&told, 2);
        told.use_wrappers(all_of(&[&old, &new])).unwrap();
        house.open(&old).unwrap().rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
        assert_eq!(told.maintain().unwrap().wrappings_missing, 0);
        told.create_database("later").unwrap().rotate().unwrap();
        told.database("d0").unwrap().rotate().unwrap();
        told.replace_cluster_key().unwrap();
        told.maintain().unwrap();
        assert_eq!(house.left_of(&old.blobs()), 0, "the old master key wraps again under {hierarchy:?}");
        old.key.delete();
        filled.check(&told).unwrap();
        filled.check(&house.open(&new).unwrap()).unwrap();
    }
}

/// A key service that names no versions, and whose key was made anew: what the old material wrapped, it opens only as long
/// as that is there.
#[derive(Clone)]
struct Unversioned {
    materials: [ScriptedWrapper; 2],
    now: Arc<Mutex<u8>>,
    hook: Hooked,
}

impl Unversioned {
    fn new() -> Self {
        let materials = [0, 1].map(|_| ScriptedWrapper::new("k"));
        Self { materials, now: Arc::default(), hook: Hooked::new("k") }
    }
}

impl KeyWrapper for Unversioned {
    fn id(&self) -> MasterKeyId {
        self.hook.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let now = *self.now.lock().unwrap();
        let mut wrapped = self.materials[usize::from(now)].wrap_key(key, cx)?;
        wrapped.key_version.clear();
        wrapped.blob.push(now);
        Ok(wrapped)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.hook.fire(cx);
        let mut key = key.clone();
        let material = key.blob.pop().unwrap();
        key.key_version = "0".to_owned();
        self.materials[usize::from(material)].unwrap_key(&key, cx)
    }
}

#[test]
fn a_key_that_changes_while_it_is_rewrapped_is_rewrapped_again() {
    let key = Unversioned::new();
    let (house, cluster) = start(Hierarchy::Direct, Wrappers::one(key.clone()));
    let filled = Filled::new(&cluster, 3);
    *key.now.lock().unwrap() = 1;
    // The cluster key comes first; then, in the middle of the data keys, one of them is retired.
    key.hook.arm({
        let (cluster, hook) = (cluster.clone(), key.hook.clone());
        move || {
            hook.arm_for_data(move || _ = cluster.database("d1").unwrap().rotate().unwrap());
        }
    });
    cluster.rewrap(Wrappers::one(key.clone()), QUIET).unwrap();
    assert!(!key.hook.is_armed());
    assert_eq!(cluster.database("d1").unwrap().generation(), generation(2));
    drop(cluster);
    key.materials[0].bad_ciphertext();
    let cluster = Cluster::open(&house.directory(), quick(), Wrappers::one(key.clone())).unwrap();
    filled.check(&cluster).unwrap();
}

#[test]
fn what_an_interrupted_rewrap_left_is_not_believed_if_the_master_key_was_made_anew_since() {
    let (old, [first, again]) = (Recorder::new("old"), ["new", "new"].map(Recorder::new));
    let (house, cluster) = start(Hierarchy::Direct, Wrappers::one(old.clone()));
    let filled = Filled::new(&cluster, 3);
    interrupt(|progress| cluster.rewrap(Wrappers::one(first.clone()), progress));
    // Under the same name, with versions that begin anew.
    cluster.rewrap(Wrappers::one(again.clone()), QUIET).unwrap();
    drop(cluster);
    old.key.delete();
    filled.check(&house.open(&again).unwrap()).unwrap();
}

#[test]
fn an_interrupted_rewrap_goes_on_without_wrapping_again_what_is_wrapped() {
    let (old, new) = (Recorder::new("old"), Recorder::new("new"));
    let (house, cluster) = start(Hierarchy::Direct, Wrappers::one(old.clone()));
    let filled = Filled::new(&cluster, 20);
    interrupt(|progress| cluster.rewrap(Wrappers::one(new.clone()), progress));
    let wrapped = new.key.wraps();
    cluster.rewrap(Wrappers::one(new.clone()), QUIET).unwrap();
    assert!(new.key.wraps() - wrapped <= 2, "more than the cluster's own keys was wrapped again");
    filled.check(&house.open(&new).unwrap()).unwrap();
}

#[test]
fn what_an_interrupted_conversion_left_is_not_believed_if_the_master_key_was_made_anew_since() {
    let (stays, [first, again]) = (Recorder::new("stays"), ["other", "other"].map(Recorder::new));
    let (_house, cluster) = start(Hierarchy::ClusterKey, all_of(&[&stays, &first]));
    let filled = Filled::new(&cluster, 3);
    interrupt(|progress| cluster.set_hierarchy(Hierarchy::Direct, progress));
    cluster.use_wrappers(all_of(&[&stays, &again])).unwrap();
    cluster.set_hierarchy(Hierarchy::Direct, QUIET).unwrap();
    // Every database is opened anew, by the one that was made anew alone.
    cluster.use_wrappers(all_of(&[&stays, &again])).unwrap();
    stays.key.unreachable();
    filled.check(&cluster).unwrap();
}

#[test]
fn a_master_key_that_cannot_be_reached_is_left_out_of_nothing() {
    type Move = fn(&Cluster, [&Recorder; 2]) -> Result<(), pageseal::Error>;
    let moves: [(Hierarchy, Move); 5] = [
        (Hierarchy::Direct, |cluster, _| cluster.replace_cluster_key()),
        (Hierarchy::ClusterKey, |cluster, _| cluster.replace_cluster_key()),
        (Hierarchy::ClusterKey, |cluster, _| cluster.set_hierarchy(Hierarchy::Direct, QUIET)),
        (Hierarchy::Direct, |cluster, [a, b]| cluster.rewrap(all_of(&[a, b, &Recorder::new("third")]), QUIET)),
        (Hierarchy::ClusterKey, |cluster, [a, b]| cluster.rewrap(all_of(&[a, b, &Recorder::new("third")]), QUIET)),
    ];
    for (which, (hierarchy, act)) in moves.into_iter().enumerate() {
        let [a, b] = ["a", "b"].map(Recorder::new);
        let (house, cluster) = start(hierarchy, all_of(&[&a, &b]));
        let filled = Filled::new(&cluster, 2);
        b.key.unreachable();
        assert_eq!(kind(act(&cluster, [&a, &b])), ErrorKind::Unreachable, "move {which}");
        // It still opens everything alone, and still has its say.
        b.key.restore();
        a.key.unreachable();
        filled.check(&house.open_with(all_of(&[&a, &b])).unwrap()).unwrap();
        a.key.restore();
        b.key.disable();
        assert_eq!(kind(house.open_with(all_of(&[&a, &b]))), ErrorKind::Disabled, "move {which}");
        b.key.restore();
        act(&cluster, [&a, &b]).unwrap();
        b.key.disable();
        assert_eq!(kind(house.open_with(all_of(&[&a, &b]))), ErrorKind::Disabled, "move {which}, afterwards");
    }
}

#[test]
fn a_new_master_key_that_cannot_be_reached_wraps_later() {
    for hierarchy in HIERARCHIES {
        let [a, b] = ["a", "b"].map(Recorder::new);
        let (house, cluster) = start(hierarchy, Wrappers::one(a.clone()));
        let filled = Filled::new(&cluster, 2);
        b.key.unreachable();
        cluster.rewrap(all_of(&[&a, &b]), QUIET).unwrap();
        filled.check(&house.open(&a).unwrap()).unwrap();
        b.key.restore();
        while cluster.maintain().unwrap().wrappings_missing > 0 {}
        a.key.delete();
        filled.check(&house.open(&b).unwrap()).unwrap();
    }
}

#[test]
fn more_master_keys_than_a_key_can_have_are_refused_before_anything_is_wrapped() {
    for hierarchy in HIERARCHIES {
        let five = |name| (0..5).map(|number| Recorder::new(&format!("{name}{number}"))).collect::<Vec<_>>();
        let (old, new) = (five("old"), five("new"));
        let (house, cluster) = start(hierarchy, all_of(&old.iter().collect::<Vec<_>>()));
        let filled = Filled::new(&cluster, 2);
        let before = house.keystore();
        let to = all_of(&new.iter().collect::<Vec<_>>());
        assert_eq!(kind(cluster.rewrap(to, QUIET)), ErrorKind::Misconfigured);
        assert_eq!(house.keystore(), before);
        filled.check(&cluster).unwrap();
    }
}

#[test]
fn a_disabled_cluster_comes_back_only_if_every_master_key_agrees_whatever_the_file_claims() {
    let [a, b] = ["a", "b"].map(Recorder::new);
    b.fail_after(0, KmsClass::Unreachable);
    let (house, cluster) = start(Hierarchy::ClusterKey, all_of(&[&a, &b]));
    let database = cluster.create_database("d").unwrap();
    // A header that names one of them only, and claims to be the newest of all.
    let mut claims = fs::read(&house.copies()[0]).unwrap();
    claims[32..40].copy_from_slice(&u64::MAX.to_le_bytes()[..]);
    claims[40..48].copy_from_slice(&u64::MAX.to_le_bytes()[..]);
    b.mend();
    while cluster.maintain().unwrap().wrappings_missing > 0 {}
    cluster.disable().unwrap();
    b.key.disable();
    assert_eq!(kind(cluster.retry()), ErrorKind::Disabled);
    fs::write(&house.copies()[0], claims).unwrap();
    assert_eq!(kind(cluster.retry()), ErrorKind::Disabled);
    assert!(cluster.is_disabled());
    b.key.restore();
    cluster.retry().unwrap();
    seal(&database.cipher().unwrap(), 1);
}

/// Cannot unwrap the key of one database.
#[derive(Clone)]
struct Picky(Recorder, Arc<Mutex<Option<DatabaseId>>>);

impl KeyWrapper for Picky {
    fn id(&self) -> MasterKeyId {
        self.0.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.0.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        match *self.1.lock().unwrap() {
            Some(database) if cx.database == Some(database) => Err(KmsError::new(KmsClass::BadCiphertext)),
            _ => self.0.unwrap_key(key, cx),
        }
    }
}

#[test]
fn a_key_that_cannot_be_repaired_keeps_no_other_from_it() {
    let (a, b) = (Picky(Recorder::new("a"), Arc::default()), Recorder::new("b"));
    b.key.unreachable();
    let both: [Arc<dyn KeyWrapper>; 2] = [Arc::new(a.clone()), Arc::new(b.clone())];
    let (_house, cluster) = start(Hierarchy::Direct, Wrappers::any_of(both).unwrap());
    let databases = ["d0", "d1", "d2"].map(|name| cluster.create_database(name).unwrap());
    b.key.restore();
    *a.1.lock().unwrap() = Some(databases[1].id());
    assert_eq!(kind(cluster.maintain()), ErrorKind::BadCiphertext);
    let wrapped = |by: &Recorder| databases.each_ref().map(|it| by.blobs_of(it.id(), generation(1)).len());
    assert_eq!(wrapped(&b), [1, 0, 1]);
    *a.1.lock().unwrap() = None;
    assert_eq!(cluster.maintain().unwrap().wrappings_missing, 0);
    assert_eq!(wrapped(&b), [1, 1, 1]);
}

#[test]
fn no_key_is_made_that_only_a_master_key_opens_which_the_cluster_does_not_use_yet() {
    let [used, new] = ["used", "new"].map(Recorder::new);
    let (_house, cluster) = start(Hierarchy::Direct, Wrappers::one(used.clone()));
    let database = cluster.create_database("d").unwrap();
    cluster.use_wrappers(all_of(&[&used, &new])).unwrap();
    used.key.unreachable();
    assert_eq!(kind(cluster.create_database("e")), ErrorKind::Unreachable);
    assert_eq!(kind(database.rotate()), ErrorKind::Unreachable);
    used.key.restore();
    cluster.create_database("e").unwrap();
}

#[test]
fn a_new_cluster_key_leaves_out_no_master_key_that_this_process_does_not_have() {
    for hierarchy in HIERARCHIES {
        let [a, b] = ["a", "b"].map(Recorder::new);
        let (house, cluster) = start(hierarchy, all_of(&[&a, &b]));
        let filled = Filled::new(&cluster, 2);
        cluster.use_wrappers(Wrappers::one(a.clone())).unwrap();
        assert_eq!(kind(cluster.replace_cluster_key()), ErrorKind::Misconfigured);
        filled.check(&house.open(&b).unwrap()).unwrap();
        cluster.rewrap(Wrappers::one(a.clone()), QUIET).unwrap();
        cluster.replace_cluster_key().unwrap();
        filled.check(&house.open(&a).unwrap()).unwrap();
    }
}
