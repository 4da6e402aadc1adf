//! [`Wrappers`]: the master keys that a cluster is wrapped under, asked all at once, and one verdict from their answers.
//!
//! A revocation anywhere beats a success anywhere: whoever can disable one of the master keys decides. No answer is no
//! verdict, so an outage of one key service is bridged by another and never undoes a revocation.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;

use crate::aead::constant_time_eq;
use crate::error::{Error, ErrorKind, KmsClass, KmsError, Result};
use crate::format::record::{MAX_BLOB, MAX_KEY_ID, MAX_KEY_VERSION, MAX_PROVIDER, MAX_WRAPPINGS};
use crate::format::wrapped::Purpose;
use crate::ids::MasterKeyId;
use crate::keys::calls::Lane;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::secret::KeyPayload;

pub(crate) use crate::keys::calls::WrapRequest;

/// One master key, or several that each wrap every key (providers or regions).
///
/// Opening asks all that wrapped the key. If one says disabled, deleted or denied, the data stays closed, whatever the others
/// say; one that cannot be reached says nothing. A master key that could not be reached when a key was made has not wrapped
/// it, and has no say in it: wrappings are not repaired yet. Clones share the bound on calls in flight.
#[derive(Clone)]
pub struct Wrappers(Arc<[Lane]>);

impl Wrappers {
    /// One master key.
    pub fn one(wrapper: impl KeyWrapper) -> Self {
        Self::from(Arc::new(wrapper) as Arc<dyn KeyWrapper>)
    }

    /// Up to eight master keys. Each alone opens what it wrapped while the others are out of reach.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] for none, for more than eight, and for two with the same [`KeyWrapper::id`].
    pub fn any_of(wrappers: impl IntoIterator<Item = Arc<dyn KeyWrapper>>) -> Result<Self> {
        let lanes: Vec<_> = wrappers.into_iter().map(Lane::new).collect();
        if lanes.is_empty() {
            return Err(misconfigured("no master key is configured; name at least one"));
        }
        if lanes.len() > MAX_WRAPPINGS {
            let text = format!("{} master keys are configured; at most {MAX_WRAPPINGS} can be", lanes.len());
            return Err(misconfigured(text));
        }
        for (at, lane) in lanes.iter().enumerate() {
            if lanes[..at].iter().any(|other| other.id() == lane.id()) {
                return Err(misconfigured(format!("master key {} is configured twice; remove one", lane.id())));
            }
        }
        Ok(Self(lanes.into()))
    }

    /// Wraps `payload` under every master key that answers, and has each unwrap its own result before it counts: the only
    /// copy of a key must not rely on a wrapper that returns garbage. One success is enough.
    ///
    /// # Errors
    /// If none succeeded, or one is revoked, the most telling failure. [`ErrorKind::Forked`] in a forked child.
    pub(crate) fn wrap(&self, payload: &Arc<KeyPayload>, request: &WrapRequest) -> Result<Vec<WrappedKey>> {
        payload.with_bytes(|_| ())?;
        let deadline = request.deadline();
        let started: Vec<_> = self
            .0
            .iter()
            .map(|lane| {
                let (payload, id) = (Arc::clone(payload), lane.id().clone());
                lane.start(request, deadline, move |wrapper, cx| wrap_and_verify(wrapper, &id, &payload, cx))
            })
            .collect();
        let mut wrapped = Vec::new();
        let mut failures = Vec::new();
        for (lane, pending) in self.0.iter().zip(started) {
            match pending.wait() {
                Ok(key) => wrapped.push(key),
                Err(error) => failures.push(Failure { key: lane.id(), version: "", error }),
            }
        }
        // A key that one master key did not wrap because it is revoked could be opened in spite of the revocation.
        let revoked = failures.iter().any(|failure| failure.error.class.is_revocation());
        if wrapped.is_empty() || revoked {
            Err(most_telling(failures, &phrase("wrapping", request)))
        } else {
            Ok(wrapped)
        }
    }

