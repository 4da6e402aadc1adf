//! Identifiers. Every id is a newtype, so that a page number is never taken for a file id.

use std::fmt;

/// Declares a random 128-bit identifier, shown as 32 hex digits.
macro_rules! id128 {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name([u8; 16]);

        impl $name {
            /// The identifier with these 16 bytes.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(bytes)
            }

            /// The 16 bytes, as they are stored.
            pub const fn to_bytes(self) -> [u8; 16] {
                self.0
            }

            /// Reads 32 hex digits, the form that `Display` writes; `None` for anything else.
            pub fn from_hex(text: &str) -> Option<Self> {
                parse_hex16(text).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }
    };
}

id128! {
    /// Names a cluster. Derived from the cluster's identity key, so it cannot be claimed by another keystore.
    ClusterId
}

id128! {
    /// Names a database in the keystore and on disk. Random, kept when the database is renamed.
    DatabaseId
}

id128! {
    /// Drawn with each data key and bound into every subkey derived from it: pages belong to the key that was made for
    /// them, whatever the catalogue calls the database.
    SealId
}

/// Names a file inside a database. Random, never reused: a page of a deleted file cannot return in a new one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(u64);

impl FileId {
    /// The file id with this value. An engine with its own file numbers may use them, if it never reuses one.
    pub const fn new(id: u64) -> Self {
        Self(id)
    }

    /// The value, as it is bound into each page.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileId({self})")
    }
}

/// Counts the data keys of a database: 1 for the first, one more at each rotation. 24 bits, because each page carries it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Generation(u32);

impl Generation {
    /// The generation that a new database starts with.
    pub const FIRST: Self = Self(1);
    /// The last generation that fits a page's trailer.
    pub const MAX: Self = Self((1 << 24) - 1);

    /// The generation with this number; `None` for 0 and for numbers above [`Generation::MAX`].
    pub const fn new(number: u32) -> Option<Self> {
        if number == 0 || number > Self::MAX.0 { None } else { Some(Self(number)) }
    }

    /// The number, 1 to 2^24 - 1.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Names a master key: which provider holds it, and its name there. Not a secret; it is stored beside each wrapped key.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct MasterKeyId {
    /// The provider, for example `local` or `aws-kms`. At most 255 bytes.
    pub provider: String,
    /// The key's name at the provider, without its version. At most 1,024 bytes.
    pub key: String,
}

impl MasterKeyId {
    /// The master key that `provider` knows as `key`.
    pub fn new(provider: impl Into<String>, key: impl Into<String>) -> Self {
        Self { provider: provider.into(), key: key.into() }
    }
}

impl fmt::Display for MasterKeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.provider, self.key)
    }
}

fn parse_hex16(text: &str) -> Option<[u8; 16]> {
    let digits = text.as_bytes();
    if digits.len() != 32 {
        return None;
    }
    let mut out = [0; 16];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        let high = char::from(pair[0]).to_digit(16)?;
        let low = char::from(pair[1]).to_digit(16)?;
        *byte = u8::try_from(high << 4 | low).ok()?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_from_what_it_shows() {
        let id = ClusterId::from_bytes(*b"\x00\x01\x7f\x80\xff\xfe6789abcdef");
        assert_eq!(ClusterId::from_hex(&id.to_string()), Some(id));
        for wrong in ["", "0", "g0000000000000000000000000000000", "000000000000000000000000000000000"] {
            assert_eq!(ClusterId::from_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn generation_zero_and_more_than_24_bits_do_not_exist() {
        assert_eq!(Generation::new(0), None);
        assert_eq!(Generation::new(1 << 24), None);
        assert_eq!(Generation::new((1 << 24) - 1), Some(Generation::MAX));
        assert_eq!(Generation::new(1), Some(Generation::FIRST));
    }
}
