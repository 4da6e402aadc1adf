//! What a failed request means: the one place where answers of Google's services become a [`KmsClass`].
//!
//! A verdict against the key ([`KmsClass::is_revocation`]) is drawn from Google's own error objects only. What a proxy may
//! have said instead (pages of HTML, bare status codes) never is one.

use std::error::Error as StdError;
use std::time::{Duration, SystemTime};

use google_cloud_auth::errors::CredentialsError;
use google_cloud_gax::error::Error as CallError;
use google_cloud_gax::error::rpc::{Code, Status, StatusDetails};
use http::HeaderMap;
use serde_json::Value;

use super::name::KeyName;
use crate::error::{KmsClass, KmsError};

/// Texts of a service are quoted up to so many characters.
const QUOTED: usize = 300;

/// How the SDK's errors begin that have the answer of an issuer of tokens: for a refresh token, a subject token, and an
/// impersonation.
const ISSUERS: [&str; 3] = ["failed to refresh user access token", "failed to exchange token", "failed to fetch token"];

/// The request that failed.
pub(super) struct Asked<'a> {
    pub(super) key: &'a KeyName,
    /// Where it was sent, for errors.
    pub(super) endpoint: &'a str,
    /// Where the credentials come from, for errors.
    pub(super) origin: &'a str,
    /// For decryption: the version of the key that the record says it was wrapped by.
    pub(super) record: Option<&'a str>,
}

pub(super) fn unclassified(text: impl Into<String>) -> KmsError {
    KmsError::with_source(KmsClass::Unclassified, text.into())
}

pub(super) fn unreachable(text: impl Into<String>) -> KmsError {
    KmsError::with_source(KmsClass::Unreachable, text.into())
}

fn misconfigured(text: impl Into<String>) -> KmsError {
    KmsError::with_source(KmsClass::Misconfigured, text.into())
}

/// Whether the credentials were refused, or there were none: others may do better.
pub(super) fn is_about_credentials(error: &CallError) -> bool {
    error.is_authentication() || error.status().is_some_and(|status| status.code == Code::Unauthenticated)
}

/// A refusal of a token that was signed for another time than it is: from 10 s before the signature to an hour after it.
pub(super) fn misled_by_the_clock(error: &CallError, now: SystemTime) -> Option<KmsError> {
    if error.status()?.code != Code::Unauthenticated {
        return None;
    }
    let theirs = parse_date(error.http_headers()?.get("date")?.to_str().ok()?)?;
    let (off, how) = match now.duration_since(theirs) {
        Ok(ahead) => (Some(ahead).filter(|ahead| ahead.as_secs() > 10), "ahead"),
        Err(behind) => (Some(behind.duration()).filter(|behind| behind.as_secs() > 3600), "behind"),
    };
    let seconds = off?.as_secs();
    Some(misconfigured(format!(
        "this machine's clock is {seconds} s {how} of Google's, so that the tokens it signs are refused; set the clock"
    )))
}

