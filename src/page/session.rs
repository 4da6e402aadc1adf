//! A session: one salt, one subkey, one counter. What makes every nonce unique, across forks, restored copies and cloned
//! machines.
//!
//! - The salt is random and drawn when the session opens, so two openings never share a subkey: no durable counter exists
//!   that a restore could turn back.
//! - Within a session the counter makes nonces unique, whatever the random source does.
//! - Fresh bits in each nonce keep a *cloned machine* apart, where both copies go on with the same salt and counter. A call
//!   first takes its range of the counter, then reads its input, and then draws the bits. The types leave no other order of
//!   range and bits: bits come only out of [`Leased::draw`]. In the other order, a clone taken between the two can pair old bits with a counter that the other
//!   copy pairs with the same bits for other data.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::env::{Entropy, NoRandomness};
use crate::format::page::NONCE_LEN;
use crate::keys::keyring::Hold;
use crate::page::subkeys::Subkey;

/// A session ends after 2^28 seals: with 64-bit fresh bits unused, 2^28 pages of 4 KiB are 2^36 blocks under one subkey,
/// which leaves an attacker an advantage below 2^-55 (the GCM bound of draft-irtf-cfrg-aead-limits).
pub(crate) const MAX_SEALS: u64 = 1 << 28;
/// Or after 1 TiB, so that large pages do not weaken the bound.
pub(crate) const MAX_BYTES: u64 = 1 << 40;
/// Bytes are counted in units of this many, each page rounded up, so that both counts fit one atomic word.
const UNIT: u64 = 512;
pub(crate) const MAX_UNITS: u64 = MAX_BYTES / UNIT;

const _: () = assert!(MAX_UNITS <= u32::MAX as u64);
const _: () = assert!(MAX_SEALS <= u32::MAX as u64);

pub(crate) struct Session {
    /// What must not be given up while anybody seals here. Declared before the subkey, so that it is gone when the keys are.
    #[allow(dead_code)] // only kept
    pub(crate) hold: Option<Hold>,
    pub(crate) subkey: Arc<Subkey>,
    pub(crate) counter: Counter,
    /// How often the process had been told that its machine was resumed, when this session opened.
    pub(crate) resumes: u64,
}

/// Counts seals (low 32 bits) and 512-byte units (high 32 bits) of one session. Never passes either limit.
pub(crate) struct Counter(AtomicU64);

impl Counter {
    pub(crate) const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Takes a contiguous range of `pages` numbers, for pages of `units` units together. `None` once the session is used
    /// up; nothing is taken then. What is taken is never given back: after an error the range is dead.
    #[inline]
    pub(crate) fn lease(&self, pages: u32, units: u64) -> Option<Leased> {
        let mut seen = self.0.load(Ordering::Relaxed);
        loop {
            let (seals, used) = (seen & u64::from(u32::MAX), seen >> 32);
            let seals_after = seals + u64::from(pages);
            let used_after = used.checked_add(units)?;
            if seals_after > MAX_SEALS || used_after > MAX_UNITS {
                return None;
            }
            // Relaxed: uniqueness needs only that the exchanges have one order, which all atomics have.
            match self.0.compare_exchange_weak(
                seen,
                used_after << 32 | seals_after,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(Leased { first: seals as u32, pages }),
                Err(now) => seen = now,
            }
        }
    }

    /// For tests: a counter that stands at `seals` and `units`; and, with [`Counter::snapshot`], a cloned machine's.
    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn at(seals: u32, units: u32) -> Self {
        Self(AtomicU64::new(u64::from(units) << 32 | u64::from(seals)))
    }

    #[cfg(any(test, feature = "test-util"))]
    pub(crate) fn snapshot(&self) -> (u32, u32) {
        let now = self.0.load(Ordering::Relaxed);
        (now as u32, (now >> 32) as u32)
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn set(&self, seals: u32, units: u32) {
        self.0.store(u64::from(units) << 32 | u64::from(seals), Ordering::Relaxed);
    }
}

/// The units that a payload of `len` bytes counts for. At least one, so that empty payloads count too.
#[inline]
pub(crate) fn units(len: usize) -> u64 {
    (len as u64).div_ceil(UNIT).max(1)
}

/// A range of the counter, taken, and not yet usable: it lacks the fresh bits.
#[must_use]
pub(crate) struct Leased {
    first: u32,
    pages: u32,
}

impl Leased {
    /// Splits the first `pages` off: the parts of a batch that threads take draw their own bits.
    pub(crate) fn split_to(&mut self, pages: u32) -> Self {
        assert!(pages <= self.pages, "{pages} pages are more than the {} that are left of a range", self.pages);
        let first = self.first;
        self.first += pages;
        self.pages -= pages;
        Self { first, pages }
    }

