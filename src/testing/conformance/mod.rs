//! The conformance suite for [`KeyWrapper`]s (feature `test-util`): what pageseal relies on, row by row, against a key service
//! that does as the suite says.
//!
//! For a wrapper of your own, implement [`KeyService`]: the wrapper, and how to disable its key, revoke its rights and so on
//! at the service. [`Front`] is a proxy that loses, delays and throttles what passes through it. Then [`run`] tries each
//! [`Behaviour`]; what a service cannot do is skipped, with the reason, and what it does otherwise is a quirk that must be
//! named. pageseal's own adapters are held to the same rows; docs/KMS.md shows the table.
//!
//! ```
//! use std::sync::Arc;
//! use pageseal::testing::conformance::{Cannot, Fault, KeyService, Step, run};
//! use pageseal::{KeyWrapper, KmsClass, ScriptedWrapper};
//!
//! struct Scripted(ScriptedWrapper);
//!
//! impl KeyService for Scripted {
//!     fn wrapper(&self) -> Arc<dyn KeyWrapper> {
//!         Arc::new(self.0.clone())
//!     }
//!     fn perform(&self, step: Step) -> Result<(), Cannot> {
//!         match step {
//!             Step::Disable => self.0.disable(),
//!             Step::Enable => self.0.restore(),
//!             _ => return Err(Cannot::new("this example shows two steps only")),
//!         }
//!         Ok(())
//!     }
//!     fn inflict(&self, _: Fault) -> Result<(), Cannot> {
//!         Err(Cannot::new("there is no network in between"))
//!     }
//! }
//!
//! let report = run(&Scripted(ScriptedWrapper::new("key")), &[]);
//! report.assert_passed();
//! println!("{report}");
//! ```

mod copies;
mod front;
mod rows;
mod trial;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

pub use copies::{Copies, copies_left};
pub use front::{Front, Passage, http_answer};

use crate::keys::wrapper::{KeyWrapper, WrapContext};
use crate::secret::KeyPayload;
use trial::{Binding, Sample, Stop, Trial};

/// A master key at a key service, and the means to change its fate.
pub trait KeyService: Send + Sync {
    /// A wrapper of the master key, with credentials that are in order. Each call may return the same one: every step and
    /// fault must reach those that were returned before.
    fn wrapper(&self) -> Arc<dyn KeyWrapper>;

    /// A wrapper of another master key at the same service.
    ///
    /// # Errors
    /// [`Cannot`], if there is no other.
    fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Cannot> {
        Err(Cannot::new("there is one key only"))
    }

    /// Changes the master key or the rights to it, and returns when that has taken effect. Each step is undone by its
    /// opposite before the next row.
    ///
    /// # Errors
    /// [`Cannot`], if the service has no such step. A step that should work and does not: panic.
    fn perform(&self, step: Step) -> Result<(), Cannot>;

    /// Disturbs the way to the service, until the next call. [`Fault::None`] is asked for at the end of each row.
    ///
    /// # Errors
    /// [`Cannot`], if that cannot be done.
    fn inflict(&self, fault: Fault) -> Result<(), Cannot>;

    /// How long a call may take that should succeed.
    fn patience(&self) -> Duration {
        Duration::from_secs(20)
    }
}

/// What happens to the master key at the service, or to the credentials.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Step {
    /// Disable the key.
    Disable,
    /// Enable it again.
    Enable,
    /// Delete the key, or schedule that.
    Delete,
    /// Take that back: the same key can be used again.
    Restore,
    /// Take the right to use the key from the wrapper's identity.
    Deny,
    /// Give it back.
    Allow,
    /// Put credentials that the service refuses in the place of the wrapper's own.
    SpoilCredentials,
    /// Put good ones there.
    FixCredentials,
    /// Make a new version of the key at the service, which wraps from now on. Not undone.
    Rotate,
}

impl Step {
    fn opposite(self) -> Option<Self> {
        match self {
            Self::Disable => Some(Self::Enable),
            Self::Delete => Some(Self::Restore),
            Self::Deny => Some(Self::Allow),
            Self::SpoilCredentials => Some(Self::FixCredentials),
            Self::Enable | Self::Restore | Self::Allow | Self::FixCredentials | Self::Rotate => None,
        }
    }
}

/// What happens on the way to the service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Fault {
    /// Nothing: all is well.
    None,
    /// Nobody listens.
    Refuse,
    /// Connections are accepted and then closed.
    Reset,
    /// Connections are accepted, and nothing ever comes back.
    Hang,
    /// The service asks to come back after so long, in whole seconds.
    Throttle(Duration),
    /// The service fails with one of its 5xx answers.
    ServerError,
    /// A 503 whose body is a page of HTML, as proxies and load balancers send it.
    ProxyError,
}

