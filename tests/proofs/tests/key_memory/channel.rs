//! Two pipes between a hunter and the victim it started. What the victim sends goes from where it lies straight into the
//! kernel, so that the test itself leaves no copy of a key in the victim.

use std::env;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicI32, Ordering};

use pageseal::{OVERHEAD, PageCipher};

const ROLE: &str = "PAGESEAL_VICTIM_ROLE";
const FOLDER: &str = "PAGESEAL_VICTIM_FOLDER";
const PIPES: &str = "PAGESEAL_VICTIM_PIPES";

/// What a victim tells.
pub enum Message {
    /// A key payload, as a key service sees it.
    Payload([u8; 128]),
    /// The trailer of a page that was sealed, and its database.
    Trailer { database: [u8; 16], trailer: [u8; 48] },
    /// Where a signal handler's stack is.
    SignalStack { start: u64, len: u64 },
    /// A signal was handled.
    Signal,
    /// A process that the victim forked.
    Forked(u32),
    /// Anything else, in words.
    Note(String),
    /// The victim waits for an answer.
    Checkpoint(String),
}

/// The victim's end. A signal handler writes to it, too.
pub struct Channel {
    input: File,
}

static OUTPUT: AtomicI32 = AtomicI32::new(-1);

/// What a victim was started for: its role, a folder to work in, and the pipes. `None` in any other process.
pub fn victim() -> Option<(String, String, Channel)> {
    let role = env::var(ROLE).ok()?;
    let folder = env::var(FOLDER).ok()?;
    let pipes = env::var(PIPES).ok()?;
    let (input, output) = pipes.split_once(' ')?;
    OUTPUT.store(output.parse().ok()?, Ordering::Relaxed);
    // SAFETY: the parent left this descriptor open for us, and nothing else here uses it.
    let input = unsafe { File::from_raw_fd(input.parse::<RawFd>().ok()?) };
    Some((role, folder, Channel { input }))
}

/// Writes tag and bytes in one call, so that messages of several threads do not mix. Takes no lock and allocates nothing:
/// also for signal handlers and forked children.
pub fn send(tag: u8, bytes: &[u8]) {
    let parts = [
        libc::iovec { iov_base: (&raw const tag).cast_mut().cast(), iov_len: 1 },
        libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() },
    ];
    // SAFETY: both parts are alive and only read.
    let written = unsafe { libc::writev(OUTPUT.load(Ordering::Relaxed), parts.as_ptr(), 2) };
    assert_eq!(written, bytes.len() as isize + 1, "the hunter is gone");
}

fn send_text(tag: u8, text: &str) {
    let mut bytes = u16::try_from(text.len()).expect("notes are short").to_le_bytes().to_vec();
    bytes.extend(text.as_bytes());
    send(tag, &bytes);
}

/// Tells the hunter of a sealed page.
pub fn send_trailer(cipher: &PageCipher, page: &[u8]) {
    let mut message = [0; 16 + OVERHEAD];
    message[..16].copy_from_slice(&cipher.database().to_bytes());
    message[16..].copy_from_slice(&page[page.len() - OVERHEAD..]);
    send(b'T', &message);
}

/// Tells the hunter something in words.
pub fn note(text: &str) {
    send_text(b'N', text);
}

impl Channel {
    /// Tells the hunter that the victim has come to this point, and waits until it is told to go on.
    pub fn checkpoint(&mut self, name: &str) {
        send_text(b'C', name);
        self.receive(&mut [0]);
    }

    /// Waits for bytes of the hunter.
    pub fn receive(&mut self, bytes: &mut [u8]) {
        self.input.read_exact(bytes).expect("the hunter is alive");
    }

    /// The descriptor, for a victim that waits in assembly.
    pub fn descriptor(&self) -> RawFd {
        self.input.as_raw_fd()
    }
}

/// A victim, as the hunter sees it. Killed when dropped.
pub struct Victim {
    child: Child,
    input: File,
    output: File,
}

impl Victim {
    /// Starts the test `test` of this binary as a victim, in a folder of its own for temporary files.
    pub fn start(test: &str, role: &str, folder: &Path) -> Self {
        let temporary = folder.join("tmp");
        fs::create_dir_all(&temporary).expect("the victim's folder is ours");
        let (their_input, input) = pipe();
        let (output, their_output) = pipe();
        let (a, b) = (their_input.as_raw_fd(), their_output.as_raw_fd());
        let mut command = Command::new(env::current_exe().expect("this binary has a path"));
        command.args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"]).stdin(Stdio::null());
        command.env(ROLE, role).env(FOLDER, folder).env(PIPES, format!("{a} {b}")).stdout(Stdio::null());
        command.env("TMPDIR", &temporary).current_dir(&temporary);
        // SAFETY: between fork and exec it only makes two system calls.
        unsafe {
            command.pre_exec(move || {
                for descriptor in [a, b] {
                    if libc::fcntl(descriptor, libc::F_SETFD, 0) != 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            })
        };
        let child = command.spawn().expect("this binary starts");
        Self { child, input, output }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The victim's next message.
    pub fn next(&mut self) -> Message {
        match self.next_or_end() {
            Ok(message) => message,
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => {
                let status = self.child.wait().expect("the victim is our child");
                panic!("the victim ended too soon: {status}");
            }
            Err(error) => panic!("a pipe cannot be read: {error}"),
        }
    }

    /// The victim's next message; an error when the victim has ended.
    pub fn next_or_end(&mut self) -> std::io::Result<Message> {
        Ok(match self.array::<1>()?[0] {
            b'P' => Message::Payload(self.array()?),
            b'T' => Message::Trailer { database: self.array()?, trailer: self.array()? },
            b'A' => Message::SignalStack {
                start: u64::from_le_bytes(self.array()?),
                len: u64::from_le_bytes(self.array()?),
            },
            b'S' => Message::Signal,
            b'F' => Message::Forked(u32::from_le_bytes(self.array()?)),
            b'N' => Message::Note(self.text()?),
            b'C' => Message::Checkpoint(self.text()?),
            other => panic!("a victim sent a message of kind {other}"),
        })
    }

    /// Lets the victim go on from its checkpoint.
    pub fn go_on(&mut self) {
        self.send(&[0]);
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.input.write_all(bytes).expect("the victim is alive");
    }

    /// Waits for the victim's end, which must be a good one.
    pub fn finish(&mut self) {
        let status = self.child.wait().expect("the victim is our child");
        assert!(status.success(), "the victim failed: {status}");
    }

    fn text(&mut self) -> std::io::Result<String> {
        let mut text = vec![0; usize::from(u16::from_le_bytes(self.array()?))];
        self.output.read_exact(&mut text)?;
        Ok(String::from_utf8(text).expect("notes are text"))
    }

    fn array<const N: usize>(&mut self) -> std::io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.output.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The two ends, to be read and to be written; other children do not get them.
fn pipe() -> (File, File) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for the two descriptors.
    let made = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) };
    assert_eq!(made, 0, "a process may have two more descriptors");
    // SAFETY: the descriptors are new and nobody else's.
    unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) }
}
