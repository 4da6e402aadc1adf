//! [`FromAsync`]: a [`KeyWrapper`] made of an asynchronous implementation (feature `tokio`).
//!
//! The thread that calls polls the future itself, inside the context of a runtime whose own thread drives sockets and timers.
//! So nothing is handed from thread to thread, a payload is lent and never copied, a future that blocks stops its own call
//! only, and a caller who is inside a runtime of their own is merely blocked.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::runtime::{Builder, Handle, Runtime};

use crate::error::{Error, ErrorKind, KmsClass, KmsError, PageError};
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::secret::KeyPayload;

/// A [`KeyWrapper`] whose calls are asynchronous, as most SDKs are. [`FromAsync`] makes a `KeyWrapper` of it.
///
/// The methods are those of [`KeyWrapper`], with the same duties. The futures need not be `Send`: they are polled on the
/// calling thread only. They are dropped at [`WrapContext::deadline`], wherever they are then.
pub trait AsyncKeyWrapper: Send + Sync + 'static {
    /// As [`KeyWrapper::id`].
    fn id(&self) -> MasterKeyId;

    /// As [`KeyWrapper::wrap_key`].
    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> impl Future<Output = Result<WrappedKey, KmsError>>;

    /// As [`KeyWrapper::unwrap_key`].
    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> impl Future<Output = Result<KeyPayload, KmsError>>;

    /// As [`KeyWrapper::rewrap_key`].
    fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> impl Future<Output = Result<WrappedKey, KmsError>> {
        async move { self.wrap_key(&self.unwrap_key(key, cx).await?, cx).await }
    }

    /// As [`KeyWrapper::can_rewrap`].
    fn can_rewrap(&self, key: &WrappedKey) -> bool {
        key.master_key == self.id()
    }

    /// As [`KeyWrapper::check`].
    fn check(&self, probe: &WrappedKey, cx: &WrapContext<'_>) -> impl Future<Output = Result<(), KmsError>> {
        async move { self.unwrap_key(probe, cx).await.map(drop) }
    }

    /// As [`KeyWrapper::wrapping_is_public`].
    fn wrapping_is_public(&self) -> bool {
        false
    }
}

/// A [`KeyWrapper`] made of an [`AsyncKeyWrapper`].
///
/// Calls may come from any thread, inside a tokio runtime of either flavour or outside. A call that is not ready at its
/// deadline is dropped and counts as unreachable.
///
/// After a fork(2) the child must make a new one: clients keep connections and tasks that the child does not have, so that
/// calls through an inherited one are refused ([`KmsClass::Misconfigured`]).
///
/// ```
/// use pageseal::{AsyncKeyWrapper, FromAsync, KeyPayload, KmsClass, KmsError, MasterKeyId, WrapContext, WrappedKey, Wrappers};
///
/// struct MyService { /* a client of your SDK */ }
///
/// impl AsyncKeyWrapper for MyService {
///     fn id(&self) -> MasterKeyId {
///         MasterKeyId::new("my-service", "key-1")
///     }
///     async fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
///         # let _ = (key, cx);
///         // let blob = self.client.encrypt(key, cx.associated_data()).await?;
///         Err(KmsError::new(KmsClass::Unclassified))
///     }
///     async fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
///         # let _ = (key, cx);
///         Err(KmsError::new(KmsClass::Unclassified))
///     }
/// }
///
/// let wrappers = Wrappers::one(FromAsync::new(MyService {}));
/// # drop(wrappers);
/// ```
pub struct FromAsync<W> {
    inner: W,
    /// The caller's runtime, or none for the one that all adapters share.
    runtime: Option<Handle>,
    process: u32,
}

impl<W: AsyncKeyWrapper> FromAsync<W> {
    /// Runs on a tokio runtime of pageseal's own, with one thread for the whole process, which the first call starts.
    pub fn new(inner: W) -> Self {
        Self { inner, runtime: None, process: std::process::id() }
    }

    /// Runs in the context of the caller's tokio runtime, for clients that are bound to it. Its own threads drive sockets and
    /// timers: were it of the `current_thread` flavour, and pageseal called on its only thread, every call would end at its
    /// deadline.
    pub fn on(inner: W, runtime: Handle) -> Self {
        Self { runtime: Some(runtime), ..Self::new(inner) }
    }

    /// The asynchronous implementation.
    pub fn get_ref(&self) -> &W {
        &self.inner
    }

