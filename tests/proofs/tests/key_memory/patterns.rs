//! What key bytes look like in memory: the keys, and everything that stands for one. Whoever finds an AES round key, the
//! hash key of GCM or the inner state of a keyed hash has the key, or all that it was good for.
//!
//! The unit is the word of eight bytes, half of the block that a cipher works on, so that a copy through a general register
//! counts as much as one of a vector. Each word is also looked for with its bytes in other orders.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use pageseal::{AesBackend, Suite};
use ring::{aead, hkdf, hmac};

/// One bit for each hash: a word whose bit is not set is no key.
const FILTER_BITS: u32 = 23;
/// GCM implementations keep powers of the hash key; none here keeps more than these.
const HASH_KEY_POWERS: usize = 16;

/// Words to look for, each with the name of the secret that it belongs to.
pub struct Patterns {
    names: Vec<String>,
    words: HashMap<u64, u32>,
    filter: Vec<u64>,
}

impl Default for Patterns {
    fn default() -> Self {
        Self { names: Vec::new(), words: HashMap::new(), filter: vec![0; 1 << (FILTER_BITS - 6)] }
    }
}

impl Patterns {
    /// How many words are looked for.
    pub fn len(&self) -> usize {
        self.words.len()
    }

    /// The name under which the pattern was added.
    pub fn name(&self, pattern: u32) -> &str {
        &self.names[pattern as usize]
    }

    /// The bytes as they are, for instance of a key. Returns the patterns that they are found as.
    pub fn add_bytes(&mut self, name: &str, bytes: &[u8]) -> Vec<u32> {
        let words = bytes.chunks_exact(8).enumerate();
        words
            .filter_map(|(at, word)| self.add_word(&format!("{name} bytes {}..{}", at * 8, at * 8 + 8), word))
            .collect()
    }

    /// A key, and what HMAC and HKDF make of it: the key under the two pads, and the two hash states after them.
    pub fn add_hmac_key(&mut self, name: &str, key: &[u8; 32]) -> Vec<u32> {
        let raw = self.add_bytes(name, key);
        self.add_bytes(&format!("{name} inner pad"), &key.map(|byte| byte ^ 0x36));
        self.add_bytes(&format!("{name} outer pad"), &key.map(|byte| byte ^ 0x5c));
        let prk = image(key, |key| hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, key));
        self.add_words(&format!("{name} in hkdf::Prk"), &prk);
        let mac = image(key, |key| hmac::Key::new(hmac::HMAC_SHA256, key));
        self.add_words(&format!("{name} in hmac::Key"), &mac);
        raw
    }

    /// A key that is kept as HMAC's hash states only. Returns the patterns of those.
    pub fn add_mac_key(&mut self, name: &str, key: &[u8; 32]) -> Vec<u32> {
        self.add_hmac_key(name, key);
        let mac = image(key, |key| hmac::Key::new(hmac::HMAC_SHA256, key));
        self.add_words(name, &mac)
    }

    /// A key of the suite's cipher, and what the implementation makes of it.
    pub fn add_cipher_key(&mut self, name: &str, key: &[u8; 32], suite: Suite, backend: AesBackend) -> Vec<u32> {
        let raw = self.add_bytes(name, key);
        match suite {
            Suite::Aes256Gcm => {
                self.add_aes_key(name, key);
                if backend == AesBackend::Ring {
                    let words = image(key, |key| less_safe_key(&aead::AES_256_GCM, key));
                    self.add_words(&format!("{name} in LessSafeKey"), &words);
                }
            }
            Suite::ChaCha20Poly1305 => {
                let words = image(key, |key| less_safe_key(&aead::CHACHA20_POLY1305, key));
                self.add_words(&format!("{name} in LessSafeKey"), &words);
            }
            Suite::Aegis256X2 => {
                self.add_bytes(&format!("{name} under the constants"), &aegis::under_constants(key));
            }
            other => panic!("no patterns for suite {other:?}"),
        }
        raw
    }

    /// What AEGIS makes of a key and one nonce before it scrambles them.
    pub fn add_aegis_nonce(&mut self, name: &str, key: &[u8; 32], nonce: &[u8; 32]) {
        let mixed: Vec<u8> = key.iter().zip(nonce).map(|(key, nonce)| key ^ nonce).collect();
        // The last four bytes of our nonces are zeros, so the last word is half the key itself; that one is there already.
        self.add_bytes(&format!("{name} under a nonce"), &mixed);
    }

    fn add_aes_key(&mut self, name: &str, key: &[u8; 32]) {
        let round_keys = aes::round_keys(key);
        for (round, block) in round_keys.iter().enumerate() {
            self.add_bytes(&format!("{name} round key {round}"), block);
            self.add_bytes(&format!("{name} inverse round key {round}"), &aes::inverse_mix_columns(block));
        }
        for (power, block) in (1..).zip(aes::powers_of_hash_key(&round_keys, HASH_KEY_POWERS)) {
            let mut reversed = block;
            reversed.reverse();
            self.add_bytes(&format!("{name} hash key to the power {power}"), &block);
            self.add_bytes(&format!("{name} reflected hash key to the power {power}"), &aes::mul_x_polyval(reversed));
        }
    }

    fn add_words(&mut self, name: &str, words: &[[u8; 8]]) -> Vec<u32> {
        words.iter().filter_map(|word| self.add_word(name, word)).collect()
    }

    /// `None` for a word that could be anything. A word that is there already keeps its name.
    fn add_word(&mut self, name: &str, word: &[u8]) -> Option<u32> {
        let word: [u8; 8] = word.try_into().unwrap();
        if !looks_random(&word) {
            return None;
        }
        let [a, b, c, d, e, f, g, h] = word;
        let orders =
            [[a, b, c, d, e, f, g, h], [h, g, f, e, d, c, b, a], [d, c, b, a, h, g, f, e], [e, f, g, h, a, b, c, d]];
        if let Some(pattern) = self.words.get(&u64::from_le_bytes(word)) {
            return Some(*pattern);
        }
        let pattern = u32::try_from(self.names.len()).expect("far fewer patterns than that");
        self.names.push(name.to_owned());
        for order in orders {
            let word = u64::from_le_bytes(order);
            let hash = hash(word);
            self.filter[hash >> 6] |= 1 << (hash & 63);
            self.words.entry(word).or_insert(pattern);
        }
        Some(pattern)
    }

    /// Looks at every eight bytes of `bytes`, and calls `found` with offset and pattern of each that is a word of a key.
    /// Returns how many places were looked at.
    pub fn search(&self, bytes: &[u8], mut found: impl FnMut(usize, u32)) -> u64 {
        let mut places = 0;
        for (at, window) in bytes.windows(8).enumerate() {
            places += 1;
            let word = u64::from_le_bytes(window.try_into().unwrap());
            let hash = hash(word);
            if self.filter[hash >> 6] & 1 << (hash & 63) != 0
                && let Some(pattern) = self.words.get(&word)
            {
                found(at, *pattern);
            }
        }
        places
    }
}

