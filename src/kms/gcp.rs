//! [`GoogleKms`]: master keys in Google Cloud KMS (feature `gcp`).

mod credentials;
mod failure;
mod name;

use std::ffi::OsString;
use std::fmt;
use std::future::Future;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use google_cloud_gax::client_builder;
use google_cloud_gax::error::Error as CallError;
use google_cloud_gax::options::RequestOptionsBuilder;
use google_cloud_gax::retry_policy::NeverRetry;
use google_cloud_kms_v1::client::KeyManagementService;
use google_cloud_kms_v1::model::{DecryptResponse, EncryptResponse};
use zeroize::Zeroizing;

pub use credentials::GoogleCredentials;

use crate::error::{Error, ErrorKind, KmsClass, KmsError, Result};
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::kms::asynchronous::{AsyncKeyWrapper, FromAsync};
use crate::secret::KeyPayload;
use credentials::{Lent, Renewal, Session, Slot};
use failure::{Asked, is_about_credentials, misled_by_the_clock, unclassified, unreachable};
use name::KeyName;

const PROVIDER: &str = "google-cloud-kms";
const KEY_VARIABLE: &str = "PAGESEAL_GCP_KEY";
const ENDPOINT_VARIABLE: &str = "PAGESEAL_GCP_ENDPOINT";
const QUOTA_PROJECT_VARIABLE: &str = "GOOGLE_CLOUD_QUOTA_PROJECT";
/// The SDK reads it too, and it wins there: the two must agree.
const UNIVERSE_VARIABLE: &str = "GOOGLE_CLOUD_UNIVERSE_DOMAIN";
/// Makes the SDK write every request and answer to the log, payloads included.
const LOGGING_VARIABLE: &str = "GOOGLE_CLOUD_RUST_LOGGING";
const EXAMPLE: &str = "projects/my-project/locations/europe-west3/keyRings/my-ring/cryptoKeys/my-key";
const LONGEST_BLOB: usize = 4096;

/// A master key in Google Cloud KMS: a symmetric key of purpose `ENCRYPT_DECRYPT`, in software, HSM or external.
///
/// Wrapping calls `encrypt` on the key, which uses its primary version; [`WrappedKey::key_version`] is that version's number.
/// Unwrapping calls `decrypt` on the key: the service finds the version itself, so that rotation needs nothing here. The
/// context is bound as additional authenticated data. Rewrapping is decrypting and encrypting, as the service has no call for
/// both. Plaintext, ciphertext and context carry CRC32C checksums in both directions, as Google advises
/// (<https://cloud.google.com/kms/docs/data-integrity-guidelines>); where one does not fit, the answer is thrown away and
/// counts as unreachable.
///
/// The official SDK does the calls, over HTTPS, with its own TLS (aws-lc) unless the process has installed another provider
/// for rustls; nothing is installed here. The SDK's retries are off, and each call ends at its deadline. This type wipes its own
/// copies of payloads; those that the SDK makes in sending and receiving are not wiped. Requests with keys follow no
/// redirection. The SDK's requests for access tokens do, which cannot be changed from here; a service account's file needs none.
///
/// Clones share credentials and connections. How each answer is classified, which rights are needed, and what is not tested
/// says docs/kms/gcp.md.
///
/// ```
/// use pageseal::{GoogleCredentials, GoogleKms, KeyWrapper};
///
/// let key = "projects/my-project/locations/europe-west3/keyRings/my-ring/cryptoKeys/my-key";
/// # let anonymous = GoogleCredentials::anonymous();
/// let master = GoogleKms::builder(key)
///     .endpoint("https://cloudkms.europe-west3.rep.googleapis.com")
/// #   .credentials(anonymous)
///     .build()?;
/// assert_eq!(master.id().to_string(), format!("google-cloud-kms:{key}"));
/// # Ok::<(), pageseal::Error>(())
/// ```
#[derive(Clone)]
pub struct GoogleKms(Arc<FromAsync<Service>>);

impl GoogleKms {
    /// The key of this full resource name: `projects/P/locations/L/keyRings/R/cryptoKeys/K`, without a version.
    pub fn builder(key: impl Into<String>) -> GoogleKmsBuilder {
        GoogleKmsBuilder {
            key: key.into(),
            endpoint: None,
            universe_domain: None,
            quota_project: None,
            credentials: GoogleCredentials::application_default(),
        }
    }

