//! Looks for patterns in another process: in all its memory, and in a core dump of it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::patterns::Patterns;

const CHUNK: usize = 1 << 20;

/// What a search saw and found.
#[derive(Default)]
pub struct Findings {
    /// Offsets at which eight bytes were compared with all patterns.
    pub places: u64,
    /// Each match.
    pub hits: Vec<Hit>,
}

/// A pattern, and where it is.
#[derive(Clone)]
pub struct Hit {
    pub pattern: u32,
    pub address: u64,
    /// Mapping, or part of a core dump, in words.
    pub place: String,
    /// The mapping is locked, left out of core dumps, and wiped in a forked child.
    pub guarded: bool,
}

impl Findings {
    /// How many copies there are of a secret whose words are `patterns`. Words of one copy lie in one slot of at most a KiB.
    pub fn copies(&self, patterns: &[u32]) -> usize {
        let of_word = |pattern: &u32| {
            let mut addresses: Vec<_> =
                self.hits.iter().filter(|hit| hit.pattern == *pattern).map(|hit| hit.address).collect();
            addresses.sort_unstable();
            addresses.dedup_by(|next, previous| next.abs_diff(*previous) < 640);
            addresses.len()
        };
        patterns.iter().map(of_word).max().unwrap_or(0)
    }
}

/// The first of `hits` in words, for the report of a failure.
pub fn describe<'h>(hits: impl Iterator<Item = &'h Hit>, patterns: &Patterns) -> String {
    let mut lines: Vec<_> =
        hits.map(|hit| format!("  {:#x} in {}: {}", hit.address, hit.place, patterns.name(hit.pattern))).collect();
    let more = lines.len().saturating_sub(60);
    lines.truncate(60);
    lines.push(format!("  and {more} more"));
    lines.join("\n")
}

/// Searches all readable memory of a process that waits.
pub fn search_memory(process: u32, patterns: &Patterns) -> Findings {
    let memory = File::open(format!("/proc/{process}/mem")).expect("a parent may read its child's memory");
    let stacks = stacks(process);
    let mut findings = Findings::default();
    for mapping in mappings(process) {
        let place = match stacks.iter().find(|(pointer, _)| mapping.holds(*pointer)) {
            Some((pointer, thread)) => format!("{} (stack of {thread}, now at {pointer:#x})", mapping.name),
            None => mapping.name.clone(),
        };
        // Mappings of the kernel's own cannot all be read.
        let _ = search_range(&memory, mapping.start, mapping.end, patterns, &mut findings, &place, mapping.guarded);
    }
    assert!(findings.places > 1 << 20, "next to nothing of process {process} could be read");
    findings
}

/// Searches a part of a process's memory, for instance the signal stack of a thread that runs.
pub fn search_part(process: u32, start: u64, len: u64, patterns: &Patterns) -> Findings {
    let memory = File::open(format!("/proc/{process}/mem")).expect("a parent may read its child's memory");
    let mut findings = Findings::default();
    search_range(&memory, start, start + len, patterns, &mut findings, "part", false).expect("the part is mapped");
    findings
}

/// Searches a core dump of a process, registers included; `None` without `gcore`.
pub fn search_core(process: u32, folder: &Path, patterns: &Patterns) -> Option<Findings> {
    let prefix = folder.join("core");
    let mut gcore = Command::new("gcore");
    gcore
        .arg("-o")
        .arg(&prefix)
        .arg(process.to_string())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .stdin(Stdio::null());
    match gcore.status() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        outcome => assert!(outcome.expect("gcore runs").success(), "gcore failed"),
    }
    let path = folder.join(format!("core.{process}"));
    let core = fs::read(&path).expect("gcore wrote a core dump");
    fs::remove_file(&path).expect("a core dump can be removed");
    let segments = segments(&core);
    assert!(segments.iter().any(|segment| segment.notes), "the core dump has no registers");
    let mut findings = Findings::default();
    findings.places = patterns.search(&core, |at, pattern| {
        let segment = segments.iter().find(|segment| segment.file.contains(&(at as u64)));
        let (address, place) = match segment {
            Some(segment) if segment.notes => (at as u64, "core dump: notes (registers)".to_owned()),
            Some(segment) => (segment.address + at as u64 - segment.file.start, "core dump: memory".to_owned()),
            None => (at as u64, "core dump: outside all segments".to_owned()),
        };
        findings.hits.push(Hit { pattern, address, place, guarded: false });
    });
    Some(findings)
}

