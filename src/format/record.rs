//! A record: what is public about one key, and the key itself as the master keys wrapped it.

use crate::format::page::{Suite, generation_bytes, read_generation};
use crate::format::reader::{Malformed, Reader};
use crate::format::wrapped::Purpose;
use crate::ids::{DatabaseId, Generation, MasterKeyId, SealId};
use crate::keys::wrapper::WrappedKey;

/// How many master keys may wrap one key.
pub(crate) const MAX_WRAPPINGS: usize = 8;
pub(crate) const MAX_BLOB: usize = 4096;
pub(crate) const MAX_PROVIDER: usize = 255;
pub(crate) const MAX_KEY_ID: usize = 1024;
pub(crate) const MAX_KEY_VERSION: usize = 255;

/// Everything before the wrappings.
const FIXED_LEN: usize = 16 + 3 + 1 + 16 + 1 + 1 + 2 + 8 + 32 + 4 + 1;
/// Four lengths of two bytes, and what they bound.
const MAX_WRAPPING_LEN: usize = 4 * 2 + MAX_PROVIDER + MAX_KEY_ID + MAX_KEY_VERSION + MAX_BLOB;
/// The longest record: 45,189 bytes.
pub(crate) const MAX_RECORD_LEN: usize = FIXED_LEN + MAX_WRAPPINGS * MAX_WRAPPING_LEN;

const _: () = assert!(FIXED_LEN == 85 && MAX_RECORD_LEN == 45_189);

/// Whether a key may still be used.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(crate) enum KeyState {
    /// Opens and seals.
    Active = 1,
    /// Opens only.
    Retired = 2,
    /// Gone: the record stays as a witness, without wrappings.
    Destroyed = 3,
}

impl KeyState {
    pub(crate) const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Active),
            2 => Some(Self::Retired),
            3 => Some(Self::Destroyed),
            _ => None,
        }
    }
}

/// One key of the keystore. Nothing in it is secret; nothing in it is to be believed before the keystore's MAC is checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Record {
    /// Zeros for cluster keys and probes, and only for those.
    pub(crate) database: DatabaseId,
    pub(crate) generation: Generation,
    pub(crate) suite: Suite,
    pub(crate) seal: SealId,
    pub(crate) state: KeyState,
    pub(crate) purpose: Purpose,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Public, derived from the key: tells, after an unwrap, that it is the right one.
    pub(crate) commitment: [u8; 32],
    /// The number of its lock among processes: no other data key of the cluster has it. 0 exactly for cluster keys and probes.
    pub(crate) lock: u32,
    /// The same key under each of several master keys. Empty for a destroyed key, and only for one.
    pub(crate) wrappings: Vec<WrappedKey>,
}

impl Record {
    /// Appends the record's bytes to `out`. A record that breaks a rule or a limit appends nothing.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let count = self.check()?;
        self.wrappings.iter().try_for_each(check_lengths)?;
        out.extend(self.database.to_bytes());
        out.extend(generation_bytes(self.generation));
        out.push(self.suite.to_byte());
        out.extend(self.seal.to_bytes());
        out.extend([self.state as u8, self.purpose as u8, 0, 0]);
        out.extend(self.created.to_le_bytes());
        out.extend(self.commitment);
        out.extend(self.lock.to_le_bytes());
        out.push(count);
        self.wrappings.iter().try_for_each(|wrapping| {
            put_short(out, wrapping.master_key.provider.as_bytes())?;
            put_short(out, wrapping.master_key.key.as_bytes())?;
            put_short(out, wrapping.key_version.as_bytes())?;
            put_short(out, &wrapping.blob)
        })
    }

    /// Reads one record and leaves `reader` behind it: a record needs no length in front.
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let database = DatabaseId::from_bytes(reader.array()?);
        let generation = read_generation(reader)?;
        let suite = Suite::from_byte(reader.u8()?).ok_or(Malformed("its suite is unknown"))?;
        let seal = SealId::from_bytes(reader.array()?);
        let state = KeyState::from_byte(reader.u8()?).ok_or(Malformed("its state is unknown"))?;
        let purpose = Purpose::from_byte(reader.u8()?).ok_or(Malformed("its purpose is unknown"))?;
        reader.zeros(2)?;
        let created = reader.u64()?;
        let commitment = reader.array()?;
        let lock = reader.u32()?;
        let count = usize::from(reader.u8()?);
        if count > MAX_WRAPPINGS {
            return Err(Malformed("it has more than 8 wrappings"));
        }
        let wrappings = (0..count).map(|_| decode_wrapping(reader)).collect::<Result<_, _>>()?;
        let record = Self { database, generation, suite, seal, state, purpose, created, commitment, lock, wrappings };
        record.check()?;
        Ok(record)
    }

    /// The rules between fields. Returns the number of wrappings as it is stored.
    fn check(&self) -> Result<u8, Malformed> {
        let no_database = self.database.to_bytes() == [0; 16];
        if no_database == (self.purpose == Purpose::Data) {
            return Err(Malformed("a data key names its database, a cluster key and a probe name none"));
        }
        if no_database != (self.lock == 0) {
            return Err(Malformed("a data key has a lock, a cluster key and a probe have none"));
        }
        if self.wrappings.is_empty() != (self.state == KeyState::Destroyed) {
            return Err(Malformed("a destroyed key has no wrapping, any other has at least one"));
        }
        match u8::try_from(self.wrappings.len()) {
            Ok(count) if self.wrappings.len() <= MAX_WRAPPINGS => Ok(count),
            _ => Err(Malformed("it has more than 8 wrappings")),
        }
    }
}

