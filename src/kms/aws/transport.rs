//! What lies between the SDK and the network, and between the SDK and the source of its credentials.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use aws_credential_types::Credentials;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider, future};
use aws_sdk_kms::config::{ConfigBag, HttpClient, RuntimeComponents, RuntimeComponentsBuilder, SharedHttpClient};
use aws_sdk_kms::error::{BoxError, ConnectorError};
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_smithy_http_client::tls::{Provider, TlsContext, TrustStore};
use aws_smithy_runtime_api::client::connector_metadata::ConnectorMetadata;
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, HttpConnectorSettings, SharedHttpConnector,
};
use aws_smithy_runtime_api::client::orchestrator::HttpRequest;
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::byte_stream::ByteStream;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

/// No answer to our calls is nearly as long.
const LONGEST_ANSWER: usize = 64 * 1024;

/// The SDK's HTTPS client on ring, which trusts the system's authorities and those in `authorities` (PEM).
///
/// # Errors
/// What is wrong with the authorities, as a phrase.
pub(super) fn https_client(authorities: Option<&[u8]>) -> Result<SharedHttpClient, String> {
    let mut trusted = TrustStore::default();
    if let Some(pem) = authorities {
        // The SDK panics at what it cannot read.
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(pem) {
            let certificate = certificate.map_err(|error| format!("is no PEM file of certificates: {error}"))?;
            roots.add(certificate).map_err(|error| format!("has a certificate that is none: {error}"))?;
        }
        if roots.is_empty() {
            return Err("has no certificate in it (-----BEGIN CERTIFICATE-----)".into());
        }
        trusted.add_pem_certificate(pem);
    }
    let tls = TlsContext::builder().with_trust_store(trusted).build().map_err(|error| error.to_string())?;
    let builder = aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring));
    Ok(builder.tls_context(tls).build_https())
}

/// Passes on to another client, over which no payload leaves in the clear and no answer is endless.
#[derive(Clone, Debug)]
pub(super) struct Guarded {
    inner: SharedHttpClient,
    plain_http: bool,
}

impl Guarded {
    pub(super) fn new(inner: SharedHttpClient, plain_http: bool) -> Self {
        Self { inner, plain_http }
    }
}

impl HttpClient for Guarded {
    fn http_connector(&self, settings: &HttpConnectorSettings, components: &RuntimeComponents) -> SharedHttpConnector {
        let inner = self.inner.http_connector(settings, components);
        SharedHttpConnector::new(GuardedConnector { inner, plain_http: self.plain_http })
    }

    fn validate_base_client_config(
        &self,
        components: &RuntimeComponentsBuilder,
        config: &ConfigBag,
    ) -> Result<(), BoxError> {
        HttpClient::validate_base_client_config(&self.inner, components, config)
    }

    fn validate_final_config(&self, components: &RuntimeComponents, config: &ConfigBag) -> Result<(), BoxError> {
        HttpClient::validate_final_config(&self.inner, components, config)
    }

    fn connector_metadata(&self) -> Option<ConnectorMetadata> {
        self.inner.connector_metadata()
    }
}

#[derive(Debug)]
struct GuardedConnector {
    inner: SharedHttpConnector,
    plain_http: bool,
}

impl HttpConnector for GuardedConnector {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        if let Err(why) = endpoint_is_sound(request.uri(), self.plain_http) {
            let text =
                format!("the endpoint (AWS_ENDPOINT_URL_KMS, AWS_ENDPOINT_URL or the profile's endpoint_url) {why}");
            return HttpConnectorFuture::ready(Err(ConnectorError::user(text.into())));
        }
        let (inner, again) = (self.inner.clone(), request.try_clone());
        HttpConnectorFuture::new(async move {
            let mut answer = match (inner.call(request).await, again) {
                // A kept connection that the service had just closed, which is no outage. Our calls change nothing there, so
                // the request may be sent twice.
                (Err(error), Some(again)) if error.as_other().is_some() => inner.call(again).await?,
                (outcome, _) => outcome?,
            };
            let body = bounded(answer.take_body()).await?;
            *answer.body_mut() = SdkBody::from(body);
            Ok(answer)
        })
    }
}

