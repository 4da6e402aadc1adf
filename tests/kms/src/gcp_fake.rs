//! [`FakeCloudKms`], a fake: it answers as Google Cloud KMS is documented to, and was written without an account there.
//!
//! What is real: AES-256-GCM with associated data under a key for each version, the states of versions, the checksums, and
//! the RS256 signatures of service accounts. What is not: everything else. The texts of its errors are those of
//! `bodies/gcp`, whose README says where each is from.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey};
use serde_json::{Value, json};

use crate::http::{Answer, HttpServer, Request};

/// The key that the bodies name.
pub const KEY: &str = "projects/my-project/locations/europe-west3/keyRings/my-ring/cryptoKeys/my-key";
/// Another key of the same ring.
pub const OTHER_KEY: &str = "projects/my-project/locations/europe-west3/keyRings/my-ring/cryptoKeys/other-key";
/// The access token that is good from the beginning.
pub const GOOD_TOKEN: &str = "ya29.good-token-of-the-fake";

macro_rules! bodies {
    ($($name:literal)*) => {
        &[$(($name, include_str!(concat!("../bodies/gcp/", $name)))),*]
    };
}

/// Every file of `bodies/gcp` but its README.
pub const BODIES: &[(&str, &str)] = bodies! {
    "aborted.json" "api_not_used_before.json" "billing_disabled.json" "cancelled.json" "checksum_mismatch.json"
    "ciphertext_invalid.json" "ciphertext_wrong_context.json" "ciphertext_wrong_key.json" "credentials_missing.json"
    "deadline_exceeded.json" "denied_in_a_server_error.json" "gateway_forbidden.json" "impersonation_denied.json" "internal.json"
    "key_not_found.json" "metadata_403.txt" "permission_denied.json" "permission_denied_message_only.json"
    "precondition_other.json" "proxy_403.html" "proxy_502.html" "quota.json" "quota_retry_info.json" "robot_404.html"
    "scope_insufficient.json" "service_disabled.json" "state_contradictory.json" "state_destroy_scheduled.json"
    "state_destroyed.json" "state_destroyed_message_only.json" "state_disabled.json" "state_disabled_message_only.json"
    "state_import_failed.json" "state_of_another_key.json" "state_of_another_version.json" "state_pending_generation.json"
    "state_pending_import.json" "state_unknown.json" "sts_attribute_condition.json" "sts_invalid_target.json" "sts_issuer_unreachable.json"
    "token_invalid_client.json" "token_invalid_grant.json" "token_invalid_rapt.json" "token_invalid_request.json"
    "token_unauthorized_client.json" "unauthenticated.json" "unavailable.json" "unimplemented.json" "unknown.json"
    "user_project_denied.json" "vpc_service_controls.json" "without_status.json" "wrong_purpose.json"
};

/// The text of one of `bodies/gcp`.
///
/// # Panics
/// If there is none.
pub fn body(name: &str) -> &'static str {
    BODIES.iter().find(|body| body.0 == name).unwrap_or_else(|| panic!("no body {name}")).1
}

/// The state of a version.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)] // Google's names.
pub enum VersionState {
    Enabled,
    Disabled,
    DestroyScheduled,
    Destroyed,
    PendingGeneration,
}

impl VersionState {
    fn body(self) -> Option<&'static str> {
        match self {
            Self::Enabled => None,
            Self::Disabled => Some("state_disabled.json"),
            Self::DestroyScheduled => Some("state_destroy_scheduled.json"),
            Self::Destroyed => Some("state_destroyed.json"),
            Self::PendingGeneration => Some("state_pending_generation.json"),
        }
    }
}

/// What happens to the contents of messages on the way, both ways.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Corruption {
    /// The plaintext of a request arrives changed, and the checksum with it is not looked at: it is not confirmed.
    Unverified,
    /// The plaintext's checksum is confirmed, that of the associated data is not.
    ContextUnverified,
    /// The ciphertext of an answer is changed.
    Ciphertext,
    /// An answer has no checksum of the ciphertext.
    NoCiphertextChecksum,
    /// The plaintext of an answer is changed.
    Plaintext,
    /// An answer has no checksum of the plaintext.
    NoPlaintextChecksum,
    /// The ciphertext of a request is changed.
    RequestCiphertext,
    /// The version named is one of another key.
    VersionOfAnotherKey,
    /// The version named is none.
    NoVersion,
    /// The plaintext is cut to 100 bytes, with the right checksum.
    ShortPlaintext,
}

