//! [`Server`]: a server as a child process, on a port of 127.0.0.1 that was free, stopped by its process id.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

/// Where `tests/run kms` has installed the servers: a Python virtual environment.
pub fn tools() -> Option<PathBuf> {
    let named = std::env::var_os("PAGESEAL_KMS_TOOLS").map(PathBuf::from);
    let target = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let target = target.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target"));
    let tools = named.unwrap_or_else(|| target.join("tools/kms"));
    tools.join("bin/python").exists().then_some(tools)
}

/// A running server. It is killed when this is dropped; if this process is killed itself, by the kernel (`setpriv
/// --pdeathsig`), so that none is left over.
pub struct Server {
    child: Option<Child>,
    command: Box<dyn Fn() -> Command + Send + Sync>,
    address: SocketAddr,
    log: PathBuf,
    ready: Duration,
}

impl Server {
    /// Starts what `command` makes for the port that it is given, and returns when something listens there.
    ///
    /// # Panics
    /// If it ends, or does not listen within a minute; with what it said.
    pub fn start(name: &str, command: impl Fn(u16) -> Command + Send + Sync + 'static) -> Self {
        // A port that was free a moment ago. Should another process take it meanwhile, the server says so and ends.
        let port = free_port();
        let directory = scratch();
        let mut server = Self {
            child: None,
            command: Box::new(move || command(port)),
            address: SocketAddr::from(([127, 0, 0, 1], port)),
            log: directory.join(format!("{name}-{port}.log")),
            ready: Duration::from_secs(60),
        };
        server.run();
        server
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// `http://` and the address.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Kills it, and starts it anew on the same port. What it had in memory only is gone.
    pub fn restart(&mut self) {
        self.stop();
        self.run();
    }

    /// Kills it, by its process id.
    pub fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn run(&mut self) {
        let log = File::options().create(true).append(true).open(&self.log).expect("the log can be written");
        let wanted = (self.command)();
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL"]).arg(wanted.get_program()).args(wanted.get_args());
        for (name, value) in wanted.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        if let Some(directory) = wanted.get_current_dir() {
            command.current_dir(directory);
        }
        let errors = log.try_clone().expect("the log can be written");
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        let child = spawn_for_good(command);
        self.child = Some(child.unwrap_or_else(|error| panic!("starting {wanted:?}: {error}")));
        self.wait_until_it_listens();
    }

    fn wait_until_it_listens(&mut self) {
        let give_up = Instant::now() + self.ready;
        while TcpStream::connect(self.address).is_err() {
            let ended = self.child.as_mut().map(Child::try_wait);
            let said = || fs::read_to_string(&self.log).unwrap_or_default();
            if let Some(Ok(Some(status))) = ended {
                panic!("the server ended with {status}; {} says: {}", self.log.display(), said());
            }
            assert!(Instant::now() < give_up, "the server does not listen; {} says: {}", self.log.display(), said());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Starts a child from a thread that never ends: the kernel sends the signal of `--pdeathsig` when the thread that started the
/// child ends, and those of tests do.
fn spawn_for_good(command: Command) -> io::Result<Child> {
    type Order = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Order>>> = LazyLock::new(|| {
        let (orders, inbox) = mpsc::channel::<Order>();
        thread::spawn(move || {
            for (mut command, started) in inbox {
                let _ = started.send(command.spawn());
            }
        });
        Mutex::new(orders)
    });
    let (started, outcome) = mpsc::channel();
    let orders = SPAWNER.lock().expect("the spawner does not panic");
    orders.send((command, started)).expect("the spawner lives as long as the process");
    outcome.recv().expect("the spawner answers")
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The directory of this process for logs and certificates. Those of processes that are gone are removed, because nothing runs
/// at the end of a test process.
///
/// # Panics
/// If the temporary directory cannot be written.
pub fn scratch() -> PathBuf {
    static OWN: LazyLock<PathBuf> = LazyLock::new(|| {
        const NAME: &str = "pageseal-kms-tests-";
        let temporary = std::env::temp_dir();
        for entry in fs::read_dir(&temporary).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let process = name.to_str().and_then(|name| name.strip_prefix(NAME)?.parse::<u32>().ok());
            if process.is_some_and(|process| !Path::new("/proc").join(process.to_string()).exists()) {
                let _ = fs::remove_dir_all(entry.path());
            }
        }
        let own = temporary.join(format!("{NAME}{}", std::process::id()));
        fs::create_dir_all(&own).expect("the temporary directory can be written");
        own
    });
    OWN.clone()
}

/// A port of 127.0.0.1 that nobody listens on.
pub fn free_port() -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("there are free ports");
    listener.local_addr().map(|address| address.port()).expect("a bound socket has an address")
}

/// Asks until `answers`, at most for a minute.
///
/// # Panics
/// If it never does.
pub fn wait_until(what: &str, mut answers: impl FnMut() -> io::Result<bool>) {
    let give_up = Instant::now() + Duration::from_secs(60);
    loop {
        let outcome = answers();
        if matches!(outcome, Ok(true)) {
            return;
        }
        assert!(Instant::now() < give_up, "{what}: {outcome:?}");
        thread::sleep(Duration::from_millis(20));
    }
}
