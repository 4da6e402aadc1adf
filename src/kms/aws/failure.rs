//! [`Failure`]: what a failed call to AWS KMS says about the key.
//!
//! A revocation (denied, disabled, deleted) is read from an error code of AWS only, never from an HTTP status alone: a proxy's
//! 403 must not stop a cluster. Sources: the error lists of Encrypt, Decrypt, ReEncrypt and DescribeKey, and "Common error
//! types", in the AWS KMS API Reference; "Key states of AWS KMS keys" in its Developer Guide.

use std::error::Error as StdError;
use std::time::Duration;

use aws_config::meta::ProviderChainError;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::error::{ConnectorError, ProvideErrorMetadata, SdkError};
use aws_sdk_kms::types::KeyState;

use super::transport::Watch;
use crate::error::{KmsClass, KmsError};

/// How much of a text from outside an error quotes.
const QUOTED: usize = 300;
/// A chain of credential sources has more to say.
const QUOTED_SOURCES: usize = 1200;
const ADVICE_ENDPOINT: &str = "is the endpoint AWS KMS? does a proxy in between change requests?";
const ADVICE_CLOCK: &str = "this machine's clock differs from AWS's by more than AWS allows: set it (NTP)";

/// A failed call.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) class: KmsClass,
    pub(super) reason: Reason,
    text: String,
    retry_after: Option<Duration>,
}

/// What kinds of failures the caller tells apart, beyond the class.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Reason {
    /// The credentials, or their source.
    Credentials,
    /// The credentials, which are too old.
    Expired,
    /// A policy.
    Policy,
    /// The named key or alias is not there.
    NotFound,
    /// The key is in a state that only DescribeKey tells.
    State,
    /// The service does not know the call.
    UnknownCall,
    Other,
}

impl Failure {
    pub(super) fn new(class: KmsClass, text: impl Into<String>) -> Self {
        Self { class, reason: Reason::Other, text: text.into(), retry_after: None }
    }

    /// Judges an error of the SDK.
    pub(super) fn of<E>(call: &str, error: &SdkError<E, HttpResponse>, watch: &Watch) -> Self
    where
        E: ProvideErrorMetadata + StdError + 'static,
    {
        let had_credentials = watch.has_loaded();
        let mut failure = match error {
            SdkError::ServiceError(refused) => Answer::new(refused.err(), refused.raw()).judge().or_outdated(watch),
            // It came, and cannot be read. The parser's text may quote what it read, so it is not shown.
            SdkError::ResponseError(unreadable) => Answer::unreadable(unreadable.raw()).judge(),
            SdkError::TimeoutError(_) => Self::new(KmsClass::Unreachable, "no answer in time"),
            SdkError::DispatchFailure(failed) => {
                let error: &(dyn StdError + 'static) = match failed.as_connector_error() {
                    Some(connector) => connector,
                    None => error_source(error),
                };
                not_sent(error, had_credentials)
            }
            other => not_sent(error_source(other), had_credentials),
        };
        failure.text = format!("{call}: {}", failure.text);
        failure
    }

    /// The same class and text for the caller of a wrapper.
    pub(super) fn into_error(self) -> KmsError {
        let error = KmsError::with_source(self.class, self.text);
        match self.retry_after {
            Some(after) => error.retry_after(after),
            None => error,
        }
    }

    pub(super) fn says(&self, what: &str) -> bool {
        self.text.contains(what)
    }

    /// Whoever is denied has lost a right, not the time: a source that renews what it gives, and gives what has expired, is
    /// out of order (an instance's metadata service prolongs its credentials by itself then), or this machine's clock is slow.
    fn or_outdated(self, watch: &Watch) -> Self {
        if self.reason != Reason::Expired || !watch.is_renewed() {
            return self;
        }
        let why = "the source of the AWS credentials gave ones that have expired, or this machine's clock is slow";
        self.reclassified(KmsClass::Unreachable, why)
    }

