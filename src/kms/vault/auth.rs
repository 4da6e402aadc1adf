//! [`VaultAuth`], how a wrapper shows who it is; and [`Session`], the token that it has got by that.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use zeroize::Zeroizing;

use super::answer::{Asked, Call, Json, unexpected};
use super::http::{Head, Http, misconfigured};
use super::settings::checked_path;
use crate::error::{KmsClass, KmsError, Result};

/// Where Kubernetes puts the token of a pod's service account.
pub(super) const SERVICE_ACCOUNT_TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount/token";

/// Beyond any token, secret id or JWT.
const MAX_SECRET: usize = 16 * 1024;
/// A token that was refused although it is fresh: the policy is the reason, and another login would change nothing. For this
/// long, refusals of it cause no further login.
const BARRED: Duration = Duration::from_secs(2);
/// After a login that was refused, the same credentials are not shown again for this long; each time for twice as long. Servers
/// lock a role after some wrong logins, for everybody.
const FIRST_REST: Duration = Duration::from_secs(1);
const LONGEST_REST: Duration = Duration::from_secs(60);
/// A credential from a file that was refused may have been read while it was written: it is read again after this long.
const SECOND_LOOK: Duration = Duration::from_millis(500);
/// After a renewal that failed, the token is used on, and the next renewal tried no sooner.
const RENEWAL_PAUSE: Duration = Duration::from_secs(1);

/// How a [`VaultTransit`](super::VaultTransit) shows the server who it is.
///
/// | method | the token | when it ends |
/// |---|---|---|
/// | [`VaultAuth::token`] | as given; never renewed | calls are [`KmsClass::Denied`] until `replace_auth` |
/// | [`VaultAuth::token_file`] | read at each call, as the sink of a Vault agent | calls are [`KmsClass::Denied`] until the file has a new one |
/// | [`VaultAuth::app_role`], [`VaultAuth::app_role_with_secret_file`] | from a login | it is renewed, or a login made |
/// | [`VaultAuth::kubernetes`] | from a login | it is renewed, or a login made |
///
/// Secrets are held in buffers that are wiped on drop. What the HTTP client copies into its own buffers is not.
#[derive(Clone)]
pub struct VaultAuth {
    method: Method,
    mount: String,
}

#[derive(Clone)]
enum Method {
    Token(Zeroizing<String>),
    TokenFile(PathBuf),
    AppRole { role_id: Zeroizing<String>, secret: Secret },
    Kubernetes { role: String, jwt_file: PathBuf },
}

#[derive(Clone)]
enum Secret {
    Given(Zeroizing<String>),
    File(PathBuf),
}

impl VaultAuth {
    /// A token, used as long as the server takes it. It is not renewed: let an agent do that and use
    /// [`VaultAuth::token_file`], or use a login method.
    pub fn token(token: impl Into<String>) -> Self {
        Self::of(Method::Token(Zeroizing::new(token.into())), "")
    }

    /// The token in a file of at most 16 KiB, read at each call. White space around it is ignored.
    pub fn token_file(path: impl Into<PathBuf>) -> Self {
        Self::of(Method::TokenFile(path.into()), "")
    }

    /// The AppRole method, mounted at `approle`, with a secret id that does not change.
    pub fn app_role(role_id: impl Into<String>, secret_id: impl Into<String>) -> Self {
        let secret = Secret::Given(Zeroizing::new(secret_id.into()));
        Self::of(Method::AppRole { role_id: Zeroizing::new(role_id.into()), secret }, "approle")
    }

    /// The AppRole method, mounted at `approle`, with a secret id in a file that is read at each login.
    pub fn app_role_with_secret_file(role_id: impl Into<String>, path: impl Into<PathBuf>) -> Self {
        let secret = Secret::File(path.into());
        Self::of(Method::AppRole { role_id: Zeroizing::new(role_id.into()), secret }, "approle")
    }

    /// The Kubernetes method, mounted at `kubernetes`, with the token of this pod's service account, which is read from
    /// `/var/run/secrets/kubernetes.io/serviceaccount/token` at each login.
    pub fn kubernetes(role: impl Into<String>) -> Self {
        Self::of(Method::Kubernetes { role: role.into(), jwt_file: SERVICE_ACCOUNT_TOKEN.into() }, "kubernetes")
    }

