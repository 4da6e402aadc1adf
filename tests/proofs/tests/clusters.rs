//! What a cluster promises: it opens under its master key and no other, believes nothing that the master key did not
//! confirm, and brings everything back when the key comes back.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pageseal::{
    Cluster, ClusterId, ClusterOptions, Error, ErrorKind, FileId, KeyPayload, KeyWrapper, KmsError, LocalKeyFile,
    MasterKeyId, PageContext, PageFileOptions, ScriptedWrapper, WrapContext, WrappedKey, Wrappers,
};

const CONTEXT: PageContext = PageContext::page(FileId::new(1), 1);

/// A directory of its own for each test, removed at its end.
struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pageseal-{name}-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn cluster(&self) -> PathBuf {
        self.0.join("cluster")
    }

    fn create(&self, key: &ScriptedWrapper) -> Cluster {
        Cluster::create(&self.cluster(), ClusterOptions::new(), Wrappers::one(key.clone())).unwrap()
    }

    fn open(&self, key: &ScriptedWrapper) -> Result<Cluster, Error> {
        Cluster::open(&self.cluster(), quick(), Wrappers::one(key.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn quick() -> ClusterOptions {
    ClusterOptions::new().kms_timeout(Duration::from_millis(300))
}

fn kind<T>(outcome: Result<T, Error>) -> ErrorKind {
    match outcome {
        Ok(_) => panic!("it should have been refused"),
        Err(error) => error.kind(),
    }
}

fn copy_directory(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target)
        } else {
            fs::copy(entry.path(), target).map(drop).unwrap()
        }
    }
}

