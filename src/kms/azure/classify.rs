//! What the answers of Key Vault and of the token endpoints mean for a master key.
//!
//! A revocation (denied, disabled, deleted) stops a running cluster. So it is read only out of what these services document,
//! in the JSON that they send; whatever a proxy or anything unknown says is unclassified.

use std::error::Error as StdError;
use std::time::Duration;

use azure_core::Value;
use azure_core::error::ErrorKind as AzureKind;
use azure_core::http::headers::{HeaderName, Headers};

use super::transport::{Failure, Peer};
use crate::error::{KmsClass, KmsError};

/// How much of a service's text is quoted.
const LONGEST_QUOTE: usize = 300;

/// What was asked of the key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Operation {
    Wrap,
    Unwrap,
    /// Whether there is a key of this name.
    Get,
}

/// A classified failure, and what it is besides.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) error: KmsError,
    pub(super) detail: Detail,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Detail {
    /// The vault refused the token: a fresh one may be taken.
    Unauthorized,
    /// The vault has no such key, or no such version of it.
    NotFound,
    Other,
}

/// What an error of the SDK means.
pub(super) fn refusal(error: &azure_core::Error, operation: Operation) -> Refusal {
    let other = |error| Refusal { error, detail: Detail::Other };
    if let Some(failure) = failure_in(error) {
        return other(failure.to_kms());
    }
    match error.kind() {
        AzureKind::HttpResponse { status, raw_response: Some(response), .. } => {
            vault_refusal(operation, u16::from(*status), response.headers(), response.body())
        }
        AzureKind::Credential => other(credential_failure(error)),
        AzureKind::Connection | AzureKind::Io => other(KmsError::with_source(KmsClass::Unreachable, text_of(error))),
        AzureKind::Other if error.to_string().contains("doesn't match the requested domain") => {
            let text = "the vault's challenge names another Azure domain than the vault URL's, and a token for that would \
                        not be sent there; check PAGESEAL_AZURE_VAULT_URL (`vault_url`), or see \
                        `AzureKeyVaultBuilder::accept_any_challenge`";
            other(KmsError::with_source(KmsClass::Misconfigured, text))
        }
        // Its text may hold parts of the answer that was not understood.
        AzureKind::DataConversion => {
            let text = "an answer was not understood; is this Key Vault, or does a proxy answer for it?";
            other(KmsError::with_source(KmsClass::Unclassified, text))
        }
        _ => other(KmsError::with_source(KmsClass::Unclassified, text_of(error))),
    }
}

/// What an answer of Key Vault or Managed HSM that is no success means.
pub(super) fn vault_refusal(operation: Operation, status: u16, headers: &Headers, body: &[u8]) -> Refusal {
    let said = Said::vault(body);
    let text = said.text(Peer::Vault, status, body);
    let refusal = |class, detail| {
        let mut error = KmsError::with_source(class, text.clone());
        error.retry_after = if status == 429 || status == 503 { retry_after(headers) } else { None };
        Refusal { error, detail }
    };
    let class = match (status, said.code.as_deref()) {
        // The vault could not get Entra ID's keys to verify a token with, and will; another token does not help.
        (401, Some(_)) if said.message.starts_with("AKV10046:") => KmsClass::Unreachable,
        // A token for something else, or of another tenant than the vault's.
        (401, Some(_)) if ["AKV10022:", "AKV10032:"].iter().any(|code| said.message.starts_with(code)) => {
            KmsClass::Misconfigured
        }
        (401, _) if challenged(headers) || said.code.is_some() => {
            return refusal(KmsClass::Denied, Detail::Unauthorized);
        }
        (403, Some(_)) => forbidden(operation, &said),
        (404, Some("KeyNotFound")) => return refusal(KmsClass::Deleted, Detail::NotFound),
        (409, Some(_)) => match said.inner.as_deref() {
            Some("ObjectIsBeingDeleted" | "ObjectIsDeletedButRecoverable") => KmsClass::Deleted,
            // It will be back in a moment.
            Some("ObjectIsBeingRecovered") => KmsClass::Unreachable,
            _ => KmsClass::Unclassified,
        },
        (400, Some(_)) => bad_request(operation, &said),
        (429, _) => KmsClass::Throttled,
        (408 | 500..=599, _) => KmsClass::Unreachable,
        _ => KmsClass::Unclassified,
    };
    refusal(class, Detail::Other)
}

