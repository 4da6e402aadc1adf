//! A file mapped for reading. Bytes are copied out and never borrowed, so that another process writing to the file can
//! change what is copied, which authentication notices, but not what the compiler believes of a `&[u8]`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{MmapOptions, MmapRaw};

pub(crate) struct ReadMap {
    map: MmapRaw,
    len: usize,
}

impl ReadMap {
    /// Maps the first `len` bytes of `file`, which must have them: touching a page behind the end of a file kills the
    /// process with SIGBUS. A file that another process truncates later has that effect too; see SECURITY.md.
    pub(crate) fn new(file: &File, len: usize) -> io::Result<Self> {
        let there = file.metadata()?.len();
        if there < len as u64 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("the file has {there} bytes, {len} are needed"),
            ));
        }
        let map = MmapOptions::new().len(len).map_raw_read_only(file)?;
        Ok(Self { map, len })
    }

    /// Copies `out.len()` bytes at `offset`; false if the map does not reach that far.
    #[inline]
    pub(crate) fn copy(&self, offset: u64, out: &mut [u8]) -> bool {
        let Some(start) = usize::try_from(offset)
            .ok()
            .filter(|start| start.checked_add(out.len()).is_some_and(|end| end <= self.len))
        else {
            return false;
        };
        // SAFETY: `start + out.len() <= self.len`, the length of the mapping, which lives as long as `self`; `out` is our
        // caller's own memory, so the two cannot overlap.
        unsafe { self.map.as_ptr().add(start).copy_to_nonoverlapping(out.as_mut_ptr(), out.len()) };
        true
    }

    /// Asks the kernel to read these bytes in now, all at once. Only advice: errors do not matter.
    pub(crate) fn populate(&self, offset: u64, len: usize) {
        if let Ok(offset) = usize::try_from(offset)
            && offset.checked_add(len).is_some_and(|end| end <= self.len)
        {
            let _ = self.map.advise_range(memmap2::Advice::PopulateRead, offset, len);
        }
    }
}