    /// As the environment says:
    ///
    /// | variable | |
    /// |---|---|
    /// | `PAGESEAL_GCP_KEY` | the key's full resource name; needed |
    /// | `PAGESEAL_GCP_ENDPOINT` | see [`GoogleKmsBuilder::endpoint`] |
    /// | `GOOGLE_APPLICATION_CREDENTIALS`, `HOME`, `GCE_METADATA_HOST` | see [`GoogleCredentials::application_default`] |
    /// | `GOOGLE_CLOUD_QUOTA_PROJECT` | see [`GoogleKmsBuilder::quota_project`] |
    /// | `GOOGLE_CLOUD_UNIVERSE_DOMAIN` | see [`GoogleKmsBuilder::universe_domain`] |
    /// | `HTTPS_PROXY`, `NO_PROXY`, `SSL_CERT_FILE` | the SDK's: a proxy, and other trusted authorities |
    /// | `GOOGLE_CLOUD_RUST_LOGGING` | must not be `true`: the SDK would write keys to the log |
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] with the variable, what is wrong with it, and how it should look. No service is asked.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(&|name| std::env::var_os(name))
    }

    fn from_lookup(lookup: &dyn Fn(&str) -> Option<OsString>) -> Result<Self> {
        let text = |name: &str| match lookup(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(value)) if value.is_empty() => Ok(None),
            Some(Ok(value)) => Ok(Some(value)),
            Some(Err(_)) => Err(misconfigured(format!("{name} is not UTF-8"))),
        };
        let key = text(KEY_VARIABLE)?.ok_or_else(|| {
            misconfigured(format!("{KEY_VARIABLE} is not set; set it to the key's full name, for example {EXAMPLE}"))
        })?;
        KeyName::parse(&key).map_err(|what| misconfigured(format!("{KEY_VARIABLE}: {what}, for example {EXAMPLE}")))?;
        let mut builder = Self::builder(key).credentials(GoogleCredentials::from_lookup(lookup));
        if let Some(endpoint) = text(ENDPOINT_VARIABLE)? {
            check_endpoint(&endpoint).map_err(|what| misconfigured(format!("{ENDPOINT_VARIABLE} {what}")))?;
            builder = builder.endpoint(endpoint);
        }
        builder.quota_project = text(QUOTA_PROJECT_VARIABLE)?;
        if lookup(UNIVERSE_VARIABLE).is_some_and(|value| value.is_empty()) {
            return Err(no_universe());
        }
        builder.universe_domain = text(UNIVERSE_VARIABLE)?;
        builder.build()
    }

    /// Puts other credentials into the place of those in use, also for the clones. Calls in flight go on with the old ones.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] if a file is missing or malformed; then the old ones stay.
    pub fn replace_credentials(&self, credentials: GoogleCredentials) -> Result<()> {
        let slot = &self.0.get_ref().slot;
        credentials.check(slot.universe()).map_err(misconfigured)?;
        slot.replace(credentials);
        Ok(())
    }
}

impl fmt::Debug for GoogleKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let service = self.0.get_ref();
        let key = service.key.as_str();
        f.debug_struct("GoogleKms").field("key", &key).field("endpoint", &service.endpoint).finish_non_exhaustive()
    }
}

forward_key_wrapper!(GoogleKms, 0);

/// What a [`GoogleKms`] is made of.
#[derive(Clone, Debug)]
#[must_use]
pub struct GoogleKmsBuilder {
    key: String,
    endpoint: Option<String>,
    universe_domain: Option<String>,
    quota_project: Option<String>,
    credentials: GoogleCredentials,
}

impl GoogleKmsBuilder {
    /// Where to send requests: a regional or private endpoint, such as `https://cloudkms.europe-west3.rep.googleapis.com`.
    /// `http://` is taken for this machine only (`127.0.0.1`, `[::1]`, `localhost`), because it shows keys to whoever listens.
    /// By default `https://cloudkms.googleapis.com`.
    pub fn endpoint(mut self, url: impl Into<String>) -> Self {
        self.endpoint = Some(url.into());
        self
    }

    /// The domain of a universe other than `googleapis.com`, as sovereign clouds have it. The credentials must be of the same.
    /// The variable `GOOGLE_CLOUD_UNIVERSE_DOMAIN`, which the SDK obeys, wins.
    pub fn universe_domain(mut self, domain: impl Into<String>) -> Self {
        self.universe_domain = Some(domain.into());
        self
    }

