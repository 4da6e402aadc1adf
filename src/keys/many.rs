//! Many keys at once, for start-up and rewrapping.
//!
//! At most [`WINDOW`] requests are under way at a time, and a request's deadline is set when it starts: ten thousand keys do
//! not stand in line with ten thousand deadlines that began together, and no more than a window of payloads is in memory.
//!
//! A master key that does not answer costs a run about two deadlines, not one for each window: see [`Wrappers::for_one_run`].

use std::cell::RefCell;
use std::collections::VecDeque;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::keys::calls::{IN_FLIGHT, WrapRequest};
use crate::keys::rewrap::{New, OldSide};
use crate::keys::wrapper::WrappedKey;
use crate::keys::wrappers::{Asked, Wrapped, Wrappers, Wraps};
use crate::secret::KeyPayload;

/// Twice what may be in flight, so that a place that becomes free finds the next call waiting.
const WINDOW: usize = 2 * IN_FLIGHT;

/// A key to unwrap.
pub(crate) struct UnwrapJob<'a> {
    pub(crate) wrappings: &'a [WrappedKey],
    pub(crate) request: WrapRequest,
}

/// A key to wrap under the master keys that have no wrapping in `existing`.
pub(crate) struct WrapJob<'a> {
    pub(crate) payload: Arc<KeyPayload>,
    pub(crate) existing: &'a [WrappedKey],
    pub(crate) request: WrapRequest,
}

/// A key to rewrap.
pub(crate) struct RewrapJob<'a> {
    pub(crate) existing: &'a [WrappedKey],
    pub(crate) request: WrapRequest,
}

impl Wrappers {
    /// [`Wrappers::unwrap_with`] for each job; `accept` is told the job's index. The results are in the order of the jobs.
    /// After a revocation no further job is started: those that were not get the same verdict.
    pub(crate) fn unwrap_many<'a, T>(
        &self,
        jobs: impl IntoIterator<Item = UnwrapJob<'a>>,
        accept: impl Fn(usize, &KeyPayload) -> Result<T>,
    ) -> Vec<Result<T>> {
        let (stop, run) = (Stop::default(), self.for_one_run());
        let start = |(at, job): (usize, UnwrapJob<'a>)| {
            stop.check()?;
            Ok((at, run.start_unwraps(job.wrappings, &job.request)?))
        };
        let finish = |started: Result<(usize, Asked<'a, KeyPayload>)>| {
            let (at, asked) = started?;
            stop.noting(asked.accept(|payload| accept(at, payload))).map(|(_, accepted)| accepted)
        };
        windowed(WINDOW, jobs.into_iter().enumerate(), start, finish).collect()
    }

    /// [`Wrappers::wrap_missing`] for each job, as [`Wrappers::unwrap_many`] does it. A job is taken from the iterator only
    /// when it is started; one that could not be made is its own result.
    pub(crate) fn wrap_many<'a>(&self, jobs: impl IntoIterator<Item = Result<WrapJob<'a>>>) -> Vec<Result<Wrapped>> {
        let (stop, run) = (Stop::default(), self.for_one_run());
        let start = |job: Result<WrapJob<'a>>| {
            stop.check()?;
            let job = job?;
            run.start_wraps(&job.payload, job.existing, &job.request)
        };
        let finish = |started: Result<Wraps<'_, WrappedKey>>| stop.noting(started?.settle(Ok));
        windowed(WINDOW, jobs.into_iter(), start, finish).collect()
    }

    /// [`Wrappers::rewrap`] for each job, as [`Wrappers::unwrap_many`] does it.
    pub(crate) fn rewrap_many<'a>(
        &self,
        old: &Wrappers,
        jobs: impl IntoIterator<Item = RewrapJob<'a>>,
        accept: impl Fn(usize, &KeyPayload) -> Result<()>,
    ) -> Vec<Result<Wrapped>> {
        let (stop, run, old) = (Stop::default(), self.for_one_run(), old.for_one_run());
        let start_old = |(at, job): (usize, RewrapJob<'a>)| {
            stop.check()?;
            let started = run.start_old(&old, job.existing, &job.request)?;
            Ok((at, job, started))
        };
        let finish_old = |started: Result<(usize, RewrapJob<'a>, OldSide<'a>)>| {
            let (at, job, started) = started?;
            Ok((at, job, stop.noting(started.finish(|payload| accept(at, payload)))?))
        };
        let start_new = |ready: Result<(usize, RewrapJob<'a>, _)>| {
            let (at, job, payload) = ready?;
            stop.check()?;
            Ok((at, run.start_new(payload, job.existing, &job.request)))
        };
        let finish_new = |started: Result<(usize, Wraps<'_, New>)>| {
            let (at, started) = started?;
            stop.noting(started.settle(|new| new.accepted(|payload| accept(at, payload))))
        };
        // Half a window for each of the two steps.
        let old_side = windowed(IN_FLIGHT, jobs.into_iter().enumerate(), start_old, finish_old);
        windowed(IN_FLIGHT, old_side, start_new, finish_new).collect()
    }
}

