//! [`FakeKeyVault`]: **a fake**. No emulator of Azure Key Vault can wrap, and no vault can be reached from a test run, so this
//! stands in: HTTPS, the 401 challenge, a token endpoint, an identity endpoint, versions and states of keys, and real
//! RSA-OAEP and AES key wrap. It says what Azure's public documents, issues and recordings show that Azure says
//! (tests/kms/bodies/azure/README.md), and proves nothing about Azure itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::key_wrap::{AES_256, AesKek, KeyWrap};
use aws_lc_rs::rsa::{
    KeySize, OAEP_SHA256_MGF1SHA256, OaepPrivateDecryptingKey, OaepPublicEncryptingKey, PrivateDecryptingKey,
};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};

use crate::http::{Answer, HttpServer, Request};

/// The tenant that its challenges name.
pub const TENANT: &str = "11111111-2222-3333-4444-555555555555";
/// The application that may ask for tokens.
pub const CLIENT: &str = "aaaaaaaa-bbbb-cccc-dddd-eeeeeeeeeeee";
/// Its secret.
pub const SECRET: &str = "the-fake-client-secret";
/// The federated token that it takes at first.
pub const ASSERTION: &str = "the.fake.assertion";
/// The key that every fake vault has.
pub const KEY: &str = "pageseal";
/// Another one.
pub const OTHER_KEY: &str = "pageseal-other";

/// Bodies by file name, from tests/kms/bodies/azure.
macro_rules! body {
    ($name:literal) => {
        include_str!(concat!("../bodies/azure/", $name))
    };
}

/// What kind of keys a fake vault has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// RSA of 2,048 bits, as in Key Vault.
    Rsa,
    /// AES of 256 bits (`oct-HSM`), as in Managed HSM.
    Oct,
}

/// A vault, a token endpoint and an identity endpoint on one HTTPS port of 127.0.0.1; the identity endpoint also without TLS.
pub struct FakeKeyVault {
    server: HttpServer,
    identity: HttpServer,
    world: Arc<Mutex<World>>,
}

/// What the fake knows. Tests may change any of it.
pub struct World {
    kind: Kind,
    /// The `host:port` by which clients know it, which is in its key ids.
    pub host: String,
    keys: BTreeMap<String, Vec<Version>>,
    deleted: BTreeMap<String, Vec<Version>>,
    /// Whether the identity may wrap and unwrap.
    pub may_use: bool,
    /// Whether it may wrap, if it may use the key at all.
    pub may_wrap: bool,
    /// Whether it may read keys.
    pub may_read: bool,
    /// The client secret that the token endpoint takes.
    pub secret: String,
    /// The federated token that it takes.
    pub assertion: String,
    /// The tokens that the vault takes.
    tokens: BTreeSet<String>,
    /// Said by the vault instead of anything else, once a request has a good token.
    pub vault_says: Option<Answer>,
    /// The same for requests that begin so, such as `GET /keys/`.
    pub says: Vec<(&'static str, Answer)>,
    /// Said by the token endpoint instead of anything else.
    pub token_says: Option<Answer>,
    /// The resource that challenges name.
    pub resource: String,
    /// How long tokens last, in seconds.
    pub token_life: u64,
    /// Every request, as `POST /keys/…`, in order.
    pub log: Vec<String>,
    given: u64,
}

struct Version {
    id: String,
    material: Material,
    enabled: bool,
    expired: bool,
}

enum Material {
    Rsa(PrivateDecryptingKey),
    Oct([u8; 32]),
}

impl FakeKeyVault {
    /// A vault with the keys [`KEY`] and [`OTHER_KEY`].
    pub fn start(kind: Kind) -> Self {
        let world = Arc::new(Mutex::new(World {
            kind,
            host: String::new(),
            keys: BTreeMap::new(),
            deleted: BTreeMap::new(),
            may_use: true,
            may_wrap: true,
            may_read: true,
            secret: SECRET.into(),
            assertion: ASSERTION.into(),
            tokens: BTreeSet::new(),
            vault_says: None,
            says: Vec::new(),
            token_says: None,
            resource: "https://vault.azure.net".into(),
            token_life: 3599,
            log: Vec::new(),
            given: 0,
        }));
        let handle = |world: &Arc<Mutex<World>>| {
            let world = Arc::clone(world);
            move |request: &Request| lock(&world).answer(request)
        };
        let server = HttpServer::tls("azure", handle(&world));
        let identity = HttpServer::plain(handle(&world));
        let fake = Self { server, identity, world };
        let mut world = fake.world();
        world.host = fake.server.address().to_string();
        for key in [KEY, OTHER_KEY] {
            world.new_version(key);
        }
        drop(world);
        fake
    }