    /// The project whose quota is used and who is charged, if not the key's or the credentials' own; the identity needs
    /// `serviceusage.services.use` there.
    pub fn quota_project(mut self, project: impl Into<String>) -> Self {
        self.quota_project = Some(project.into());
        self
    }

    /// By default [`GoogleCredentials::application_default`].
    pub fn credentials(mut self, credentials: GoogleCredentials) -> Self {
        self.credentials = credentials;
        self
    }

    /// Without a call to any service.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`]: which piece of the key's name, which file or what else is wrong. Also if the variable
    /// `GOOGLE_CLOUD_RUST_LOGGING` is `true`, because the SDK would then write keys to the program's log.
    pub fn build(self) -> Result<GoogleKms> {
        let key = KeyName::parse(&self.key).map_err(|what| misconfigured(format!("the key {:?}: {what}", self.key)))?;
        if let Some(endpoint) = &self.endpoint {
            check_endpoint(endpoint).map_err(|what| misconfigured(format!("the endpoint {what}")))?;
        }
        if std::env::var_os(LOGGING_VARIABLE).is_some_and(|value| value == "true") {
            return Err(misconfigured(format!(
                "{LOGGING_VARIABLE} is true, by which Google's SDK writes the keys themselves to the log; unset it"
            )));
        }
        let universe = std::env::var(UNIVERSE_VARIABLE).ok().or(self.universe_domain);
        if universe.as_deref() == Some("") {
            return Err(no_universe());
        }
        let slot = Arc::new(Slot::new(self.credentials.clone(), universe.clone()));
        self.credentials.check(slot.universe()).map_err(misconfigured)?;

        // pageseal repeats calls by itself.
        let mut client = KeyManagementService::builder().with_retry_policy(NeverRetry);
        client = client.with_credentials(Lent(Arc::clone(&slot)));
        client = client.with_universe_domain(slot.universe());
        // A redirection would carry a key to whatever host it names; a small answer could unpack to more than there is memory.
        client = client_builder::internal::with_follow_redirects(client, false);
        client = client_builder::internal::with_automatic_decompression(client, false);
        let default = format!("https://cloudkms.{}", slot.universe());
        let endpoint = self.endpoint.unwrap_or(default);
        let client = at_once(client.with_endpoint(&endpoint).build()).ok_or_else(|| {
            misconfigured("Google's SDK asks a service before its client is made, which this version does not expect")
        })?;
        let client = client.map_err(|error| {
            misconfigured(format!(
                "making a client for {endpoint}{}; are there trusted authorities on this system (SSL_CERT_FILE)?",
                failure::innermost(&error)
            ))
        })?;
        let id = MasterKeyId::new(PROVIDER, key.as_str());
        let service = Service { key, id, endpoint, client, slot, quota_project: self.quota_project };
        Ok(GoogleKms(Arc::new(FromAsync::new(service))))
    }
}

struct Service {
    key: KeyName,
    id: MasterKeyId,
    endpoint: String,
    client: KeyManagementService,
    slot: Arc<Slot>,
    quota_project: Option<String>,
}

impl Service {
    /// Sends a request: with credentials that were not begun for it a second time, if these are refused, because a token may
    /// have grown old unnoticed (a suspended machine), and what a cache says must not stop a cluster.
    async fn request<T, F>(
        &self,
        record: Option<&str>,
        deadline: Instant,
        send: impl Fn(Duration) -> F,
    ) -> Result<T, KmsError>
    where
        F: Future<Output = Result<T, CallError>>,
    {
        let mut again = true;
        loop {
            let (session, fresh) = self.slot.session()?;
            let asked = Asked { key: &self.key, endpoint: &self.endpoint, origin: &session.origin, record };
            let outcome = match self.wait_for_token(&session, &asked, deadline).await {
                Err((error, true)) => return Err(error),
                Err((error, false)) => Err(error),
                Ok(()) => match send(left(deadline)).await {
                    Ok(value) => return Ok(value),
                    // The caller's function fails by itself, and has said what that means.
                    Err(error) if error.is_authentication() && session.renewal == Renewal::Ask => {
                        return Err(asked.failed(&error));
                    }
                    Err(error) if is_about_credentials(&error) && session.renewal == Renewal::Impossible => {
                        Err(no_verdict(asked.failed(&error)))
                    }
                    Err(error) if is_about_credentials(&error) => Err(match misled_by_the_clock(&error, now()) {
                        Some(told) if session.signs => told,
                        _ => asked.failed(&error),
                    }),
                    Err(error) => return Err(asked.failed(&error)),
                },
            };
            self.slot.forget(&session);
            if fresh || matches!(session.renewal, Renewal::Impossible | Renewal::Pointless) || !again {
                return outcome;
            }
            again = false;
        }
    }

