//! The processor's random source (RDRAND), distrusted: tested before use, watched in use, given up for good at the first
//! sign of trouble. Known trouble: AMD family 15h and 16h after resume returned all ones; a failing source clears the carry
//! flag for ever.
#![allow(unsafe_code)]

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};

/// Intel's advice for one draw (Digital Random Number Generator guide, section 5.2.1).
const RETRIES: usize = 10;
const SELF_TEST_DRAWS: usize = 16;

/// Draws from the processor until the source misbehaves once; from then on `None`, for good.
pub(crate) struct HardwareSource {
    step: fn() -> Option<u64>,
    trusted: AtomicBool,
}

impl HardwareSource {
    /// The processor's source, if it has one and passes the self-test.
    pub(crate) fn tested() -> Self {
        if is_x86_feature_detected!("rdrand") { Self::over(rdrand) } else { Self::over(|| None) }
    }

    /// A source over `step`, which gives 64 bits or fails; self-tested here.
    pub(crate) fn over(step: fn() -> Option<u64>) -> Self {
        let source = Self { step, trusted: AtomicBool::new(false) };
        source.trusted.store(source.self_test(), Ordering::Relaxed);
        source
    }

    #[inline]
    pub(crate) fn draw(&self) -> Option<u64> {
        if !self.trusted.load(Ordering::Relaxed) {
            return None;
        }
        match self.checked_step() {
            Some(bits) => Some(bits),
            None => {
                self.trusted.store(false, Ordering::Relaxed);
                None
            }
        }
    }

    /// Passes only if all draws succeed and all differ: the chance that a sound source repeats one is 2^-57.
    fn self_test(&self) -> bool {
        let mut draws = [0; SELF_TEST_DRAWS];
        for draw in &mut draws {
            match self.checked_step() {
                Some(bits) => *draw = bits,
                None => return false,
            }
        }
        draws.sort_unstable();
        draws.windows(2).all(|pair| pair[0] != pair[1])
    }

    /// One draw; `None` if it fails, is stuck at all zeros or all ones, or repeats this thread's last one.
    #[inline]
    fn checked_step(&self) -> Option<u64> {
        thread_local!(static LAST: Cell<u64> = const { Cell::new(0) });
        for _ in 0..RETRIES {
            let Some(bits) = (self.step)() else { continue };
            let repeated = LAST.replace(bits) == bits;
            return (!repeated && bits != 0 && bits != u64::MAX).then_some(bits);
        }
        None
    }
}

fn rdrand() -> Option<u64> {
    // SAFETY: only installed as a source after the processor said that it has RDRAND.
    unsafe { rdrand_step() }
}

#[target_feature(enable = "rdrand")]
#[inline]
fn rdrand_step() -> Option<u64> {
    let mut bits = 0;
    (std::arch::x86_64::_rdrand64_step(&mut bits) == 1).then_some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn a_failing_stuck_or_repeating_source_is_never_used() {
        assert_eq!(HardwareSource::over(|| None).draw(), None);
        for step in [(|| Some(0)) as fn() -> Option<u64>, || Some(u64::MAX), || Some(7)] {
            assert_eq!(HardwareSource::over(step).draw(), None);
        }
        static ALTERNATE: AtomicU64 = AtomicU64::new(0);
        assert_eq!(HardwareSource::over(|| Some(1 + ALTERNATE.fetch_add(1, Ordering::Relaxed) % 2)).draw(), None);
    }

    #[test]
    fn a_source_that_breaks_later_is_given_up_for_good() {
        static DRAWS: AtomicU64 = AtomicU64::new(1);
        fn breaks_for_a_while() -> Option<u64> {
            let draw = DRAWS.fetch_add(1, Ordering::Relaxed);
            Some(if (100..102).contains(&draw) { u64::MAX } else { draw })
        }
        let source = HardwareSource::over(breaks_for_a_while);
        let before = std::iter::from_fn(|| source.draw()).count();
        assert_eq!(before, 99 - SELF_TEST_DRAWS);
        assert!((0..1000).all(|_| source.draw().is_none()), "a source that recovered was trusted again");
    }

    #[test]
    fn a_transient_failure_is_retried_as_the_manual_says() {
        static DRAWS: AtomicU64 = AtomicU64::new(1);
        fn fails_nine_times_of_ten() -> Option<u64> {
            let draw = DRAWS.fetch_add(1, Ordering::Relaxed);
            draw.is_multiple_of(10).then_some(draw)
        }
        assert!(HardwareSource::over(fails_nine_times_of_ten).draw().is_some());
    }
}