/// `Wed, 21 Oct 2026 07:28:00 GMT`: RFC 9110, section 5.6.7.
pub(super) fn parse_date(text: &str) -> Option<SystemTime> {
    const MONTHS: &str = "JanFebMarAprMayJunJulAugSepOctNovDec";
    let mut fields = text.split_once(", ")?.1.split([' ', ':']);
    let number = |fields: &mut dyn Iterator<Item = &str>| fields.next()?.parse::<u64>().ok().filter(|n| *n < 10_000);
    let day = number(&mut fields)?;
    let month = fields.next().filter(|name| name.len() == 3)?;
    let month = u64::try_from(MONTHS.find(month).filter(|at| at % 3 == 0)?).ok()? / 3 + 1;
    let year = number(&mut fields)?.checked_sub(1970)? + 1970;
    let (hour, minute, second) = (number(&mut fields)?, number(&mut fields)?, number(&mut fields)?);
    // Years that begin in March, so that a leap day is the last one.
    let (year, month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let days = year * 365 + year / 4 - year / 100 + year / 400 + (month * 153 + 2) / 5 + day;
    let seconds = days.checked_sub(719_469)? * 86_400 + hour * 3600 + minute * 60 + second;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

impl Asked<'_> {
    /// The failure of a request to the key service.
    pub(super) fn failed(&self, error: &CallError) -> KmsError {
        if let Some(error) = links(error).find_map(|link| link.downcast_ref::<CredentialsError>()) {
            return self.without_token(error);
        }
        match (error.http_status_code(), error.status()) {
            // Whatever the body says: a service that fails knows nothing for certain.
            (Some(code @ (408 | 500 | 502..=599)), status) => {
                let said = status.map(|status| quoted(&status.message)).unwrap_or_default();
                unreachable(format!("{} answered {code}{said}", self.endpoint))
            }
            (Some(code @ 300..=399), _) => misconfigured(format!(
                "{} sends requests elsewhere ({code}), not as Cloud KMS does; check the endpoint",
                self.endpoint
            )),
            (code, Some(status)) if status.code != Code::Unknown => self.refused(status, code, error),
            (Some(429), _) => throttled(format!("{} answered 429", self.endpoint), retry_after(error)),
            (Some(404), _) => {
                misconfigured(format!("{} answered 404, not as Cloud KMS does; check the endpoint", self.endpoint))
            }
            (Some(code), _) => unclassified(format!("{} answered {code}, not as Cloud KMS does", self.endpoint)),
            (None, _) => self.not_answered(error),
        }
    }

    /// There was no HTTP answer that could be read.
    fn not_answered(&self, error: &CallError) -> KmsError {
        let endpoint = self.endpoint;
        let why = innermost(error);
        if error.is_deserialization() {
            // Without the reason, which may quote what was received.
            return unclassified(format!("{endpoint} sent an answer that is not as those of Cloud KMS"));
        }
        if error.is_serialization() || error.is_binding() {
            return misconfigured(format!("the request cannot be made{why}"));
        }
        if links(error).any(|link| link.to_string().contains("invalid peer certificate")) {
            return misconfigured(format!(
                "the certificate of {endpoint} is not trusted{why}; check the endpoint, the clock, and the system's trusted \
                 authorities (SSL_CERT_FILE)"
            ));
        }
        match error.is_timeout() {
            true => unreachable(format!("{endpoint} did not answer in time")),
            false => unreachable(format!("no answer from {endpoint}{why}")),
        }
    }

    /// One of Google's error objects.
    fn refused(&self, status: &Status, code: Option<u16>, error: &CallError) -> KmsError {
        let said = format!("{}{}", status.code.name(), quoted(&status.message));
        match status.code {
            Code::FailedPrecondition => self.precondition(status, said),
            Code::PermissionDenied => permission_denied(reason(status), said),
            Code::Unauthenticated => {
                KmsError::with_source(KmsClass::Denied, format!("{said}; the credentials are {}", self.origin))
            }
            Code::NotFound => misconfigured(format!(
                "{said}; check the key's name (a key is not deleted before all its versions are destroyed, which is told \
                 otherwise)"
            )),
            Code::InvalidArgument => self.invalid_argument(status, said),
            Code::ResourceExhausted => throttled(said, retry_delay(status).or_else(|| retry_after(error))),
            Code::Unavailable | Code::Internal | Code::DeadlineExceeded | Code::Aborted | Code::Cancelled => {
                unreachable(said)
            }
            Code::Unimplemented => misconfigured(format!("{said}; check the endpoint {}", self.endpoint)),
            _ => unclassified(match code {
                Some(code) => format!("{said} ({code})"),
                None => said,
            }),
        }
    }

    fn invalid_argument(&self, status: &Status, said: String) -> KmsError {
        let message = status.message.to_ascii_lowercase();
        if message.contains("crc32c") || message.contains("checksum") {
            return unreachable(format!("the request was corrupted in transit: {said}"));
        }
        match self.record.is_some() && message.starts_with("decryption failed") {
            true => KmsError::with_source(KmsClass::BadCiphertext, said),
            false => misconfigured(said),
        }
    }

    /// A version of the key that cannot be used. The state is in the details and in the message; what contradicts itself,
    /// names another key, or is worded otherwise is no verdict.
    fn precondition(&self, status: &Status, said: String) -> KmsError {
        let details = status.details.iter().filter_map(|detail| match detail {
            StatusDetails::PreconditionFailure(failure) => Some(&failure.violations),
            _ => None,
        });
        let violations = details.flatten().filter_map(|violation| {
            let state = violation.r#type.strip_prefix("KEY_")?;
            Some((self.key.version_in(&violation.subject), state))
        });
        let claims: Vec<(Option<&str>, &str)> = violations.chain(self.claim_of(&status.message)).collect();
        let Some(&(Some(version), state)) = claims.first().filter(|first| claims.iter().all(|claim| claim == *first))
        else {
            return unclassified(said);
        };
        let class = match state {
            "DISABLED" => KmsClass::Disabled,
            "DESTROYED" | "DESTROY_SCHEDULED" | "PENDING_EXTERNAL_DESTRUCTION" | "EXTERNAL_DESTRUCTION_FAILED" => {
                KmsClass::Deleted
            }
            // Soon over.
            "PENDING_GENERATION" => KmsClass::Unreachable,
            "PENDING_IMPORT" | "IMPORT_FAILED" | "GENERATION_FAILED" => KmsClass::Misconfigured,
            _ => KmsClass::Unclassified,
        };
        match self.record {
            // A blob of another version than its record says was put there by somebody, and must not pass for a revocation.
            Some(record) if record != version => KmsError::with_source(
                KmsClass::BadCiphertext,
                format!(
                    "the record says that version {record} wrapped it, the service that version {version} did: {said}"
                ),
            ),
            _ => KmsError::with_source(class, said),
        }
    }

    /// `NAME is not enabled, current state is: STATE.`
    fn claim_of<'m>(&self, message: &'m str) -> Option<(Option<&'m str>, &'m str)> {
        let (name, state) =
            message.trim_end().trim_end_matches('.').split_once(" is not enabled, current state is: ")?;
        Some((self.key.version_in(name), state))
    }

    /// No token could be had: the failure of the token's issuer, not of the key service.
    pub(super) fn without_token(&self, error: &CredentialsError) -> KmsError {
        let origin = self.origin;
        let own = links(error).find_map(|link| link.downcast_ref::<KmsError>());
        if let Some(own) = own {
            // From a function of the caller's, or from loading: classified already.
            let text = own.source.as_ref().map(|source| source.to_string()).unwrap_or_default();
            let told = KmsError::with_source(own.class, text);
            return KmsError { retry_after: own.retry_after, ..told };
        }
        let what = format!("no access token from {origin}");
        let answer = Answer::of(error);
        let said = answer.said.as_deref().map(quoted).unwrap_or_default();
        match answer.status {
            // Security Token Service could not fetch the keys of the provider that signed the subject token.
            Some(_) if answer.is_about_the_provider() => unreachable(format!("{what}{said}")),
            Some(status @ (401 | 403)) if answer.error.as_deref() == Some("PERMISSION_DENIED") => {
                permission_denied(answer.reason.as_deref(), format!("{what}: refused with {status}{said}"))
            }
            Some(status @ (401 | 403)) if answer.refuses() || answer.is_metadata => {
                KmsError::with_source(KmsClass::Denied, format!("{what}: refused with {status}{said}"))
            }
            Some(400) if answer.refuses() => KmsError::with_source(KmsClass::Denied, format!("{what}: refused{said}")),
            Some(429) => throttled(format!("{what}: its issuer answered 429{said}"), answer.retry_after),
            Some(404) if answer.is_metadata => misconfigured(format!(
                "{what}: it knows none (404); attach a service account to this machine or pod{said}"
            )),
            Some(408 | 500..=599) => {
                unreachable(format!("{what}: its issuer answered {}{said}", answer.status.unwrap_or_default()))
            }
            Some(status @ (400 | 404)) if answer.is_issuers => {
                misconfigured(format!("{what}: its issuer does not take the request ({status}{said})"))
            }
            Some(status) => unclassified(format!("{what}: answered with {status}, not as an issuer of tokens does")),
            None if error.is_transient() => {
                unreachable(format!("{what}: its issuer cannot be reached{}", innermost(error)))
            }
            None if answer.is_garbled => unclassified(format!("{what}: its issuer's answer is not as it should be")),
            // A file that is missing, a key that is none. The SDK's text might quote it; the system's does not.
            None => {
                let system = links(error).find_map(|link| link.downcast_ref::<std::io::Error>());
                let why = system.map(|error| quoted(&error.to_string())).unwrap_or_default();
                misconfigured(format!("{what}: they name something that is missing or malformed{why}"))
            }
        }
    }
}

