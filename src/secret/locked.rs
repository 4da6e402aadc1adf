//! Locked memory: `mmap` + `mlock` + `MADV_DONTDUMP` + `MADV_WIPEONFORK`, cut into slots with a canary each.
//!
//! Invariant of this file: a slot is owned by exactly one [`Locked`] or by the free list of its arena, and a slot on the
//! free list holds zeros only.
#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwapOption;

use crate::secret::wipe::{scoped, wipe_bytes};

/// The canary before each value. The kernel zeroes it in a forked child, together with the value.
const CANARY: u64 = 0x5047_5345_414c_4b31;
/// Growth step. Small, because the default RLIMIT_MEMLOCK of older systems is 64 KiB.
const CHUNK: usize = 16 * 1024;
const SLOT_ALIGN: usize = 64;

/// This process is a fork of the one that made the secret.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Forked;

/// Why there is no slot for a secret.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum LockedMemoryError {
    Forked,
    Exhausted,
}

/// One value in locked memory. Wiped on drop. Every access checks the canary, so that a forked child is told, instead of
/// computing with the zeros that the kernel left it.
pub(crate) struct Locked<T> {
    slot: NonNull<Slot<T>>,
    arena: Arc<Arena>,
    owns: PhantomData<T>,
}

#[repr(C)]
struct Slot<T> {
    canary: u64,
    value: T,
}

// SAFETY: `Locked<T>` owns its slot alone (file invariant) and gives out only `&T` from `&self`; so it is as movable and
// shareable as a `Box<T>`.
unsafe impl<T: Send> Send for Locked<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Locked<T> {}

impl<T> Locked<T> {
    /// Builds a value with `make` and moves it into locked memory; then wipes the stack and the registers that the
    /// building used.
    pub(crate) fn new_with<E: From<LockedMemoryError>>(make: impl FnOnce() -> Result<T, E>) -> Result<Self, E> {
        // Until there is a value in it, the slot goes back if `make` fails or panics.
        struct Empty(Option<(Arc<Arena>, NonNull<u8>)>, usize);
        impl Drop for Empty {
            fn drop(&mut self) {
                if let Some((arena, slot)) = self.0.take() {
                    arena.give_back(slot, self.1);
                }
            }
        }
        let (arena, slot) = Self::allocate()?;
        let mut empty = Empty(Some((Arc::clone(&arena), slot.cast())), Self::slot_len());
        scoped(|| {
            make().map(|value| {
                // SAFETY: `slot` is ours alone, large enough and aligned for `Slot<T>` (`Arena::take`).
                unsafe {
                    (&raw mut (*slot.as_ptr()).value).write(value);
                    (&raw mut (*slot.as_ptr()).canary).write(CANARY);
                }
            })
        })?;
        empty.0 = None;
        Ok(Self { slot, arena, owns: PhantomData })
    }

    /// Lends the value to `f`. The canary is looked at before and after: if the process was forked in the middle, `f` may
    /// have worked with the zeros that the kernel left, and what it made must not be used.
    #[inline]
    pub(crate) fn with<R>(&self, f: impl FnOnce(&T) -> R) -> Result<R, Forked> {
        self.check()?;
        // SAFETY: the slot holds a `T` written by the constructor, and nobody else writes to it while `self` lives.
        let made = f(unsafe { &(*self.slot.as_ptr()).value });
        self.check()?;
        Ok(made)
    }

    /// Whether the value is still there.
    #[inline]
    pub(crate) fn check(&self) -> Result<(), Forked> {
        // SAFETY: the slot is mapped as long as `self.arena` lives. Volatile, because the kernel changes it at a fork.
        let canary = unsafe { (&raw const (*self.slot.as_ptr()).canary).read_volatile() };
        if canary == CANARY { Ok(()) } else { Err(Forked) }
    }

    /// Whether one more value would take of the last locked memory, which is kept for keys that no cache can give back.
    pub(crate) fn would_use_reserve() -> bool {
        Arena::of_this_process().is_ok_and(|arena| arena.would_use_reserve(Self::slot_len()))
    }

    fn allocate() -> Result<(Arc<Arena>, NonNull<Slot<T>>), LockedMemoryError> {
        const { assert!(align_of::<Slot<T>>() <= SLOT_ALIGN) };
        let arena = Arena::of_this_process()?;
        let slot = arena.take(Self::slot_len())?.cast();
        Ok((arena, slot))
    }

    fn slot_len() -> usize {
        size_of::<Slot<T>>().next_multiple_of(SLOT_ALIGN)
    }
}

