//! AWS KMS, as two emulators show it: ministack knows key states and IAM, moto knows the integrity of ciphertexts, rotation and
//! ReEncrypt. Neither shows everything; together they show every row.

pub mod fake;

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use pageseal::testing::conformance::{Behaviour, Cannot, Fault, Front, KeyService, Step, http_answer};
use pageseal::{AwsCredentials, AwsKms, AwsKmsBuilder, KeyWrapper};
use serde_json::{Value, json};

use crate::http::proxy_error;
use crate::server::{Server, tools, wait_until};

/// What ministack does otherwise than AWS.
pub const MINISTACK_QUIRKS: &[(Behaviour, &str)] =
    &[(Behaviour::Tampered, "ministack does not authenticate ciphertexts: a changed one decrypts to other bytes")];

/// What moto does otherwise than AWS.
pub const MOTO_QUIRKS: &[(Behaviour, &str)] = &[];

/// The region of the keys.
pub const REGION: &str = "eu-west-1";
/// Another, with replicas.
pub const OTHER_REGION: &str = "us-east-1";

/// ministack as a key service.
///
/// # Errors
/// Why it cannot run here.
pub fn ministack() -> Result<Box<dyn KeyService>, String> {
    Ok(Box::new(Emulator::ministack()?))
}

/// moto as a key service.
///
/// # Errors
/// Why it cannot run here.
pub fn moto() -> Result<Box<dyn KeyService>, String> {
    Ok(Box::new(Emulator::moto()?))
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Ministack,
    Moto,
}

/// An emulator with a user, a master key and another, behind a [`Front`].
pub struct Emulator {
    kind: Kind,
    server: Server,
    front: Front,
    user: AccessKey,
    key: String,
    other_key: String,
    wrapper: AwsKms,
}

#[derive(Clone)]
struct AccessKey {
    id: String,
    secret: String,
}

impl Emulator {
    /// # Errors
    /// Why it cannot run here.
    pub fn ministack() -> Result<Self, String> {
        Self::start(Kind::Ministack, "ministack", |program, port| {
            let mut command = Command::new(program);
            // Without the first two it listens on all addresses.
            command.env("IOT_MTLS_ENABLED", "0").env("BIND_HOST", "127.0.0.1");
            command.env("GATEWAY_PORT", port.to_string()).env("AUTH", "true");
            command
        })
    }

    /// # Errors
    /// Why it cannot run here.
    pub fn moto() -> Result<Self, String> {
        Self::start(Kind::Moto, "moto_server", |program, port| {
            let mut command = Command::new(program);
            command.args(["-H", "127.0.0.1", "-p", &port.to_string()]);
            command
        })
    }

    fn start(kind: Kind, name: &str, command: fn(&std::path::Path, u16) -> Command) -> Result<Self, String> {
        let program = tools().map(|tools| tools.join("bin").join(name)).filter(|program| program.exists());
        let program = program.ok_or_else(|| format!("{name} is not installed (tests/run kms installs it)"))?;
        let server = Server::start(name, move |port| command(&program, port));
        wait_until(name, || Ok(call(&server, REGION, "ListKeys", json!({})).is_ok()));
        let front = Front::before(server.address()).expect("there are free ports");
        let user = make_user(&server);
        let key = make_key(&server, json!({}));
        let other_key = make_key(&server, json!({}));
        let mut emulator = Self { kind, wrapper: placeholder(), key, other_key, user, front, server };
        emulator.wrapper = emulator.builder(&emulator.key).build().expect("the settings are sound");
        emulator.put_policy("Allow");
        Ok(emulator)
    }

    /// Settings for a key of this emulator, with the user's credentials.
    pub fn builder(&self, key: &str) -> AwsKmsBuilder {
        self.anonymous(key).region(REGION).credentials(self.credentials())
    }

    /// The same without region and credentials.
    pub fn anonymous(&self, key: &str) -> AwsKmsBuilder {
        AwsKms::builder(key).endpoint_url(self.url())
    }

    /// Where the proxy before it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.front.address())
    }

    /// The user's credentials.
    pub fn credentials(&self) -> AwsCredentials {
        AwsCredentials::new(&self.user.id, &self.user.secret)
    }

    /// The user's access key id and secret.
    pub fn access_key(&self) -> (&str, &str) {
        (&self.user.id, &self.user.secret)
    }

    /// The master key's id.
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The proxy before it.
    pub fn front(&self) -> &Front {
        &self.front
    }

    /// Where the emulator itself listens.
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// Makes a key of it, with what CreateKey takes; returns its id.
    pub fn make_key(&self, settings: Value) -> String {
        make_key(&self.server, settings)
    }

    /// A call of AWS KMS as the root user.
    ///
    /// # Panics
    /// If it fails.
    pub fn call(&self, region: &str, action: &str, body: Value) -> Value {
        self.as_root(|| call(&self.server, region, action, body))
            .unwrap_or_else(|error| panic!("{action} in {region}: {error}"))
    }

    fn put_policy(&self, effect: &str) {
        let statement = json!({ "Effect": effect, "Action": "kms:*", "Resource": "*" });
        self.put_statement(statement);
    }

    /// Gives the user this policy statement, in the place of the one before.
    pub fn put_statement(&self, statement: Value) {
        let policy = json!({ "Version": "2012-10-17", "Statement": [statement] });
        let policy = percent(&policy.to_string());
        let form = format!("Action=PutUserPolicy&UserName=pageseal&PolicyName=kms&PolicyDocument={policy}");
        self.as_root(|| iam(&self.server, &form)).unwrap_or_else(|error| panic!("PutUserPolicy: {error}"));
    }

    /// moto checks all requests or none, and we sign none: it does not check while this runs.
    fn as_root<T>(&self, call: impl FnOnce() -> T) -> T {
        let check = |after: &str| {
            if self.kind == Kind::Moto {
                let url = format!("{}/moto-api/reset-auth", self.server.url());
                let answer = agent().post(&url).header("Content-Type", "text/plain").send(after);
                assert!(answer.is_ok_and(|answer| answer.status() == 200), "moto-api/reset-auth");
            }
        };
        check("inf");
        let outcome = call();
        check("0");
        outcome
    }
}

