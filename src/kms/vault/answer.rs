//! [`Answer`]: what the server said, and which [`KmsClass`] that is.

use std::time::Duration;

use serde_json::Value;
use zeroize::{Zeroize, Zeroizing};

use crate::error::{KmsClass, KmsError};

/// The type of key that [`encrypt`](super::VaultTransit) asks for should the key be missing. There is none of this name, so
/// that the server refuses instead of making a key. For a key that exists the field means nothing.
pub(super) const NO_SUCH_TYPE: &str = "pageseal-never-creates-a-key";

/// Beyond this, a text of the server is cut in our errors.
const MAX_QUOTED: usize = 300;

#[derive(Default)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) retry_after: Option<Duration>,
    pub(super) location: Option<String>,
    pub(super) body: Zeroizing<Vec<u8>>,
}

/// A call, for those who judge its answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Call {
    Encrypt,
    Decrypt,
    Login,
    Renew,
}

/// What the text of an error names.
pub(super) struct Asked<'a> {
    pub(super) call: Call,
    pub(super) path: &'a str,
    pub(super) namespace: Option<&'a str>,
    /// What is secret in the body that is sent, as it stands there.
    pub(super) secret: &'a [u8],
}

impl Answer {
    pub(super) fn is_redirect(&self) -> bool {
        (300..400).contains(&self.status)
    }

    /// Whether the server itself refuses the token or the use of the path; not, whether a proxy on the way does. The server's
    /// own refusals have a text.
    pub(super) fn is_denied(&self) -> bool {
        self.status == 403 && self.errors().is_some_and(|said| !said.trim().is_empty())
    }

    /// The body of a good answer.
    pub(super) fn into_json(self, asked: &Asked<'_>) -> Result<Json, KmsError> {
        if self.status != 200 {
            return Err(self.into_error(asked));
        }
        let parsed = Json::parse(&self.body);
        let json = parsed.ok_or_else(|| unexpected(asked, "answered with something else than JSON"))?;
        if json.warns_of("associated_data") {
            let text = format!(
                "{}: the server does not know associated_data, which binds a wrapped key to its place; use a newer Vault or \
                 OpenBao (VAULT_ADDR)",
                asked.path
            );
            return Err(KmsError::with_source(KmsClass::Misconfigured, text));
        }
        Ok(json)
    }

    /// The messages of the server's `errors` list, if the body has one, which is of texts only: gateways have other lists of
    /// this name. The list may be empty.
    fn errors(&self) -> Option<Zeroizing<String>> {
        let json = Json::parse(&self.body)?;
        let list = json.0.get("errors")?.as_array()?;
        let texts: Option<Vec<_>> = list.iter().map(Value::as_str).collect();
        Some(Zeroizing::new(texts?.join("; ")))
    }

