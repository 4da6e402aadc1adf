//! [`GoogleCredentials`]: where access tokens come from; and [`Slot`], which holds them for a client and can be refilled.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use google_cloud_auth::credentials::{
    CacheableResource, Credentials, CredentialsProvider, EntityTag, anonymous, external_account, impersonated, mds,
    service_account, user_account,
};
use google_cloud_auth::errors::CredentialsError;
use http::header::{AUTHORIZATION, HeaderValue};
use http::{Extensions, HeaderMap};
use serde_json::Value;
use zeroize::{Zeroize, Zeroizing};

use crate::error::{KmsClass, KmsError};

pub(super) const CREDENTIALS_VARIABLE: &str = "GOOGLE_APPLICATION_CREDENTIALS";
/// Where `gcloud auth application-default login` leaves its file, below the home directory.
const WELL_KNOWN: &str = ".config/gcloud/application_default_credentials.json";
const DEFAULT_UNIVERSE: &str = "googleapis.com";
/// No credentials file is nearly as long.
const LONGEST_FILE: u64 = 64 * 1024;

/// How a [`GoogleKms`](crate::GoogleKms) shows who it is.
///
/// Files are read anew whenever the credentials were refused or a token could not be had: a repaired file works without a
/// restart. What this type holds of a key or token is wiped when it is dropped; the SDK keeps copies of its own, which are
/// not.
#[derive(Clone)]
pub struct GoogleCredentials(Source);

#[derive(Clone)]
enum Source {
    /// The variable's file, if it is set; else the well-known one, if it is there; else the metadata server.
    ApplicationDefault {
        named: Option<PathBuf>,
        well_known: Option<PathBuf>,
    },
    File(PathBuf),
    Json(Arc<Zeroizing<Vec<u8>>>),
    Function(Arc<Provide>),
    Sdk(Credentials),
    Anonymous,
}

type Provide = dyn Fn(Option<&str>) -> Result<String, KmsError> + Send + Sync;

impl GoogleCredentials {
    /// What every Google program looks for (Application Default Credentials,
    /// <https://cloud.google.com/docs/authentication/application-default-credentials>): the file that
    /// `GOOGLE_APPLICATION_CREDENTIALS` names now, else that of `gcloud auth application-default login`, else the metadata
    /// server of Compute Engine, GKE (Workload Identity) or Cloud Run, at `GCE_METADATA_HOST` if that is set.
    pub fn application_default() -> Self {
        Self::from_lookup(&|name| std::env::var_os(name))
    }

    pub(super) fn from_lookup(lookup: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let named = lookup(CREDENTIALS_VARIABLE).map(PathBuf::from);
        // Nothing would be the working directory, where anybody's file may lie.
        let home = lookup("HOME").filter(|home| !home.is_empty());
        let well_known = home.map(|home| PathBuf::from(home).join(WELL_KNOWN));
        Self(Source::ApplicationDefault { named, well_known })
    }

    /// A credentials file: a service account's key, a workload identity federation's configuration (`external_account`), an
    /// impersonation, or what `gcloud` leaves.
    pub fn file(path: impl Into<PathBuf>) -> Self {
        Self(Source::File(path.into()))
    }

    /// The content of such a file, as a secret store returns it.
    pub fn json(content: impl Into<Vec<u8>>) -> Self {
        Self(Source::Json(Arc::new(Zeroizing::new(content.into()))))
    }

    /// Access tokens (without `Bearer`) from a function of yours. It is called on the calling thread for every request, so
    /// it should keep a token until shortly before its end, and not wait for long. Its argument is the token that Google
    /// refused last, if one was: never return that one again, but one that was fetched anew. If that is refused too, the
    /// answer is [`KmsClass::Denied`], which stops a running cluster, as it does as a failure of yours, which you classify.
    pub fn access_token(provide: impl Fn(Option<&str>) -> Result<String, KmsError> + Send + Sync + 'static) -> Self {
        Self(Source::Function(Arc::new(provide)))
    }

    /// Credentials of the SDK's own making. The tokio runtime that they were made in must live as long as they. They cannot be
    /// told to fetch a token anew, and take one for good as long as a clock says that stands still in a suspended machine: that
    /// Google refuses their token is [`KmsClass::Unclassified`], and stops no running cluster.
    pub fn sdk(credentials: Credentials) -> Self {
        Self(Source::Sdk(credentials))
    }

