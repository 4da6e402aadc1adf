//! A cluster whose keystore lies on a simulated disk, what is done with it, and what is seen of it afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use pageseal::testing::SimulatedDisk;
use pageseal::{
    Cluster, ClusterId, ClusterOptions, Database, DatabaseId, Error, FileId, Generation, Hierarchy, KeyPayload,
    KeyWrapper, KmsError, MasterKeyId, PageCipher, PageContext, PageError, Purpose, ScriptedWrapper, WrapContext,
    WrappedKey, Wrappers,
};

const CONTEXT: PageContext = PageContext::page(FileId::new(1), 1);
const PAGE: usize = 128;
/// The files of a keystore.
pub const COPIES: [&str; 2] = ["keystore", "keystore.copy"];

/// A master key that remembers what it wrapped.
#[derive(Clone)]
pub struct Tap {
    pub key: ScriptedWrapper,
    wrapped: Arc<Mutex<Vec<Wrapping>>>,
}

/// What a [`Tap`] remembers of a wrapping.
#[derive(Clone)]
pub struct Wrapping {
    pub database: Option<DatabaseId>,
    pub generation: Generation,
    pub purpose: Purpose,
    pub blob: Vec<u8>,
}

impl Tap {
    fn new(name: &str) -> Self {
        Self { key: ScriptedWrapper::new(name), wrapped: Arc::default() }
    }

    pub fn wrapped(&self) -> Vec<Wrapping> {
        self.wrapped.lock().unwrap().clone()
    }

    fn remember(&self, key: WrappedKey, cx: &WrapContext<'_>) -> WrappedKey {
        let (database, generation, purpose, blob) = (cx.database, cx.generation, cx.purpose, key.blob.clone());
        self.wrapped.lock().unwrap().push(Wrapping { database, generation, purpose, blob });
        key
    }
}

impl KeyWrapper for Tap {
    fn id(&self) -> MasterKeyId {
        self.key.id()
    }

    fn wrap_key(&self, payload: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        Ok(self.remember(self.key.wrap_key(payload, cx)?, cx))
    }

    fn unwrap_key(&self, wrapped: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.key.unwrap_key(wrapped, cx)
    }

    fn rewrap_key(&self, wrapped: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        Ok(self.remember(self.key.rewrap_key(wrapped, cx)?, cx))
    }
}