impl<const N: usize> Locked<[u8; N]> {
    /// Lets `fill` write the bytes where they will stay; then wipes the stack and the registers that it used.
    pub(crate) fn fill_with<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E>
    where
        E: From<LockedMemoryError>,
    {
        let (arena, slot) = Self::allocate()?;
        // SAFETY: the slot is ours alone and holds zeros (file invariant), which are a valid `Slot<[u8; N]>`.
        let bytes = unsafe { &mut (*slot.as_ptr()).value };
        // SAFETY: as above. Set first, so that from here on dropping `locked`, also by a panic in `fill`, wipes the slot.
        unsafe { (&raw mut (*slot.as_ptr()).canary).write(CANARY) };
        let locked = Self { slot, arena, owns: PhantomData };
        scoped(|| fill(bytes))?;
        Ok(locked)
    }
}

impl<T> Drop for Locked<T> {
    fn drop(&mut self) {
        // In a forked child the value is gone, and the arena's lock may be held by a thread that does not exist here.
        if self.check().is_err() {
            return;
        }
        // SAFETY: the canary says that the slot holds a `T`; `self` is its only owner and is going away.
        unsafe { (&raw mut (*self.slot.as_ptr()).value).drop_in_place() };
        self.arena.give_back(self.slot.cast(), Self::slot_len());
    }
}

/// The locked memory of one process. A forked child starts a new one.
struct Arena {
    fork: ForkDetector,
    free: Mutex<FreeLists>,
}

#[derive(Default)]
struct FreeLists {
    /// (slot length, free slots of that length); a handful of lengths, so a scan is enough.
    by_len: Vec<(usize, Vec<NonNull<u8>>)>,
    chunks: Vec<Mapping>,
}

// SAFETY: the pointers in the lists are slots that the arena owns; they are used only under the mutex.
unsafe impl Send for FreeLists {}

static ARENA: ArcSwapOption<Arena> = ArcSwapOption::const_empty();

impl Arena {
    fn of_this_process() -> Result<Arc<Self>, LockedMemoryError> {
        loop {
            let current = ARENA.load();
            if let Some(arena) = &*current
                && !arena.fork.forked()
            {
                return Ok(Arc::clone(arena));
            }
            let fork = ForkDetector::new().map_err(|_| LockedMemoryError::Exhausted)?;
            let new = Arc::new(Self { fork, free: Mutex::default() });
            ARENA.compare_and_swap(&*current, Some(new));
        }
    }

    /// A zeroed slot of `len` bytes, a multiple of 64, aligned to 64.
    fn take(&self, len: usize) -> Result<NonNull<u8>, LockedMemoryError> {
        if self.fork.forked() {
            return Err(LockedMemoryError::Forked);
        }
        let mut lists = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = lists.of(len).pop() {
            return Ok(slot);
        }
        let chunk = Mapping::locked(len.max(CHUNK)).map_err(|_| LockedMemoryError::Exhausted)?;
        let count = chunk.len / len;
        for index in (0..count).rev() {
            // SAFETY: `index * len + len <= chunk.len`, so the slot lies inside the mapping.
            let slot = unsafe { chunk.start.add(index * len) };
            lists.of(len).push(slot);
        }
        lists.chunks.push(chunk);
        lists.of(len).pop().ok_or(LockedMemoryError::Exhausted)
    }

    /// A quarter of what this process may lock is the reserve.
    fn would_use_reserve(&self, len: usize) -> bool {
        let mut lists = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let locked: usize = lists.chunks.iter().map(|chunk| chunk.len).sum();
        lists.of(len).is_empty() && (locked + len.max(CHUNK)) as u64 > lockable() / 4 * 3
    }

    /// Wipes a slot and puts it on the free list. In a forked child, where the kernel wiped it already, it does nothing.
    fn give_back(&self, slot: NonNull<u8>, len: usize) {
        if self.fork.forked() {
            return;
        }
        // SAFETY: the caller owns the slot and gives it up; it is `len` bytes inside a mapping of this arena.
        unsafe { wipe_bytes(slot, len) };
        self.free.lock().unwrap_or_else(PoisonError::into_inner).of(len).push(slot);
    }
}

impl FreeLists {
    fn of(&mut self, len: usize) -> &mut Vec<NonNull<u8>> {
        let at = self.by_len.iter().position(|(have, _)| *have == len).unwrap_or_else(|| {
            self.by_len.push((len, Vec::new()));
            self.by_len.len() - 1
        });
        &mut self.by_len[at].1
    }
}

/// The limit on locked memory. A process with CAP_IPC_LOCK may pass it, but need not.
fn lockable() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes the limit to where it is told, and fails for nothing but a wrong pointer.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) };
    limit.rlim_cur
}

