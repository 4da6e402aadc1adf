//! [`Http`]: one POST to the server, within a deadline, over TLS that trusts what the operator named.

use std::fs::File;
use std::io::{ErrorKind as IoKind, Read};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::{HeaderMap, HeaderValue, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider};
use ureq::{Agent, Proxy};
use zeroize::Zeroizing;

use super::answer::{Answer, quoted};
use crate::error::{Error, ErrorKind, KmsClass, KmsError, Result};
use crate::keys::calls::IN_FLIGHT;

/// No answer of the calls made here has a twentieth of this.
const MAX_ANSWER: usize = 64 * 1024;
/// Beyond any list of certificates.
const MAX_CA_FILE: usize = 4 * 1024 * 1024;
/// How long a connection waits for another call: longer than the pauses between checks, and no longer than what stands before
/// servers commonly keeps one.
const IDLE: Duration = Duration::from_secs(60);

/// The server's address, and how to speak to it.
pub(super) struct Http {
    agent: Agent,
    /// Scheme, authority and path without a slash at the end.
    address: String,
    /// What follows the authority in `address`.
    prefix: String,
    namespace: Option<HeaderValue>,
    ca_file: Option<PathBuf>,
    /// Whether a redirect may lead to another host without TLS.
    plain_allowed: bool,
}

/// What one call sends beside its body.
pub(super) struct Head<'a> {
    /// Below `/v1/`.
    pub(super) path: &'a str,
    pub(super) token: Option<&'a str>,
    /// For the server's audit log.
    pub(super) label: Option<&'a str>,
    pub(super) deadline: Instant,
}

impl Http {
    /// Reads the certificates; nothing is sent.
    pub(super) fn new(
        address: &str,
        namespace: Option<&str>,
        ca_file: Option<PathBuf>,
        plain_allowed: bool,
    ) -> Result<Self> {
        let (address, uri) = checked_address(address)?;
        let tls = uri.scheme_str() == Some("https");
        if !tls && !plain_allowed && !is_loopback(&uri) {
            return Err(misconfigured(format!(
                "the Vault address {address} is without TLS, so that the token could be read on the way; use https://"
            )));
        }
        let roots = match (&ca_file, tls) {
            (Some(file), _) => certificates_of(file)?,
            (None, true) => certificates_of_the_system()?,
            (None, false) => Vec::new(),
        };
        let tls_config = TlsConfig::builder()
            .provider(TlsProvider::Rustls)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .root_certs(RootCerts::from(roots))
            .build();
        let config = Agent::config_builder()
            .tls_config(tls_config)
            // A proxy sees the bytes of a connection without TLS.
            .proxy(Proxy::try_from_env().filter(|_| tls))
            .http_status_as_error(false)
            // They are followed here, because a token goes with them.
            .max_redirects(0)
            .max_redirects_will_error(false)
            // A connection is dear, for its TLS: each call in flight finds one again.
            .max_idle_connections(IN_FLIGHT)
            .max_idle_connections_per_host(IN_FLIGHT)
            .max_idle_age(IDLE)
            .user_agent(concat!("pageseal/", env!("CARGO_PKG_VERSION")))
            .build();
        let header = |text| HeaderValue::from_str(text).map_err(|_| misconfigured("the namespace is no header value"));
        Ok(Self {
            agent: config.new_agent(),
            prefix: uri.path().trim_end_matches('/').to_owned(),
            address,
            namespace: namespace.map(header).transpose()?,
            ca_file,
            plain_allowed,
        })
    }

    pub(super) fn address(&self) -> &str {
        &self.address
    }

    pub(super) fn namespace(&self) -> Option<&str> {
        self.namespace.as_ref().and_then(|namespace| namespace.to_str().ok())
    }

    /// Posts a body of JSON. A standby's redirect to its leader is followed, once.
    pub(super) fn post(&self, head: &Head<'_>, body: &[u8]) -> Result<Answer, KmsError> {
        let first = format!("{}/v1/{}", self.address, head.path);
        let answer = self.send(&first, head, body)?;
        if !answer.is_redirect() {
            return Ok(answer);
        }
        let second = self.redirected(head.path, &answer)?;
        let answer = self.send(&second, head, body)?;
        if answer.is_redirect() {
            let text = format!("{first} redirects to {second}, which redirects again: the servers have no leader yet");
            return Err(KmsError::with_source(KmsClass::Unreachable, text));
        }
        Ok(answer)
    }

