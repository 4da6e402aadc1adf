//! `VaultTransit` against the real OpenBao server, and against servers that misbehave: what the rows of the conformance suite do
//! not show.
#![cfg(feature = "vault")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use pageseal::testing::conformance::context;
use pageseal::{
    Cluster, ClusterOptions, ErrorKind, KeyPayload, KeyWrapper, KmsClass, KmsError, VaultAuth, VaultTransit,
    WrappedKey, Wrappers,
};
use pageseal_kms_tests::http::{Answer, HttpServer, Request};
use pageseal_kms_tests::server::{Server, free_port, wait_until};
use pageseal_kms_tests::vault::{Api, OpenBao, PAGE, ROOT, policy, program};
use pageseal_proofs::{score, skipped};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(20);

/// One server for all tests; each has keys, roles and mounts of its own.
fn bao() -> Option<&'static OpenBao> {
    static BAO: OnceLock<Result<OpenBao, String>> = OnceLock::new();
    match BAO.get_or_init(OpenBao::start) {
        Ok(bao) => Some(bao),
        Err(why) => {
            skipped("kms vault", why);
            None
        }
    }
}

/// Without a key service that this machine cannot run, a test has nothing to show.
macro_rules! bao {
    () => {
        match bao() {
            Some(bao) => bao,
            None => return,
        }
    };
}

fn payload() -> KeyPayload {
    KeyPayload::from_bytes(&mut [0x5a; 128]).unwrap()
}

fn wrap(wrapper: &VaultTransit) -> Result<WrappedKey, KmsError> {
    wrapper.wrap_key(&payload(), &context(PATIENCE))
}

fn unwrap(wrapper: &VaultTransit, wrapped: &WrappedKey) -> Result<(), KmsError> {
    let opened = wrapper.unwrap_key(wrapped, &context(PATIENCE))?;
    assert!(opened.with_bytes(|bytes| *bytes == [0x5a; 128]).unwrap());
    Ok(())
}

