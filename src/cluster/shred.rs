//! Taking keys away for good: dropping a database, destroying a generation. What was sealed under them is shredded with them.

use std::fmt;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::cluster::Cluster;
use crate::cluster::shared::ClusterInner;
use crate::database::{Database, file_of};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{KeyUse, Operation, OwnerKind};
use crate::format::record::{KeyState, Record};
use crate::ids::{DatabaseId, Generation, MasterKeyId};
use crate::keys::keyring::Closed;
use crate::keys::keystore::Keystore;
use crate::keys::names::CLUSTER_SCOPE;
use crate::keys::root::{RootKeys, is_by_cluster_key};
use crate::keys::store::Aside;
use crate::keys::wrapper::WrappedKey;
use crate::storage::locks::{Destroying, Holder};

/// What became unreadable when keys were destroyed, and what may still hold the keys.
///
/// The wrapped keys have left both copies of the keystore. Copies of them elsewhere can still be unwrapped by whoever may
/// use the master keys: what an import replaced (`copies`), exports and backups of the keystore, snapshots of its file
/// system, and blocks that a disk (an SSD, a
/// copy-on-write file system) has not overwritten yet. To be sure, destroy the master keys' versions, or those copies.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Shredded {
    /// The database whose keys are gone.
    pub database: DatabaseId,
    /// The generations whose keys are gone.
    pub generations: Vec<Generation>,
    /// The page files that nothing opens any more, where they lay. They were removed, except those that `left` names.
    pub files: Vec<PathBuf>,
    /// Files that could not be removed. They hold nothing that can be read.
    pub left: Vec<PathBuf>,
    /// Whether engines were given ciphers: what they sealed, wherever they store it, is unreadable, too.
    pub external: bool,
    /// The master keys that can unwrap copies of the destroyed keys, with their versions.
    pub wrapped_by: Vec<(MasterKeyId, String)>,
    /// Files beside the keystore that may still hold the wrapped keys: what an import replaced (`keystore.replaced-…`). They
    /// may hold keys of other databases that are nowhere else, so nothing but the caller removes them.
    pub copies: Vec<PathBuf>,
}

impl fmt::Display for Shredded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let keys: Vec<_> =
            self.wrapped_by.iter().map(|(key, version)| format!("{key} {version}").trim_end().to_owned()).collect();
        write!(
            f,
            "{} data keys of database {} are destroyed, with {} page files{}; copies of the keystore (exports, backups, \
             snapshots, blocks that a disk has not overwritten) can still be opened with {}",
            self.generations.len(),
            self.database,
            self.files.len(),
            if self.external { " and whatever engines sealed under them" } else { "" },
            keys.join(", ")
        )?;
        if self.copies.is_empty() {
            return Ok(());
        }
        let copies: Vec<_> = self.copies.iter().map(|path| path.display().to_string()).collect();
        write!(f, "; so can what an import replaced, unless it is removed: {}", copies.join(", "))
    }
}

impl Cluster {
    /// Drops a database for good: its keys leave both copies of the keystore before this returns, its page files are removed,
    /// and every handle of it is refused ([`PageError::Dropped`](crate::PageError::Dropped)).
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] while another process has the database open;
    /// [`ErrorKind::Closed`] while the cluster is disabled; what changing the keystore gives.
    pub fn drop_database(&self, name: &str) -> Result<Shredded> {
        self.0.drop_database(name)
    }
}

impl Database {
    /// Destroys the key of an older generation: whatever still lies sealed under it can never be read again. Refused while
    /// anybody is known to need it.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] with the names of all who need it: page files and ciphers
    /// ([`Database::release_external`]), operations in flight, another process, or new seals;
    /// [`ErrorKind::NotFound`] if there is no such generation; [`ErrorKind::Invalid`] if it is destroyed already;
    /// [`ErrorKind::Closed`] while the cluster is disabled; what changing the keystore gives.
    pub fn destroy_generation(&self, generation: Generation) -> Result<Shredded> {
        let shredded = self.cluster().destroy_generation(self.id(), generation)?;
        // No operation waits for it: what is in flight with this key can only be an opening, and ends by itself.
        self.cipher_inner().forget_generation(generation)?;
        Ok(shredded)
    }
}

