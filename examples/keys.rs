//! The life of a cluster's keys: rotation, another master key, another hierarchy, a second process, the gate, shredding,
//! and the way back from a lost keystore.
//!
//! `cargo run --release --example keys`

use std::error::Error;
use std::path::{Path, PathBuf};
use std::{env, fs};

use pageseal::{
    Cluster, ClusterOptions, FileId, Hierarchy, LocalKeyFile, PageCipher, PageContext, PageFileOptions, Progress,
    Wrappers,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let dir = Scratch::new()?;
    let (old_key, new_key) = (dir.path("old.key"), dir.path("new.key"));
    let home = dir.path("cluster");

    say("create", "a cluster under old.key, with a database, a cipher and a page file");
    let cluster = Cluster::create(&home, ClusterOptions::new(), Wrappers::one(LocalKeyFile::create(&old_key)?))?;
    let orders = cluster.create_database("orders")?;
    let cipher = orders.cipher()?;
    let first = seal(&cipher, b"sealed under generation 1")?;
    orders.create_page_file("table", PageFileOptions::new())?;

    let generation = orders.rotate()?;
    let second = seal(&cipher, b"sealed under generation 2")?;
    say("rotate", &format!("new seals use generation {generation}; old pages open: {:?}", open(&cipher, &first)?));

    match orders.destroy_generation(pageseal::Generation::FIRST) {
        Ok(_) => return Err("a key that is needed was destroyed".into()),
        Err(refused) => say("destroy", &format!("refused: {refused}")),
    }

    let new = LocalKeyFile::create(&new_key)?;
    cluster.rewrap(Wrappers::one(new), &|Progress { done, total, .. }| {
        say("rewrap", &format!("{done} of {total} keys"))
    })?;
    fs::remove_file(&old_key)?;
    cluster.check_master_key()?;
    say("rewrap", "the cluster is under new.key; old.key was removed, and nothing misses it");

    cluster.set_hierarchy(Hierarchy::ClusterKey, &|_| ())?;
    cluster.replace_cluster_key()?;
    say("hierarchy", &format!("{:?}: one call to the key service opens every database", cluster.hierarchy()));

    let other = Cluster::open(&home, ClusterOptions::new().expected_id(cluster.id()), wrappers(&new_key))?;
    let same = other.database("orders")?.cipher()?;
    say("share", &format!("a second handle, as another process has it, reads {:?}", open(&same, &second)?));

    cluster.disable()?;
    say(
        "disable",
        &format!("{}", cipher.open_in_place(&context(), &mut second.clone()).expect_err("the gate is closed")),
    );
    cluster.retry()?;
    say("retry", &format!("the same cipher reads {:?}", open(&cipher, &second)?));

    let safe = dir.path("keys.export");
    cluster.export(&safe)?;
    drop((same, other, cipher, orders, cluster));
    fs::remove_file(home.join("keystore"))?;
    fs::remove_file(home.join("keystore.copy"))?;
    let cluster = Cluster::import(&home, &safe, ClusterOptions::new(), wrappers(&new_key))?;
    let cipher = cluster.database("orders")?.cipher()?;
    say(
        "import",
        &format!("both copies of the keystore were lost, the export brought back {:?}", open(&cipher, &first)?),
    );

    say("drop", &format!("{}", cluster.drop_database("orders")?));
    say("drop", &format!("{}", cipher.open_in_place(&context(), &mut second.clone()).expect_err("the keys are gone")));
    Ok(())
}

fn wrappers(key: &Path) -> Wrappers {
    Wrappers::one(LocalKeyFile::new(key))
}

fn context() -> PageContext {
    PageContext::page(FileId::new(1), 42)
}

fn seal(cipher: &PageCipher, text: &[u8]) -> Result<Vec<u8>> {
    let mut page = vec![0; 4096];
    page[..text.len()].copy_from_slice(text);
    cipher.seal_in_place(&context(), &mut page)?;
    Ok(page)
}

fn open(cipher: &PageCipher, page: &[u8]) -> Result<String> {
    let mut page = page.to_vec();
    cipher.open_in_place(&context(), &mut page)?;
    Ok(String::from_utf8_lossy(&page[..25]).into_owned())
}

fn say(step: &str, what: &str) {
    println!("{step:<10} {what}");
}

/// A directory that goes with the program.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let directory = env::temp_dir().join(format!("pageseal-keys-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        Ok(Self(directory))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