fn hash(word: u64) -> usize {
    (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (64 - FILTER_BITS)) as usize
}

/// False for words like zeros or small numbers, which are all over the memory. A random word fails once in 2^20.
fn looks_random(word: &[u8; 8]) -> bool {
    let distinct = (0..8).filter(|at| !word[..*at].contains(&word[*at])).count();
    distinct >= 5
}

fn less_safe_key(algorithm: &'static aead::Algorithm, key: &[u8; 32]) -> aead::LessSafeKey {
    aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, key).unwrap())
}

/// The words of a value that depend on the key: the same each time it is made from this key, and not those of another key.
pub fn image<T>(key: &[u8; 32], make: impl Fn(&[u8; 32]) -> T) -> Vec<[u8; 8]> {
    let bytes_of = |key: &[u8; 32]| {
        let value = Box::new(make(key));
        let mut bytes = vec![0; size_of::<T>()];
        // By the kernel, because a value has bytes between its fields that this program may not read itself.
        let memory = File::open("/proc/self/mem").unwrap();
        memory.read_exact_at(&mut bytes, (&raw const *value).addr() as u64).unwrap();
        bytes
    };
    let other = bytes_of(&key.map(|byte| byte ^ 0xa5));
    let (one, two) = (bytes_of(key), bytes_of(key));
    let words = one.chunks_exact(8).zip(two.chunks_exact(8)).zip(other.chunks_exact(8));
    let depends = words.filter(|((one, two), other)| one == two && one != other);
    depends.map(|((one, _), _)| one.try_into().unwrap()).collect()
}

/// AES-256 and the field of GCM, written out to have the intermediate values that no crate gives away. FIPS 197 and
/// SP 800-38D.
pub mod aes {
    use std::sync::LazyLock;

    pub type Block = [u8; 16];

