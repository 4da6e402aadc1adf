//! The gate of a whole cluster: disabling it stops every operation of every handle at once and takes the keys out of memory
//! (`key_memory` looks); bringing it back revives the same handles, with whatever other processes changed meanwhile.

mod common;
#[path = "common/house.rs"]
mod house;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::{Method, copy_directory, generation, is_zero};
use house::{AT, House, Recorder, all_of, append, generation_of, kind, opens, quick, read, seal, small_file};
use pageseal::{
    Appender, Cluster, Database, Error, ErrorKind, Hierarchy, Inline, KmsClass, OVERHEAD, PageCipher, PageError,
    PageFile, PageFileOptions, PageJob, ReadJob, Threads, Wrappers,
};
use pageseal_proofs::score;

const HIERARCHIES: [Hierarchy; 2] = [Hierarchy::Direct, Hierarchy::ClusterKey];

/// A cluster with one of each handle.
struct Handles {
    house: House,
    key: Recorder,
    cluster: Cluster,
    database: Database,
    cipher: PageCipher,
    file: PageFile,
    page: Vec<u8>,
}

impl Handles {
    fn new(hierarchy: Hierarchy) -> Self {
        let (house, key) = (House::new(), Recorder::new("k"));
        let cluster = house.create(quick().hierarchy(hierarchy), &key);
        let database = cluster.create_database("d").unwrap();
        cluster.create_database("closed").unwrap();
        let cipher = database.cipher().unwrap();
        let file = small_file(&database, "f");
        append(&file, 1).unwrap();
        let page = seal(&cipher, 1);
        Self { house, key, cluster, database, cipher, file, page }
    }

    /// Every call there is, by its name, and what it gives.
    fn everything(&self, appender: &mut Option<Appender<'_>>) -> Vec<(&'static str, Result<(), Error>)> {
        let Self { cluster, database, cipher, file, .. } = self;
        let payload = vec![0; file.payload_len()];
        let mut outcomes = vec![
            ("databases", cluster.databases().map(drop)),
            ("create_database", cluster.create_database("new").map(drop)),
            ("database, open", cluster.database("d").map(drop)),
            ("database, closed", cluster.database("closed").map(drop)),
            ("open_databases", cluster.open_databases().map(drop)),
            ("rename_database", cluster.rename_database("closed", "renamed")),
            ("drop_database", cluster.drop_database("closed").map(drop)),
            ("rewrap", cluster.rewrap(Wrappers::one(self.key.clone()), &|_| {})),
            ("set_hierarchy", cluster.set_hierarchy(other(cluster.hierarchy()), &|_| {})),
            ("replace_cluster_key", cluster.replace_cluster_key()),
            ("maintain", cluster.maintain().map(drop)),
            ("export", cluster.export(&self.house.0.join("export"))),
            ("rotate", database.rotate().map(drop)),
            ("destroy_generation", database.destroy_generation(generation(1)).map(drop)),
            ("cipher", database.cipher().map(drop)),
            ("release_external", database.release_external(generation(1))),
            ("create_page_file", database.create_page_file("new", PageFileOptions::new()).map(drop)),
            ("page_file", database.page_file("f").map(drop)),
            ("remove_page_file", database.remove_page_file("f")),
            ("read", read(file, 0).map(drop)),
            ("append", file.append().map(drop)),
        ];
        if let Some(appender) = appender {
            outcomes.push(("write", appender.write(&Inline, &payload).map(drop)));
        }
        if let Some(appender) = appender.take() {
            outcomes.push(("finish", appender.finish().map(drop)));
        }
        for method in Method::ALL {
            outcomes.push(("seal", method.seal(cipher, &AT, &[1; 64]).map(drop).map_err(Error::from)));
            let (opened, left) = method.open(cipher, &AT, &self.page);
            assert!(opened.is_ok() || is_zero(&left), "{method:?}");
            outcomes.push(("open", opened.map_err(Error::from)));
        }
        for pool in [&Inline as &dyn pageseal::Pool, Threads::shared()] {
            let mut pages = vec![vec![1; 64 + OVERHEAD]; 40];
            let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(AT, page)).collect();
            let _ = cipher.seal_batch(pool, &mut jobs);
            outcomes.extend(jobs.iter().map(|job| ("seal_batch", job.result().map_err(Error::from))));
            let mut payload = payload.clone();
            let mut jobs = [ReadJob::new(0, &mut payload)];
            let _ = file.read_many(pool, &mut jobs);
            outcomes.push(("read_many", jobs[0].result().map(drop).map_err(Error::from)));
        }
        outcomes
    }
}

