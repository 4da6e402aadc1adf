//! The keystore file's own bytes: its header, and the operations inside the bodies of its groups.

use std::fmt;

use crate::format::group::SECTOR;
use crate::format::page::{generation_bytes, read_generation};
use crate::format::reader::{Malformed, Reader};
use crate::format::record::{KeyState, MAX_RECORD_LEN, Record};
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, Generation};

pub(crate) const HEADER_MAC_LEN: usize = 32;
/// The longest header.
pub(crate) const MAX_HEADER_LEN: usize = 64 * 1024;
/// The longest sealed name, in bytes.
pub(crate) const MAX_SEALED_NAME: usize = 512;

/// `"PGSEALK" | version digit | length u32 | hierarchy u8 | 0^3 | cluster 16 | sequence u64 | whole u64`.
const HEADER_FIXED_LEN: usize = 8 + 4 + 1 + 3 + 16 + 8 + 8;
const MAGIC: &[u8; 7] = b"PGSEALK";
pub(crate) const VERSION: u8 = b'1';
/// Where the version byte stands.
pub(crate) const VERSION_AT: usize = MAGIC.len();

const _: () = assert!(HEADER_FIXED_LEN + MAX_RECORD_LEN + HEADER_MAC_LEN <= MAX_HEADER_LEN);

/// Why bytes are not what this version writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Refused {
    Malformed(Malformed),
    /// The file's version digit.
    UnknownVersion(u8),
    /// The number of an operation. Never skipped: it may be what makes another operation wrong.
    UnknownOperation(u8),
}

impl From<Malformed> for Refused {
    fn from(malformed: Malformed) -> Self {
        Self::Malformed(malformed)
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Malformed(Malformed(rule)) => f.write_str(rule),
            Self::UnknownVersion(byte) => {
                write!(f, "its version byte is {byte:#04x}, which this version does not know")
            }
            Self::UnknownOperation(kind) => write!(f, "it has an operation of kind {kind}, written by a newer version"),
        }
    }
}

/// What the master keys wrap. A setting of a cluster, which can be changed while it runs
/// ([`Cluster::set_hierarchy`](crate::Cluster::set_hierarchy)).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Hierarchy {
    /// Each data key. Opening a database calls the key service once for each generation of its key.
    Direct = 0,
    /// One cluster key, which wraps the data keys. For thousands of databases: one call to the key service opens them all,
    /// and one wraps them anew under another master key.
    ClusterKey = 1,
}

/// What stands in clear at the beginning of a keystore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Header {
    pub(crate) hierarchy: Hierarchy,
    pub(crate) cluster: ClusterId,
    /// The sequence number of the change that this header stands for; the first group has the next one. Also the
    /// "segment" that the groups' tags bind, so that a group of an earlier file does not fit a rewritten one.
    pub(crate) sequence: u64,
    /// The last change that was written together with this header, before the file took its name: a file that ends earlier
    /// is damaged, and not torn.
    pub(crate) whole: u64,
    /// The wrapped cluster key and identity key.
    pub(crate) record: Record,
}

