//! A page opens where, when and under the key that it was sealed with, and nowhere else.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{
    CIPHERS, Dice, GlassWrapper, Method, Refusals, TempDir, generation, is_zero, open_stray, salt_and_nonce, stray_key,
};
use pageseal::testing::stray::{StrayDatabase, StrayKey};
use pageseal::testing::stray_cipher;
use pageseal::{
    AesBackend, Cluster, ClusterOptions, Entropy, FileId, Generation, Location, MAX_PAYLOAD, NoRandomness, OVERHEAD,
    PageCipher, PageContext, PageError, SealId, Suite, Trailer, Wrappers,
};
use pageseal_proofs::score;
use proptest::prelude::*;
use ring::{aead, hkdf};

const PAGE: usize = 4096;
const PAYLOAD: usize = PAGE - OVERHEAD;
const FILE: FileId = FileId::new(0x0102_0304_0506_0708);
/// Where the trailer's fields begin, counted from its first byte.
const SALT_AT: usize = 28;
const GENERATION_AT: usize = 44;
const SUITE_AT: usize = 47;

fn at(page: u64) -> PageContext {
    PageContext::page(FILE, page)
}

#[test]
fn every_single_bit_flip_of_a_sealed_page_is_refused() {
    let mut flips = Refusals::default();
    let mut broken = Refusals::default();
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        let payload = Dice::new(1).bytes(PAYLOAD);
        let sealed = Method::Into.seal(&cipher, &at(7), &payload).unwrap();
        assert_eq!(sealed.len(), PAGE);
        for bit in 0..PAGE * 8 {
            let mut page = sealed.clone();
            page[bit / 8] ^= 1 << (bit % 8);
            for method in [Method::Into, Method::InPlace, Method::Detached] {
                flips.count(method.open(&cipher, &at(7), &page));
            }
            // The broken variant: an opener that takes the salt from elsewhere, and so does not cover the page's own.
            let salt = PAYLOAD + SALT_AT;
            page[salt..salt + 16].copy_from_slice(&sealed[salt..salt + 16]);
            broken.count(Method::InPlace.open(&cipher, &at(7), &page));
        }
        for method in Method::ALL {
            assert_eq!(
                method.open(&cipher, &at(7), &sealed),
                (Ok(()), payload.clone()),
                "the page itself does not open"
            );
        }
    }
    let control = broken.accepted() == 16 * 8 * CIPHERS.len() as u64;
    score(&format!("bit-flips tried={} refused={} control={}", flips.tried, flips.refused, u8::from(control)));
    assert!(control, "the broken variant accepted {} flips", broken.accepted());
    assert_eq!(flips.tried, flips.refused);
    assert_eq!(flips.tried, (PAGE * 8 * 3 * CIPHERS.len()) as u64);
}

#[test]
fn no_page_opens_in_the_place_of_another() {
    let mut swaps = Refusals::default();
    let mut unbound = Refusals::default();
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        pairs_of_256_pages(&cipher, at, &mut swaps);
        pairs_of_256_pages(&cipher, |page| PageContext::page(FileId::new(page), 7), &mut swaps);
        pairs_of_256_pages(&cipher, |page| at(7).with_version(page), &mut swaps);
        // The broken variant: an engine that binds no place.
        pairs_of_256_pages(&cipher, |_| PageContext::unbound(), &mut unbound);
        contexts_that_look_alike(&cipher, &mut swaps);
        trailers_of_other_pages(&cipher, &mut swaps);
        keys_that_look_alike(suite, backend, &mut swaps);
        databases_of_clusters(suite, backend, &mut swaps);
    }
    let control = unbound.refused == 0 && unbound.tried > 0;
    score(&format!("swaps tried={} refused={} control={}", swaps.tried, swaps.refused, u8::from(control)));
    assert!(control, "{} swaps of unbound pages were refused", unbound.refused);
    assert_eq!(swaps.tried, swaps.refused);
    assert!(swaps.tried >= 3 * 65_280 * CIPHERS.len() as u64);
}

