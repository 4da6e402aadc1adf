//! The keystore's promises. Its bytes and their damage are in [`bytes`], the two copies in [`copies`], changes and other
//! processes in [`changes`], what a disk does in [`disks`].

mod bytes;
mod changes;
mod copies;
mod disks;

use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock};

use super::*;
use crate::format::keystore::{KeyUse, OwnerId, OwnerKind, SealedName};
use crate::format::record::KeyState;
use crate::format::record::tests::{cluster_record, data_record};
use crate::format::wrapped::Purpose;
use crate::ids::{DatabaseId, Generation};
use crate::keys::store::{FileStore, MemoryStore};
use crate::secret::SecretKey;
use crate::storage::disk::simulated::{Broken, SimulatedDisk};
use crate::storage::locks::LockFile;

const SEQUENCE: u64 = 40;

static MAC: LazyLock<HmacKey> = LazyLock::new(|| mac_key(7));

fn mac_key(byte: u8) -> HmacKey {
    let key = SecretKey::fill_with(|out| {
        out.fill(byte);
        Ok::<(), Error>(())
    });
    HmacKey::new(&key.unwrap()).unwrap()
}

fn header() -> Header {
    Header {
        hierarchy: Hierarchy::Direct,
        cluster: ClusterId::from_bytes([0xc1; 16]),
        sequence: SEQUENCE,
        whole: SEQUENCE,
        record: cluster_record(Purpose::Cluster),
    }
}

fn id(database: u8) -> DatabaseId {
    DatabaseId::from_bytes([database; 16])
}

fn generation(number: u32) -> Generation {
    Generation::new(number).unwrap()
}

fn name(byte: u8) -> SealedName {
    SealedName { lookup: [byte; 32], sealed: vec![byte; 20] }
}

/// A database and its first data key.
fn new_database(byte: u8) -> Vec<Operation> {
    vec![Operation::Database { database: id(byte), name: name(byte) }, Operation::Generation(data_record(byte, 1))]
}

fn key_use(database: u8, owner: u8, oldest: u32) -> KeyUse {
    KeyUse {
        kind: OwnerKind::PageFile,
        owner: OwnerId([owner; 16]),
        database: id(database),
        oldest: generation(oldest),
        name: Some(name(owner)),
    }
}

/// A small history of four groups, of one sector and of several.
fn history() -> Vec<Vec<Operation>> {
    let long = SealedName { lookup: [0x51; 32], sealed: vec![0x52; 500] };
    let external = KeyUse { kind: OwnerKind::External, owner: OwnerId([0; 16]), name: None, ..key_use(1, 0, 2) };
    vec![
        vec![Operation::Probe(cluster_record(Purpose::Probe))],
        new_database(1),
        vec![
            Operation::KeyUseAdd(KeyUse { name: Some(long), ..key_use(1, 9, 1) }),
            Operation::Generation(data_record(1, 2)),
        ],
        vec![Operation::KeyUseAdd(external)],
    ]
}

/// As [`history`], and behind it a group for each other kind of operation.
fn every_kind() -> Vec<Vec<Operation>> {
    let (database, kind, owner) = (id(1), OwnerKind::PageFile, OwnerId([9; 16]));
    let mut rewrapped = data_record(1, 2);
    rewrapped.wrappings[0].key_version = "v3".to_owned();
    let mut all = history();
    all.extend([
        vec![Operation::Rename { database, name: name(4) }],
        vec![Operation::State { database, generation: generation(1), state: KeyState::Retired }],
        vec![Operation::KeyUseRaise { kind, owner, database, oldest: generation(2) }],
        vec![Operation::State { database, generation: generation(1), state: KeyState::Destroyed }],
        vec![Operation::Wrapping(rewrapped)],
        vec![Operation::KeyUseRelease { kind, owner, database }],
        new_database(2),
        vec![Operation::Drop { database: id(2) }, Operation::Rename { database, name: name(5) }],
    ]);
    all
}

type Copies = [Option<Vec<u8>>; 2];

fn both(bytes: &[u8]) -> Copies {
    [Some(bytes.to_vec()), Some(bytes.to_vec())]
}

fn alone(bytes: &[u8]) -> Copies {
    [Some(bytes.to_vec()), None]
}

fn open(copies: Copies) -> Result<Keystore> {
    open_store(Arc::new(MemoryStore::with(copies)))
}

fn open_store(store: Arc<dyn KeystoreStore>) -> Result<Keystore> {
    UnverifiedKeystore::read(store)?.verify(&MAC)
}

fn create(store: Arc<dyn KeystoreStore>, first: Vec<Operation>) -> Result<Keystore> {
    Keystore::create(store, header(), first, &MAC)
}

fn read(store: &dyn KeystoreStore) -> Copies {
    [0, 1].map(|which| store.read(which).unwrap().map(|(_, bytes)| bytes))
}

fn error_of<T>(result: Result<T>) -> Error {
    result.err().expect("this must be refused")
}

/// Another catalogue with the same content, made of the operations that a rewrite would write.
fn copy(catalogue: &Catalogue) -> Catalogue {
    let mut copy = Catalogue::default();
    copy.apply(catalogue.operations().flatten()).unwrap();
    copy.keep();
    copy
}

/// A keystore file with these groups, the offsets where its groups begin and it ends, and the catalogue after each.
struct File {
    bytes: Vec<u8>,
    ends: Vec<usize>,
    catalogues: Vec<Catalogue>,
}

