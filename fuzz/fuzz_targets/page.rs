//! A page of any bytes: its trailer reads without a panic, it opens only if it is what was sealed. By the raw cipher path over
//! keys and nonces of the input's choice, and by `PageCipher`, where a refusal leaves zeros.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use pageseal::testing::{open_raw, seal_raw, stray_cipher};
use pageseal::{AesBackend, FileId, OVERHEAD, PageCipher, PageContext, PageError, Suite, Trailer};

/// Set by `tests/run` to see this target fail: then whatever is opened counts as authentic.
static BROKEN: LazyLock<bool> = LazyLock::new(|| std::env::var_os("PAGESEAL_FUZZ_BROKEN").is_some());

static CIPHERS: LazyLock<[PageCipher; 2]> = LazyLock::new(|| {
    [Suite::Aes256Gcm, Suite::ChaCha20Poly1305].map(|suite| stray_cipher(suite, AesBackend::Ring).unwrap())
});

const KEY: [u8; 32] = [0x5a; 32];
const CONTEXT: PageContext = PageContext::page(FileId::new(1), 42);
/// Nothing is sealed here. (At `CONTEXT` the input itself may be a sealed page: libFuzzer learns it from a comparison.)
const ELSEWHERE: PageContext = PageContext::page(FileId::new(1), 43);

fuzz_target!(|page: &[u8]| {
    let Some((payload, trailer)) = page.split_last_chunk::<OVERHEAD>() else { return };
    trailer_reads_as_its_bytes_say(trailer);
    let fields = Fields::of(trailer);
    let suite = if fields.choice & 1 == 0 { Suite::Aes256Gcm } else { Suite::ChaCha20Poly1305 };

    let mut forged = payload.to_vec();
    assert!(!open(suite, &fields, &mut forged, &fields.tag), "bytes that nobody sealed were opened");

    let mut sealed = payload.to_vec();
    let tag = seal_raw(suite, AesBackend::Ring, &KEY, fields.nonce, &fields.salt, &fields.aad, &mut sealed).unwrap();
    let mut opened = sealed.clone();
    assert!(open(suite, &fields, &mut opened, &tag), "a sealed page was refused");
    assert_eq!(opened, payload);
    one_flipped_bit_is_refused(suite, &fields, sealed, tag);

    let cipher = &CIPHERS[fields.choice & 1];
    nothing_is_opened_that_was_not_sealed(cipher, page);
    a_changed_page_is_refused(cipher, payload, trailer, fields.choice >> 1);
});

/// What the trailer's bytes stand for here; the generation and suite choose the suite and the bit to flip.
struct Fields {
    tag: [u8; 16],
    nonce: [u8; 12],
    salt: [u8; 16],
    aad: [u8; 32],
    choice: usize,
}

impl Fields {
    fn of(trailer: &[u8; OVERHEAD]) -> Self {
        let part = |at: usize, len: usize| &trailer[at..at + len];
        let mut aad = [0; 32];
        aad.copy_from_slice(part(16, 32));
        Self {
            tag: part(0, 16).try_into().unwrap(),
            nonce: part(16, 12).try_into().unwrap(),
            salt: part(28, 16).try_into().unwrap(),
            aad,
            choice: u32::from_le_bytes(part(44, 4).try_into().unwrap()) as usize,
        }
    }
}

fn open(suite: Suite, fields: &Fields, data: &mut [u8], tag: &[u8; 16]) -> bool {
    open_raw(suite, AesBackend::Ring, &KEY, fields.nonce, &fields.salt, &fields.aad, data, tag).unwrap() || *BROKEN
}

fn one_flipped_bit_is_refused(suite: Suite, fields: &Fields, mut sealed: Vec<u8>, mut tag: [u8; 16]) {
    let Fields { mut nonce, mut aad, choice, .. } = *fields;
    let bit = (choice >> 1) % (8 * (sealed.len() + tag.len() + nonce.len() + aad.len()));
    let byte = tag.iter_mut().chain(&mut nonce).chain(&mut aad).chain(&mut sealed).nth(bit / 8).unwrap();
    *byte ^= 1 << (bit % 8);
    let changed = Fields { nonce, aad, ..*fields };
    assert!(!open(suite, &changed, &mut sealed, &tag), "a page with bit {bit} flipped was opened");
}

fn nothing_is_opened_that_was_not_sealed(cipher: &PageCipher, page: &[u8]) {
    let mut left = page.to_vec();
    is_refused(cipher.open_in_place(&ELSEWHERE, &mut left), &left);
}

/// Changes a sealed page by the input's trailer: its bytes where `fields` has their bit; and one bit of the ciphertext.
fn a_changed_page_is_refused(cipher: &PageCipher, payload: &[u8], mask: &[u8; OVERHEAD], fields: usize) {
    let mut page = vec![0; payload.len() + OVERHEAD];
    cipher.seal_into(&CONTEXT, payload, &mut page).unwrap();
    let sealed = page.clone();
    for (field, range) in [0..16, 16..28, 28..44, 44..47, 47..48].into_iter().enumerate() {
        if fields >> field & 1 == 1 {
            let mask = &mask[range.clone()];
            page[payload.len()..][range].iter_mut().zip(mask).for_each(|(byte, mask)| *byte ^= mask);
        }
    }
    if fields >> 5 & 1 == 1 && !payload.is_empty() {
        let bit = (fields >> 6) % (8 * payload.len());
        page[bit / 8] ^= 1 << (bit % 8);
    }
    let mut left = vec![0xee; payload.len()];
    let outcome = cipher.open_into(&CONTEXT, &page, &mut left);
    if page == sealed {
        assert!(outcome.is_ok() && left == payload, "a sealed page was refused");
    } else {
        is_refused(outcome, &left);
        left.copy_from_slice(&page[..payload.len()]);
        let trailer = Trailer(*page.last_chunk().unwrap());
        is_refused(cipher.open_detached(&CONTEXT, &mut left, &trailer), &left);
    }
}

fn is_refused(outcome: Result<(), PageError>, left: &[u8]) {
    assert!(matches!(outcome, Err(PageError::Authentication | PageError::UnknownGeneration(_))), "{outcome:?}");
    assert!(left.iter().all(|&byte| byte == 0), "a refused page left something");
}

fn trailer_reads_as_its_bytes_say(bytes: &[u8; OVERHEAD]) {
    let trailer = Trailer(*bytes);
    let [a, b, c, suite] = [bytes[44], bytes[45], bytes[46], bytes[47]];
    let generation = u32::from_le_bytes([a, b, c, 0]);
    assert_eq!(trailer.generation().map_or(0, |generation| generation.get()), generation);
    assert_eq!(trailer.suite().map(Suite::to_byte), (1..=3).contains(&suite).then_some(suite));
    let _ = format!("{trailer:?}");
}
