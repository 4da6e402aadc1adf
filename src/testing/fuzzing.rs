//! What the targets in `fuzz/` need beside the public API: every structure on disk, decoded and encoded again; and wrapped
//! keys, keystores and page files under known keys, whose bytes a target changes before the real code reads them.
//!
//! Files lie in `/dev/shm`, so that a million of them cost no disk.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use std::{env, io};

use crate::aead::{AesBackend, HmacKey, hmac_sha256};
use crate::env::Env;
use crate::error::{Error, ErrorKind, KmsClass, Result};
use crate::format::derive::Label;
use crate::format::file_header::{self, BODY_LEN, CLEAR_LEN, ClearHeader, HeaderBody, SLOT_LEN, Seen};
use crate::format::group::{self, HEAD_LEN, Head};
use crate::format::keystore::{HEADER_MAC_LEN, Header, Hierarchy, KeyUse, Operation, OwnerId, OwnerKind, SealedName};
use crate::format::page::{NONCE_LEN, OVERHEAD, SALT_LEN, SubkeyName, Suite, TAG_LEN, Trailer};
use crate::format::reader::Reader;
use crate::format::record::{KeyState, Record};
use crate::format::wrapped::{PAYLOAD_KEY_AT, PAYLOAD_LEN, PayloadHead, Purpose};
use crate::ids::{ClusterId, DatabaseId, FileId, Generation, MasterKeyId, SealId};
use crate::keys::keyring::DataKey;
use crate::keys::keystore::{Keystore, UnverifiedKeystore};
use crate::keys::payload;
use crate::keys::store::{KeystoreStore, MemoryStore};
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::kms::local::LocalKeyFile;
use crate::page::cipher::PageCipher;
use crate::page::pool::Inline;
use crate::secret::{KeyPayload, SecretKey};
use crate::storage::page_file::{PageFile, PageFileOptions};
use crate::storage::place::{History, Place};

/// A structure on disk, or inside a wrapped key, that can be read without a key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Structure {
    /// A key's record.
    Record,
    /// The header of a keystore, with its MAC, which is not checked.
    KeystoreHeader,
    /// One operation in the body of a keystore's group.
    Operation,
    /// The head of a group, up to its tag.
    GroupHead,
    /// The public half of a wrapped payload.
    PayloadHead,
    /// The clear part of a page file's header slot.
    FileHeader,
    /// The sealed part of a page file's header slot, after opening it.
    FileHeaderBody,
}

impl Structure {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Record,
        Self::KeystoreHeader,
        Self::Operation,
        Self::GroupHead,
        Self::PayloadHead,
        Self::FileHeader,
        Self::FileHeaderBody,
    ];

    /// Decodes the structure at the beginning of `bytes`, and encodes what came out: how many bytes were read, and those
    /// that were written, which should be the same. `None` if the bytes are refused.
    pub fn recode(self, bytes: &[u8]) -> Option<(usize, Vec<u8>)> {
        let mut reader = Reader::new(bytes);
        let mut out = Vec::new();
        let encoded = match self {
            Self::Record => Record::decode(&mut reader).ok()?.encode(&mut out),
            Self::Operation => Operation::decode(&mut reader).ok()?.encode(&mut out),
            Self::KeystoreHeader => {
                let (header, len) = Header::decode(bytes).ok()?;
                out = header.encode().unwrap_or_default();
                // The MAC is not part of what was decoded.
                let (_, mac) = bytes[..len].split_at(len - HEADER_MAC_LEN);
                out.truncate(out.len().saturating_sub(HEADER_MAC_LEN));
                out.extend(mac);
                return Some((len, out));
            }
            Self::GroupHead => {
                out.extend(Head::decode(bytes.first_chunk()?, u32::MAX).ok()?.encode());
                out.truncate(group::HEAD_TAG_AT);
                return Some((group::HEAD_TAG_AT, out));
            }
            Self::PayloadHead => {
                out.extend(PayloadHead::decode(bytes).ok()?.encode());
                return Some((PAYLOAD_KEY_AT, out));
            }
            Self::FileHeader => {
                out.extend(ClearHeader::decode(bytes.first_chunk()?).ok()?.encode());
                return Some((CLEAR_LEN, out));
            }
            Self::FileHeaderBody => {
                out.extend(HeaderBody::decode(bytes.first_chunk()?).ok()?.encode());
                return Some((BODY_LEN, out));
            }
        };
        // What was decoded and cannot be encoded is no success: nothing was written.
        encoded.map_or_else(|_| out.clear(), |()| ());
        Some((bytes.len() - reader.remaining(), out))
    }
}

