//! [`Cluster`]: the databases that share a keystore and a master key.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use crate::aead::{AesBackend, check_suite, derive_key};
use crate::database::{Database, DatabaseInner};
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::format::derive::{Info, Label};
use crate::format::keystore::{Header, Hierarchy, Operation, SealedName};
use crate::format::page::Suite;
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, FileId, Generation, SealId};
use crate::keys::calls::WrapRequest;
use crate::keys::keyring::{DataKey, Hold, Keyring};
use crate::keys::keystore::{Keystore, UnverifiedKeystore};
use crate::keys::names::{CLUSTER_SCOPE, NameKeys, check_name};
use crate::keys::payload;
use crate::keys::wrappers::Wrappers;
use crate::page::cipher::{CipherInner, PageCipher};
use crate::page::subkeys::SubkeyCache;
use crate::secret::{KeyPayload, SecretKey};
use crate::storage::disk::make_directories;
use crate::storage::page_file::{self, PageFile};

/// Never renamed or removed, so that all processes lock the same file.
const LOCK_FILE: &str = "lock";

/// How a cluster works. The defaults are right for most.
#[derive(Clone)]
#[non_exhaustive]
pub struct ClusterOptions {
    suite: Suite,
    backend: AesBackend,
    expected_id: Option<ClusterId>,
    kms_timeout: Duration,
    subkey_cache: usize,
    env: Env,
}

impl ClusterOptions {
    /// AES-256-GCM, ten seconds for a call to a key service, 1,024 cached subkeys.
    pub fn new() -> Self {
        Self {
            suite: Suite::Aes256Gcm,
            backend: AesBackend::default(),
            expected_id: None,
            kms_timeout: Duration::from_secs(10),
            subkey_cache: 1024,
            env: Env::system(),
        }
    }

    /// The suite of the databases that will be created. Those that exist keep theirs.
    pub fn suite(mut self, suite: Suite) -> Self {
        self.suite = suite;
        self
    }

    /// The implementation of AES-256-GCM.
    pub fn aes_backend(mut self, backend: AesBackend) -> Self {
        self.backend = backend;
        self
    }

    /// The id of the cluster that must be found. It must come from somewhere else than the cluster's directory: it is what
    /// tells the cluster from one that an attacker put in its place. Mandatory where a public key suffices to wrap.
    pub fn expected_id(mut self, id: ClusterId) -> Self {
        self.expected_id = Some(id);
        self
    }

    /// How long to wait for one call to a key service.
    pub fn kms_timeout(mut self, timeout: Duration) -> Self {
        self.kms_timeout = timeout;
        self
    }

    /// How many subkeys of other sessions are kept, at most 2^20, of about 600 bytes of locked memory each. Reading a page whose subkey
    /// is not kept takes 3 µs longer.
    pub fn subkey_cache(mut self, subkeys: usize) -> Self {
        self.subkey_cache = subkeys.min(1 << 20);
        self
    }

    /// Where keys, salts and fresh bits come from.
    #[cfg(feature = "test-util")]
    pub fn entropy(mut self, entropy: Arc<dyn crate::env::Entropy>) -> Self {
        self.env.entropy = entropy;
        self
    }
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for ClusterOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterOptions")
            .field("suite", &self.suite)
            .field("backend", &self.backend)
            .field("expected_id", &self.expected_id)
            .field("kms_timeout", &self.kms_timeout)
            .field("subkey_cache", &self.subkey_cache)
            .finish_non_exhaustive()
    }
}

/// The databases of one directory: their keystore, and the master keys that wrap their data keys.
///
/// A handle: cloning it is cheap. Key services are called when a cluster or database is created or opened and by
/// [`Cluster::check_master_key`], and at no other time. So far one process at a time can hold a cluster, as long as it
/// keeps any handle of it: of the cluster, a database, a cipher or a page file.
///
/// ```
/// use pageseal::{Cluster, ClusterOptions, LocalKeyFile, Wrappers};
///
/// # let dir = std::env::temp_dir().join(format!("pageseal-doc-cluster-{}", std::process::id()));
/// # std::fs::create_dir_all(&dir)?;
/// let master = LocalKeyFile::create(dir.join("master.key"))?; // For development; use a key service in production.
/// let cluster = Cluster::create(&dir.join("cluster"), ClusterOptions::new(), Wrappers::one(master))?;
/// let id = cluster.id(); // Keep it elsewhere: it tells this cluster from an impostor.
/// cluster.create_database("orders")?;
/// drop(cluster);
///
/// let master = LocalKeyFile::new(dir.join("master.key"));
/// let options = ClusterOptions::new().expected_id(id);
/// let cluster = Cluster::open(&dir.join("cluster"), options, Wrappers::one(master))?;
/// assert_eq!(cluster.databases()?, ["orders"]);
/// # std::fs::remove_dir_all(&dir)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Cluster(Arc<ClusterInner>);