const PROVIDER_TOO_LONG: Malformed = Malformed("its provider's name is longer than 255 bytes");
const KEY_ID_TOO_LONG: Malformed = Malformed("its master key's name is longer than 1024 bytes");
const KEY_VERSION_TOO_LONG: Malformed = Malformed("its master key's version is longer than 255 bytes");
const BLOB_TOO_LONG: Malformed = Malformed("its wrapped key is longer than 4096 bytes");

fn check_lengths(wrapping: &WrappedKey) -> Result<(), Malformed> {
    let limits = [
        (wrapping.master_key.provider.len(), MAX_PROVIDER, PROVIDER_TOO_LONG),
        (wrapping.master_key.key.len(), MAX_KEY_ID, KEY_ID_TOO_LONG),
        (wrapping.key_version.len(), MAX_KEY_VERSION, KEY_VERSION_TOO_LONG),
        (wrapping.blob.len(), MAX_BLOB, BLOB_TOO_LONG),
    ];
    limits.into_iter().try_for_each(|(len, max, too_long)| if len > max { Err(too_long) } else { Ok(()) })
}

fn decode_wrapping(reader: &mut Reader<'_>) -> Result<WrappedKey, Malformed> {
    let provider = text(reader.short(MAX_PROVIDER, PROVIDER_TOO_LONG)?)?;
    let key = text(reader.short(MAX_KEY_ID, KEY_ID_TOO_LONG)?)?;
    let key_version = text(reader.short(MAX_KEY_VERSION, KEY_VERSION_TOO_LONG)?)?.to_owned();
    let blob = reader.short(MAX_BLOB, BLOB_TOO_LONG)?.to_vec();
    Ok(WrappedKey { master_key: MasterKeyId::new(provider, key), key_version, blob })
}

fn text(bytes: &[u8]) -> Result<&str, Malformed> {
    std::str::from_utf8(bytes).map_err(|_| Malformed("a name in it is not UTF-8"))
}

