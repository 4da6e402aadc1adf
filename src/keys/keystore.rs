//! The keystore: the wrapped keys of one cluster, believed only after their MACs.
//!
//! [`UnverifiedKeystore`] has read both copies and believes nothing. [`UnverifiedKeystore::verify`] takes the MAC key, which
//! comes out of the cluster record by way of a master key, and checks header, chain and every operation; only the
//! [`Keystore`] that it returns has a [`Catalogue`] and can change.
//!
//! A change is one group appended to both copies. What must leave the files (a destroyed or dropped key, an old wrapping,
//! another cluster record) is a rewrite: both files are made anew and renamed. The caller holds the cluster's lock, and
//! calls [`Keystore::catch_up`] under it before each change: other processes may have made theirs.

#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use crate::aead::HmacKey;
use crate::error::{Error, ErrorKind, Result};
use crate::format::keystore::{Header, Hierarchy, Operation};
use crate::format::reader::Malformed;
use crate::format::record::Record;
use crate::ids::ClusterId;
use crate::keys::catalogue::{Catalogue, Conflict};
use crate::keys::chain::{self, CopyState, Fault, Tag, Tip, Verified};
use crate::keys::store::{Aside, Durability, KeystoreStore, Version, Versions, is_about_the_copy, store_failed};

/// What an import adds to the sequence at least: files that have seen later changes of the lost keystore must open with it, and
/// no keystore makes so many changes.
const IMPORT_JUMP: u64 = 1 << 32;
/// And at least so many changes for each second since 1970, so that files which have seen an earlier import of the same export
/// open, too.
const CHANGES_A_SECOND: u64 = 1 << 24;
/// Whatever the clock says, an import leaves room for the changes after it.
const LAST_IMPORT: u64 = 1 << 62;
/// A keystore is compacted when it has this many groups more than four for each thing that it holds.
const SPARE_GROUPS: usize = 1024;

/// Both copies of a keystore as they were read. Nothing that they say is authenticated: their cluster id only tells which
/// keystore they claim to be, and their cluster record only what to ask a master key to unwrap.
pub(crate) struct UnverifiedKeystore {
    store: Arc<dyn KeystoreStore>,
    copies: [Found; 2],
    headers: Vec<Header>,
}

/// One copy, as far as it could be read.
enum Found {
    Missing,
    Read(Version, Vec<u8>),
    /// The second copy has the bytes of the first.
    Same(Version),
    /// Something is there, and this is why it cannot be read.
    Unreadable(Option<Version>, io::Error),
}

impl Found {
    fn version(&self) -> Option<Version> {
        match self {
            Self::Missing => None,
            Self::Read(version, _) | Self::Same(version) => Some(*version),
            Self::Unreadable(version, _) => *version,
        }
    }

    fn bytes(&self) -> Option<&[u8]> {
        match self {
            Self::Read(_, bytes) => Some(bytes),
            Self::Missing | Self::Same(_) | Self::Unreadable(..) => None,
        }
    }

    fn into_bytes(self) -> Option<Vec<u8>> {
        match self {
            Self::Read(_, bytes) => Some(bytes),
            Self::Missing | Self::Same(_) | Self::Unreadable(..) => None,
        }
    }
}

impl UnverifiedKeystore {
    /// Reads both copies, and of their content the headers. Writes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is none, [`ErrorKind::Damaged`] if none has a header, [`ErrorKind::Unsupported`] if
    /// it is of a version that this build does not know, [`ErrorKind::Io`] if none can be read.
    pub(crate) fn read(store: Arc<dyn KeystoreStore>) -> Result<Self> {
        let copies = read_copies(&*store)?;
        Self::from_copies(store, copies)
    }

    /// An exported keystore, to be put into `store`.
    pub(crate) fn exported(store: Arc<dyn KeystoreStore>, bytes: Vec<u8>) -> Result<Self> {
        let version = Version { file: 0, len: bytes.len() as u64 };
        Self::from_copies(store, [Found::Read(version, bytes), Found::Missing])
    }