    /// Unwraps a key from those of its wrappings whose master keys are configured; the others are sent nowhere. Whether the
    /// payload is the expected one is for the caller to check.
    ///
    /// # Errors
    /// A revocation by any master key, whatever the others answered; else, if none succeeded, the most telling failure.
    /// [`ErrorKind::Misconfigured`] if no configured master key has wrapped it.
    pub(crate) fn unwrap(&self, wrappings: &[WrappedKey], request: &WrapRequest) -> Result<KeyPayload> {
        self.ask(wrappings, request, &phrase("unwrapping", request), |wrapper, key, cx| wrapper.unwrap_key(key, cx))
    }

    /// Whether the master keys can be used, by their stored probes.
    ///
    /// # Errors
    /// As [`Wrappers::unwrap`].
    pub(crate) fn check(&self, probes: &[WrappedKey], request: &WrapRequest) -> Result<()> {
        self.ask(probes, request, "checking", |wrapper, probe, cx| wrapper.check(probe, cx))
    }

    /// Whether anybody could have wrapped what these open.
    pub(crate) fn is_public(&self) -> bool {
        self.0.iter().any(|lane| lane.wrapper().wrapping_is_public())
    }

    /// The configured master keys.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &MasterKeyId> {
        self.0.iter().map(Lane::id)
    }

    fn ask<T: Send + 'static>(
        &self,
        wrappings: &[WrappedKey],
        request: &WrapRequest,
        what: &str,
        call: fn(&dyn KeyWrapper, &WrappedKey, &WrapContext<'_>) -> Result<T, KmsError>,
    ) -> Result<T> {
        let deadline = request.deadline();
        let mut started = Vec::new();
        for lane in &*self.0 {
            for key in wrappings.iter().filter(|key| key.master_key == *lane.id()) {
                let own = key.clone();
                started.push((key, lane.start(request, deadline, move |wrapper, cx| call(wrapper, &own, cx))));
            }
        }
        if started.is_empty() {
            return Err(self.no_master_key(wrappings, what));
        }
        let mut success = None;
        let mut failures = Vec::new();
        for (key, pending) in started {
            match pending.wait() {
                Ok(value) => success = success.or(Some(value)),
                Err(error) => failures.push(Failure { key: &key.master_key, version: &key.key_version, error }),
            }
        }
        match success {
            Some(value) if !failures.iter().any(|failure| failure.error.class.is_revocation()) => Ok(value),
            _ => Err(most_telling(failures, what)),
        }
    }

    fn no_master_key(&self, wrappings: &[WrappedKey], what: &str) -> Error {
        let configured: Vec<_> = self.ids().map(MasterKeyId::to_string).collect();
        let recorded: Vec<_> = wrappings.iter().map(|key| key.master_key.to_string()).collect();
        // In quotes and escaped: a record's ids are not authenticated yet.
        misconfigured(format!(
            "{what}: no configured master key has wrapped this key; configured: {configured:?}, recorded: {recorded:?}; \
             configure one that is recorded"
        ))
    }
}

impl From<Arc<dyn KeyWrapper>> for Wrappers {
    fn from(wrapper: Arc<dyn KeyWrapper>) -> Self {
        Self(Arc::new([Lane::new(wrapper)]))
    }
}

impl fmt::Debug for Wrappers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.ids()).finish()
    }
}

/// One master key's failure; `version` is of the wrapping that it was asked about, if any.
struct Failure<'a> {
    key: &'a MasterKeyId,
    version: &'a str,
    error: KmsError,
}