    /// Where a login method is mounted, below `auth/`.
    pub fn mount(mut self, mount: impl Into<String>) -> Self {
        self.mount = mount.into();
        self
    }

    /// Where the JWT of [`VaultAuth::kubernetes`] is. Means nothing to other methods.
    pub fn jwt_file(mut self, path: impl Into<PathBuf>) -> Self {
        if let Method::Kubernetes { jwt_file, .. } = &mut self.method {
            *jwt_file = path.into();
        }
        self
    }

    fn of(method: Method, mount: &str) -> Self {
        Self { method, mount: mount.to_owned() }
    }

    /// That it can be sent at all.
    pub(super) fn checked(mut self) -> Result<Self> {
        let empty = |what: &str| Err(misconfigured(format!("the {what} is empty")));
        match &self.method {
            Method::Token(token) if token.trim().is_empty() => return empty("Vault token (VAULT_TOKEN)"),
            Method::Token(token) if !token.trim().bytes().all(|byte| byte.is_ascii_graphic()) => {
                return Err(misconfigured("the Vault token (VAULT_TOKEN) holds characters that no token has"));
            }
            Method::AppRole { role_id, .. } if role_id.is_empty() => return empty("role id (PAGESEAL_VAULT_ROLE_ID)"),
            Method::AppRole { secret: Secret::Given(secret), .. } if secret.is_empty() => {
                return empty("secret id (PAGESEAL_VAULT_SECRET_ID)");
            }
            Method::Kubernetes { role, .. } if role.is_empty() => {
                return empty("role (PAGESEAL_VAULT_KUBERNETES_ROLE)");
            }
            _ => {}
        }
        if self.logs_in() {
            self.mount = checked_path("mount of the auth method (PAGESEAL_VAULT_AUTH_MOUNT)", &self.mount)?;
        }
        Ok(self)
    }

    fn logs_in(&self) -> bool {
        matches!(self.method, Method::AppRole { .. } | Method::Kubernetes { .. })
    }

    fn secret_is_in_file(&self) -> bool {
        matches!(self.method, Method::AppRole { secret: Secret::File(_), .. } | Method::Kubernetes { .. })
    }

    /// The body of a login, with the secret as it is in its file now.
    fn login_body(&self) -> Result<Zeroizing<Vec<u8>>, KmsError> {
        match &self.method {
            Method::AppRole { role_id, secret: Secret::Given(secret) } => {
                Ok(object([("role_id", role_id), ("secret_id", secret)]))
            }
            Method::AppRole { role_id, secret: Secret::File(path) } => {
                let secret = read_secret(path, "secret id", "PAGESEAL_VAULT_SECRET_ID_FILE")?;
                Ok(object([("role_id", role_id), ("secret_id", &secret)]))
            }
            Method::Kubernetes { role, jwt_file } => {
                let jwt = read_secret(jwt_file, "service account token", "PAGESEAL_VAULT_KUBERNETES_JWT_FILE")?;
                Ok(object([("role", role), ("jwt", &jwt)]))
            }
            Method::Token(_) | Method::TokenFile(_) => Ok(Zeroizing::default()),
        }
    }
}

impl fmt::Debug for VaultAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let method = match &self.method {
            Method::Token(_) => "token",
            Method::TokenFile(_) => "token file",
            Method::AppRole { .. } => "AppRole",
            Method::Kubernetes { .. } => "Kubernetes",
        };
        f.debug_struct("VaultAuth").field("method", &method).finish_non_exhaustive()
    }
}

/// A JSON object of two texts, in a buffer that never grows.
fn object(members: [(&str, &str); 2]) -> Zeroizing<Vec<u8>> {
    // An escaped character takes at most six bytes for one.
    let length: usize = members.iter().map(|(name, text)| name.len() + 6 * text.len() + 8).sum();
    let mut body = Zeroizing::new(Vec::with_capacity(length + 2));
    for (index, (name, text)) in members.into_iter().enumerate() {
        body.push(if index == 0 { b'{' } else { b',' });
        body.extend_from_slice(format!("\"{name}\":").as_bytes());
        serde_json::to_writer(&mut *body, text).expect("a text can be written to memory");
    }
    body.push(b'}');
    body
}

