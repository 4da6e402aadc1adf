//! Disabling a running cluster and bringing it back: one gate for every handle.
//!
//! There is no check of its own on the page path. To close the gate is to take the keys away: whoever has begun still has
//! them and ends whole, everybody else finds none.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use crate::cluster::Cluster;
use crate::cluster::opening::{Keys, alive_of};
use crate::cluster::shared::{ClusterInner, PATIENCE, read_keystore, unwrap_any_root, unwrap_root};
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Header, Hierarchy};
use crate::format::record::Record;
use crate::format::wrapped::Purpose;
use crate::ids::DatabaseId;
use crate::keys::keyring::Closed;
use crate::keys::root::RootKeys;
use crate::keys::wrappers::Wrappers;
use crate::page::cipher::CipherInner;

/// Tells other processes that they should check the master key now. Holds no secret, and is never believed: it causes a
/// check, and nothing else.
const HINT_FILE: &str = "hint";
const HINT_LEN: usize = 64;
/// How often bringing a cluster back begins anew when other processes rotate its databases meanwhile.
const TRIES: usize = 8;

impl Cluster {
    /// Closes the gate: from now on every operation of every handle is refused with [`ErrorKind::Closed`]
    /// ([`PageError::Disabled`](crate::PageError::Disabled) for pages), at once. Waits until operations in flight have ended,
    /// and with them the last use of a key: then all keys are wiped from memory, those that calls to key services are wrapping
    /// included. A call to unwrap one, which nobody waits for any more, may bring it once more; it is wiped at once. Data stays
    /// where it is. Other processes that
    /// have the cluster open are told to check their master key; they disable themselves if it is revoked.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if operations in flight did not end within 30 seconds: the gate is closed, but keys may be in
    /// memory until they do; or if the cluster was brought back meanwhile. [`ErrorKind::Forked`].
    pub fn disable(&self) -> Result<()> {
        self.0.disable()
    }

    /// Whether the gate is closed.
    pub fn is_disabled(&self) -> bool {
        self.0.check_fork().is_ok() && self.0.root().is_err()
    }

    /// Opens the gate again, if the master key can be used: unwraps the keys of the cluster and of every open database, and
    /// the same handles work as before. Does nothing if the gate is open.
    ///
    /// # Errors
    /// What the key services answered; [`ErrorKind::KeystoreStale`] if an older keystore was put in its place meanwhile;
    /// what opening the cluster gives. The gate stays closed then.
    pub fn retry(&self) -> Result<()> {
        self.0.retry()
    }
}

impl ClusterInner {
    pub(super) fn disable(&self) -> Result<()> {
        self.check_fork()?;
        let mut closings = self.closings();
        *closings += 1;
        self.close_gate();
        drop(closings);
        self.leave_hint();
        if self.in_memory.wait(PATIENCE, || self.root().is_ok()) {
            return Ok(());
        }
        let message = if self.root().is_ok() {
            format!("cluster {} was disabled, and brought back before its last operation had ended", self.id)
        } else {
            format!(
                "cluster {} is disabled, but operations in flight did not end within {PATIENCE:?}; their keys stay in memory \
                 until they do",
                self.id
            )
        };
        Err(Error::new(ErrorKind::InUse, message))
    }

    fn closings(&self) -> MutexGuard<'_, u64> {
        self.closings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The cluster's own keys go first: a database that is being opened right now is closed here, or sees that they are gone
    /// (see [`ClusterInner::handle`]).
    fn close_gate(&self) {
        self.set_root(None);
        for (_, cipher) in self.ciphers.all() {
            cipher.close(Closed::Disabled);
        }
    }

    pub(super) fn retry(&self) -> Result<()> {
        self.check_fork()?;
        let _recovering = self.recovering.lock().unwrap_or_else(PoisonError::into_inner);
        let before = {
            let closings = self.closings();
            if self.root().is_ok() {
                return Ok(());
            }
            *closings
        };
        // Whoever disables the cluster meanwhile is not kept waiting by key services, but waits for the end of this.
        let _in_flight = self.in_memory.mark();
        let (root, record) = self.unwrap_closed(&self.wrappers())?;
        let root = self.confirmed(root, &record)?;
        let reopened = self.unwrap_open_databases(&root)?;
        let closings = self.closings();
        if *closings != before {
            let message = format!("cluster {} was disabled again while it was being brought back", self.id);
            return Err(Error::new(ErrorKind::Closed, message));
        }
        self.set_root(Some(root));
        // All come back, or none does.
        reopen(reopened).inspect_err(|_| self.close_gate())?;
        // Who followed other processes between the two found them closed, and passed them over.
        self.unfollowed.store(true, Ordering::Release);
        Ok(())
    }