    /// None: for emulators.
    pub fn anonymous() -> Self {
        Self(Source::Anonymous)
    }

    /// That there is a well-formed file where one is needed. Without a call.
    pub(super) fn check(&self, universe: &str) -> Result<(), String> {
        self.load(universe).map(drop)
    }

    fn load(&self, universe: &str) -> Result<Loaded, String> {
        let read = |path: &Path, origin: &str| {
            let place = format!("the credentials file {}{origin}", path.display());
            read_file(path).and_then(|content| parse(&content, universe)).map_err(|what| format!("{place} {what}"))
        };
        let named = format!(", named by {CREDENTIALS_VARIABLE},");
        match &self.0 {
            Source::Function(provide) => Ok(Loaded::Function(Arc::clone(provide))),
            Source::Sdk(credentials) => Ok(Loaded::Sdk(credentials.clone())),
            Source::Anonymous => Ok(Loaded::Sdk(anonymous::Builder::new().build())),
            Source::Json(content) => parse(content, universe).map_err(|what| format!("the credentials {what}")),
            Source::File(path) => read(path, ""),
            Source::ApplicationDefault { named: Some(path), .. } if path.as_os_str().is_empty() => {
                Err(format!("{CREDENTIALS_VARIABLE} is set to nothing; unset it, or name a credentials file"))
            }
            Source::ApplicationDefault { named: Some(path), .. } => read(path, &named),
            Source::ApplicationDefault { well_known: Some(path), .. } if path.exists() => {
                read(path, ", left by gcloud auth application-default login,")
            }
            Source::ApplicationDefault { .. } => Ok(Loaded::MetadataServer),
        }
    }

    /// What to look at when no token can be had.
    fn origin(&self) -> String {
        match &self.0 {
            Source::Function(_) | Source::Sdk(_) | Source::Anonymous => "the credentials that the program gave".into(),
            Source::Json(_) => "the credentials JSON that the program gave".into(),
            Source::File(path) => format!("the credentials file {}", path.display()),
            Source::ApplicationDefault { named: Some(path), .. } => {
                format!("the credentials file {}, named by {CREDENTIALS_VARIABLE}", path.display())
            }
            Source::ApplicationDefault { well_known: Some(path), .. } if path.exists() => {
                format!("the credentials file {}, left by gcloud", path.display())
            }
            Source::ApplicationDefault { .. } => format!(
                "the metadata server, asked because {CREDENTIALS_VARIABLE} is not set and gcloud has left no credentials"
            ),
        }
    }
}

impl fmt::Debug for GoogleCredentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GoogleCredentials").field("origin", &self.origin()).finish_non_exhaustive()
    }
}

/// Well-formed credentials, from which the SDK's can be made.
enum Loaded {
    Json(Kind, Secret),
    MetadataServer,
    Function(Arc<Provide>),
    Sdk(Credentials),
}

/// Wiped on drop.
struct Secret(Value);

impl Drop for Secret {
    fn drop(&mut self) {
        fn wipe(value: &mut Value) {
            match value {
                Value::String(text) => text.zeroize(),
                Value::Array(values) => values.iter_mut().for_each(wipe),
                Value::Object(fields) => fields.values_mut().for_each(wipe),
                Value::Null | Value::Bool(_) | Value::Number(_) => {}
            }
        }
        wipe(&mut self.0);
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    ServiceAccount,
    User,
    External,
    Impersonated,
}

impl Kind {
    const ALL: [(&str, Self); 4] = [
        ("service_account", Self::ServiceAccount),
        ("authorized_user", Self::User),
        ("external_account", Self::External),
        ("impersonated_service_account", Self::Impersonated),
    ];

    /// The texts without which the SDK makes nothing of it.
    fn needs(self) -> &'static [&'static str] {
        match self {
            Self::ServiceAccount => &["client_email", "private_key_id", "private_key", "project_id"],
            Self::User => &["client_id", "client_secret", "refresh_token"],
            Self::External => &["audience", "subject_token_type", "token_url"],
            Self::Impersonated => &["service_account_impersonation_url"],
        }
    }
}

