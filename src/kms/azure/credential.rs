//! [`AzureCredential`]: as whom Key Vault is asked.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use azure_core::cloud::{CloudConfiguration, CustomConfiguration};
use azure_core::credentials::{AccessToken, Secret, TokenCredential, TokenRequestOptions};
use azure_core::http::{ClientMethodOptions, ClientOptions, RetryOptions, UserAgentOptions};
use azure_identity::{
    AzureCliCredential, ClientAssertion, ClientAssertionCredential, ClientAssertionCredentialOptions,
    ClientSecretCredential, ClientSecretCredentialOptions, ManagedIdentityCredential, ManagedIdentityCredentialOptions,
    UserAssignedId,
};
use zeroize::Zeroizing;

use super::classify::{bounded, credential_failure, failure_in};
use super::transport::{Failure, Peer, Transports, misconfigured};
use crate::error::{KmsClass, KmsError, Result};

/// How long the default chain waits for the identity endpoint of a machine, which off Azure is nobody.
const IDENTITY_PATIENCE: Duration = Duration::from_secs(3);
/// Links of the default chain.
const IDENTITY: &str = "managed identity";
const CLI: &str = "Azure CLI";
/// Which links there are: as Azure's SDKs for other languages have it.
/// <https://learn.microsoft.com/azure/developer/python/sdk/authentication/credential-chains#how-to-customize-defaultazurecredential>
const WHICH: &str = "AZURE_TOKEN_CREDENTIALS";
/// A federated token is a JWT of one or two thousand bytes.
const LONGEST_TOKEN: u64 = 64 * 1024;

/// As whom [`AzureKeyVault`](crate::AzureKeyVault) asks for its key: one of the ways in which Microsoft Entra ID gives tokens.
/// The tokens are kept in memory until shortly before they expire (about an hour), and dropped when the vault refuses one.
///
/// Which of them suits which place:
/// <https://learn.microsoft.com/azure/key-vault/general/authentication>.
#[derive(Clone)]
pub struct AzureCredential(Source);

#[derive(Clone)]
enum Source {
    /// Whether the managed identity has ever given a token, which outlives the chain that is made anew.
    Chain(Arc<AtomicBool>),
    ManagedIdentity(Option<UserAssignedId>),
    WorkloadIdentity {
        tenant: String,
        client: String,
        token_file: PathBuf,
    },
    ClientSecret {
        tenant: String,
        client: String,
        secret: Arc<Zeroizing<String>>,
    },
    DeveloperTools,
    Own(Arc<dyn TokenCredential>),
}

impl AzureCredential {
    /// What the environment offers, in the order that Azure's SDKs have in common:
    ///
    /// 1. a client secret, if `AZURE_CLIENT_SECRET` is set (with `AZURE_TENANT_ID` and `AZURE_CLIENT_ID`);
    /// 2. a workload identity, if `AZURE_FEDERATED_TOKEN_FILE` is set (with the same two), as Kubernetes sets it;
    /// 3. the managed identity of the machine or of App Service: the one of `AZURE_CLIENT_ID`, else the system's;
    /// 4. the Azure CLI (`az login`).
    ///
    /// The first two are the only ones to be asked where they are set: were another identity taken when they fail, nobody
    /// would notice. For the same reason the Azure CLI is asked only if the endpoint for managed identities says that there
    /// is none, or if nobody listens there; not if it does not answer in time or is in trouble, nor once it has given a token.
    ///
    /// `AZURE_TOKEN_CREDENTIALS=dev` (or `AzureCliCredential`) leaves the Azure CLI alone, for a developer's machine on which
    /// the endpoint's address is not refused but swallowed, and `prod` leaves it out. Other values are refused.
    ///
    /// The environment is read when the wrapper is made, and again when the vault refuses a token.
    pub fn from_environment() -> Self {
        Self(Source::Chain(Arc::default()))
    }

    /// The managed identity that the system assigned to this machine, container or App Service.
    pub fn managed_identity() -> Self {
        Self(Source::ManagedIdentity(None))
    }

    /// The managed identity with this client id, assigned by a user.
    pub fn user_assigned_identity(client_id: impl Into<String>) -> Self {
        Self(Source::ManagedIdentity(Some(UserAssignedId::ClientId(client_id.into()))))
    }

    /// The managed identity with this ARM resource id, assigned by a user. (Not on App Service.)
    pub fn user_assigned_resource(resource_id: impl Into<String>) -> Self {
        Self(Source::ManagedIdentity(Some(UserAssignedId::ResourceId(resource_id.into()))))
    }

