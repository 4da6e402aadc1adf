//! [`Trial`]: one row against one service: the calls, what they must answer, and the undoing of what was done.

use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{Cannot, Fault, KeyService, Step};
use crate::env::Env;
use crate::error::{KmsClass, KmsError};
use crate::format::page::Suite;
use crate::format::wrapped::{PAYLOAD_KEY_AT, PayloadHead, Purpose};
use crate::ids::{ClusterId, DatabaseId, Generation, SealId};
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::secret::KeyPayload;

/// Why a row ended before its end.
pub(super) enum Stop {
    Cannot(Cannot),
    Failed(String),
}

impl From<Cannot> for Stop {
    fn from(cannot: Cannot) -> Self {
        Self::Cannot(cannot)
    }
}

pub(super) fn failed(why: impl Into<String>) -> Stop {
    Stop::Failed(why.into())
}

/// Fails the row unless `holds`.
pub(super) fn must(holds: bool, why: impl FnOnce() -> String) -> Result<(), Stop> {
    if holds { Ok(()) } else { Err(failed(why())) }
}

/// What a wrapped key is bound to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Binding {
    pub(super) cluster: ClusterId,
    pub(super) database: Option<DatabaseId>,
    pub(super) generation: Generation,
    pub(super) purpose: Purpose,
}

impl Binding {
    pub(super) const DATA: Self = Self {
        cluster: ClusterId::from_bytes([0xc1; 16]),
        database: Some(DatabaseId::from_bytes([0xd2; 16])),
        generation: Generation::FIRST,
        purpose: Purpose::Data,
    };
    pub(super) const CLUSTER: Self = Self { database: None, purpose: Purpose::Cluster, ..Self::DATA };
    pub(super) const PROBE: Self = Self { database: None, purpose: Purpose::Probe, ..Self::DATA };

    pub(super) fn context(&self, timeout: Duration) -> WrapContext<'static> {
        WrapContext {
            cluster: self.cluster,
            database: self.database,
            generation: self.generation,
            purpose: self.purpose,
            deadline: Instant::now() + timeout,
            label: "pageseal conformance",
        }
    }
}

/// A payload as pageseal makes them, and a copy of its secret half to compare with.
pub(super) struct Sample {
    pub(super) payload: KeyPayload,
    /// On the heap, so that moves leave no copies behind.
    bytes: Box<[u8; KeyPayload::LEN]>,
}

impl Sample {
    pub(super) fn new(binding: &Binding) -> Self {
        let head = PayloadHead {
            purpose: binding.purpose,
            suite: Suite::Aes256Gcm,
            generation: binding.generation,
            cluster: binding.cluster,
            database: binding.database.unwrap_or(DatabaseId::from_bytes([0; 16])),
            seal: SealId::from_bytes([0x5e; 16]),
        };
        let mut bytes = Box::new([0; KeyPayload::LEN]);
        bytes[..PAYLOAD_KEY_AT].copy_from_slice(&head.encode());
        Env::system().entropy.fill(&mut bytes[PAYLOAD_KEY_AT..]).expect("the system has random bytes");
        let payload = KeyPayload::from_bytes(&mut *bytes.clone()).expect("there is locked memory");
        Self { payload, bytes }
    }

    /// The payload alone; the copy is wiped.
    pub(super) fn into_payload(mut self) -> KeyPayload {
        zeroize::Zeroize::zeroize(&mut *self.bytes);
        self.payload
    }

    pub(super) fn is(&self, payload: &KeyPayload) -> bool {
        payload.with_bytes(|bytes| *bytes == *self.bytes).expect("this process is not forked")
    }

    /// Whether `haystack` shows a part of the secret half.
    pub(super) fn shows_in(&self, haystack: &[u8]) -> bool {
        let mut parts = self.bytes[PAYLOAD_KEY_AT..].chunks_exact(8);
        parts.any(|part| haystack.windows(part.len()).any(|window| window == part))
    }

    /// Whether a text shows it, as it is, in hex or in base64.
    fn shows_in_text(&self, text: &str) -> bool {
        let secret = &self.bytes[PAYLOAD_KEY_AT..];
        let hex: String = secret[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        self.shows_in(text.as_bytes()) || text.contains(&hex) || text.contains(&base64_head(&self.bytes))
    }
}

/// The first characters of a whole payload's base64 that hang on secret bytes only.
fn base64_head(bytes: &[u8; KeyPayload::LEN]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // Groups of three from the payload's begin: byte 66 is the first of a group.
    let groups = bytes[PAYLOAD_KEY_AT + 2..].chunks_exact(3).take(4);
    let digits = groups.flat_map(|group| {
        let bits = u32::from(group[0]) << 16 | u32::from(group[1]) << 8 | u32::from(group[2]);
        [18, 12, 6, 0].map(|shift| char::from(ALPHABET[(bits >> shift & 63) as usize]))
    });
    digits.collect()
}

pub(super) struct Trial<'a> {
    service: &'a dyn KeyService,
    pub(super) wrapper: Arc<dyn KeyWrapper>,
    done: Mutex<Vec<Step>>,
}

impl<'a> Trial<'a> {
    pub(super) fn new(service: &'a dyn KeyService) -> Self {
        Self { service, wrapper: service.wrapper(), done: Mutex::default() }
    }

