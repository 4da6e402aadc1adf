//! [`FakeKms`]: an AWS KMS of this process, which notes every request and answers as a test says. Its ciphertexts are numbers:
//! what it shows is the traffic, not cryptography.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pageseal::{AwsCredentials, AwsKms, AwsKmsBuilder};
use serde_json::{Value, json};

use crate::http::{Answer, HttpServer, Request};

/// The id of the key that every alias points to.
pub const KEY: &str = "1234abcd-12ab-34cd-56ef-1234567890ab";
/// Its ARN.
pub const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

type Script = dyn Fn(&str, &Value) -> Option<Answer> + Send;

/// A running fake.
pub struct FakeKms {
    server: HttpServer,
    shared: Arc<Shared>,
}

struct Shared {
    requests: Mutex<Vec<(String, Value)>>,
    /// What was encrypted, with its context.
    stored: Mutex<HashMap<String, (String, Value)>>,
    script: Mutex<Box<Script>>,
    /// The id of an access key that is not known any more.
    refused: Mutex<Option<String>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            requests: Mutex::default(),
            stored: Mutex::default(),
            script: Mutex::new(Box::new(|_, _| None)),
            refused: Mutex::default(),
        })
    }
}

impl FakeKms {
    /// Over plain HTTP.
    pub fn start() -> Self {
        let shared = Shared::new();
        let own = Arc::clone(&shared);
        Self { server: HttpServer::plain(move |request| own.answer(request)), shared }
    }

    /// Over TLS.
    pub fn start_tls() -> Self {
        let shared = Shared::new();
        let own = Arc::clone(&shared);
        Self { server: HttpServer::tls("aws", move |request| own.answer(request)), shared }
    }

    /// Where it listens.
    pub fn server(&self) -> &HttpServer {
        &self.server
    }

    /// `http://` or `https://`, and the address.
    pub fn url(&self) -> String {
        let scheme = if self.server.certificate().is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.server.address())
    }

    /// Settings for a key of it, with credentials.
    pub fn builder(&self, key: &str) -> AwsKmsBuilder {
        let credentials = AwsCredentials::new("AKIAEXAMPLE", "secret");
        AwsKms::builder(key).region("eu-west-1").endpoint_url(self.url()).credentials(credentials)
    }

    /// From now on, calls are answered by this where it answers: by the name of the call and its body.
    pub fn script(&self, script: impl Fn(&str, &Value) -> Option<Answer> + Send + 'static) {
        *lock(&self.shared.script) = Box::new(script);
    }

    /// From now on, what is signed with this access key is refused.
    pub fn refuse_access_key(&self, id: &str) {
        *lock(&self.shared.refused) = Some(id.into());
    }

    /// The calls since the last time that this was asked.
    pub fn calls(&self) -> Vec<String> {
        self.requests().into_iter().map(|request| request.0).collect()
    }

    /// The same with their bodies.
    pub fn requests(&self) -> Vec<(String, Value)> {
        std::mem::take(&mut *lock(&self.shared.requests))
    }
}

impl Shared {
    fn answer(&self, request: &Request) -> Answer {
        let action = request.header("x-amz-target").unwrap_or_default().trim_start_matches("TrentService.").to_owned();
        let body = request.json();
        lock(&self.requests).push((action.clone(), body.clone()));
        let signed = request.header("authorization").unwrap_or_default();
        if lock(&self.refused).as_ref().is_some_and(|id| signed.contains(&format!("Credential={id}/"))) {
            return refusal("UnrecognizedClientException", "The security token included in the request is invalid.");
        }
        if let Some(scripted) = lock(&self.script)(&action, &body) {
            return scripted;
        }
        match action.as_str() {
            "Encrypt" => self.stored(&body["Plaintext"], &body["EncryptionContext"]),
            "Decrypt" => match self.opened(&body, "EncryptionContext") {
                Some(plaintext) => ok(json!({ "KeyId": ARN, "Plaintext": plaintext })),
                None => refusal("InvalidCiphertextException", ""),
            },
            "ReEncrypt" => match self.opened(&body, "SourceEncryptionContext") {
                Some(plaintext) => self.stored(&json!(plaintext), &body["DestinationEncryptionContext"]),
                None => refusal("InvalidCiphertextException", ""),
            },
            "DescribeKey" => ok(json!({ "KeyMetadata": { "KeyId": KEY, "Arn": ARN, "KeyState": "Enabled" } })),
            _ => refusal("UnknownOperationException", ""),
        }
    }

    fn stored(&self, plaintext: &Value, context: &Value) -> Answer {
        let mut stored = lock(&self.stored);
        let blob = STANDARD.encode(format!("ciphertext {}", stored.len()));
        stored.insert(blob.clone(), (plaintext.as_str().unwrap_or_default().into(), context.clone()));
        ok(json!({ "KeyId": ARN, "SourceKeyId": ARN, "CiphertextBlob": blob }))
    }

    fn opened(&self, body: &Value, context: &str) -> Option<String> {
        let stored = lock(&self.stored);
        let (plaintext, bound) = stored.get(body["CiphertextBlob"].as_str()?)?;
        (body[context] == *bound).then(|| plaintext.clone())
    }
}

/// A good answer.
pub fn ok(body: Value) -> Answer {
    Answer::json("200 OK", body)
}

/// An error as AWS KMS answers it.
pub fn refusal(code: &str, message: &str) -> Answer {
    Answer::json("400 Bad Request", json!({ "__type": code, "message": message }))
}
