//! A real process: this binary again, that obeys the lines on its input.

use std::env;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use crate::worker::{Home, Worker};

const HOME: &str = "PAGESEAL_PROCESS_HOME";
const WATCHED: &str = "PAGESEAL_PROCESS_WATCHED";
/// What an answer begins with: the test harness writes to the same output.
const MARK: &str = "@@ ";
/// The name of the test that is the child.
const TEST: &str = "child";
const PATIENCE: Duration = Duration::from_secs(60);

/// Does what the parent says, if this process was started for that.
pub fn serve() {
    let Some(home) = env::var_os(HOME) else { return };
    let mut worker = Worker::new(&Home(PathBuf::from(home)), env::var_os(WATCHED).is_some());
    tell("ready");
    for line in std::io::stdin().lines() {
        let line = line.unwrap();
        match line.strip_prefix("create-for-ever ") {
            Some(prefix) => create_for_ever(&mut worker, prefix),
            None => tell(&worker.answer(&line)),
        }
    }
}

/// Tells each answer. Two thirds of the databases are dropped again, so that there are rewrites, too.
fn create_for_ever(worker: &mut Worker, prefix: &str) {
    for number in 0.. {
        let name = format!("{prefix}{number}");
        let created = worker.answer(&format!("create {name}"));
        tell(&format!("{created} {name}"));
        worker.answer(&format!("close {name}"));
        if number % 3 > 0 {
            tell(&format!("dropping {name}"));
            worker.answer(&format!("drop {name}"));
        }
    }
}

fn tell(text: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody listens any more: the parent is gone.
    if writeln!(out, "{MARK}{text}").and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

/// The child, as its parent sees it. Killed when dropped.
pub struct Process {
    child: Child,
    input: ChildStdin,
    answers: Receiver<String>,
}

impl Process {
    pub fn start(home: &Home, watched: bool) -> Self {
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", TEST, "--nocapture", "--test-threads=1"]).env(HOME, &home.0);
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        if watched {
            command.env(WATCHED, "1");
        }
        let mut child = command.spawn().unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines() {
                let Ok(line) = line else { return };
                if let Some((_, answer)) = line.split_once(MARK)
                    && sender.send(answer.to_owned()).is_err()
                {
                    return;
                }
            }
        });
        let mut process = Self { child, input, answers };
        assert_eq!(process.next(), "ready");
        process
    }

    pub fn id(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn tell(&mut self, line: &str) {
        writeln!(self.input, "{line}").unwrap();
    }

    pub fn next(&mut self) -> String {
        self.answers.recv_timeout(PATIENCE).expect("the child answers")
    }

    /// The next answer; `None` when the child has ended and all that it said was read.
    pub fn next_if_any(&mut self) -> Option<String> {
        match self.answers.recv_timeout(PATIENCE) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("the child neither answers nor ends"),
        }
    }

    pub fn ask(&mut self, line: &str) -> String {
        self.tell(line);
        self.next()
    }

    /// Ends it as `kill -9` does.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    pub fn signal(&self, signal: libc::c_int) {
        // SAFETY: sends a signal to a child of ours that was not waited for.
        assert_eq!(unsafe { libc::kill(self.id(), signal) }, 0);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
