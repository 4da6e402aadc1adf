//! [`AzureKeyVault`]: a master key in Azure Key Vault or Managed HSM.

mod classify;
mod credential;
mod transport;

use std::collections::HashSet;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use azure_core::http::{RequestContent, Url};
use azure_security_keyvault_keys::models::{
    KeyClientUnwrapKeyOptions, KeyClientWrapKeyOptions, KeyOperationParameters, KeyOperationResult,
};
use azure_security_keyvault_keys::{KeyClient, KeyClientOptions};
use zeroize::{Zeroize, Zeroizing};

use crate::error::{KmsClass, KmsError, Result};
use crate::format::wrapped::{PAYLOAD_KEY_AT, PAYLOAD_LEN, PayloadHead};
use crate::ids::{DatabaseId, MasterKeyId};
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::kms::asynchronous::{AsyncKeyWrapper, FromAsync};
use crate::secret::KeyPayload;
use classify::{Detail, Operation, Refusal, bounded};
use credential::Place;
use transport::{Peer, Transports, misconfigured};

pub use credential::AzureCredential;

const PROVIDER: &str = "azure-key-vault";

/// The domains under which Key Vault and Managed HSM have their names, in the public and the sovereign clouds.
const AZURE_DOMAINS: [&str; 7] = [
    ".vault.azure.net",
    ".managedhsm.azure.net",
    ".vault.azure.cn",
    ".managedhsm.azure.cn",
    ".vault.usgovcloudapi.net",
    ".managedhsm.usgovcloudapi.net",
    ".vault.microsoftazure.de",
];

/// A master key in Azure Key Vault or Managed HSM, by Azure's SDK (`wrapKey` and `unwrapKey`).
///
/// ```no_run
/// use pageseal::{AzureCredential, AzureKeyVault, Wrappers};
///
/// let key = AzureKeyVault::builder("https://contoso.vault.azure.net", "pageseal")
///     .credential(AzureCredential::managed_identity())
///     .build()?;
/// let wrappers = Wrappers::one(key);
/// # drop(wrappers);
/// # Ok::<(), pageseal::Error>(())
/// ```
///
/// The id is `azure-key-vault:` and the key's URL without its version, as the vault URL and the name were given. The key
/// version is Key Vault's: it is taken from the answer to each wrap, and used to unwrap, so that a rotation at the service
/// leaves old wrappings readable.
///
/// # What binds a wrapped key to its place
///
/// RSA-OAEP and AES-KW take no associated data. Both refuse a ciphertext that was changed, and the payload that they return
/// names its cluster, database, generation and purpose; these are compared with the context after each unwrap, and one that
/// differs is [`KmsClass::BadCiphertext`]. With RSA anybody who has the public key can make a ciphertext that opens, so
/// [`KeyWrapper::wrapping_is_public`] holds, and `Cluster::open` demands the expected cluster id.
///
/// # What a lost key version means
///
/// A version that a stored record names and that the vault does not have may mean that the key was deleted, or that the
/// record was changed. Then the vault is asked for the key itself (`keys/read`; without that right, by wrapping zeros): if it
/// is there, the record is wrong ([`KmsClass::BadCiphertext`]), and if it is not, the key is deleted
/// ([`KmsClass::Deleted`]). Where both are forbidden the key counts as deleted if this wrapper has used that version before,
/// as a running cluster has; otherwise the failure is [`KmsClass::Unclassified`], and says that `keys/read` is missing.
///
/// # What stays in memory
///
/// Payloads are in locked memory, and their base64 in buffers that are wiped. Azure's SDK, the HTTP client and TLS make
/// copies of requests and answers that are not.
///
/// # Threads
///
/// Clones are one wrapper: [`AzureKeyVault::replace_credentials`] reaches all of them. After a fork(2) the child must make
/// a new one; an inherited one is refused ([`KmsClass::Misconfigured`]).
///
/// docs/kms/azure.md shows the rights that the key needs, and what each failure means.
#[derive(Clone)]
pub struct AzureKeyVault {
    keys: Arc<FromAsync<Keys>>,
}

