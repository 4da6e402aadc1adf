//! The input of every key derivation: one 48-byte block, its label first, so that no two uses can meet.

use crate::format::page::{SALT_LEN, Suite, generation_bytes};
use crate::ids::{ClusterId, Generation, SealId};

pub(crate) const LABEL_LEN: usize = 12;
/// One block: label, seal id, salt, generation and suite fill it with nothing left over.
pub(crate) const INFO_LEN: usize = 48;

/// What a derived key is for. Each purpose has its own label, so that one derived key is never another's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Label {
    /// Pages; parent: data key; salt: the session's.
    Page,
    /// Page-file header slots; parent: data key; salt: fresh for each write.
    Head,
    /// The public commitment to a data key; parent: data key; salt: 0.
    Check,
    /// The cluster id; parent: identity key; salt: 0, seal id 0.
    ClusterId,
    /// Keystore MACs; parent: identity key; salt: 0.
    KeystoreMac,
    /// Look-up of a name without storing it; parent: identity key; salt: 0.
    Name,
    /// Sealed names, and data keys under a cluster key; parent: cluster key; salt: fresh for each.
    Wrap,
    /// The public commitment to a cluster key; parent: cluster key; salt: 0.
    WrapCheck,
    /// The blob of a local key file; parent: the file's key; salt: fresh for each wrap.
    Local,
    /// The public version of a local key file; parent: the file's key; salt: 0.
    LocalVersion,
}

impl Label {
    #[cfg(test)]
    pub(crate) const ALL: [Self; 10] = [
        Self::Page,
        Self::Head,
        Self::Check,
        Self::ClusterId,
        Self::KeystoreMac,
        Self::Name,
        Self::Wrap,
        Self::WrapCheck,
        Self::Local,
        Self::LocalVersion,
    ];

    pub(crate) const fn bytes(self) -> &'static [u8; LABEL_LEN] {
        match self {
            Self::Page => b"pgseal1.page",
            Self::Head => b"pgseal1.head",
            Self::Check => b"pgseal1.chek",
            Self::ClusterId => b"pgseal1.clid",
            Self::KeystoreMac => b"pgseal1.kmac",
            Self::Name => b"pgseal1.name",
            Self::Wrap => b"pgseal1.wrap",
            Self::WrapCheck => b"pgseal1.wchk",
            Self::Local => b"pgseal1.locl",
            Self::LocalVersion => b"pgseal1.locv",
        }
    }
}

/// `label 12 | seal id 16 | salt 16 | generation u24 | suite u8`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Info(pub(crate) [u8; INFO_LEN]);

impl Info {
    /// For keys derived from a data key.
    pub(crate) fn data(
        label: Label,
        seal: SealId,
        salt: &[u8; SALT_LEN],
        generation: Generation,
        suite: Suite,
    ) -> Self {
        Self::encode(label, seal.to_bytes(), salt, generation_bytes(generation), suite.to_byte())
    }

    /// For keys derived from the identity key: generation 0, suite 0, which no data key has.
    pub(crate) fn identity(label: Label, cluster: ClusterId) -> Self {
        Self::encode(label, cluster.to_bytes(), &[0; SALT_LEN], [0; 3], 0)
    }

    /// For the cluster id itself, which is not known before.
    pub(crate) fn cluster_id() -> Self {
        Self::encode(Label::ClusterId, [0; 16], &[0; SALT_LEN], [0; 3], 0)
    }

    /// For keys derived from a cluster key: its own generation, suite 1.
    pub(crate) fn cluster_key(label: Label, cluster: ClusterId, salt: &[u8; SALT_LEN], generation: Generation) -> Self {
        Self::encode(label, cluster.to_bytes(), salt, generation_bytes(generation), Suite::Aes256Gcm.to_byte())
    }

    /// For keys derived from a local key file: no cluster, so that its version is the same for all.
    pub(crate) fn local(label: Label, salt: &[u8; SALT_LEN]) -> Self {
        Self::encode(label, [0; 16], salt, [0; 3], Suite::Aes256Gcm.to_byte())
    }

    fn encode(label: Label, id: [u8; 16], salt: &[u8; SALT_LEN], generation: [u8; 3], suite: u8) -> Self {
        let mut bytes = [0; INFO_LEN];
        bytes[..12].copy_from_slice(label.bytes());
        bytes[12..28].copy_from_slice(&id);
        bytes[28..44].copy_from_slice(salt);
        bytes[44..47].copy_from_slice(&generation);
        bytes[47] = suite;
        Self(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_pairwise_distinct() {
        for (i, a) in Label::ALL.iter().enumerate() {
            for b in &Label::ALL[i + 1..] {
                assert_ne!(a.bytes(), b.bytes());
            }
        }
    }

    /// `text | seal id | salt | generation | suite`, written out by hand.
    fn golden(text: &[u8; 12], id: u8, salt: u8, generation: [u8; 3], suite: u8) -> Vec<u8> {
        let mut out = text.to_vec();
        out.extend([id; 16]);
        out.extend([salt; 16]);
        out.extend(generation);
        out.push(suite);
        out
    }

    #[test]
    fn golden_info_of_every_label() {
        let seal = SealId::from_bytes([0xa1; 16]);
        let cluster = ClusterId::from_bytes([0xc1; 16]);
        let generation = Generation::new(0x0004_0302).unwrap();
        let data = |label, salt: u8| Info::data(label, seal, &[salt; 16], generation, Suite::Aegis256X2).0;
        assert_eq!(data(Label::Page, 5)[..], golden(b"pgseal1.page", 0xa1, 5, [2, 3, 4], 3));
        assert_eq!(data(Label::Head, 6)[..], golden(b"pgseal1.head", 0xa1, 6, [2, 3, 4], 3));
        assert_eq!(data(Label::Check, 0)[..], golden(b"pgseal1.chek", 0xa1, 0, [2, 3, 4], 3));
        assert_eq!(Info::cluster_id().0[..], golden(b"pgseal1.clid", 0, 0, [0; 3], 0));
        assert_eq!(Info::identity(Label::KeystoreMac, cluster).0[..], golden(b"pgseal1.kmac", 0xc1, 0, [0; 3], 0));
        assert_eq!(Info::identity(Label::Name, cluster).0[..], golden(b"pgseal1.name", 0xc1, 0, [0; 3], 0));
        let wrap = |label, salt: u8| Info::cluster_key(label, cluster, &[salt; 16], generation).0;
        assert_eq!(wrap(Label::Wrap, 7)[..], golden(b"pgseal1.wrap", 0xc1, 7, [2, 3, 4], 1));
        assert_eq!(wrap(Label::WrapCheck, 0)[..], golden(b"pgseal1.wchk", 0xc1, 0, [2, 3, 4], 1));
        assert_eq!(Info::local(Label::Local, &[8; 16]).0[..], golden(b"pgseal1.locl", 0, 8, [0; 3], 1));
        assert_eq!(Info::local(Label::LocalVersion, &[0; 16]).0[..], golden(b"pgseal1.locv", 0, 0, [0; 3], 1));
    }
}
