//! Replacing the cluster key: a new one wraps the data keys and seals the names anew. Two calls to the key service, one
//! rewrite of the keystore; a crash leaves the old or the new state.

use std::sync::{Arc, PoisonError};

use crate::cluster::{Cluster, ClusterInner};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Hierarchy, Operation};
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{Generation, MasterKeyId};
use crate::keys::catalogue::Catalogue;
use crate::keys::names::CLUSTER_SCOPE;
use crate::keys::payload;
use crate::keys::root::{RootKeys, is_by_cluster_key};
use crate::rotation::rewrapped;

/// A cluster key from so far in the future was made while a clock was wrong: its age is unknown.
const CLOCK_TOLERANCE: u64 = 24 * 60 * 60;

impl Cluster {
    /// Replaces the cluster key now. The cluster does it by itself when the key has reached
    /// [`ClusterOptions::cluster_key_age`](crate::ClusterOptions::cluster_key_age).
    ///
    /// # Errors
    /// What the key services answered; [`ErrorKind::Closed`] while the cluster is disabled; what changing the keystore gives.
    /// Nothing is changed then.
    pub fn replace_cluster_key(&self) -> Result<()> {
        self.0.replace_cluster_key()
    }
}

impl ClusterInner {
    /// Whether the cluster key is as old as it may become.
    pub(crate) fn cluster_key_is_due(&self) -> bool {
        let (now, created) = (self.now(), self.keystore().cluster_record().created);
        let age = self.options.cluster_key_age.as_secs();
        now >= created.saturating_add(age) || created > now.saturating_add(CLOCK_TOLERANCE)
    }

    pub(crate) fn replace_cluster_key(&self) -> Result<()> {
        let _moving = self.moving.lock().unwrap_or_else(PoisonError::into_inner);
        let _in_flight = self.enter()?;
        let old = self.look(|keystore, _| Ok(keystore.cluster_record().clone()))?;
        let (record, new) = self.make_cluster_key(&old)?;
        self.change(|keystore, root| {
            if *keystore.cluster_record() != old {
                // Another process did it, or wrapped it anew.
                return Err(Error::new(
                    ErrorKind::InUse,
                    format!(
                        "the cluster key of {} was changed by another process meanwhile; try again if need be",
                        self.id
                    ),
                ));
            }
            let hierarchy = keystore.hierarchy();
            let under = Some((hierarchy, record));
            keystore.rewrite_with(&root.mac, under, |catalogue, _| self.move_to(catalogue, hierarchy, root, &new))?;
            self.note_root(new);
            Ok(())
        })
    }

    /// Draws a new cluster key and has it wrapped, the same identity key beside it.
    fn make_cluster_key(&self, old: &Record) -> Result<(Record, RootKeys)> {
        let wrappers = self.wrappers();
        let request = self.request(None, old.generation, Purpose::Cluster);
        let accept = |unwrapped: &_| payload::accept_cluster(unwrapped, old, self.id);
        let (_, identity) = wrappers.unwrap_with(&old.wrappings, &request, accept)?;
        let generation = Generation::new(old.generation.get() + 1);
        let generation = generation.ok_or_else(|| Error::invalid("the cluster has had all 2^24 - 1 cluster keys"))?;
        let key = payload::random_key(self.env())?;
        let unwrapped = Arc::new(payload::cluster_payload(&key, &identity, self.id, generation)?);
        let commitment = payload::cluster_commitment(&key, self.id, generation)?;
        let wrapped = self.wrapping_keys().wrap(&unwrapped, &self.request(None, generation, Purpose::Cluster))?;
        // An outage of one of them is no reason to leave it out: the old cluster key is good until it is back.
        let wrappings = wrapped.instead_of(&old.wrappings, format_args!("replacing the cluster key of {}", self.id))?;
        let has = |id: &MasterKeyId| wrappings.iter().any(|key| key.master_key == *id);
        if let Some(lost) = old.wrappings.iter().find(|key| !has(&key.master_key)) {
            let message = format!(
                "the cluster key of {} is wrapped by master key {}, too, which is not configured here: it would be left out. \
                 Configure it, or rewrap without it",
                self.id, lost.master_key
            );
            return Err(Error::new(ErrorKind::Misconfigured, message));
        }
        let record = Record { generation, commitment, wrappings, created: self.now(), ..old.clone() };
        Ok((record, RootKeys::new(self.id, generation, key, &identity)?))
    }

    /// Seals every name anew, and wraps every data key that the old cluster key wraps.
    fn move_to(&self, catalogue: &mut Catalogue, hierarchy: Hierarchy, old: &RootKeys, new: &RootKeys) -> Result<()> {
        catalogue.reseal_names(|database, owner, sealed| {
            let scope = database.map_or(CLUSTER_SCOPE, |database| database.to_bytes());
            let name = old.names.open(&scope, &owner, sealed)?;
            let sealed = new.names.seal(self.env(), &scope, &owner, &name)?;
            if new.names.open(&scope, &owner, &sealed)? == name {
                return Ok(sealed);
            }
            Err(Error::damaged("a name does not come out as it was sealed: nothing was changed; check this machine"))
        })?;
        if hierarchy == Hierarchy::Direct {
            return Ok(());
        }
        let alive = catalogue.records().filter(|record| record.state != KeyState::Destroyed);
        let moved = alive.map(|record| self.rewrap_here(record, old, new)).collect::<Result<Vec<_>>>()?;
        catalogue.apply(moved).map_err(|conflict| Error::damaged(conflict.to_string()))
    }

    fn rewrap_here(&self, record: &Record, old: &RootKeys, new: &RootKeys) -> Result<Operation> {
        let payload = old.unwrap(record)?;
        // Not without having seen that it is the right key.
        drop(payload::accept_data(&payload, record, self.id)?);
        let mut wrappings: Vec<_> = record.wrappings.iter().filter(|key| !is_by_cluster_key(key)).cloned().collect();
        wrappings.push(new.wrap(self.env(), &payload, record.database, record.generation)?);
        Ok(Operation::Wrapping(rewrapped(record, wrappings)))
    }
}