/// How the key wraps.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[non_exhaustive]
pub enum AzureAlgorithm {
    /// RSA-OAEP with SHA-256, of RSA keys of 2,048, 3,072 or 4,096 bits: in Key Vault and in Managed HSM.
    RsaOaep256,
    /// AES key wrap (RFC 3394) under `oct-HSM` keys of 256 bits, which Managed HSM has.
    A256Kw,
}

impl AzureAlgorithm {
    /// As Key Vault names it.
    fn name(self) -> &'static str {
        match self {
            Self::RsaOaep256 => "RSA-OAEP-256",
            Self::A256Kw => "A256KW",
        }
    }

    /// Whether a wrapped payload can have so many bytes.
    fn makes(self, len: usize) -> bool {
        match self {
            Self::RsaOaep256 => matches!(len, 256 | 384 | 512),
            Self::A256Kw => len == PAYLOAD_LEN + 8,
        }
    }
}

/// Settings of an [`AzureKeyVault`].
#[derive(Clone)]
#[must_use]
pub struct AzureKeyVaultBuilder {
    vault_url: String,
    key: String,
    key_version: Option<String>,
    algorithm: AzureAlgorithm,
    credential: AzureCredential,
    ca_file: Option<PathBuf>,
    authority_host: Option<String>,
    any_challenge: bool,
}

impl AzureKeyVault {
    /// The key `key` in the vault at `vault_url`, such as `https://contoso.vault.azure.net`, with the credential that the
    /// environment offers ([`AzureCredential::from_environment`]) unless another is given.
    pub fn builder(vault_url: impl Into<String>, key: impl Into<String>) -> AzureKeyVaultBuilder {
        AzureKeyVaultBuilder {
            vault_url: vault_url.into(),
            key: key.into(),
            key_version: None,
            algorithm: AzureAlgorithm::RsaOaep256,
            credential: AzureCredential::from_environment(),
            ca_file: None,
            authority_host: None,
            any_challenge: false,
        }
    }

    /// The key that the environment names.
    ///
    /// | variable | what |
    /// |---|---|
    /// | `PAGESEAL_AZURE_VAULT_URL` | the vault, such as `https://contoso.vault.azure.net`; required |
    /// | `PAGESEAL_AZURE_KEY` | the key's name; required |
    /// | `PAGESEAL_AZURE_KEY_VERSION` | the version that wraps, instead of the current one |
    /// | `PAGESEAL_AZURE_ALGORITHM` | `RSA-OAEP-256` (the default) or `A256KW` |
    /// | `PAGESEAL_AZURE_CA_FILE` | certificate authorities in PEM, beside the system's |
    /// | `PAGESEAL_AZURE_ANY_CHALLENGE` | `1`: as [`AzureKeyVaultBuilder::accept_any_challenge`] |
    /// | `AZURE_AUTHORITY_HOST` | the token endpoint of a sovereign cloud |
    /// | `AZURE_TENANT_ID`, `AZURE_CLIENT_ID`, `AZURE_CLIENT_SECRET`, `AZURE_FEDERATED_TOKEN_FILE` | the credential: [`AzureCredential::from_environment`] |
    /// | `AZURE_TOKEN_CREDENTIALS` | `dev` for the Azure CLI alone, `prod` for all but it |
    /// | `IDENTITY_ENDPOINT`, `IDENTITY_HEADER` | where a managed identity gets its tokens; set by App Service |
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured), with the variable that is missing or wrong.
    pub fn from_env() -> Result<Self> {
        AzureKeyVaultBuilder::from_variables(|name| std::env::var_os(name))?.build()
    }

    /// Asks as somebody else from now on, in this wrapper and all its clones: for a running cluster whose credentials were
    /// revoked or have expired. Calls that are under way end as they began.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured) if the credential cannot be used; the former one stays.
    pub fn replace_credentials(&self, credential: AzureCredential) -> Result<()> {
        let keys = self.keys.get_ref();
        keys.session.store(Arc::new(keys.settings.connect(credential)?));
        Ok(())
    }
}