/// The fake. It serves with the process's life; clones are the same.
#[derive(Clone)]
pub struct FakeCloudKms {
    address: SocketAddr,
    certificate: Option<PathBuf>,
    state: Arc<Mutex<State>>,
}

type Canned = Box<dyn Fn(&Request) -> Option<Answer> + Send>;

struct State {
    keys: HashMap<String, Key>,
    /// Whether the identity has the role on the keys.
    allowed: bool,
    tokens: HashSet<String>,
    /// Public keys of service accounts (RSA, PKCS#1), by address.
    accounts: HashMap<String, Vec<u8>>,
    /// Refresh tokens and subject tokens that are exchanged for a good token.
    exchanged: HashSet<String>,
    /// What they are exchanged for, and what the metadata server gives.
    issued: String,
    corruption: Option<Corruption>,
    canned: Option<Canned>,
    seen: Vec<(String, Vec<(String, String)>)>,
}

struct Key {
    /// In every ciphertext, so that another key's is told.
    mark: [u8; 8],
    versions: Vec<Version>,
    primary: usize,
}

struct Version {
    material: [u8; 32],
    state: VersionState,
}

impl Default for FakeCloudKms {
    fn default() -> Self {
        Self::start()
    }
}

impl FakeCloudKms {
    /// On a free port of 127.0.0.1, with [`KEY`] and [`OTHER_KEY`] and [`GOOD_TOKEN`].
    pub fn start() -> Self {
        Self::start_as(None)
    }

    /// The same with TLS, under a certificate of its own.
    pub fn start_with_tls() -> Self {
        Self::start_as(Some("fake-cloud-kms"))
    }

