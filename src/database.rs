//! [`Database`]: one data key, and what is sealed under it.

use std::sync::Arc;

use crate::cluster::ClusterInner;
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{KeyUse, Operation, OwnerId, OwnerKind, SealedName};
use crate::ids::{DatabaseId, FileId};
use crate::keys::names::check_name;
use crate::page::cipher::PageCipher;
use crate::storage::page_file::{PageFile, PageFileOptions};
use crate::storage::place::Place;

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

    /// The database's id, which names its directory and its records.
    pub fn id(&self) -> DatabaseId {
        self.0.id
    }

    /// The name under which it was opened.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A cipher for an engine that stores its pages itself. The first time, the keystore notes, durably and before anything
    /// can be sealed, that pages exist which only the engine knows of: their keys are never destroyed behind its back.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if that note could not be written.
    pub fn cipher(&self) -> Result<PageCipher> {
        let inner = &*self.0;
        let mut keystore = inner.cluster.keystore()?;
        let noted = keystore.catalogue().key_uses(inner.id).any(|key_use| key_use.kind == OwnerKind::External);
        if !noted {
            let key_use = KeyUse {
                kind: OwnerKind::External,
                owner: OwnerId([0; 16]),
                database: inner.id,
                oldest: inner.cipher.generation(),
                name: None,
            };
            inner.cluster.append(&mut keystore, vec![Operation::KeyUseAdd(key_use)])?;
        }
        Ok(inner.cipher.clone())
    }

    /// Makes a page file of this name, and notes durably in the keystore that it uses this database's keys. If that was
    /// interrupted after the note, [`Database::page_file`] finishes it.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::Invalid`] for a name or page size that cannot be; [`ErrorKind::Io`].
    pub fn create_page_file(&self, name: &str, options: PageFileOptions) -> Result<PageFile> {
        check_name("page file", name)?;
        let inner = &*self.0;
        options.check()?;
        let (scope, env) = (inner.id.to_bytes(), inner.cluster.env());
        let look_up = inner.cluster.names.look_up(&scope, name)?;
        let file = FileId::new(u64::from_le_bytes(env.random()?));
        let sealed = inner.cluster.names.seal(env, &scope, &owner_of(file).0, name)?;
        let mut keystore = inner.cluster.keystore()?;
        if keystore.catalogue().find_key_use(inner.id, OwnerKind::PageFile, &look_up).is_some() {
            let message = format!("database {} has a page file named {name:?} already", inner.id);
            return Err(Error::new(ErrorKind::AlreadyExists, message));
        }
        let key_use = KeyUse {
            kind: OwnerKind::PageFile,
            owner: owner_of(file),
            database: inner.id,
            oldest: inner.cipher.generation(),
            name: Some(SealedName { lookup: look_up, sealed }),
        };
        let register = || inner.cluster.append(&mut keystore, vec![Operation::KeyUseAdd(key_use)]);
        inner.cluster.page_file(file, || PageFile::create(self.place(file), &options, register))
    }

    /// Opens the page file of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::WrongIdentity`] if another file lies in its place;
    /// [`ErrorKind::Authentication`] or [`ErrorKind::Damaged`] if its header is not what was written.
    pub fn page_file(&self, name: &str) -> Result<PageFile> {
        let inner = &*self.0;
        let look_up = inner.cluster.names.look_up(&inner.id.to_bytes(), name)?;
        let owner = {
            let keystore = inner.cluster.keystore()?;
            keystore.catalogue().find_key_use(inner.id, OwnerKind::PageFile, &look_up).map(|noted| noted.owner)
        };
        let owner = owner.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("database {} has no page file named {name:?}", inner.id))
        })?;
        let file = file_of(owner);
        inner.cluster.page_file(file, || PageFile::open(self.place(file)))
    }

    fn place(&self, file: FileId) -> Place {
        let inner = &*self.0;
        Place {
            cluster: inner.cluster.id,
            database: inner.id,
            file,
            directory: inner.cluster.directory.join(inner.id.to_string()),
            cipher: inner.cipher.clone(),
            backend: inner.cluster.backend(),
            env: inner.cluster.env().clone(),
            keystore_sequence: Arc::clone(&inner.cluster.sequence),
        }
    }
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

fn file_of(owner: OwnerId) -> FileId {
    let (file, _) = owner.0.split_first_chunk().expect("16 bytes begin with 8");
    FileId::new(u64::from_le_bytes(*file))
}