/// The second text of an [`object`], as it stands there.
fn secret_of(body: &[u8]) -> &[u8] {
    let text = body.strip_suffix(b"\"}").unwrap_or_default();
    &text[text.iter().rposition(|&byte| byte == b'"').map_or(0, |quote| quote + 1)..]
}

/// The text of a file without the white space around it. A file that is not there or empty says nothing about the key, and
/// is as likely to be just being replaced as to be removed for good: hence no verdict.
fn read_secret(path: &Path, what: &str, variable: &str) -> Result<Zeroizing<String>, KmsError> {
    let refused = |why: &str| {
        let text = format!("the file {} with the {what} ({variable}) {why}", path.display());
        KmsError::with_source(KmsClass::Misconfigured, text)
    };
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET + 1));
    // Without waiting for whoever writes to a pipe.
    let opened = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    let read = opened.and_then(|file| file.take(MAX_SECRET as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|error| refused(&format!("cannot be read: {error}")))?;
    if bytes.len() > MAX_SECRET {
        return Err(refused("is too long for one"));
    }
    let text = std::str::from_utf8(&bytes).map_err(|_| refused("holds no text"))?.trim();
    if text.is_empty() {
        return Err(refused("is empty"));
    }
    Ok(Zeroizing::new(text.to_owned()))
}

/// A token that the server has given or the user.
pub(super) struct Token {
    text: Zeroizing<String>,
    /// Tells the tokens of one session apart.
    number: u64,
    /// Whether a call with it has succeeded.
    taken: AtomicBool,
    /// Ends after some uses, however long its lease is.
    limited: bool,
}

impl Token {
    fn given(text: Zeroizing<String>) -> Arc<Self> {
        Arc::new(Self { text, number: 0, taken: AtomicBool::new(false), limited: false })
    }

    /// Notes that the server took it.
    pub(super) fn was_taken(&self) {
        self.taken.store(true, Ordering::Relaxed);
    }

    pub(super) fn text(&self) -> &str {
        &self.text
    }
}

/// The token in use. All threads share it, and one of them at a time logs in or renews; the others wait for it, each until
/// its own deadline.
pub(super) struct Session {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    auth: Arc<VaultAuth>,
    /// Counts the replacements of `auth`: what began under another is of no interest any more.
    epoch: u64,
    current: Option<Current>,
    /// The number of the attempt (login or renewal) that a thread is making now.
    at_work: Option<u64>,
    attempts: u64,
    /// How the last attempt ended, if it failed.
    failure: Option<(u64, Failure)>,
    /// The last login, if the server refused it.
    rest: Option<Rest>,
}

struct Current {
    token: Arc<Token>,
    lease: Option<Lease>,
    barred_until: Option<Instant>,
    /// By a call. It is kept until a login brings another: should that fail, the server is asked with this one again, whose
    /// refusal says more than that of a login.
    refused: bool,
}

impl Current {
    fn lives(&self, now: Instant) -> bool {
        self.lease.is_none_or(|lease| now < lease.ends)
    }
}

struct Rest {
    until: Instant,
    length: Duration,
    /// What was sent.
    body: Zeroizing<Vec<u8>>,
    failure: Failure,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Lease {
    /// What the login gave: a renewal that gives much less is near the token's last end.
    granted: Duration,
    renew_at: Instant,
    ends: Instant,
    /// By the clock on the wall, which also counts the time that this machine sleeps.
    ends_by_wall: SystemTime,
    renewable: bool,
}

/// Counts the time that this machine sleeps, too.
#[allow(clippy::disallowed_methods)] // A lease is the server's, of the time that it is.
fn wall_clock() -> SystemTime {
    SystemTime::now()
}

impl Lease {
    /// None for a token that does not end.
    fn new(seconds: u64, renewable: bool, now: Instant) -> Option<Self> {
        let granted = Duration::from_secs(seconds.min(u64::from(u32::MAX)));
        (seconds > 0).then(|| Self {
            granted,
            renew_at: now + granted.mul_f64(2.0 / 3.0),
            ends: now + granted,
            ends_by_wall: wall_clock() + granted,
            renewable,
        })
    }

