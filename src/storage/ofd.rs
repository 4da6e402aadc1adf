//! Locks on single bytes of a file that belong to the open file description (`F_OFD_SETLK`), not to the process:
//! opening and closing the file elsewhere in the process does not lose them, and the kernel frees them when the last
//! descriptor of the description closes, also that of a killed process. They are advisory: who does not ask is not kept
//! out.
//!
//! One description has at most one lock on a byte. Asking again converts it, so who shares a description must count.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Locks a byte together with all who share it, without waiting; false if somebody else has it exclusively.
pub(super) fn try_shared(file: &File, byte: u64) -> io::Result<bool> {
    set(file, libc::F_RDLCK, byte)
}

/// Locks a byte alone, without waiting; false if somebody else has it in any way.
pub(super) fn try_exclusive(file: &File, byte: u64) -> io::Result<bool> {
    set(file, libc::F_WRLCK, byte)
}

/// Frees a byte. Nothing happens if it is not locked.
pub(super) fn unlock(file: &File, byte: u64) -> io::Result<()> {
    set(file, libc::F_UNLCK, byte).map(|_| ())
}

fn set(file: &File, kind: libc::c_int, byte: u64) -> io::Result<bool> {
    let start = libc::off_t::try_from(byte).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
    let wanted = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: 1,
        l_pid: 0, // or the kernel refuses
    };
    loop {
        // SAFETY: the descriptor is open as long as `file` is borrowed; the kernel only reads `wanted`, which outlives
        // the call.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) } == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::EAGAIN | libc::EACCES) => return Ok(false),
            _ => return Err(error),
        }
    }
}

/// Runs `f` in a forked child, which then ends at once, without destructors; whether `f` returned true, in time.
#[cfg(test)]
pub(super) fn in_forked_child(f: impl FnOnce() -> bool) -> bool {
    // SAFETY: the child has this thread only. It runs `f`, whose caller sees to it that no lock of another thread is
    // needed (glibc mends its allocator at a fork), and leaves by `_exit`, also if `f` panics.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "{}", io::Error::last_os_error());
        if child == 0 {
            libc::alarm(10);
            let good = std::panic::catch_unwind(std::panic::AssertUnwindSafe(f)).unwrap_or(false);
            libc::_exit(if good { 0 } else { 1 });
        }
        let mut status = 0;
        while libc::waitpid(child, &raw mut status, 0) != child {
            assert_eq!(io::Error::last_os_error().kind(), io::ErrorKind::Interrupted);
        }
        status == 0
    }
}