    /// Where it listens, with TLS.
    pub fn address(&self) -> SocketAddr {
        self.server.address()
    }

    /// Where its identity endpoint listens, without TLS.
    pub fn identity_url(&self) -> String {
        format!("http://{}/msi/token", self.identity.address())
    }

    /// The certificate to trust, in PEM.
    pub fn certificate(&self) -> &Path {
        self.server.certificate().expect("it was started with TLS")
    }

    /// What it knows.
    pub fn world(&self) -> MutexGuard<'_, World> {
        lock(&self.world)
    }
}

fn lock(world: &Mutex<World>) -> MutexGuard<'_, World> {
    world.lock().unwrap_or_else(PoisonError::into_inner)
}

impl World {
    /// Makes a new version of a key, which is the current one from now on, and returns its name.
    pub fn new_version(&mut self, key: &str) -> String {
        let id = random(16).iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let material = match self.kind {
            Kind::Rsa => Material::Rsa(PrivateDecryptingKey::generate(KeySize::Rsa2048).expect("RSA keys can be made")),
            Kind::Oct => Material::Oct(random(32).try_into().expect("32 bytes were asked for")),
        };
        let version = Version { id: id.clone(), material, enabled: true, expired: false };
        self.keys.entry(key.to_owned()).or_default().push(version);
        id
    }

    /// Enables or disables all versions of a key. (Azure does so for each version by itself.)
    pub fn enable(&mut self, key: &str, enabled: bool) {
        self.each(key, |version| version.enabled = enabled);
    }

    /// Enables or disables one version.
    pub fn enable_version(&mut self, key: &str, id: &str, enabled: bool) {
        self.each(key, |version| {
            if version.id == id {
                version.enabled = enabled;
            }
        });
    }

    /// Lets all versions of a key expire, or takes that back.
    pub fn expire(&mut self, key: &str, expired: bool) {
        self.each(key, |version| version.expired = expired);
    }

    fn each(&mut self, key: &str, change: impl FnMut(&mut Version)) {
        self.keys.get_mut(key).expect("there is such a key").iter_mut().for_each(change);
    }

    /// Deletes a key, softly.
    pub fn delete(&mut self, key: &str) {
        let versions = self.keys.remove(key).expect("there is such a key");
        self.deleted.insert(key.to_owned(), versions);
    }

    /// Takes that back.
    pub fn recover(&mut self, key: &str) {
        let versions = self.deleted.remove(key).expect("there is such a deleted key");
        self.keys.insert(key.to_owned(), versions);
    }

    /// Forgets every token that was given out, as if they were revoked.
    pub fn revoke_tokens(&mut self) {
        self.tokens.clear();
    }

    /// How many requests began with this, such as `POST /keys/`.
    pub fn count(&self, begin: &str) -> usize {
        self.log.iter().filter(|line| line.starts_with(begin)).count()
    }

    fn answer(&mut self, request: &Request) -> Answer {
        let path = request.path().to_owned();
        self.log.push(format!("{} {path}", request.method));
        if path.ends_with("/oauth2/v2.0/token") {
            return self.token(request);
        }
        if path == "/msi/token" {
            return self.identity_token(request);
        }
        self.vault(request, &path)
    }

