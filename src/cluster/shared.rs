//! What the handles of a cluster share: its own keys, its keystore and how it is read and changed, and what is open.
//!
//! Locks are taken in one order: `moving`, `recovering` or `looking`, then `closings`, the lock among processes, the
//! keystore's mutex. The last three are never held while a key service is called, and who waits for another process keeps no
//! thread from the keystore.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};

use crate::aead::AesBackend;
use crate::cluster::options::ClusterOptions;
use crate::cluster::watch::Watch;
use crate::env::Env;
use crate::error::{Error, ErrorKind, PageError, Result};
use crate::format::file_header::Seen;
use crate::format::keystore::{Header, Hierarchy, Operation};
use crate::format::record::Record;
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, FileId, Generation, MasterKeyId};
use crate::keys::calls::WrapRequest;
use crate::keys::in_memory::{InMemory, KeysInMemory, Live};
use crate::keys::keystore::{Keystore, UnverifiedKeystore};
use crate::keys::root::RootKeys;
use crate::keys::store::FileStore;
use crate::keys::wrappers::Wrappers;
use crate::page::cipher::CipherInner;
use crate::page::subkeys::SubkeyCache;
use crate::registry::Registry;
use crate::secret::ForkDetector;
use crate::storage::locks::LockFile;
use crate::storage::page_file;
use crate::storage::place::History;

/// How long to wait for another process that reads or changes the keystore. Such work takes milliseconds; a process that was
/// stopped in the middle of it must not stop this one for ever.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How often a change is tried when other processes replace the cluster key under it.
const TRIES: usize = 32;

pub(crate) struct ClusterInner {
    pub(crate) id: ClusterId,
    pub(crate) directory: PathBuf,
    pub(crate) options: ClusterOptions,
    pub(crate) locks: Arc<LockFile>,
    pub(super) store: Arc<FileStore>,
    wrappers: ArcSwap<Wrappers>,
    /// Those of them that another process moved the cluster away from: nothing is wrapped under them any more.
    left: Mutex<Vec<MasterKeyId>>,
    /// None while the cluster is disabled.
    root: ArcSwapOption<Live<RootKeys>>,
    /// Says whether the cluster's own keys are in memory, or those of a database, or anything that they come out of.
    pub(crate) in_memory: KeysInMemory,
    fork: ForkDetector,
    /// How often the gate was closed. Held while it is closed or opened; no key service is called meanwhile.
    pub(super) closings: Mutex<u64>,
    /// Held while the cluster is brought back: one at a time.
    pub(super) recovering: Mutex<()>,
    /// Held while keys are moved to others.
    pub(crate) moving: Mutex<()>,
    keystore: Mutex<Keystore>,
    /// The keystore's last change in both copies, for those who note it without taking the keystore's mutex.
    position: Mutex<Seen>,
    /// The keystore's, for those who must not wait for its mutex.
    clustered: AtomicBool,
    /// Somebody put an older keystore back: nothing is changed any more.
    stale: AtomicBool,
    /// Databases in use, so that there is one set of keys and one session for each.
    pub(super) ciphers: Registry<DatabaseId, CipherInner>,
    /// Open databases may lack what other processes changed.
    pub(super) unfollowed: AtomicBool,
    /// Held by the one thread that looks for a generation which a page named: when that last failed.
    pub(super) looking: Mutex<Option<Instant>>,
    /// Page files in use, so that there is one writer and one written mark for each.
    pub(crate) files: Registry<(DatabaseId, FileId), page_file::Inner>,
    pub(super) subkeys: Arc<SubkeyCache>,
    pub(super) resumes: Arc<AtomicU64>,
    /// Ends with the last handle.
    watch: OnceLock<Watch>,
}

impl ClusterInner {
    pub(super) fn new(
        directory: PathBuf,
        options: ClusterOptions,
        wrappers: Wrappers,
        locks: Arc<LockFile>,
        store: Arc<FileStore>,
        keystore: Keystore,
        root: RootKeys,
    ) -> Result<Self> {
        let fork = ForkDetector::new().map_err(|error| Error::io("preparing to notice forks", error))?;
        let in_memory = KeysInMemory::default();
        Ok(Self {
            id: root.names.cluster,
            directory,
            locks,
            store,
            wrappers: ArcSwap::from_pointee(wrappers),
            left: Mutex::default(),
            root: ArcSwapOption::new(Some(Live::new(root, in_memory.mark()))),
            in_memory,
            fork,
            closings: Mutex::default(),
            recovering: Mutex::default(),
            moving: Mutex::default(),
            position: Mutex::new(position_of(&keystore)),
            clustered: AtomicBool::new(keystore.hierarchy() == Hierarchy::ClusterKey),
            keystore: Mutex::new(keystore),
            stale: AtomicBool::new(false),
            ciphers: Registry::new(),
            unfollowed: AtomicBool::new(false),
            looking: Mutex::new(None),
            files: Registry::new(),
            subkeys: Arc::new(SubkeyCache::new(options.subkey_cache)),
            resumes: Arc::default(),
            watch: OnceLock::new(),
            options,
        })
    }

