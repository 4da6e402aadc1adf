//! The header of a page file: two slots of 4,096 bytes, written in turn, so that one is always whole.

use crate::format::page::{OVERHEAD, TAG_LEN, read_generation};
use crate::format::reader::{Malformed, Reader};
use crate::ids::{ClusterId, DatabaseId, FileId, Generation};

pub(crate) const SLOT_LEN: usize = 4096;
pub(crate) const SLOTS: usize = 2;
/// The clear part of a slot: associated data of the sealed part.
pub(crate) const CLEAR_LEN: usize = 64;
pub(crate) const BODY_LEN: usize = SLOT_LEN - CLEAR_LEN - OVERHEAD;

/// Page sizes are multiples of this, so that pages lie on sectors.
pub(crate) const PAGE_SIZE_STEP: u32 = 512;
pub(crate) const MAX_PAGE_SIZE: u32 = 1 << 20;

const MAGIC: &[u8; 8] = b"PGSEALF1";

/// The version digit, if these are the first bytes of a page file of another version.
pub(crate) fn unknown_version(bytes: &[u8; CLEAR_LEN]) -> Option<char> {
    let (name, version) = (&bytes[..7], bytes[7]);
    (name == &MAGIC[..7] && version != MAGIC[7]).then_some(char::from(version))
}

/// What a slot says in clear. Authenticated once the sealed part opened; until then good for refusing only.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct ClearHeader {
    /// Bytes of a sealed page on disk.
    pub(crate) page_size: u32,
    pub(crate) cluster: ClusterId,
    pub(crate) database: DatabaseId,
    pub(crate) file: FileId,
    pub(crate) slot: u32,
}

impl ClearHeader {
    pub(crate) fn encode(&self) -> [u8; CLEAR_LEN] {
        let mut out = [0; CLEAR_LEN];
        out[..8].copy_from_slice(MAGIC);
        out[8..12].copy_from_slice(&self.page_size.to_le_bytes());
        out[12..16].copy_from_slice(&self.payload_len().to_le_bytes());
        out[16..32].copy_from_slice(&self.cluster.to_bytes());
        out[32..48].copy_from_slice(&self.database.to_bytes());
        out[48..56].copy_from_slice(&self.file.get().to_le_bytes());
        out[56..60].copy_from_slice(&self.slot.to_le_bytes());
        out
    }

    pub(crate) fn decode(bytes: &[u8; CLEAR_LEN]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.array::<8>()? != *MAGIC {
            return Err(Malformed("it does not begin as a page file of this version"));
        }
        let page_size = reader.u32()?;
        check_page_size(page_size)?;
        let payload = reader.u32()?;
        let cluster = ClusterId::from_bytes(reader.array()?);
        let database = DatabaseId::from_bytes(reader.array()?);
        let file = FileId::new(reader.u64()?);
        let slot = reader.u32()?;
        reader.zeros(4)?;
        reader.finish()?;
        let header = Self { page_size, cluster, database, file, slot };
        if payload != header.payload_len() {
            return Err(Malformed("its payload length does not fit its page size"));
        }
        Ok(header)
    }

    fn payload_len(&self) -> u32 {
        self.page_size - OVERHEAD as u32
    }
}

/// Whether pages of this size can be stored: a multiple of 512, at least 512, at most 1 MiB.
pub(crate) fn check_page_size(size: u32) -> Result<(), Malformed> {
    if size == 0 || size > MAX_PAGE_SIZE || !size.is_multiple_of(PAGE_SIZE_STEP) {
        return Err(Malformed("its page size is not a multiple of 512 up to 1 MiB"));
    }
    Ok(())
}

/// Where page `page` begins; `None` past what a file can hold.
pub(crate) fn page_offset(page_size: u32, page: u64) -> Option<u64> {
    let size = u64::from(page_size);
    let first = size.max((SLOTS * SLOT_LEN) as u64);
    page.checked_mul(size)?.checked_add(first)
}

/// The sealed part of a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct HeaderBody {
    /// Grows by one with each write of the header; the slot with the larger one counts.
    pub(crate) sequence: u64,
    /// Pages below this number were written; a page of zeros there is tampered.
    pub(crate) written: u64,
    /// No page is sealed under an older generation.
    pub(crate) oldest_generation: Generation,
    /// The keystore's last change when the header was written.
    pub(crate) seen: Seen,
}

