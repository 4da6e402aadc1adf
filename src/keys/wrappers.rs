//! [`Wrappers`]: the master keys that a cluster is wrapped under, asked all at once, and one verdict from their answers.
//!
//! A revocation anywhere beats a success anywhere: whoever can disable one of the master keys decides. No answer is no
//! verdict, so an outage of one key service is bridged by another and never undoes a revocation.

use std::cmp::Reverse;
use std::fmt;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, KmsClass, KmsError, Result};
use crate::format::record::{MAX_BLOB, MAX_KEY_ID, MAX_KEY_VERSION, MAX_PROVIDER, MAX_WRAPPINGS, Record};
use crate::format::wrapped::Purpose;
use crate::ids::MasterKeyId;
use crate::keys::calls::{Lane, Pending};
use crate::keys::payload::are_same;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::secret::KeyPayload;

pub(crate) use crate::keys::calls::WrapRequest;

/// One master key, or several that each wrap every key (providers or regions).
///
/// Opening asks all that wrapped the key. If one says disabled, deleted or denied, the data stays closed, whatever the others
/// say; one that cannot be reached says nothing. A master key that could not be reached when a key was made has not wrapped
/// it, and has no say in it until it does. Clones share the bound on calls in flight.
///
/// Where many keys are wrapped or unwrapped together, a master key that could not be reached by 16 calls in a row is not
/// asked about the others, so that an outage costs about two time-outs and not hundreds. It is the same as if the outage
/// lasted as long: a revocation by that master key is heard the next time it is asked.
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
    /// copy of a key must not rely on a wrapper that returns garbage. One success is enough; what the others answered is told
    /// beside it.
    ///
    /// # Errors
    /// If none succeeded, or one is revoked, the most telling failure. [`ErrorKind::Forked`] in a forked child.
    pub(crate) fn wrap(&self, payload: &Arc<KeyPayload>, request: &WrapRequest) -> Result<Wrapped> {
        self.wrap_missing(payload, &[], request)
    }

    /// As [`Wrappers::wrap`], but only under the master keys that have no wrapping in `existing`: what was missing when the
    /// key was made. Makes no call, and returns nothing, if they all have one.
    ///
    /// # Errors
    /// As [`Wrappers::wrap`], of the master keys that it asks.
    pub(crate) fn wrap_missing(
        &self,
        payload: &Arc<KeyPayload>,
        existing: &[WrappedKey],
        request: &WrapRequest,
    ) -> Result<Wrapped> {
        self.start_wraps(payload, existing, request)?.settle(Ok)
    }

    /// Whether a configured master key has no wrapping in `existing`.
    pub(crate) fn lacks(&self, existing: &[WrappedKey]) -> bool {
        self.0.iter().any(|lane| !has_wrapped(lane, existing))
    }

    /// Unwraps a key from those of its wrappings whose master keys are configured; the others are sent nowhere. A payload
    /// counts only if `accept` takes it, which says whether it is the expected one; else the next is tried.
    ///
    /// # Errors
    /// A revocation by any master key, whatever the others answered; else the first refusal by `accept`, if it refused all;
    /// else, if none was unwrapped, the most telling failure. [`ErrorKind::Misconfigured`] if no configured master key has
    /// wrapped it.
    pub(crate) fn unwrap_with<T>(
        &self,
        wrappings: &[WrappedKey],
        request: &WrapRequest,
        accept: impl Fn(&KeyPayload) -> Result<T>,
    ) -> Result<T> {
        self.start_unwraps(wrappings, request)?.accept(accept).map(|(_, accepted)| accepted)
    }

    /// As [`Wrappers::unwrap_with`], but takes any payload.
    #[cfg(test)]
    pub(crate) fn unwrap(&self, wrappings: &[WrappedKey], request: &WrapRequest) -> Result<KeyPayload> {
        self.start_unwraps(wrappings, request)?.accept(|_| Ok(())).map(|(payload, ())| payload)
    }

    /// Whether the master keys can be used, by their stored probes.
    ///
    /// # Errors
    /// A revocation by any master key, whatever the others answered; else, if none succeeded, the most telling failure.
    /// [`ErrorKind::Misconfigured`] if no configured master key has wrapped the probe.
    pub(crate) fn check(&self, probes: &[WrappedKey], request: &WrapRequest) -> Result<()> {
        let asked = self.ask(probes, request, "checking".into(), |wrapper, probe, cx| wrapper.check(probe, cx))?;
        asked.accept(|()| Ok(())).map(|_| ())
    }

    /// Whether anybody could have wrapped what these open.
    pub(crate) fn is_public(&self) -> bool {
        self.0.iter().any(|lane| lane.wrapper().wrapping_is_public())
    }

    /// # Errors
    /// [`ErrorKind::Misconfigured`] if none of these master keys wraps the cluster's own keys: what they wrapped would be lost
    /// to those that do.
    pub(crate) fn require_any_of(&self, cluster: &Record) -> Result<()> {
        if self.0.iter().any(|lane| has_wrapped(lane, &cluster.wrappings)) {
            return Ok(());
        }
        let ids = |ids: &mut dyn Iterator<Item = &MasterKeyId>| ids.map(MasterKeyId::to_string).collect::<Vec<_>>();
        Err(misconfigured(format!(
            "the cluster was moved to the master keys {:?}, and {:?} are configured; use those (Cluster::use_wrappers)",
            ids(&mut cluster.wrappings.iter().map(|key| &key.master_key)),
            ids(&mut self.ids())
        )))
    }

    /// These without the master keys `gone`, unless none would be left.
    pub(crate) fn without(&self, gone: &[MasterKeyId]) -> Self {
        let left: Arc<[_]> = self.0.iter().filter(|lane| !gone.contains(lane.id())).cloned().collect();
        if left.is_empty() { self.clone() } else { Self(left) }
    }

    /// The configured master keys.
    pub(crate) fn ids(&self) -> impl Iterator<Item = &MasterKeyId> {
        self.0.iter().map(Lane::id)
    }

    /// The same master keys for one run over many keys, in which one that does not answer is soon not asked any more: see
    /// [`Lane::for_one_run`]. A run within a run is part of it.
    pub(crate) fn for_one_run(&self) -> Self {
        Self(self.0.iter().map(Lane::for_one_run).collect())
    }

    /// These master keys, and those of `others` that are not among them, as far as a key can have wrappings.
    pub(crate) fn and(&self, others: &Self) -> Self {
        let more = others.0.iter().filter(|other| self.ids().all(|id| id != other.id()));
        Self(self.0.iter().chain(more).take(MAX_WRAPPINGS).cloned().collect())
    }

    pub(super) fn lanes(&self) -> &[Lane] {
        &self.0
    }

    /// Starts what [`Wrappers::wrap_missing`] waits for.
    pub(super) fn start_wraps(
        &self,
        payload: &Arc<KeyPayload>,
        existing: &[WrappedKey],
        request: &WrapRequest,
    ) -> Result<Wraps<'_, WrappedKey>> {
        payload.with_bytes(|_| ())?;
        let deadline = request.deadline();
        let start = |lane: &Lane| {
            let (payload, id) = (Arc::clone(payload), lane.id().clone());
            lane.start(request, deadline, move |wrapper, cx| wrap_and_verify(wrapper, &id, &payload, cx))
        };
        let asked = self.0.iter().filter(|lane| !has_wrapped(lane, existing));
        Ok(Wraps { what: phrase("wrapping", request), calls: asked.map(|lane| (lane.id(), start(lane))).collect() })
    }

    /// Starts what [`Wrappers::unwrap_with`] waits for.
    pub(super) fn start_unwraps<'a>(
        &self,
        wrappings: &'a [WrappedKey],
        request: &WrapRequest,
    ) -> Result<Asked<'a, KeyPayload>> {
        let what = phrase("unwrapping", request);
        self.ask(wrappings, request, what, |wrapper, key, cx| wrapper.unwrap_key(key, cx))
    }

    fn ask<'a, T: Send + 'static>(
        &self,
        wrappings: &'a [WrappedKey],
        request: &WrapRequest,
        what: String,
        call: fn(&dyn KeyWrapper, &WrappedKey, &WrapContext<'_>) -> Result<T, KmsError>,
    ) -> Result<Asked<'a, T>> {
        let deadline = request.deadline();
        // Nothing secret goes into such a call. What comes out when nobody waits any more is wiped at once.
        let request = &WrapRequest { in_flight: None, ..request.clone() };
        let mut calls = Vec::new();
        for lane in &*self.0 {
            for key in wrappings.iter().filter(|key| key.master_key == *lane.id()) {
                let own = key.clone();
                calls.push((key, lane.start(request, deadline, move |wrapper, cx| call(wrapper, &own, cx))));
            }
        }
        if calls.is_empty() {
            return Err(self.no_master_key(wrappings, &what));
        }
        Ok(Asked { what, calls })
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

/// A key that was wrapped, and the master keys under which it was not.
#[derive(Debug)]
pub(crate) struct Wrapped {
    /// One for each master key that succeeded.
    pub(crate) keys: Vec<WrappedKey>,
    /// The others, none of them revoked.
    pub(crate) missing: Vec<Missing>,
}

impl Wrapped {
    /// The wrappings, if one of them is by a master key that has wrapped `cluster`, too: a key that none of those opens is
    /// lost when the others are retired.
    ///
    /// # Errors
    /// Why the first of them did not wrap it.
    pub(crate) fn sharing_a_key_with(self, cluster: &Record, what: impl fmt::Display) -> Result<Vec<WrappedKey>> {
        if self.keys.iter().any(|key| cluster.wrappings.iter().any(|own| own.master_key == key.master_key)) {
            return Ok(self.keys);
        }
        self.instead_of(&cluster.wrappings, what)
    }

    /// The wrappings, if every master key that has wrapped `before` and is configured is among them: one that cannot be
    /// reached must not lose its say by the way, nor the key one of those that open it.
    ///
    /// # Errors
    /// Why one of them did not wrap it.
    pub(crate) fn instead_of(self, before: &[WrappedKey], what: impl fmt::Display) -> Result<Vec<WrappedKey>> {
        let had = |missing: &Missing| before.iter().any(|key| key.master_key == missing.master_key);
        match self.missing.into_iter().find(had) {
            None => Ok(self.keys),
            Some(Missing { master_key, why }) => Err(Error::kms(why, &master_key, what.to_string())),
        }
    }
}

/// A master key that did not wrap a key, and has no say in it until it does.
#[derive(Debug)]
pub(crate) struct Missing {
    pub(crate) master_key: MasterKeyId,
    pub(crate) why: KmsError,
}

/// Calls about the wrappings of one key, all under way.
#[must_use]
pub(super) struct Asked<'a, T> {
    what: String,
    calls: Vec<(&'a WrappedKey, Pending<T>)>,
}

impl<T> Asked<'_, T> {
    /// Waits for every answer, and returns the first that `accept` takes unless one was a revocation.
    pub(super) fn accept<R>(self, accept: impl Fn(&T) -> Result<R>) -> Result<(T, R)> {
        let mut answers = Vec::new();
        let mut failures = Vec::new();
        for (key, pending) in self.calls {
            match pending.wait() {
                Ok(answer) => answers.push(answer),
                Err(error) => failures.push(Failure { key: &key.master_key, version: &key.key_version, error }),
            }
        }
        if failures.iter().any(Failure::is_revocation) {
            return Err(most_telling(failures, &self.what));
        }
        let mut refusal = None;
        for answer in answers {
            match accept(&answer) {
                Ok(accepted) => return Ok((answer, accepted)),
                Err(error) => refusal = refusal.or(Some(error)),
            }
        }
        Err(refusal.unwrap_or_else(|| most_telling(failures, &self.what)))
    }
}

