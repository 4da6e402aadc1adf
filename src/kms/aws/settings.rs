//! [`AwsKmsBuilder`] and [`AwsCredentials`]: the settings of an [`AwsKms`], and what can be wrong with them.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use aws_sdk_kms::config::{Credentials, SharedHttpClient};

use super::key::{KeyName, is_region};
use super::transport::{Guarded, endpoint_is_sound, https_client};
use super::{AwsKms, PROVIDER, Service, State};
use crate::error::{Error, ErrorKind, Result};
use crate::kms::asynchronous::FromAsync;

impl AwsKms {
    pub(super) fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let set = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let Some(key) = set("PAGESEAL_AWS_KEY") else {
            return Err(misconfigured(
                "PAGESEAL_AWS_KEY is not set: it names the master key, for example \
                 PAGESEAL_AWS_KEY=arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab",
            ));
        };
        KeyName::parse(&key).map_err(|why| misconfigured(format!("PAGESEAL_AWS_KEY, {key:?}, {why}")))?;
        for name in ["AWS_REGION", "AWS_DEFAULT_REGION"] {
            if let Some(region) = set(name).filter(|region| !is_region(region)) {
                return Err(misconfigured(format!("{name} is {region:?}, which is no region; for example eu-west-1")));
            }
        }
        let ids = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];
        if let [Some(_), None] | [None, Some(_)] = ids.map(set) {
            return Err(misconfigured(format!(
                "of {} and {}, one is set without the other; set both or none",
                ids[0], ids[1]
            )));
        }
        for name in ["AWS_ENDPOINT_URL_KMS", "AWS_ENDPOINT_URL"] {
            if let Some(url) = set(name) {
                endpoint_is_sound(&url, false).map_err(|why| misconfigured(format!("{name} {why}")))?;
                break;
            }
        }
        let mut builder = Self::builder(key);
        if let Some(path) = set("AWS_CA_BUNDLE") {
            https_client_of(Some(Path::new(&path))).map_err(|why| misconfigured(format!("AWS_CA_BUNDLE: {why}")))?;
            builder = builder.ca_file(path);
        }
        builder.build()
    }
}

/// Credentials that were given: an access key of an IAM user, or temporary ones with a session token. Wiped on drop.
#[derive(Clone)]
pub struct AwsCredentials(pub(super) Credentials);

impl AwsCredentials {
    /// An access key id (20 characters, `AKIA...` or `ASIA...`) and its secret (40 characters).
    pub fn new(access_key_id: impl Into<String>, secret_access_key: impl Into<String>) -> Self {
        Self(Credentials::new(access_key_id, secret_access_key, None, None, PROVIDER))
    }

    /// The same with the session token that came with temporary credentials.
    pub fn session_token(self, token: impl Into<String>) -> Self {
        let (id, secret) = (self.0.access_key_id(), self.0.secret_access_key());
        Self(Credentials::new(id, secret, Some(token.into()), None, PROVIDER))
    }

    pub(super) fn validate(&self) -> Result<()> {
        let parts = [
            ("access key id", Some(self.0.access_key_id())),
            ("secret access key", Some(self.0.secret_access_key())),
            ("session token", self.0.session_token()),
        ];
        for (what, part) in parts.into_iter().filter_map(|(what, part)| Some((what, part?))) {
            if part.is_empty() {
                return Err(misconfigured(format!("the {what} of the AWS credentials is empty")));
            }
            if !part.bytes().all(|byte| byte.is_ascii_graphic()) {
                let text =
                    format!("the {what} of the AWS credentials has a space, a line end or another odd character in it");
                return Err(misconfigured(text));
            }
        }
        Ok(())
    }
}

impl fmt::Debug for AwsCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsCredentials").finish_non_exhaustive()
    }
}

/// Settings of an [`AwsKms`].
#[derive(Clone, Debug)]
#[must_use]
pub struct AwsKmsBuilder {
    key: String,
    region: Option<String>,
    endpoint_url: Option<String>,
    credentials: Option<AwsCredentials>,
    profile: Option<String>,
    ca_file: Option<PathBuf>,
    plain_http: bool,
}