    fn token(&mut self, request: &Request) -> Answer {
        if let Some(answer) = &self.token_says {
            return answer.clone();
        }
        let form = form(&request.body);
        let field = |name: &str| form.get(name).map(String::as_str).unwrap_or_default();
        if request.path() != format!("/{TENANT}/oauth2/v2.0/token") {
            return Answer::json("400 Bad Request", body!("token-no-tenant.json"));
        }
        if field("client_id") != CLIENT {
            return Answer::json("400 Bad Request", body!("token-no-application.json"));
        }
        let in_order = match form.get("client_assertion") {
            None if field("client_secret") != self.secret => Some(body!("token-wrong-secret.json")),
            Some(assertion) if *assertion != self.assertion => Some(body!("token-old-assertion.json")),
            _ => None,
        };
        if let Some(refusal) = in_order {
            return Answer::json("401 Unauthorized", refusal);
        }
        if field("grant_type") != "client_credentials" || field("scope") != format!("{}/.default", self.resource) {
            return Answer::json(
                "400 Bad Request",
                json!({"error": "invalid_scope", "error_description": "AADSTS70011"}),
            );
        }
        let mut granted: Value = serde_json::from_str(body!("token-granted.json")).expect("the file is JSON");
        granted["access_token"] = self.give().into();
        granted["expires_in"] = self.token_life.into();
        Answer::json("200 OK", granted)
    }

    fn identity_token(&mut self, request: &Request) -> Answer {
        if let Some(answer) = &self.token_says {
            return answer.clone();
        }
        if request.header("x-identity-header") != Some("the-identity-header") {
            return Answer::json("401 Unauthorized", json!({"statusCode": 401, "message": "wrong identity header"}));
        }
        if request.target.contains("client_id=") && !request.target.contains(&format!("client_id={CLIENT}")) {
            return Answer::json("400 Bad Request", body!("identity-not-assigned.json"));
        }
        let token = self.give();
        let answer = json!({
            "access_token": token, "expires_on": "4102444800", "resource": self.resource, "token_type": "Bearer"
        });
        Answer::json("200 OK", answer)
    }

    /// A token that the vault takes.
    pub fn give(&mut self) -> String {
        self.given += 1;
        let token = format!("token-{}", self.given);
        self.tokens.insert(token.clone());
        token
    }

