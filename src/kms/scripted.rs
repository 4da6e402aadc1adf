//! [`ScriptedWrapper`]: a master key in memory that fails as it is told (feature `test-util`).

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::env::Env;
use crate::error::{Error, KmsClass, KmsError};
use crate::format::wrapped::PAYLOAD_KEY_AT;
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::kms::envelope::{WrappingKey, open_payload, seal_payload};
use crate::secret::{KeyPayload, SecretKey};

/// A key service for your tests: a master key in memory, with real encryption, that does what the test says.
///
/// Clones are one and the same key, so a test keeps one and gives the other to the cluster. Each state replaces the one
/// before, and applies to every call until the next one is set: while the key is disabled, wrapping fails as unwrapping
/// does. The key is lost with the last clone.
///
/// ```
/// use pageseal::{KeyWrapper, ScriptedWrapper};
///
/// let key = ScriptedWrapper::new("primary");
/// let given_to_the_cluster = key.clone();
/// key.disable();
/// // The cluster finds its master key disabled at the next check, ...
/// key.restore();
/// // ... and usable again at the one after.
/// assert_eq!(given_to_the_cluster.id().to_string(), "scripted:primary");
/// assert_eq!(key.calls(), 0);
/// ```
#[derive(Clone)]
pub struct ScriptedWrapper(Arc<Shared>);

struct Shared {
    name: String,
    env: Env,
    public: bool,
    wraps: AtomicU64,
    unwraps: AtomicU64,
    rewraps: AtomicU64,
    in_flight: AtomicU64,
    most_in_flight: AtomicU64,
    script: Mutex<Script>,
    changed: Condvar,
}

struct Script {
    behaviour: Behaviour,
    /// How many calls are throttled before `behaviour` applies, and when they are told to come back.
    throttled: (u64, Option<Duration>),
    /// How often [`ScriptedWrapper::rotate`] was called. Keys are drawn when they are first used, where failing is possible.
    rotations: usize,
    keys: Vec<Arc<SecretKey>>,
}

#[derive(Clone, Copy)]
enum Behaviour {
    Works,
    Lies,
    Hangs,
    Fails(KmsClass, Option<Duration>),
}

impl ScriptedWrapper {
    /// A new random master key `scripted:name` that works.
    pub fn new(name: impl Into<String>) -> Self {
        Self::make(name.into(), false)
    }

    /// The same, but as if a public key sufficed to wrap ([`KeyWrapper::wrapping_is_public`]).
    pub fn public(name: impl Into<String>) -> Self {
        Self::make(name.into(), true)
    }

    fn make(name: String, public: bool) -> Self {
        let script = Script { behaviour: Behaviour::Works, throttled: (0, None), rotations: 0, keys: Vec::new() };
        Self(Arc::new(Shared {
            name,
            env: Env::system(),
            public,
            wraps: AtomicU64::new(0),
            unwraps: AtomicU64::new(0),
            rewraps: AtomicU64::new(0),
            in_flight: AtomicU64::new(0),
            most_in_flight: AtomicU64::new(0),
            script: Mutex::new(script),
            changed: Condvar::new(),
        }))
    }

    /// Every call answers that the key is disabled.
    pub fn disable(&self) {
        self.fail(KmsClass::Disabled);
    }

    /// Every call answers that the key is deleted. As at a real service within its waiting period, it can be restored.
    pub fn delete(&self) {
        self.fail(KmsClass::Deleted);
    }

    /// Every call is refused for its credentials.
    pub fn deny(&self) {
        self.fail(KmsClass::Denied);
    }

    /// Every call fails as if nobody was there.
    pub fn unreachable(&self) {
        self.fail(KmsClass::Unreachable);
    }

    /// Every call is asked to come back after `retry_after`.
    pub fn throttle(&self, retry_after: Duration) {
        self.set(Behaviour::Fails(KmsClass::Throttled, Some(retry_after)));
    }

    /// The next `calls` calls are asked to come back, after `retry_after` if that is some; those after them find the state that
    /// was set before. A state that is set meanwhile applies at once.
    pub fn throttle_next(&self, calls: u64, retry_after: impl Into<Option<Duration>>) {
        self.script().throttled = (calls, retry_after.into());
    }

