//! [`AwsKms`]: master keys in AWS KMS (feature `aws`).

mod failure;
mod key;
mod record;
mod settings;
mod transport;

use std::fmt;
use std::future::Future;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_kms::Client;
use aws_sdk_kms::config::http::HttpResponse;
use aws_sdk_kms::config::{Credentials, IdentityCache, SharedHttpClient};
use aws_sdk_kms::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_kms::primitives::Blob;
use aws_sdk_kms::types::KeyState;

use crate::error::{KmsClass, KmsError, Result};
use crate::ids::MasterKeyId;
use crate::keys::wrapper::{KeyWrapper, WrapContext, WrappedKey};
use crate::kms::asynchronous::{AsyncKeyWrapper, FromAsync};
use crate::secret::KeyPayload;
use failure::{Failure, Reason, judge_state};
use key::{KeyArn, KeyName};
use record::{bad, encryption_context, framed, recorded};
use transport::{Guarded, Watch, Watched};

pub use settings::{AwsCredentials, AwsKmsBuilder};

const PROVIDER: &str = "aws-kms";
/// So many keys are remembered: an alias rarely moves.
const MOST_KNOWN: usize = 64;
/// How much earlier than its deadline a call ends by itself, to say what it was waiting for.
const MARGIN: Duration = Duration::from_millis(10);
/// The SDK's own limit for loading credentials, beyond any deadline: ours ends the call.
const LOAD_TIMEOUT: Duration = Duration::from_secs(300);
/// How the SDK behaves, so that an upgrade of the SDK changes nothing by the way.
fn behavior() -> BehaviorVersion {
    BehaviorVersion::v2026_01_12()
}

/// A symmetric encryption key in AWS KMS, by the official SDK. Clones are the same wrapper.
///
/// Each key is bound to its cluster, database, generation and purpose by the encryption context, whose names and values are
/// part of the format; they are readable in CloudTrail and in policies (`kms:EncryptionContext:pageseal:cluster`):
///
/// | name | value | present |
/// |---|---|---|
/// | `pageseal:version` | `1` | always |
/// | `pageseal:purpose` | `data`, `cluster` or `probe` | always |
/// | `pageseal:cluster` | 32 hex digits | always |
/// | `pageseal:database` | 32 hex digits | for data keys |
/// | `pageseal:generation` | decimal, 1 to 2^24 - 1 | always |
///
/// The key can be named in five ways:
///
/// | name | example | unwraps |
/// |---|---|---|
/// | key id | `1234abcd-12ab-34cd-56ef-1234567890ab` | what this key wrapped |
/// | key ARN | `arn:aws:kms:eu-west-1:111122223333:key/1234abcd-...` | the same; gives the region too |
/// | multi-region key id or ARN | `mrk-1234abcd12ab34cd56ef1234567890ab` | what this key wrapped in any region |
/// | alias | `alias/pageseal` | what any key of the account wrapped, to which the alias may have pointed; needs `kms:DescribeKey` |
/// | alias ARN | `arn:aws:kms:eu-west-1:111122223333:alias/pageseal` | the same, of this account only |
///
/// [`KeyWrapper::id`] is `aws-kms:` and the key id, whether it was named by id or by ARN, so the two can be exchanged, and a
/// replica of a multi-region key opens what was wrapped in another region. Of an alias it is the alias, as it was written.
/// AWS names no versions of a key's material, so the key version is empty, and a rewrap wraps every key anew. The ARN of the
/// key that wrapped is kept in the blob (`0x01 | length of the ARN u8 | ARN | ciphertext of AWS KMS`). **An alias is a name that can be pointed
/// elsewhere**: new keys are then wrapped by the new key and old ones unwrapped by the old one, which so stays needed until
/// a rewrap, and its state counts as the master key's, once this process has used it; before that, an old key that is refused
/// cannot be told from one that somebody wrote into the record, and is [`KmsClass::Misconfigured`]. Prefer the ARN.
///
/// Credentials are those that were given, or come from the SDK's default chain: environment, profile, web identity (EKS),
/// container (ECS, EKS Pod Identity), instance metadata (EC2). They are loaded at the first call, and again shortly before
/// their end; those of a file are kept until AWS refuses them. **A denial is believed only of credentials that were loaded
/// for this very call**: of others, client and credentials are made anew and the call is repeated, so a change in the file or
/// the role is taken up without a restart, and the old access key may be disabled as soon as the new one is there. That
/// temporary credentials have expired is no denial where their source said for how long they hold: then that source or
/// this machine's clock is out of order. The environment of a running process does not change: use
/// [`AwsKms::replace_credentials`].
///
/// The SDK's own retries are off: pageseal repeats calls itself. Calls are Encrypt, Decrypt and ReEncrypt, and DescribeKey
/// where it takes one to understand a failure. [`KeyWrapper::rewrap_key`] is ReEncrypt, which hands no payload out; where
/// ReEncrypt is refused, it is Decrypt and Encrypt, whose answers count.
///
/// What the SDK copies is not wiped: while a call lasts, and until its memory is used again, a payload is also in buffers of
/// the SDK, of its JSON and of TLS. Credentials are wiped by the SDK when it drops them.
///
/// ```no_run
/// use pageseal::{AwsKms, Cluster, ClusterOptions, Wrappers};
///
/// let key = AwsKms::builder("arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab").build()?;
/// let cluster = Cluster::create("/var/lib/db/cluster".as_ref(), ClusterOptions::new(), Wrappers::one(key))?;
/// # drop(cluster);
/// # Ok::<(), pageseal::Error>(())
/// ```
#[derive(Clone)]
pub struct AwsKms(Arc<FromAsync<Service>>);

