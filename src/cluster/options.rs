//! [`ClusterOptions`]: how a cluster works.

use std::sync::Arc;
use std::time::Duration;

use crate::aead::AesBackend;
use crate::env::Env;
use crate::format::keystore::Hierarchy;
use crate::format::page::Suite;
use crate::ids::ClusterId;
use crate::storage::disk::{Disk, RealDisk};

/// How a cluster works. The defaults are right for most.
#[derive(Clone)]
#[non_exhaustive]
pub struct ClusterOptions {
    pub(crate) suite: Suite,
    pub(crate) backend: AesBackend,
    pub(crate) hierarchy: Hierarchy,
    pub(crate) expected_id: Option<ClusterId>,
    pub(crate) kms_timeout: Duration,
    pub(crate) cluster_key_age: Duration,
    pub(crate) subkey_cache: usize,
    pub(crate) watched: bool,
    pub(crate) env: Env,
    pub(crate) disk: Arc<dyn Disk>,
}

impl ClusterOptions {
    /// AES-256-GCM, each data key wrapped by the master keys, a cluster key that lasts 90 days, ten seconds for a call to a
    /// key service, 1,024 cached subkeys.
    pub fn new() -> Self {
        Self {
            suite: Suite::Aes256Gcm,
            backend: AesBackend::default(),
            hierarchy: Hierarchy::Direct,
            expected_id: None,
            kms_timeout: Duration::from_secs(10),
            cluster_key_age: Duration::from_secs(90 * 24 * 60 * 60),
            subkey_cache: 1024,
            watched: true,
            env: Env::system(),
            disk: Arc::new(RealDisk),
        }
    }

    /// The suite of the databases that will be created. Those that exist keep theirs.
    pub fn suite(mut self, suite: Suite) -> Self {
        self.suite = suite;
        self
    }

    /// The implementation of AES-256-GCM.
    pub fn aes_backend(mut self, backend: AesBackend) -> Self {
        self.backend = backend;
        self
    }

    /// What the master keys wrap in a cluster that will be created. One that exists keeps what it has, until
    /// [`Cluster::set_hierarchy`](crate::Cluster::set_hierarchy) changes it.
    pub fn hierarchy(mut self, hierarchy: Hierarchy) -> Self {
        self.hierarchy = hierarchy;
        self
    }

    /// How old the cluster key may become before the cluster replaces it by itself. What it wraps is wrapped anew here; no
    /// page is rewritten.
    pub fn cluster_key_age(mut self, age: Duration) -> Self {
        self.cluster_key_age = age;
        self
    }

    /// The id of the cluster that must be found. It must come from somewhere else than the cluster's directory: it is what
    /// tells the cluster from one that an attacker put in its place. Mandatory where a public key suffices to wrap.
    pub fn expected_id(mut self, id: ClusterId) -> Self {
        self.expected_id = Some(id);
        self
    }

    /// How long to wait for one call to a key service, with its repetitions where the service asks to slow down.
    pub fn kms_timeout(mut self, timeout: Duration) -> Self {
        self.kms_timeout = timeout;
        self
    }

    /// How many subkeys of other sessions are kept, at most 2^20, of about 600 bytes of locked memory each. Reading a page whose subkey
    /// is not kept takes 3 µs longer.
    pub fn subkey_cache(mut self, subkeys: usize) -> Self {
        self.subkey_cache = subkeys.min(1 << 20);
        self
    }

    /// Whether a thread looks each second what other processes changed, and each minute whether something is due. Without
    /// it, [`Cluster::maintain`](crate::Cluster::maintain) does the same when it is called, and what other processes change
    /// is noticed when this one opens or changes something.
    pub fn watched(mut self, watched: bool) -> Self {
        self.watched = watched;
        self
    }

    /// What time it is, since 1970. Decides how old keys are.
    #[cfg(feature = "test-util")]
    pub fn clock(mut self, now: impl Fn() -> Duration + Send + Sync + 'static) -> Self {
        self.env.now = Arc::new(now);
        self
    }

    /// The disk that the keystore lies on. Page files and the lock stay in the real directory.
    #[cfg(feature = "test-util")]
    pub fn keystore_disk(mut self, disk: &crate::testing::SimulatedDisk) -> Self {
        self.disk = Arc::new(disk.clone());
        self
    }

    /// Where keys, salts and fresh bits come from.
    #[cfg(feature = "test-util")]
    pub fn entropy(mut self, entropy: Arc<dyn crate::env::Entropy>) -> Self {
        self.env.entropy = entropy;
        self
    }
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self::new()
    }
}

impl std::fmt::Debug for ClusterOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterOptions")
            .field("suite", &self.suite)
            .field("backend", &self.backend)
            .field("hierarchy", &self.hierarchy)
            .field("expected_id", &self.expected_id)
            .field("kms_timeout", &self.kms_timeout)
            .field("cluster_key_age", &self.cluster_key_age)
            .field("subkey_cache", &self.subkey_cache)
            .finish_non_exhaustive()
    }
}
