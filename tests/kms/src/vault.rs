//! The real OpenBao server as a key service, in its development mode.

use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use pageseal::testing::conformance::{Cannot, Fault, Front, KeyService, Step, http_answer};
use pageseal::{KeyWrapper, VaultAuth, VaultTransit};
use serde_json::{Value, json};

use crate::http::proxy_error;
use crate::server::{Server, tools, wait_until};

/// The master key's name at the server.
pub const KEY: &str = "pageseal";
/// Another key's.
pub const OTHER_KEY: &str = "pageseal-other";
/// The root token of [`OpenBao`].
pub const ROOT: &str = "root-token-of-the-tests";

/// What a user reads about this service.
pub const PAGE: &str = include_str!("../../../docs/kms/vault.md");

/// The policy that [`PAGE`] prints, for the key [`KEY`]: so that it is the one which is tested.
///
/// # Panics
/// If the page has none.
pub fn policy() -> &'static str {
    let (_, begin) = PAGE.split_once("```hcl\n").expect("the page prints the policy");
    begin.split_once("```").expect("the block ends").0
}

/// The server's program.
///
/// # Errors
/// Why there is none.
pub fn program() -> Result<PathBuf, String> {
    let program = tools().map(|tools| tools.join("bin/bao")).filter(|program| program.exists());
    program.ok_or_else(|| "bao is not installed (tests/run kms installs it)".into())
}

/// A server's interface, for those who set it up.
#[derive(Clone)]
pub struct Api {
    /// `http://` and where it listens.
    pub url: String,
    /// What it is asked with.
    pub token: String,
}

impl Api {
    /// The answer's body, null if it is empty; or the status and the text.
    ///
    /// # Errors
    /// If the answer is no success, or there is none.
    pub fn ask(&self, method: &str, path: &str, body: &Value) -> Result<Value, String> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}/v1/{path}", self.url))
            .header("X-Vault-Token", &self.token)
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

    /// The same.
    ///
    /// # Panics
    /// Where `ask` fails.
    pub fn call(&self, method: &str, path: &str, body: &Value) -> Value {
        self.ask(method, path, body).unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// A role of AppRole with this policy and these settings: its id, and a secret id.
    pub fn app_role(&self, name: &str, policy: &str, settings: Value) -> (String, String) {
        self.call("PUT", &format!("sys/policies/acl/{name}"), &json!({ "policy": policy }));
        let mut role = settings;
        role["token_policies"] = json!([name]);
        self.call("POST", &format!("auth/approle/role/{name}"), &role);
        (self.role_id(name), self.secret_id(name))
    }

    fn role_id(&self, name: &str) -> String {
        text(&self.call("GET", &format!("auth/approle/role/{name}/role-id"), &Value::Null)["data"]["role_id"])
    }

    /// A new secret id of a role.
    pub fn secret_id(&self, name: &str) -> String {
        text(&self.call("POST", &format!("auth/approle/role/{name}/secret-id"), &json!({}))["data"]["secret_id"])
    }
}

fn text(value: &Value) -> String {
    value.as_str().expect("OpenBao names it").to_owned()
}

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
    _server: Server,
    /// Of the server as root, past the proxy.
    pub api: Api,
    front: Front,
    wrapper: VaultTransit,
    backup: Mutex<Option<String>>,
}

impl OpenBao {
    /// # Errors
    /// Why it cannot run here.
    pub fn start() -> Result<Self, String> {
        let program = program()?;
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
        let api = Api { url: server.url(), token: ROOT.into() };
        let bao = Self { _server: server, api, front, wrapper, backup: Mutex::default() };
        wait_until("openbao", || Ok(bao.api.ask("GET", "sys/health", &Value::Null).is_ok()));
        bao.api.call("POST", "sys/mounts/transit", &json!({ "type": "transit" }));
        for key in [KEY, OTHER_KEY] {
            bao.api.call("POST", &format!("transit/keys/{key}"), &json!({ "type": "aes256-gcm96" }));
            let settings = json!({ "deletion_allowed": true, "exportable": true, "allow_plaintext_backup": true });
            bao.api.call("POST", &format!("transit/keys/{key}/config"), &settings);
        }
        bao.api.call("POST", "sys/auth/approle", &json!({ "type": "approle" }));
        bao.api.app_role("pageseal", &policies(), json!({ "token_ttl": "1h" }));
        bao.wrapper.replace_auth(bao.auth()).expect("the role is well formed");
        Ok(bao)
    }

    /// Where the proxy before it listens.
    pub fn url(&self) -> String {
        format!("http://{}", self.front.address())
    }

    /// The id of the wrapper's role, and a new secret id.
    pub fn app_role(&self) -> (String, String) {
        (self.api.role_id("pageseal"), self.api.secret_id("pageseal"))
    }

    /// The role, with a new secret id.
    pub fn auth(&self) -> VaultAuth {
        let (role, secret) = self.app_role();
        VaultAuth::app_role(role, secret)
    }

    fn put_policy(&self, policy: &str) {
        self.api.call("PUT", "sys/policies/acl/pageseal", &json!({ "policy": policy }));
    }

    fn key(&self, step: &str) -> String {
        format!("transit/keys/{KEY}{step}")
    }
}

/// For both keys.
fn policies() -> String {
    format!("{}{}", policy(), policy().replace(&format!("/{KEY}\""), &format!("/{OTHER_KEY}\"")))
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
            Step::Disable => _ = self.api.call("DELETE", &self.key("/soft-delete"), &Value::Null),
            Step::Enable => _ = self.api.call("POST", &self.key("/soft-delete-restore"), &json!({})),
            Step::Delete => {
                let saved = self.api.call("GET", &format!("transit/backup/{KEY}"), &Value::Null);
                *backup = Some(saved["data"]["backup"].as_str().expect("OpenBao gives a backup").to_owned());
                self.api.call("DELETE", &self.key(""), &Value::Null);
            }
            Step::Restore => {
                let saved = backup.take().expect("it was deleted before");
                self.api.call("POST", &format!("transit/restore/{KEY}"), &json!({ "backup": saved }));
            }
            Step::Deny => self.put_policy("# nothing"),
            Step::Allow => self.put_policy(&policies()),
            Step::SpoilCredentials => {
                self.wrapper.replace_auth(VaultAuth::app_role("nobody", "nothing")).expect("it is well formed");
            }
            Step::FixCredentials => self.wrapper.replace_auth(self.auth()).expect("it is well formed"),
            Step::Rotate => _ = self.api.call("POST", &self.key("/rotate"), &json!({})),
            step => return Err(Cannot::new(format!("{step:?} is not known here"))),
        }
        Ok(())
    }

    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        let errors = |text: &str| json!({ "errors": [text] }).to_string();
        self.front.set(fault.passage(|fault| match fault {
            Fault::Throttle(after) => {
                let after = after.as_secs().to_string();
                let body = errors("request path \"transit/decrypt/pageseal\": rate limit quota exceeded");
                http_answer("429 Too Many Requests", &[("Retry-After", &after)], &body)
            }
            Fault::ServerError => http_answer("503 Service Unavailable", &[], &errors("Vault is sealed")),
            _ => proxy_error(),
        }));
        Ok(())
    }
}