impl Header {
    /// The header's bytes, a multiple of 512, with zeros where the MAC goes: in the last 32.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, Malformed> {
        check_purpose(&self.record, Purpose::Cluster)?;
        if self.whole < self.sequence {
            return Err(Malformed("its header ends before it begins"));
        }
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.push(VERSION);
        out.extend([0; 4]);
        out.extend([self.hierarchy as u8, 0, 0, 0]);
        out.extend(self.cluster.to_bytes());
        out.extend(self.sequence.to_le_bytes());
        out.extend(self.whole.to_le_bytes());
        self.record.encode(&mut out)?;
        let len = (out.len() + HEADER_MAC_LEN).next_multiple_of(SECTOR);
        out.resize(len, 0);
        let len = u32::try_from(len).map_err(|_| Malformed("its header is longer than 64 KiB"))?;
        out[8..12].copy_from_slice(&len.to_le_bytes());
        Ok(out)
    }

    /// Reads the header at the beginning of `file`, and returns its length with it. Nothing of it is authenticated.
    pub(crate) fn decode(file: &[u8]) -> Result<(Self, usize), Refused> {
        let mut reader = Reader::new(file);
        if reader.array()? != *MAGIC {
            return Err(Malformed("it is no keystore of pageseal").into());
        }
        match reader.u8()? {
            VERSION => {}
            other => return Err(Refused::UnknownVersion(other)),
        }
        let len = reader.u32()? as usize;
        if len > MAX_HEADER_LEN || len == 0 || !len.is_multiple_of(SECTOR) {
            return Err(Malformed("its header's length is not a multiple of 512 up to 64 KiB").into());
        }
        let (covered, _mac) = Reader::new(file).bytes(len)?.split_at(len - HEADER_MAC_LEN);
        let mut reader = Reader::new(covered);
        reader.bytes(8 + 4)?;
        let hierarchy = match reader.u8()? {
            0 => Hierarchy::Direct,
            1 => Hierarchy::ClusterKey,
            _ => return Err(Malformed("its hierarchy is unknown").into()),
        };
        reader.zeros(3)?;
        let cluster = ClusterId::from_bytes(reader.array()?);
        let (sequence, whole) = (reader.u64()?, reader.u64()?);
        if whole < sequence {
            return Err(Malformed("its header ends before it begins").into());
        }
        let record = Record::decode(&mut reader)?;
        check_purpose(&record, Purpose::Cluster)?;
        if reader.remaining() >= SECTOR {
            return Err(Malformed("its header is longer than it needs to be").into());
        }
        reader.padding()?;
        Ok((Self { hierarchy, cluster, sequence, whole, record }, len))
    }
}

/// A name as the keystore holds it: to be found by its HMAC, and to be shown after opening it. Never in clear.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SealedName {
    pub(crate) lookup: [u8; 32],
    /// 1 to 512 bytes.
    pub(crate) sealed: Vec<u8>,
}

/// Who uses a database's keys.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[repr(u8)]
pub(crate) enum OwnerKind {
    PageFile = 1,
    Log = 2,
    Adapter = 3,
    /// A cipher handed out to an engine; only the engine knows when it needs the keys no more.
    External = 4,
}

impl OwnerKind {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::PageFile),
            2 => Some(Self::Log),
            3 => Some(Self::Adapter),
            4 => Some(Self::External),
            _ => None,
        }
    }
}

/// Which page file, log, adapter or external cipher, within its kind and database.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) struct OwnerId(pub(crate) [u8; 16]);

/// Somebody who may have sealed under a database's keys, from one generation on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct KeyUse {
    pub(crate) kind: OwnerKind,
    pub(crate) owner: OwnerId,
    pub(crate) database: DatabaseId,
    pub(crate) oldest: Generation,
    /// Only an external owner may have none.
    pub(crate) name: Option<SealedName>,
}

/// One change of the keystore.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Operation {
    /// A new database.
    Database { database: DatabaseId, name: SealedName },
    /// Another name for a database.
    Rename { database: DatabaseId, name: SealedName },
    /// A database goes, with its keys and those who use them.
    Drop { database: DatabaseId },
    /// A new data key of a database.
    Generation(Record),
    /// A data key is retired or destroyed.
    State { database: DatabaseId, generation: Generation, state: KeyState },
    /// The same data key or probe under other master keys: the record as it is now, different in its wrappings only.
    Wrapping(Record),
    /// The key whose unwrapping shows that the master key can be used. The latest counts.
    Probe(Record),
    /// A new user of a database's keys.
    KeyUseAdd(KeyUse),
    /// A user of a database's keys has sealed anew what was older than `oldest`.
    KeyUseRaise { kind: OwnerKind, owner: OwnerId, database: DatabaseId, oldest: Generation },
    /// A user of a database's keys is gone, and what it sealed with it.
    KeyUseRelease { kind: OwnerKind, owner: OwnerId, database: DatabaseId },
}