/// The error of the strongest failure, the first of equals, with the others in its message.
fn most_telling(mut failures: Vec<Failure<'_>>, what: &str) -> Error {
    let ranks = failures.iter().enumerate().map(|(at, failure)| (rank(failure.error.class), Reverse(at)));
    let Some((_, Reverse(at))) = ranks.max() else {
        return Error::new(ErrorKind::Unclassified, format!("{what}: no master key was asked"));
    };
    let told = failures.remove(at);
    let what = if told.version.is_empty() { what.into() } else { format!("{what} (key version {:?})", told.version) };
    let error = Error::kms(told.error, told.key, what);
    if failures.is_empty() {
        return error;
    }
    let others: Vec<_> = failures.iter().map(|other| format!("{}: {}", other.key, other.error)).collect();
    Error::with_source(error.kind(), format!("{error}; also {}", others.join("; ")), error)
}

fn rank(class: KmsClass) -> u8 {
    match class {
        KmsClass::Denied | KmsClass::Disabled | KmsClass::Deleted => 2,
        KmsClass::BadCiphertext | KmsClass::Misconfigured | KmsClass::Unclassified => 1,
        KmsClass::Unreachable | KmsClass::Throttled => 0,
    }
}

fn phrase(doing: &str, request: &WrapRequest) -> String {
    let generation = request.generation;
    match (request.purpose, request.database) {
        (Purpose::Data, Some(database)) => format!("{doing} data key {generation} of database {database}"),
        (Purpose::Data, None) => format!("{doing} data key {generation}"),
        (Purpose::Cluster, _) => format!("{doing} cluster key {generation} of cluster {}", request.cluster),
        (Purpose::Probe, _) => format!("{doing} a probe"),
    }
}

fn wrap_and_verify(
    wrapper: &dyn KeyWrapper,
    id: &MasterKeyId,
    payload: &KeyPayload,
    cx: &WrapContext<'_>,
) -> Result<WrappedKey, KmsError> {
    let wrapped = wrapper.wrap_key(payload, cx)?;
    if let Some(fault) = fault_of(&wrapped, id) {
        return Err(unclassified(format!("the wrapper returned {fault}; report it to its author")));
    }
    let unwrapped = wrapper.unwrap_key(&wrapped, cx).map_err(|error| match error.class {
        KmsClass::BadCiphertext => unclassified(format!("the wrapper cannot unwrap what it has just wrapped: {error}")),
        _ => error,
    })?;
    let same = payload.with_bytes(|sent| unwrapped.with_bytes(|got| constant_time_eq(sent, got)));
    match same {
        Ok(Ok(true)) => Ok(wrapped),
        Ok(Ok(false)) => {
            Err(unclassified("the wrapper unwrapped another payload than it had just wrapped; do not use it"))
        }
        Ok(Err(error)) | Err(error) => Err(unclassified(error)),
    }
}

/// What about the wrapper's answer does not fit a record, or is not its own.
fn fault_of(wrapped: &WrappedKey, id: &MasterKeyId) -> Option<String> {
    let MasterKeyId { provider, key } = &wrapped.master_key;
    let over =
        |name: &str, len: usize, most: usize| (len > most).then(|| format!("{name} of {len} bytes, more than {most}"));
    if wrapped.master_key != *id {
        return Some(format!("a key of master key {:?}, not of its own", wrapped.master_key.to_string()));
    }
    if wrapped.blob.is_empty() {
        return Some("an empty blob".into());
    }
    over("a blob", wrapped.blob.len(), MAX_BLOB)
        .or_else(|| over("a key version", wrapped.key_version.len(), MAX_KEY_VERSION))
        .or_else(|| over("a provider name", provider.len(), MAX_PROVIDER))
        .or_else(|| over("a master key name", key.len(), MAX_KEY_ID))
}

fn misconfigured(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misconfigured, message)
}

