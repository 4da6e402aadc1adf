//! Files of sealed pages.

pub(crate) mod appender;
pub(crate) mod disk;
pub(crate) mod locks;
pub(crate) mod map;
mod ofd;
pub(crate) mod page_file;
pub(crate) mod place;
