//! [`VaultTransit`]: a master key in the transit engine of HashiCorp Vault or OpenBao, by its HTTP interface (feature
//! `vault`).

mod answer;
mod auth;
mod http;
mod settings;
#[cfg(test)]
mod stand_in;

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use zeroize::Zeroizing;

pub use auth::VaultAuth;
pub use settings::VaultTransitBuilder;

use answer::{Asked, Call, Json, NO_SUCH_TYPE, unexpected};
use auth::Session;
use http::{Head, Http};

use crate::error::{Error, ErrorKind, KmsClass, KmsError, PageError, Result};
use crate::format::wrapped::CONTEXT_LEN;
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::secret::KeyPayload;

const PROVIDER: &str = "vault-transit";
/// What every ciphertext of transit begins with; its version and base64 follow.
const PREFIX: &str = "vault:v";
/// The shortest nonce and tag of the engine's ciphers.
const CIPHER_OVERHEAD: usize = 12 + 16;
const MAX_BLOB: usize = 4096;
/// A payload in base64.
const PLAINTEXT_LEN: usize = KeyPayload::LEN.div_ceil(3) * 4;
/// What stands before it in the body of an encryption.
const ENCRYPT_HEAD: &str = "{\"plaintext\":\"";
/// A context in base64.
const CONTEXT_TEXT_LEN: usize = CONTEXT_LEN.div_ceil(3) * 4;

/// A master key in the transit engine of HashiCorp Vault or OpenBao.
///
/// The key must be of a type with associated data (`aes256-gcm96`, `chacha20-poly1305`; OpenBao's `xchacha20-poly1305`) and
/// not `derived`. The key never leaves the server; the context of each wrap is bound as `associated_data`. The least policy,
/// the set-up of the auth methods and what each failure means are in docs/kms/vault.md.
///
/// The id is `vault-transit:` and `NAMESPACE/MOUNT/keys/NAME`, without the server's address: servers may move, the key may not
/// be renamed. The key version is the number in the ciphertext's `vault:vN:`.
///
/// A key that is missing is never made anew, even if the token would allow it: transit makes keys as a side effect of
/// `encrypt` ("upsert"), and every encryption of ours names a type of key that does not exist, which the server looks at only
/// when it would make one. So a lost key is [`KmsClass::Deleted`], and not a fresh one that opens nothing.
///
/// [`KeyWrapper::rewrap_key`] is a decryption and an encryption: `transit/rewrap` knows no associated data.
///
/// A login that fails with a bare "permission denied" is [`KmsClass::Unclassified`]: it is what the server says when access is
/// withdrawn, and also when the Kubernetes API server is down or somebody has had the role locked by wrong secrets. Access that
/// is withdrawn is seen before, at a call: a token that the server took, and whose time is not over, is refused. A login that
/// was refused is not repeated with the same credentials for a second, and then ever longer, up to a minute.
///
/// [`KmsClass::Disabled`] is also said of a ciphertext of a version below the key's `min_decryption_version`. The server looks
/// at no more than the number before the ciphertext, so that who can change a stored record can cause it; the checks of a
/// running cluster use an authenticated probe instead.
///
/// Tokens of login methods are renewed at a call when two thirds of their lease have passed, and got anew when that fails or
/// the server refuses one; threads share one login. Redirects of a standby to its leader are followed once, to the same path
/// and never from TLS to none. Calls last no longer than [`WrapContext::deadline`] and are not repeated but for the one after
/// a new login.
///
/// Plaintext is wiped from this wrapper's own buffers. The HTTP client and TLS keep some in theirs, which are not wiped.
/// [`WrapContext::label`] goes along as the header `X-Pageseal-Label`, for audit logs that are told to note it.
///
/// After a fork(2) the child must make a new one: connections are shared with the parent, so that calls through an inherited
/// one are refused ([`KmsClass::Misconfigured`]). Clones share the token and the connections.
///
/// Source: the services' documentation, <https://openbao.org/api-docs/secret/transit/> and
/// <https://developer.hashicorp.com/vault/api-docs/secret/transit>.
///
/// ```
/// use pageseal::{KeyWrapper, VaultAuth, VaultTransit};
///
/// let auth = VaultAuth::app_role_with_secret_file("675a50e7-cfe0-be76-e35f-49ec009731ea", "/run/secrets/secret-id");
/// let key = VaultTransit::builder("http://127.0.0.1:8200", "pageseal", auth).namespace("team").build()?;
/// assert_eq!(key.id().to_string(), "vault-transit:team/transit/keys/pageseal");
/// # Ok::<(), pageseal::Error>(())
/// ```
#[derive(Clone)]
pub struct VaultTransit(Arc<Inner>);

