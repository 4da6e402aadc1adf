//! Google Cloud KMS for the conformance suite: [`fake`], because no server can run here, and [`live`], if there is a key.

use std::sync::Arc;
use std::time::Duration;

use pageseal::testing::conformance::{Cannot, Fault, Front, KeyService, Step, http_answer};
use pageseal::{GoogleCredentials, GoogleKms, KeyWrapper};

use crate::gcp_fake::{FakeCloudKms, GOOD_TOKEN, KEY, OTHER_KEY, VersionState, body};

/// [`FakeCloudKms`] behind a [`Front`].
///
/// # Errors
/// Never: it runs everywhere.
pub fn fake() -> Result<Box<dyn KeyService>, String> {
    Ok(Box::new(Fake::start()))
}

/// The fake as a service, and its parts for other tests.
pub struct Fake {
    /// The service itself.
    pub cloud: FakeCloudKms,
    /// What stands before it.
    pub front: Front,
    wrapper: GoogleKms,
}

impl Fake {
    /// With a wrapper whose credentials are a good token.
    ///
    /// # Panics
    /// If the system has no sockets left.
    pub fn start() -> Self {
        let cloud = FakeCloudKms::start();
        let front = Front::before(cloud.address()).expect("there are free ports");
        let wrapper = wrapper_of(KEY, &front, token(GOOD_TOKEN));
        Self { cloud, front, wrapper }
    }

    /// A wrapper of [`KEY`] with these credentials.
    pub fn wrapper_with(&self, credentials: GoogleCredentials) -> GoogleKms {
        wrapper_of(KEY, &self.front, credentials)
    }

    /// The wrapper with the good token.
    pub fn google(&self) -> &GoogleKms {
        &self.wrapper
    }
}

fn wrapper_of(key: &str, front: &Front, credentials: GoogleCredentials) -> GoogleKms {
    let builder = GoogleKms::builder(key).endpoint(format!("http://{}", front.address())).credentials(credentials);
    builder.build().expect("the settings are in order")
}

/// Credentials that are always this token.
pub fn token(token: &str) -> GoogleCredentials {
    let token = token.to_owned();
    GoogleCredentials::access_token(move |_| Ok(token.clone()))
}

impl KeyService for Fake {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.wrapper.clone())
    }

    fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Cannot> {
        Ok(Arc::new(wrapper_of(OTHER_KEY, &self.front, token(GOOD_TOKEN))))
    }

    fn perform(&self, step: Step) -> Result<(), Cannot> {
        let credentials =
            |token: GoogleCredentials| self.wrapper.replace_credentials(token).expect("no file is needed");
        match step {
            Step::Disable => self.cloud.set_state(VersionState::Disabled),
            Step::Delete => self.cloud.set_state(VersionState::DestroyScheduled),
            Step::Enable => self.cloud.set_state(VersionState::Enabled),
            Step::Restore => {
                // Restoring makes a version disabled, so that it must be enabled too.
                self.cloud.set_state(VersionState::Disabled);
                self.cloud.set_state(VersionState::Enabled);
            }
            Step::Deny => self.cloud.allow(false),
            Step::Allow => self.cloud.allow(true),
            Step::SpoilCredentials => credentials(token("ya29.a-token-that-was-revoked")),
            Step::FixCredentials => credentials(token(GOOD_TOKEN)),
            Step::Rotate => _ = self.cloud.rotate(),
            _ => return Err(Cannot::new("the fake has no such step")),
        }
        Ok(())
    }

    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        let json = ("Content-Type", "application/json; charset=UTF-8");
        self.front.set(fault.passage(|fault| match fault {
            Fault::Throttle(after) => {
                let headers = [json, ("Retry-After", &after.as_secs().to_string())];
                http_answer("429 Too Many Requests", &headers, body("quota.json"))
            }
            Fault::ServerError => http_answer("500 Internal Server Error", &[json], body("internal.json")),
            _ => http_answer("503 Service Unavailable", &[("Content-Type", "text/html")], body("proxy_502.html")),
        }));
        Ok(())
    }
}

/// The real service, with the key that `PAGESEAL_GCP_KEY` names, if `PAGESEAL_LIVE_KMS` is `1`. Nothing is done to the key
/// and nothing to the network: rows that need that are skipped.
///
/// # Errors
/// Why it is not asked.
pub fn live() -> Result<Box<dyn KeyService>, String> {
    if std::env::var_os("PAGESEAL_LIVE_KMS").is_none_or(|value| value != "1") {
        return Err("PAGESEAL_LIVE_KMS is not 1".into());
    }
    let wrapper = GoogleKms::from_env().map_err(|error| error.to_string())?;
    Ok(Box::new(Live(wrapper)))
}

struct Live(GoogleKms);

impl KeyService for Live {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.0.clone())
    }

    fn perform(&self, step: Step) -> Result<(), Cannot> {
        let credentials = |token: GoogleCredentials| self.0.replace_credentials(token).expect("they were good before");
        match step {
            Step::SpoilCredentials => credentials(token("ya29.no-token-of-anybody")),
            Step::FixCredentials => credentials(GoogleCredentials::application_default()),
            _ => return Err(Cannot::new("nothing is done to a real key")),
        }
        Ok(())
    }

    fn inflict(&self, _: Fault) -> Result<(), Cannot> {
        Err(Cannot::new("there is nothing between this and the real service"))
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }
}
