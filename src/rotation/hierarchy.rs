//! From one hierarchy to the other while the cluster runs: each data key gets its new wrapping beside the old one, in parts;
//! when all have it, one rewrite changes the hierarchy and drops the old wrappings.

use std::sync::{Arc, PoisonError};

use crate::cluster::{Cluster, ClusterInner};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Hierarchy, Operation};
use crate::format::record::Record;
use crate::format::wrapped::Purpose;
use crate::ids::MasterKeyId;
use crate::keys::in_memory::Live;
use crate::keys::keystore::Keystore;
use crate::keys::many::{UnwrapJob, WrapJob};
use crate::keys::payload;
use crate::keys::root::{RootKeys, is_by_cluster_key};
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::{Wrapped, Wrappers};
use crate::rotation::{KeyIds, PART, Progress, alive, id_of, merged, rewrapped};
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
        let mut conversion = Conversion { to, done: KeyIds::new() };
        // What other processes did to the master keys is known afterwards.
        self.look(|_, _| Ok(()))?;
        // One run for all parts: a master key that hangs is waited for once.
        let (wrappers, unwrapping) = (self.wrapping_keys().for_one_run(), self.wrappers().for_one_run());
        for _ in 0..ROUNDS {
            if self.look(|keystore, _| Ok(keystore.hierarchy()))? == to {
                return Ok(());
            }
            let Round { root, cluster, part, left, total } =
                self.look(|keystore, root| Ok(conversion.round(keystore, root, &wrappers)))?;
            if to == Hierarchy::Direct {
                wrappers.require_any_of(&cluster)?;
            }
            progress(Progress { done: total - left, total });
            if part.is_empty() {
                if self.finish_conversion(&conversion, &wrappers)? {
                    return Ok(());
                }
                continue;
            }
            let part = self.without_converted(&mut conversion, &root, &wrappers, &cluster, part)?;
            let wrapped = match to {
                Hierarchy::ClusterKey => self.wrap_here(&unwrapping, &root, &part)?,
                Hierarchy::Direct => self.wrap_there(&wrappers, &root, &cluster, &part)?,
            };
            conversion.done.extend(self.add_wrappings(&cluster, part, wrapped)?);
        }
        let message = format!("other processes keep adding keys to cluster {}; try again", self.id);
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// Those of these records that must be wrapped: not those that an earlier call wrapped, and that open.
    fn without_converted(
        &self,
        conversion: &mut Conversion,
        root: &RootKeys,
        wrappers: &Wrappers,
        cluster: &Record,
        part: Vec<Record>,
    ) -> Result<Vec<Record>> {
        let (wrapped, mut left): (Vec<_>, Vec<_>) =
            part.into_iter().partition(|record| conversion.looks_done(record, root, wrappers, cluster));
        let good = match conversion.to {
            Hierarchy::Direct => {
                self.prove(wrappers, &wrapped, |key| is_required(&key.master_key, wrappers, cluster))?
            }
            Hierarchy::ClusterKey => wrapped.iter().filter(|record| self.opens_here(root, record)).map(id_of).collect(),
        };
        left.extend(wrapped.into_iter().filter(|record| !good.contains(&id_of(record))));
        conversion.done.extend(good);
        Ok(left)
    }

    fn opens_here(&self, root: &RootKeys, record: &Record) -> bool {
        let opened = root.unwrap(record).and_then(|payload| payload::accept_data(&payload, record, self.id));
        opened.is_ok()
    }

    /// Unwraps by the key service, wraps under the cluster key.
    fn wrap_here(&self, wrappers: &Wrappers, root: &RootKeys, part: &[Record]) -> Result<Vec<Vec<WrappedKey>>> {
        let jobs = part.iter().map(|record| self.unwrap_job(record));
        let wrap = |at: usize, unwrapped: &KeyPayload| {
            let record: &Record = &part[at];
            drop(payload::accept_data(unwrapped, record, self.id)?);
            Ok(vec![root.wrap(self.env(), unwrapped, record.database, record.generation)?])
        };
        wrappers.unwrap_many(jobs, wrap).into_iter().collect()
    }

    /// Unwraps under the cluster key, wraps by the key service: anew also where an earlier wrapping does not open.
    fn wrap_there(
        &self,
        wrappers: &Wrappers,
        root: &RootKeys,
        cluster: &Record,
        part: &[Record],
    ) -> Result<Vec<Vec<WrappedKey>>> {
        let jobs = part.iter().map(|record| {
            let unwrapped = root.unwrap(record)?;
            drop(payload::accept_data(&unwrapped, record, self.id)?);
            let request = self.request(Some(record.database), record.generation, Purpose::Data);
            Ok(WrapJob { payload: Arc::new(unwrapped), existing: &[], request })
        });
        let wrapped = wrappers.wrap_many(jobs).into_iter().zip(part);
        // The cluster key's wrapping goes at the end, and with it whoever has a say in the cluster key only.
        let all = |(wrapped, record): (Result<Wrapped>, &Record)| {
            let what = format!("wrapping data key {} of database {}", record.generation, record.database);
            wrapped?.instead_of(&cluster.wrappings, what)
        };
        wrapped.map(all).collect()
    }

    pub(super) fn unwrap_job<'a>(&self, record: &'a Record) -> UnwrapJob<'a> {
        let request = self.request(Some(record.database), record.generation, Purpose::Data);
        UnwrapJob { wrappings: &record.wrappings, request }
    }

    /// Adds new wrappings to their records, as far as those and the cluster record are what they were. Returns to which it
    /// did.
    pub(super) fn add_wrappings(
        &self,
        cluster: &Record,
        records: Vec<Record>,
        wrapped: Vec<Vec<WrappedKey>>,
    ) -> Result<KeyIds> {
        self.append(|keystore, _| {
            if keystore.cluster_record() != cluster {
                return Ok((Vec::new(), KeyIds::new()));
            }
            let unchanged =
                |record: &Record| keystore.catalogue().generation(record.database, record.generation) == Some(record);
            let (mut operations, mut added) = (Vec::new(), KeyIds::new());
            for (record, new) in records.iter().zip(wrapped).filter(|(record, _)| unchanged(record)) {
                operations.push(Operation::Wrapping(rewrapped(record, merged(&record.wrappings, new))));
                added.insert(id_of(record));
            }
            Ok((operations, added))
        })
    }

    /// Changes the hierarchy and drops the old wrappings; false if a key came meanwhile that has only those.
    fn finish_conversion(&self, conversion: &Conversion, wrappers: &Wrappers) -> Result<bool> {
        self.change(|keystore, root| {
            let cluster = keystore.cluster_record().clone();
            if conversion.to == Hierarchy::Direct {
                wrappers.require_any_of(&cluster)?;
            }
            if alive(keystore).any(|record| !conversion.is_done(record, root, wrappers, &cluster)) {
                return Ok(false);
            }
            let kept = alive(keystore).map(|record| {
                let keep = |key: &&WrappedKey| match conversion.to {
                    Hierarchy::ClusterKey => is_current(key, root),
                    Hierarchy::Direct => !is_by_cluster_key(key),
                };
                Operation::Wrapping(rewrapped(record, record.wrappings.iter().filter(keep).cloned().collect()))
            });
            let kept = kept.collect();
            keystore.shred(&root.mac, kept, Some((conversion.to, cluster)))?;
            Ok(true)
        })
    }
}

