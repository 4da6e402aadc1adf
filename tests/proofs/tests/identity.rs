//! Whose cluster it is: a keystore that was put in another's place, a key that an attacker wrapped, an older state that was
//! put back, and master keys that say different things, each get the one right answer.

mod common;
#[path = "common/house.rs"]
mod house;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use common::{copy_directory, generation};
use house::{House, Recorder, append, contains, kind, opens, quick, read, seal, small_file};
use pageseal::{
    Cluster, ClusterId, Error, ErrorKind, Generation, Hierarchy, KeyPayload, KeyWrapper, KmsClass, KmsError,
    MasterKeyId, ScriptedWrapper, WrapContext, WrappedKey, Wrappers,
};
use pageseal_proofs::score;

/// What an attacker has who has only the public key of a victim's master key: they can wrap whatever they like as if it were
/// the victim's. What they wrapped they can also unwrap for themselves, because they know it.
struct Attacker {
    public: ScriptedWrapper,
    /// Whom the wrapped payloads say that they belong to, if not to the cluster that they are made for.
    pretends: Option<ClusterId>,
}

const CLUSTER_AT: std::ops::Range<usize> = 16..32;

impl Attacker {
    /// The payload with another cluster's id in it.
    fn altered(payload: &KeyPayload, cluster: ClusterId) -> KeyPayload {
        let mut bytes = payload.with_bytes(|bytes| *bytes).unwrap();
        bytes[CLUSTER_AT].copy_from_slice(&cluster.to_bytes());
        KeyPayload::from_bytes(&mut bytes).unwrap()
    }
}

impl KeyWrapper for Attacker {
    fn id(&self) -> MasterKeyId {
        self.public.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let Some(victim) = self.pretends else { return self.public.wrap_key(key, cx) };
        let mut theirs = *cx;
        theirs.cluster = victim;
        self.public.wrap_key(&Self::altered(key, victim), &theirs)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let Some(victim) = self.pretends else { return self.public.unwrap_key(key, cx) };
        let mut theirs = *cx;
        theirs.cluster = victim;
        Ok(Self::altered(&self.public.unwrap_key(key, &theirs)?, cx.cluster))
    }
}

/// A cluster under a master key that anybody can wrap for, with a page in its one database; closed.
struct Victim {
    house: House,
    public: ScriptedWrapper,
    id: ClusterId,
    page: Vec<u8>,
}

impl Victim {
    fn new() -> Self {
        let (house, public) = (House::new(), ScriptedWrapper::public("rsa"));
        let cluster = house.create(quick(), &Recorder::over(public.clone()));
        let page = seal(&cluster.create_database("d").unwrap().cipher().unwrap(), 1);
        cluster.create_database("e").unwrap();
        Self { house, public, id: cluster.id(), page }
    }

    fn open(&self) -> Result<Cluster, Error> {
        let wrappers = Wrappers::one(self.public.clone());
        Cluster::open(&self.house.directory(), quick().expected_id(self.id), wrappers)
    }

    /// What the attacker made, somewhere else, with databases of the same names.
    fn attack(&self, pretends: Option<ClusterId>) -> House {
        let house = House::new();
        let wrappers = Wrappers::one(Attacker { public: self.public.clone(), pretends });
        let cluster = Cluster::create(&house.directory(), quick(), wrappers).unwrap();
        cluster.create_database("d").unwrap();
        cluster.create_database("e").unwrap();
        house
    }
}

/// Where the n-th group of a keystore begins; 0 is the first behind the header.
fn group(keystore: &[u8], number: usize) -> usize {
    let header = u32::from_le_bytes(keystore[8..12].try_into().unwrap()) as usize;
    let magic = &keystore[header..header + 4];
    let mut starts = (header..keystore.len()).step_by(512).filter(|&at| &keystore[at..at + 4] == magic);
    starts.nth(number).expect("there are so many groups")
}

