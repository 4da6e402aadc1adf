//! Keeping the wrapped keys in a safe place: one file that holds the whole keystore, and the way back.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::aead::check_suite;
use crate::cluster::options::ClusterOptions;
use crate::cluster::shared::{PATIENCE, root_request, unwrap_any_root};
use crate::cluster::{Cluster, ClusterInner, check_expected, check_providers, lock_file, make_cluster_directory};
use crate::error::{Error, ErrorKind, Result};
use crate::keys::chain::MAX_FILE_LEN;
use crate::keys::keystore::{Keystore, UnverifiedKeystore};
use crate::keys::root::RootKeys;
use crate::keys::store::FileStore;
use crate::keys::wrappers::Wrappers;
use crate::storage::disk::{Disk, RealDisk, directory_of};

impl Cluster {
    /// Writes the whole keystore to a file, durably: every wrapped key, and who uses it. Without the master keys it opens
    /// nothing, and tells no more than the keystore does; with them it opens everything, so whoever drops a database must
    /// think of it. Make one after each change that must not be lost with this disk.
    ///
    /// If the keystore's files were lost, damaged, or put back to an older state while the cluster was open, what this process
    /// knows of it is exported: without what other processes changed since it last looked.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if there is a file at `path`; [`ErrorKind::Closed`] while the cluster is disabled;
    /// [`ErrorKind::Io`].
    pub fn export(&self, path: &Path) -> Result<()> {
        let bytes = self.0.export()?;
        write_beside(path, &bytes, self.0.env().random()?).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let message = format!("there is a file {} already; choose another name", path.display());
                Error::new(ErrorKind::AlreadyExists, message)
            }
            _ => Error::io(format!("exporting the keystore to {}", path.display()), error),
        })
    }

    /// Puts an exported keystore in the place of one that was lost or damaged beyond repair, and opens the cluster. What
    /// was created after the export is not in it: those databases can be opened by a newer copy only, and it is as if
    /// databases dropped since were never dropped. What lay there is kept beside it as `keystore.replaced-…`,
    /// and stays until you remove it: it may hold keys that the export lacks, and also keys that are destroyed later
    /// ([`Shredded::copies`](crate::Shredded::copies)).
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`] if the keystore that is there can be verified and is not older: nothing is lost, open it;
    /// [`ErrorKind::InUse`] while anybody has the cluster open (a forked child counts until it ends): if it lost its keystore,
    /// [`Cluster::export`] there first; [`ErrorKind::NotFound`] without a file at `path`; else as [`Cluster::open`].
    pub fn import(directory: &Path, path: &Path, options: ClusterOptions, wrappers: Wrappers) -> Result<Self> {
        check_suite(options.suite)?;
        check_providers(&wrappers)?;
        make_cluster_directory(directory)?;
        let locks = lock_file(directory)?;
        let store = Arc::new(FileStore::new(Arc::clone(&options.disk), directory, Arc::clone(&locks)));
        let bytes = RealDisk.read(path, MAX_FILE_LEN as u64).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let message = format!("there is no exported keystore {}", path.display());
                Error::with_source(ErrorKind::NotFound, message, error)
            }
            _ => Error::io(format!("reading the exported keystore {}", path.display()), error),
        })?;
        let named = |error: Error| match error.kind() {
            ErrorKind::Damaged | ErrorKind::Authentication | ErrorKind::Unsupported => {
                let message = format!("the exported keystore {} cannot be imported: {error}", path.display());
                Error::with_source(error.kind(), message, error)
            }
            _ => error,
        };
        let mut exported = UnverifiedKeystore::exported(Arc::clone(&store) as _, bytes).map_err(named)?;
        check_expected(&mut exported, directory, &options, &wrappers)?;
        let (root, _) = unwrap_any_root(&wrappers, exported.headers(), |header| root_request(&options, header))?;
        let mut keystore = exported.verify(&root.mac).map_err(named)?;
        {
            let _change = locks.change(PATIENCE)?;
            let there = refuse_if_newer_is_there(&store, &root, &keystore)?;
            // Whoever has the cluster open may have keys that the exported keystore lacks, and would go on sealing under them.
            if !locks.try_be_alone()? {
                let message = format!(
                    "{} is open, here or in another process, which may know newer keys: if so, export them there; then close it \
                     everywhere before a keystore is imported",
                    directory.display()
                );
                return Err(Error::new(ErrorKind::InUse, message));
            }
            keystore.install(&root.mac, there, (options.env.now)().as_secs())?;
        }
        locks.join(PATIENCE)?;
        Self::assemble(directory, options, wrappers, locks, store, keystore, root)
    }
}

/// Makes a file, durably, where there is none: whole or not at all, wherever files can have two names. It is written under a name that nobody else has.
fn write_beside(path: &Path, bytes: &[u8], salt: [u8; 8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{:016x}.tmp", u64::from_le_bytes(salt)));
    let beside = PathBuf::from(name);
    // A link, unlike a rename, takes no other file's place.
    let written = RealDisk.write_new(&beside, bytes).and_then(|()| match fs::hard_link(&beside, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => write_at_once(path, bytes),
        linked => linked,
    });
    let removed = RealDisk.remove(&beside);
    written.and(removed)?;
    RealDisk.sync_dir(directory_of(path))
}

/// Where there are no links. A crash leaves a part, which no import takes for a whole.
fn write_at_once(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes).and_then(|()| file.sync_all()).inspect_err(|_| _ = fs::remove_file(path))
}

impl ClusterInner {
    /// The whole keystore. If both copies were lost or damaged or became unreadable while it was open, or an older one put in
    /// their place, as it was before: that may be the way to get it back.
    fn export(&self) -> Result<Vec<u8>> {
        use ErrorKind::{Authentication, Damaged, Io, KeystoreStale, NotFound};
        match self.look(|keystore, root| keystore.export(&root.mac)) {
            Err(error) if matches!(error.kind(), NotFound | Damaged | Authentication | KeystoreStale | Io) => {
                let root = self.root()?;
                self.keystore().export(&root.mac)
            }
            exported => exported,
        }
    }
}

/// An import must not take keys away that are there. Returns the last change of what is there, if that can be told.
fn refuse_if_newer_is_there(store: &Arc<FileStore>, root: &RootKeys, exported: &Keystore) -> Result<u64> {
    let there = UnverifiedKeystore::read(Arc::clone(store) as _).and_then(|there| {
        refuse_if_anothers(&there, root)?;
        there.verify(&root.mac)
    });
    match there {
        Ok(there) if there.as_of() < exported.as_of() => Ok(there.position().0),
        Ok(there) => {
            let (ours, theirs) = (there.as_of(), exported.as_of());
            let message = if there.catalogue().may_have_become_of(exported.catalogue()) {
                format!(
                    "the keystore that is there is whole, and not older than the exported one (change {ours} and {theirs}); open \
                     it instead"
                )
            } else {
                format!(
                    "the keystore that is there (change {ours}) lacks keys that the exported one (change {theirs}) has, or has \
                     others in their place: they are two histories. Export the one and move it away before the other is used"
                )
            };
            Err(Error::new(ErrorKind::AlreadyExists, message))
        }
        // Not there, or neither copy can be used: what is left of them is kept.
        Err(error) => match error.kind() {
            ErrorKind::NotFound | ErrorKind::Damaged | ErrorKind::Authentication => Ok(0),
            _ => Err(error),
        },
    }
}

fn refuse_if_anothers(there: &UnverifiedKeystore, root: &RootKeys) -> Result<()> {
    let own = root.names.cluster;
    match there.headers().first() {
        Some(other) if there.headers().iter().all(|header| header.cluster != own) => {
            let message =
                format!("the keystore that is there is of cluster {}, not {own}; move it away first", other.cluster);
            Err(Error::new(ErrorKind::WrongIdentity, message))
        }
        _ => Ok(()),
    }
}
