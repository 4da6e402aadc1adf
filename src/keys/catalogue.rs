//! The catalogue: what the keystore knows, as the sum of its operations.
//!
//! A change is applied at once and can be taken back until it is durable: each table keeps a journal of what it replaced.
//! So a change costs the same whatever the size of the catalogue, and one that breaks a rule, or could not be written,
//! leaves nothing behind.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::hash::{BuildHasher, BuildHasherDefault, Hash, Hasher};

use crate::error::ErrorKind;
use crate::format::keystore::{KeyUse, Operation, OwnerId, OwnerKind, SealedName};
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{DatabaseId, Generation};

/// What a [`Table`] needs of a map.
trait Map<K, V>: Default {
    fn insert(&mut self, key: K, value: V) -> Option<V>;
    fn remove(&mut self, key: &K) -> Option<V>;
}

impl<K: Ord, V> Map<K, V> for BTreeMap<K, V> {
    fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.insert(key, value)
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        self.remove(key)
    }
}

impl<K: Eq + Hash, V, S: BuildHasher + Default> Map<K, V> for HashMap<K, V, S> {
    fn insert(&mut self, key: K, value: V) -> Option<V> {
        self.insert(key, value)
    }

    fn remove(&mut self, key: &K) -> Option<V> {
        self.remove(key)
    }
}

/// A map that remembers what it replaced until it is told to keep the changes or to take them back.
struct Table<K, V, M = BTreeMap<K, V>> {
    map: M,
    replaced: Vec<(K, Option<V>)>,
}

impl<K, V, M: Default> Default for Table<K, V, M> {
    fn default() -> Self {
        Self { map: M::default(), replaced: Vec::new() }
    }
}

impl<K: Copy, V, M: Map<K, V>> Table<K, V, M> {
    /// Returns what it replaced.
    fn set(&mut self, key: K, value: Option<V>) -> Option<&V> {
        let old = match value {
            Some(value) => self.map.insert(key, value),
            None => self.map.remove(&key),
        };
        self.replaced.push((key, old));
        self.replaced.last().and_then(|(_, old)| old.as_ref())
    }

    fn keep(&mut self) {
        // Its memory stays for the next change, but not that of one which touched every entry.
        self.replaced.clear();
        self.replaced.shrink_to(16);
    }

    fn take_back(&mut self) {
        while let Some((key, old)) = self.replaced.pop() {
            match old {
                Some(value) => self.map.insert(key, value),
                None => self.map.remove(&key),
            };
        }
    }
}

/// A table that is only looked up in, never gone through: an entry is found at once, however many there are. Its keys end in
/// a look-up value, which is an HMAC: as good as any hash of it, and nobody without the cluster's keys can choose it.
type Index<K, V> = Table<K, V, HashMap<K, V, BuildHasherDefault<LookUpHasher>>>;

/// Takes the last eight bytes that it is given for their hash.
#[derive(Default)]
struct LookUpHasher(u64);

