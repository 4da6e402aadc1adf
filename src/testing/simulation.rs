//! The real session core, in steps, for the simulation of cloned machines: take a range, draw the fresh bits, use them. Each
//! step's state can be copied, as a snapshot of a virtual machine copies it.

use crate::env::{Entropy, NoRandomness};
use crate::page::session::{Counter, Leased, Nonces, units};

/// The counter of one session.
pub struct Core(Counter);

/// A range that was taken, before its fresh bits are drawn.
pub struct Taken(Leased);

/// The nonces of one call.
pub struct Drawn(Nonces);

impl Core {
    /// A session that has sealed nothing.
    pub fn new() -> Self {
        Self(Counter::new())
    }

    /// A session that stands at `seals` seals and `units` units of 512 bytes.
    pub fn at(seals: u32, units: u32) -> Self {
        Self(Counter::at(seals, units))
    }

    /// Takes a range for `pages` pages of `len` payload bytes each; `None` when the session is used up.
    pub fn take(&self, pages: u32, len: usize) -> Option<Taken> {
        self.0.lease(pages, u64::from(pages) * units(len)).map(Taken)
    }

    /// What a clone of the machine, taken now, has in its memory.
    pub fn cloned_machine(&self) -> Self {
        let (seals, units) = self.0.snapshot();
        Self(Counter::at(seals, units))
    }
}

impl Default for Core {
    fn default() -> Self {
        Self::new()
    }
}

impl Taken {
    /// Draws the fresh bits.
    ///
    /// # Errors
    /// Those of `entropy`.
    pub fn draw(self, entropy: &dyn Entropy) -> Result<Drawn, NoRandomness> {
        self.0.draw(entropy).map(Drawn)
    }

    /// What a clone of the machine, taken now, has in its memory.
    pub fn cloned_machine(&self) -> Self {
        Self(self.0.cloned_machine())
    }
}

impl Drawn {
    /// The nonce of page `index` of the call.
    pub fn nonce(&self, index: u32) -> [u8; 12] {
        self.0.nonce(index)
    }

    /// What a clone of the machine, taken now, has in its memory.
    pub fn cloned_machine(&self) -> Self {
        Self(self.0.cloned_machine())
    }
}