    pub(super) fn reclassified(self, class: KmsClass, why: &str) -> Self {
        Self { class, text: format!("{why} ({})", self.text), ..self }
    }
}

fn error_source<E: StdError + 'static>(error: &SdkError<E, HttpResponse>) -> &(dyn StdError + 'static) {
    // A dispatch failure and a construction failure always have one.
    struct Unknown;
    impl std::fmt::Debug for Unknown {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Unknown")
        }
    }
    impl std::fmt::Display for Unknown {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("the SDK did not send the request")
        }
    }
    impl StdError for Unknown {}
    error.source().unwrap_or(&Unknown)
}

/// An error answer, as far as it counts.
#[derive(Default)]
struct Answer {
    code: Option<String>,
    message: String,
    status: u16,
    retry_after: Option<Duration>,
    unreadable: bool,
    /// It is one of S3, or of what imitates it.
    of_s3: bool,
}

impl Answer {
    fn new(error: &impl ProvideErrorMetadata, raw: &HttpResponse) -> Self {
        let unreadable = Self::unreadable(raw);
        let body = raw.body().bytes().and_then(|body| std::str::from_utf8(body).ok()).unwrap_or_default();
        // The namespace of a `__type`, and what may follow the code in a header.
        let code = error.code().and_then(|code| code.rsplit('#').next()?.split(':').next());
        match code.filter(|code| !code.is_empty()) {
            Some(code) => {
                let message = error.message().unwrap_or_default();
                Self { code: Some(code.into()), message: message.into(), unreadable: false, ..unreadable }
            }
            // As AWS's query services answer, and gateways before the service.
            None => match xml_text(body, "Code") {
                Some(code) => {
                    let message = xml_text(body, "Message").unwrap_or_default().into();
                    let of_s3 = !body.contains("<ErrorResponse");
                    Self { code: Some(code.into()), message, unreadable: false, of_s3, ..unreadable }
                }
                None => Self { unreadable: false, ..unreadable },
            },
        }
    }

    fn unreadable(raw: &HttpResponse) -> Self {
        let retry_after = raw.headers().get("retry-after").and_then(|seconds| seconds.trim().parse().ok());
        Self {
            status: raw.status().as_u16(),
            retry_after: retry_after.map(Duration::from_secs),
            unreadable: true,
            ..Self::default()
        }
    }

    fn judge(self) -> Failure {
        let mut judgement = match self.code.as_deref() {
            Some(code) => judge_code(code, &self.message, self.status),
            None => judge_status(self.status),
        };
        // What another service says of its own rights says nothing about the key.
        if self.of_s3 && (judgement.0.is_revocation() || judgement.0 == KmsClass::BadCiphertext) {
            judgement = (KmsClass::Misconfigured, Reason::Other, Some(ADVICE_ENDPOINT));
        }
        let (class, reason, advice) = judgement;
        let mut text = match &self.code {
            Some(code) if self.message.is_empty() => quoted(code, QUOTED),
            Some(code) => format!("{}: {}", quoted(code, QUOTED), quoted(&self.message, QUOTED)),
            None if self.unreadable || self.status < 300 => {
                format!("HTTP {}, with an answer that cannot be read", self.status)
            }
            None => format!("HTTP {}, without an error code of AWS", self.status),
        };
        if let Some(advice) = advice {
            text = format!("{text}; {advice}");
        }
        let retry_after = self.retry_after.filter(|_| class == KmsClass::Throttled);
        Failure { class, reason, text, retry_after }
    }
}