    /// A workload identity: a token of the platform, which Entra ID exchanges. The file is read each time that a token is
    /// needed, because the platform replaces it.
    pub fn workload_identity(
        tenant_id: impl Into<String>,
        client_id: impl Into<String>,
        token_file: impl Into<PathBuf>,
    ) -> Self {
        let (tenant, client, token_file) = (tenant_id.into(), client_id.into(), token_file.into());
        Self(Source::WorkloadIdentity { tenant, client, token_file })
    }

    /// An application with a client secret. The secret is kept in memory that is wiped; Azure's SDK keeps a copy that is not.
    pub fn client_secret(
        tenant_id: impl Into<String>,
        client_id: impl Into<String>,
        secret: impl Into<String>,
    ) -> Self {
        let secret = Arc::new(Zeroizing::new(secret.into()));
        Self(Source::ClientSecret { tenant: tenant_id.into(), client: client_id.into(), secret })
    }

    /// Whoever is logged in to the Azure CLI on this machine (`az login`): for development.
    pub fn developer_tools() -> Self {
        Self(Source::DeveloperTools)
    }

    /// A credential of your own, of the crate `azure_core` 1. Its errors of the kind `Credential` count as refusals
    /// ([`KmsClass::Denied`]), those of the kinds `Connection` and `Io` as unreachable, and others say nothing.
    pub fn own(credential: Arc<dyn TokenCredential>) -> Self {
        Self(Source::Own(credential))
    }

    /// A new credential of the SDK, with no token yet.
    pub(super) fn connect(&self, place: &Place<'_>) -> Result<Arc<dyn TokenCredential>> {
        Ok(match &self.0 {
            Source::Chain(identity_gave) => {
                Arc::new(Chain::from_environment(place, Arc::clone(identity_gave), |name| std::env::var_os(name))?)
            }
            Source::ManagedIdentity(id) => managed_identity(place, id.clone())?,
            Source::WorkloadIdentity { tenant, client, token_file } => {
                workload_identity(place, tenant, client, token_file)?
            }
            Source::ClientSecret { tenant, client, secret } => client_secret(place, tenant, client, secret)?,
            Source::DeveloperTools => developer_tools()?,
            Source::Own(credential) => Arc::clone(credential),
        })
    }
}

impl fmt::Debug for AzureCredential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match &self.0 {
            Source::Chain(_) => "from_environment",
            Source::ManagedIdentity(_) => "managed_identity",
            Source::WorkloadIdentity { .. } => "workload_identity",
            Source::ClientSecret { .. } => "client_secret",
            Source::DeveloperTools => "developer_tools",
            Source::Own(_) => "own",
        };
        f.debug_struct("AzureCredential").field("source", &name).finish_non_exhaustive()
    }
}

/// Where tokens come from.
pub(super) struct Place<'a> {
    pub(super) transports: &'a Transports,
    /// Instead of `AZURE_AUTHORITY_HOST`, or else of the public cloud.
    pub(super) authority: Option<&'a str>,
}

impl Place<'_> {
    pub(super) fn options(&self, peer: Peer) -> ClientOptions {
        let cloud = self.authority.map(|host| {
            let mut custom = CustomConfiguration::default();
            custom.authority_host = host.to_owned();
            Arc::new(CloudConfiguration::Custom(custom))
        });
        ClientOptions {
            // pageseal repeats calls itself, within the caller's deadline.
            retry: RetryOptions::none(),
            transport: Some(self.transports.to(peer)),
            user_agent: UserAgentOptions { application_id: Some("pageseal".into()) },
            cloud,
            ..ClientOptions::default()
        }
    }
}

fn wrong(what: &str, error: &azure_core::Error) -> crate::Error {
    misconfigured(format!("the Azure credential {what}: {}", bounded(&error.to_string())))
}

fn client_secret(place: &Place<'_>, tenant: &str, client: &str, secret: &str) -> Result<Arc<dyn TokenCredential>> {
    let options = ClientSecretCredentialOptions { client_options: place.options(Peer::Entra) };
    let secret = Secret::new(secret.to_owned());
    let made = ClientSecretCredential::new(tenant, client.to_owned(), secret, Some(options));
    Ok(made.map_err(|error| wrong("client secret", &error))?)
}

fn workload_identity(
    place: &Place<'_>,
    tenant: &str,
    client: &str,
    token_file: &Path,
) -> Result<Arc<dyn TokenCredential>> {
    let options = ClientAssertionCredentialOptions { client_options: place.options(Peer::Entra) };
    let assertion = TokenFile(token_file.to_owned());
    let made = ClientAssertionCredential::new(tenant.to_owned(), client.to_owned(), assertion, Some(options));
    Ok(made.map_err(|error| wrong("workload identity", &error))?)
}

fn managed_identity(place: &Place<'_>, user_assigned_id: Option<UserAssignedId>) -> Result<Arc<dyn TokenCredential>> {
    let client_options = place.options(Peer::Identity);
    let options = ManagedIdentityCredentialOptions { user_assigned_id, client_options };
    Ok(ManagedIdentityCredential::new(Some(options)).map_err(|error| wrong("managed identity", &error))?)
}