const KIND_DATABASE: u8 = 1;
const KIND_RENAME: u8 = 2;
const KIND_DROP: u8 = 3;
const KIND_GENERATION: u8 = 4;
const KIND_STATE: u8 = 5;
const KIND_WRAPPING: u8 = 6;
const KIND_PROBE: u8 = 7;
const KIND_KEY_USE_ADD: u8 = 8;
const KIND_KEY_USE_RAISE: u8 = 9;
const KIND_KEY_USE_RELEASE: u8 = 10;

impl Operation {
    /// Appends `kind u8 | 0^3 | length u32 | bytes`. An operation that breaks a rule may leave part of itself in `out`.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), Malformed> {
        let start = out.len();
        out.extend([self.kind(), 0, 0, 0, 0, 0, 0, 0]);
        let body = out.len();
        match self {
            Self::Database { database, name } | Self::Rename { database, name } => {
                out.extend(database.to_bytes());
                encode_name(Some(name), out)?;
            }
            Self::Drop { database } => out.extend(database.to_bytes()),
            Self::Generation(record) => {
                check_purpose(record, Purpose::Data)?;
                record.encode(out)?;
            }
            Self::State { database, generation, state } => {
                out.extend(database.to_bytes());
                out.extend(generation_bytes(*generation));
                out.push(*state as u8);
            }
            Self::Wrapping(record) => {
                check_rewrapped(record)?;
                record.encode(out)?;
            }
            Self::Probe(record) => {
                check_purpose(record, Purpose::Probe)?;
                record.encode(out)?;
            }
            Self::KeyUseAdd(key_use) => encode_key_use(key_use, out)?,
            Self::KeyUseRaise { kind, owner, database, oldest } => {
                encode_owner(*kind, *owner, *database, out);
                out.extend(generation_bytes(*oldest));
                out.push(0);
            }
            Self::KeyUseRelease { kind, owner, database } => encode_owner(*kind, *owner, *database, out),
        }
        let len = u32::try_from(out.len() - body).map_err(|_| Malformed("it is longer than 4 GiB"))?;
        out[start + 4..body].copy_from_slice(&len.to_le_bytes());
        Ok(())
    }

    /// Reads the next operation of a group's body.
    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self, Refused> {
        let kind = reader.u8()?;
        reader.zeros(3)?;
        let len = reader.u32()? as usize;
        let mut body = Reader::new(reader.bytes(len)?);
        match kind {
            KIND_DATABASE => decode_named(body).map(|(database, name)| Self::Database { database, name }),
            KIND_RENAME => decode_named(body).map(|(database, name)| Self::Rename { database, name }),
            KIND_DROP => {
                let database = DatabaseId::from_bytes(body.array()?);
                body.finish()?;
                Ok(Self::Drop { database })
            }
            KIND_GENERATION => Ok(Self::Generation(decode_record(body, Purpose::Data)?)),
            KIND_STATE => Ok(decode_state(body)?),
            KIND_WRAPPING => {
                let record = Record::decode(&mut body)?;
                check_rewrapped(&record)?;
                body.finish()?;
                Ok(Self::Wrapping(record))
            }
            KIND_PROBE => Ok(Self::Probe(decode_record(body, Purpose::Probe)?)),
            KIND_KEY_USE_ADD => Ok(Self::KeyUseAdd(decode_key_use(body)?)),
            KIND_KEY_USE_RAISE => {
                let (kind, owner, database) = decode_owner(&mut body)?;
                let oldest = read_generation(&mut body)?;
                body.zeros(1)?;
                body.finish()?;
                Ok(Self::KeyUseRaise { kind, owner, database, oldest })
            }
            KIND_KEY_USE_RELEASE => {
                let (kind, owner, database) = decode_owner(&mut body)?;
                body.finish()?;
                Ok(Self::KeyUseRelease { kind, owner, database })
            }
            unknown => Err(Refused::UnknownOperation(unknown)),
        }
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Database { .. } => KIND_DATABASE,
            Self::Rename { .. } => KIND_RENAME,
            Self::Drop { .. } => KIND_DROP,
            Self::Generation(_) => KIND_GENERATION,
            Self::State { .. } => KIND_STATE,
            Self::Wrapping(_) => KIND_WRAPPING,
            Self::Probe(_) => KIND_PROBE,
            Self::KeyUseAdd(_) => KIND_KEY_USE_ADD,
            Self::KeyUseRaise { .. } => KIND_KEY_USE_RAISE,
            Self::KeyUseRelease { .. } => KIND_KEY_USE_RELEASE,
        }
    }
}

