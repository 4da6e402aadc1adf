//! Errors: [`PageError`] on the page path (`Copy`, no allocation), [`KmsError`] from a wrapper, [`Error`] everywhere else.
//! None of them ever carries key bytes or plaintext.

use std::fmt;
use std::time::Duration;

use crate::ids::{DatabaseId, FileId, Generation, MasterKeyId};

/// The result of everything that is not a single page operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a page was not sealed or opened. The buffer that would have received plaintext holds zeros.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageError {
    /// This process is a fork of the one that opened the cluster; its keys were wiped. Drop the inherited handles, and open
    /// the cluster anew; a page file can be opened here once the parent has closed it.
    #[error("this process is a fork and holds no keys; drop its handles, and open the cluster anew")]
    Forked,
    /// The page is not what was sealed at this location, version and key: damaged, moved, swapped, or foreign. Which of
    /// these is not told, so that an attacker learns nothing. Restore the page from a replica or a backup.
    #[error("the page failed authentication; restore it from a replica or a backup")]
    Authentication,
    /// The page names a data key generation that this database does not have. Nothing about the page is authenticated.
    #[error("the page names generation {0}, which this database does not have")]
    UnknownGeneration(Generation),
    /// The slices do not fit: a sealed page is [`OVERHEAD`](crate::OVERHEAD) bytes longer than its payload, and a payload
    /// has at most [`MAX_PAYLOAD`](crate::MAX_PAYLOAD) bytes.
    #[error("the slices do not fit: a sealed page is 48 bytes longer than its payload")]
    Length,
    /// The system gave no random bytes for a new session. Try again; nothing was sealed.
    #[error("the system gave no random bytes for a new session; try again")]
    Randomness,
    /// No locked memory is left for a subkey. Raise `RLIMIT_MEMLOCK` (or systemd's `LimitMEMLOCK`) and try again.
    #[error("no locked memory is left for a subkey; raise RLIMIT_MEMLOCK")]
    LockedMemory,
    /// The job was not reached, because another job or the pool panicked. Nothing was sealed under it; submit it again.
    #[error("the page was not reached because the batch was interrupted; submit it again")]
    NotRun,
    /// The cluster is disabled, and its keys are wiped from memory. Restore the master key or the credentials; once the
    /// cluster is active again, the same handles work again. Nothing was read or written.
    #[error(
        "the cluster is disabled: restore the master key or the credentials, then retry; this handle works again then"
    )]
    Disabled,
    /// The database was dropped. Drop its handles.
    #[error("the database was dropped; drop its handles")]
    Dropped,
}

/// What the caller can do about an [`Error`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The key service did not answer. Retry; nothing is known about the key.
    Unreachable,
    /// The key service refused our credentials or its policy forbids the use. Fix them, then retry.
    Denied,
    /// The master key is disabled. Enable it at the provider, then retry.
    Disabled,
    /// The cluster was disabled and refuses reads and writes. Restore the master key or the credentials, then call
    /// `Cluster::retry`; the same handles work again afterwards. See [`PageError::Disabled`].
    Closed,
    /// The master key is gone. Restore exactly that key; no other opens this data.
    Deleted,
    /// A wrapped key was refused by the provider: another master key, or a tampered record. Check the configured key.
    BadCiphertext,
    /// The configuration cannot work (mode of a key file, names, sizes). Fix it; retrying will not help.
    Misconfigured,
    /// The wrapper failed in a way that nobody classified. Report it to the wrapper's author.
    Unclassified,
    /// The data is not what was written under this key: damaged, moved or substituted. Restore from a backup.
    Authentication,
    /// The structure on disk is broken at the place that the message names. Restore from a copy.
    Damaged,
    /// The keystore or file belongs to another cluster or database than the one expected.
    WrongIdentity,
    /// The keystore is older than a file that was written beside it: somebody put a copy back. The file is not opened; create
    /// nothing, and put the newest keystore back.
    KeystoreStale,
    /// The bytes use a version or feature that this build does not know. Use a newer build or the named feature.
    Unsupported,
    /// The call cannot be right (an empty name, a page out of range). Change the call.
    Invalid,
    /// There is no such cluster, database or file, or it was dropped.
    NotFound,
    /// A cluster, database or file of this name exists already.
    AlreadyExists,
    /// Somebody else needs what this call would take: another process, a handle, or an operation in flight. The message says
    /// who. Close it there, or try again.
    InUse,
    /// This process is a fork: see [`PageError::Forked`].
    Forked,
    /// The system lacks a resource: locked memory, random bytes, threads. The message names it.
    Resources,
    /// An input or output operation failed; `source()` has the system's error, unless an earlier failure is the reason.
    Io,
}