type Judgement = (KmsClass, Reason, Option<&'static str>);

fn judge_code(code: &str, message: &str, status: u16) -> Judgement {
    use KmsClass::{BadCiphertext, Deleted, Denied, Disabled, Misconfigured, Throttled, Unclassified, Unreachable};
    match code {
        "InvalidCiphertextException" | "IncorrectKeyException" => (BadCiphertext, Reason::Other, None),
        "DisabledException" => (Disabled, Reason::Other, None),
        "NotFoundException" => (
            Deleted,
            Reason::NotFound,
            Some(
                "either it was deleted, or it never existed in this account and region: compare both with the key's ARN",
            ),
        ),
        "KMSInvalidStateException" => (judge_state_text(message), Reason::State, None),
        "RequestTimeTooSkewed" | "RequestExpired" => (Misconfigured, Reason::Other, Some(ADVICE_CLOCK)),
        "InvalidSignatureException" | "SignatureDoesNotMatch"
            if message.contains("Signature expired") || message.contains("Signature not yet current") =>
        {
            (Misconfigured, Reason::Other, Some(ADVICE_CLOCK))
        }
        "InvalidSignatureException" | "SignatureDoesNotMatch" if message.contains("Credential should be scoped to") => {
            (
                Misconfigured,
                Reason::Other,
                Some("the endpoint is in another region, or of another service, than is configured"),
            )
        }
        // Every request is signed: one that came without has passed a proxy that changed it, or has come to an API gateway.
        "IncompleteSignature"
        | "IncompleteSignatureException"
        | "MissingAuthenticationToken"
        | "MissingAuthenticationTokenException" => (Misconfigured, Reason::Other, Some(ADVICE_ENDPOINT)),
        "UnrecognizedClientException"
        | "InvalidClientTokenId"
        | "InvalidSignatureException"
        | "SignatureDoesNotMatch"
        | "TokenRefreshRequired"
        | "InvalidToken"
        | "AuthFailure" => (Denied, Reason::Credentials, None),
        "ExpiredToken" | "ExpiredTokenException" => (Denied, Reason::Expired, None),
        "AccessDeniedException" | "AccessDenied" | "NotAuthorized" | "UnauthorizedOperation" => {
            (Denied, Reason::Policy, None)
        }
        "OptInRequired" | "SubscriptionRequiredException" => (Denied, Reason::Policy, None),
        "ThrottlingException"
        | "Throttling"
        | "ThrottledException"
        | "TooManyRequestsException"
        | "TooManyRequests"
        | "RequestLimitExceeded"
        | "RequestThrottled"
        | "RequestThrottledException"
        | "LimitExceededException"
        | "SlowDown" => (Throttled, Reason::Other, None),
        "KMSInternalException"
        | "DependencyTimeoutException"
        | "KeyUnavailableException"
        | "InternalFailure"
        | "InternalError"
        | "InternalServerError"
        | "InternalServiceError"
        | "ServiceUnavailable"
        | "ServiceUnavailableException"
        | "RequestTimeout"
        | "RequestTimeoutException" => (Unreachable, Reason::Other, None),
        "InvalidArnException" | "ValidationException" | "ValidationError" => {
            (Misconfigured, Reason::Other, Some("check how the key is named"))
        }
        "InvalidKeyUsageException" | "UnsupportedOperationException" => (
            Misconfigured,
            Reason::Other,
            Some("a symmetric encryption key is needed (ENCRYPT_DECRYPT, SYMMETRIC_DEFAULT)"),
        ),
        "UnknownOperationException" | "UnknownOperation" | "InvalidAction" => {
            (Misconfigured, Reason::UnknownCall, Some("is the endpoint AWS KMS?"))
        }
        _ if status >= 500 => (Unreachable, Reason::Other, None),
        _ if status == 429 => (Throttled, Reason::Other, None),
        _ => (Unclassified, Reason::Other, None),
    }
}

fn judge_status(status: u16) -> Judgement {
    let class = match status {
        429 => KmsClass::Throttled,
        500.. => KmsClass::Unreachable,
        300..400 | 404 | 405 => {
            return (KmsClass::Misconfigured, Reason::Other, Some("is the endpoint AWS KMS?"));
        }
        400.. => return (KmsClass::Unclassified, Reason::Other, Some("it may come from a proxy in between")),
        _ => KmsClass::Unclassified,
    };
    (class, Reason::Other, None)
}

/// What the message of a KMSInvalidStateException says, for those who may not ask DescribeKey.
fn judge_state_text(message: &str) -> KmsClass {
    let says = |what: &str| message.contains(what);
    if says("is pending deletion") || says("is pending replica deletion") || says("is pending import") {
        KmsClass::Deleted
    } else if says("is disabled") {
        KmsClass::Disabled
    } else if says("is unavailable") || says("is creating") || says("is updating") {
        KmsClass::Unreachable
    } else {
        KmsClass::Unclassified
    }
}

/// What a key's state means, and what to do about it.
pub(super) fn judge_state(state: &KeyState) -> Option<(KmsClass, &'static str)> {
    Some(match state {
        KeyState::PendingDeletion => (
            KmsClass::Deleted,
            "the key is scheduled for deletion: cancel that, and enable the key, before it is too late",
        ),
        KeyState::PendingReplicaDeletion => (
            KmsClass::Deleted,
            "the multi-region key will be deleted when its last replica is: cancel that, and enable the key",
        ),
        // Deleting the imported material is how a customer takes such a key away at once.
        KeyState::PendingImport => (
            KmsClass::Deleted,
            "the key's imported material was deleted or has expired: import the same material again",
        ),
        KeyState::Disabled => (KmsClass::Disabled, "the key is disabled"),
        KeyState::Unavailable => (KmsClass::Unreachable, "the key store behind the key is not connected"),
        KeyState::Creating | KeyState::Updating | KeyState::Enabled => {
            (KmsClass::Unreachable, "the key's state is just changing")
        }
        _ => return None,
    })
}

/// A request that had no answer.
fn not_sent(error: &(dyn StdError + 'static), had_credentials: bool) -> Failure {
    if let Some(source) = find::<CredentialsError>(error) {
        let (class, text) = judge_source(source, had_credentials);
        return Failure { reason: Reason::Credentials, ..Failure::new(class, text) };
    }
    let text = quoted(&chain_text(error), QUOTED);
    if let Some(tls) = find::<rustls::Error>(error) {
        return judge_tls(tls, text);
    }
    let Some(connector) = find::<ConnectorError>(error) else {
        // The cache of credentials has given up on their source.
        let timed_out = text.contains("timed out");
        return match timed_out {
            true => Failure::new(KmsClass::Unreachable, text),
            false => Failure::new(KmsClass::Unclassified, text),
        };
    };
    let class = if connector.is_timeout() || connector.is_io() || connector.as_other().is_some() {
        KmsClass::Unreachable
    } else if connector.is_user() {
        KmsClass::Misconfigured
    } else {
        KmsClass::Unclassified
    };
    Failure::new(class, text)
}

fn judge_tls(error: &rustls::Error, text: String) -> Failure {
    match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => Failure::new(
            KmsClass::Misconfigured,
            format!(
                "{text}; the endpoint's certificate is not trusted here: correct the endpoint or the clock, or name the \
                     authority (AwsKmsBuilder::ca_file, AWS_CA_BUNDLE)"
            ),
        ),
        _ => Failure::new(KmsClass::Unreachable, text),
    }
}

/// Why the source of the credentials gave none. A source that is out of reach says nothing about our rights; a source that
/// says no does. Where there are none, nobody has said no.
fn judge_source(error: &CredentialsError, had_credentials: bool) -> (KmsClass, String) {
    let text = quoted(&chain_text(error), QUOTED_SOURCES);
    let class = match error {
        CredentialsError::CredentialsNotLoaded(_) => {
            let silent = silence_of_instance_metadata(error);
            // On a machine that is no EC2 instance, nobody listens at the metadata service's address. Who listens and does
            // not answer is out of order, and so is any source that gave credentials before: a file is just being replaced.
            if had_credentials || silent.is_some_and(|silence| silence.contains("HTTP read timeout")) {
                KmsClass::Unreachable
            } else {
                return (KmsClass::Misconfigured, format!("there are no AWS credentials; looked in: {text}"));
            }
        }
        CredentialsError::ProviderTimedOut(_) => KmsClass::Unreachable,
        CredentialsError::InvalidConfiguration(_) => KmsClass::Misconfigured,
        _ => match find::<ConnectorError>(error) {
            Some(_) => KmsClass::Unreachable,
            None => judge_source_text(&text),
        },
    };
    (class, format!("loading the AWS credentials: {text}"))
}

/// What the credential service's answer says; its types are not within reach.
fn judge_source_text(text: &str) -> KmsClass {
    const DENIED: [&str; 8] = [
        "AccessDenied",
        "ExpiredToken",
        "InvalidClientTokenId",
        "UnrecognizedClient",
        "SignatureDoesNotMatch",
        "InvalidIdentityToken",
        "IDPRejectedClaim",
        "InvalidGrant",
    ];
    // The provider of identities was out of reach for STS, though the code is one of a bad token.
    const OUT_OF_REACH: [&str; 2] = ["Couldn't retrieve verification key", "IDPCommunicationError"];
    let says = |what: &&str| text.contains(*what);
    if OUT_OF_REACH.iter().any(says) {
        KmsClass::Unreachable
    } else if DENIED.iter().any(says) {
        KmsClass::Denied
    } else if says(&"Throttl") {
        KmsClass::Throttled
    } else if says(&"timed out") || says(&"timeout") {
        KmsClass::Unreachable
    } else {
        KmsClass::Unclassified
    }
}

/// How the instance's metadata service was out of reach, if that is where the chain ended.
fn silence_of_instance_metadata(error: &CredentialsError) -> Option<String> {
    let chain = error.source()?.downcast_ref::<ProviderChainError<CredentialsError>>()?;
    let texts = chain.attempts().iter().map(|attempt| chain_text(attempt.error()));
    texts.into_iter().find(|text| text.contains("could not communicate with IMDS"))
}

/// The first error of this type in the chain.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        // An I/O error passes over what it wraps, when it is asked for its source.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match wrapped {
            Some(wrapped) => Some(wrapped as &(dyn StdError + 'static)),
            None => error.source(),
        };
    }
    None
}