impl AwsKms {
    /// Names the master key: see the table above. What else is not set comes from where every AWS program takes it (the
    /// environment and `~/.aws/config`), among it the region, unless the key's ARN gives it.
    pub fn builder(key: impl Into<String>) -> AwsKmsBuilder {
        AwsKmsBuilder::new(key.into())
    }

    /// The master key that the environment names.
    ///
    /// | variable | meaning |
    /// |---|---|
    /// | `PAGESEAL_AWS_KEY` | the key, named in one of the five ways; needed |
    /// | `AWS_REGION` | the region, unless the key's ARN gives it; else from the profile |
    /// | `AWS_ENDPOINT_URL_KMS`, `AWS_ENDPOINT_URL` | another endpoint: a VPC endpoint, an emulator |
    /// | `AWS_CA_BUNDLE` | a PEM file of authorities to trust, beside the system's |
    /// | `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN` | credentials |
    /// | `AWS_PROFILE`, `AWS_CONFIG_FILE`, `AWS_SHARED_CREDENTIALS_FILE`, `AWS_ROLE_ARN`, ... | as for every AWS SDK |
    ///
    /// # Errors
    /// [`Misconfigured`](crate::ErrorKind::Misconfigured) names the variable that is missing or wrong.
    pub fn from_env() -> Result<Self> {
        Self::from_lookup(|name| std::env::var_os(name).map(|value| value.to_string_lossy().into_owned()))
    }

    /// Puts other credentials in the place of those in use, whatever their source was; the next call uses them. All clones
    /// of this wrapper do.
    ///
    /// # Errors
    /// [`Misconfigured`](crate::ErrorKind::Misconfigured) if they cannot be credentials; nothing is changed then.
    pub fn replace_credentials(&self, credentials: AwsCredentials) -> Result<()> {
        credentials.validate()?;
        let mut state = self.0.get_ref().state();
        state.credentials = Some(credentials.0);
        state.replace();
        Ok(())
    }

    /// Makes client and credentials anew at the next call, from where they came. Needed only to take up other credentials
    /// while those in use still work.
    pub fn refresh(&self) {
        self.0.get_ref().state().replace();
    }
}

impl fmt::Debug for AwsKms {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AwsKms").field("key", &self.0.get_ref().key.text()).finish_non_exhaustive()
    }
}

forward_key_wrapper!(AwsKms, 0);

/// One master key.
struct Service {
    key: KeyName,
    /// As configured, or from the key's ARN; else the SDK finds it.
    region: Option<String>,
    endpoint_url: Option<String>,
    profile: Option<String>,
    /// Its connections outlive the clients. The sources of credentials use it, some of them over plain HTTP on this machine.
    https: SharedHttpClient,
    guarded: Guarded,
    watch: Arc<Watch>,
    state: Mutex<State>,
}

struct State {
    /// Those that were given.
    credentials: Option<Credentials>,
    connected: Option<Arc<Connected>>,
    /// Counts what was forgotten: a client that was begun before is not kept.
    epoch: u64,
    /// Counts the orders from outside to take other credentials.
    replaced: u64,
    /// Keys that have wrapped or unwrapped, the newest first.
    known: Vec<KeyArn>,
}