    fn renewed(&self, seconds: u64, renewable: bool, now: Instant) -> Option<Self> {
        let mut next = Self::new(seconds, renewable, now)?;
        next.renewable &= 2 * next.granted >= self.granted;
        next.granted = self.granted;
        Some(next)
    }

    /// After a renewal that failed.
    fn postpone(&mut self, now: Instant) {
        self.renew_at = now + (self.ends.saturating_duration_since(now) / 4).max(RENEWAL_PAUSE);
    }
}

/// A failure that several threads are told.
#[derive(Clone)]
struct Failure {
    class: KmsClass,
    retry_after: Option<Duration>,
    text: String,
    /// The thread that tried had no time left; another may have.
    ran_out: bool,
}

impl Failure {
    fn of(error: &KmsError, deadline: Instant) -> Self {
        let text = error.source.as_ref().map(ToString::to_string).unwrap_or_default();
        let ran_out = error.class == KmsClass::Unreachable && Instant::now() >= deadline;
        Self { class: error.class, retry_after: error.retry_after, text, ran_out }
    }

    fn to_error(&self) -> KmsError {
        KmsError { retry_after: self.retry_after, ..KmsError::with_source(self.class, self.text.clone()) }
    }
}

/// What a thread has to do to get a token.
enum Turn {
    Use(Arc<Token>),
    ReadFile(PathBuf),
    Work(Attempt),
}

struct Attempt {
    auth: Arc<VaultAuth>,
    epoch: u64,
    number: u64,
    /// To be renewed, instead of a login.
    renew: Option<(Arc<Token>, Lease)>,
}

impl Session {
    pub(super) fn new(auth: VaultAuth) -> Self {
        let state = State {
            auth: Arc::new(auth),
            epoch: 0,
            current: None,
            at_work: None,
            attempts: 0,
            failure: None,
            rest: None,
        };
        Self { state: Mutex::new(state), changed: Condvar::new() }
    }

    pub(super) fn replace(&self, auth: VaultAuth) {
        let mut state = self.lock();
        let (epoch, attempts) = (state.epoch + 1, state.attempts);
        *state =
            State { auth: Arc::new(auth), epoch, current: None, at_work: None, attempts, failure: None, rest: None };
        drop(state);
        self.changed.notify_all();
    }

    /// A token that is good as far as is known here; or a refused one, if there is no other.
    pub(super) fn token(&self, http: &Http, deadline: Instant) -> Result<Arc<Token>, KmsError> {
        self.good_token(http, deadline).or_else(|error| {
            let unclear = matches!(error.class, KmsClass::Unreachable | KmsClass::Throttled);
            let state = self.lock();
            let refused = state.current.as_ref().filter(|current| !unclear && current.lives(Instant::now()));
            refused.map(|current| Arc::clone(&current.token)).ok_or(error)
        })
    }

    /// Whether the server would take `token`, had nobody withdrawn it: it has taken it before, and its time is not over.
    pub(super) fn vouches_for(&self, token: &Token) -> bool {
        let state = self.lock();
        let own = state.current.as_ref().filter(|current| current.token.number == token.number);
        own.is_some_and(|own| {
            let lives = own.lives(Instant::now());
            let over = own.lease.is_some_and(|lease| lease.ends_by_wall <= wall_clock());
            lives && !over && !token.limited && token.taken.load(Ordering::Relaxed)
        })
    }

    fn good_token(&self, http: &Http, deadline: Instant) -> Result<Arc<Token>, KmsError> {
        loop {
            match self.next_turn(deadline)? {
                Turn::Use(token) => return Ok(token),
                Turn::ReadFile(path) => {
                    let text = read_secret(&path, "token", "PAGESEAL_VAULT_TOKEN_FILE")?;
                    return Ok(Token::given(text));
                }
                Turn::Work(attempt) => self.work(http, &attempt, deadline)?,
            }
        }
    }

