//! The keystore: the wrapped keys of one cluster, in one append-only file that is believed only after its MACs.
//!
//! [`UnverifiedKeystore`] has read the file and believes nothing. [`UnverifiedKeystore::verify`] takes the MAC key, which
//! comes out of the cluster record by way of a master key, and checks header, chain and every operation; only the
//! [`Keystore`] that it returns has a [`Catalogue`] and can append.
//!
//! What the MACs do not show: whoever can write the file can put an older state of it back, or cut groups off its end.
//! Neither can be told from a crash before the later appends, without an anchor elsewhere. So what verifies is always an
//! unaltered beginning of the keystore's history. Cut after a group, the file is simply older; cut within a group, or
//! with its last group damaged, it looks like the torn tail of an append that was never acknowledged, and that group is
//! dropped. A damaged group that a later one says was synced is an error that names the place.
//!
//! The caller keeps other processes out (a lock on the cluster). Here it is only noticed if the file's length changed.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::aead::{constant_time_eq, hmac_sha256};
use crate::error::{Error, ErrorKind, Result};
use crate::format::group::{self, HEAD_COVERED, HEAD_LEN, HEAD_TAG_AT, Head, SECTOR};
use crate::format::keystore::{
    HEADER_MAC_LEN, Header, Hierarchy, KeyUse, Operation, OwnerId, OwnerKind, Refused, SealedName,
};
use crate::format::page::{NONCE_LEN, TAG_LEN};
use crate::format::reader::{Malformed, Reader};
use crate::format::record::{KeyState, Record};
use crate::ids::{ClusterId, DatabaseId, Generation};
use crate::secret::SecretKey;
use crate::storage::disk::{Disk, RealDisk, Stat};

const FILE_NAME: &str = "keystore";
/// The longest keystore: about a million databases. Read before anything is authenticated, so it is bounded.
const MAX_FILE_LEN: usize = 1 << 30;
/// The longest body of one group.
const MAX_BODY_LEN: u32 = 16 << 20;

type Tag = [u8; TAG_LEN];

/// A keystore as it was found on disk. Nothing that it says is authenticated: its cluster id only tells which keystore
/// it claims to be, and its cluster record only what to ask a master key to unwrap.
pub(crate) struct UnverifiedKeystore {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    bytes: Vec<u8>,
    header: Header,
    header_len: usize,
}

impl UnverifiedKeystore {
    /// Reads the keystore in `dir`, and of its content the header. Writes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none, [`ErrorKind::Damaged`] if it has no header, [`ErrorKind::Unsupported`] if
    /// its header is of a version that this build does not know, [`ErrorKind::Io`].
    pub(crate) fn read(dir: &Path) -> Result<Self> {
        Self::read_on(Arc::new(RealDisk), dir)
    }

