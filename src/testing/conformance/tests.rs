//! Each row passes for a sound wrapper, and fails for one that breaks just its promise.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use super::*;
use crate::error::{KmsClass, KmsError};
use crate::ids::{ClusterId, MasterKeyId};
use crate::keys::wrapper::{WrapContext, WrappedKey};
use crate::kms::scripted::ScriptedWrapper;
use crate::secret::KeyPayload;

/// A key service in memory, with one promise broken or none.
#[derive(Clone)]
struct Model(Arc<Inner>);

struct Inner {
    key: ScriptedWrapper,
    broken: Option<Behaviour>,
    /// What every call answers, if it fails.
    verdict: Mutex<Option<KmsClass>>,
    fault: Mutex<Fault>,
    in_flight: AtomicU64,
    /// The last payload that was wrapped, for wrappers that lie.
    last: Mutex<Option<Vec<u8>>>,
}

impl Model {
    fn new(broken: impl Into<Option<Behaviour>>) -> Self {
        Self::named("model", broken.into())
    }

    fn named(name: &str, broken: Option<Behaviour>) -> Self {
        Self(Arc::new(Inner {
            key: ScriptedWrapper::new(name),
            broken,
            verdict: Mutex::default(),
            fault: Mutex::new(Fault::None),
            in_flight: AtomicU64::new(0),
            last: Mutex::default(),
        }))
    }

    fn breaks(&self, behaviour: Behaviour) -> bool {
        self.0.broken == Some(behaviour)
    }

    fn enter(&self, cx: &WrapContext<'_>) -> Result<(), KmsError> {
        self.refuse_runtimes();
        let fault = *lock(&self.0.fault);
        self.disturbed(fault, cx)?;
        match *lock(&self.0.verdict) {
            Some(class) => Err(KmsError::with_source(self.told(class), "as the test says")),
            None => Ok(()),
        }
    }

    fn refuse_runtimes(&self) {
        #[cfg(feature = "tokio")]
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            let current = runtime.runtime_flavor() == tokio::runtime::RuntimeFlavor::CurrentThread;
            let broken = if current { Behaviour::InCurrentThreadRuntime } else { Behaviour::InMultiThreadRuntime };
            assert!(!self.breaks(broken), "a runtime from within a runtime");
        }
        assert!(!self.breaks(Behaviour::WithoutRuntime), "there is no reactor running");
    }

    fn told(&self, class: KmsClass) -> KmsClass {
        match class {
            KmsClass::Disabled if self.breaks(Behaviour::Disabled) => KmsClass::Deleted,
            KmsClass::Disabled if self.breaks(Behaviour::ClusterLife) => KmsClass::Unreachable,
            KmsClass::Deleted if self.breaks(Behaviour::Deleted) => KmsClass::Disabled,
            KmsClass::Denied if self.breaks(Behaviour::Denied) => KmsClass::Unclassified,
            class => class,
        }
    }

    fn disturbed(&self, fault: Fault, cx: &WrapContext<'_>) -> Result<(), KmsError> {
        let unreachable = |lies: bool, lie: KmsClass| {
            Err(KmsError::with_source(if lies { lie } else { KmsClass::Unreachable }, "as the test says"))
        };
        match fault {
            Fault::None => Ok(()),
            Fault::Refuse | Fault::Reset => unreachable(self.breaks(Behaviour::Unreachable), KmsClass::Denied),
            Fault::ServerError => unreachable(false, KmsClass::Denied),
            Fault::ProxyError => unreachable(self.breaks(Behaviour::ServerError), KmsClass::Unclassified),
            Fault::Throttle(after) => {
                let error = KmsError::with_source(KmsClass::Throttled, "as the test says");
                Err(if self.breaks(Behaviour::Throttled) { error } else { error.retry_after(after) })
            }
            // At once: at the deadline it would be too late to do harm.
            Fault::Hang if self.breaks(Behaviour::HangingIsAbandoned) => unreachable(true, KmsClass::Denied),
            Fault::Hang => {
                let late = if self.breaks(Behaviour::BlackHole) { Duration::from_secs(5) } else { Duration::ZERO };
                thread::sleep(cx.deadline.saturating_duration_since(Instant::now()) + late);
                unreachable(false, KmsClass::Denied)
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl KeyWrapper for Model {
    fn id(&self) -> MasterKeyId {
        self.0.key.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.enter(cx)?;
        *lock(&self.0.last) = Some(key.with_bytes(|bytes| bytes.to_vec())?);
        let cx = if self.breaks(Behaviour::ContextBound) { &unbound(cx) } else { cx };
        let mut wrapped = self.0.key.wrap_key(key, cx)?;
        if self.breaks(Behaviour::RoundTrip) {
            wrapped.blob = key.with_bytes(|bytes| bytes.to_vec())?;
        }
        Ok(wrapped)
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let others = self.0.in_flight.fetch_add(1, Ordering::SeqCst);
        let entered = self.enter(cx);
        if self.breaks(Behaviour::Concurrent) {
            thread::sleep(Duration::from_millis(5));
        }
        self.0.in_flight.fetch_sub(1, Ordering::SeqCst);
        entered?;
        if self.breaks(Behaviour::Concurrent) && others > 0 {
            return Err(KmsError::new(KmsClass::Unreachable));
        }
        if self.breaks(Behaviour::RoundTrip) {
            return Ok(KeyPayload::from_bytes(&mut key.blob.clone())?);
        }
        let cx = if self.breaks(Behaviour::ContextBound) { &unbound(cx) } else { cx };
        let opened = self.0.key.unwrap_key(key, cx);
        if self.breaks(Behaviour::RotationAtTheService) && key.key_version != "0" {
            return Err(KmsError::new(KmsClass::BadCiphertext));
        }
        let lies = self.breaks(Behaviour::Tampered) || self.breaks(Behaviour::OtherKey);
        match (opened, &*lock(&self.0.last)) {
            (Err(error), Some(last)) if lies && error.class == KmsClass::BadCiphertext => {
                Ok(KeyPayload::from_bytes(&mut last.clone())?)
            }
            (opened, _) => opened,
        }
    }

    fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.enter(cx)?;
        let rewrapped = self.0.key.rewrap_key(key, cx)?;
        let blob = if self.breaks(Behaviour::Rewrap) { rewrapped.blob[1..].to_vec() } else { rewrapped.blob };
        Ok(WrappedKey { blob, ..rewrapped })
    }

    fn check(&self, probe: &WrappedKey, cx: &WrapContext<'_>) -> Result<(), KmsError> {
        if self.breaks(Behaviour::StoredProbe) { Ok(()) } else { self.unwrap_key(probe, cx).map(drop) }
    }
}

fn unbound<'a>(cx: &WrapContext<'a>) -> WrapContext<'a> {
    WrapContext { cluster: ClusterId::from_bytes([0; 16]), database: None, ..*cx }
}