impl ClusterInner {
    fn drop_database(self: &Arc<Self>, name: &str) -> Result<Shredded> {
        let shredded = self.change(|keystore, root| {
            let id = keystore.catalogue().find_database(&root.names.look_up(&CLUSTER_SCOPE, name)?);
            let id =
                id.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no database named {name:?}")))?;
            // Kept until the keys are gone, so that no process begins to seal under one of them.
            let _locks = self.take_from_others(keystore, id)?;
            let shredded = self.whole_database(keystore, id)?;
            keystore.shred(&root.mac, vec![Operation::Drop { database: id }], None)?;
            Ok(shredded)
        })?;
        // Also for a thread that is opening it right now, and is not registered yet.
        self.unfollowed.store(true, Ordering::Release);
        if let Some(cipher) = self.ciphers.get(shredded.database) {
            cipher.close(Closed::Dropped);
        }
        Ok(self.remove_files(shredded))
    }

    /// Keeps all other processes from every generation of the database.
    fn take_from_others(&self, keystore: &Keystore, id: DatabaseId) -> Result<Vec<Destroying>> {
        let alive = keystore.catalogue().generations(id).filter(|record| record.state != KeyState::Destroyed);
        alive
            .map(|record| {
                let taken = self.locks.try_take_from_others(record)?;
                taken.map_err(|_| {
                    let message =
                        format!("another process has database {id} open; close it there before it is dropped");
                    Error::new(ErrorKind::InUse, message)
                })
            })
            .collect()
    }

    fn whole_database(&self, keystore: &Keystore, database: DatabaseId) -> Result<Shredded> {
        let records: Vec<_> = keystore.catalogue().generations(database).collect();
        let directory = self.directory.join(database.to_string());
        let page_files = keystore.catalogue().key_uses(database).filter(|user| user.kind == OwnerKind::PageFile);
        Ok(Shredded {
            files: page_files.map(|user| directory.join(file_of(user.owner).to_string())).collect(),
            left: Vec::new(),
            external: keystore.catalogue().key_uses(database).any(|user| user.kind == OwnerKind::External),
            copies: self.replaced_keystores()?,
            ..shredded(keystore, database, &records)
        })
    }

    fn replaced_keystores(&self) -> Result<Vec<PathBuf>> {
        let replaced = self.store.kept(Aside::Replaced);
        replaced.map_err(|error| Error::io(format!("looking for keystores in {}", self.directory.display()), error))
    }

    /// Best effort: what is left holds nothing that can be read.
    fn remove_files(&self, mut shredded: Shredded) -> Shredded {
        let failed =
            |path: &&PathBuf| fs::remove_file(path).is_err_and(|error| error.kind() != std::io::ErrorKind::NotFound);
        shredded.left = shredded.files.iter().filter(failed).cloned().collect();
        let directory = self.directory.join(shredded.database.to_string());
        // With it go files that were never registered. Nothing else lies there.
        let _ = fs::remove_dir_all(directory);
        shredded
    }

    fn destroy_generation(&self, database: DatabaseId, generation: Generation) -> Result<Shredded> {
        if let Some(cipher) = self.ciphers.get(database) {
            // Another process may have rotated it: then our own new seals must not be in the way. If this fails, they are.
            let _ = self.follow_one(database, &cipher);
        }
        self.change(|keystore, root| {
            let record = self.refuse_if_needed(keystore, root, database, generation)?;
            let shredded = Shredded { copies: self.replaced_keystores()?, ..shredded(keystore, database, &[record]) };
            let _lock = self.take_generation(record)?;
            let state = Operation::State { database, generation, state: KeyState::Destroyed };
            keystore.shred(&root.mac, vec![state], None)?;
            Ok(shredded)
        })
    }