impl AzureKeyVaultBuilder {
    /// Wraps with this version of the key, instead of the one that is current at the service. What other versions wrapped
    /// is unwrapped all the same.
    pub fn key_version(mut self, version: impl Into<String>) -> Self {
        self.key_version = Some(version.into());
        self
    }

    /// How the key wraps; [`AzureAlgorithm::RsaOaep256`] unless it is said.
    pub fn algorithm(mut self, algorithm: AzureAlgorithm) -> Self {
        self.algorithm = algorithm;
        self
    }

    /// As whom the vault is asked.
    pub fn credential(mut self, credential: AzureCredential) -> Self {
        self.credential = credential;
        self
    }

    /// Certificate authorities in PEM, trusted beside those of the system: for a proxy that inspects TLS.
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// The token endpoint of a sovereign cloud, such as `https://login.microsoftonline.us`. Without it
    /// `AZURE_AUTHORITY_HOST`, or else the public cloud's.
    pub fn authority_host(mut self, url: impl Into<String>) -> Self {
        self.authority_host = Some(url.into());
        self
    }

    /// Sends a token to the vault URL whatever resource its challenge asks for, and takes whatever host it names its keys
    /// by. Only for a host that is not under one of Azure's own domains: a proxy of yours, or a test. Whoever answers there
    /// chooses what the token is good for.
    pub fn accept_any_challenge(mut self) -> Self {
        self.any_challenge = true;
        self
    }

    /// Makes the wrapper, without a call to the vault.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`](crate::ErrorKind::Misconfigured), with the setting that cannot work.
    pub fn build(self) -> Result<AzureKeyVault> {
        let url = vault_url(&self.vault_url)?;
        key_name(&self.key)?;
        if let Some(version) = &self.key_version
            && !is_version(version)
        {
            let text = format!(
                "the Azure key version {version:?} (PAGESEAL_AZURE_KEY_VERSION, or `key_version`) must be 1 to 64 letters \
                 and digits, for example 0123456789abcdef0123456789abcdef"
            );
            return Err(misconfigured(text));
        }
        if let Some(host) = &self.authority_host {
            https_url("the token endpoint", "AZURE_AUTHORITY_HOST, or `authority_host`", host, PUBLIC_AUTHORITY)?;
        }
        let host = url.host_str().unwrap_or_default();
        if self.any_challenge && AZURE_DOMAINS.iter().any(|domain| host.ends_with(domain)) {
            let text = format!(
                "any challenge is accepted (PAGESEAL_AZURE_ANY_CHALLENGE, or `accept_any_challenge`), which is not for \
                 {host}: it is one of Azure's own names, whose challenges can be verified; take the setting away"
            );
            return Err(misconfigured(text));
        }
        let id = MasterKeyId::new(PROVIDER, format!("{}/keys/{}", url.as_str().trim_end_matches('/'), self.key));
        let settings = Settings {
            transports: Transports::new(self.ca_file.as_deref())?,
            authority_host: self.authority_host,
            any_challenge: self.any_challenge,
            url,
        };
        let session = ArcSwap::from_pointee(settings.connect(self.credential)?);
        let (key, pinned, algorithm) = (self.key, self.key_version, self.algorithm);
        let keys = Keys { id, settings, key, pinned, algorithm, session, seen: Mutex::default() };
        Ok(AzureKeyVault { keys: Arc::new(FromAsync::new(keys)) })
    }

    fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let get = |name: &str| -> Result<Option<String>> {
            match get(name).map(OsString::into_string) {
                None => Ok(None),
                Some(Ok(value)) if value.is_empty() => Ok(None),
                Some(Ok(value)) => Ok(Some(value)),
                Some(Err(_)) => Err(misconfigured(format!("the environment variable {name} is not UTF-8"))),
            }
        };
        let needed = |name: &str, example: &str| -> Result<String> {
            get(name)?.ok_or_else(|| {
                misconfigured(format!("the environment variable {name} is not set; for example {name}={example}"))
            })
        };
        let url = needed("PAGESEAL_AZURE_VAULT_URL", EXAMPLE_URL)?;
        let mut builder = AzureKeyVault::builder(url, needed("PAGESEAL_AZURE_KEY", "pageseal")?);
        builder.key_version = get("PAGESEAL_AZURE_KEY_VERSION")?;
        builder.ca_file = get("PAGESEAL_AZURE_CA_FILE")?.map(PathBuf::from);
        builder.authority_host = get("AZURE_AUTHORITY_HOST")?;
        builder.algorithm = match get("PAGESEAL_AZURE_ALGORITHM")?.as_deref() {
            None | Some("RSA-OAEP-256") => AzureAlgorithm::RsaOaep256,
            Some("A256KW") => AzureAlgorithm::A256Kw,
            Some(other) => {
                let text = format!(
                    "PAGESEAL_AZURE_ALGORITHM is {other:?}; it must be RSA-OAEP-256 (RSA keys) or A256KW (oct-HSM keys of \
                     Managed HSM)"
                );
                return Err(misconfigured(text));
            }
        };
        builder.any_challenge = match get("PAGESEAL_AZURE_ANY_CHALLENGE")?.as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => {
                return Err(misconfigured(format!("PAGESEAL_AZURE_ANY_CHALLENGE is {other:?}; it must be 0 or 1")));
            }
        };
        Ok(builder)
    }
}

const EXAMPLE_URL: &str = "https://contoso.vault.azure.net";
const PUBLIC_AUTHORITY: &str = "https://login.microsoftonline.com";

/// The vault's URL, with nothing behind its host.
fn vault_url(text: &str) -> Result<Url> {
    let url = https_url("the Azure vault URL", "PAGESEAL_AZURE_VAULT_URL, or `vault_url`", text, EXAMPLE_URL)?;
    if !matches!(url.path(), "" | "/") {
        let text = format!(
            "the Azure vault URL {text:?} (PAGESEAL_AZURE_VAULT_URL, or `vault_url`) must end with its host; the key's \
             name goes into PAGESEAL_AZURE_KEY (`key`), its version into PAGESEAL_AZURE_KEY_VERSION (`key_version`)"
        );
        return Err(misconfigured(text));
    }
    Ok(url)
}

fn https_url(what: &str, setting: &str, text: &str, example: &str) -> Result<Url> {
    // What stands between `//` and `@` may be a password.
    let wrong = |why: &str| {
        let shown = if text.contains('@') { "it".to_owned() } else { format!("{text:?}") };
        misconfigured(format!("{what} ({setting}): {shown} {why}; for example {example}"))
    };
    let url = Url::parse(text).map_err(|error| wrong(&format!("is no URL: {error}")))?;
    if url.scheme() != "https" {
        return Err(wrong("must begin with https://"));
    }
    if url.host_str().is_none_or(str::is_empty) {
        return Err(wrong("names no host"));
    }
    if !url.username().is_empty() || url.password().is_some() || url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("must have neither user nor query"));
    }
    Ok(url)
}

/// <https://learn.microsoft.com/azure/key-vault/general/about-keys-secrets-certificates#object-identifiers>
fn key_name(name: &str) -> Result<()> {
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if (1..=127).contains(&name.len()) && name.chars().all(legal) {
        return Ok(());
    }
    let text = format!(
        "the Azure key name {name:?} (PAGESEAL_AZURE_KEY, or `key`) must be 1 to 127 letters, digits and hyphens, \
         without the vault's URL; for example pageseal"
    );
    Err(misconfigured(text))
}

/// Key Vault's are 32 hexadecimal digits. Nothing that could reach another path is let through.
fn is_version(version: &str) -> bool {
    (1..=64).contains(&version.len()) && version.bytes().all(|byte| byte.is_ascii_alphanumeric())
}

/// What outlives a change of credentials.
struct Settings {
    url: Url,
    transports: Transports,
    authority_host: Option<String>,
    any_challenge: bool,
}

/// A client with its credential and their tokens.
struct Session {
    client: KeyClient,
    credential: AzureCredential,
    /// When the vault refused a token that was fetched for this session.
    refused: OnceLock<Instant>,
}

