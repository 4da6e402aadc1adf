//! Wrapping keys under master keys that have not wrapped them: because they could not be reached then, or were added since.

use std::sync::{Arc, PoisonError};

use crate::cluster::ClusterInner;
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Hierarchy, Operation};
use crate::format::record::Record;
use crate::format::wrapped::Purpose;
use crate::keys::keystore::Keystore;
use crate::keys::many::WrapJob;
use crate::keys::payload;
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::Wrappers;
use crate::rotation::{PART, alive, merged, rewrapped};
use crate::secret::KeyPayload;

impl ClusterInner {
    /// Wraps what lacks a wrapping, a part of it in each call. Returns how many were repaired, and how many still lack one.
    pub(crate) fn repair_wrappings(&self) -> Result<(usize, usize)> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let _in_flight = self.enter()?;
        // What other processes did to the master keys is known afterwards.
        self.look(|_, _| Ok(()))?;
        let wrappers = self.wrapping_keys();
        let lacking = self.look(|keystore, _| Ok(Lacking::find(keystore, &wrappers)))?;
        let total = lacking.len();
        // The cluster's own keys first: if a master key still does not answer, it is not asked for the others.
        let (own, all_own) = self.repair_own(&wrappers, &lacking)?;
        if !all_own || lacking.data.is_empty() {
            return Ok((own, total - own));
        }
        let part: Vec<_> = lacking.data.into_iter().take(PART).collect();
        let cluster = self.look(|keystore, _| Ok(keystore.cluster_record().clone()))?;
        let (records, wrapped, failed) = self.wrap_missing(&wrappers, part);
        let repaired = self.add_wrappings(&cluster, records, wrapped)?.len();
        let left = self.look(|keystore, _| Ok(Lacking::find(keystore, &wrappers).len()))?;
        match failed {
            Some(error) => Err(error),
            None => Ok(((own + repaired).min(total.saturating_sub(left)), left)),
        }
    }

    /// The cluster record and the probe. The second answer is whether none of them lacks a wrapping any more.
    fn repair_own(&self, wrappers: &Wrappers, lacking: &Lacking) -> Result<(usize, bool)> {
        let (mut repaired, mut complete) = (0, true);
        for record in lacking.probe.iter().chain(&lacking.cluster) {
            let request = self.request(None, record.generation, record.purpose);
            let accept = |unwrapped: &KeyPayload| match record.purpose {
                Purpose::Cluster => payload::accept_cluster(unwrapped, record, self.id).map(|_| copy(unwrapped)),
                _ => payload::accept_probe(unwrapped, self.id).map(|()| copy(unwrapped)),
            };
            let unwrapped = wrappers.unwrap_with(&record.wrappings, &request, accept)??;
            let wrapped = match wrappers.wrap_missing(&Arc::new(unwrapped), &record.wrappings, &request) {
                // None of those that are missing answers: later.
                Err(error) if error.kind() == ErrorKind::Unreachable => {
                    complete = false;
                    continue;
                }
                wrapped => wrapped?,
            };
            complete &= wrapped.missing.is_empty();
            if !wrapped.keys.is_empty() {
                self.put_own(record, merged(&record.wrappings, wrapped.keys))?;
                repaired += 1;
            }
        }
        Ok((repaired, complete))
    }

    fn put_own(&self, record: &Record, wrappings: Vec<WrappedKey>) -> Result<()> {
        let repaired = rewrapped(record, wrappings);
        match record.purpose {
            Purpose::Cluster => self.change(|keystore, root| {
                if keystore.cluster_record() != record {
                    return Ok(());
                }
                let under = Some((keystore.hierarchy(), repaired));
                keystore.rewrite(&root.mac, Vec::new(), under)
            }),
            _ => self.append(|keystore, _| {
                let unchanged = keystore.catalogue().probe() == Some(record);
                Ok((if unchanged { vec![Operation::Wrapping(repaired)] } else { Vec::new() }, ()))
            }),
        }
    }

    /// Those that could be wrapped, with their wrappings, and the first failure: one key that cannot be repaired keeps no
    /// other from it.
    fn wrap_missing(
        &self,
        wrappers: &Wrappers,
        part: Vec<Record>,
    ) -> (Vec<Record>, Vec<Vec<WrappedKey>>, Option<Error>) {
        let jobs = part.iter().map(|record| self.unwrap_job(record));
        let accept = |at: usize, unwrapped: &KeyPayload| {
            drop(payload::accept_data(unwrapped, &part[at], self.id)?);
            copy(unwrapped)
        };
        let unwrapped = wrappers.unwrap_many(jobs, accept);
        let jobs = part.iter().zip(unwrapped).map(|(record, unwrapped)| {
            let request = self.request(Some(record.database), record.generation, Purpose::Data);
            Ok(WrapJob { payload: Arc::new(unwrapped?), existing: &record.wrappings, request })
        });
        let outcomes = wrappers.wrap_many(jobs);
        let (mut records, mut wrapped, mut failed) = (Vec::new(), Vec::new(), None);
        for (record, outcome) in part.into_iter().zip(outcomes) {
            match outcome {
                // None of those that are missing answers: later.
                Ok(outcome) if outcome.keys.is_empty() => {}
                Ok(outcome) => {
                    records.push(record);
                    wrapped.push(outcome.keys);
                }
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        (records, wrapped, failed)
    }
}

/// The records that not every configured master key has wrapped.
struct Lacking {
    cluster: Option<Record>,
    probe: Option<Record>,
    data: Vec<Record>,
}

impl Lacking {
    fn find(keystore: &Keystore, wrappers: &Wrappers) -> Self {
        let lacks = |record: &&Record| wrappers.lacks(&record.wrappings);
        let data = match keystore.hierarchy() {
            Hierarchy::Direct => alive(keystore).filter(lacks).cloned().collect(),
            Hierarchy::ClusterKey => Vec::new(),
        };
        let cluster = Some(keystore.cluster_record()).filter(lacks).cloned();
        Self { cluster, probe: keystore.catalogue().probe().filter(lacks).cloned(), data }
    }

    fn len(&self) -> usize {
        self.data.len() + usize::from(self.cluster.is_some()) + usize::from(self.probe.is_some())
    }
}

fn copy(payload: &KeyPayload) -> Result<KeyPayload> {
    payload.with_bytes(|bytes| KeyPayload::fill_with(|out| out.copy_from_slice(bytes)))?
}
