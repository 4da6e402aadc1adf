//! The real OpenBao server as a key service, in its development mode.

use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageseal::testing::conformance::{Cannot, Fault, Front, KeyService, Passage, Step, http_answer};
use pageseal::{KeyWrapper, VaultAuth, VaultTransit};
use serde_json::{Value, json};

use crate::server::{Server, tools, wait_until};

/// The master key's name at the server.
pub const KEY: &str = "pageseal";
/// Another key's.
pub const OTHER_KEY: &str = "pageseal-other";
const ROOT: &str = "root-token-of-the-tests";

/// The policy of the wrapper's identity: the one that docs/kms/vault.md prints.
const POLICY: &str = r#"
path "transit/encrypt/pageseal" { capabilities = ["update"] }
path "transit/decrypt/pageseal" { capabilities = ["update"] }
path "transit/encrypt/pageseal-other" { capabilities = ["update"] }
path "transit/decrypt/pageseal-other" { capabilities = ["update"] }
"#;

/// The OpenBao server, with an AppRole for the wrapper.
///
/// # Errors
/// Why it cannot run here.
pub fn openbao() -> Result<Box<dyn KeyService>, String> {
    Ok(Box::new(OpenBao::start()?))
}

/// A running server with what a user would set in the environment.
///
/// # Errors
/// Why it cannot run here.
#[allow(clippy::type_complexity)]
pub fn environment() -> Result<(Box<dyn Send>, Vec<(&'static str, String)>), String> {
    let bao = OpenBao::start()?;
    let (role, secret) = bao.app_role();
    let environment = vec![
        ("PAGESEAL_VAULT_KEY", KEY.to_owned()),
        ("VAULT_ADDR", bao.url()),
        ("PAGESEAL_VAULT_ROLE_ID", role),
        ("PAGESEAL_VAULT_SECRET_ID", secret),
    ];
    Ok((Box::new(bao), environment))
}

/// A server behind a [`Front`], with two keys and an AppRole that may use both.
pub struct OpenBao {
    server: Server,
    front: Front,
    wrapper: VaultTransit,
    backup: Mutex<Option<String>>,
}

impl OpenBao {
    /// # Errors
    /// Why it cannot run here.
    pub fn start() -> Result<Self, String> {
        let program = tools().map(|tools| tools.join("bin/bao")).filter(|program| program.exists());
        let program = program.ok_or("bao is not installed (tests/run kms installs it)")?;
        let server = Server::start("openbao", move |port| {
            let mut command = Command::new(&program);
            command.args(["server", "-dev", "-dev-no-store-token"]);
            command.arg(format!("-dev-root-token-id={ROOT}")).arg(format!("-dev-listen-address=127.0.0.1:{port}"));
            command
        });
        let front = Front::before(server.address()).expect("there are free ports");
        // Replaced at once: a role can be made when the server is there.
        let placeholder = VaultAuth::token("none-yet");
        let wrapper = builder(&front, KEY, placeholder).build().expect("the settings are in order");
        let bao = Self { server, front, wrapper, backup: Mutex::default() };
        wait_until("openbao", || Ok(bao.ask("GET", "sys/health", &Value::Null).is_ok()));
        bao.call("POST", "sys/mounts/transit", &json!({ "type": "transit" }));
        for key in [KEY, OTHER_KEY] {
            bao.call("POST", &format!("transit/keys/{key}"), &json!({ "type": "aes256-gcm96" }));
            let settings = json!({ "deletion_allowed": true, "exportable": true, "allow_plaintext_backup": true });
            bao.call("POST", &format!("transit/keys/{key}/config"), &settings);
        }
        bao.put_policy(POLICY);
        bao.call("POST", "sys/auth/approle", &json!({ "type": "approle" }));
        bao.call("POST", "auth/approle/role/pageseal", &json!({ "token_policies": ["pageseal"], "token_ttl": "1h" }));
        bao.wrapper.replace_auth(bao.auth()).expect("the role is well formed");
        Ok(bao)
    }

    /// Where the proxy before it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.front.address())
    }

    /// The id of the wrapper's role, and a new secret id.
    pub fn app_role(&self) -> (String, String) {
        let role = self.call("GET", "auth/approle/role/pageseal/role-id", &Value::Null);
        let secret = self.call("POST", "auth/approle/role/pageseal/secret-id", &json!({}));
        let text = |value: &Value| value.as_str().expect("OpenBao names it").to_owned();
        (text(&role["data"]["role_id"]), text(&secret["data"]["secret_id"]))
    }

    /// The role, with a new secret id.
    pub fn auth(&self) -> VaultAuth {
        let (role, secret) = self.app_role();
        VaultAuth::app_role(role, secret)
    }

    /// Asks as root, past the proxy.
    ///
    /// # Panics
    /// If the answer is no success.
    pub fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        self.ask(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/v1/{path}", self.server.url()))
            .header("X-Vault-Token", ROOT)
            .body(body)
            .map_err(|error| error.to_string())?;
        let agent: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(20)))
            .http_status_as_error(false)
            .allow_non_standard_methods(true)
            .build()
            .into();
        let mut answer = agent.run(request).map_err(|error| error.to_string())?;
        let text = answer.body_mut().read_to_string().map_err(|error| error.to_string())?;
        if !answer.status().is_success() {
            return Err(format!("{}: {text}", answer.status()));
        }
        Ok(serde_json::from_str(&text).unwrap_or_default())
    }

    fn put_policy(&self, policy: &str) {
        self.call("PUT", "sys/policies/acl/pageseal", &json!({ "policy": policy }));
    }

    fn key(&self, step: &str) -> String {
        format!("transit/keys/{KEY}{step}")
    }
}