    fn read_on(disk: Arc<dyn Disk>, dir: &Path) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let bytes = disk.read(&path, MAX_FILE_LEN as u64).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                let message =
                    format!("there is no keystore {}; check the directory, or create the cluster", path.display());
                Error::with_source(ErrorKind::NotFound, message, error)
            }
            io::ErrorKind::FileTooLarge => damaged(&path, MAX_FILE_LEN, "the file is longer than 1 GiB"),
            _ => Error::io(format_args!("reading the keystore {}", path.display()), error),
        })?;
        let (header, header_len) = Header::decode(&bytes).map_err(|refused| refusal(&path, 0, refused))?;
        Ok(Self { disk, path, bytes, header, header_len })
    }

    /// Which cluster the keystore claims to be. Unauthenticated.
    pub(crate) fn cluster_id(&self) -> ClusterId {
        self.header.cluster
    }

    /// The wrapped cluster key and identity key. Unauthenticated: unwrap it under configured master keys only.
    pub(crate) fn cluster_record(&self) -> &Record {
        &self.header.record
    }

    /// What the master keys wrap. Unauthenticated.
    pub(crate) fn hierarchy(&self) -> Hierarchy {
        self.header.hierarchy
    }

    /// Checks the header, all groups and all operations under `mac`, the key derived from the identity key for it.
    /// Writes nothing; a torn tail is left out, and removed from the file by the first append.
    ///
    /// # Errors
    /// [`ErrorKind::Authentication`] if the header is not of this key, [`ErrorKind::Damaged`] with the byte where the
    /// history is broken, [`ErrorKind::Unsupported`] for an operation that this version does not know.
    pub(crate) fn verify(self, mac: SecretKey) -> Result<Keystore> {
        let Self { disk, path, mut bytes, header, header_len } = self;
        let mac = Mac::new(mac, &header);
        let (covered, stored) = bytes[..header_len].split_at(header_len - HEADER_MAC_LEN);
        let computed = mac.header(covered)?;
        if !constant_time_eq(&computed, stored) {
            let message = format!(
                "the header of keystore {}, bytes 0 to {header_len}, was not written under this cluster's identity key: \
                 damaged or substituted; restore the keystore from a copy",
                path.display()
            );
            return Err(Error::new(ErrorKind::Authentication, message));
        }
        let mut keystore = Keystore::empty(disk, path, header, mac, Tip::after_header(header_len, &computed));
        let mut last = header_len;
        while keystore.tip.end < bytes.len() {
            let at = keystore.tip.end;
            if !keystore.admit_group(&bytes, at)? {
                keystore.refuse_if_synced(&bytes, at)?;
                bytes.truncate(at);
                keystore.unsettled = Unsettled::TornTail(bytes);
                return Ok(keystore);
            }
            last = at;
        }
        keystore.unsettled = Unsettled::LastGroup { at: last, bytes: bytes.split_off(last) };
        Ok(keystore)
    }
}

/// A verified keystore. One handle; the caller serialises changes.
pub(crate) struct Keystore {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    header: Header,
    mac: Mac,
    catalogue: Catalogue,
    tip: Tip,
    unsettled: Unsettled,
    /// A write or sync failed: nobody knows what is on the disk, so this handle writes no more.
    poisoned: bool,
}

/// Where the next group goes, and what it chains to.
#[derive(Clone, Copy)]
struct Tip {
    end: usize,
    seq: u64,
    tag: Tag,
}

impl Tip {
    fn after_header(len: usize, mac: &[u8; HEADER_MAC_LEN]) -> Self {
        Self { end: len, seq: 0, tag: first_bytes(mac) }
    }
}

/// What the first append after opening must do before it: the process before us may have ended after a failed sync.
/// Then the kernel shows us bytes that the disk does not have and that no later sync would write.
enum Unsettled {
    No,
    /// The verified beginning of the file, to be put in its place.
    TornTail(Vec<u8>),
    /// The last group, the only one that no later group calls synced: to be written again in place, with the same bytes.
    LastGroup {
        at: usize,
        bytes: Vec<u8>,
    },
}

fn refuse_existing(disk: &dyn Disk, path: &Path) -> Result<()> {
    let exists = disk.exists(path);
    if exists.map_err(|error| Error::io(format_args!("looking for the keystore {}", path.display()), error))? {
        let message = format!("there is a keystore {} already; open it, or choose another directory", path.display());
        return Err(Error::new(ErrorKind::AlreadyExists, message));
    }
    Ok(())
}

/// A validated change, ready to be written.
struct Change {
    added: Catalogue,
    group: Vec<u8>,
    tip: Tip,
}

impl Keystore {
    /// Makes the keystore in `dir`, with these operations as its first group. It exists whole and durably, or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::Io`], after which the keystore may exist (whole) or not; the errors of
    /// [`Keystore::append`].
    pub(crate) fn create(dir: &Path, header: Header, first: Vec<Operation>, mac: SecretKey) -> Result<Self> {
        Self::create_on(Arc::new(RealDisk), dir, header, first, mac)
    }

    /// Refuses a directory that holds a keystore already. [`Keystore::create`] asks too; this is for those who have work
    /// to do before, such as calling a key service.
    pub(crate) fn check_absent(dir: &Path) -> Result<()> {
        refuse_existing(&RealDisk, &dir.join(FILE_NAME))
    }

