//! [`Threads`]: our own pool.
//!
//! Not rayon, whose scopes wait for every spawned task to have run: a caller that has done all the work itself would still
//! wait for a sleeping thread to wake up and find nothing, and a process cloned in the middle of a batch would wait for
//! threads that do not exist in it for ever. Here a caller waits only for threads that have begun, and nobody waits in a
//! clone.
#![allow(unsafe_code)]

use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{Builder, JoinHandle, available_parallelism, park, sleep, yield_now};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};
use crate::page::pool::{Inline, Pool};
use crate::secret::ForkDetector;

/// How long a thread looks for the next batch before it sleeps, and a caller for the last thread to end: being woken costs
/// more than that.
const SPIN: Duration = Duration::from_micros(50);

/// A pool of our own. In a forked child, where its threads do not exist, it does the work on the calling thread. One batch
/// at a time is shared out; another that comes meanwhile is its caller's alone.
pub struct Threads {
    shared: Arc<Shared>,
    /// One thread fewer than work at once, because the caller takes part.
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    /// `CLAIMED`, `OPEN`, how many workers are within the task, and how many tasks there were.
    state: AtomicUsize,
    /// The task, as long as somebody can be within it.
    task: AtomicPtr<Task<'static>>,
    stop: AtomicBool,
    fork: ForkDetector,
}

/// A caller owns the pool.
const CLAIMED: usize = 1;
/// Workers may enter the task.
const OPEN: usize = 2;
const ONE_WORKER: usize = 4;
const WORKERS: usize = 0xfffc;
const ONE_TASK: usize = 0x1_0000;

struct Task<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    tasks: usize,
    next: AtomicUsize,
    panicked: AtomicBool,
}

impl Threads {
    /// A pool in which `threads` threads work at once: the caller and `threads - 1` of the pool's. At most 1,024.
    ///
    /// # Errors
    /// [`ErrorKind::Resources`] if the system gives no more threads.
    pub fn new(threads: NonZero<usize>) -> Result<Self, Error> {
        let count = threads.get().min(1024) - 1;
        let resources = |error: std::io::Error| {
            Error::with_source(ErrorKind::Resources, format!("starting {count} threads: {error}"), error)
        };
        let shared = Arc::new(Shared {
            state: AtomicUsize::new(0),
            task: AtomicPtr::new(ptr::null_mut()),
            stop: AtomicBool::new(false),
            fork: ForkDetector::new().map_err(resources)?,
        });
        // Dropped, and the threads with it, if one cannot be started.
        let mut pool = Self { shared, workers: Vec::with_capacity(count) };
        for index in 0..count {
            let shared = Arc::clone(&pool.shared);
            let started = Builder::new().name(format!("pageseal-{index}")).spawn(move || shared.work());
            pool.workers.push(started.map_err(resources)?);
        }
        Ok(pool)
    }

    /// The pool of this process, with as many threads as the machine lends it. Started at the first call; if the system
    /// gives no threads, it works on the calling thread alone.
    pub fn shared() -> &'static dyn Pool {
        static SHARED: OnceLock<Option<Threads>> = OnceLock::new();
        let started = SHARED.get_or_init(|| Self::new(available_parallelism().unwrap_or(NonZero::<usize>::MIN)).ok());
        match started {
            Some(threads) => threads,
            None => &Inline,
        }
    }
}

impl Pool for Threads {
    fn threads(&self) -> usize {
        if self.shared.fork.forked() { 1 } else { self.workers.len() + 1 }
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let helpers = self.workers.len().min(tasks.saturating_sub(1));
        if helpers == 0 || !self.shared.claim() {
            return Inline.run(tasks, f);
        }
        let task = Task { f, tasks, next: AtomicUsize::new(1), panicked: AtomicBool::new(false) };
        // The guard closes the task and waits for those within, also if `f` panics: `task` and `f` outlive all use.
        let open = self.shared.open(&task);
        self.workers[..helpers].iter().for_each(|worker| worker.thread().unpark());
        f(0);
        task.run_rest();
        drop(open);
        if task.panicked.load(Ordering::Relaxed) {
            panic!("a task of a batch panicked on another thread");
        }
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        let forked = self.shared.fork.forked();
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            if forked {
                // A thread that does not exist here can neither be woken nor joined.
                std::mem::forget(worker);
            } else {
                worker.thread().unpark();
                let _ = worker.join();
            }
        }
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("threads", &(self.workers.len() + 1)).finish_non_exhaustive()
    }
}

