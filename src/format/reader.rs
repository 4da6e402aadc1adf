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
        if self.bytes(len)?.iter().all(|&byte| byte == 0) { Ok(()) } else { Err(Malformed("reserved bytes are not zero")) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
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
    fn what_must_be_zero_is_checked() {
        assert!(Reader::new(&[0, 0, 1]).zeros(3).is_err());
        assert!(Reader::new(&[0, 0, 1]).padding().is_err());
        assert!(Reader::new(&[0, 0]).padding().is_ok());
        assert!(Reader::new(&[0]).finish().is_err());
    }
}