/// What each error of the chain says, without repetitions.
fn chain_text(error: &(dyn StdError + 'static)) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let own = error.to_string();
        if !text.contains(&own) {
            let separator = if text.is_empty() { "" } else { ": " };
            text = format!("{text}{separator}{own}");
        }
        next = error.source();
    }
    text
}

/// At most so many characters of a text from outside, on one line.
pub(super) fn quoted(text: &str, most: usize) -> String {
    let mut words = text.split(|c: char| c.is_control() || c.is_whitespace()).filter(|word| !word.is_empty());
    let first = words.next().unwrap_or_default().to_owned();
    let line = words.fold(first, |line, word| line + " " + word);
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

fn xml_text<'a>(body: &'a str, element: &str) -> Option<&'a str> {
    let (_, rest) = body.split_once(&format!("<{element}>"))?;
    rest.split_once(&format!("</{element}>")).map(|(text, _)| text)
}

#[cfg(test)]
mod tests {
    use KmsClass::{BadCiphertext, Deleted, Denied, Disabled, Misconfigured, Throttled, Unclassified, Unreachable};

    use super::*;

    fn answered(code: &str, message: &str, status: u16) -> Failure {
        Answer { code: Some(code.into()), message: message.into(), status, ..Answer::default() }.judge()
    }

