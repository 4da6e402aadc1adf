//! Azure Key Vault and Managed HSM as key services: two **fakes**, and a real vault where the environment names one.

#[path = "azure_fake.rs"]
pub mod fake;

use std::sync::Arc;
use std::time::Duration;

use pageseal::testing::conformance::{Cannot, Fault, Front, KeyService, Passage, Step};
use pageseal::{AzureAlgorithm, AzureCredential, AzureKeyVault, AzureKeyVaultBuilder, KeyWrapper};

use crate::http::Answer;
use fake::{CLIENT, FakeKeyVault, KEY, Kind, OTHER_KEY, SECRET, TENANT};

/// A fake of Key Vault, with RSA keys.
///
/// # Errors
/// None: it runs everywhere.
pub fn fake() -> Result<Box<dyn KeyService>, String> {
    Ok(Box::new(FakeService::start(Kind::Rsa)))
}

/// A fake of Managed HSM, with AES keys.
///
/// # Errors
/// None: it runs everywhere.
pub fn fake_managed_hsm() -> Result<Box<dyn KeyService>, String> {
    Ok(Box::new(FakeService::start(Kind::Oct)))
}

/// A real vault.
///
/// # Errors
/// Why there is none: it must be named in the environment, as [`AzureKeyVault::from_env`] says, and wanted there, by
/// `PAGESEAL_LIVE_KMS=1`.
pub fn live() -> Result<Box<dyn KeyService>, String> {
    if std::env::var("PAGESEAL_LIVE_KMS").as_deref() != Ok("1") {
        return Err("PAGESEAL_LIVE_KMS=1 is not set".into());
    }
    let key = AzureKeyVault::from_env().map_err(|error| error.to_string())?;
    Ok(Box::new(Live(key)))
}

/// A fake behind a [`Front`], and a wrapper with a client secret.
pub struct FakeService {
    /// What stands behind the front.
    pub fake: FakeKeyVault,
    /// The way to it.
    pub front: Front,
    kind: Kind,
    wrapper: AzureKeyVault,
}

impl FakeService {
    /// Starts it.
    pub fn start(kind: Kind) -> Self {
        let fake = FakeKeyVault::start(kind);
        let front = Front::before(fake.address()).expect("there are free ports");
        fake.world().host = front.address().to_string();
        let wrapper = builder(&fake, &front, kind, KEY).build().expect("the settings are in order");
        Self { fake, front, kind, wrapper }
    }

    /// The settings of a wrapper for one of its keys, with a client secret.
    pub fn builder(&self, key: &str) -> AzureKeyVaultBuilder {
        builder(&self.fake, &self.front, self.kind, key)
    }

    /// Its wrapper.
    pub fn azure(&self) -> &AzureKeyVault {
        &self.wrapper
    }
}

fn builder(fake: &FakeKeyVault, front: &Front, kind: Kind, key: &str) -> AzureKeyVaultBuilder {
    let url = format!("https://{}", front.address());
    let algorithm = match kind {
        Kind::Rsa => AzureAlgorithm::RsaOaep256,
        Kind::Oct => AzureAlgorithm::A256Kw,
    };
    AzureKeyVault::builder(&url, key)
        .algorithm(algorithm)
        .credential(good_credential())
        .ca_file(fake.certificate())
        .authority_host(&url)
        .accept_any_challenge()
}

/// The client secret that the fake takes.
pub fn good_credential() -> AzureCredential {
    AzureCredential::client_secret(TENANT, CLIENT, SECRET)
}

impl KeyService for FakeService {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.wrapper.clone())
    }

    fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Cannot> {
        Ok(Arc::new(self.builder(OTHER_KEY).build().expect("the settings are in order")))
    }

    fn perform(&self, step: Step) -> Result<(), Cannot> {
        let replace = |secret: &str| {
            let credential = AzureCredential::client_secret(TENANT, CLIENT, secret);
            self.wrapper.replace_credentials(credential).expect("the credential is well formed");
        };
        match step {
            Step::Disable => self.fake.world().enable(KEY, false),
            Step::Enable => self.fake.world().enable(KEY, true),
            Step::Delete => self.fake.world().delete(KEY),
            Step::Restore => self.fake.world().recover(KEY),
            Step::Deny => self.fake.world().may_use = false,
            Step::Allow => self.fake.world().may_use = true,
            Step::SpoilCredentials => replace("not-the-secret"),
            Step::FixCredentials => replace(SECRET),
            Step::Rotate => drop(self.fake.world().new_version(KEY)),
            _ => return Err(Cannot::new("this fake does not know the step")),
        }
        Ok(())
    }

    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        // What it answers, it must say itself: the front cannot look into TLS.
        self.fake.world().vault_says = match fault {
            Fault::Throttle(after) => Some(throttled(after)),
            Fault::ServerError => {
                Some(Answer::json("500 Internal Server Error", include_str!("../bodies/azure/internal.json")))
            }
            Fault::ProxyError => {
                let answer = Answer::json("503 Service Unavailable", include_str!("../bodies/azure/proxy.html"));
                Some(answer.header("Content-Type", "text/html"))
            }
            _ => None,
        };
        self.front.set(match fault.passage(|_| Vec::new()) {
            Passage::Answer(_) => Passage::Open,
            passage => passage,
        });
        Ok(())
    }
}

/// As Key Vault throttles.
pub fn throttled(after: Duration) -> Answer {
    let answer = Answer::json("429 Too Many Requests", include_str!("../bodies/azure/throttled.json"));
    answer.header("Retry-After", &after.as_secs().to_string())
}

/// A real vault, whose keys a test leaves as they are.
struct Live(AzureKeyVault);

impl KeyService for Live {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.0.clone())
    }

    fn perform(&self, _: Step) -> Result<(), Cannot> {
        Err(Cannot::new("a test does not change the keys and rights of a real vault"))
    }

    fn inflict(&self, _: Fault) -> Result<(), Cannot> {
        Err(Cannot::new("there is no proxy before a real vault"))
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(60)
    }
}