/// How much memory a process has locked, in bytes.
pub fn locked(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("the process lives");
    let line = status.lines().find(|line| line.starts_with("VmLck:")).expect("the kernel counts locked memory");
    let kibibytes: u64 = line.split_whitespace().nth(1).and_then(|number| number.parse().ok()).expect("it is a number");
    kibibytes * 1024
}

/// The threads of a process.
pub fn threads(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the process lives");
    tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

/// The thread of a process that has used the processor most.
pub fn busiest_thread(process: u32) -> u32 {
    let time = |thread: u32| {
        let stat = fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).unwrap_or_default();
        let rest = stat.rsplit(')').next().unwrap_or_default().to_owned();
        rest.split_whitespace().nth(11).and_then(|ticks| ticks.parse().ok()).unwrap_or(0u64)
    };
    threads(process).into_iter().max_by_key(|thread| time(*thread)).expect("a process has a thread")
}

/// Whether every thread of a process sleeps.
pub fn idle(process: u32) -> bool {
    threads(process).iter().all(|thread| {
        let stat = fs::read_to_string(format!("/proc/{process}/task/{thread}/stat")).unwrap_or_default();
        stat.rsplit(')').next().is_some_and(|rest| rest.trim_start().starts_with('S'))
    })
}

struct Mapping {
    start: u64,
    end: u64,
    name: String,
    guarded: bool,
}

impl Mapping {
    fn holds(&self, address: u64) -> bool {
        (self.start..self.end).contains(&address)
    }
}

fn mappings(process: u32) -> Vec<Mapping> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps")).expect("a parent may read its child's mappings");
    let mut mappings = Vec::new();
    let mut readable = false;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            let permissions = words.next().expect("permissions follow the range");
            readable = permissions.starts_with('r');
            let path = words.nth(3).unwrap_or("anonymous").rsplit('/').next().unwrap_or_default();
            let name = format!("{path} {permissions} {start:x}-{end:x}");
            if readable {
                mappings.push(Mapping { start, end, name, guarded: false });
            }
        } else if first == "VmFlags:" && readable {
            let flags: Vec<_> = words.collect();
            let last = mappings.last_mut().expect("flags follow a mapping");
            last.guarded = ["lo", "dd", "wf"].iter().all(|flag| flags.contains(flag));
        }
    }
    mappings
}

/// Stack pointer and name of each thread.
fn stacks(process: u32) -> Vec<(u64, String)> {
    let pointer_of = |thread: u32| {
        let folder = format!("/proc/{process}/task/{thread}");
        let call = fs::read_to_string(format!("{folder}/syscall")).ok()?;
        let pointer = call.split_whitespace().rev().nth(1)?.trim_start_matches("0x").to_owned();
        let name = fs::read_to_string(format!("{folder}/comm")).unwrap_or_default();
        Some((u64::from_str_radix(&pointer, 16).ok()?, format!("thread {}", name.trim_end())))
    };
    threads(process).into_iter().filter_map(pointer_of).collect()
}

fn search_range(
    memory: &File,
    start: u64,
    end: u64,
    patterns: &Patterns,
    findings: &mut Findings,
    place: &str,
    guarded: bool,
) -> std::io::Result<()> {
    let mut buffer = vec![0; CHUNK + 7];
    let mut at = start;
    while at < end {
        // Seven bytes of the next chunk, so that no word is missed at the border.
        let len = usize::try_from(end - at).unwrap().min(CHUNK + 7);
        memory.read_exact_at(&mut buffer[..len], at)?;
        let hits = &mut findings.hits;
        findings.places += patterns.search(&buffer[..len], |offset, pattern| {
            let address = at + offset as u64;
            hits.push(Hit { pattern, address, place: place.to_owned(), guarded });
        });
        at += CHUNK as u64;
    }
    Ok(())
}

struct Segment {
    notes: bool,
    address: u64,
    file: std::ops::Range<u64>,
}

/// The program headers of a 64-bit ELF file.
fn segments(core: &[u8]) -> Vec<Segment> {
    let number =
        |at: usize, len: usize| core[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    assert_eq!(&core[..5], b"\x7fELF\x02", "a core dump is a 64-bit ELF file");
    let (table, size, count) = (number(32, 8), number(54, 2), number(56, 2));
    let headers = (0..count).map(|index| usize::try_from(table + index * size).unwrap());
    headers
        .map(|at| Segment {
            notes: number(at, 4) == 4,
            address: number(at + 16, 8),
            file: number(at + 8, 8)..number(at + 8, 8) + number(at + 32, 8),
        })
        .collect()
}