    /// Classifies an answer that is no success. A status that speaks for itself comes first; a 400 has many meanings, which
    /// only its text tells apart, and one that is not known is not guessed at.
    pub(super) fn into_error(self, asked: &Asked<'_>) -> KmsError {
        let errors = self.errors();
        let from_vault = errors.is_some();
        let said = match errors {
            Some(said) if said.trim().is_empty() => "without a message".to_owned(),
            Some(said) if echoes(&said, asked.secret) => "a message that repeats what was sent".to_owned(),
            Some(said) => quoted(&said),
            None => self.untyped_text(),
        };
        let has = |part: &str| said.contains(part);
        let login = asked.call == Call::Login;
        let namespace = asked.namespace.map_or_else(|| "no namespace".into(), |name| format!("the namespace {name}"));
        let (class, advice) = match self.status {
            429 => (KmsClass::Throttled, String::new()),
            // 472 and 473 are a disaster recovery secondary and a performance standby, 412 a standby that is behind.
            412 | 472 | 473 | 500.. => (KmsClass::Unreachable, String::new()),
            400 if self.is_from_tls_server() => {
                (KmsClass::Misconfigured, "the server wants https:// (VAULT_ADDR)".into())
            }
            _ if !from_vault => {
                (KmsClass::Unclassified, "this is no answer of Vault's, but of something before it (VAULT_ADDR)".into())
            }
            403 if self.is_denied() && login => login_refused(&said, &namespace),
            403 if self.is_denied() => (KmsClass::Denied, String::new()),
            404 if has("namespace not found") => {
                (KmsClass::Misconfigured, format!("the server does not know {namespace} (VAULT_NAMESPACE)"))
            }
            404 | 405 if login => (
                KmsClass::Misconfigured,
                format!("no such auth method is mounted there (PAGESEAL_VAULT_AUTH_MOUNT), in {namespace}"),
            ),
            404 | 405 => (
                KmsClass::Misconfigured,
                format!("no transit engine is mounted there (PAGESEAL_VAULT_MOUNT), in {namespace}"),
            ),
            400 => refused(asked.call, &said),
            _ => (KmsClass::Unclassified, String::new()),
        };
        let separator = if advice.is_empty() { "" } else { "; " };
        let text = format!("{}: HTTP {}: {said}{separator}{advice}", asked.path, self.status);
        KmsError { retry_after: self.retry_after, ..KmsError::with_source(class, text) }
    }

    /// Go's own server, asked without TLS, answers in plain text.
    fn is_from_tls_server(&self) -> bool {
        let text = b"HTTP request to an HTTPS server";
        self.body.len() < 200 && self.body.windows(text.len()).any(|part| part == text)
    }

    /// For a body that is not Vault's, which is never quoted: it may repeat the request, or be an answer with a plaintext.
    fn untyped_text(&self) -> String {
        format!("a body of {} bytes without Vault's list of errors", self.body.len())
    }
}

/// Whether a text repeats a part of a secret of 31 bytes or more, or a short one as a whole.
fn echoes(text: &str, secret: &[u8]) -> bool {
    const PART: usize = 16;
    let holds = |part: &[u8]| text.as_bytes().windows(part.len()).any(|window| window == part);
    let mut parts = secret.chunks_exact(PART);
    parts.any(holds) || (!secret.is_empty() && holds(secret))
}

/// The meanings of a 403 for a login. A bare "permission denied" is the same for a mount that does not exist, for a role that
/// is locked because somebody else tried wrong secrets, and for a Kubernetes API server that is down: no verdict. The clocks
/// of three machines meet in a JWT.
fn login_refused(said: &str, namespace: &str) -> (KmsClass, String) {
    if said.contains("not authorized") {
        return (KmsClass::Denied, String::new());
    }
    if said.contains("claim: token") {
        let advice = "compare the clocks of the Vault server and of Kubernetes, and see that the file with the service account's \
                      token is renewed (PAGESEAL_VAULT_KUBERNETES_JWT_FILE)";
        return (KmsClass::Unclassified, advice.into());
    }
    let advice = format!(
        "this says not whether access was withdrawn: see that the auth method is mounted there (PAGESEAL_VAULT_AUTH_MOUNT), in \
         {namespace}, that the role is not locked after failed logins (sys/locked-users), and that the server reaches the \
         Kubernetes API server"
    );
    (KmsClass::Unclassified, advice)
}

