//! What the proofs about the life of a cluster share: a directory, master keys that remember and fail as they are told, and
//! ways to look into every file of the directory.
// Each test binary uses a part of it.
#![allow(dead_code)]

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use pageseal::{
    Cluster, ClusterOptions, Database, DatabaseId, Error, ErrorKind, FileId, Generation, Inline, KeyPayload,
    KeyWrapper, KmsClass, KmsError, MasterKeyId, PageCipher, PageContext, PageError, PageFile, PageFileOptions,
    Purpose, ScriptedWrapper, WrapContext, WrappedKey, Wrappers,
};

use super::common::{TempDir, generation};

pub const AT: PageContext = PageContext::page(FileId::new(1), 1);

/// No thread changes anything behind the test's back, and a key service that does not answer is not waited for.
pub fn quick() -> ClusterOptions {
    ClusterOptions::new().watched(false).kms_timeout(Duration::from_millis(300))
}

pub fn kind<T>(outcome: Result<T, Error>) -> ErrorKind {
    match outcome {
        Ok(_) => panic!("it should have been refused"),
        Err(error) => error.kind(),
    }
}

/// Several master keys as one.
pub fn all_of(keys: &[&Recorder]) -> Wrappers {
    Wrappers::any_of(keys.iter().map(|&key| Arc::new(key.clone()) as Arc<dyn KeyWrapper>)).unwrap()
}

/// A directory with a cluster in it, or without.
pub struct House(pub TempDir);

impl House {
    pub fn new() -> Self {
        Self(TempDir::new())
    }

    pub fn directory(&self) -> PathBuf {
        self.0.join("cluster")
    }

    pub fn copies(&self) -> [PathBuf; 2] {
        ["keystore", "keystore.copy"].map(|name| self.directory().join(name))
    }

    /// Both copies as they are.
    pub fn keystore(&self) -> [Vec<u8>; 2] {
        self.copies().map(|path| fs::read(path).unwrap())
    }

    pub fn put_keystore(&self, copies: &[Vec<u8>; 2]) {
        for (path, bytes) in self.copies().iter().zip(copies) {
            fs::write(path, bytes).unwrap();
        }
    }

    pub fn create(&self, options: ClusterOptions, key: &Recorder) -> Cluster {
        Cluster::create(&self.directory(), options, Wrappers::one(key.clone())).unwrap()
    }

    pub fn open(&self, key: &Recorder) -> Result<Cluster, Error> {
        self.open_with(Wrappers::one(key.clone()))
    }

    pub fn open_with(&self, wrappers: Wrappers) -> Result<Cluster, Error> {
        Cluster::open(&self.directory(), quick(), wrappers)
    }

    /// Every file of the directory, and what is in it.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        let mut folders = vec![self.directory()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let bytes = fs::read(&path).unwrap();
                    files.push((path, bytes));
                }
            }
        }
        files
    }

    /// The files of the directory that hold these bytes.
    pub fn holding(&self, needle: &[u8]) -> Vec<PathBuf> {
        self.files().into_iter().filter(|(_, bytes)| contains(bytes, needle)).map(|(path, _)| path).collect()
    }

    /// How many of these blobs, of 16 bytes or more, are in any file.
    pub fn left_of(&self, blobs: &[Vec<u8>]) -> usize {
        let mut begun: HashMap<&[u8], Vec<&[u8]>> = HashMap::new();
        blobs.iter().for_each(|blob| begun.entry(&blob[..16]).or_default().push(blob));
        let mut found = HashSet::new();
        for (_, bytes) in self.files() {
            for (at, window) in bytes.windows(16).enumerate() {
                let here = begun.get(window).into_iter().flatten().filter(|blob| bytes[at..].starts_with(blob));
                found.extend(here.copied());
            }
        }
        found.len()
    }
}

pub fn contains(bytes: &[u8], needle: &[u8]) -> bool {
    needle.is_empty() || bytes.windows(needle.len()).any(|window| window == needle)
}

