//! Key payloads: making the 128 bytes that a master key wraps, and accepting those that it unwrapped.
//!
//! Nothing of an unwrapped payload is used before its commitment and its public half were compared with the record: a wrong
//! key, a swapped record and a tampered record are three different errors.

use crate::aead::{constant_time_eq, derive_public};
use crate::env::Env;
use crate::error::{Error, ErrorKind, Result};
use crate::format::derive::{Info, Label};
use crate::format::page::{SALT_LEN, Suite};
use crate::format::record::Record;
use crate::format::wrapped::{PAYLOAD_KEY_AT, PAYLOAD_SECOND_AT, PayloadHead, Purpose};
use crate::ids::{ClusterId, DatabaseId, Generation, SealId};
use crate::keys::keyring::DataKey;
use crate::secret::{KeyPayload, SecretKey};

const NO_DATABASE: DatabaseId = DatabaseId::from_bytes([0; 16]);
const NO_SEAL: SealId = SealId::from_bytes([0; 16]);

/// Draws a new key into locked memory.
pub(crate) fn random_key(env: &Env) -> Result<SecretKey> {
    SecretKey::fill_with(|out| env.entropy.fill(out).map_err(Error::from))
}

/// The id of the cluster that this identity key makes.
pub(crate) fn cluster_id(identity: &SecretKey) -> Result<ClusterId> {
    let derived = derive_public(identity, &Info::cluster_id())?;
    let (id, _) = derived.split_first_chunk().expect("32 bytes begin with 16");
    Ok(ClusterId::from_bytes(*id))
}

/// The commitment to a data key: public, and different for every other key, so that no ciphertext opens under two.
pub(crate) fn data_commitment(key: &DataKey) -> Result<[u8; 32]> {
    let info = Info::data(Label::Check, key.seal, &[0; SALT_LEN], key.generation, key.suite);
    derive_public(&key.key, &info)
}

/// The commitment to a cluster key.
pub(crate) fn cluster_commitment(key: &SecretKey, cluster: ClusterId, generation: Generation) -> Result<[u8; 32]> {
    derive_public(key, &Info::cluster_key(Label::WrapCheck, cluster, &[0; SALT_LEN], generation))
}

/// The payload of a data key, its commitment beside it.
pub(crate) fn data_payload(
    key: &DataKey,
    cluster: ClusterId,
    database: DatabaseId,
    commitment: &[u8; 32],
) -> Result<KeyPayload> {
    let head = PayloadHead {
        purpose: Purpose::Data,
        suite: key.suite,
        generation: key.generation,
        cluster,
        database,
        seal: key.seal,
    };
    key.key.with(|secret| payload(&head, secret, commitment))?
}

/// The payload of a cluster key, the identity key beside it.
pub(crate) fn cluster_payload(
    key: &SecretKey,
    identity: &SecretKey,
    cluster: ClusterId,
    generation: Generation,
) -> Result<KeyPayload> {
    let head = keyless_head(Purpose::Cluster, cluster, generation);
    key.with(|key| identity.with(|identity| payload(&head, key, identity)))??
}

/// The payload of a probe: a random key that protects nothing.
pub(crate) fn probe_payload(env: &Env, cluster: ClusterId) -> Result<KeyPayload> {
    let key = random_key(env)?;
    key.with(|key| payload(&keyless_head(Purpose::Probe, cluster, Generation::FIRST), key, &[0; 32]))?
}

/// Takes a data key out of its unwrapped payload, if it is the one that the record commits to.
pub(crate) fn accept_data(payload: &KeyPayload, record: &Record, cluster: ClusterId) -> Result<DataKey> {
    let expected = PayloadHead {
        purpose: Purpose::Data,
        suite: record.suite,
        generation: record.generation,
        cluster,
        database: record.database,
        seal: record.seal,
    };
    let what = format!("the data key, generation {}, of database {}", record.generation, record.database);
    check_head(payload, &expected, &what)?;
    let key = DataKey { generation: record.generation, suite: record.suite, seal: record.seal, key: payload.key()? };
    check_commitment(&data_commitment(&key)?, &record.commitment, &what)?;
    let beside = payload.second()?;
    beside.with(|beside| check_commitment(beside, &record.commitment, &what))??;
    Ok(key)
}

/// Takes the cluster key and the identity key out of their unwrapped payload, if they are this cluster's.
pub(crate) fn accept_cluster(
    payload: &KeyPayload,
    record: &Record,
    cluster: ClusterId,
) -> Result<(SecretKey, SecretKey)> {
    let what = format!("the cluster key of cluster {cluster}");
    check_head(payload, &keyless_head(Purpose::Cluster, cluster, record.generation), &what)?;
    let (key, identity) = (payload.key()?, payload.second()?);
    if cluster_id(&identity)? != cluster {
        return Err(Error::new(ErrorKind::WrongIdentity, format!("the keystore does not belong to cluster {cluster}")));
    }
    check_commitment(&cluster_commitment(&key, cluster, record.generation)?, &record.commitment, &what)?;
    Ok((key, identity))
}

/// Whether this is a probe of the cluster. What key it holds does not matter.
pub(crate) fn accept_probe(payload: &KeyPayload, cluster: ClusterId) -> Result<()> {
    check_head(payload, &keyless_head(Purpose::Probe, cluster, Generation::FIRST), "a probe")
}

fn keyless_head(purpose: Purpose, cluster: ClusterId, generation: Generation) -> PayloadHead {
    PayloadHead { purpose, suite: Suite::Aes256Gcm, generation, cluster, database: NO_DATABASE, seal: NO_SEAL }
}

fn payload(head: &PayloadHead, key: &[u8; 32], second: &[u8; 32]) -> Result<KeyPayload> {
    KeyPayload::fill_with(|out| {
        out[..PAYLOAD_KEY_AT].copy_from_slice(&head.encode());
        out[PAYLOAD_KEY_AT..PAYLOAD_SECOND_AT].copy_from_slice(key);
        out[PAYLOAD_SECOND_AT..].copy_from_slice(second);
    })
}

/// Compares the public half of what was unwrapped with what the record promised.
fn check_head(payload: &KeyPayload, expected: &PayloadHead, what: &str) -> Result<()> {
    let head = payload.with_bytes(|bytes| PayloadHead::decode(&bytes[..PAYLOAD_KEY_AT]))?;
    let head = head.map_err(|why| Error::damaged(format!("unwrapping {what}: {}", why.0)))?;
    if head == *expected {
        return Ok(());
    }
    let message = format!(
        "unwrapping {what} gave generation {} of database {} in cluster {}: the record was swapped; restore the keystore",
        head.generation, head.database, head.cluster
    );
    Err(Error::new(ErrorKind::WrongIdentity, message))
}

fn check_commitment(derived: &[u8; 32], recorded: &[u8; 32], what: &str) -> Result<()> {
    if constant_time_eq(derived, recorded) {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Authentication,
        format!("{what} is not the key that its record commits to: the record was tampered with; restore the keystore"),
    ))
}

/// Whether two payloads are the same, in a time that does not tell where they differ.
pub(crate) fn are_same(a: &KeyPayload, b: &KeyPayload) -> Result<bool> {
    a.with_bytes(|a| b.with_bytes(|b| constant_time_eq(a, b)))?
}