    fn create_on(
        disk: Arc<dyn Disk>,
        dir: &Path,
        header: Header,
        first: Vec<Operation>,
        mac: SecretKey,
    ) -> Result<Self> {
        let path = dir.join(FILE_NAME);
        let mac = Mac::new(mac, &header);
        let mut bytes = header.encode().map_err(|rule| unwritable(&path, rule))?;
        let covered = bytes.len() - HEADER_MAC_LEN;
        let header_mac = mac.header(&bytes[..covered])?;
        bytes[covered..].copy_from_slice(&header_mac);
        let tip = Tip::after_header(bytes.len(), &header_mac);
        let mut keystore = Self::empty(disk, path, header, mac, tip);
        if !first.is_empty() {
            let change = keystore.prepare(first)?;
            bytes.extend(&change.group);
            keystore.accept(change);
        }
        keystore.publish_new(&bytes)?;
        Ok(keystore)
    }

    fn publish_new(&self, bytes: &[u8]) -> Result<()> {
        refuse_existing(&*self.disk, &self.path)?;
        let replaced = self.disk.replace(&self.path, bytes);
        replaced.map_err(|error| Error::io(format_args!("creating the keystore {}", self.path.display()), error))
    }

    fn empty(disk: Arc<dyn Disk>, path: PathBuf, header: Header, mac: Mac, tip: Tip) -> Self {
        let tip = Tip { seq: header.sequence, ..tip };
        let catalogue = Catalogue::default();
        Self { disk, path, header, mac, catalogue, tip, unsettled: Unsettled::No, poisoned: false }
    }

    /// Adds operations, all or none: durable when it returns. The operations are checked first; if they contradict the
    /// catalogue or each other, nothing is written. No operations are no change.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`], [`ErrorKind::NotFound`] or [`ErrorKind::Invalid`] for operations that do not fit;
    /// [`ErrorKind::Io`] if writing failed: then the change may be durable or not, and every further append is refused,
    /// until the keystore is opened again.
    pub(crate) fn append(&mut self, operations: Vec<Operation>) -> Result<()> {
        if self.poisoned {
            let message =
                format!("an earlier write to keystore {} failed; open the cluster again", self.path.display());
            return Err(Error::new(ErrorKind::Io, message));
        }
        if operations.is_empty() {
            return Ok(());
        }
        let change = self.prepare(operations)?;
        // Set before the first write, so that a panic below leaves it set too.
        self.poisoned = true;
        self.write(&change.group)
            .map_err(|error| Error::io(format_args!("writing the keystore {}", self.path.display()), error))?;
        self.poisoned = false;
        self.accept(change);
        Ok(())
    }

    /// The databases, keys and users, as of the last append.
    pub(crate) fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The number of the last change.
    pub(crate) fn sequence(&self) -> u64 {
        self.tip.seq
    }

    /// The wrapped cluster key and identity key.
    pub(crate) fn cluster_record(&self) -> &Record {
        &self.header.record
    }

    /// Whether the file ends in a torn append, which is not part of the catalogue and which the next append removes.
    pub(crate) fn has_torn_tail(&self) -> bool {
        matches!(self.unsettled, Unsettled::TornTail(_))
    }

    fn prepare(&self, operations: Vec<Operation>) -> Result<Change> {
        let mut body = Vec::new();
        operations
            .iter()
            .try_for_each(|operation| operation.encode(&mut body))
            .map_err(|rule| unwritable(&self.path, rule))?;
        let added = self
            .catalogue
            .with(operations)
            .map_err(|conflict| Error::new(conflict.kind, format!("keystore {}: {conflict}", self.path.display())))?;
        let length = u32::try_from(body.len()).ok().filter(|&length| length <= MAX_BODY_LEN);
        let length =
            length.ok_or_else(|| unwritable(&self.path, Malformed("a change is longer than 16 MiB; split it")))?;
        let end = self.tip.end + group::group_len(length);
        let seq = self.tip.seq.checked_add(1).filter(|_| end <= MAX_FILE_LEN);
        let seq =
            seq.ok_or_else(|| unwritable(&self.path, Malformed("it would grow beyond 1 GiB; split the cluster")))?;
        let (group, tag) = self.mac.seal_group(seq, &self.tip.tag, length, &body)?;
        Ok(Change { added, group, tip: Tip { end, seq, tag } })
    }

