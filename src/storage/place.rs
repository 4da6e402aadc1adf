//! Where a page file lies and what belongs in its place: its header slots, sealed and read, and its making.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::aead::AesBackend;
use crate::env::Env;
use crate::error::{Error, ErrorKind, PageError, Result};
use crate::format::derive::Label;
use crate::format::file_header::{BODY_LEN, CLEAR_LEN, ClearHeader, HeaderBody, SLOT_LEN, Seen, unknown_version};
use crate::format::page::{NONCE_LEN, OVERHEAD, SALT_LEN, SubkeyName, Trailer};
use crate::ids::{ClusterId, DatabaseId, FileId};
use crate::keys::keyring::DataKey;
use crate::page::cipher::PageCipher;
use crate::storage::disk::make_directories;
use crate::storage::locks::FileOwner;

/// Where a page file belongs, and what it is opened with.
pub(crate) struct Place {
    pub(crate) cluster: ClusterId,
    pub(crate) database: DatabaseId,
    pub(crate) file: FileId,
    pub(crate) directory: PathBuf,
    pub(crate) cipher: PageCipher,
    pub(crate) backend: AesBackend,
    pub(crate) env: Env,
    /// The cluster's keystore, as it grows.
    pub(crate) history: Arc<dyn History>,
    /// Held as long as the file is open: no other process has it.
    #[allow(dead_code)] // kept for its drop
    pub(crate) owner: Option<FileOwner>,
}

/// The history of the cluster's keystore: it only grows, so one that lacks what a file has seen was put back from a copy.
pub(crate) trait History: Send + Sync {
    /// The last change.
    fn now(&self) -> Seen;

    /// Whether it has this change. If not, the implementor changes nothing any more.
    ///
    /// # Errors
    /// Those of looking at what other processes changed.
    fn has(&self, seen: &Seen) -> Result<bool>;
}

impl Place {
    pub(super) fn path(&self) -> PathBuf {
        self.directory.join(self.file.to_string())
    }

    /// Where a file lies between its making and its registration.
    pub(super) fn unregistered(&self) -> PathBuf {
        self.path().with_extension("new")
    }