fn other(hierarchy: Hierarchy) -> Hierarchy {
    match hierarchy {
        Hierarchy::Direct => Hierarchy::ClusterKey,
        _ => Hierarchy::Direct,
    }
}

#[test]
fn a_disabled_cluster_refuses_every_call_of_every_handle_and_the_same_handles_come_back() {
    let (mut calls, mut refused) = (0, 0);
    let mut control = true;
    for hierarchy in HIERARCHIES {
        let handles = Handles::new(hierarchy);
        let before = handles.house.keystore();
        // The control: without the gate closed, the same count is not full.
        let open = Handles::new(hierarchy);
        control &= open.everything(&mut None).iter().any(|(_, outcome)| outcome.is_ok());
        let mut appender = handles.file.append().ok();
        handles.cluster.disable().unwrap();
        assert!(handles.cluster.is_disabled() && handles.cluster.clone().is_disabled());
        for (name, outcome) in handles.everything(&mut appender) {
            calls += 1;
            match outcome {
                Err(error) if error.kind() == ErrorKind::Closed => refused += 1,
                other => println!("{name} is not refused: {other:?}"),
            }
        }
        drop(appender);
        assert_eq!(opens(&handles.cipher, &handles.page, 1), Err(PageError::Disabled));
        assert_eq!(handles.house.keystore(), before, "a refused call changed the keystore");
        // What needs no key goes on.
        assert_eq!((handles.database.name(), handles.database.generation()), ("d", generation(1)));
        assert_eq!((handles.file.pages(), handles.cluster.keystore_findings().len()), (1, 0));
        handles.cluster.check_master_key().unwrap();
        handles.key.key.disable();
        assert_eq!(kind(handles.cluster.check_master_key()), ErrorKind::Disabled);
        handles.key.key.restore();
        handles.cluster.disable().unwrap();

        handles.cluster.retry().unwrap();
        assert!(!handles.cluster.is_disabled());
        handles.cluster.retry().unwrap();
        opens(&handles.cipher, &handles.page, 1).unwrap();
        assert_eq!(read(&handles.file, 0).unwrap(), 1);
        assert_eq!(append(&handles.file, 2).unwrap(), 2);
        opens(&handles.cipher, &seal(&handles.cipher, 3), 3).unwrap();
        assert_eq!(handles.cluster.databases().unwrap(), ["closed", "d"]);
        handles.cluster.database("closed").unwrap();
        handles.database.rotate().unwrap();
    }
    score(&format!("disabled calls={calls} refused={refused} control={}", u8::from(control)));
    assert_eq!(calls, refused);
    assert!(control, "the calls are refused whatever the gate says");
}

/// Sets a state of a master key.
type SetState = fn(&Recorder);

#[test]
fn retry_fails_while_the_master_key_is_revoked_or_away_and_keeps_the_gate_closed() {
    for hierarchy in HIERARCHIES {
        let handles = Handles::new(hierarchy);
        handles.cluster.disable().unwrap();
        let states: [(SetState, ErrorKind); 5] = [
            (|key| key.key.disable(), ErrorKind::Disabled),
            (|key| key.key.delete(), ErrorKind::Deleted),
            (|key| key.key.deny(), ErrorKind::Denied),
            (|key| key.key.unreachable(), ErrorKind::Unreachable),
            (|key| key.key.bad_ciphertext(), ErrorKind::BadCiphertext),
        ];
        for (set, expected) in states {
            set(&handles.key);
            assert_eq!(kind(handles.cluster.retry()), expected);
            assert!(handles.cluster.is_disabled());
            assert_eq!(opens(&handles.cipher, &handles.page, 1), Err(PageError::Disabled));
        }
        handles.key.key.restore();
        // All come back, or none does: the cluster key was unwrapped, a data key was not.
        if hierarchy == Hierarchy::Direct {
            handles.key.fail_after(1, KmsClass::Denied);
            assert_eq!(kind(handles.cluster.retry()), ErrorKind::Denied);
            assert!(handles.key.mend() && handles.cluster.is_disabled());
            assert_eq!(opens(&handles.cipher, &handles.page, 1), Err(PageError::Disabled));
            assert_eq!(kind(handles.cluster.databases()), ErrorKind::Closed);
        }
        handles.cluster.retry().unwrap();
        opens(&handles.cipher, &handles.page, 1).unwrap();
    }
}

