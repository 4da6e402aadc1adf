//! A bounds-checked cursor over bytes from disk: every read can fail, none can panic.

/// The bytes are shorter than the structure, or break one of its rules. The text says which rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Malformed(pub(crate) &'static str);

pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(Malformed("it is cut short"))?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(Malformed("it is cut short"))?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, Malformed> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn u24(&mut self) -> Result<u32, Malformed> {
        self.array().map(|[a, b, c]| u32::from_le_bytes([a, b, c, 0]))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_le_bytes)
    }

    /// Reads `len` bytes that must be zero.
    pub(crate) fn zeros(&mut self, len: usize) -> Result<(), Malformed> {
        if self.bytes(len)?.iter().all(|&byte| byte == 0) {
            Ok(())
        } else {
            Err(Malformed("reserved bytes are not zero"))
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// How many bytes are left.
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Ends the reading with whatever is left.
    pub(crate) fn rest(self) -> &'a [u8] {
        self.rest
    }

    /// Reads a `u16` length of at most `max`, and as many bytes. The text says what is too long.
    pub(crate) fn short(&mut self, max: usize, too_long: Malformed) -> Result<&'a [u8], Malformed> {
        let len = usize::from(self.u16()?);
        if len > max { Err(too_long) } else { self.bytes(len) }
    }

    /// Ends the reading: whatever is left must be zero (padding).
    pub(crate) fn padding(mut self) -> Result<(), Malformed> {
        let len = self.rest.len();
        self.zeros(len)
    }

    /// Ends the reading: nothing may be left.
    pub(crate) fn finish(self) -> Result<(), Malformed> {
        if self.is_empty() { Ok(()) } else { Err(Malformed("bytes are left over at its end")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reading_past_the_end_is_an_error_and_takes_nothing() {
        let mut reader = Reader::new(&[1, 2, 3]);
        assert!(reader.u32().is_err());
        assert!(reader.bytes(4).is_err());
        assert_eq!(reader.u24(), Ok(0x0003_0201));
        assert!(reader.u8().is_err());
        assert!(reader.finish().is_ok());
    }

    #[test]
    fn a_short_part_is_bounded_by_its_limit_and_by_what_is_there() {
        let read = |bytes: &'static [u8], max| Reader::new(bytes).short(max, Malformed("too long"));
        assert_eq!(read(b"\x02\x00abc", 2), Ok(&b"ab"[..]));
        assert_eq!(read(b"\x02\x00abc", 1), Err(Malformed("too long")));
        assert!(read(b"\x02\x00a", 2).is_err());
        assert!(read(b"\x02", 2).is_err());
        assert_eq!(Reader::new(b"abc").remaining(), 3);
        assert_eq!(Reader::new(b"abc").rest(), b"abc");
    }

    #[test]
    fn what_must_be_zero_is_checked() {
        assert!(Reader::new(&[0, 0, 1]).zeros(3).is_err());
        assert!(Reader::new(&[0, 0, 1]).padding().is_err());
        assert!(Reader::new(&[0, 0]).padding().is_ok());
        assert!(Reader::new(&[0]).finish().is_err());
    }
}