/// All ordered pairs of 256 pages of small payload (the place is bound, whatever the length).
fn pairs_of_256_pages(cipher: &PageCipher, context: impl Fn(u64) -> PageContext, swaps: &mut Refusals) {
    let sealed: Vec<_> =
        (0..256).map(|page| Method::InPlace.seal(cipher, &context(page), &[page as u8; 64]).unwrap()).collect();
    for (from, page) in (0..).zip(&sealed) {
        assert_eq!(Method::Into.open(cipher, &context(from), page), (Ok(()), vec![from as u8; 64]));
        for to in (0..256).filter(|to| *to != from) {
            swaps.count(Method::InPlace.open(cipher, &context(to), page));
        }
    }
}

fn contexts_that_look_alike(cipher: &PageCipher, swaps: &mut Refusals) {
    let (zero, max) = (FileId::new(0), FileId::new(u64::MAX));
    let mut contexts = vec![PageContext::unbound()];
    for (file, page) in
        [(zero, 0), (zero, 1), (FileId::new(1), 0), (FILE, 7), (FileId::new(7), FILE.get()), (max, u64::MAX)]
    {
        contexts.push(PageContext::page(file, page));
    }
    for plain in contexts.clone() {
        // Versions that equal other fields, so that fields cannot be mistaken for each other.
        contexts.extend([0, 1, 2, 3, 7, FILE.get(), u64::MAX].map(|version| plain.with_version(version)));
    }
    for method in Method::ALL {
        for sealed_at in &contexts {
            let page = method.seal(cipher, sealed_at, b"the same payload everywhere").unwrap();
            assert_eq!(method.open(cipher, sealed_at, &page).0, Ok(()));
            for other in contexts.iter().filter(|other| *other != sealed_at) {
                swaps.count(method.open(cipher, other, &page));
            }
        }
    }
}

/// A page under the trailer of another one at the same place: the older image's tag does not fit the newer one's bytes.
fn trailers_of_other_pages(cipher: &PageCipher, swaps: &mut Refusals) {
    let images: Vec<_> = (0..32).map(|image| Method::Into.seal(cipher, &at(7), &[image; 64]).unwrap()).collect();
    for (i, image) in images.iter().enumerate() {
        for (_, other) in images.iter().enumerate().filter(|(j, _)| *j != i) {
            let mut mixed = image.clone();
            mixed[64..].copy_from_slice(&other[64..]);
            swaps.count(Method::Detached.open(cipher, &at(7), &mixed));
        }
    }
}

/// Databases, clusters, generations and suites whose data key differs from the page's in one respect.
fn keys_that_look_alike(suite: Suite, backend: AesBackend, swaps: &mut Refusals) {
    let good = stray_key(suite, 1);
    let home = open_stray(&[good], backend).cipher;
    let page = Method::Into.seal(&home, &at(7), b"payload").unwrap();
    let (again, unlike) = (open_stray(&[good], backend).cipher, stray_key(suite, 2));
    assert_eq!(Method::Into.open(&again, &at(7), &page).0, Ok(()), "another handle of the same database");

    let mut others = vec![
        // Another database; a later cluster of the same name, whose key was drawn anew; and, as a cross-check that the
        // seal id is bound and not only the key, the same key under another seal id and the other way round.
        unlike,
        StrayKey { seal: unlike.seal, ..good },
        StrayKey { key: unlike.key, ..good },
    ];
    others.extend([2, 3, 255, 256, 65_536].map(|number| StrayKey { generation: generation(number), ..good }));
    let suites = [Suite::Aes256Gcm, Suite::ChaCha20Poly1305, Suite::Aegis256X2].into_iter();
    others.extend(suites.filter(|other| *other != suite).map(|suite| StrayKey { suite, ..good }));
    for other in others {
        let cipher = open_stray(&[other], backend).cipher;
        let mut forged = page.clone();
        for _as_it_is_and_forged in 0..2 {
            for method in Method::ALL {
                swaps.count(method.open(&cipher, &at(7), &forged));
            }
            // Now with a trailer that names the key which the opener has.
            forged[7 + GENERATION_AT..7 + SUITE_AT].copy_from_slice(&other.generation.get().to_le_bytes()[..3]);
            forged[7 + SUITE_AT] = other.suite.to_byte();
        }
    }
}