    fn start_as(tls: Option<&str>) -> Self {
        let state = State {
            keys: [KEY, OTHER_KEY].map(|name| (name.to_owned(), Key::new())).into(),
            allowed: true,
            tokens: HashSet::from([GOOD_TOKEN.to_owned()]),
            accounts: HashMap::new(),
            exchanged: HashSet::new(),
            issued: GOOD_TOKEN.into(),
            corruption: None,
            canned: None,
            seen: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let shared = Arc::clone(&state);
        let handler = move |request: &Request| lock(&shared).answer(request);
        let server = match tls {
            Some(name) => HttpServer::tls(name, handler),
            None => HttpServer::plain(handler),
        };
        Self { address: server.address(), certificate: server.certificate().map(Path::to_owned), state }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The scheme and the address.
    pub fn url(&self) -> String {
        let scheme = if self.certificate.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// The file with its certificate, if it has one.
    pub fn certificate(&self) -> Option<&Path> {
        self.certificate.as_deref()
    }

    /// Whether the identity has the role on the keys.
    pub fn allow(&self, allowed: bool) {
        self.state().allowed = allowed;
    }

    /// Puts all versions of [`KEY`] that are not destroyed into this state.
    pub fn set_state(&self, state: VersionState) {
        let mut shared = self.state();
        let versions = &mut shared.keys.get_mut(KEY).expect("it was made at the start").versions;
        versions.iter_mut().filter(|version| version.state != VersionState::Destroyed).for_each(|it| it.state = state);
    }

    /// Puts one version of [`KEY`], counted from 1, into this state.
    pub fn set_version_state(&self, number: usize, state: VersionState) {
        self.state().keys.get_mut(KEY).expect("it was made at the start").versions[number - 1].state = state;
    }

    /// Makes a new version of [`KEY`], the primary one from now on, and returns its number.
    pub fn rotate(&self) -> usize {
        let mut shared = self.state();
        let key = shared.keys.get_mut(KEY).expect("it was made at the start");
        key.versions.push(Version::new());
        key.primary = key.versions.len() - 1;
        key.versions.len()
    }

    /// Takes this access token from now on.
    pub fn accept_token(&self, token: &str) {
        self.state().tokens.insert(token.to_owned());
    }

    /// Does not take this access token any more.
    pub fn revoke_token(&self, token: &str) {
        self.state().tokens.remove(token);
    }

    /// Gives and takes this access token from now on.
    pub fn issue_token(&self, token: &str) {
        self.accept_token(token);
        self.state().issued = token.to_owned();
    }

    /// Exchanges this refresh token or subject token for an access token from now on.
    pub fn accept_for_exchange(&self, token: &str) {
        self.state().exchanged.insert(token.to_owned());
    }

    /// Takes tokens that this service account has signed itself; the key is RSA in PKCS#1.
    pub fn accept_account(&self, address: &str, public_key: &[u8]) {
        self.state().accounts.insert(address.to_owned(), public_key.to_vec());
    }

    /// What happens to messages from now on.
    pub fn corrupt(&self, corruption: impl Into<Option<Corruption>>) {
        self.state().corruption = corruption.into();
    }

    /// Requests for which this returns an answer get it.
    pub fn answer_with(&self, canned: impl Fn(&Request) -> Option<Answer> + Send + 'static) {
        self.state().canned = Some(Box::new(canned));
    }

    /// Answers by itself again.
    pub fn answer_itself(&self) {
        self.state().canned = None;
    }

    /// Paths and headers of all requests since the last call of this.
    pub fn take_seen(&self) -> Vec<(String, Vec<(String, String)>)> {
        std::mem::take(&mut self.state().seen)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[allow(clippy::disallowed_methods)] // The fake is a service of its own, whose keys no test chooses.
fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).expect("the system has random bytes");
    bytes
}

impl Key {
    fn new() -> Self {
        Self { mark: random(), versions: vec![Version::new()], primary: 0 }
    }
}

impl Version {
    fn new() -> Self {
        Self { material: random(), state: VersionState::Enabled }
    }

    fn cipher(&self) -> LessSafeKey {
        LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &self.material).expect("the key has 32 bytes"))
    }
}

/// Of a ciphertext: the key's mark, and the version.
const HEADER_LEN: usize = 8 + 4;

impl State {
    fn answer(&mut self, request: &Request) -> Answer {
        self.seen.push((request.target.clone(), request.headers.clone()));
        if let Some(answer) = self.canned.as_ref().and_then(|canned| canned(request)) {
            return answer;
        }
        match request.path() {
            "/token" => self.exchange(request),
            "/computeMetadata/v1/instance/service-accounts/default/token" => self.metadata_token(request),
            path => self.key_service(path, request).unwrap_or_else(|refused| refused),
        }
    }

    /// The token endpoint: refresh tokens as JSON (RFC 6749, section 6), subject tokens as a form (RFC 8693).
    fn exchange(&self, request: &Request) -> Answer {
        let body = String::from_utf8_lossy(&request.body);
        let form = body.split('&').find_map(|field| field.strip_prefix("subject_token=").map(str::to_owned));
        let shown = request.json()["refresh_token"].as_str().map(str::to_owned).or(form).unwrap_or_default();
        match self.exchanged.contains(&shown) {
            true => {
                let issued = "urn:ietf:params:oauth:token-type:access_token";
                Answer::json(
                    "200 OK",
                    json!({"access_token": self.issued, "token_type": "Bearer", "expires_in": 3600,
                    "issued_token_type": issued}),
                )
            }
            false => Answer::json("400 Bad Request", body_of_error("token_invalid_grant.json", KEY, 1)),
        }
    }

    /// As Compute Engine and GKE serve it: every answer says whose it is.
    fn metadata_token(&self, request: &Request) -> Answer {
        let answer = match request.header("metadata-flavor") {
            Some("Google") => {
                Answer::json("200 OK", json!({"access_token": self.issued, "token_type": "Bearer", "expires_in": 3599}))
            }
            _ => Answer::json("403 Forbidden", "Missing required header"),
        };
        answer.header("Metadata-Flavor", "Google")
    }