    /// Another token after the server has refused `token`, if there may be a better one.
    pub(super) fn after_refusal(
        &self,
        token: &Token,
        http: &Http,
        deadline: Instant,
    ) -> Result<Option<Arc<Token>>, KmsError> {
        let from_file = {
            let mut state = self.lock();
            if let Some(own) = state.current.as_mut().filter(|current| current.token.number == token.number) {
                if own.barred_until.is_some_and(|until| Instant::now() < until) {
                    return Ok(None);
                }
                own.refused = true;
            }
            matches!(state.auth.method, Method::TokenFile(_))
        };
        let mut next = self.good_token(http, deadline)?;
        if from_file && next.text == token.text {
            wait_for_a_second_look(deadline);
            next = self.good_token(http, deadline)?;
        }
        Ok((next.text != token.text).then_some(next))
    }

    /// That `token` was refused too, although it was got just now.
    pub(super) fn bar(&self, token: &Token) {
        let mut state = self.lock();
        if let Some(current) = state.current.as_mut().filter(|current| current.token.number == token.number) {
            current.barred_until = Some(Instant::now() + BARRED);
        }
    }

    /// Waits for the thread that is at work, if there is one and no token.
    fn next_turn(&self, deadline: Instant) -> Result<Turn, KmsError> {
        let mut state = self.lock();
        loop {
            match &state.auth.method {
                Method::Token(text) => {
                    let text = Zeroizing::new(text.trim().to_owned());
                    return Ok(Turn::Use(Token::given(text)));
                }
                Method::TokenFile(path) => return Ok(Turn::ReadFile(path.clone())),
                Method::AppRole { .. } | Method::Kubernetes { .. } => {}
            }
            let now = Instant::now();
            let good = state.current.as_ref().filter(|current| !current.refused && current.lives(now));
            if let Some(current) = good {
                let due = current.lease.filter(|lease| lease.renew_at <= now);
                let Some(lease) = due.filter(|_| state.at_work.is_none()) else {
                    return Ok(Turn::Use(Arc::clone(&current.token)));
                };
                let renew = Some((Arc::clone(&current.token), lease));
                return Ok(Turn::Work(state.begin(renew)));
            }
            let Some(waited_for) = state.at_work else {
                return Ok(Turn::Work(state.begin(None)));
            };
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                let text = "another thread's login to the Vault server has not ended in time";
                return Err(KmsError::with_source(KmsClass::Unreachable, text));
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
            // Its failure is ours too, or 200 threads would try 200 logins one after the other.
            if let Some((number, failure)) = &state.failure
                && *number == waited_for
                && !failure.ran_out
            {
                return Err(failure.to_error());
            }
        }
    }

    /// Makes the attempt, and lets all know how it ended.
    fn work(&self, http: &Http, attempt: &Attempt, deadline: Instant) -> Result<(), KmsError> {
        // Also if what follows panics.
        let _ended = Ended { session: self, attempt };
        let Some((token, lease)) = &attempt.renew else {
            let current = self.login(http, attempt, deadline).inspect_err(|error| {
                let failure = Failure::of(error, deadline);
                self.settle(attempt, |state| state.failure = Some((attempt.number, failure)));
            })?;
            self.settle(attempt, |state| state.current = Some(current));
            return Ok(());
        };
        match renew(http, token, lease, half(deadline)) {
            Ok(lease) => self.settle(attempt, |state| {
                if let Some(current) = &mut state.current {
                    current.lease = lease;
                }
            }),
            Err(error) => {
                let unclear = matches!(error.class, KmsClass::Unreachable | KmsClass::Throttled);
                // The token will end for good: a new one, while the old one lasts.
                let next = if unclear { Err(error) } else { self.login(http, attempt, half(deadline)) };
                self.settle(attempt, |state| match (next, &mut state.current) {
                    (Ok(next), current) => *current = Some(next),
                    (Err(_), Some(Current { lease: Some(lease), .. })) => lease.postpone(Instant::now()),
                    (Err(_), _) => {}
                });
            }
        }
        Ok(())
    }