fn put_short(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), Malformed> {
    let len = u16::try_from(bytes.len()).map_err(|_| Malformed("a part of it is longer than 65535 bytes"))?;
    out.extend(len.to_le_bytes());
    out.extend(bytes);
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A data key of database `[database; 16]`, wrapped once.
    pub(crate) fn data_record(database: u8, generation: u32) -> Record {
        Record {
            database: DatabaseId::from_bytes([database; 16]),
            generation: Generation::new(generation).unwrap(),
            suite: Suite::ChaCha20Poly1305,
            seal: SealId::from_bytes([0xe3; 16]),
            state: KeyState::Active,
            purpose: Purpose::Data,
            created: 0x0102_0304_0506_0708,
            commitment: [0xc7; 32],
            lock: u32::from(database) << 24 | generation,
            wrappings: vec![wrapping("prov", "key-1", "v2", &[0xb1, 0xb2, 0xb3])],
        }
    }

    /// A cluster key's or a probe's record.
    pub(crate) fn cluster_record(purpose: Purpose) -> Record {
        let database = DatabaseId::from_bytes([0; 16]);
        Record { database, suite: Suite::Aes256Gcm, purpose, lock: 0, ..data_record(1, 1) }
    }

    pub(crate) fn wrapping(provider: &str, key: &str, version: &str, blob: &[u8]) -> WrappedKey {
        WrappedKey { master_key: MasterKeyId::new(provider, key), key_version: version.to_owned(), blob: blob.to_vec() }
    }

    fn encoded(record: &Record) -> Vec<u8> {
        let mut out = Vec::new();
        record.encode(&mut out).unwrap();
        out
    }

    fn decoded(bytes: &[u8]) -> Result<Record, Malformed> {
        let mut reader = Reader::new(bytes);
        let record = Record::decode(&mut reader)?;
        reader.finish()?;
        Ok(record)
    }

    #[test]
    fn golden_record_bytes() {
        let mut record = data_record(0xd2, 0x0003_0201);
        record.wrappings.push(wrapping("p", "", "", &[]));
        let mut golden = vec![0xd2; 16];
        golden.extend([1, 2, 3, 2]);
        golden.extend([0xe3; 16]);
        golden.extend([1, 1, 0, 0]);
        golden.extend([8, 7, 6, 5, 4, 3, 2, 1]);
        golden.extend([0xc7; 32]);
        golden.extend([1, 2, 3, 0xd2]);
        golden.push(2);
        golden.extend(b"\x04\x00prov\x05\x00key-1\x02\x00v2\x03\x00\xb1\xb2\xb3");
        golden.extend(b"\x01\x00p\x00\x00\x00\x00\x00\x00");
        assert_eq!(encoded(&record), golden);
        assert_eq!(decoded(&golden), Ok(record));
    }

    #[test]
    fn every_cut_of_a_record_is_refused() {
        let bytes = encoded(&data_record(0xd2, 1));
        for len in 0..bytes.len() {
            assert!(decoded(&bytes[..len]).is_err(), "length {len}");
        }
    }

    #[test]
    fn a_record_decodes_from_no_other_bytes_than_its_own() {
        let good = encoded(&data_record(0xd2, 1));
        for at in 0..good.len() {
            for value in 0..=255u8 {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok(record) = decoded(&bytes) {
                    assert_eq!(encoded(&record), bytes, "byte {at} = {value}");
                }
            }
        }
    }

    #[test]
    fn unknown_numbers_and_set_reserved_bytes_are_refused() {
        let good = encoded(&data_record(0xd2, 1));
        for (at, legal) in [(19, 1..=3u8), (36, 1..=2), (37, 1..=1), (38, 0..=0), (39, 0..=0), (84, 1..=1)] {
            for value in 0..=255u8 {
                let mut bytes = good.clone();
                bytes[at] = value;
                assert_eq!(decoded(&bytes).is_ok(), legal.contains(&value), "byte {at} = {value}");
            }
        }
        let mut bytes = good;
        bytes[16] = 0;
        assert_eq!(decoded(&bytes), Err(Malformed("its generation is 0")));
    }

    #[test]
    fn what_is_longer_than_its_limit_is_neither_written_nor_read() {
        let limits = [(MAX_PROVIDER, 0), (MAX_KEY_ID, 1), (MAX_KEY_VERSION, 2), (MAX_BLOB, 3)];
        for (max, part) in limits {
            let of = |len: usize| {
                let long = |this: usize| "x".repeat(if this == part { len } else { 0 });
                let mut record = data_record(1, 1);
                record.wrappings = vec![wrapping(&long(0), &long(1), &long(2), long(3).as_bytes()); MAX_WRAPPINGS];
                record
            };
            let bytes = encoded(&of(max));
            assert_eq!(decoded(&bytes), Ok(of(max)));
            let mut out = Vec::new();
            assert!(of(max + 1).encode(&mut out).is_err());
            assert!(out.is_empty(), "a refused record wrote bytes");
            let mut longer = bytes;
            let at = FIXED_LEN + 2 * part;
            longer[at..at + 2].copy_from_slice(&u16::try_from(max + 1).unwrap().to_le_bytes());
            let error = decoded(&longer).unwrap_err();
            assert!(error.0.contains("longer than"), "{error:?}");
        }
        let mut record = data_record(1, 1);
        record.wrappings = vec![wrapping("", "", "", &[]); MAX_WRAPPINGS + 1];
        assert!(record.encode(&mut Vec::new()).is_err());
        record.wrappings = vec![wrapping("", "", "", &[]); 256 + 1];
        assert!(record.encode(&mut Vec::new()).is_err());
    }

    #[test]
    fn the_longest_record_has_the_length_that_headers_are_made_for() {
        let (provider, key, version) = ("p".repeat(MAX_PROVIDER), "k".repeat(MAX_KEY_ID), "v".repeat(MAX_KEY_VERSION));
        let mut record = data_record(1, 1);
        record.wrappings = vec![wrapping(&provider, &key, &version, &[0; MAX_BLOB]); MAX_WRAPPINGS];
        assert_eq!(encoded(&record).len(), MAX_RECORD_LEN);
    }

    #[test]
    fn names_that_are_not_utf8_are_refused() {
        let mut bytes = encoded(&data_record(1, 1));
        bytes[FIXED_LEN + 2] = 0xff;
        assert_eq!(decoded(&bytes), Err(Malformed("a name in it is not UTF-8")));
    }

    #[test]
    fn a_record_that_contradicts_itself_is_refused() {
        let homeless = Record { database: DatabaseId::from_bytes([0; 16]), ..data_record(1, 1) };
        let unlocked = Record { lock: 0, ..data_record(1, 1) };
        let locked = Record { lock: 1, ..cluster_record(Purpose::Cluster) };
        let housed = Record { purpose: Purpose::Probe, ..data_record(1, 1) };
        let destroyed_with_key = Record { state: KeyState::Destroyed, ..data_record(1, 1) };
        let active_without_key = Record { wrappings: Vec::new(), ..data_record(1, 1) };
        for record in [homeless, housed, unlocked, locked, destroyed_with_key, active_without_key] {
            assert!(record.encode(&mut Vec::new()).is_err(), "{record:?}");
        }
        let destroyed = Record { state: KeyState::Destroyed, wrappings: Vec::new(), ..data_record(1, 1) };
        assert_eq!(decoded(&encoded(&destroyed)), Ok(destroyed));
    }
}