impl State {
    fn forget(&mut self) {
        self.connected = None;
        self.epoch += 1;
    }

    fn know(&mut self, arn: &KeyArn) {
        if !self.known.contains(arn) {
            // The oldest goes.
            self.known.truncate(MOST_KNOWN - 1);
            self.known.insert(0, arn.clone());
        }
    }

    fn replace(&mut self) {
        self.forget();
        self.replaced += 1;
    }
}

/// A client with its cache of credentials.
struct Connected {
    client: Client,
    region: String,
    /// When it was begun. Its credentials are not older.
    since: Instant,
    /// As in [`State`] then.
    replaced: u64,
    /// A key of the account that the credentials are of, in which an alias without an account is.
    home: OnceLock<KeyArn>,
}

impl AsyncKeyWrapper for Service {
    fn id(&self) -> MasterKeyId {
        MasterKeyId::new(PROVIDER, self.key.stored())
    }

    async fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.within(cx, self.believed(async |connected: &Arc<Connected>| self.wrap(key, cx, connected).await)).await
    }

    async fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        self.within(cx, self.believed(async |connected: &Arc<Connected>| self.unwrap(key, cx, connected).await)).await
    }

    async fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        self.within(cx, self.believed(async |connected: &Arc<Connected>| self.rewrap(key, cx, connected).await)).await
    }

    /// What this key wrapped, under whatever name. Not what other keys of the account wrapped: pageseal has those unwrapped
    /// by their own wrapper in any case, to hear its verdict, and this wrapper's credentials may have no right to them.
    fn can_rewrap(&self, key: &WrappedKey) -> bool {
        key.master_key == self.id()
            || (key.master_key.provider == PROVIDER && recorded(key).is_ok_and(|(arn, _)| self.key.is(&arn)))
    }
}

impl Service {
    /// Makes the call, and repeats it after a denial that says nothing, because its credentials were loaded for an earlier
    /// call or were replaced during this one. Each repetition takes a replacement, and the deadline ends them.
    async fn believed<T>(&self, call: impl AsyncFn(&Arc<Connected>) -> Result<T, KmsError>) -> Result<T, KmsError> {
        let started = Instant::now();
        loop {
            let connected = self.connected().await?;
            let outcome = call(&connected).await;
            if outcome.as_ref().err().is_none_or(|error| error.class != KmsClass::Denied) {
                return outcome;
            }
            self.forget(&connected);
            let replaced = self.state().replaced != connected.replaced;
            if connected.since >= started && !replaced {
                return outcome;
            }
        }
    }

    async fn wrap(
        &self,
        key: &KeyPayload,
        cx: &WrapContext<'_>,
        connected: &Arc<Connected>,
    ) -> Result<WrappedKey, KmsError> {
        let plaintext = Blob::new(key.with_bytes(|bytes| bytes.to_vec())?);
        let call = connected.client.encrypt().key_id(self.key.text()).plaintext(plaintext);
        let answer = match call.set_encryption_context(Some(encryption_context(cx))).send().await {
            Ok(answer) => answer,
            Err(error) => return Err(self.refused("Encrypt", &error, connected, self.key.text()).await.into_error()),
        };
        self.wrapped("Encrypt", answer.key_id, answer.ciphertext_blob, connected)
    }

    async fn unwrap(
        &self,
        key: &WrappedKey,
        cx: &WrapContext<'_>,
        connected: &Arc<Connected>,
    ) -> Result<KeyPayload, KmsError> {
        let (recorded, ciphertext) = recorded(key)?;
        let named = self.key.that_unwraps(&recorded, &connected.region).map_err(bad)?;
        let call = connected.client.decrypt().key_id(&named).ciphertext_blob(Blob::new(ciphertext));
        let answer = match call.set_encryption_context(Some(encryption_context(cx))).send().await {
            Ok(answer) => answer,
            Err(error) => {
                let mut failure = self.refused("Decrypt", &error, connected, &named).await;
                if failure.reason == Reason::Policy {
                    failure = self.of_this_ciphertext(failure, connected, &named, cx).await;
                }
                return Err(self.of_recorded(failure, &recorded, connected).await.into_error());
            }
        };
        // From here on the bytes are wiped, whatever else is wrong.
        let mut plaintext =
            zeroize::Zeroizing::new(WipedVec(answer.plaintext.map(Blob::into_inner).unwrap_or_default()));
        let by = answer.key_id.as_deref().unwrap_or_default();
        if KeyArn::parse(by).is_none_or(|by| !by.is_or_replicates(&recorded)) {
            let by = failure::quoted(by, 100);
            return Err(bad(format!("AWS KMS decrypted it under {by:?}, and it was wrapped by {recorded}")));
        }
        if plaintext.0.len() != KeyPayload::LEN {
            let len = plaintext.0.len();
            return Err(bad(format!("AWS KMS decrypted it to {len} bytes, and a payload has {}", KeyPayload::LEN)));
        }
        self.is_at_home(&recorded, connected).await?;
        let payload = KeyPayload::from_bytes(&mut plaintext.0)?;
        self.state().know(&recorded);
        Ok(payload)
    }