    /// Returns when the credentials have a token, which the client then finds there. An error comes with whether it is final.
    ///
    /// Whatever ends the waiting, also the end of the call, throws the credentials away: their fetching of a token has no
    /// time limit, and once it hangs it would hang for all later calls too.
    async fn wait_for_token(
        &self,
        session: &Arc<Session>,
        asked: &Asked<'_>,
        deadline: Instant,
    ) -> Result<(), (KmsError, bool)> {
        if session.renewal != Renewal::Begin {
            return Ok(());
        }
        let mut abandoned = Abandoned(Some((&self.slot, session)));
        // A little less than there is, so that this answer comes and not the general one.
        let wait = left(deadline).mul_f64(0.95);
        let headers = session.credentials.headers(Default::default());
        match tokio::time::timeout(wait, headers).await {
            Ok(Ok(_)) => {
                abandoned.0 = None;
                Ok(())
            }
            Ok(Err(error)) => Err((asked.without_token(&error), false)),
            Err(_) => {
                let text = format!("no access token from {} after {wait:.1?}", session.origin);
                Err((unreachable(text), true))
            }
        }
    }

    /// What every request carries.
    fn with_options<R: RequestOptionsBuilder>(&self, request: R, cx: &WrapContext<'_>, timeout: Duration) -> R {
        let label: String = cx.label.chars().filter(|c| c.is_ascii_graphic() || *c == ' ').take(200).collect();
        let agent = format!("pageseal/{} {label}", env!("CARGO_PKG_VERSION"));
        let request = request.with_attempt_timeout(timeout).with_user_agent(agent.trim_end());
        match &self.quota_project {
            Some(project) => request.with_quota_project(project),
            None => request,
        }
    }

    /// The checks that Google advises, and that the version is one of this key.
    fn encrypted(&self, answer: EncryptResponse) -> Result<WrappedKey, KmsError> {
        if !answer.verified_plaintext_crc32c || !answer.verified_additional_authenticated_data_crc32c {
            let text = "the service did not confirm the checksums of the request, which was corrupted in transit";
            return Err(unreachable(text));
        }
        if answer.ciphertext_crc32c != Some(checksum(&answer.ciphertext)) {
            return Err(unreachable("the ciphertext does not fit its checksum: the answer was corrupted in transit"));
        }
        let Some(version) = self.key.version_in(&answer.name) else {
            return Err(unclassified("the service encrypted with a key version that is not of this key"));
        };
        if !(1..=LONGEST_BLOB).contains(&answer.ciphertext.len()) {
            return Err(unclassified(format!("the service made a ciphertext of {} bytes", answer.ciphertext.len())));
        }
        Ok(WrappedKey { master_key: self.id.clone(), key_version: version.into(), blob: answer.ciphertext.into() })
    }

    fn decrypted(&self, answer: DecryptResponse) -> Result<KeyPayload, KmsError> {
        let fits = answer.plaintext_crc32c == Some(checksum(&answer.plaintext));
        // In place, if the SDK has no other handle on it.
        let len = answer.plaintext.len();
        let payload = match answer.plaintext.try_into_mut() {
            Ok(mut plaintext) => KeyPayload::from_bytes(&mut plaintext),
            Err(plaintext) => KeyPayload::from_bytes(&mut plaintext.to_vec()),
        };
        if !fits {
            return Err(unreachable("the plaintext does not fit its checksum: the answer was corrupted in transit"));
        }
        if len != KeyPayload::LEN {
            let text = format!("it decrypts to {len} bytes, which is no key of pageseal");
            return Err(KmsError::with_source(KmsClass::BadCiphertext, text));
        }
        Ok(payload?)
    }
}

impl AsyncKeyWrapper for Service {
    fn id(&self) -> MasterKeyId {
        self.id.clone()
    }

