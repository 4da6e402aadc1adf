//! The HTTPS client under Azure's SDK: TLS on ring, with the system's roots and an authority of the user's; bounded answers;
//! and failures that keep their class on the way through the SDK.

use std::error::Error as StdError;
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use azure_core::error::ErrorKind as AzureKind;
use azure_core::http::headers::{HeaderName, HeaderValue, Headers};
use azure_core::http::{AsyncRawResponse, Body, HttpClient, Method, Request, Transport};
use reqwest::redirect::Policy;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use zeroize::Zeroizing;

use super::classify::{self, bounded};
use crate::error::{Error, ErrorKind, KmsClass, KmsError, Result};

/// The answers are JSON of a few hundred bytes.
const LONGEST_ANSWER: usize = 64 * 1024;
/// A call has its own deadline; this one lets another address of the same host be tried before it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A failure that was classified before the SDK saw it, carried through the SDK as the source of its error.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) class: KmsClass,
    pub(super) retry_after: Option<Duration>,
    pub(super) text: String,
    /// Nobody listens there: the connection was refused, or there is no way to the host. (A time-out is not that.)
    pub(super) nobody: bool,
}

impl Failure {
    pub(super) fn new(class: KmsClass, text: impl Into<String>) -> Self {
        Self { class, retry_after: None, text: text.into(), nobody: false }
    }

    pub(super) fn to_kms(&self) -> KmsError {
        let error = KmsError::with_source(self.class, self.text.clone());
        match self.retry_after {
            Some(after) => error.retry_after(after),
            None => error,
        }
    }

    /// Of the kind that none of the SDK's policies repeats.
    pub(super) fn into_azure(self) -> azure_core::Error {
        let text = self.text.clone();
        azure_core::Error::with_error(AzureKind::Other, self, text)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl StdError for Failure {}

/// Who is spoken to, which decides what its refusals mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Peer {
    /// Key Vault or Managed HSM. Its refusals go to the SDK, which answers challenges.
    Vault,
    /// The token endpoint of Microsoft Entra ID.
    Entra,
    /// The endpoint for managed identities, of the machine (IMDS) or of App Service.
    Identity,
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Vault => "Key Vault",
            Self::Entra => "Microsoft Entra ID",
            Self::Identity => "the managed identity endpoint",
        })
    }
}

/// The connections of one wrapper, kept when its credentials are replaced.
#[derive(Clone)]
pub(super) struct Transports {
    /// Through the proxy that the environment names, if it does.
    outward: reqwest::Client,
    /// Past any proxy: the identity endpoint is this machine's own, and speaks plain HTTP.
    local: reqwest::Client,
}

impl Transports {
    pub(super) fn new(ca_file: Option<&Path>) -> Result<Self> {
        let tls = tls_config(ca_file)?;
        let client = |builder: reqwest::ClientBuilder| {
            let built = builder
                .tls_backend_preconfigured(tls.clone())
                .http1_only()
                .redirect(Policy::none())
                .connect_timeout(CONNECT_TIMEOUT)
                .build();
            built.map_err(|error| misconfigured(format!("making an HTTPS client for Azure: {}", innermost(&error))))
        };
        Ok(Self { outward: client(reqwest::Client::builder())?, local: client(reqwest::Client::builder().no_proxy())? })
    }

    pub(super) fn to(&self, peer: Peer) -> Transport {
        let client = if peer == Peer::Identity { &self.local } else { &self.outward };
        Transport::new(Arc::new(Channel { client: client.clone(), peer }))
    }
}

