//! Disabling a running cluster and bringing it back: one gate for every handle.
//!
//! There is no check of its own on the page path. To close the gate is to take the keys away: whoever has begun still has
//! them and ends whole, everybody else finds none.

use std::fs::{self, File};
use std::io::Read;
use std::sync::{Arc, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::cluster::opening::{Keys, newest_of};
use crate::cluster::shared::{ClusterInner, PATIENCE, read_keystore, unwrap_any_root};
use crate::error::{Error, ErrorKind, PageError, Result};
use crate::format::keystore::Hierarchy;
use crate::format::record::Record;
use crate::ids::DatabaseId;
use crate::keys::keyring::{Closed, Closing};
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
    /// and with them the last use of a key: then all keys are wiped from memory. Data stays where it is. Other processes that
    /// have the cluster open are told to check their master key; they disable themselves if it is revoked.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] if operations in flight did not end within 30 seconds: the gate is closed, but keys may be in
    /// memory until they do. [`ErrorKind::Forked`].
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
        let mut fading = self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner);
        // First, so that a database that is being opened right now sees it: see `handle`.
        fading.root.extend(self.set_root(None).map(|root| Arc::downgrade(&root)));
        fading.keys.extend(self.ciphers.all().iter().map(|(_, cipher)| cipher.close(Closed::Disabled)));
        self.leave_hint();
        if fading.wait(PATIENCE) {
            return Ok(());
        }
        let message = format!(
            "cluster {} is disabled, but operations in flight did not end within {PATIENCE:?}; their keys stay in memory \
             until they do",
            self.id
        );
        Err(Error::new(ErrorKind::InUse, message))
    }

    pub(super) fn retry(&self) -> Result<()> {
        self.check_fork()?;
        let _lifecycle = self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner);
        if self.root().is_ok() {
            return Ok(());
        }
        let root = self.unwrap_closed(&self.wrappers())?;
        let reopened = self.unwrap_open_databases(&root)?;
        self.set_root(Some(root));
        let mut outcome = Ok(());
        for (cipher, keys) in reopened {
            let opened = match keys {
                Some((keys, hold)) => cipher.open_with(keys, hold),
                None => {
                    let _ = cipher.close(Closed::Dropped);
                    Ok(())
                }
            };
            // One that was dropped stays so, and keeps no other from coming back.
            outcome = outcome.and(opened.or_else(|error| match error.kind() {
                ErrorKind::NotFound => Ok(()),
                _ => Err(error),
            }));
        }
        outcome.and_then(|()| self.reopen_stragglers())
    }

    /// Opens what was being opened while the gate was closed, and closed for it.
    fn reopen_stragglers(&self) -> Result<()> {
        for (id, cipher) in self.ciphers.all() {
            if matches!(cipher.enter(), Err(PageError::Disabled)) {
                match self.newest_keys(id) {
                    Ok((keys, hold)) => cipher.open_with(keys, hold)?,
                    Err(error) if error.kind() == ErrorKind::NotFound => drop(cipher.close(Closed::Dropped)),
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }

    /// The cluster's own keys, as they lie in the keystore now, by these master keys.
    ///
    /// # Errors
    /// What the key services answered; what reading the keystore gives.
    pub(crate) fn unwrap_closed(&self, wrappers: &Wrappers) -> Result<RootKeys> {
        let mut unverified = read_keystore(&self.store, &self.locks)?;
        unverified.retain(self.id);
        unwrap_any_root(wrappers, &self.options, unverified.headers()).map(|(root, _)| root)
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

    /// The keys of every open database, before any of them is opened: all come back, or none does. Without keys where a
    /// database was dropped meanwhile.
    fn unwrap_open_databases(&self, root: &RootKeys) -> Result<Vec<(Arc<CipherInner>, Option<Keys>)>> {
        for _ in 0..TRIES {
            self.catch_up_closed(root)?;
            let open = self.ciphers.all();
            let (hierarchy, records) = self.records_of(&open);
            let mut keys = self.unwrap_all(root, hierarchy, &records)?;
            // What is newest must still be so now that it is held.
            self.catch_up_closed(root)?;
            let now = self.records_of(&open).1;
            if records.iter().zip(&now).all(|((_, a), (_, b))| newest_of(a) == newest_of(b)) {
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
        let _ = fs::write(&beside, text).and_then(|()| fs::rename(&beside, self.directory.join(HINT_FILE)));
    }

    /// What the hint says now; it only matters whether it is another one than before.
    pub(super) fn hint(&self) -> Option<Vec<u8>> {
        let path = self.directory.join(HINT_FILE);
        // Anybody may have put anything there: nothing is read that may block, or be long.
        let plain = fs::symlink_metadata(&path).is_ok_and(|found| found.is_file() && found.len() <= HINT_LEN as u64);
        let mut hint = Vec::new();
        (plain && File::open(path).ok()?.take(HINT_LEN as u64).read_to_end(&mut hint).is_ok()).then_some(hint)
    }
}

/// Keys that were let go of, and that operations in flight may still use. Kept until they are gone, so that whoever disables
/// a cluster again waits for them, too.
#[derive(Default)]
pub(super) struct Fading {
    root: Vec<Weak<RootKeys>>,
    keys: Vec<Closing>,
}

impl Fading {
    /// Waits until they are gone; false if that took longer than `patience`.
    fn wait(&mut self, patience: Duration) -> bool {
        let end = Instant::now() + patience;
        let left = || end.saturating_duration_since(Instant::now());
        self.keys.retain(|closing| !closing.wait(left()));
        while self.root.iter().any(|root| root.strong_count() > 0) && !left().is_zero() {
            std::thread::sleep(Duration::from_micros(200));
        }
        self.root.retain(|root| root.strong_count() > 0);
        self.keys.is_empty() && self.root.is_empty()
    }
}