    /// Removes the file, durably, wherever a creation or a removal that was interrupted left it. Returns where it lay.
    pub(crate) fn remove(&self) -> Result<PathBuf> {
        let path = self.path();
        let removed = [&path, &self.unregistered()].into_iter().try_for_each(|path| match fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        });
        let synced = removed.and_then(|()| match File::open(&self.directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            directory => directory?.sync_all(),
        });
        synced.map_err(|error| Error::io(format!("removing {}", path.display()), error))?;
        Ok(path)
    }

    fn check(&self, clear: &ClearHeader, path: &Path) -> Result<()> {
        if (clear.cluster, clear.database, clear.file) == (self.cluster, self.database, self.file) {
            return Ok(());
        }
        let message = format!(
            "{} is file {} of database {} in cluster {}, not file {} of database {} in cluster {}; put the right file back",
            path.display(),
            clear.file,
            clear.database,
            clear.cluster,
            self.file,
            self.database,
            self.cluster
        );
        Err(Error::new(ErrorKind::WrongIdentity, message))
    }

    /// Seals a header slot under `key`, a salt and a nonce of its own.
    pub(super) fn seal_slot(&self, key: &DataKey, clear: &ClearHeader, body: &HeaderBody) -> Result<[u8; SLOT_LEN]> {
        let salt: [u8; SALT_LEN] = self.env.random()?;
        let nonce: [u8; NONCE_LEN] = self.env.random()?;
        let clear = clear.encode();
        let mut body = body.encode();
        let subkey = key.derive(Label::Head, &salt, self.backend)?;
        let tag = subkey.with(|key| key.seal(nonce, &salt, &clear, &mut body))?;
        let trailer = Trailer::new(&tag, &nonce, &SubkeyName::new(&salt, key.generation, key.suite));
        let mut slot = [0; SLOT_LEN];
        slot[..CLEAR_LEN].copy_from_slice(&clear);
        slot[CLEAR_LEN..SLOT_LEN - OVERHEAD].copy_from_slice(&body);
        slot[SLOT_LEN - OVERHEAD..].copy_from_slice(&trailer.0);
        Ok(slot)
    }

    /// The newest slot that opens. A torn write spoils one slot at most.
    pub(super) fn read_header(&self, file: &File, path: &Path) -> Result<(ClearHeader, HeaderBody)> {
        match [self.read_slot(file, path, 0), self.read_slot(file, path, 1)] {
            [Ok((clear, a)), Ok((_, b))] => Ok((clear, if a.sequence < b.sequence { b } else { a })),
            // A slot that could not be read, or is of a newer version, may be the one that counts; only one that is bad may
            // be passed over.
            [Err(error), _] | [_, Err(error)] if !is_bad_slot(&error) => Err(error),
            [Ok(read), Err(_)] | [Err(_), Ok(read)] => Ok(read),
            [Err(error), Err(_)] => Err(error),
        }
    }

    /// Refuses a file that has seen more of the keystore, or another one, than is there.
    pub(super) fn check_keystore(&self, header: &HeaderBody, path: &Path) -> Result<()> {
        if self.history.has(&header.seen)? {
            return Ok(());
        }
        let message = format!(
            "the keystore is older than {}, or of another history: it stands at change {}, the file has seen change {} of \
             its own; put the newest keystore back",
            path.display(),
            self.history.now().sequence,
            header.seen.sequence
        );
        Err(Error::new(ErrorKind::KeystoreStale, message))
    }

    fn read_slot(&self, file: &File, path: &Path, slot: u32) -> Result<(ClearHeader, HeaderBody)> {
        let mut bytes = [0; SLOT_LEN];
        let read = file.read_exact_at(&mut bytes, u64::from(slot) * SLOT_LEN as u64);
        read.map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => damaged_slot(path, slot, "it is cut short"),
            _ => Error::io(format!("reading the header of {}", path.display()), error),
        })?;
        let (clear_bytes, rest) =
            bytes.split_first_chunk_mut::<CLEAR_LEN>().expect("a slot is longer than its clear part");
        if let Some(version) = unknown_version(clear_bytes) {
            let message = format!("{} has format version {version:?}; use a newer version of pageseal", path.display());
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let clear = ClearHeader::decode(clear_bytes).map_err(|why| damaged_slot(path, slot, why.0))?;
        self.check(&clear, path)?;
        if clear.slot != slot {
            return Err(damaged_slot(path, slot, "it was written for the other slot"));
        }
        let (body, trailer) = rest.split_last_chunk_mut::<OVERHEAD>().expect("a slot is longer than its trailer");
        self.open_slot(clear_bytes, body, &Trailer(*trailer), path, slot)?;
        let body = <&[u8; BODY_LEN]>::try_from(&*body).expect("clear part, body and trailer fill a slot");
        let body = HeaderBody::decode(body).map_err(|why| damaged_slot(path, slot, why.0))?;
        Ok((ClearHeader { slot: 0, ..clear }, body))
    }

    fn open_slot(&self, aad: &[u8], body: &mut [u8], trailer: &Trailer, path: &Path, slot: u32) -> Result<()> {
        let failed = || {
            let message = format!(
                "header slot {slot} of {} (database {}) failed authentication; restore the file from a backup",
                path.display(),
                self.database
            );
            Error::new(ErrorKind::Authentication, message)
        };
        let name = trailer.subkey_name();
        let key = self.cipher.find_key(name.generation().ok_or_else(failed)?).map_err(|error| match error {
            PageError::UnknownGeneration(_) => failed(),
            error => error.into(),
        })?;
        if name.suite() != Some(key.suite) {
            return Err(failed());
        }
        let salt = name.salt();
        let subkey = key.derive(Label::Head, &salt, self.backend)?;
        let opened = subkey.with(|key| key.open(trailer.nonce(), &salt, aad, body, &trailer.tag()))?;
        opened.map_err(|_| failed())
    }
}

/// Whether an error is about what the slot holds, and not about the system or this process.
fn is_bad_slot(error: &Error) -> bool {
    use ErrorKind::*;
    matches!(error.kind(), Authentication | Damaged | WrongIdentity)
}

fn damaged_slot(path: &Path, slot: u32, why: &str) -> Error {
    Error::damaged(format!("header slot {slot} of {}: {why}; restore the file from a backup", path.display()))
}

/// Writes a new file and makes it durable, with its directory. What an earlier attempt left at `path` is removed.
pub(super) fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<File> {
    let directory = path.parent().ok_or_else(|| std::io::Error::other("the path has no directory"))?;
    make_directories(directory)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all_at(bytes, 0)?;
    file.sync_all()?;
    File::open(directory)?.sync_all()?;
    Ok(file)
}

/// Gives a new file its name. File ids are random, so none is there that it could replace.
pub(super) fn publish(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::rename(from, to)?;
    let directory = to.parent().ok_or_else(|| std::io::Error::other("the path has no directory"))?;
    File::open(directory)?.sync_all()
}