impl Fault {
    /// What a [`Front`] does for it; `answer` makes the service's own bytes for a call that is throttled or fails
    /// ([`http_answer`]).
    pub fn passage(self, answer: impl FnOnce(Self) -> Vec<u8>) -> Passage {
        match self {
            Self::None => Passage::Open,
            Self::Refuse => Passage::Refuse,
            Self::Reset => Passage::Reset,
            Self::Hang => Passage::Hang,
            Self::Throttle(_) | Self::ServerError | Self::ProxyError => Passage::Answer(answer(self)),
        }
    }
}

/// Why a service cannot do what the suite wants.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cannot(String);

impl Cannot {
    /// The reason, as a phrase.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

/// What pageseal relies on: one row of the table each.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
#[non_exhaustive]
#[allow(missing_docs)] // `promise` says what each is.
pub enum Behaviour {
    RoundTrip,
    ContextBound,
    Tampered,
    OtherKey,
    Disabled,
    Deleted,
    Restored,
    Denied,
    CredentialsFixedInPlace,
    Unreachable,
    ServerError,
    BlackHole,
    Throttled,
    RotationAtTheService,
    Rewrap,
    StoredProbe,
    Concurrent,
    InMultiThreadRuntime,
    InCurrentThreadRuntime,
    WithoutRuntime,
    HangingIsAbandoned,
    ClusterLife,
}

impl Behaviour {
    /// All rows, in the order of the table.
    pub const ALL: [Self; 22] = [
        Self::RoundTrip,
        Self::ContextBound,
        Self::Tampered,
        Self::OtherKey,
        Self::Disabled,
        Self::Deleted,
        Self::Restored,
        Self::Denied,
        Self::CredentialsFixedInPlace,
        Self::Unreachable,
        Self::ServerError,
        Self::BlackHole,
        Self::Throttled,
        Self::RotationAtTheService,
        Self::Rewrap,
        Self::StoredProbe,
        Self::Concurrent,
        Self::InMultiThreadRuntime,
        Self::InCurrentThreadRuntime,
        Self::WithoutRuntime,
        Self::HangingIsAbandoned,
        Self::ClusterLife,
    ];

    /// What must hold.
    pub fn promise(self) -> &'static str {
        match self {
            Self::RoundTrip => "what was wrapped comes back unchanged, in a blob that shows none of it",
            Self::ContextBound => "a wrapped key opens for its own cluster, database, generation and purpose only",
            Self::Tampered => "a changed blob is refused as a bad ciphertext",
            Self::OtherKey => "what another master key wrapped is refused",
            Self::Disabled => "a disabled key is told as such, and works again when it is enabled",
            Self::Deleted => "a deleted key is told as such",
            Self::Restored => "a restored key opens what it wrapped before",
            Self::Denied => "a missing right is told as such, and works again when it is given",
            Self::CredentialsFixedInPlace => {
                "refused credentials are told as such, and the same wrapper works with good ones"
            }
            Self::Unreachable => "a refused or broken connection says nothing about the key",
            Self::ServerError => "a 5xx says nothing about the key, whatever its body is",
            Self::BlackHole => "a service that never answers costs no more than the deadline",
            Self::Throttled => "a throttled call is told as such, with the time to come back",
            Self::RotationAtTheService => "after a rotation at the service, old wrappings open",
            Self::Rewrap => "a rewrapped key opens, and is wrapped by the current version",
            Self::StoredProbe => "the stored probe tells whether the key can be used",
            Self::Concurrent => "200 calls at the same time all succeed",
            Self::InMultiThreadRuntime => "calls work inside a multi-threaded tokio runtime",
            Self::InCurrentThreadRuntime => "calls work inside a current-thread tokio runtime",
            Self::WithoutRuntime => "calls work without any runtime",
            Self::HangingIsAbandoned => "while the service hangs, a cluster goes on with its other master key",
            Self::ClusterLife => "a cluster is made, opened, refused while the key is unusable, and opened again",
        }
    }
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match self {
            Self::RoundTrip => "round trip",
            Self::ContextBound => "context bound",
            Self::Tampered => "tampered",
            Self::OtherKey => "other key",
            Self::Disabled => "disabled",
            Self::Deleted => "deleted",
            Self::Restored => "restored",
            Self::Denied => "denied",
            Self::CredentialsFixedInPlace => "credentials fixed in place",
            Self::Unreachable => "unreachable",
            Self::ServerError => "server error",
            Self::BlackHole => "black hole",
            Self::Throttled => "throttled",
            Self::RotationAtTheService => "rotation at the service",
            Self::Rewrap => "rewrap",
            Self::StoredProbe => "stored probe",
            Self::Concurrent => "200 concurrent calls",
            Self::InMultiThreadRuntime => "in a multi-thread runtime",
            Self::InCurrentThreadRuntime => "in a current-thread runtime",
            Self::WithoutRuntime => "without a runtime",
            Self::HangingIsAbandoned => "hanging call abandoned",
            Self::ClusterLife => "life of a cluster",
        };
        f.pad(name)
    }
}

