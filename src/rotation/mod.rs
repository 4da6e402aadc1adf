//! Keys that change while a cluster runs: new data keys ([`rotate`]), a new cluster key ([`cluster_key`]), other master keys
//! ([`rewrap`], [`repair`]), another hierarchy ([`hierarchy`]). No page is rewritten by any of them.
//!
//! What can take long is done in parts, each durable when it is done: after an interruption the same call goes on where it
//! was. Old wrappings leave the keystore only at the end, when every key was seen to unwrap under the new ones.

pub(crate) mod cluster_key;
pub(crate) mod hierarchy;
pub(crate) mod repair;
pub(crate) mod rewrap;
pub(crate) mod rotate;

use crate::format::record::{KeyState, Record};
use crate::keys::keystore::Keystore;
use crate::keys::wrapper::WrappedKey;

/// How many keys are wrapped anew between two changes of the keystore.
const PART: usize = 128;

/// How far a long operation is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Progress {
    /// The keys that are done, of this call and of those before it that were interrupted.
    pub done: usize,
    /// All keys.
    pub total: usize,
}

/// The records of all data keys that were not destroyed.
fn alive(keystore: &Keystore) -> impl Iterator<Item = &Record> {
    keystore.catalogue().records().filter(|record| record.state != KeyState::Destroyed)
}

/// `record` as it is, with these wrappings.
fn rewrapped(record: &Record, wrappings: Vec<WrappedKey>) -> Record {
    Record { wrappings, ..record.clone() }
}

/// Whether two wrappings are by the same version of the same master key.
fn same_key(a: &WrappedKey, b: &WrappedKey) -> bool {
    a.master_key == b.master_key && a.key_version == b.key_version
}

/// `existing` with `new` in it, in the place of older wrappings by the same versions.
fn merged(existing: &[WrappedKey], new: Vec<WrappedKey>) -> Vec<WrappedKey> {
    let mut all: Vec<_> = existing.iter().filter(|old| !new.iter().any(|new| same_key(old, new))).cloned().collect();
    all.extend(new);
    all
}