    /// Draws the fresh bits, once for the whole range. The nonces must be used at once, by the call that drew them: never
    /// after a wait, a callback or a read of input.
    #[inline]
    pub(crate) fn draw(self, entropy: &dyn Entropy) -> Result<Nonces, NoRandomness> {
        Ok(Nonces { first: self.first, pages: self.pages, fresh: entropy.fresh()? })
    }

    /// For the simulation of a cloned machine: the other machine's copy of this lease.
    #[cfg(feature = "test-util")]
    pub(crate) fn cloned_machine(&self) -> Self {
        Self { first: self.first, pages: self.pages }
    }
}

/// The nonces of one call: `counter u32 | fresh 8` each. Not `Clone`; each index is used once.
pub(crate) struct Nonces {
    first: u32,
    pages: u32,
    fresh: [u8; 8],
}

impl Nonces {
    #[inline]
    pub(crate) fn nonce(&self, index: u32) -> [u8; NONCE_LEN] {
        assert!(index < self.pages, "page {index} of a call is outside its range of {}", self.pages);
        let mut nonce = [0; NONCE_LEN];
        nonce[..4].copy_from_slice(&(self.first + index).to_le_bytes());
        nonce[4..].copy_from_slice(&self.fresh);
        nonce
    }

    #[cfg(feature = "test-util")]
    pub(crate) fn cloned_machine(&self) -> Self {
        Self { first: self.first, pages: self.pages, fresh: self.fresh }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn a_session_ends_at_its_last_seal_and_not_before() {
        let last = u32::try_from(MAX_SEALS - 1).unwrap();
        let counter = Counter::at(last, 0);
        assert!(counter.lease(2, 1).is_none());
        assert!(counter.lease(1, 1).is_some_and(|leased| leased.first == last));
        assert!(counter.lease(1, 1).is_none());
        assert_eq!(counter.snapshot().0, last + 1, "a refused lease took something");
    }

    #[test]
    fn a_session_ends_at_one_tebibyte() {
        let counter = Counter::at(5, u32::try_from(MAX_UNITS - 1).unwrap());
        assert!(counter.lease(1, 2).is_none());
        assert!(counter.lease(1, 1).is_some());
        assert!(counter.lease(1, 1).is_none());
        assert!(Counter::new().lease(1, u64::MAX).is_none());
        assert_eq!(MAX_UNITS * units(1 << 20) / 2048, MAX_UNITS);
    }

    #[test]
    fn every_payload_counts_for_its_bytes_rounded_up() {
        for (len, expected) in [(0, 1), (1, 1), (512, 1), (513, 2), (4096, 8), (65536, 128)] {
            assert_eq!(units(len), expected, "{len}");
        }
    }

    #[test]
    fn the_fresh_bits_are_drawn_after_the_range_is_taken() {
        struct SeesCounter<'a>(&'a Counter, AtomicBool);
        impl Entropy for SeesCounter<'_> {
            fn fill(&self, _: &mut [u8]) -> Result<(), NoRandomness> {
                Err(NoRandomness)
            }
            fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
                self.1.store(self.0.snapshot() == (3, 24), Ordering::Relaxed);
                Ok([9; 8])
            }
        }
        let counter = Counter::new();
        let entropy = SeesCounter(&counter, AtomicBool::new(false));
        let nonces = counter.lease(3, 24).unwrap().draw(&entropy).unwrap();
        assert!(entropy.1.load(Ordering::Relaxed), "bits were drawn before the counter was advanced");
        assert_eq!(nonces.nonce(2), [2, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9]);
    }

    #[test]
    fn the_parts_of_a_range_cover_it_once() {
        let counter = Counter::at(10, 0);
        let mut leased = counter.lease(5, 5).unwrap();
        let parts = [leased.split_to(2), leased.split_to(0), leased.split_to(3)];
        assert_eq!(parts.map(|part| (part.first, part.pages)), [(10, 2), (12, 0), (12, 3)]);
        assert_eq!(leased.pages, 0);
    }

    #[test]
    #[should_panic(expected = "outside its range")]
    fn an_index_outside_the_range_has_no_nonce() {
        Nonces { first: 0, pages: 3, fresh: [0; 8] }.nonce(3);
    }
}
