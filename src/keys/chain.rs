//! The keystore's bytes under their MACs: a header, and the chain of groups behind it. Written here, and believed here.
//!
//! There are two copies of every keystore, with the same bytes. What verifies in either is taken, group by group, so a
//! group is lost only where both copies are damaged in the same place. Copies with different headers are two states of a
//! rewrite that was interrupted: the newer one counts if it is whole. Unless the older one goes on behind the place where the
//! newer begins: then somebody put a file back, and the longer history counts.
//!
//! What the MACs do not show: whoever can write the files can put an older state of both back, or cut groups off both
//! ends. Neither can be told from a crash before the later appends without an anchor elsewhere (page files note the change
//! and its tag that they have seen). So what verifies is always an unaltered beginning of the keystore's history.

use std::fmt;

use crate::aead::{Hmac, constant_time_eq};
use crate::error::{Error, ErrorKind, Result};
use crate::format::group::{self, HEAD_COVERED, HEAD_LEN, HEAD_TAG_AT, Head, SECTOR};
use crate::format::keystore::{HEADER_MAC_LEN, Header, MAX_HEADER_LEN, Operation, Refused, VERSION, VERSION_AT};
use crate::format::page::{NONCE_LEN, TAG_LEN};
use crate::format::reader::{Malformed, Reader};
use crate::keys::catalogue::Catalogue;
use crate::keys::store::Durability;

/// The longest keystore: about a million databases. Read before anything is authenticated, so it is bounded.
pub(crate) const MAX_FILE_LEN: usize = 1 << 30;
/// The longest body of one group.
pub(crate) const MAX_BODY_LEN: u32 = 16 << 20;
/// The body of a group that a rewrite fills.
const REWRITTEN_BODY_LEN: usize = 1 << 20;

pub(crate) type Tag = [u8; TAG_LEN];

/// Where the next group goes, and what it chains to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Tip {
    pub(crate) end: usize,
    pub(crate) seq: u64,
    pub(crate) tag: Tag,
    /// The last change that is sure to be durable in both copies: no later one may be.
    pub(crate) in_both: u64,
}

impl Tip {
    /// The tip after a change of this durability.
    fn then(&self, next: Self, durability: Durability) -> Self {
        match durability {
            Durability::Both => next,
            Durability::One => Self { in_both: self.in_both, ..next },
        }
    }
}

/// The MACs of one keystore file. Header, heads and bodies cannot be taken for each other: what is covered begins with
/// `PGSEALK1`, `head` or `body`.
struct Mac<'a> {
    hmac: &'a Hmac<'a>,
    cluster: [u8; 16],
    segment: u64,
}

impl<'a> Mac<'a> {
    fn new(hmac: &'a Hmac<'a>, header: &Header) -> Self {
        Self { hmac, cluster: header.cluster.to_bytes(), segment: header.sequence }
    }

    fn head(&self, covered: &[u8]) -> Tag {
        first_bytes(&self.hmac.sign(&[&group::head_prefix(&self.cluster, self.segment), covered]))
    }

    fn body(&self, seq: u64, body: &[u8]) -> Tag {
        first_bytes(&self.hmac.sign(&[&group::body_prefix(&self.cluster, self.segment, seq), body]))
    }

    /// The bytes of a group, and the tag of its head.
    fn seal_group(&self, seq: u64, previous: &Tag, length: u32, body: &[u8]) -> (Vec<u8>, Tag) {
        let head = Head {
            length,
            sealed_length: 0,
            end: false,
            seq,
            // Every append is synced before it returns, so all before this one is durable.
            synced: seq.saturating_sub(1),
            previous: *previous,
            body_nonce: [0; NONCE_LEN],
            body_tag: self.body(seq, body),
            head_nonce: [0; NONCE_LEN],
        };
        let bytes = head.encode();
        let tag = self.head(group::covered_and_tag(&bytes).0);
        (group::assemble(bytes, &tag, body), tag)
    }

