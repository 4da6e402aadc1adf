//! [`Cluster`]: the databases that share a keystore and a master key.

mod gate;
mod opening;
mod options;
mod safekeeping;
mod shared;
mod shred;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::aead::check_suite;
use crate::database::Database;
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Header, Operation, SealedName};
use crate::format::page::Suite;
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, Generation, SealId};
use crate::keys::chain::CopyState;
use crate::keys::keystore::{Keystore, UnverifiedKeystore};
use crate::keys::names::{CLUSTER_SCOPE, check_name};
use crate::keys::payload;
use crate::keys::root::{CLUSTER_KEY_PROVIDER, RootKeys};
use crate::keys::store::{FILE_NAMES, FileStore};
use crate::keys::wrappers::Wrappers;
use crate::secret::KeyPayload;
use crate::storage::disk::make_directories;
use crate::storage::locks::LockFile;

pub use options::ClusterOptions;
pub(crate) use shared::ClusterInner;
use shared::{PATIENCE, read_keystore, request, root_request, unwrap_any_root, unwrap_root};
pub use shred::Shredded;
pub use watch::Maintained;
use watch::Watch;

/// How often a new database's key is wrapped anew because the cluster was moved to other keys meanwhile.
const TRIES: usize = 32;
/// Never renamed or removed, so that all processes lock the same file.
const LOCK_FILE: &str = "lock";

/// The databases of one directory: their keystore, and the master keys that wrap their data keys.
///
/// A handle: cloning it is cheap. Key services are called when a cluster or database is created or opened, when keys are
/// rotated, rewrapped or repaired, and by [`Cluster::check_master_key`]; never to seal a page, and to open one only under
/// [`Hierarchy::Direct`](crate::Hierarchy::Direct), if it names a generation that another process has just made.
///
/// Several processes may have a cluster open. Each change of the keystore is made under a lock, after what the others changed
/// was taken over; a rotation, a drop or a new database is seen by the others within about a second. A page file has one
/// process at a time. A key is destroyed only if no process may seal under it. A process that is killed blocks nobody. A
/// forked child must open the cluster anew; it keeps its parent's locks until it ends.
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
pub struct Cluster(pub(crate) Arc<ClusterInner>);

impl Cluster {
    /// Makes a new cluster in `directory`, which is created if need be: draws its keys, wraps them with `wrappers`, and
    /// writes the keystore durably.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if there is a keystore; what the key services answered; [`ErrorKind::Io`].
    pub fn create(directory: &Path, options: ClusterOptions, wrappers: Wrappers) -> Result<Self> {
        check_suite(options.suite)?;
        check_providers(&wrappers)?;
        make_cluster_directory(directory)?;
        if keystore_exists(&options, directory)? {
            // Asked again under the lock; but here before a key service is called for nothing.
            let message =
                format!("there is a keystore in {} already; open it, or choose another directory", directory.display());
            return Err(Error::new(ErrorKind::AlreadyExists, message));
        }
        let locks = joined(directory)?;
        let store = Arc::new(FileStore::new(Arc::clone(&options.disk), directory, Arc::clone(&locks)));
        let env = &options.env;
        let identity = payload::random_key(env)?;
        let cluster_key = payload::random_key(env)?;
        let id = payload::cluster_id(&identity)?;
        let generation = Generation::FIRST;
        let cluster_payload = payload::cluster_payload(&cluster_key, &identity, id, generation)?;
        let commitment = payload::cluster_commitment(&cluster_key, id, generation)?;
        let record = wrap_own(&options, &wrappers, id, Purpose::Cluster, cluster_payload, commitment)?;
        let probe = payload::probe_payload(env, id)?;
        let probe = wrap_own(&options, &wrappers, id, Purpose::Probe, probe, [0; 32])?;
        let header = Header { hierarchy: options.hierarchy, cluster: id, sequence: 1, whole: 1, record };
        let root = RootKeys::new(id, generation, cluster_key, &identity)?;
        let keystore = {
            let _change = locks.change(PATIENCE)?;
            Keystore::create(Arc::clone(&store) as _, header, vec![Operation::Probe(probe)], &root.mac)?
        };
        Self::assemble(directory, options, wrappers, locks, store, keystore, root)
    }