    pub(super) fn watch(&self, watch: Watch) {
        let _ = self.watch.set(watch);
    }

    pub(crate) fn env(&self) -> &Env {
        &self.options.env
    }

    pub(crate) fn backend(&self) -> AesBackend {
        self.options.backend
    }

    /// Seconds since 1970.
    pub(crate) fn now(&self) -> u64 {
        (self.env().now)().as_secs()
    }

    /// The master keys that are configured now.
    pub(crate) fn wrappers(&self) -> Arc<Wrappers> {
        self.wrappers.load_full()
    }

    /// Those of them that keys are wrapped under.
    pub(crate) fn wrapping_keys(&self) -> Arc<Wrappers> {
        let (wrappers, left) = (self.wrappers(), self.left());
        if left.is_empty() { wrappers } else { Arc::new(wrappers.without(&left)) }
    }

    pub(crate) fn set_wrappers(&self, wrappers: Wrappers) {
        self.wrappers.store(Arc::new(wrappers));
        self.left().clear();
    }

    fn left(&self) -> MutexGuard<'_, Vec<MasterKeyId>> {
        self.left.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A call to a key service about one key of this cluster.
    pub(crate) fn request(
        &self,
        database: Option<DatabaseId>,
        generation: Generation,
        purpose: Purpose,
    ) -> WrapRequest {
        // Also when nobody waits for the call any more, if a payload is in it.
        let in_flight = Some(self.in_memory.mark());
        WrapRequest { in_flight, ..request(&self.options, self.id, database, generation, purpose) }
    }

    /// For the length of an operation that has keys in its hands, so that whoever closes the gate waits for its end.
    ///
    /// # Errors
    /// As [`ClusterInner::root`].
    pub(crate) fn enter(&self) -> Result<InMemory> {
        // Not a new mark: while the gate is closed, those who knock must not look like keys.
        Ok(self.root()?.mark())
    }

    /// The cluster's own keys. In a forked child, where another thread's lock would be held for ever, they are refused before
    /// any lock is touched.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] while the cluster is disabled; [`ErrorKind::Forked`].
    pub(crate) fn root(&self) -> Result<Arc<Live<RootKeys>>> {
        self.check_fork()?;
        self.root.load_full().ok_or_else(|| PageError::Disabled.into())
    }

    pub(crate) fn check_fork(&self) -> Result<()> {
        if self.fork.forked() { Err(PageError::Forked.into()) } else { Ok(()) }
    }

    pub(super) fn set_root(&self, root: Option<RootKeys>) {
        self.root.store(root.map(|root| Live::new(root, self.in_memory.mark())));
    }

    /// The keystore's memory, as it is, whatever other processes did.
    pub(crate) fn keystore(&self) -> MutexGuard<'_, Keystore> {
        self.keystore.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows the keystore to `f`, after what other processes changed was taken over.
    ///
    /// # Errors
    /// As [`ClusterInner::root`]; [`ErrorKind::KeystoreStale`]; what reading the keystore gives.
    pub(crate) fn look<R>(&self, f: impl FnOnce(&Keystore, &Arc<Live<RootKeys>>) -> Result<R>) -> Result<R> {
        for _ in 0..TRIES {
            let root = self.root()?;
            let mut keystore = self.keystore();
            if keystore.is_behind()? {
                drop(keystore);
                let _look = self.locks.look(PATIENCE)?;
                keystore = self.keystore();
                self.catch_up(&mut keystore, &root)?;
            }
            if keystore.cluster_record().generation == root.generation() {
                return f(&keystore, &root);
            }
            drop(keystore);
            self.refresh_root()?;
        }
        Err(self.restless())
    }

    /// Lets `f` change the keystore, alone among threads and processes, after what others changed was taken over.
    ///
    /// # Errors
    /// As [`ClusterInner::look`]; [`ErrorKind::InUse`] if another process keeps the lock; those of `f`.
    pub(crate) fn change<R>(&self, f: impl FnOnce(&mut Keystore, &RootKeys) -> Result<R>) -> Result<R> {
        for _ in 0..TRIES {
            self.refuse_if_stale()?;
            let root = self.root()?;
            let change = self.locks.change(PATIENCE)?;
            let mut keystore = self.keystore();
            self.catch_up(&mut keystore, &root)?;
            if keystore.cluster_record().generation == root.generation() {
                keystore.settle(&root.mac)?;
                let changed = f(&mut keystore, &root);
                self.note(&keystore);
                return changed;
            }
            drop(keystore);
            // A key service is called next.
            drop(change);
            self.refresh_root()?;
        }
        Err(self.restless())
    }