    pub fn round_keys(key: &[u8; 32]) -> [Block; 15] {
        let mut words = [[0u8; 4]; 60];
        for (word, bytes) in words.iter_mut().zip(key.chunks_exact(4)) {
            word.copy_from_slice(bytes);
        }
        let mut constant = 1;
        for at in 8..60 {
            let mut word = words[at - 1];
            if at % 8 == 0 {
                word.rotate_left(1);
                word = word.map(substitute);
                word[0] ^= constant;
                constant = double(constant);
            } else if at % 8 == 4 {
                word = word.map(substitute);
            }
            for byte in 0..4 {
                words[at][byte] = words[at - 8][byte] ^ word[byte];
            }
        }
        std::array::from_fn(|round| std::array::from_fn(|byte| words[round * 4 + byte / 4][byte % 4]))
    }

    pub fn encrypt(round_keys: &[Block; 15], block: Block) -> Block {
        let mut state = xor(block, round_keys[0]);
        for round_key in &round_keys[1..14] {
            state = xor(mix_columns(shifted(state.map(substitute)), [2, 3, 1, 1]), *round_key);
        }
        xor(shifted(state.map(substitute)), round_keys[14])
    }

    /// What AES-NI's decryption uses instead of a round key.
    pub fn inverse_mix_columns(block: &Block) -> Block {
        mix_columns(*block, [14, 11, 13, 9])
    }

    /// H = AES(0), H², H³ and so on.
    pub fn powers_of_hash_key(round_keys: &[Block; 15], count: usize) -> Vec<Block> {
        let h = u128::from_be_bytes(encrypt(round_keys, [0; 16]));
        std::iter::successors(Some(h), |power| Some(gcm_product(*power, h)))
            .take(count)
            .map(u128::to_be_bytes)
            .collect()
    }

    /// RFC 8452, appendix A: how implementations of GCM keep the hash key, its bytes reversed before.
    pub fn mul_x_polyval(block: Block) -> Block {
        let value = u128::from_le_bytes(block);
        let carry = if value >> 127 == 1 { 1 | 1 << 127 | 1 << 126 | 1 << 121 } else { 0 };
        (value << 1 ^ carry).to_le_bytes()
    }

    fn gcm_product(x: u128, y: u128) -> u128 {
        let (mut product, mut shifted) = (0, y);
        for bit in (0..128).rev() {
            if x >> bit & 1 == 1 {
                product ^= shifted;
            }
            shifted = shifted >> 1 ^ if shifted & 1 == 1 { 0xe1 << 120 } else { 0 };
        }
        product
    }

    fn xor(a: Block, b: Block) -> Block {
        std::array::from_fn(|at| a[at] ^ b[at])
    }

    fn shifted(state: Block) -> Block {
        std::array::from_fn(|at| state[(at + 4 * (at % 4)) % 16])
    }

    fn mix_columns(state: Block, row: [u8; 4]) -> Block {
        std::array::from_fn(|at| {
            let column = &state[at / 4 * 4..][..4];
            (0..4).fold(0, |sum, byte| sum ^ product(column[byte], row[(byte + 4 - at % 4) % 4]))
        })
    }

    fn substitute(byte: u8) -> u8 {
        static TABLE: LazyLock<[u8; 256]> = LazyLock::new(|| std::array::from_fn(|byte| substitution(byte as u8)));
        TABLE[usize::from(byte)]
    }

    fn substitution(byte: u8) -> u8 {
        // The inverse is the 254th power.
        let inverse = (1..254).fold(byte, |power, _| product(power, byte));
        (0..5).fold(0x63, |sum, turn| sum ^ inverse.rotate_left(turn))
    }

    fn product(a: u8, b: u8) -> u8 {
        let (mut sum, mut a) = (0, a);
        for bit in 0..8 {
            if b >> bit & 1 == 1 {
                sum ^= a;
            }
            a = double(a);
        }
        sum
    }

    fn double(byte: u8) -> u8 {
        byte << 1 ^ if byte & 0x80 != 0 { 0x1b } else { 0 }
    }
}

mod aegis {
    const C0: [u8; 16] =
        [0x00, 0x01, 0x01, 0x02, 0x03, 0x05, 0x08, 0x0d, 0x15, 0x22, 0x37, 0x59, 0x90, 0xe9, 0x79, 0x62];
    const C1: [u8; 16] =
        [0xdb, 0x3d, 0x18, 0x55, 0x6d, 0xc2, 0x2f, 0xf1, 0x20, 0x11, 0x31, 0x42, 0x73, 0xb5, 0x28, 0xdd];

    /// `k0 ^ C0 | k1 ^ C1`, two of the six blocks of the first state.
    pub fn under_constants(key: &[u8; 32]) -> [u8; 32] {
        std::array::from_fn(|at| key[at] ^ if at < 16 { C0[at] } else { C1[at - 16] })
    }
}