/// What a keystore tells of a database, in pieces of which there is one each: bytes that look random, from where its id
/// stands to the end of its group.
pub fn traces(keystore: &[u8], id: DatabaseId) -> Vec<Vec<u8>> {
    let id = id.to_bytes();
    let mut pieces = BTreeSet::from([id.to_vec()]);
    for at in (0..keystore.len() - 16).filter(|&at| keystore[at..at + 16] == id) {
        // The next group begins on a sector, and nothing else is on it before.
        let end = (at / 512 + 1) * 512;
        for piece in keystore[at..end.min(keystore.len())].chunks_exact(32) {
            if piece.iter().collect::<BTreeSet<_>>().len() >= 24 {
                pieces.insert(piece.to_vec());
            }
        }
    }
    pieces.into_iter().collect()
}

/// A sealed page of `byte`s.
pub fn seal(cipher: &PageCipher, byte: u8) -> Vec<u8> {
    let mut page = vec![byte; 4096];
    cipher.seal_in_place(&AT, &mut page).unwrap();
    page
}

/// Whether it opens; if it does, it holds `byte`s.
pub fn opens(cipher: &PageCipher, page: &[u8], byte: u8) -> Result<(), PageError> {
    let mut page = page.to_vec();
    cipher.open_in_place(&AT, &mut page)?;
    assert!(page[..4048].iter().all(|got| *got == byte), "a page opened, and holds something else");
    Ok(())
}

/// The generation that a sealed page names.
pub fn generation_of(page: &[u8]) -> Generation {
    let at = page.len() - 4;
    generation(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], 0]))
}

pub fn append(file: &PageFile, byte: u8) -> Result<u64, Error> {
    let mut appender = file.append()?;
    appender.write(&Inline, &vec![byte; file.payload_len()])?;
    appender.finish()
}

pub fn read(file: &PageFile, page: u64) -> Result<u8, Error> {
    let mut payload = vec![0; file.payload_len()];
    assert_eq!(file.read(page, &mut payload)?, pageseal::Read::Page);
    Ok(payload[0])
}

pub fn small_file(database: &Database, name: &str) -> PageFile {
    database.create_page_file(name, PageFileOptions::new().page_size(512)).unwrap()
}

/// A wrapping that a master key made.
#[derive(Clone)]
pub struct Wrapping {
    pub purpose: Purpose,
    pub database: Option<DatabaseId>,
    pub generation: Generation,
    pub blob: Vec<u8>,
}

/// A scripted master key that remembers what it wrapped, and fails from its n-th call on. Clones are one and the same.
#[derive(Clone)]
pub struct Recorder {
    pub key: ScriptedWrapper,
    wrappings: Arc<Mutex<Vec<Wrapping>>>,
    /// The calls that are left before it fails.
    left: Arc<AtomicI64>,
    class: Arc<Mutex<KmsClass>>,
}

impl Recorder {
    pub fn new(name: &str) -> Self {
        Self::over(ScriptedWrapper::new(name))
    }

    pub fn over(key: ScriptedWrapper) -> Self {
        let class = Arc::new(Mutex::new(KmsClass::Denied));
        Self { key, wrappings: Arc::default(), left: Arc::new(AtomicI64::new(i64::MAX)), class }
    }

    /// It answers `calls` calls, and then every one with this failure, until [`Recorder::mend`].
    pub fn fail_after(&self, calls: i64, class: KmsClass) {
        *self.class.lock().unwrap() = class;
        self.left.store(calls, Ordering::SeqCst);
    }

    /// Whether it failed since [`Recorder::fail_after`]; works again.
    pub fn mend(&self) -> bool {
        self.left.swap(i64::MAX, Ordering::SeqCst) < 0
    }