#[test]
fn who_has_only_the_public_key_cannot_replace_the_keystore() {
    let victim = Victim::new();
    let without_id = Cluster::open(&victim.house.directory(), quick(), Wrappers::one(victim.public.clone()));
    assert_eq!(kind(without_id), ErrorKind::Misconfigured);
    let good = victim.house.keystore();
    // A cluster of the attacker's own; one whose keys say that they are the victim's; and one whose header says so, too.
    for (pretends, header) in [(None, false), (Some(victim.id), false), (None, true), (Some(victim.id), true)] {
        let theirs = victim.attack(pretends).keystore().map(|mut bytes| {
            if header {
                bytes[CLUSTER_AT].copy_from_slice(&victim.id.to_bytes());
            }
            bytes
        });
        victim.house.put_keystore(&theirs);
        let calls = victim.public.calls();
        let refused = kind(victim.open());
        // With a header that names the victim the service is asked; what comes out does not make this id.
        let expected = if header && pretends.is_none() { ErrorKind::BadCiphertext } else { ErrorKind::WrongIdentity };
        assert_eq!(refused, expected, "{pretends:?} {header}");
        assert_eq!(victim.public.calls() > calls, header, "a key service was called for a stranger's keystore");
        // With one copy of the victim's own, that one counts, and the other is said to be damaged.
        victim.house.put_keystore(&[theirs[0].clone(), good[1].clone()]);
        let cluster = victim.open().unwrap();
        assert_eq!(cluster.keystore_findings().len(), 1);
        opens(&cluster.database("d").unwrap().cipher().unwrap(), &victim.page, 1).unwrap();
        drop(cluster);
        victim.house.put_keystore(&good);
    }
}

#[test]
fn who_has_only_the_public_key_cannot_add_a_generation_nor_exchange_a_wrapping() {
    let victim = Victim::new();
    let good = victim.house.keystore()[0].clone();
    let theirs = victim.attack(Some(victim.id)).keystore()[0].clone();
    let put = |bytes: &[u8]| victim.house.put_keystore(&[bytes.to_vec(), bytes.to_vec()]);
    // Groups of theirs behind the victim's last, and in the place of it: what they hold never is believed.
    let appended = [&good[..], &theirs[group(&theirs, 1)..]].concat();
    let exchanged = [&good[..group(&good, 3)], &theirs[group(&theirs, 2)..]].concat();
    for (forged, names) in [(&appended, &["d", "e"][..]), (&exchanged, &["d"][..])] {
        put(forged);
        let cluster = victim.open().unwrap();
        assert_eq!(cluster.databases().unwrap(), names);
        assert_eq!(cluster.keystore_findings().len(), 2, "nothing was said");
        let cipher = cluster.database("d").unwrap().cipher().unwrap();
        assert_eq!(cipher.generation(), Generation::FIRST);
        opens(&cipher, &victim.page, 1).unwrap();
    }
    // A wrapping that is well made, of a key that the attacker knows, in the place of the victim's own.
    put(&good);
    let key = Recorder::over(victim.public.clone());
    let cluster = Cluster::open(&victim.house.directory(), quick().expected_id(victim.id), Wrappers::one(key.clone()));
    let database = cluster.unwrap().database("d").unwrap();
    database.rotate().unwrap();
    let before = victim.house.keystore()[0].clone();
    let own = key.blobs_of(database.id(), generation(2));
    drop(database);
    let blob = forge(&victim, &KeyPayload::from_bytes(&mut [7; KeyPayload::LEN]).unwrap());
    let at = before.windows(own[0].len()).position(|window| window == own[0]).unwrap();
    let mut forged = before.clone();
    forged[at..at + blob.len()].copy_from_slice(&blob);
    put(&forged);
    let cluster = victim.open().unwrap();
    let database = cluster.database("d").unwrap();
    assert_eq!(database.generation(), Generation::FIRST, "the attacker's key seals");
    assert!(!contains(&victim.house.keystore()[0], &blob));
    opens(&database.cipher().unwrap(), &victim.page, 1).unwrap();
    // With a change behind it, it is damage in the middle of the history.
    drop((cluster, database));
    put(&before);
    victim.open().unwrap().create_database("later").unwrap();
    let mut forged = victim.house.keystore()[0].clone();
    forged[at..at + blob.len()].copy_from_slice(&blob);
    put(&forged);
    assert_eq!(kind(victim.open()), ErrorKind::Damaged);
}