    #[test]
    fn each_code_of_aws_has_its_class() {
        let cases: [(KmsClass, &[&str]); 7] = [
            (BadCiphertext, &["InvalidCiphertextException", "IncorrectKeyException"]),
            (Disabled, &["DisabledException"]),
            (Deleted, &["NotFoundException"]),
            (
                Denied,
                &[
                    "AccessDeniedException",
                    "AccessDenied",
                    "NotAuthorized",
                    "OptInRequired",
                    "UnrecognizedClientException",
                    "InvalidClientTokenId",
                    "InvalidSignatureException",
                    "SignatureDoesNotMatch",
                    "ExpiredTokenException",
                    "ExpiredToken",
                ],
            ),
            (
                Throttled,
                &["ThrottlingException", "TooManyRequestsException", "RequestLimitExceeded", "LimitExceededException"],
            ),
            (
                Unreachable,
                &[
                    "KMSInternalException",
                    "DependencyTimeoutException",
                    "KeyUnavailableException",
                    "InternalFailure",
                    "ServiceUnavailable",
                ],
            ),
            (
                Misconfigured,
                &[
                    "InvalidArnException",
                    "InvalidKeyUsageException",
                    "UnsupportedOperationException",
                    "ValidationException",
                    "UnknownOperationException",
                    "InvalidAction",
                    "RequestTimeTooSkewed",
                    "RequestExpired",
                    "IncompleteSignature",
                    "MissingAuthenticationToken",
                    "MissingAuthenticationTokenException",
                ],
            ),
        ];
        for (class, codes) in cases {
            for code in codes {
                let failure = answered(code, "why", 400);
                assert_eq!(failure.class, class, "{code}");
                assert!(failure.text.starts_with(&format!("{code}: why")), "{}", failure.text);
            }
        }
        assert_eq!(answered("NewException", "", 400).class, Unclassified);
        assert_eq!(answered("NewException", "", 403).class, Unclassified);
        assert_eq!(answered("NewException", "", 500).class, Unreachable);
        assert_eq!(answered("NewException", "", 429).class, Throttled);
    }