    /// Takes all generations below `below`, which nobody in any process seals under then.
    pub(crate) fn take_older(
        &self,
        keystore: &Keystore,
        database: DatabaseId,
        below: Generation,
    ) -> Result<Vec<Destroying>> {
        let records = keystore.catalogue().generations(database);
        let older = records.filter(|record| record.generation < below && record.state != KeyState::Destroyed);
        older.map(|record| self.take_generation(record)).collect()
    }

    fn take_generation(&self, record: &Record) -> Result<Destroying> {
        let (database, generation) = (record.database, record.generation);
        let taken = self.locks.try_destroy(record)?;
        taken.map_err(|holder| {
            let holder = match holder {
                Holder::ThisProcess => "this process has operations in flight that seal under it; try again",
                Holder::AnotherProcess => "another process may still seal under it; let it catch up, or close it",
            };
            let message = format!("generation {generation} of database {database} is in use: {holder}");
            Error::new(ErrorKind::InUse, message)
        })
    }

    /// The record of a generation that nobody needs; else names everybody who does.
    fn refuse_if_needed<'a>(
        &self,
        keystore: &'a Keystore,
        root: &RootKeys,
        database: DatabaseId,
        generation: Generation,
    ) -> Result<&'a Record> {
        let catalogue = keystore.catalogue();
        let missing = || Error::new(ErrorKind::NotFound, format!("database {database} has no generation {generation}"));
        let record = catalogue.generation(database, generation).ok_or_else(missing)?;
        let newest = catalogue.generations(database).next_back().map(|record| record.generation);
        let mut holders: Vec<_> = catalogue
            .key_uses(database)
            .filter(|user| user.oldest <= generation)
            .map(|user| describe(user, root))
            .collect();
        if newest == Some(generation) {
            holders.insert(0, "new seals (rotate first)".to_owned());
        }
        if holders.is_empty() {
            return Ok(record);
        }
        let message = format!(
            "generation {generation} of database {database} is in use by {}; re-encrypt or remove what they sealed",
            holders.join(", ")
        );
        Err(Error::new(ErrorKind::InUse, message))
    }
}

fn describe(user: &KeyUse, root: &RootKeys) -> String {
    let kind = match user.kind {
        OwnerKind::PageFile => "page file",
        OwnerKind::Log => "log",
        OwnerKind::Adapter => "adapter",
        OwnerKind::External => return "ciphers given to engines (Database::release_external)".to_owned(),
    };
    let name = user.name.as_ref().map(|name| {
        root.names.open(&user.database.to_bytes(), &user.owner.0, &name.sealed).unwrap_or_else(|_| "?".to_owned())
    });
    format!("{kind} {:?} (generation {} on)", name.unwrap_or_default(), user.oldest)
}

fn shredded(keystore: &Keystore, database: DatabaseId, records: &[&Record]) -> Shredded {
    let alive = || records.iter().filter(|record| record.state != KeyState::Destroyed);
    let mut wrapped_by = Vec::new();
    let mut note = |wrapping: &WrappedKey| {
        let key = (wrapping.master_key.clone(), wrapping.key_version.clone());
        if !wrapped_by.contains(&key) {
            wrapped_by.push(key);
        }
    };
    for wrapping in alive().flat_map(|record| &record.wrappings) {
        match is_by_cluster_key(wrapping) {
            // What a cluster key wraps, its master keys open.
            true => keystore.cluster_record().wrappings.iter().for_each(&mut note),
            false => note(wrapping),
        }
    }
    Shredded {
        database,
        generations: alive().map(|record| record.generation).collect(),
        files: Vec::new(),
        left: Vec::new(),
        external: false,
        wrapped_by,
        copies: Vec::new(),
    }
}
