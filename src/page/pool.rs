//! [`Pool`]: who lends threads to batches. The calling thread takes part in the work: while the others wake up, it has begun.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

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
    use std::num::NonZero;

    use super::*;
    use crate::page::threads::Threads;

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