struct Inner {
    http: Http,
    session: Session,
    id: MasterKeyId,
    encrypt_path: String,
    decrypt_path: String,
    process: u32,
}

/// Settings that were checked.
struct Parts {
    http: Http,
    auth: VaultAuth,
    mount: String,
    key: String,
    namespace: Option<String>,
}

impl VaultTransit {
    /// Settings for the key named `key` at the server at `address`, such as `https://vault.example.com:8200`. An address
    /// without TLS is taken for this machine only, or with [`VaultTransitBuilder::dangerous_allow_plain_http`].
    pub fn builder(address: impl Into<String>, key: impl Into<String>, auth: VaultAuth) -> VaultTransitBuilder {
        VaultTransitBuilder::new(address.into(), key.into(), auth)
    }

    /// The key and the credentials that the environment names. Of those that begin with `VAULT_`, OpenBao's names (`BAO_`) go
    /// before.
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `VAULT_ADDR` | the server, such as `https://vault.example.com:8200`; required |
    /// | `VAULT_TOKEN` | a token, if no login method and no file is named |
    /// | `VAULT_NAMESPACE` | the namespace of the engine and the auth method |
    /// | `VAULT_CACERT` | a PEM file with the certificate authorities to trust, and no others |
    /// | `VAULT_SKIP_VERIFY` | refused unless false |
    /// | `VAULT_CAPATH`, `VAULT_CACERT_BYTES` | refused: not supported |
    /// | `VAULT_CLIENT_CERT`, `VAULT_CLIENT_KEY`, `VAULT_TLS_SERVER_NAME` | refused: not supported |
    /// | `VAULT_AGENT_ADDR`, `VAULT_PROXY_ADDR`, `VAULT_HTTP_PROXY` | refused: not supported |
    /// | `PAGESEAL_VAULT_KEY` | the key's name; required |
    /// | `PAGESEAL_VAULT_MOUNT` | where the transit engine is mounted; `transit` if not set |
    /// | `PAGESEAL_VAULT_ROLE_ID` | the role id of an AppRole |
    /// | `PAGESEAL_VAULT_SECRET_ID_FILE`, `PAGESEAL_VAULT_SECRET_ID` | its secret id, in a file or as it is |
    /// | `PAGESEAL_VAULT_KUBERNETES_ROLE` | the role of the Kubernetes method |
    /// | `PAGESEAL_VAULT_KUBERNETES_JWT_FILE` | its token, if not the pod's own |
    /// | `PAGESEAL_VAULT_AUTH_MOUNT` | where the login method is mounted; `approle` or `kubernetes` if not set |
    /// | `PAGESEAL_VAULT_TOKEN_FILE` | a file with a token, read at each call |
    /// | `ALL_PROXY`, `HTTPS_PROXY`, `HTTP_PROXY`; `NO_PROXY` | a proxy for addresses with TLS, the first that is set |
    ///
    /// The names of the proxy may be in lower case too. One that is no URL is passed over. A part of a login method without the
    /// method, such as a secret id without a role id, is refused. Without any credentials, the token in `~/.vault-token` is used, as by `vault` and `bao`.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`], naming the variable that is missing, wrong or not supported.
    pub fn from_env() -> Result<Self> {
        VaultTransitBuilder::from_variables(&text_of)?.build()
    }

    /// Uses `auth` from now on, in all clones, for calls that have not begun.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] if it cannot be sent; then nothing has changed. Whether the server takes it, the next call
    /// tells.
    pub fn replace_auth(&self, auth: VaultAuth) -> Result<()> {
        self.0.session.replace(auth.checked()?);
        Ok(())
    }