/// Calls that wrap one key under several master keys, all under way.
#[must_use]
pub(super) struct Wraps<'a, T> {
    pub(super) what: String,
    pub(super) calls: Vec<(&'a MasterKeyId, Pending<T>)>,
}

impl<T> Wraps<'_, T> {
    /// Waits for every answer. One counts if `keep` makes a wrapped key of it.
    ///
    /// # Errors
    /// The most telling failure if one is a revocation: a key that a revoked master key did not wrap could be opened in spite
    /// of the revocation. Else, if there is no success, the first refusal by `keep`, or the most telling failure.
    pub(super) fn settle(self, keep: impl Fn(T) -> Result<WrappedKey>) -> Result<Wrapped> {
        let mut keys = Vec::new();
        let mut failures = Vec::new();
        let mut refusal = None;
        for (key, pending) in self.calls {
            let error = match pending.wait().map(&keep) {
                Ok(Ok(wrapped)) => {
                    keys.push(wrapped);
                    continue;
                }
                Ok(Err(refused)) => {
                    let told = unclassified(refused.to_string());
                    refusal = refusal.or(Some(refused));
                    told
                }
                Err(error) => error,
            };
            failures.push(Failure { key, version: "", error });
        }
        let revoked = failures.iter().any(Failure::is_revocation);
        if revoked || (keys.is_empty() && !failures.is_empty()) {
            return Err(refusal.filter(|_| !revoked).unwrap_or_else(|| most_telling(failures, &self.what)));
        }
        let missing = failures.into_iter().map(|it| Missing { master_key: it.key.clone(), why: it.error }).collect();
        Ok(Wrapped { keys, missing })
    }
}

