//! Moving a cluster to other master keys, or to new versions of those it has: the same keys, wrapped anew.

use std::sync::PoisonError;

use crate::cluster::{Cluster, ClusterInner, check_providers};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Hierarchy, Operation};
use crate::format::record::{MAX_WRAPPINGS, Record};
use crate::format::wrapped::Purpose;
use crate::keys::keystore::Keystore;
use crate::keys::many::RewrapJob;
use crate::keys::payload;
use crate::keys::root::is_by_cluster_key;
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::{Wrapped, Wrappers};
use crate::rotation::{KeyIds, PART, Progress, alive, id_of, rewrapped, same_key};
use crate::secret::KeyPayload;

/// How often what other processes changed is caught up with before the rewrap gives up.
const ROUNDS: usize = 1_000;

impl Cluster {
    /// Moves the cluster to the master keys `to`: other keys, other providers, or new versions of the same keys. The master
    /// keys in use must be valid now. Each key is unwrapped under `to` and compared before its old wrapping goes; at the end
    /// the old wrappings have left the keystore (not its backups and exports, nor what an import replaced, nor what a file system
    /// or a disk keeps of overwritten blocks), and this process uses `to`. Under [`Hierarchy::ClusterKey`] that is two keys, whatever the number
    /// of databases. After an interruption the same call goes on where it was.
    ///
    /// A master key of `to` that is new and cannot be reached is left out, and wraps later ([`Cluster::maintain`]); one that is
    /// in use already and cannot be reached, or is revoked, stops the rewrap. Other processes need [`Cluster::use_wrappers`],
    /// before this is called with both, or after it: until then those that have none of the new ones open nothing more by the
    /// master keys, and make no key that only the old ones wrap.
    ///
    /// Data keys stay the same: whoever could unwrap them before may have kept them. To lock somebody out, rotate too.
    ///
    /// # Errors
    /// What the key services answered, old and new; [`ErrorKind::Misconfigured`] for more than 8 old and new master keys
    /// together; [`ErrorKind::Closed`] while the cluster is disabled; what changing the keystore gives. Until the end, the old
    /// wrappings are there; if the last write failed, the old or the new ones are, and this process opens them.
    pub fn rewrap(&self, to: Wrappers, progress: &dyn Fn(Progress)) -> Result<()> {
        check_providers(&to)?;
        self.0.rewrap(to, progress)
    }

    /// Uses `wrappers` from now on for calls to key services, if they open this cluster: after another process has rewrapped
    /// it, with other credentials, or with one more master key, which then wraps what it lacks ([`Cluster::maintain`]).
    /// Works while the cluster is disabled, too: [`Cluster::retry`] then uses them.
    ///
    /// # Errors
    /// What the key services answered. The old ones stay in use then.
    pub fn use_wrappers(&self, wrappers: Wrappers) -> Result<()> {
        check_providers(&wrappers)?;
        self.0.check_fork()?;
        // Read anew: the keystore in memory is as it was when the cluster was disabled.
        let _in_memory = self.0.in_memory.mark();
        self.0.unwrap_closed(&wrappers)?;
        self.0.set_wrappers(wrappers);
        Ok(())
    }
}

/// What a rewrap has made of the cluster's own keys. It also tells which versions of the new master keys wrap now.
struct Own {
    old_cluster: Record,
    cluster: Record,
    old_probe: Record,
    probe: Record,
    /// A master key that wrapped before wraps now, and names no version: an old wrapping looks like a new one.
    unversioned: bool,
    /// The data keys that this call rewrapped, or whose new wrappings, by an earlier one, it has seen to open.
    done: KeyIds,
}

