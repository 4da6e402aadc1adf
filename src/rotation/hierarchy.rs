//! From one hierarchy to the other while the cluster runs: each data key gets its new wrapping beside the old one, in parts;
//! when all have it, one rewrite changes the hierarchy and drops the old wrappings.

use std::sync::{Arc, PoisonError};

use crate::cluster::{Cluster, ClusterInner};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Hierarchy, Operation};
use crate::format::record::Record;
use crate::format::wrapped::Purpose;
use crate::keys::keystore::Keystore;
use crate::keys::many::{UnwrapJob, WrapJob};
use crate::keys::payload;
use crate::keys::root::{RootKeys, is_by_cluster_key};
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::Wrappers;
use crate::rotation::{PART, Progress, alive, merged, rewrapped};
use crate::secret::KeyPayload;

/// How often new databases of other processes are caught up with before the conversion gives up.
const ROUNDS: usize = 1_000;

impl Hierarchy {
    /// Whether the record has a wrapping of this hierarchy.
    pub(crate) fn wraps(self, record: &Record) -> bool {
        record.wrappings.iter().any(|key| is_by_cluster_key(key) == (self == Self::ClusterKey))
    }
}

impl Cluster {
    /// What the master keys wrap.
    pub fn hierarchy(&self) -> Hierarchy {
        self.0.hierarchy()
    }

    /// Changes what the master keys wrap, while everything runs; no page is rewritten. To
    /// [`Hierarchy::ClusterKey`] each data key is unwrapped by the key service a last time; to [`Hierarchy::Direct`] each is
    /// wrapped by it, a bounded number at a time. After an interruption the same call goes on where it was.
    ///
    /// # Errors
    /// What the key services answered; [`ErrorKind::Closed`] while the cluster is disabled; what changing the keystore gives.
    /// The hierarchy is unchanged then.
    pub fn set_hierarchy(&self, to: Hierarchy, progress: &dyn Fn(Progress)) -> Result<()> {
        self.0.set_hierarchy(to, progress)
    }
}

impl ClusterInner {
    fn set_hierarchy(&self, to: Hierarchy, progress: &dyn Fn(Progress)) -> Result<()> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let _in_flight = self.enter()?;
        for _ in 0..ROUNDS {
            if self.look(|keystore, _| Ok(keystore.hierarchy()))? == to {
                return Ok(());
            }
            let wrappers = self.wrappers();
            let (root, (part, left, total)) =
                self.look(|keystore, root| Ok((Arc::clone(root), next_part(keystore, root, &wrappers, to))))?;
            progress(Progress { done: total - left, total });
            if part.is_empty() {
                if self.finish_conversion(&wrappers, to)? {
                    return Ok(());
                }
                continue;
            }
            let wrapped = match to {
                Hierarchy::ClusterKey => self.wrap_here(&root, &part)?,
                Hierarchy::Direct => self.wrap_there(&wrappers, &root, &part)?,
            };
            self.add_wrappings(part, wrapped)?;
        }
        let message = format!("other processes keep adding keys to cluster {}; try again", self.id);
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// Unwraps by the key service, wraps under the cluster key.
    fn wrap_here(&self, root: &RootKeys, part: &[Record]) -> Result<Vec<Vec<WrappedKey>>> {
        let jobs = part.iter().map(|record| self.unwrap_job(record));
        let wrap = |at: usize, unwrapped: &KeyPayload| {
            let record: &Record = &part[at];
            drop(payload::accept_data(unwrapped, record, self.id)?);
            Ok(vec![root.wrap(self.env(), unwrapped, record.database, record.generation)?])
        };
        self.wrappers().unwrap_many(jobs, wrap).into_iter().collect()
    }

    /// Unwraps under the cluster key, wraps by the key service.
    fn wrap_there(&self, wrappers: &Wrappers, root: &RootKeys, part: &[Record]) -> Result<Vec<Vec<WrappedKey>>> {
        let jobs = part.iter().map(|record| {
            let unwrapped = root.unwrap(record)?;
            drop(payload::accept_data(&unwrapped, record, self.id)?);
            let request = self.request(Some(record.database), record.generation, Purpose::Data);
            Ok(WrapJob { payload: Arc::new(unwrapped), existing: &record.wrappings, request })
        });
        wrappers.wrap_many(jobs).into_iter().map(|wrapped| wrapped.map(|wrapped| wrapped.keys)).collect()
    }

    pub(super) fn unwrap_job<'a>(&self, record: &'a Record) -> UnwrapJob<'a> {
        let request = self.request(Some(record.database), record.generation, Purpose::Data);
        UnwrapJob { wrappings: &record.wrappings, request }
    }

    /// Adds new wrappings to their records, as far as those are what they were.
    pub(super) fn add_wrappings(&self, records: Vec<Record>, wrapped: Vec<Vec<WrappedKey>>) -> Result<()> {
        self.append(|keystore, _| {
            let unchanged =
                |record: &Record| keystore.catalogue().generation(record.database, record.generation) == Some(record);
            let added = records.iter().zip(wrapped).filter(|(record, _)| unchanged(record));
            let added =
                added.map(|(record, new)| Operation::Wrapping(rewrapped(record, merged(&record.wrappings, new))));
            Ok((added.collect(), ()))
        })
    }

    /// Changes the hierarchy and drops the old wrappings; false if a key came meanwhile that has only those.
    fn finish_conversion(&self, wrappers: &Wrappers, to: Hierarchy) -> Result<bool> {
        self.change(|keystore, root| {
            if alive(keystore).any(|record| !is_converted(record, root, wrappers, to)) {
                return Ok(false);
            }
            let kept = alive(keystore).map(|record| {
                let keep = |key: &&WrappedKey| match to {
                    Hierarchy::ClusterKey => is_current(key, root),
                    Hierarchy::Direct => !is_by_cluster_key(key),
                };
                Operation::Wrapping(rewrapped(record, record.wrappings.iter().filter(keep).cloned().collect()))
            });
            let kept = kept.collect();
            let under = Some((to, keystore.cluster_record().clone()));
            keystore.rewrite(&root.mac, kept, under)?;
            Ok(true)
        })
    }
}

/// The next records to wrap, how many are left, and how many there are.
fn next_part(keystore: &Keystore, root: &RootKeys, wrappers: &Wrappers, to: Hierarchy) -> (Vec<Record>, usize, usize) {
    let left: Vec<_> = alive(keystore).filter(|record| !is_converted(record, root, wrappers, to)).collect();
    let part = left.iter().take(PART).map(|&record| record.clone()).collect();
    (part, left.len(), alive(keystore).count())
}

fn is_converted(record: &Record, root: &RootKeys, wrappers: &Wrappers, to: Hierarchy) -> bool {
    match to {
        Hierarchy::ClusterKey => record.wrappings.iter().any(|key| is_current(key, root)),
        // Not by a master key that was in use when an earlier conversion was interrupted, and is not any more.
        Hierarchy::Direct => record.wrappings.iter().any(|key| wrappers.ids().any(|id| *id == key.master_key)),
    }
}

/// Whether the cluster key that there is now made this wrapping. One that it replaced may have left some in a conversion
/// that was interrupted.
fn is_current(key: &WrappedKey, root: &RootKeys) -> bool {
    is_by_cluster_key(key) && key.key_version == root.generation().to_string()
}
