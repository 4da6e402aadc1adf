//! [`Database`]: one data key, and what is sealed under it.

use std::sync::Arc;

use crate::cluster::ClusterInner;
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{KeyUse, Operation, OwnerId, OwnerKind, SealedName};
use crate::ids::{DatabaseId, FileId, Generation};
use crate::keys::names::check_name;
use crate::page::cipher::{CipherInner, PageCipher};
use crate::storage::page_file::{PageFile, PageFileOptions};
use crate::storage::place::{History, Place};

/// An open database. A handle: cloning it is cheap, and all handles of a database share its keys and its session.
#[derive(Clone)]
pub struct Database(Arc<DatabaseInner>);

pub(crate) struct DatabaseInner {
    pub(crate) cluster: Arc<ClusterInner>,
    pub(crate) id: DatabaseId,
    pub(crate) name: String,
    pub(crate) cipher: PageCipher,
}

impl Database {
    pub(crate) fn from_inner(inner: Arc<DatabaseInner>) -> Self {
        Self(inner)
    }

    pub(crate) fn cluster(&self) -> &Arc<ClusterInner> {
        &self.0.cluster
    }

    pub(crate) fn cipher_inner(&self) -> &CipherInner {
        &self.0.cipher.0
    }

    /// The database's id, which names its directory and its records.
    pub fn id(&self) -> DatabaseId {
        self.0.id
    }

    /// The name under which it was opened.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The generation that new seals use.
    pub fn generation(&self) -> Generation {
        self.0.cipher.generation()
    }

