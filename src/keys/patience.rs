//! [`Patient`]: a wrapper whose calls come again where the service asked to be asked later, as long as the caller waits.
//!
//! The waits are spent on the thread of the call, which so keeps its place among those in flight
//! ([`IN_FLIGHT`](crate::keys::calls::IN_FLIGHT)): a service that throttles us gets fewer calls, not more.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{KmsClass, KmsError};
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::secret::KeyPayload;

/// The first wait after a throttled call; each further one is twice as long, up to [`LONGEST_WAIT`].
const FIRST_WAIT: Duration = Duration::from_millis(100);
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// Forwards every call, and repeats the failed ones as [`Pace`] says. A method of [`KeyWrapper`] that has a default must be
/// forwarded too: else the default would hide the user's own.
pub(crate) struct Patient(pub(crate) Arc<dyn KeyWrapper>);

impl KeyWrapper for Patient {
    fn id(&self) -> MasterKeyId {
        self.0.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        patiently(cx.deadline, || self.0.wrap_key(key, cx))
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        patiently(cx.deadline, || self.0.unwrap_key(key, cx))
    }

    fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        patiently(cx.deadline, || self.0.rewrap_key(key, cx))
    }

    fn can_rewrap(&self, key: &WrappedKey) -> bool {
        self.0.can_rewrap(key)
    }

    fn check(&self, probe: &WrappedKey, cx: &WrapContext<'_>) -> Result<(), KmsError> {
        patiently(cx.deadline, || self.0.check(probe, cx))
    }

    fn wrapping_is_public(&self) -> bool {
        self.0.wrapping_is_public()
    }
}

