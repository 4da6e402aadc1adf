//! pageseal

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
compile_error!(
    "pageseal runs on Linux x86-64 only, so far: its key memory needs MADV_WIPEONFORK, and wiping registers is written for x86-64"
);

mod aead;
mod env;
mod error;
mod format;
mod ids;
mod keys;
mod page;
mod secret;
mod storage;
#[cfg(feature = "test-util")]
pub mod testing;

pub use aead::{AesBackend, AesHardware};
#[cfg(feature = "test-util")]
pub use env::{Entropy, NoRandomness};
pub use error::{Error, ErrorKind, KmsClass, KmsError, PageError, Result};
pub use format::page::{Location, MAX_PAYLOAD, OVERHEAD, PageContext, Suite, Trailer};
pub use format::wrapped::Purpose;
pub use ids::{ClusterId, DatabaseId, FileId, Generation, MasterKeyId, SealId};
pub use keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
pub use page::batch::PageJob;
pub use page::cipher::PageCipher;
pub use page::pool::{Inline, Pool, Threads};
pub use secret::KeyPayload;
pub use storage::page_file::{Appender, PageFile, PageFileOptions, Read, ReadJob};
