//! The keys that a running cluster has of its own, all out of one wrapped payload: the cluster key, and what is derived from
//! the identity key. While the cluster is disabled there are none.

use std::time::Instant;

use crate::aead::{HmacKey, derive_key};
use crate::env::Env;
use crate::error::{Error, ErrorKind, KmsClass, Result};
use crate::format::derive::{Info, Label};
use crate::format::record::Record;
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, Generation, MasterKeyId};
use crate::keys::names::NameKeys;
use crate::keys::payload;
use crate::keys::wrapper::{WrapContext, WrappedKey};
use crate::kms::envelope::{WrappingKey, open_payload, seal_payload};
use crate::secret::{KeyPayload, SecretKey};

/// The provider under which a record names a wrapping by the cluster key. No `KeyWrapper` may call itself so.
pub(crate) const CLUSTER_KEY_PROVIDER: &str = "pageseal";
const CLUSTER_KEY: &str = "cluster-key";

/// Whether a wrapping was made by a cluster key, and not by a master key.
pub(crate) fn is_by_cluster_key(key: &WrappedKey) -> bool {
    key.master_key.provider == CLUSTER_KEY_PROVIDER
}

/// A cluster's own keys.
pub(crate) struct RootKeys {
    pub(crate) names: NameKeys,
    pub(crate) mac: HmacKey,
}

impl RootKeys {
    /// Derives them. `generation` is the cluster key's.
    pub(crate) fn new(
        cluster: ClusterId,
        generation: Generation,
        cluster_key: SecretKey,
        identity: &SecretKey,
    ) -> Result<Self> {
        let look_up = derive_key(identity, &Info::identity(Label::Name, cluster))?;
        let mac = HmacKey::new(&derive_key(identity, &Info::identity(Label::KeystoreMac, cluster))?)?;
        Ok(Self { names: NameKeys { cluster, look_up, cluster_key, generation }, mac })
    }

    /// Takes them out of the unwrapped payload of a cluster record.
    ///
    /// # Errors
    /// [`ErrorKind::WrongIdentity`], [`ErrorKind::Authentication`] or [`ErrorKind::Damaged`] if it is another payload than the record says.
    pub(crate) fn accept(payload: &KeyPayload, record: &Record, cluster: ClusterId) -> Result<Self> {
        let (cluster_key, identity) = payload::accept_cluster(payload, record, cluster)?;
        Self::new(cluster, record.generation, cluster_key, &identity)
    }

    /// The generation of the cluster key.
    pub(crate) fn generation(&self) -> Generation {
        self.names.generation
    }

    /// Wraps a data key's payload under the cluster key, and sees that it comes out again: it may be its only wrapping.
    pub(crate) fn wrap(
        &self,
        env: &Env,
        payload: &KeyPayload,
        database: DatabaseId,
        generation: Generation,
    ) -> Result<WrappedKey> {
        let blob = seal_payload(self.wrapping_key(), env, payload, &self.context(database, generation));
        let blob = blob.map_err(|error| own_failure(error.class, database, generation))?;
        let opened = open_payload(self.wrapping_key(), &blob, &self.context(database, generation))
            .map_err(|error| own_failure(error.class, database, generation))?;
        if !payload::are_same(payload, &opened)? {
            let what = format!("data key {generation} of database {database} does not come out as it was wrapped");
            return Err(Error::damaged(format!("{what}: nothing was changed; check this machine")));
        }
        Ok(WrappedKey { master_key: own_id(), key_version: self.generation().to_string(), blob })
    }

    /// Unwraps a data key's payload from the wrapping that this cluster key made.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`] if there is none; [`ErrorKind::InUse`] if another cluster key made it; [`ErrorKind::BadCiphertext`] if it does not open.
    pub(crate) fn unwrap(&self, record: &Record) -> Result<KeyPayload> {
        let own = (own_id(), self.generation().to_string());
        let wrapping = record.wrappings.iter().find(|key| (&key.master_key, &key.key_version) == (&own.0, &own.1));
        let wrapping = wrapping.ok_or_else(|| self.does_not_wrap(record))?;
        let context = self.context(record.database, record.generation);
        open_payload(self.wrapping_key(), &wrapping.blob, &context)
            .map_err(|error| own_failure(error.class, record.database, record.generation))
    }