    async fn rewrap(
        &self,
        key: &WrappedKey,
        cx: &WrapContext<'_>,
        connected: &Arc<Connected>,
    ) -> Result<WrappedKey, KmsError> {
        let (recorded, ciphertext) = recorded(key)?;
        let named = self.key.that_unwraps(&recorded, &connected.region).map_err(bad)?;
        let context = encryption_context(cx);
        let call = connected.client.re_encrypt().source_key_id(&named).destination_key_id(self.key.text());
        let call = call.set_source_encryption_context(Some(context.clone()));
        let call = call.set_destination_encryption_context(Some(context));
        match call.ciphertext_blob(Blob::new(ciphertext)).send().await {
            Ok(answer) => {
                let wrapped = self.wrapped("ReEncrypt", answer.key_id, answer.ciphertext_blob, connected)?;
                self.is_at_home(&recorded, connected).await?;
                Ok(wrapped)
            }
            Err(error) => {
                let failure = Failure::of("ReEncrypt", &error, &self.watch);
                let silent = matches!(failure.class, KmsClass::Unreachable | KmsClass::Throttled);
                if silent && failure.reason == Reason::Other {
                    return Err(failure.into_error());
                }
                // Decrypt and Encrypt are rights of their own, and tell which of the two keys is refused.
                self.wrap(&self.unwrap(key, cx, connected).await?, cx, connected).await
            }
        }
    }

    /// Whoever changed the record may have written a key of their own account into it that everybody may use. An alias points to
    /// keys of its account only, which its name tells, or else AWS.
    async fn is_at_home(&self, recorded: &KeyArn, connected: &Arc<Connected>) -> Result<(), KmsError> {
        if !self.key.lacks_account() {
            return Ok(());
        }
        if connected.home.get().is_none() {
            let arn = match connected.client.describe_key().key_id(self.key.text()).send().await {
                Ok(answer) => answer.key_metadata.and_then(|metadata| KeyArn::parse(metadata.arn()?)),
                Err(error) => {
                    let failure = self.refused("DescribeKey", &error, connected, self.key.text()).await;
                    if failure.reason != Reason::Policy {
                        return Err(failure.into_error());
                    }
                    let why = "whether the key that wrapped is of the alias's account cannot be told: give the right \
                               kms:DescribeKey, or name the key with its account, by an ARN";
                    return Err(failure.reclassified(KmsClass::Misconfigured, why).into_error());
                }
            };
            if let Some(arn) = arn {
                connected.home.get_or_init(|| arn);
            }
        }
        match connected.home.get() {
            Some(home) if home.is_of_account_of(recorded) => Ok(()),
            _ => Err(bad(format!("it was wrapped by {recorded}, of another account than {}", self.key.text()))),
        }
    }

    /// What a call that wrapped has answered, if it makes sense.
    fn wrapped(
        &self,
        call: &str,
        key_id: Option<String>,
        blob: Option<Blob>,
        connected: &Connected,
    ) -> Result<WrappedKey, KmsError> {
        let senseless = |what: String| KmsError::with_source(KmsClass::Unclassified, format!("{call}: {what}"));
        let arn = key_id.as_deref().and_then(KeyArn::parse);
        let Some(arn) = arn else {
            let named = failure::quoted(key_id.as_deref().unwrap_or_default(), 100);
            return Err(senseless(format!("AWS KMS named the key that it used {named:?}, which is no ARN of a key")));
        };
        if !self.key.may_be(&arn, &connected.region) {
            return Err(senseless(format!("AWS KMS used {arn}, and was asked for {}", self.key.text())));
        }
        connected.home.get_or_init(|| arn.clone());
        self.state().know(&arn);
        let ciphertext = blob.map(Blob::into_inner).unwrap_or_default();
        match framed(&arn, &ciphertext) {
            Some(blob) => Ok(WrappedKey { master_key: self.id(), key_version: String::new(), blob }),
            None => Err(senseless(format!("AWS KMS returned a ciphertext of {} bytes", ciphertext.len()))),
        }
    }