    fn send(&self, url: &str, head: &Head<'_>, body: &[u8]) -> Result<Answer, KmsError> {
        let asked = Instant::now();
        let left = head.deadline.saturating_duration_since(asked);
        if left.is_zero() {
            return Err(KmsError::with_source(KmsClass::Unreachable, format!("no time was left to ask {url}")));
        }
        // Linux lets a socket wait up to an eighth longer; what has not come by then is told before the caller gives up.
        let mut request = self.agent.post(url).config().timeout_global(Some(left * 8 / 9)).build();
        request = request.header("Content-Type", "application/json").header("X-Vault-Request", "true");
        if let Some(namespace) = &self.namespace {
            request = request.header("X-Vault-Namespace", namespace);
        }
        if let Some(token) = head.token {
            request = request.header("X-Vault-Token", sensitive(token)?);
        }
        if let Some(label) = head.label.and_then(|label| HeaderValue::from_str(label).ok()) {
            request = request.header("X-Pageseal-Label", label);
        }
        let mut response = request.send(body).map_err(|error| self.failed(url, error, asked))?;
        // In one piece, so that no copy is left behind by a buffer that grew.
        let mut received = Zeroizing::new(Vec::with_capacity(MAX_ANSWER + 1));
        let mut reader = response.body_mut().as_reader().take(MAX_ANSWER as u64 + 1);
        reader.read_to_end(&mut received).map_err(|error| self.failed(url, error.into(), asked))?;
        if received.len() > MAX_ANSWER {
            let text = format!("{url} answered with more than {MAX_ANSWER} bytes: this is no Vault server");
            return Err(KmsError::with_source(KmsClass::Unclassified, text));
        }
        Ok(Answer {
            status: response.status().as_u16(),
            retry_after: retry_after(response.headers()),
            location: response.headers().get("location").and_then(|to| to.to_str().ok()).map(str::to_owned),
            body: received,
        })
    }

    /// Where a redirect leads, if a token may go there: to the same path, as a standby sends its clients to the leader, and
    /// never from TLS to none. That the redirect came from the server itself is what TLS has shown.
    fn redirected(&self, path: &str, answer: &Answer) -> Result<String, KmsError> {
        let location = answer.location.as_deref().unwrap_or_default();
        let refused = |why: &str| {
            let location = quoted(location);
            let text = format!("{} redirects to {location:?}, {why}; check VAULT_ADDR", self.address);
            KmsError::with_source(KmsClass::Misconfigured, text)
        };
        if !matches!(answer.status, 307 | 308) {
            return Err(refused("in a way that no Vault server does"));
        }
        let target: Uri = match location.strip_prefix('/') {
            Some(_) => {
                format!("{}{location}", self.address.strip_suffix(&self.prefix).unwrap_or(&self.address)).parse()
            }
            None => location.parse(),
        }
        .map_err(|_| refused("which is no address"))?;
        if !target.path().ends_with(&format!("/v1/{path}")) || target.query().is_some() {
            return Err(refused("which is not the same path"));
        }
        match target.scheme_str() {
            Some("https") => Ok(target.to_string()),
            Some("http") if self.address.starts_with("https:") => Err(refused("which is without TLS")),
            Some("http") if is_loopback(&target) || self.plain_allowed => Ok(target.to_string()),
            _ => Err(refused("which is without TLS")),
        }
    }

    /// What a call without an answer means. Nothing of the request is in the error.
    fn failed(&self, url: &str, error: ureq::Error, asked: Instant) -> KmsError {
        let unreachable = |text: String| KmsError::with_source(KmsClass::Unreachable, text);
        match error {
            ureq::Error::Timeout(_) => {
                let took = Duration::from_millis(asked.elapsed().as_millis().try_into().unwrap_or(u64::MAX));
                unreachable(format!("no answer from {url} after {took:?}"))
            }
            ureq::Error::Io(error) => match error.get_ref().and_then(|own| own.downcast_ref::<rustls::Error>()) {
                Some(tls) => self.tls_failed(url, tls),
                None if error.kind() == IoKind::InvalidData => unclassified(url, &error),
                None => unreachable(format!("{url}: {error}")),
            },
            ureq::Error::Rustls(tls) => self.tls_failed(url, &tls),
            ureq::Error::HostNotFound | ureq::Error::ConnectionFailed | ureq::Error::ConnectProxyFailed(_) => {
                unreachable(format!("{url}: {error}"))
            }
            ureq::Error::Protocol(_) | ureq::Error::LargeResponseHeader(..) => unclassified(url, &error),
            error => KmsError::with_source(KmsClass::Misconfigured, format!("{url}: {error}")),
        }
    }