#[test]
fn what_another_handle_changed_while_a_cluster_was_disabled_is_there_when_it_comes_back() {
    for hierarchy in HIERARCHIES {
        let handles = Handles::new(hierarchy);
        let cluster = &handles.cluster;
        let doomed = cluster.create_database("doomed").unwrap();
        let lost = doomed.cipher().unwrap();
        let page = seal(&lost, 9);
        let moved = cluster.create_database("moved").unwrap();
        cluster.disable().unwrap();

        let beside = handles.house.open(&handles.key).unwrap();
        beside.drop_database("doomed").expect("a disabled cluster keeps nothing from being dropped");
        let database = beside.database("d").unwrap();
        assert_eq!(database.rotate().unwrap(), generation(2));
        database.release_external(generation(2)).unwrap();
        let holders = database.destroy_generation(generation(1)).unwrap_err().to_string();
        assert!(holders.contains("page file \"f\"") && !holders.contains("process"), "{holders}");
        let newer = seal(&database.cipher().unwrap(), 2);
        let other = beside.database("moved").unwrap();
        other.rotate().unwrap();
        other.destroy_generation(generation(1)).expect("a disabled cluster keeps no generation");
        beside.create_database("made").unwrap();
        beside.rename_database("moved", "renamed").unwrap();
        beside.replace_cluster_key().unwrap();
        drop((database, other, beside));

        cluster.retry().unwrap();
        assert_eq!(cluster.databases().unwrap(), ["closed", "d", "made", "renamed"]);
        assert_eq!(opens(&lost, &page, 9), Err(PageError::Dropped));
        assert_eq!(kind(doomed.rotate()), ErrorKind::NotFound);
        opens(&handles.cipher, &newer, 2).unwrap();
        opens(&handles.cipher, &handles.page, 1).unwrap();
        assert_eq!(generation_of(&seal(&handles.cipher, 3)), generation(2));
        assert_eq!(generation_of(&seal(&moved.cipher().unwrap(), 3)), generation(2), "a destroyed key seals");
        assert_eq!(append(&handles.file, 2).unwrap(), 2);
        assert_eq!([read(&handles.file, 0).unwrap(), read(&handles.file, 1).unwrap()], [1, 2]);
    }
}

#[test]
fn an_older_keystore_that_was_put_back_while_a_cluster_was_disabled_keeps_it_disabled() {
    let handles = Handles::new(Hierarchy::Direct);
    let older = handles.house.keystore();
    handles.cluster.create_database("later").unwrap();
    let newest = handles.house.keystore();
    handles.cluster.disable().unwrap();
    handles.house.put_keystore(&older);
    assert_eq!(kind(handles.cluster.retry()), ErrorKind::KeystoreStale);
    assert!(handles.cluster.is_disabled());
    handles.house.put_keystore(&newest);
    handles.cluster.retry().unwrap();
    opens(&handles.cipher, &handles.page, 1).unwrap();
}

#[test]
fn a_disabled_cluster_comes_back_under_other_credentials_or_the_master_key_that_another_handle_moved_it_to() {
    for hierarchy in HIERARCHIES {
        let handles = Handles::new(hierarchy);
        let cluster = &handles.cluster;
        // The same master key, through a wrapper whose credentials are good.
        let good = Recorder::over(handles.key.key.clone());
        handles.key.fail_after(0, KmsClass::Denied);
        cluster.disable().unwrap();
        assert_eq!(kind(cluster.retry()), ErrorKind::Denied);
        cluster.use_wrappers(Wrappers::one(good.clone())).unwrap();
        assert!(cluster.is_disabled(), "new credentials alone opened the gate");
        cluster.retry().unwrap();
        opens(&handles.cipher, &handles.page, 1).unwrap();

        cluster.disable().unwrap();
        let new = Recorder::new("new");
        handles.house.open(&good).unwrap().rewrap(Wrappers::one(new.clone()), &|_| {}).unwrap();
        assert_eq!(kind(cluster.retry()), ErrorKind::Misconfigured);
        new.key.disable();
        assert_eq!(kind(cluster.use_wrappers(Wrappers::one(new.clone()))), ErrorKind::Disabled);
        new.key.restore();
        assert_eq!(kind(cluster.use_wrappers(Wrappers::one(Recorder::new("stranger")))), ErrorKind::Misconfigured);
        cluster.use_wrappers(Wrappers::one(new)).unwrap();
        cluster.retry().unwrap();
        opens(&handles.cipher, &handles.page, 1).unwrap();
        assert_eq!(append(&handles.file, 2).unwrap(), 2);
    }
}