/// Where a page begins in a page file with pages of this size; `None` past what a file can hold.
pub fn page_offset(page_size: u32, page: u64) -> Option<u64> {
    file_header::page_offset(page_size, page)
}

/// A cluster key and a data key, always the same: their records, their payloads as a master key would unwrap them, and the
/// data key's blob under a key file.
pub struct KnownKeys {
    master: LocalKeyFile,
    cluster: ClusterId,
    records: [Record; 2],
    payloads: [[u8; PAYLOAD_LEN]; 2],
    blob: WrappedKey,
    _scratch: Scratch,
}

impl KnownKeys {
    /// Makes them. Only the blob is not the same each time.
    ///
    /// # Errors
    /// No locked memory; no place for the key file.
    pub fn new() -> Result<Self> {
        let scratch = Scratch::new()?;
        let (identity, key) = (key(0x1d)?, key(0xc7)?);
        let cluster = payload::cluster_id(&identity)?;
        let cluster_payload = payload::cluster_payload(&key, &identity, cluster, Generation::FIRST)?;
        let commitment = payload::cluster_commitment(&key, cluster, Generation::FIRST)?;
        let cluster_record = Record { commitment, ..record(Purpose::Cluster, 0, 1) };
        let data_record = record(Purpose::Data, 1, 1);
        let Record { database, generation, suite, seal, .. } = data_record;
        let data = DataKey { generation, suite, seal, key };
        let commitment = payload::data_commitment(&data)?;
        let data_payload = payload::data_payload(&data, cluster, database, &commitment)?;
        let master = LocalKeyFile::create(scratch.path("master.key"))?;
        let blob = master.wrap_key(&data_payload, &context(cluster));
        Ok(Self {
            blob: blob.map_err(|error| Error::kms(error, &master.id(), "wrapping"))?,
            master,
            cluster,
            records: [cluster_record, Record { commitment, ..data_record }],
            payloads: [cluster_payload.with_bytes(|bytes| *bytes)?, data_payload.with_bytes(|bytes| *bytes)?],
            _scratch: scratch,
        })
    }

    /// The record of the data key, or of the cluster key.
    pub fn record(&self, data: bool) -> Vec<u8> {
        let mut out = Vec::new();
        self.records[usize::from(data)].encode(&mut out).map_or_else(|_| Vec::new(), |()| out)
    }

    /// The payload of the data key, or of the cluster key.
    pub fn payload(&self, data: bool) -> [u8; PAYLOAD_LEN] {
        self.payloads[usize::from(data)]
    }

    /// The data key's payload as the key file wrapped it.
    pub fn blob(&self) -> &[u8] {
        &self.blob.blob
    }

    /// Whether what a master key unwrapped is taken for the key of this record.
    ///
    /// # Errors
    /// Why it is not; [`ErrorKind::Invalid`] for bytes that are no record of a data key or cluster key.
    pub fn accept(&self, mut payload: Vec<u8>, record: &[u8]) -> Result<()> {
        let payload = KeyPayload::from_bytes(&mut payload)?;
        let record = Record::decode(&mut Reader::new(record)).map_err(|why| Error::invalid(why.0))?;
        match record.purpose {
            Purpose::Data => payload::accept_data(&payload, &record, self.cluster).map(drop),
            Purpose::Cluster => payload::accept_cluster(&payload, &record, self.cluster).map(drop),
            Purpose::Probe => Err(Error::invalid("a probe's key is used for nothing")),
        }
    }

