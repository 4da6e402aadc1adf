//! The clock and randomness, the only two things that this crate takes from outside without being asked. Injectable, so
//! that tests decide what time it is and what the dice show.

#![cfg_attr(not(feature = "test-util"), allow(unreachable_pub))]

mod hardware;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::rand::SecureRandom;

pub(crate) use hardware::HardwareSource;

use crate::error::{Error, ErrorKind};

/// No random bytes could be had.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the system gave no random bytes")]
pub struct NoRandomness;

impl From<NoRandomness> for Error {
    fn from(error: NoRandomness) -> Self {
        Self::with_source(ErrorKind::Resources, error.to_string(), error)
    }
}

/// A source of randomness.
pub trait Entropy: Send + Sync {
    /// Fills `out` with bytes fit for keys and salts.
    ///
    /// # Errors
    /// [`NoRandomness`] if the source fails; `out` must then not be used.
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness>;

    /// Eight bytes that a clone of this machine does not draw again. Called for each page sealed alone and for each 16 of a batch, so it must be fast
    /// (20 ns), and must never hand out bytes that were buffered before.
    ///
    /// # Errors
    /// [`NoRandomness`] if the source fails.
    fn fresh(&self) -> Result<[u8; 8], NoRandomness>;
}

/// Where a cluster takes time and randomness from.
#[derive(Clone)]
pub(crate) struct Env {
    pub(crate) entropy: Arc<dyn Entropy>,
    /// Time since 1970.
    pub(crate) now: Arc<dyn Fn() -> Duration + Send + Sync>,
}

impl Env {
    pub(crate) fn system() -> Self {
        Self { entropy: Arc::new(SystemEntropy::default()), now: Arc::new(system_now) }
    }

    pub(crate) fn random<const N: usize>(&self) -> Result<[u8; N], NoRandomness> {
        let mut out = [0; N];
        self.entropy.fill(&mut out)?;
        Ok(out)
    }
}

/// Time since 1970; before 1970 counts as 1970. Used for dates in records, never for a decision.
#[allow(clippy::disallowed_methods)]
fn system_now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Keys and salts from the operating system, fresh bits from the processor as long as it can be trusted.
struct SystemEntropy {
    system: ring::rand::SystemRandom,
    hardware: HardwareSource,
}

impl Default for SystemEntropy {
    #[allow(clippy::disallowed_methods)]
    fn default() -> Self {
        Self { system: ring::rand::SystemRandom::new(), hardware: HardwareSource::tested() }
    }
}

impl Entropy for SystemEntropy {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        self.system.fill(out).map_err(|_| NoRandomness)
    }

    #[inline]
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        match self.hardware.draw() {
            Some(bits) => Ok(bits.to_le_bytes()),
            None => {
                let mut out = [0; 8];
                self.fill(&mut out)?;
                Ok(out)
            }
        }
    }
}