/// Real ones: two databases of a cluster, and those of the same names in a later cluster under the same master key.
fn databases_of_clusters(suite: Suite, backend: AesBackend, swaps: &mut Refusals) {
    let (dir, master) = (TempDir::new(), GlassWrapper::default());
    let options = || ClusterOptions::new().suite(suite).aes_backend(backend);
    let cluster = |name: &str| Cluster::create(&dir.join(name), options(), Wrappers::one(master.clone())).unwrap();
    let ciphers: Vec<_> = [cluster("first"), cluster("later")]
        .iter()
        .flat_map(|cluster| ["orders", "users"].map(|name| cluster.create_database(name).unwrap().cipher().unwrap()))
        .collect();
    for (i, home) in ciphers.iter().enumerate() {
        let page = Method::Into.seal(home, &at(7), b"payload").unwrap();
        for (_, other) in ciphers.iter().enumerate().filter(|(j, _)| *j != i) {
            Method::ALL.iter().for_each(|method| swaps.count(method.open(other, &at(7), &page)));
        }
        assert_eq!(Method::Into.open(home, &at(7), &page).0, Ok(()));
    }
}

/// A database with a generation of each suite, two of the first, and the last generation that exists.
fn five_generations() -> Vec<StrayKey> {
    let suites = [Suite::Aes256Gcm, Suite::Aes256Gcm, Suite::ChaCha20Poly1305, Suite::Aegis256X2, Suite::Aes256Gcm];
    let numbers = [1, 2, 3, 0x01_0203, Generation::MAX.get()];
    // One key and one seal id: what keeps the generations apart here is the trailer alone.
    suites
        .iter()
        .zip(numbers)
        .map(|(suite, number)| StrayKey { generation: generation(number), ..stray_key(*suite, 1) })
        .collect()
}

#[test]
fn every_field_of_the_trailer_set_to_another_value_is_a_clear_error() {
    let keys = five_generations();
    let database = open_stray(&keys, AesBackend::Ring).cipher;
    for newest in 0..keys.len() {
        // Sealed when this generation was the newest.
        let sealer = open_stray(&keys[..=newest], AesBackend::Ring).cipher;
        let own = keys[newest];
        assert_eq!(sealer.generation(), own.generation);
        let sealed = Method::Into.seal(&sealer, &at(7), &[0x3c; 100]).unwrap();
        let trailer = Trailer(*sealed.last_chunk().unwrap());
        assert_eq!((trailer.generation(), trailer.suite()), (Some(own.generation), Some(own.suite)));
        assert_eq!(Method::InPlace.open(&database, &at(7), &sealed).0, Ok(()));

        let numbers = (0..=300).chain(0xff_0000..=0xff_0040).chain((0..24).map(|bit| own.generation.get() ^ 1 << bit));
        for number in numbers.chain(keys.iter().map(|key| key.generation.get())) {
            for suite in [own.suite.to_byte(), 0, 1, 2, 3, 4, 255] {
                check_forged_name(&database, &keys, &sealed, number, suite);
            }
        }
        for suite in 0..=255 {
            check_forged_name(&database, &keys, &sealed, own.generation.get(), suite);
        }
        for field in 0..GENERATION_AT {
            for value in 0..=255 {
                let mut page = sealed.clone();
                let byte = &mut page[100 + field];
                if std::mem::replace(byte, value) != value {
                    let refused = Method::InPlace.open(&database, &at(7), &page);
                    assert_eq!(refused, (Err(PageError::Authentication), vec![0; 148]), "byte {field} = {value}");
                }
            }
        }
    }
}