    /// The head at `at`, with its tag, if it is one of ours, wherever it belongs.
    fn authentic_head(&self, file: &[u8], at: usize) -> Result<Option<(Head, Tag)>, Fault> {
        let Some(bytes) = file.get(at..).and_then(<[u8]>::first_chunk::<HEAD_LEN>) else {
            return Ok(None);
        };
        // The nonce stands outside what the tag covers: it is zero, or the head was changed.
        if !bytes.starts_with(&group::MAGIC) || bytes[HEAD_COVERED..HEAD_TAG_AT] != [0; NONCE_LEN] {
            return Ok(None);
        }
        let (covered, stored) = group::covered_and_tag(bytes);
        let tag = self.head(covered);
        if !constant_time_eq(&tag, stored) {
            return Ok(None);
        }
        let head = Head::decode(bytes, MAX_BODY_LEN).map_err(|rule| Fault::new(at, rule))?;
        Ok(Some((head, tag)))
    }
}

/// The bytes of a new group after `tip`, and the tip then.
pub(crate) fn seal_group(
    hmac: &Hmac<'_>,
    header: &Header,
    tip: &Tip,
    operations: &[Operation],
) -> Result<(Vec<u8>, Tip), Malformed> {
    let mut body = Vec::new();
    operations.iter().try_for_each(|operation| operation.encode(&mut body))?;
    let (group, next) = seal_body(hmac, header, tip, &body)?;
    Ok((group, tip.then(next, Durability::of(operations))))
}

/// As [`seal_group`], for a body that is encoded already.
pub(crate) fn seal_body(hmac: &Hmac<'_>, header: &Header, tip: &Tip, body: &[u8]) -> Result<(Vec<u8>, Tip), Malformed> {
    let length = u32::try_from(body.len()).ok().filter(|&length| length <= MAX_BODY_LEN);
    let length = length.ok_or(Malformed("a change is longer than 16 MiB; split it"))?;
    let end = tip.end + group::group_len(length);
    let seq = tip.seq.checked_add(1).filter(|_| end <= MAX_FILE_LEN);
    let seq = seq.ok_or(Malformed("it would grow beyond 1 GiB; split the cluster"))?;
    let (group, tag) = Mac::new(hmac, header).seal_group(seq, &tip.tag, length, body);
    Ok((group, Tip { end, seq, tag, in_both: seq }))
}

/// A keystore file written whole.
pub(crate) struct Written {
    pub(crate) header: Header,
    pub(crate) bytes: Vec<u8>,
}

/// Writes a whole file: `header`, and behind it groups with these operations, parts together that must be.
pub(crate) fn write_whole(
    hmac: &Hmac<'_>,
    header: Header,
    parts: impl Iterator<Item = Vec<Operation>>,
) -> Result<Written, Malformed> {
    let bodies = bodies(parts)?;
    let whole = header.sequence.checked_add(bodies.len() as u64);
    let header = Header { whole: whole.ok_or(Malformed("it has no sequence number left"))?, ..header };
    let mut bytes = header.encode()?;
    let covered = bytes.len() - HEADER_MAC_LEN;
    let mac = hmac.sign(&[&bytes[..covered]]);
    bytes[covered..].copy_from_slice(&mac);
    let mut tip = Tip { end: bytes.len(), seq: header.sequence, tag: first_bytes(&mac), in_both: header.sequence };
    for body in bodies {
        let (group, next) = seal_body(hmac, &header, &tip, &body)?;
        bytes.extend(group);
        tip = next;
    }
    Ok(Written { header, bytes })
}

fn bodies(parts: impl Iterator<Item = Vec<Operation>>) -> Result<Vec<Vec<u8>>, Malformed> {
    let mut bodies: Vec<Vec<u8>> = Vec::new();
    for part in parts {
        let mut encoded = Vec::new();
        part.iter().try_for_each(|operation| operation.encode(&mut encoded))?;
        match bodies.last_mut() {
            Some(body) if body.len() + encoded.len() <= REWRITTEN_BODY_LEN => body.extend(encoded),
            _ => bodies.push(encoded),
        }
    }
    bodies.retain(|body| !body.is_empty());
    Ok(bodies)
}

/// What became of one copy when both were verified.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum CopyState {
    /// Every byte is as it was written.
    Intact,
    /// An unaltered beginning, without the last changes.
    Short,
    /// As [`CopyState::Short`] or [`CopyState::Intact`], and bytes behind it that do not verify: a torn append.
    Torn,
    /// Whole, and written before the last rewrite.
    Older,
    /// There is no such file.
    Missing,
    /// What is wrong, and at which byte.
    Damaged(String),
    /// It is there, and this is why it cannot be read.
    Unreadable(String),
}

