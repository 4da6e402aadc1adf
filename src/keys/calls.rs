//! Calls to a [`KeyWrapper`], each on a thread of ours, at most [`IN_FLIGHT`] at a time for one wrapper, each with a
//! deadline at which nobody waits for it any more.
//!
//! A thread cannot be stopped from outside, so an abandoned call keeps its place among those in flight until it returns. A
//! wrapper that hangs for ever can therefore use up its own places, and nothing else: further calls to it wait in line, fail
//! at their deadline, and never cost a thread. A call that waits because the service throttles it keeps its place too. Plain
//! threads, so a caller inside an async runtime is merely blocked.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::error::{KmsClass, KmsError};
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, Generation, MasterKeyId};
use crate::keys::in_memory::InMemory;
use crate::keys::patience::Patient;
use crate::keys::wrapper::{KeyWrapper, WrapContext};
use crate::secret::scoped_deep;

/// How many calls to one wrapper may run at the same time.
pub(crate) const IN_FLIGHT: usize = 16;
/// Longer time-outs count as this one, so that adding one to the clock cannot overflow.
const LONGEST_TIMEOUT: Duration = Duration::from_secs(24 * 60 * 60);

/// What a wrap, unwrap or check is about, and how long the caller waits.
#[derive(Clone, Debug)]
pub(crate) struct WrapRequest {
    pub(crate) cluster: ClusterId,
    pub(crate) database: Option<DatabaseId>,
    pub(crate) generation: Generation,
    pub(crate) purpose: Purpose,
    pub(crate) timeout: Duration,
    /// Kept by a call that has a payload until it has returned, whether anybody still waits for it or not.
    pub(crate) in_flight: Option<InMemory>,
}

impl WrapRequest {
    /// The instant at which a caller who starts now stops waiting.
    pub(crate) fn deadline(&self) -> Instant {
        Instant::now() + self.timeout.min(LONGEST_TIMEOUT)
    }

    /// What the service's audit log shows: ids in hex, never a name.
    fn label(&self) -> String {
        let purpose = match self.purpose {
            Purpose::Data => "data",
            Purpose::Cluster => "cluster",
            Purpose::Probe => "probe",
        };
        let mut label = format!("pageseal purpose={purpose} cluster={}", self.cluster);
        if let Some(database) = self.database {
            label.push_str(&format!(" database={database}"));
        }
        label + &format!(" generation={}", self.generation)
    }
}

/// One wrapper, and the calls to it.
#[derive(Clone)]
pub(crate) struct Lane {
    id: MasterKeyId,
    wrapper: Arc<dyn KeyWrapper>,
    crew: Arc<ArcSwap<Crew>>,
    /// Of the calls in one run, how many were unreachable since the last that was not; outside a run nobody counts.
    silence: Option<Arc<AtomicUsize>>,
}

impl Lane {
    pub(crate) fn new(wrapper: Arc<dyn KeyWrapper>) -> Self {
        Self::bounded(wrapper, IN_FLIGHT)
    }

    fn bounded(wrapper: Arc<dyn KeyWrapper>, bound: usize) -> Self {
        let crew = Arc::new(ArcSwap::from_pointee(Crew::new(bound, std::process::id())));
        Self { id: wrapper.id(), wrapper: Arc::new(Patient(wrapper)), crew, silence: None }
    }

    /// The same lane for one run of many calls: once [`IN_FLIGHT`] in a row were unreachable, no further one is made, and
    /// each is answered so at once. Else a service that hangs would cost its deadline again and again.
    ///
    /// A revocation could not be heard during an outage; in the rest of such a run it is not heard after one either.
    pub(crate) fn for_one_run(&self) -> Self {
        let silence = Some(self.silence.clone().unwrap_or_default());
        Self { id: self.id.clone(), wrapper: Arc::clone(&self.wrapper), crew: Arc::clone(&self.crew), silence }
    }

    fn is_silent(&self) -> bool {
        self.silence.as_ref().is_some_and(|silence| silence.load(Ordering::Relaxed) >= IN_FLIGHT)
    }

