//! What an attacker or a broken disk does to a file.

/// Blocks are moved in units of this.
const SECTOR: usize = 512;
/// A file does not grow longer than this.
const LONGEST: usize = 1 << 16;

/// Changes `file` as `input` says, four bytes a change: `kind | at u16 | value`. At most 64 changes.
pub fn change(file: &mut Vec<u8>, input: &[u8]) {
    for &[kind, low, high, value] in input.as_chunks().0.iter().take(64) {
        let at = usize::from(u16::from_le_bytes([low, high]));
        one_change(file, kind, at, value);
    }
}

fn one_change(file: &mut Vec<u8>, kind: u8, at: usize, value: u8) {
    let sectors = file.len() / SECTOR;
    let grows = file.len() + SECTOR <= LONGEST;
    match kind % 8 {
        0 => byte(file, at, |byte| *byte = value),
        1 => byte(file, at, |byte| *byte ^= 1 << (value % 8)),
        2 => byte(file, at, |byte| *byte = byte.wrapping_add(value)),
        3 => file.truncate(at),
        4 if grows => file.resize(file.len() + SECTOR, value),
        _ if sectors == 0 => {}
        kind => {
            let (from, to) = (SECTOR * (at % sectors), SECTOR * (usize::from(value) % sectors));
            match kind {
                5 => file.copy_within(from..from + SECTOR, to),
                6 => drop(file.drain(from..from + SECTOR)),
                7 if grows => {
                    let copied = file[from..from + SECTOR].to_vec();
                    file.splice(to..to, copied);
                }
                _ => {}
            }
        }
    }
}

fn byte(file: &mut [u8], at: usize, f: impl FnOnce(&mut u8)) {
    if let Some(len) = std::num::NonZero::new(file.len()) {
        f(&mut file[at % len]);
    }
}