impl Hasher for LookUpHasher {
    fn write(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last_chunk() {
            self.0 = u64::from_le_bytes(*last);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Databases, their keys, and who uses them.
#[derive(Default)]
pub(crate) struct Catalogue {
    databases: Table<DatabaseId, SealedName>,
    names: Index<[u8; 32], DatabaseId>,
    generations: Table<(DatabaseId, Generation), Record>,
    /// Which generation has a lock, by its number.
    locks: Table<u32, (DatabaseId, Generation)>,
    probe: Table<(), Record>,
    key_uses: Table<(DatabaseId, OwnerKind, OwnerId), KeyUse>,
    key_use_names: Index<(DatabaseId, OwnerKind, [u8; 32]), OwnerId>,
}

impl PartialEq for Catalogue {
    fn eq(&self, other: &Self) -> bool {
        self.databases.map == other.databases.map
            && self.names.map == other.names.map
            && self.generations.map == other.generations.map
            && self.locks.map == other.locks.map
            && self.probe.map == other.probe.map
            && self.key_uses.map == other.key_uses.map
            && self.key_use_names.map == other.key_use_names.map
    }
}

/// What is looked up.
impl Catalogue {
    /// All databases, with their names.
    pub(crate) fn databases(&self) -> impl Iterator<Item = (DatabaseId, &SealedName)> {
        self.databases.map.iter().map(|(&database, name)| (database, name))
    }

    /// The database whose name has this HMAC.
    pub(crate) fn find_database(&self, lookup: &[u8; 32]) -> Option<DatabaseId> {
        self.names.map.get(lookup).copied()
    }

    /// The name of a database.
    pub(crate) fn database_name(&self, database: DatabaseId) -> Option<&SealedName> {
        self.databases.map.get(&database)
    }

    /// The records of a database's data keys, oldest first. New seals use the last. States are as they were written: a
    /// newer generation does not retire the one before by itself.
    pub(crate) fn generations(&self, database: DatabaseId) -> impl DoubleEndedIterator<Item = &Record> {
        let all = (database, Generation::FIRST)..=(database, Generation::MAX);
        self.generations.map.range(all).map(|(_, record)| record)
    }

    /// The record of one data key.
    pub(crate) fn generation(&self, database: DatabaseId, generation: Generation) -> Option<&Record> {
        self.generations.map.get(&(database, generation))
    }

    /// A number for the lock of the next data key. They follow each other, so that the system can join the locks of a process
    /// that has many; one whose database was dropped may come again, after nobody holds it any more. `None` if there is none.
    pub(crate) fn next_lock(&self) -> Option<u32> {
        self.locks.map.last_key_value().map_or(0, |(last, _)| *last).checked_add(1)
    }

    /// The records of all data keys, by database and generation.
    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.generations.map.values()
    }

    /// The latest probe.
    pub(crate) fn probe(&self) -> Option<&Record> {
        self.probe.map.get(&())
    }

    /// Everybody who uses a database's keys.
    pub(crate) fn key_uses(&self, database: DatabaseId) -> impl Iterator<Item = &KeyUse> {
        let least = (database, OwnerKind::PageFile, OwnerId([0; 16]));
        let most = (database, OwnerKind::External, OwnerId([0xff; 16]));
        self.key_uses.map.range(least..=most).map(|(_, key_use)| key_use)
    }

    /// The user of this kind whose name has this HMAC.
    pub(crate) fn find_key_use(&self, database: DatabaseId, kind: OwnerKind, lookup: &[u8; 32]) -> Option<&KeyUse> {
        let owner = self.key_use_names.map.get(&(database, kind, *lookup))?;
        self.key_uses.map.get(&(database, kind, *owner))
    }

    /// Whether this can be what `before` was changed to. No database loses its newest key, no key becomes another one, and
    /// none that was destroyed comes back, unless the whole database goes.
    pub(crate) fn may_have_become_of(&self, before: &Self) -> bool {
        before.records().filter(|old| self.has_database(old.database)).all(|old| {
            self.generation(old.database, old.generation).is_some_and(|new| {
                (new.seal, new.lock) == (old.seal, old.lock)
                    && (old.state != KeyState::Destroyed || new.state == KeyState::Destroyed)
            })
        })
    }

    /// How many databases, keys and users of keys there are.
    pub(crate) fn len(&self) -> usize {
        self.databases.map.len() + self.generations.map.len() + self.key_uses.map.len()
    }

    /// The whole catalogue as operations that make it anew, in parts that must each stay in one group: a new database and its
    /// first key. Whatever else a database has can go into further groups, so that it may have any number of keys and users.
    pub(crate) fn operations(&self) -> impl Iterator<Item = Vec<Operation>> {
        let probe = self.probe().map(|probe| vec![Operation::Probe(probe.clone())]);
        probe.into_iter().chain(self.databases().flat_map(|(database, name)| {
            let mut generations = self.generations(database).cloned().map(Operation::Generation);
            let mut first = vec![Operation::Database { database, name: name.clone() }];
            first.extend(generations.next());
            let key_uses = self.key_uses(database).cloned().map(Operation::KeyUseAdd);
            std::iter::once(first).chain(generations.chain(key_uses).map(|operation| vec![operation]))
        }))
    }
}

/// Operations that do not fit the catalogue, or each other.
#[derive(Debug)]
pub(crate) struct Conflict {
    pub(crate) kind: ErrorKind,
    what: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

fn is_taken(other: DatabaseId) -> Result<(), Conflict> {
    conflict(ErrorKind::AlreadyExists, format!("there is a database of this name already, {other}"))
}

fn conflict<T>(kind: ErrorKind, what: String) -> Result<T, Conflict> {
    Err(Conflict { kind, what })
}

/// How it changes. After [`Catalogue::apply`] succeeded, the caller decides between [`Catalogue::keep`] and
/// [`Catalogue::take_back`]; in between the catalogue shows the change.
impl Catalogue {
    /// Applies these operations, one after the other. If one does not fit, none of them was applied.
    pub(crate) fn apply(&mut self, operations: impl IntoIterator<Item = Operation>) -> Result<(), Conflict> {
        let applied = self.apply_all(operations);
        if applied.is_err() {
            self.take_back();
        }
        applied
    }

    /// The changes since the last `keep` stay.
    pub(crate) fn keep(&mut self) {
        self.databases.keep();
        self.names.keep();
        self.generations.keep();
        self.locks.keep();
        self.probe.keep();
        self.key_uses.keep();
        self.key_use_names.keep();
    }

    /// The changes since the last `keep` never were.
    pub(crate) fn take_back(&mut self) {
        self.databases.take_back();
        self.names.take_back();
        self.generations.take_back();
        self.locks.take_back();
        self.probe.take_back();
        self.key_uses.take_back();
        self.key_use_names.take_back();
    }

    /// Puts another sealed form in the place of every name, for a new cluster key; the names stay what they are. `reseal`
    /// is given the database whose scope the name is in (`None` for names of databases), its owner and its sealed form.
    pub(crate) fn reseal_names<E>(
        &mut self,
        mut reseal: impl FnMut(Option<DatabaseId>, [u8; 16], &[u8]) -> Result<Vec<u8>, E>,
    ) -> Result<(), E> {
        for database in self.databases.map.keys().copied().collect::<Vec<_>>() {
            let name = &self.databases.map[&database];
            let sealed = reseal(None, database.to_bytes(), &name.sealed)?;
            let name = SealedName { lookup: name.lookup, sealed };
            self.databases.set(database, Some(name));
        }
        for key in self.key_uses.map.keys().copied().collect::<Vec<_>>() {
            let mut key_use = self.key_uses.map[&key].clone();
            if let Some(name) = &mut key_use.name {
                name.sealed = reseal(Some(key.0), key.2.0, &name.sealed)?;
                self.key_uses.set(key, Some(key_use));
            }
        }
        Ok(())
    }

    fn apply_all(&mut self, operations: impl IntoIterator<Item = Operation>) -> Result<(), Conflict> {
        // Databases whose first key did not follow at once, as it does in what we write: these are looked up at the end.
        let mut added = Vec::new();
        for operation in operations {
            match &operation {
                Operation::Database { database, .. } => added.push(*database),
                Operation::Generation(record) => drop(added.pop_if(|database| *database == record.database)),
                _ => {}
            }
            self.apply_one(operation)?;
        }
        // Only at the end of a group it shows whether a database has a key: without, it would be one that nothing opens.
        match added.into_iter().find(|&database| !self.has_generation(database) && self.has_database(database)) {
            Some(database) => {
                conflict(ErrorKind::Invalid, format!("database {database} is added without its first data key"))
            }
            None => Ok(()),
        }
    }

    fn apply_one(&mut self, operation: Operation) -> Result<(), Conflict> {
        match operation {
            Operation::Database { database, name } => self.add_database(database, name),
            Operation::Rename { database, name } => self.rename(database, name),
            Operation::Drop { database } => self.drop_database(database),
            Operation::Generation(record) => self.add_generation(record),
            Operation::State { database, generation, state } => self.set_state(database, generation, state),
            Operation::Wrapping(record) => self.set_wrappings(record),
            Operation::Probe(record) => {
                self.probe.set((), Some(record));
                Ok(())
            }
            Operation::KeyUseAdd(key_use) => self.add_key_use(key_use),
            Operation::KeyUseRaise { kind, owner, database, oldest } => self.raise((database, kind, owner), oldest),
            Operation::KeyUseRelease { kind, owner, database } => self.release((database, kind, owner)),
        }
    }

    fn add_database(&mut self, database: DatabaseId, name: SealedName) -> Result<(), Conflict> {
        // What is found to be there is put back with the rest: see `apply`.
        if let Some(&other) = self.names.set(name.lookup, Some(database)) {
            return is_taken(other);
        }
        if self.databases.set(database, Some(name)).is_some() {
            return conflict(ErrorKind::AlreadyExists, format!("there is a database {database} already"));
        }
        Ok(())
    }

    fn rename(&mut self, database: DatabaseId, name: SealedName) -> Result<(), Conflict> {
        self.require_database(database)?;
        self.require_free(&name.lookup, Some(database))?;
        if let Some(old) = self.database_name(database).map(|name| name.lookup) {
            self.names.set(old, None);
        }
        self.names.set(name.lookup, Some(database));
        self.databases.set(database, Some(name));
        Ok(())
    }

    fn drop_database(&mut self, database: DatabaseId) -> Result<(), Conflict> {
        self.require_database(database)?;
        if let Some(name) = self.database_name(database).map(|name| name.lookup) {
            self.names.set(name, None);
        }
        self.databases.set(database, None);
        for generation in self.generations(database).map(|record| record.generation).collect::<Vec<_>>() {
            if let Some(lock) = self.generation(database, generation).map(|record| record.lock) {
                self.locks.set(lock, None);
            }
            self.generations.set((database, generation), None);
        }
        for (kind, owner) in self.key_uses(database).map(|user| (user.kind, user.owner)).collect::<Vec<_>>() {
            self.release((database, kind, owner))?;
        }
        Ok(())
    }

    fn add_generation(&mut self, record: Record) -> Result<(), Conflict> {
        let (database, generation) = (record.database, record.generation);
        let last = match self.generations(database).next_back() {
            Some(record) => record.generation.get(),
            None => {
                self.require_database(database)?;
                0
            }
        };
        if generation.get() != last + 1 {
            let what = format!("generation {generation} of database {database} does not follow generation {last}");
            return conflict(ErrorKind::Invalid, what);
        }
        if let Some((other, _)) = self.locks.set(record.lock, Some((database, generation))) {
            let what = format!("generation {generation} of database {database} has a lock that database {other} has");
            return conflict(ErrorKind::Invalid, what);
        }
        self.generations.set((database, generation), Some(record));
        Ok(())
    }

    /// A key's state only goes forward, and one that somebody needs is never destroyed.
    fn set_state(&mut self, database: DatabaseId, generation: Generation, state: KeyState) -> Result<(), Conflict> {
        let mut record = self.require_generation(database, generation)?.clone();
        use KeyState::{Active, Destroyed, Retired};
        let forward = matches!((record.state, state), (Active, Retired) | (Active | Retired, Destroyed));
        if !forward {
            let what = format!("generation {generation} of database {database} cannot become {state:?}");
            return conflict(ErrorKind::Invalid, what);
        }
        if state == KeyState::Destroyed {
            self.require_unused(database, generation)?;
            record.wrappings.clear();
        }
        record.state = state;
        self.generations.set((database, generation), Some(record));
        Ok(())
    }

    fn require_unused(&self, database: DatabaseId, generation: Generation) -> Result<(), Conflict> {
        if self.generations(database).next_back().map(|record| record.generation) == Some(generation) {
            let what = format!("generation {generation} of database {database} is the one that new seals use");
            return conflict(ErrorKind::InUse, what);
        }
        match self.key_uses(database).filter(|user| user.oldest <= generation).count() {
            0 => Ok(()),
            users => {
                let what = format!("{users} still use generation {generation} of database {database}");
                conflict(ErrorKind::InUse, what)
            }
        }
    }

    fn set_wrappings(&mut self, record: Record) -> Result<(), Conflict> {
        let known = match record.purpose {
            Purpose::Probe => self.probe(),
            _ => self.generation(record.database, record.generation),
        };
        let same = known.is_some_and(|known| Record { wrappings: known.wrappings.clone(), ..record.clone() } == *known);
        if !same {
            let what = format!(
                "generation {} of database {} is wrapped anew, and is no such key",
                record.generation, record.database
            );
            return conflict(ErrorKind::Invalid, what);
        }
        match record.purpose {
            Purpose::Probe => self.probe.set((), Some(record)),
            _ => self.generations.set((record.database, record.generation), Some(record)),
        };
        Ok(())
    }

    fn add_key_use(&mut self, key_use: KeyUse) -> Result<(), Conflict> {
        let KeyUse { kind, owner, database, oldest, .. } = key_use;
        self.require_usable(database, oldest)?;
        if self.key_uses.map.contains_key(&(database, kind, owner)) {
            let what = format!("this owner uses the keys of database {database} already");
            return conflict(ErrorKind::AlreadyExists, what);
        }
        if let Some(name) = &key_use.name {
            let key = (database, kind, name.lookup);
            if self.key_use_names.map.contains_key(&key) {
                let what = format!("database {database} has one of this kind and name already");
                return conflict(ErrorKind::AlreadyExists, what);
            }
            self.key_use_names.set(key, Some(owner));
        }
        self.key_uses.set((database, kind, owner), Some(key_use));
        Ok(())
    }

    fn raise(&mut self, key: (DatabaseId, OwnerKind, OwnerId), oldest: Generation) -> Result<(), Conflict> {
        self.require_usable(key.0, oldest)?;
        let mut key_use = self.require_key_use(key)?.clone();
        if oldest < key_use.oldest {
            let what =
                format!("a user of database {} that needs generation {} on cannot need less", key.0, key_use.oldest);
            return conflict(ErrorKind::Invalid, what);
        }
        key_use.oldest = oldest;
        self.key_uses.set(key, Some(key_use));
        Ok(())
    }

    fn release(&mut self, key: (DatabaseId, OwnerKind, OwnerId)) -> Result<(), Conflict> {
        let name = self.require_key_use(key)?.name.as_ref().map(|name| name.lookup);
        if let Some(lookup) = name {
            self.key_use_names.set((key.0, key.1, lookup), None);
        }
        self.key_uses.set(key, None);
        Ok(())
    }

    fn require_free(&self, lookup: &[u8; 32], own: Option<DatabaseId>) -> Result<(), Conflict> {
        match self.find_database(lookup) {
            Some(other) if Some(other) != own => is_taken(other),
            _ => Ok(()),
        }
    }

    fn require_database(&self, database: DatabaseId) -> Result<(), Conflict> {
        if self.has_database(database) {
            return Ok(());
        }
        conflict(ErrorKind::NotFound, format!("there is no database {database}"))
    }

    fn require_generation(&self, database: DatabaseId, generation: Generation) -> Result<&Record, Conflict> {
        self.require_database(database)?;
        let found = self.generation(database, generation);
        let missing = || format!("database {database} has no generation {generation}");
        found.ok_or_else(|| Conflict { kind: ErrorKind::NotFound, what: missing() })
    }

    /// The generation and all that came after it are there, and not destroyed: who needs keys from one on needs the later
    /// ones, too.
    fn require_usable(&self, database: DatabaseId, generation: Generation) -> Result<(), Conflict> {
        self.require_generation(database, generation)?;
        let from = self.generations(database).rev().take_while(|record| record.generation >= generation);
        match from.filter(|record| record.state == KeyState::Destroyed).last() {
            Some(gone) => {
                let what = format!("generation {} of database {database} is destroyed", gone.generation);
                conflict(ErrorKind::Invalid, what)
            }
            None => Ok(()),
        }
    }

    fn require_key_use(&self, key: (DatabaseId, OwnerKind, OwnerId)) -> Result<&KeyUse, Conflict> {
        let missing = || format!("there is no such user of the keys of database {}", key.0);
        self.key_uses.map.get(&key).ok_or_else(|| Conflict { kind: ErrorKind::NotFound, what: missing() })
    }

    fn has_database(&self, database: DatabaseId) -> bool {
        self.databases.map.contains_key(&database)
    }

    fn has_generation(&self, database: DatabaseId) -> bool {
        self.generations(database).next().is_some()
    }
}