    /// The wrapper's master key, asked for once.
    pub(crate) fn id(&self) -> &MasterKeyId {
        &self.id
    }

    pub(crate) fn wrapper(&self) -> &dyn KeyWrapper {
        &*self.wrapper
    }

    /// Starts `call` on another thread, or puts it in line if too many are in flight; does not wait for either.
    pub(crate) fn start<T: Send + 'static>(
        &self,
        request: &WrapRequest,
        deadline: Instant,
        call: impl FnOnce(&dyn KeyWrapper, &WrapContext<'_>) -> Result<T, KmsError> + Send + 'static,
    ) -> Pending<T> {
        let (sender, answer) = mpsc::channel();
        let started = Arc::new(AtomicBool::new(false));
        let job = {
            let (sender, started) = (sender.clone(), Arc::clone(&started));
            let (wrapper, request) = (Arc::clone(&self.wrapper), request.clone());
            Job {
                deadline,
                _in_flight: request.in_flight.clone(),
                run: Box::new(move || {
                    started.store(true, Ordering::Relaxed);
                    // Nobody may be waiting any more. Then what came back is dropped here, and so wiped.
                    let _ = sender.send(call(&*wrapper, &context(&request, deadline, &request.label())));
                }),
            }
        };
        let crew = self.crew_of_this_process();
        let id = &self.id;
        let taken_on = if self.is_silent() {
            Err(format!("master key {id} was not asked: the last {IN_FLIGHT} calls to it or more were unreachable"))
        } else {
            crew.take_on(job)
                .map_err(|error| format!("no thread could be started for the call to master key {id}: {error}"))
        };
        match taken_on {
            Ok(TakenOn::Thread) => started.store(true, Ordering::Relaxed),
            Ok(TakenOn::Line) => {}
            Err(text) => _ = sender.send(Err(KmsError::with_source(KmsClass::Unreachable, text))),
        }
        let silence = self.silence.clone();
        Pending { id: id.clone(), timeout: request.timeout, deadline, started, answer, crew, silence }
    }

    /// A forked child has none of its parent's threads, and perhaps its lock, held by one of them, for ever: it starts anew.
    fn crew_of_this_process(&self) -> Arc<Crew> {
        loop {
            let crew = self.crew.load_full();
            if crew.process == std::process::id() {
                return crew;
            }
            let new = Arc::new(Crew::new(crew.bound, std::process::id()));
            self.crew.compare_and_swap(&crew, new);
        }
    }
}

fn context<'a>(request: &WrapRequest, deadline: Instant, label: &'a str) -> WrapContext<'a> {
    WrapContext {
        cluster: request.cluster,
        database: request.database,
        generation: request.generation,
        purpose: request.purpose,
        deadline,
        label,
    }
}

/// A call that was started, or waits in line.
#[must_use]
pub(crate) struct Pending<T> {
    id: MasterKeyId,
    timeout: Duration,
    deadline: Instant,
    started: Arc<AtomicBool>,
    answer: Receiver<Result<T, KmsError>>,
    crew: Arc<Crew>,
    silence: Option<Arc<AtomicUsize>>,
}

impl<T> Pending<T> {
    /// Waits for the answer, until the deadline at most.
    pub(crate) fn wait(self) -> Result<T, KmsError> {
        let outcome = self.outcome();
        if let Some(silence) = &self.silence {
            match &outcome {
                Err(error) if error.class == KmsClass::Unreachable => _ = silence.fetch_add(1, Ordering::Relaxed),
                _ => silence.store(0, Ordering::Relaxed),
            }
        }
        outcome
    }

    fn outcome(&self) -> Result<T, KmsError> {
        let outcome = self.answer.recv_timeout(self.deadline.saturating_duration_since(Instant::now()));
        match outcome {
            Ok(answer) => answer,
            // Whoever clears the line may have dropped this call; but only after its deadline.
            Err(RecvTimeoutError::Disconnected) if Instant::now() < self.deadline => Err(self.panicked()),
            Err(_) => {
                self.crew.drop_expired();
                Err(self.abandoned())
            }
        }
    }