#[test]
fn with_two_master_keys_a_disabled_cluster_comes_back_on_outage_and_not_on_revocation() {
    let (house, [a, b]) = (House::new(), ["a", "b"].map(Recorder::new));
    let cluster = Cluster::create(&house.directory(), quick(), all_of(&[&a, &b])).unwrap();
    let cipher = cluster.create_database("d").unwrap().cipher().unwrap();
    let page = seal(&cipher, 1);
    cluster.disable().unwrap();
    a.key.disable();
    assert_eq!(kind(cluster.retry()), ErrorKind::Disabled);
    a.key.unreachable();
    cluster.retry().unwrap();
    opens(&cipher, &page, 1).unwrap();
}

#[test]
fn operations_in_flight_end_whole_while_a_cluster_is_disabled_and_brought_back_again_and_again() {
    const ROUNDS: usize = 40;
    let handles = Handles::new(Hierarchy::Direct);
    let Handles { cluster, cipher, file, database, .. } = &handles;
    // For the control: what a cluster looks like that loses everything made from here on.
    let forgetful = House::new();
    copy_directory(&handles.house.directory(), &forgetful.directory());
    let stop = AtomicBool::new(false);
    let [done, refused] = [const { AtomicU64::new(0) }; 2];
    let count = |outcome: Result<(), Error>| match outcome {
        Ok(()) => done.fetch_add(1, Ordering::Relaxed),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Closed, "{error}");
            refused.fetch_add(1, Ordering::Relaxed)
        }
    };
    let mut made = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                let mut page = vec![5; 4096];
                let sealed = cipher.seal_in_place(&AT, &mut page);
                if sealed.is_ok() {
                    count(opens(cipher, &page, 5).map_err(Error::from));
                }
                count(sealed.map_err(Error::from));
            }
        });
        scope.spawn(|| {
            let mut pages = vec![vec![0; 64 + OVERHEAD]; 400];
            while !stop.load(Ordering::Relaxed) {
                pages.iter_mut().for_each(|page| page.fill(6));
                let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(AT, page)).collect();
                let failed = cipher.seal_batch(Threads::shared(), &mut jobs);
                assert!(failed == 0 || failed == 400, "{failed} of 400 pages of one batch were refused");
                count(jobs[0].result().map_err(Error::from));
            }
        });
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                count(append(file, 7).map(drop));
                count(read(file, 0).map(drop));
            }
        });
        let creating = scope.spawn(|| {
            let mut made = 0;
            while !stop.load(Ordering::Relaxed) {
                let outcome = cluster.create_database(&format!("n{made}"));
                // Durable before it was refused: as after any failure, one looks whether it is there.
                match outcome {
                    Err(error) if error.kind() == ErrorKind::AlreadyExists => made += 1,
                    outcome => {
                        made += u64::from(outcome.is_ok());
                        count(outcome.map(drop));
                    }
                }
                count(database.rotate().map(drop));
            }
            made
        });
        for round in 0..ROUNDS {
            std::thread::sleep(Duration::from_millis(2 + round as u64 % 7));
            cluster.disable().unwrap();
            assert_eq!(opens(cipher, &handles.page, 1), Err(PageError::Disabled));
            cluster.retry().unwrap();
            opens(cipher, &handles.page, 1).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
        made = creating.join().unwrap();
    });
    let (done, refused) = (done.into_inner(), refused.into_inner());
    // What was acknowledged is there.
    let reopened = handles.house.open(&handles.key).unwrap();
    let missing_in = |cluster: &Cluster| {
        let names = cluster.databases().unwrap();
        (0..made).filter(|number| !names.contains(&format!("n{number}"))).count()
    };
    let missing = missing_in(&reopened);
    for page in 1..file.pages() {
        assert_eq!(read(file, page).unwrap(), 7);
    }
    let newest = seal(cipher, 8);
    opens(&reopened.database("d").unwrap().cipher().unwrap(), &newest, 8).unwrap();
    let control = missing_in(&forgetful.open(&handles.key).unwrap()) > 0;
    score(&format!(
        "disabled-under-load rounds={ROUNDS} done={done} refused={refused} lost={missing} control={}",
        u8::from(control)
    ));
    assert_eq!(missing, 0);
    assert!(done > 100 && refused > 100, "the gate and the operations did not meet");
    assert!(control, "what is lost was not noticed");
}