fn check_forged_name(cipher: &PageCipher, keys: &[StrayKey], sealed: &[u8], number: u32, suite: u8) {
    let mut page = sealed.to_vec();
    page[100 + GENERATION_AT..100 + SUITE_AT].copy_from_slice(&number.to_le_bytes()[..3]);
    page[100 + SUITE_AT] = suite;
    let expected = match Generation::new(number) {
        _ if page == sealed => Ok(()),
        Some(number) if keys.iter().all(|key| key.generation != number) => Err(PageError::UnknownGeneration(number)),
        _ => Err(PageError::Authentication),
    };
    for method in Method::ALL {
        let (outcome, left) = method.open(cipher, &at(7), &page);
        assert_eq!(outcome, expected, "generation {number}, suite {suite}");
        assert_eq!(is_zero(&left), expected.is_err());
    }
}

#[test]
fn every_truncation_and_extension_is_an_error() {
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        let sealed = Method::Into.seal(&cipher, &at(7), &Dice::new(1).bytes(PAYLOAD)).unwrap();
        let mut twice = sealed.clone();
        twice.extend_from_slice(&sealed);
        // Ends that are cut off and beginnings; one page and a part of the same page again; the page after zeros.
        let cut = (0..PAGE).flat_map(|len| [&sealed[..len], &sealed[PAGE - len..]]);
        let extended = (PAGE + 1..2 * PAGE).flat_map(|len| [&twice[..len], &twice[2 * PAGE - len..]]);
        for page in cut.chain(extended) {
            for method in [Method::Into, Method::InPlace, Method::Detached] {
                let (outcome, left) = method.open(&cipher, &at(7), page);
                let error = outcome.expect_err("a page of another length opened");
                assert_eq!(error == PageError::Length, page.len() < OVERHEAD, "length {}: {error}", page.len());
                assert!(is_zero(&left), "length {}", page.len());
            }
        }
        for method in [Method::BatchBetween, Method::BatchInPlace] {
            for len in (0..=OVERHEAD).chain(PAGE - OVERHEAD..PAGE) {
                let (outcome, left) = method.open(&cipher, &at(7), &sealed[..len]);
                assert!(outcome.is_err() && is_zero(&left), "length {len}");
            }
        }
    }
}

#[test]
fn slices_that_do_not_fit_are_a_length_error() {
    let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
    let sealed = Method::Into.seal(&cipher, &at(7), &[1; 100]).unwrap();
    for len in (0..300).filter(|len| *len != 148) {
        let mut page = vec![0xa5; len];
        assert_eq!(cipher.seal_into(&at(7), &[1; 100], &mut page), Err(PageError::Length));
        assert!(is_zero(&page), "a failed seal_into left something");
    }
    for len in (0..300).filter(|len| *len != 100) {
        let mut payload = vec![0xa5; len];
        assert_eq!(cipher.open_into(&at(7), &sealed, &mut payload), Err(PageError::Length));
        assert!(is_zero(&payload), "a failed open_into left something");
    }
    for len in 0..OVERHEAD {
        let mut page = vec![0xa5; len];
        assert_eq!(cipher.seal_in_place(&at(7), &mut page), Err(PageError::Length));
        assert_eq!(page, vec![0xa5; len], "a failed seal_in_place changed the engine's only copy");
    }
}

