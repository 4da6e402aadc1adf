//! Calls to a [`KeyWrapper`], each on a thread of ours, at most [`IN_FLIGHT`] at a time for one wrapper, each with a
//! deadline at which nobody waits for it any more.
//!
//! A thread cannot be stopped from outside, so an abandoned call keeps its place among those in flight until it returns. A
//! wrapper that hangs for ever can therefore use up its own places, and nothing else: further calls to it wait in line, fail
//! at their deadline, and never cost a thread. Plain threads, so a caller inside an async runtime is merely blocked.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;

use crate::error::{KmsClass, KmsError};
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, Generation, MasterKeyId};
use crate::keys::wrapper::{KeyWrapper, WrapContext};
use crate::secret::scoped;

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
pub(crate) struct Lane {
    id: MasterKeyId,
    wrapper: Arc<dyn KeyWrapper>,
    crew: ArcSwap<Crew>,
}

impl Lane {
    pub(crate) fn new(wrapper: Arc<dyn KeyWrapper>) -> Self {
        Self::bounded(wrapper, IN_FLIGHT)
    }

    fn bounded(wrapper: Arc<dyn KeyWrapper>, bound: usize) -> Self {
        Self { id: wrapper.id(), wrapper, crew: ArcSwap::from_pointee(Crew::new(bound, std::process::id())) }
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
                run: Box::new(move || {
                    started.store(true, Ordering::Relaxed);
                    // Nobody may be waiting any more. Then what came back is dropped here, and so wiped.
                    let _ = sender.send(call(&*wrapper, &context(&request, deadline, &request.label())));
                }),
            }
        };
        let crew = self.crew_of_this_process();
        if let Err(error) = crew.take_on(job) {
            let text = format!("no thread could be started for the call to master key {}: {error}", self.id);
            let _ = sender.send(Err(KmsError::with_source(KmsClass::Unreachable, text)));
        }
        Pending { id: self.id.clone(), timeout: request.timeout, deadline, started, answer, crew }
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
}

impl<T> Pending<T> {
    /// Waits for the answer, until the deadline at most.
    pub(crate) fn wait(self) -> Result<T, KmsError> {
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

struct Job {
    deadline: Instant,
    run: Box<dyn FnOnce() + Send>,
}

impl Crew {
    fn new(bound: usize, process: u32) -> Self {
        Self { bound, process, state: Mutex::default() }
    }

    /// # Errors
    /// The system's, if it gives no thread; then the job is dropped.
    fn take_on(self: &Arc<Self>, job: Job) -> io::Result<()> {
        {
            let mut state = self.lock();
            if state.busy >= self.bound {
                state.waiting.push_back(job);
                return Ok(());
            }
            state.busy += 1;
        }
        let crew = Arc::clone(self);
        let spawned = thread::Builder::new().name("pageseal-kms".into()).spawn(move || crew.work(job));
        if spawned.is_err() {
            self.lock().busy -= 1;
        }
        spawned.map(drop)
    }

    /// Runs one job after the other, and ends when none waits.
    fn work(&self, first: Job) {
        let mut next = Some(first);
        while let Some(job) = next {
            // A panic drops the job's sender, which tells the one who waits. Key bytes on this stack are wiped in any case.
            let _ = catch_unwind(AssertUnwindSafe(|| scoped(job.run)));
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
        let expired: Vec<Job> = {
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