impl AwsKmsBuilder {
    pub(super) fn new(key: String) -> Self {
        let (region, endpoint_url, credentials, profile, ca_file) = (None, None, None, None, None);
        Self { key, region, endpoint_url, credentials, profile, ca_file, plain_http: false }
    }

    /// The region of the key (`eu-west-1`). Not needed where the key's ARN gives it, and must then be the same.
    pub fn region(mut self, region: impl Into<String>) -> Self {
        self.region = Some(region.into());
        self
    }

    /// Another endpoint than the region's public one: a VPC endpoint, FIPS, an emulator.
    pub fn endpoint_url(mut self, url: impl Into<String>) -> Self {
        self.endpoint_url = Some(url.into());
        self
    }

    /// These credentials, instead of those of the default chain.
    pub fn credentials(mut self, credentials: AwsCredentials) -> Self {
        self.credentials = Some(credentials);
        self
    }

    /// This profile of `~/.aws/config` and `~/.aws/credentials`, instead of the one that `AWS_PROFILE` names.
    pub fn profile(mut self, name: impl Into<String>) -> Self {
        self.profile = Some(name.into());
        self
    }

    /// Trusts the certificate authorities in this PEM file, beside the system's. It is read by [`AwsKmsBuilder::build`].
    pub fn ca_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(path.into());
        self
    }

    /// Takes an endpoint with `http://` that is not on this machine. **Keys then cross the network in the clear**: for
    /// emulators in containers only.
    pub fn allow_plain_http(mut self) -> Self {
        self.plain_http = true;
        self
    }

    /// Makes the wrapper. No call is made, and no credentials are looked for, before the first use.
    ///
    /// # Errors
    /// [`ErrorKind::Misconfigured`] says which setting cannot work, and why.
    pub fn build(self) -> Result<AwsKms> {
        let key =
            KeyName::parse(&self.key).map_err(|why| misconfigured(format!("the AWS KMS key {:?} {why}", self.key)))?;
        if let Some(region) = &self.region {
            if !is_region(region) {
                return Err(misconfigured(format!("the AWS region {region:?} is none; for example eu-west-1")));
            }
            if let Some(own) = key.region().filter(|own| own != region) {
                return Err(misconfigured(format!(
                    "the AWS KMS key {:?} is in the region {own}, and the region is set to {region}; leave the region away, or \
                     name the key there",
                    self.key
                )));
            }
        }
        if let Some(url) = &self.endpoint_url {
            endpoint_is_sound(url, self.plain_http)
                .map_err(|why| misconfigured(format!("the AWS KMS endpoint {why}")))?;
        }
        if self.profile.as_deref() == Some("") {
            return Err(misconfigured("the name of the AWS profile is empty"));
        }
        if let Some(credentials) = &self.credentials {
            credentials.validate()?;
        }
        let https = https_client_of(self.ca_file.as_deref()).map_err(misconfigured)?;
        let region = self.region.or_else(|| key.region().map(str::to_owned));
        let state = State {
            credentials: self.credentials.map(|credentials| credentials.0),
            connected: None,
            epoch: 0,
            replaced: 0,
            known: Vec::new(),
        };
        let service = Service {
            key,
            region,
            endpoint_url: self.endpoint_url,
            profile: self.profile,
            guarded: Guarded::new(https.clone(), self.plain_http),
            https,
            watch: Arc::default(),
            state: Mutex::new(state),
        };
        Ok(AwsKms(Arc::new(FromAsync::new(service))))
    }
}

pub(super) fn misconfigured(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::Misconfigured, text)
}

fn https_client_of(ca_file: Option<&Path>) -> Result<SharedHttpClient, String> {
    let Some(path) = ca_file else {
        return https_client(None);
    };
    let named = |why: String| format!("the file of certificate authorities {} {why}", path.display());
    let pem = std::fs::read(path).map_err(|error| named(format!("cannot be read: {error}")))?;
    https_client(Some(&pem)).map_err(named)
}