/// What the public key makes of a payload: as long as any other blob.
fn forge(victim: &Victim, payload: &KeyPayload) -> Vec<u8> {
    let forger = Forger {
        public: victim.public.clone(),
        payload: Attacker::altered(payload, victim.id),
        blob: Mutex::default(),
    };
    let forger = Arc::new(forger);
    let wrappers = Wrappers::from(Arc::clone(&forger) as Arc<dyn KeyWrapper>);
    Cluster::create(&House::new().directory(), quick(), wrappers).unwrap();
    forger.blob.lock().unwrap().clone()
}

/// Wraps what it is told to beside what it is given: a context can only be had from a call.
struct Forger {
    public: ScriptedWrapper,
    payload: KeyPayload,
    blob: Mutex<Vec<u8>>,
}

impl KeyWrapper for Forger {
    fn id(&self) -> MasterKeyId {
        self.public.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        *self.blob.lock().unwrap() = self.public.wrap_key(&self.payload, cx)?.blob;
        self.public.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.public.unwrap_key(key, cx)
    }
}

#[test]
fn an_older_keystore_beside_newer_files_is_refused_also_after_it_grew_past_what_the_files_saw() {
    for hierarchy in [Hierarchy::Direct, Hierarchy::ClusterKey] {
        let (house, key) = (House::new(), Recorder::new("k"));
        let cluster = house.create(quick().hierarchy(hierarchy), &key);
        let database = cluster.create_database("d").unwrap();
        let file = small_file(&database, "f");
        append(&file, 1).unwrap();
        let older = house.keystore();
        cluster.create_database("lost").unwrap();
        append(&file, 2).unwrap();
        drop((file, database, cluster));
        let newest = house.keystore();
        for changes in [0, 1, 2, 7] {
            house.put_keystore(&older);
            let cluster = house.open(&key).unwrap();
            // A second handle that knows nothing of it, either.
            let beside = house.open(&key).unwrap();
            for number in 0..changes {
                cluster.create_database(&format!("grown {number}")).unwrap();
            }
            let database = cluster.database("d").unwrap();
            let error = database.page_file("f").unwrap_err();
            assert_eq!(error.kind(), ErrorKind::KeystoreStale, "after {changes} changes");
            let before = house.keystore();
            // Nothing is changed from here on.
            for outcome in [
                cluster.create_database("more").map(drop),
                cluster.rename_database("d", "renamed"),
                cluster.drop_database("d").map(drop),
                cluster.replace_cluster_key(),
                cluster.set_hierarchy(other(hierarchy), &|_| {}),
                database.rotate().map(drop),
                database.cipher().map(drop),
                database.create_page_file("g", pageseal::PageFileOptions::new()).map(drop),
                database.page_file("f").map(drop),
            ] {
                assert_eq!(kind(outcome), ErrorKind::KeystoreStale, "after {changes} changes");
            }
            assert_eq!(house.keystore(), before, "a stale keystore was written to");
            assert_eq!(cluster.databases().unwrap().len(), 1 + changes, "what can be read can be read");
            let other = beside.database("d").unwrap();
            assert_eq!(kind(other.page_file("f")), ErrorKind::KeystoreStale);
            assert_eq!(kind(beside.create_database("more")), ErrorKind::KeystoreStale);
        }
        house.put_keystore(&newest);
        let cluster = house.open(&key).unwrap();
        let file = cluster.database("d").unwrap().page_file("f").unwrap();
        assert_eq!([read(&file, 0).unwrap(), read(&file, 1).unwrap()], [1, 2]);
        cluster.create_database("more").unwrap();
    }
}

fn other(hierarchy: Hierarchy) -> Hierarchy {
    match hierarchy {
        Hierarchy::Direct => Hierarchy::ClusterKey,
        _ => Hierarchy::Direct,
    }
}

