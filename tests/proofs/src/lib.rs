//! What the proofs share: how they report what they measured.
//!
//! A line goes to standard output and, because `cargo test` hides the output of tests that pass, to the file that the
//! variable `PAGESEAL_FIGURES` names. `tests/run` sets it and prints the collected lines at the end.

use std::env;
use std::fs::OpenOptions;
use std::io::Write;

/// Reports a proof's counters: `score("vectors checked=816 mismatches=0 control=1")`. Count where the check happens, and set
/// `control=1` only if a deliberately broken variant was seen to fail in the same run.
pub fn score(figures: &str) {
    report("SCORE", figures);
}

/// Reports a measured speed: `limit("op=seal suite=aes256gcm size=4096 ratio=0.951")`. Never fails a test.
pub fn limit(figures: &str) {
    report("LIMIT", figures);
}

/// Reports that the proof `name` could not run here.
///
/// # Panics
/// Where `CI` is `true`: there, everything must run.
pub fn skipped(name: &str, why: &str) {
    report("SKIPPED", &format!("{name}: {why}"));
    assert!(env::var("CI").as_deref() != Ok("true"), "{name} was skipped where CI=true: {why}");
}

fn report(kind: &str, text: &str) {
    let line = format!("{kind} {text}\n");
    print!("{line}");
    let Some(path) = env::var_os("PAGESEAL_FIGURES") else { return };
    // One write to a file open for appending: lines of tests that run side by side do not mix.
    let written =
        OpenOptions::new().create(true).append(true).open(&path).and_then(|mut file| file.write_all(line.as_bytes()));
    if let Err(error) = written {
        panic!("PAGESEAL_FIGURES names {}, which cannot be written: {error}", path.display());
    }
}