/// The system's roots, and those of `ca_file`.
fn tls_config(ca_file: Option<&Path>) -> Result<ClientConfig> {
    let system = rustls_native_certs::load_native_certs();
    let mut roots = RootCertStore::empty();
    // What is unreadable there is not trusted; a handshake that needs it says so.
    roots.add_parsable_certificates(system.certs);
    if let Some(path) = ca_file {
        let wrong = |what: String| misconfigured(format!("the CA file {}: {what}", path.display()));
        let read = CertificateDer::pem_file_iter(path).map_err(|error| wrong(error.to_string()))?;
        let mut count = 0;
        for certificate in read {
            let certificate = certificate.map_err(|error| wrong(error.to_string()))?;
            roots.add(certificate).map_err(|error| wrong(error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(wrong("there is no certificate in it; it must be PEM (-----BEGIN CERTIFICATE-----)".into()));
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let versions = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let builder = versions.map_err(|error| misconfigured(format!("TLS: {error}")))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

pub(super) fn misconfigured(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misconfigured, text)
}

#[derive(Debug)]
struct Channel {
    client: reqwest::Client,
    peer: Peer,
}

impl Channel {
    async fn exchange(&self, request: &Request) -> Result<AsyncRawResponse, Failure> {
        let unexpected = |what| Failure::new(KmsClass::Unclassified, format!("the SDK made {what}"));
        let method = method(request.method()).ok_or_else(|| unexpected("a request of an unexpected method"))?;
        let mut asked = self.client.request(method, request.url().clone());
        for (name, value) in request.headers().iter() {
            asked = asked.header(name.as_str(), value.as_str());
        }
        let asked = match request.body() {
            Body::Bytes(bytes) => asked.body(bytes.clone()),
            Body::SeekableStream(_) => return Err(unexpected("a streamed request")),
        };
        let mut answer = asked.send().await.map_err(|error| self.broken(&error, request))?;
        let status = answer.status().as_u16();
        let headers = headers(answer.headers());
        let announced = answer.content_length().and_then(|length| usize::try_from(length).ok());
        // It holds a payload's base64 after an unwrap: never reallocated, and wiped.
        let mut body = Zeroizing::new(Vec::with_capacity(announced.unwrap_or(LONGEST_ANSWER).min(LONGEST_ANSWER)));
        while let Some(chunk) = answer.chunk().await.map_err(|error| self.broken(&error, request))? {
            if chunk.len() > body.capacity() - body.len() {
                let text = format!("{} answered with more than {LONGEST_ANSWER} bytes", self.place(request));
                return Err(Failure::new(KmsClass::Unclassified, text));
            }
            body.extend_from_slice(&chunk);
        }
        if self.peer != Peer::Vault && !(200..300).contains(&status) {
            return Err(classify::token_refusal(self.peer, status, &headers, &body));
        }
        Ok(AsyncRawResponse::from_bytes(status.into(), headers, azure_core::Bytes::from_owner(body)))
    }

    fn place(&self, request: &Request) -> String {
        let host = request.url().host_str().unwrap_or_default();
        match request.url().port() {
            Some(port) => format!("{} at {host}:{port}", self.peer),
            None => format!("{} at {host}", self.peer),
        }
    }

    /// A connection that could not be made, or that broke.
    fn broken(&self, error: &reqwest::Error, request: &Request) -> Failure {
        let place = self.place(request);
        if let Some(refused) = untrusted(error) {
            let text = format!(
                "{place}: its certificate is not trusted ({refused}); put the authority that issued it into the CA file \
                 (PAGESEAL_AZURE_CA_FILE, or `ca_file` of the builder) or into the system's trust store"
            );
            return Failure::new(KmsClass::Misconfigured, text);
        }
        if error.is_builder() {
            return Failure::new(KmsClass::Misconfigured, format!("{place}: {}", bounded(&innermost(error))));
        }
        let what = if error.is_connect() { "no connection" } else { "the connection broke" };
        let nobody = error.is_connect() && !error.is_timeout();
        let text = format!("{place}: {what}: {}", bounded(&innermost(error)));
        Failure { nobody, ..Failure::new(KmsClass::Unreachable, text) }
    }
}

// As the macro of the crate `async-trait` writes it, without which the SDK's traits cannot be implemented otherwise.
impl HttpClient for Channel {
    fn execute_request<'own, 'request, 'future>(
        &'own self,
        request: &'request Request,
    ) -> Pin<Box<dyn Future<Output = azure_core::Result<AsyncRawResponse>> + Send + 'future>>
    where
        'own: 'future,
        'request: 'future,
        Self: 'future,
    {
        Box::pin(async move { self.exchange(request).await.map_err(Failure::into_azure) })
    }
}

fn method(method: Method) -> Option<reqwest::Method> {
    match method {
        Method::Get => Some(reqwest::Method::GET),
        Method::Post => Some(reqwest::Method::POST),
        // Nothing that this crate calls.
        _ => None,
    }
}

fn headers(received: &reqwest::header::HeaderMap) -> Headers {
    let mut headers = Headers::new();
    for (name, value) in received {
        if let Ok(value) = value.to_str() {
            headers.insert(HeaderName::from(name.as_str().to_owned()), HeaderValue::from(value.to_owned()));
        }
    }
    headers
}

/// What is wrong with the peer's certificate, if that is why there is no connection.
fn untrusted<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return matches!(tls, rustls::Error::InvalidCertificate(_)).then_some(tls);
        }
        // An I/O error made of another one hides it from `source`.
        next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// The text of the first cause: those above it say "error sending request".
fn innermost(error: &(dyn StdError + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_ca_file_is_told_with_its_name() {
        let directory = std::env::temp_dir().join(format!("pageseal-azure-ca-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let (missing, empty, garbage) = (directory.join("missing"), directory.join("empty"), directory.join("garbage"));
        std::fs::write(&empty, "no certificate\n").unwrap();
        std::fs::write(&garbage, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
        for path in [missing, empty, garbage] {
            let error = Transports::new(Some(&path)).err().unwrap();
            assert_eq!(error.kind(), ErrorKind::Misconfigured);
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
