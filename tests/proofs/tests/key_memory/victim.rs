//! What a victim does: it uses pageseal as an engine would, and waits at checkpoints to be searched.

use std::arch::asm;
use std::num::NonZero;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use pageseal::testing::{set_session_counter, stray_cipher};
use pageseal::{ErrorKind, FileId, PageCipher, PageContext, PageError, PageJob, Pool, Threads};
use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};

use crate::channel::{Channel, note, send, send_trailer};
use crate::subject::{Store, Subject};

const PAGE: usize = 4096;
/// Pages of one batch.
const BATCH: u64 = 400;
/// Pages that each thread seals and opens one by one.
const SINGLE: u64 = 300;

/// Runs `role` to its end.
pub fn run(role: &str, folder: &str, mut channel: Channel) {
    std::panic::set_hook(Box::new(|info| {
        if !info.to_string().contains("on purpose") {
            eprintln!("{info}");
        }
    }));
    handle_signals();
    let (role, subject) = role.split_once(' ').unwrap_or((role, ""));
    let subject = Subject::new(subject, folder);
    match role {
        "life" => life(&subject, &mut channel),
        "leak" => leak(&subject, &mut channel),
        "signals" => signals(&subject, &mut channel),
        "short-of-memory" => short_of_memory(&subject, &mut channel),
        "exhausted-memory" => exhausted_memory(&subject, &mut channel),
        "without-memory" => without_memory(&subject, &mut channel),
        other => panic!("no victim has the role {other}"),
    }
}

fn life(subject: &Subject, channel: &mut Channel) {
    let pool = Threads::new(NonZero::new(3).unwrap()).unwrap();
    {
        let store = use_everything(subject, &pool, channel);
        fork_and_wait(channel);
        let ciphers = store.ciphers();
        store.cluster.disable().unwrap();
        channel.checkpoint("disabled");
        store.cluster.retry().unwrap();
        ciphers.iter().for_each(|cipher| one_by_one(cipher, 10));
        channel.checkpoint("brought back");
        drop((ciphers, store));
    }
    channel.checkpoint("dropped");
    panic_while_sealing(subject, &pool);
    channel.checkpoint("panicked");
}

/// Seals and opens on this thread, on threads of its own that stay, on the pool, in several sessions.
fn use_everything(subject: &Subject, pool: &Threads, channel: &mut Channel) -> Store {
    let store = subject.open();
    let done = Arc::new(Barrier::new(3));
    for _ in 0..2 {
        let (ciphers, done) = (store.ciphers(), Arc::clone(&done));
        thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                ciphers.iter().for_each(|cipher| one_by_one(cipher, SINGLE));
                drop(ciphers);
                done.wait();
                thread::park();
            })
            .unwrap();
    }
    store.ciphers().iter().for_each(|cipher| one_by_one(cipher, SINGLE));
    done.wait();
    let before = store.ciphers();
    let mut sealed: Vec<_> = before.iter().map(|cipher| batch(cipher, pool)).collect();
    store.cluster.resumed();
    sealed.extend(before.iter().map(|cipher| batch(cipher, pool)));
    // Pages of both sessions, under the handles that sealed them and under others.
    for (cipher, pages) in before.iter().zip(&mut sealed) {
        open_batch(cipher, pool, pages);
    }
    before.iter().for_each(|cipher| one_by_one(cipher, 10));
    store.files(pool);
    drop(before);
    channel.checkpoint("alive");
    store
}

fn one_by_one(cipher: &PageCipher, pages: u64) {
    let mut page = vec![0; PAGE];
    for number in 0..pages {
        let context = PageContext::page(FileId::new(1), number);
        fill(&mut page, number);
        cipher.seal_in_place(&context, &mut page).unwrap();
        send_trailer(cipher, &page);
        cipher.open_in_place(&context, &mut page).unwrap();
        assert_eq!(page[0], number as u8 | 1);
        // A page that was tampered with takes another way out.
        page[0] ^= 1;
        assert!(cipher.open_in_place(&context, &mut page).is_err());
    }
}

fn batch(cipher: &PageCipher, pool: &dyn Pool) -> Vec<Vec<u8>> {
    let mut pages: Vec<_> = (0..BATCH)
        .map(|number| {
            let mut page = vec![0; PAGE];
            fill(&mut page, number);
            page
        })
        .collect();
    assert_eq!(cipher.seal_batch(pool, &mut jobs(&mut pages)), 0);
    for page in &pages {
        send_trailer(cipher, page);
    }
    open_batch(cipher, pool, &mut pages.clone());
    pages
}