pub(crate) struct ClusterInner {
    pub(crate) id: ClusterId,
    pub(crate) directory: PathBuf,
    pub(crate) options: ClusterOptions,
    pub(crate) names: NameKeys,
    wrappers: Wrappers,
    keystore: Mutex<Keystore>,
    /// The keystore's sequence, for those who note it without taking the keystore's lock.
    pub(crate) sequence: Arc<AtomicU64>,
    /// Ciphers in use, so that there is one set of keys and one session for each database.
    ciphers: Mutex<HashMap<DatabaseId, Weak<CipherInner>>>,
    /// Page files in use, so that there is one writer and one written mark for each.
    files: Mutex<HashMap<FileId, Weak<page_file::Inner>>>,
    subkeys: Arc<SubkeyCache>,
    resumes: Arc<AtomicU64>,
    torn_tail: bool,
    /// Held as long as a handle of the cluster, a database, a cipher or a page file is left.
    lock: Arc<File>,
}

impl Cluster {
    /// Makes a new cluster in `directory`, which is created if need be: draws its keys, wraps them with `wrappers`, and
    /// writes the keystore durably.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if there is a keystore; what the key services answered; [`ErrorKind::Io`].
    pub fn create(directory: &Path, options: ClusterOptions, wrappers: Wrappers) -> Result<Self> {
        check_suite(options.suite)?;
        make_directories(directory).map_err(|error| Error::io(format!("creating {}", directory.display()), error))?;
        let lock = lock(directory)?;
        Keystore::check_absent(directory)?;
        let env = &options.env;
        let identity = payload::random_key(env)?;
        let cluster_key = payload::random_key(env)?;
        let id = payload::cluster_id(&identity)?;
        let generation = Generation::FIRST;
        let cluster_payload = payload::cluster_payload(&cluster_key, &identity, id, generation)?;
        let commitment = payload::cluster_commitment(&cluster_key, id, generation)?;
        let seal = SealId::from_bytes([0; 16]);
        let wrap = |purpose, payload: KeyPayload, commitment| {
            let request = request(&options, id, None, generation, purpose);
            let wrappings = wrappers.wrap(&Arc::new(payload), &request)?.keys;
            let created = (env.now)().as_secs();
            let database = DatabaseId::from_bytes([0; 16]);
            let (suite, state) = (Suite::Aes256Gcm, KeyState::Active);
            Ok::<_, Error>(Record { database, generation, suite, seal, state, purpose, created, commitment, wrappings })
        };
        let record = wrap(Purpose::Cluster, cluster_payload, commitment)?;
        let probe = wrap(Purpose::Probe, payload::probe_payload(env, id)?, [0; 32])?;
        let header = Header { hierarchy: Hierarchy::Direct, cluster: id, sequence: 1, record };
        let mac = derive_key(&identity, &Info::identity(Label::KeystoreMac, id))?;
        let keystore = Keystore::create(directory, header, vec![Operation::Probe(probe)], mac)?;
        Self::assemble(id, directory, options, wrappers, lock, keystore, cluster_key, &identity)
    }