#[test]
fn payloads_reach_from_nothing_to_the_longest() {
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        for (seal, open) in Method::ALL.iter().flat_map(|seal| Method::ALL.map(|open| (seal, open))) {
            let page = seal.seal(&cipher, &at(7), &[]).unwrap();
            assert_eq!(page.len(), OVERHEAD);
            assert_eq!(open.open(&cipher, &at(7), &page), (Ok(()), Vec::new()));
            assert!(open.open(&cipher, &at(8), &page).0.is_err());
        }
        let longest = vec![0x5a; MAX_PAYLOAD];
        let page = Method::InPlace.seal(&cipher, &at(7), &longest).unwrap();
        assert!(Method::Into.open(&cipher, &at(7), &page) == (Ok(()), longest));
    }
    let cipher = stray_cipher(Suite::Aes256Gcm, AesBackend::Ring).unwrap();
    let too_long = vec![0x5a; MAX_PAYLOAD + 1];
    let mut page = vec![0x5a; MAX_PAYLOAD + 1 + OVERHEAD];
    for method in Method::ALL {
        assert_eq!(method.seal(&cipher, &at(7), &too_long), Err(PageError::Length), "{method:?}");
        let (outcome, left) = method.open(&cipher, &at(7), &page);
        assert_eq!(outcome, Err(PageError::Length), "{method:?}");
        assert!(is_zero(&left), "{method:?}");
    }
    assert_eq!(cipher.seal_into(&at(7), &too_long, &mut page), Err(PageError::Length));
    assert!(is_zero(&page));
}

#[test]
fn buffers_may_lie_at_any_address() {
    for (suite, backend) in CIPHERS {
        let cipher = stray_cipher(suite, backend).unwrap();
        let payload = Dice::new(2).bytes(1000);
        for offset in 0..=64 {
            let mut buffer = vec![0xa5; offset + 1000 + OVERHEAD + 64];
            let (before, rest) = buffer.split_at_mut(offset);
            let (page, after) = rest.split_at_mut(1000 + OVERHEAD);
            cipher.seal_into(&at(7), &payload, page).unwrap();
            cipher.open_in_place(&at(7), page).unwrap();
            assert_eq!(page[..1000], payload);
            cipher.seal_in_place(&at(7), page).unwrap();
            let mut out = vec![0xa5; offset + 1000];
            cipher.open_into(&at(7), page, &mut out[offset..]).unwrap();
            assert_eq!(out[offset..], payload);
            let untouched = before.iter().chain(after.iter()).chain(&out[..offset]);
            assert!(untouched.clone().all(|byte| *byte == 0xa5), "bytes outside the page were written");
        }
    }
}

/// Salts of fives and fresh bits of nines, for pages whose every byte is known.
struct KnownDice;

impl Entropy for KnownDice {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        out.fill(5);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        Ok([9; 8])
    }
}

/// `file | page | version | flags`, written out from docs/FORMAT.md and not with the crate's own code.
fn associated_data(context: &PageContext) -> [u8; 32] {
    let (file, page, located) = match context.location {
        Location::Page { file, page } => (file.get(), page, 1),
        _ => (0, 0, 0),
    };
    let versioned = if context.version.is_some() { 2 } else { 0 };
    let words = [file, page, context.version.unwrap_or(0), located + versioned];
    let mut aad = [0; 32];
    words.iter().zip(aad.chunks_mut(8)).for_each(|(word, out)| out.copy_from_slice(&word.to_le_bytes()));
    aad
}

/// `label | seal id | salt | generation | suite`.
fn info(key: &StrayKey, salt: &[u8]) -> Vec<u8> {
    let generation = key.generation.get().to_le_bytes();
    [b"pgseal1.page", &key.seal.to_bytes()[..], salt, &generation[..3], &[key.suite.to_byte()]].concat()
}

/// The session's key as stock ring derives it.
fn stock_subkey(key: &StrayKey, salt: &[u8]) -> [u8; 32] {
    let mut out = [0; 32];
    let parent = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, &key.key);
    parent.expand(&[&info(key, salt)], hkdf::HKDF_SHA256).unwrap().fill(&mut out).unwrap();
    out
}