    fn tls_failed(&self, url: &str, error: &rustls::Error) -> KmsError {
        let misconfigured = |text: String| KmsError::with_source(KmsClass::Misconfigured, text);
        match error {
            rustls::Error::InvalidCertificate(_) => {
                let trusted = match &self.ca_file {
                    Some(file) => format!("only the authorities in {}", file.display()),
                    None => "the system's authorities".to_owned(),
                };
                misconfigured(format!(
                    "the certificate of {url} is not trusted ({error}); trusted are {trusted}: name the file with the \
                     right ones in VAULT_CACERT or VaultTransitBuilder::ca_file, or correct the host name"
                ))
            }
            rustls::Error::InvalidMessage(_) => {
                misconfigured(format!("{url} does not speak TLS ({error}); check VAULT_ADDR"))
            }
            rustls::Error::AlertReceived(_) | rustls::Error::PeerIncompatible(_) => misconfigured(format!(
                "{url} refuses the TLS connection ({error}); client certificates and versions before TLS 1.2 are not \
                 supported"
            )),
            _ => KmsError::with_source(KmsClass::Unreachable, format!("{url}: {error}")),
        }
    }
}

fn unclassified(url: &str, error: &dyn std::fmt::Display) -> KmsError {
    KmsError::with_source(KmsClass::Unclassified, format!("{url} does not answer as a Vault server does: {error}"))
}