/// A conversion under way.
struct Conversion {
    to: Hierarchy,
    /// The data keys that this call wrapped, or whose new wrappings, by an earlier one, it has seen to open.
    done: KeyIds,
}

/// What a conversion finds at the beginning of a round.
struct Round {
    root: Arc<Live<RootKeys>>,
    cluster: Record,
    /// The next records to convert, how many are left, and how many there are.
    part: Vec<Record>,
    left: usize,
    total: usize,
}

impl Conversion {
    fn round(&self, keystore: &Keystore, root: &Arc<Live<RootKeys>>, wrappers: &Wrappers) -> Round {
        let cluster = keystore.cluster_record().clone();
        let left: Vec<_> = alive(keystore).filter(|record| !self.is_done(record, root, wrappers, &cluster)).collect();
        let part = left.iter().take(PART).map(|&record| record.clone()).collect();
        let (left, total) = (left.len(), alive(keystore).count());
        Round { root: Arc::clone(root), cluster, part, left, total }
    }

    fn is_done(&self, record: &Record, root: &RootKeys, wrappers: &Wrappers, cluster: &Record) -> bool {
        self.done.contains(&id_of(record)) && self.looks_done(record, root, wrappers, cluster)
    }

    fn looks_done(&self, record: &Record, root: &RootKeys, wrappers: &Wrappers, cluster: &Record) -> bool {
        match self.to {
            Hierarchy::ClusterKey => record.wrappings.iter().any(|key| is_current(key, root)),
            Hierarchy::Direct => {
                let has = |id: &MasterKeyId| record.wrappings.iter().any(|key| key.master_key == *id);
                wrappers.ids().filter(|id| is_required(id, wrappers, cluster)).all(has)
            }
        }
    }
}

/// Whether a master key must wrap every data key under [`Hierarchy::Direct`]: one that is configured, and wraps the cluster
/// key. Not one that was in use when an earlier conversion was interrupted, and is not any more.
fn is_required(id: &MasterKeyId, wrappers: &Wrappers, cluster: &Record) -> bool {
    wrappers.ids().any(|configured| configured == id) && cluster.wrappings.iter().any(|key| key.master_key == *id)
}

/// Whether the cluster key that there is now made this wrapping. One that it replaced may have left some in a conversion
/// that was interrupted.
fn is_current(key: &WrappedKey, root: &RootKeys) -> bool {
    is_by_cluster_key(key) && key.key_version == root.generation().to_string()
}
