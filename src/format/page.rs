//! A sealed page: its trailer, and the associated data that binds it to its place.

use crate::format::reader::{Malformed, Reader};
use crate::ids::{FileId, Generation};

/// How many bytes longer a sealed page is than its payload. Always the same, whatever the suite, and known without a key.
pub const OVERHEAD: usize = 48;

/// The longest payload of one page, 16 MiB. It keeps a session's byte count exact and a single call short.
pub const MAX_PAYLOAD: usize = 1 << 24;

pub(crate) const TAG_LEN: usize = 16;
pub(crate) const NONCE_LEN: usize = 12;
pub(crate) const SALT_LEN: usize = 16;
/// Salt, generation and suite: what names a subkey inside one database. The trailer ends with these bytes.
pub(crate) const SUBKEY_NAME_LEN: usize = SALT_LEN + 3 + 1;
pub(crate) const AAD_LEN: usize = 32;

const _: () = assert!(TAG_LEN + NONCE_LEN + SUBKEY_NAME_LEN == OVERHEAD);

const FLAG_LOCATED: u64 = 1;
const FLAG_VERSIONED: u64 = 2;

/// The algorithm that seals the pages of a generation. Names an algorithm, not a library.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
#[repr(u8)]
pub enum Suite {
    /// AES-256-GCM (NIST SP 800-38D). The default.
    Aes256Gcm = 1,
    /// ChaCha20-Poly1305 (RFC 8439), for machines without AES hardware.
    ChaCha20Poly1305 = 2,
    /// AEGIS-256X2 (draft-irtf-cfrg-aegis-aead) with a 128-bit tag. Feature `aegis`; needs AES hardware; not for FIPS.
    Aegis256X2 = 3,
}

impl Suite {
    /// The suite with this number on disk, if this version knows it.
    pub const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Aes256Gcm),
            2 => Some(Self::ChaCha20Poly1305),
            3 => Some(Self::Aegis256X2),
            _ => None,
        }
    }

    /// The suite's number on disk.
    pub const fn to_byte(self) -> u8 {
        self as u8
    }
}

/// Where a page lies. Bound into the page: it opens nowhere else.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum Location {
    /// Page `page` of file `file`.
    Page {
        /// The file; never reused within a database.
        file: FileId,
        /// The page's number in the file.
        page: u64,
    },
    /// For engine hooks that cannot know where the page will lie. Such a page can be moved unnoticed within its database.
    /// Not the same as page 0 of file 0.
    Unbound,
}

/// What a page is bound to, besides its key. The same context must be given to open it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub struct PageContext {
    /// Where the page lies.
    pub location: Location,
    /// The engine's version of the page (an LSN), if it keeps one where an attacker cannot change it. With a version, an
    /// older image of the same page is refused; without, it is not.
    pub version: Option<u64>,
}

impl PageContext {
    /// Page `page` of file `file`, without a version.
    pub const fn page(file: FileId, page: u64) -> Self {
        Self { location: Location::Page { file, page }, version: None }
    }

    /// A page whose location is unknown; see [`Location::Unbound`].
    pub const fn unbound() -> Self {
        Self { location: Location::Unbound, version: None }
    }

    /// The same place, bound to this version.
    pub const fn with_version(self, version: u64) -> Self {
        Self { location: self.location, version: Some(version) }
    }

    /// `file u64 | page u64 | version u64 | flags u64`. The flags tell "unbound" from (0, 0) and "no version" from 0.
    #[inline]
    pub(crate) fn associated_data(&self) -> [u8; AAD_LEN] {
        let (file, page, located) = match self.location {
            Location::Page { file, page } => (file.get(), page, FLAG_LOCATED),
            Location::Unbound => (0, 0, 0),
        };
        let (version, versioned) = match self.version {
            Some(version) => (version, FLAG_VERSIONED),
            None => (0, 0),
        };
        let mut aad = [0; AAD_LEN];
        aad[..8].copy_from_slice(&file.to_le_bytes());
        aad[8..16].copy_from_slice(&page.to_le_bytes());
        aad[16..24].copy_from_slice(&version.to_le_bytes());
        aad[24..].copy_from_slice(&(located | versioned).to_le_bytes());
        aad
    }
}

/// The last 48 bytes of a sealed page: `tag 16 | nonce 12 | salt 16 | generation u24 | suite u8`.
///
/// None of it is secret. Everything but the tag is authenticated by the tag: the nonce enters the cipher, salt, generation
/// and suite enter the derivation of the subkey.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Trailer(pub [u8; OVERHEAD]);

impl Trailer {
    #[inline]
    pub(crate) fn new(tag: &[u8; TAG_LEN], nonce: &[u8; NONCE_LEN], name: &SubkeyName) -> Self {
        let mut bytes = [0; OVERHEAD];
        bytes[..16].copy_from_slice(tag);
        bytes[16..28].copy_from_slice(nonce);
        bytes[28..].copy_from_slice(&name.0);
        Self(bytes)
    }