impl File {
    fn new(groups: Vec<Vec<Operation>>) -> Self {
        let store = Arc::new(MemoryStore::default());
        let mut keystore = create(store.clone(), Vec::new()).unwrap();
        let mut file =
            Self { bytes: Vec::new(), ends: vec![keystore.tip.end], catalogues: vec![copy(keystore.catalogue())] };
        for operations in groups {
            keystore.append(&MAC, operations).unwrap();
            file.ends.push(keystore.tip.end);
            file.catalogues.push(copy(keystore.catalogue()));
        }
        let [first, second] = read(&*store);
        assert_eq!(first, second);
        file.bytes = first.unwrap();
        file
    }

    /// How many groups this catalogue is the sum of.
    fn position(&self, catalogue: &Catalogue) -> Option<usize> {
        self.catalogues.iter().position(|known| known == catalogue)
    }

    fn groups(&self) -> usize {
        self.catalogues.len() - 1
    }

    /// 0 for the header, else the number of the group that has this byte, from 1.
    fn part_of(&self, at: usize) -> usize {
        self.ends.iter().position(|&end| at < end).unwrap()
    }

    fn group(&self, index: usize) -> &[u8] {
        &self.bytes[self.ends[index]..self.ends[index + 1]]
    }

    fn header(&self) -> &[u8] {
        &self.bytes[..self.ends[0]]
    }

    /// Its bytes with one of them changed.
    fn flipped(&self, at: usize, change: u8) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes[at] ^= change;
        bytes
    }
}

type ReadError = fn() -> io::Error;

/// A store in memory that another one can be put in the place of, which counts what is read, and whose mark can be set.
#[derive(Default)]
struct Watched {
    inner: RwLock<MemoryStore>,
    whole_reads: AtomicUsize,
    unfinished: AtomicBool,
    refusing: AtomicBool,
    kept: Mutex<Vec<Vec<u8>>>,
    replaced: Mutex<Vec<Vec<u8>>>,
    /// How reading each copy fails. What is moved aside, or made anew, is another file.
    read_errors: Mutex<[Option<ReadError>; 2]>,
    moved: Mutex<Vec<(usize, Aside)>>,
}

impl Watched {
    fn with(copies: Copies) -> Arc<Self> {
        let store = Self::default();
        *store.inner.write().unwrap() = MemoryStore::with(copies);
        Arc::new(store)
    }

    fn fail_read(&self, copy: usize) -> io::Result<()> {
        self.read_errors.lock().unwrap()[copy].map_or(Ok(()), |error| Err(error()))
    }

    fn write<R>(&self, write: impl FnOnce(&MemoryStore) -> io::Result<R>) -> io::Result<R> {
        if self.refusing.load(Ordering::Relaxed) {
            return Err(io::Error::other("refused by the test"));
        }
        let written = write(&self.inner.read().unwrap());
        self.unfinished.store(false, Ordering::Relaxed);
        written
    }
}

impl KeystoreStore for Watched {
    fn name(&self, copy: usize) -> String {
        format!("watched, copy {copy}")
    }

    fn versions(&self) -> io::Result<Versions> {
        self.inner.read().unwrap().versions()
    }

    fn read(&self, copy: usize) -> io::Result<Option<(Version, Vec<u8>)>> {
        self.whole_reads.fetch_add(1, Ordering::Relaxed);
        self.fail_read(copy)?;
        self.inner.read().unwrap().read(copy)
    }

    fn holds(&self, copy: usize, bytes: &[u8]) -> Option<Version> {
        self.fail_read(copy).ok()?;
        self.inner.read().unwrap().holds(copy, bytes)
    }

    fn read_from(&self, at: u64) -> io::Result<Vec<u8>> {
        self.fail_read(0)?;
        self.inner.read().unwrap().read_from(at)
    }

    fn create(&self, bytes: &[u8]) -> io::Result<Versions> {
        self.write(|store| store.create(bytes))
    }

    fn append(&self, expected: &Versions, bytes: &[u8], durability: Durability) -> io::Result<Versions> {
        self.write(|store| store.append(expected, bytes, durability))
    }

    fn replace(&self, expected: &Versions, bytes: &[u8]) -> io::Result<Versions> {
        self.write(|store| store.replace(expected, bytes))
    }

    fn keep_aside(&self, bytes: &[u8], why: Aside, _: u64) -> io::Result<()> {
        let kept = if why == Aside::Damaged { &self.kept } else { &self.replaced };
        kept.lock().unwrap().push(bytes.to_vec());
        Ok(())
    }

    fn move_aside(&self, copy: usize, why: Aside, number: u64) -> io::Result<()> {
        self.moved.lock().unwrap().push((copy, why));
        self.read_errors.lock().unwrap()[copy] = None;
        self.inner.read().unwrap().move_aside(copy, why, number)
    }

    fn remove_strays(&self) -> io::Result<()> {
        self.kept.lock().unwrap().clear();
        Ok(())
    }

    fn is_unfinished(&self) -> Result<bool> {
        Ok(self.unfinished.load(Ordering::Relaxed))
    }
}

/// A directory with a real lock file, removed at the end. The keystore's files are on a simulated disk.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("pageseal-keystore-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        Self(dir)
    }

    fn locks(&self) -> Arc<LockFile> {
        LockFile::open(&self.0.join("lock")).unwrap()
    }

    fn store(&self, disk: &SimulatedDisk) -> Arc<FileStore> {
        Arc::new(FileStore::new(Arc::new(disk.clone()), dir(), self.locks()))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn dir() -> &'static Path {
    Path::new("/cluster")
}

fn path(copy: usize) -> PathBuf {
    dir().join(crate::keys::store::FILE_NAMES[copy])
}

/// A disk with these bytes in both copies, durably.
fn disk_with(copies: Copies, broken: Broken) -> SimulatedDisk {
    let disk = SimulatedDisk::new(broken);
    for (which, copy) in copies.iter().enumerate() {
        if let Some(bytes) = copy {
            disk.set(&path(which), bytes);
        }
    }
    disk
}