    /// Every call blocks until another state is set, and then does what that one says. Calls that still block when the test
    /// ends keep their threads.
    pub fn hang(&self) {
        self.set(Behaviour::Hangs);
    }

    /// The wrapper lies: it wraps well, but every unwrap succeeds with a payload whose key has one bit flipped.
    pub fn corrupt(&self) {
        self.set(Behaviour::Lies);
    }

    /// Every call answers that the ciphertext is not of this key.
    pub fn bad_ciphertext(&self) {
        self.fail(KmsClass::BadCiphertext);
    }

    /// Every call fails because the configuration cannot work.
    pub fn misconfigure(&self) {
        self.fail(KmsClass::Misconfigured);
    }

    /// The key works again.
    pub fn restore(&self) {
        self.set(Behaviour::Works);
    }

    /// Makes a new version of the key, which wraps from now on. Older versions still unwrap what they wrapped.
    pub fn rotate(&self) {
        self.script().rotations += 1;
    }

    /// How many calls were asked for so far, with those that failed or still hang. A check is an unwrap; a cluster unwraps
    /// after each wrap, to verify it, and repeats a call once that could not reach the key, and often one that was throttled.
    pub fn calls(&self) -> u64 {
        self.wraps() + self.unwraps() + self.rewraps()
    }

    /// How many of the calls were wraps.
    pub fn wraps(&self) -> u64 {
        self.0.wraps.load(Ordering::SeqCst)
    }

    /// How many of the calls were unwraps or checks.
    pub fn unwraps(&self) -> u64 {
        self.0.unwraps.load(Ordering::SeqCst)
    }

    /// How many of the calls were rewraps, which hand no payload out.
    pub fn rewraps(&self) -> u64 {
        self.0.rewraps.load(Ordering::SeqCst)
    }

    /// How many calls there were at the same time, at most.
    pub fn most_in_flight(&self) -> u64 {
        self.0.most_in_flight.load(Ordering::SeqCst)
    }

    fn fail(&self, class: KmsClass) {
        self.set(Behaviour::Fails(class, None));
    }

    fn set(&self, behaviour: Behaviour) {
        let mut script = self.script();
        (script.behaviour, script.throttled) = (behaviour, (0, None));
        drop(script);
        self.0.changed.notify_all();
    }

    /// Counts the call, as one in flight while the guard lives.
    fn count(&self, calls: &AtomicU64) -> InFlight<'_> {
        calls.fetch_add(1, Ordering::SeqCst);
        let now = self.0.in_flight.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most_in_flight.fetch_max(now, Ordering::SeqCst);
        InFlight(&self.0.in_flight)
    }

    /// Waits while the call hangs, and fails if it is to fail; else returns the script, and whether to lie.
    fn enter(&self) -> Result<(MutexGuard<'_, Script>, bool), KmsError> {
        let hangs = |script: &mut Script| matches!(script.behaviour, Behaviour::Hangs);
        let mut script = self.0.changed.wait_while(self.script(), hangs).unwrap_or_else(PoisonError::into_inner);
        if let (left @ 1.., retry_after) = script.throttled {
            script.throttled.0 = left - 1;
            return Err(KmsError {
                retry_after,
                ..KmsError::with_source(KmsClass::Throttled, "as the test's script says")
            });
        }
        match script.behaviour {
            Behaviour::Fails(class, retry_after) => {
                Err(KmsError { retry_after, ..KmsError::with_source(class, "as the test's script says") })
            }
            Behaviour::Works | Behaviour::Hangs => Ok((script, false)),
            Behaviour::Lies => Ok((script, true)),
        }
    }

    fn script(&self) -> MutexGuard<'_, Script> {
        self.0.script.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seal(
        &self,
        script: MutexGuard<'_, Script>,
        payload: &KeyPayload,
        cx: &WrapContext<'_>,
    ) -> Result<WrappedKey, KmsError> {
        let (key_version, key) = self.current(script)?;
        let blob = seal_payload(WrappingKey::Local(&key), &self.0.env, payload, cx)?;
        Ok(WrappedKey { master_key: self.id(), key_version, blob })
    }

    /// The version that wraps, and its key.
    fn current(&self, mut script: MutexGuard<'_, Script>) -> Result<(String, Arc<SecretKey>), KmsError> {
        while script.keys.len() <= script.rotations {
            let key = SecretKey::fill_with(|out| self.0.env.entropy.fill(out).map_err(Error::from));
            script.keys.push(Arc::new(key?));
        }
        let version = script.rotations;
        Ok((version.to_string(), Arc::clone(&script.keys[version])))
    }
}