    fn from_copies(store: Arc<dyn KeystoreStore>, copies: [Found; 2]) -> Result<Self> {
        if are_missing(&copies) {
            let message = format!("there is no keystore {}; check the directory, or create the cluster", store.name(0));
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let mut headers: Vec<Header> = Vec::new();
        let mut refused = None;
        for (which, copy) in copies.iter().enumerate() {
            let Some(bytes) = copy.bytes() else { continue };
            match Header::decode(bytes) {
                Ok((header, _)) if headers.contains(&header) => {}
                Ok((header, _)) => headers.push(header),
                Err(why) => {
                    // If the other copy can be read, the MACs will tell a newer version's header from a damaged one.
                    let error = Fault::of_header(why).into_error(&store.name(which));
                    if refused.is_none() || error.kind() == ErrorKind::Unsupported {
                        refused = Some(error);
                    }
                }
            }
        }
        headers.sort_by_key(|header| std::cmp::Reverse(header.sequence));
        match refused {
            Some(error) if headers.is_empty() => Err(error),
            _ => Ok(Self { store, copies, headers }),
        }
    }

    /// What the copies claim: one header, or two where they differ, the newer first. Unauthenticated: unwrap their records
    /// under configured master keys only.
    pub(crate) fn headers(&self) -> &[Header] {
        &self.headers
    }

    /// Forgets the copies that claim to be of another cluster.
    pub(crate) fn retain(&mut self, cluster: ClusterId) {
        self.headers.retain(|header| header.cluster == cluster);
    }

    /// Checks header, groups and operations of both copies under the MAC key. Writes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Authentication`] if the headers are not of this key, [`ErrorKind::Damaged`] with the byte where the
    /// history is broken, [`ErrorKind::Unsupported`] for an operation that this version does not know.
    pub(crate) fn verify(self, mac: &HmacKey) -> Result<Keystore> {
        let unfinished = self.store.is_unfinished()?;
        let verified = verify_copies(&*self.store, mac, &self.copies)?;
        let versions = self.copies.each_ref().map(Found::version);
        Ok(Keystore::adopt(self.store, verified, versions, unfinished))
    }
}

/// Reads both copies. That one cannot be read is what became of it, as long as the other one can.
fn read_copies(store: &dyn KeystoreStore) -> Result<[Found; 2]> {
    let first = read_copy(store, 0)?;
    let second = match first.bytes().and_then(|bytes| store.holds(1, bytes)) {
        // Nearly always: then there is one keystore in memory, and not two.
        Some(version) => Found::Same(version),
        None => read_copy(store, 1)?,
    };
    let copies = [first, second];
    if copies.iter().any(|copy| copy.bytes().is_some()) {
        return Ok(copies);
    }
    match copies {
        [Found::Unreadable(_, error), _] => Err(unreadable(&store.name(0), error)),
        [_, Found::Unreadable(_, error)] => Err(unreadable(&store.name(1), error)),
        copies => Ok(copies),
    }
}

fn read_copy(store: &dyn KeystoreStore, which: usize) -> Result<Found> {
    let failed = |error| store_failed("reading", &store.name(which), error);
    match store.read(which) {
        Ok(Some((version, bytes))) => Ok(Found::Read(version, bytes)),
        Ok(None) => Ok(Found::Missing),
        Err(error) if is_about_the_copy(&error) => {
            Ok(Found::Unreadable(store.versions().map_err(failed)?[which], error))
        }
        Err(error) => Err(failed(error)),
    }
}

/// Why a keystore is refused of which no copy can be read.
fn unreadable(name: &str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::FileTooLarge {
        return Fault::too_long().into_error(&name);
    }
    let what = format_args!("neither copy of the keystore {name} can be read");
    Error::io(format_args!("{what}; check the disk, or move both files away and import an export"), error)
}

fn are_missing(copies: &[Found; 2]) -> bool {
    copies.iter().all(|copy| matches!(copy, Found::Missing))
}

fn bytes_of(copies: &[Found; 2]) -> [Option<&[u8]>; 2] {
    let [first, second] = copies;
    let second = if matches!(second, Found::Same(_)) { first } else { second };
    [first.bytes(), second.bytes()]
}

fn verify_copies(store: &dyn KeystoreStore, mac: &HmacKey, copies: &[Found; 2]) -> Result<Verified> {
    let verified = mac.with(|hmac| chain::verify(hmac, bytes_of(copies)))?;
    let mut verified = verified.map_err(|(which, fault)| fault.into_error(&store.name(which)))?;
    for (state, copy) in verified.copies.iter_mut().zip(copies) {
        if let Found::Unreadable(_, why) = copy {
            *state = CopyState::Unreadable(why.to_string());
        }
    }
    Ok(verified)
}

/// A verified keystore. One handle in a process; the caller serialises changes, here and with other processes.
pub(crate) struct Keystore {
    store: Arc<dyn KeystoreStore>,
    header: Header,
    catalogue: Catalogue,
    tip: Tip,
    tags: Vec<Tag>,
    versions: Versions,
    copies: [CopyState; 2],
    /// Both copies are whole and durable: a group may be appended.
    settled: bool,
    /// What was read is on the disk, in one copy at least: nobody ended in the middle of writing it.
    durable: bool,
    /// A write failed: nobody knows what is on the disk, so it is read again before anything else.
    unsure: bool,
    /// The last change that was read or written while it was durable: one that a process left unsynced may be gone when the
    /// files are read again.
    sure: (u64, Tag),
}

impl Keystore {
    /// Makes the keystore, with these operations. It exists whole and durably, or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`]; [`ErrorKind::Invalid`] for operations that do not fit; [`ErrorKind::Io`], after which
    /// the keystore may exist (whole) or not.
    pub(crate) fn create(
        store: Arc<dyn KeystoreStore>,
        header: Header,
        first: Vec<Operation>,
        mac: &HmacKey,
    ) -> Result<Self> {
        let mut catalogue = Catalogue::default();
        catalogue.apply(first.clone()).map_err(|conflict| misfit(&*store, &conflict))?;
        catalogue.keep();
        let (bytes, verified) = write_checked(&*store, mac, header, &catalogue)?;
        let versions = store.create(&bytes).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                let message =
                    format!("there is a keystore {} already; open it, or choose another directory", store.name(0));
                Error::new(ErrorKind::AlreadyExists, message)
            }
            _ => store_failed("creating", &store.name(0), error),
        })?;
        Ok(Self::adopt(store, verified, versions, false))
    }

    fn adopt(store: Arc<dyn KeystoreStore>, verified: Verified, versions: Versions, unfinished: bool) -> Self {
        let settled = is_settled(&verified, unfinished);
        let Verified { header, catalogue, tip, tags, copies, .. } = verified;
        let durable = !unfinished;
        let sure =
            if durable { (tip.seq, tip.tag) } else { (header.sequence, tags.first().copied().unwrap_or(tip.tag)) };
        Self { store, header, catalogue, tip, tags, versions, copies, settled, durable, unsure: false, sure }
    }

    /// The databases, keys and users, as of the last change.
    pub(crate) fn catalogue(&self) -> &Catalogue {
        &self.catalogue
    }

    /// The number of the last change, and its tag.
    pub(crate) fn position(&self) -> (u64, Tag) {
        (self.tip.seq, self.tip.tag)
    }

    /// The last change that no single damage or power cut takes away, as of which there are two durable copies.
    pub(crate) fn durable_position(&self) -> (u64, Tag) {
        // While a copy is not whole, only what was written together with the header is sure to be in both.
        let seq = if self.is_settled() { self.tip.in_both } else { self.header.sequence };
        self.tag_of(seq).map_or_else(|| self.position(), |tag| (seq, *tag))
    }

    /// The number of the last change that is in it.
    pub(crate) fn as_of(&self) -> u64 {
        chain::as_of(&self.header, &self.tip)
    }

    /// Whether this history has the change of this number and tag. A change before the last rewrite is believed: its tag is
    /// not known any more.
    pub(crate) fn has(&self, seq: u64, tag: &Tag) -> bool {
        seq <= self.tip.seq && self.tag_of(seq).is_none_or(|known| known == tag)
    }

    fn tag_of(&self, seq: u64) -> Option<&Tag> {
        let at = seq.checked_sub(self.header.sequence)?;
        self.tags.get(usize::try_from(at).ok()?)
    }

    /// The wrapped cluster key and identity key.
    pub(crate) fn cluster_record(&self) -> &Record {
        &self.header.record
    }

    pub(crate) fn hierarchy(&self) -> Hierarchy {
        self.header.hierarchy
    }

    /// What was wrong with the two copies when they were read, last.
    pub(crate) fn copies(&self) -> &[CopyState; 2] {
        &self.copies
    }

    pub(crate) fn copy_name(&self, which: usize) -> String {
        self.store.name(which)
    }

    /// What was wrong stays known after it was put right.
    fn remember(&mut self, found: [CopyState; 2]) {
        for (known, found) in self.copies.iter_mut().zip(found) {
            if found != CopyState::Intact {
                *known = found;
            }
        }
    }

    /// Whether both copies are whole and durable, as far as is known.
    pub(crate) fn is_settled(&self) -> bool {
        self.settled && !self.unsure
    }

    /// Whether a power cut leaves all that was read. Until it does, nothing may be sealed under a key out of it.
    pub(crate) fn is_durable(&self) -> bool {
        self.durable && !self.unsure
    }

    /// Whether [`Keystore::catch_up`] would find anything, without reading it.
    pub(crate) fn is_behind(&self) -> Result<bool> {
        Ok(self.unsure || self.versions()? != self.versions || (self.settled && self.store.is_unfinished()?))
    }

    /// Takes over what other processes changed. The caller holds the cluster's lock. True if anything was.
    ///
    /// # Errors
    /// [`ErrorKind::KeystoreStale`] if somebody put an older keystore in its place; those of [`UnverifiedKeystore::verify`].
    pub(crate) fn catch_up(&mut self, mac: &HmacKey) -> Result<bool> {
        let unfinished = self.store.is_unfinished()?;
        let now = self.versions()?;
        if !self.unsure && now == self.versions && !(unfinished && self.settled) {
            return Ok(false);
        }
        if !self.unsure && !unfinished && self.settled && self.grew_to(&now) && self.follow_on(mac, &now)? {
            return Ok(true);
        }
        self.reload(mac).map(|_| true)
    }

    fn versions(&self) -> Result<Versions> {
        self.store.versions().map_err(|error| store_failed("looking at", &self.store.name(0), error))
    }

    /// Whether both files are those known, and longer by the same.
    fn grew_to(&self, now: &Versions) -> bool {
        match (now, &self.versions) {
            ([Some(a), Some(b)], [Some(known), Some(other)]) => {
                (a.file, b.file) == (known.file, other.file) && a.len == b.len && a.len > known.len
            }
            _ => false,
        }
    }

    /// Reads what was appended. False if it cannot be read, or does not verify to its end: then both copies are read whole.
    fn follow_on(&mut self, mac: &HmacKey, now: &Versions) -> Result<bool> {
        let Ok(bytes) = self.store.read_from(self.tip.end as u64) else { return Ok(false) };
        // If the catalogue is left between two changes, all is read again.
        self.unsure = true;
        let (header, catalogue, tags, tip) = (&self.header, &mut self.catalogue, &mut self.tags, self.tip);
        let followed = mac.with(|hmac| chain::follow_on(hmac, header, catalogue, tags, tip, &bytes))?;
        match followed {
            Ok(tip) if now[0].is_some_and(|version| version.len == tip.end as u64) => {
                self.tip = tip;
                self.sure = (tip.seq, tip.tag);
                self.versions = *now;
                self.unsure = false;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Reads and verifies both copies anew.
    fn reload(&mut self, mac: &HmacKey) -> Result<Reloaded> {
        let unfinished = self.store.is_unfinished()?;
        let copies = read_copies(&*self.store)?;
        if are_missing(&copies) {
            let message = format!("the keystore {} is gone; restore it from a copy", self.store.name(0));
            return Err(Error::new(ErrorKind::NotFound, message));
        }
        let verified = verify_copies(&*self.store, mac, &copies)?;
        if !self.continues_in(&verified) {
            return Err(self.went_back(&verified));
        }
        self.settled = is_settled(&verified, unfinished);
        self.durable = !unfinished;
        self.versions = copies.each_ref().map(Found::version);
        let bytes = verified.bytes(bytes_of(&copies)).to_vec();
        let Verified { header, catalogue, tip, tags, copies: states, .. } = verified;
        (self.header, self.catalogue, self.tip, self.tags) = (header, catalogue, tip, tags);
        if self.durable {
            self.sure = self.position();
        }
        self.remember(states.clone());
        self.unsure = false;
        Ok(Reloaded { bytes, copies: copies.map(Found::into_bytes), states })
    }

    /// Whether `verified` is what became of this history.
    fn continues_in(&self, verified: &Verified) -> bool {
        let (seq, tag) = self.sure;
        let known = seq.checked_sub(verified.header.sequence).and_then(|at| usize::try_from(at).ok());
        match known.map(|at| verified.tags.get(at)) {
            // It was rewritten since. What it was before cannot be told from its tags.
            None => {
                verified.header.record.generation >= self.header.record.generation
                    && (!self.durable || verified.catalogue.may_have_become_of(&self.catalogue))
            }
            Some(known) => known == Some(&tag),
        }
    }

    fn went_back(&self, verified: &Verified) -> Error {
        let message = format!(
            "the keystore {} was put back to change {}, this process has seen change {} of another or a longer history; \
             put the newest keystore back, or export it from here and import that",
            self.store.name(0),
            verified.tip.seq,
            self.tip.seq
        );
        Error::new(ErrorKind::KeystoreStale, message)
    }

    /// Makes both copies whole and durable, if one is not. The caller holds the cluster's lock.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], after which nothing is lost; those of [`Keystore::catch_up`].
    pub(crate) fn settle(&mut self, mac: &HmacKey) -> Result<()> {
        if self.is_settled() {
            return Ok(());
        }
        let read = self.reload(mac)?;
        self.keep_damaged(&read)?;
        self.unsure = true;
        let replaced = self.store.replace(&self.versions, &read.bytes);
        self.versions = replaced.map_err(|error| store_failed("repairing", &self.store.name(0), error))?;
        self.tip.in_both = self.tip.seq;
        self.sure = self.position();
        (self.settled, self.durable, self.unsure) = (true, true, false);
        Ok(())
    }

    /// Keeps aside what is about to go, unless the other copy shows that nothing is lost with it.
    fn keep_damaged(&mut self, Reloaded { copies, states, .. }: &Reloaded) -> Result<()> {
        for (which, state) in states.iter().enumerate() {
            // A crash tears one copy at a time, nearly always: if both are torn, it may have been none.
            let vouched = matches!(states[1 - which], CopyState::Intact | CopyState::Short | CopyState::Older);
            let keep = match state {
                CopyState::Damaged(_) => true,
                CopyState::Torn => !vouched,
                _ => false,
            };
            let kept = match &copies[which] {
                Some(bytes) if keep => self.store.keep_aside(bytes, Aside::Damaged, self.tip.seq),
                None if matches!(state, CopyState::Unreadable(_)) => self.move_aside(which, Aside::Damaged),
                _ => Ok(()),
            };
            kept.map_err(|error| store_failed("keeping a damaged copy of", &self.store.name(which), error))?;
        }
        Ok(())
    }

    /// What cannot be read keeps its bytes, whatever can be read of them later: it is not written over.
    fn move_aside(&mut self, which: usize, why: Aside) -> io::Result<()> {
        self.unsure = true;
        self.store.move_aside(which, why, self.tip.seq)?;
        self.versions[which] = None;
        Ok(())
    }

    /// Adds operations, all or none: durable when it returns, in both copies unless [`Durability::of`] them says otherwise.
    /// The operations are checked first; if they contradict the catalogue or each other, nothing is written. No operations
    /// are no change. The caller holds the cluster's lock and has caught up.
    ///
    /// # Errors
    /// [`ErrorKind::AlreadyExists`], [`ErrorKind::NotFound`], [`ErrorKind::InUse`] or [`ErrorKind::Invalid`] for operations
    /// that do not fit; [`ErrorKind::Io`] if writing failed: then the change may be durable or not, which the next call finds
    /// out by reading the keystore again.
    pub(crate) fn append(&mut self, mac: &HmacKey, operations: Vec<Operation>) -> Result<()> {
        if operations.is_empty() {
            return Ok(());
        }
        self.settle(mac)?;
        let (header, tip, durability) = (&self.header, &self.tip, Durability::of(&operations));
        let sealed = mac.with(|hmac| chain::seal_group(hmac, header, tip, &operations))?;
        let (group, tip) = sealed.map_err(|rule| unwritable(&*self.store, rule))?;
        self.catalogue.apply(operations).map_err(|conflict| misfit(&*self.store, &conflict))?;
        // Set before the write, so that a panic below leaves it set too.
        self.unsure = true;
        match self.store.append(&self.versions, &group, durability) {
            Ok(versions) => {
                self.catalogue.keep();
                self.versions = versions;
                self.tip = tip;
                self.sure = (tip.seq, tip.tag);
                self.tags.push(tip.tag);
                self.unsure = false;
                Ok(())
            }
            Err(error) => {
                self.catalogue.take_back();
                Err(store_failed("writing", &self.store.name(0), error))
            }
        }
    }

    /// Writes both files anew with these operations applied. What was kept aside stays. The caller holds the cluster's lock
    /// and has caught up.
    ///
    /// # Errors
    /// As [`Keystore::append`].
    pub(crate) fn rewrite(
        &mut self,
        mac: &HmacKey,
        operations: Vec<Operation>,
        under: Option<(Hierarchy, Record)>,
    ) -> Result<()> {
        self.rewrite_with(mac, under, |catalogue, store| {
            catalogue.apply(operations).map_err(|conflict| misfit(store, &conflict))
        })
    }

    /// As [`Keystore::rewrite`], where something must leave: what the operations take away has left both files when this
    /// returns, and what was kept of damaged copies.
    ///
    /// # Errors
    /// As [`Keystore::append`].
    pub(crate) fn shred(
        &mut self,
        mac: &HmacKey,
        operations: Vec<Operation>,
        under: Option<(Hierarchy, Record)>,
    ) -> Result<()> {
        self.rewrite(mac, operations, under)?;
        // Not before: as long as the files could not be written, it may be of use.
        self.store.remove_strays().map_err(|error| {
            // Who asked for it is told that it failed, and must see what became of it.
            self.unsure = true;
            let name = self.store.name(0);
            let what = format_args!("the keystore {name} is changed, but removing keystore.damaged-* beside it failed");
            Error::io(format_args!("{what}, which may hold what left it; remove them"), error)
        })
    }

    /// As [`Keystore::rewrite`], with any change of the catalogue; `under` replaces the hierarchy and the cluster record.
    pub(crate) fn rewrite_with(
        &mut self,
        mac: &HmacKey,
        under: Option<(Hierarchy, Record)>,
        change: impl FnOnce(&mut Catalogue, &dyn KeystoreStore) -> Result<()>,
    ) -> Result<()> {
        let sequence = self.next_sequence(1)?;
        let (hierarchy, record) = under.unwrap_or_else(|| (self.header.hierarchy, self.header.record.clone()));
        let header = Header { hierarchy, record, sequence, ..self.header.clone() };
        // A change that fails half-way is taken back below, and one that panics is read again from the disk.
        let before = std::mem::replace(&mut self.unsure, true);
        let written = change(&mut self.catalogue, &*self.store)
            .and_then(|()| write_checked(&*self.store, mac, header, &self.catalogue));
        let (bytes, verified) = written.inspect_err(|_| {
            self.catalogue.take_back();
            self.unsure = before;
        })?;
        self.put(&bytes, verified)
    }

    /// Puts whole files in the place of both copies.
    fn put(&mut self, bytes: &[u8], verified: Verified) -> Result<()> {
        match self.store.replace(&self.versions, bytes) {
            Ok(versions) => {
                let found = self.copies.clone();
                *self = Self { copies: found, ..Self::adopt(Arc::clone(&self.store), verified, versions, false) };
                Ok(())
            }
            Err(error) => {
                self.catalogue.take_back();
                Err(store_failed("rewriting", &self.store.name(0), error))
            }
        }
    }

    /// Whether more than it need be is stored.
    pub(crate) fn is_wasteful(&self) -> bool {
        self.tags.len() > SPARE_GROUPS && self.tags.len() - SPARE_GROUPS > 4 * self.catalogue.len()
    }

    /// The whole keystore as one file, to be kept elsewhere.
    pub(crate) fn export(&self, mac: &HmacKey) -> Result<Vec<u8>> {
        let header = Header { sequence: self.tip.seq, ..self.header.clone() };
        write_checked(&*self.store, mac, header, &self.catalogue).map(|(bytes, _)| bytes)
    }

    /// Puts this keystore, which was exported, in the place of what the store has, as the newest of all: also newer than change
    /// `there`, the last of what is there. `now` is in seconds since 1970. The caller has made sure that nothing is lost by it,
    /// and holds the lock. What it replaces is kept aside, and no rewrite removes that.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub(crate) fn install(&mut self, mac: &HmacKey, there: u64, now: u64) -> Result<()> {
        self.versions = self.versions()?;
        for which in 0..2 {
            let kept = match read_copy(&*self.store, which)? {
                Found::Missing | Found::Same(_) => Ok(()),
                Found::Read(_, bytes) => self.store.keep_aside(&bytes, Aside::Replaced, self.tip.seq),
                Found::Unreadable(..) => self.move_aside(which, Aside::Replaced),
            };
            kept.map_err(|error| store_failed("keeping", &self.store.name(which), error))?;
        }
        let by_clock = now.saturating_mul(CHANGES_A_SECOND).min(LAST_IMPORT);
        let sequence =
            self.next_sequence(IMPORT_JUMP)?.max(there.saturating_add(IMPORT_JUMP).min(LAST_IMPORT)).max(by_clock);
        let header = Header { sequence, ..self.header.clone() };
        let (bytes, verified) = write_checked(&*self.store, mac, header, &self.catalogue)?;
        let versions = self.store.replace(&self.versions, &bytes);
        let versions = versions.map_err(|error| store_failed("importing", &self.store.name(0), error))?;
        *self = Self::adopt(Arc::clone(&self.store), verified, versions, false);
        Ok(())
    }

    fn next_sequence(&self, more: u64) -> Result<u64> {
        let next = self.tip.seq.checked_add(more);
        next.ok_or_else(|| unwritable(&*self.store, Malformed("it has no sequence number left")))
    }
}

/// What [`Keystore::reload`] read: the verified bytes, and both copies as they are.
struct Reloaded {
    bytes: Vec<u8>,
    copies: [Option<Vec<u8>>; 2],
    states: [CopyState; 2],
}

fn is_settled(verified: &Verified, unfinished: bool) -> bool {
    !unfinished && verified.copies.iter().all(|copy| *copy == CopyState::Intact)
}

/// Writes a whole file, and reads it back as an opening would, before it may replace what works.
fn write_checked(
    store: &dyn KeystoreStore,
    mac: &HmacKey,
    header: Header,
    catalogue: &Catalogue,
) -> Result<(Vec<u8>, Verified)> {
    let written = mac.with(|hmac| chain::write_whole(hmac, header, catalogue.operations()))?;
    let written = written.map_err(|rule| unwritable(store, rule))?;
    let both = [Some(written.bytes.as_slice()); 2];
    let verified = mac.with(|hmac| chain::verify(hmac, both))?;
    let verified = verified.map_err(|(which, fault)| fault.into_error(&store.name(which)))?;
    if verified.header != written.header || verified.catalogue != *catalogue {
        let message = format!("rewriting the keystore {} would lose something; report this", store.name(0));
        return Err(Error::damaged(message));
    }
    Ok((written.bytes, verified))
}

fn misfit(store: &dyn KeystoreStore, conflict: &Conflict) -> Error {
    Error::new(conflict.kind, format!("keystore {}: {conflict}", store.name(0)))
}

/// The caller's own operations or header break a rule of the format.
fn unwritable(store: &dyn KeystoreStore, Malformed(rule): Malformed) -> Error {
    Error::invalid(format!("this cannot be written to keystore {}: {rule}", store.name(0)))
}