fn decode_named(mut body: Reader<'_>) -> Result<(DatabaseId, SealedName), Refused> {
    let database = DatabaseId::from_bytes(body.array()?);
    let name = decode_name(body)?.ok_or(Malformed("a database has no name"))?;
    Ok((database, name))
}

fn decode_state(mut body: Reader<'_>) -> Result<Operation, Malformed> {
    let database = DatabaseId::from_bytes(body.array()?);
    let generation = read_generation(&mut body)?;
    let state = KeyState::from_byte(body.u8()?).ok_or(Malformed("a key's state is unknown"))?;
    body.finish()?;
    Ok(Operation::State { database, generation, state })
}

/// A cluster key is in the header: wrapping it anew rewrites the file.
fn check_rewrapped(record: &Record) -> Result<(), Malformed> {
    match record.purpose {
        Purpose::Data | Purpose::Probe if record.state != KeyState::Destroyed => Ok(()),
        _ => Err(Malformed("what is wrapped anew is neither a data key nor a probe")),
    }
}

/// `kind u8 | 0^3 | owner 16 | database 16`.
fn encode_owner(kind: OwnerKind, owner: OwnerId, database: DatabaseId, out: &mut Vec<u8>) {
    out.extend([kind as u8, 0, 0, 0]);
    out.extend(owner.0);
    out.extend(database.to_bytes());
}

fn decode_owner(body: &mut Reader<'_>) -> Result<(OwnerKind, OwnerId, DatabaseId), Malformed> {
    let kind = OwnerKind::from_byte(body.u8()?).ok_or(Malformed("a key use is of an unknown kind"))?;
    body.zeros(3)?;
    Ok((kind, OwnerId(body.array()?), DatabaseId::from_bytes(body.array()?)))
}

fn check_purpose(record: &Record, purpose: Purpose) -> Result<(), Malformed> {
    if record.purpose == purpose {
        Ok(())
    } else {
        Err(Malformed("a key is not for the purpose that its place demands"))
    }
}

fn decode_record(mut body: Reader<'_>, purpose: Purpose) -> Result<Record, Malformed> {
    let record = Record::decode(&mut body)?;
    check_purpose(&record, purpose)?;
    body.finish()?;
    Ok(record)
}

/// `name HMAC 32 | sealed name`, up to the end of the operation; zeros and nothing if there is no name.
fn encode_name(name: Option<&SealedName>, out: &mut Vec<u8>) -> Result<(), Malformed> {
    match name {
        None => out.extend([0; 32]),
        Some(name) if name.sealed.is_empty() => return Err(Malformed("a name is empty")),
        Some(name) if name.sealed.len() > MAX_SEALED_NAME => {
            return Err(Malformed("a sealed name is longer than 512 bytes"));
        }
        Some(name) => {
            out.extend(name.lookup);
            out.extend(&name.sealed);
        }
    }
    Ok(())
}