impl KeyService for Emulator {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.wrapper.clone())
    }

    fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Cannot> {
        Ok(Arc::new(self.builder(&self.other_key).build().expect("the settings are sound")))
    }

    fn perform(&self, step: Step) -> Result<(), Cannot> {
        let on_key = |action: &str| drop(self.call(REGION, action, json!({ "KeyId": self.key })));
        match step {
            Step::Disable | Step::Enable | Step::Delete | Step::Restore if self.kind == Kind::Moto => {
                return Err(Cannot::new("moto lets disabled and deleted keys be used"));
            }
            Step::Disable => on_key("DisableKey"),
            Step::Enable => on_key("EnableKey"),
            Step::Delete => {
                drop(self.call(REGION, "ScheduleKeyDeletion", json!({ "KeyId": self.key, "PendingWindowInDays": 7 })));
            }
            Step::Restore => {
                on_key("CancelKeyDeletion");
                on_key("EnableKey");
            }
            Step::Deny => self.put_policy("Deny"),
            Step::Allow => self.put_policy("Allow"),
            Step::SpoilCredentials => {
                let spoiled = AwsCredentials::new(&self.user.id, "wrong".repeat(8));
                self.wrapper.replace_credentials(spoiled).expect("they look sound");
            }
            Step::FixCredentials => self.wrapper.replace_credentials(self.credentials()).expect("they are sound"),
            Step::Rotate if self.kind == Kind::Ministack => {
                return Err(Cannot::new("ministack does not know RotateKeyOnDemand"));
            }
            Step::Rotate => on_key("RotateKeyOnDemand"),
            _ => return Err(Cannot::new("there is no such step here")),
        }
        Ok(())
    }

    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        let json = ("Content-Type", "application/x-amz-json-1.1");
        self.front.set(fault.passage(|fault| match fault {
            Fault::Throttle(after) => {
                let body = json!({ "__type": "ThrottlingException", "message": "Rate exceeded" });
                let headers = [json, ("Retry-After", &after.as_secs().to_string())];
                http_answer("400 Bad Request", &headers, &body.to_string())
            }
            Fault::ServerError => {
                let body = json!({ "__type": "KMSInternalException", "message": "internal" });
                http_answer("500 Internal Server Error", &[json], &body.to_string())
            }
            _ => proxy_error(),
        }));
        Ok(())
    }

    fn patience(&self) -> Duration {
        Duration::from_secs(30)
    }
}

/// Takes the place of the real one for a moment.
fn placeholder() -> AwsKms {
    AwsKms::builder("alias/none").build().expect("the settings are sound")
}

fn make_user(server: &Server) -> AccessKey {
    iam(server, "Action=CreateUser&UserName=pageseal").expect("CreateUser works");
    let made = iam(server, "Action=CreateAccessKey&UserName=pageseal").expect("CreateAccessKey works");
    let text = |element: &str| {
        let rest = made.split_once(&format!("<{element}>")).map(|parts| parts.1).unwrap_or_default();
        let text = rest.split_once('<').map(|parts| parts.0).unwrap_or_default();
        assert!(!text.is_empty(), "no {element} in {made}");
        text.replace("&amp;", "&")
    };
    AccessKey { id: text("AccessKeyId"), secret: text("SecretAccessKey") }
}

fn make_key(server: &Server, settings: Value) -> String {
    let made = call(server, REGION, "CreateKey", settings).expect("CreateKey works");
    made["KeyMetadata"]["KeyId"].as_str().expect("a key has an id").to_owned()
}

fn agent() -> ureq::Agent {
    let config =
        ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(Duration::from_secs(30)));
    config.build().into()
}

/// Neither emulator checks the signature of its root user, but both read the region and the service from it.
fn authorization(region: &str, service: &str) -> String {
    format!(
        "AWS4-HMAC-SHA256 Credential=test/20261124/{region}/{service}/aws4_request, SignedHeaders=host, Signature=0"
    )
}

fn call(server: &Server, region: &str, action: &str, body: Value) -> Result<Value, String> {
    let request = agent().post(server.url()).header("X-Amz-Target", format!("TrentService.{action}"));
    let request = request.header("Content-Type", "application/x-amz-json-1.1");
    let sent = request.header("Authorization", authorization(region, "kms")).send(body.to_string());
    let text = read(sent)?;
    Ok(serde_json::from_str(&text).unwrap_or_default())
}

fn iam(server: &Server, form: &str) -> Result<String, String> {
    let request = agent().post(server.url()).header("Content-Type", "application/x-www-form-urlencoded");
    read(request.header("Authorization", authorization("us-east-1", "iam")).send(format!("{form}&Version=2010-05-08")))
}

fn read(answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<String, String> {
    let mut answer = answer.map_err(|error| error.to_string())?;
    let text = answer.body_mut().read_to_string().map_err(|error| error.to_string())?;
    if answer.status().is_success() { Ok(text) } else { Err(format!("{}: {text}", answer.status())) }
}

fn percent(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' => char::from(byte).to_string(),
            _ => format!("%{byte:02X}"),
        })
        .collect()
}