    fn run<T>(&self, deadline: Instant, future: impl Future<Output = Result<T, KmsError>>) -> Result<T, KmsError> {
        if self.process != std::process::id() {
            let forked = Error::with_source(
                ErrorKind::Forked,
                "this key wrapper was made before a fork, whose child has none of its connections; make a new one",
                PageError::Forked,
            );
            return Err(KmsError::with_source(KmsClass::Misconfigured, forked));
        }
        let runtime = match &self.runtime {
            Some(runtime) => runtime.clone(),
            None => shared_runtime()?,
        };
        let _context = runtime.enter();
        let asked = Instant::now();
        poll_until(deadline, future).unwrap_or_else(|| {
            let text = format!("no answer from the key service after {:?}", rounded(asked.elapsed()));
            Err(KmsError::with_source(KmsClass::Unreachable, text))
        })
    }
}

impl<W: AsyncKeyWrapper> KeyWrapper for FromAsync<W> {
    fn id(&self) -> MasterKeyId {
        self.inner.id()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.run(cx.deadline, self.inner.wrap_key(key, cx))
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.run(cx.deadline, self.inner.unwrap_key(key, cx))
    }

    fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.run(cx.deadline, self.inner.rewrap_key(key, cx))
    }

    fn can_rewrap(&self, key: &WrappedKey) -> bool {
        self.inner.can_rewrap(key)
    }

    fn check(&self, probe: &WrappedKey, cx: &WrapContext<'_>) -> Result<(), KmsError> {
        self.run(cx.deadline, self.inner.check(probe, cx))
    }

    fn wrapping_is_public(&self) -> bool {
        self.inner.wrapping_is_public()
    }
}

/// The runtime of this process, with one thread that drives sockets and timers. It is never dropped: a thread that is
/// inside another runtime must not drop one, and in a forked child the thread that would be joined does not exist.
fn shared_runtime() -> Result<Handle, KmsError> {
    static SHARED: ArcSwapOption<(u32, Handle)> = ArcSwapOption::const_empty();
    loop {
        let current = SHARED.load_full();
        if let Some(shared) = current.as_deref().filter(|(process, _)| *process == std::process::id()) {
            return Ok(shared.1.clone());
        }
        let runtime = new_runtime()?;
        let shared = Arc::new((std::process::id(), runtime.handle().clone()));
        let before = SHARED.compare_and_swap(&current, Some(shared));
        if before.as_ref().map(Arc::as_ptr) == current.as_ref().map(Arc::as_ptr) {
            std::mem::forget(runtime);
        } else {
            runtime.shutdown_background();
        }
    }
}

fn new_runtime() -> Result<Runtime, KmsError> {
    let built = Builder::new_multi_thread().worker_threads(1).thread_name("pageseal-kms-io").enable_all().build();
    built.map_err(|error| {
        let text = format!("starting the thread for asynchronous key services: {error}");
        Error::with_source(ErrorKind::Resources, text, error).into()
    })
}

/// Polls on this thread until the future is ready or the deadline has passed; then it is dropped.
fn poll_until<F: Future>(deadline: Instant, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let signal = Arc::new(Signal { thread: thread::current(), woken: AtomicBool::new(false) });
    let waker = Waker::from(Arc::clone(&signal));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // Looked at after each poll, for a future that wakes itself for ever.
            if left.is_zero() {
                return None;
            }
            // The flag, because a future that blocks may have used up the thread's own token.
            if signal.woken.swap(false, Ordering::Acquire) {
                break;
            }
            thread::park_timeout(left);
        }
    }
}

struct Signal {
    thread: Thread,
    woken: AtomicBool,
}

impl Wake for Signal {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.woken.store(true, Ordering::Release);
        self.thread.unpark();
    }
}