/// Starts jobs ahead, at most `width` at a time, and finishes them in order.
fn windowed<J, P, R>(
    width: usize,
    mut jobs: impl Iterator<Item = J>,
    mut start: impl FnMut(J) -> P,
    mut finish: impl FnMut(P) -> R,
) -> impl Iterator<Item = R> {
    let mut under_way = VecDeque::with_capacity(width);
    std::iter::from_fn(move || {
        while under_way.len() < width {
            match jobs.next() {
                Some(job) => under_way.push_back(start(job)),
                None => break,
            }
        }
        under_way.pop_front().map(&mut finish)
    })
}

/// The first revocation, after which nothing more is started.
#[derive(Default)]
struct Stop(RefCell<Option<(ErrorKind, String)>>);

impl Stop {
    fn check(&self) -> Result<()> {
        match &*self.0.borrow() {
            Some((kind, text)) => Err(Error::new(*kind, format!("{text}; nothing else was asked after that"))),
            None => Ok(()),
        }
    }

    fn noting<T>(&self, outcome: Result<T>) -> Result<T> {
        if let Err(error) = &outcome
            && matches!(error.kind(), ErrorKind::Denied | ErrorKind::Disabled | ErrorKind::Deleted)
        {
            self.0.borrow_mut().get_or_insert_with(|| (error.kind(), error.to_string()));
        }
        outcome
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::keys::calls::fixtures::{payload, request};
    use crate::kms::scripted::ScriptedWrapper;

    /// As many keys as `0..many`, each of which is its number.
    fn wrapped(wrappers: &Wrappers, many: u8) -> Vec<Vec<WrappedKey>> {
        (0..many).map(|number| wrappers.wrap(&payload(number), &request()).unwrap().keys).collect()
    }

    fn unwraps(keys: &[Vec<WrappedKey>]) -> impl Iterator<Item = UnwrapJob<'_>> {
        keys.iter().map(|wrappings| UnwrapJob { wrappings, request: request() })
    }