    #[test]
    fn a_wrong_clock_is_no_revocation() {
        for message in ["Signature expired: 20261124T1 is now earlier than 2", "Signature not yet current: 20261124T1"]
        {
            let failure = answered("InvalidSignatureException", message, 400);
            assert_eq!(failure.class, Misconfigured);
            assert!(failure.text.contains("set it (NTP)"), "{}", failure.text);
        }
    }

    #[test]
    fn a_signature_for_another_region_is_a_setting() {
        let failure = answered(
            "InvalidSignatureException",
            "Credential should be scoped to a valid region, not 'us-east-1'. ",
            400,
        );
        assert_eq!(failure.class, Misconfigured);
        assert!(failure.text.contains("the endpoint is in another region"), "{}", failure.text);
    }

    #[test]
    fn a_status_alone_is_never_a_revocation() {
        let class = |status| Answer { status, ..Answer::default() }.judge().class;
        for status in 100..600 {
            assert!(!class(status).is_revocation() && class(status) != BadCiphertext, "{status}");
        }
        assert_eq!([429, 500, 503, 404, 302, 403, 200].map(class), {
            [Throttled, Unreachable, Unreachable, Misconfigured, Misconfigured, Unclassified, Unclassified]
        });
    }

    #[test]
    fn only_a_throttled_call_is_told_when_to_come_back() {
        let after = Some(Duration::from_secs(7));
        let answer =
            |status| Answer { status, retry_after: after, ..Answer::default() }.judge().into_error().retry_after;
        assert_eq!((answer(429), answer(503)), (after, None));
    }