    /// Changes the memory only.
    fn accept(&mut self, change: Change) {
        self.catalogue.merge(change.added);
        self.tip = change.tip;
    }

    fn write(&mut self, group: &[u8]) -> io::Result<()> {
        self.settle()?;
        self.write_at(self.tip.end, group)
    }

    fn write_at(&self, at: usize, bytes: &[u8]) -> io::Result<()> {
        let file = self.disk.stat(&self.path)?.ok_or(io::ErrorKind::NotFound)?;
        let expected = Stat { len: self.tip.end as u64, ..file };
        self.disk.write_at(&self.path, expected, at as u64, bytes, true)
    }

    /// Makes durable what was read at opening, which the next group's `synced` will promise.
    fn settle(&mut self) -> io::Result<()> {
        match mem::replace(&mut self.unsettled, Unsettled::No) {
            Unsettled::No => Ok(()),
            Unsettled::TornTail(bytes) => {
                self.keep_tail(bytes.len())?;
                self.disk.replace(&self.path, &bytes)
            }
            Unsettled::LastGroup { at, bytes } => {
                if !bytes.is_empty() {
                    self.write_at(at, &bytes)?;
                }
                // The file's own name may be the part that was never synced.
                self.disk.sync_dir(self.path.parent().unwrap_or(Path::new("")))
            }
        }
    }

    /// Copies what does not verify into a file of its own before it goes. Nearly always it is an append that a crash tore;
    /// but a key that was acknowledged last, and damaged since, looks the same and must not be lost for good.
    fn keep_tail(&self, verified: usize) -> io::Result<()> {
        let whole = self.disk.read(&self.path, MAX_FILE_LEN as u64)?;
        // Under a name of its own: what an earlier damage left is not replaced.
        let mut kept = self.path.with_extension(format!("torn-{}", self.tip.seq + 1));
        let mut again = 1;
        while self.disk.exists(&kept)? {
            again += 1;
            kept = self.path.with_extension(format!("torn-{}-{again}", self.tip.seq + 1));
        }
        self.disk.write_new(&kept, whole.get(verified..).unwrap_or_default())?;
        self.disk.sync_dir(self.path.parent().unwrap_or(Path::new("")))
    }

    /// Verifies and applies the group at `at`. False if it does not verify or is cut: its bytes are not what was written.
    ///
    /// # Errors
    /// For a group that was written under our key and yet does not belong here.
    fn admit_group(&mut self, file: &[u8], at: usize) -> Result<bool> {
        let Some((head, tag)) = self.authentic_head(file, at)? else {
            return Ok(false);
        };
        self.check_place(&head, at)?;
        let Ok(body) = group::body_of(&file[at..], head.length) else {
            return Ok(false);
        };
        if !constant_time_eq(&self.mac.body(head.seq, body)?, &head.body_tag) {
            return Ok(false);
        }
        self.apply(body, at + HEAD_LEN)?;
        self.tip = Tip { end: at + group::group_len(head.length), seq: head.seq, tag };
        Ok(true)
    }

    /// The head at `at`, with its tag, if it is one of ours, wherever it belongs.
    fn authentic_head(&self, file: &[u8], at: usize) -> Result<Option<(Head, Tag)>> {
        let Some(bytes) = file.get(at..).and_then(<[u8]>::first_chunk::<HEAD_LEN>) else {
            return Ok(None);
        };
        // The nonce stands outside what the tag covers: it is zero, or the head was changed.
        if !bytes.starts_with(&group::MAGIC) || bytes[HEAD_COVERED..HEAD_TAG_AT] != [0; NONCE_LEN] {
            return Ok(None);
        }
        let (covered, stored) = group::covered_and_tag(bytes);
        let tag = self.mac.head(covered)?;
        if !constant_time_eq(&tag, stored) {
            return Ok(None);
        }
        let head = Head::decode(bytes, MAX_BODY_LEN).map_err(|rule| refusal(&self.path, at, rule.into()))?;
        if head.end || head.sealed_length != 0 || head.body_nonce != [0; NONCE_LEN] {
            return Err(refusal(&self.path, at, Malformed("the group has fields that no keystore has").into()));
        }
        Ok(Some((head, tag)))
    }