struct InFlight<'a>(&'a AtomicU64);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Script {
    /// The version that wrapped this.
    fn key_of(&self, wrapped: &WrappedKey) -> Result<Arc<SecretKey>, KmsError> {
        let key = wrapped.key_version.parse().ok().and_then(|version: usize| self.keys.get(version).map(Arc::clone));
        key.ok_or_else(|| {
            let text = format!("this key has no version {:?}", wrapped.key_version);
            KmsError::with_source(KmsClass::BadCiphertext, text)
        })
    }
}

impl KeyWrapper for ScriptedWrapper {
    fn id(&self) -> MasterKeyId {
        MasterKeyId::new("scripted", &*self.0.name)
    }

    fn wrap_key(&self, payload: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let _in_flight = self.count(&self.0.wraps);
        let (script, _) = self.enter()?;
        self.seal(script, payload, cx)
    }

    fn unwrap_key(&self, wrapped: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let _in_flight = self.count(&self.0.unwraps);
        let (script, lies) = self.enter()?;
        let key = script.key_of(wrapped)?;
        drop(script);
        let payload = open_payload(WrappingKey::Local(&key), &wrapped.blob, cx)?;
        if lies { with_a_flipped_bit(&payload) } else { Ok(payload) }
    }

    fn rewrap_key(&self, wrapped: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let _in_flight = self.count(&self.0.rewraps);
        let (script, _) = self.enter()?;
        let payload = open_payload(WrappingKey::Local(&*script.key_of(wrapped)?), &wrapped.blob, cx)?;
        self.seal(script, &payload, cx)
    }

    fn wrapping_is_public(&self) -> bool {
        self.0.public
    }
}

impl fmt::Debug for ScriptedWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ScriptedWrapper")
            .field("name", &self.0.name)
            .field("calls", &self.calls())
            .finish_non_exhaustive()
    }
}