/// The meanings of a 400.
fn refused(call: Call, said: &str) -> (KmsClass, String) {
    let has = |part: &str| said.contains(part);
    if call == Call::Login {
        // The last is a role that does not take this address.
        let known = [
            "invalid role or secret ID",
            "invalid secret id",
            "invalid role ID",
            "invalid role name",
            "CIDR restrictions",
        ];
        let class = if known.iter().any(|&known| has(known)) { KmsClass::Denied } else { KmsClass::Unclassified };
        return (class, String::new());
    }
    let absent = has("encryption key not found") || (call == Call::Encrypt && has(NO_SUCH_TYPE));
    if absent {
        return (KmsClass::Deleted, "there is no key of this name, and none was made".into());
    }
    if has("soft-deleted") {
        return (KmsClass::Disabled, String::new());
    }
    if has("disallowed by policy (too old)") {
        return (KmsClass::Disabled, "lower min_decryption_version to use this version of the key".into());
    }
    if has("missing 'context'") || has("non-AEAD cipher") || has("not supported for key type") || has("convergent") {
        let wanted = "the key must be of type aes256-gcm96 or chacha20-poly1305, and not derived (PAGESEAL_VAULT_KEY)";
        return (KmsClass::Misconfigured, wanted.into());
    }
    let wrong = ["message authentication failed", "invalid ciphertext", "unable to decrypt", "version is too new"];
    if call == Call::Decrypt && wrong.iter().any(|&wrong| has(wrong)) {
        return (KmsClass::BadCiphertext, String::new());
    }
    (KmsClass::Unclassified, String::new())
}

/// An answer that says success and does not fit.
pub(super) fn unexpected(asked: &Asked<'_>, what: &str) -> KmsError {
    KmsError::with_source(KmsClass::Unclassified, format!("{}: the server {what}", asked.path))
}

/// On one line, without control characters, and not too long.
pub(super) fn quoted(text: &str) -> String {
    let clean: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let words: Vec<_> = clean.split_whitespace().collect();
    let mut line = words.join(" ");
    if let Some((end, _)) = line.char_indices().nth(MAX_QUOTED) {
        line.truncate(end);
        line.push_str("...");
    }
    line
}

/// A parsed body. Its strings, among which is a plaintext, are wiped when it is dropped.
pub(super) struct Json(Value);

impl Json {
    fn parse(body: &[u8]) -> Option<Self> {
        serde_json::from_slice(body).ok().map(Self)
    }

    fn warns_of(&self, name: &str) -> bool {
        let warnings = self.0.get("warnings").and_then(Value::as_array);
        warnings.is_some_and(|list| list.iter().filter_map(Value::as_str).any(|warning| warning.contains(name)))
    }

    pub(super) fn text(&self, object: &str, name: &str) -> Option<&str> {
        self.0.get(object)?.get(name)?.as_str()
    }

    pub(super) fn number(&self, object: &str, name: &str) -> Option<u64> {
        self.0.get(object)?.get(name)?.as_u64()
    }

    pub(super) fn flag(&self, object: &str, name: &str) -> Option<bool> {
        self.0.get(object)?.get(name)?.as_bool()
    }
}