/// Opens a sealed page with stock crates alone; `None` if they refuse it.
fn stock_open(key: &StrayKey, context: &PageContext, page: &[u8]) -> Option<Vec<u8>> {
    let (salt, nonce) = salt_and_nonce(page);
    let (subkey, aad) = (stock_subkey(key, &salt), associated_data(context));
    // The tag comes first in the trailer: ciphertext and tag are one piece, as stock ciphers want it.
    let (payload, mut sealed) = (page.len() - OVERHEAD, page[..page.len() - 32].to_vec());
    if key.suite == Suite::Aegis256X2 {
        let tag = sealed[payload..].try_into().unwrap();
        let cipher = aegis::aegis256x2::Aegis256X2::<16>::new(&subkey, &aegis_nonce(&nonce, &salt));
        return cipher.decrypt(&sealed[..payload], &tag, &aad).ok();
    }
    let cipher = aead::LessSafeKey::new(aead::UnboundKey::new(stock_algorithm(key.suite), &subkey).unwrap());
    let nonce = aead::Nonce::assume_unique_for_key(nonce);
    cipher.open_in_place(nonce, aead::Aad::from(aad), &mut sealed).ok().map(|payload| payload.to_vec())
}

/// Seals a page with stock crates alone.
fn stock_seal(key: &StrayKey, context: &PageContext, salt: [u8; 16], nonce: [u8; 12], payload: &[u8]) -> Vec<u8> {
    let (subkey, aad) = (stock_subkey(key, &salt), associated_data(context));
    let mut page = payload.to_vec();
    if key.suite == Suite::Aegis256X2 {
        let cipher = aegis::aegis256x2::Aegis256X2::<16>::new(&subkey, &aegis_nonce(&nonce, &salt));
        let (sealed, tag) = cipher.encrypt(payload, &aad);
        page = [sealed, tag.to_vec()].concat();
    } else {
        let cipher = aead::LessSafeKey::new(aead::UnboundKey::new(stock_algorithm(key.suite), &subkey).unwrap());
        let stock_nonce = aead::Nonce::assume_unique_for_key(nonce);
        cipher.seal_in_place_append_tag(stock_nonce, aead::Aad::from(aad), &mut page).unwrap();
    }
    page.extend(nonce);
    page.extend(salt);
    page.extend(&key.generation.get().to_le_bytes()[..3]);
    page.push(key.suite.to_byte());
    page
}

fn stock_algorithm(suite: Suite) -> &'static aead::Algorithm {
    if suite == Suite::ChaCha20Poly1305 { &aead::CHACHA20_POLY1305 } else { &aead::AES_256_GCM }
}

fn aegis_nonce(nonce: &[u8; 12], salt: &[u8; 16]) -> [u8; 32] {
    let mut out = [0; 32];
    out[..12].copy_from_slice(nonce);
    out[12..28].copy_from_slice(salt);
    out
}

#[test]
fn a_stock_cipher_opens_our_pages_and_we_open_its() {
    let contexts =
        [at(7), at(u64::MAX).with_version(3), PageContext::unbound(), PageContext::unbound().with_version(0)];
    for (suite, backend) in CIPHERS {
        let key = StrayKey { generation: generation(0x01_0203), ..stray_key(suite, 1) };
        let cipher = open_stray(&[key], backend).cipher;
        for (context, len) in contexts.iter().flat_map(|context| [0, 1, 100, PAYLOAD].map(|len| (context, len))) {
            let payload = Dice::new(3).bytes(len);
            for method in Method::ALL {
                let page = method.seal(&cipher, context, &payload).unwrap();
                assert_eq!(stock_open(&key, context, &page), Some(payload.clone()), "{suite:?} {context:?}");
                let foreign = stock_seal(&key, context, [0xc4; 16], *b"stock nonce!", &payload);
                assert_eq!(method.open(&cipher, context, &foreign), (Ok(()), payload.clone()), "{suite:?} {context:?}");
            }
        }
    }
}