fn with_a_flipped_bit(payload: &KeyPayload) -> Result<KeyPayload, KmsError> {
    let flipped = payload.with_bytes(|bytes| {
        KeyPayload::fill_with(|out| {
            out.copy_from_slice(bytes);
            out[PAYLOAD_KEY_AT] ^= 1;
        })
    });
    flipped.and_then(|flipped| flipped).map_err(KmsError::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::keys::calls::fixtures::{payload, request};
    use crate::keys::wrappers::{WrapRequest, Wrappers};

    #[test]
    fn each_state_fails_wraps_and_unwraps_alike_until_it_is_replaced() {
        type Set = fn(&ScriptedWrapper);
        let states: [(Set, ErrorKind); 7] = [
            (ScriptedWrapper::disable, ErrorKind::Disabled),
            (ScriptedWrapper::delete, ErrorKind::Deleted),
            (ScriptedWrapper::deny, ErrorKind::Denied),
            (ScriptedWrapper::unreachable, ErrorKind::Unreachable),
            (|key| key.throttle(Duration::from_secs(70)), ErrorKind::Unreachable),
            (ScriptedWrapper::bad_ciphertext, ErrorKind::BadCiphertext),
            (ScriptedWrapper::misconfigure, ErrorKind::Misconfigured),
        ];
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(key.clone());
        let wrapped = wrappers.wrap(&payload(1), &request()).unwrap().keys;
        for (set, kind) in states {
            set(&key);
            assert_eq!(wrappers.wrap(&payload(1), &request()).unwrap_err().kind(), kind);
            assert_eq!(wrappers.unwrap(&wrapped, &request()).err().map(|error| error.kind()), Some(kind));
            assert_eq!(wrappers.check(&wrapped, &request()).unwrap_err().kind(), kind);
        }
        key.restore();
        wrappers.check(&wrapped, &request()).unwrap();
    }

    #[test]
    fn a_throttled_caller_is_told_when_to_come_back() {
        let key = ScriptedWrapper::new("k");
        key.throttle(Duration::from_secs(7));
        let error = key.enter().err().unwrap();
        assert_eq!((error.class, error.retry_after), (KmsClass::Throttled, Some(Duration::from_secs(7))));
    }

    #[test]
    fn a_hanging_call_goes_on_as_the_next_state_says() {
        let key = ScriptedWrapper::new("k");
        key.hang();
        let wrappers = Wrappers::one(key.clone());
        std::thread::scope(|scope| {
            let call = scope.spawn(|| wrappers.wrap(&payload(1), &request()));
            while key.calls() == 0 {
                std::thread::yield_now();
            }
            key.deny();
            assert_eq!(call.join().unwrap().unwrap_err().kind(), ErrorKind::Denied);
        });
        key.hang();
        let short = WrapRequest { timeout: Duration::from_millis(20), ..request() };
        assert_eq!(wrappers.wrap(&payload(1), &short).unwrap_err().kind(), ErrorKind::Unreachable);
        key.restore();
    }

    #[test]
    fn a_lying_wrapper_returns_another_payload_without_an_error() {
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(key.clone());
        let wrapped = wrappers.wrap(&payload(1), &request()).unwrap().keys;
        key.corrupt();
        let got = wrappers.unwrap(&wrapped, &request()).unwrap();
        let differing: u32 = got.with_bytes(|bytes| bytes.iter().map(|byte| (byte ^ 1).count_ones()).sum()).unwrap();
        assert_eq!(differing, 1);
    }

    #[test]
    fn older_versions_still_unwrap_and_clones_are_one_key() {
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(key.clone());
        let old = wrappers.wrap(&payload(1), &request()).unwrap().keys;
        let clone = key.clone();
        clone.rotate();
        let new = wrappers.wrap(&payload(1), &request()).unwrap().keys;
        assert_eq!((&*old[0].key_version, &*new[0].key_version), ("0", "1"));
        for wrapped in [old, new] {
            wrappers.unwrap(&wrapped, &request()).unwrap();
        }
        assert_eq!(clone.calls(), 6, "two wraps, each verified, and two unwraps");
    }

    #[test]
    fn calls_are_counted_by_what_they_are_and_by_how_many_there_are_at_once() {
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(key.clone());
        let wrapped = wrappers.wrap(&payload(1), &request()).unwrap().keys;
        let cases = (key.wraps(), key.unwraps(), key.rewraps(), key.calls(), key.most_in_flight());
        assert_eq!(cases, (1, 1, 0, 2, 1));
        key.hang();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| wrappers.check(&wrapped, &request()).unwrap());
            }
            while key.calls() < 5 {
                std::thread::yield_now();
            }
            key.restore();
        });
        assert_eq!((key.unwraps(), key.most_in_flight()), (4, 3));
    }

    #[test]
    fn only_the_next_calls_are_throttled_and_a_new_state_ends_it() {
        let key = ScriptedWrapper::new("k");
        let throttled = |key: &ScriptedWrapper| key.enter().err().map(|error| (error.class, error.retry_after));
        key.throttle_next(2, None);
        let answers = [throttled(&key), throttled(&key), throttled(&key)];
        assert_eq!(answers, [Some((KmsClass::Throttled, None)), Some((KmsClass::Throttled, None)), None]);
        let after = Duration::from_secs(1);
        key.throttle_next(2, after);
        assert_eq!(throttled(&key), Some((KmsClass::Throttled, Some(after))));
        key.restore();
        assert_eq!(throttled(&key), None);
    }

    #[test]
    fn a_public_key_wraps_like_any_other_and_says_what_it_is() {
        assert!(Wrappers::one(ScriptedWrapper::public("k")).is_public());
        assert!(!Wrappers::one(ScriptedWrapper::new("k")).is_public());
        let wrappers = Wrappers::one(ScriptedWrapper::public("k"));
        let wrapped = wrappers.wrap(&payload(1), &request()).unwrap().keys;
        wrappers.check(&wrapped, &request()).unwrap();
    }
}