impl Drop for Json {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

/// The parser bounds the depth.
fn wipe(value: &mut Value) {
    match value {
        Value::String(text) => text.zeroize(),
        Value::Array(list) => list.iter_mut().for_each(wipe),
        Value::Object(map) => map.values_mut().for_each(wipe),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use KmsClass::{BadCiphertext, Deleted, Denied, Disabled, Misconfigured, Throttled, Unclassified, Unreachable};

    fn classify(call: Call, status: u16, body: &str) -> KmsError {
        let answer = Answer { status, body: Zeroizing::new(body.as_bytes().to_vec()), ..Answer::default() };
        answer.into_error(&Asked { call, path: "transit/decrypt/k", namespace: Some("team"), secret: b"" })
    }

    const CIDR: &str = "source address \"127.0.0.1\" unauthorized by CIDR restrictions on the role: %!w(<nil>)";

    fn errors(text: &str) -> String {
        serde_json::json!({ "errors": [text] }).to_string()
    }

    /// The texts are those of OpenBao 2.7.2, and where marked of HashiCorp Vault's sources.
    #[test]
    fn every_known_answer_has_its_class() {
        let too_old = "ciphertext or signature version is disallowed by policy (too old)";
        let non_aead = "'[0].associated_data' provided for non-AEAD cipher suite rsa-2048";
        let derived = "missing 'context' for key derivation; the key was created using a derived key, which means more";
        for (call, status, text, class) in [
            (Call::Decrypt, 400, "refusing to use soft-deleted key", Disabled),
            (Call::Encrypt, 400, "refusing to use soft-deleted key", Disabled),
            (Call::Decrypt, 400, too_old, Disabled),
            (Call::Decrypt, 400, "encryption key not found", Deleted),
            // With disable_upsert.
            (Call::Encrypt, 400, "encryption key not found", Deleted),
            (Call::Encrypt, 400, "unknown key type pageseal-never-creates-a-key", Deleted),
            (Call::Decrypt, 400, "unknown key type pageseal-never-creates-a-key", Unclassified),
            (Call::Decrypt, 400, "cipher: message authentication failed", BadCiphertext),
            (Call::Decrypt, 400, "chacha20poly1305: message authentication failed", BadCiphertext),
            (Call::Decrypt, 400, "invalid ciphertext: version is too new", BadCiphertext),
            (Call::Decrypt, 400, "invalid ciphertext length", BadCiphertext),
            (Call::Decrypt, 400, "invalid ciphertext: unable to decrypt", BadCiphertext),
            (Call::Encrypt, 400, "cipher: message authentication failed", Unclassified),
            (Call::Encrypt, 400, non_aead, Misconfigured),
            (Call::Decrypt, 400, non_aead, Misconfigured),
            (Call::Encrypt, 400, derived, Misconfigured),
            (Call::Decrypt, 400, "something new", Unclassified),
            (Call::Decrypt, 403, "permission denied", Denied),
            (Call::Decrypt, 403, "1 error occurred:\n\t* permission denied\n\n", Denied),
            (Call::Decrypt, 404, "no handler for route \"nomount/decrypt/k\". route entry not found.", Misconfigured),
            (Call::Decrypt, 404, "namespace not found", Misconfigured),
            (Call::Decrypt, 405, "unsupported operation", Misconfigured),
            (Call::Decrypt, 412, "required index state not present", Unreachable),
            (Call::Decrypt, 418, "teapot", Unclassified),
            (Call::Decrypt, 429, "request path \"transit/decrypt/k\": rate limit quota exceeded", Throttled),
            (Call::Decrypt, 472, "", Unreachable),
            (Call::Decrypt, 473, "", Unreachable),
            (Call::Decrypt, 500, "internal error", Unreachable),
            // Whatever its text.
            (Call::Decrypt, 500, "encryption key not found", Unreachable),
            (Call::Decrypt, 501, "not initialized", Unreachable),
            (Call::Decrypt, 503, "Vault is sealed", Unreachable),
            (Call::Login, 400, "invalid role or secret ID", Denied),
            // HashiCorp Vault.
            (Call::Login, 400, "invalid secret id", Denied),
            (Call::Login, 400, "invalid role ID", Denied),
            (Call::Login, 400, "invalid role name \"nope\"", Denied),
            (Call::Login, 400, "missing secret_id", Unclassified),
            (Call::Login, 400, "encryption key not found", Unclassified),
            (Call::Login, 400, CIDR, Denied),
            (Call::Login, 403, "service account name not authorized", Denied),
            (Call::Login, 403, "namespace not authorized", Denied),
            // No such mount; a role that is locked out; a Kubernetes API server that is down.
            (Call::Login, 403, "permission denied", Unclassified),
            (Call::Login, 403, "invalid expiration time (exp) claim: token is expired", Unclassified),
            (Call::Login, 403, "invalid not before (nbf) claim: token not yet valid", Unclassified),
            (Call::Login, 403, "something new", Unclassified),
            // HashiCorp Vault; OpenBao says 403.
            (Call::Login, 404, "no handler for route \"auth/x/login\". route entry not found.", Misconfigured),
            (Call::Login, 500, "could not load backend configuration", Unreachable),
            (Call::Renew, 403, "permission denied", Denied),
            (Call::Renew, 400, "lease is not renewable", Unclassified),
        ] {
            let error = classify(call, status, &errors(text));
            assert_eq!(error.class, class, "{call:?} {status} {text}");
        }
    }

    #[test]
    fn a_verdict_is_taken_from_the_server_only_and_not_from_what_stands_before_it() {
        let page = "<html><h1>403 Forbidden</h1></html>";
        let json_api = "{\"errors\":[{\"status\":\"403\",\"title\":\"Forbidden\"}]}";
        let mixed = "{\"errors\":[\"permission denied\",{\"code\":403}]}";
        let none = "{\"success\":false,\"errors\":[]}";
        let empty = "{\"errors\":[\" \"]}";
        let foreign = [page, "", "{}", "[]", "null", "{\"errors\":7}", "\u{0}\u{1}", json_api, mixed];
        for body in foreign.into_iter().chain([none, empty]) {
            assert_eq!(classify(Call::Decrypt, 403, body).class, Unclassified, "{body}");
            let denied = Answer { status: 403, body: Zeroizing::new(body.into()), ..Answer::default() };
            assert!(!denied.is_denied(), "{body}");
        }
        for body in foreign.into_iter().chain(["default backend - 404"]) {
            for status in [400, 401, 403, 404] {
                assert_eq!(classify(Call::Decrypt, status, body).class, Unclassified, "{status} {body}");
            }
            assert_eq!(classify(Call::Decrypt, 502, body).class, Unreachable, "{body}");
            assert_eq!(classify(Call::Decrypt, 429, body).class, Throttled, "{body}");
            let denied = Answer { status: 403, body: Zeroizing::new(body.into()), ..Answer::default() };
            assert!(!denied.is_denied(), "{body}");
        }
        let plain = "Client sent an HTTP request to an HTTPS server.\n";
        let error = classify(Call::Decrypt, 400, plain);
        assert_eq!(error.class, Misconfigured);
        assert!(error.to_string().contains("VAULT_ADDR"), "{error}");
    }

    #[test]
    fn an_error_names_the_setting_and_quotes_the_server_on_one_line_of_bounded_length() {
        let error = classify(Call::Decrypt, 404, &errors("namespace not found")).to_string();
        assert!(error.contains("the namespace team (VAULT_NAMESPACE)"), "{error}");
        let error = classify(Call::Login, 404, &errors("no handler for route")).to_string();
        assert!(error.contains("PAGESEAL_VAULT_AUTH_MOUNT"), "{error}");
        let error = classify(Call::Decrypt, 400, &errors(&format!("a\n\t\u{1b}[31mb{}", "é".repeat(5000)))).to_string();
        assert!(error.contains("a [31mbé") && error.len() < 800 && !error.contains(['\n', '\u{1b}']), "{error}");
        assert!(classify(Call::Decrypt, 502, &"<p>".repeat(9999)).to_string().len() < 600);
    }

    #[test]
    fn a_login_that_is_refused_for_an_unclear_reason_says_what_to_look_at() {
        let error = classify(Call::Login, 403, &errors("permission denied")).to_string();
        for part in ["PAGESEAL_VAULT_AUTH_MOUNT", "locked", "Kubernetes API server", "the namespace team"] {
            assert!(error.contains(part), "{part}: {error}");
        }
        let error = classify(Call::Login, 403, &errors("invalid not before (nbf) claim: token not yet valid"));
        assert!(error.to_string().contains("clock"), "{error}");
    }

    #[test]
    fn strings_are_wiped_wherever_they_are() {
        let mut value = serde_json::json!({ "data": { "plaintext": "secret", "more": ["secret", 7, null] } });
        wipe(&mut value);
        assert_eq!(value, serde_json::json!({ "data": { "plaintext": "", "more": ["", 7, null] } }));
    }
}