    fn assemble(parts: Parts) -> Self {
        let Parts { http, auth, mount, key, namespace } = parts;
        let prefix = namespace.map(|namespace| namespace + "/").unwrap_or_default();
        Self(Arc::new(Inner {
            http,
            session: Session::new(auth),
            id: MasterKeyId::new(PROVIDER, format!("{prefix}{mount}/keys/{key}")),
            encrypt_path: format!("{mount}/encrypt/{key}"),
            decrypt_path: format!("{mount}/decrypt/{key}"),
            process: std::process::id(),
        }))
    }

    /// Asks once; and once more with a new token, if the server refuses the one in use.
    fn ask(&self, asked: &Asked<'_>, body: &[u8], cx: &WrapContext<'_>) -> Result<Json, KmsError> {
        let Inner { http, session, .. } = &*self.0;
        let post = |token: &str| {
            http.post(
                &Head { path: asked.path, token: Some(token), label: Some(cx.label), deadline: cx.deadline },
                body,
            )
        };
        let token = session.token(http, cx.deadline)?;
        let mut answer = post(token.text())?;
        if answer.is_denied() {
            let counts = session.vouches_for(&token);
            match session.after_refusal(&token, http, cx.deadline) {
                Ok(None) => {}
                Ok(Some(next)) => {
                    answer = post(next.text())?;
                    if answer.is_denied() {
                        session.bar(&next);
                    } else if answer.status == 200 {
                        next.was_taken();
                    }
                }
                // A refusal of a token that was good until now is a verdict, unless a login could still show otherwise.
                Err(why) if counts && !matches!(why.class, KmsClass::Unreachable | KmsClass::Throttled) => {
                    return Err(both(&answer.into_error(asked), &why));
                }
                Err(why) => return Err(why),
            }
        } else if answer.status == 200 {
            token.was_taken();
        }
        answer.into_json(asked)
    }

    fn asked<'a>(&'a self, call: Call, path: &'a str, secret: &'a [u8]) -> Asked<'a> {
        Asked { call, path, namespace: self.0.http.namespace(), secret }
    }

    fn same_process(&self) -> Result<(), KmsError> {
        if self.0.process == std::process::id() {
            return Ok(());
        }
        let forked = Error::with_source(
            ErrorKind::Forked,
            "this key wrapper was made before a fork, and shares its connections with the parent; make a new one",
            PageError::Forked,
        );
        Err(KmsError::with_source(KmsClass::Misconfigured, forked))
    }
}

impl KeyWrapper for VaultTransit {
    fn id(&self) -> MasterKeyId {
        self.0.id.clone()
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.same_process()?;
        let body = encrypt_body(key, cx)?;
        let plaintext = &body[ENCRYPT_HEAD.len()..][..PLAINTEXT_LEN];
        let asked = self.asked(Call::Encrypt, &self.0.encrypt_path, plaintext);
        let json = self.ask(&asked, &body, cx)?;
        let blob = json.text("data", "ciphertext").unwrap_or_default();
        let version = Ciphertext::parse(blob.as_bytes()).map(|ciphertext| ciphertext.version.to_owned());
        let key_version = version.ok_or_else(|| unexpected(&asked, "gave no ciphertext of a known form"))?;
        Ok(WrappedKey { master_key: self.id(), key_version, blob: blob.as_bytes().to_vec() })
    }

    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.same_process()?;
        let bad = |text: String| KmsError::with_source(KmsClass::BadCiphertext, text);
        if key.master_key != self.0.id {
            return Err(bad(format!("it was wrapped by {}, not by {}", key.master_key, self.0.id)));
        }
        let ciphertext = Ciphertext::parse(&key.blob).ok_or_else(|| bad("it is no ciphertext of transit".into()))?;
        if ciphertext.version != key.key_version {
            let named = answer::quoted(&key.key_version);
            return Err(bad(format!("the record names version {named:?}, its ciphertext {:?}", ciphertext.version)));
        }
        let asked = self.asked(Call::Decrypt, &self.0.decrypt_path, b"");
        let json = self.ask(&asked, &decrypt_body(ciphertext.text, cx), cx)?;
        let text = json.text("data", "plaintext").unwrap_or_default();
        let mut bytes = Zeroizing::new([0; PLAINTEXT_LEN]);
        match STANDARD.decode_slice(text, &mut *bytes) {
            Ok(KeyPayload::LEN) => Ok(KeyPayload::from_bytes(&mut bytes[..KeyPayload::LEN])?),
            _ => Err(unexpected(&asked, "gave no plaintext of 128 bytes")),
        }
    }
}

