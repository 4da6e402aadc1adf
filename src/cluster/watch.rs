//! The watch: a thread for each open cluster that looks every second what other processes changed, and every minute whether
//! something is due. It never holds the cluster open, and ends with its last handle.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use crate::cluster::Cluster;
use crate::cluster::shared::ClusterInner;
use crate::error::{Error, ErrorKind, Result};
use crate::format::wrapped::Purpose;

const TICK: Duration = Duration::from_secs(1);
/// How often it is looked whether a key is due or a wrapping is missing.
const MAINTENANCE: Duration = Duration::from_secs(60);
/// A hint causes a check at most so often.
const HINT_INTERVAL: Duration = Duration::from_secs(10);

/// Ends the thread when it is dropped.
pub(super) struct Watch {
    _end: Sender<()>,
}

impl Watch {
    /// Starts the thread.
    pub(super) fn start(cluster: &Arc<ClusterInner>) -> Result<Self> {
        let (end, ended) = mpsc::channel();
        let watched = Arc::downgrade(cluster);
        let spawned = std::thread::Builder::new().name("pageseal-watch".into()).spawn(move || watch(&watched, &ended));
        spawned.map_err(|error| {
            let message = format!("no thread could be started to watch the cluster: {error}");
            Error::with_source(ErrorKind::Resources, message, error)
        })?;
        Ok(Self { _end: end })
    }
}

fn watch(cluster: &Weak<ClusterInner>, ended: &Receiver<()>) {
    let mut rounds = Rounds::default();
    if let Some(cluster) = cluster.upgrade() {
        rounds.hint = cluster.hint();
    }
    while matches!(ended.recv_timeout(TICK), Err(RecvTimeoutError::Timeout)) {
        let Some(cluster) = cluster.upgrade() else { return };
        rounds.round(&cluster);
    }
}

#[derive(Default)]
struct Rounds {
    maintained: Option<Instant>,
    hint: Option<Vec<u8>>,
    checked: Option<Instant>,
}

impl Rounds {
    /// What fails is tried again in a later round: who uses the cluster learns of it there.
    fn round(&mut self, cluster: &Arc<ClusterInner>) {
        if cluster.root().is_err() {
            return;
        }
        let _ = cluster.keep_up();
        self.heed_hint(cluster);
        if self.maintained.is_none_or(|last| last.elapsed() >= MAINTENANCE) {
            let _ = cluster.maintain();
            self.maintained = Some(Instant::now());
        }
    }

    /// Another process was disabled. The hint is not believed; the master key is asked.
    fn heed_hint(&mut self, cluster: &Arc<ClusterInner>) {
        let hint = cluster.hint();
        if hint == self.hint || self.checked.is_some_and(|last| last.elapsed() < HINT_INTERVAL) {
            return;
        }
        self.checked = Some(Instant::now());
        use ErrorKind::{Deleted, Denied, Disabled};
        match cluster.check_master_key().map_err(|error| error.kind()) {
            Ok(()) => {}
            Err(Disabled | Deleted | Denied) => drop(cluster.disable()),
            // No verdict: asked again.
            Err(_) => return,
        }
        self.hint = hint;
    }
}

impl Cluster {
    /// Does now what the cluster otherwise does by itself, each minute: takes over what other processes changed, replaces the
    /// cluster key if it is older than [`ClusterOptions::cluster_key_age`](crate::ClusterOptions::cluster_key_age), and wraps
    /// keys under master keys that could not be reached when the keys were made.
    ///
    /// # Errors
    /// What the key services answered; what changing the keystore gives. What was done before stays done.
    pub fn maintain(&self) -> Result<Maintained> {
        self.0.keep_up()?;
        self.0.maintain()
    }
}

/// What [`Cluster::maintain`] did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Maintained {
    /// Whether the cluster key was replaced.
    pub cluster_key_replaced: bool,
    /// How many keys were wrapped under a master key that had not wrapped them.
    pub wrappings_repaired: usize,
    /// How many keys still lack one.
    pub wrappings_missing: usize,
}

impl ClusterInner {
    /// Takes over what other processes changed, here and in the open databases.
    pub(crate) fn keep_up(self: &Arc<Self>) -> Result<()> {
        self.look(|_, _| Ok(()))?;
        self.follow_if_behind();
        // What a process left half-done when it ended is put right before anybody needs it.
        let settled = self.keystore().is_settled();
        if settled { Ok(()) } else { self.change(|_, _| Ok(())) }
    }

    fn maintain(self: &Arc<Self>) -> Result<Maintained> {
        let mut done = Maintained::default();
        if self.cluster_key_is_due() {
            self.replace_cluster_key()?;
            done.cluster_key_replaced = true;
        }
        (done.wrappings_repaired, done.wrappings_missing) = self.repair_wrappings()?;
        Ok(done)
    }

    /// Asks the key services, by unwrapping the stored probe, whether the master keys can be used now.
    pub(crate) fn check_master_key(&self) -> Result<()> {
        let probe = self.keystore().catalogue().probe().cloned();
        let probe = probe.ok_or_else(|| Error::damaged(format!("the keystore of cluster {} has no probe", self.id)))?;
        self.wrappers().check(&probe.wrappings, &self.request(None, probe.generation, Purpose::Probe))
    }
}
