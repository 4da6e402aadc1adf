//! What each operation costs in calls to the key service, as docs/KMS.md says.

use std::path::{Path, PathBuf};
use std::{env, fs, process};

use pageseal::{Cluster, ClusterOptions, Hierarchy, PageContext, ScriptedWrapper, Wrappers};

struct Place(PathBuf);

impl Place {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("pageseal-costs-{name}-{}", process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The calls that `f` makes, in words.
fn calls<T>(key: &ScriptedWrapper, f: impl FnOnce() -> T) -> (T, String) {
    let before = (key.wraps(), key.unwraps(), key.rewraps());
    let out = f();
    let made =
        [(key.wraps() - before.0, "wrap"), (key.unwraps() - before.1, "unwrap"), (key.rewraps() - before.2, "rewrap")];
    let words: Vec<String> = made
        .iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}{}", if *count == 1 { "" } else { "s" }))
        .collect();
    (out, if words.is_empty() { "0".into() } else { words.join(", ") })
}

/// Every row of the table, for one hierarchy, with one database of one generation.
fn costs(name: &str, hierarchy: Hierarchy) -> Vec<(&'static str, String)> {
    let place = Place::new(name);
    let key = ScriptedWrapper::new("costs");
    let options = || ClusterOptions::new().hierarchy(hierarchy).watched(false);
    let directory = place.0.join("cluster");
    let wrappers = || Wrappers::one(key.clone());
    let mut rows = Vec::new();
    let (cluster, cost) = calls(&key, || Cluster::create(&directory, options(), wrappers()).unwrap());
    rows.push(("create a cluster", cost));
    let (database, cost) = calls(&key, || cluster.create_database("orders").unwrap());
    rows.push(("create a database", cost));
    let (_, cost) = calls(&key, || {
        let cipher = database.cipher().unwrap();
        let mut page = vec![1; 4096];
        cipher.seal_in_place(&PageContext::unbound(), &mut page).unwrap();
        cipher.open_in_place(&PageContext::unbound(), &mut page).unwrap();
    });
    rows.push(("seal and open a page", cost));
    drop(database);
    let id = cluster.id();
    drop(cluster);
    let (cluster, cost) = calls(&key, || Cluster::open(&directory, options().expected_id(id), wrappers()).unwrap());
    rows.push(("open a cluster", cost));
    let (database, cost) = calls(&key, || cluster.database("orders").unwrap());
    rows.push(("open a database of one generation", cost));
    rows.push(("check the master key", calls(&key, || cluster.check_master_key().unwrap()).1));
    // The usual reason to rewrap.
    key.rotate();
    rows.push((
        "rewrap after a rotation at the service, with one data key",
        calls(&key, || cluster.rewrap(wrappers(), &|_| {}).unwrap()).1,
    ));
    rows.push(("rotate a data key", calls(&key, || database.rotate().unwrap()).1));
    rows
}

#[test]
fn each_operation_costs_the_calls_that_the_page_says() {
    let direct = costs("direct", Hierarchy::Direct);
    let cluster_key = costs("cluster-key", Hierarchy::ClusterKey);
    let page = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/KMS.md")).unwrap();
    let rows = direct.iter().zip(&cluster_key);
    let rows: Vec<String> =
        rows.map(|((what, direct), (_, other))| format!("| {what} | {direct} | {other} |")).collect();
    let missing: Vec<&String> = rows.iter().filter(|row| !page.contains(*row)).collect();
    assert!(missing.is_empty(), "docs/KMS.md lacks {missing:#?}; all rows:\n{}", rows.join("\n"));
}
