//! The bytes on disk, and nothing else: no I/O, no keys. `docs/FORMAT.md` is their description; this is its other half.
//!
//! Everything is little-endian. Lengths are bounded before anything is read by them, and unused bytes are checked to be zero.

pub(crate) mod derive;
pub(crate) mod file_header;
pub(crate) mod group;
pub(crate) mod keystore;
pub(crate) mod page;
pub(crate) mod reader;
pub(crate) mod record;
pub(crate) mod wrapped;
