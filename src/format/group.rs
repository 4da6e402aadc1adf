//! A group: what one append adds to a keystore or to a log segment. A head of 104 bytes, then a body, on 512-byte
//! boundaries, so that a crash tears a group but never its neighbours.
//!
//! Head and body are authenticated separately, so that a reader who finds a broken body still knows where the next group
//! must begin, and a later head can say that the broken one had been synced. Here are the bytes only; who computes the
//! tags (an AEAD for logs, an HMAC for the keystore) decides over what key.

use crate::format::page::{NONCE_LEN, TAG_LEN};
use crate::format::reader::{Malformed, Reader};

/// Groups begin and end on multiples of this: what a disk writes whole or not at all.
pub(crate) const SECTOR: usize = 512;
pub(crate) const HEAD_LEN: usize = 104;
/// How much of the head its tag covers, as associated data. After it come the head's own nonce, which the tag depends on
/// anyway or which must be zero, and the tag.
pub(crate) const HEAD_COVERED: usize = 76;
pub(crate) const HEAD_TAG_AT: usize = HEAD_COVERED + NONCE_LEN;
/// "PageSeal GRoup". Only a filter for the search for later heads; the tag is what counts.
pub(crate) const MAGIC: [u8; 4] = *b"PSGR";

const FLAG_END: u32 = 1;
const ID_LEN: usize = 16;
/// `"head" | id 16 | segment u64`, and before the covered bytes.
const HEAD_PREFIX_LEN: usize = 4 + ID_LEN + 8;
/// `"body" | id 16 | segment u64 | seq u64`.
const BODY_PREFIX_LEN: usize = 4 + ID_LEN + 8 + 8;

const _: () = assert!(4 + 4 + 4 + 4 + 8 + 8 + TAG_LEN + NONCE_LEN + TAG_LEN == HEAD_COVERED);
const _: () = assert!(HEAD_TAG_AT + TAG_LEN == HEAD_LEN);
const _: () = assert!(HEAD_LEN < SECTOR);

/// The fields of a head, except its tag, which is over the encoded bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Head {
    /// How long the body is, without padding.
    pub(crate) length: u32,
    /// How much of the body's beginning is sealed (a log's table); 0 in the keystore.
    pub(crate) sealed_length: u32,
    /// The segment ends here. Never set in the keystore.
    pub(crate) end: bool,
    pub(crate) seq: u64,
    /// Every group up to this one was synced when this group was written: they were acknowledged, so if one of them does
    /// not verify, it is damaged, and not the torn tail of a crash.
    pub(crate) synced: u64,
    /// The tag of the head before this one; it chains the groups.
    pub(crate) previous: [u8; TAG_LEN],
    pub(crate) body_nonce: [u8; NONCE_LEN],
    pub(crate) body_tag: [u8; TAG_LEN],
    /// Zeros in the keystore.
    pub(crate) head_nonce: [u8; NONCE_LEN],
}

impl Head {
    /// The head's bytes, with zeros where the tag goes.
    pub(crate) fn encode(&self) -> [u8; HEAD_LEN] {
        let mut out = [0; HEAD_LEN];
        out[..4].copy_from_slice(&MAGIC);
        out[4..8].copy_from_slice(&self.length.to_le_bytes());
        out[8..12].copy_from_slice(&self.sealed_length.to_le_bytes());
        out[12..16].copy_from_slice(&(if self.end { FLAG_END } else { 0 }).to_le_bytes());
        out[16..24].copy_from_slice(&self.seq.to_le_bytes());
        out[24..32].copy_from_slice(&self.synced.to_le_bytes());
        out[32..48].copy_from_slice(&self.previous);
        out[48..60].copy_from_slice(&self.body_nonce);
        out[60..76].copy_from_slice(&self.body_tag);
        out[76..88].copy_from_slice(&self.head_nonce);
        out
    }

    /// Reads a head whose tag was checked before, and bounds its lengths.
    pub(crate) fn decode(bytes: &[u8; HEAD_LEN], max_length: u32) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.array()? != MAGIC {
            return Err(Malformed("it does not begin with PSGR"));
        }
        let length = reader.u32()?;
        if length > max_length {
            return Err(Malformed("its body is longer than allowed"));
        }
        let sealed_length = reader.u32()?;
        if sealed_length > length {
            return Err(Malformed("its sealed part is longer than its body"));
        }
        let end = match reader.u32()? {
            0 => false,
            FLAG_END if length == 0 => true,
            FLAG_END => return Err(Malformed("it ends the segment and has a body")),
            _ => return Err(Malformed("it has unknown flags")),
        };
        Ok(Self {
            length,
            sealed_length,
            end,
            seq: reader.u64()?,
            synced: reader.u64()?,
            previous: reader.array()?,
            body_nonce: reader.array()?,
            body_tag: reader.array()?,
            head_nonce: reader.array()?,
        })
    }
}

/// The parts of an encoded head: the bytes that its tag covers, and the tag.
pub(crate) fn covered_and_tag(head: &[u8; HEAD_LEN]) -> (&[u8], &[u8]) {
    (&head[..HEAD_COVERED], &head[HEAD_TAG_AT..])
}

/// What a head's tag covers before the head's own bytes: whose it is, and in which segment.
pub(crate) fn head_prefix(id: &[u8; ID_LEN], segment: u64) -> [u8; HEAD_PREFIX_LEN] {
    let mut out = [0; HEAD_PREFIX_LEN];
    out[..4].copy_from_slice(b"head");
    out[4..20].copy_from_slice(id);
    out[20..].copy_from_slice(&segment.to_le_bytes());
    out
}