    /// The cluster's own keys, as they lie in the keystore now, by these master keys, and the record that they came out of.
    /// Nothing has authenticated that record: see [`ClusterInner::confirmed`].
    ///
    /// # Errors
    /// What the key services answered; what reading the keystore gives.
    pub(crate) fn unwrap_closed(&self, wrappers: &Wrappers) -> Result<(RootKeys, Record)> {
        let mut unverified = read_keystore(&self.store, &self.locks)?;
        unverified.retain(self.id);
        let request = |header: &Header| self.request(None, header.record.generation, Purpose::Cluster);
        unwrap_any_root(wrappers, unverified.headers(), request)
    }

    /// The same keys, after all master keys were heard that wrap them: as the keystore says, and not a header that nobody had
    /// authenticated, out of which one that is revoked may have been cut.
    fn confirmed(&self, root: RootKeys, record: &Record) -> Result<RootKeys> {
        self.catch_up_closed(&root)?;
        let now = self.keystore().cluster_record().clone();
        if now == *record {
            return Ok(root);
        }
        unwrap_root(&self.wrappers(), &self.request(None, now.generation, Purpose::Cluster), &now)
    }

    /// Takes over what happened to the keystore while the gate was closed.
    fn catch_up_closed(&self, root: &RootKeys) -> Result<()> {
        let _change = self.locks.change(PATIENCE)?;
        let mut keystore = self.keystore();
        self.catch_up(&mut keystore, root)?;
        if keystore.cluster_record().generation == root.generation() {
            // As whenever keys are about to be used: first what is there must be sure to stay.
            return if keystore.is_durable() { Ok(()) } else { keystore.settle(&root.mac) };
        }
        Err(Error::new(ErrorKind::InUse, format!("another process replaced the cluster key of {}; try again", self.id)))
    }

    /// The keys of every open database. Without keys where a database was dropped meanwhile.
    fn unwrap_open_databases(&self, root: &RootKeys) -> Result<Vec<(Arc<CipherInner>, Option<Keys>)>> {
        for _ in 0..TRIES {
            self.catch_up_closed(root)?;
            let open = self.ciphers.all();
            let (hierarchy, records) = self.records_of(&open);
            let mut keys = self.unwrap_all(root, hierarchy, &records)?;
            // What is newest must still be so now that it is held.
            self.catch_up_closed(root)?;
            let now = self.records_of(&open).1;
            if records.iter().zip(&now).all(|((_, a), (_, b))| alive_of(a) == alive_of(b)) {
                let with_keys = |(id, cipher)| (cipher, keys.remove(&id).filter(|(keys, _)| !keys.is_empty()));
                return Ok(open.into_iter().map(with_keys).collect());
            }
        }
        Err(Error::new(ErrorKind::InUse, format!("other processes keep rotating databases of {}; try again", self.id)))
    }

    fn records_of(&self, open: &[(DatabaseId, Arc<CipherInner>)]) -> (Hierarchy, Vec<(DatabaseId, Vec<Record>)>) {
        let keystore = self.keystore();
        let of = |(id, _): &(DatabaseId, _)| (*id, keystore.catalogue().generations(*id).cloned().collect());
        (keystore.hierarchy(), open.iter().map(of).collect())
    }

    /// Best effort: the other processes check by themselves, only later.
    fn leave_hint(&self) {
        let Ok(bits) = self.env().random::<8>() else { return };
        let text: String = bits.iter().map(|byte| format!("{byte:02x}")).collect();
        let beside = self.directory.join(format!("{HINT_FILE}.tmp"));
        let write = || {
            // What lies there is not written through: it may be a link to something else.
            let _ = fs::remove_file(&beside);
            let mut new = OpenOptions::new();
            new.write(true).create_new(true).mode(0o600).open(&beside)?.write_all(text.as_bytes())?;
            fs::rename(&beside, self.directory.join(HINT_FILE))
        };
        let _ = write();
    }

    /// What the hint says now; it only matters whether it is another one than before.
    pub(super) fn hint(&self) -> Option<Vec<u8>> {
        // Anybody may have put anything there: nothing is read that may block, be long, or lie elsewhere.
        let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
        let file = OpenOptions::new().read(true).custom_flags(flags).open(self.directory.join(HINT_FILE)).ok()?;
        let plain = file.metadata().is_ok_and(|found| found.is_file() && found.len() <= HINT_LEN as u64);
        let mut hint = Vec::new();
        (plain && file.take(HINT_LEN as u64).read_to_end(&mut hint).is_ok()).then_some(hint)
    }
}

/// Opens the gate of these databases, or says that they are gone.
fn reopen(databases: Vec<(Arc<CipherInner>, Option<Keys>)>) -> Result<()> {
    for (cipher, keys) in databases {
        let Some((keys, hold)) = keys else {
            cipher.close(Closed::Dropped);
            continue;
        };
        match cipher.open_with(keys, hold) {
            // One that was dropped stays so, and keeps no other from coming back.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            opened => opened?,
        }
    }
    Ok(())
}
