//! Pages of many sessions are read within bounded memory.

mod common;

use std::collections::HashSet;
use std::process::Command;
use std::{env, fs};

use common::{CIPHERS, Dice, Method, open_stray, salt_and_nonce, stray_key};
use pageseal::{AesBackend, FileId, PageContext, PageError, Suite};

const SESSIONS: usize = 10_000;
/// 1,024 subkeys of 640 bytes, a data key, and chunks that are not full; 10,000 subkeys would be 6,250 KiB.
const MOST_LOCKED_KIB: u64 = 800;

fn at(page: usize) -> PageContext {
    PageContext::page(FileId::new(1), page as u64)
}

/// Runs the test in a process that did nothing else: what other tests once locked stays locked, for reuse.
fn in_a_process_of_its_own(test: &str, body: impl FnOnce()) {
    const MARK: &str = "PAGESEAL_IN_A_PROCESS_OF_ITS_OWN";
    if env::var_os(MARK).is_some() {
        return body();
    }
    let this = env::current_exe().unwrap();
    let output = Command::new(this).args(["--exact", test, "--nocapture"]).env(MARK, "1").output().unwrap();
    print!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// `VmLck` or another figure of this process, in KiB.
fn kibibytes(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn pages_of_ten_thousand_sessions_open_within_bounded_memory() {
    in_a_process_of_its_own("pages_of_ten_thousand_sessions_open_within_bounded_memory", ten_thousand_sessions);
}

fn ten_thousand_sessions() {
    let mut dice = Dice::printed("ten thousand sessions");
    for (suite, backend) in CIPHERS {
        let database = open_stray(&[stray_key(suite, 1)], backend);
        let mut pages = Vec::with_capacity(SESSIONS);
        for number in 0..SESSIONS {
            database.resumed();
            pages.push(Method::InPlace.seal(&database.cipher, &at(number), &number.to_le_bytes()).unwrap());
        }
        let salts: HashSet<_> = pages.iter().map(|page| salt_and_nonce(page).0).collect();
        assert_eq!(salts.len(), SESSIONS);

        // The sealer's handle, and one that has seen none of these sessions.
        let reader = open_stray(&[stray_key(suite, 1)], backend);
        let mut order: Vec<_> = (0..SESSIONS).chain(0..SESSIONS).collect();
        dice.shuffle(&mut order);
        let mut most = 0;
        for cipher in [&database.cipher, &reader.cipher] {
            std::thread::scope(|scope| {
                for part in order.chunks(order.len() / 4) {
                    let pages = &pages;
                    scope.spawn(move || {
                        for number in part {
                            let opened = Method::Into.open(cipher, &at(*number), &pages[*number]);
                            assert_eq!(opened, (Ok(()), number.to_le_bytes().to_vec()));
                        }
                    });
                }
            });
            most = most.max(kibibytes("VmLck"));
        }
        assert!(most <= 2 * MOST_LOCKED_KIB, "{most} KiB are locked by two handles");
        assert!(most >= 600, "only {most} KiB: are the subkeys in locked memory at all?");
    }
}

#[test]
fn the_running_session_goes_on_while_others_push_its_subkey_out() {
    let mut dice = Dice::printed("running session");
    let database = open_stray(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring);
    let foreign: Vec<_> = (0..3_000)
        .map(|number| {
            database.resumed();
            Method::Into.seal(&database.cipher, &at(number), &[1; 64]).unwrap()
        })
        .collect();
    database.resumed();
    let mut own = Vec::new();
    for round in 0..3_000 {
        own.push(Method::Into.seal(&database.cipher, &at(round), &[2; 64]).unwrap());
        let other = dice.below(foreign.len());
        assert_eq!(Method::Into.open(&database.cipher, &at(other), &foreign[other]).0, Ok(()));
        if round % 97 == 0 {
            let page = dice.below(own.len());
            assert_eq!(Method::Into.open(&database.cipher, &at(page), &own[page]).0, Ok(()));
        }
    }
    let salts: HashSet<_> = own.iter().map(|page| salt_and_nonce(page).0).collect();
    assert_eq!(salts.len(), 1, "the session was replaced without need");
}

#[test]
fn forged_salts_do_not_fill_the_memory() {
    in_a_process_of_its_own("forged_salts_do_not_fill_the_memory", forged_salts);
}

fn forged_salts() {
    let mut dice = Dice::printed("forged salts");
    let database = open_stray(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring);
    let good = Method::Into.seal(&database.cipher, &at(0), &[1; 64]).unwrap();
    let before = kibibytes("VmLck");
    for _ in 0..20_000 {
        let mut forged = good.clone();
        dice.fill(&mut forged[64 + 28..64 + 44]);
        assert_eq!(Method::InPlace.open(&database.cipher, &at(0), &forged).0, Err(PageError::Authentication));
    }
    assert!(kibibytes("VmLck") <= before + 16, "keys of forged sessions are kept");
    assert_eq!(Method::Into.open(&database.cipher, &at(0), &good).0, Ok(()));
}

#[test]
fn where_locked_memory_is_short_fewer_subkeys_are_kept_and_every_page_opens() {
    let test = "where_locked_memory_is_short_fewer_subkeys_are_kept_and_every_page_opens";
    in_a_process_of_its_own(test, little_locked_memory);
}

fn little_locked_memory() {
    give_up_the_right_to_lock_beyond_the_limit();
    let limit = 64 * 1024;
    limit_locked_memory_to(limit);
    let database = open_stray(&[stray_key(Suite::Aes256Gcm, 1)], AesBackend::Ring);
    let seal = |number| {
        database.resumed();
        Method::Into.seal(&database.cipher, &at(number), &[3; 64]).unwrap()
    };
    let pages: Vec<_> = (0..1_500).map(seal).collect();
    for (number, page) in pages.iter().enumerate().chain(pages.iter().enumerate().rev()) {
        assert_eq!(Method::Into.open(&database.cipher, &at(number), page), (Ok(()), vec![3; 64]), "page {number}");
    }
    let locked = kibibytes("VmLck") * 1024;
    assert!(locked > limit / 2 && locked <= limit, "{locked} bytes are locked, {limit} were allowed");

    // Where not even the keys fit, the error says so; what fits goes on.
    let mut others = Vec::new();
    let error = loop {
        match pageseal::testing::stray::StrayDatabase::open(&[stray_key(Suite::Aes256Gcm, 2)], AesBackend::Ring, None) {
            Ok(database) => others.push(database),
            Err(error) => break error,
        }
        assert!(others.len() < 10_000, "keys are kept in memory that is not locked");
    };
    assert_eq!(error.kind(), pageseal::ErrorKind::Resources);
    assert!(error.to_string().contains("RLIMIT_MEMLOCK"), "{error}");
    assert_eq!(Method::Into.open(&database.cipher, &at(0), &pages[0]).0, Ok(()));
}

fn limit_locked_memory_to(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: passes a valid struct; changes nothing but this process's own limit.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &limit) }, 0);
}

/// Without CAP_IPC_LOCK, which root has, limits hold.
fn give_up_the_right_to_lock_beyond_the_limit() {
    #[repr(C)]
    struct Header {
        version: u32,
        thread: i32,
    }
    #[repr(C)]
    #[derive(Clone, Copy, Default)]
    struct Data {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    const CAP_IPC_LOCK: u32 = 14;
    let header = Header { version: VERSION_3, thread: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: the structs are laid out as capget(2) and capset(2) say for version 3, and outlive the calls.
    unsafe {
        assert_eq!(libc::syscall(libc::SYS_capget, &header, &mut data), 0);
        data[0].effective &= !(1 << CAP_IPC_LOCK);
        assert_eq!(libc::syscall(libc::SYS_capset, &header, &data), 0);
    }
}