    /// Whether a record that was wrapped by a cluster key was wrapped by this one.
    pub(crate) fn still_wraps(&self, record: &Record) -> bool {
        let current = self.generation().to_string();
        record.wrappings.iter().filter(|key| is_by_cluster_key(key)).all(|key| key.key_version == current)
    }

    fn does_not_wrap(&self, record: &Record) -> Error {
        let what = format!(
            "data key {} of database {} is not wrapped by cluster key {}",
            record.generation,
            record.database,
            self.generation()
        );
        match record.wrappings.iter().find(|key| is_by_cluster_key(key)) {
            Some(other) => {
                let message = format!("{what}, but by {}, which replaced it meanwhile; try again", other.key_version);
                Error::new(ErrorKind::InUse, message)
            }
            None => Error::damaged(format!("{what}; restore the keystore from a copy")),
        }
    }

    fn wrapping_key(&self) -> WrappingKey<'_> {
        WrappingKey::Cluster(&self.names.cluster_key, self.names.cluster, self.generation())
    }

    fn context(&self, database: DatabaseId, generation: Generation) -> WrapContext<'static> {
        WrapContext {
            cluster: self.names.cluster,
            database: Some(database),
            generation,
            purpose: Purpose::Data,
            // Nobody is waited for: the cluster key is here.
            deadline: Instant::now(),
            label: "",
        }
    }
}

fn own_id() -> MasterKeyId {
    MasterKeyId::new(CLUSTER_KEY_PROVIDER, CLUSTER_KEY)
}