    fn key_service(&self, path: &str, request: &Request) -> Result<Answer, Answer> {
        self.authenticate(request)?;
        let called = path.strip_prefix("/v1/").and_then(|path| path.rsplit_once(':'));
        let Some((name, verb @ ("encrypt" | "decrypt"))) = called.filter(|_| request.method == "POST") else {
            return Err(Answer::json("404 Not Found", body("robot_404.html")).header("Content-Type", "text/html"));
        };
        // Google tells nobody without the right whether there is a key.
        let Some(key) = self.keys.get(name).filter(|_| self.allowed) else {
            return Err(refuse("403 Forbidden", "permission_denied.json", name, 1));
        };
        let body = request.json();
        match verb {
            "encrypt" => self.encrypt(name, key, &body),
            _ => self.decrypt(name, key, &body),
        }
    }

    fn authenticate(&self, request: &Request) -> Result<(), Answer> {
        let Some(token) = request.header("authorization").and_then(|value| value.strip_prefix("Bearer ")) else {
            return Err(refuse("401 Unauthorized", "credentials_missing.json", KEY, 1));
        };
        match self.tokens.contains(token) || self.is_signed_by_an_account(token).unwrap_or(false) {
            true => Ok(()),
            false => Err(refuse("401 Unauthorized", "unauthenticated.json", KEY, 1)),
        }
    }