fn developer_tools() -> Result<Arc<dyn TokenCredential>> {
    Ok(AzureCliCredential::new(None).map_err(|error| wrong("Azure CLI", &error))?)
}

/// The platform's token in a file, read anew each time.
#[derive(Debug)]
struct TokenFile(PathBuf);

impl TokenFile {
    fn read(&self) -> Result<String, Failure> {
        let mut text = String::new();
        let read = File::open(&self.0).and_then(|file| file.take(LONGEST_TOKEN).read_to_string(&mut text));
        match read {
            Ok(_) if !text.trim().is_empty() => Ok(text.trim().to_owned()),
            Ok(_) => Err(self.wrong("is empty")),
            Err(error) => Err(self.wrong(&format!("cannot be read: {error}"))),
        }
    }

    fn wrong(&self, what: &str) -> Failure {
        let text = format!(
            "the federated token file {} (AZURE_FEDERATED_TOKEN_FILE, or `workload_identity`) {what}",
            self.0.display()
        );
        Failure::new(KmsClass::Misconfigured, text)
    }
}

// As the macro of the crate `async-trait` writes it, here and below.
impl ClientAssertion for TokenFile {
    fn secret<'own, 'options, 'future>(
        &'own self,
        _: Option<ClientMethodOptions<'options>>,
    ) -> Pin<Box<dyn Future<Output = azure_core::Result<String>> + Send + 'future>>
    where
        'own: 'future,
        'options: 'future,
        Self: 'future,
    {
        Box::pin(async move { self.read().map_err(Failure::into_azure) })
    }
}

/// The credentials that the environment offers.
struct Chain {
    sources: Vec<Link>,
    /// What is not asked, and why.
    skipped: Vec<String>,
    /// The managed identity has given a token: it alone is asked from then on.
    identity_gave: Arc<AtomicBool>,
}

struct Link {
    name: &'static str,
    credential: Arc<dyn TokenCredential>,
    patience: Option<Duration>,
}

impl Chain {
    fn from_environment(
        place: &Place<'_>,
        identity_gave: Arc<AtomicBool>,
        get: impl Fn(&str) -> Option<OsString>,
    ) -> Result<Self> {
        let get = |name: &str| -> Result<Option<String>> {
            match get(name).map(OsString::into_string) {
                None => Ok(None),
                Some(Ok(value)) if value.is_empty() => Ok(None),
                Some(Ok(value)) => Ok(Some(value)),
                Some(Err(_)) => Err(misconfigured(format!("the environment variable {name} is not UTF-8"))),
            }
        };
        let needed = |name: &str, by: &str, example: &str| -> Result<String> {
            get(name)?.ok_or_else(|| {
                misconfigured(format!("{by} is set, and {name} is not; set it too, for example {name}={example}"))
            })
        };
        const UUID: &str = "00000000-0000-0000-0000-000000000000";
        let mut chain = Self { sources: Vec::new(), skipped: Vec::new(), identity_gave };
        let link = |name, credential, patience| Link { name, credential, patience };
        let with_cli = match get(WHICH)?.map(|value| value.to_ascii_lowercase()).as_deref() {
            None => true,
            Some("prod") => false,
            Some("dev" | "azureclicredential") => {
                chain.sources.push(link(CLI, developer_tools()?, None));
                chain.skipped.push(format!("all others: {WHICH} says so"));
                return Ok(chain);
            }
            Some(other) => {
                let text = format!(
                    "{WHICH} is {other:?}; here it may be prod (all but the Azure CLI), or dev or AzureCliCredential (the \
                     Azure CLI alone), for example {WHICH}=prod; otherwise unset it"
                );
                return Err(misconfigured(text));
            }
        };
        let secret = get("AZURE_CLIENT_SECRET")?.map(Zeroizing::new);
        if let Some(secret) = secret {
            let tenant = needed("AZURE_TENANT_ID", "AZURE_CLIENT_SECRET", UUID)?;
            let client = needed("AZURE_CLIENT_ID", "AZURE_CLIENT_SECRET", UUID)?;
            chain.sources.push(link("client secret", client_secret(place, &tenant, &client, &secret)?, None));
            return Ok(chain);
        }
        chain.skipped.push("client secret: AZURE_CLIENT_SECRET is not set".into());
        if let Some(file) = get("AZURE_FEDERATED_TOKEN_FILE")? {
            let tenant = needed("AZURE_TENANT_ID", "AZURE_FEDERATED_TOKEN_FILE", UUID)?;
            let client = needed("AZURE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE", UUID)?;
            let credential = workload_identity(place, &tenant, &client, Path::new(&file))?;
            chain.sources.push(link("workload identity", credential, None));
            return Ok(chain);
        }
        chain.skipped.push("workload identity: AZURE_FEDERATED_TOKEN_FILE is not set".into());
        let id = get("AZURE_CLIENT_ID")?.map(UserAssignedId::ClientId);
        match managed_identity(place, id) {
            Ok(credential) => chain.sources.push(link(IDENTITY, credential, Some(IDENTITY_PATIENCE))),
            // A kind of managed identity that the SDK does not support.
            Err(error) => chain.skipped.push(format!("managed identity: {error}")),
        }
        if with_cli {
            chain.sources.push(link(CLI, developer_tools()?, None));
        } else {
            chain.skipped.push(format!("{CLI}: {WHICH} leaves it out"));
        }
        Ok(chain)
    }