/// Calls until it succeeds, fails for good, or the next wait would reach the deadline; then the failure is returned at once,
/// with the service's own `retry_after`.
fn patiently<T>(deadline: Instant, mut call: impl FnMut() -> Result<T, KmsError>) -> Result<T, KmsError> {
    let mut pace = Pace::new();
    loop {
        let error = match call() {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        match pace.wait_after(&error, jitter()) {
            Some(wait) if wait < deadline.saturating_duration_since(Instant::now()) => thread::sleep(wait),
            _ => return Err(error),
        }
    }
}

/// When a failed call is repeated: a throttled one after ever longer waits, an unreachable one once, so that an opening
/// during an outage fails fast, and any other never.
struct Pace {
    next: Duration,
    unreachable_before: bool,
}

impl Pace {
    fn new() -> Self {
        Self { next: FIRST_WAIT, unreachable_before: false }
    }

    /// How long to wait before the call is repeated, if it is; `jitter` is in `0.0..1.0`. Never shorter than the service
    /// asked for, and beyond that spread, so that those who were throttled together do not come back together.
    fn wait_after(&mut self, error: &KmsError, jitter: f64) -> Option<Duration> {
        match error.class {
            KmsClass::Throttled => {
                let spread = self.next.mul_f64(0.5 + jitter);
                self.next = (2 * self.next).min(LONGEST_WAIT);
                Some(error.retry_after.unwrap_or_default().saturating_add(spread))
            }
            KmsClass::Unreachable if !self.unreachable_before => {
                self.unreachable_before = true;
                Some(FIRST_WAIT.mul_f64(1.0 + jitter))
            }
            _ => None,
        }
    }
}

/// Differs from call to call and from process to process, forks included. Nothing secret hangs on it.
fn jitter() -> f64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    // 53 bits, which a float holds exactly.
    (hasher.finish() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::keys::calls::Lane;
    use crate::keys::calls::fixtures::{payload, request};
    use crate::keys::calls::{Pending, WrapRequest};
    use crate::kms::scripted::ScriptedWrapper;

    fn throttled(retry_after: Option<Duration>) -> KmsError {
        KmsError { retry_after, ..KmsError::new(KmsClass::Throttled) }
    }

    fn within(timeout: Duration, wrapper: &ScriptedWrapper) -> Pending<WrappedKey> {
        let (request, key) = (WrapRequest { timeout, ..request() }, payload(1));
        Lane::new(Arc::new(wrapper.clone()))
            .start(&request, request.deadline(), move |wrapper, cx| wrapper.wrap_key(&key, cx))
    }

    #[test]
    fn waits_double_up_to_two_seconds_and_never_undercut_the_service() {
        let mut pace = Pace::new();
        let waits: Vec<_> = (0..7).map(|_| pace.wait_after(&throttled(None), 0.5).unwrap().as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 2000, 2000]);
        let bounds = [0.0, 1.0].map(|jitter| Pace::new().wait_after(&throttled(None), jitter).unwrap().as_millis());
        assert_eq!(bounds, [50, 150]);
        let asked = throttled(Some(Duration::from_secs(3)));
        assert_eq!(Pace::new().wait_after(&asked, 0.0), Some(Duration::from_millis(3050)));
        assert_eq!(Pace::new().wait_after(&throttled(Some(Duration::MAX)), 0.5), Some(Duration::MAX));
    }

    #[test]
    fn an_unreachable_service_is_asked_once_more_and_a_verdict_never() {
        let mut pace = Pace::new();
        assert_eq!(pace.wait_after(&KmsError::new(KmsClass::Unreachable), 0.5), Some(Duration::from_millis(150)));
        assert_eq!(pace.wait_after(&KmsError::new(KmsClass::Unreachable), 0.5), None);
        use KmsClass::{BadCiphertext, Deleted, Denied, Disabled, Misconfigured, Unclassified};
        for class in [Denied, Disabled, Deleted, BadCiphertext, Misconfigured, Unclassified] {
            assert_eq!(Pace::new().wait_after(&KmsError::new(class), 0.5), None, "{class:?}");
        }
        let key = ScriptedWrapper::new("k");
        key.unreachable();
        assert!(within(Duration::from_secs(60), &key).wait().is_err());
        assert_eq!(key.calls(), 2);
    }

    #[test]
    fn a_throttled_call_comes_back_within_its_deadline() {
        for retry_after in [None, Some(Duration::from_millis(80))] {
            let key = ScriptedWrapper::new("k");
            key.throttle_next(2, retry_after);
            let start = Instant::now();
            within(Duration::from_secs(60), &key).wait().unwrap();
            assert_eq!(key.calls(), 3);
            let least = 2 * retry_after.unwrap_or_default() + Duration::from_millis(50 + 100);
            assert!(start.elapsed() >= least, "{:?} < {least:?}", start.elapsed());
        }
    }

    #[test]
    fn a_wait_that_would_pass_the_deadline_is_not_begun() {
        let key = ScriptedWrapper::new("k");
        key.throttle(Duration::from_secs(60));
        let start = Instant::now();
        let error = within(Duration::from_secs(50), &key).wait().unwrap_err();
        assert!(start.elapsed() < Duration::from_secs(25), "waited {:?}", start.elapsed());
        assert_eq!((error.class, error.retry_after), (KmsClass::Throttled, Some(Duration::from_secs(60))));
        assert_eq!(key.calls(), 1);
    }

    #[test]
    fn a_waiting_call_keeps_its_place_among_those_in_flight() {
        let key = ScriptedWrapper::new("k");
        let lane = Lane::new(Arc::new(key.clone()));
        key.throttle_next(crate::keys::calls::IN_FLIGHT as u64, Duration::from_millis(300));
        let request = request();
        let begun = Instant::now();
        let start = || {
            let key = payload(1);
            lane.start(&request, request.deadline(), move |wrapper, cx| {
                wrapper.wrap_key(&key, cx).map(|_| Instant::now())
            })
        };
        let calls: Vec<_> = (0..=crate::keys::calls::IN_FLIGHT).map(|_| start()).collect();
        let earliest = calls.into_iter().map(|call| call.wait().unwrap()).min().unwrap();
        assert!(earliest - begun >= Duration::from_millis(300), "a call overtook those that wait");
    }

    #[test]
    fn jitter_differs_from_call_to_call_and_fills_its_range() {
        let drawn: Vec<_> = (0..1000).map(|_| jitter()).collect();
        assert!(drawn.iter().all(|value| (0.0..1.0).contains(value)));
        assert_eq!(drawn.iter().map(|value| value.to_bits()).collect::<HashSet<_>>().len(), 1000);
        assert!(drawn.iter().any(|value| *value < 0.1) && drawn.iter().any(|value| *value > 0.9));
    }

    #[test]
    fn what_the_wrapper_overrides_is_asked_of_it() {
        struct Own(ScriptedWrapper);
        impl KeyWrapper for Own {
            fn id(&self) -> MasterKeyId {
                self.0.id()
            }
            fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                self.0.wrap_key(key, cx)
            }
            fn unwrap_key(&self, _: &WrappedKey, _: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
                panic!("the default was used")
            }
            fn rewrap_key(&self, key: &WrappedKey, _: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                Ok(key.clone())
            }
            fn can_rewrap(&self, _: &WrappedKey) -> bool {
                true
            }
            fn check(&self, _: &WrappedKey, _: &WrapContext<'_>) -> Result<(), KmsError> {
                Ok(())
            }
            fn wrapping_is_public(&self) -> bool {
                true
            }
        }
        let patient = Patient(Arc::new(Own(ScriptedWrapper::new("k"))));
        let other = WrappedKey { master_key: MasterKeyId::new("o", "o"), key_version: String::new(), blob: vec![1] };
        assert!(patient.can_rewrap(&other) && patient.wrapping_is_public());
        let lane = Lane::new(Arc::new(patient));
        let request = request();
        let asked = other.clone();
        let outcome = lane.start(&request, request.deadline(), move |wrapper, cx| {
            wrapper.check(&asked, cx)?;
            wrapper.rewrap_key(&asked, cx)
        });
        assert_eq!(outcome.wait().unwrap(), other);
    }
}