fn own_failure(class: KmsClass, database: DatabaseId, generation: Generation) -> Error {
    let what = format!("data key {generation} of database {database} under the cluster key");
    match class {
        KmsClass::BadCiphertext => Error::new(
            ErrorKind::BadCiphertext,
            format!("{what} does not open: the record was tampered with; restore the keystore"),
        ),
        _ => Error::new(ErrorKind::Resources, format!("{what}: no locked memory or no random bytes are left")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::tests::data_record;
    use crate::keys::calls::fixtures::payload;

    const CLUSTER: ClusterId = ClusterId::from_bytes([0xc1; 16]);

    fn key(byte: u8) -> SecretKey {
        SecretKey::fill_with(|out| {
            out.fill(byte);
            Ok::<(), Error>(())
        })
        .unwrap()
    }

    fn generation(number: u32) -> Generation {
        Generation::new(number).unwrap()
    }

    fn root_of(cluster: ClusterId, number: u32, cluster_key: u8) -> RootKeys {
        RootKeys::new(cluster, generation(number), key(cluster_key), &key(5)).unwrap()
    }

    fn root() -> RootKeys {
        root_of(CLUSTER, 3, 4)
    }

    /// The record of data key 2 of database 1, wrapped by [`root`].
    fn record() -> Record {
        let mut record = data_record(1, 2);
        record.wrappings =
            vec![root().wrap(&Env::system(), &payload(0x5a), record.database, record.generation).unwrap()];
        record
    }

    fn kind(root: &RootKeys, record: &Record) -> ErrorKind {
        root.unwrap(record).err().expect("this must be refused").kind()
    }

    fn bytes(payload: &KeyPayload) -> Vec<u8> {
        payload.with_bytes(|bytes| bytes.to_vec()).unwrap()
    }

    #[test]
    fn a_data_key_comes_back_from_under_the_cluster_key_and_no_wrapping_is_like_another() {
        let record = record();
        assert_eq!(bytes(&root().unwrap(&record).unwrap()), bytes(&payload(0x5a)));
        assert_ne!(record.wrappings[0].blob, self::record().wrappings[0].blob);
        assert!(is_by_cluster_key(&record.wrappings[0]));
        assert_eq!(record.wrappings[0].key_version, "3");
    }

    #[test]
    fn a_wrapping_is_bound_to_its_database_generation_cluster_and_cluster_key() {
        let record = record();
        let other = Record { database: DatabaseId::from_bytes([2; 16]), ..record.clone() };
        assert_eq!(kind(&root(), &other), ErrorKind::BadCiphertext);
        let other = Record { generation: generation(3), ..record.clone() };
        assert_eq!(kind(&root(), &other), ErrorKind::BadCiphertext);
        assert_eq!(kind(&root_of(ClusterId::from_bytes([0xc2; 16]), 3, 4), &record), ErrorKind::BadCiphertext);
        assert_eq!(kind(&root_of(CLUSTER, 3, 6), &record), ErrorKind::BadCiphertext);
        // Renamed to be of another cluster key, it does not open under that either, be the key the same.
        let mut renamed = record;
        renamed.wrappings[0].key_version = "4".into();
        assert_eq!(kind(&root_of(CLUSTER, 4, 4), &renamed), ErrorKind::BadCiphertext);
    }

    #[test]
    fn any_changed_byte_of_a_wrapping_is_refused() {
        let record = record();
        for at in 0..record.wrappings[0].blob.len() {
            let mut changed = record.clone();
            changed.wrappings[0].blob[at] ^= 1;
            assert_eq!(kind(&root(), &changed), ErrorKind::BadCiphertext, "byte {at}");
        }
        let mut cut = record;
        cut.wrappings[0].blob.pop();
        assert_eq!(kind(&root(), &cut), ErrorKind::BadCiphertext);
    }

    #[test]
    fn a_record_without_a_wrapping_by_a_cluster_key_is_damage_and_other_wrappings_are_passed_over() {
        let record = record();
        assert_eq!(kind(&root(), &data_record(1, 2)), ErrorKind::Damaged);
        assert_eq!(kind(&root_of(CLUSTER, 4, 4), &record), ErrorKind::InUse, "another cluster key made it: try again");
        // While it is moved from one cluster key or hierarchy to another, a record has several.
        let mut several = record;
        let next = root_of(CLUSTER, 4, 9);
        let moved = next.wrap(&Env::system(), &payload(0x5b), several.database, several.generation).unwrap();
        several.wrappings.extend([data_record(1, 2).wrappings[0].clone(), moved]);
        several.wrappings.rotate_left(1);
        assert_eq!(bytes(&root().unwrap(&several).unwrap()), bytes(&payload(0x5a)));
        assert_eq!(bytes(&next.unwrap(&several).unwrap()), bytes(&payload(0x5b)));
    }

    #[test]
    fn a_record_says_whether_a_cluster_key_before_this_one_wrapped_it() {
        let record = record();
        assert!(root().still_wraps(&record) && !root_of(CLUSTER, 4, 4).still_wraps(&record));
        assert!(root().still_wraps(&data_record(1, 2)), "a master key wrapped it, and no cluster key");
    }

    #[test]
    fn the_keys_of_a_cluster_come_from_its_identity_and_are_no_other_clusters() {
        let tag = |root: &RootKeys| root.mac.with(|hmac| hmac.sign(&[b"the same"])).unwrap();
        let look_up = |root: &RootKeys| root.names.look_up(&[0; 16], "the same").unwrap();
        let same = root_of(CLUSTER, 4, 9);
        // A new cluster key changes neither: they come out of the identity key, which never changes.
        assert_eq!((tag(&root()), look_up(&root())), (tag(&same), look_up(&same)));
        let other_cluster = root_of(ClusterId::from_bytes([0xc2; 16]), 3, 4);
        let other_identity = RootKeys::new(CLUSTER, generation(3), key(4), &key(6)).unwrap();
        for other in [other_cluster, other_identity] {
            assert_ne!(tag(&root()), tag(&other));
            assert_ne!(look_up(&root()), look_up(&other));
        }
    }

    #[test]
    fn a_cluster_record_gives_the_keys_of_its_own_cluster_only() {
        let identity = key(5);
        let cluster = payload::cluster_id(&identity).unwrap();
        let wrapped = payload::cluster_payload(&key(4), &identity, cluster, generation(3)).unwrap();
        let commitment = payload::cluster_commitment(&key(4), cluster, generation(3)).unwrap();
        let record = Record {
            database: DatabaseId::from_bytes([0; 16]),
            purpose: Purpose::Cluster,
            generation: generation(3),
            commitment,
            ..data_record(1, 1)
        };
        let accepted = RootKeys::accept(&wrapped, &record, cluster).unwrap();
        assert_eq!((accepted.generation(), accepted.names.cluster), (generation(3), cluster));
        let refused = |record: &Record, cluster| RootKeys::accept(&wrapped, record, cluster).err().map(|e| e.kind());
        assert_eq!(refused(&record, CLUSTER), Some(ErrorKind::WrongIdentity));
        let other = Record { generation: generation(4), ..record.clone() };
        assert_eq!(refused(&other, cluster), Some(ErrorKind::WrongIdentity));
        let other = Record { commitment: [0; 32], ..record };
        assert_eq!(refused(&other, cluster), Some(ErrorKind::Authentication));
    }
}