    /// Unwraps a blob with the key file, in the data key's context.
    ///
    /// # Errors
    /// The class of the failure.
    pub fn unwrap_blob(&self, blob: &[u8]) -> Result<[u8; PAYLOAD_LEN], KmsClass> {
        let wrapped = WrappedKey { blob: blob.to_vec(), ..self.blob.clone() };
        let payload = self.master.unwrap_key(&wrapped, &context(self.cluster)).map_err(|error| error.class)?;
        payload.with_bytes(|bytes| *bytes).map_err(|_| KmsClass::Unclassified)
    }
}

fn context(cluster: ClusterId) -> WrapContext<'static> {
    WrapContext {
        cluster,
        database: Some(database_id(1)),
        generation: Generation::FIRST,
        purpose: Purpose::Data,
        deadline: Instant::now(),
        label: "",
    }
}

/// A keystore with a short history under a known MAC key. Its bytes are always the same.
pub struct KnownKeystore {
    /// The keystore as it was after each of its groups, and before the first.
    history: Vec<Keystore>,
    ends: Vec<usize>,
    bytes: Vec<u8>,
    mac: HmacKey,
}

impl KnownKeystore {
    /// Writes the history, once for each of its beginnings.
    ///
    /// # Errors
    /// No locked memory; no place for the files.
    pub fn new() -> Result<Self> {
        let mac = HmacKey::new(&key(MAC)?)?;
        let mut new = Self { history: Vec::new(), ends: Vec::new(), bytes: Vec::new(), mac };
        for groups in 0..=history().len() {
            let store = Arc::new(MemoryStore::default());
            let mut keystore = Keystore::create(Arc::clone(&store) as _, header(), Vec::new(), &new.mac)?;
            history().into_iter().take(groups).try_for_each(|operations| keystore.append(&new.mac, operations))?;
            new.bytes = bytes_of(&store)?;
            new.ends.push(new.bytes.len());
            new.history.push(keystore);
        }
        Ok(new)
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where the header and each group end in the file.
    pub fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// Reads a keystore whose first copy has these bytes, and whose second has those or is missing, and verifies it.
    ///
    /// # Errors
    /// As opening a cluster.
    pub fn open(&self, first: &[u8], second: Option<&[u8]>) -> Result<OpenKeystore<'_>> {
        let store = Arc::new(MemoryStore::with([Some(first.to_vec()), second.map(<[u8]>::to_vec)]));
        let keystore = UnverifiedKeystore::read(Arc::clone(&store) as _)?.verify(&self.mac)?;
        Ok(OpenKeystore { known: self, keystore, store })
    }

    /// The history, and after it one more group with this body: correctly authenticated, whatever the body.
    ///
    /// # Errors
    /// No locked memory; a body of 4 GiB.
    pub fn followed_by(&self, body: &[u8]) -> Result<Vec<u8>> {
        let length = u32::try_from(body.len()).map_err(|_| Error::invalid("a body is shorter than 4 GiB"))?;
        let (groups, zeros) = (self.history.len() as u64, [0; NONCE_LEN]);
        let head = Head {
            length,
            sealed_length: 0,
            end: false,
            seq: header().sequence + groups,
            synced: header().sequence + groups - 1,
            previous: [0; TAG_LEN],
            body_nonce: zeros,
            body_tag: [0; TAG_LEN],
            head_nonce: zeros,
        };
        let mut bytes = [self.bytes.clone(), group::assemble(head.encode(), &[0; TAG_LEN], body)].concat();
        authenticate(&mut bytes)?;
        Ok(bytes)
    }
}