/// At most [`LONGEST_FILE`] bytes, in memory that is wiped.
fn read_file(path: &Path) -> Result<Zeroizing<Vec<u8>>, String> {
    let read = || {
        let file = File::open(path)?;
        // Made before it is read, so that no part is left behind where a vector grew.
        let mut content = Zeroizing::new(Vec::with_capacity(LONGEST_FILE as usize + 1));
        file.take(LONGEST_FILE + 1).read_to_end(&mut content)?;
        Ok::<_, std::io::Error>(content)
    };
    let content = read().map_err(|error| format!("cannot be read: {error}"))?;
    if content.len() as u64 > LONGEST_FILE {
        return Err(format!("is longer than {LONGEST_FILE} bytes, so it is no credentials file"));
    }
    Ok(content)
}

/// Says what is wrong and quotes nothing: any part may be a secret that went into the wrong field.
fn parse(content: &[u8], universe: &str) -> Result<Loaded, String> {
    let value = serde_json::from_slice(content)
        .map_err(|error| format!("is no JSON (line {}, column {})", error.line(), error.column()))?;
    let value = Secret(value);
    let text = |name: &str| value.0.get(name).and_then(Value::as_str);
    let known = || Kind::ALL.map(|known| known.0).join(", ");
    let Some(named) = text("type") else {
        return Err(format!("has no \"type\"; it must be one of {}", known()));
    };
    let Some((_, kind)) = Kind::ALL.into_iter().find(|known| known.0 == named) else {
        return Err(format!("has a \"type\" that is not known here; it must be one of {}", known()));
    };
    if let Some(missing) = kind.needs().iter().find(|&&name| text(name).is_none_or(str::is_empty)) {
        return Err(format!("has no {missing:?}, which its type needs"));
    }
    let pem = |key: &str| key.trim_start().starts_with("-----BEGIN PRIVATE KEY-----");
    if kind == Kind::ServiceAccount && !text("private_key").is_some_and(pem) {
        return Err("has a \"private_key\" that does not begin with -----BEGIN PRIVATE KEY----- (PKCS#8)".into());
    }
    if text("universe_domain").unwrap_or(DEFAULT_UNIVERSE) != universe {
        return Err(format!("belongs to another universe than {universe}; set the universe domain to its own"));
    }
    Ok(Loaded::Json(kind, value))
}

impl Loaded {
    /// The SDK's credentials, which begin to fetch a token at once, in the tokio runtime whose context this runs in.
    fn begin(self, last: &Last, refused: Option<Token>) -> Result<Credentials, String> {
        let built = match self {
            Self::Sdk(credentials) => return Ok(credentials),
            Self::Function(provide) => return Ok(Provided { provide, refused, last: Arc::clone(last) }.into()),
            Self::MetadataServer => mds::Builder::default().build(),
            Self::Json(kind, mut secret) => {
                let value = std::mem::take(&mut secret.0);
                match kind {
                    Kind::ServiceAccount => service_account::Builder::new(value).build(),
                    Kind::User => user_account::Builder::new(value).build(),
                    Kind::External => external_account::Builder::new(value).build(),
                    Kind::Impersonated => impersonated::Builder::new(value).build(),
                }
            }
        };
        // The SDK's own text may quote what it did not understand.
        built.map_err(|error| match error.is_not_supported() {
            true => "are of a kind that Google's SDK does not support here".into(),
            false => "lack a field, or have one of another form than Google's SDK knows".into(),
        })
    }
}

/// The credentials in use, and what can make them anew. Shared by the client, which asks for headers, and by the wrapper,
/// which throws credentials away that were refused.
pub(super) struct Slot {
    universe: String,
    state: Mutex<State>,
}

struct State {
    source: GoogleCredentials,
    session: Option<Arc<Session>>,
    /// What the session before this one had from the caller's function.
    refused: Option<Token>,
}

type Token = Arc<Zeroizing<String>>;
type Last = Arc<Mutex<Option<Token>>>;

/// What can be done about a token that was refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Renewal {
    /// Beginning anew fetches one.
    Begin,
    /// The caller's function is told.
    Ask,
    /// None can be had, so that the refusal may be an old token's.
    Impossible,
    /// There is no token.
    Pointless,
}

/// Credentials that have been begun.
pub(super) struct Session {
    pub(super) credentials: Credentials,
    pub(super) renewal: Renewal,
    /// The last token of the caller's function.
    last: Last,
    /// Whether tokens are signed here, for the time that this machine's clock says.
    pub(super) signs: bool,
    /// Where they come from, for errors.
    pub(super) origin: String,
}