fn unclassified(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> KmsError {
    KmsError::with_source(KmsClass::Unclassified, source)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::ids::{DatabaseId, Generation};
    use crate::keys::calls::fixtures::{payload, request};
    use crate::kms::scripted::ScriptedWrapper;

    fn both(first: &ScriptedWrapper, second: &ScriptedWrapper) -> Wrappers {
        let all = [first.clone(), second.clone()].map(|wrapper| Arc::new(wrapper) as Arc<dyn KeyWrapper>);
        Wrappers::any_of(all).unwrap()
    }

    fn bytes(payload: &KeyPayload) -> [u8; 128] {
        payload.with_bytes(|bytes| *bytes).unwrap()
    }

    fn kind<T>(outcome: Result<T>) -> Option<ErrorKind> {
        outcome.err().map(|error| error.kind())
    }

    type Scene = (&'static str, fn(&ScriptedWrapper));
    const SCENES: [Scene; 6] = [
        ("ok", ScriptedWrapper::restore),
        ("disabled", ScriptedWrapper::disable),
        ("deleted", ScriptedWrapper::delete),
        ("denied", ScriptedWrapper::deny),
        ("unreachable", ScriptedWrapper::unreachable),
        ("bad ciphertext", ScriptedWrapper::bad_ciphertext),
    ];

    #[test]
    fn one_revocation_beats_any_success_and_no_answer_is_no_verdict() {
        use ErrorKind::{BadCiphertext, Deleted, Denied, Disabled, Unreachable};
        // The outcome of (row, column), in the order of SCENES; None is success.
        let expected: [[Option<ErrorKind>; 6]; 6] = [
            [None, Some(Disabled), Some(Deleted), Some(Denied), None, None],
            [Some(Disabled); 6],
            [Some(Deleted); 6],
            [Some(Denied); 6],
            [None, Some(Disabled), Some(Deleted), Some(Denied), Some(Unreachable), Some(BadCiphertext)],
            [None, Some(Disabled), Some(Deleted), Some(Denied), Some(BadCiphertext), Some(BadCiphertext)],
        ];
        let (a, b) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"));
        let wrappers = both(&a, &b);
        let key = payload(1);
        let wrapped = wrappers.wrap(&key, &request()).unwrap();
        assert_eq!(wrapped.len(), 2);
        for (row, (name_a, set_a)) in SCENES.into_iter().enumerate() {
            for (column, (name_b, set_b)) in SCENES.into_iter().enumerate() {
                set_a(&a);
                set_b(&b);
                let expected = expected[row][column];
                let unwrapped = wrappers.unwrap(&wrapped, &request());
                assert_eq!(unwrapped.as_ref().err().map(Error::kind), expected, "unwrap: {name_a}, {name_b}");
                assert!(unwrapped.is_err() || bytes(&unwrapped.unwrap()) == bytes(&key), "{name_a}, {name_b}");
                assert_eq!(kind(wrappers.check(&wrapped, &request())), expected, "check: {name_a}, {name_b}");
            }
        }
    }

    #[test]
    fn a_wrap_keeps_what_succeeded_unless_a_master_key_is_revoked() {
        let (a, b) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"));
        let wrappers = both(&a, &b);
        let key = payload(1);
        for (name, set) in &SCENES[1..] {
            a.restore();
            set(&b);
            let revoked = matches!(*name, "disabled" | "deleted" | "denied");
            match wrappers.wrap(&key, &request()) {
                Ok(wrapped) => {
                    assert!(!revoked, "{name}: the key could be opened in spite of the revocation");
                    assert_eq!(wrapped.iter().map(|key| &key.master_key).collect::<Vec<_>>(), [&a.id()], "{name}");
                }
                Err(error) => assert!(revoked, "{name}: {error}"),
            }
            a.unreachable();
            assert_ne!(kind(wrappers.wrap(&key, &request())), None, "{name}");
        }
    }

    #[test]
    fn of_two_failures_the_verdict_is_told_first_and_the_other_beside_it() {
        let (a, b) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"));
        let wrappers = both(&a, &b);
        a.unreachable();
        b.disable();
        let error = wrappers.wrap(&payload(1), &request()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Disabled);
        let text = error.to_string();
        let (first, second) = (text.find("scripted:b"), text.find("scripted:a"));
        assert!(first.is_some() && second.is_some() && first < second, "{text}");
        assert!(text.contains("data key 3 of database d2d2d2d2"), "{text}");
    }

    #[test]
    fn a_hanging_wrapper_costs_its_deadline_and_not_the_key() {
        let (a, b) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"));
        let wrappers = both(&a, &b);
        let key = payload(1);
        let wrapped = wrappers.wrap(&key, &request()).unwrap();
        a.hang();
        let waiting = |millis| WrapRequest { timeout: Duration::from_millis(millis), ..request() };
        // Uses up every place for calls to `a`, whatever becomes of these.
        for _ in 0..crate::keys::calls::IN_FLIGHT {
            let _ = wrappers.unwrap(&wrapped, &waiting(1));
        }
        let short = waiting(500);
        for _ in 0..2 {
            let start = Instant::now();
            assert_eq!(bytes(&wrappers.unwrap(&wrapped, &short).unwrap()), bytes(&key));
            assert!(start.elapsed() >= short.timeout);
        }
        b.disable();
        assert_eq!(kind(wrappers.unwrap(&wrapped, &short)), Some(ErrorKind::Disabled));
        a.restore();
    }

    #[test]
    fn a_wrapping_of_another_master_key_is_sent_nowhere() {
        let (a, b) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"));
        let wrapped = Wrappers::one(a.clone()).wrap(&payload(1), &request()).unwrap();
        let other = Wrappers::one(b.clone());
        for outcome in [other.unwrap(&wrapped, &request()).map(drop), other.check(&wrapped, &request())] {
            let error = outcome.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            let text = error.to_string();
            assert!(text.contains("scripted:a") && text.contains("scripted:b"), "{text}");
        }
        assert_eq!(b.calls(), 0);
        assert_eq!(kind(other.unwrap(&[], &request())), Some(ErrorKind::Misconfigured));
    }

    #[test]
    fn every_recorded_version_of_a_master_key_is_tried() {
        let a = ScriptedWrapper::new("a");
        let wrappers = Wrappers::one(a.clone());
        let key = payload(1);
        let mut wrapped = wrappers.wrap(&key, &request()).unwrap();
        a.rotate();
        wrapped.extend(wrappers.wrap(&key, &request()).unwrap());
        assert_ne!(wrapped[0].key_version, wrapped[1].key_version);
        for damaged in 0..2 {
            let mut wrapped = wrapped.clone();
            wrapped[damaged].blob[0] ^= 1;
            assert_eq!(bytes(&wrappers.unwrap(&wrapped, &request()).unwrap()), bytes(&key));
        }
        let mut damaged = wrapped.clone();
        damaged.iter_mut().for_each(|key| key.blob[0] ^= 1);
        let error = wrappers.unwrap(&damaged, &request()).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::BadCiphertext);
        assert!(error.to_string().contains("key version \"0\""), "{error}");
    }

    #[test]
    fn a_key_opens_for_its_own_cluster_database_generation_and_purpose_only() {
        let wrappers = Wrappers::one(ScriptedWrapper::new("a"));
        let wrapped = wrappers.wrap(&payload(1), &request()).unwrap();
        let others = [
            WrapRequest { cluster: crate::ids::ClusterId::from_bytes([9; 16]), ..request() },
            WrapRequest { database: Some(DatabaseId::from_bytes([9; 16])), ..request() },
            WrapRequest { database: None, ..request() },
            WrapRequest { generation: Generation::new(9).unwrap(), ..request() },
            WrapRequest { purpose: Purpose::Cluster, ..request() },
        ];
        for other in others {
            assert_eq!(kind(wrappers.unwrap(&wrapped, &other)), Some(ErrorKind::BadCiphertext), "{other:?}");
        }
        assert_eq!(kind(wrappers.unwrap(&wrapped, &request())), None);
    }

    #[test]
    fn a_wrapper_that_lies_is_found_before_a_key_relies_on_it() {
        let a = ScriptedWrapper::new("a");
        a.corrupt();
        let error = Wrappers::one(a).wrap(&payload(1), &request()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unclassified);
        assert!(error.to_string().contains("another payload"), "{error}");
    }

    /// Wraps well, and then spoils what it returns.
    struct Spoiling<F>(ScriptedWrapper, Mutex<F>);

    impl<F: FnMut(&mut WrappedKey) + Send + 'static> KeyWrapper for Spoiling<F> {
        fn id(&self) -> MasterKeyId {
            self.0.id()
        }

        fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
            let mut wrapped = self.0.wrap_key(key, cx)?;
            (self.1.lock().unwrap())(&mut wrapped);
            Ok(wrapped)
        }

        fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
            self.0.unwrap_key(key, cx)
        }
    }

    #[test]
    fn a_wrapper_that_returns_garbage_is_found_when_it_wraps() {
        type Spoil = fn(&mut WrappedKey);
        let spoils: [(Spoil, &str); 7] = [
            (|key| key.blob.fill(0), "cannot unwrap what it has just wrapped"),
            (|key| key.blob.truncate(100), "cannot unwrap what it has just wrapped"),
            (|key| key.key_version = "7".into(), "cannot unwrap what it has just wrapped"),
            (|key| key.blob.clear(), "an empty blob"),
            (|key| key.blob.resize(4097, 0), "a blob of 4097 bytes"),
            (|key| key.key_version = "v".repeat(256), "a key version of 256 bytes"),
            (|key| key.master_key.key = "other".into(), "scripted:other"),
        ];
        for (spoil, expected) in spoils {
            let wrapper = Spoiling(ScriptedWrapper::new("a"), Mutex::new(spoil));
            let error = Wrappers::one(wrapper).wrap(&payload(1), &request()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unclassified, "{error}");
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn a_master_key_whose_name_fits_no_record_wraps_nothing() {
        let wrappers = Wrappers::one(ScriptedWrapper::new("k".repeat(1025)));
        assert_eq!(kind(wrappers.wrap(&payload(1), &request())), Some(ErrorKind::Unclassified));
        let wrappers = Wrappers::one(ScriptedWrapper::new("k".repeat(1024)));
        assert_eq!(kind(wrappers.wrap(&payload(1), &request())), None);
    }

    #[test]
    fn no_master_key_too_many_or_the_same_twice_is_refused() {
        let named = |name: usize| Arc::new(ScriptedWrapper::new(name.to_string())) as Arc<dyn KeyWrapper>;
        assert_eq!(kind(Wrappers::any_of([])), Some(ErrorKind::Misconfigured));
        assert_eq!(kind(Wrappers::any_of((0..8).map(named))), None);
        assert_eq!(kind(Wrappers::any_of((0..9).map(named))), Some(ErrorKind::Misconfigured));
        let error = Wrappers::any_of([named(1), named(2), named(1)]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Misconfigured);
        assert!(error.to_string().contains("scripted:1"), "{error}");
    }

    #[test]
    fn wrapping_is_public_if_it_is_for_any_of_them() {
        struct Public;
        impl KeyWrapper for Public {
            fn id(&self) -> MasterKeyId {
                MasterKeyId::new("rsa", "k")
            }
            fn wrap_key(&self, _: &KeyPayload, _: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                Err(KmsError::new(KmsClass::Unreachable))
            }
            fn unwrap_key(&self, _: &WrappedKey, _: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
                Err(KmsError::new(KmsClass::Unreachable))
            }
            fn wrapping_is_public(&self) -> bool {
                true
            }
        }
        let scripted = ScriptedWrapper::new("a");
        assert!(!Wrappers::one(scripted.clone()).is_public());
        assert!(Wrappers::any_of([Arc::new(scripted) as Arc<dyn KeyWrapper>, Arc::new(Public)]).unwrap().is_public());
    }
}