    /// Opens the cluster in `directory`. Nothing in the keystore is believed before the cluster key was unwrapped under one
    /// of `wrappers` and the keystore's MACs were checked with it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without a keystore; [`ErrorKind::InUse`] while another process holds the cluster;
    /// [`ErrorKind::WrongIdentity`] if it is another cluster than expected, before any key service is called; what the key
    /// services answered; [`ErrorKind::Damaged`] or [`ErrorKind::Authentication`] if the keystore is not what was written.
    pub fn open(directory: &Path, options: ClusterOptions, wrappers: Wrappers) -> Result<Self> {
        check_suite(options.suite)?;
        let unverified = UnverifiedKeystore::read(directory)?;
        check_expected(&unverified, directory, &options, &wrappers)?;
        let lock = lock(directory)?;
        // Read again under the lock: whoever held it may have appended.
        let unverified = UnverifiedKeystore::read(directory)?;
        check_expected(&unverified, directory, &options, &wrappers)?;
        let id = unverified.cluster_id();
        let record = unverified.cluster_record().clone();
        let request = request(&options, id, None, record.generation, Purpose::Cluster);
        let accept = |unwrapped: &KeyPayload| payload::accept_cluster(unwrapped, &record, id);
        let (cluster_key, identity) = wrappers.unwrap_with(&record.wrappings, &request, accept)?;
        let mac = derive_key(&identity, &Info::identity(Label::KeystoreMac, id))?;
        let keystore = unverified.verify(mac)?;
        Self::assemble(id, directory, options, wrappers, lock, keystore, cluster_key, &identity)
    }

    #[allow(clippy::too_many_arguments)]
    fn assemble(
        id: ClusterId,
        directory: &Path,
        options: ClusterOptions,
        wrappers: Wrappers,
        lock: File,
        keystore: Keystore,
        cluster_key: SecretKey,
        identity: &SecretKey,
    ) -> Result<Self> {
        let generation = keystore.cluster_record().generation;
        let look_up = derive_key(identity, &Info::identity(Label::Name, id))?;
        let names = NameKeys { cluster: id, look_up, cluster_key, generation };
        let sequence = Arc::new(AtomicU64::new(keystore.sequence()));
        let torn_tail = keystore.has_torn_tail();
        let subkeys = Arc::new(SubkeyCache::new(options.subkey_cache));
        Ok(Self(Arc::new(ClusterInner {
            id,
            directory: directory.to_path_buf(),
            options,
            names,
            wrappers,
            keystore: Mutex::new(keystore),
            sequence,
            ciphers: Mutex::default(),
            files: Mutex::default(),
            subkeys,
            resumes: Arc::default(),
            torn_tail,
            lock: Arc::new(lock),
        })))
    }

    /// The cluster's id. Keep it outside the cluster's directory, and give it to [`ClusterOptions::expected_id`].
    pub fn id(&self) -> ClusterId {
        self.0.id
    }

    /// Makes a new database, with a data key of its own, wrapped and durable before this returns.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::Invalid`] for an empty name, one over 255 bytes, or one with control
    /// characters; what the key services answered; [`ErrorKind::Io`].
    pub fn create_database(&self, name: &str) -> Result<Database> {
        check_name("database", name)?;
        let inner = &self.0;
        let look_up = inner.look_up(name)?;
        let exists = || Error::new(ErrorKind::AlreadyExists, format!("a database named {name:?} exists already"));
        if inner.keystore()?.catalogue().find_database(&look_up).is_some() {
            return Err(exists());
        }
        let env = inner.env();
        let id = DatabaseId::from_bytes(env.random()?);
        let key = DataKey {
            generation: Generation::FIRST,
            suite: inner.options.suite,
            seal: SealId::from_bytes(env.random()?),
            key: payload::random_key(env)?,
        };
        // No lock is held while the key service is called.
        let record = inner.wrap_data_key(&key, id)?;
        let sealed = inner.names.seal(env, &CLUSTER_SCOPE, &id.to_bytes(), name)?;
        let name_on_disk = SealedName { lookup: look_up, sealed };
        let mut keystore = inner.keystore()?;
        if keystore.catalogue().find_database(&look_up).is_some() {
            return Err(exists());
        }
        let new = vec![Operation::Database { database: id, name: name_on_disk }, Operation::Generation(record)];
        inner.append(&mut keystore, new)?;
        drop(keystore);
        inner.adopt(id, name, vec![key])
    }

    /// Opens the database of this name: its data keys are unwrapped, all generations, unless it is open already.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; what the key services answered; [`ErrorKind::WrongIdentity`] or
    /// [`ErrorKind::Authentication`] if a record holds another key than it promises.
    pub fn database(&self, name: &str) -> Result<Database> {
        let inner = &self.0;
        let look_up = inner.look_up(name)?;
        let (id, records) = {
            let keystore = inner.keystore()?;
            let id = keystore.catalogue().find_database(&look_up);
            let id =
                id.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no database named {name:?}")))?;
            (id, keystore.catalogue().generations(id).cloned().collect::<Vec<_>>())
        };
        if let Some(cipher) = inner.opened(id) {
            return Ok(inner.handle(id, name, cipher));
        }
        let keys = records.iter().filter(|record| record.state != KeyState::Destroyed);
        let keys = keys.map(|record| inner.unwrap_data_key(record)).collect::<Result<Vec<_>>>()?;
        inner.adopt(id, name, keys)
    }

