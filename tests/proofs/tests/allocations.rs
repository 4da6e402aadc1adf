//! Sealing and opening allocates nothing. In a test binary of its own, because it counts in the allocator.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{CIPHERS, is_zero};
use pageseal::testing::stray_cipher;
use pageseal::{FileId, Inline, OVERHEAD, PageCipher, PageContext, PageError, PageJob, Pool, Threads, Trailer};
use pageseal_proofs::score;

struct Counting;

thread_local!(static OF_THREAD: Cell<u64> = const { Cell::new(0) });
static OF_PROCESS: AtomicU64 = AtomicU64::new(0);

fn count() {
    OF_PROCESS.fetch_add(1, Ordering::Relaxed);
    // A thread that is ending has no counter any more; it seals nothing either.
    let _ = OF_THREAD.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: hands everything to the system's allocator; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, at: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, len) }
    }
    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CALLS: u64 = 500;
const AT: PageContext = PageContext::page(FileId::new(1), 7);

/// Calls `f` once to warm up and then [`CALLS`] times; returns the allocations of this thread.
fn allocations(mut f: impl FnMut()) -> u64 {
    f();
    let before = OF_THREAD.get();
    (0..CALLS).for_each(|_| f());
    OF_THREAD.get() - before
}

/// What the ways in and out allocate, summed over all ciphers.
#[derive(Default)]
struct Report {
    /// (operation, allocations, pages, allocations of the broken variant)
    rows: Vec<(&'static str, u64, u64, u64)>,
}

impl Report {
    /// Counts `f`, and the broken variant that keeps a copy of what it works on.
    fn measure(&mut self, op: &'static str, pages: u64, mut f: impl FnMut()) {
        let allocated = allocations(&mut f);
        let broken = allocations(|| {
            (0..pages).for_each(|_| drop(std::hint::black_box(vec![0xa5u8; 64])));
            f();
        });
        match self.rows.iter_mut().find(|row| row.0 == op) {
            Some(row) => (row.1, row.2, row.3) = (row.1 + allocated, row.2 + pages * CALLS, row.3 + broken),
            None => self.rows.push((op, allocated, pages * CALLS, broken)),
        }
    }
}

#[test]
fn sealing_and_opening_a_page_allocates_nothing() {
    let mut report = Report::default();
    for (suite, backend) in CIPHERS {
        single_pages(&stray_cipher(suite, backend).unwrap(), &mut report);
        batches(&stray_cipher(suite, backend).unwrap(), &mut report);
    }
    for (op, allocated, pages, broken) in &report.rows {
        // Rounded up: one allocation in a million pages is not zero.
        let (per_page, control) = (allocated.div_ceil(*pages), broken >= pages);
        score(&format!("allocations op={op} per_page={per_page} pages={pages} control={}", u8::from(control)));
        assert!(control, "{op}: an allocation a page was not seen");
        assert_eq!(*allocated, 0, "{op}");
    }
    assert_eq!(report.rows.len(), 9);
    parallel_batches();
}

fn single_pages(cipher: &PageCipher, report: &mut Report) {
    let (payload, mut page, mut out) = (vec![1; 4096], vec![0; 4096 + OVERHEAD], vec![0; 4096]);
    report.measure("seal_into", 1, || cipher.seal_into(&AT, &payload, &mut page).unwrap());
    report.measure("open_into", 1, || cipher.open_into(&AT, &page, &mut out).unwrap());
    assert_eq!(out, payload);
    report.measure("seal_in_place", 1, || cipher.seal_in_place(&AT, &mut page).unwrap());
    let sealed = page.clone();
    report.measure("open_in_place", 1, || {
        page.copy_from_slice(&sealed);
        cipher.open_in_place(&AT, &mut page).unwrap();
    });
    let mut trailer = Trailer([0; OVERHEAD]);
    report.measure("seal_detached", 1, || trailer = cipher.seal_detached(&AT, &mut out).unwrap());
    let sealed = out.clone();
    report.measure("open_detached", 1, || {
        out.copy_from_slice(&sealed);
        cipher.open_detached(&AT, &mut out, &trailer).unwrap();
    });
    report.measure("refused_open", 1, || {
        out.copy_from_slice(&sealed);
        let refused = cipher.open_detached(&PageContext::unbound(), &mut out, &trailer);
        assert_eq!(refused, Err(PageError::Authentication));
    });
    assert!(is_zero(&out));
}

/// Batches on the calling thread: 200 KiB, so above the limit for going parallel, but in a pool without threads.
fn batches(cipher: &PageCipher, report: &mut Report) {
    let mut pages = vec![vec![0; 4096 + OVERHEAD]; 50];
    let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(AT, page)).collect();
    report.measure("seal_batch", 50, || assert_eq!(cipher.seal_batch(&Inline, &mut jobs), 0));
    drop(jobs);
    let sealed = pages.clone();
    let mut out = vec![vec![0; 4096]; 50];
    let mut jobs: Vec<_> = sealed.iter().zip(&mut out).map(|(page, out)| PageJob::between(AT, page, out)).collect();
    report.measure("open_batch", 50, || assert_eq!(cipher.open_batch(&Inline, &mut jobs), 0));
}

/// A pool may allocate to hand out its tasks, but not for each page: as much for 2,048 pages as for 128.
fn parallel_batches() {
    const ROUNDS: u64 = 50;
    let cipher = stray_cipher(CIPHERS[0].0, CIPHERS[0].1).unwrap();
    let ours = Threads::new(NonZero::new(2).unwrap()).unwrap();
    let callers = rayon::ThreadPoolBuilder::new().num_threads(2).build().unwrap();
    for pool in [&ours as &dyn Pool, &callers] {
        let of_batch = |count: usize| {
            let mut pages = vec![vec![0; 4096 + OVERHEAD]; count];
            let mut jobs: Vec<_> = pages.iter_mut().map(|page| PageJob::in_place(AT, page)).collect();
            (0..10).for_each(|_| assert_eq!(cipher.seal_batch(pool, &mut jobs), 0));
            let before = OF_PROCESS.load(Ordering::Relaxed);
            (0..ROUNDS).for_each(|_| {
                assert_eq!(cipher.seal_batch(pool, &mut jobs), 0);
                assert_eq!(cipher.open_batch(pool, &mut jobs), 0);
            });
            OF_PROCESS.load(Ordering::Relaxed) - before
        };
        let (few, many) = (of_batch(128), of_batch(2_048));
        println!(
            "{ROUNDS} rounds of seal_batch and open_batch on a pool: {few} allocations for 128 pages, {many} for 2,048"
        );
        assert!(many <= few + ROUNDS && many < ROUNDS * 128, "allocations grow with the pages: {few}, {many}");
    }
}