fn forbidden(operation: Operation, said: &Said) -> KmsClass {
    let inner = said.inner.as_deref().unwrap_or_default();
    let message = said.message.as_str();
    let out_of_date = matches!(inner, "KeyExpired" | "KeyNotYetValid" | "KeyNotYetValidOrExpired")
        || message.contains("expired key")
        || message.contains("not yet valid");
    match (inner, said.code.as_deref()) {
        ("KeyDisabled", _) => KmsClass::Disabled,
        ("", _) if message.contains("disabled key") => KmsClass::Disabled,
        // The network, not the identity or the key: an address that changed must not stop a running cluster.
        ("ForbiddenByFirewall" | "ForbiddenByConnection", _) => KmsClass::Misconfigured,
        // Such a key unwraps, so that to wrap with it is refused revokes nothing.
        _ if out_of_date && operation != Operation::Unwrap => KmsClass::Misconfigured,
        _ if out_of_date => KmsClass::Disabled,
        ("ForbiddenByRbac" | "ForbiddenByPolicy" | "AccessDenied" | "KeyOperationForbidden", Some(_)) => {
            KmsClass::Denied
        }
        // A firewall is not known to give its inner code everywhere, as in Managed HSM.
        _ if about_network(message) => KmsClass::Misconfigured,
        ("", Some("Forbidden" | "AccessDenied")) => KmsClass::Denied,
        // Whatever new reason it is, it need not be about the identity.
        _ => KmsClass::Unclassified,
    }
}

/// Whether a refusal is about where the request came from.
fn about_network(message: &str) -> bool {
    let client_address = message.starts_with("Client address") && message.contains("not authorized");
    client_address
        || ["Public network access is disabled", "not an approved private link"]
            .iter()
            .any(|text| message.contains(text))
}

/// The length of the ciphertext and the form of the version were in order, so what is left is the ciphertext itself, or an
/// algorithm that the key does not have.
fn bad_request(operation: Operation, said: &Said) -> KmsClass {
    let code = said.code.as_deref().unwrap_or_default();
    let message = said.message.to_ascii_lowercase();
    let about_settings = ["algorithm", "'alg'", "key type", "kty", "api-version", "api version"];
    if about_settings.iter().any(|word| message.contains(word)) {
        return KmsClass::Misconfigured;
    }
    match (operation, code) {
        (Operation::Unwrap, "BadParameter" | "BadRequest") => KmsClass::BadCiphertext,
        (Operation::Wrap | Operation::Get, "BadParameter" | "BadRequest") => KmsClass::Misconfigured,
        _ => KmsClass::Unclassified,
    }
}

