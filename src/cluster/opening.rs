//! Data keys: wrapped when they are made, unwrapped when a database is opened, and followed as other processes change them.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::aead::check_suite;
use crate::cluster::shared::ClusterInner;
use crate::database::{Database, DatabaseInner};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Hierarchy, SealedName};
use crate::format::page::Suite;
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{DatabaseId, Generation, SealId};
use crate::keys::in_memory::Live;
use crate::keys::keyring::{Closed, DataKey, Hold, Keyring};
use crate::keys::keystore::Keystore;
use crate::keys::many::UnwrapJob;
use crate::keys::names::CLUSTER_SCOPE;
use crate::keys::payload;
use crate::keys::root::RootKeys;
use crate::keys::wrapper::WrappedKey;
use crate::page::cipher::{CipherInner, GenerationSource, PageCipher};

/// How often an opening begins anew when other processes rotate the database meanwhile.
const TRIES: usize = 8;
const PAUSE: Duration = Duration::from_millis(2);
/// How long a page's unknown generation is not looked for after that failed, so that a key service which does not answer
/// is not asked for every page.
const LOOK_PAUSE: Duration = Duration::from_secs(1);

impl ClusterInner {
    /// Draws a data key.
    pub(crate) fn draw_data_key(&self, generation: Generation, suite: Suite) -> Result<DataKey> {
        let env = self.env();
        let seal = SealId::from_bytes(env.random()?);
        Ok(DataKey { generation, suite, seal, key: payload::random_key(env)? })
    }

    /// The record of a data key that was just drawn: wrapped as the hierarchy says. It must still fit when it is written: see
    /// [`NewRecord::fits`].
    pub(crate) fn wrap_data_key(&self, key: &DataKey, database: DatabaseId) -> Result<NewRecord> {
        let commitment = payload::data_commitment(key)?;
        let wrapped = Arc::new(payload::data_payload(key, self.id, database, &commitment)?);
        let (hierarchy, cluster) =
            self.look(|keystore, _| Ok((keystore.hierarchy(), keystore.cluster_record().clone())))?;
        let wrappings = match hierarchy {
            Hierarchy::Direct => {
                let wrappers = self.wrapping_keys();
                wrappers.require_any_of(&cluster)?;
                let request = self.request(Some(database), key.generation, Purpose::Data);
                let what = format!("wrapping data key {} of database {database}", key.generation);
                wrappers.wrap(&wrapped, &request)?.sharing_a_key_with(&cluster, what)?
            }
            Hierarchy::ClusterKey => vec![self.root()?.wrap(self.env(), &wrapped, database, key.generation)?],
        };
        Ok(NewRecord { record: self.data_record(key, database, commitment, wrappings), cluster })
    }

    /// The record with the number of its lock, held before anybody can read it. To be called under the lock under which it is
    /// written.
    pub(crate) fn numbered(&self, mut record: Record, keystore: &Keystore) -> Result<(Record, Hold)> {
        let number = keystore.catalogue().next_lock();
        record.lock = number.ok_or_else(|| Error::invalid("the cluster has had all 2^32 - 1 locks of data keys"))?;
        let hold = self.locks.hold(&record)?;
        Ok((record, hold))
    }

    fn data_record(
        &self,
        key: &DataKey,
        database: DatabaseId,
        commitment: [u8; 32],
        wrappings: Vec<WrappedKey>,
    ) -> Record {
        Record {
            database,
            generation: key.generation,
            suite: key.suite,
            seal: key.seal,
            state: KeyState::Active,
            purpose: Purpose::Data,
            created: self.now(),
            commitment,
            // Given when it is written: see `numbered`.
            lock: 0,
            wrappings,
        }
    }

    /// Unwraps these records, many at a time, in order. Those that are destroyed are left out.
    ///
    /// # Errors
    /// The first failure.
    pub(crate) fn unwrap_data_keys(
        &self,
        root: &RootKeys,
        hierarchy: Hierarchy,
        records: &[Record],
    ) -> Result<Vec<DataKey>> {
        let alive: Vec<_> = records.iter().filter(|record| record.state != KeyState::Destroyed).collect();
        alive.iter().try_for_each(|record| check_suite(record.suite))?;
        match hierarchy {
            Hierarchy::ClusterKey => {
                alive.iter().map(|record| payload::accept_data(&root.unwrap(record)?, record, self.id)).collect()
            }
            Hierarchy::Direct => {
                let jobs = alive.iter().map(|record| UnwrapJob {
                    wrappings: &record.wrappings,
                    request: self.request(Some(record.database), record.generation, Purpose::Data),
                });
                let accept = |at: usize, payload: &_| payload::accept_data(payload, alive[at], self.id);
                self.wrappers().unwrap_many(jobs, accept).into_iter().collect()
            }
        }
    }