    /// A JWT that a service account made itself: <https://google.aip.dev/auth/4111>.
    fn is_signed_by_an_account(&self, token: &str) -> Option<bool> {
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).ok();
        let header: Value = serde_json::from_slice(&decode(header)?).ok()?;
        let claims: Value = serde_json::from_slice(&decode(claims)?).ok()?;
        let account = claims["iss"].as_str()?;
        let key = UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, self.accounts.get(account)?);
        #[allow(clippy::disallowed_methods)] // The SDK signs for the time that it is.
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).ok()?.as_secs();
        let lives = claims["iat"].as_u64()? <= now && now < claims["exp"].as_u64()?;
        let scope = claims["scope"].as_str()?.contains("https://www.googleapis.com/auth/cloud-platform");
        let good = header["alg"] == "RS256" && claims["sub"] == account && lives && scope;
        Some(good && key.verify(signed.as_bytes(), &decode(signature)?).is_ok())
    }

    fn encrypt(&self, name: &str, key: &Key, body: &Value) -> Result<Answer, Answer> {
        let (number, version) = (key.primary + 1, &key.versions[key.primary]);
        check_state(name, number, version)?;
        let mut plaintext = bytes(body, "plaintext");
        let context = bytes(body, "additionalAuthenticatedData");
        let checked = |field: &str, data: &[u8]| match checksum_in(body, field) {
            Some(sum) if sum != i64::from(crc32c::crc32c(data)) => Err(mismatch(name)),
            sum => Ok(sum.is_some()),
        };
        let mut plaintext_verified = checked("plaintextCrc32c", &plaintext)?;
        let mut context_verified = checked("additionalAuthenticatedDataCrc32c", &context)?;
        match self.corruption {
            Some(Corruption::Unverified) => {
                plaintext[70] ^= 1;
                (plaintext_verified, context_verified) = (false, false);
            }
            Some(Corruption::ContextUnverified) => context_verified = false,
            _ => {}
        }
        let header = [&key.mark[..], &u32::try_from(number).expect("few versions").to_be_bytes()].concat();
        let nonce: [u8; NONCE_LEN] = random();
        let aad = Aad::from([&header[..], &context].concat());
        let sealed =
            version.cipher().seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), aad, &mut plaintext);
        sealed.expect("a plaintext is short");
        let mut ciphertext = [&header[..], &nonce, &plaintext].concat();
        let sum = crc32c::crc32c(&ciphertext).to_string();
        if self.corruption == Some(Corruption::Ciphertext) {
            ciphertext[40] ^= 1;
        }
        let named = match self.corruption {
            Some(Corruption::VersionOfAnotherKey) => format!("{OTHER_KEY}/cryptoKeyVersions/{number}"),
            Some(Corruption::NoVersion) => name.to_owned(),
            _ => format!("{name}/cryptoKeyVersions/{number}"),
        };
        let mut answer = json!({
            "name": named,
            "ciphertext": BASE64_STANDARD.encode(&ciphertext),
            "ciphertextCrc32c": sum,
            "protectionLevel": "SOFTWARE",
        });
        // As proto3 has it in JSON: what is false is left away.
        if plaintext_verified {
            answer["verifiedPlaintextCrc32c"] = true.into();
        }
        if context_verified {
            answer["verifiedAdditionalAuthenticatedDataCrc32c"] = true.into();
        }
        if self.corruption == Some(Corruption::NoCiphertextChecksum) {
            answer.as_object_mut().expect("it is an object").remove("ciphertextCrc32c");
        }
        Ok(Answer::json("200 OK", answer))
    }

    fn decrypt(&self, name: &str, key: &Key, body: &Value) -> Result<Answer, Answer> {
        let mut ciphertext = bytes(body, "ciphertext");
        let context = bytes(body, "additionalAuthenticatedData");
        if self.corruption == Some(Corruption::RequestCiphertext) {
            ciphertext[40] ^= 1;
        }
        for (field, data) in [("ciphertextCrc32c", &ciphertext), ("additionalAuthenticatedDataCrc32c", &context)] {
            if checksum_in(body, field).is_some_and(|sum| sum != i64::from(crc32c::crc32c(data))) {
                return Err(mismatch(name));
            }
        }
        let invalid = || refuse("400 Bad Request", "ciphertext_invalid.json", name, 1);
        let (header, sealed) = ciphertext.split_at_checked(HEADER_LEN).ok_or_else(invalid)?;
        if header[..8] != key.mark {
            let known = self.keys.values().any(|other| header[..8] == other.mark);
            let wrong_key = || refuse("400 Bad Request", "ciphertext_wrong_key.json", name, 1);
            return Err(if known { wrong_key() } else { invalid() });
        }
        let number = u32::from_be_bytes(header[8..].try_into().expect("four bytes")) as usize;
        let version = number.checked_sub(1).and_then(|index| key.versions.get(index)).ok_or_else(invalid)?;
        check_state(name, number, version)?;
        let (nonce, sealed) = sealed.split_at_checked(NONCE_LEN).ok_or_else(invalid)?;
        let mut sealed = sealed.to_vec();
        let nonce = Nonce::try_assume_unique_for_key(nonce).expect("it has its length");
        let opened = version.cipher().open_in_place(nonce, Aad::from([header, &context].concat()), &mut sealed);
        let mut plaintext = opened.map_err(|_| invalid())?.to_vec();
        if self.corruption == Some(Corruption::ShortPlaintext) {
            plaintext.truncate(100);
        }
        let sum = crc32c::crc32c(&plaintext).to_string();
        if self.corruption == Some(Corruption::Plaintext) {
            plaintext[70] ^= 1;
        }
        let mut answer = json!({
            "plaintext": BASE64_STANDARD.encode(&plaintext),
            "plaintextCrc32c": sum,
            "usedPrimary": number == key.primary + 1,
            "protectionLevel": "SOFTWARE",
        });
        if self.corruption == Some(Corruption::NoPlaintextChecksum) {
            answer.as_object_mut().expect("it is an object").remove("plaintextCrc32c");
        }
        Ok(Answer::json("200 OK", answer))
    }
}

fn check_state(name: &str, number: usize, version: &Version) -> Result<(), Answer> {
    match version.state.body() {
        Some(body) => Err(refuse("400 Bad Request", body, name, number)),
        None => Ok(()),
    }
}

fn mismatch(name: &str) -> Answer {
    refuse("400 Bad Request", "checksum_mismatch.json", name, 1)
}

fn refuse(status: &str, file: &str, name: &str, number: usize) -> Answer {
    Answer::json(status, body_of_error(file, name, number))
}

/// One of the bodies, about this key and version.
fn body_of_error(file: &str, name: &str, number: usize) -> String {
    body(file).replace(KEY, name).replace("/cryptoKeyVersions/1", &format!("/cryptoKeyVersions/{number}"))
}

/// A field of bytes; what is absent is empty.
fn bytes(body: &Value, field: &str) -> Vec<u8> {
    body[field].as_str().and_then(|text| BASE64_STANDARD.decode(text).ok()).unwrap_or_default()
}

/// An Int64Value: a text in JSON, or a number.
fn checksum_in(body: &Value, field: &str) -> Option<i64> {
    body[field].as_str().and_then(|text| text.parse().ok()).or_else(|| body[field].as_i64())
}
