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

use std::collections::HashSet;

use crate::cluster::ClusterInner;
use crate::error::{Error, ErrorKind, Result};
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{DatabaseId, Generation};
use crate::keys::keystore::Keystore;
use crate::keys::many::UnwrapJob;
use crate::keys::payload;
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::Wrappers;

/// Data keys, by what names them.
type KeyIds = HashSet<(DatabaseId, Generation)>;

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

fn id_of(record: &Record) -> (DatabaseId, Generation) {
    (record.database, record.generation)
}

/// Whether a failure is about one wrapping, which can be made anew, and not about the master key or the way to it.
fn is_about_the_wrapping(error: &Error) -> bool {
    use ErrorKind::{Authentication, BadCiphertext, Damaged, Unclassified, WrongIdentity};
    matches!(error.kind(), BadCiphertext | Authentication | WrongIdentity | Damaged | Unclassified)
}

impl ClusterInner {
    /// Which of these records have only good wrappings among those that `kept` picks: each is unwrapped by itself, and must
    /// hold the key that the record promises. Wrappings that an earlier call left are not believed: the master key may have
    /// been made anew under the same name since.
    ///
    /// # Errors
    /// What the key services answered, unless it is about a wrapping.
    fn prove(&self, wrappers: &Wrappers, records: &[Record], kept: impl Fn(&WrappedKey) -> bool) -> Result<KeyIds> {
        let mut each: Vec<(&Record, &[WrappedKey])> = Vec::new();
        for record in records {
            let wrappings = record.wrappings.iter().filter(|key| kept(key));
            each.extend(wrappings.map(|key| (record, std::slice::from_ref(key))));
        }
        let jobs = each.iter().map(|(record, wrappings)| UnwrapJob {
            wrappings,
            request: self.request(Some(record.database), record.generation, Purpose::Data),
        });
        let accept = |at: usize, unwrapped: &_| payload::accept_data(unwrapped, each[at].0, self.id).map(drop);
        let mut good: KeyIds = records.iter().map(id_of).collect();
        for (outcome, (record, _)) in wrappers.unwrap_many(jobs, accept).into_iter().zip(&each) {
            match outcome {
                Err(error) if is_about_the_wrapping(&error) => drop(good.remove(&id_of(record))),
                outcome => outcome?,
            }
        }
        Ok(good)
    }
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