fn decode_name(mut body: Reader<'_>) -> Result<Option<SealedName>, Malformed> {
    let lookup = body.array()?;
    let sealed = body.rest();
    if sealed.len() > MAX_SEALED_NAME {
        return Err(Malformed("a sealed name is longer than 512 bytes"));
    }
    match (sealed.is_empty(), lookup == [0; 32]) {
        (true, true) => Ok(None),
        (true, false) => Err(Malformed("a name is empty")),
        (false, _) => Ok(Some(SealedName { lookup, sealed: sealed.to_vec() })),
    }
}

/// `kind u8 | 0^3 | owner 16 | database 16 | oldest generation u24 | 0 | name`.
fn encode_key_use(key_use: &KeyUse, out: &mut Vec<u8>) -> Result<(), Malformed> {
    check_named(key_use)?;
    encode_owner(key_use.kind, key_use.owner, key_use.database, out);
    out.extend(generation_bytes(key_use.oldest));
    out.push(0);
    encode_name(key_use.name.as_ref(), out)
}

fn decode_key_use(mut body: Reader<'_>) -> Result<KeyUse, Malformed> {
    let (kind, owner, database) = decode_owner(&mut body)?;
    let oldest = read_generation(&mut body)?;
    body.zeros(1)?;
    let key_use = KeyUse { kind, owner, database, oldest, name: decode_name(body)? };
    check_named(&key_use)?;
    Ok(key_use)
}