/// `PERMISSION_DENIED` with the reason of its `google.rpc.ErrorInfo`; the reasons are those of google/api/error_reason.proto. Only
/// the want of a right is a verdict, and a reason that is not known here is none.
fn permission_denied(reason: Option<&str>, said: String) -> KmsError {
    match reason {
        None | Some("" | "IAM_PERMISSION_DENIED") => KmsError::with_source(KmsClass::Denied, said),
        Some(
            "SERVICE_DISABLED" | "BILLING_DISABLED" | "USER_PROJECT_DENIED" | "CONSUMER_INVALID" | "CONSUMER_SUSPENDED",
        ) => misconfigured(format!("the project that is charged for the request may not make it: {said}")),
        // A perimeter around networks and projects, which this machine may have left by a change of address.
        Some("SECURITY_POLICY_VIOLATED") => {
            misconfigured(format!("VPC Service Controls do not let the request through: {said}"))
        }
        Some("ACCESS_TOKEN_SCOPE_INSUFFICIENT") => misconfigured(format!(
            "the access token is not for Cloud KMS; give the machine or the token the scope cloud-platform: {said}"
        )),
        Some(reason) => unclassified(format!("{said}{}", quoted(reason))),
    }
}

/// What is known of the answer of a token's issuer.
#[derive(Default)]
struct Answer {
    status: Option<u16>,
    /// The error's code, as OAuth 2.0 or Google name it.
    error: Option<String>,
    /// The reason of Google's.
    reason: Option<String>,
    /// What may be quoted.
    said: Option<String>,
    retry_after: Option<Duration>,
    is_metadata: bool,
    /// That it looks like an issuer's own.
    is_issuers: bool,
    is_garbled: bool,
}