/// A change of the keystore: its number, and the tag that tells it from a change of this number in another history.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Seen {
    pub(crate) sequence: u64,
    pub(crate) tag: [u8; TAG_LEN],
}

/// Kept for the log position of the last checkpoint (log id 16, segment 8, sequence 8).
const CHECKPOINT_LEN: usize = 32;
/// Kept for freshness: root 32, epoch 8.
const FRESHNESS_LEN: usize = 40;
const SEEN_AT: usize = 24 + CHECKPOINT_LEN;
const SEEN_TAG_AT: usize = SEEN_AT + 8 + FRESHNESS_LEN;

impl HeaderBody {
    pub(crate) fn encode(&self) -> [u8; BODY_LEN] {
        let mut out = [0; BODY_LEN];
        out[..8].copy_from_slice(&self.sequence.to_le_bytes());
        out[8..16].copy_from_slice(&self.written.to_le_bytes());
        out[16..20].copy_from_slice(&self.oldest_generation.get().to_le_bytes());
        out[SEEN_AT..][..8].copy_from_slice(&self.seen.sequence.to_le_bytes());
        out[SEEN_TAG_AT..][..TAG_LEN].copy_from_slice(&self.seen.tag);
        out
    }

    pub(crate) fn decode(bytes: &[u8; BODY_LEN]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        let sequence = reader.u64()?;
        let written = reader.u64()?;
        let oldest_generation = read_generation(&mut reader)?;
        reader.zeros(5)?;
        reader.zeros(CHECKPOINT_LEN)?;
        let seen_sequence = reader.u64()?;
        reader.zeros(FRESHNESS_LEN)?;
        let seen = Seen { sequence: seen_sequence, tag: reader.array()? };
        reader.padding()?;
        Ok(Self { sequence, written, oldest_generation, seen })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clear() -> ClearHeader {
        ClearHeader {
            page_size: 16384,
            cluster: ClusterId::from_bytes([0xc1; 16]),
            database: DatabaseId::from_bytes([0xd2; 16]),
            file: FileId::new(0x0807_0605_0403_0201),
            slot: 1,
        }
    }

    #[test]
    fn golden_clear_header_bytes() {
        let mut golden = b"PGSEALF1\x00\x40\x00\x00\xd0\x3f\x00\x00".to_vec();
        golden.extend([0xc1; 16]);
        golden.extend([0xd2; 16]);
        golden.extend([1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(clear().encode()[..], golden);
        assert_eq!(ClearHeader::decode(&clear().encode()), Ok(clear()));
    }

    #[test]
    fn golden_header_body_bytes() {
        let body = HeaderBody {
            sequence: 0x11,
            written: 0x2222,
            oldest_generation: Generation::new(0x0003_0201).unwrap(),
            seen: Seen { sequence: 0x4444, tag: [0x55; 16] },
        };
        let bytes = body.encode();
        let mut golden = vec![0; 3984];
        golden[0] = 0x11;
        golden[8..10].fill(0x22);
        golden[16..19].copy_from_slice(&[1, 2, 3]);
        golden[56..58].fill(0x44);
        golden[104..120].fill(0x55);
        assert_eq!(bytes[..], golden);
        assert_eq!(HeaderBody::decode(&bytes), Ok(body));
        for reserved in [19, 20, 23, 24, 55, 64, 103, 120, 3983] {
            let mut changed = bytes;
            changed[reserved] = 1;
            assert!(HeaderBody::decode(&changed).is_err(), "byte {reserved}");
        }
    }

    #[test]
    fn page_sizes_that_cannot_be_are_refused() {
        for size in [0, 1, 511, 513, 48, 4097, MAX_PAGE_SIZE + 512, u32::MAX] {
            let mut bytes = clear().encode();
            bytes[8..12].copy_from_slice(&size.to_le_bytes());
            bytes[12..16].copy_from_slice(&size.wrapping_sub(48).to_le_bytes());
            assert!(ClearHeader::decode(&bytes).is_err(), "{size}");
        }
    }

    #[test]
    fn pages_begin_after_both_slots_and_never_wrap() {
        assert_eq!(page_offset(4096, 0), Some(8192));
        assert_eq!(page_offset(16384, 0), Some(16384));
        assert_eq!(page_offset(4096, 3), Some(8192 + 3 * 4096));
        assert_eq!(page_offset(4096, u64::MAX), None);
    }
}