    #[test]
    fn a_key_state_has_its_class_by_describe_key_and_by_the_text() {
        let state = |state: KeyState| judge_state(&state).map(|judged| judged.0);
        let cases = [
            (KeyState::PendingDeletion, Deleted),
            (KeyState::PendingReplicaDeletion, Deleted),
            (KeyState::PendingImport, Deleted),
            (KeyState::Disabled, Disabled),
            (KeyState::Unavailable, Unreachable),
            (KeyState::Enabled, Unreachable),
            (KeyState::Creating, Unreachable),
        ];
        for (of, class) in cases {
            assert_eq!(state(of.clone()), Some(class), "{of:?}");
        }
        assert_eq!(state(KeyState::from("Haunted")), None);
        let text = |message: &str| answered("KMSInvalidStateException", message, 400).class;
        assert_eq!(text("arn:aws:kms:... is pending deletion."), Deleted);
        assert_eq!(text("arn:aws:kms:... is pending import."), Deleted);
        assert_eq!(text("arn:aws:kms:... is disabled."), Disabled);
        assert_eq!(text("arn:aws:kms:... is unavailable."), Unreachable);
        assert_eq!(text("something else"), Unclassified);
    }

    #[test]
    fn a_source_of_credentials_that_is_out_of_reach_says_nothing_and_one_that_says_no_does() {
        let refused = || std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let cases = [
            (CredentialsError::not_loaded("nothing is set"), Misconfigured),
            (CredentialsError::provider_timed_out(Duration::from_secs(1)), Unreachable),
            (CredentialsError::invalid_configuration("line 3"), Misconfigured),
            (CredentialsError::provider_error(ConnectorError::io(refused().into())), Unreachable),
            (CredentialsError::provider_error(ConnectorError::timeout("slow".into())), Unreachable),
            (CredentialsError::provider_error("AccessDenied: no AssumeRole"), Denied),
            (CredentialsError::provider_error("ExpiredTokenException: token"), Denied),
            (
                CredentialsError::provider_error(
                    "InvalidIdentityToken: Couldn't retrieve verification key from your identity provider, please reference \
                     AssumeRoleWithWebIdentity documentation for requirements",
                ),
                Unreachable,
            ),
            (CredentialsError::provider_error("IDPCommunicationError: could not be reached"), Unreachable),
            (CredentialsError::provider_error("InvalidIdentityToken: No OpenIDConnect provider found"), Denied),
            (CredentialsError::provider_error("Throttling: slow down"), Throttled),
            (CredentialsError::provider_error("request has timed out"), Unreachable),
            (CredentialsError::unhandled("what"), Unclassified),
        ];
        for (error, class) in cases {
            let failure = not_sent(&ConnectorError::other(error.into(), None), false);
            assert_eq!((failure.class, failure.reason), (class, Reason::Credentials), "{}", failure.text);
        }
        // There were some, so their source is out of order: a file just being replaced, a mount that is gone.
        let gone = ConnectorError::other(CredentialsError::not_loaded("nothing is set").into(), None);
        assert_eq!(not_sent(&gone, true).class, Unreachable);
    }

    #[test]
    fn an_untrusted_certificate_is_a_setting_and_other_trouble_with_tls_an_outage() {
        let tls = |error: rustls::Error| {
            let error = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
            not_sent(&ConnectorError::io(error.into()), true)
        };
        let untrusted = tls(rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer));
        assert_eq!(untrusted.class, Misconfigured);
        assert!(untrusted.text.contains("AWS_CA_BUNDLE"), "{}", untrusted.text);
        assert_eq!(tls(rustls::Error::HandshakeNotComplete).class, Unreachable);
    }

    #[test]
    fn a_text_from_outside_is_bounded_and_on_one_line() {
        assert_eq!(quoted(" a\r\n\tb\u{7}c ", 99), "a b c");
        assert_eq!(quoted(&"ü".repeat(400), 300), "ü".repeat(300) + "...");
    }

    #[test]
    fn a_code_in_xml_is_read() {
        let body = "<ErrorResponse><Error><Code>AccessDenied</Code><Message>no</Message></Error></ErrorResponse>";
        assert_eq!((xml_text(body, "Code"), xml_text(body, "Message")), (Some("AccessDenied"), Some("no")));
        assert_eq!(xml_text("<html><Code>x", "Code"), None);
    }
}