/// A keystore that verified: its history, and where it was found.
pub(crate) struct Verified {
    pub(crate) header: Header,
    pub(crate) catalogue: Catalogue,
    pub(crate) tip: Tip,
    /// The tags of all changes from the header's on.
    pub(crate) tags: Vec<Tag>,
    proved: Proved,
    pub(crate) copies: [CopyState; 2],
}

/// Where every byte of the history is.
enum Proved {
    /// In this copy, at its beginning.
    InCopy(usize),
    /// Here: some of it was found in one copy only, and some in the other only.
    Pieced(Vec<u8>),
}

impl Verified {
    /// Every byte of the history, given the copies that it was found in.
    pub(crate) fn bytes<'a>(&'a self, copies: [Option<&'a [u8]>; 2]) -> &'a [u8] {
        match &self.proved {
            Proved::Pieced(bytes) => bytes,
            Proved::InCopy(which) => copies[*which].and_then(|copy| copy.get(..self.tip.end)).unwrap_or_default(),
        }
    }

    /// Whether it went on further than `older`, which has all that it began with. What was only written whole, as an export
    /// is, went nowhere, whatever its number.
    fn is_longer_than(&self, older: &Self) -> bool {
        self.tip.seq > self.header.whole && self.tip.seq > older.tip.seq
    }
}

/// Why a file, or a place in it, is not what was written.
pub(crate) enum Fault {
    Damaged {
        at: usize,
        what: String,
    },
    Unsupported {
        at: usize,
        what: String,
    },
    /// The header was not written under this cluster's identity key.
    Foreign {
        len: usize,
    },
}

impl Fault {
    fn new(at: usize, why: impl Into<Refused>) -> Self {
        match why.into() {
            refused @ Refused::Malformed(_) => Self::Damaged { at, what: refused.to_string() },
            refused => Self::Unsupported { at, what: refused.to_string() },
        }
    }

    /// Of a header that cannot be read.
    pub(crate) fn of_header(refused: Refused) -> Self {
        Self::new(0, refused)
    }

    pub(crate) fn too_long() -> Self {
        Self::damaged(MAX_FILE_LEN, "the file is longer than 1 GiB")
    }

    fn damaged(at: usize, what: impl fmt::Display) -> Self {
        Self::Damaged { at, what: what.to_string() }
    }

    /// Of a copy that went on behind the change with which the other one begins.
    fn of_the_longer_copy(self, begins: u64) -> Self {
        match self {
            Self::Damaged { at, what } => {
                let longer = "so this is the longer one, which is needed, and nothing was written over it";
                Self::damaged(at, format!("{what}; the other copy was put back from change {begins}, {longer}"))
            }
            fault => fault,
        }
    }

