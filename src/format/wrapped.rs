//! What a master key wraps: the 128-byte payload, and the 48-byte context that goes to the provider beside it.

use crate::format::page::Suite;
use crate::format::reader::{Malformed, Reader};
use crate::ids::{ClusterId, DatabaseId, Generation, SealId};

/// The length of every wrapped payload. Fits RSA-2048 OAEP (190 bytes) and AES-KW (a multiple of 8).
pub(crate) const PAYLOAD_LEN: usize = 128;
pub(crate) const CONTEXT_LEN: usize = 48;
/// Where the two secret halves lie; the rest of a payload is public.
pub(crate) const PAYLOAD_KEY_AT: usize = 64;
pub(crate) const PAYLOAD_SECOND_AT: usize = 96;

const PAYLOAD_MAGIC: &[u8; 4] = b"PSWK";
const CONTEXT_MAGIC: &[u8; 4] = b"PSWC";
const VERSION: u8 = 1;

/// What a wrapped key is for.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
#[repr(u8)]
pub enum Purpose {
    /// A database's data key.
    Data = 1,
    /// A cluster's key, with its identity key beside it.
    Cluster = 2,
    /// A random key that protects nothing: unwrapping it shows that the master key can be used.
    Probe = 3,
}

impl Purpose {
    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Data),
            2 => Some(Self::Cluster),
            3 => Some(Self::Probe),
            _ => None,
        }
    }
}

/// The public half of a payload: what the keys in it belong to. Compared with what the caller expects after any unwrap.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct PayloadHead {
    pub(crate) purpose: Purpose,
    pub(crate) suite: Suite,
    pub(crate) generation: Generation,
    pub(crate) cluster: ClusterId,
    /// Zeros for cluster keys and probes.
    pub(crate) database: DatabaseId,
    pub(crate) seal: SealId,
}

impl PayloadHead {
    pub(crate) fn encode(&self) -> [u8; PAYLOAD_KEY_AT] {
        let mut out = [0; PAYLOAD_KEY_AT];
        out[..4].copy_from_slice(PAYLOAD_MAGIC);
        out[4] = VERSION;
        out[5] = self.purpose as u8;
        out[6] = self.suite.to_byte();
        out[8..12].copy_from_slice(&self.generation.get().to_le_bytes());
        out[16..32].copy_from_slice(&self.cluster.to_bytes());
        out[32..48].copy_from_slice(&self.database.to_bytes());
        out[48..64].copy_from_slice(&self.seal.to_bytes());
        out
    }

    /// Reads the first 64 bytes of an unwrapped payload.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        if reader.array::<4>()? != *PAYLOAD_MAGIC {
            return Err(Malformed("it is no wrapped key of pageseal"));
        }
        if reader.u8()? != VERSION {
            return Err(Malformed("its version is unknown"));
        }
        let purpose = Purpose::from_byte(reader.u8()?).ok_or(Malformed("its purpose is unknown"))?;
        let suite = Suite::from_byte(reader.u8()?).ok_or(Malformed("its suite is unknown"))?;
        reader.zeros(1)?;
        let generation = Generation::new(reader.u32()?).ok_or(Malformed("its generation is out of range"))?;
        reader.zeros(4)?;
        let cluster = ClusterId::from_bytes(reader.array()?);
        let database = DatabaseId::from_bytes(reader.array()?);
        let seal = SealId::from_bytes(reader.array()?);
        Ok(Self { purpose, suite, generation, cluster, database, seal })
    }
}

/// The associated data of a wrap: `"PSWC" | version | purpose | 0^2 | generation u32 | 0^4 | cluster 16 | database 16`.
pub(crate) fn context_bytes(
    purpose: Purpose,
    generation: Generation,
    cluster: ClusterId,
    database: Option<DatabaseId>,
) -> [u8; CONTEXT_LEN] {
    let mut out = [0; CONTEXT_LEN];
    out[..4].copy_from_slice(CONTEXT_MAGIC);
    out[4] = VERSION;
    out[5] = purpose as u8;
    out[8..12].copy_from_slice(&generation.get().to_le_bytes());
    out[16..32].copy_from_slice(&cluster.to_bytes());
    if let Some(database) = database {
        out[32..].copy_from_slice(&database.to_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head() -> PayloadHead {
        PayloadHead {
            purpose: Purpose::Data,
            suite: Suite::ChaCha20Poly1305,
            generation: Generation::new(0x0001_0203).unwrap(),
            cluster: ClusterId::from_bytes([0xc1; 16]),
            database: DatabaseId::from_bytes([0xd2; 16]),
            seal: SealId::from_bytes([0xe3; 16]),
        }
    }

    #[test]
    fn golden_payload_head_bytes() {
        let mut golden = b"PSWK\x01\x01\x02\x00\x03\x02\x01\x00\x00\x00\x00\x00".to_vec();
        golden.extend([0xc1; 16]);
        golden.extend([0xd2; 16]);
        golden.extend([0xe3; 16]);
        assert_eq!(head().encode()[..], golden);
        assert_eq!(PayloadHead::decode(&golden), Ok(head()));
    }

    #[test]
    fn golden_context_bytes() {
        let bytes = context_bytes(
            Purpose::Cluster,
            Generation::new(7).unwrap(),
            ClusterId::from_bytes([0xc1; 16]),
            Some(DatabaseId::from_bytes([0xd2; 16])),
        );
        let mut golden = b"PSWC\x01\x02\x00\x00\x07\x00\x00\x00\x00\x00\x00\x00".to_vec();
        golden.extend([0xc1; 16]);
        golden.extend([0xd2; 16]);
        assert_eq!(bytes[..], golden);
    }

    #[test]
    fn every_other_value_of_a_fixed_byte_is_refused() {
        let good = head().encode();
        for at in [0, 1, 2, 3, 4, 7, 11, 12, 13, 14, 15] {
            for value in 0..=255u8 {
                let mut bytes = good;
                bytes[at] = value;
                assert_eq!(PayloadHead::decode(&bytes).is_ok(), value == good[at], "byte {at} = {value}");
            }
        }
        for (at, legal) in [(5, 1..=3u8), (6, 1..=3)] {
            for value in 0..=255u8 {
                let mut bytes = good;
                bytes[at] = value;
                assert_eq!(PayloadHead::decode(&bytes).is_ok(), legal.contains(&value), "byte {at} = {value}");
            }
        }
        for len in 0..good.len() {
            assert!(PayloadHead::decode(&good[..len]).is_err(), "length {len}");
        }
    }
}
