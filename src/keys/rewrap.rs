//! Rewrapping: the same key, wrapped by the master keys that are configured now instead of those that were.

use std::sync::Arc;

use crate::error::{KmsClass, KmsError, Result};
use crate::ids::MasterKeyId;
use crate::keys::calls::{Lane, Pending, WrapRequest};
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::keys::wrappers::{Asked, Wrapped, Wrappers, Wraps, phrase, unwrap_own};
use crate::secret::KeyPayload;

impl Wrappers {
    /// Wraps a key, which `old` has wrapped as `existing`, under each of these master keys: by
    /// [`KeyWrapper::rewrap_key`] where the wrapper takes one of `existing`, else from the payload, which `old` unwraps at
    /// most once. A new wrapping counts only if it was unwrapped under its own master key and `accept` took the payload. One
    /// success is enough, as for [`Wrappers::wrap`]. May take the request's time-out twice: for `old`, and for these.
    ///
    /// # Errors
    /// A revocation by any master key, old or new, whatever the others answered: then nothing may be changed. What
    /// [`Wrappers::unwrap_with`] says of `old`, if it is asked. If no new wrapping counts, the first refusal by `accept`, else
    /// the most telling failure.
    pub(crate) fn rewrap(
        &self,
        old: &Wrappers,
        existing: &[WrappedKey],
        request: &WrapRequest,
        accept: impl Fn(&KeyPayload) -> Result<()>,
    ) -> Result<Wrapped> {
        let payload = self.start_old(old, existing, request)?.finish(&accept)?;
        self.start_new(payload, existing, request).settle(|new| new.accepted(&accept))
    }

    /// Has `old` unwrap the key, unless each of these master keys rewraps it by itself and so gives the verdict on all of
    /// those that had wrapped it.
    pub(super) fn start_old<'a>(
        &self,
        old: &Wrappers,
        existing: &'a [WrappedKey],
        request: &WrapRequest,
    ) -> Result<OldSide<'a>> {
        let rewraps = |lane: &Lane| existing.iter().any(|key| lane.wrapper().can_rewrap(key));
        let heard = |id: &MasterKeyId| {
            self.ids().any(|target| target == id) || !existing.iter().any(|key| key.master_key == *id)
        };
        let by_itself = self.lanes().iter().all(rewraps) && old.ids().all(heard);
        Ok(OldSide(if by_itself { None } else { Some(old.start_unwraps(existing, request)?) }))
    }

    /// Starts the new wraps; without `payload`, every wrapper takes one of `existing`.
    pub(super) fn start_new(
        &self,
        payload: Option<Arc<KeyPayload>>,
        existing: &[WrappedKey],
        request: &WrapRequest,
    ) -> Wraps<'_, New> {
        let deadline = request.deadline();
        let start = |lane: &Lane| -> Pending<New> {
            let taken = existing.iter().filter(|key| lane.wrapper().can_rewrap(key)).cloned().collect();
            let job = Rewrap { id: lane.id().clone(), taken, payload: payload.clone() };
            lane.start(request, deadline, move |wrapper, cx| job.run(wrapper, cx))
        };
        let calls = self.lanes().iter().map(|lane| (lane.id(), start(lane))).collect();
        Wraps { what: phrase("rewrapping", request), calls }
    }
}

/// The unwrapping by the old master keys, if it was started.
#[must_use]
pub(super) struct OldSide<'a>(Option<Asked<'a, KeyPayload>>);

impl OldSide<'_> {
    pub(super) fn finish(self, accept: impl Fn(&KeyPayload) -> Result<()>) -> Result<Option<Arc<KeyPayload>>> {
        self.0.map(|asked| asked.accept(accept).map(|(payload, ())| Arc::new(payload))).transpose()
    }
}

/// A new wrapping, and what its own master key unwrapped from it.
pub(super) struct New {
    key: WrappedKey,
    unwrapped: KeyPayload,
}

impl New {
    pub(super) fn accepted(self, accept: impl Fn(&KeyPayload) -> Result<()>) -> Result<WrappedKey> {
        accept(&self.unwrapped)?;
        Ok(self.key)
    }
}

/// What one of the new master keys is to do.
struct Rewrap {
    id: MasterKeyId,
    /// The wrappings that its wrapper takes.
    taken: Vec<WrappedKey>,
    payload: Option<Arc<KeyPayload>>,
}

impl Rewrap {
    fn run(&self, wrapper: &dyn KeyWrapper, cx: &WrapContext<'_>) -> Result<New, KmsError> {
        let key = self.make(wrapper, cx)?;
        let unwrapped = unwrap_own(wrapper, &self.id, &key, cx)?;
        Ok(New { key, unwrapped })
    }

    /// A damaged wrapping is passed over, so that it does not hold up what the others still allow.
    fn make(&self, wrapper: &dyn KeyWrapper, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        let mut bad = None;
        for key in &self.taken {
            match wrapper.rewrap_key(key, cx) {
                Err(error) if error.class == KmsClass::BadCiphertext => bad = bad.or(Some(error)),
                outcome => return outcome,
            }
        }
        match (&self.payload, bad) {
            (Some(payload), _) => wrapper.wrap_key(payload, cx),
            (None, bad) => Err(bad.unwrap_or_else(|| KmsError::new(KmsClass::Unclassified))),
        }
    }
}