impl Session {
    /// Whether the vault has just refused a fresh token, so that another would be asked for in vain: Entra ID locks out who
    /// asks it too often.
    fn just_refused(&self) -> bool {
        self.refused.get().is_some_and(|at| at.elapsed() < FRESH_TOKEN_AFTER)
    }
}

/// How long a refusal of a fresh token holds before another one is fetched.
const FRESH_TOKEN_AFTER: Duration = Duration::from_secs(30);

impl Settings {
    fn connect(&self, credential: AzureCredential) -> Result<Session> {
        let place = Place { transports: &self.transports, authority: self.authority_host.as_deref() };
        let options = KeyClientOptions {
            client_options: place.options(Peer::Vault),
            verify_challenge_resource: Some(!self.any_challenge),
            ..KeyClientOptions::default()
        };
        let client = KeyClient::new(self.url.as_str(), credential.connect(&place)?, Some(options));
        let client = client.map_err(|error| misconfigured(format!("the Azure vault URL {}: {error}", self.url)))?;
        Ok(Session { client, credential, refused: OnceLock::new() })
    }
}

struct Keys {
    id: MasterKeyId,
    settings: Settings,
    key: String,
    /// The version that wraps; the current one if there is none.
    pinned: Option<String>,
    algorithm: AzureAlgorithm,
    session: ArcSwap<Session>,
    /// The versions that the service has used for this wrapper, in lower case. They are the service's word, never a record's.
    seen: Mutex<HashSet<String>>,
}

/// More versions than a key gets in a hundred years.
const MOST_SEEN: usize = 4096;

impl Keys {
    /// Asks the vault; a second time with a fresh token if it refused the first, which may have been revoked while it was
    /// kept here. Only what it says to a fresh token is its verdict.
    async fn ask<T>(
        &self,
        operation: Operation,
        call: impl AsyncFn(&KeyClient) -> azure_core::Result<T>,
    ) -> Result<T, Refusal> {
        let session = self.session.load_full();
        let refusal = match call(&session.client).await {
            Ok(value) => return Ok(value),
            Err(error) => classify::refusal(&error, operation),
        };
        if refusal.detail != Detail::Unauthorized || session.just_refused() {
            return Err(refusal);
        }
        let fresh = match self.settings.connect(session.credential.clone()) {
            Ok(fresh) => Arc::new(fresh),
            Err(_) => return Err(refusal),
        };
        // Unless somebody else has done so, or has replaced the credentials, meanwhile.
        self.session.compare_and_swap(&session, fresh);
        let session = self.session.load_full();
        call(&session.client).await.map_err(|error| {
            let refusal = classify::refusal(&error, operation);
            if refusal.detail == Detail::Unauthorized {
                // The first refusal's time stays, so that a fresh token is fetched some time after it.
                let _ = session.refused.set(Instant::now());
            }
            refusal
        })
    }

    async fn operate(
        &self,
        operation: Operation,
        version: Option<&str>,
        value: &[u8],
    ) -> Result<KeyOperationResult, Refusal> {
        let version = version.map(str::to_owned);
        let answer = self.ask(operation, async |client| {
            let body = self.request(value);
            match operation {
                Operation::Wrap | Operation::Get => {
                    let options = KeyClientWrapKeyOptions { key_version: version.clone(), ..Default::default() };
                    client.wrap_key(&self.key, body, Some(options)).await
                }
                Operation::Unwrap => {
                    let version = version.as_deref().unwrap_or_default();
                    let options = KeyClientUnwrapKeyOptions::default();
                    client.unwrap_key(&self.key, version, body, Some(options)).await
                }
            }
        });
        // The error of the parser quotes what it could not parse, which may be a payload.
        answer.await?.into_model().map_err(|_| Refusal {
            error: unclassified("its answer is not the JSON of Key Vault; does a proxy answer for it?"),
            detail: Detail::Other,
        })
    }

    /// The JSON of a key operation, wiped when the SDK has done with it.
    fn request(&self, value: &[u8]) -> RequestContent<KeyOperationParameters> {
        let encoded = Zeroizing::new(azure_core::base64::encode_url_safe(value));
        let mut json = Zeroizing::new(Vec::with_capacity(encoded.len() + 64));
        for part in [r#"{"alg":""#, self.algorithm.name(), r#"","value":""#, &encoded, r#""}"#] {
            json.extend_from_slice(part.as_bytes());
        }
        azure_core::Bytes::from_owner(json).into()
    }