    /// With the name of the file that it is about.
    pub(crate) fn into_error(self, file: &dyn fmt::Display) -> Error {
        match &self {
            Self::Damaged { .. } => {
                Error::damaged(format!("keystore {file}, {self}; restore the keystore from a copy"))
            }
            Self::Unsupported { .. } => {
                let message = format!("keystore {file}, {self}; use a newer version of pageseal");
                Error::new(ErrorKind::Unsupported, message)
            }
            Self::Foreign { .. } => {
                let message = format!("keystore {file}, {self}; restore the keystore from a copy");
                Error::new(ErrorKind::Authentication, message)
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Damaged { at, what } | Self::Unsupported { at, what } => write!(f, "byte {at}: {what}"),
            Self::Foreign { len } => write!(
                f,
                "bytes 0 to {len}: the header was not written under this cluster's identity key: damaged or substituted"
            ),
        }
    }
}

/// Verifies what two copies hold, either of which may be missing. At least one is there.
///
/// # Errors
/// What is wrong, and with which copy: the first, or the one with the newer header, if neither holds an unaltered beginning of
/// the history that reaches as far as what was acknowledged; the one with the older header, if it went on further than the
/// other and does not verify.
pub(crate) fn verify(hmac: &Hmac<'_>, copies: [Option<&[u8]>; 2]) -> Result<Verified, (usize, Fault)> {
    let headers = copies.map(|copy| copy.map(|bytes| authentic_header(hmac, bytes)));
    let (first, newest) = newest(&headers)?;
    let older = (0..2).find_map(|which| {
        let (header, _) = headers[which].as_ref()?.as_ref().ok()?;
        (*header != newest).then_some(Older { which, bytes: copies[which]?, header })
    });
    // Groups have MACs of their own: a copy whose header is damaged still has them.
    let is_older = |which: usize| older.as_ref().is_some_and(|older| older.which == which);
    let of_newest = [0, 1].map(|which| copies[which].filter(|_| !is_older(which)));
    let newer = follow(hmac, &newest, of_newest);
    let Some(older) = older else {
        let mut verified = newer.map_err(|fault| (first, fault))?;
        verified.copies = [0, 1].map(|which| state_of(&verified, copies, which, headers[which].as_ref()));
        return Ok(verified);
    };
    let (mut verified, counts, state) = older.or_newer(hmac, &newest, newer, copies[first].unwrap_or_default())?;
    verified.copies[counts] = state_of(&verified, copies, counts, headers[counts].as_ref());
    verified.copies[1 - counts] = state;
    Ok(verified)
}

/// The copy with the older of two authentic headers.
struct Older<'a> {
    which: usize,
    bytes: &'a [u8],
    header: &'a Header,
}

impl Older<'_> {
    /// Decides between this copy and the other, whose header is `newest`, and which verified as `newer`. Returns what
    /// counts, in which copy it is, and the state of the one that does not count.
    fn or_newer(
        &self,
        hmac: &Hmac<'_>,
        newest: &Header,
        newer: Result<Verified, Fault>,
        newer_bytes: &[u8],
    ) -> Result<(Verified, usize, CopyState), (usize, Fault)> {
        let mut alone = [None, None];
        alone[self.which] = Some(self.bytes);
        let (this, other) = (self.which, 1 - self.which);
        match (newer, follow(hmac, self.header, alone)) {
            (Ok(newer), Ok(older)) if older.tip.seq < newest.sequence => {
                let state = self.before_rewrite(&older, newest);
                Ok((newer, other, state))
            }
            // No rewrite was interrupted: it would begin behind the last change of this copy. A file was put back, which
            // may have been gone on with.
            (Ok(newer), Ok(older)) if newer.is_longer_than(&older) => {
                let state = put_back(&older, &newer);
                Ok((newer, other, state))
            }
            (Ok(newer), Ok(older)) => {
                let state = put_back(&newer, &older);
                Ok((older, this, state))
            }
            (Ok(_), Err(fault))
                if holds_change_after(hmac, self.header, self.bytes, newest.sequence.saturating_sub(1)) =>
            {
                Err((this, fault.of_the_longer_copy(newest.sequence)))
            }
            (Ok(newer), Err(fault)) => Ok((newer, other, CopyState::Damaged(fault.to_string()))),
            // Before the rewrite there was another state, which still counts if nothing was built on the new one.
            (Err(_), Ok(older))
                if older.tip.seq.saturating_add(1) >= newest.sequence
                    && !holds_change_after(hmac, newest, newer_bytes, newest.whole) =>
            {
                Ok((older, this, CopyState::Damaged("its rewrite is not whole".into())))
            }
            (Err(fault), _) => Err((other, fault)),
        }
    }

    /// The state of this copy if it ends before the other one begins.
    fn before_rewrite(&self, verified: &Verified, newest: &Header) -> CopyState {
        let Tip { end, seq, .. } = verified.tip;
        // What a crash tore behind the last change before the rewrite is no reason to keep what was to leave with it.
        if end == self.bytes.len() || seq.checked_add(1) == Some(newest.sequence) {
            return CopyState::Older;
        }
        // Perhaps not torn: it may have gone on for longer than the other copy knows.
        CopyState::Damaged(format!("byte {end}: what stands behind change {seq} does not verify"))
    }
}

/// The state of a copy that ends, or was written whole, before the end of the other.
fn put_back(copy: &Verified, other: &Verified) -> CopyState {
    let from = as_of(&copy.header, &copy.tip);
    CopyState::Damaged(format!(
        "it was put back from change {from}, the other copy goes on to change {}",
        other.tip.seq
    ))
}

