//! Files of sealed pages.

pub(crate) mod disk;
pub(crate) mod map;
pub(crate) mod page_file;