    /// Logs in, unless the server has just refused the very same.
    fn login(&self, http: &Http, attempt: &Attempt, deadline: Instant) -> Result<Current, KmsError> {
        let auth = &attempt.auth;
        let mut body = auth.login_body()?;
        let before = {
            let state = self.lock();
            let same = state.rest.as_ref().filter(|rest| rest.body == body);
            if let Some(rest) = same.filter(|rest| Instant::now() < rest.until) {
                return Err(rest.failure.to_error());
            }
            same.map(|rest| rest.length)
        };
        let mut outcome = login(http, auth, &body, attempt.number, deadline);
        let denied = outcome.as_ref().err().is_some_and(|error| error.class == KmsClass::Denied);
        if denied && before.is_none() && auth.secret_is_in_file() {
            wait_for_a_second_look(deadline);
            let again = auth.login_body()?;
            if again != body {
                outcome = login(http, auth, &again, attempt.number, deadline);
                body = again;
            }
        }
        let rest = match &outcome {
            Err(error) if matches!(error.class, KmsClass::Denied | KmsClass::Unclassified) => {
                let length = before.map_or(FIRST_REST, |before| (2 * before).min(LONGEST_REST));
                let failure = Failure::of(error, deadline);
                Some(Rest { until: Instant::now() + length, length, body, failure })
            }
            _ => None,
        };
        self.settle(attempt, |state| state.rest = rest);
        outcome
    }

    /// Notes an outcome, unless the credentials were replaced meanwhile.
    fn settle(&self, attempt: &Attempt, note: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        if state.epoch == attempt.epoch {
            note(&mut state);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn begin(&mut self, renew: Option<(Arc<Token>, Lease)>) -> Attempt {
        self.attempts += 1;
        self.at_work = Some(self.attempts);
        Attempt { auth: Arc::clone(&self.auth), epoch: self.epoch, number: self.attempts, renew }
    }
}

struct Ended<'a> {
    session: &'a Session,
    attempt: &'a Attempt,
}

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let mut state = self.session.lock();
        if state.at_work == Some(self.attempt.number) {
            state.at_work = None;
        }
        drop(state);
        self.session.changed.notify_all();
    }
}

/// Half of the time that is left: the rest is for the call that a token is renewed for.
fn half(deadline: Instant) -> Instant {
    let now = Instant::now();
    now + deadline.saturating_duration_since(now) / 2
}

fn wait_for_a_second_look(deadline: Instant) {
    thread::sleep(SECOND_LOOK.min(deadline.saturating_duration_since(Instant::now()) / 4));
}

fn login(http: &Http, auth: &VaultAuth, body: &[u8], number: u64, deadline: Instant) -> Result<Current, KmsError> {
    let path = format!("auth/{}/login", auth.mount);
    let asked = Asked { call: Call::Login, path: &path, namespace: http.namespace(), secret: secret_of(body) };
    let now = Instant::now();
    let json = http.post(&Head { path: &path, token: None, label: None, deadline }, body)?.into_json(&asked)?;
    let text = json.text("auth", "client_token").filter(|token| !token.is_empty());
    let text = text.ok_or_else(|| unexpected(&asked, "gave no token for the login (does it want a second factor?)"))?;
    let limited = json.number("auth", "num_uses").unwrap_or(0) > 0;
    let text = Zeroizing::new(text.to_owned());
    let token = Arc::new(Token { text, number, taken: AtomicBool::new(false), limited });
    Ok(Current { token, lease: lease_of(&json, now), barred_until: None, refused: false })
}

/// Counted from before the call, so as to end a little early rather than late.
fn lease_of(json: &Json, asked: Instant) -> Option<Lease> {
    let seconds = json.number("auth", "lease_duration").unwrap_or(0);
    Lease::new(seconds, json.flag("auth", "renewable").unwrap_or(false), asked)
}