fn rounded(took: Duration) -> Duration {
    Duration::from_millis(took.as_millis().try_into().unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::keys::calls::fixtures::{payload, request};
    use crate::kms::scripted::ScriptedWrapper;

    /// Waits on a timer of the runtime, or for ever, and then does what the scripted key does.
    struct Slow {
        key: ScriptedWrapper,
        wait: Option<Duration>,
        dropped: Arc<AtomicUsize>,
    }

    impl Slow {
        fn new(wait: impl Into<Option<Duration>>) -> Self {
            Self { key: ScriptedWrapper::new("slow"), wait: wait.into(), dropped: Arc::default() }
        }

        async fn wait(&self) {
            let _counted = CountDrop(&self.dropped);
            match self.wait {
                Some(wait) => tokio::time::sleep(wait).await,
                None => std::future::pending().await,
            }
        }
    }

    struct CountDrop<'a>(&'a AtomicUsize);

    impl Drop for CountDrop<'_> {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    impl AsyncKeyWrapper for Slow {
        fn id(&self) -> MasterKeyId {
            self.key.id()
        }

        async fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
            self.wait().await;
            self.key.wrap_key(key, cx)
        }

        async fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
            self.wait().await;
            self.key.unwrap_key(key, cx)
        }

        fn wrapping_is_public(&self) -> bool {
            true
        }
    }

    fn context(timeout: Duration) -> WrapContext<'static> {
        let request = request();
        WrapContext {
            cluster: request.cluster,
            database: request.database,
            generation: request.generation,
            purpose: request.purpose,
            deadline: Instant::now() + timeout,
            label: "",
        }
    }

    const LONG: Duration = Duration::from_secs(60);

    fn round_trip(wrapper: &impl KeyWrapper) {
        let cx = context(LONG);
        let wrapped = wrapper.wrap_key(&payload(7), &cx).unwrap();
        let rewrapped = wrapper.rewrap_key(&wrapped, &cx).unwrap();
        assert_ne!(wrapped, rewrapped);
        wrapper.check(&rewrapped, &cx).unwrap();
        let opened = wrapper.unwrap_key(&rewrapped, &cx).unwrap();
        assert!(opened.with_bytes(|bytes| *bytes == [7; 128]).unwrap());
    }

    fn adapter() -> FromAsync<Slow> {
        FromAsync::new(Slow::new(Duration::from_millis(3)))
    }

    #[test]
    fn a_call_comes_from_any_thread_inside_a_runtime_of_either_flavour_or_outside() {
        round_trip(&adapter());
        let flavours = [
            Builder::new_current_thread().build().unwrap(),
            Builder::new_multi_thread().worker_threads(1).build().unwrap(),
        ];
        for runtime in flavours {
            runtime.block_on(async { round_trip(&adapter()) });
        }
    }

    #[test]
    fn the_callers_own_runtime_drives_what_is_bound_to_it() {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_time().build().unwrap();
        let wrapper = FromAsync::on(Slow::new(Duration::from_millis(3)), runtime.handle().clone());
        round_trip(&wrapper);
        runtime.block_on(async { round_trip(&wrapper) });
    }

    #[test]
    fn a_call_that_is_not_ready_at_its_deadline_is_dropped_and_unreachable() {
        let wrapper = FromAsync::new(Slow::new(None));
        let start = Instant::now();
        let error = wrapper.wrap_key(&payload(1), &context(Duration::from_millis(40))).unwrap_err();
        assert_eq!((error.class, wrapper.get_ref().dropped.load(Ordering::SeqCst)), (KmsClass::Unreachable, 1));
        assert!((Duration::from_millis(40)..LONG / 2).contains(&start.elapsed()), "{:?}", start.elapsed());
    }

    #[test]
    fn a_future_that_parks_its_thread_loses_no_wake() {
        struct Parks(bool);
        impl Future for Parks {
            type Output = ();
            fn poll(mut self: std::pin::Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
                if std::mem::replace(&mut self.0, true) {
                    return Poll::Ready(());
                }
                cx.waker().wake_by_ref();
                thread::park();
                Poll::Pending
            }
        }
        assert_eq!(poll_until(Instant::now() + LONG, Parks(false)), Some(()));
    }

    #[test]
    fn a_future_that_wakes_itself_for_ever_ends_at_the_deadline() {
        let restless = std::future::poll_fn(|cx| {
            cx.waker().wake_by_ref();
            Poll::<()>::Pending
        });
        assert_eq!(poll_until(Instant::now() + Duration::from_millis(30), restless), None);
    }

    #[test]
    fn what_hangs_costs_other_calls_nothing() {
        let hanging = Arc::new(FromAsync::new(Slow::new(None)));
        let calls: Vec<_> = (0..8)
            .map(|_| {
                let hanging = Arc::clone(&hanging);
                thread::spawn(move || {
                    hanging.wrap_key(&payload(1), &context(Duration::from_secs(2))).unwrap_err().class
                })
            })
            .collect();
        let start = Instant::now();
        round_trip(&adapter());
        assert!(start.elapsed() < Duration::from_secs(2));
        assert!(calls.into_iter().all(|call| call.join().unwrap() == KmsClass::Unreachable));
    }

    #[test]
    fn what_was_made_before_a_fork_is_refused_with_what_to_do() {
        let mut wrapper = adapter();
        wrapper.process ^= 1;
        let error = wrapper.wrap_key(&payload(1), &context(LONG)).unwrap_err();
        assert_eq!(error.class, KmsClass::Misconfigured);
        assert!(error.to_string().contains("make a new one"), "{error}");
    }

    #[test]
    fn what_the_implementation_overrides_is_asked_of_it() {
        let wrapper = adapter();
        assert_eq!(wrapper.id().to_string(), "scripted:slow");
        assert!(wrapper.wrapping_is_public());
        let wrapped = wrapper.wrap_key(&payload(1), &context(LONG)).unwrap();
        assert!(wrapper.can_rewrap(&wrapped));
        let other = WrappedKey { master_key: MasterKeyId::new("o", "o"), ..wrapped };
        assert!(!wrapper.can_rewrap(&other));
    }
}