/// Whether an authentic group with a higher number than `seq` is anywhere in a file with this header.
fn holds_change_after(hmac: &Hmac<'_>, header: &Header, file: &[u8], seq: u64) -> bool {
    let mac = Mac::new(hmac, header);
    (0..file.len()).step_by(SECTOR).any(|at| match mac.authentic_head(file, at) {
        Ok(found) => found.is_some_and(|(head, _)| head.seq > seq),
        Err(_) => true,
    })
}

/// The number of the last change that is in a history. A file that was written whole ends with changes of its own that add
/// nothing: an export's last number is higher than that of the keystore it was made from.
pub(crate) fn as_of(header: &Header, tip: &Tip) -> u64 {
    if tip.seq == header.whole { header.sequence } else { tip.seq }
}

type Authentic = Result<(Header, usize), Fault>;

fn authentic_header(hmac: &Hmac<'_>, file: &[u8]) -> Authentic {
    match Header::decode(file) {
        Ok((header, len)) if has_header_mac(hmac, &file[..len]) => Ok((header, len)),
        Ok((_, len)) => Err(Fault::Foreign { len }),
        Err(Refused::UnknownVersion(_)) if was_of_this_version(hmac, file) => {
            Err(Fault::damaged(VERSION_AT, "its version byte was changed"))
        }
        Err(refused) => Err(Fault::new(0, refused)),
    }
}

fn has_header_mac(hmac: &Hmac<'_>, header: &[u8]) -> bool {
    let (covered, stored) = header.split_at(header.len() - HEADER_MAC_LEN);
    constant_time_eq(&hmac.sign(&[covered]), stored)
}

/// Whether the header is one of ours with another version byte: then it is damaged, and no newer version wrote it.
fn was_of_this_version(hmac: &Hmac<'_>, file: &[u8]) -> bool {
    let mut restored = file[..file.len().min(MAX_HEADER_LEN)].to_vec();
    restored[VERSION_AT] = VERSION;
    Header::decode(&restored).is_ok_and(|(_, len)| has_header_mac(hmac, &restored[..len]))
}

/// The authentic header with the highest sequence, and a copy that has it; else what is wrong with the first copy.
fn newest(headers: &[Option<Authentic>; 2]) -> Result<(usize, Header), (usize, Fault)> {
    let headers = || headers.iter().enumerate().filter_map(|(which, header)| Some((which, header.as_ref()?)));
    // A header of a newer version may be the one that counts.
    if let Some((which, Err(Fault::Unsupported { at, what }))) = headers().find(|(_, header)| is_unsupported(header)) {
        return Err((which, Fault::Unsupported { at: *at, what: what.clone() }));
    }
    let authentic = headers().filter_map(|(which, header)| Some((which, &header.as_ref().ok()?.0)));
    if let Some((which, header)) = authentic.max_by_key(|(_, header)| header.sequence) {
        return Ok((which, header.clone()));
    }
    match headers().next() {
        Some((which, Err(Fault::Damaged { at, what }))) => Err((which, Fault::damaged(*at, what))),
        Some((which, Err(Fault::Foreign { len }))) => Err((which, Fault::Foreign { len: *len })),
        _ => Err((0, Fault::damaged(0, "there is no keystore"))),
    }
}

fn is_unsupported(header: &Authentic) -> bool {
    matches!(header, Err(Fault::Unsupported { .. }))
}

/// The state of a copy that has the header that counts, or none that can be believed.
fn state_of(verified: &Verified, copies: [Option<&[u8]>; 2], which: usize, header: Option<&Authentic>) -> CopyState {
    let Some(copy) = copies[which] else { return CopyState::Missing };
    if let Some(Err(fault)) = header {
        return CopyState::Damaged(fault.to_string());
    }
    let proved = verified.bytes(copies);
    // Compared as a whole first, and not with itself: ten thousand databases are 10 MB.
    let common = copy.len().min(proved.len());
    let same = std::ptr::eq(copy.as_ptr(), proved.as_ptr()) || copy[..common] == proved[..common];
    let differs = if same { None } else { copy.iter().zip(proved).position(|(a, b)| a != b) };
    match differs {
        None if copy.len() == proved.len() => CopyState::Intact,
        None if copy.len() > proved.len() => CopyState::Torn,
        None if copy.len().is_multiple_of(SECTOR) => CopyState::Short,
        None => CopyState::Torn,
        Some(at) => CopyState::Damaged(format!("byte {at}: it differs from what the other copy proves")),
    }
}