    /// The names of all databases, sorted.
    ///
    /// # Errors
    /// [`ErrorKind::Authentication`] if a name is not what was written.
    pub fn databases(&self) -> Result<Vec<String>> {
        let inner = &self.0;
        let sealed: Vec<_> = {
            let keystore = inner.keystore()?;
            keystore.catalogue().databases().map(|(id, name)| (id, name.sealed.clone())).collect()
        };
        let open = |(id, sealed): &(DatabaseId, Vec<u8>)| inner.names.open(&CLUSTER_SCOPE, &id.to_bytes(), sealed);
        let mut names = sealed.iter().map(open).collect::<Result<Vec<_>>>()?;
        names.sort_unstable();
        Ok(names)
    }

    /// Asks the key services, by unwrapping the stored probe, whether the master key can be used now.
    ///
    /// # Errors
    /// The verdict: [`ErrorKind::Disabled`], [`ErrorKind::Deleted`], [`ErrorKind::Denied`], or
    /// [`ErrorKind::Unreachable`], which is none.
    pub fn check_master_key(&self) -> Result<()> {
        let inner = &self.0;
        let probe = inner.keystore()?.catalogue().probe().cloned();
        let probe =
            probe.ok_or_else(|| Error::damaged(format!("the keystore of cluster {} has no probe", inner.id)))?;
        let request = request(&inner.options, inner.id, None, probe.generation, Purpose::Probe);
        inner.wrappers.check(&probe.wrappings, &request)
    }

    /// Whether the keystore, when it was opened, ended in bytes that did not verify. Nearly always that is a change that a
    /// crash interrupted before it was acknowledged. But damage to the very last change looks the same: if a database or
    /// file that was made last is missing, restore the keystore from a copy, or ask for help with the bytes that were kept
    /// beside it under the name `keystore.torn-N`.
    pub fn found_torn_tail(&self) -> bool {
        self.0.torn_tail
    }