/// How a row ended.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub enum Outcome {
    /// The promise held.
    Passed,
    /// The service cannot show it, for this reason.
    Skipped(String),
    /// The promise did not hold, or a quirk that was named is not there.
    Failed(String),
}

/// The outcome of every row for one service.
#[derive(Clone, Debug)]
pub struct Report(Vec<(Behaviour, Outcome)>);

impl Report {
    /// Every row with its outcome, in the order of [`Behaviour::ALL`].
    pub fn rows(&self) -> &[(Behaviour, Outcome)] {
        &self.0
    }

    /// How `behaviour` ended.
    pub fn outcome(&self, behaviour: Behaviour) -> &Outcome {
        let row = self.0.iter().find(|row| row.0 == behaviour);
        &row.expect("a report has every row").1
    }

    /// How many rows passed.
    pub fn passed(&self) -> usize {
        self.0.iter().filter(|row| row.1 == Outcome::Passed).count()
    }

    /// How many rows were skipped.
    pub fn skipped(&self) -> usize {
        self.0.iter().filter(|row| matches!(row.1, Outcome::Skipped(_))).count()
    }

    /// How many rows failed.
    pub fn failed(&self) -> usize {
        self.0.len() - self.passed() - self.skipped()
    }

    /// # Panics
    /// If a row failed, with the whole table.
    pub fn assert_passed(&self) {
        assert!(self.failed() == 0, "{} of {} rows failed:\n{self}", self.failed(), self.0.len());
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (behaviour, outcome) in &self.0 {
            match outcome {
                Outcome::Passed => writeln!(f, "{behaviour:<28} passed")?,
                Outcome::Skipped(why) => writeln!(f, "{behaviour:<28} skipped: {why}")?,
                Outcome::Failed(why) => writeln!(f, "{behaviour:<28} FAILED: {why}")?,
            }
        }
        Ok(())
    }
}

/// Tries every row against `service`. The rows that `quirks` names are tried too, and must fail: they count as skipped, with
/// the reason given there, and as failed when they pass, so that no quirk is kept longer than it lasts.
pub fn run(service: &dyn KeyService, quirks: &[(Behaviour, &str)]) -> Report {
    Report(Behaviour::ALL.into_iter().map(|behaviour| (behaviour, judged(service, behaviour, quirks))).collect())
}

/// Tries one row, without regard to quirks.
pub fn try_one(service: &dyn KeyService, behaviour: Behaviour) -> Outcome {
    let trial = Trial::new(service);
    let ended = catch_unwind(AssertUnwindSafe(|| rows::attempt(behaviour, &trial)));
    let undone = catch_unwind(AssertUnwindSafe(|| trial.undo()));
    match (ended, undone) {
        (Ok(Ok(())), Ok(Ok(()))) => Outcome::Passed,
        (Ok(Err(Stop::Cannot(Cannot(why)))), Ok(Ok(()))) => Outcome::Skipped(why),
        (Ok(Err(Stop::Failed(why))), _) => Outcome::Failed(why),
        (Err(panic), _) => Outcome::Failed(format!("panicked: {}", text_of(&*panic))),
        (_, Ok(Err(why))) => Outcome::Failed(format!("afterwards: {why}")),
        (_, Err(panic)) => Outcome::Failed(format!("afterwards, panicked: {}", text_of(&*panic))),
    }
}

/// A context for a data key, with this time left: for tests that call a wrapper themselves.
pub fn context(timeout: Duration) -> WrapContext<'static> {
    Binding::DATA.context(timeout)
}

/// A payload as pageseal makes them, for a key of [`context`], with random keys in it.
pub fn payload() -> KeyPayload {
    Sample::new(&Binding::DATA).into_payload()
}

fn judged(service: &dyn KeyService, behaviour: Behaviour, quirks: &[(Behaviour, &str)]) -> Outcome {
    let quirk = quirks.iter().find(|quirk| quirk.0 == behaviour).map(|quirk| quirk.1);
    match (try_one(service, behaviour), quirk) {
        (Outcome::Failed(_), Some(why)) => Outcome::Skipped(why.to_owned()),
        (Outcome::Passed, Some(why)) => Outcome::Failed(format!("it passed, so this is no quirk any more: {why}")),
        (outcome, _) => outcome,
    }
}

fn text_of(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("without a text")
}

#[cfg(test)]
mod tests;
