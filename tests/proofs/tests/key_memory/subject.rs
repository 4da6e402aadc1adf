//! The cluster that a victim opens, and the key wrapper through which the hunter learns its keys.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use pageseal::{
    AesBackend, Cluster, ClusterOptions, Database, KeyPayload, KeyWrapper, KmsError, LocalKeyFile, MasterKeyId,
    PageCipher, PageFileOptions, Pool, ReadJob, Suite, WrapContext, WrappedKey, Wrappers,
};

use crate::channel::send;

const DATABASES: [&str; 3] = ["orders", "customers", "ledger"];
/// Payload of a page of the page files.
const PAYLOAD: usize = 4096 - pageseal::OVERHEAD;

/// Which suite and implementation, and where.
pub struct Subject {
    kind: String,
    folder: PathBuf,
}

/// A cluster with its databases open.
pub struct Store {
    pub cluster: Cluster,
    pub databases: Vec<Database>,
}

impl Subject {
    pub fn new(kind: &str, folder: &str) -> Self {
        Self { kind: kind.to_owned(), folder: PathBuf::from(folder) }
    }

    pub fn options(&self) -> ClusterOptions {
        ClusterOptions::new().suite(suite_of(&self.kind)).aes_backend(backend_of(&self.kind))
    }

    /// The master key's file, outside the cluster's folder. Made at the first call.
    pub fn wrapper(&self) -> Telling {
        let path = master_key(&self.folder);
        if path.exists() {
            return Telling(LocalKeyFile::new(path));
        }
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        Telling(LocalKeyFile::create(path).unwrap())
    }

    /// Makes the master key's file without the library, which would need locked memory.
    pub fn write_master_key(&self, key: &[u8; 32]) {
        let path = master_key(&self.folder);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
        file.write_all(key).unwrap();
    }

    pub fn cluster_folder(&self) -> PathBuf {
        cluster(&self.folder)
    }

    /// Opens the cluster, or makes it if its folder is not there.
    pub fn cluster(&self) -> pageseal::Result<Cluster> {
        let folder = self.cluster_folder();
        if folder.exists() {
            return Cluster::open(&folder, self.options(), Wrappers::one(self.wrapper()));
        }
        Cluster::create(&folder, self.options(), Wrappers::one(self.wrapper()))
    }

    /// Opens the cluster and its databases, which are made the first time.
    pub fn open(&self) -> Store {
        let cluster = self.cluster().unwrap();
        let open = |name: &str| cluster.database(name).or_else(|_| cluster.create_database(name)).unwrap();
        let databases = DATABASES.iter().map(|name| open(name)).collect();
        Store { cluster, databases }
    }
}

impl Store {
    pub fn ciphers(&self) -> Vec<PageCipher> {
        self.databases.iter().map(|database| database.cipher().unwrap()).collect()
    }

    /// Writes and reads page files, on `pool` and on this thread.
    pub fn files(&self, pool: &dyn Pool) {
        for database in &self.databases {
            let file = database.create_page_file("pages", PageFileOptions::new().page_size(4096)).unwrap();
            let payloads: Vec<u8> = (0..64 * PAYLOAD).map(|at| (at % 251) as u8).collect();
            let mut appender = file.append().unwrap();
            appender.write(pool, &payloads).unwrap();
            appender.finish().unwrap();
            drop(file);
            let file = database.page_file("pages").unwrap();
            let mut read = vec![0; payloads.len()];
            let mut jobs: Vec<_> =
                (0..).zip(read.chunks_mut(PAYLOAD)).map(|(page, buf)| ReadJob::new(page, buf)).collect();
            assert_eq!(file.read_many(pool, &mut jobs), 0);
            assert_eq!(read, payloads);
            let _ = file.read(7, &mut read[..PAYLOAD]).unwrap();
        }
        assert_eq!(self.cluster.databases().unwrap().len(), DATABASES.len());
        self.cluster.check_master_key().unwrap();
    }
}

/// A local key file that tells the hunter every payload, as a key service sees it.
pub struct Telling(LocalKeyFile);

impl KeyWrapper for Telling {
    fn id(&self) -> MasterKeyId {
        self.0.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        tell(key);
        self.0.wrap_key(key, cx)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let payload = self.0.unwrap_key(key, cx)?;
        tell(&payload);
        // As a service does whose answer comes in a buffer of the caller's.
        let mut answer = [0; KeyPayload::LEN];
        payload.with_bytes(|bytes| answer.copy_from_slice(bytes)).unwrap();
        Ok(KeyPayload::from_bytes(&mut answer).unwrap())
    }
}

fn tell(payload: &KeyPayload) {
    payload.with_bytes(|bytes| send(b'P', bytes)).unwrap();
}

/// The cluster's folder inside the victim's.
pub fn cluster(folder: &Path) -> PathBuf {
    folder.join("cluster")
}

/// The master key's file inside the victim's folder.
pub fn master_key(folder: &Path) -> PathBuf {
    folder.join("elsewhere").join("master.key")
}

/// The suites and implementations that this machine has.
pub fn kinds() -> Vec<&'static str> {
    let mut kinds = vec!["aes-ring", "aes-rustcrypto", "chacha", "aegis"];
    if pageseal::AesHardware::detect() == pageseal::AesHardware::None {
        kinds.retain(|kind| *kind != "aegis");
    }
    kinds
}

/// The suite that a kind seals with.
pub fn suite_of(kind: &str) -> Suite {
    match kind {
        "chacha" => Suite::ChaCha20Poly1305,
        "aegis" => Suite::Aegis256X2,
        _ => Suite::Aes256Gcm,
    }
}

/// The implementation that a kind seals with.
pub fn backend_of(kind: &str) -> AesBackend {
    if kind == "aes-rustcrypto" { AesBackend::RustCrypto } else { AesBackend::Ring }
}
