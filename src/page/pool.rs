//! Thread pools for batches. The calling thread takes part in the work: while the others wake up, it has begun.

use std::num::NonZero;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};
use crate::secret::ForkDetector;

/// Runs the tasks of a batch. Implement it to lend pageseal your engine's own threads.
///
/// A batch does not rely on it for safety: each page is taken by exactly one thread even if `run` calls a task twice, and
/// the caller finishes what `run` leaves undone.
pub trait Pool: Send + Sync {
    /// How many threads can work at once, the caller included.
    fn threads(&self) -> usize;

    /// Calls `f(0)` to `f(tasks - 1)`, `f(0)` on the calling thread, and returns when all calls have.
    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync));
}

/// No pool: the caller does all the work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

impl Pool for Inline {
    fn threads(&self) -> usize {
        1
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        (0..tasks).for_each(f);
    }
}

/// A pool of our own. In a forked child, where its threads do not exist, it does the work on the calling thread.
pub struct Threads {
    /// One thread fewer than `threads`, because the caller takes part; `None` if that leaves none.
    pool: Option<rayon::ThreadPool>,
    threads: usize,
    fork: ForkDetector,
}

impl Threads {
    /// A pool in which `threads` threads work at once: the caller and `threads - 1` of the pool's.
    ///
    /// # Errors
    /// [`ErrorKind::Resources`] if the system gives no more threads.
    pub fn new(threads: NonZero<usize>) -> Result<Self, Error> {
        let threads = threads.get();
        let resources =
            |error: String| Error::new(ErrorKind::Resources, format!("starting {threads} threads: {error}"));
        let fork = ForkDetector::new().map_err(|error| resources(error.to_string()))?;
        let pool = match threads {
            1 => None,
            _ => {
                let builder = rayon::ThreadPoolBuilder::new().num_threads(threads - 1);
                let builder = builder.thread_name(|index| format!("pageseal-{index}"));
                Some(builder.build().map_err(|error| resources(error.to_string()))?)
            }
        };
        Ok(Self { pool, threads, fork })
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
        if self.fork.forked() { 1 } else { self.threads }
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        match &self.pool {
            Some(pool) if !self.fork.forked() => pool.run(tasks, f),
            _ => Inline.run(tasks, f),
        }
    }
}

impl std::fmt::Debug for Threads {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Threads").field("threads", &self.threads).finish_non_exhaustive()
    }
}

/// A rayon pool of the caller's. Do not use one across a fork: its threads do not exist in the child.
impl Pool for rayon::ThreadPool {
    fn threads(&self) -> usize {
        // A caller from outside the pool works beside its threads; one of the pool's own threads is among them.
        self.current_num_threads() + usize::from(self.current_thread_index().is_none())
    }

    fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let running = AtomicUsize::new(tasks.saturating_sub(1));
        self.in_place_scope(|scope| {
            for task in 1..tasks {
                let running = &running;
                scope.spawn(move |_| {
                    f(task);
                    running.fetch_sub(1, Ordering::Release);
                });
            }
            f(0);
            spin_while(|| running.load(Ordering::Acquire) > 0);
        });
    }
}

/// Waits a little without sleeping: the other threads end within microseconds of the caller, and being woken would cost
/// more than that. Whoever is still running then is waited for in the ordinary way.
fn spin_while(condition: impl Fn() -> bool) {
    const LONGEST: Duration = Duration::from_micros(40);
    let start = Instant::now();
    while condition() && start.elapsed() < LONGEST {
        std::hint::spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_and_the_first_on_the_calling_thread() {
        let three = Threads::new(NonZero::new(3).unwrap()).unwrap();
        let own = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
        for pool in [&Inline as &dyn Pool, &three, &own, Threads::shared()] {
            let caller = std::thread::current().id();
            let runs: Vec<_> = (0..5).map(|_| AtomicUsize::new(0)).collect();
            pool.run(5, &|task| {
                runs[task].fetch_add(1, Ordering::Relaxed);
                assert!(task != 0 || std::thread::current().id() == caller);
            });
            assert!(runs.iter().all(|run| run.load(Ordering::Relaxed) == 1));
        }
        assert_eq!(three.threads(), 3);
    }
}