    #[inline]
    pub(crate) fn tag(&self) -> [u8; TAG_LEN] {
        sub_array(&self.0, 0)
    }

    #[inline]
    pub(crate) fn nonce(&self) -> [u8; NONCE_LEN] {
        sub_array(&self.0, TAG_LEN)
    }

    #[inline]
    pub(crate) fn subkey_name(&self) -> SubkeyName {
        SubkeyName(sub_array(&self.0, TAG_LEN + NONCE_LEN))
    }

    /// The data key generation that the page says it was sealed under; `None` if it is 0, which no page has. Not
    /// authenticated until the page opens.
    pub fn generation(&self) -> Option<Generation> {
        self.subkey_name().generation()
    }

    /// The suite that the page says it was sealed with, if known. Not authenticated until the page opens.
    pub fn suite(&self) -> Option<Suite> {
        self.subkey_name().suite()
    }
}

impl std::fmt::Debug for Trailer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trailer")
            .field("generation", &self.generation())
            .field("suite", &self.suite())
            .finish_non_exhaustive()
    }
}

/// `salt 16 | generation u24 | suite u8`: names a subkey inside one database.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct SubkeyName(pub(crate) [u8; SUBKEY_NAME_LEN]);

impl SubkeyName {
    pub(crate) fn new(salt: &[u8; SALT_LEN], generation: Generation, suite: Suite) -> Self {
        let mut bytes = [0; SUBKEY_NAME_LEN];
        bytes[..16].copy_from_slice(salt);
        bytes[16..19].copy_from_slice(&generation_bytes(generation));
        bytes[19] = suite.to_byte();
        Self(bytes)
    }

    pub(crate) fn salt(&self) -> [u8; SALT_LEN] {
        sub_array(&self.0, 0)
    }

    /// The two halves of the salt as numbers, to place the subkey in a table by.
    #[inline]
    pub(crate) fn halves(&self) -> (u64, u64) {
        (u64::from_le_bytes(sub_array(&self.0, 0)), u64::from_le_bytes(sub_array(&self.0, 8)))
    }

    pub(crate) fn generation(&self) -> Option<Generation> {
        let [a, b, c] = sub_array(&self.0, SALT_LEN);
        Generation::new(u32::from_le_bytes([a, b, c, 0]))
    }

    pub(crate) fn suite(&self) -> Option<Suite> {
        Suite::from_byte(self.0[19])
    }
}

/// A generation as the u24 that pages, records and derivations carry.
pub(crate) fn generation_bytes(generation: Generation) -> [u8; 3] {
    let [a, b, c, _] = generation.get().to_le_bytes();
    [a, b, c]
}

/// Reads a u24 generation and refuses 0.
pub(crate) fn read_generation(reader: &mut Reader<'_>) -> Result<Generation, Malformed> {
    Generation::new(reader.u24()?).ok_or(Malformed("its generation is 0"))
}

/// The `N` bytes of `bytes` at `at`; both are constants, within the array.
#[inline]
fn sub_array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_trailer_bytes() {
        let name = SubkeyName::new(&[0x22; 16], Generation::new(0x0003_0201).unwrap(), Suite::ChaCha20Poly1305);
        let trailer = Trailer::new(&[0x11; 16], b"nonce-bytes!", &name);
        let mut golden = [0u8; 48];
        golden[..16].fill(0x11);
        golden[16..28].copy_from_slice(b"nonce-bytes!");
        golden[28..44].fill(0x22);
        golden[44..].copy_from_slice(&[1, 2, 3, 2]);
        assert_eq!(trailer.0, golden);
        assert_eq!(trailer.generation().map(Generation::get), Some(0x0003_0201));
        assert_eq!(trailer.suite(), Some(Suite::ChaCha20Poly1305));
        assert_eq!(trailer.tag(), [0x11; 16]);
        assert_eq!(&trailer.nonce(), b"nonce-bytes!");
        assert_eq!(trailer.subkey_name().salt(), [0x22; 16]);
    }

    #[test]
    fn golden_associated_data_bytes() {
        let context = PageContext::page(FileId::new(0x0102_0304_0506_0708), 0x1112_1314_1516_1718).with_version(0x2122);
        let golden = [
            8, 7, 6, 5, 4, 3, 2, 1, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11, 0x22, 0x21, 0, 0, 0, 0, 0, 0, 3, 0,
            0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(context.associated_data(), golden);
    }

    #[test]
    fn unbound_and_unversioned_differ_from_zero() {
        let zero = PageContext::page(FileId::new(0), 0);
        let all = [zero, zero.with_version(0), PageContext::unbound(), PageContext::unbound().with_version(0)];
        for (i, a) in all.iter().enumerate() {
            for b in &all[i + 1..] {
                assert_ne!(a.associated_data(), b.associated_data(), "{a:?} {b:?}");
            }
        }
    }

    #[test]
    fn only_suites_one_to_three_exist() {
        for byte in 0..=255 {
            assert_eq!(Suite::from_byte(byte).map(Suite::to_byte), (1..=3).contains(&byte).then_some(byte));
        }
    }
}