#[test]
fn an_older_keystore_that_is_put_back_under_a_running_cluster_is_noticed_and_not_written_to() {
    let (house, key) = (House::new(), Recorder::new("k"));
    let cluster = house.create(quick(), &key);
    let cipher = cluster.create_database("d").unwrap().cipher().unwrap();
    let older = house.keystore();
    cluster.create_database("later").unwrap();
    let newest = house.keystore();
    house.put_keystore(&older);
    assert_eq!(kind(cluster.create_database("more")), ErrorKind::KeystoreStale);
    assert_eq!(house.keystore(), older);
    opens(&cipher, &seal(&cipher, 1), 1).expect("what is open works on");
    house.put_keystore(&newest);
    assert_eq!(kind(cluster.create_database("more")), ErrorKind::KeystoreStale, "until it is opened again");
    drop((cluster, cipher));
    house.open(&key).unwrap().create_database("more").unwrap();
}

#[test]
fn a_copy_of_a_cluster_is_the_same_cluster_and_another_cluster_is_never_taken_for_it() {
    let (house, key) = (House::new(), Recorder::new("k"));
    let cluster = house.create(quick(), &key);
    let page = seal(&cluster.create_database("d").unwrap().cipher().unwrap(), 1);
    let copy = House::new();
    copy_directory(&house.directory(), &copy.directory());
    let open = |house: &House, id: ClusterId| {
        Cluster::open(&house.directory(), quick().expected_id(id), Wrappers::one(key.clone()))
    };
    let copied = open(&copy, cluster.id()).unwrap();
    opens(&copied.database("d").unwrap().cipher().unwrap(), &page, 1).unwrap();
    let stranger = House::new();
    let other = stranger.create(quick(), &key);
    let calls = key.key.calls();
    assert_eq!(kind(open(&stranger, cluster.id())), ErrorKind::WrongIdentity);
    assert_eq!(kind(open(&house, other.id())), ErrorKind::WrongIdentity);
    assert_eq!(key.key.calls(), calls, "a key service was called for a stranger");
}

type State = (&'static str, fn(&ScriptedWrapper));

const STATES: [State; 6] = [
    ("ok", ScriptedWrapper::restore),
    ("disabled", ScriptedWrapper::disable),
    ("deleted", ScriptedWrapper::delete),
    ("denied", ScriptedWrapper::deny),
    ("unreachable", ScriptedWrapper::unreachable),
    ("bad", ScriptedWrapper::bad_ciphertext),
];

/// What becomes of each call when the first master key is in the row's state and the second in the column's: written by hand,
/// from what the user is promised. Whoever can revoke one of the keys decides; an outage decides nothing; one answer is enough.
const ORACLE: [[&str; 6]; 6] = [
    // ok          disabled    deleted    denied    unreachable    bad
    ["ok", "disabled", "deleted", "denied", "ok", "ok"],
    ["disabled", "disabled", "disabled", "disabled", "disabled", "disabled"],
    ["deleted", "deleted", "deleted", "deleted", "deleted", "deleted"],
    ["denied", "denied", "denied", "denied", "denied", "denied"],
    ["ok", "disabled", "deleted", "denied", "unreachable", "bad"],
    ["ok", "disabled", "deleted", "denied", "bad", "bad"],
];

fn verdict<T>(outcome: &Result<T, Error>) -> &'static str {
    match outcome.as_ref().err().map(Error::kind) {
        None => "ok",
        Some(ErrorKind::Disabled) => "disabled",
        Some(ErrorKind::Deleted) => "deleted",
        Some(ErrorKind::Denied) => "denied",
        Some(ErrorKind::Unreachable) => "unreachable",
        Some(ErrorKind::BadCiphertext) => "bad",
        Some(_) => "something else",
    }
}

/// A wrapper that keeps a revocation to itself: to whoever asks it looks like an outage. The broken variant.
#[derive(Clone)]
struct Discreet(ScriptedWrapper);