    fn abandoned(&self) -> KmsError {
        let (id, timeout, bound) = (&self.id, self.timeout, self.crew.bound);
        let text = if self.started.load(Ordering::Relaxed) {
            format!("the call to master key {id} did not return within {timeout:?}")
        } else {
            format!(
                "the call to master key {id} was not started within {timeout:?}: {bound} earlier calls have not returned"
            )
        };
        KmsError::with_source(KmsClass::Unreachable, text)
    }

    /// Without the panic's own text, which may quote what the wrapper had in its hands.
    fn panicked(&self) -> KmsError {
        KmsError::with_source(KmsClass::Unclassified, format!("the wrapper of master key {} panicked", self.id))
    }
}

/// The threads that call one wrapper, in one process.
struct Crew {
    bound: usize,
    process: u32,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Threads that run a call, or look for the next one.
    busy: usize,
    /// Empty unless `busy` has reached the bound.
    waiting: VecDeque<Job>,
}

/// Where a job went.
enum TakenOn {
    Thread,
    Line,
}

struct Job {
    deadline: Instant,
    run: Box<dyn FnOnce() + Send>,
    // Declared after what runs, so that the payload in that is gone when it goes.
    _in_flight: Option<InMemory>,
}

impl Crew {
    fn new(bound: usize, process: u32) -> Self {
        Self { bound, process, state: Mutex::default() }
    }

    /// # Errors
    /// The system's, if it gives no thread; then the job is dropped.
    fn take_on(self: &Arc<Self>, job: Job) -> io::Result<TakenOn> {
        {
            let mut state = self.lock();
            if state.busy >= self.bound {
                state.waiting.push_back(job);
                return Ok(TakenOn::Line);
            }
            state.busy += 1;
        }
        let crew = Arc::clone(self);
        let spawned = thread::Builder::new().name("pageseal-kms".into()).spawn(move || crew.work(job));
        if spawned.is_err() {
            self.lock().busy -= 1;
        }
        spawned.map(|_| TakenOn::Thread)
    }

    /// Runs one job after the other, and ends when none waits.
    fn work(&self, first: Job) {
        let mut next = Some(first);
        while let Some(job) = next {
            // A panic drops the job's sender, which tells the one who waits. Key bytes on this stack are wiped in any case.
            let _ = catch_unwind(AssertUnwindSafe(|| scoped_deep(job.run)));
            self.drop_expired();
            next = self.next_or_leave();
        }
    }

    /// In one step: else a job could be put in line after the last thread had looked there.
    fn next_or_leave(&self) -> Option<Job> {
        let mut state = self.lock();
        let next = state.waiting.pop_front();
        if next.is_none() {
            state.busy -= 1;
        }
        next
    }

