//! Batches of pages, sealed and opened in place, on the calling thread alone and on as many threads as the machine lends.
//!
//! ```text
//! cargo bench -p pageseal-benches --bench batches -- 'seal/4096'
//! ```

use std::thread::available_parallelism;

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pageseal::testing::stray_cipher;
use pageseal::{AesBackend, FileId, Inline, PageCipher, PageContext, PageJob, Pool, Suite, Threads};

/// Page sizes, and the numbers of pages in a batch: around the size from which another thread pays, and far above.
const BATCHES: [(usize, [usize; 5]); 2] = [(4096, [8, 32, 64, 256, 1024]), (16384, [2, 8, 16, 64, 256])];

criterion_group!(batches, all_batches);
criterion_main!(batches);

fn all_batches(criterion: &mut Criterion) {
    let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).expect("every machine can do AES");
    let threads = available_parallelism().expect("the system tells how many threads it has");
    let pool = Threads::new(threads).expect("the system gives threads");
    let pools: [(&str, &dyn Pool); 2] = [("inline", &Inline), ("threads", &pool)];
    for (size, batches) in BATCHES {
        let mut seal = criterion.benchmark_group(format!("seal/{size}"));
        for batch in batches {
            seal.throughput(Throughput::Bytes((batch * size) as u64));
            for (name, pool) in pools {
                let mut pages = vec![0x5a; batch * size];
                seal.bench_function(BenchmarkId::new(name, batch), |bencher| {
                    bencher.iter(|| seal_all(&cipher, pool, &mut pages, size));
                });
            }
        }
        seal.finish();
        let mut open = criterion.benchmark_group(format!("open/{size}"));
        for batch in batches {
            open.throughput(Throughput::Bytes((batch * size) as u64));
            for (name, pool) in pools {
                let mut sealed = vec![0x5a; batch * size];
                seal_all(&cipher, &Inline, &mut sealed, size);
                open.bench_function(BenchmarkId::new(name, batch), |bencher| {
                    let open = |pages: &mut Vec<u8>| {
                        assert_eq!(cipher.open_batch(pool, &mut jobs(pages, size)), 0);
                    };
                    bencher.iter_batched_ref(|| sealed.clone(), open, BatchSize::LargeInput);
                });
            }
        }
        open.finish();
    }
}

fn seal_all(cipher: &PageCipher, pool: &dyn Pool, pages: &mut [u8], size: usize) {
    assert_eq!(cipher.seal_batch(pool, &mut jobs(pages, size)), 0);
}

fn jobs(pages: &mut [u8], size: usize) -> Vec<PageJob<'_>> {
    let place = |page| PageContext::page(FileId::new(1), page);
    (0..).zip(pages.chunks_exact_mut(size)).map(|(page, bytes)| PageJob::in_place(place(page), bytes)).collect()
}