/// The failure, which must be of this class, hold these texts, and nothing secret.
fn told<T>(outcome: Result<T, KmsError>, class: KmsClass, parts: &[&str]) -> KmsError {
    let error = outcome.err().expect("it fails");
    let text = error.to_string();
    assert_eq!(error.class, class, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    for secret in [ROOT, &BASE64_STANDARD.encode([0x5a; 128])] {
        assert!(!text.contains(secret), "{text}");
    }
    error
}

/// The same; and the page prints these texts.
fn told_and_explained<T>(outcome: Result<T, KmsError>, class: KmsClass, parts: &[&str]) -> KmsError {
    for part in parts {
        assert!(PAGE.contains(part), "the page does not print: {part}");
    }
    told(outcome, class, parts)
}

fn make_key(api: &Api, name: &str) {
    api.call("POST", &format!("transit/keys/{name}"), &json!({ "type": "aes256-gcm96" }));
}

fn keys(api: &Api) -> Value {
    api.call("LIST", "transit/keys", &Value::Null)["data"]["keys"].clone()
}

/// The page's policy, for another key.
fn policy_for(key: &str) -> String {
    policy().replace("/pageseal\"", &format!("/{key}\""))
}

fn build(url: &str, key: &str, auth: VaultAuth) -> VaultTransit {
    VaultTransit::builder(url, key, auth).build().unwrap()
}

/// A directory of a test's own, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pageseal-vault-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    /// Replaced in one step, as secrets should be.
    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let (path, new) = (self.0.join(name), self.0.join(format!("{name}.new")));
        std::fs::write(&new, content).unwrap();
        std::fs::rename(&new, &path).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The requests that came to a server: their paths and tokens.
#[derive(Clone, Default)]
struct Seen(Arc<Mutex<Vec<Asked>>>);

type Asked = (String, Option<String>);

impl Seen {
    fn note(&self, request: &Request) {
        let token = request.header("x-vault-token").map(str::to_owned);
        self.0.lock().unwrap().push((request.target.clone(), token));
    }

    fn count(&self, part: &str) -> usize {
        self.0.lock().unwrap().iter().filter(|(path, _)| path.contains(part)).count()
    }

    fn last_token(&self) -> String {
        let seen = self.0.lock().unwrap();
        seen.iter().rev().find_map(|(_, token)| token.clone()).expect("a token was sent")
    }
}

/// Passes requests on to the server at `url`, and notes them.
fn recorder(url: &str) -> (String, Seen) {
    let (seen, url) = (Seen::default(), url.to_owned());
    let noted = seen.clone();
    let server = HttpServer::plain(move |request| {
        noted.note(request);
        forward(&url, request)
    });
    (format!("http://{}", server.address()), seen)
}

fn forward(url: &str, request: &Request) -> Answer {
    let config = ureq::Agent::config_builder().http_status_as_error(false);
    let agent: ureq::Agent = config.timeout_global(Some(PATIENCE)).build().into();
    let mut ask = agent.post(format!("{url}{}", request.target));
    for name in ["x-vault-token", "x-vault-namespace", "x-vault-request"] {
        if let Some(value) = request.header(name) {
            ask = ask.header(name, value);
        }
    }
    match ask.send(&request.body[..]) {
        Ok(mut answer) => {
            let body = answer.body_mut().read_to_string().unwrap();
            Answer::json(&format!("{} Passed On", answer.status().as_u16()), body)
        }
        Err(error) => Answer::json("502 Bad Gateway", error),
    }
}

#[test]
fn a_key_that_is_missing_is_never_made_whatever_the_rights() {
    let bao = bao!();
    let before = keys(&bao.api);
    // As root: the server would make it as a side effect, if it were asked for a type that exists.
    let root = build(&bao.url(), "never-made", VaultAuth::token(ROOT));
    told_and_explained(wrap(&root), KmsClass::Deleted, &["there is no key of this name, and none was made"]);
    // By the page's policy: the server asks for the right to create, and does not say that the key is missing.
    let (role, secret) = bao.api.app_role("never-made", &policy_for("never-made"), json!({}));
    let least = build(&bao.url(), "never-made", VaultAuth::app_role(role, secret));
    told_and_explained(wrap(&least), KmsClass::Denied, &["HTTP 403: ", "permission denied"]);
    // A decryption says it to both.
    let pageseal = build(&bao.url(), "pageseal", VaultAuth::token(ROOT));
    let elsewhere = wrap(&pageseal).unwrap();
    for wrapper in [&root, &least] {
        let moved = WrappedKey { master_key: wrapper.id(), ..elsewhere.clone() };
        told_and_explained(unwrap(wrapper, &moved), KmsClass::Deleted, &["encryption key not found"]);
    }
    let after = keys(&bao.api);
    assert!(!after.to_string().contains("never-made"), "{before} {after}");
    // The control: without the guard the same server makes the key.
    bao.api.call("POST", "transit/encrypt/made-by-upsert", &json!({ "plaintext": "AAAA" }));
    assert!(keys(&bao.api).to_string().contains("made-by-upsert"));
    score("vault-upsert servers=1 keys_made=0 control=1");
}

#[test]
fn the_policy_of_the_page_gives_one_key_and_nothing_else() {
    let bao = bao!();
    make_key(&bao.api, "least");
    make_key(&bao.api, "least-neighbour");
    let (role, secret) = bao.api.app_role("least", &policy_for("least"), json!({ "token_no_default_policy": true }));
    let login = json!({ "role_id": role, "secret_id": secret });
    let answer = bao.api.call("POST", "auth/approle/login", &login);
    let own = Api { token: answer["auth"]["client_token"].as_str().unwrap().into(), ..bao.api.clone() };
    let wrapper = build(&bao.url(), "least", VaultAuth::app_role(role, secret));
    unwrap(&wrapper, &wrap(&wrapper).unwrap()).unwrap();
    for (method, path) in [
        ("POST", "transit/encrypt/least-neighbour"),
        ("POST", "transit/decrypt/least-neighbour"),
        ("GET", "transit/keys/least"),
        ("LIST", "transit/keys"),
        ("POST", "transit/keys/least/rotate"),
        ("POST", "transit/keys/least/config"),
        ("DELETE", "transit/keys/least"),
        ("DELETE", "transit/keys/least/soft-delete"),
        ("GET", "transit/backup/least"),
        ("GET", "transit/export/encryption-key/least"),
        ("POST", "transit/keys/another"),
    ] {
        let refused = own.ask(method, path, &json!({ "plaintext": "AAAA", "ciphertext": "vault:v1:AAAA" }));
        assert!(refused.as_ref().is_err_and(|why| why.starts_with("403")), "{method} {path}: {refused:?}");
    }
}

#[test]
fn a_token_is_renewed_while_it_can_be_and_got_anew_when_it_ends_for_good() {
    let bao = bao!();
    make_key(&bao.api, "renewed");
    let settings = json!({ "token_ttl": "2s", "token_max_ttl": "5s" });
    let (role, secret) = bao.api.app_role("renewed", &policy_for("renewed"), settings);
    let (url, seen) = recorder(&bao.api.url);
    let wrapper = build(&url, "renewed", VaultAuth::app_role(role, secret));
    let wrapped = wrap(&wrapper).unwrap();
    let (begin, mut calls) = (Instant::now(), 0);
    while begin.elapsed() < Duration::from_secs(8) {
        unwrap(&wrapper, &wrapped).unwrap();
        calls += 1;
        thread::sleep(Duration::from_millis(100));
    }
    let (logins, renewals) = (seen.count("/login"), seen.count("/renew-self"));
    assert!((2..=4).contains(&logins), "{logins} logins, {renewals} renewals");
    assert!((2..=12).contains(&renewals), "{logins} logins, {renewals} renewals");
    // Idle until it has ended.
    thread::sleep(Duration::from_millis(2500));
    unwrap(&wrapper, &wrapped).unwrap();
    score(&format!("vault-leases ttl_s=2 max_ttl_s=5 calls={calls} failed=0 logins={logins} renewals={renewals}"));
}

#[test]
fn a_revoked_token_comes_back_by_itself_where_there_is_a_login() {
    let bao = bao!();
    make_key(&bao.api, "revoked");
    let (role, secret) = bao.api.app_role("revoked", &policy_for("revoked"), json!({}));
    let (url, seen) = recorder(&bao.api.url);
    let wrapper = build(&url, "revoked", VaultAuth::app_role(role, secret));
    let wrapped = wrap(&wrapper).unwrap();
    for logins in 2..5 {
        bao.api.call("POST", "auth/token/revoke", &json!({ "token": seen.last_token() }));
        unwrap(&wrapper, &wrapped).unwrap();
        unwrap(&wrapper, &wrapped).unwrap();
        assert_eq!(seen.count("/login"), logins);
    }
}

#[test]
fn a_secret_id_in_a_file_is_replaced_without_a_restart() {
    let bao = bao!();
    make_key(&bao.api, "replaced");
    let (role, secret) = bao.api.app_role("replaced", &policy_for("replaced"), json!({}));
    let directory = Directory::new("secret-id");
    let file = directory.file("secret-id", format!("{secret}\n"));
    let (url, seen) = recorder(&bao.api.url);
    let wrapper = build(&url, "replaced", VaultAuth::app_role_with_secret_file(role, &file));
    let wrapped = wrap(&wrapper).unwrap();

    let destroy = json!({ "secret_id": secret });
    bao.api.call("POST", "auth/approle/role/replaced/secret-id/destroy", &destroy);
    // The token of the login before goes on.
    unwrap(&wrapper, &wrapped).unwrap();
    bao.api.call("POST", "auth/token/revoke", &json!({ "token": seen.last_token() }));
    told_and_explained(unwrap(&wrapper, &wrapped), KmsClass::Denied, &["invalid role or secret ID"]);
    directory.file("secret-id", bao.api.secret_id("replaced"));
    soon("the new secret id is taken", || unwrap(&wrapper, &wrapped));
}

/// Within the seconds for which a wrapper may leave a server alone that has refused it.
fn soon(what: &str, mut call: impl FnMut() -> Result<(), KmsError>) {
    wait_until(what, || call().map(|()| true).map_err(std::io::Error::other));
}

#[test]
fn a_token_file_is_read_anew_for_each_call() {
    let bao = bao!();
    make_key(&bao.api, "token-file");
    bao.api.call("PUT", "sys/policies/acl/token-file", &json!({ "policy": policy_for("token-file") }));
    let new_token = || {
        let made = bao.api.call("POST", "auth/token/create", &json!({ "policies": ["token-file"] }));
        made["auth"]["client_token"].as_str().unwrap().to_owned()
    };
    let directory = Directory::new("token");
    let first = new_token();
    let file = directory.file("token", &first);
    let wrapper = build(&bao.url(), "token-file", VaultAuth::token_file(&file));
    let wrapped = wrap(&wrapper).unwrap();
    bao.api.call("POST", "auth/token/revoke", &json!({ "token": first }));
    told_and_explained(unwrap(&wrapper, &wrapped), KmsClass::Denied, &["permission denied"]);
    directory.file("token", format!("\n{}\n", new_token()));
    unwrap(&wrapper, &wrapped).unwrap();
    // Nothing is kept of it.
    std::fs::remove_file(&file).unwrap();
    told_and_explained(
        unwrap(&wrapper, &wrapped),
        KmsClass::Misconfigured,
        &["with the token (PAGESEAL_VAULT_TOKEN_FILE) cannot be read: "],
    );
    directory.file("token", new_token());
    unwrap(&wrapper, &wrapped).unwrap();
}

/// Stands in for the Kubernetes API server, of which OpenBao asks only whether a service account's token is genuine.
struct FakeTokenReview {
    server: HttpServer,
    reviews: Arc<AtomicU64>,
}

impl FakeTokenReview {
    /// The token of the service account `keeper` in the namespace `db`. OpenBao reads its claims before it asks.
    fn jwt(account: &str) -> String {
        let part = |value: &Value| BASE64_STANDARD.encode(value.to_string()).replace('+', "-").replace('/', "_");
        let claims = json!({
            "iss": "kubernetes/serviceaccount",
            "sub": format!("system:serviceaccount:db:{account}"),
            "aud": ["vault"],
            "exp": 4_000_000_000_u64,
            "iat": 1_600_000_000,
            "nbf": 1_600_000_000,
            "kubernetes.io": { "namespace": "db", "serviceaccount": { "name": account, "uid": "u-1" } },
        });
        let parts = [part(&json!({ "alg": "RS256", "typ": "JWT" })), part(&claims), "c2lnbmF0dXJl".into()];
        parts.map(|part| part.trim_end_matches('=').to_owned()).join(".")
    }

    fn start() -> Self {
        let reviews = Arc::new(AtomicU64::new(0));
        let counted = Arc::clone(&reviews);
        let server = HttpServer::plain(move |request| {
            counted.fetch_add(1, Ordering::SeqCst);
            let asked = request.json();
            let genuine = ["keeper", "stranger"].into_iter().find(|name| asked["spec"]["token"] == Self::jwt(name));
            let status = match genuine {
                Some(name) => json!({
                    "authenticated": true,
                    "user": { "username": format!("system:serviceaccount:db:{name}"), "uid": "u-1",
                        "groups": ["system:serviceaccounts", "system:serviceaccounts:db"] },
                    "audiences": ["vault"],
                }),
                None => json!({ "authenticated": false, "error": "invalid bearer token" }),
            };
            let kind = json!({ "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status });
            Answer::json("201 Created", kind)
        });
        Self { server, reviews }
    }
}

#[test]
fn a_pod_logs_in_by_its_service_account() {
    let bao = bao!();
    let fake = FakeTokenReview::start();
    make_key(&bao.api, "pod");
    bao.api.call("PUT", "sys/policies/acl/pod", &json!({ "policy": policy_for("pod") }));
    bao.api.call("POST", "sys/auth/cluster-1", &json!({ "type": "kubernetes" }));
    let config = json!({
        "kubernetes_host": format!("http://{}", fake.server.address()),
        "kubernetes_ca_cert": rcgen_ca(),
        "token_reviewer_jwt": FakeTokenReview::jwt("reviewer"),
        "disable_local_ca_jwt": true,
        "disable_iss_validation": true,
    });
    bao.api.call("POST", "auth/cluster-1/config", &config);
    let role = json!({
        "bound_service_account_names": ["keeper"],
        "bound_service_account_namespaces": ["db"],
        "token_policies": ["pod"],
        "audience": "vault",
    });
    bao.api.call("POST", "auth/cluster-1/role/pod", &role);
    let directory = Directory::new("jwt");
    let file = directory.file("jwt", FakeTokenReview::jwt("keeper"));
    let auth = |role: &str| VaultAuth::kubernetes(role).mount("cluster-1").jwt_file(&file);
    let wrapper = build(&bao.url(), "pod", auth("pod"));
    let wrapped = wrap(&wrapper).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();
    assert_eq!(fake.reviews.load(Ordering::SeqCst), 1);

    told_and_explained(
        unwrap(&build(&bao.url(), "pod", auth("no-such-role")), &wrapped),
        KmsClass::Denied,
        &["invalid role name"],
    );
    directory.file("jwt", FakeTokenReview::jwt("stranger"));
    told_and_explained(
        unwrap(&build(&bao.url(), "pod", auth("pod")), &wrapped),
        KmsClass::Denied,
        &["service account name not authorized"],
    );
    // What the wrapper has, it has.
    unwrap(&wrapper, &wrapped).unwrap();
    std::fs::remove_file(&file).unwrap();
    told_and_explained(
        unwrap(&build(&bao.url(), "pod", auth("pod")), &wrapped),
        KmsClass::Misconfigured,
        &["with the service account token (PAGESEAL_VAULT_KUBERNETES_JWT_FILE) cannot be read: "],
    );
}

/// The method wants one, even where it speaks plain HTTP to the API server.
fn rcgen_ca() -> String {
    rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap().cert.pem()
}

#[test]
fn a_namespace_holds_the_engine_and_the_logins() {
    let bao = bao!();
    bao.api.call("POST", "sys/namespaces/team", &json!({}));
    let call = |method: &str, path: &str, body: Value| bao.api.call(method, &format!("team/{path}"), &body);
    call("POST", "sys/mounts/transit", json!({ "type": "transit" }));
    call("POST", "transit/keys/pageseal", json!({ "type": "aes256-gcm96" }));
    call("PUT", "sys/policies/acl/pageseal", json!({ "policy": policy() }));
    call("POST", "sys/auth/approle", json!({ "type": "approle" }));
    call("POST", "auth/approle/role/pageseal", json!({ "token_policies": ["pageseal"] }));
    let role = call("GET", "auth/approle/role/pageseal/role-id", Value::Null);
    let secret = call("POST", "auth/approle/role/pageseal/secret-id", json!({}));
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let auth = VaultAuth::app_role(text(&role["data"]["role_id"]), text(&secret["data"]["secret_id"]));
    let within = |namespace: &str, auth: VaultAuth| {
        VaultTransit::builder(bao.url(), "pageseal", auth).namespace(namespace).build().unwrap()
    };
    let wrapper = within("team", auth.clone());
    assert_eq!(wrapper.id().to_string(), "vault-transit:team/transit/keys/pageseal");
    let wrapped = wrap(&wrapper).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();

    // The key of the same name outside is another, and nobody is led to it.
    let outside = build(&bao.url(), "pageseal", VaultAuth::token(ROOT));
    told(unwrap(&outside, &wrapped), KmsClass::BadCiphertext, &["it was wrapped by vault-transit:team/"]);
    let moved = WrappedKey { master_key: outside.id(), ..wrapped };
    told_and_explained(unwrap(&outside, &moved), KmsClass::BadCiphertext, &["message authentication failed"]);
    for auth in [auth, VaultAuth::token(ROOT)] {
        told_and_explained(
            wrap(&within("nowhere", auth)),
            KmsClass::Misconfigured,
            &["namespace not found", "the server does not know the namespace ", "(VAULT_NAMESPACE)"],
        );
    }
}

#[test]
fn a_quota_that_is_used_up_is_throttling_with_the_time_that_the_server_names() {
    let bao = bao!();
    bao.api.call("POST", "sys/mounts/limited", &json!({ "type": "transit" }));
    bao.api.call("POST", "limited/keys/limited", &json!({ "type": "aes256-gcm96" }));
    let wrapper = VaultTransit::builder(bao.url(), "limited", VaultAuth::token(ROOT)).mount("limited").build().unwrap();
    let wrapped = wrap(&wrapper).unwrap();
    let quota = json!({ "path": "limited/", "rate": 1, "interval": "3s" });
    // Without the header, as the server is by default, no time is made up.
    for (headers, named) in [(false, false), (true, true)] {
        bao.api.call("POST", "sys/quotas/config", &json!({ "enable_rate_limit_response_headers": headers }));
        bao.api.call("POST", "sys/quotas/rate-limit/limited", &quota);
        let begin = Instant::now();
        let error = loop {
            if let Err(error) = unwrap(&wrapper, &wrapped) {
                break error;
            }
            assert!(begin.elapsed() < PATIENCE, "the quota is never used up");
        };
        let error = told_and_explained::<()>(Err(error), KmsClass::Throttled, &["rate limit quota exceeded"]);
        assert_eq!(error.retry_after.is_some(), named, "{error:?}");
        if let Some(after) = error.retry_after {
            assert!((1..=3).contains(&after.as_secs()), "{after:?}");
            // The server cuts the fraction off.
            thread::sleep(after + Duration::from_millis(1200));
            unwrap(&wrapper, &wrapped).unwrap();
        }
        bao.api.call("DELETE", "sys/quotas/rate-limit/limited", &Value::Null);
    }
}

#[test]
fn a_sealed_or_restarted_server_says_nothing_about_the_key_and_is_used_again_when_it_is_unsealed() {
    let program = match program() {
        Ok(program) => program,
        Err(why) => return skipped("kms vault", &why),
    };
    let directory = Directory::new("persistent");
    let place = directory.0.clone();
    std::fs::create_dir_all(place.join("data")).unwrap();
    let cluster = format!("127.0.0.1:{}", free_port());
    let mut server = Server::start("openbao-persistent", move |port| {
        let address = format!("127.0.0.1:{port}");
        let config = json!({
            "storage": { "raft": { "path": place.join("data"), "node_id": "one", "performance_multiplier": "1" } },
            "listener": { "tcp": { "address": address, "cluster_address": cluster, "tls_disable": true } },
            "api_addr": format!("http://{address}"),
            "cluster_addr": format!("https://{cluster}"),
        });
        std::fs::write(place.join("config.json"), config.to_string()).unwrap();
        let mut command = Command::new(&program);
        command.arg("server").arg(format!("-config={}", place.join("config.json").display()));
        command
    });
    let mut api = Api { url: server.url(), token: String::new() };
    let init = json!({ "secret_shares": 1, "secret_threshold": 1 });
    let mut made = Value::Null;
    wait_until("the server can be initialised", || match api.ask("POST", "sys/init", &init) {
        Ok(answer) => {
            made = answer;
            Ok(true)
        }
        Err(error) => Err(std::io::Error::other(error)),
    });
    api.token = made["root_token"].as_str().unwrap().into();
    let unseal = |api: &Api| {
        wait_until("the server is unsealed", || {
            let key = json!({ "key": made["keys"][0] });
            let answer = api.ask("POST", "sys/unseal", &key).map_err(std::io::Error::other)?;
            // It is healthy when it has made itself the leader.
            Ok(answer["sealed"] == false && api.ask("GET", "sys/health", &Value::Null).is_ok())
        });
    };
    unseal(&api);
    api.call("POST", "sys/mounts/transit", &json!({ "type": "transit" }));
    make_key(&api, "pageseal");
    api.call("POST", "sys/auth/approle", &json!({ "type": "approle" }));
    let (role, secret) = api.app_role("pageseal", policy(), json!({}));
    let wrapper = build(&server.url(), "pageseal", VaultAuth::app_role(role, secret));
    let wrapped = wrap(&wrapper).unwrap();

    api.call("POST", "sys/seal", &json!({}));
    told_and_explained(unwrap(&wrapper, &wrapped), KmsClass::Unreachable, &["HTTP 503: ", "is sealed"]);
    unseal(&api);
    unwrap(&wrapper, &wrapped).unwrap();

    server.restart();
    told(unwrap(&wrapper, &wrapped), KmsClass::Unreachable, &["is sealed"]);
    unseal(&api);
    unwrap(&wrapper, &wrapped).unwrap();

    server.stop();
    told_and_explained(unwrap(&wrapper, &wrapped), KmsClass::Unreachable, &["Connection refused"]);
    server.restart();
    unseal(&api);
    unwrap(&wrapper, &wrapped).unwrap();
}

#[test]
fn a_mount_that_is_gone_is_told_as_a_setting() {
    let bao = bao!();
    bao.api.call("POST", "sys/mounts/going", &json!({ "type": "transit" }));
    bao.api.call("POST", "going/keys/k", &json!({ "type": "aes256-gcm96" }));
    let wrapper = VaultTransit::builder(bao.url(), "k", VaultAuth::token(ROOT)).mount("going").build().unwrap();
    let wrapped = wrap(&wrapper).unwrap();
    bao.api.call("DELETE", "sys/mounts/going", &Value::Null);
    for outcome in [wrap(&wrapper).map(drop), unwrap(&wrapper, &wrapped)] {
        told_and_explained(
            outcome,
            KmsClass::Misconfigured,
            &["no handler for route", "no transit engine is mounted there (PAGESEAL_VAULT_MOUNT)"],
        );
    }
}

#[test]
fn a_key_that_takes_no_context_is_told_as_a_setting() {
    let bao = bao!();
    bao.api.call("POST", "transit/keys/rsa", &json!({ "type": "rsa-2048" }));
    bao.api.call("POST", "transit/keys/derived", &json!({ "type": "aes256-gcm96", "derived": true }));
    for key in ["rsa", "derived"] {
        let wrapper = build(&bao.url(), key, VaultAuth::token(ROOT));
        told_and_explained(
            wrap(&wrapper),
            KmsClass::Misconfigured,
            &["the key must be of type aes256-gcm96 or chacha20-poly1305, and not derived (PAGESEAL_VAULT_KEY)"],
        );
    }
}

#[test]
fn a_version_that_the_server_has_retired_is_disabled_until_it_is_allowed_again() {
    let bao = bao!();
    make_key(&bao.api, "retired");
    let wrapper = build(&bao.url(), "retired", VaultAuth::token(ROOT));
    let first = wrap(&wrapper).unwrap();
    bao.api.call("POST", "transit/keys/retired/rotate", &json!({}));
    let second = wrapper.rewrap_key(&first, &context(PATIENCE)).unwrap();
    assert_eq!((first.key_version.as_str(), second.key_version.as_str()), ("1", "2"));
    let least = |version: u64| {
        bao.api.call("POST", "transit/keys/retired/config", &json!({ "min_decryption_version": version }));
    };
    least(2);
    told_and_explained(
        unwrap(&wrapper, &first),
        KmsClass::Disabled,
        &[
            "ciphertext or signature version is disallowed by policy (too old)",
            "lower min_decryption_version to use this version of the key",
        ],
    );
    unwrap(&wrapper, &second).unwrap();
    least(1);
    unwrap(&wrapper, &first).unwrap();
}

#[test]
fn two_hundred_threads_share_one_login_and_one_refusal() {
    let bao = bao!();
    make_key(&bao.api, "crowd");
    let (role, secret) = bao.api.app_role("crowd", &policy_for("crowd"), json!({}));
    // What a role that is locked out says is another matter.
    let tuned = json!({ "user_lockout_config": { "lockout_disable": true } });
    bao.api.call("POST", "sys/auth/approle/tune", &tuned);
    let (url, seen) = recorder(&bao.api.url);
    let wrapper = build(&url, "crowd", VaultAuth::app_role(&role, secret));
    let failed = crowd(&wrapper);
    assert_eq!((failed, seen.count("/login")), (0, 1));
    let logins = seen.count("/login");

    wrapper.replace_auth(VaultAuth::app_role(role, "wrong")).unwrap();
    let failed = crowd(&wrapper);
    let refused = seen.count("/login") - logins;
    assert_eq!(failed, 200);
    // Who comes after the refusal may try again.
    assert!(refused <= 100, "{refused} logins were refused");
    score(&format!(
        "vault-crowd threads=200 logins={logins} failed=0 refused_threads={failed} refused_logins={refused}"
    ));
}

/// How many of 200 threads fail, all denied.
fn crowd(wrapper: &VaultTransit) -> usize {
    let start = Barrier::new(200);
    thread::scope(|scope| {
        let threads: Vec<_> = (0..200)
            .map(|_| {
                scope.spawn(|| {
                    start.wait();
                    wrap(wrapper).map(drop)
                })
            })
            .collect();
        let outcomes = threads.into_iter().map(|thread| thread.join().unwrap());
        let failures: Vec<_> = outcomes.filter_map(Result::err).collect();
        assert!(failures.iter().all(|error| error.class == KmsClass::Denied), "{failures:?}");
        failures.len()
    })
}

#[test]
fn each_call_is_one_request_and_a_retired_version_can_be_left_behind() {
    let bao = bao!();
    make_key(&bao.api, "counted");
    let (role, secret) = bao.api.app_role("counted", &policy_for("counted"), json!({}));
    let (url, seen) = recorder(&bao.api.url);
    let wrapper = build(&url, "counted", VaultAuth::app_role(role, secret));
    let wrappers = || Wrappers::one(wrapper.clone());
    let asked = || [seen.count("/encrypt/"), seen.count("/decrypt/"), seen.count("/auth/")];
    let before = Mutex::new([0; 3]);
    let calls = |what: &str, expected: [usize; 3]| {
        let now = asked();
        let then = std::mem::replace(&mut *before.lock().unwrap(), now);
        assert_eq!([0, 1, 2].map(|index| now[index] - then[index]), expected, "{what}");
    };
    let directory = Directory::new("counted");
    let home = directory.0.join("cluster");
    let cluster = Cluster::create(&home, ClusterOptions::new(), wrappers()).unwrap();
    calls("create a cluster", [2, 2, 1]);
    let orders = cluster.create_database("orders").unwrap();
    calls("create a database", [1, 1, 0]);
    cluster.check_master_key().unwrap();
    calls("check the master key", [0, 1, 0]);
    bao.api.call("POST", "transit/keys/counted/rotate", &json!({}));
    cluster.rewrap(wrappers(), &|_| ()).unwrap();
    // Five unwraps, and three rewraps, each of which is one of both.
    calls("rewrap after a rotation, with one data key", [3, 8, 0]);
    cluster.rewrap(wrappers(), &|_| ()).unwrap();
    calls("rewrap again", [2, 7, 0]);
    let id = cluster.id();
    drop((orders, cluster));

    // Everything is under version 2 now.
    bao.api.call("POST", "transit/keys/counted/config", &json!({ "min_decryption_version": 2 }));
    let cluster = Cluster::open(&home, ClusterOptions::new().expected_id(id), wrappers()).unwrap();
    calls("open a cluster", [0, 1, 0]);
    cluster.database("orders").unwrap();
    calls("open a database of one generation", [0, 1, 0]);
    bao.api.call("POST", "transit/keys/counted/rotate", &json!({}));
    bao.api.call("POST", "transit/keys/counted/config", &json!({ "min_decryption_version": 3 }));
    let error = cluster.check_master_key().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Disabled, "{error}");
    assert!(error.to_string().contains("lower min_decryption_version"), "{error}");
    bao.api.call("POST", "transit/keys/counted/config", &json!({ "min_decryption_version": 1 }));
    drop(cluster);
    Cluster::open(&home, ClusterOptions::new().expected_id(id), wrappers()).map(drop).unwrap();
    score("vault-calls operations=7 logins=1");
}

#[test]
fn a_redirect_is_followed_once_to_the_same_path_and_a_token_goes_nowhere_else() {
    let bao = bao!();
    let (leader, followed) = recorder(&bao.api.url);
    let (target, seen) = (Arc::new(Mutex::new(String::new())), Seen::default());
    let (to, noted) = (Arc::clone(&target), seen.clone());
    let standby = HttpServer::plain(move |request| {
        noted.note(request);
        let to = to.lock().unwrap().replace("{path}", &request.target);
        Answer::json("307 Temporary Redirect", "").header("Location", &to)
    });
    let url = format!("http://{}", standby.address());
    let wrapper = build(&url, "pageseal", VaultAuth::token(ROOT));
    let lead = |to: &str| *target.lock().unwrap() = to.to_owned();

    lead(&format!("{leader}{{path}}"));
    unwrap(&wrapper, &wrap(&wrapper).unwrap()).unwrap();
    assert_eq!((seen.count("/transit/"), followed.count("/transit/")), (2, 2));
    assert_eq!(followed.last_token(), ROOT);

    let before = followed.count("");
    lead(&format!("{leader}/v1/sys/elsewhere"));
    told_and_explained(wrap(&wrapper), KmsClass::Misconfigured, &["redirects to ", "which is not the same path"]);
    lead("http://198.51.100.7:8200{path}");
    told_and_explained(wrap(&wrapper), KmsClass::Misconfigured, &["which is without TLS", "check VAULT_ADDR"]);
    assert_eq!(followed.count(""), before);
    // To itself: two requests, and no more.
    let asked = seen.count("");
    lead("{path}");
    told_and_explained(wrap(&wrapper), KmsClass::Unreachable, &["the servers have no leader yet"]);
    assert_eq!(seen.count(""), asked + 2);
}

#[test]
fn a_redirect_never_leads_out_of_tls() {
    let (leader, followed) = (Seen::default(), Seen::default());
    let noted = followed.clone();
    let plain = HttpServer::plain(move |request| {
        noted.note(request);
        Answer::json("200 OK", "{}")
    });
    let to = format!("http://{}", plain.address());
    let noted = leader.clone();
    let standby = HttpServer::tls("standby", move |request| {
        noted.note(request);
        Answer::json("307 Temporary Redirect", "").header("Location", &format!("{to}{}", request.target))
    });
    let url = format!("https://{}", standby.address());
    let builder = VaultTransit::builder(url, "pageseal", VaultAuth::token(ROOT));
    let wrapper = builder.ca_file(standby.certificate().unwrap()).dangerous_allow_plain_http().build().unwrap();
    told(wrap(&wrapper), KmsClass::Misconfigured, &["which is without TLS"]);
    assert_eq!((leader.count(""), followed.count("")), (1, 0));
}

#[test]
fn garbage_is_no_verdict_and_no_key() {
    let answer = Arc::new(Mutex::new(Answer::json("200 OK", "")));
    let given = Arc::clone(&answer);
    let server = HttpServer::plain(move |_| given.lock().unwrap().clone());
    let wrapper = build(&format!("http://{}", server.address()), "k", VaultAuth::token("t"));
    let blob = format!("vault:v1:{}", BASE64_STANDARD.encode([7; 156])).into_bytes();
    let wrapped = WrappedKey { master_key: wrapper.id(), key_version: "1".into(), blob };
    let plaintext =
        |length: usize| json!({ "data": { "plaintext": BASE64_STANDARD.encode(vec![0x5a; length]) } }).to_string();
    *answer.lock().unwrap() = Answer::json("200 OK", plaintext(128));
    unwrap(&wrapper, &wrapped).unwrap();

    let huge = format!("{{\"data\":{{\"plaintext\":\"{}\"}}}}", "A".repeat(1 << 20));
    let deep = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    let bodies = [
        String::new(),
        "<html>Welcome</html>".into(),
        "{\"data\":".into(),
        "null".into(),
        "{}".into(),
        json!({ "data": null }).to_string(),
        json!({ "data": { "plaintext": 7, "ciphertext": [] } }).to_string(),
        json!({ "data": { "plaintext": "!", "ciphertext": "!" } }).to_string(),
        json!({ "data": { "plaintext": "", "ciphertext": "vault:v0:AAAA" } }).to_string(),
        plaintext(127),
        plaintext(129),
        plaintext(0),
        huge,
        deep,
        "\u{0}\u{1}\u{2}".into(),
    ];
    let count = bodies.len();
    for body in bodies {
        let shown = body[..body.len().min(60)].to_owned();
        *answer.lock().unwrap() = Answer::json("200 OK", body);
        for outcome in [wrap(&wrapper).map(drop), unwrap(&wrapper, &wrapped)] {
            let error = outcome.expect_err(&shown);
            assert_eq!(error.class, KmsClass::Unclassified, "{shown}: {error}");
            assert!(error.to_string().len() < 700 && !error.to_string().contains("Wlpa"), "{shown}: {error}");
        }
    }
    for status in
        ["204 No Content", "201 Created", "301 Moved Permanently", "401 Unauthorized", "404 Not Found", "418 ?"]
    {
        *answer.lock().unwrap() = Answer::json(status, "<html>no</html>");
        let error = unwrap(&wrapper, &wrapped).unwrap_err();
        assert!(matches!(error.class, KmsClass::Unclassified | KmsClass::Misconfigured), "{status}: {error}");
    }
    score(&format!("vault-garbage bodies={count} keys=0 verdicts=0 control=1"));
}

/// A server in development mode with TLS; its certificates are in the directory.
fn with_tls(directory: &Directory) -> Result<Server, String> {
    let (program, place) = (program()?, directory.0.clone());
    let server = Server::start("openbao-tls", move |port| {
        let mut command = Command::new(&program);
        command.args(["server", "-dev", "-dev-no-store-token", "-dev-tls"]);
        command.arg(format!("-dev-tls-cert-dir={}", place.display()));
        command.arg(format!("-dev-root-token-id={ROOT}")).arg(format!("-dev-listen-address=127.0.0.1:{port}"));
        command
    });
    Ok(server)
}

#[test]
fn tls_trusts_the_authorities_that_were_named_and_no_others() {
    let directory = Directory::new("tls");
    let server = match with_tls(&directory) {
        Ok(server) => server,
        Err(why) => return skipped("kms vault", &why),
    };
    let authority = directory.0.join("vault-ca.pem");
    let url = format!("https://{}", server.address());
    let set_up = |arguments: &[&str]| {
        let mut command = Command::new(program().unwrap());
        command.args(arguments).env("VAULT_ADDR", &url).env("VAULT_CACERT", &authority).env("VAULT_TOKEN", ROOT);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(true) } else { Err(std::io::Error::other(said)) }
    };
    wait_until("the engine is mounted", || set_up(&["secrets", "enable", "transit"]));
    set_up(&["write", "-f", "transit/keys/pageseal", "type=aes256-gcm96"]).unwrap();

    let builder = |url: &str| VaultTransit::builder(url, "pageseal", VaultAuth::token(ROOT));
    let wrapper = builder(&url).ca_file(&authority).build().unwrap();
    let wrapped = wrap(&wrapper).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();

    let another = HttpServer::tls("another-authority", |_| Answer::json("200 OK", "{}"));
    let file = another.certificate().unwrap();
    told_and_explained(
        wrap(&builder(&url).ca_file(file).build().unwrap()),
        KmsClass::Misconfigured,
        &["is not trusted (", "only the authorities in ", "VAULT_CACERT"],
    );
    told(wrap(&builder(&url).ca_file(file).build().unwrap()), KmsClass::Misconfigured, &[&file.display().to_string()]);
    // By a name that is not in the certificate.
    let url_by_name = url.replace("127.0.0.1", "127.0.0.2");
    let by_name = builder(&url_by_name).ca_file(&authority).build().unwrap();
    if let Err(error) = wrap(&by_name) {
        assert!(matches!(error.class, KmsClass::Misconfigured | KmsClass::Unreachable), "{error}");
    } else {
        panic!("a certificate of 127.0.0.1 was taken for 127.0.0.2");
    }
    // Both ways round.
    let plain = builder(&url.replace("https", "http")).build().unwrap();
    // The server says so and closes the connection, with or without having read the request: then the client may see the
    // end before the answer.
    wait_until("the wrong scheme is told", || {
        let error = wrap(&plain).unwrap_err();
        assert!(matches!(error.class, KmsClass::Misconfigured | KmsClass::Unreachable), "{error}");
        let (hint, known) = ("the server wants https:// (VAULT_ADDR)", error.class == KmsClass::Misconfigured);
        assert!(PAGE.contains(hint) && (!known || error.to_string().contains(hint)), "{error}");
        Ok(known)
    });
    if let Some(bao) = bao() {
        let tls = builder(&bao.url().replace("http", "https")).ca_file(&authority).build().unwrap();
        told_and_explained(wrap(&tls), KmsClass::Misconfigured, &["does not speak TLS (", "check VAULT_ADDR"]);
    }
}

#[test]
fn the_commands_of_the_page_set_up_what_they_promise() {
    let bao = bao!();
    let directory = Directory::new("page");
    directory.file("pageseal.hcl", policy());
    let tools = program().unwrap().parent().unwrap().to_path_buf();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap_or_default());
    // A server of its own would be cleaner and take longer: hence a namespace.
    bao.api.call("POST", "sys/namespaces/page", &json!({}));
    let mut blocks = 0;
    for block in PAGE.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()) {
        // Kubernetes is set up against the fake above, not against a cluster.
        if !block.contains("bao ") || block.contains("kubernetes") {
            continue;
        }
        let mut command = Command::new("bash");
        command.args(["-euc", block]).current_dir(&directory.0).env("PATH", &path);
        command.env("VAULT_ADDR", &bao.api.url).env("VAULT_TOKEN", ROOT).env("VAULT_NAMESPACE", "page");
        let output = command.output().unwrap();
        assert!(output.status.success(), "{block}\n{}", String::from_utf8_lossy(&output.stderr));
        blocks += 1;
    }
    assert!(blocks >= 2, "the page's commands were not found");
    let role = std::fs::read_to_string(directory.0.join("role-id")).unwrap();
    let auth = VaultAuth::app_role_with_secret_file(role.trim(), directory.0.join("secret-id"));
    let builder = VaultTransit::builder(bao.url(), "pageseal", auth).namespace("page");
    let wrapper = builder.build().unwrap();
    let wrapped = wrap(&wrapper).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();
    score(&format!("vault-page blocks={blocks} failed=0"));
}