fn open_batch(cipher: &PageCipher, pool: &dyn Pool, pages: &mut [Vec<u8>]) {
    assert_eq!(cipher.open_batch(pool, &mut jobs(pages)), 0);
}

fn jobs(pages: &mut [Vec<u8>]) -> Vec<PageJob<'_>> {
    let context = |number| PageContext::page(FileId::new(2), number);
    (0..).zip(pages).map(|(number, page)| PageJob::in_place(context(number), page)).collect()
}

fn fill(page: &mut [u8], number: u64) {
    page.fill(number as u8 | 1);
}

/// A pool that panics when half the pages are sealed, with every handle owned by what unwinds.
fn panic_while_sealing(subject: &Subject, pool: &Threads) {
    struct Panics<'p>(&'p Threads);
    impl Pool for Panics<'_> {
        fn threads(&self) -> usize {
            3
        }
        fn run(&self, _: usize, f: &(dyn Fn(usize) + Sync)) {
            let once = AtomicBool::new(true);
            self.0.run(2, &|task| {
                if once.swap(false, Ordering::Relaxed) {
                    f(task);
                }
            });
            panic!("on purpose");
        }
    }
    let store = subject.open();
    let outcome = catch_unwind(AssertUnwindSafe(move || {
        let store = store;
        let ciphers = store.ciphers();
        ciphers.iter().for_each(|cipher| one_by_one(cipher, 3));
        batch(&ciphers[0], &Panics(pool));
    }));
    assert!(outcome.is_err(), "the pool was to panic");
}

/// The hunter searches the child, and kills it.
fn fork_and_wait(channel: &mut Channel) {
    // SAFETY: the child does nothing but wait.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "a process may fork");
    if child == 0 {
        loop {
            // SAFETY: no memory is involved.
            unsafe { libc::pause() };
        }
    }
    send(b'F', &child.to_le_bytes());
    channel.checkpoint("forked");
    // SAFETY: a null status is allowed.
    assert_eq!(unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) }, child);
}

/// The control of the hunt: what pageseal takes care never to do.
fn leak(subject: &Subject, channel: &mut Channel) {
    let pool = Threads::new(NonZero::new(3).unwrap()).unwrap();
    let store = use_everything(subject, &pool, channel);
    drop(store);
    let mut key = [0; 32];
    channel.receive(&mut key);
    // A cipher of ring's, built and dropped: it wipes nothing.
    drop(Box::new(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key).unwrap())));
    channel.checkpoint("leaked to the heap");
    wait_with_key_in_register(&key, channel);
    channel.checkpoint("leaked to a register");
}

/// Sessions whose subkeys together need five times the memory that may be locked.
const SESSIONS: u64 = 2_000;
const LOCKABLE: u64 = 256 * 1024;

fn short_of_memory(subject: &Subject, channel: &mut Channel) {
    become_nobody();
    allow_locked(LOCKABLE);
    let cluster = subject.cluster().unwrap();
    let cipher = cluster.create_database("orders").unwrap().cipher().unwrap();
    let context = |number| PageContext::page(FileId::new(1), number);
    let mut pages = Vec::new();
    for number in 0..SESSIONS {
        // The session's last seal was made, so that a new one begins.
        set_session_counter(&cipher, 1 << 28, 0).unwrap();
        let mut page = vec![0; PAGE];
        fill(&mut page, number);
        cipher.seal_in_place(&context(number), &mut page).unwrap();
        send_trailer(&cipher, &page);
        pages.push(page);
    }
    let mut read = 0;
    for _ in 0..2 {
        for (number, page) in (0..).zip(&pages) {
            let mut page = page.clone();
            cipher.open_in_place(&context(number), &mut page).unwrap();
            assert_eq!(page[0], number as u8 | 1);
            read += 1;
        }
    }
    note(&format!("read {read}"));
    channel.checkpoint("read");
    // What is not a page's key must find room, too.
    note(&format!("{:?}", cluster.check_master_key().and_then(|()| cluster.create_database("customers").map(drop))));
    channel.checkpoint("used");
    drop((cipher, cluster));
    channel.checkpoint("dropped");
}