/// Writes all MACs of a keystore file anew, as only somebody who holds the MAC key can: the header's, and those of all
/// groups, up to the first that is too long for the file. Each group is chained to the one before.
///
/// # Errors
/// No locked memory.
pub fn authenticate(file: &mut [u8]) -> Result<()> {
    let Ok((header, header_len)) = Header::decode(file) else { return Ok(()) };
    let (mac, cluster, segment) = (key(MAC)?, header.cluster.to_bytes(), header.sequence);
    let (head, mut rest) = file.split_at_mut(header_len);
    let (covered, stored) = head.split_at_mut(header_len - HEADER_MAC_LEN);
    stored.copy_from_slice(&hmac_sha256(&mac, &[covered])?);
    let mut previous = first_bytes(stored);
    while let Some(bytes) = rest.first_chunk()
        && let Ok(head) = Head::decode(bytes, u32::MAX)
        && let Some((group, after)) = rest.split_at_mut_checked(group::group_len(head.length))
    {
        let body = &group[HEAD_LEN..][..head.length as usize];
        let body_tag = hmac_sha256(&mac, &[&group::body_prefix(&cluster, segment, head.seq), body])?;
        let bytes = Head { previous, body_tag: first_bytes(&body_tag), ..head }.encode();
        let (covered, _) = group::covered_and_tag(&bytes);
        previous = first_bytes(&hmac_sha256(&mac, &[&group::head_prefix(&cluster, segment), covered])?);
        group[..HEAD_LEN].copy_from_slice(&bytes);
        group[group::HEAD_TAG_AT..HEAD_LEN].copy_from_slice(&previous);
        rest = after;
    }
    Ok(())
}

/// A keystore that verified.
pub struct OpenKeystore<'a> {
    known: &'a KnownKeystore,
    keystore: Keystore,
    store: Arc<MemoryStore>,
}

impl OpenKeystore<'_> {
    /// After how many groups of its history the known keystore was the same; `None` if it never was.
    pub fn groups(&self) -> Option<usize> {
        self.known.history.iter().position(|known| same(known, &self.keystore))
    }

    /// Whether what its operations say fits together: each database has a name and its generations from the first on, each
    /// user of keys a generation, and each name is found.
    pub fn is_consistent(&self) -> bool {
        let catalogue = self.keystore.catalogue();
        catalogue.databases().all(|(database, name)| {
            let generations = || catalogue.generations(database);
            let generation_of = |number| generations().any(|record| record.generation == number);
            catalogue.find_database(&name.lookup) == Some(database)
                && generations().next().is_some()
                && (1..).zip(generations()).all(|(number, record)| record.generation.get() == number)
                && catalogue.key_uses(database).all(|key_use| {
                    let found = |name: &SealedName| {
                        catalogue.find_key_use(database, key_use.kind, &name.lookup) == Some(key_use)
                    };
                    generation_of(key_use.oldest) && key_use.name.as_ref().is_none_or(found)
                })
        })
    }

    /// Appends one more operation, and writes the keystore anew. True if the files, read again after each, are then what
    /// this keystore is, and both copies are whole.
    ///
    /// # Errors
    /// Those of changing and of reading.
    pub fn change(mut self) -> Result<bool> {
        let mac = &self.known.mac;
        let operation = Operation::Probe(Record { created: 77, ..record(Purpose::Probe, 0, 1) });
        self.keystore.append(mac, vec![operation])?;
        let appended = self.is_stored()?;
        self.keystore.rewrite(mac, Vec::new(), None)?;
        Ok(appended && self.is_stored()?)
    }

    fn is_stored(&self) -> Result<bool> {
        let again = UnverifiedKeystore::read(Arc::clone(&self.store) as _)?.verify(&self.known.mac)?;
        Ok(same(&again, &self.keystore) && again.is_settled())
    }
}

fn bytes_of(store: &MemoryStore) -> Result<Vec<u8>> {
    let read = store.read(0).map_err(scratch_failed)?;
    Ok(read.map(|(_, bytes)| bytes).unwrap_or_default())
}

fn same(one: &Keystore, other: &Keystore) -> bool {
    one.position() == other.position()
        && one.cluster_record() == other.cluster_record()
        && one.catalogue() == other.catalogue()
}

/// The byte that the known keystore's MAC key consists of.
const MAC: u8 = 0x3a;

fn header() -> Header {
    Header {
        hierarchy: Hierarchy::Direct,
        cluster: ClusterId::from_bytes([0xc1; 16]),
        sequence: 40,
        whole: 40,
        record: record(Purpose::Cluster, 0, 1),
    }
}