    async fn token(&self, scopes: &[&str]) -> Result<AccessToken, Failure> {
        let mut failures = Vec::new();
        let mut next = self.sources.iter();
        for link in next.by_ref() {
            match link.token(scopes).await {
                Ok(token) => {
                    // The Azure CLI is not chosen for good: the identity may have been wrongly missed.
                    if link.name == IDENTITY {
                        self.identity_gave.store(true, Ordering::Relaxed);
                    }
                    return Ok(token);
                }
                Err(error) => {
                    let known = link.name == IDENTITY && self.identity_gave.load(Ordering::Relaxed);
                    let passes = error.is_not_there && !known;
                    failures.push((link.name, error.error));
                    if !passes {
                        break;
                    }
                }
            }
        }
        let left =
            next.map(|link| format!("{}: not asked, because that may pass ({WHICH}=dev asks it alone)", link.name));
        let left: Vec<_> = left.collect();
        Err(self.failure(failures, left))
    }

    /// What all that failed have in common: a refusal only if every source refused, because one that could not be asked
    /// might give a token.
    fn failure(&self, failures: Vec<(&'static str, KmsError)>, left: Vec<String>) -> Failure {
        use KmsClass::{Denied, Misconfigured, Throttled, Unclassified, Unreachable};
        let has = |class| failures.iter().any(|(_, error)| error.class == class);
        // The Azure CLI that is not installed is a source that is not there.
        let absent = |name: &str, error: &KmsError| name == CLI && error.class == Misconfigured;
        let asked = || failures.iter().filter(|(name, error)| !absent(name, error));
        let uncertain = [Throttled, Unreachable, Unclassified].into_iter().find(|class| has(*class));
        let class = uncertain.unwrap_or(match asked().count() {
            0 => Misconfigured,
            _ if asked().all(|(_, error)| error.class == Denied) => Denied,
            _ => Misconfigured,
        });
        let tried = failures.iter().map(|(name, error)| match &error.source {
            Some(source) => format!("{name}: {source}"),
            None => format!("{name}: {}", error.class),
        });
        let all: Vec<_> = tried.chain(left).chain(self.skipped.iter().cloned()).collect();
        let retry_after = failures.iter().find_map(|(_, error)| error.retry_after);
        let text = format!("no Azure credential of the environment gave a token. {}", all.join(". "));
        Failure { retry_after, ..Failure::new(class, text) }
    }
}

/// Why a link gave no token.
struct NoToken {
    error: KmsError,
    /// There is no such source here, as far as one can tell, so that the next may be asked.
    is_not_there: bool,
}

impl Link {
    async fn token(&self, scopes: &[&str]) -> Result<AccessToken, NoToken> {
        let asked = self.credential.get_token(scopes, None);
        let answer = match self.patience {
            None => asked.await,
            Some(patience) => tokio::time::timeout(patience, asked).await.unwrap_or_else(|_| {
                let text = format!("no answer from {} within {patience:?}", Peer::Identity);
                Err(Failure::new(KmsClass::Unreachable, text).into_azure())
            }),
        };
        answer.map_err(|azure| {
            let error = credential_failure(&azure);
            let nobody = failure_in(&azure).is_some_and(|failure| failure.nobody);
            let is_not_there = nobody || matches!(error.class, KmsClass::Denied | KmsClass::Misconfigured);
            NoToken { error, is_not_there }
        })
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").finish_non_exhaustive()
    }
}

impl TokenCredential for Chain {
    fn get_token<'own, 'scopes, 'scope, 'options, 'future>(
        &'own self,
        scopes: &'scopes [&'scope str],
        _: Option<TokenRequestOptions<'options>>,
    ) -> Pin<Box<dyn Future<Output = azure_core::Result<AccessToken>> + Send + 'future>>
    where
        'own: 'future,
        'scopes: 'future,
        'scope: 'future,
        'options: 'future,
        Self: 'future,
    {
        Box::pin(async move { self.token(scopes).await.map_err(Failure::into_azure) })
    }
}