fn renew(http: &Http, token: &Token, lease: &Lease, deadline: Instant) -> Result<Option<Lease>, KmsError> {
    let path = "auth/token/renew-self";
    let asked = Asked { call: Call::Renew, path, namespace: http.namespace(), secret: b"" };
    if !lease.renewable {
        return Err(unexpected(&asked, "does not renew this token"));
    }
    let now = Instant::now();
    let head = Head { path, token: Some(token.text()), label: None, deadline };
    let json = http.post(&head, b"{}")?.into_json(&asked)?;
    let seconds = json.number("auth", "lease_duration");
    let seconds = seconds.ok_or_else(|| unexpected(&asked, "gave no lease for the renewal"))?;
    Ok(lease.renewed(seconds, json.flag("auth", "renewable").unwrap_or(false), now))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_renewed_when_two_thirds_have_passed_and_left_when_little_more_is_given() {
        let now = Instant::now();
        let seconds = Duration::from_secs;
        let lease = Lease::new(90, true, now).unwrap();
        assert_eq!((lease.renew_at - now, lease.ends - now, lease.renewable), (seconds(60), seconds(90), true));
        assert_eq!(Lease::new(0, true, now), None);
        assert!(Lease::new(u64::MAX, true, now).is_some());
        assert!(lease.renewed(45, true, now).unwrap().renewable);
        assert!(!lease.renewed(44, true, now).unwrap().renewable);
        assert!(!lease.renewed(90, false, now).unwrap().renewable);
        // Halving again and again is noticed too.
        assert!(!lease.renewed(45, true, now).unwrap().renewed(23, true, now).unwrap().renewable);
        assert_eq!(lease.renewed(0, true, now), None);
    }

    #[test]
    fn a_login_is_proper_json_in_one_buffer_whatever_the_secret_is() {
        let secret = "a\"b\\c\n\u{1}é".repeat(100);
        let body = object([("role_id", "r"), ("secret_id", &secret)]);
        assert!(body.capacity() >= body.len());
        let parsed: serde_json::Value = serde_json::from_slice(&body).unwrap();
        assert_eq!(parsed, serde_json::json!({ "role_id": "r", "secret_id": secret }));
    }

    #[test]
    fn credentials_that_cannot_be_sent_are_told_by_their_variable() {
        for (auth, part) in [
            (VaultAuth::token(" \n"), "VAULT_TOKEN"),
            (VaultAuth::token("a b"), "VAULT_TOKEN"),
            (VaultAuth::token("é"), "VAULT_TOKEN"),
            (VaultAuth::app_role("", "s"), "PAGESEAL_VAULT_ROLE_ID"),
            (VaultAuth::app_role("r", ""), "PAGESEAL_VAULT_SECRET_ID"),
            (VaultAuth::kubernetes(""), "PAGESEAL_VAULT_KUBERNETES_ROLE"),
            (VaultAuth::app_role("r", "s").mount("a/../b"), "PAGESEAL_VAULT_AUTH_MOUNT"),
        ] {
            let error = auth.checked().err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(VaultAuth::token("s.abc\n").checked().is_ok());
    }

    #[test]
    fn a_secret_file_that_is_not_there_empty_or_too_long_is_no_verdict() {
        let path = std::env::temp_dir().join(format!("pageseal-secret-{}", std::process::id()));
        let class = || read_secret(&path, "secret id", "VARIABLE").map(|text| text.to_string());
        for content in [None, Some(vec![]), Some(b" \n".to_vec()), Some(vec![0xff]), Some(vec![b'x'; MAX_SECRET + 1])] {
            if let Some(content) = &content {
                std::fs::write(&path, content).unwrap();
            }
            let error = class().unwrap_err();
            assert_eq!(error.class, KmsClass::Misconfigured);
            let text = error.to_string();
            assert!(text.contains("VARIABLE") && text.contains("pageseal-secret"), "{text}");
        }
        std::fs::write(&path, "\nsecret\r\n").unwrap();
        assert_eq!(class().unwrap(), "secret");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn nothing_secret_is_shown() {
        let file = VaultAuth::app_role_with_secret_file("secret-role", "/f");
        for auth in [VaultAuth::token("secret-token"), VaultAuth::app_role("secret-role", "secret-id"), file] {
            assert!(!format!("{auth:?}").contains("secret-"), "{auth:?}");
        }
    }
}