impl Task<'_> {
    /// Runs the calls that nobody has begun.
    fn run_rest(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= self.tasks {
                break;
            }
            (self.f)(index);
        }
    }
}

impl Shared {
    /// Takes the pool for one caller; false if another has it, or this is a forked child.
    fn claim(&self) -> bool {
        let state = self.state.load(Ordering::Relaxed);
        state & (CLAIMED | OPEN | WORKERS) == 0
            && !self.fork.forked()
            && self.state.compare_exchange(state, state | CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok()
    }

    /// Lets the workers into `task` until the guard is dropped. Only for the caller that claimed the pool.
    fn open<'t>(&'t self, task: &'t Task<'_>) -> Open<'t> {
        self.task.store(ptr::from_ref(task).cast::<Task<'static>>().cast_mut(), Ordering::Relaxed);
        // Release: who sees the task open sees the pointer to it.
        self.state.fetch_add(ONE_TASK | OPEN, Ordering::Release);
        Open(self)
    }

    /// Enters the open task, if there is one and it is not number `last`.
    fn enter(&self, last: usize) -> Option<usize> {
        let mut state = self.state.load(Ordering::Relaxed);
        while state & OPEN != 0 && state / ONE_TASK != last {
            match self.state.compare_exchange_weak(state, state + ONE_WORKER, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return Some(state / ONE_TASK),
                Err(now) => state = now,
            }
        }
        None
    }

    /// A worker's life.
    fn work(&self) {
        let mut last = 0;
        let mut idle = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            if let Some(number) = self.enter(last) {
                last = number;
                // SAFETY: `enter` counted this thread as within the task while it was open. The task's caller (`Open::drop`)
                // waits until nobody is within before it lets go of the task, and the pointer changes only after that.
                let task = unsafe { &*self.task.load(Ordering::Relaxed) };
                if catch_unwind(AssertUnwindSafe(|| task.run_rest())).is_err() {
                    task.panicked.store(true, Ordering::Relaxed);
                }
                // Release: the caller sees what was done. From here on `task` may be gone.
                self.state.fetch_sub(ONE_WORKER, Ordering::Release);
                idle = Instant::now();
            } else if idle.elapsed() < SPIN {
                std::hint::spin_loop();
            } else {
                park();
                idle = Instant::now();
            }
        }
    }
}

/// An open task.
struct Open<'t>(&'t Shared);

impl Drop for Open<'_> {
    fn drop(&mut self) {
        self.0.state.fetch_and(!OPEN, Ordering::Relaxed);
        let start = Instant::now();
        // Acquire: see what the workers did. In a process cloned meanwhile there are no workers to wait for.
        while self.0.state.load(Ordering::Acquire) & WORKERS != 0 && !self.0.fork.forked() {
            match start.elapsed() {
                waited if waited < SPIN => std::hint::spin_loop(),
                waited if waited < 20 * SPIN => yield_now(),
                _ => sleep(SPIN),
            }
        }
        self.0.state.fetch_and(!CLAIMED, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_runs_every_task_of_many_batches_once_whoever_calls() {
        let pool = Threads::new(NonZero::new(3).unwrap()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for round in 0..2_000 {
                        let runs: Vec<_> = (0..round % 7).map(|_| AtomicUsize::new(0)).collect();
                        pool.run(runs.len(), &|task| {
                            runs[task].fetch_add(1, Ordering::Relaxed);
                        });
                        assert!(runs.iter().all(|run| run.load(Ordering::Relaxed) == 1));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_on_any_thread_reaches_the_caller_and_the_pool_goes_on() {
        let pool = Threads::new(NonZero::new(3).unwrap()).unwrap();
        for bad in 0..8 {
            let run = AssertUnwindSafe(|| pool.run(8, &|task| assert!(task != bad, "as told")));
            assert!(catch_unwind(run).is_err(), "task {bad}");
            let count = AtomicUsize::new(0);
            pool.run(8, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(count.load(Ordering::Relaxed), 8);
        }
    }

    #[test]
    fn a_batch_within_a_batch_is_its_callers_alone() {
        let pool = Threads::new(NonZero::new(2).unwrap()).unwrap();
        let count = AtomicUsize::new(0);
        pool.run(4, &|_| {
            pool.run(4, &|_| {
                count.fetch_add(1, Ordering::Relaxed);
            })
        });
        assert_eq!(count.load(Ordering::Relaxed), 16);
    }
}