    /// Opens the database of this name, unless it is open already.
    pub(crate) fn open_database(self: &Arc<Self>, name: &str) -> Result<Database> {
        let id = self.look(|keystore, root| {
            let found = keystore.catalogue().find_database(&root.names.look_up(&CLUSTER_SCOPE, name)?);
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no database named {name:?}")))
        })?;
        self.follow_if_behind();
        let _in_flight = self.enter()?;
        let cipher = self.ciphers.get_or_open(id, || self.open_cipher(id))?;
        // If it was open, and another thread is still about to follow the others. What fails is tried again later.
        let _ = self.follow_one(id, &cipher);
        self.handle(id, name, cipher)
    }

    /// All databases by their names, sorted.
    pub(super) fn named_databases(&self) -> Result<Vec<(String, DatabaseId)>> {
        let mut named = self.look(|keystore, root| {
            let open = |(id, name): (DatabaseId, &SealedName)| {
                root.names.open(&CLUSTER_SCOPE, &id.to_bytes(), &name.sealed).map(|name| (name, id))
            };
            keystore.catalogue().databases().map(open).collect::<Result<Vec<_>>>()
        })?;
        named.sort_unstable();
        Ok(named)
    }

    /// Opens every database; those that are not open yet are unwrapped together.
    pub(super) fn open_databases(self: &Arc<Self>) -> Result<Vec<Database>> {
        let named = self.named_databases()?;
        let _in_flight = self.enter()?;
        self.follow_if_behind();
        let closed = named.iter().map(|(_, id)| *id).filter(|id| self.ciphers.get(*id).is_none());
        let mut opened = self.unwrap_together(&closed.collect::<Vec<_>>())?;
        let handle = |(name, id): (String, DatabaseId)| {
            let open = || match opened.remove(&id) {
                Some((keys, hold)) => self.adopt(id, keys, hold),
                None => self.open_cipher(id),
            };
            self.handle(id, &name, self.ciphers.get_or_open(id, open)?)
        };
        named.into_iter().map(handle).collect()
    }

    /// The keys of these databases, as far as nobody rotates them meanwhile.
    fn unwrap_together(&self, ids: &[DatabaseId]) -> Result<HashMap<DatabaseId, Keys>> {
        let (root, hierarchy, records) = self.look(|keystore, root| {
            let of = |id: &DatabaseId| (*id, keystore.catalogue().generations(*id).cloned().collect::<Vec<_>>());
            Ok((Arc::clone(root), keystore.hierarchy(), ids.iter().map(of).collect::<Vec<_>>()))
        })?;
        let mut opened = self.unwrap_all(&root, hierarchy, &records)?;
        self.look(|keystore, _| {
            for (id, records) in &records {
                if alive_of(records) != alive_of(keystore.catalogue().generations(*id)) {
                    opened.remove(id);
                }
            }
            Ok(())
        })?;
        self.make_durable()?;
        Ok(opened)
    }

    /// Holds the newest generations of these databases, and unwraps the keys of all. The caller looks again afterwards
    /// whether they are still the newest.
    pub(super) fn unwrap_all(
        &self,
        root: &RootKeys,
        hierarchy: Hierarchy,
        databases: &[(DatabaseId, Vec<Record>)],
    ) -> Result<HashMap<DatabaseId, Keys>> {
        let mut opened = HashMap::new();
        for (id, records) in databases {
            opened.insert(*id, (Vec::new(), self.hold_newest(records)?));
        }
        let alive = |record: &&Record| record.state != KeyState::Destroyed;
        let all: Vec<_> = databases.iter().flat_map(|(_, records)| records).filter(alive).cloned().collect();
        for (record, key) in all.iter().zip(self.unwrap_data_keys(root, hierarchy, &all)?) {
            if let Some((keys, _)) = opened.get_mut(&record.database) {
                keys.push(key);
            }
        }
        Ok(opened)
    }

    /// Unwraps the keys of a database, and holds its newest generation among the processes.
    fn open_cipher(self: &Arc<Self>, id: DatabaseId) -> Result<Arc<CipherInner>> {
        let (keys, hold) = self.newest_keys(id)?;
        self.adopt(id, keys, hold)
    }