impl Slot {
    pub(super) fn new(source: GoogleCredentials, universe: Option<String>) -> Self {
        let universe = universe.unwrap_or_else(|| DEFAULT_UNIVERSE.into());
        Self { universe, state: Mutex::new(State { source, session: None, refused: None }) }
    }

    pub(super) fn universe(&self) -> &str {
        &self.universe
    }

    pub(super) fn replace(&self, source: GoogleCredentials) {
        *self.state() = State { source, session: None, refused: None };
    }

    /// The credentials in use, and whether their token is a new one.
    pub(super) fn session(&self) -> Result<(Arc<Session>, bool), KmsError> {
        let mut state = self.state();
        if let Some(session) = &state.session {
            return Ok((Arc::clone(session), false));
        }
        let origin = state.source.origin();
        let (mut signs, last) = (false, Last::default());
        let begun = state.source.load(&self.universe).and_then(|loaded| {
            signs = matches!(loaded, Loaded::Json(Kind::ServiceAccount | Kind::Impersonated, _));
            loaded.begin(&last, state.refused.clone()).map_err(|what| format!("{origin}: they {what}"))
        });
        let credentials = begun.map_err(|text| KmsError::with_source(KmsClass::Misconfigured, text))?;
        let renewal = match state.source.0 {
            Source::Function(_) => Renewal::Ask,
            Source::Sdk(_) => Renewal::Impossible,
            Source::Anonymous => Renewal::Pointless,
            _ => Renewal::Begin,
        };
        let session = Arc::new(Session { credentials, renewal, last, signs, origin });
        state.session = Some(Arc::clone(&session));
        // A function may have kept its token for long, unless it was told of a refusal.
        Ok((session, renewal != Renewal::Ask || state.refused.is_some()))
    }

    /// The next call begins anew, unless that has happened already.
    pub(super) fn forget(&self, session: &Arc<Session>) {
        let mut state = self.state();
        if state.session.as_ref().is_some_and(|current| Arc::ptr_eq(current, session)) {
            let last = session.last.lock().unwrap_or_else(PoisonError::into_inner).take();
            state.refused = last.or(state.refused.take());
            state.session = None;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the SDK's client holds instead of credentials, so that it can keep its connections while they change.
pub(super) struct Lent(pub(super) Arc<Slot>);

impl fmt::Debug for Lent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lent").finish_non_exhaustive()
    }
}

impl CredentialsProvider for Lent {
    async fn headers(&self, _: Extensions) -> Result<CacheableResource<HeaderMap>, CredentialsError> {
        let (session, _) = self.0.session().map_err(|error| CredentialsError::from_source(false, error))?;
        // Without the caller's tag, so that the headers always come along.
        session.credentials.headers(Extensions::new()).await
    }

    /// Compared with the client's, which is the same: see [`parse`] for the credentials' own.
    async fn universe_domain(&self) -> Option<String> {
        Some(self.0.universe.clone())
    }
}

struct Provided {
    provide: Arc<Provide>,
    refused: Option<Token>,
    last: Last,
}

impl fmt::Debug for Provided {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Provided").finish_non_exhaustive()
    }
}