impl Discreet {
    fn told(error: KmsError) -> KmsError {
        match error.class {
            KmsClass::Disabled | KmsClass::Deleted | KmsClass::Denied => {
                KmsError::with_source(KmsClass::Unreachable, "kept to itself")
            }
            _ => error,
        }
    }
}

impl KeyWrapper for Discreet {
    fn id(&self) -> MasterKeyId {
        self.0.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.0.wrap_key(key, cx).map_err(Self::told)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.0.unwrap_key(key, cx).map_err(Self::told)
    }
}

/// Runs the whole matrix for opening a cluster, opening a database, and creating one. How many cases, and how many of them
/// ended as the oracle says.
fn matrix<W: KeyWrapper + Clone>(wrapper: impl Fn(ScriptedWrapper) -> W + Sync) -> (u64, u64) {
    let [cases, passed] = [const { AtomicU64::new(0) }; 2];
    let pairs: Vec<_> = (0..36).map(|number| (number / 6, number % 6)).collect();
    // A few at a time: an unreachable key is asked again after a while.
    let next = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..9 {
            scope.spawn(|| {
                while let Some(&(row, column)) = pairs.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    let keys = [ScriptedWrapper::new("a"), ScriptedWrapper::new("b")];
                    let outcomes = outcomes(&keys, &wrapper, [STATES[row].1, STATES[column].1]);
                    for (call, outcome) in outcomes {
                        cases.fetch_add(1, Ordering::Relaxed);
                        if outcome == ORACLE[row][column] {
                            passed.fetch_add(1, Ordering::Relaxed);
                        } else {
                            println!("{call}, {} and {}: {outcome}", STATES[row].0, STATES[column].0);
                        }
                    }
                }
            });
        }
    });
    (cases.into_inner(), passed.into_inner())
}

fn outcomes<W: KeyWrapper + Clone>(
    keys: &[ScriptedWrapper; 2],
    wrapper: &impl Fn(ScriptedWrapper) -> W,
    states: [fn(&ScriptedWrapper); 2],
) -> [(&'static str, &'static str); 3] {
    let both =
        || Wrappers::any_of(keys.iter().map(|key| Arc::new(wrapper(key.clone())) as Arc<dyn KeyWrapper>)).unwrap();
    let house = House::new();
    let options = || quick().kms_timeout(Duration::from_millis(200));
    let cluster = Cluster::create(&house.directory(), options(), both()).unwrap();
    let page = seal(&cluster.create_database("d").unwrap().cipher().unwrap(), 1);
    // With a second handle, whose database is not open yet.
    let beside = Cluster::open(&house.directory(), options(), both()).unwrap();
    keys.iter().zip(states).for_each(|(key, set)| set(key));
    let opened = Cluster::open(&house.directory(), options(), both());
    let database = beside.database("d");
    let created = cluster.create_database("new");
    if let Ok(database) = &database {
        opens(&database.cipher().unwrap(), &page, 1).unwrap();
    }
    assert_eq!(
        cluster.databases().unwrap().len(),
        1 + usize::from(created.is_ok()),
        "a refused creation left something"
    );
    let verdicts = [("open", verdict(&opened)), ("database", verdict(&database)), ("create", verdict(&created))];
    // Whatever it was, restoring the keys brings everything back.
    keys.iter().for_each(ScriptedWrapper::restore);
    let again = Cluster::open(&house.directory(), options(), both()).unwrap();
    opens(&again.database("d").unwrap().cipher().unwrap(), &page, 1).unwrap();
    if created.is_ok() {
        again.database("new").unwrap();
    }
    verdicts
}

#[test]
fn one_revocation_beats_any_success_and_no_answer_is_no_verdict() {
    let (cases, passed) = matrix(|key| key);
    let (tried, fooled) = matrix(Discreet);
    let control = tried == cases && fooled < tried;
    score(&format!("wrappings cases={cases} passed={passed} control={}", u8::from(control)));
    assert_eq!((cases, passed), (108, 108));
    assert!(control, "a revocation that is kept secret was not noticed");
}