impl ClusterInner {
    fn rewrap(&self, to: Wrappers, progress: &dyn Fn(Progress)) -> Result<()> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let _in_flight = self.enter()?;
        // Without a valid key nothing is changed, whatever `to` could do.
        self.look(|_, _| Ok(()))?;
        self.check_master_key()?;
        // One run for all parts: an old master key that hangs is waited for once.
        let old = self.wrappers().for_one_run();
        let mut own = self.rewrap_own(&old, &to)?;
        for _ in 0..ROUNDS {
            if !self.look(|keystore, _| Ok(own.is_of(keystore)))? {
                own = self.rewrap_own(&old, &to)?;
            }
            let (part, left, total) = self.look(|keystore, _| Ok(own.next_part(keystore)))?;
            progress(Progress { done: total - left, total });
            if !part.is_empty() {
                let part = self.without_proved(&to, &mut own, part)?;
                let wrapped = self.rewrap_part(&old, &to, &own, &part)?;
                own.done.extend(self.add_wrappings(&own.old_cluster, part, wrapped)?);
                continue;
            }
            if !own.done.is_empty() {
                // What was revoked since the beginning, perhaps by one that was not asked any more, is heard before it is
                // shaken off.
                self.check_master_key()?;
            }
            match self.finish_rewrap(&own) {
                Ok(true) => {
                    self.set_wrappers(to);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => {
                    self.use_what_was_found(&own, to);
                    return Err(error);
                }
            }
        }
        let message = format!("other processes keep adding keys to cluster {}; try again", self.id);
        Err(Error::new(ErrorKind::InUse, message))
    }

    /// A rewrap whose last write failed may have moved the cluster all the same. Then it is opened by the new master keys
    /// only; while nobody can know, it is opened by both.
    fn use_what_was_found(&self, own: &Own, to: Wrappers) {
        match self.look(|keystore, _| Ok(*keystore.cluster_record() == own.cluster)) {
            Ok(true) => self.set_wrappers(to),
            Ok(false) => {}
            Err(_) => self.set_wrappers(to.and(&self.wrappers())),
        }
    }

    fn rewrap_own(&self, old: &Wrappers, to: &Wrappers) -> Result<Own> {
        let (old_cluster, old_probe) = self.look(|keystore, _| {
            let probe = keystore.catalogue().probe().cloned();
            let probe = probe.ok_or_else(|| Error::damaged(format!("cluster {} has no probe", self.id)))?;
            Ok((keystore.cluster_record().clone(), probe))
        })?;
        let request = self.request(None, old_cluster.generation, Purpose::Cluster);
        let accept = |unwrapped: &KeyPayload| payload::accept_cluster(unwrapped, &old_cluster, self.id).map(drop);
        let what = format_args!("rewrapping the cluster key of {}", self.id);
        let cluster = to.rewrap(old, &old_cluster.wrappings, &request, accept)?;
        let cluster = cluster.instead_of(&old_cluster.wrappings, what)?;
        let request = self.request(None, old_probe.generation, Purpose::Probe);
        let accept = |unwrapped: &KeyPayload| payload::accept_probe(unwrapped, self.id);
        let probe = to.rewrap(old, &old_probe.wrappings, &request, accept)?.instead_of(&old_probe.wrappings, what)?;
        check_room(&old_cluster.wrappings, &cluster)?;
        let (cluster, probe) = (rewrapped(&old_cluster, cluster), rewrapped(&old_probe, probe));
        let unversioned =
            cluster.wrappings.iter().any(|new| new.key_version.is_empty() && old.ids().any(|id| *id == new.master_key));
        Ok(Own { old_cluster, cluster, old_probe, probe, unversioned, done: KeyIds::new() })
    }

    /// Those of these records that must be wrapped: not those that an earlier call wrapped, and that open.
    fn without_proved(&self, to: &Wrappers, own: &mut Own, part: Vec<Record>) -> Result<Vec<Record>> {
        let (wrapped, mut left): (Vec<_>, Vec<_>) = part.into_iter().partition(|record| own.looks_done(record));
        let good = self.prove(to, &wrapped, |key| own.is_new(key))?;
        left.extend(wrapped.into_iter().filter(|record| !good.contains(&id_of(record))));
        own.done.extend(good);
        Ok(left)
    }