    /// Opens the cluster in `directory`. Nothing in the keystore is believed before the cluster key was unwrapped under one
    /// of `wrappers` and the keystore's MACs were checked with it. Where one copy of the keystore is damaged or
    /// cannot be read, or an older file was put in its place, the other is used, and that one made anew:
    /// [`Cluster::keystore_findings`] tells.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] without a keystore; [`ErrorKind::WrongIdentity`] if it is another cluster than expected, before
    /// any key service is called; what the key services answered; [`ErrorKind::Damaged`] or [`ErrorKind::Authentication`] if
    /// neither copy of the keystore is what was written, or the longer one is not.
    pub fn open(directory: &Path, options: ClusterOptions, wrappers: Wrappers) -> Result<Self> {
        check_suite(options.suite)?;
        check_providers(&wrappers)?;
        if !keystore_exists(&options, directory)? {
            // Before a lock file is made where no cluster is.
            let message =
                format!("there is no keystore in {}; check the directory, or create the cluster", directory.display());
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let locks = joined(directory)?;
        let store = Arc::new(FileStore::new(Arc::clone(&options.disk), directory, Arc::clone(&locks)));
        let mut unverified = read_keystore(&store, &locks)?;
        check_expected(&mut unverified, directory, &options, &wrappers)?;
        let (mut root, record) =
            unwrap_any_root(&wrappers, unverified.headers(), |header| root_request(&options, header))?;
        let keystore = unverified.verify(&root.mac)?;
        if *keystore.cluster_record() != record {
            // The other copy's record was opened, but this one counts: who cannot open it cannot open its data keys either.
            let record = keystore.cluster_record();
            let request = request(&options, root.names.cluster, None, record.generation, Purpose::Cluster);
            root = unwrap_root(&wrappers, &request, record)?;
        }
        Self::assemble(directory, options, wrappers, locks, store, keystore, root)
    }

    fn assemble(
        directory: &Path,
        options: ClusterOptions,
        wrappers: Wrappers,
        locks: Arc<LockFile>,
        store: Arc<FileStore>,
        keystore: Keystore,
        root: RootKeys,
    ) -> Result<Self> {
        let watched = options.watched;
        let settled = keystore.is_settled();
        let directory = directory.to_path_buf();
        let inner = Arc::new(ClusterInner::new(directory, options, wrappers, locks, store, keystore, root)?);
        if !settled {
            // A damaged copy is made anew now, not with the next change, which may be far. If it cannot be written, the
            // cluster still shows what is there, and says what it found; databases open as far as a power cut would leave their
            // keys.
            let _ = inner.change(|_, _| Ok(()));
        }
        if watched {
            inner.watch(Watch::start(&inner)?);
        }
        Ok(Self(inner))
    }

    /// The cluster's id. Keep it outside the cluster's directory, and give it to [`ClusterOptions::expected_id`].
    pub fn id(&self) -> ClusterId {
        self.0.id
    }

    /// Makes a new database, with a data key of its own, wrapped and durable before this returns.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::Invalid`] for an empty name, one over 255 bytes, or one with control
    /// characters; what the key services answered; [`ErrorKind::Closed`] while the cluster is disabled, after which the
    /// database may exist if that happened meanwhile; what changing the keystore gives: [`ErrorKind::Io`],
    /// [`ErrorKind::InUse`] if another process keeps its lock, [`ErrorKind::KeystoreStale`].
    pub fn create_database(&self, name: &str) -> Result<Database> {
        check_name("database", name)?;
        let inner = &self.0;
        let exists = || Error::new(ErrorKind::AlreadyExists, format!("a database named {name:?} exists already"));
        inner.look(|keystore, root| {
            let look_up = root.names.look_up(&CLUSTER_SCOPE, name)?;
            if keystore.catalogue().find_database(&look_up).is_some() { Err(exists()) } else { Ok(()) }
        })?;
        let _in_flight = inner.enter()?;
        let id = DatabaseId::from_bytes(inner.env().random()?);
        for _ in 0..TRIES {
            let key = inner.draw_data_key(Generation::FIRST, inner.options.suite)?;
            // No lock is held while the key service is called.
            let new = inner.wrap_data_key(&key, id)?;
            let persisted = inner.append(|keystore, root| {
                let look_up = root.names.look_up(&CLUSTER_SCOPE, name)?;
                if keystore.catalogue().find_database(&look_up).is_some() {
                    return Err(exists());
                }
                if !new.fits(keystore, root) {
                    return Ok((Vec::new(), None));
                }
                let (record, hold) = inner.numbered(new.record, keystore)?;
                let sealed = root.names.seal(inner.env(), &CLUSTER_SCOPE, &id.to_bytes(), name)?;
                let name = SealedName { lookup: look_up, sealed };
                Ok((vec![Operation::Database { database: id, name }, Operation::Generation(record)], Some(hold)))
            })?;
            if let Some(hold) = persisted {
                let cipher = inner.ciphers.get_or_open(id, || inner.adopt(id, vec![key], Some(hold)))?;
                return inner.handle(id, name, cipher);
            }
            // The cluster was moved to other keys meanwhile: wrapped for nothing.
        }
        let message = format!("cluster {} is being moved to other keys again and again; try again", inner.id);
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// Opens the database of this name: its data keys are unwrapped, all generations, unless it is open already. Callers who
    /// open the same database at once share one unwrapping.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; what the key services answered; [`ErrorKind::WrongIdentity`] or
    /// [`ErrorKind::Authentication`] if a record holds another key than it promises; [`ErrorKind::Closed`] while the cluster
    /// is disabled.
    pub fn database(&self, name: &str) -> Result<Database> {
        self.0.open_database(name)
    }

    /// Opens every database, a bounded number of calls to the key services at a time: for engines that have thousands.
    /// In the order of [`Cluster::databases`].
    ///
    /// # Errors
    /// As [`Cluster::database`], the first failure.
    pub fn open_databases(&self) -> Result<Vec<Database>> {
        self.0.open_databases()
    }

    /// The names of all databases, sorted.
    ///
    /// # Errors
    /// [`ErrorKind::Authentication`] if a name is not what was written; [`ErrorKind::Closed`] while the cluster is disabled.
    pub fn databases(&self) -> Result<Vec<String>> {
        Ok(self.0.named_databases()?.into_iter().map(|(name, _)| name).collect())
    }

    /// Gives a database another name. Its id, keys and files stay; handles that are open keep working, and keep showing the
    /// name under which they were opened.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::AlreadyExists`] if another database has the new name; [`ErrorKind::Invalid`]
    /// for a name that cannot be; [`ErrorKind::Closed`] while the cluster is disabled; what changing the keystore gives.
    pub fn rename_database(&self, from: &str, to: &str) -> Result<()> {
        check_name("database", to)?;
        let inner = &self.0;
        inner.append(|keystore, root| {
            let database = keystore.catalogue().find_database(&root.names.look_up(&CLUSTER_SCOPE, from)?);
            let database = database
                .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no database named {from:?}")))?;
            let lookup = root.names.look_up(&CLUSTER_SCOPE, to)?;
            if keystore.catalogue().find_database(&lookup).is_some_and(|other| other != database) {
                return Err(Error::new(ErrorKind::AlreadyExists, format!("a database named {to:?} exists already")));
            }
            let sealed = root.names.seal(inner.env(), &CLUSTER_SCOPE, &database.to_bytes(), to)?;
            Ok((vec![Operation::Rename { database, name: SealedName { lookup, sealed } }], ()))
        })
    }

    /// Asks the key services, by unwrapping the stored probe, whether the master key can be used now. Works while the cluster
    /// is disabled, too.
    ///
    /// # Errors
    /// The verdict: [`ErrorKind::Disabled`], [`ErrorKind::Deleted`], [`ErrorKind::Denied`], or
    /// [`ErrorKind::Unreachable`], which is none.
    pub fn check_master_key(&self) -> Result<()> {
        self.0.check_fork()?;
        self.0.check_master_key()
    }

    /// What was found wrong with the two copies of the keystore since the cluster was opened here; empty if nothing was.
    /// Nothing is lost as long as one copy is whole at each place, and a copy that is not is made anew. But damage is a sign
    /// of a failing disk, or of somebody at work.
    pub fn keystore_findings(&self) -> Vec<String> {
        if self.0.check_fork().is_err() {
            return Vec::new();
        }
        let keystore = self.0.keystore();
        let told = keystore.copies().iter().enumerate().filter_map(|(which, state)| {
            let name = keystore.copy_name(which);
            match state {
                CopyState::Intact => None,
                CopyState::Short => Some(format!("{name} lacks the last changes, which a crash interrupted")),
                CopyState::Torn => {
                    Some(format!("{name} ends in bytes that do not verify: a change that a crash interrupted"))
                }
                CopyState::Older => Some(format!("{name} is from before a rewrite, which a crash interrupted")),
                CopyState::Missing => Some(format!("{name} is missing")),
                CopyState::Damaged(what) => Some(format!("{name} is damaged: {what}")),
                CopyState::Unreadable(why) => Some(format!("{name} cannot be read: {why}")),
            }
        });
        told.collect()
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

/// The record of the cluster key or of a probe, just drawn.
fn wrap_own(
    options: &ClusterOptions,
    wrappers: &Wrappers,
    id: ClusterId,
    purpose: Purpose,
    payload: KeyPayload,
    commitment: [u8; 32],
) -> Result<Record> {
    let generation = Generation::FIRST;
    let request = request(options, id, None, generation, purpose);
    let wrappings = wrappers.wrap(&Arc::new(payload), &request)?.keys;
    Ok(Record {
        database: DatabaseId::from_bytes([0; 16]),
        generation,
        suite: Suite::Aes256Gcm,
        seal: SealId::from_bytes([0; 16]),
        state: KeyState::Active,
        purpose,
        created: (options.env.now)().as_secs(),
        commitment,
        lock: 0,
        wrappings,
    })
}

/// Before anything is unwrapped: is this the cluster that the caller means, and does it say so where it must? A copy of the
/// keystore that claims to be another cluster's is passed over, if the other copy is not.
fn check_expected(
    keystore: &mut UnverifiedKeystore,
    directory: &Path,
    options: &ClusterOptions,
    wrappers: &Wrappers,
) -> Result<()> {
    let Some(expected) = options.expected_id else {
        return if wrappers.is_public() {
            let message = format!(
                "anybody can wrap keys for this master key, so opening {} needs ClusterOptions::expected_id",
                directory.display()
            );
            Err(Error::new(ErrorKind::Misconfigured, message))
        } else {
            Ok(())
        };
    };
    let found = keystore.headers().first().map(|header| header.cluster);
    keystore.retain(expected);
    match found {
        Some(found) if keystore.headers().is_empty() => Err(Error::new(
            ErrorKind::WrongIdentity,
            format!(
                "{} holds cluster {found}, not the expected {expected}; somebody may have replaced it",
                directory.display()
            ),
        )),
        _ => Ok(()),
    }
}

/// A wrapper that calls itself as the cluster key does would be taken for it.
pub(crate) fn check_providers(wrappers: &Wrappers) -> Result<()> {
    if wrappers.ids().all(|id| id.provider != CLUSTER_KEY_PROVIDER) {
        return Ok(());
    }
    let message = format!("a key wrapper calls its provider {CLUSTER_KEY_PROVIDER:?}, which is reserved; rename it");
    Err(Error::new(ErrorKind::Misconfigured, message))
}

fn make_cluster_directory(directory: &Path) -> Result<()> {
    make_directories(directory).map_err(|error| Error::io(format!("creating {}", directory.display()), error))
}

/// The lock file of somebody who has the cluster open.
fn joined(directory: &Path) -> Result<Arc<LockFile>> {
    let locks = lock_file(directory)?;
    // Before the keystore is read: from here on nobody puts an older one in its place.
    locks.join(PATIENCE)?;
    Ok(locks)
}

fn lock_file(directory: &Path) -> Result<Arc<LockFile>> {
    LockFile::open(&directory.join(LOCK_FILE))
}

/// Whether either copy is there.
fn keystore_exists(options: &ClusterOptions, directory: &Path) -> Result<bool> {
    let look = |name: &str| options.disk.exists(&directory.join(name));
    let found = FILE_NAMES.iter().map(|name| look(name)).collect::<std::io::Result<Vec<_>>>();
    let found =
        found.map_err(|error| Error::io(format!("looking for a keystore in {}", directory.display()), error))?;
    Ok(found.contains(&true))
}