/// What a body's tag covers before the body.
pub(crate) fn body_prefix(id: &[u8; ID_LEN], segment: u64, seq: u64) -> [u8; BODY_PREFIX_LEN] {
    let mut out = [0; BODY_PREFIX_LEN];
    out[..4].copy_from_slice(b"body");
    out[4..20].copy_from_slice(id);
    out[20..28].copy_from_slice(&segment.to_le_bytes());
    out[28..].copy_from_slice(&seq.to_le_bytes());
    out
}

/// How many bytes a group with a body of `length` bytes occupies.
pub(crate) const fn group_len(length: u32) -> usize {
    (HEAD_LEN + length as usize).next_multiple_of(SECTOR)
}

/// A whole group: the encoded head with its tag, the body, and zeros up to the next boundary.
pub(crate) fn assemble(mut head: [u8; HEAD_LEN], tag: &[u8; TAG_LEN], body: &[u8]) -> Vec<u8> {
    head[HEAD_TAG_AT..].copy_from_slice(tag);
    let len = (HEAD_LEN + body.len()).next_multiple_of(SECTOR);
    let mut out = Vec::with_capacity(len);
    out.extend(head);
    out.extend(body);
    out.resize(len, 0);
    out
}

/// The body of `length` bytes in a group's bytes from its head on. The group must be there whole, and padded with zeros.
pub(crate) fn body_of(group: &[u8], length: u32) -> Result<&[u8], Malformed> {
    let mut reader = Reader::new(group);
    let mut whole = Reader::new(reader.bytes(group_len(length))?);
    whole.bytes(HEAD_LEN)?;
    let body = whole.bytes(length as usize)?;
    whole.padding()?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> Head {
        Head {
            length: 0x0102,
            sealed_length: 0x0101,
            end: false,
            seq: 0x1112_1314_1516_1718,
            synced: 0x2122_2324_2526_2728,
            previous: [0x31; 16],
            body_nonce: [0x41; 12],
            body_tag: [0x51; 16],
            head_nonce: [0x61; 12],
        }
    }

    #[test]
    fn golden_head_bytes() {
        let mut golden = b"PSGR\x02\x01\x00\x00\x01\x01\x00\x00\x00\x00\x00\x00".to_vec();
        golden.extend([0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11]);
        golden.extend([0x28, 0x27, 0x26, 0x25, 0x24, 0x23, 0x22, 0x21]);
        golden.extend([0x31; 16]);
        golden.extend([0x41; 12]);
        golden.extend([0x51; 16]);
        golden.extend([0x61; 12]);
        golden.extend([0; 16]);
        assert_eq!(head().encode()[..], golden);
        assert_eq!(Head::decode(&head().encode(), 0x0102), Ok(head()));
        let (covered, tag) = (&golden[..76], &golden[88..]);
        assert_eq!(covered_and_tag(&head().encode()), (covered, tag));
    }

    #[test]
    fn golden_associated_data_bytes() {
        let mut golden = b"head".to_vec();
        golden.extend([0xc1; 16]);
        golden.extend([8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(head_prefix(&[0xc1; 16], 0x0102_0304_0506_0708)[..], golden);
        golden[..4].copy_from_slice(b"body");
        golden.extend([9, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(body_prefix(&[0xc1; 16], 0x0102_0304_0506_0708, 9)[..], golden);
    }

    #[test]
    fn golden_group_bytes() {
        let head = Head { length: 3, sealed_length: 0, ..head() };
        let group = assemble(head.encode(), &[0x71; 16], b"abc");
        assert_eq!(group.len(), 512);
        assert_eq!(group[..88], head.encode()[..88]);
        assert_eq!(group[88..104], [0x71; 16]);
        assert_eq!(&group[104..107], b"abc");
        assert!(group[107..].iter().all(|&byte| byte == 0));
        assert_eq!(body_of(&group, 3), Ok(&b"abc"[..]));
    }

    #[test]
    fn groups_fill_whole_sectors() {
        for (length, len) in [(0, 512), (408, 512), (409, 1024), (920, 1024), (921, 1536)] {
            assert_eq!(group_len(length), len, "body of {length}");
            assert_eq!(assemble([0; HEAD_LEN], &[0; 16], &vec![1; length as usize]).len(), len);
        }
        assert_eq!(group_len(u32::MAX), (1 << 32) + 512);
    }

    #[test]
    fn a_length_above_the_bound_is_refused_before_it_is_used() {
        for length in [0x0103, 1 << 24, u32::MAX] {
            assert!(Head::decode(&Head { length, ..head() }.encode(), 0x0102).is_err());
        }
        assert!(Head::decode(&Head { sealed_length: 0x0103, ..head() }.encode(), 0x0102).is_err());
        assert!(body_of(&[0; 512], u32::MAX).is_err());
    }

    #[test]
    fn unknown_flags_and_magic_are_refused() {
        for (at, value) in [(0, b'Q'), (12, 2), (12, 3), (13, 1), (15, 0x80), (12, 1)] {
            let mut bytes = head().encode();
            bytes[at] = value;
            assert!(Head::decode(&bytes, 0x0102).is_err(), "byte {at} = {value}");
        }
        let end = Head { end: true, length: 0, sealed_length: 0, ..head() };
        assert_eq!(Head::decode(&end.encode(), 0x0102), Ok(end));
    }

    #[test]
    fn a_body_that_is_cut_or_not_padded_with_zeros_is_refused() {
        let group = assemble(head().encode(), &[0; 16], b"abc");
        for len in 0..group.len() {
            assert!(body_of(&group[..len], 3).is_err(), "length {len}");
        }
        for at in 107..group.len() {
            let mut changed = group.clone();
            changed[at] = 1;
            assert!(body_of(&changed, 3).is_err(), "byte {at}");
        }
    }
}