/// Five groups, of one sector and of several, with every kind of operation.
fn history() -> Vec<Vec<Operation>> {
    let name = |byte| SealedName { lookup: [byte; 32], sealed: vec![byte; 20] };
    let database = |byte| Operation::Database { database: database_id(byte), name: name(byte) };
    let mut wide = record(Purpose::Data, 1, 3);
    wide.wrappings = [700, 9, 0].map(|len| WrappedKey { blob: vec![0xbb; len], ..wide.wrappings[0].clone() }).to_vec();
    let key_use = |kind, database, oldest, name| {
        let (owner, database) = (OwnerId([0x0e; 16]), database_id(database));
        Operation::KeyUseAdd(KeyUse { kind, owner, database, oldest, name })
    };
    vec![
        vec![Operation::Probe(record(Purpose::Probe, 0, 1))],
        vec![database(1), Operation::Generation(record(Purpose::Data, 1, 1))],
        vec![
            key_use(OwnerKind::PageFile, 1, Generation::FIRST, Some(name(9))),
            Operation::Generation(record(Purpose::Data, 1, 2)),
        ],
        vec![key_use(OwnerKind::External, 1, Generation::FIRST, None), Operation::Generation(wide)],
        vec![
            database(2),
            Operation::Generation(record(Purpose::Data, 2, 1)),
            key_use(OwnerKind::Log, 2, Generation::FIRST, Some(name(9))),
        ],
    ]
}

fn record(purpose: Purpose, database: u8, generation: u32) -> Record {
    let wrapping =
        WrappedKey { master_key: MasterKeyId::new("prov", "key-1"), key_version: "v2".into(), blob: vec![0xb1; 3] };
    Record {
        database: database_id(database),
        generation: Generation::new(generation).unwrap_or(Generation::FIRST),
        suite: Suite::Aes256Gcm,
        seal: SealId::from_bytes(if purpose == Purpose::Data { [0xe3; 16] } else { [0; 16] }),
        state: KeyState::Active,
        purpose,
        created: 1_700_000_000,
        commitment: [0xc7; 32],
        lock: if purpose == Purpose::Data { u32::from(database) << 24 | generation } else { 0 },
        wrappings: vec![wrapping],
    }
}

fn database_id(byte: u8) -> DatabaseId {
    DatabaseId::from_bytes([byte; 16])
}

/// A page file with three small pages, written in two steps, under a stray data key. It is as a crash leaves it that comes
/// in the second step, between the writes of the two header slots.
pub struct KnownFile {
    cipher: PageCipher,
    bytes: Vec<u8>,
    scratch: Scratch,
}

impl KnownFile {
    /// The bytes of one page on disk.
    pub const PAGE_SIZE: u32 = 512;

    /// Page `page` holds its number in each byte.
    ///
    /// # Errors
    /// No locked memory; no place for the file.
    pub fn new() -> Result<Self> {
        let cipher = super::stray_cipher(Suite::Aes256Gcm, AesBackend::Ring)?;
        let mut new = Self { cipher, bytes: Vec::new(), scratch: Scratch::new()? };
        let options = PageFileOptions::new().page_size(Self::PAGE_SIZE);
        let file = PageFile::create(new.place(), &options, |_| Ok(()))?;
        let append = |pages: std::ops::Range<u8>| {
            let payloads: Vec<u8> = pages.flat_map(|page| vec![page; file.payload_len()]).collect();
            let mut appender = file.append()?;
            appender.write(&Inline, &payloads)?;
            appender.finish()?;
            fs::read(file.path()).map_err(scratch_failed)
        };
        let older = append(0..2)?;
        new.bytes = append(2..3)?;
        new.bytes[SLOT_LEN..2 * SLOT_LEN].copy_from_slice(&older[SLOT_LEN..2 * SLOT_LEN]);
        Ok(new)
    }

    /// The whole file: slot 0, which says that there are three pages; slot 1, which is older and says two; the pages.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Opens a file with these bytes in its place. The one opened before must be gone.
    ///
    /// # Errors
    /// As opening a page file.
    pub fn open(&self, bytes: &[u8]) -> Result<PageFile> {
        fs::write(self.scratch.path(&FILE.to_string()), bytes).map_err(scratch_failed)?;
        PageFile::open(self.place())
    }