impl CredentialsProvider for Provided {
    async fn headers(&self, _: Extensions) -> Result<CacheableResource<HeaderMap>, CredentialsError> {
        let failed = |error: KmsError| CredentialsError::from_source(false, error);
        let refused = self.refused.as_deref().map(|token| token.as_str());
        let token = (self.provide)(refused).map(Zeroizing::new).map_err(failed)?;
        let mut bearer = format!("Bearer {}", *token).into_bytes();
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(token));
        let value = HeaderValue::from_bytes(&bearer);
        bearer.zeroize();
        let mut value = value.map_err(|_| {
            let text = "the function that provides access tokens returned one with characters that no header may have";
            failed(KmsError::with_source(KmsClass::Misconfigured, text))
        })?;
        value.set_sensitive(true);
        let data = HeaderMap::from_iter([(AUTHORIZATION, value)]);
        Ok(CacheableResource::New { entity_tag: EntityTag::new(), data })
    }

    async fn universe_domain(&self) -> Option<String> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SERVICE_ACCOUNT: &str = r#"{"type": "service_account", "project_id": "p", "private_key_id": "1",
        "private_key": "-----BEGIN PRIVATE KEY-----\nSECRET\n-----END PRIVATE KEY-----\n", "client_email": "a@b.c"}"#;

    fn wrong(content: &str) -> String {
        let text = parse(content.as_bytes(), DEFAULT_UNIVERSE).err().unwrap_or_default();
        assert!(!text.contains("SECRET"), "{text}");
        text
    }

    #[test]
    fn what_is_wrong_with_credentials_is_told_without_quoting_them() {
        assert_eq!(wrong(SERVICE_ACCOUNT), "");
        let cases = [
            ("SECRET", "no JSON (line 1, column 1)"),
            ("{\n \"type\": SECRET}", "no JSON (line 2"),
            ("[]", "no \"type\""),
            ("\"SECRET\"", "no \"type\""),
            (r#"{"type": 5}"#, "no \"type\""),
            (r#"{"type": "SECRET"}"#, "a \"type\" that is not known here; it must be one of service_account, "),
            (r#"{"type": "authorized_user", "client_id": "SECRET", "client_secret": "x"}"#, "no \"refresh_token\""),
            (r#"{"type": "authorized_user", "client_id": 5}"#, "no \"client_id\""),
            (r#"{"type": "external_account", "audience": "SECRET"}"#, "no \"subject_token_type\""),
            (r#"{"type": "impersonated_service_account"}"#, "no \"service_account_impersonation_url\""),
            (&SERVICE_ACCOUNT.replace("\"a@b.c\"", "\"\""), "no \"client_email\""),
            (&SERVICE_ACCOUNT.replace("BEGIN PRIVATE", "BEGIN RSA PRIVATE"), "does not begin with"),
            (&SERVICE_ACCOUNT.replace("\"project_id\"", "\"universe_domain\": \"SECRET\", \"project_id\""), "universe"),
        ];
        for (content, expected) in cases {
            let text = wrong(content);
            assert!(text.contains(expected), "{content}: {text}");
        }
    }

    #[test]
    fn the_sources_are_tried_in_the_documented_order() {
        let directory = std::env::temp_dir().join(format!("pageseal-gcp-credentials-{}", std::process::id()));
        let gcloud = directory.join(WELL_KNOWN);
        std::fs::create_dir_all(gcloud.parent().unwrap()).unwrap();
        let named = directory.join("named.json");
        let home = directory.clone();
        let with = |variable: Option<&Path>| {
            GoogleCredentials::from_lookup(&|name| match name {
                CREDENTIALS_VARIABLE => variable.map(OsString::from),
                "HOME" => Some(home.clone().into()),
                _ => None,
            })
        };
        let load = |credentials: &GoogleCredentials| credentials.load(DEFAULT_UNIVERSE);

        assert!(matches!(load(&with(None)), Ok(Loaded::MetadataServer)));
        assert!(with(None).origin().contains("metadata server"));
        let homeless = GoogleCredentials::from_lookup(&|name| (name == "HOME").then(OsString::new));
        assert!(matches!(homeless.0, Source::ApplicationDefault { well_known: None, .. }));
        std::fs::write(&gcloud, SERVICE_ACCOUNT).unwrap();
        assert!(matches!(load(&with(None)), Ok(Loaded::Json(Kind::ServiceAccount, _))));
        let missing = load(&with(Some(&named))).err().unwrap();
        assert!(missing.contains("named.json, named by GOOGLE_APPLICATION_CREDENTIALS, cannot be read: "), "{missing}");
        std::fs::write(&named, "SECRET").unwrap();
        let malformed = load(&with(Some(&named))).err().unwrap();
        assert!(malformed.contains("is no JSON") && !malformed.contains("SECRET"), "{malformed}");
        std::fs::write(&named, vec![b' '; LONGEST_FILE as usize + 1]).unwrap();
        assert!(load(&with(Some(&named))).err().unwrap().contains("is longer than 65536 bytes"));
        assert!(load(&with(Some(&directory))).err().unwrap().contains("cannot be read"));
        assert!(load(&with(Some(Path::new("")))).err().unwrap().contains("is set to nothing"));
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn debug_shows_no_secret() {
        let shown =
            format!("{:?} {:?}", GoogleCredentials::json(SERVICE_ACCOUNT), GoogleCredentials::file("/a/b.json"));
        assert!(!shown.contains("SECRET") && shown.contains("/a/b.json"), "{shown}");
    }
}