    async fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        // Wiped when the last handle on it is gone.
        let plaintext = key.with_bytes(|bytes| Bytes::from_owner(Zeroizing::new(bytes.to_vec())))?;
        let context = Bytes::copy_from_slice(&cx.associated_data());
        let answer = self.request(None, cx.deadline, |timeout| {
            let request = self.client.encrypt().set_name(self.key.as_str());
            let request = request.set_plaintext(plaintext.clone()).set_plaintext_crc32c(checksum(&plaintext));
            let request = request.set_additional_authenticated_data(context.clone());
            let request = request.set_additional_authenticated_data_crc32c(checksum(&context));
            self.with_options(request, cx, timeout).send()
        });
        self.encrypted(answer.await?)
    }

    async fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        let refused = |text: String| Err(KmsError::with_source(KmsClass::BadCiphertext, text));
        if key.master_key != self.id {
            return refused(format!("it was wrapped by {}", key.master_key));
        }
        if !(1..=LONGEST_BLOB).contains(&key.blob.len()) {
            return refused(format!("the record has a ciphertext of {} bytes", key.blob.len()));
        }
        let ciphertext = Bytes::copy_from_slice(&key.blob);
        let context = Bytes::copy_from_slice(&cx.associated_data());
        let answer = self.request(Some(&key.key_version), cx.deadline, |timeout| {
            let request = self.client.decrypt().set_name(self.key.as_str());
            let request = request.set_ciphertext(ciphertext.clone()).set_ciphertext_crc32c(checksum(&ciphertext));
            let request = request.set_additional_authenticated_data(context.clone());
            let request = request.set_additional_authenticated_data_crc32c(checksum(&context));
            self.with_options(request, cx, timeout).send()
        });
        self.decrypted(answer.await?)
    }
}

/// Throws credentials away when it is dropped, unless it was emptied.
struct Abandoned<'a>(Option<(&'a Slot, &'a Arc<Session>)>);

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if let Some((slot, session)) = self.0.take() {
            slot.forget(session);
        }
    }
}

/// Of credentials that cannot be told to fetch a token anew.
fn no_verdict(error: KmsError) -> KmsError {
    match error.class {
        KmsClass::Denied => {
            unclassified(format!("{error}; the token may be an old one, which the SDK still takes for good"))
        }
        _ => error,
    }
}

#[allow(clippy::disallowed_methods)] // The SDK signs for the time that it is.
fn now() -> SystemTime {
    SystemTime::now()
}

fn checksum(bytes: &[u8]) -> i64 {
    crc32c::crc32c(bytes).into()
}

fn left(deadline: Instant) -> Duration {
    // A timeout of nothing would be none at all.
    deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1))
}

/// The output of a future that waits for nothing.
fn at_once<F: Future>(future: F) -> Option<F::Output> {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    }
}

/// The SDK takes nothing for a domain.
fn no_universe() -> Error {
    misconfigured(format!(
        "{UNIVERSE_VARIABLE} or the universe domain is set to nothing; unset it, or name googleapis.com"
    ))
}

fn misconfigured(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misconfigured, text)
}

/// `https://HOST[:PORT]`, or `http://` to this machine.
fn check_endpoint(url: &str) -> Result<(), String> {
    const LOOKS: &str = "it looks like https://cloudkms.europe-west3.rep.googleapis.com";
    let (scheme, rest) = url.split_once("://").ok_or(format!("{url:?} has no scheme; {LOOKS}"))?;
    let authority = rest.strip_suffix('/').unwrap_or(rest);
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, port),
        _ => (authority, "443"),
    };
    let bracketed = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let address: Option<IpAddr> = bracketed.unwrap_or(host).parse().ok();
    let named = !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || c == '.' || c == '-');
    if !(named || (bracketed.is_some() && address.is_some())) || port.parse::<u16>().is_err() {
        return Err(format!("{url:?} is more or less than a host and perhaps a port; {LOOKS}"));
    }
    match scheme {
        "https" => Ok(()),
        "http" if host == "localhost" || address.is_some_and(|address| address.is_loopback()) => Ok(()),
        "http" => Err(format!("{url:?} would show keys to whoever listens on the way; use https")),
        _ => Err(format!("{url:?} is neither https nor http; {LOOKS}")),
    }
}

#[cfg(test)]
mod tests;