    /// The sealed part of a slot, opened.
    ///
    /// # Errors
    /// [`ErrorKind::Authentication`].
    pub fn open_slot(&self, slot: &mut [u8; SLOT_LEN]) -> Result<()> {
        let failed = || Error::new(ErrorKind::Authentication, "the slot does not open");
        let (clear, rest) = slot.split_at_mut(CLEAR_LEN);
        let (body, trailer) = rest.split_last_chunk_mut::<OVERHEAD>().ok_or_else(failed)?;
        let (trailer, salt) = (Trailer(*trailer), Trailer(*trailer).subkey_name().salt());
        let subkey = self.cipher.current_key()?.key.derive(Label::Head, &salt, AesBackend::Ring)?;
        subkey.with(|key| key.open(trailer.nonce(), &salt, clear, body, &trailer.tag()))?.map_err(|_| failed())
    }

    /// Seals the part of a slot that should be: correctly, whatever it says.
    ///
    /// # Errors
    /// No locked memory.
    pub fn seal_slot(&self, slot: &mut [u8; SLOT_LEN]) -> Result<()> {
        let (salt, nonce) = ([0x5a; SALT_LEN], [0x0c; NONCE_LEN]);
        let key = self.cipher.current_key()?.key;
        let subkey = key.derive(Label::Head, &salt, AesBackend::Ring)?;
        let (clear, rest) = slot.split_at_mut(CLEAR_LEN);
        let (body, trailer) = rest.split_at_mut(BODY_LEN);
        let tag = subkey.with(|key| key.seal(nonce, &salt, clear, body))?;
        let name = SubkeyName::new(&salt, key.generation, key.suite);
        trailer.copy_from_slice(&Trailer::new(&tag, &nonce, &name).0);
        Ok(())
    }

    fn place(&self) -> Place {
        Place {
            cluster: ClusterId::from_bytes([0xc1; 16]),
            database: database_id(1),
            file: FILE,
            directory: self.scratch.directory.clone(),
            cipher: self.cipher.clone(),
            backend: AesBackend::Ring,
            env: Env::system(),
            history: Arc::new(Forgetful),
            owner: None,
        }
    }
}

const FILE: FileId = FileId::new(7);

/// A keystore at change 41 that has every other change, too.
struct Forgetful;

impl History for Forgetful {
    fn now(&self) -> Seen {
        Seen { sequence: 41, tag: [0; TAG_LEN] }
    }

    fn has(&self, seen: &Seen) -> Result<bool> {
        Ok(seen.sequence <= 41)
    }
}

fn key(byte: u8) -> Result<SecretKey> {
    SecretKey::fill_with(|out| {
        out.fill(byte);
        Ok(())
    })
}

fn first_bytes(mac: &[u8]) -> [u8; TAG_LEN] {
    let mut tag = [0; TAG_LEN];
    tag.copy_from_slice(&mac[..TAG_LEN]);
    tag
}

/// A directory in memory. Removed on drop; what a crashed target leaves is used again.
struct Scratch {
    directory: PathBuf,
    /// Tells the others that the directory is taken.
    _lock: File,
}

impl Scratch {
    fn new() -> Result<Self> {
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { env::temp_dir() };
        let claimed = (0..1000).find_map(|number| Self::claim(parent.join(format!("pageseal-fuzzing-{number}"))).ok());
        claimed.ok_or_else(|| scratch_failed(io::ErrorKind::StorageFull.into()))
    }

    fn claim(directory: PathBuf) -> io::Result<Self> {
        if let Err(error) = fs::create_dir(&directory)
            && error.kind() != io::ErrorKind::AlreadyExists
        {
            return Err(error);
        }
        let lock = File::open(&directory)?;
        lock.try_lock()?;
        // Another may have removed it before it was locked.
        if lock.metadata()?.ino() != fs::metadata(&directory)?.ino() {
            return Err(io::ErrorKind::NotFound.into());
        }
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }?;
        }
        Ok(Self { directory, _lock: lock })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn scratch_failed(error: io::Error) -> Error {
    Error::io("keeping files for a fuzz target", error)
}