    /// The version in the key id that the service answered with, which must be of our key.
    fn version_of(&self, kid: Option<&str>) -> Result<String, KmsError> {
        let kid = kid.unwrap_or_default();
        let ours = || {
            let url = Url::parse(kid).ok()?;
            let same_place = self.settings.any_challenge
                || (url.scheme() == "https"
                    && url.host_str() == self.settings.url.host_str()
                    && url.port_or_known_default() == self.settings.url.port_or_known_default());
            let segments: Vec<_> = url.path_segments()?.collect();
            match segments.as_slice() {
                // Key Vault tells names of one another by more than case.
                ["keys", name, version]
                    if same_place && name.eq_ignore_ascii_case(&self.key) && is_version(version) =>
                {
                    Some((*version).to_owned())
                }
                _ => None,
            }
        };
        ours().ok_or_else(|| unclassified(format!("the service answered for another key: {:?}", bounded(kid))))
    }

    fn seen(&self) -> MutexGuard<'_, HashSet<String>> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_used(&self, version: &str) {
        let mut seen = self.seen();
        if seen.len() < MOST_SEEN {
            seen.insert(version.to_ascii_lowercase());
        }
    }

    /// What it means that the vault does not have this version of the key.
    async fn version_is_missing(&self, version: &str, not_found: KmsError, absent: KmsError) -> KmsError {
        let get = async |client: &KeyClient| client.get_key(&self.key, None).await.map(drop);
        let refusal = match self.ask(Operation::Get, get).await {
            Ok(()) => return absent,
            // Wrapping needs a right that we have, if not that to read the key.
            Err(refusal) if refusal.error.class == KmsClass::Denied => {
                match self.operate(Operation::Get, None, &[0; PAYLOAD_LEN]).await {
                    Ok(_) => return absent,
                    Err(refusal) => refusal,
                }
            }
            Err(refusal) => refusal,
        };
        match refusal.error.class {
            KmsClass::Deleted => not_found,
            // No version is deleted but with its key, so what was there says that the key was deleted.
            KmsClass::Denied if self.seen().contains(&version.to_ascii_lowercase()) => not_found,
            KmsClass::Denied => {
                let text = format!(
                    "the vault does not have version {version} of {}, and whether the key was deleted or the record was \
                     changed cannot be told without the right keys/read; grant it",
                    self.id.key
                );
                unclassified(text)
            }
            KmsClass::Disabled | KmsClass::Misconfigured => absent,
            _ => refusal.error,
        }
    }
}

impl AsyncKeyWrapper for Keys {
    fn id(&self) -> MasterKeyId {
        self.id.clone()
    }

    async fn wrap_key(&self, payload: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        // What names another place would never open again.
        payload.with_bytes(|bytes| matches_context(bytes, cx))??;
        let value = payload.with_bytes(|bytes| Zeroizing::new(bytes.to_vec()))?;
        let pinned = self.pinned.as_deref();
        let answer = match self.operate(Operation::Wrap, pinned, &value).await {
            Ok(answer) => answer,
            Err(refusal) if refusal.detail == Detail::NotFound && pinned.is_some() => {
                let text = format!(
                    "the key {} has no version {:?} (PAGESEAL_AZURE_KEY_VERSION, or `key_version`); choose another",
                    self.id.key,
                    pinned.unwrap_or_default()
                );
                let absent = KmsError::with_source(KmsClass::Misconfigured, text);
                return Err(self.version_is_missing(pinned.unwrap_or_default(), refusal.error, absent).await);
            }
            Err(refusal) => return Err(refusal.error),
        };
        let key_version = self.version_of(answer.kid.as_deref())?;
        if pinned.is_some_and(|pinned| !pinned.eq_ignore_ascii_case(&key_version)) {
            return Err(unclassified(format!(
                "the service wrapped with version {key_version}, not with the pinned one"
            )));
        }
        let blob = answer.result.unwrap_or_default();
        if !self.algorithm.makes(blob.len()) {
            let text =
                format!("the service wrapped into {} bytes, which {} does not make", blob.len(), self.algorithm.name());
            return Err(unclassified(text));
        }
        self.has_used(&key_version);
        Ok(WrappedKey { master_key: self.id(), key_version, blob })
    }