impl KeyService for Model {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.clone())
    }

    fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Cannot> {
        Ok(Arc::new(Self::named("other", None)))
    }

    fn perform(&self, step: Step) -> Result<(), Cannot> {
        let verdict = match step {
            Step::Disable => Some(KmsClass::Disabled),
            Step::Delete => Some(KmsClass::Deleted),
            Step::Deny | Step::SpoilCredentials => Some(KmsClass::Denied),
            Step::Restore if self.breaks(Behaviour::Restored) => Some(KmsClass::Disabled),
            Step::FixCredentials if self.breaks(Behaviour::CredentialsFixedInPlace) => Some(KmsClass::Denied),
            Step::Enable | Step::Restore | Step::Allow | Step::FixCredentials => None,
            Step::Rotate => {
                self.0.key.rotate();
                return Ok(());
            }
        };
        *lock(&self.0.verdict) = verdict;
        Ok(())
    }

    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        *lock(&self.0.fault) = fault;
        Ok(())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(10)
    }
}

#[test]
fn a_sound_wrapper_passes_every_row() {
    let report = run(&Model::new(None), &[]);
    report.assert_passed();
    let runtimes = if cfg!(feature = "tokio") { 0 } else { 2 };
    assert_eq!((report.passed(), report.skipped()), (Behaviour::ALL.len() - runtimes, runtimes));
}

#[test]
fn a_wrapper_that_breaks_one_promise_fails_its_row() {
    let rows = Behaviour::ALL.into_iter().filter(|row| {
        cfg!(feature = "tokio") || !matches!(row, Behaviour::InMultiThreadRuntime | Behaviour::InCurrentThreadRuntime)
    });
    let outcomes = rows.map(|row| thread::spawn(move || (row, try_one(&Model::new(row), row))));
    for (row, outcome) in outcomes.collect::<Vec<_>>().into_iter().map(|row| row.join().unwrap()) {
        assert!(matches!(outcome, Outcome::Failed(_)), "{row}: {outcome:?}");
    }
}