    /// Appends what `build` makes of the catalogue as it is under the lock.
    ///
    /// # Errors
    /// As [`ClusterInner::change`].
    pub(crate) fn append<R>(
        &self,
        build: impl FnOnce(&Keystore, &RootKeys) -> Result<(Vec<Operation>, R)>,
    ) -> Result<R> {
        self.change(|keystore, root| {
            let (operations, built) = build(keystore, root)?;
            keystore.append(&root.mac, operations)?;
            if keystore.is_wasteful() {
                // The change is durable: what was asked for is done, whether this comes off or not.
                let _ = keystore.rewrite(&root.mac, Vec::new(), None);
            }
            Ok(built)
        })
    }

    /// Makes sure that a power cut leaves what was last looked at, before anything is sealed under a key out of it: who wrote
    /// it may have ended before it was synced.
    ///
    /// # Errors
    /// As [`ClusterInner::change`].
    pub(crate) fn make_durable(&self) -> Result<()> {
        let durable = self.keystore().is_durable();
        if durable { Ok(()) } else { self.change(|_, _| Ok(())) }
    }

    /// Takes over what other processes changed. The caller holds the lock among processes.
    pub(super) fn catch_up(&self, keystore: &mut Keystore, root: &RootKeys) -> Result<()> {
        let before = keystore.cluster_record().clone();
        match keystore.catch_up(&root.mac) {
            Ok(false) => Ok(()),
            Ok(true) => {
                self.note_master_keys(&before, keystore.cluster_record());
                self.unfollowed.store(true, Ordering::Release);
                self.note(keystore);
                Ok(())
            }
            Err(error) => {
                if error.kind() == ErrorKind::KeystoreStale {
                    self.stale.store(true, Ordering::Relaxed);
                }
                Err(error)
            }
        }
    }

    /// Another process moved the cluster away from some of the master keys, and perhaps back to others: this one wraps nothing
    /// under those that are gone, or it would bring them back.
    fn note_master_keys(&self, before: &Record, now: &Record) {
        let has = |id: &MasterKeyId| now.wrappings.iter().any(|key| key.master_key == *id);
        let mut left = self.left();
        left.extend(before.wrappings.iter().map(|key| key.master_key.clone()));
        left.retain(|id| !has(id));
    }

    /// Not what a power cut may still take away: a page file that noted it would be refused ever after.
    fn note(&self, keystore: &Keystore) {
        if !keystore.is_settled() {
            return;
        }
        *self.position.lock().unwrap_or_else(PoisonError::into_inner) = position_of(keystore);
        self.clustered.store(keystore.hierarchy() == Hierarchy::ClusterKey, Ordering::Relaxed);
    }

    fn refuse_if_stale(&self) -> Result<()> {
        if !self.stale.load(Ordering::Relaxed) {
            return Ok(());
        }
        let message = format!(
            "somebody put an older keystore back in {}; nothing is changed any more: put the newest one back and open the \
             cluster again",
            self.directory.display()
        );
        Err(Error::new(ErrorKind::KeystoreStale, message))
    }

    fn restless(&self) -> Error {
        let message =
            format!("other processes keep replacing the cluster key of {}; try again", self.directory.display());
        Error::new(ErrorKind::InUse, message)
    }

    /// Unwraps the cluster key that another process put in the place of ours.
    fn refresh_root(&self) -> Result<()> {
        let old = self.root()?;
        let record = self.keystore().cluster_record().clone();
        let request = self.request(None, record.generation, Purpose::Cluster);
        let new = Live::new(unwrap_root(&self.wrappers(), &request, &record)?, old.mark());
        // Not if the cluster was disabled meanwhile.
        self.root.compare_and_swap(&Some(old), Some(new));
        Ok(())
    }

    /// Uses these keys of its own from now on, unless the cluster was disabled meanwhile.
    pub(crate) fn note_root(&self, root: RootKeys) {
        if let Some(current) = self.root.load_full() {
            self.root.compare_and_swap(&Some(Arc::clone(&current)), Some(Live::new(root, current.mark())));
        }
    }
}