/// What went wrong, for which database and page, and what to do. See [`Error::kind`].
#[derive(thiserror::Error)]
#[error("{}", .0.message)]
pub struct Error(#[source] Box<Inner>);

struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// What the caller can do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self.kind(), ErrorKind::Unreachable | ErrorKind::InUse | ErrorKind::Resources)
    }

    /// When the key service said to come back, if it is the reason and did.
    pub fn retry_after(&self) -> Option<Duration> {
        let mut next: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(error) = next {
            if let Some(after) = error.downcast_ref::<KmsError>().and_then(|error| error.retry_after) {
                return Some(after);
            }
            next = error.source();
        }
        None
    }

    pub(crate) fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: None }))
    }

    pub(crate) fn with_source(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self(Box::new(Inner { kind, message: message.into(), source: Some(source.into()) }))
    }

    /// An I/O error while doing `what`, a phrase such as "writing the keystore /data/keystore".
    pub(crate) fn io(what: impl fmt::Display, source: std::io::Error) -> Self {
        Self::with_source(ErrorKind::Io, format!("{what}: {source}"), source)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn damaged(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Damaged, message)
    }

    /// A page error with the place where it happened.
    pub(crate) fn page(error: PageError, database: DatabaseId, file: FileId, page: u64) -> Self {
        let message = format!("page {page} of file {file} in database {database}: {error}");
        Self::with_source(page_kind(error), message, error)
    }

    /// A failure of the master key `key` while doing `what`, a phrase such as "unwrapping the cluster key".
    pub(crate) fn kms(error: KmsError, key: &MasterKeyId, what: impl fmt::Display) -> Self {
        // Our own want of memory is no trouble of the key service.
        let own = error.source.as_ref().and_then(|source| source.downcast_ref::<Self>());
        if let Some(own) = own.filter(|own| own.kind() == ErrorKind::Resources) {
            return Self::with_source(ErrorKind::Resources, format!("{what} with master key {key}: {own}"), error);
        }
        let message = format!("{what} with master key {key}: {error}");
        Self::with_source(error.class.error_kind(), message, error)
    }
}

impl std::error::Error for Inner {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

impl fmt::Display for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, self.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error({:?})", self.0)
    }
}

impl From<PageError> for Error {
    fn from(error: PageError) -> Self {
        Self::with_source(page_kind(error), error.to_string(), error)
    }
}

fn page_kind(error: PageError) -> ErrorKind {
    match error {
        PageError::Forked => ErrorKind::Forked,
        PageError::Authentication | PageError::UnknownGeneration(_) => ErrorKind::Authentication,
        PageError::Length => ErrorKind::Invalid,
        PageError::Randomness | PageError::LockedMemory | PageError::NotRun => ErrorKind::Resources,
        PageError::Disabled => ErrorKind::Closed,
        PageError::Dropped => ErrorKind::NotFound,
    }
}

/// How a [`KeyWrapper`](crate::KeyWrapper) failed. The provider decides, because only it knows its service's errors; the
/// class decides whether a running cluster goes on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum KmsClass {
    /// No answer: refused, DNS, time-out, 5xx, a sealed vault. Says nothing about the key.
    Unreachable,
    /// As `Unreachable`, because the service asked us to slow down (429); see [`KmsError::retry_after`].
    Throttled,
    /// Bad credentials or a policy that forbids the use.
    Denied,
    /// The key exists and is disabled.
    Disabled,
    /// The key is deleted, or scheduled for deletion.
    Deleted,
    /// The service answered that this ciphertext is not of this key or context, or is damaged.
    BadCiphertext,
    /// The configuration cannot work.
    Misconfigured,
    /// Anything else. Never served to a new open, never stops a running cluster.
    Unclassified,
}

impl KmsClass {
    /// Whether the provider gave a verdict against the use of the key. One verdict beats any success elsewhere.
    pub fn is_revocation(self) -> bool {
        matches!(self, Self::Denied | Self::Disabled | Self::Deleted)
    }