    fn check_place(&self, head: &Head, at: usize) -> Result<()> {
        let expected = self.tip.seq.checked_add(1);
        if expected != Some(head.seq) {
            let what =
                format!("change {} stands where the one after {} belongs: groups were moved", head.seq, self.tip.seq);
            return Err(damaged(&self.path, at, what));
        }
        if head.previous != self.tip.tag {
            return Err(damaged(&self.path, at, format!("change {} belongs to another history", head.seq)));
        }
        // Each append syncs before it returns.
        if head.synced != self.tip.seq {
            return Err(damaged(
                &self.path,
                at,
                format!("change {} contradicts itself about what was synced", head.seq),
            ));
        }
        Ok(())
    }

    /// The group at `at` does not verify. If any head after it says that it was synced, it was acknowledged: damage.
    fn refuse_if_synced(&self, file: &[u8], at: usize) -> Result<()> {
        let bad = self.tip.seq.saturating_add(1);
        for later in (at..file.len()).step_by(SECTOR).skip(1) {
            if let Some((head, _)) = self.authentic_head(file, later)?
                && head.seq > bad
                && head.synced >= bad
            {
                let what =
                    format!("change {bad} does not verify, and change {} at byte {later} says it was synced", head.seq);
                return Err(damaged(&self.path, at, what));
            }
        }
        Ok(())
    }

    /// Applies the operations of an authentic body, which begins at `at`. They can still be wrong, if who wrote them was.
    fn apply(&mut self, body: &[u8], at: usize) -> Result<()> {
        let mut reader = Reader::new(body);
        let mut staged = Staged::on(&self.catalogue);
        if reader.is_empty() {
            return Err(refusal(&self.path, at, Malformed("the group is empty").into()));
        }
        while !reader.is_empty() {
            let at = at + body.len() - reader.remaining();
            let operation = Operation::decode(&mut reader).map_err(|refused| refusal(&self.path, at, refused))?;
            staged.apply(operation).map_err(|conflict| damaged(&self.path, at, conflict))?;
        }
        let added = staged.finish().map_err(|conflict| damaged(&self.path, at, conflict))?;
        self.catalogue.merge(added);
        Ok(())
    }
}

/// The MACs of one keystore file. Header, heads and bodies cannot be taken for each other: what is covered begins with
/// `PGSEALK1`, `head` or `body`.
struct Mac {
    key: SecretKey,
    cluster: [u8; 16],
    segment: u64,
}

impl Mac {
    fn new(key: SecretKey, header: &Header) -> Self {
        Self { key, cluster: header.cluster.to_bytes(), segment: header.sequence }
    }

    fn header(&self, covered: &[u8]) -> Result<[u8; HEADER_MAC_LEN]> {
        hmac_sha256(&self.key, &[covered])
    }

    fn head(&self, covered: &[u8]) -> Result<Tag> {
        let prefix = group::head_prefix(&self.cluster, self.segment);
        hmac_sha256(&self.key, &[&prefix, covered]).map(|mac| first_bytes(&mac))
    }

    fn body(&self, seq: u64, body: &[u8]) -> Result<Tag> {
        let prefix = group::body_prefix(&self.cluster, self.segment, seq);
        hmac_sha256(&self.key, &[&prefix, body]).map(|mac| first_bytes(&mac))
    }

    /// The bytes of a group, and the tag of its head.
    fn seal_group(&self, seq: u64, previous: &Tag, length: u32, body: &[u8]) -> Result<(Vec<u8>, Tag)> {
        let head = Head {
            length,
            sealed_length: 0,
            end: false,
            seq,
            // Every append syncs before it returns, so all before this one is durable.
            synced: seq.saturating_sub(1),
            previous: *previous,
            body_nonce: [0; NONCE_LEN],
            body_tag: self.body(seq, body)?,
            head_nonce: [0; NONCE_LEN],
        };
        let bytes = head.encode();
        let tag = self.head(group::covered_and_tag(&bytes).0)?;
        Ok((group::assemble(bytes, &tag, body), tag))
    }
}

fn first_bytes(mac: &[u8; 32]) -> Tag {
    let mut tag = [0; TAG_LEN];
    tag.copy_from_slice(&mac[..TAG_LEN]);
    tag
}