#[test]
fn what_was_sealed_opens_after_everything_was_dropped_and_reopened() {
    let (place, key) = (Place::new("reopen"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let id = cluster.id();
    let mut pages = Vec::new();
    for name in ["one", "two"] {
        let cipher = cluster.create_database(name).unwrap().cipher().unwrap();
        let mut page = vec![name.as_bytes()[0]; 4096];
        cipher.seal_in_place(&CONTEXT, &mut page).unwrap();
        pages.push((name, page));
    }
    drop(cluster);
    let cluster = Cluster::open(&place.cluster(), quick().expected_id(id), Wrappers::one(key)).unwrap();
    assert_eq!(cluster.databases().unwrap(), ["one", "two"]);
    for (name, mut page) in pages {
        cluster.database(name).unwrap().cipher().unwrap().open_in_place(&CONTEXT, &mut page).unwrap();
        assert_eq!(page[..4048], vec![name.as_bytes()[0]; 4048]);
    }
}

#[test]
fn an_unexpected_cluster_is_refused_before_any_key_service_is_called() {
    let (place, key) = (Place::new("expected"), ScriptedWrapper::new("k"));
    drop(place.create(&key));
    let calls = key.calls();
    let options = quick().expected_id(ClusterId::from_bytes([7; 16]));
    let outcome = Cluster::open(&place.cluster(), options, Wrappers::one(key.clone()));
    assert_eq!(kind(outcome), ErrorKind::WrongIdentity);
    assert_eq!(key.calls(), calls);
}

#[test]
fn a_keystore_that_was_put_in_anothers_place_is_refused() {
    let (place, other, key) = (Place::new("victim"), Place::new("attacker"), ScriptedWrapper::new("k"));
    let id = place.create(&key).id();
    drop(other.create(&key));
    let open = || Cluster::open(&place.cluster(), quick().expected_id(id), Wrappers::one(key.clone()));
    for (own, foreign) in place.copies().into_iter().zip(other.copies()) {
        let kept = fs::read(&own).unwrap();
        fs::copy(&foreign, &own).unwrap();
        let cluster = open().unwrap();
        assert_eq!(
            (cluster.id(), cluster.keystore_findings().len()),
            (id, 1),
            "one copy was enough, and nothing is said"
        );
        drop(cluster);
        fs::write(&own, kept).unwrap();
    }
    for (own, foreign) in place.copies().into_iter().zip(other.copies()) {
        fs::copy(foreign, own).unwrap();
    }
    assert_eq!(kind(open()), ErrorKind::WrongIdentity);
}

#[test]
fn where_anybody_can_wrap_the_expected_id_is_mandatory() {
    let place = Place::new("public");
    let public =
        || Wrappers::one(Altered { key: None, inner: LocalKeyFile::new(place.0.join("master.key")), public: true });
    LocalKeyFile::create(place.0.join("master.key")).unwrap();
    let id = Cluster::create(&place.cluster(), ClusterOptions::new(), public()).unwrap().id();
    assert_eq!(kind(Cluster::open(&place.cluster(), quick(), public())), ErrorKind::Misconfigured);
    Cluster::open(&place.cluster(), quick().expected_id(id), public()).unwrap();
}

#[test]
fn every_state_of_the_master_key_decides_an_opening_and_restoring_it_brings_the_data_back() {
    let (place, key) = (Place::new("states"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let cipher = cluster.create_database("d").unwrap().cipher().unwrap();
    let mut sealed = vec![1; 4096];
    cipher.seal_in_place(&CONTEXT, &mut sealed).unwrap();
    drop((cluster, cipher));
    let states: [(&dyn Fn(), ErrorKind); 7] = [
        (&|| key.disable(), ErrorKind::Disabled),
        (&|| key.delete(), ErrorKind::Deleted),
        (&|| key.deny(), ErrorKind::Denied),
        (&|| key.unreachable(), ErrorKind::Unreachable),
        (&|| key.throttle(Duration::from_secs(1)), ErrorKind::Unreachable),
        (&|| key.bad_ciphertext(), ErrorKind::BadCiphertext),
        (&|| key.misconfigure(), ErrorKind::Misconfigured),
    ];
    for (set, expected) in states {
        set();
        assert_eq!(kind(place.open(&key)), expected);
        key.restore();
        let cipher = place.open(&key).unwrap().database("d").unwrap().cipher().unwrap();
        let mut page = sealed.clone();
        cipher.open_in_place(&CONTEXT, &mut page).unwrap();
    }
}

#[test]
fn a_hanging_key_service_costs_an_opening_its_time_out_and_no_more() {
    let (place, key) = (Place::new("hang"), ScriptedWrapper::new("k"));
    drop(place.create(&key));
    key.hang();
    let start = Instant::now();
    assert_eq!(kind(place.open(&key)), ErrorKind::Unreachable);
    assert!(start.elapsed() < Duration::from_secs(10));
    key.restore();
    place.open(&key).unwrap();
}

#[test]
fn an_open_cluster_works_on_without_its_key_service_and_a_failed_creation_changes_nothing() {
    let (place, key) = (Place::new("running"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let cipher = cluster.create_database("d").unwrap().cipher().unwrap();
    key.unreachable();
    let mut page = vec![1; 4096];
    cipher.seal_in_place(&CONTEXT, &mut page).unwrap();
    cipher.open_in_place(&CONTEXT, &mut page).unwrap();
    assert_eq!(kind(cluster.check_master_key()), ErrorKind::Unreachable);
    assert_eq!(kind(cluster.create_database("e")), ErrorKind::Unreachable);
    assert_eq!(cluster.databases().unwrap(), ["d"]);
    key.disable();
    assert_eq!(kind(cluster.check_master_key()), ErrorKind::Disabled);
    key.restore();
    cluster.check_master_key().unwrap();
    cluster.create_database("e").unwrap();
}

#[test]
fn a_service_that_returns_another_key_is_found_out() {
    let place = Place::new("lies");
    LocalKeyFile::create(place.0.join("master.key")).unwrap();
    let wrapper = |key: Option<Change>| {
        Wrappers::one(Altered { key, inner: LocalKeyFile::new(place.0.join("master.key")), public: false })
    };
    let cluster = Cluster::create(&place.cluster(), ClusterOptions::new(), wrapper(None)).unwrap();
    cluster.create_database("d").unwrap();
    drop(cluster);
    let cases: [(Change, ErrorKind); 7] = [
        (|payload| payload[0] ^= 1, ErrorKind::Damaged),
        (|payload| payload[8] ^= 2, ErrorKind::WrongIdentity),
        (|payload| payload[16] ^= 1, ErrorKind::WrongIdentity),
        (|payload| payload[32] ^= 1, ErrorKind::WrongIdentity),
        (|payload| payload[48] ^= 1, ErrorKind::WrongIdentity),
        (|payload| payload[64] ^= 1, ErrorKind::Authentication),
        (|payload| payload[96] ^= 1, ErrorKind::WrongIdentity),
    ];
    for (index, (change, expected)) in cases.into_iter().enumerate() {
        let outcome = Cluster::open(&place.cluster(), quick(), wrapper(Some(change)));
        assert_eq!(kind(outcome), expected, "case {index}");
    }
    // The same for a data key: the cluster's own record is left alone.
    let data_cases: [(Change, ErrorKind); 4] = [
        (
            |payload| {
                if payload[5] == 1 {
                    payload[33] ^= 1
                }
            },
            ErrorKind::WrongIdentity,
        ),
        (
            |payload| {
                if payload[5] == 1 {
                    payload[50] ^= 1
                }
            },
            ErrorKind::WrongIdentity,
        ),
        (
            |payload| {
                if payload[5] == 1 {
                    payload[70] ^= 1
                }
            },
            ErrorKind::Authentication,
        ),
        (
            |payload| {
                if payload[5] == 1 {
                    payload[100] ^= 1
                }
            },
            ErrorKind::Authentication,
        ),
    ];
    for (index, (change, expected)) in data_cases.into_iter().enumerate() {
        let cluster = Cluster::open(&place.cluster(), quick(), wrapper(Some(change))).unwrap();
        assert_eq!(kind(cluster.database("d")), expected, "data case {index}");
    }
}

#[test]
fn a_cluster_is_open_in_several_handles_at_once_and_a_page_file_in_one() {
    let (place, key) = (Place::new("several"), ScriptedWrapper::new("k"));
    let first = place.create(&key);
    let second = place.open(&key).unwrap();
    let (database, other) = (first.create_database("d").unwrap(), second.database("d").unwrap());
    second.create_database("e").unwrap();
    assert_eq!(first.databases().unwrap(), ["d", "e"], "a handle does not see what another one made");
    assert_eq!(kind(first.create_database("e")), ErrorKind::AlreadyExists);
    let mut page = vec![7; 4096];
    database.cipher().unwrap().seal_in_place(&CONTEXT, &mut page).unwrap();
    other.cipher().unwrap().open_in_place(&CONTEXT, &mut page).unwrap();
    let file = database.create_page_file("f", PageFileOptions::new()).unwrap();
    assert_eq!(kind(other.create_page_file("f", PageFileOptions::new())), ErrorKind::AlreadyExists);
    assert_eq!(kind(other.page_file("f")), ErrorKind::InUse, "two write one file");
    assert_eq!(kind(other.remove_page_file("f")), ErrorKind::InUse, "a file that is open was removed");
    let again = database.page_file("f").unwrap();
    drop(file);
    assert_eq!(kind(other.page_file("f")), ErrorKind::InUse, "a second handle does not keep the file");
    drop(again);
    let file = other.page_file("f").unwrap();
    assert_eq!(kind(database.page_file("f")), ErrorKind::InUse);
    drop((first, second, other, file));
    database.page_file("f").expect("a database handle keeps the cluster open");
}

#[test]
fn a_cipher_that_outlives_its_database_is_still_the_only_one() {
    let (place, key) = (Place::new("only"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let cipher = cluster.create_database("d").unwrap().cipher().unwrap();
    let calls = key.calls();
    let again = cluster.database("d").unwrap().cipher().unwrap();
    assert_eq!(key.calls(), calls, "the keys were unwrapped a second time");
    let salt = |cipher: &pageseal::PageCipher| cipher.seal_detached(&CONTEXT, &mut [0; 64]).unwrap().0[28..44].to_vec();
    assert_eq!(salt(&cipher), salt(&again));
}

#[test]
fn a_key_is_not_made_while_one_of_its_master_keys_is_revoked() {
    let place = Place::new("revoked");
    let (one, two) = (ScriptedWrapper::new("one"), ScriptedWrapper::new("two"));
    let all: [Arc<dyn KeyWrapper>; 2] = [Arc::new(one.clone()), Arc::new(two.clone())];
    let both = Wrappers::any_of(all).unwrap();
    let cluster = Cluster::create(&place.cluster(), quick(), both).unwrap();
    two.disable();
    assert_eq!(kind(cluster.create_database("d")), ErrorKind::Disabled);
    two.unreachable();
    cluster.create_database("d").unwrap();
    assert_eq!(cluster.databases().unwrap(), ["d"]);
}

/// A cluster with databases "one" and "two", closed.
fn with_two_databases(name: &str, key: &ScriptedWrapper) -> Place {
    let place = Place::new(name);
    let cluster = place.create(key);
    assert_eq!(cluster.keystore_findings(), [""; 0]);
    cluster.create_database("one").unwrap();
    cluster.create_database("two").unwrap();
    place
}

impl Place {
    fn copies(&self) -> [PathBuf; 2] {
        ["keystore", "keystore.copy"].map(|name| self.cluster().join(name))
    }

    /// What was kept of damaged copies.
    fn kept(&self) -> Vec<Vec<u8>> {
        let paths = fs::read_dir(self.cluster()).unwrap().map(|entry| entry.unwrap().path());
        paths
            .filter(|path| path.to_str().unwrap().contains("keystore.damaged-"))
            .map(|path| fs::read(path).unwrap())
            .collect()
    }
}

/// Flips a bit in the last change.
fn damage(path: &Path) -> Vec<u8> {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() - 700;
    bytes[at] ^= 1;
    fs::write(path, &bytes).unwrap();
    bytes
}

#[test]
fn a_damaged_copy_of_the_keystore_loses_nothing_is_said_and_is_kept_beside_it() {
    let key = ScriptedWrapper::new("k");
    for which in 0..2 {
        let place = with_two_databases("damaged", &key);
        let good = fs::read(&place.copies()[0]).unwrap();
        let mut kept = Vec::new();
        // The same damage a second time does not replace what was kept the first time.
        for round in 0..2 {
            kept.push(damage(&place.copies()[which]));
            let cluster = place.open(&key).unwrap();
            let findings = cluster.keystore_findings();
            let named = format!("{} is damaged", place.copies()[which].display());
            assert!(findings.len() == 1 && findings[0].starts_with(&named), "{findings:?}");
            assert_eq!(cluster.databases().unwrap().len(), 2 + round, "a copy that is whole was not enough");
            drop(cluster);
            let cluster = place.open(&key).unwrap();
            assert_eq!(cluster.keystore_findings(), [""; 0], "the copy was not made anew");
            let both = place.copies().map(|path| fs::read(path).unwrap());
            assert_eq!(both[0], both[1]);
            assert!(round > 0 || both[0] == good);
            let mut found = place.kept();
            found.sort();
            let mut expected = kept.clone();
            expected.sort();
            assert!(found == expected, "copy {which}, round {round}: not all damaged bytes were kept");
            cluster.create_database(&format!("more {round}")).unwrap();
        }
    }
}

/// Leaves a copy of the keystore as a crash does.
type Tear = fn(&Path);

#[test]
fn a_torn_or_missing_copy_of_the_keystore_is_made_anew_and_nothing_is_kept_of_it() {
    let key = ScriptedWrapper::new("k");
    let tears: [(&str, Tear); 4] = [
        ("lacks the last changes", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 1024]).unwrap();
        }),
        ("ends in bytes that do not verify", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, &bytes[..bytes.len() - 700]).unwrap();
        }),
        ("ends in bytes that do not verify", |path| {
            let bytes = fs::read(path).unwrap();
            fs::write(path, [bytes, vec![7; 900]].concat()).unwrap();
        }),
        ("is missing", |path| fs::remove_file(path).unwrap()),
    ];
    for (finding, tear) in tears {
        for which in 0..2 {
            let place = with_two_databases("torn", &key);
            let good = fs::read(&place.copies()[0]).unwrap();
            tear(&place.copies()[which]);
            let cluster = place.open(&key).unwrap();
            let findings = cluster.keystore_findings();
            assert!(findings.len() == 1 && findings[0].contains(finding), "{finding}, copy {which}: {findings:?}");
            assert_eq!(cluster.databases().unwrap(), ["one", "two"]);
            assert_eq!(place.kept(), [[0; 0]; 0], "{finding}, copy {which}");
            assert!(place.copies().iter().all(|path| fs::read(path).unwrap() == good), "it was not made anew");
        }
    }
}

#[test]
fn a_change_that_is_damaged_in_both_copies_is_lost_said_and_kept_beside_them() {
    let key = ScriptedWrapper::new("k");
    let place = with_two_databases("both", &key);
    let damaged = place.copies().map(|path| damage(&path));
    let cluster = place.open(&key).unwrap();
    assert_eq!(cluster.keystore_findings().len(), 2);
    assert_eq!(cluster.databases().unwrap(), ["one"]);
    cluster.create_database("three").unwrap();
    assert!(damaged.iter().all(|bytes| place.kept().contains(bytes)), "an acknowledged key is gone without a trace");
    drop(cluster);
    let cluster = place.open(&key).unwrap();
    assert_eq!(cluster.databases().unwrap(), ["one", "three"]);
    assert_eq!(cluster.keystore_findings(), [""; 0]);
}

#[test]
fn a_cluster_is_never_created_over_another() {
    let (place, key) = (Place::new("twice"), ScriptedWrapper::new("k"));
    let id = place.create(&key).id();
    let again = Cluster::create(&place.cluster(), ClusterOptions::new(), Wrappers::one(key.clone()));
    assert_eq!(kind(again), ErrorKind::AlreadyExists);
    assert_eq!(place.open(&key).unwrap().id(), id);
    assert_eq!(kind(Cluster::open(&place.0.join("none"), quick(), Wrappers::one(key))), ErrorKind::NotFound);
}

#[test]
fn names_are_unique_looked_up_exactly_and_checked() {
    let (place, key) = (Place::new("names"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    for name in ["b", "a", "A", "\u{e9}t\u{e9}", &"x".repeat(255)] {
        cluster.create_database(name).unwrap();
        assert_eq!(kind(cluster.create_database(name)), ErrorKind::AlreadyExists);
    }
    for wrong in ["", "a\0", "line\nbreak", &"x".repeat(256)] {
        assert_eq!(kind(cluster.create_database(wrong)), ErrorKind::Invalid);
    }
    assert_eq!(kind(cluster.database("B")), ErrorKind::NotFound);
    drop(cluster);
    let names = place.open(&key).unwrap().databases().unwrap();
    assert_eq!(names, ["A", "a", "b", &"x".repeat(255), "\u{e9}t\u{e9}"]);
}

#[test]
fn all_handles_of_a_database_share_one_session() {
    let (place, key) = (Place::new("share"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let first = cluster.create_database("d").unwrap();
    let second = cluster.database("d").unwrap();
    let salt = |database: &pageseal::Database| {
        let trailer = database.cipher().unwrap().seal_detached(&CONTEXT, &mut [0; 64]).unwrap();
        trailer.0[28..44].to_vec()
    };
    assert_eq!(salt(&first), salt(&second));
    cluster.resumed();
    assert_eq!(salt(&first), salt(&second));
    let (before, after) = (salt(&first), {
        cluster.resumed();
        salt(&second)
    });
    assert_ne!(before, after, "a resumed machine goes on under the old session");
}

#[test]
fn asking_for_the_cipher_again_writes_nothing() {
    let (place, key) = (Place::new("cipher"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let database = cluster.create_database("d").unwrap();
    let length = || fs::metadata(place.cluster().join("keystore")).unwrap().len();
    let before = length();
    database.cipher().unwrap();
    let noted = length();
    assert!(noted > before, "the use of the keys was not noted");
    database.cipher().unwrap();
    assert_eq!(length(), noted);
    drop((database, cluster));
    place.open(&key).unwrap().database("d").unwrap().cipher().unwrap();
    assert_eq!(length(), noted);
}

#[test]
fn two_master_keys_fail_over_on_outage_and_never_on_revocation() {
    let place = Place::new("two");
    let (one, two) = (ScriptedWrapper::new("one"), ScriptedWrapper::new("two"));
    let both = || {
        let all: [Arc<dyn KeyWrapper>; 2] = [Arc::new(one.clone()), Arc::new(two.clone())];
        Wrappers::any_of(all).unwrap()
    };
    let cluster = Cluster::create(&place.cluster(), ClusterOptions::new(), both()).unwrap();
    cluster.create_database("d").unwrap();
    drop(cluster);
    let open = || Cluster::open(&place.cluster(), quick(), both())?.database("d");
    one.unreachable();
    open().unwrap();
    one.disable();
    assert_eq!(kind(open()), ErrorKind::Disabled, "one revoked key must beat the other's success");
    one.restore();
    two.delete();
    assert_eq!(kind(open()), ErrorKind::Deleted);
    two.restore();
    open().unwrap();
    let only_two = Cluster::open(&place.cluster(), quick(), Wrappers::one(two.clone())).unwrap();
    only_two.database("d").unwrap();
    drop(only_two);
    let stranger = Cluster::open(&place.cluster(), quick(), Wrappers::one(ScriptedWrapper::new("three")));
    assert_eq!(kind(stranger), ErrorKind::Misconfigured);
}

#[test]
fn a_copied_directory_is_a_cluster_of_its_own_that_opens_all_pages_of_the_original() {
    let (place, copy, key) = (Place::new("original"), Place::new("copy"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let cipher = cluster.create_database("d").unwrap().cipher().unwrap();
    copy_directory(&place.cluster(), &copy.cluster());
    let mut page = vec![1; 4096];
    cipher.seal_in_place(&CONTEXT, &mut page).unwrap();
    let copied = copy.open(&key).unwrap().database("d").unwrap().cipher().unwrap();
    copied.open_in_place(&CONTEXT, &mut page.clone()).unwrap();
    let salt_of =
        |cipher: &pageseal::PageCipher| cipher.seal_detached(&CONTEXT, &mut [0; 64]).unwrap().0[28..44].to_vec();
    assert_ne!(salt_of(&cipher), salt_of(&copied), "two copies seal under one subkey");
}

#[test]
fn an_interrupted_creation_of_a_page_file_is_finished_and_a_lost_file_is_not_made_anew() {
    let (place, key) = (Place::new("interrupted"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let database = cluster.create_database("d").unwrap();
    let file = database.create_page_file("f", PageFileOptions::new()).unwrap();
    let path = file.path().to_path_buf();
    drop(file);
    // As a crash leaves it between the note in the keystore and the file's name.
    fs::rename(&path, path.with_extension("new")).unwrap();
    assert_eq!(kind(database.create_page_file("f", PageFileOptions::new())), ErrorKind::AlreadyExists);
    assert_eq!(database.page_file("f").unwrap().pages(), 0);
    fs::remove_file(&path).unwrap();
    assert_eq!(kind(database.page_file("f")), ErrorKind::NotFound);
    assert_eq!(kind(database.create_page_file("f", PageFileOptions::new())), ErrorKind::AlreadyExists);
}

#[test]
fn an_older_keystore_beside_newer_files_is_refused() {
    let (place, key) = (Place::new("stale"), ScriptedWrapper::new("k"));
    let cluster = place.create(&key);
    let database = cluster.create_database("d").unwrap();
    let file = database.create_page_file("f", PageFileOptions::new()).unwrap();
    let older = fs::read(&place.copies()[0]).unwrap();
    cluster.create_database("e").unwrap();
    let mut appender = file.append().unwrap();
    appender.write(&pageseal::Inline, &vec![1; file.payload_len()]).unwrap();
    appender.finish().unwrap();
    drop((file, database, cluster));
    let newest = fs::read(&place.copies()[0]).unwrap();
    let put = |bytes: &[u8]| place.copies().iter().for_each(|path| fs::write(path, bytes).unwrap());
    put(&older);
    let cluster = place.open(&key).unwrap();
    assert_eq!(kind(cluster.database("d").unwrap().page_file("f")), ErrorKind::KeystoreStale);
    drop(cluster);
    put(&newest);
    place.open(&key).unwrap().database("d").unwrap().page_file("f").unwrap();
}

/// What a lying service does to a payload.
type Change = fn(&mut [u8]);

/// A key service that changes what it unwraps, once it wrapped honestly; or that says that its wrapping is public.
struct Altered {
    key: Option<Change>,
    inner: LocalKeyFile,
    public: bool,
}

impl KeyWrapper for Altered {
    fn id(&self) -> MasterKeyId {
        self.inner.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.inner.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let payload = self.inner.unwrap_key(key, cx)?;
        let Some(change) = self.key else { return Ok(payload) };
        let mut bytes = payload.with_bytes(|bytes| *bytes).unwrap();
        change(&mut bytes);
        Ok(KeyPayload::from_bytes(&mut bytes).unwrap())
    }

    fn wrapping_is_public(&self) -> bool {
        self.public
    }
}