    fn error_kind(self) -> ErrorKind {
        match self {
            Self::Unreachable | Self::Throttled => ErrorKind::Unreachable,
            Self::Denied => ErrorKind::Denied,
            Self::Disabled => ErrorKind::Disabled,
            Self::Deleted => ErrorKind::Deleted,
            Self::BadCiphertext => ErrorKind::BadCiphertext,
            Self::Misconfigured => ErrorKind::Misconfigured,
            Self::Unclassified => ErrorKind::Unclassified,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Unreachable => "the key service is unreachable; try again",
            Self::Throttled => "the key service asked to slow down; try again later",
            Self::Denied => "access denied; check the credentials and the key's policy",
            Self::Disabled => "the master key is disabled; enable it to regain the data",
            Self::Deleted => "the master key is deleted; restore exactly this key",
            Self::BadCiphertext => "the wrapped key is not of this master key, or is damaged",
            Self::Misconfigured => "the configuration cannot work",
            Self::Unclassified => "unclassified failure",
        }
    }
}

impl fmt::Display for KmsClass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// A failed call to a [`KeyWrapper`](crate::KeyWrapper).
#[derive(Debug)]
pub struct KmsError {
    /// The provider's classification.
    pub class: KmsClass,
    /// When the service said to come back, if it did.
    pub retry_after: Option<Duration>,
    /// The provider's own error. Must hold no key bytes.
    pub source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl KmsError {
    /// A failure of this class without further detail.
    pub fn new(class: KmsClass) -> Self {
        Self { class, retry_after: None, source: None }
    }

    /// A failure of this class, with the provider's own error or a message.
    pub fn with_source(class: KmsClass, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self { class, retry_after: None, source: Some(source.into()) }
    }

    /// The same failure, with the time after which the service wants to be asked again.
    pub fn retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }
}

/// For wrappers, whose calls of [`KeyPayload`](crate::KeyPayload) fail with an [`Error`]: a lack of resources is a passing
/// trouble of ours and says nothing about the key; anything else is unclassified.
impl From<Error> for KmsError {
    fn from(error: Error) -> Self {
        let class = if error.kind() == ErrorKind::Resources { KmsClass::Unreachable } else { KmsClass::Unclassified };
        Self::with_source(class, error)
    }
}

impl fmt::Display for KmsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.class)?;
        match &self.source {
            Some(source) => write!(f, " ({source})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for KmsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_the_wrappers_own_error_as_its_source() {
        let own = KmsError::with_source(KmsClass::Disabled, "DisabledException");
        let error = Error::kms(own, &MasterKeyId::new("aws-kms", "k1"), "unwrapping the cluster key");
        assert_eq!(error.kind(), ErrorKind::Disabled);
        assert!(!error.is_retryable());
        let text = error.to_string();
        assert!(
            text.contains("aws-kms:k1") && text.contains("enable it") && text.contains("DisabledException"),
            "{text}"
        );
        let source = std::error::Error::source(&error).and_then(|inner| inner.source());
        assert!(source.is_some_and(|source| source.is::<KmsError>()));
    }

    #[test]
    fn an_error_says_when_the_service_wants_to_be_asked_again() {
        let after = Duration::from_secs(7);
        let throttled = KmsError::new(KmsClass::Throttled).retry_after(after);
        let error = Error::kms(throttled, &MasterKeyId::new("aws-kms", "k1"), "wrapping");
        let told = Error::with_source(error.kind(), "also another", error);
        assert_eq!(told.retry_after(), Some(after));
        let unreachable = Error::kms(KmsError::new(KmsClass::Unreachable), &MasterKeyId::new("a", "k"), "wrapping");
        assert_eq!((unreachable.retry_after(), Error::invalid("name").retry_after()), (None, None));
    }

    #[test]
    fn only_denied_disabled_and_deleted_are_verdicts() {
        use KmsClass::*;
        for class in [Unreachable, Throttled, BadCiphertext, Misconfigured, Unclassified] {
            assert!(!class.is_revocation(), "{class:?}");
        }
        for class in [Denied, Disabled, Deleted] {
            assert!(class.is_revocation(), "{class:?}");
        }
    }

    #[test]
    fn a_page_error_names_the_database_the_file_and_the_page() {
        let error = Error::page(PageError::Authentication, DatabaseId::from_bytes([0xab; 16]), FileId::new(0x17), 42);
        let text = error.to_string();
        assert!(text.contains("page 42"), "{text}");
        assert!(text.contains("0000000000000017") && text.contains("abababab"), "{text}");
        assert_eq!(error.kind(), ErrorKind::Authentication);
    }
}
