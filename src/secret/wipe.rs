//! Wiping memory, the stack and the vector registers, in ways that the compiler may not remove.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::mem::MaybeUninit;
use std::ptr::NonNull;

/// How much of the stack below the caller is wiped. ring's key set-up and one-page calls stay well within it (measured).
const STACK: usize = 32 * 1024;

/// Runs `f`, then wipes the stack below this frame and all vector registers, also when `f` panics. For code that builds or
/// derives keys; too slow (1 to 2 µs) for each page.
pub(crate) fn scoped<R>(f: impl FnOnce() -> R) -> R {
    scoped_to::<STACK, R>(f)
}

/// As [`scoped`], for code of others, whose frames may reach deeper: a key service's SDK.
pub(crate) fn scoped_deep<R>(f: impl FnOnce() -> R) -> R {
    scoped_to::<{ 8 * STACK }, R>(f)
}

/// As [`scoped`], `DEPTH` bytes deep. For calls of ciphers that use all vector registers: AVX-512 code keeps keys in those
/// above 15, too.
pub(crate) fn scoped_to<const DEPTH: usize, R>(f: impl FnOnce() -> R) -> R {
    struct WipeOnExit<const DEPTH: usize>;
    impl<const DEPTH: usize> Drop for WipeOnExit<DEPTH> {
        fn drop(&mut self) {
            wipe_stack::<DEPTH>();
            wipe_vector_registers();
            wipe_upper_registers();
        }
    }
    let _wipe = WipeOnExit::<DEPTH>;
    call(f)
}

/// Keeps the frames of `f` below the caller's, where [`wipe_stack`] reaches them.
#[inline(never)]
fn call<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Runs `f`, one call of a cipher that spills its key, then wipes `DEPTH` bytes of the stack below this frame. For each
/// page, so `DEPTH` is no more than that cipher needs.
#[inline]
pub(crate) fn scoped_call<const DEPTH: usize, R>(f: impl FnOnce() -> R) -> R {
    let result = call(f);
    wipe_stack::<DEPTH>();
    result
}

#[inline(never)]
fn wipe_stack<const DEPTH: usize>() {
    let mut below = MaybeUninit::<[u8; DEPTH]>::uninit();
    // SAFETY: writes within `below`. The asm block is said to read the memory behind the pointer, so the writes must happen.
    unsafe {
        below.as_mut_ptr().cast::<u8>().write_bytes(0, DEPTH);
        std::arch::asm!("/* {0} */", in(reg) below.as_ptr(), options(nostack, preserves_flags));
    }
    black_box(&below);
}

/// Wipes `len` bytes at `start`.
///
/// # Safety
/// The caller owns the `len` bytes at `start`, and nothing else reads or writes them meanwhile.
pub(super) unsafe fn wipe_bytes(start: NonNull<u8>, len: usize) {
    // SAFETY: the caller's promise. The asm block is said to read the memory, so the writes must happen.
    unsafe {
        start.write_bytes(0, len);
        std::arch::asm!("/* {0} */", in(reg) start.as_ptr(), options(nostack, preserves_flags));
    }
}

/// Zeroes vector registers 0 to 15, where ciphers keep round keys; a signal or a core dump would copy them. Costs 2 ns, so
/// it is done after each call.
#[inline]
pub(crate) fn wipe_vector_registers() {
    if is_x86_feature_detected!("avx") {
        // SAFETY: AVX is there. Every register that the instruction zeroes is declared as overwritten.
        unsafe {
            std::arch::asm!(
                "vzeroall",
                out("ymm0") _, out("ymm1") _, out("ymm2") _, out("ymm3") _,
                out("ymm4") _, out("ymm5") _, out("ymm6") _, out("ymm7") _,
                out("ymm8") _, out("ymm9") _, out("ymm10") _, out("ymm11") _,
                out("ymm12") _, out("ymm13") _, out("ymm14") _, out("ymm15") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    } else {
        wipe_sse_registers();
    }
}

#[cold]
fn wipe_sse_registers() {
    // SAFETY: SSE2 is part of x86-64. Every register that is zeroed is declared as overwritten.
    unsafe {
        std::arch::asm!(
            "pxor xmm0, xmm0", "pxor xmm1, xmm1", "pxor xmm2, xmm2", "pxor xmm3, xmm3",
            "pxor xmm4, xmm4", "pxor xmm5, xmm5", "pxor xmm6, xmm6", "pxor xmm7, xmm7",
            "pxor xmm8, xmm8", "pxor xmm9, xmm9", "pxor xmm10, xmm10", "pxor xmm11, xmm11",
            "pxor xmm12, xmm12", "pxor xmm13, xmm13", "pxor xmm14, xmm14", "pxor xmm15, xmm15",
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nomem, nostack, preserves_flags)
        );
    }
}

/// Zeroes registers 16 to 31 where they exist (AVX-512): glibc copies memory through them, so a moved key passes there.
fn wipe_upper_registers() {
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: AVX-512F is there. Every register that is zeroed is declared as overwritten.
        unsafe {
            std::arch::asm!(
                "vpxord zmm16, zmm16, zmm16", "vpxord zmm17, zmm17, zmm17", "vpxord zmm18, zmm18, zmm18",
                "vpxord zmm19, zmm19, zmm19", "vpxord zmm20, zmm20, zmm20", "vpxord zmm21, zmm21, zmm21",
                "vpxord zmm22, zmm22, zmm22", "vpxord zmm23, zmm23, zmm23", "vpxord zmm24, zmm24, zmm24",
                "vpxord zmm25, zmm25, zmm25", "vpxord zmm26, zmm26, zmm26", "vpxord zmm27, zmm27, zmm27",
                "vpxord zmm28, zmm28, zmm28", "vpxord zmm29, zmm29, zmm29", "vpxord zmm30, zmm30, zmm30",
                "vpxord zmm31, zmm31, zmm31",
                out("xmm16") _, out("xmm17") _, out("xmm18") _, out("xmm19") _,
                out("xmm20") _, out("xmm21") _, out("xmm22") _, out("xmm23") _,
                out("xmm24") _, out("xmm25") _, out("xmm26") _, out("xmm27") _,
                out("xmm28") _, out("xmm29") _, out("xmm30") _, out("xmm31") _,
                options(nomem, nostack, preserves_flags)
            );
        }
    }
}