/// A header that no log shows.
fn sensitive(token: &str) -> Result<HeaderValue, KmsError> {
    let value = HeaderValue::from_str(token);
    let mut value = value.map_err(|_| {
        KmsError::with_source(KmsClass::Misconfigured, "the token holds characters that no token has (a line break?)")
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// In seconds, as Vault gives it.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get("retry-after")?.to_str().ok()?.trim().parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// The address without a slash at its end.
fn checked_address(address: &str) -> Result<(String, Uri)> {
    // Before anything that quotes the address: a password may stand in it, however wrong the rest is.
    if address.contains('@') {
        return Err(misconfigured(
            "the Vault address (VAULT_ADDR) holds an '@', as if for a user name; credentials belong into VaultAuth, or the \
             variables for it",
        ));
    }
    let refused = |why: &str| {
        misconfigured(format!(
            "the Vault address {:?} {why}; give it as https://vault.example.com:8200 (VAULT_ADDR)",
            quoted(address)
        ))
    };
    let trimmed = address.trim_end_matches('/');
    let uri: Uri = trimmed.parse().map_err(|_| refused("is no URL"))?;
    match (uri.scheme_str(), uri.authority()) {
        (Some("https" | "http"), Some(_)) => {}
        (Some(_), _) => return Err(refused("is neither https nor http")),
        _ => return Err(refused("has no scheme or host")),
    }
    if uri.query().is_some() || trimmed.contains('#') {
        return Err(refused("has a query"));
    }
    if uri.path().ends_with("/v1") {
        return Err(refused("ends with /v1, which is added to it"));
    }
    Ok((trimmed.to_owned(), uri))
}

fn is_loopback(uri: &Uri) -> bool {
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']);
    host.eq_ignore_ascii_case("localhost") || host.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

fn certificates_of(file: &Path) -> Result<Vec<Certificate<'static>>> {
    let refused = |why: String| misconfigured(format!("the file {} {why} (VAULT_CACERT)", file.display()));
    let mut pem = Vec::new();
    let read = File::open(file).and_then(|opened| opened.take(MAX_CA_FILE as u64 + 1).read_to_end(&mut pem));
    read.map_err(|error| refused(format!("with the certificate authorities cannot be read: {error}")))?;
    if pem.len() > MAX_CA_FILE {
        return Err(refused(format!("is longer than {MAX_CA_FILE} bytes")));
    }
    let mut found = Vec::new();
    for item in ureq::tls::parse_pem(&pem) {
        if let PemItem::Certificate(certificate) = item.map_err(|error| refused(format!("is no PEM file: {error}")))? {
            found.push(certificate);
        }
    }
    if found.is_empty() {
        return Err(refused("holds no certificate in PEM form".to_owned()));
    }
    Ok(found)
}

fn certificates_of_the_system() -> Result<Vec<Certificate<'static>>> {
    let loaded = rustls_native_certs::load_native_certs();
    if loaded.certs.is_empty() {
        let why: String = loaded.errors.iter().take(3).map(|error| format!("; {error}")).collect();
        return Err(misconfigured(format!("the system names no certificate authorities; give VAULT_CACERT{why}")));
    }
    Ok(loaded.certs.iter().map(|certificate| Certificate::from_der(certificate).to_owned()).collect())
}

pub(super) fn misconfigured(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misconfigured, message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn http(address: &str) -> Http {
        Http::new(address, None, None, false).unwrap()
    }

    fn why(address: &str) -> String {
        let error = Http::new(address, None, None, false).err().unwrap();
        assert_eq!(error.kind(), ErrorKind::Misconfigured, "{address}");
        error.to_string()
    }

    #[test]
    fn an_address_that_cannot_be_right_is_told() {
        for (address, part) in [
            ("vault:8200", "no scheme or host"),
            ("vault", "no scheme or host"),
            ("", "no URL"),
            ("unix:///run/vault.sock", "is no URL"),
            ("https://vault:8200/v1", "ends with /v1"),
            ("https://vault:8200/v1/", "ends with /v1"),
            ("https://vault:8200?x=1", "has a query"),
            ("https://me:secret@vault", "user name"),
            ("https://vault/@", "user name"),
            ("http://vault:8200", "without TLS"),
            ("http://127.0.0.1.example.com", "without TLS"),
            ("http://10.0.0.1:8200", "without TLS"),
        ] {
            let text = why(address);
            assert!(text.contains(part), "{address}: {text}");
        }
        for address in
            ["https://me:secret@vault", "ftp://me:secret@vault", "me:secret@vault", "https://me:se cret@vault"]
        {
            let text = why(address);
            assert!(!text.contains("cret") && text.contains("VAULT_ADDR"), "{text}");
        }
    }

    #[test]
    fn without_tls_only_this_machine_is_asked_unless_allowed() {
        for address in ["http://127.0.0.1:8200", "http://localhost:8200/", "http://[::1]:8200", "http://127.9.9.9/x"] {
            assert_eq!(http(address).address(), address.trim_end_matches('/'));
        }
        assert!(Http::new("http://vault:8200", None, None, true).is_ok());
    }

    #[test]
    fn a_ca_file_must_be_there_and_hold_certificates() {
        let missing = Http::new("https://v", None, Some("/nonexistent/ca.pem".into()), false).err().unwrap();
        assert!(missing.to_string().contains("VAULT_CACERT"), "{missing}");
        let path = std::env::temp_dir().join(format!("pageseal-ca-{}", std::process::id()));
        for content in ["", "no certificate", "-----BEGIN CERTIFICATE-----\n*\n-----END CERTIFICATE-----\n"] {
            std::fs::write(&path, content).unwrap();
            let error = Http::new("https://v", None, Some(path.clone()), false).err().unwrap();
            assert!(error.to_string().contains("VAULT_CACERT"), "{content:?}: {error}");
        }
        let pem = any_certificate();
        let one = std::fs::read(&pem).unwrap();
        std::fs::remove_file(pem).unwrap();
        std::fs::write(&path, [&one[..], &vec![b'\n'; 4 * 1024 * 1024]].concat()).unwrap();
        let error = Http::new("https://v", None, Some(path.clone()), false).err().unwrap();
        assert!(error.to_string().contains("VAULT_CACERT") && error.to_string().contains("longer"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    fn redirect(from: &str, status: u16, to: &str) -> Result<String, String> {
        let answer = Answer { status, location: Some(to.to_owned()), ..Answer::default() };
        http(from).redirected("transit/decrypt/k", &answer).map_err(|error| {
            assert_eq!(error.class, KmsClass::Misconfigured);
            error.to_string()
        })
    }

    #[test]
    fn a_token_follows_a_redirect_to_the_same_path_only_and_never_out_of_tls() {
        let path = "/v1/transit/decrypt/k";
        let leader = format!("https://leader:8200{path}");
        // The system may have no authorities at all.
        let pem = any_certificate();
        let tls = Http::new("https://standby:8200", None, Some(pem.clone()), false).unwrap();
        let to = |location: &str| {
            let answer = Answer { status: 307, location: Some(location.to_owned()), ..Answer::default() };
            tls.redirected("transit/decrypt/k", &answer).map_err(|error| error.to_string())
        };
        assert_eq!(to(&leader), Ok(leader.clone()));
        assert_eq!(to(path), Ok(format!("https://standby:8200{path}")));
        assert!(to(&format!("http://leader:8200{path}")).unwrap_err().contains("without TLS"));
        assert!(to(&format!("http://127.0.0.1{path}")).unwrap_err().contains("without TLS"));
        std::fs::remove_file(pem).unwrap();

        let from = "http://127.0.0.1:1";
        assert_eq!(redirect(from, 307, &leader), Ok(leader.clone()));
        assert_eq!(redirect(from, 308, path), Ok(format!("{from}{path}")));
        assert!(redirect(from, 307, &format!("http://127.0.0.1:2{path}")).is_ok());
        assert!(redirect(from, 307, &format!("http://leader:8200{path}")).unwrap_err().contains("without TLS"));
        for (status, to) in [
            (302, leader.as_str()),
            (301, leader.as_str()),
            (307, "https://leader:8200/ui/login"),
            (307, "https://leader:8200/v1/transit/decrypt/k?x=1"),
            (307, "ftp://leader/v1/transit/decrypt/k"),
            (307, "\u{7f}"),
            (307, ""),
        ] {
            assert!(redirect(from, status, to).is_err(), "{status} {to}");
        }
    }

    /// A file with any well-formed PEM certificate: what is in it is not looked at before a connection is made.
    fn any_certificate() -> PathBuf {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("pageseal-pem-{}-{number}", std::process::id()));
        std::fs::write(&path, "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n").unwrap();
        path
    }
}