    /// All keys of a database, its newest generation held.
    pub(super) fn newest_keys(&self, id: DatabaseId) -> Result<Keys> {
        for _ in 0..TRIES {
            let Wrapped { root, hierarchy, records } = self.data_records(id)?;
            let hold = match self.hold_newest(&records) {
                // Not the newest any more, and being destroyed or looked at.
                Err(error) if error.kind() == ErrorKind::InUse => {
                    std::thread::sleep(PAUSE);
                    continue;
                }
                hold => hold?,
            };
            let keys = self.unwrap_data_keys(&root, hierarchy, &records)?;
            // Only what is newest while it is held is sure to be there as long as it is held.
            if self.alive_generations(id)? == alive_of(&records) {
                self.make_durable()?;
                return Ok((keys, hold));
            }
        }
        Err(Error::new(ErrorKind::InUse, format!("other processes keep rotating database {id}; try again")))
    }

    fn data_records(&self, id: DatabaseId) -> Result<Wrapped> {
        self.look(|keystore, root| {
            let records: Vec<_> = keystore.catalogue().generations(id).cloned().collect();
            if records.is_empty() {
                return Err(Error::new(ErrorKind::NotFound, format!("database {id} was dropped")));
            }
            Ok(Wrapped { root: Arc::clone(root), hierarchy: keystore.hierarchy(), records })
        })
    }

    fn hold_newest(&self, records: &[Record]) -> Result<Option<Hold>> {
        records.last().map(|newest| Ok(self.locks.hold(newest)? as Hold)).transpose()
    }

    fn alive_generations(&self, id: DatabaseId) -> Result<Vec<(Generation, SealId)>> {
        self.look(|keystore, _| Ok(alive_of(keystore.catalogue().generations(id))))
    }

    /// The one cipher of a database whose keys were just unwrapped or drawn.
    pub(super) fn adopt(
        self: &Arc<Self>,
        id: DatabaseId,
        keys: Vec<DataKey>,
        hold: Option<Hold>,
    ) -> Result<Arc<CipherInner>> {
        let keyring = Keyring::new(id, keys, hold, &self.in_memory)?;
        let source: Weak<dyn GenerationSource> = Arc::downgrade(&(Arc::clone(self) as Arc<dyn GenerationSource>));
        let (subkeys, resumes) = (Arc::clone(&self.subkeys), Arc::clone(&self.resumes));
        let cipher = PageCipher::new(keyring, self.backend(), subkeys, resumes, self.env().clone(), Some(source));
        Ok(cipher.0)
    }

    /// A handle of a database that is open and registered.
    ///
    /// # Errors
    /// As [`ClusterInner::root`].
    pub(super) fn handle(self: &Arc<Self>, id: DatabaseId, name: &str, cipher: Arc<CipherInner>) -> Result<Database> {
        // The cluster may have been disabled after the keys were unwrapped. Whoever disables it empties `root` first and then
        // closes what is registered. So if there is a root, the gate of this database was not passed over; if there is none,
        // nobody gets it.
        self.root()?;
        // What other processes changed before it was registered was followed by nobody.
        let now: Vec<_> = alive_of(self.keystore().catalogue().generations(id)).into_iter().map(|(g, _)| g).collect();
        if cipher.enter().is_ok_and(|open| open.generations() != now) {
            self.unfollowed.store(true, Ordering::Release);
            self.follow_if_behind();
        }
        let cipher = PageCipher::from_inner(cipher);
        let inner = DatabaseInner { cluster: Arc::clone(self), id, name: name.to_owned(), cipher };
        Ok(Database::from_inner(Arc::new(inner)))
    }

    /// Brings open databases to what other processes changed, if they may be behind. What fails is tried again later.
    pub(crate) fn follow_if_behind(&self) {
        if self.unfollowed.swap(false, Ordering::AcqRel) && self.follow().is_err() {
            self.unfollowed.store(true, Ordering::Release);
        }
    }

    fn follow(&self) -> Result<()> {
        let mut outcome = Ok(());
        for (id, cipher) in self.ciphers.all() {
            // One database whose key service does not answer does not keep the others behind.
            outcome = outcome.and(self.follow_one(id, &cipher));
        }
        outcome
    }

    /// Brings one open database to what other processes changed.
    ///
    /// # Errors
    /// What the key services answered; [`ErrorKind::InUse`] if others keep rotating it; what looking at the keystore gives.
    pub(crate) fn follow_one(&self, id: DatabaseId, cipher: &CipherInner) -> Result<()> {
        for _ in 0..TRIES {
            if self.try_follow(id, cipher)? {
                return Ok(());
            }
        }
        Err(Error::new(ErrorKind::InUse, format!("other processes keep rotating database {id}; try again")))
    }