    /// Judges a failed call, and asks for the key's state where the answer depends on it.
    async fn refused<E>(
        &self,
        call: &str,
        error: &SdkError<E, HttpResponse>,
        connected: &Arc<Connected>,
        named: &str,
    ) -> Failure
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let call = format!("{call} with {named} in {}", connected.region);
        self.understood(Failure::of(&call, error, &self.watch), connected, named).await
    }

    async fn understood(&self, failure: Failure, connected: &Arc<Connected>, named: &str) -> Failure {
        // A client keeps what it has read, even that a file was missing or half-written.
        let of_what_was_read = matches!(failure.reason, Reason::Credentials | Reason::Expired);
        if of_what_was_read || matches!(failure.class, KmsClass::Denied | KmsClass::Misconfigured) {
            self.forget(connected);
        }
        match failure.reason {
            Reason::State => {
                let Ok(Ok(described)) = self.describe(connected, named).await else {
                    return failure;
                };
                if described.key_state() == Some(&KeyState::Enabled) && failure.says("external key") {
                    let why = "the external key store refuses; which of its refusals are meant to last is not known, so to take \
                               the key away, disable the KMS key";
                    return failure.reclassified(KmsClass::Unclassified, why);
                }
                match described.key_state().and_then(judge_state) {
                    Some((class, text)) => failure.reclassified(class, text),
                    None => failure,
                }
            }
            Reason::NotFound if self.key.is_alias() && named == self.key.text() => {
                failure.reclassified(KmsClass::Misconfigured, "there is no such alias in this account and region")
            }
            _ => failure,
        }
    }

    /// Whoever changed the record may have written a key's ARN into it that we have no right to, that is disabled, or that does
    /// not exist. By an alias, no key is known to be ours but the one that it points to now, and those that this process has
    /// seen at work.
    async fn of_recorded(&self, failure: Failure, recorded: &KeyArn, connected: &Arc<Connected>) -> Failure {
        let suspicious = !matches!(failure.reason, Reason::Credentials | Reason::Expired);
        if !self.key.is_alias()
            || !suspicious
            || !failure.class.is_revocation()
            || self.state().known.contains(recorded)
        {
            return failure;
        }
        match self.describe(connected, self.key.text()).await {
            Ok(Ok(described)) if described.key_id() != recorded.id() => {
                let why = format!(
                    "{} points to the key {} now, and {recorded} was refused",
                    self.key.text(),
                    described.key_id()
                );
                failure.reclassified(KmsClass::Misconfigured, &why)
            }
            Err(silent) => silent,
            _ => failure,
        }
    }

    /// AWS denies access too where a ciphertext refers to a key that it does not find, which whoever changes a blob can bring
    /// about. So a denial must also hold for a fresh ciphertext of the same key and context; of a sentence of ours, no payload.
    async fn of_this_ciphertext(
        &self,
        failure: Failure,
        connected: &Connected,
        named: &str,
        cx: &WrapContext<'_>,
    ) -> Failure {
        let silent_or = |other: Failure, failure: Failure| match other.class {
            KmsClass::Unreachable | KmsClass::Throttled => other,
            _ => failure,
        };
        let context = Some(encryption_context(cx));
        let call = connected.client.encrypt().key_id(named).plaintext(Blob::new(*b"pageseal asks for its rights"));
        let fresh = match call.set_encryption_context(context.clone()).send().await {
            Ok(answer) => answer.ciphertext_blob,
            Err(error) => return silent_or(Failure::of("Encrypt", &error, &self.watch), failure),
        };
        let call = connected.client.decrypt().key_id(named).set_ciphertext_blob(fresh);
        match call.set_encryption_context(context).send().await {
            Ok(_) => {
                failure.reclassified(KmsClass::BadCiphertext, "only this ciphertext is refused, a fresh one is not")
            }
            Err(error) => silent_or(Failure::of("Decrypt", &error, &self.watch), failure),
        }
    }

    /// What DescribeKey says: the key's description, that it says none, or why it was not heard.
    async fn describe(
        &self,
        connected: &Connected,
        named: &str,
    ) -> Result<Result<aws_sdk_kms::types::KeyMetadata, ()>, Failure> {
        match connected.client.describe_key().key_id(named).send().await {
            Ok(answer) => Ok(answer.key_metadata.ok_or(())),
            Err(error) => {
                let failure = Failure::of("DescribeKey", &error, &self.watch);
                match failure.class {
                    KmsClass::Unreachable | KmsClass::Throttled => Err(failure),
                    _ => Ok(Err(())),
                }
            }
        }
    }

    /// Ends the call a little before its deadline, to say what it was waiting for.
    async fn within<T>(
        &self,
        cx: &WrapContext<'_>,
        call: impl Future<Output = Result<T, KmsError>>,
    ) -> Result<T, KmsError> {
        let started = Instant::now();
        let mut call = pin!(call);
        let end = cx.deadline.checked_sub(MARGIN).unwrap_or(cx.deadline);
        match tokio::time::timeout_at(end.into(), call.as_mut()).await {
            Ok(outcome) => outcome,
            Err(_) => {
                // The call still exists, so what it does just now can be told.
                let who = match self.watch.is_loading() {
                    true => "the source of the AWS credentials",
                    false => "AWS KMS",
                };
                let text =
                    format!("{who} did not answer within {:?}", Duration::from_millis(millis(started.elapsed())));
                Err(KmsError::with_source(KmsClass::Unreachable, text))
            }
        }
    }

    /// The client in use, or a new one.
    async fn connected(&self) -> Result<Arc<Connected>, KmsError> {
        loop {
            let since = Instant::now();
            let (epoch, replaced, credentials) = {
                let state = self.state();
                if let Some(connected) = &state.connected {
                    return Ok(Arc::clone(connected));
                }
                (state.epoch, state.replaced, state.credentials.clone())
            };
            let (client, region) = self.connect(credentials).await?;
            let made = Connected { client, region, since, replaced, home: OnceLock::new() };
            let mut state = self.state();
            if state.epoch == epoch {
                // Of those that were made at the same time one is kept, so that credentials are loaded once.
                return Ok(Arc::clone(state.connected.get_or_insert_with(|| Arc::new(made))));
            }
        }
    }

    async fn connect(&self, credentials: Option<Credentials>) -> Result<(Client, String), KmsError> {
        let cache = IdentityCache::lazy().load_timeout(LOAD_TIMEOUT).build();
        let mut loader = aws_config::defaults(behavior())
            .http_client(self.https.clone())
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .identity_cache(cache);
        if let Some(region) = &self.region {
            loader = loader.region(Region::new(region.clone()));
        }
        if let Some(url) = &self.endpoint_url {
            loader = loader.endpoint_url(url);
        }
        if let Some(profile) = &self.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(credentials) = credentials {
            loader = loader.credentials_provider(credentials);
        }
        let found = loader.load().await;
        let Some(region) = found.region().map(|region| region.as_ref().to_owned()) else {
            return Err(KmsError::with_source(
                KmsClass::Misconfigured,
                "no AWS region is configured: name the key by its ARN, or set AWS_REGION, the profile's region, or \
                 AwsKmsBuilder::region",
            ));
        };
        let mut config = aws_sdk_kms::config::Builder::from(&found).http_client(self.guarded.clone());
        if let Some(inner) = found.credentials_provider() {
            config = config.credentials_provider(Watched { inner, watch: Arc::clone(&self.watch) });
        }
        Ok((Client::from_conf(config.build()), region))
    }

    /// Has the next call make client and credentials anew, unless that happened already.
    fn forget(&self, refused: &Arc<Connected>) {
        let mut state = self.state();
        if state.connected.as_ref().is_some_and(|connected| Arc::ptr_eq(connected, refused)) {
            state.forget();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the SDK handed out.
struct WipedVec(Vec<u8>);

impl zeroize::Zeroize for WipedVec {
    fn zeroize(&mut self) {
        self.0.as_mut_slice().zeroize();
    }
}

fn millis(took: Duration) -> u64 {
    took.as_millis().try_into().unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