/// What an answer of a token endpoint that is no success means.
pub(super) fn token_refusal(peer: Peer, status: u16, headers: &Headers, body: &[u8]) -> Failure {
    let said = Said::token(body);
    let class = match (status, said.code.as_deref()) {
        (429, _) => KmsClass::Throttled,
        (400..=499, Some(_)) if let Some(class) = entra_in_trouble(&said.message) => class,
        (408 | 500..=599, _) => KmsClass::Unreachable,
        // The endpoint is being updated, or the identity's tokens are not there yet: it is to be asked again.
        (404 | 410, _) if peer == Peer::Identity => KmsClass::Unreachable,
        // IMDS says so too for a while on machines that have one (Azure/aad-pod-identity#681, #1102), and it is no verdict of
        // the vault: an identity that was taken away is refused there.
        (400, _) if peer == Peer::Identity && no_identity(&said.message) => KmsClass::Misconfigured,
        (_, Some("temporarily_unavailable" | "server_error")) => KmsClass::Unreachable,
        (
            400 | 401 | 403,
            Some(
                "invalid_client"
                | "unauthorized_client"
                | "invalid_grant"
                | "access_denied"
                | "interaction_required"
                | "consent_required"
                | "login_required",
            ),
        ) if peer == Peer::Entra => KmsClass::Denied,
        // AADSTS70021, 700211, 700212, 700213: the federation of a workload identity is gone, or was never there.
        (400 | 401, Some("invalid_request")) if said.message.starts_with("AADSTS70021") => KmsClass::Denied,
        (400..=499, Some("invalid_request" | "invalid_scope" | "invalid_resource" | "unsupported_grant_type")) => {
            KmsClass::Misconfigured
        }
        _ => KmsClass::Unclassified,
    };
    let mut failure = Failure::new(class, said.text(peer, status, body));
    let comes_back = class == KmsClass::Throttled || status == 503;
    failure.retry_after = if comes_back { retry_after(headers) } else { None };
    failure
}

/// What Entra ID says under the codes of refusals though it refuses nobody: the number goes before the code.
/// <https://learn.microsoft.com/entra/identity-platform/reference-error-codes>
fn entra_in_trouble(message: &str) -> Option<KmsClass> {
    let number = message.strip_prefix("AADSTS")?;
    match number.split(|c: char| !c.is_ascii_digit()).next()? {
        // Too many requests of the same client ("invalid_grant").
        "50196" => Some(KmsClass::Throttled),
        // A transient error; and an issuer of federated tokens whose keys Entra ID could not get.
        "90033" | "50166" | "90061" | "900612" => Some(KmsClass::Unreachable),
        _ => None,
    }
}

fn no_identity(message: &str) -> bool {
    ["Identity not found", "No User Assigned or Delegated Managed Identity found", "No Managed Identity found"]
        .iter()
        .any(|text| message.contains(text))
}

/// What a credential's error means, be it one of ours or of the user's.
pub(super) fn credential_failure(error: &azure_core::Error) -> KmsError {
    if let Some(failure) = failure_in(error) {
        return failure.to_kms();
    }
    let mut deepest = error;
    for source in sources(error).filter_map(|error| error.downcast_ref::<azure_core::Error>()) {
        deepest = source;
    }
    let text = text_of(error);
    let class = match deepest.kind() {
        AzureKind::HttpResponse { status, raw_response: Some(response), .. } => {
            return token_refusal(Peer::Entra, u16::from(*status), response.headers(), response.body()).to_kms();
        }
        AzureKind::Connection | AzureKind::Io => KmsClass::Unreachable,
        AzureKind::Credential if text.contains("not found on PATH") => KmsClass::Misconfigured,
        // The Azure CLI's own failures come as text. Only what is known to be about the login is taken for a refusal.
        AzureKind::Credential if text.contains("AzureCliCredential") && !text.contains("az login") => {
            KmsClass::Unclassified
        }
        AzureKind::Credential => KmsClass::Denied,
        AzureKind::DataConversion => {
            let text = "a token endpoint's answer was not understood; does a proxy answer for it?";
            return KmsError::with_source(KmsClass::Unclassified, text);
        }
        _ => KmsClass::Unclassified,
    };
    KmsError::with_source(class, text)
}

pub(super) fn failure_in(error: &azure_core::Error) -> Option<&Failure> {
    sources(error).find_map(|error| error.downcast_ref::<Failure>())
}

fn sources<'a>(error: &'a azure_core::Error) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let first: &'a (dyn StdError + 'static) = error;
    std::iter::successors(Some(first), |error| (*error).source())
}

fn text_of(error: &azure_core::Error) -> String {
    bounded(&error.to_string())
}