    /// Drops the calls in line for which nobody waits any more, and with them the payloads that they hold.
    fn drop_expired(&self) {
        let now = Instant::now();
        let expired: VecDeque<Job> = {
            let mut state = self.lock();
            let (expired, waiting) = state.waiting.drain(..).partition(|job| job.deadline <= now);
            state.waiting = waiting;
            expired
        };
        // Outside the lock, because a wrapper whose last owner this is runs its own `Drop`.
        drop(expired);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
pub(crate) mod fixtures {
    use super::*;
    use crate::secret::KeyPayload;

    /// About the data key of generation 3 of database d2, with a time-out that no sound call reaches.
    pub(crate) fn request() -> WrapRequest {
        WrapRequest {
            cluster: ClusterId::from_bytes([0xc1; 16]),
            database: Some(DatabaseId::from_bytes([0xd2; 16])),
            generation: Generation::new(3).unwrap(),
            purpose: Purpose::Data,
            timeout: Duration::from_secs(60),
            in_flight: None,
        }
    }

    pub(crate) fn payload(byte: u8) -> Arc<KeyPayload> {
        Arc::new(KeyPayload::from_bytes(&mut [byte; KeyPayload::LEN]).unwrap())
    }
}

#[cfg(test)]
mod tests {
    use super::fixtures::{payload, request};
    use super::*;
    use crate::keys::wrapper::WrappedKey;
    use crate::kms::scripted::ScriptedWrapper;
    use crate::secret::KeyPayload;

    fn lane(wrapper: &ScriptedWrapper) -> Lane {
        Lane::new(Arc::new(wrapper.clone()))
    }

    /// Starts a wrap that is waited for `millis` long.
    fn start(lane: &Lane, millis: u64) -> Pending<WrappedKey> {
        start_with(lane, millis, &payload(1))
    }

    fn start_with(lane: &Lane, millis: u64, payload: &Arc<KeyPayload>) -> Pending<WrappedKey> {
        let request = WrapRequest { timeout: Duration::from_millis(millis), ..request() };
        let payload = Arc::clone(payload);
        lane.start(&request, request.deadline(), move |wrapper, cx| wrapper.wrap_key(&payload, cx))
    }

    fn class<T>(outcome: Result<T, KmsError>) -> Option<KmsClass> {
        outcome.err().map(|error| error.class)
    }

    /// Waits for what another thread is about to do.
    fn eventually(what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            assert!(start.elapsed() < Duration::from_secs(30), "{what}");
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn busy(lane: &Lane) -> usize {
        lane.crew_of_this_process().lock().busy
    }

    #[test]
    fn a_hanging_call_is_abandoned_at_its_deadline() {
        let wrapper = ScriptedWrapper::new("k");
        let lane = lane(&wrapper);
        wrapper.hang();
        let begun = Instant::now();
        let error = start(&lane, 100).wait().unwrap_err();
        assert!(begun.elapsed() >= Duration::from_millis(100));
        assert!(begun.elapsed() < Duration::from_secs(20), "waited {:?}", begun.elapsed());
        assert_eq!(error.class, KmsClass::Unreachable);
        let text = error.to_string();
        assert!(text.contains("scripted:k did not return within 100ms"), "{text}");
        wrapper.restore();
    }

    #[test]
    fn a_hanging_wrapper_does_not_hold_up_another() {
        let (stuck, sound) = (ScriptedWrapper::new("stuck"), ScriptedWrapper::new("sound"));
        stuck.hang();
        let (stuck_lane, sound_lane) = (lane(&stuck), lane(&sound));
        let hanging: Vec<_> = (0..2 * IN_FLIGHT).map(|_| start(&stuck_lane, 60_000)).collect();
        assert_eq!(class(start(&sound_lane, 60_000).wait()), None);
        stuck.restore();
        for pending in hanging {
            assert_eq!(class(pending.wait()), None);
        }
    }

    #[test]
    fn only_as_many_unreachable_calls_in_a_row_as_may_be_in_flight_end_a_run() {
        let wrapper = ScriptedWrapper::new("k");
        let lane = lane(&wrapper);
        let run = lane.for_one_run();
        let asks = |lane: &Lane, count: usize| {
            let before = wrapper.calls();
            let calls: Vec<_> = (0..count).map(|_| start(lane, 60_000)).collect();
            let classes: Vec<_> = calls.into_iter().map(|call| class(call.wait())).collect();
            assert!(classes.iter().all(|class| *class == classes[0]), "{classes:?}");
            (classes[0], wrapper.calls() - before)
        };
        let throttle = |key: &ScriptedWrapper| key.throttle(Duration::from_secs(70));
        for other in [ScriptedWrapper::restore, ScriptedWrapper::disable, throttle] {
            wrapper.unreachable();
            // Each is repeated once.
            assert_eq!(asks(&run, IN_FLIGHT - 1), (Some(KmsClass::Unreachable), 2 * (IN_FLIGHT as u64 - 1)));
            other(&wrapper);
            assert_ne!(asks(&run, 1).0, Some(KmsClass::Unreachable), "it was not asked, and could have answered");
        }
        assert_eq!(asks(&run, 2 * IN_FLIGHT), (Some(KmsClass::Throttled), 2 * IN_FLIGHT as u64));
        wrapper.unreachable();
        assert_eq!(asks(&run, IN_FLIGHT), (Some(KmsClass::Unreachable), 2 * IN_FLIGHT as u64));
        wrapper.restore();
        assert_eq!(asks(&run, 100), (Some(KmsClass::Unreachable), 0));
        let error = start(&run.for_one_run(), 60_000).wait().unwrap_err();
        assert!(error.to_string().contains("scripted:k was not asked"), "{error}");
        for other in [&lane, &lane.for_one_run()] {
            assert_eq!(asks(other, 1), (None, 1), "a run's silence is another's");
        }
    }

    #[test]
    fn a_late_answer_in_a_run_lets_it_ask_again() {
        let wrapper = ScriptedWrapper::new("k");
        wrapper.hang();
        let run = lane(&wrapper).for_one_run();
        let abandoned: Vec<_> = (0..IN_FLIGHT).map(|_| start(&run, 20)).collect();
        let patient = start(&run, 60_000);
        assert!(abandoned.into_iter().all(|call| class(call.wait()) == Some(KmsClass::Unreachable)));
        assert_eq!(class(start(&run, 60_000).wait()), Some(KmsClass::Unreachable));
        wrapper.restore();
        assert_eq!(class(patient.wait()), None);
        assert_eq!(class(start(&run, 60_000).wait()), None);
    }

    #[test]
    fn calls_in_flight_are_bounded_and_further_ones_fail_without_a_thread() {
        let wrapper = ScriptedWrapper::new("k");
        wrapper.hang();
        let lane = lane(&wrapper);
        let abandoned: Vec<_> = (0..IN_FLIGHT).map(|_| start(&lane, 20)).collect();
        eventually("all are in flight", || wrapper.calls() == IN_FLIGHT as u64);
        assert!(abandoned.into_iter().all(|call| class(call.wait()) == Some(KmsClass::Unreachable)));
        for _ in 0..3 {
            let error = start(&lane, 20).wait().unwrap_err();
            assert_eq!(error.class, KmsClass::Unreachable);
            assert!(error.to_string().contains("16 earlier calls have not returned"), "{error}");
        }
        assert_eq!(
            (wrapper.calls(), busy(&lane)),
            (IN_FLIGHT as u64, IN_FLIGHT),
            "an abandoned call gave its place up"
        );
        wrapper.restore();
        eventually("every place is free again", || busy(&lane) == 0);
        assert_eq!(class(start(&lane, 60_000).wait()), None);
        assert_eq!(wrapper.calls(), IN_FLIGHT as u64 + 1, "a call was made for which nobody waited");
    }

    #[test]
    fn a_call_in_line_begins_when_one_in_flight_returns() {
        let wrapper = ScriptedWrapper::new("k");
        wrapper.hang();
        let lane = Lane::bounded(Arc::new(wrapper.clone()), 1);
        let calls: Vec<_> = (0..20).map(|_| start(&lane, 60_000)).collect();
        eventually("the first is in flight", || wrapper.calls() == 1);
        wrapper.restore();
        assert!(calls.into_iter().all(|call| class(call.wait()).is_none()));
        assert_eq!(wrapper.calls(), 20);
    }

    #[test]
    fn a_call_given_up_in_line_lets_go_of_its_payload_at_once() {
        let wrapper = ScriptedWrapper::new("k");
        wrapper.hang();
        let lane = Lane::bounded(Arc::new(wrapper.clone()), 1);
        let first = start(&lane, 60_000);
        let key = payload(1);
        let second = start_with(&lane, 20, &key);
        assert_eq!(Arc::strong_count(&key), 2);
        assert_eq!(class(second.wait()), Some(KmsClass::Unreachable));
        assert_eq!(Arc::strong_count(&key), 1);
        wrapper.restore();
        assert_eq!(class(first.wait()), None);
    }

    #[test]
    fn a_call_whose_deadline_passed_in_line_is_never_made() {
        let wrapper = ScriptedWrapper::new("k");
        wrapper.hang();
        let lane = Lane::bounded(Arc::new(wrapper.clone()), 1);
        let (first, second) = (start(&lane, 60_000), start(&lane, 1));
        thread::sleep(Duration::from_millis(5));
        wrapper.restore();
        assert_eq!(class(first.wait()), None);
        eventually("the place is free again", || busy(&lane) == 0);
        let error = second.wait().unwrap_err();
        assert_eq!((error.class, wrapper.calls()), (KmsClass::Unreachable, 1));
        assert!(error.to_string().contains("was not started"), "{error}");
    }

    #[test]
    fn an_abandoned_call_lets_go_of_its_payload_when_it_returns() {
        let wrapper = ScriptedWrapper::new("k");
        wrapper.hang();
        let lane = lane(&wrapper);
        let key = payload(1);
        assert_eq!(class(start_with(&lane, 20, &key).wait()), Some(KmsClass::Unreachable));
        assert_eq!(Arc::strong_count(&key), 2);
        wrapper.restore();
        eventually("the payload is let go", || Arc::strong_count(&key) == 1);
    }

    #[test]
    fn a_panic_is_unclassified_keeps_its_text_to_itself_and_gives_its_place_back() {
        let lane = lane(&ScriptedWrapper::new("k"));
        let request = request();
        for _ in 0..2 * IN_FLIGHT {
            let call =
                |_: &dyn KeyWrapper, _: &WrapContext<'_>| -> Result<(), KmsError> { panic!("key bytes: 0xc0ffee") };
            let error = lane.start(&request, request.deadline(), call).wait().unwrap_err();
            assert_eq!(error.class, KmsClass::Unclassified);
            let text = format!("{error} {error:?}");
            assert!(text.contains("scripted:k panicked") && !text.contains("c0ffee"), "{text}");
        }
        eventually("every place is free again", || busy(&lane) == 0);
        assert_eq!(class(start(&lane, 60_000).wait()), None);
    }

    #[test]
    fn a_forked_child_begins_with_no_call_in_flight_and_an_open_lock() {
        let wrapper = ScriptedWrapper::new("k");
        let lane = lane(&wrapper);
        // What a child inherits: a crew of its parent's, whose threads it does not have, one of which held the lock.
        let parents = Arc::new(Crew::new(1, std::process::id() ^ 1));
        lane.crew.store(Arc::clone(&parents));
        let mut held = parents.lock();
        held.busy = 1;
        assert_eq!(class(start(&lane, 60_000).wait()), None);
    }

    #[test]
    fn the_wrapper_is_told_the_ids_in_hex_and_the_deadline() {
        let lane = lane(&ScriptedWrapper::new("k"));
        let request = request();
        let deadline = request.deadline();
        let seen = lane.start(&request, deadline, |_, cx| {
            Ok((cx.cluster, cx.database, cx.generation, cx.purpose, cx.deadline, cx.label.to_owned()))
        });
        let (cluster, database, generation, purpose, told, label) = seen.wait().unwrap();
        assert_eq!((cluster, database, generation), (request.cluster, request.database, request.generation));
        assert_eq!((purpose, told), (Purpose::Data, deadline));
        let (c1, d2) = ("c1".repeat(16), "d2".repeat(16));
        assert_eq!(label, format!("pageseal purpose=data cluster={c1} database={d2} generation=3"));
    }

    #[test]
    fn an_endless_timeout_is_no_overflow_and_none_at_all_is_unreachable() {
        let wrapper = ScriptedWrapper::new("k");
        let lane = lane(&wrapper);
        let endless = WrapRequest { timeout: Duration::MAX, ..request() };
        assert!(lane.start(&endless, endless.deadline(), |_, _| Ok(())).wait().is_ok());
        wrapper.hang();
        assert_eq!(class(start(&lane, 0).wait()), Some(KmsClass::Unreachable));
        wrapper.restore();
    }
}
