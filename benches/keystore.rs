//! What a cluster's keystore costs: creating a database, opening a cluster (which verifies its keystore), opening all of its
//! databases. The keystore is in memory, so that no disk is measured.
//!
//! ```text
//! cargo bench -p pageseal-benches --bench keystore -- 'verify'
//! ```

use std::path::PathBuf;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pageseal::testing::{Broken, SimulatedDisk};
use pageseal::{Cluster, ClusterOptions, Error, Hierarchy, ScriptedWrapper, Wrappers};

const SIZES: [usize; 2] = [100, 10_000];
const HIERARCHIES: [(&str, Hierarchy); 2] = [("direct", Hierarchy::Direct), ("cluster-key", Hierarchy::ClusterKey)];

criterion_group!(keystore, all);
criterion_main!(keystore);

fn all(criterion: &mut Criterion) {
    for (name, hierarchy) in HIERARCHIES {
        for databases in SIZES {
            let measured = measure(criterion, name, hierarchy, databases);
            measured.expect("a keystore in memory and a key service that works give no errors");
        }
    }
}

fn measure(criterion: &mut Criterion, name: &str, hierarchy: Hierarchy, databases: usize) -> Result<(), Error> {
    let place = Place::new(hierarchy, databases)?;
    let mut group = criterion.benchmark_group("keystore");
    group.sample_size(20);
    // Each creation makes the keystore longer: it is the creation after so many that is measured, roughly.
    let cluster = place.open()?;
    let mut number = databases;
    group.bench_function(BenchmarkId::new(format!("create/{name}"), databases), |bencher| {
        bencher.iter(|| {
            number += 1;
            cluster.create_database(&format!("database {number}"))
        });
    });
    drop((cluster, place));
    let place = Place::new(hierarchy, databases)?;
    group.throughput(Throughput::Elements(databases as u64));
    group.bench_function(BenchmarkId::new(format!("verify/{name}"), databases), |bencher| {
        bencher.iter_with_large_drop(|| place.open());
    });
    group.bench_function(BenchmarkId::new(format!("open_databases/{name}"), databases), |bencher| {
        bencher.iter_batched(|| place.open(), |cluster| cluster?.open_databases(), BatchSize::PerIteration);
    });
    group.finish();
    Ok(())
}

/// A cluster in a directory of its own, which goes with it.
struct Place {
    path: PathBuf,
    disk: SimulatedDisk,
    key: ScriptedWrapper,
}

impl Place {
    fn new(hierarchy: Hierarchy, databases: usize) -> Result<Self, Error> {
        let path = std::env::temp_dir().join(format!("pageseal-bench-keystore-{}", std::process::id()));
        let place = Self { path, disk: SimulatedDisk::new(Broken::No), key: ScriptedWrapper::new("bench") };
        let cluster =
            Cluster::create(&place.path, place.options().hierarchy(hierarchy), Wrappers::one(place.key.clone()))?;
        for number in 0..databases {
            cluster.create_database(&format!("database {number}"))?;
        }
        Ok(place)
    }

    fn options(&self) -> ClusterOptions {
        ClusterOptions::new().keystore_disk(&self.disk).watched(false)
    }

    fn open(&self) -> Result<Cluster, Error> {
        Cluster::open(&self.path, self.options(), Wrappers::one(self.key.clone()))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