    fn rewraps(keys: &[Vec<WrappedKey>]) -> impl Iterator<Item = RewrapJob<'_>> {
        keys.iter().map(|existing| RewrapJob { existing, request: request() })
    }

    fn first_byte(payload: &KeyPayload) -> u8 {
        payload.with_bytes(|bytes| bytes[0]).unwrap()
    }

    fn is_number(at: usize, payload: &KeyPayload) -> Result<()> {
        if first_byte(payload) == at as u8 { Ok(()) } else { Err(Error::damaged("another key")) }
    }

    fn kinds<T>(outcomes: &[Result<T>]) -> Vec<Option<ErrorKind>> {
        outcomes.iter().map(|outcome| outcome.as_ref().err().map(Error::kind)).collect()
    }

    #[test]
    fn many_keys_come_back_in_order_with_a_bounded_number_of_calls_in_flight() {
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(key.clone());
        let jobs = (0..200).map(|number| Ok(WrapJob { payload: payload(number), existing: &[], request: request() }));
        let keys: Vec<_> = wrappers.wrap_many(jobs).into_iter().map(|outcome| outcome.unwrap().keys).collect();
        key.rotate();
        let rewrapped: Vec<_> = wrappers.rewrap_many(&wrappers, rewraps(&keys), is_number);
        let rewrapped: Vec<_> = rewrapped.into_iter().map(|outcome| outcome.unwrap().keys).collect();
        assert!(rewrapped.iter().all(|keys| keys[0].key_version == "1") && key.rewraps() == 200);
        for keys in [keys, rewrapped] {
            let numbers = wrappers.unwrap_many(unwraps(&keys), |at, payload| {
                is_number(at, payload)?;
                Ok(first_byte(payload))
            });
            assert_eq!(numbers.into_iter().map(Result::unwrap).collect::<Vec<_>>(), (0..200).collect::<Vec<u8>>());
        }
        let most = key.most_in_flight();
        assert!((1..=IN_FLIGHT as u64).contains(&most), "{most}");
    }

    #[test]
    fn no_more_than_a_window_is_under_way_and_each_job_begins_when_it_is_started() {
        let under_way = std::cell::Cell::new(0);
        let most = std::cell::Cell::new(0);
        let start = |job: u32| {
            under_way.set(under_way.get() + 1);
            most.set(most.get().max(under_way.get()));
            job
        };
        let finish = |job: u32| {
            under_way.set(under_way.get() - 1);
            job
        };
        assert!(windowed(5, 0..100, start, finish).eq(0..100));
        assert_eq!((most.get(), under_way.get()), (5, 0));
        assert_eq!(windowed(5, 0..3, start, finish).count(), 3);

        // Slower than its time-out as a whole: only if they all began together would the last jobs be late.
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(Slow(key.clone()));
        let keys = wrapped(&Wrappers::one(key), 160);
        let short = || WrapRequest { timeout: Duration::from_millis(800), ..request() };
        let begun = Instant::now();
        let jobs = keys.iter().map(|wrappings| UnwrapJob { wrappings, request: short() });
        let outcomes = wrappers.unwrap_many(jobs, is_number);
        assert!(begun.elapsed() > short().timeout, "it took {:?}, which proves nothing", begun.elapsed());
        assert!(kinds(&outcomes).iter().all(Option::is_none), "{:?}", kinds(&outcomes));
    }

    /// Takes 100 ms to unwrap.
    struct Slow(ScriptedWrapper);

    impl crate::KeyWrapper for Slow {
        fn id(&self) -> crate::MasterKeyId {
            self.0.id()
        }

        fn wrap_key(&self, key: &KeyPayload, cx: &crate::WrapContext<'_>) -> Result<WrappedKey, crate::KmsError> {
            self.0.wrap_key(key, cx)
        }

        fn unwrap_key(&self, key: &WrappedKey, cx: &crate::WrapContext<'_>) -> Result<KeyPayload, crate::KmsError> {
            thread::sleep(Duration::from_millis(100));
            self.0.unwrap_key(key, cx)
        }
    }

    #[test]
    fn one_revocation_stops_the_rest_without_calling() {
        let (key, target) = (ScriptedWrapper::new("k"), ScriptedWrapper::new("t"));
        let (wrappers, targets) = (Wrappers::one(key.clone()), Wrappers::one(target.clone()));
        let keys = wrapped(&wrappers, 200);
        key.disable();
        let all_disabled = vec![Some(ErrorKind::Disabled); 200];
        let mut before = key.calls();
        let mut asked = || {
            let asked = key.calls() - before;
            before = key.calls();
            asked
        };
        let unwrapped = wrappers.unwrap_many(unwraps(&keys), is_number);
        assert_eq!(kinds(&unwrapped), all_disabled);
        assert!(unwrapped[199].as_ref().unwrap_err().to_string().contains("nothing else was asked"));
        assert!(asked() <= WINDOW as u64);
        let jobs = (0..200).map(|number| Ok(WrapJob { payload: payload(number), existing: &[], request: request() }));
        assert_eq!(kinds(&wrappers.wrap_many(jobs)), all_disabled);
        assert!(asked() <= WINDOW as u64);
        assert_eq!(kinds(&targets.rewrap_many(&wrappers, rewraps(&keys), is_number)), all_disabled);
        assert!(asked() <= WINDOW as u64);
        assert_eq!(target.calls(), 0);
        key.restore();
        target.disable();
        assert_eq!(kinds(&targets.rewrap_many(&wrappers, rewraps(&keys), is_number)), all_disabled);
        assert!(asked() <= WINDOW as u64 && target.calls() <= IN_FLIGHT as u64);
    }

    /// Two master keys; the first hangs after both have wrapped 200 keys, and is waited for 400 ms.
    fn one_hangs() -> (ScriptedWrapper, Wrappers, Vec<Vec<WrappedKey>>) {
        let (stuck, sound) = (ScriptedWrapper::new("stuck"), ScriptedWrapper::new("sound"));
        let all = [stuck.clone(), sound].map(|key| Arc::new(key) as Arc<dyn crate::KeyWrapper>);
        let wrappers = Wrappers::any_of(all).unwrap();
        let keys = wrapped(&wrappers, 200);
        stuck.hang();
        (stuck, wrappers, keys)
    }

    const SHORT: Duration = Duration::from_millis(400);

    fn short() -> WrapRequest {
        WrapRequest { timeout: SHORT, ..request() }
    }

    /// `keys` again and again.
    fn ten_thousand(keys: &[Vec<WrappedKey>]) -> impl Iterator<Item = UnwrapJob<'_>> {
        keys.iter().cycle().take(10_000).map(|wrappings| UnwrapJob { wrappings, request: short() })
    }

    #[test]
    fn ten_thousand_keys_open_in_about_two_deadlines_while_one_of_two_master_keys_hangs() {
        let (stuck, wrappers, keys) = one_hangs();
        let calls = stuck.calls();
        let begun = Instant::now();
        let outcomes = wrappers.unwrap_many(ten_thousand(&keys), |at, payload| is_number(at % 200, payload));
        let took = begun.elapsed();
        assert!(kinds(&outcomes).iter().all(Option::is_none));
        assert!(took >= SHORT && took < 20 * SHORT, "{took:?}; it would be {} deadlines", 10_000 / WINDOW);
        assert_eq!(stuck.calls() - calls, IN_FLIGHT as u64);
        stuck.restore();
    }

    #[test]
    fn keys_are_wrapped_and_rewrapped_by_the_master_key_that_answers_and_the_other_is_told_as_missing() {
        let (stuck, wrappers, keys) = one_hangs();
        let wraps = || {
            let job =
                |number: usize| Ok(WrapJob { payload: payload((number % 200) as u8), existing: &[], request: short() });
            wrappers.wrap_many((0..1000).map(job))
        };
        let rewraps = || {
            let jobs = keys.iter().map(|existing| RewrapJob { existing, request: short() });
            wrappers.rewrap_many(&wrappers, jobs, is_number)
        };
        for (most, outcomes) in [(10, &wraps as &dyn Fn() -> Vec<Result<Wrapped>>), (8, &rewraps)] {
            let begun = Instant::now();
            let outcomes = outcomes();
            assert!(begun.elapsed() < most * SHORT, "{:?}", begun.elapsed());
            for outcome in &outcomes {
                let wrapped = outcome.as_ref().unwrap();
                assert_eq!((wrapped.keys[0].master_key.key.as_str(), wrapped.keys.len()), ("sound", 1));
                assert_eq!(
                    (&wrapped.missing[0].master_key, wrapped.missing.len()),
                    (&crate::KeyWrapper::id(&stuck), 1)
                );
            }
            let last = outcomes.last().unwrap().as_ref().unwrap().missing[0].why.to_string();
            assert!(last.contains("was not asked"), "{last}");
        }
        stuck.restore();
    }

    #[test]
    fn an_outage_of_the_only_master_key_fails_fast_and_the_next_run_asks_again() {
        let key = ScriptedWrapper::new("k");
        let wrappers = Wrappers::one(key.clone());
        let keys = wrapped(&wrappers, 200);
        key.hang();
        let begun = Instant::now();
        let outcomes = wrappers.unwrap_many(ten_thousand(&keys), |at, payload| is_number(at % 200, payload));
        assert!(begun.elapsed() < 20 * SHORT, "{:?}", begun.elapsed());
        assert!(kinds(&outcomes).iter().all(|kind| *kind == Some(ErrorKind::Unreachable)));
        let last = outcomes[9_999].as_ref().unwrap_err().to_string();
        assert!(last.contains("was not asked") && !outcomes[0].as_ref().unwrap_err().to_string().contains("not asked"));
        key.restore();
        assert!(kinds(&wrappers.unwrap_many(unwraps(&keys), is_number)).iter().all(Option::is_none));
        // What revokes it answers, and is heard.
        key.disable();
        assert_eq!(kinds(&wrappers.unwrap_many(unwraps(&keys), is_number)), vec![Some(ErrorKind::Disabled); 200]);
    }

    #[test]
    fn a_run_that_is_used_in_parts_waits_for_a_hanging_master_key_once() {
        let (stuck, wrappers, keys) = one_hangs();
        let run = wrappers.for_one_run();
        let part = || {
            let begun = Instant::now();
            let jobs = keys[..100].iter().map(|wrappings| UnwrapJob { wrappings, request: short() });
            assert!(kinds(&run.unwrap_many(jobs, is_number)).iter().all(Option::is_none));
            begun.elapsed()
        };
        assert!(part() >= SHORT);
        assert!(part() < SHORT);
        stuck.restore();
    }

    #[test]
    fn a_key_that_fails_by_itself_leaves_the_others_alone() {
        let wrappers = Wrappers::one(ScriptedWrapper::new("k"));
        let mut keys = wrapped(&wrappers, 5);
        keys[1][0].blob[0] ^= 1;
        keys.swap(3, 4);
        keys[0].clear();
        let (bad, damaged) = (Some(ErrorKind::BadCiphertext), Some(ErrorKind::Damaged));
        let expected = [Some(ErrorKind::Misconfigured), bad, None, damaged, damaged];
        assert_eq!(kinds(&wrappers.unwrap_many(unwraps(&keys), is_number)), expected);
        assert_eq!(kinds(&wrappers.rewrap_many(&wrappers, rewraps(&keys), is_number)), expected);
        let jobs = [
            Err(Error::invalid("not made")),
            Ok(WrapJob { payload: payload(1), existing: &keys[2], request: request() }),
            Ok(WrapJob { payload: payload(1), existing: &[], request: request() }),
        ];
        let outcomes = wrappers.wrap_many(jobs);
        assert_eq!(kinds(&outcomes), [Some(ErrorKind::Invalid), None, None]);
        let made: Vec<_> = outcomes.into_iter().flatten().map(|wrapped| wrapped.keys.len()).collect();
        assert_eq!(made, [0, 1]);
    }
}