#[test]
fn a_stock_cipher_opens_the_pages_of_a_real_cluster_and_the_cluster_its() {
    for (suite, backend) in CIPHERS {
        let (dir, master) = (TempDir::new(), GlassWrapper::default());
        let options = || ClusterOptions::new().suite(suite).aes_backend(backend);
        let cluster = Cluster::create(&dir.join("cluster"), options(), Wrappers::one(master.clone())).unwrap();
        let cipher = cluster.create_database("orders").unwrap().cipher().unwrap();
        let [key] = master.data_keys()[..] else { panic!("one database has one data key") };
        assert_eq!((key.suite, key.generation), (suite, Generation::FIRST));
        let page = Method::InPlace.seal(&cipher, &at(7), &[3; 100]).unwrap();
        assert_eq!(stock_open(&key, &at(7), &page), Some(vec![3; 100]));

        drop((cipher, cluster));
        let cluster = Cluster::open(&dir.join("cluster"), options(), Wrappers::one(master)).unwrap();
        let cipher = cluster.database("orders").unwrap().cipher().unwrap();
        assert_eq!(Method::InPlace.open(&cipher, &at(7), &page), (Ok(()), vec![3; 100]));
        let foreign = stock_seal(&key, &at(8), [0xc4; 16], *b"stock nonce!", &[4; 100]);
        assert_eq!(Method::InPlace.open(&cipher, &at(8), &foreign), (Ok(()), vec![4; 100]));
    }
}

#[test]
fn a_page_holds_exactly_the_bytes_of_the_format() {
    for (suite, backend) in CIPHERS {
        let key = StrayKey { generation: generation(0x01_0203), ..stray_key(suite, 1) };
        let database = StrayDatabase::open(&[key], backend, Some(Arc::new(KnownDice))).unwrap();
        for counter in 0..300u32 {
            let method = Method::ALL[counter as usize % 5];
            let page = method.seal(&database.cipher, &at(7), &[1; 100]).unwrap();
            let mut nonce = [9; 12];
            nonce[..4].copy_from_slice(&counter.to_le_bytes());
            assert_eq!(page, stock_seal(&key, &at(7), [5; 16], nonce, &[1; 100]), "seal {counter}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn what_any_method_sealed_every_method_opens(
        payload in prop_oneof![
            proptest::collection::vec(any::<u8>(), 0..200),
            proptest::collection::vec(any::<u8>(), 0..9000),
        ],
        (file, page, version) in (any::<u64>(), any::<u64>(), any::<Option<u64>>()),
        (bound, number, cipher) in (any::<bool>(), 1u32..1 << 24, 0..CIPHERS.len()),
        (seal, key) in (0..5usize, any::<u64>()),
    ) {
        let (suite, backend) = CIPHERS[cipher];
        let key = StrayKey { generation: generation(number), ..stray_key(suite, key) };
        let place = if bound { PageContext::page(FileId::new(file), page) } else { PageContext::unbound() };
        let context = version.map_or(place, |version| place.with_version(version));
        let sealed = Method::ALL[seal].seal(&open_stray(&[key], backend).cipher, &context, &payload).unwrap();
        prop_assert_eq!(sealed.len(), payload.len() + 48);
        for backend in [AesBackend::Ring, AesBackend::RustCrypto] {
            let cipher = open_stray(&[key], backend).cipher;
            for method in Method::ALL {
                prop_assert_eq!(method.open(&cipher, &context, &sealed), (Ok(()), payload.clone()));
            }
        }
        prop_assert_eq!(stock_open(&key, &context, &sealed), Some(payload));
    }

    #[test]
    fn no_bytes_at_all_open_by_chance_or_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300), suite in 1u8..=3) {
        let cipher = open_stray(&five_generations(), AesBackend::Ring).cipher;
        let mut named = bytes.clone();
        if let Some(trailer) = named.last_chunk_mut::<OVERHEAD>() {
            trailer[GENERATION_AT..].copy_from_slice(&[suite, 0, 0, suite]);
        }
        for page in [bytes, named] {
            for method in Method::ALL {
                let (outcome, left) = method.open(&cipher, &at(7), &page);
                prop_assert!(outcome.is_err() && is_zero(&left));
            }
        }
    }
}