/// One master key's failure; `version` is of the wrapping that it was asked about, if any.
struct Failure<'a> {
    key: &'a MasterKeyId,
    version: &'a str,
    error: KmsError,
}

impl Failure<'_> {
    fn is_revocation(&self) -> bool {
        self.error.class.is_revocation()
    }
}

fn has_wrapped(lane: &Lane, existing: &[WrappedKey]) -> bool {
    existing.iter().any(|key| key.master_key == *lane.id())
}

/// The error of the strongest failure, the first of equals, with the others in its message.
fn most_telling(mut failures: Vec<Failure<'_>>, what: &str) -> Error {
    let ranks = failures.iter().enumerate().map(|(at, failure)| (rank(&failure.error), Reverse(at)));
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

fn rank(error: &KmsError) -> u8 {
    match error.class {
        KmsClass::Denied | KmsClass::Disabled | KmsClass::Deleted => 3,
        KmsClass::BadCiphertext | KmsClass::Misconfigured | KmsClass::Unclassified => 2,
        // It says when to come back.
        KmsClass::Throttled if error.retry_after.is_some() => 1,
        KmsClass::Unreachable | KmsClass::Throttled => 0,
    }
}

pub(super) fn phrase(doing: &str, request: &WrapRequest) -> String {
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
    let unwrapped = unwrap_own(wrapper, id, &wrapped, cx)?;
    match are_same(payload, &unwrapped) {
        Ok(true) => Ok(wrapped),
        Ok(false) => Err(unclassified("the wrapper unwrapped another payload than it had just wrapped; do not use it")),
        Err(error) => Err(unclassified(error)),
    }
}

/// Unwraps what the wrapper has just returned, if it fits a record.
pub(super) fn unwrap_own(
    wrapper: &dyn KeyWrapper,
    id: &MasterKeyId,
    wrapped: &WrappedKey,
    cx: &WrapContext<'_>,
) -> Result<KeyPayload, KmsError> {
    if let Some(fault) = fault_of(wrapped, id) {
        return Err(unclassified(format!("the wrapper returned {fault}; report it to its author")));
    }
    wrapper.unwrap_key(wrapped, cx).map_err(|error| match error.class {
        KmsClass::BadCiphertext => unclassified(format!("the wrapper cannot unwrap what it has just wrapped: {error}")),
        _ => error,
    })
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

    /// The states of the matrices below, in the order of their rows and columns.
    const SCENES: [Scene; 6] = [
        ("ok", ScriptedWrapper::restore),
        ("dis", ScriptedWrapper::disable),
        ("del", ScriptedWrapper::delete),
        ("den", ScriptedWrapper::deny),
        ("unr", ScriptedWrapper::unreachable),
        ("bad", ScriptedWrapper::bad_ciphertext),
    ];

    /// What becomes of a call when master key `a` is in the row's state, and `b` in the column's. Written by hand: one
    /// revocation beats any success, the first the second; no answer is no verdict; a success needs one master key.
    type Matrix = [&'static str; 6];
    const EITHER: Matrix = [
        // ok dis del den unr bad
        "ok  dis del den ok  ok",
        "dis dis dis dis dis dis",
        "del del del del del del",
        "den den den den den den",
        "ok  dis del den unr bad",
        "ok  dis del den bad bad",
    ];
    /// The key moves from `a` to `b`: both must work, and `b` is not asked unless `a` does.
    const MOVED: Matrix = [
        "ok  dis del den unr bad",
        "dis dis dis dis dis dis",
        "del del del del del del",
        "den den den den den den",
        "unr unr unr unr unr unr",
        "bad bad bad bad bad bad",
    ];
    /// `b` is added to `a`, which alone has wrapped the key.
    const ADDED: Matrix = [
        "ok  dis del den ok  ok",
        "dis dis dis dis dis dis",
        "del del del del del del",
        "den den den den den den",
        "unr unr unr unr unr unr",
        "bad bad bad bad bad bad",
    ];
    /// `b` is taken away: its revocation still counts, and its payload still helps, but only `a` wraps.
    const REMOVED: Matrix = [
        "ok  dis del den ok  ok",
        "dis dis dis dis dis dis",
        "del del del del del del",
        "den den den den den den",
        "unr dis del den unr bad",
        "bad dis del den bad bad",
    ];

    /// Runs `cell` for each pair of states, set after the key was wrapped as `with` says; each on a thread of its own, because
    /// unreachable master keys are asked again after a while.
    fn for_each_pair(matrix: Matrix, cell: impl Fn(&Pair, [&str; 2], &str) + Sync) {
        std::thread::scope(|scope| {
            for (row, (state_a, set_a)) in SCENES.into_iter().enumerate() {
                let expected: Vec<_> = matrix[row].split_whitespace().collect();
                assert_eq!(expected.len(), 6);
                for ((state_b, set_b), expected) in SCENES.into_iter().zip(expected) {
                    let cell = &cell;
                    scope.spawn(move || {
                        let pair = Pair::new();
                        set_a(&pair.a);
                        set_b(&pair.b);
                        cell(&pair, [state_a, state_b], expected);
                    });
                }
            }
        });
    }

    /// Two master keys that have both wrapped `key`.
    struct Pair {
        a: ScriptedWrapper,
        b: ScriptedWrapper,
        key: Arc<KeyPayload>,
        wrapped: Vec<WrappedKey>,
    }

    impl Pair {
        fn new() -> Self {
            let (a, b, key) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"), payload(1));
            let wrapped = both(&a, &b).wrap(&key, &request()).unwrap().keys;
            assert_eq!(wrapped.len(), 2);
            Self { a, b, key, wrapped }
        }

        /// Whether this is the key.
        fn accept(&self, payload: &KeyPayload) -> Result<()> {
            if bytes(payload) == bytes(&self.key) { Ok(()) } else { Err(Error::damaged("another key")) }
        }

        /// Checks what was wrapped: by whom, what is missing, and that it opens when all is well again.
        fn holds(&self, wrapped: &Wrapped, targets: &[&ScriptedWrapper], states: &[&str], told: &str) {
            let by = |ok: bool| -> Vec<MasterKeyId> {
                targets
                    .iter()
                    .zip(states)
                    .filter(|(_, state)| (**state == "ok") == ok)
                    .map(|(key, _)| key.id())
                    .collect()
            };
            assert_eq!(wrapped.keys.iter().map(|key| key.master_key.clone()).collect::<Vec<_>>(), by(true), "{told}");
            assert_eq!(wrapped.missing.iter().map(|it| it.master_key.clone()).collect::<Vec<_>>(), by(false), "{told}");
            assert!(wrapped.missing.iter().all(|it| !it.why.class.is_revocation()), "{told}");
            self.a.restore();
            self.b.restore();
            for key in &wrapped.keys {
                let one = std::slice::from_ref(key);
                both(&self.a, &self.b).unwrap_with(one, &request(), |payload| self.accept(payload)).unwrap();
            }
        }
    }

    fn verdict<T>(outcome: &Result<T>) -> &'static str {
        match outcome.as_ref().err().map(Error::kind) {
            None => "ok",
            Some(ErrorKind::Disabled) => "dis",
            Some(ErrorKind::Deleted) => "del",
            Some(ErrorKind::Denied) => "den",
            Some(ErrorKind::Unreachable) => "unr",
            Some(ErrorKind::BadCiphertext) => "bad",
            Some(_) => "other",
        }
    }

    #[test]
    fn one_revocation_beats_any_success_and_no_answer_is_no_verdict() {
        for_each_pair(EITHER, |pair, states, expected| {
            let wrappers = both(&pair.a, &pair.b);
            let unwrapped = wrappers.unwrap_with(&pair.wrapped, &request(), |payload| pair.accept(payload));
            assert_eq!(verdict(&unwrapped), expected, "unwrap {states:?}");
            assert_eq!(verdict(&wrappers.check(&pair.wrapped, &request())), expected, "check {states:?}");
        });
    }

    #[test]
    fn a_wrap_keeps_what_succeeded_and_tells_what_is_missing_unless_a_master_key_is_revoked() {
        for_each_pair(EITHER, |pair, states, expected| {
            let wrapped = both(&pair.a, &pair.b).wrap(&pair.key, &request());
            assert_eq!(verdict(&wrapped), expected, "{states:?}");
            if let Ok(wrapped) = wrapped {
                pair.holds(&wrapped, &[&pair.a, &pair.b], &states, &format!("{states:?}"));
            }
        });
    }

    #[test]
    fn a_rewrap_under_the_same_master_keys_follows_the_verdicts_of_both() {
        for_each_pair(EITHER, |pair, states, expected| {
            let wrappers = both(&pair.a, &pair.b);
            let (calls, told) = (pair.a.unwraps(), format!("{states:?}"));
            let wrapped = wrappers.rewrap(&wrappers, &pair.wrapped, &request(), |payload| pair.accept(payload));
            assert_eq!(verdict(&wrapped), expected, "{told}");
            assert!(pair.a.rewraps() > 0 && pair.a.wraps() == 1, "{told}: it did not rewrap by itself");
            assert_eq!(pair.a.unwraps() - calls, u64::from(states[0] == "ok"), "{told}: more than the verification");
            if let Ok(wrapped) = wrapped {
                pair.holds(&wrapped, &[&pair.a, &pair.b], &states, &told);
            }
        });
    }

    #[test]
    fn a_key_moves_to_another_master_key_only_if_both_work() {
        for_each_pair(MOVED, |pair, states, expected| {
            let (old, new) = (Wrappers::one(pair.a.clone()), Wrappers::one(pair.b.clone()));
            let calls = pair.b.calls();
            let wrapped = new.rewrap(&old, &pair.wrapped[..1], &request(), |payload| pair.accept(payload));
            assert_eq!(verdict(&wrapped), expected, "{states:?}");
            assert_eq!(pair.b.calls() > calls, states[0] == "ok", "{states:?}: the old side was not asked first");
            if let Ok(wrapped) = wrapped {
                pair.holds(&wrapped, &[&pair.b], &states[1..], &format!("{states:?}"));
            }
        });
    }

    #[test]
    fn a_master_key_is_added_once_the_old_one_works_and_may_be_missing_at_first() {
        for_each_pair(ADDED, |pair, states, expected| {
            let (old, new) = (Wrappers::one(pair.a.clone()), both(&pair.a, &pair.b));
            let wrapped = new.rewrap(&old, &pair.wrapped[..1], &request(), |payload| pair.accept(payload));
            assert_eq!(verdict(&wrapped), expected, "{states:?}");
            if let Ok(wrapped) = wrapped {
                pair.holds(&wrapped, &[&pair.a, &pair.b], &states, &format!("{states:?}"));
            }
        });
    }

    #[test]
    fn a_master_key_that_is_revoked_is_not_shaken_off_by_a_rewrap_without_it() {
        for_each_pair(REMOVED, |pair, states, expected| {
            let (old, new) = (both(&pair.a, &pair.b), Wrappers::one(pair.a.clone()));
            let wrapped = new.rewrap(&old, &pair.wrapped, &request(), |payload| pair.accept(payload));
            assert_eq!(verdict(&wrapped), expected, "{states:?}");
            if let Ok(wrapped) = wrapped {
                pair.holds(&wrapped, &[&pair.a], &states[..1], &format!("{states:?}"));
            }
        });
    }

    #[test]
    fn a_success_that_is_refused_gives_way_to_the_next_and_to_any_revocation() {
        let pair = Pair::new();
        let wrappers = both(&pair.a, &pair.b);
        let accepted = || wrappers.unwrap_with(&pair.wrapped, &request(), |payload| pair.accept(payload));
        pair.a.corrupt();
        accepted().unwrap();
        pair.b.unreachable();
        assert_eq!(kind(accepted()), Some(ErrorKind::Damaged), "the refusal tells more than the outage");
        pair.b.deny();
        assert_eq!(kind(accepted()), Some(ErrorKind::Denied));
        pair.b.corrupt();
        let number = std::cell::Cell::new(0);
        let refuse = |_: &KeyPayload| -> Result<()> {
            number.set(number.get() + 1);
            Err(Error::invalid(format!("refusal {}", number.get())))
        };
        let error = wrappers.unwrap_with(&pair.wrapped, &request(), refuse).unwrap_err();
        assert_eq!((error.to_string().as_str(), number.get()), ("refusal 1", 2));
    }

    #[test]
    fn only_what_is_missing_is_wrapped_anew() {
        let pair = Pair::new();
        let wrappers = both(&pair.a, &pair.b);
        let calls = pair.a.calls() + pair.b.calls();
        assert!(!wrappers.lacks(&pair.wrapped));
        let nothing = wrappers.wrap_missing(&pair.key, &pair.wrapped, &request()).unwrap();
        assert!(nothing.keys.is_empty() && nothing.missing.is_empty());
        assert_eq!(pair.a.calls() + pair.b.calls(), calls);

        let existing = &pair.wrapped[..1];
        let asked_of_a = pair.a.calls();
        assert!(wrappers.lacks(existing));
        pair.b.disable();
        assert_eq!(kind(wrappers.wrap_missing(&pair.key, existing, &request())), Some(ErrorKind::Disabled));
        pair.b.restore();
        let repaired = wrappers.wrap_missing(&pair.key, existing, &request()).unwrap().keys;
        assert_eq!(repaired.iter().map(|key| &key.master_key).collect::<Vec<_>>(), [&pair.b.id()]);
        assert_eq!(pair.a.calls(), asked_of_a);
    }

    #[test]
    fn a_rewrap_uses_the_current_version_and_is_verified_before_it_counts() {
        let pair = Pair::new();
        let wrappers = both(&pair.a, &pair.b);
        let rewrap = || wrappers.rewrap(&wrappers, &pair.wrapped, &request(), |payload| pair.accept(payload));
        pair.a.rotate();
        pair.b.rotate();
        let versions = rewrap().unwrap().keys.into_iter().map(|key| key.key_version).collect::<Vec<_>>();
        assert_eq!(versions, ["1", "1"]);
        pair.a.corrupt();
        let wrapped = rewrap().unwrap();
        assert_eq!(wrapped.missing.iter().map(|it| &it.master_key).collect::<Vec<_>>(), [&pair.a.id()]);
        assert_eq!(wrapped.missing[0].why.class, KmsClass::Unclassified);
        pair.b.corrupt();
        assert_eq!(kind(rewrap()), Some(ErrorKind::Damaged), "it was kept though it holds another key");
    }

    #[test]
    fn a_damaged_wrapping_does_not_hold_up_a_rewrap_that_another_allows() {
        let pair = Pair::new();
        let mut wrapped = pair.wrapped.clone();
        wrapped[0].blob[0] ^= 1;
        let (old, new) = (both(&pair.a, &pair.b), Wrappers::one(pair.a.clone()));
        let outcome = new.rewrap(&old, &wrapped, &request(), |payload| pair.accept(payload)).unwrap();
        pair.holds(&outcome, &[&pair.a], &["ok"], "from the payload");
        let mut versions = vec![wrapped[0].clone(), pair.wrapped[0].clone()];
        let outcome = new.rewrap(&new, &versions, &request(), |payload| pair.accept(payload)).unwrap();
        pair.holds(&outcome, &[&pair.a], &["ok"], "from the second wrapping");
        versions.truncate(1);
        let outcome = new.rewrap(&new, &versions, &request(), |payload| pair.accept(payload));
        assert_eq!(kind(outcome), Some(ErrorKind::BadCiphertext));
    }

    #[test]
    fn a_service_that_re_encrypts_from_another_of_its_keys_is_asked_to() {
        /// Takes what `self.1` wrapped.
        struct Relative(ScriptedWrapper, ScriptedWrapper);
        impl KeyWrapper for Relative {
            fn id(&self) -> MasterKeyId {
                self.0.id()
            }
            fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                self.0.wrap_key(key, cx)
            }
            fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
                self.0.unwrap_key(key, cx)
            }
            fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                let inner = self.1.rewrap_key(key, cx)?;
                self.0.wrap_key(&self.1.unwrap_key(&inner, cx)?, cx)
            }
            fn can_rewrap(&self, key: &WrappedKey) -> bool {
                key.master_key == self.1.id()
            }
        }
        let pair = Pair::new();
        let (old, new) = (Wrappers::one(pair.a.clone()), Wrappers::one(Relative(pair.b.clone(), pair.a.clone())));
        let wrapped = new.rewrap(&old, &pair.wrapped[..1], &request(), |payload| pair.accept(payload)).unwrap();
        assert_eq!(pair.a.rewraps(), 1);
        pair.holds(&wrapped, &[&pair.b], &["ok"], "re-encrypted");
        pair.a.disable();
        let refused = new.rewrap(&old, &pair.wrapped[..1], &request(), |payload| pair.accept(payload));
        assert_eq!(kind(refused), Some(ErrorKind::Disabled));
    }

    #[test]
    fn a_throttled_key_opens_a_little_later_and_a_failure_says_when() {
        let pair = Pair::new();
        let wrappers = Wrappers::one(pair.a.clone());
        pair.a.throttle_next(1, Duration::from_millis(10));
        wrappers.unwrap_with(&pair.wrapped, &request(), |payload| pair.accept(payload)).unwrap();
        let after = Duration::from_secs(70);
        pair.a.throttle(after);
        let error = wrappers.check(&pair.wrapped, &request()).unwrap_err();
        assert_eq!((error.kind(), error.retry_after()), (ErrorKind::Unreachable, Some(after)));
    }

    #[test]
    fn of_two_outages_the_one_that_says_when_to_come_back_is_told() {
        let (a, b) = (ScriptedWrapper::new("a"), ScriptedWrapper::new("b"));
        let after = Duration::from_secs(70);
        b.throttle(after);
        for outage in [ScriptedWrapper::unreachable, |a: &ScriptedWrapper| a.throttle(Duration::MAX)] {
            outage(&a);
            let error = both(&b, &a).wrap(&payload(1), &request()).unwrap_err();
            assert_eq!((error.kind(), error.retry_after()), (ErrorKind::Unreachable, Some(after)));
        }
        a.unreachable();
        let error = both(&a, &b).wrap(&payload(1), &request()).unwrap_err();
        assert_eq!((error.kind(), error.retry_after()), (ErrorKind::Unreachable, Some(after)));
        assert!(error.to_string().contains("scripted:a"), "{error}");
        for verdict in [ScriptedWrapper::misconfigure, ScriptedWrapper::disable] {
            verdict(&a);
            let error = both(&b, &a).wrap(&payload(1), &request()).unwrap_err();
            assert_eq!((error.kind() == ErrorKind::Unreachable, error.retry_after()), (false, None));
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
        let wrapped = wrappers.wrap(&key, &request()).unwrap().keys;
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
        let wrapped = Wrappers::one(a.clone()).wrap(&payload(1), &request()).unwrap().keys;
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
        let mut wrapped = wrappers.wrap(&key, &request()).unwrap().keys;
        a.rotate();
        wrapped.extend(wrappers.wrap(&key, &request()).unwrap().keys);
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
        let wrapped = wrappers.wrap(&payload(1), &request()).unwrap().keys;
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
