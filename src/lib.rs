//! Encrypts what a database engine stores, under keys that the customer holds.
//!
//! Every database has its own data key. A master key in the customer's key service wraps the data keys; whoever holds the
//! master key decides whether the data can be read. Pages are sealed with hardware AES-GCM, at nearly the speed of the
//! cipher itself.
//!
//! ```
//! use pageseal::{Cluster, ClusterOptions, LocalKeyFile, PageFileOptions, Read, Threads, Wrappers};
//!
//! # let dir = std::env::temp_dir().join(format!("pageseal-doc-lib-{}", std::process::id()));
//! # std::fs::create_dir_all(&dir)?;
//! // The master key. A key file is for trying things out; in production implement `KeyWrapper` over your key service.
//! let master = LocalKeyFile::create(dir.join("master.key"))?;
//! let cluster = Cluster::create(&dir.join("cluster"), ClusterOptions::new(), Wrappers::one(master))?;
//! let orders = cluster.create_database("orders")?;
//!
//! // An engine with storage of its own seals its pages where they are.
//! let cipher = orders.cipher()?;
//! let context = pageseal::PageContext::page(pageseal::FileId::new(1), 42);
//! let mut page = vec![7u8; 4096]; // The last 48 bytes are the trailer's.
//! cipher.seal_in_place(&context, &mut page)?;
//! cipher.open_in_place(&context, &mut page)?;
//!
//! // Or pageseal keeps the file.
//! let file = orders.create_page_file("table", PageFileOptions::new())?;
//! let mut appender = file.append()?;
//! appender.write(Threads::shared(), &vec![1; 10 * file.payload_len()])?;
//! appender.finish()?;
//! let mut payload = vec![0; file.payload_len()];
//! assert_eq!(file.read(3, &mut payload)?, Read::Page);
//! # std::fs::remove_dir_all(&dir)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What is protected
//!
//! Against whoever can read and change the disk, the backups and the network storage, but not this process:
//!
//! - The contents of pages, and the names of databases and files.
//! - Their integrity and place: a page that was changed, moved, swapped with another (of this or another file, database,
//!   cluster or generation) or cut short does not open. An older image of the same page is refused where the engine gives
//!   a version ([`PageContext::with_version`]).
//! - The keys: data keys rest wrapped by the master key, and live in locked, non-dumpable memory that is wiped on drop and
//!   in forked children.
//! - Nonces: two openings, restored copies and forks never seal different data under one key and nonce; the copies of a
//!   cloned machine are kept apart by 64 random bits for each call ([`Cluster::resumed`]).
//!
//! # What is not
//!
//! Sizes, numbers and times of pages and files, ids, dates and the names of master keys; the return of a whole older file;
//! an older image of a page without a version; the moving of [`Location::Unbound`] pages; an attacker inside this process.
//! This is no FIPS-validated module. SECURITY.md says more.
//!
//! # What is not there yet
//!
//! Commits that rewrite pages durably, checking the master key regularly and disabling a running cluster by itself when it is
//! revoked, re-encrypting what older generations sealed, backups, and the adapters to key services and engines. The
//! documentation of each type says what it does today.
//!
//! # Where things are
//!
//! | to | use |
//! |---|---|
//! | seal and open pages of your own | [`PageCipher`], [`PageContext`]; in batches [`PageJob`] on a [`Pool`] |
//! | store pages | [`PageFile`] |
//! | manage databases and their keys | [`Cluster`], [`Database`] |
//! | rotate and rewrap keys | [`Database::rotate`], [`Cluster::rewrap`], [`Cluster::set_hierarchy`] |
//! | destroy keys for good | [`Cluster::drop_database`], [`Database::destroy_generation`] |
//! | stop everything at once, and come back | [`Cluster::disable`], [`Cluster::retry`] |
//! | connect a key service | [`KeyWrapper`], [`Wrappers`]; [`LocalKeyFile`] to try things out |
//! | test your own code against failing key services | `ScriptedWrapper`, feature `test-util` |
//!
//! # Features
//!
//! | feature | adds |
//! |---|---|
//! | `rustcrypto` | AES-256-GCM by the `aes-gcm` crate, as an alternative that one chooses with [`ClusterOptions::aes_backend`] |
//! | `aegis` | [`Suite::Aegis256X2`], twice as fast; needs AES hardware, builds C, not for FIPS |
//! | `test-util` | `ScriptedWrapper`, injected randomness, and raw access for test vectors |
//!
//! Features only add: none changes what the others do, and none weakens anything.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "pageseal runs on Linux x86-64 only, so far: its key memory needs MADV_WIPEONFORK, and wiping registers is written for x86-64"
);

mod aead;
mod cluster;
mod database;
mod env;
mod error;
mod format;
mod ids;
mod keys;
mod kms;
mod page;
mod registry;
mod rotation;
mod secret;
mod storage;
#[cfg(feature = "test-util")]
pub mod testing;

pub use aead::{AesBackend, AesHardware};
pub use cluster::{Cluster, ClusterOptions, Maintained, Shredded};
pub use database::Database;
#[cfg(feature = "test-util")]
pub use env::{Entropy, NoRandomness};
pub use error::{Error, ErrorKind, KmsClass, KmsError, PageError, Result};
pub use format::keystore::Hierarchy;
pub use format::page::{Location, MAX_PAYLOAD, OVERHEAD, PageContext, Suite, Trailer};
pub use format::wrapped::Purpose;
pub use ids::{ClusterId, DatabaseId, FileId, Generation, MasterKeyId, SealId};
pub use keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
pub use keys::wrappers::Wrappers;
#[cfg(feature = "tokio")]
pub use kms::asynchronous::{AsyncKeyWrapper, FromAsync};
pub use kms::local::LocalKeyFile;
#[cfg(any(test, feature = "test-util"))]
pub use kms::scripted::ScriptedWrapper;
#[cfg(feature = "vault")]
pub use kms::vault::{VaultAuth, VaultTransit, VaultTransitBuilder};
pub use page::batch::PageJob;
pub use page::cipher::PageCipher;
pub use page::pool::{Inline, Pool};
pub use page::threads::Threads;
pub use rotation::Progress;
pub use secret::KeyPayload;
pub use storage::appender::Appender;
pub use storage::page_file::{PageFile, PageFileOptions, Read, ReadJob};