    /// True if there is nothing to follow. After something was followed it must be looked at again: what another process
    /// destroyed meanwhile has no place in the keyring, and what it made is held only now.
    fn try_follow(&self, id: DatabaseId, cipher: &CipherInner) -> Result<bool> {
        let Wrapped { root, hierarchy, records } = match self.data_records(id) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                cipher.close(Closed::Dropped);
                return Ok(true);
            }
            records => records?,
        };
        let current: Vec<_> = alive_of(&records).into_iter().map(|(generation, _)| generation).collect();
        // While it is closed there is nothing to follow; opening it brings everything.
        let Ok(open) = cipher.enter() else { return Ok(true) };
        if open.generations() == current {
            return Ok(true);
        }
        let hold = self.hold_newest(&records)?;
        let unknown: Vec<_> = records.iter().filter(|record| open.find(record.generation).is_none()).cloned().collect();
        drop(open);
        let keys = self.unwrap_data_keys(&root, hierarchy, &unknown)?;
        // As when it is opened: what is newest must still be so now that it is held.
        if self.alive_generations(id)? == alive_of(&records) {
            self.make_durable()?;
            cipher.follow(&current, keys, hold)?;
        }
        Ok(false)
    }
}

/// The record of a new data key, and the cluster record as it was before the key was wrapped.
pub(crate) struct NewRecord {
    pub(crate) record: Record,
    cluster: Record,
}

impl NewRecord {
    /// Whether the hierarchy, the cluster key and the master keys are still those that wrapped it: else whoever moves the
    /// cluster to other keys meanwhile would leave this one behind.
    pub(crate) fn fits(&self, keystore: &Keystore, root: &RootKeys) -> bool {
        let by_master_keys = keystore.hierarchy() == Hierarchy::Direct;
        keystore.hierarchy().wraps(&self.record)
            && root.still_wraps(&self.record)
            && (!by_master_keys || have_the_same_keys(keystore.cluster_record(), &self.cluster))
    }
}

/// Whether two states of the cluster record are wrapped by the same versions of the same master keys. Where a service names no
/// versions, only the same wrapping tells.
fn have_the_same_keys(a: &Record, b: &Record) -> bool {
    let same = |a: &WrappedKey, b: &WrappedKey| {
        a.master_key == b.master_key
            && a.key_version == b.key_version
            && (!a.key_version.is_empty() || a.blob == b.blob)
    };
    a.wrappings.len() == b.wrappings.len() && a.wrappings.iter().all(|a| b.wrappings.iter().any(|b| same(a, b)))
}

/// What a database is opened with.
pub(super) type Keys = (Vec<DataKey>, Option<Hold>);

/// Records, and the keys and hierarchy under which they are wrapped.
struct Wrapped {
    root: Arc<Live<RootKeys>>,
    hierarchy: Hierarchy,
    records: Vec<Record>,
}

/// The generations that are not destroyed, with what tells their keys apart.
pub(super) fn alive_of<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<(Generation, SealId)> {
    let alive = records.into_iter().filter(|record| record.state != KeyState::Destroyed);
    alive.map(|record| (record.generation, record.seal)).collect()
}

impl ClusterInner {
    /// Whether the keystore has the generation and the open database has it now, too.
    fn find_generation(&self, database: DatabaseId, generation: Generation) -> Result<bool> {
        // Costs a few system calls if nothing changed: also a forged page may ask, and as often as it likes.
        let found = self.look(|keystore, _| {
            let record = keystore.catalogue().generation(database, generation);
            Ok(record.is_some_and(|record| record.state != KeyState::Destroyed))
        })?;
        match self.ciphers.get(database) {
            Some(cipher) if found => self.follow_one(database, &cipher).map(|()| true),
            _ => Ok(false),
        }
    }
}

impl GenerationSource for ClusterInner {
    fn look_for(&self, database: DatabaseId, generation: Generation) -> bool {
        // One thread at a time: when many readers meet a new generation at once, the key service is asked once.
        let mut failed = self.looking.lock().unwrap_or_else(PoisonError::into_inner);
        if failed.is_some_and(|before| before.elapsed() < LOOK_PAUSE) {
            return false;
        }
        let found = self.find_generation(database, generation);
        *failed = found.is_err().then(Instant::now);
        found.unwrap_or(false)
    }
}