impl History for ClusterInner {
    fn now(&self) -> Seen {
        *self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has(&self, seen: &Seen) -> Result<bool> {
        let knows = |keystore: &Keystore| keystore.has(seen.sequence, &seen.tag);
        // Another process may have made that change after we last looked.
        let has = knows(&self.keystore()) || self.look(|keystore, _| Ok(knows(keystore)))?;
        if !has {
            self.stale.store(true, Ordering::Relaxed);
        }
        Ok(has)
    }
}

fn position_of(keystore: &Keystore) -> Seen {
    let (sequence, tag) = keystore.durable_position();
    Seen { sequence, tag }
}

pub(super) fn request(
    options: &ClusterOptions,
    cluster: ClusterId,
    database: Option<DatabaseId>,
    generation: Generation,
    purpose: Purpose,
) -> WrapRequest {
    WrapRequest { cluster, database, generation, purpose, timeout: options.kms_timeout, in_flight: None }
}

/// Unwraps the cluster's own keys. `record` need not be authenticated: what comes out must make this cluster's id.
pub(super) fn unwrap_root(wrappers: &Wrappers, request: &WrapRequest, record: &Record) -> Result<RootKeys> {
    wrappers.unwrap_with(&record.wrappings, request, |payload| RootKeys::accept(payload, record, request.cluster))
}

/// Unwraps the cluster's own keys as one of the copies of an unverified keystore has them, the newer first; with the record
/// that they came out of. That is not the last word: if the keystore, once it is verified, has another record, that one
/// decides, and whoever has a say in it is heard.
///
/// # Errors
/// What the key services answered about the newer, if the older does not open either; [`ErrorKind::WrongIdentity`] if both
/// open, and are of different clusters.
pub(super) fn unwrap_any_root(
    wrappers: &Wrappers,
    headers: &[Header],
    request: impl Fn(&Header) -> WrapRequest,
) -> Result<(RootKeys, Record)> {
    let mut refused = None;
    for header in headers {
        match unwrap_root(wrappers, &request(header), &header.record) {
            Ok(root) => {
                let others = headers.iter().filter(|other| other.cluster != header.cluster);
                refuse_if_genuine(wrappers, header.cluster, others, request)?;
                return Ok((root, header.record.clone()));
            }
            Err(error) if is_about_the_record(&error) => refused = refused.or(Some(error)),
            Err(error) => return Err(refused.unwrap_or(error)),
        }
    }
    Err(refused.unwrap_or_else(|| Error::damaged("the keystore has no header")))
}

/// Two clusters' keystores in one directory: whichever was taken, the other's would be repaired away. Only what does not open
/// under its master key is no other cluster's, but damage.
fn refuse_if_genuine<'a>(
    wrappers: &Wrappers,
    cluster: ClusterId,
    others: impl Iterator<Item = &'a Header>,
    request: impl Fn(&Header) -> WrapRequest,
) -> Result<()> {
    use ErrorKind::{Authentication, BadCiphertext, Damaged, Misconfigured, WrongIdentity};
    for other in others {
        match unwrap_root(wrappers, &request(other), &other.record).map_err(|error| (error.kind(), error)) {
            Err((BadCiphertext | Authentication | WrongIdentity | Damaged, _)) => {}
            // Or only a master key that is not configured could tell whose it is.
            Ok(_) | Err((Misconfigured, _)) => {
                let message = format!(
                    "one copy of the keystore is of cluster {cluster}, the other of cluster {}; move the one away that does \
                     not belong here, or say which is meant (ClusterOptions::expected_id)",
                    other.cluster
                );
                return Err(Error::new(WrongIdentity, message));
            }
            Err((_, error)) => return Err(error),
        }
    }
    Ok(())
}

/// Whether another copy's record could be unwrapped where this one's could not. A verdict on a master key, too: nothing has
/// authenticated the key version that it was asked about.
fn is_about_the_record(error: &Error) -> bool {
    use ErrorKind::*;
    matches!(
        error.kind(),
        BadCiphertext
            | Misconfigured
            | Authentication
            | WrongIdentity
            | Damaged
            | Unclassified
            | Disabled
            | Deleted
            | Denied
    )
}

/// The call that unwraps what a keystore's header has.
pub(super) fn root_request(options: &ClusterOptions, header: &Header) -> WrapRequest {
    request(options, header.cluster, None, header.record.generation, Purpose::Cluster)
}

/// Reads both copies, while nobody changes them.
pub(super) fn read_keystore(store: &Arc<FileStore>, locks: &LockFile) -> Result<UnverifiedKeystore> {
    let _look = locks.look(PATIENCE)?;
    UnverifiedKeystore::read(Arc::clone(store) as _)
}

impl ClusterInner {
    /// What the master keys wrap.
    pub(crate) fn hierarchy(&self) -> Hierarchy {
        if self.clustered.load(Ordering::Relaxed) { Hierarchy::ClusterKey } else { Hierarchy::Direct }
    }
}