/// Tells a forked child that it is one, without a system call: a page that the kernel zeroes in children.
pub(crate) struct ForkDetector(Mapping);

impl ForkDetector {
    pub(crate) fn new() -> io::Result<Self> {
        let page = Mapping::wiped_on_fork(SLOT_ALIGN)?;
        // SAFETY: the mapping is writable, aligned to a page and longer than 8 bytes.
        unsafe { page.start.cast::<u64>().write_volatile(CANARY) };
        Ok(Self(page))
    }

    #[inline]
    pub(crate) fn forked(&self) -> bool {
        // SAFETY: mapped as long as `self` lives; never written again by this process.
        unsafe { self.0.start.cast::<u64>().read_volatile() != CANARY }
    }
}

/// The process that made it, by the fork detector of its locked memory: for those who must still tell a forked child when
/// they hold no key. Costs no memory of its own.
pub(crate) struct ThisProcess(Arc<Arena>);

impl ThisProcess {
    pub(crate) fn mark() -> Result<Self, LockedMemoryError> {
        Arena::of_this_process().map(Self)
    }

    #[inline]
    pub(crate) fn check(&self) -> Result<(), Forked> {
        if self.0.fork.forked() { Err(Forked) } else { Ok(()) }
    }
}

/// An anonymous private mapping, zeroed by the kernel now and in every forked child.
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping is plain memory; who may touch which part of it is decided by the types above.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn wiped_on_fork(len: usize) -> io::Result<Self> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(std::ptr::null_mut(), len, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1, 0)
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mmap returned null"))?;
        let mapping = Self { start, len };
        mapping.advise(libc::MADV_WIPEONFORK)?;
        Ok(mapping)
    }

    fn locked(len: usize) -> io::Result<Self> {
        let mapping = Self::wiped_on_fork(len)?;
        mapping.advise(libc::MADV_DONTDUMP)?;
        // SAFETY: locks pages of a mapping that we own; unlocked by munmap.
        if unsafe { libc::mlock(mapping.start.as_ptr().cast(), len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(mapping)
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: both advices change how the kernel treats this mapping at a fork or dump, never its contents here.
        if unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and no slot of it is in use: each `Locked` keeps the arena, and so this, alive.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> Locked<[u8; 32]> {
        Locked::fill_with(|out| {
            out.fill(byte);
            Ok::<(), LockedMemoryError>(())
        })
        .unwrap()
    }

    #[test]
    fn a_slot_is_zero_again_after_drop_and_is_reused() {
        let arena = Arena { fork: ForkDetector::new().unwrap(), free: Mutex::default() };
        let first = arena.take(64).unwrap();
        // SAFETY: the slot is ours until it is given back.
        unsafe { first.write_bytes(0xee, 64) };
        arena.give_back(first, 64);
        let again = arena.take(64).unwrap();
        assert_eq!(first, again);
        // SAFETY: as above.
        assert_eq!(unsafe { std::slice::from_raw_parts(again.as_ptr(), 64) }, [0; 64]);
    }

    #[test]
    fn slots_do_not_overlap() {
        let secrets: Vec<_> = (0..=255).map(secret).collect();
        for (byte, secret) in (0..=255).zip(&secrets) {
            assert_eq!(secret.with(|bytes| *bytes), Ok([byte; 32]));
        }
    }

    #[test]
    fn a_failed_or_panicking_build_gives_its_slot_back_wiped() {
        let failed = Locked::<[u8; 32]>::fill_with(|out| {
            out.fill(0xee);
            Err(LockedMemoryError::Exhausted)
        });
        assert!(failed.is_err());
        let panicked = std::panic::catch_unwind(|| {
            Locked::<[u8; 32]>::fill_with(|out| -> Result<(), LockedMemoryError> {
                out.fill(0xee);
                panic!("in the middle of a key")
            })
        });
        assert!(panicked.is_err());
        let next: Vec<_> =
            (0..600).map(|_| Locked::<[u8; 32]>::fill_with(|_| Ok::<(), LockedMemoryError>(()))).collect();
        assert!(next.iter().all(|secret| secret.as_ref().is_ok_and(|s| s.with(|bytes| *bytes) == Ok([0; 32]))));
    }

    #[test]
    fn a_value_is_dropped_once() {
        let count = Arc::new(());
        let held = Locked::new_with(|| Ok::<_, LockedMemoryError>(Arc::clone(&count))).unwrap();
        assert_eq!(Arc::strong_count(&count), 2);
        drop(held);
        assert_eq!(Arc::strong_count(&count), 1);
    }
}