#[test]
fn a_login_that_others_spoil_is_no_verdict() {
    let bao = bao!();
    make_key(&bao.api, "spoiled");
    let pageseal = build(&bao.url(), "spoiled", VaultAuth::token(ROOT));
    let wrapped = wrap(&pageseal).unwrap();
    let no_verdict = |what: &str, auth: VaultAuth| {
        let error = unwrap(&build(&bao.url(), "spoiled", auth), &wrapped).unwrap_err();
        assert!(!error.class.is_revocation(), "{what}: {error}");
    };

    // The Kubernetes API server is down, in two ways.
    bao.api.call("POST", "sys/auth/cluster-2", &json!({ "type": "kubernetes" }));
    let role = json!({ "bound_service_account_names": ["keeper"], "bound_service_account_namespaces": ["db"] });
    bao.api.call("POST", "auth/cluster-2/role/pod", &role);
    let directory = Directory::new("jwt-down");
    let file = directory.file("jwt", FakeTokenReview::jwt("keeper"));
    let overloaded = HttpServer::plain(|_| Answer::json("503 Service Unavailable", "overloaded"));
    for host in [format!("127.0.0.1:{}", free_port()), overloaded.address().to_string()] {
        let config = json!({
            "kubernetes_host": format!("http://{host}"),
            "kubernetes_ca_cert": rcgen_ca(),
            "token_reviewer_jwt": FakeTokenReview::jwt("reviewer"),
            "disable_local_ca_jwt": true,
            "disable_iss_validation": true,
        });
        bao.api.call("POST", "auth/cluster-2/config", &config);
        no_verdict("API server", VaultAuth::kubernetes("pod").mount("cluster-2").jwt_file(&file));
    }

    // Somebody who knows the role id has tried wrong secret ids, until the server locked the role out.
    bao.api.call("POST", "sys/auth/lockable", &json!({ "type": "approle" }));
    bao.api.call("POST", "auth/lockable/role/r", &json!({ "token_policies": ["default"] }));
    let role = bao.api.call("GET", "auth/lockable/role/r/role-id", &Value::Null)["data"]["role_id"].clone();
    let secret = bao.api.call("POST", "auth/lockable/role/r/secret-id", &json!({}))["data"]["secret_id"].clone();
    for _ in 0..6 {
        let wrong = json!({ "role_id": role, "secret_id": "wrong" });
        bao.api.ask("POST", "auth/lockable/login", &wrong).unwrap_err();
    }
    let auth = VaultAuth::app_role(role.as_str().unwrap(), secret.as_str().unwrap()).mount("lockable");
    no_verdict("locked out", auth);
}