    fn vault(&mut self, request: &Request, path: &str) -> Answer {
        let token = request.header("authorization").and_then(|header| header.strip_prefix("Bearer "));
        if !token.is_some_and(|token| self.tokens.contains(token)) {
            let said = if token.is_some() { body!("token-expired.json") } else { body!("unauthorized.json") };
            let challenge =
                format!(r#"Bearer authorization="https://{}/{TENANT}", resource="{}""#, self.host, self.resource);
            return Answer::json("401 Unauthorized", said).header("WWW-Authenticate", &challenge);
        }
        if let Some(answer) = &self.vault_says {
            return answer.clone();
        }
        let line = format!("{} {path}", request.method);
        if let Some((_, answer)) = self.says.iter().find(|(begin, _)| line.starts_with(begin)) {
            return answer.clone();
        }
        let segments: Vec<_> = path.split('/').collect();
        match (request.method.as_str(), segments.as_slice()) {
            ("POST", ["", "keys", key, version, "wrapkey"]) => self.operate(request, key, version, true),
            ("POST", ["", "keys", key, version, "unwrapkey"]) => self.operate(request, key, version, false),
            ("GET", ["", "keys", key, version]) => {
                if !self.may_read {
                    return Answer::json("403 Forbidden", body!("rbac.json"));
                }
                match self.version(key, version) {
                    Some(version) => Answer::json("200 OK", json!({"key": {"kid": self.kid(key, version)}})),
                    None => Answer::json("404 Not Found", body!("key-not-found.json")),
                }
            }
            _ => Answer::json("400 Bad Request", body!("bad-request.json")),
        }
    }

    fn version(&self, key: &str, id: &str) -> Option<&Version> {
        let versions = self.keys.get(key)?;
        if id.is_empty() { versions.last() } else { versions.iter().find(|version| version.id == id) }
    }

    fn kid(&self, key: &str, version: &Version) -> String {
        format!("https://{}/keys/{key}/{}", self.host, version.id)
    }

    fn operate(&self, request: &Request, key: &str, version: &str, wrap: bool) -> Answer {
        // Rights are looked at first: who has none does not learn which keys there are.
        if !self.may_use || (wrap && !self.may_wrap) {
            return Answer::json("403 Forbidden", body!("rbac.json"));
        }
        let Some(version) = self.version(key, version) else {
            return Answer::json("404 Not Found", body!("key-not-found.json"));
        };
        // Azure wraps with a disabled key, and unwraps with an expired one.
        if !wrap && !version.enabled {
            return Answer::json("403 Forbidden", body!("disabled.json"));
        }
        if wrap && version.expired {
            return Answer::json("403 Forbidden", body!("expired.json"));
        }
        let asked = request.json();
        let algorithm = match version.material {
            Material::Rsa(_) => "RSA-OAEP-256",
            Material::Oct(_) => "A256KW",
        };
        if asked["alg"] != algorithm {
            return Answer::json("400 Bad Request", body!("wrong-algorithm.json"));
        }
        let value = asked["value"].as_str().and_then(|value| URL_SAFE_NO_PAD.decode(value).ok());
        let Some(value) = value else {
            return Answer::json("400 Bad Request", body!("bad-value.json"));
        };
        let result = if wrap { version.material.wrap(&value) } else { version.material.unwrap(&value) };
        match (result, &version.material) {
            (Some(result), _) => {
                let value = URL_SAFE_NO_PAD.encode(result);
                Answer::json("200 OK", json!({"kid": self.kid(key, version), "value": value}))
            }
            (None, Material::Rsa(_)) => Answer::json("400 Bad Request", body!("bad-oaep.json")),
            (None, Material::Oct(_)) => Answer::json("400 Bad Request", body!("bad-parameter.json")),
        }
    }
}

impl Material {
    fn wrap(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; 512];
        let wrapped = match self {
            Self::Rsa(key) => {
                let key = OaepPublicEncryptingKey::new(key.public_key()).ok()?;
                key.encrypt(&OAEP_SHA256_MGF1SHA256, plain, &mut out, None).ok()?.to_vec()
            }
            Self::Oct(key) => AesKek::new(&AES_256, key).ok()?.wrap(plain, &mut out).ok()?.to_vec(),
        };
        Some(wrapped)
    }

    fn unwrap(&self, wrapped: &[u8]) -> Option<Vec<u8>> {
        let mut out = vec![0; 512];
        let plain = match self {
            Self::Rsa(key) => {
                let key = OaepPrivateDecryptingKey::new(key.clone()).ok()?;
                key.decrypt(&OAEP_SHA256_MGF1SHA256, wrapped, &mut out, None).ok()?.to_vec()
            }
            Self::Oct(key) => AesKek::new(&AES_256, key).ok()?.unwrap(wrapped, &mut out).ok()?.to_vec(),
        };
        Some(plain)
    }
}

fn random(len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    aws_lc_rs::rand::fill(&mut bytes).expect("the system has random bytes");
    bytes
}

/// The fields of a form, without their percent signs.
fn form(body: &[u8]) -> BTreeMap<String, String> {
    let text = String::from_utf8_lossy(body);
    text.split('&').filter_map(|pair| pair.split_once('=')).map(|(name, value)| (name.into(), decoded(value))).collect()
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, behind)) = rest.split_first() {
        let hex = behind.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        match (first, hex.and_then(|two| u8::from_str_radix(two, 16).ok())) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &behind[2..];
            }
            (b'+', _) => {
                bytes.push(b' ');
                rest = behind;
            }
            _ => {
                bytes.push(first);
                rest = behind;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