#[test]
fn a_row_leaves_all_well_and_says_so_if_it_cannot() {
    let model = Model::new(None);
    for row in [Behaviour::Disabled, Behaviour::Deleted, Behaviour::StoredProbe, Behaviour::BlackHole] {
        assert_eq!(try_one(&model, row), Outcome::Passed);
        assert_eq!((*lock(&model.0.verdict), *lock(&model.0.fault)), (None, Fault::None), "{row}");
    }
    let stuck = Model::new(Behaviour::Restored);
    let outcome = try_one(&stuck, Behaviour::Deleted);
    assert!(matches!(&outcome, Outcome::Failed(why) if why.starts_with("afterwards")), "{outcome:?}");
}

#[test]
fn a_quirk_must_be_real_and_a_service_without_a_step_is_skipped() {
    let broken = Model::new(Behaviour::Disabled);
    let quirks = [(Behaviour::Disabled, "this model says deleted")];
    assert_eq!(judged(&broken, Behaviour::Disabled, &quirks), Outcome::Skipped("this model says deleted".into()));
    let outcome = judged(&Model::new(None), Behaviour::Disabled, &quirks);
    assert!(matches!(&outcome, Outcome::Failed(why) if why.contains("no quirk any more")), "{outcome:?}");

    struct Bare(Model);
    impl KeyService for Bare {
        fn wrapper(&self) -> Arc<dyn KeyWrapper> {
            self.0.wrapper()
        }
        fn perform(&self, _: Step) -> Result<(), Cannot> {
            Err(Cannot::new("no states"))
        }
        fn inflict(&self, _: Fault) -> Result<(), Cannot> {
            Err(Cannot::new("no network"))
        }
    }
    let report = run(&Bare(Model::new(None)), &[]);
    report.assert_passed();
    assert_eq!(*report.outcome(Behaviour::Disabled), Outcome::Skipped("no states".into()));
    assert_eq!(*report.outcome(Behaviour::BlackHole), Outcome::Skipped("no network".into()));
    assert_eq!(*report.outcome(Behaviour::RoundTrip), Outcome::Passed);
    assert!(report.to_string().contains("skipped: there is one key only"), "{report}");
}

#[test]
#[should_panic(expected = "disabled                     FAILED")]
fn a_failed_row_is_shown_in_its_table() {
    run(&Model::new(Behaviour::Disabled), &[]).assert_passed();
}

/// Answers each line with itself.
fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok(read @ 1..) = stream.read(&mut buffer) {
                    stream.write_all(&buffer[..read]).unwrap();
                }
            });
        }
    });
    address
}

/// What comes back for "hello", within a second.
fn ask(front: &Front) -> Result<Vec<u8>, ErrorKind> {
    let outcome = TcpStream::connect(front.address()).and_then(|stream| ask_over(&stream));
    outcome.map_err(|error| error.kind())
}

fn ask_over(mut stream: &TcpStream) -> std::io::Result<Vec<u8>> {
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(b"hello")?;
    let mut answer = vec![0; 64];
    let read = stream.read(&mut answer)?;
    answer.truncate(read);
    Ok(answer)
}

#[test]
fn a_front_passes_on_refuses_hangs_resets_and_answers() {
    let front = Front::before(echo()).unwrap();
    for _ in 0..3 {
        front.set(Passage::Open);
        assert_eq!(ask(&front).unwrap(), b"hello");
        front.set(Passage::Refuse);
        assert_eq!(ask(&front), Err(ErrorKind::ConnectionRefused));
        front.set(Passage::Hang);
        assert_eq!(ask(&front), Err(ErrorKind::WouldBlock));
        front.set(Passage::Reset);
        assert!(ask(&front).is_ok_and(|answer| answer.is_empty()) || ask(&front).is_err());
    }
    let answer = http_answer("429 Too Many Requests", &[("Retry-After", "3")], "slow down");
    front.set(Passage::Answer(answer.clone()));
    let mut stream = TcpStream::connect(front.address()).unwrap();
    stream.write_all(b"POST / HTTP/1.1\r\nContent-Length: 3\r\n\r\nab").unwrap();
    thread::sleep(Duration::from_millis(20));
    stream.write_all(b"c").unwrap();
    let mut answered = Vec::new();
    stream.read_to_end(&mut answered).unwrap();
    assert_eq!(answered, answer);
    assert!(answered.starts_with(b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: 9\r\n"));
}

#[test]
fn no_connection_that_was_kept_alive_escapes_a_front() {
    let front = Front::before(echo()).unwrap();
    let kept = TcpStream::connect(front.address()).unwrap();
    assert_eq!(ask_over(&kept).unwrap(), b"hello");
    assert_eq!(ask_over(&kept).unwrap(), b"hello");
    front.set(Passage::Hang);
    assert!(ask_over(&kept).map_or(true, |answer| answer.is_empty()));
    assert_eq!(front.connections(), 1);
}