/// Follows the chain behind an authentic header, which at least one of the copies has.
fn follow(hmac: &Hmac<'_>, header: &Header, copies: [Option<&[u8]>; 2]) -> Result<Verified, Fault> {
    let is_headed = |copy: &[u8]| matches!(authentic_header(hmac, copy), Ok((found, _)) if found == *header);
    let first = (0..2).find(|&which| copies[which].is_some_and(is_headed));
    let missing = || Fault::damaged(0, "there is no keystore");
    let (first, file) = first.and_then(|which| Some((which, copies[which]?))).ok_or_else(missing)?;
    let sources: Vec<&[u8]> = [copies[first], copies[1 - first]].into_iter().flatten().collect();
    let header_len = Header::decode(file).map_err(|refused| Fault::new(0, refused))?.1;
    let header_bytes = &file[..header_len];
    let tag = first_bytes(&header_bytes[header_len - HEADER_MAC_LEN..]);
    let tip = Tip { end: header_len, seq: header.sequence, tag, in_both: header.sequence };
    let (mac, whole) = (Mac::new(hmac, header), header.whole);
    let mut chain = Chain { mac, whole, catalogue: Catalogue::default(), tip, tags: vec![tag] };
    let mut pieced: Option<Vec<u8>> = None;
    loop {
        let at = chain.tip.end;
        let Some(source) = chain.admit_from(&sources)? else { break };
        // Nothing is copied as long as one copy has it all.
        if pieced.is_some() || !std::ptr::eq(source, file) {
            pieced.get_or_insert_with(|| file[..at].to_vec()).extend(&source[at..chain.tip.end]);
        }
    }
    chain.refuse_if_acknowledged(&sources, header.whole)?;
    let Chain { catalogue, tip, tags, .. } = chain;
    let copies = [CopyState::Missing, CopyState::Missing];
    let proved = pieced.map_or(Proved::InCopy(first), Proved::Pieced);
    Ok(Verified { header: header.clone(), catalogue, tip, tags, proved, copies })
}

/// Follows the chain on, in bytes that stand behind `tip` in a file. Returns how far it reaches, and whether that is the
/// end of the bytes.
pub(crate) fn follow_on(
    hmac: &Hmac<'_>,
    header: &Header,
    catalogue: &mut Catalogue,
    tags: &mut Vec<Tag>,
    tip: Tip,
    bytes: &[u8],
) -> Result<Tip, Fault> {
    let base = tip.end;
    let known = std::mem::take(tags);
    let mut chain = Chain {
        mac: Mac::new(hmac, header),
        whole: header.whole,
        catalogue: std::mem::take(catalogue),
        tip: Tip { end: 0, ..tip },
        tags: known,
    };
    let sources = [bytes];
    let mut followed = Ok(());
    while followed.is_ok() {
        match chain.admit_from(&sources) {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(fault) => followed = Err(fault),
        }
    }
    let Chain { catalogue: after, tip, tags: seen, .. } = chain;
    *catalogue = after;
    *tags = seen;
    followed?;
    Ok(Tip { end: base + tip.end, ..tip })
}

/// The chain, as far as it was followed.
struct Chain<'a> {
    mac: Mac<'a>,
    /// Changes up to this one were written together with the header.
    whole: u64,
    catalogue: Catalogue,
    tip: Tip,
    tags: Vec<Tag>,
}