    async fn unwrap_key(&self, wrapped: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        if wrapped.master_key != self.id {
            return Err(bad(format!("it was wrapped by {}, not by {}", wrapped.master_key, self.id)));
        }
        let version = wrapped.key_version.as_str();
        if !is_version(version) {
            return Err(bad(format!("the key version {:?} is none of Key Vault", bounded(version))));
        }
        if !self.algorithm.makes(wrapped.blob.len()) {
            let text = format!(
                "the blob has {} bytes, which {} does not make (PAGESEAL_AZURE_ALGORITHM, or `algorithm`)",
                wrapped.blob.len(),
                self.algorithm.name()
            );
            return Err(bad(text));
        }
        let answer = match self.operate(Operation::Unwrap, Some(version), &wrapped.blob).await {
            Ok(answer) => answer,
            Err(refusal) if refusal.detail == Detail::NotFound => {
                let absent = bad(format!("the key {} has no version {version:?}", self.id.key));
                return Err(self.version_is_missing(version, refusal.error, absent).await);
            }
            Err(refusal) => return Err(refusal.error),
        };
        let mut value = Zeroizing::new(answer.result.unwrap_or_default());
        let unwrapped_by = self.version_of(answer.kid.as_deref())?;
        if !unwrapped_by.eq_ignore_ascii_case(version) {
            return Err(unclassified(format!("the service unwrapped with version {unwrapped_by}, not with {version}")));
        }
        self.has_used(version);
        if value.len() != PAYLOAD_LEN {
            return Err(bad(format!("it holds {} bytes, not the {PAYLOAD_LEN} of a key", value.len())));
        }
        let payload = KeyPayload::from_bytes(&mut value)?;
        value.zeroize();
        payload.with_bytes(|bytes| matches_context(bytes, cx))??;
        Ok(payload)
    }

    fn wrapping_is_public(&self) -> bool {
        self.algorithm == AzureAlgorithm::RsaOaep256
    }
}

/// Compares what a payload says of itself with what it is used for.
fn matches_context(payload: &[u8; PAYLOAD_LEN], cx: &WrapContext<'_>) -> Result<(), KmsError> {
    let head = PayloadHead::decode(&payload[..PAYLOAD_KEY_AT]).map_err(|error| bad(error.0))?;
    let database = cx.database.unwrap_or(DatabaseId::from_bytes([0; 16]));
    let differs = if head.purpose != cx.purpose {
        "purpose"
    } else if head.cluster != cx.cluster {
        "cluster"
    } else if head.database != database {
        "database"
    } else if head.generation != cx.generation {
        "generation"
    } else {
        return Ok(());
    };
    Err(bad(format!("it is a key of another {differs}")))
}

fn bad(text: impl Into<String>) -> KmsError {
    KmsError::with_source(KmsClass::BadCiphertext, text.into())
}

fn unclassified(text: impl Into<String>) -> KmsError {
    KmsError::with_source(KmsClass::Unclassified, text.into())
}

forward_key_wrapper!(AzureKeyVault, keys);

impl fmt::Debug for AzureKeyVault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureKeyVault").field("key", &self.keys.get_ref().id.key).finish_non_exhaustive()
    }
}