impl Answer {
    fn of(error: &CredentialsError) -> Self {
        let mut answer = Self::default();
        for link in links(error) {
            if let Some(error) = link.downcast_ref::<reqwest::Error>() {
                answer.status = answer.status.or(error.status().map(|status| status.as_u16()));
                answer.is_garbled |= error.is_decode();
            }
            if let Some(error) = link.downcast_ref::<CallError>()
                && let Some(status) = error.http_status_code()
            {
                answer.status = answer.status.or(Some(status));
                // The metadata server's errors are plain text, and its way is no private one: the SDK obeys HTTP_PROXY there. It
                // marks every answer as its own.
                answer.is_metadata |= error.http_headers().is_some_and(is_metadata);
                answer.retry_after = answer.retry_after.or(retry_after(error));
                // Impersonation fails so too.
                if let Some(body) = error.http_payload() {
                    answer.read(body);
                }
            }
            // The SDK puts the body into the text of its error. What the source of a subject token says is not an issuer's.
            if link.is::<CredentialsError>()
                && let Some((doing, rest)) = link.to_string().split_once(", body=<")
                && ISSUERS.contains(&doing)
                && let Some((body, _)) = rest.rsplit_once('>')
            {
                answer.read(body.as_bytes());
            }
        }
        answer
    }

    fn read(&mut self, body: &[u8]) {
        let Ok(body) = serde_json::from_slice::<Value>(body) else { return };
        let (code, description) = match &body["error"] {
            Value::String(code) => (code.as_str(), body["error_description"].as_str()),
            Value::Object(error) => {
                let field = |name: &str| error.get(name).and_then(Value::as_str);
                let details = error.get("details").and_then(Value::as_array).into_iter().flatten();
                let info = |detail: &&Value| detail["@type"] == "type.googleapis.com/google.rpc.ErrorInfo";
                self.reason =
                    details.filter(info).find_map(|detail| detail["reason"].as_str()).map(|reason| reason.to_owned());
                (field("status").unwrap_or_default(), field("message"))
            }
            _ => return,
        };
        self.is_issuers = true;
        self.error = Some(code.to_owned());
        self.said = Some(format!("{code} {}", description.unwrap_or_default()).trim().to_owned());
    }

    /// The codes by which OAuth 2.0 refuses credentials, RFC 6749, section 5.2, and Google's name for it. Others say `error`
    /// too: proxies and gateways.
    fn refuses(&self) -> bool {
        matches!(
            self.error.as_deref(),
            Some("invalid_grant" | "invalid_client" | "unauthorized_client" | "access_denied" | "UNAUTHENTICATED")
        )
    }

    /// Said with `invalid_grant`, but of an outage.
    fn is_about_the_provider(&self) -> bool {
        let said = self.said.as_deref().unwrap_or_default();
        said.contains(" Error connecting to the given credential's issuer")
    }
}

/// <https://cloud.google.com/compute/docs/metadata/querying-metadata>
fn is_metadata(headers: &HeaderMap) -> bool {
    headers.get("metadata-flavor").is_some_and(|flavor| flavor == "Google")
}

/// The error and its sources.
fn links<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// `: TEXT` of the last source, which is the system's or the TLS implementation's.
pub(super) fn innermost(error: &(dyn StdError + 'static)) -> String {
    links(error).last().map(|link| quoted(&link.to_string())).unwrap_or_default()
}

fn throttled(text: String, after: Option<Duration>) -> KmsError {
    KmsError { retry_after: after, ..KmsError::with_source(KmsClass::Throttled, text) }
}

/// `google.rpc.RetryInfo`.
fn retry_delay(status: &Status) -> Option<Duration> {
    status.details.iter().find_map(|detail| match detail {
        StatusDetails::RetryInfo(info) => {
            let delay = info.retry_delay.as_ref()?;
            Some(Duration::new(delay.seconds().try_into().ok()?, delay.nanos().try_into().ok()?))
        }
        _ => None,
    })
}

/// The header, in seconds.
fn retry_after(error: &CallError) -> Option<Duration> {
    let value = error.http_headers()?.get("retry-after")?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}

/// `google.rpc.ErrorInfo`.
fn reason(status: &Status) -> Option<&str> {
    status.details.iter().find_map(|detail| match detail {
        StatusDetails::ErrorInfo(info) => Some(info.reason.as_str()),
        _ => None,
    })
}

/// `: TEXT`, bounded and in one line; nothing for nothing.
fn quoted(text: &str) -> String {
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(QUOTED).collect();
    match text.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}