impl<'a> Chain<'a> {
    /// Admits the next group from the first source that has it. `None` if none has.
    fn admit_from<'s>(&mut self, sources: &[&'s [u8]]) -> Result<Option<&'s [u8]>, Fault> {
        let mut refused = None;
        for source in sources {
            match self.admit(source) {
                Ok(true) => return Ok(Some(source)),
                Ok(false) => {}
                // A newer version's group must not be passed over, whatever the other copy says.
                Err(fault @ Fault::Unsupported { .. }) => return Err(fault),
                Err(fault) => refused = refused.or(Some(fault)),
            }
        }
        // A copy that ends here is whole: what stands behind its end in the other one was put there by something else.
        let ends_here = sources.iter().any(|source| source.len() == self.tip.end);
        refused.filter(|_| !ends_here).map_or(Ok(None), Err)
    }

    /// Verifies and applies the group at the tip. False if it does not verify or is cut: its bytes are not what was written.
    ///
    /// # Errors
    /// For a group that was written under our key and yet does not belong here.
    fn admit(&mut self, file: &[u8]) -> Result<bool, Fault> {
        let at = self.tip.end;
        let Some((head, tag)) = self.mac.authentic_head(file, at)? else {
            return Ok(false);
        };
        self.check_place(&head)?;
        let Ok(body) = group::body_of(&file[at..], head.length) else {
            return Ok(false);
        };
        if !constant_time_eq(&self.mac.body(head.seq, body), &head.body_tag) {
            return Ok(false);
        }
        let durability = self.apply(body, at + HEAD_LEN)?;
        let durability = if head.seq <= self.whole { Durability::Both } else { durability };
        let next = Tip { end: at + group::group_len(head.length), seq: head.seq, tag, in_both: head.seq };
        self.tip = self.tip.then(next, durability);
        self.tags.push(tag);
        Ok(true)
    }

    fn check_place(&self, head: &Head) -> Result<(), Fault> {
        let at = self.tip.end;
        if Some(head.seq) != self.tip.seq.checked_add(1) {
            let what =
                format!("change {} stands where the one after {} belongs: groups were moved", head.seq, self.tip.seq);
            return Err(Fault::damaged(at, what));
        }
        if head.previous != self.tip.tag {
            return Err(Fault::damaged(at, format!("change {} belongs to another history", head.seq)));
        }
        if head.sealed_length != 0 || head.end || head.body_nonce != [0; NONCE_LEN] {
            return Err(Fault::damaged(at, format!("change {} has fields that only logs have", head.seq)));
        }
        if head.synced != self.tip.seq {
            return Err(Fault::damaged(at, format!("change {} contradicts itself about what was synced", head.seq)));
        }
        Ok(())
    }

    /// Applies the operations of an authentic body, which begins at `at`. They can still be wrong, if who wrote them was.
    fn apply(&mut self, body: &[u8], at: usize) -> Result<Durability, Fault> {
        let mut reader = Reader::new(body);
        let mut operations = Vec::new();
        if reader.is_empty() {
            return Err(Fault::damaged(at, "the group is empty"));
        }
        while !reader.is_empty() {
            let at = at + body.len() - reader.remaining();
            operations.push(Operation::decode(&mut reader).map_err(|refused| Fault::new(at, refused))?);
        }
        let durability = Durability::of(&operations);
        self.catalogue.apply(operations).map_err(|conflict| Fault::damaged(at, conflict))?;
        self.catalogue.keep();
        Ok(durability)
    }

    /// Nothing verifies at the tip. If any authentic head behind it says that the group there was synced, or the header that
    /// it was written together with it, it was acknowledged: that is damage, and not the torn tail of an append.
    fn refuse_if_acknowledged(&self, sources: &[&[u8]], whole: u64) -> Result<(), Fault> {
        let (at, bad) = (self.tip.end, self.tip.seq.saturating_add(1));
        for source in sources {
            for later in (at..source.len()).step_by(SECTOR).skip(1) {
                if let Some((head, _)) = self.mac.authentic_head(source, later)?
                    && head.seq > bad
                    && head.synced >= bad
                {
                    let what = format!(
                        "change {bad} does not verify, and change {} at byte {later} says it was synced",
                        head.seq
                    );
                    return Err(Fault::damaged(at, what));
                }
            }
        }
        if self.tip.seq < whole {
            let what =
                format!("change {bad} does not verify, and the header says that changes up to {whole} were written");
            return Err(Fault::damaged(at, what));
        }
        Ok(())
    }
}

pub(crate) fn first_bytes(mac: &[u8]) -> Tag {
    let mut tag = [0; TAG_LEN];
    tag.copy_from_slice(&mac[..TAG_LEN]);
    tag
}