fn check_named(key_use: &KeyUse) -> Result<(), Malformed> {
    match (&key_use.name, key_use.kind) {
        (None, OwnerKind::PageFile | OwnerKind::Log | OwnerKind::Adapter) => {
            Err(Malformed("a key use that is not external has no name"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::tests::{cluster_record, data_record, wrapping};

    fn header() -> Header {
        Header {
            hierarchy: Hierarchy::ClusterKey,
            cluster: ClusterId::from_bytes([0xc1; 16]),
            sequence: 0x0102_0304_0506_0708,
            whole: 0x1102_0304_0506_0708,
            record: cluster_record(Purpose::Cluster),
        }
    }

    fn record_bytes(record: &Record) -> Vec<u8> {
        let mut out = Vec::new();
        record.encode(&mut out).unwrap();
        out
    }

    fn encoded(operation: &Operation) -> Vec<u8> {
        let mut out = Vec::new();
        operation.encode(&mut out).unwrap();
        out
    }

    fn decoded(bytes: &[u8]) -> Result<Operation, Refused> {
        let mut reader = Reader::new(bytes);
        let operation = Operation::decode(&mut reader)?;
        reader.finish()?;
        Ok(operation)
    }

    fn name() -> SealedName {
        SealedName { lookup: [0x17; 32], sealed: vec![0x5a; 5] }
    }

    fn key_use() -> KeyUse {
        KeyUse {
            kind: OwnerKind::Log,
            owner: OwnerId([0x0e; 16]),
            database: DatabaseId::from_bytes([0xd2; 16]),
            oldest: Generation::new(0x0003_0201).unwrap(),
            name: Some(name()),
        }
    }

    fn all_operations() -> [Operation; 10] {
        let database = DatabaseId::from_bytes([0xd2; 16]);
        let KeyUse { kind, owner, oldest, .. } = key_use();
        [
            Operation::Database { database, name: name() },
            Operation::Generation(data_record(0xd2, 1)),
            Operation::Probe(cluster_record(Purpose::Probe)),
            Operation::KeyUseAdd(key_use()),
            Operation::Rename { database, name: name() },
            Operation::Drop { database },
            Operation::State { database, generation: oldest, state: KeyState::Destroyed },
            Operation::Wrapping(data_record(0xd2, 1)),
            Operation::KeyUseRaise { kind, owner, database, oldest },
            Operation::KeyUseRelease { kind, owner, database },
        ]
    }

    #[test]
    fn golden_header_bytes() {
        let mut golden = b"PGSEALK1\x00\x02\x00\x00\x01\x00\x00\x00".to_vec();
        golden.extend([0xc1; 16]);
        golden.extend([8, 7, 6, 5, 4, 3, 2, 1]);
        golden.extend([8, 7, 6, 5, 4, 3, 2, 0x11]);
        golden.extend(record_bytes(&header().record));
        golden.resize(512, 0);
        assert_eq!(header().encode().unwrap(), golden);
        assert_eq!(Header::decode(&golden), Ok((header(), 512)));
    }

    #[test]
    fn golden_operation_bytes() {
        let [database, generation, probe, key_use, rename, drop, state, wrapping, raise, release] = all_operations();

        let mut golden = b"\x01\x00\x00\x00\x35\x00\x00\x00".to_vec();
        golden.extend([0xd2; 16]);
        golden.extend([0x17; 32]);
        golden.extend([0x5a; 5]);
        assert_eq!(encoded(&database), golden);

        let record = record_bytes(&data_record(0xd2, 1));
        assert_eq!(record.len(), 0x6b);
        let golden = [b"\x04\x00\x00\x00\x6b\x00\x00\x00".to_vec(), record].concat();
        assert_eq!(encoded(&generation), golden);

        let record = record_bytes(&cluster_record(Purpose::Probe));
        let golden = [b"\x07\x00\x00\x00\x6b\x00\x00\x00".to_vec(), record].concat();
        assert_eq!(encoded(&probe), golden);

        let mut golden = b"\x08\x00\x00\x00\x4d\x00\x00\x00\x02\x00\x00\x00".to_vec();
        golden.extend([0x0e; 16]);
        golden.extend([0xd2; 16]);
        golden.extend([1, 2, 3, 0]);
        golden.extend([0x17; 32]);
        golden.extend([0x5a; 5]);
        assert_eq!(encoded(&key_use), golden);

        let mut golden = encoded(&database);
        golden[0] = 2;
        assert_eq!(encoded(&rename), golden);
        let mut golden = encoded(&generation);
        golden[0] = 6;
        assert_eq!(encoded(&wrapping), golden);
        assert_eq!(encoded(&drop), [&b"\x03\x00\x00\x00\x10\x00\x00\x00"[..], &[0xd2; 16]].concat());
        let golden = [&b"\x05\x00\x00\x00\x14\x00\x00\x00"[..], &[0xd2; 16], &[1, 2, 3, 3]].concat();
        assert_eq!(encoded(&state), golden);
        let owner = [&[2, 0, 0, 0][..], &[0x0e; 16], &[0xd2; 16]].concat();
        let golden = [&b"\x09\x00\x00\x00\x28\x00\x00\x00"[..], &owner, &[1, 2, 3, 0]].concat();
        assert_eq!(encoded(&raise), golden);
        assert_eq!(encoded(&release), [&b"\x0a\x00\x00\x00\x24\x00\x00\x00"[..], &owner].concat());

        for operation in all_operations() {
            assert_eq!(decoded(&encoded(&operation)), Ok(operation));
        }
    }

    #[test]
    fn the_longest_record_fits_a_header() {
        let (provider, key, version) = ("p".repeat(255), "k".repeat(1024), "v".repeat(255));
        let mut long = header();
        long.record.wrappings = vec![wrapping(&provider, &key, &version, &[0; 4096]); 8];
        let bytes = long.encode().unwrap();
        assert!(bytes.len() <= MAX_HEADER_LEN);
        assert_eq!(Header::decode(&bytes), Ok((long, bytes.len())));
    }

    #[test]
    fn headers_and_operations_decode_from_no_other_bytes_than_their_own() {
        let good = header().encode().unwrap();
        for at in 0..good.len() - HEADER_MAC_LEN {
            for value in [0, 1, 2, 3, 4, 0x7f, 0x80, 0xff] {
                let mut bytes = good.clone();
                bytes[at] = value;
                if let Ok((header, _)) = Header::decode(&bytes) {
                    assert_eq!(header.encode().unwrap(), bytes, "byte {at} = {value}");
                }
            }
        }
        for operation in all_operations() {
            let good = encoded(&operation);
            for at in 0..good.len() {
                for value in 0..=255u8 {
                    let mut bytes = good.clone();
                    bytes[at] = value;
                    if let Ok(operation) = decoded(&bytes) {
                        assert_eq!(encoded(&operation), bytes, "byte {at} = {value}");
                    }
                }
            }
        }
    }

    #[test]
    fn cut_headers_and_operations_are_refused() {
        let good = header().encode().unwrap();
        for len in 0..good.len() {
            assert!(Header::decode(&good[..len]).is_err(), "length {len}");
        }
        for operation in all_operations() {
            let good = encoded(&operation);
            for len in 0..good.len() {
                assert!(decoded(&good[..len]).is_err(), "{operation:?} at length {len}");
            }
        }
    }

    #[test]
    fn declared_lengths_beyond_the_bounds_are_refused() {
        for len in [0, 1, 511, 513, 64 * 1024 + 512, u32::MAX] {
            let mut bytes = header().encode().unwrap();
            bytes[8..12].copy_from_slice(&len.to_le_bytes());
            assert!(Header::decode(&bytes).is_err(), "length {len}");
        }
        let mut operation = encoded(&all_operations()[0]);
        operation[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(decoded(&operation).is_err());
        let long = SealedName { sealed: vec![1; MAX_SEALED_NAME + 1], ..name() };
        let long = Operation::Database { database: DatabaseId::from_bytes([1; 16]), name: long };
        assert!(long.encode(&mut Vec::new()).is_err());
        let mut bytes = encoded(&all_operations()[0]);
        bytes.resize(8 + 48 + MAX_SEALED_NAME + 1, 1);
        bytes[4..8].copy_from_slice(&u32::try_from(48 + MAX_SEALED_NAME + 1).unwrap().to_le_bytes());
        assert_eq!(decoded(&bytes), Err(Malformed("a sealed name is longer than 512 bytes").into()));
    }

    #[test]
    fn operations_of_unknown_kinds_are_refused_and_not_skipped() {
        for kind in (0..=255u8).filter(|kind| !(1..=10).contains(kind)) {
            let mut bytes = encoded(&all_operations()[0]);
            bytes[0] = kind;
            assert_eq!(decoded(&bytes), Err(Refused::UnknownOperation(kind)));
        }
        let mut bytes = header().encode().unwrap();
        bytes[7] = b'2';
        assert_eq!(Header::decode(&bytes), Err(Refused::UnknownVersion(b'2')));
    }

    #[test]
    fn a_key_in_the_wrong_place_is_refused() {
        let data = data_record(0xd2, 1);
        assert!(Operation::Probe(data.clone()).encode(&mut Vec::new()).is_err());
        assert!(Operation::Generation(cluster_record(Purpose::Probe)).encode(&mut Vec::new()).is_err());
        assert!(Header { record: data, ..header() }.encode().is_err());
        assert!(Operation::Wrapping(cluster_record(Purpose::Cluster)).encode(&mut Vec::new()).is_err());
        assert!(Header { whole: header().sequence - 1, ..header() }.encode().is_err());
        let mut swapped = encoded(&all_operations()[1]);
        swapped[0] = KIND_PROBE;
        assert!(decoded(&swapped).is_err());
    }

    #[test]
    fn only_an_external_owner_may_have_no_name() {
        for kind in [OwnerKind::PageFile, OwnerKind::Log, OwnerKind::Adapter] {
            let nameless = Operation::KeyUseAdd(KeyUse { kind, name: None, ..key_use() });
            assert!(nameless.encode(&mut Vec::new()).is_err(), "{kind:?}");
        }
        let external = Operation::KeyUseAdd(KeyUse { kind: OwnerKind::External, name: None, ..key_use() });
        assert_eq!(decoded(&encoded(&external)), Ok(external));
    }
}