/// Opens more sessions than there is room for, all in use, so that no cache can make room for one more.
fn exhausted_memory(subject: &Subject, channel: &mut Channel) {
    become_nobody();
    allow_locked(LOCKABLE / 2);
    let cluster = subject.cluster().unwrap();
    let create = |number| cluster.create_database(&format!("database {number}")).unwrap().cipher().unwrap();
    let ciphers: Vec<_> = (0..200).map(create).collect();
    let seal = |cipher: &PageCipher| {
        let mut page = vec![0; PAGE];
        cipher.seal_in_place(&PageContext::page(FileId::new(1), 1), &mut page)?;
        send_trailer(cipher, &page);
        Ok(())
    };
    let outcomes: Vec<_> = ciphers.iter().map(seal).collect();
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(PageError::LockedMemory))), "{outcomes:?}");
    let sessions = outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    assert!(sessions > 20 && sessions < 200, "{sessions} sessions were opened");
    for (cipher, outcome) in ciphers.iter().zip(&outcomes) {
        assert!(outcome.is_err() || seal(cipher) == Ok(()), "a session that was open no longer works");
    }
    let refused = cluster.create_database("one more").map(drop);
    note(&format!("{refused:?}"));
    channel.checkpoint("exhausted");
    drop((ciphers, cluster));
    channel.checkpoint("dropped");
}

fn without_memory(subject: &Subject, channel: &mut Channel) {
    become_nobody();
    allow_locked(0);
    subject.write_master_key(&[7; 32]);
    let refused = subject.cluster().expect_err("there is no memory for a key");
    assert_eq!(refused.kind(), ErrorKind::Resources, "{refused}");
    note(&refused.to_string());
    let refused =
        stray_cipher(pageseal::Suite::Aes256Gcm, pageseal::AesBackend::Ring).expect_err("no memory for a key");
    assert_eq!(refused.kind(), ErrorKind::Resources, "{refused}");
    channel.checkpoint("refused");
}

/// Gives up the right to lock more memory than the limit.
fn become_nobody() {
    const NOBODY: u32 = 65_534;
    // SAFETY: no memory is involved.
    unsafe {
        if libc::geteuid() == 0 {
            assert_eq!(libc::setresgid(NOBODY, NOBODY, NOBODY), 0);
            assert_eq!(libc::setresuid(NOBODY, NOBODY, NOBODY), 0);
        }
    }
}

fn allow_locked(bytes: u64) {
    let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
    // SAFETY: the limit is only read.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_MEMLOCK, &raw const limit) }, 0);
}

/// Waits in a system call with a part of the key in a vector register, where ciphers leave it.
fn wait_with_key_in_register(key: &[u8; 32], channel: &Channel) {
    let mut byte = 0u8;
    note("waiting with a key in a register");
    // SAFETY: reads 16 of the key's 32 bytes; the system call reads one byte into `byte`. What either overwrites is said.
    unsafe {
        asm!(
            "movdqu xmm7, [{key}]",
            "syscall",
            key = in(reg) key.as_ptr(),
            inlateout("rax") libc::SYS_read => _,
            in("rdi") i64::from(channel.descriptor()),
            in("rsi") &raw mut byte,
            in("rdx") 1u64,
            out("rcx") _,
            out("r11") _,
            out("xmm7") _,
            options(nostack)
        );
    }
}

/// Seals on and on while the hunter sends signals.
fn signals(subject: &Subject, channel: &mut Channel) {
    let stack = vec![0u8; 256 * 1024].leak();
    let new = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack was leaked, so it lives as long as the process.
    assert_eq!(unsafe { libc::sigaltstack(&raw const new, std::ptr::null_mut()) }, 0);
    let mut place = (stack.as_ptr().addr() as u64).to_le_bytes().to_vec();
    place.extend((stack.len() as u64).to_le_bytes());
    send(b'A', &place);
    let store = subject.open();
    let ciphers = store.ciphers();
    ciphers.iter().for_each(|cipher| one_by_one(cipher, 10));
    channel.checkpoint("idle");
    note("sealing");
    // The hunter sends signals until it sends a byte.
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            channel.receive(&mut [0]);
            stop.store(true, Ordering::Relaxed);
        });
        let mut page = vec![0; 16 * PAGE];
        while !stop.load(Ordering::Relaxed) {
            ciphers[0].seal_in_place(&PageContext::page(FileId::new(1), 1), &mut page).unwrap();
        }
    });
    channel.checkpoint("sealed");
    stack.fill(0);
    drop(ciphers);
    drop(store);
    channel.checkpoint("dropped");
}

/// A handler that only tells the hunter, on the signal stack of whichever thread is hit.
fn handle_signals() {
    extern "C" fn handler(_: libc::c_int) {
        send(b'S', &[]);
    }
    // SAFETY: all zeros are a valid `sigaction`.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as extern "C" fn(libc::c_int) as usize;
    action.sa_flags = libc::SA_ONSTACK | libc::SA_RESTART;
    // SAFETY: the handler makes one system call.
    assert_eq!(unsafe { libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut()) }, 0);
}