impl fmt::Debug for VaultTransit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("VaultTransit");
        shown.field("address", &self.0.http.address()).field("id", &self.0.id).finish_non_exhaustive()
    }
}

/// The refusal of a call, with what became of the login after it.
fn both(refusal: &KmsError, login: &KmsError) -> KmsError {
    let text = |error: &KmsError| error.source.as_ref().map(ToString::to_string).unwrap_or_default();
    let text = format!("{}; and there is no new token: {}", text(refusal), text(login));
    KmsError::with_source(refusal.class, text)
}

/// A variable of the environment. What is not UTF-8 comes out as a text that no setting takes: it must not count as unset.
fn text_of(name: &str) -> Option<String> {
    std::env::var_os(name).map(|value| value.to_string_lossy().into_owned())
}

/// A ciphertext's `vault:vN:` and base64, as [`KeyWrapper::wrap_key`] stores it.
struct Ciphertext<'a> {
    version: &'a str,
    text: &'a str,
}

impl<'a> Ciphertext<'a> {
    /// None for what the engine cannot have made. Version 0 is among that: the engine would take it for version 1.
    fn parse(blob: &'a [u8]) -> Option<Self> {
        let text = std::str::from_utf8(blob).ok().filter(|text| text.len() <= MAX_BLOB)?;
        let (version, base64) = text.strip_prefix(PREFIX)?.split_once(':')?;
        let number = version.len() <= 9 && version.bytes().all(|byte| byte.is_ascii_digit());
        if !number || version.is_empty() || version.starts_with('0') {
            return None;
        }
        let bytes = STANDARD.decode(base64).ok()?;
        (bytes.len() >= KeyPayload::LEN + CIPHER_OVERHEAD).then_some(Self { version, text })
    }
}

/// In a buffer of the right size from the start: one that grows leaves copies behind.
fn encrypt_body(key: &KeyPayload, cx: &WrapContext<'_>) -> Result<Zeroizing<Vec<u8>>, KmsError> {
    let (head, middle, tail) = (ENCRYPT_HEAD, "\",\"type\":\"", "\",\"associated_data\":\"");
    let length = head.len() + PLAINTEXT_LEN + middle.len() + NO_SUCH_TYPE.len() + tail.len() + CONTEXT_TEXT_LEN + 2;
    let mut body = Zeroizing::new(Vec::with_capacity(length));
    body.extend_from_slice(head.as_bytes());
    body.resize(head.len() + PLAINTEXT_LEN, 0);
    let encoded = key.with_bytes(|bytes| STANDARD.encode_slice(bytes, &mut body[head.len()..]))?;
    debug_assert_eq!(encoded, Ok(PLAINTEXT_LEN));
    for part in [middle, NO_SUCH_TYPE, tail, &STANDARD.encode(cx.associated_data()), "\"}"] {
        body.extend_from_slice(part.as_bytes());
    }
    debug_assert_eq!((body.len(), body.capacity()), (length, length));
    Ok(body)
}

