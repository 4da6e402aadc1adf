//! What one master key that does not answer costs a cluster of many databases, while another one does.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::TempDir;
use pageseal::{Cluster, ClusterOptions, ErrorKind, KeyWrapper, ScriptedWrapper, Wrappers};

const DATABASES: usize = 640;
/// What may be in flight to one master key.
const IN_FLIGHT: u64 = 16;
const TIMEOUT: Duration = Duration::from_millis(600);

fn options() -> ClusterOptions {
    ClusterOptions::new().watched(false).kms_timeout(TIMEOUT)
}

fn all_of(keys: [&ScriptedWrapper; 2]) -> Wrappers {
    Wrappers::any_of(keys.map(|key| Arc::new(key.clone()) as Arc<dyn KeyWrapper>)).unwrap()
}

/// A cluster whose data keys `a` and `b` have both wrapped.
struct Scene {
    temp: TempDir,
    a: ScriptedWrapper,
    b: ScriptedWrapper,
}

impl Scene {
    fn new(databases: usize) -> (Self, Cluster) {
        let scene = Self { temp: TempDir::new(), a: ScriptedWrapper::new("a"), b: ScriptedWrapper::new("b") };
        // Nothing times out while it is made, however slow the machine is.
        let patient = ClusterOptions::new().watched(false);
        let cluster = Cluster::create(&scene.directory(), patient, scene.wrappers()).unwrap();
        for number in 0..databases {
            cluster.create_database(&format!("d{number}")).unwrap();
        }
        (scene, cluster)
    }

    fn directory(&self) -> PathBuf {
        self.temp.join("cluster")
    }

    fn wrappers(&self) -> Wrappers {
        all_of([&self.a, &self.b])
    }

    fn open(&self) -> Cluster {
        Cluster::open(&self.directory(), options(), self.wrappers()).unwrap()
    }
}

fn timed<T>(what: impl FnOnce() -> T) -> (T, Duration) {
    let begun = Instant::now();
    (what(), begun.elapsed())
}

#[test]
fn a_hanging_master_key_costs_a_start_and_a_return_a_few_deadlines_whatever_the_number_of_databases() {
    let (scene, cluster) = Scene::new(DATABASES);
    drop(cluster);
    scene.a.hang();
    let calls = scene.a.calls();
    let (cluster, opening) = timed(|| scene.open());
    let (databases, start) = timed(|| cluster.open_databases().unwrap());
    assert_eq!(databases.len(), DATABASES);
    // Without giving up there would be one for each 32 databases.
    assert!(start < 10 * TIMEOUT && opening < 5 * TIMEOUT, "{opening:?} and {start:?}");
    assert!(scene.a.calls() - calls <= IN_FLIGHT);
    cluster.disable().unwrap();
    let ((), back) = timed(|| cluster.retry().unwrap());
    assert!(back < 10 * TIMEOUT, "{back:?}");
    assert!(databases.iter().all(|database| database.cipher().is_ok()));

    // Another time it is asked anew, and what it says counts.
    cluster.disable().unwrap();
    scene.a.disable();
    assert_eq!(cluster.retry().unwrap_err().kind(), ErrorKind::Disabled);
    scene.a.restore();
    cluster.retry().unwrap();
}

#[test]
fn a_rewrap_away_from_a_hanging_master_key_is_quick_and_hears_a_revocation_before_its_wrappings_go() {
    let (scene, cluster) = Scene::new(DATABASES);
    drop(cluster);
    let cluster = scene.open();
    let c = ScriptedWrapper::new("c");
    let to = || all_of([&scene.b, &c]);
    let outage = |revoked_at_the_end: bool| {
        let progress = |progress: pageseal::Progress| {
            if progress.done == 0 {
                scene.a.hang();
            } else if progress.done == progress.total && revoked_at_the_end {
                scene.a.disable();
            }
        };
        cluster.rewrap(to(), &progress)
    };
    let (outcome, took) = timed(|| outage(true));
    assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Disabled);
    // It would be two for each part of 128 databases.
    assert!(took < 8 * TIMEOUT, "{took:?}");
    scene.a.restore();
    // Its wrappings are still there: alone it opens the cluster.
    drop(Cluster::open(&scene.directory(), options(), Wrappers::one(scene.a.clone())).unwrap());
    outage(false).unwrap();
    drop(cluster);
    scene.a.restore();
    let alone = Cluster::open(&scene.directory(), options(), Wrappers::one(scene.a.clone()));
    assert_eq!(alone.map(drop).unwrap_err().kind(), ErrorKind::Misconfigured);
    for key in [&scene.b, &c] {
        let cluster = Cluster::open(&scene.directory(), options(), Wrappers::one(key.clone())).unwrap();
        assert_eq!(cluster.open_databases().unwrap().len(), DATABASES);
    }
}