impl fmt::Debug for AzureKeyVaultBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AzureKeyVaultBuilder").field("key", &self.key).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::error::ErrorKind;

    fn built(variables: &[(&str, &str)]) -> Result<AzureKeyVault> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        AzureKeyVaultBuilder::from_variables(|name| variables.get(name).map(OsString::from))?
            .credential(AzureCredential::client_secret("t", "c", "s"))
            .build()
    }

    const VAULT: (&str, &str) = ("PAGESEAL_AZURE_VAULT_URL", "https://Contoso.vault.azure.net/");
    const KEY: (&str, &str) = ("PAGESEAL_AZURE_KEY", "pageseal");

    #[test]
    fn the_id_is_the_keys_url_without_a_version() {
        let key = built(&[VAULT, KEY, ("PAGESEAL_AZURE_KEY_VERSION", "0123456789abcdef")]).unwrap();
        assert_eq!(key.id().to_string(), "azure-key-vault:https://contoso.vault.azure.net/keys/pageseal");
        assert!(key.wrapping_is_public());
        let key = built(&[VAULT, KEY, ("PAGESEAL_AZURE_ALGORITHM", "A256KW")]).unwrap();
        assert!(!key.wrapping_is_public());
    }

    #[test]
    fn a_wrong_or_missing_variable_is_told_by_its_name_with_an_example() {
        let cases: &[(&str, &[(&str, &str)])] = &[
            ("PAGESEAL_AZURE_VAULT_URL=https://", &[KEY]),
            ("PAGESEAL_AZURE_KEY=pageseal", &[VAULT]),
            ("PAGESEAL_AZURE_KEY=pageseal", &[VAULT, ("PAGESEAL_AZURE_KEY", "")]),
            ("for example https://contoso.vault.azure.net", &[("PAGESEAL_AZURE_VAULT_URL", "contoso"), KEY]),
            ("must begin with https://", &[("PAGESEAL_AZURE_VAULT_URL", "http://contoso.vault.azure.net"), KEY]),
            ("PAGESEAL_AZURE_KEY_VERSION", &[("PAGESEAL_AZURE_VAULT_URL", "https://c.vault.azure.net/keys/k/v"), KEY]),
            ("neither user nor query", &[("PAGESEAL_AZURE_VAULT_URL", "https://u:hush@c.vault.azure.net"), KEY]),
            ("for example pageseal", &[VAULT, ("PAGESEAL_AZURE_KEY", "https://c.vault.azure.net/keys/k")]),
            ("1 to 64 letters", &[VAULT, KEY, ("PAGESEAL_AZURE_KEY_VERSION", "../x")]),
            ("RSA-OAEP-256", &[VAULT, KEY, ("PAGESEAL_AZURE_ALGORITHM", "RSA-OAEP")]),
            ("0 or 1", &[VAULT, KEY, ("PAGESEAL_AZURE_ANY_CHALLENGE", "true")]),
            ("one of Azure's own names", &[VAULT, KEY, ("PAGESEAL_AZURE_ANY_CHALLENGE", "1")]),
            ("/nonexistent", &[VAULT, KEY, ("PAGESEAL_AZURE_CA_FILE", "/nonexistent")]),
            ("AZURE_AUTHORITY_HOST", &[VAULT, KEY, ("AZURE_AUTHORITY_HOST", "login.microsoftonline.us")]),
        ];
        for (expected, variables) in cases {
            let error = built(variables).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Misconfigured, "{error}");
            assert!(error.to_string().contains(expected), "{expected}: {error}");
            assert!(!error.to_string().contains("hush"), "{error}");
        }
    }

    #[test]
    fn a_wrong_credential_is_told_when_it_is_given() {
        let with = |credential| AzureKeyVault::builder(VAULT.1, KEY.1).credential(credential).build();
        for credential in [
            AzureCredential::client_secret("no tenant!", "c", "s"),
            AzureCredential::client_secret("t", "", "s"),
            AzureCredential::client_secret("t", "c", ""),
            AzureCredential::workload_identity("", "c", "/file"),
        ] {
            assert_eq!(with(credential).err().map(|error| error.kind()), Some(ErrorKind::Misconfigured));
        }
    }

    #[test]
    fn lengths_are_those_of_the_algorithm() {
        let makes = |algorithm: AzureAlgorithm| (0..1000).filter(|len| algorithm.makes(*len)).collect::<Vec<_>>();
        assert_eq!(makes(AzureAlgorithm::RsaOaep256), [256, 384, 512]);
        assert_eq!(makes(AzureAlgorithm::A256Kw), [136]);
    }
}