fn builder(front: &Front, key: &str, auth: VaultAuth) -> pageseal::VaultTransitBuilder {
    VaultTransit::builder(format!("http://{}", front.address()), key, auth)
}

impl KeyService for OpenBao {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(self.wrapper.clone())
    }

    fn other_key(&self) -> Result<Arc<dyn KeyWrapper>, Cannot> {
        Ok(Arc::new(builder(&self.front, OTHER_KEY, self.auth()).build().expect("the settings are in order")))
    }

    fn perform(&self, step: Step) -> Result<(), Cannot> {
        let mut backup = self.backup.lock().unwrap_or_else(PoisonError::into_inner);
        match step {
            Step::Disable => _ = self.call("DELETE", &self.key("/soft-delete"), &Value::Null),
            Step::Enable => _ = self.call("POST", &self.key("/soft-delete-restore"), &json!({})),
            Step::Delete => {
                let saved = self.call("GET", &format!("transit/backup/{KEY}"), &Value::Null);
                *backup = Some(saved["data"]["backup"].as_str().expect("OpenBao gives a backup").to_owned());
                self.call("DELETE", &self.key(""), &Value::Null);
            }
            Step::Restore => {
                let saved = backup.take().expect("it was deleted before");
                self.call("POST", &format!("transit/restore/{KEY}"), &json!({ "backup": saved }));
            }
            Step::Deny => self.put_policy("# nothing"),
            Step::Allow => self.put_policy(POLICY),
            Step::SpoilCredentials => {
                self.wrapper.replace_auth(VaultAuth::app_role("nobody", "nothing")).expect("it is well formed");
            }
            Step::FixCredentials => self.wrapper.replace_auth(self.auth()).expect("it is well formed"),
            Step::Rotate => _ = self.call("POST", &self.key("/rotate"), &json!({})),
            step => return Err(Cannot::new(format!("{step:?} is not known here"))),
        }
        Ok(())
    }

    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        let errors = |text: &str| json!({ "errors": [text] }).to_string();
        self.front.set(match fault {
            Fault::None => Passage::Open,
            Fault::Refuse => Passage::Refuse,
            Fault::Reset => Passage::Reset,
            Fault::Hang => Passage::Hang,
            Fault::Throttle(after) => {
                let after = after.as_secs().to_string();
                let body = errors("request path \"transit/decrypt/pageseal\": rate limit quota exceeded");
                Passage::Answer(http_answer("429 Too Many Requests", &[("Retry-After", &after)], &body))
            }
            Fault::ServerError => {
                Passage::Answer(http_answer("503 Service Unavailable", &[], &errors("Vault is sealed")))
            }
            Fault::ProxyError => {
                let html = "<html><body><h1>503 Service Unavailable</h1></body></html>";
                Passage::Answer(http_answer("503 Service Unavailable", &[("Content-Type", "text/html")], html))
            }
            fault => return Err(Cannot::new(format!("{fault:?} is not known here"))),
        });
        Ok(())
    }
}