    /// A cipher for an engine that stores its pages itself. The first time, the keystore notes, durably and before anything
    /// can be sealed, that pages exist which only the engine knows of: their keys are never destroyed behind its back.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] while the cluster is disabled; [`ErrorKind::NotFound`] if the database was dropped; what
    /// changing the keystore gives if that note could not be written.
    pub fn cipher(&self) -> Result<PageCipher> {
        let inner = &*self.0;
        for _ in 0..TRIES {
            // Another process may have noted it, from a generation on that this one did not know.
            inner.cluster.follow_one(inner.id, &inner.cipher.0)?;
            // Kept until the note is there, and with it what is held for the first generation that this process may seal
            // under: nobody destroys that meanwhile.
            let open = inner.cipher.0.enter()?;
            if self.note_external(open.current_generation())? {
                // Whoever noted it may have ended before it was synced.
                inner.cluster.make_durable()?;
                return Ok(inner.cipher.keeping(Arc::clone(&inner.cluster) as _));
            }
        }
        let message = format!("other processes keep rotating database {}; try again", inner.id);
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// False if it is noted already, and from a newer generation on.
    fn note_external(&self, oldest: Generation) -> Result<bool> {
        let (cluster, database) = (&self.0.cluster, self.id());
        let noted = cluster.look(|keystore, _| Ok(external(keystore.catalogue().key_uses(database))))?;
        if let Some(noted) = noted {
            return Ok(noted <= oldest);
        }
        cluster.append(|keystore, _| {
            let key_use = KeyUse { kind: OwnerKind::External, owner: EXTERNAL, database, oldest, name: None };
            Ok(match external(keystore.catalogue().key_uses(database)) {
                Some(noted) => (Vec::new(), noted <= oldest),
                None => (vec![Operation::KeyUseAdd(key_use)], true),
            })
        })
    }

    /// The older generations under which a process may still seal, because it has not caught up with a rotation or has
    /// operations in flight. Empty within about a second after [`Database::rotate`], unless a process hangs. Only then a
    /// search for pages of older generations finds all that there will ever be.
    ///
    /// # Errors
    /// [`ErrorKind::Closed`] while the cluster is disabled; [`ErrorKind::NotFound`] if the database was dropped; what
    /// reading the keystore gives.
    pub fn generations_in_flight(&self) -> Result<Vec<Generation>> {
        let (cluster, id) = (self.cluster(), self.id());
        cluster.look(|keystore, _| {
            let all: Vec<_> = keystore.catalogue().generations(id).collect();
            let (_, older) = all
                .split_last()
                .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("database {id} was dropped")))?;
            let mut held = Vec::new();
            for record in older {
                if cluster.locks.try_destroy(record)?.is_err() {
                    held.push(record.generation);
                }
            }
            Ok(held)
        })
    }

    /// Says that nothing which engines sealed with [`Database::cipher`] needs a generation older than `below` any more: it
    /// was sealed anew, or is gone. Only the engine can know. Older generations can then be destroyed. The engine rotates,
    /// waits until [`Database::generations_in_flight`] is empty, seals anew what is older, and then calls this.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] while a process may still seal under an older one;
    /// [`ErrorKind::NotFound`] if no cipher was ever given out, or there is no such generation; [`ErrorKind::Invalid`] if
    /// that was said of a newer generation before, or one from `below` on is destroyed; [`ErrorKind::Closed`] while the cluster is disabled; what changing the
    /// keystore gives.
    pub fn release_external(&self, below: Generation) -> Result<()> {
        let raise =
            Operation::KeyUseRaise { kind: OwnerKind::External, owner: EXTERNAL, database: self.id(), oldest: below };
        let cluster = &self.0.cluster;
        cluster.follow_one(self.id(), self.cipher_inner())?;
        // What is taken is given back when the change is durable: nobody begins to seal under it in between, nor afterwards.
        cluster.append(|keystore, _| Ok((vec![raise], cluster.take_older(keystore, self.id(), below)?)))?;
        Ok(())
    }

    /// Makes a page file of this name, and notes durably in the keystore that it uses this database's keys. If that was
    /// interrupted after the note, [`Database::page_file`] finishes it.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::Invalid`] for a name or page size that cannot be;
    /// [`ErrorKind::Closed`] while the cluster is disabled; [`ErrorKind::Io`]; what changing the keystore gives.
    pub fn create_page_file(&self, name: &str, options: PageFileOptions) -> Result<PageFile> {
        check_name("page file", name)?;
        options.check()?;
        let inner = &*self.0;
        let (scope, env) = (inner.id.to_bytes(), inner.cluster.env());
        let exists = || {
            let message = format!("database {} has a page file named {name:?} already", inner.id);
            Error::new(ErrorKind::AlreadyExists, message)
        };
        inner.cluster.look(|keystore, root| {
            let look_up = root.names.look_up(&scope, name)?;
            let found = keystore.catalogue().find_key_use(inner.id, OwnerKind::PageFile, &look_up);
            found.map_or(Ok(()), |_| Err(exists()))
        })?;
        let file = FileId::new(u64::from_le_bytes(env.random()?));
        let register = |oldest| {
            inner.cluster.append(|keystore, root| {
                let lookup = root.names.look_up(&scope, name)?;
                if keystore.catalogue().find_key_use(inner.id, OwnerKind::PageFile, &lookup).is_some() {
                    return Err(exists());
                }
                let sealed = root.names.seal(env, &scope, &owner_of(file).0, name)?;
                let (kind, owner, database) = (OwnerKind::PageFile, owner_of(file), inner.id);
                let name = Some(SealedName { lookup, sealed });
                Ok((vec![Operation::KeyUseAdd(KeyUse { kind, owner, database, oldest, name })], ()))
            })
        };
        let create = || Ok(PageFile::create(self.place(file)?, &options, register)?.into_inner());
        inner.cluster.files.get_or_open((inner.id, file), create).map(PageFile::from_inner)
    }

    /// Opens the page file of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] while another process has it open; [`ErrorKind::WrongIdentity`] if
    /// another file lies in its place; [`ErrorKind::KeystoreStale`] if it has seen more of the keystore than is there;
    /// [`ErrorKind::Authentication`] or [`ErrorKind::Damaged`] if its header is not what was written;
    /// [`ErrorKind::Closed`] while the cluster is disabled.
    pub fn page_file(&self, name: &str) -> Result<PageFile> {
        let inner = &*self.0;
        let file = file_of(self.find_page_file(name)?);
        // It is noted to need keys from some generation on; nothing in it may be sealed under an older one.
        inner.cluster.follow_one(inner.id, self.cipher_inner())?;
        // Who noted it may have ended before it was synced; nothing is written to a file that a power cut makes nobody's.
        inner.cluster.make_durable()?;
        let open = || Ok(PageFile::open(self.place(file)?)?.into_inner());
        inner.cluster.files.get_or_open((inner.id, file), open).map(PageFile::from_inner)
    }

    /// Removes a page file for good. It must not be open anywhere: drop its handles first.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::InUse`] while it is open, here or in another process;
    /// [`ErrorKind::Closed`] while the cluster is disabled; [`ErrorKind::Io`], after which it can be removed again.
    pub fn remove_page_file(&self, name: &str) -> Result<()> {
        let inner = &*self.0;
        let owner = self.find_page_file(name)?;
        // Nobody opens it from here on.
        let place = self.place(file_of(owner))?;
        let path = place.remove()?;
        let release = Operation::KeyUseRelease { kind: OwnerKind::PageFile, owner, database: inner.id };
        // The file goes first: without it the note does no harm, without the note the file would be nobody's.
        inner.cluster.append(|_, _| Ok((vec![release], ()))).map_err(|error| {
            Error::with_source(error.kind(), format!("{} is removed, but still noted: {error}", path.display()), error)
        })
    }

    fn find_page_file(&self, name: &str) -> Result<OwnerId> {
        let inner = &*self.0;
        let owner = inner.cluster.look(|keystore, root| {
            let look_up = root.names.look_up(&inner.id.to_bytes(), name)?;
            let found = keystore.catalogue().find_key_use(inner.id, OwnerKind::PageFile, &look_up);
            Ok(found.map(|noted| noted.owner))
        })?;
        owner.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("database {} has no page file named {name:?}", inner.id))
        })
    }

    /// Where a page file lies; taken for this process.
    fn place(&self, file: FileId) -> Result<Place> {
        let inner = &*self.0;
        let owner = inner.cluster.locks.try_own_file(inner.id, file)?;
        let owner = owner.ok_or_else(|| {
            let message =
                format!("page file {file} of database {} is open in another process or being removed", inner.id);
            Error::new(ErrorKind::InUse, message)
        })?;
        Ok(Place {
            cluster: inner.cluster.id,
            database: inner.id,
            file,
            directory: inner.cluster.directory.join(inner.id.to_string()),
            cipher: inner.cipher.clone(),
            backend: inner.cluster.backend(),
            env: inner.cluster.env().clone(),
            history: Arc::clone(&inner.cluster) as Arc<dyn History>,
            owner: Some(owner),
        })
    }
}

/// How often giving out a cipher begins anew when other processes rotate the database meanwhile.
const TRIES: usize = 8;
/// All ciphers that engines were given are one user of the keys.
const EXTERNAL: OwnerId = OwnerId([0; 16]);

/// From which generation on engines need the keys, if they were ever given a cipher.
fn external<'a>(mut users: impl Iterator<Item = &'a KeyUse>) -> Option<Generation> {
    users.find(|user| user.kind == OwnerKind::External).map(|user| user.oldest)
}

impl std::fmt::Debug for Database {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Database").field("id", &self.0.id).finish_non_exhaustive()
    }
}

/// A file as the owner of a key use: `file id u64 | 0^8`.
fn owner_of(file: FileId) -> OwnerId {
    let mut owner = [0; 16];
    owner[..8].copy_from_slice(&file.get().to_le_bytes());
    OwnerId(owner)
}

pub(crate) fn file_of(owner: OwnerId) -> FileId {
    let (file, _) = owner.0.split_first_chunk().expect("16 bytes begin with 8");
    FileId::new(u64::from_le_bytes(*file))
}