#[test]
fn two_clusters_keystores_in_one_directory_are_refused_and_neither_is_written_over() {
    let (key, [ours, theirs]) = (Recorder::new("shared"), [House::new(), House::new()]);
    let cluster = ours.create(quick(), &key);
    let id = cluster.id();
    let page = seal(&cluster.create_database("d").unwrap().cipher().unwrap(), 1);
    drop(cluster);
    let other = theirs.create(quick(), &key);
    // Each drop is a rewrite, with a higher number than all before it.
    for _ in 0..5 {
        other.create_database("x").unwrap();
        other.drop_database("x").unwrap();
    }
    drop(other);
    for which in 0..2 {
        let (good, mut mixed) = (ours.keystore(), ours.keystore());
        mixed[which] = theirs.keystore()[0].clone();
        ours.put_keystore(&mixed);
        assert_eq!(kind(ours.open(&key)), ErrorKind::WrongIdentity);
        assert_eq!(ours.keystore(), mixed, "a keystore was written over");
        // Nor while the one is out of reach whose master key would tell.
        let (alone, strange) = (Recorder::new("alone"), House::new());
        drop(strange.create(quick(), &alone));
        let mut stranger = good.clone();
        stranger[which] = strange.keystore()[0].clone();
        ours.put_keystore(&stranger);
        for (open_with, expected) in [
            (Wrappers::one(key.clone()), ErrorKind::WrongIdentity),
            (Wrappers::one(alone.clone()), ErrorKind::WrongIdentity),
            (house::all_of(&[&key, &alone]), ErrorKind::WrongIdentity),
        ] {
            assert_eq!(kind(ours.open_with(open_with)), expected);
        }
        alone.key.unreachable();
        assert_eq!(kind(ours.open_with(house::all_of(&[&key, &alone]))), ErrorKind::Unreachable);
        assert_eq!(ours.keystore(), stranger, "a keystore was written over");
        ours.put_keystore(&mixed);
        let wrappers = || Wrappers::one(key.clone());
        let cluster = Cluster::open(&ours.directory(), quick().expected_id(id), wrappers()).unwrap();
        opens(&cluster.database("d").unwrap().cipher().unwrap(), &page, 1).unwrap();
        drop(cluster);
        assert_eq!(ours.keystore(), [good[0].clone(), good[0].clone()], "it was not repaired");
    }
}

/// Says that a version which it does not have is disabled, as some services do.
#[derive(Clone)]
struct Strict(Recorder);

impl KeyWrapper for Strict {
    fn id(&self) -> MasterKeyId {
        self.0.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.0.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        match key.key_version.as_str() {
            "0" => self.0.unwrap_key(key, cx),
            _ => Err(KmsError::new(KmsClass::Disabled)),
        }
    }
}

#[test]
fn a_verdict_about_a_damaged_copy_does_not_close_a_cluster_whose_other_copy_is_whole() {
    for which in 0..2 {
        let (house, key) = (House::new(), Strict(Recorder::new("k")));
        let cluster = Cluster::create(&house.directory(), quick(), Wrappers::one(key.clone())).unwrap();
        let page = seal(&cluster.create_database("d").unwrap().cipher().unwrap(), 1);
        drop(cluster);
        let mut copies = house.keystore();
        let version = copies[which].windows(3).position(|bytes| bytes == [1, 0, b'0']).unwrap() + 2;
        copies[which][version] = b'9';
        house.put_keystore(&copies);
        let cluster = house.open_with(Wrappers::one(key.clone())).unwrap();
        opens(&cluster.database("d").unwrap().cipher().unwrap(), &page, 1).unwrap();
        assert!(cluster.keystore_findings().iter().any(|finding| finding.contains("damaged")));
        drop(cluster);
        house.put_keystore(&copies);
        key.0.key.disable();
        assert_eq!(kind(house.open_with(Wrappers::one(key))), ErrorKind::Disabled, "a real verdict was not heard");
    }
}