    /// To be called when this machine was resumed from a snapshot or cloned, as soon as the engine is told: every database
    /// seals under a new session from now on. Until then two clones go on under one session, kept apart by the 64 fresh
    /// bits of each call: safe for a few clones with a sound source of randomness, not for thousands.
    pub fn resumed(&self) {
        self.0.resumes.fetch_add(1, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").field("id", &self.0.id).field("directory", &self.0.directory).finish_non_exhaustive()
    }
}

impl ClusterInner {
    /// The keystore, for as long as the guard lives. In a forked child, where another thread's lock would be held for ever,
    /// it is refused before the lock is touched.
    pub(crate) fn keystore(&self) -> Result<MutexGuard<'_, Keystore>> {
        self.names.cluster_key.check()?;
        Ok(self.keystore.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn env(&self) -> &Env {
        &self.options.env
    }

    pub(crate) fn backend(&self) -> AesBackend {
        self.options.backend
    }

    fn look_up(&self, name: &str) -> Result<[u8; 32]> {
        self.names.look_up(&CLUSTER_SCOPE, name)
    }

    fn wrap_data_key(&self, key: &DataKey, database: DatabaseId) -> Result<Record> {
        let commitment = payload::data_commitment(key)?;
        let wrapped = payload::data_payload(key, self.id, database, &commitment)?;
        let request = request(&self.options, self.id, Some(database), key.generation, Purpose::Data);
        let wrappings = self.wrappers.wrap(&Arc::new(wrapped), &request)?.keys;
        Ok(Record {
            database,
            generation: key.generation,
            suite: key.suite,
            seal: key.seal,
            state: KeyState::Active,
            purpose: Purpose::Data,
            created: (self.env().now)().as_secs(),
            commitment,
            wrappings,
        })
    }

    fn unwrap_data_key(&self, record: &Record) -> Result<DataKey> {
        check_suite(record.suite)?;
        let request = request(&self.options, self.id, Some(record.database), record.generation, Purpose::Data);
        let accept = |unwrapped: &KeyPayload| payload::accept_data(unwrapped, record, self.id);
        self.wrappers.unwrap_with(&record.wrappings, &request, accept)
    }

    /// Appends to the keystore whose guard the caller holds.
    pub(crate) fn append(&self, keystore: &mut Keystore, operations: Vec<Operation>) -> Result<()> {
        keystore.append(operations)?;
        self.sequence.store(keystore.sequence(), Ordering::Release);
        Ok(())
    }

    fn opened(&self, id: DatabaseId) -> Option<PageCipher> {
        let ciphers = self.ciphers.lock().unwrap_or_else(PoisonError::into_inner);
        Some(PageCipher(ciphers.get(&id)?.upgrade()?))
    }

    fn handle(self: &Arc<Self>, id: DatabaseId, name: &str, cipher: PageCipher) -> Database {
        Database::from_inner(Arc::new(DatabaseInner { cluster: Arc::clone(self), id, name: name.to_owned(), cipher }))
    }

    /// Makes the handle of a database whose keys were just unwrapped or drawn, unless another thread was faster.
    fn adopt(self: &Arc<Self>, id: DatabaseId, name: &str, keys: Vec<DataKey>) -> Result<Database> {
        let lock: Hold = Arc::clone(&self.lock) as Hold;
        let keyring = Keyring::new(id, keys, Some(lock))?;
        let mut ciphers = self.ciphers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inner) = ciphers.get(&id).and_then(Weak::upgrade) {
            return Ok(self.handle(id, name, PageCipher(inner)));
        }
        let cipher = PageCipher::new(
            keyring,
            self.options.backend,
            Arc::clone(&self.subkeys),
            Arc::clone(&self.resumes),
            self.env().clone(),
            None,
        );
        ciphers.insert(id, Arc::downgrade(&cipher.0));
        Ok(self.handle(id, name, cipher))
    }

    /// The page file `id`: the one in use, or what `open` opens. No two are opened at once, so that there is one of each.
    pub(crate) fn page_file(&self, id: FileId, open: impl FnOnce() -> Result<PageFile>) -> Result<PageFile> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(inner) = files.get(&id).and_then(Weak::upgrade) {
            return Ok(PageFile::from_inner(inner));
        }
        let file = open()?;
        files.retain(|_, file| file.strong_count() > 0);
        files.insert(id, file.downgrade());
        Ok(file)
    }
}

fn request(
    options: &ClusterOptions,
    cluster: ClusterId,
    database: Option<DatabaseId>,
    generation: Generation,
    purpose: Purpose,
) -> WrapRequest {
    WrapRequest { cluster, database, generation, purpose, timeout: options.kms_timeout }
}

/// Before anything is unwrapped: is this the cluster that the caller means, and does it say so where it must?
fn check_expected(
    keystore: &UnverifiedKeystore,
    directory: &Path,
    options: &ClusterOptions,
    wrappers: &Wrappers,
) -> Result<()> {
    let (found, directory) = (keystore.cluster_id(), directory.display());
    match options.expected_id {
        Some(expected) if expected != found => Err(Error::new(
            ErrorKind::WrongIdentity,
            format!("{directory} holds cluster {found}, not the expected {expected}; somebody may have replaced it"),
        )),
        None if wrappers.is_public() => Err(Error::new(
            ErrorKind::Misconfigured,
            format!(
                "anybody can wrap keys for this master key, so opening {directory} needs ClusterOptions::expected_id"
            ),
        )),
        _ if keystore.hierarchy() != Hierarchy::Direct => Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "cluster {found} keeps its data keys under a cluster key, which this version cannot do; use a newer one"
            ),
        )),
        _ => Ok(()),
    }
}

/// Takes the cluster for this process. The lock goes when its last handle is dropped or the process ends, however it does;
/// but a forked child inherits it, and holds it until it drops its copies of the handles, or ends too.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join(LOCK_FILE);
    let io = |error| Error::io(format!("locking {}", path.display()), error);
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(io)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Error::new(
            ErrorKind::InUse,
            format!(
                "{} is open already, here, in another process or in a fork of one; drop all its handles there first",
                directory.display()
            ),
        )),
        Err(TryLockError::Error(error)) => Err(io(error)),
    }
}
