//! One page, sealed and opened in place, by pageseal and by the cipher under it: for each suite, 4 to 64 KiB.
//!
//! ```text
//! cargo bench -p pageseal-benches --bench pages -- 'seal/aes256gcm'
//! ```
//!
//! The two are measured one after the other, so on a busy machine their ratio says little; the example `limits` lets them
//! take turns.

use aegis::aegis256x2::Aegis256X2;
use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use pageseal::testing::stray_cipher;
use pageseal::{AesBackend, FileId, OVERHEAD, PageCipher, PageContext, Suite, Trailer};
use ring::aead::{AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey};

const SIZES: [usize; 5] = [4, 8, 16, 32, 64];
const CONTEXT: PageContext = PageContext::page(FileId::new(1), 1);

criterion_group!(pages, all_suites);
criterion_main!(pages);

fn all_suites(criterion: &mut Criterion) {
    one_suite(criterion, "aes256gcm", Suite::Aes256Gcm, &Ring::new(&AES_256_GCM));
    one_suite(criterion, "chacha20poly1305", Suite::ChaCha20Poly1305, &Ring::new(&CHACHA20_POLY1305));
    one_suite(criterion, "aegis256x2", Suite::Aegis256X2, &Aegis);
}

fn one_suite(criterion: &mut Criterion, name: &str, suite: Suite, raw: &impl Cipher) {
    let ours = match stray_cipher(suite, AesBackend::Ring) {
        Ok(cipher) => cipher,
        Err(error) => return println!("{name} is left out: {error}"),
    };
    let mut seal = criterion.benchmark_group(format!("seal/{name}"));
    for size in SIZES.map(|kib| kib * 1024) {
        seal.throughput(Throughput::Bytes(size as u64));
        let mut page = vec![0x5a; size - OVERHEAD];
        let mut counter = 0;
        seal.bench_function(BenchmarkId::new("pageseal", size), |bencher| {
            bencher.iter(|| ours.seal(&mut counter, &mut page));
        });
        seal.bench_function(BenchmarkId::new("raw", size), |bencher| {
            bencher.iter(|| raw.seal(&mut counter, &mut page))
        });
    }
    seal.finish();
    let mut open = criterion.benchmark_group(format!("open/{name}"));
    for size in SIZES.map(|kib| kib * 1024) {
        open.throughput(Throughput::Bytes(size as u64));
        open.bench_function(BenchmarkId::new("pageseal", size), |bencher| open_pages(bencher, &ours, size));
        open.bench_function(BenchmarkId::new("raw", size), |bencher| open_pages(bencher, raw, size));
    }
    open.finish();
}

/// Opens copies of one sealed page; making them is not measured.
fn open_pages<C: Cipher>(bencher: &mut criterion::Bencher<'_>, cipher: &C, size: usize) {
    let mut sealed = vec![0x5a; size - OVERHEAD];
    let tag = cipher.seal(&mut 7, &mut sealed);
    bencher.iter_batched_ref(|| sealed.clone(), |page| cipher.open(7, page, &tag), BatchSize::SmallInput);
}

/// What seals pages in place, with a counter for a nonce where it does not have its own.
trait Cipher {
    type Tag;
    fn seal(&self, counter: &mut u64, page: &mut [u8]) -> Self::Tag;
    fn open(&self, counter: u64, page: &mut [u8], tag: &Self::Tag);
}

impl Cipher for PageCipher {
    type Tag = Trailer;

    fn seal(&self, _: &mut u64, page: &mut [u8]) -> Trailer {
        self.seal_detached(&CONTEXT, page).expect("sealing works")
    }

    fn open(&self, _: u64, page: &mut [u8], trailer: &Trailer) {
        self.open_detached(&CONTEXT, page, trailer).expect("it was sealed so");
    }
}

struct Ring(LessSafeKey);

impl Ring {
    fn new(algorithm: &'static Algorithm) -> Self {
        Self(LessSafeKey::new(UnboundKey::new(algorithm, &[7; 32]).expect("both algorithms have keys of 32 bytes")))
    }
}

impl Cipher for Ring {
    type Tag = [u8; 16];

    fn seal(&self, counter: &mut u64, page: &mut [u8]) -> [u8; 16] {
        let tag = self.0.seal_in_place_separate_tag(ring_nonce(*counter), Aad::from([1; 32]), page);
        *counter += 1;
        tag.expect("pages are short").as_ref().try_into().expect("tags have 16 bytes")
    }

    fn open(&self, counter: u64, page: &mut [u8], tag: &[u8; 16]) {
        let opened =
            self.0.open_in_place_separate_tag(ring_nonce(counter), Aad::from([1; 32]), (*tag).into(), page, 0..);
        opened.expect("it was sealed so");
    }
}

fn ring_nonce(counter: u64) -> Nonce {
    let mut nonce = [0; 12];
    nonce[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

struct Aegis;

impl Aegis {
    fn state(counter: u64) -> Aegis256X2<16> {
        let mut nonce = [0; 32];
        nonce[..8].copy_from_slice(&counter.to_le_bytes());
        Aegis256X2::new(&[7; 32], &nonce)
    }
}

impl Cipher for Aegis {
    type Tag = [u8; 16];

    fn seal(&self, counter: &mut u64, page: &mut [u8]) -> [u8; 16] {
        *counter += 1;
        Self::state(*counter - 1).encrypt_in_place(page, &[1; 32])
    }

    fn open(&self, counter: u64, page: &mut [u8], tag: &[u8; 16]) {
        Self::state(counter).decrypt_in_place(page, tag, &[1; 32]).expect("it was sealed so");
    }
}