/// What the keystore knows: the sum of its operations.
#[derive(Default, PartialEq, Eq)]
pub(crate) struct Catalogue {
    databases: BTreeMap<DatabaseId, SealedName>,
    names: BTreeMap<[u8; 32], DatabaseId>,
    generations: BTreeMap<(DatabaseId, Generation), Record>,
    probe: Option<Record>,
    key_uses: BTreeMap<(DatabaseId, OwnerKind, OwnerId), KeyUse>,
    key_use_names: BTreeMap<(DatabaseId, OwnerKind, [u8; 32]), OwnerId>,
}

impl Catalogue {
    /// All databases, with their names.
    pub(crate) fn databases(&self) -> impl Iterator<Item = (DatabaseId, &SealedName)> {
        self.databases.iter().map(|(&database, name)| (database, name))
    }

    /// The database whose name has this HMAC.
    pub(crate) fn find_database(&self, lookup: &[u8; 32]) -> Option<DatabaseId> {
        self.names.get(lookup).copied()
    }

    /// The records of a database's data keys, oldest first. New seals use the last. States are as they were written: a
    /// newer generation does not retire the one before by itself.
    pub(crate) fn generations(&self, database: DatabaseId) -> impl DoubleEndedIterator<Item = &Record> {
        self.generations.range((database, Generation::FIRST)..=(database, Generation::MAX)).map(|(_, record)| record)
    }

    /// The latest probe.
    pub(crate) fn probe(&self) -> Option<&Record> {
        self.probe.as_ref()
    }

    /// Everybody who uses a database's keys.
    pub(crate) fn key_uses(&self, database: DatabaseId) -> impl Iterator<Item = &KeyUse> {
        let least = (database, OwnerKind::PageFile, OwnerId([0; 16]));
        let most = (database, OwnerKind::External, OwnerId([0xff; 16]));
        self.key_uses.range(least..=most).map(|(_, key_use)| key_use)
    }

    /// The user of this kind whose name has this HMAC.
    pub(crate) fn find_key_use(&self, database: DatabaseId, kind: OwnerKind, lookup: &[u8; 32]) -> Option<&KeyUse> {
        let owner = self.key_use_names.get(&(database, kind, *lookup))?;
        self.key_uses.get(&(database, kind, *owner))
    }

    /// What these operations, one after the other, would add. Changes nothing.
    fn with(&self, operations: Vec<Operation>) -> Result<Catalogue, Conflict> {
        let mut staged = Staged::on(self);
        operations.into_iter().try_for_each(|operation| staged.apply(operation))?;
        staged.finish()
    }

    fn merge(&mut self, added: Catalogue) {
        self.databases.extend(added.databases);
        self.names.extend(added.names);
        self.generations.extend(added.generations);
        self.probe = added.probe.or(self.probe.take());
        self.key_uses.extend(added.key_uses);
        self.key_use_names.extend(added.key_use_names);
    }
}

/// Operations that do not fit the catalogue, or each other.
#[derive(Debug)]
struct Conflict {
    kind: ErrorKind,
    what: String,
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// The additions of one group, over a catalogue that stays as it is until they are durable. Costs the same whatever the
/// size of the catalogue.
struct Staged<'a> {
    base: &'a Catalogue,
    added: Catalogue,
}

impl<'a> Staged<'a> {
    fn on(base: &'a Catalogue) -> Self {
        Self { base, added: Catalogue::default() }
    }

    fn apply(&mut self, operation: Operation) -> Result<(), Conflict> {
        match operation {
            Operation::Database { database, name } => self.add_database(database, name),
            Operation::Generation(record) => self.add_generation(record),
            Operation::Probe(record) => {
                self.added.probe = Some(record);
                Ok(())
            }
            Operation::KeyUseAdd(key_use) => self.add_key_use(key_use),
        }
    }

    /// Checks what only shows at the end of a group: a database without a key would be one that nothing can open.
    fn finish(self) -> Result<Catalogue, Conflict> {
        match self.added.databases.keys().find(|&&database| self.added.generations(database).next().is_none()) {
            Some(database) => {
                conflict(ErrorKind::Invalid, format!("database {database} is added without its first data key"))
            }
            None => Ok(self.added),
        }
    }