    /// The same service, by another of its keys.
    pub(super) fn of(other: &Trial<'a>, wrapper: Arc<dyn KeyWrapper>) -> Self {
        Self { service: other.service, wrapper, done: Mutex::default() }
    }

    pub(super) fn patience(&self) -> Duration {
        self.service.patience()
    }

    pub(super) fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Stop> {
        Ok(self.service.other_key()?)
    }

    /// Performs a step that [`Trial::undo`] takes back.
    pub(super) fn perform(&self, step: Step) -> Result<(), Stop> {
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(before) = done.iter().position(|before| before.opposite() == Some(step)) {
            self.service.perform(step)?;
            done.remove(before);
        } else {
            // Noted first: a step that fails half-way must be taken back too.
            done.push(step);
            if let Err(cannot) = self.service.perform(step) {
                done.pop();
                return Err(cannot.into());
            }
        }
        Ok(())
    }

    /// Returns when pooled connections have noticed, too: a call must meet the fault, and not a connection that it closed.
    pub(super) fn inflict(&self, fault: Fault) -> Result<(), Stop> {
        self.service.inflict(fault)?;
        self.settle();
        Ok(())
    }

    /// Makes all well again, and sees that it is.
    pub(super) fn undo(&self) -> Result<(), String> {
        // A service that cannot inflict anything has nothing to take back.
        let _ = self.service.inflict(Fault::None);
        let done = std::mem::take(&mut *self.done.lock().unwrap_or_else(PoisonError::into_inner));
        self.settle();
        for step in done.into_iter().rev().filter_map(Step::opposite) {
            self.service.perform(step).map_err(|Cannot(why)| format!("{step:?}: {why}"))?;
        }
        self.round_trip(&Binding::DATA).map_err(|stop| match stop {
            Stop::Failed(why) | Stop::Cannot(Cannot(why)) => why,
        })
    }

    pub(super) fn wrap(&self, sample: &Sample, binding: &Binding) -> Result<WrappedKey, Stop> {
        let wrapped = self.wrapper.wrap_key(&sample.payload, &binding.context(self.patience()));
        wrapped.map_err(|error| failed(format!("wrapping failed: {error}")))
    }

    pub(super) fn unwrap(&self, wrapped: &WrappedKey, binding: &Binding) -> Result<KeyPayload, KmsError> {
        self.unwrap_within(wrapped, binding, self.patience())
    }

    pub(super) fn unwrap_within(
        &self,
        wrapped: &WrappedKey,
        binding: &Binding,
        timeout: Duration,
    ) -> Result<KeyPayload, KmsError> {
        self.wrapper.unwrap_key(wrapped, &binding.context(timeout))
    }

    pub(super) fn rewrap(&self, wrapped: &WrappedKey, binding: &Binding) -> Result<WrappedKey, Stop> {
        let rewrapped = self.wrapper.rewrap_key(wrapped, &binding.context(self.patience()));
        rewrapped.map_err(|error| failed(format!("rewrapping failed: {error}")))
    }

    pub(super) fn check(&self, probe: &WrappedKey) -> Result<(), KmsError> {
        self.wrapper.check(probe, &Binding::PROBE.context(self.patience()))
    }

    /// A sample and its wrapped form.
    pub(super) fn wrapped(&self, binding: &Binding) -> Result<(Sample, WrappedKey), Stop> {
        let sample = Sample::new(binding);
        let wrapped = self.wrap(&sample, binding)?;
        Ok((sample, wrapped))
    }

    pub(super) fn opens(&self, sample: &Sample, wrapped: &WrappedKey, binding: &Binding) -> Result<(), Stop> {
        let payload = self.unwrap(wrapped, binding).map_err(|error| failed(format!("unwrapping failed: {error}")))?;
        must(sample.is(&payload), || "another payload came back".into())
    }

    pub(super) fn round_trip(&self, binding: &Binding) -> Result<(), Stop> {
        let (sample, wrapped) = self.wrapped(binding)?;
        self.opens(&sample, &wrapped, binding)
    }

    /// That unwrapping fails so, with an error that shows nothing of the sample.
    pub(super) fn refuses(
        &self,
        what: &str,
        expected: KmsClass,
        sample: &Sample,
        outcome: Result<KeyPayload, KmsError>,
    ) -> Result<KmsError, Stop> {
        let error = match outcome {
            Err(error) => error,
            Ok(payload) if sample.is(&payload) => return Err(failed(format!("{what}: it was unwrapped"))),
            Ok(_) => return Err(failed(format!("{what}: another payload came back"))),
        };
        self.shows_nothing(&error, sample)?;
        must(error.class == expected, || format!("{what}: {:?} instead of {expected:?}: {error}", error.class))?;
        Ok(error)
    }

    pub(super) fn shows_nothing(&self, error: &KmsError, sample: &Sample) -> Result<(), Stop> {
        let mut text = format!("{error} {error:?}");
        let mut next = std::error::Error::source(error);
        while let Some(source) = next {
            text.push_str(&format!(" {source} {source:?}"));
            next = source.source();
        }
        must(!sample.shows_in_text(&text), || "an error shows the payload".into())
    }

    /// Waits until pooled connections have noticed what became of them.
    pub(super) fn settle(&self) {
        thread::sleep(Duration::from_millis(50));
    }
}