    fn rewrap_part(&self, old: &Wrappers, to: &Wrappers, own: &Own, part: &[Record]) -> Result<Vec<Vec<WrappedKey>>> {
        part.iter().try_for_each(|record| check_room(&record.wrappings, &own.cluster.wrappings))?;
        let jobs = part.iter().map(|record| RewrapJob {
            existing: &record.wrappings,
            request: self.request(Some(record.database), record.generation, Purpose::Data),
        });
        let accept = |at: usize, unwrapped: &KeyPayload| payload::accept_data(unwrapped, &part[at], self.id).map(drop);
        let rewrapped = to.rewrap_many(old, jobs, accept).into_iter().zip(part);
        // All of those answered for the cluster key, so one that does not any more is an outage: better wait than go on
        // without what it would wrap.
        let all = |(wrapped, record): (Result<Wrapped>, &Record)| {
            let what = format!("rewrapping data key {} of database {}", record.generation, record.database);
            wrapped?.instead_of(&own.cluster.wrappings, what)
        };
        rewrapped.map(all).collect()
    }

    /// Drops the old wrappings; false if something came meanwhile that has only those.
    fn finish_rewrap(&self, own: &Own) -> Result<bool> {
        self.change(|keystore, root| {
            let (part, ..) = own.next_part(keystore);
            if !own.is_of(keystore) || !part.is_empty() {
                return Ok(false);
            }
            let mut kept = vec![Operation::Wrapping(own.probe.clone())];
            // Under a cluster key, a conversion that was interrupted may have left some by the old master keys.
            let keep = |key: &&WrappedKey| match keystore.hierarchy() {
                Hierarchy::Direct => own.is_new(key),
                Hierarchy::ClusterKey => is_by_cluster_key(key),
            };
            kept.extend(alive(keystore).map(|record| {
                let wrappings = record.wrappings.iter().filter(keep);
                Operation::Wrapping(rewrapped(record, wrappings.cloned().collect()))
            }));
            let under = Some((keystore.hierarchy(), own.cluster.clone()));
            keystore.shred(&root.mac, kept, under)?;
            Ok(true)
        })
    }
}

/// Old and new wrappings stand in a record together until the end.
fn check_room(old: &[WrappedKey], new: &[WrappedKey]) -> Result<()> {
    let kept = old.iter().filter(|old| !new.iter().any(|new| same_key(old, new))).count();
    if kept + new.len() <= MAX_WRAPPINGS {
        return Ok(());
    }
    let message = format!(
        "{kept} old and {} new master keys are more than the {MAX_WRAPPINGS} that a key can be wrapped under at once; rewrap to \
         fewer first",
        new.len()
    );
    Err(Error::new(ErrorKind::Misconfigured, message))
}

impl Own {
    /// Whether the cluster's own keys are still those that were rewrapped.
    fn is_of(&self, keystore: &Keystore) -> bool {
        *keystore.cluster_record() == self.old_cluster && keystore.catalogue().probe() == Some(&self.old_probe)
    }

    /// Whether a wrapping is by a version that wraps now.
    fn is_new(&self, key: &WrappedKey) -> bool {
        self.cluster.wrappings.iter().any(|new| same_key(new, key))
    }

    fn is_done(&self, record: &Record) -> bool {
        self.done.contains(&id_of(record)) && self.has_all(record)
    }

    /// Whether an earlier call seems to have rewrapped it.
    fn looks_done(&self, record: &Record) -> bool {
        !self.unversioned && self.has_all(record)
    }

    fn has_all(&self, record: &Record) -> bool {
        self.cluster.wrappings.iter().all(|new| record.wrappings.iter().any(|key| same_key(new, key)))
    }

    /// The next records to rewrap, how many are left, and how many there are.
    fn next_part(&self, keystore: &Keystore) -> (Vec<Record>, usize, usize) {
        if keystore.hierarchy() == Hierarchy::ClusterKey {
            return (Vec::new(), 0, 0);
        }
        let left: Vec<_> = alive(keystore).filter(|record| !self.is_done(record)).collect();
        let part = left.iter().take(PART).map(|&record| record.clone()).collect();
        (part, left.len(), alive(keystore).count())
    }
}