async fn bounded(body: SdkBody) -> Result<Vec<u8>, ConnectorError> {
    let announced = body.content_length().and_then(|length| usize::try_from(length).ok()).unwrap_or(4096);
    // Allocated once where the length is known: what grows leaves copies behind.
    let mut read = Vec::with_capacity(announced.min(LONGEST_ANSWER));
    let mut stream = ByteStream::new(body);
    while let Some(chunk) = stream.try_next().await.map_err(|error| ConnectorError::io(error.into()))? {
        if read.len() + chunk.len() > LONGEST_ANSWER {
            let text = format!("the answer is longer than {LONGEST_ANSWER} bytes");
            return Err(ConnectorError::other(text.into(), None));
        }
        read.extend_from_slice(&chunk);
    }
    Ok(read)
}

/// # Errors
/// What is wrong with it, as a phrase that follows what it is.
pub(super) fn endpoint_is_sound(url: &str, plain_http: bool) -> Result<(), String> {
    let (scheme, rest) = url.split_once("://").unwrap_or_default();
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit('@').next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(address) => address.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    // Not the whole of it, which may have credentials in it.
    if host.is_empty() || !(scheme == "http" || scheme == "https") {
        return Err("is no URL of the form https://HOST[:PORT]".into());
    }
    if authority.contains('@') {
        return Err("has a user or a password in it, which AWS KMS does not take".into());
    }
    let loopback = host == "localhost" || host.parse().is_ok_and(|address: std::net::IpAddr| address.is_loopback());
    if scheme == "http" && !loopback && !plain_http {
        return Err(format!(
            "is http://{host}, over which keys would leave this machine in the clear; use https:// \
             (for an emulator, AwsKmsBuilder::allow_plain_http)"
        ));
    }
    Ok(())
}

/// What is known of the source of the credentials.
#[derive(Default, Debug)]
pub(super) struct Watch {
    loading: AtomicUsize,
    loaded: AtomicBool,
    renewed: AtomicBool,
}

impl Watch {
    /// Whether credentials are being loaded just now.
    pub(super) fn is_loading(&self) -> bool {
        self.loading.load(Ordering::Relaxed) > 0
    }

    /// Whether those that were loaded last came with their end, before which their source has to give others.
    pub(super) fn is_renewed(&self) -> bool {
        self.renewed.load(Ordering::Relaxed)
    }

    /// Whether credentials were ever loaded.
    pub(super) fn has_loaded(&self) -> bool {
        self.loaded.load(Ordering::Relaxed)
    }
}

/// A source of credentials that is watched.
#[derive(Debug)]
pub(super) struct Watched {
    pub(super) inner: SharedCredentialsProvider,
    pub(super) watch: Arc<Watch>,
}

impl ProvideCredentials for Watched {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async move {
            let _loading = Loading::new(&self.watch);
            let loaded = self.inner.provide_credentials().await;
            if let Ok(credentials) = &loaded {
                self.watch.loaded.store(true, Ordering::Relaxed);
                self.watch.renewed.store(credentials.expiry().is_some(), Ordering::Relaxed);
            }
            loaded
        })
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        self.inner.fallback_on_interrupt()
    }
}

/// Counts a load, however it ends: a call may be dropped at its deadline.
struct Loading<'a>(&'a Watch);

impl<'a> Loading<'a> {
    fn new(watch: &'a Watch) -> Self {
        watch.loading.fetch_add(1, Ordering::Relaxed);
        Self(watch)
    }
}

impl Drop for Loading<'_> {
    fn drop(&mut self) {
        self.0.loading.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_http_is_for_this_machine_only() {
        for url in
            ["http://127.0.0.1:4566", "http://localhost", "http://[::1]:80/", "https://kms.eu-west-1.amazonaws.com/"]
        {
            assert_eq!(endpoint_is_sound(url, false), Ok(()), "{url}");
        }
        for url in
            ["http://kms.internal", "http://10.0.0.1:4566", "http://localhost.evil.org", "http://127.0.0.1.evil.org"]
        {
            assert!(endpoint_is_sound(url, false).unwrap_err().contains("in the clear"), "{url}");
            assert_eq!(endpoint_is_sound(url, true), Ok(()), "{url}");
        }
        for url in ["", "kms.internal", "ftp://localhost", "https://", "https://:443", "http://localhost@evil.org"] {
            assert!(endpoint_is_sound(url, true).is_err(), "{url}");
        }
        assert!(!endpoint_is_sound("https://u:pass@localhost", false).unwrap_err().contains("pass@"));
    }

    #[test]
    fn authorities_that_cannot_be_read_are_told_and_do_not_panic() {
        let cut = b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
        for (pem, expected) in [(&b"hello"[..], "no certificate in it"), (cut, "that is none"), (b"", "no certificate")]
        {
            let error = https_client(Some(pem)).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        assert!(https_client(None).is_ok());
    }
}