/// What a service's JSON says.
#[derive(Default, Debug)]
struct Said {
    code: Option<String>,
    inner: Option<String>,
    message: String,
}

impl Said {
    /// `{"error":{"code":"Forbidden","message":"…","innererror":{"code":"KeyDisabled"}}}`; some write `innerError`.
    fn vault(body: &[u8]) -> Self {
        let value: Value = azure_core::json::from_json(body).unwrap_or_default();
        let error = &value["error"];
        let inner = ["innererror", "innerError"].iter().find_map(|name| string(&error[name]["code"]));
        Self { code: string(&error["code"]), inner, message: string(&error["message"]).unwrap_or_default() }
    }

    /// `{"error":"invalid_client","error_description":"AADSTS7000215: …"}` of Entra ID and IMDS; App Service sends
    /// `{"statusCode":400,"message":"…"}`.
    fn token(body: &[u8]) -> Self {
        let value: Value = azure_core::json::from_json(body).unwrap_or_default();
        let message = string(&value["error_description"]).or_else(|| string(&value["message"]));
        Self { code: string(&value["error"]), inner: None, message: message.unwrap_or_default() }
    }

    fn text(&self, peer: Peer, status: u16, body: &[u8]) -> String {
        let codes = [&self.code, &self.inner].into_iter().flatten().map(|code| bounded(code));
        let codes: Vec<_> = codes.collect();
        let message = bounded(&self.message);
        match codes.as_slice() {
            // An answer that is no refusal may hold a payload.
            [] if message.is_empty() && status < 300 => format!("HTTP {status} from {peer}, which was not expected"),
            [] if message.is_empty() => {
                let begin = String::from_utf8_lossy(&body[..body.len().min(LONGEST_QUOTE)]).into_owned();
                format!("HTTP {status} from {peer}, with no error of its own: {:?}", bounded(&begin))
            }
            [] => format!("HTTP {status} from {peer}: {message}"),
            _ => format!("HTTP {status} {} from {peer}: {message}", codes.join("/")),
        }
    }
}