/// A source that fails when told to; otherwise counts.
#[derive(Default)]
struct Moody {
    salts_fail: AtomicBool,
    bits_fail: AtomicBool,
    next: AtomicU64,
}

impl Entropy for Moody {
    fn fill(&self, out: &mut [u8]) -> Result<(), NoRandomness> {
        if self.salts_fail.load(Ordering::Relaxed) {
            // What a half-failed source left behind must not become a salt.
            out.fill(0xee);
            return Err(NoRandomness);
        }
        Dice::new(self.next.fetch_add(1, Ordering::Relaxed)).fill(out);
        Ok(())
    }
    fn fresh(&self) -> Result<[u8; 8], NoRandomness> {
        let bits = self.next.fetch_add(1, Ordering::Relaxed).to_le_bytes();
        if self.bits_fail.load(Ordering::Relaxed) { Err(NoRandomness) } else { Ok(bits) }
    }
}

#[test]
fn without_randomness_nothing_is_sealed_and_the_engines_copy_stays() {
    let moody = Arc::new(Moody::default());
    let database =
        StrayDatabase::open(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring, Some(moody.clone())).unwrap();
    let cipher = &database.cipher;
    for (salts_fail, bits_fail) in [(true, false), (false, true), (false, true), (true, true)] {
        moody.salts_fail.store(salts_fail, Ordering::Relaxed);
        moody.bits_fail.store(bits_fail, Ordering::Relaxed);
        for method in Method::ALL {
            assert_eq!(method.seal(cipher, &at(7), &[1; 100]), Err(PageError::Randomness), "{method:?}");
        }
        let (mut page, mut out) = ([1; 148], [0xa5; 148]);
        assert_eq!(cipher.seal_into(&at(7), &[1; 100], &mut out), Err(PageError::Randomness));
        assert_eq!(out, [0; 148]);
        assert_eq!(cipher.seal_in_place(&at(7), &mut page), Err(PageError::Randomness));
        assert_eq!(cipher.seal_detached(&at(7), &mut page), Err(PageError::Randomness));
        assert_eq!(page, [1; 148]);
        let (before, mut out) = (page, [0xa5; 148]);
        let mut jobs = [
            pageseal::PageJob::in_place(at(7), &mut page),
            pageseal::PageJob::between(at(7), &before[..100], &mut out),
        ];
        assert_eq!(cipher.seal_batch(&pageseal::Inline, &mut jobs), 2);
        assert!(jobs.iter().all(|job| job.result() == Err(PageError::Randomness)));
        assert_eq!((page, out), (before, [0; 148]));
        if salts_fail {
            // No session was opened by the failure: the next call draws a salt again.
            database.resumed();
        }
    }
    moody.salts_fail.store(false, Ordering::Relaxed);
    moody.bits_fail.store(false, Ordering::Relaxed);
    let page = Method::Into.seal(cipher, &at(7), &[1; 100]).unwrap();
    assert_eq!(Method::Into.open(cipher, &at(7), &page), (Ok(()), vec![1; 100]));
    assert_ne!(salt_and_nonce(&page).0, [0xee; 16]);
}

#[test]
fn a_seal_id_is_bound_byte_by_byte() {
    let good = stray_key(Suite::Aes256Gcm, 1);
    let page = Method::Into.seal(&open_stray(&[good], AesBackend::Ring).cipher, &at(7), &[1; 100]).unwrap();
    for byte in 0..16 {
        let mut seal = good.seal.to_bytes();
        seal[byte] ^= 0x80;
        let other = open_stray(&[StrayKey { seal: SealId::from_bytes(seal), ..good }], AesBackend::Ring).cipher;
        assert_eq!(Method::Into.open(&other, &at(7), &page).0, Err(PageError::Authentication), "byte {byte}");
    }
}