    fn add_database(&mut self, database: DatabaseId, name: SealedName) -> Result<(), Conflict> {
        if self.has_database(database) {
            return conflict(ErrorKind::AlreadyExists, format!("there is a database {database} already"));
        }
        if let Some(other) = self.both(|catalogue| catalogue.find_database(&name.lookup)) {
            return conflict(ErrorKind::AlreadyExists, format!("there is a database of this name already, {other}"));
        }
        self.added.names.insert(name.lookup, database);
        self.added.databases.insert(database, name);
        Ok(())
    }

    fn add_generation(&mut self, record: Record) -> Result<(), Conflict> {
        let (database, generation) = (record.database, record.generation);
        self.require_database(database)?;
        let last = self.both(|catalogue| catalogue.generations(database).next_back());
        let last = last.map_or(0, |record| record.generation.get());
        if generation.get() != last + 1 {
            let what = format!("generation {generation} of database {database} does not follow generation {last}");
            return conflict(ErrorKind::Invalid, what);
        }
        self.added.generations.insert((database, generation), record);
        Ok(())
    }

    fn add_key_use(&mut self, key_use: KeyUse) -> Result<(), Conflict> {
        let KeyUse { kind, owner, database, oldest, .. } = key_use;
        self.require_database(database)?;
        match self.both(|catalogue| catalogue.generations.get(&(database, oldest))).map(|record| record.state) {
            None => return conflict(ErrorKind::NotFound, format!("database {database} has no generation {oldest}")),
            Some(KeyState::Destroyed) => {
                return conflict(
                    ErrorKind::Invalid,
                    format!("generation {oldest} of database {database} is destroyed"),
                );
            }
            Some(KeyState::Active | KeyState::Retired) => {}
        }
        if self.both(|catalogue| catalogue.key_uses.get(&(database, kind, owner))).is_some() {
            return conflict(
                ErrorKind::AlreadyExists,
                format!("this owner uses the keys of database {database} already"),
            );
        }
        if let Some(name) = &key_use.name {
            let key = (database, kind, name.lookup);
            if self.both(|catalogue| catalogue.key_use_names.get(&key)).is_some() {
                let what = format!("database {database} has one of this kind and name already");
                return conflict(ErrorKind::AlreadyExists, what);
            }
            self.added.key_use_names.insert(key, owner);
        }
        self.added.key_uses.insert((database, kind, owner), key_use);
        Ok(())
    }

    fn require_database(&self, database: DatabaseId) -> Result<(), Conflict> {
        if self.has_database(database) {
            Ok(())
        } else {
            conflict(ErrorKind::NotFound, format!("there is no database {database}"))
        }
    }

    fn has_database(&self, database: DatabaseId) -> bool {
        self.both(|catalogue| catalogue.databases.get(&database)).is_some()
    }

    /// Looks in what was added, then in what was there.
    fn both<'s, T: 's>(&'s self, look: impl Fn(&'s Catalogue) -> Option<T>) -> Option<T> {
        look(&self.added).or_else(|| look(self.base))
    }
}

fn conflict<T>(kind: ErrorKind, what: String) -> Result<T, Conflict> {
    Err(Conflict { kind, what })
}

fn damaged(path: &Path, at: usize, what: impl fmt::Display) -> Error {
    Error::damaged(format!("keystore {}, byte {at}: {what}; restore the keystore from a copy", path.display()))
}

/// Bytes that this version does not write.
fn refusal(path: &Path, at: usize, refused: Refused) -> Error {
    match refused {
        Refused::Malformed(_) => damaged(path, at, refused),
        Refused::UnknownVersion(_) | Refused::UnknownOperation(_) => {
            let message = format!("keystore {}, byte {at}: {refused}; use a newer version of pageseal", path.display());
            Error::new(ErrorKind::Unsupported, message)
        }
    }
}

/// The caller's own operations or header break a rule of the format.
fn unwritable(path: &Path, Malformed(rule): Malformed) -> Error {
    Error::invalid(format!("this cannot be written to keystore {}: {rule}", path.display()))
}