fn string(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

/// A text of a service on one line, and not too long.
pub(super) fn bounded(text: &str) -> String {
    let mut words = text.split(|c: char| c.is_control() || c == ' ').filter(|word| !word.is_empty());
    let mut line = words.next().unwrap_or_default().to_owned();
    for word in words {
        line.push(' ');
        line.push_str(word);
    }
    match line.char_indices().nth(LONGEST_QUOTE) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}

/// The challenge that Key Vault and Managed HSM send with every 401.
fn challenged(headers: &Headers) -> bool {
    let challenge = headers.get_optional_str(&HeaderName::from_static("www-authenticate"));
    challenge.is_some_and(|text| text.starts_with("Bearer ") && text.contains("authorization="))
}

/// When the service wants to be asked again. (A date is not read: pageseal then chooses the wait itself.)
fn retry_after(headers: &Headers) -> Option<Duration> {
    let number = |name: &'static str| headers.get_optional_str(&HeaderName::from_static(name))?.trim().parse().ok();
    let millis = number("retry-after-ms").or_else(|| number("x-ms-retry-after-ms")).map(Duration::from_millis);
    millis.or_else(|| number("retry-after").map(Duration::from_secs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vault(operation: Operation, status: u16, body: &str) -> (KmsClass, Detail) {
        let refusal = vault_refusal(operation, status, &Headers::new(), body.as_bytes());
        (refusal.error.class, refusal.detail)
    }

    fn forbidden(inner: &str) -> String {
        format!(r#"{{"error":{{"code":"Forbidden","message":"m","innererror":{{"code":"{inner}"}}}}}}"#)
    }

    #[test]
    fn a_refusal_is_read_out_of_key_vaults_json_only() {
        use KmsClass::*;
        for (inner, expected) in [
            ("KeyDisabled", Disabled),
            ("ForbiddenByRbac", Denied),
            ("ForbiddenByPolicy", Denied),
            ("AccessDenied", Denied),
            ("KeyOperationForbidden", Denied),
            ("SomethingNew", Unclassified),
            ("ForbiddenByNsp", Unclassified),
            ("ForbiddenByFirewall", Misconfigured),
            ("ForbiddenByConnection", Misconfigured),
        ] {
            for operation in [Operation::Wrap, Operation::Unwrap, Operation::Get] {
                assert_eq!(vault(operation, 403, &forbidden(inner)).0, expected, "{inner}");
            }
        }
        let wrong = [
            "",
            "<html>",
            "null",
            "[]",
            "{}",
            r#"{"error":null}"#,
            r#"{"error":"Forbidden"}"#,
            r#"{"error":{"code":7}}"#,
        ];
        for body in wrong {
            for status in [302, 400, 401, 403, 404, 407, 409, 410] {
                assert_eq!(vault(Operation::Unwrap, status, body), (Unclassified, Detail::Other), "{status} {body}");
            }
            assert_eq!(vault(Operation::Unwrap, 429, body).0, Throttled);
            for status in [408, 500, 502, 503, 504, 599] {
                assert_eq!(vault(Operation::Unwrap, status, body).0, Unreachable);
            }
        }
    }

    #[test]
    fn the_number_of_an_entra_error_goes_before_its_code() {
        use KmsClass::*;
        let class = |number: &str, code: &str| {
            let body = format!(r#"{{"error":"{code}","error_description":"AADSTS{number}: m"}}"#);
            token_refusal(Peer::Entra, 400, &Headers::new(), body.as_bytes()).class
        };
        for code in ["invalid_grant", "invalid_request", "invalid_client", "unauthorized_client"] {
            assert_eq!(class("50196", code), Throttled, "{code}");
            for number in ["90061", "50166", "900612", "90033"] {
                assert_eq!(class(number, code), Unreachable, "{number} {code}");
            }
        }
        // Longer numbers are other errors.
        assert_eq!(class("501960", "invalid_grant"), Denied);
        assert_eq!(class("7000215", "invalid_client"), Denied);
        let mut headers = Headers::new();
        headers.insert("retry-after", "300");
        let body = br#"{"error":"invalid_grant","error_description":"AADSTS50196: m"}"#;
        let failure = token_refusal(Peer::Entra, 400, &headers, body);
        assert_eq!(failure.retry_after, Some(Duration::from_secs(300)));
    }

    #[test]
    fn the_network_is_known_by_the_text_too() {
        use KmsClass::*;
        let said = |code: &str, message: &str| format!(r#"{{"error":{{"code":"{code}","message":"{message}"}}}}"#);
        for (message, expected) in [
            ("Client address is not authorized and caller is not a trusted service.", Misconfigured),
            ("Client address (192.0.2.1) is not authorized and caller is not a trusted service.", Misconfigured),
            ("Public network access is disabled and request is not from a trusted service", Misconfigured),
            ("Connection is not an approved private link and caller was ignored", Misconfigured),
            ("Caller is not authorized to perform action on resource.", Denied),
            ("", Denied),
        ] {
            for code in ["Forbidden", "AccessDenied"] {
                assert_eq!(vault(Operation::Unwrap, 403, &said(code, message)).0, expected, "{code} {message}");
            }
            assert_ne!(vault(Operation::Unwrap, 403, &said("SomethingNew", message)).0, Denied);
        }
    }

    #[test]
    fn an_expired_key_is_no_revocation_when_it_is_to_wrap() {
        for inner in ["KeyExpired", "KeyNotYetValid"] {
            assert_eq!(vault(Operation::Wrap, 403, &forbidden(inner)).0, KmsClass::Misconfigured);
            assert_eq!(vault(Operation::Unwrap, 403, &forbidden(inner)).0, KmsClass::Disabled);
        }
    }

    #[test]
    fn only_a_missing_key_is_deleted() {
        let said = |code| format!(r#"{{"error":{{"code":"{code}","message":"m"}}}}"#);
        assert_eq!(vault(Operation::Unwrap, 404, &said("KeyNotFound")), (KmsClass::Deleted, Detail::NotFound));
        assert_eq!(vault(Operation::Unwrap, 404, &said("NotFound")), (KmsClass::Unclassified, Detail::Other));
        assert_eq!(vault(Operation::Unwrap, 401, &said("Unauthorized")), (KmsClass::Denied, Detail::Unauthorized));
    }

    #[test]
    fn a_401_without_json_counts_with_key_vaults_challenge_only() {
        let mut headers = Headers::new();
        headers.insert("www-authenticate", "Basic realm=proxy");
        let class = |headers: &Headers| vault_refusal(Operation::Wrap, 401, headers, b"OK").error.class;
        assert_eq!(class(&headers), KmsClass::Unclassified);
        headers.insert("www-authenticate", r#"Bearer authorization="https://login/t", resource="https://vault""#);
        assert_eq!(class(&headers), KmsClass::Denied);
    }

    #[test]
    fn the_time_to_come_back_is_read_in_seconds_and_milliseconds() {
        for (name, value, expected) in [
            ("retry-after", "7", Some(Duration::from_secs(7))),
            ("retry-after-ms", "250", Some(Duration::from_millis(250))),
            ("x-ms-retry-after-ms", "250", Some(Duration::from_millis(250))),
            ("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT", None),
            ("retry-after", "-1", None),
            ("retry-after", "99999999999999999999999", None),
        ] {
            let mut headers = Headers::new();
            headers.insert(name, value);
            assert_eq!(retry_after(&headers), expected, "{name}: {value}");
        }
    }

    #[test]
    fn a_quoted_text_is_one_line_of_bounded_length_whatever_it_is() {
        assert_eq!(bounded("a\r\n b\u{0}c  d\u{85}"), "a b c d");
        let long = bounded(&"ä".repeat(1000));
        assert_eq!(long.chars().count(), LONGEST_QUOTE + 1);
        let error = vault_refusal(Operation::Unwrap, 502, &Headers::new(), &[0xff; 5000]).error.to_string();
        assert!(error.len() < 2000, "{}", error.len());
        // What is no refusal may hold a payload.
        let error = vault_refusal(Operation::Unwrap, 201, &Headers::new(), b"payload").error.to_string();
        assert!(!error.contains("payload"), "{error}");
    }

    #[test]
    fn a_credentials_error_is_a_refusal_only_if_it_says_so() {
        use KmsClass::*;
        let inner = |kind| azure_core::Error::with_message(kind, "inner");
        let outer = |error| azure_core::Error::with_error(AzureKind::Credential, error, "SomeCredential failed");
        for (kind, expected) in [
            (AzureKind::Credential, Denied),
            (AzureKind::Connection, Unreachable),
            (AzureKind::Io, Unreachable),
            (AzureKind::DataConversion, Unclassified),
            (AzureKind::Other, Unclassified),
        ] {
            assert_eq!(credential_failure(&outer(inner(kind.clone()))).class, expected, "{kind}");
        }
        let cli = |text: &'static str| azure_core::Error::with_message(AzureKind::Credential, text);
        assert_eq!(credential_failure(&cli("AzureCliCredential: Please run 'az login'")).class, Denied);
        assert_eq!(credential_failure(&cli("AzureCliCredential: az not found on PATH")).class, Misconfigured);
        assert_eq!(credential_failure(&cli("AzureCliCredential: Traceback")).class, Unclassified);
        let failure = Failure { retry_after: Some(Duration::from_secs(3)), ..Failure::new(Throttled, "t") };
        let error = credential_failure(&outer(failure.into_azure()));
        assert_eq!((error.class, error.retry_after), (Throttled, Some(Duration::from_secs(3))));
    }
}