/// A change of a cluster, or an opening that is one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    CreateCluster,
    Open,
    Import,
    Create(&'static str),
    /// The first cipher of a database notes that its keys are used.
    Cipher(&'static str),
    Rename(&'static str, &'static str),
    Rotate(&'static str),
    Release(&'static str, u32),
    Destroy(&'static str, u32),
    Drop(&'static str),
    Rewrap,
    SetHierarchy(Hierarchy),
    ReplaceClusterKey,
    Maintain,
}

impl Act {
    /// Whether it makes the handle that later acts use.
    pub fn opens(self) -> bool {
        matches!(self, Self::CreateCluster | Self::Open | Self::Import)
    }
}

/// A page that was sealed, and the byte that its payload consists of.
#[derive(Clone)]
pub struct Sealed {
    page: Vec<u8>,
    payload: u8,
}

/// Everything that a cluster shows of its keystore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct State {
    pub hierarchy: Hierarchy,
    pub databases: BTreeMap<String, Shown>,
    /// Which of the two master keys opens everything alone.
    pub opened_by: [bool; 2],
}

/// Everything that a database shows of its keys.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Shown {
    pub generation: u32,
    /// Whether its use by an engine was noted.
    pub noted: bool,
    /// Which of the pages that were sealed before it opens.
    pub opens: Vec<usize>,
}

/// A directory of its own, two master keys, and what was sealed.
pub struct World {
    pub directory: PathBuf,
    pub masters: [Tap; 2],
    /// Whether both master keys are configured.
    pub both: bool,
    pub id: Option<ClusterId>,
    pub hierarchy: Hierarchy,
    pub sealed: Vec<Sealed>,
}

impl World {
    pub fn new(hierarchy: Hierarchy) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let directory = parent.join(format!("pageseal-crashes-{}-{number}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let masters = [Tap::new("first"), Tap::new("second")];
        Self { directory, masters, both: false, id: None, hierarchy, sealed: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn wrappers(&self) -> Wrappers {
        match self.both {
            true => Wrappers::any_of(self.masters.clone().map(|key| Arc::new(key) as Arc<dyn KeyWrapper>)).unwrap(),
            false => Wrappers::one(self.masters[0].clone()),
        }
    }

    fn options(&self, disk: &SimulatedDisk) -> ClusterOptions {
        let options = ClusterOptions::new().hierarchy(self.hierarchy).keystore_disk(disk).watched(false);
        match self.id {
            Some(id) => options.expected_id(id),
            None => options,
        }
    }

    /// Opens the cluster, with whichever of the master keys there are.
    pub fn open(&self, disk: &SimulatedDisk) -> Result<Cluster, Error> {
        let opened = Cluster::open(&self.directory, self.options(disk), self.wrappers());
        match opened {
            // The keys may have been moved to the second.
            Err(_) if !self.both => self.open_with(disk, 1).or(opened),
            opened => opened,
        }
    }

    pub fn open_with(&self, disk: &SimulatedDisk, master: usize) -> Result<Cluster, Error> {
        Cluster::open(&self.directory, self.options(disk), Wrappers::one(self.masters[master].clone()))
    }

    /// What a process that ended in the middle of a change left in the lock file; nobody, after the machine started anew.
    pub fn mark(&self) -> Option<Vec<u8>> {
        fs::read(self.path("lock")).ok().filter(|mark| mark.iter().any(|byte| *byte != 0))
    }

    pub fn set_mark(&self, mark: Option<&[u8]>) {
        match mark {
            Some(mark) => fs::write(self.path("lock"), mark).unwrap(),
            None => drop(fs::remove_file(self.path("lock"))),
        }
    }

    /// What is seen of the cluster. The databases whose use was not noted are noted by it.
    pub fn look(&self, disk: &SimulatedDisk, cluster: &Cluster) -> Result<State, Error> {
        // What an interrupted change left is written anew by this: it must not be taken for a note.
        let renamed = cluster.rename_database("no such database", "other");
        assert!(renamed.is_err(), "a database was renamed that does not exist");
        let mut databases = BTreeMap::new();
        for name in cluster.databases()? {
            let database = cluster.database(&name)?;
            let written = disk.bytes_written();
            let cipher = database.cipher()?;
            let noted = disk.bytes_written() == written;
            let opens = (0..self.sealed.len()).filter(|&page| self.sealed[page].opens(&cipher)).collect();
            databases.insert(name, Shown { generation: database.generation().get(), noted, opens });
        }
        Ok(State { hierarchy: cluster.hierarchy(), databases, opened_by: [true, false] })
    }

    /// Which of the master keys opens everything alone.
    pub fn opened_by(&self, disk: &SimulatedDisk) -> [bool; 2] {
        [0, 1].map(|master| {
            let opened = self.open_with(&disk.kill(), master).and_then(|cluster| cluster.open_databases());
            opened.is_ok()
        })
    }

    pub fn act(&self, act: Act, disk: &SimulatedDisk, handles: &mut Handles) -> Result<(), Error> {
        let directory = &self.directory;
        match act {
            Act::CreateCluster => {
                handles.cluster = Some(Cluster::create(directory, self.options(disk), self.wrappers())?);
            }
            Act::Open => handles.cluster = Some(self.open(disk)?),
            Act::Import => {
                let export = self.path("export");
                handles.cluster = Some(Cluster::import(directory, &export, self.options(disk), self.wrappers())?);
            }
            Act::Create(name) => drop(handles.cluster().create_database(name)?),
            Act::Cipher(name) => {
                let cipher = handles.cluster().database(name)?.cipher()?;
                handles.ciphers.push((name, cipher));
            }
            Act::Rename(from, to) => handles.cluster().rename_database(from, to)?,
            Act::Rotate(name) => drop(self.database(handles, name)?.rotate()?),
            Act::Release(name, below) => self.database(handles, name)?.release_external(generation(below))?,
            Act::Destroy(name, number) => {
                drop(self.database(handles, name)?.destroy_generation(generation(number))?);
            }
            Act::Drop(name) => {
                drop(handles.cluster().drop_database(name)?);
                handles.ciphers.retain(|(dropped, _)| *dropped != name);
            }
            Act::Rewrap => handles.cluster().rewrap(Wrappers::one(self.masters[1].clone()), &|_| ())?,
            Act::SetHierarchy(to) => handles.cluster().set_hierarchy(to, &|_| ())?,
            Act::ReplaceClusterKey => handles.cluster().replace_cluster_key()?,
            Act::Maintain => drop(handles.cluster().maintain()?),
        }
        Ok(())
    }

    fn database(&self, handles: &Handles, name: &str) -> Result<Database, Error> {
        handles.cluster().database(name)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// What a process has open.
#[derive(Default)]
pub struct Handles {
    pub cluster: Option<Cluster>,
    pub ciphers: Vec<(&'static str, PageCipher)>,
}

impl Handles {
    pub fn cluster(&self) -> &Cluster {
        self.cluster.as_ref().expect("the cluster was opened first")
    }

    /// A page by each cipher there is, except of dropped databases; nothing of the disk is needed for that.
    pub fn seal(&self) -> Vec<Sealed> {
        self.ciphers.iter().filter_map(|(_, cipher)| Sealed::new(cipher)).collect()
    }
}

impl Sealed {
    /// `None` if the database was dropped.
    pub fn new(cipher: &PageCipher) -> Option<Self> {
        let payload = 0x40 + cipher.generation().get() as u8;
        let mut page = vec![payload; PAGE];
        match cipher.seal_in_place(&CONTEXT, &mut page) {
            Err(PageError::Dropped) => None,
            sealed => sealed.map(|()| Some(Self { page, payload })).unwrap(),
        }
    }

    pub fn opens(&self, cipher: &PageCipher) -> bool {
        let mut page = self.page.clone();
        cipher.open_in_place(&CONTEXT, &mut page).is_ok()
            && page[..PAGE - pageseal::OVERHEAD].iter().all(|byte| *byte == self.payload)
    }
}

pub fn generation(number: u32) -> Generation {
    Generation::new(number).unwrap()
}