    fn call(&self) -> Result<(), KmsError> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        self.left.fetch_min(-1, Ordering::SeqCst);
        Err(KmsError::with_source(*self.class.lock().unwrap(), "as the test wants it"))
    }

    fn record(&self, wrapped: WrappedKey, cx: &WrapContext<'_>) -> WrappedKey {
        let (purpose, database, generation) = (cx.purpose, cx.database, cx.generation);
        self.wrappings.lock().unwrap().push(Wrapping { purpose, database, generation, blob: wrapped.blob.clone() });
        wrapped
    }

    pub fn wrappings(&self) -> Vec<Wrapping> {
        self.wrappings.lock().unwrap().clone()
    }

    pub fn blobs(&self) -> Vec<Vec<u8>> {
        self.wrappings().into_iter().map(|wrapping| wrapping.blob).collect()
    }

    /// The wrappings of one data key.
    pub fn blobs_of(&self, database: DatabaseId, number: Generation) -> Vec<Vec<u8>> {
        let of = |it: &Wrapping| it.database == Some(database) && it.generation == number;
        self.wrappings().into_iter().filter(of).map(|wrapping| wrapping.blob).collect()
    }
}

impl KeyWrapper for Recorder {
    fn id(&self) -> MasterKeyId {
        self.key.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.call()?;
        Ok(self.record(self.key.wrap_key(key, cx)?, cx))
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.call()?;
        self.key.unwrap_key(key, cx)
    }

    fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.call()?;
        Ok(self.record(self.key.rewrap_key(key, cx)?, cx))
    }

    fn wrapping_is_public(&self) -> bool {
        self.key.wrapping_is_public()
    }
}

/// Databases with a page each, and the pages.
pub struct Filled {
    pub names: Vec<String>,
    pub pages: Vec<Vec<u8>>,
}

impl Filled {
    pub fn new(cluster: &Cluster, databases: u8) -> Self {
        let names: Vec<_> = (0..databases).map(|number| format!("d{number}")).collect();
        let page =
            |(number, name): (u8, &String)| seal(&cluster.create_database(name).unwrap().cipher().unwrap(), number);
        let pages = (0..).zip(&names).map(page).collect();
        Self { names, pages }
    }

    /// Every database opens, and every page in it.
    pub fn check(&self, cluster: &Cluster) -> Result<(), Error> {
        let names = cluster.databases()?;
        assert!(self.names.iter().all(|name| names.contains(name)), "{names:?}");
        for ((name, page), number) in self.names.iter().zip(&self.pages).zip(0..) {
            opens(&cluster.database(name)?.cipher()?, page, number)?;
        }
        Ok(())
    }
}

type Call = Box<dyn FnOnce() + Send>;

/// In which call of a master key something is done.
#[derive(Clone, Copy, PartialEq)]
enum When {
    Any,
    Data,
    Wrap,
}

/// A master key that does something in the middle of its next call, once.
#[derive(Clone)]
pub struct Hooked {
    pub key: Recorder,
    next: Arc<Mutex<Option<(When, Call)>>>,
}

impl Hooked {
    pub fn new(name: &str) -> Self {
        Self { key: Recorder::new(name), next: Arc::default() }
    }

    pub fn arm(&self, call: impl FnOnce() + Send + 'static) {
        *self.next.lock().unwrap() = Some((When::Any, Box::new(call)));
    }

    /// In the next call about a data key.
    pub fn arm_for_data(&self, call: impl FnOnce() + Send + 'static) {
        *self.next.lock().unwrap() = Some((When::Data, Box::new(call)));
    }

    /// In the next call that wraps a key.
    pub fn arm_for_wrap(&self, call: impl FnOnce() + Send + 'static) {
        *self.next.lock().unwrap() = Some((When::Wrap, Box::new(call)));
    }

    pub fn is_armed(&self) -> bool {
        self.next.lock().unwrap().is_some()
    }

    pub fn fire(&self, cx: &WrapContext<'_>) {
        self.fire_if(|when| match when {
            When::Any => cx.purpose != Purpose::Probe,
            When::Data => cx.purpose == Purpose::Data,
            When::Wrap => false,
        });
    }

    fn fire_if(&self, wanted: impl Fn(When) -> bool) {
        let call = self.next.lock().unwrap().take_if(|(when, _)| wanted(*when));
        if let Some((_, call)) = call {
            call();
        }
    }
}

impl KeyWrapper for Hooked {
    fn id(&self) -> MasterKeyId {
        self.key.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.fire(cx);
        self.fire_if(|when| when == When::Wrap);
        self.key.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.fire(cx);
        self.key.unwrap_key(key, cx)
    }
}