/// Neither part holds what JSON would escape.
fn decrypt_body(ciphertext: &str, cx: &WrapContext<'_>) -> Vec<u8> {
    let context = STANDARD.encode(cx.associated_data());
    format!("{{\"ciphertext\":\"{ciphertext}\",\"associated_data\":\"{context}\"}}").into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::calls::fixtures::{payload, request};
    use std::time::{Duration, Instant};

    fn wrapper() -> VaultTransit {
        // Nobody listens there.
        VaultTransit::builder("http://127.0.0.1:1", "k", VaultAuth::token("s.t")).build().unwrap()
    }

    fn context() -> WrapContext<'static> {
        let request = request();
        WrapContext {
            cluster: request.cluster,
            database: request.database,
            generation: request.generation,
            purpose: request.purpose,
            deadline: Instant::now() + Duration::from_secs(20),
            label: "",
        }
    }

    fn blob(version: &str, bytes: usize) -> Vec<u8> {
        format!("vault:v{version}:{}", STANDARD.encode(vec![7; bytes])).into_bytes()
    }

    #[test]
    fn what_transit_cannot_have_made_is_refused_without_a_call() {
        let wrapper = wrapper();
        let wrapped =
            |version: &str, blob: Vec<u8>| WrappedKey { master_key: wrapper.id(), key_version: version.into(), blob };
        let class = |wrapped: &WrappedKey| wrapper.unwrap_key(wrapped, &context()).err().unwrap().class;
        assert_eq!(class(&wrapped("1", blob("1", 156))), KmsClass::Unreachable);
        assert_eq!(class(&wrapped("123456789", blob("123456789", 168))), KmsClass::Unreachable);
        for (version, blob) in [
            ("2", blob("1", 156)),
            ("", blob("1", 156)),
            ("01", blob("1", 156)),
            ("01", blob("01", 156)),
            ("0", blob("0", 156)),
            ("", blob("", 156)),
            ("-1", blob("-1", 156)),
            ("1234567890", blob("1234567890", 156)),
            ("1", blob("1", 155)),
            ("1", blob("1", 5000)),
            ("1", blob("1", 156)[1..].to_vec()),
            ("1", [&blob("1", 156)[..], b"\""].concat()),
            ("1", [&blob("1", 156)[..], b"\n"].concat()),
            ("1", b"vault:v1:".to_vec()),
            ("1", b"vault:v1".to_vec()),
            ("1", vec![0xff; 200]),
            ("", Vec::new()),
        ] {
            let shown = String::from_utf8_lossy(&blob[..blob.len().min(20)]).into_owned();
            assert_eq!(class(&wrapped(version, blob)), KmsClass::BadCiphertext, "{version} {shown}");
        }
        let foreign = WrappedKey { master_key: MasterKeyId::new(PROVIDER, "other"), ..wrapped("1", blob("1", 156)) };
        assert_eq!(class(&foreign), KmsClass::BadCiphertext);
    }

    #[test]
    fn the_bodies_are_json_of_what_is_meant_and_the_first_is_never_moved() {
        let cx = context();
        let body = encrypt_body(&payload(7), &cx).unwrap();
        let parsed: serde_json::Value = serde_json::from_slice(&body).unwrap();
        let expected = serde_json::json!({
            "plaintext": STANDARD.encode([7; 128]),
            "type": "pageseal-never-creates-a-key",
            "associated_data": STANDARD.encode(cx.associated_data()),
        });
        assert_eq!(parsed, expected);
        let parsed: serde_json::Value = serde_json::from_slice(&decrypt_body("vault:v1:AAAA", &cx)).unwrap();
        let context = STANDARD.encode(cx.associated_data());
        assert_eq!(parsed, serde_json::json!({ "ciphertext": "vault:v1:AAAA", "associated_data": context }));
    }

    #[test]
    fn what_was_made_before_a_fork_is_refused_with_what_to_do() {
        let mut wrapper = wrapper();
        Arc::get_mut(&mut wrapper.0).unwrap().process ^= 1;
        let error = wrapper.wrap_key(&payload(1), &context()).unwrap_err();
        assert_eq!(error.class, KmsClass::Misconfigured);
        assert!(error.to_string().contains("make a new one"), "{error}");
        let wrapped = WrappedKey { master_key: wrapper.id(), key_version: "1".into(), blob: blob("1", 156) };
        assert_eq!(wrapper.unwrap_key(&wrapped, &context()).err().unwrap().class, KmsClass::Misconfigured);
    }

    #[test]
    fn nothing_secret_is_shown() {
        let shown =
            format!("{:?} {:?}", wrapper(), VaultTransit::builder("http://127.0.0.1", "k", VaultAuth::token("s.t")));
        assert!(!shown.contains("s.t"), "{shown}");
    }

    use super::stand_in::{Request, StandIn};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    fn told(status: u16, text: &str) -> (u16, String) {
        (status, serde_json::json!({ "errors": [text] }).to_string())
    }

    fn wrapped() -> (u16, String) {
        let text = String::from_utf8(blob("1", 156)).unwrap();
        (200, serde_json::json!({ "data": { "ciphertext": text } }).to_string())
    }

    /// A login that gives the token `t`.
    fn logged_in(seconds: u64, uses: u64) -> (u16, String) {
        let auth = serde_json::json!({ "client_token": "t", "lease_duration": seconds, "num_uses": uses });
        (200, serde_json::json!({ "auth": auth }).to_string())
    }

    const LOGIN: &str = "auth/approle/login";

    fn of(server: &StandIn, auth: VaultAuth) -> VaultTransit {
        VaultTransit::builder(&server.address, "k", auth).build().unwrap()
    }

    fn role() -> VaultAuth {
        VaultAuth::app_role("role", "secret-id")
    }

    fn failure(wrapper: &VaultTransit) -> KmsError {
        wrapper.wrap_key(&payload(7), &context()).expect_err("the stand-in refuses")
    }

    /// A server that takes the role and the call until the test turns it; from then on, logins are answered by `login` and
    /// calls are refused.
    fn turning(seconds: u64, uses: u64, login: (u16, String)) -> (StandIn, Arc<AtomicBool>) {
        let turned = Arc::<AtomicBool>::default();
        let seen = Arc::clone(&turned);
        let server = StandIn::start(move |request| match (seen.load(Ordering::Relaxed), request.path.as_str()) {
            (false, LOGIN) => logged_in(seconds, uses),
            (false, _) => wrapped(),
            (true, LOGIN) => login.clone(),
            (true, _) => told(403, "permission denied"),
        });
        (server, turned)
    }

    #[test]
    fn the_refusal_of_a_good_token_is_told_though_the_new_login_fails() {
        for (status, text) in [
            // What `auth disable` gives.
            (403, "permission denied"),
            (404, "namespace not found"),
            (400, "something new"),
            (400, "invalid role or secret ID"),
        ] {
            let (server, turned) = turning(3600, 0, told(status, text));
            let wrapper = of(&server, role());
            wrapper.wrap_key(&payload(7), &context()).unwrap();
            turned.store(true, Ordering::Relaxed);
            for _ in 0..3 {
                let error = failure(&wrapper);
                assert_eq!(error.class, KmsClass::Denied, "{status} {text}: {error}");
                assert!(error.to_string().contains(text), "{error}");
            }
            turned.store(false, Ordering::Relaxed);
            wrapper.wrap_key(&payload(7), &context()).unwrap();
        }
    }

    #[test]
    fn the_refusal_of_a_token_that_may_have_ended_is_no_verdict_if_the_login_gives_none() {
        for (seconds, uses, asked_before, login, class) in [
            (1, 0, true, told(403, "permission denied"), KmsClass::Unclassified),
            (3600, 7, true, told(403, "permission denied"), KmsClass::Unclassified),
            (3600, 0, false, told(403, "permission denied"), KmsClass::Unclassified),
            (3600, 0, true, told(503, "Vault is sealed"), KmsClass::Unreachable),
            (3600, 0, true, told(429, "rate limit quota exceeded"), KmsClass::Throttled),
        ] {
            let (server, turned) = turning(seconds, uses, login.clone());
            let wrapper = of(&server, role());
            if asked_before {
                wrapper.wrap_key(&payload(7), &context()).unwrap();
            } else {
                wrapper.0.session.token(&wrapper.0.http, context().deadline).unwrap();
            }
            thread::sleep(Duration::from_millis(if seconds == 1 { 1100 } else { 0 }));
            turned.store(true, Ordering::Relaxed);
            let error = failure(&wrapper);
            assert_eq!(error.class, class, "{seconds} {uses} {asked_before} {login:?}: {error}");
        }
    }

    #[test]
    fn a_refused_login_is_not_tried_again_at_once_but_with_other_credentials() {
        let path = std::env::temp_dir().join(format!("pageseal-vault-rest-{}", std::process::id()));
        std::fs::write(&path, "stale").unwrap();
        let server = StandIn::start(|request: &Request| match request.path.as_str() {
            LOGIN if request.body.contains("fresh") => logged_in(3600, 0),
            LOGIN => told(400, "invalid role or secret ID"),
            _ => wrapped(),
        });
        let wrapper = of(&server, VaultAuth::app_role_with_secret_file("role", &path));
        for _ in 0..5 {
            assert_eq!(failure(&wrapper).class, KmsClass::Denied);
        }
        assert!(server.count(LOGIN) <= 2, "{}", server.count(LOGIN));
        std::fs::write(&path, "fresh").unwrap();
        wrapper.wrap_key(&payload(7), &context()).unwrap();
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_just_being_written_is_no_verdict() {
        let path = std::env::temp_dir().join(format!("pageseal-vault-half-{}", std::process::id()));
        let server = StandIn::start(|request: &Request| match request.path.as_str() {
            LOGIN if request.body.contains("whole-secret") => logged_in(3600, 0),
            LOGIN => told(400, "invalid role or secret ID"),
            _ if request.token == "whole-secret" || request.token == "t" => wrapped(),
            _ => told(403, "permission denied"),
        });
        for auth in [VaultAuth::token_file(&path), VaultAuth::app_role_with_secret_file("role", &path)] {
            let wrapper = of(&server, auth);
            std::fs::write(&path, "whole-se").unwrap();
            let writer = thread::spawn({
                let path = path.clone();
                move || {
                    thread::sleep(Duration::from_millis(150));
                    std::fs::write(&path, "whole-secret").unwrap();
                }
            });
            wrapper.wrap_key(&payload(7), &context()).unwrap();
            writer.join().unwrap();
            std::fs::write(&path, "").unwrap();
            wrapper.replace_auth(VaultAuth::token_file(&path)).unwrap();
            assert_eq!(failure(&wrapper).class, KmsClass::Misconfigured);
            std::fs::write(&path, "wrong").unwrap();
            assert_eq!(failure(&wrapper).class, KmsClass::Denied);
        }
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn connections_of_all_calls_in_flight_are_kept() {
        const CALLS: usize = 16;
        let meeting = Arc::new(std::sync::Barrier::new(CALLS));
        let server = StandIn::start(move |_| {
            meeting.wait();
            wrapped()
        });
        let wrapper = of(&server, VaultAuth::token("t"));
        for _ in 0..3 {
            thread::scope(|scope| {
                for _ in 0..CALLS {
                    scope.spawn(|| wrapper.wrap_key(&payload(7), &context()).unwrap());
                }
            });
        }
        assert_eq!(server.connections(), CALLS);
    }

    #[test]
    fn a_server_that_does_not_bind_the_context_is_refused() {
        let warning = "Endpoint ignored these unrecognized parameters: [associated_data]";
        let server = StandIn::start(move |_| {
            let data = serde_json::json!({
                "ciphertext": String::from_utf8(blob("1", 156)).unwrap(),
                "plaintext": STANDARD.encode([7; 128]),
            });
            (200, serde_json::json!({ "data": data, "warnings": [warning] }).to_string())
        });
        let wrapper = of(&server, VaultAuth::token("t"));
        let wrapped = WrappedKey { master_key: wrapper.id(), key_version: "1".into(), blob: blob("1", 156) };
        let unwrapped = wrapper.unwrap_key(&wrapped, &context()).err().unwrap();
        for error in [failure(&wrapper), unwrapped] {
            assert_eq!(error.class, KmsClass::Misconfigured);
            assert!(error.to_string().contains("associated_data"), "{error}");
        }
    }

    #[test]
    fn what_was_sent_is_in_no_error_whoever_echoes_it() {
        let plaintext = STANDARD.encode([7; 128]);
        for status in [200, 201, 400, 403, 404, 418, 500, 503] {
            for typed in [true, false] {
                let server = StandIn::start(move |request: &Request| {
                    let echo = || told(status, &format!("cannot take {}", request.body));
                    if typed { echo() } else { (status, request.body.clone()) }
                });
                let error = failure(&of(&server, VaultAuth::token("t"))).to_string();
                assert!(!error.contains(&plaintext[..16]), "{status} {typed}: {error}");
                let error = failure(&of(&server, VaultAuth::app_role("role", "secret-id-of-someone"))).to_string();
                assert!(!error.contains("secret-id-of"), "{status} {typed}: {error}");
            }
        }
        let half = StandIn::start(move |_| told(400, &format!("bad \"{}...", &plaintext[4..60])));
        let error = failure(&of(&half, VaultAuth::token("t"))).to_string();
        assert!(!error.contains("BwcHBwcH"), "{error}");
    }
}
