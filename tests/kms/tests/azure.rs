//! What Azure's adapter does beyond the conformance rows. Everything here is against a **fake**, but for `live_…`, which
//! needs a real vault.
#![cfg(feature = "azure")]

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pageseal::testing::conformance::{Front, Passage};
use pageseal::{
    AzureCredential, AzureKeyVault, Cluster, ClusterOptions, ErrorKind, Generation, KeyPayload, KeyWrapper, KmsClass,
    KmsError, MasterKeyId, WrapContext, WrappedKey, Wrappers,
};
use pageseal_kms_tests::azure::fake::{ASSERTION, CLIENT, FakeKeyVault, KEY, Kind, SECRET, TENANT};
use pageseal_kms_tests::azure::{self, FakeService, good_credential};
use pageseal_kms_tests::http::{Answer, HttpServer};
use pageseal_kms_tests::table;

#[test]
fn live_vault_does_what_the_rows_say_that_need_no_change_of_its_keys() {
    match azure::live() {
        Ok(service) => table::hold("azure", "key-vault", "yes", &*service),
        Err(why) => println!("not run against a real vault: {why}"),
    }
}

/// A wrapper that lends what it is asked to wrap to a closure: only pageseal makes payloads and contexts.
struct Lender(Mutex<Option<Job>>);

type Job = Box<dyn FnOnce(&KeyPayload, &WrapContext<'_>) + Send>;

impl KeyWrapper for Lender {
    fn id(&self) -> MasterKeyId {
        MasterKeyId::new("test", "lender")
    }

    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        if let Some(job) = self.0.lock().unwrap().take() {
            job(key, cx);
        }
        Err(KmsError::new(KmsClass::Unclassified))
    }

    fn unwrap_key(&self, _: &WrappedKey, _: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        Err(KmsError::new(KmsClass::Unclassified))
    }
}

/// Calls `job` with a payload and its context, and with a minute until the deadline.
fn with_payload<T: Send + 'static>(job: impl FnOnce(&KeyPayload, &WrapContext<'_>) -> T + Send + 'static) -> T {
    let (send, receive) = std::sync::mpsc::channel();
    let job: Job = Box::new(move |payload, cx| send.send(job(payload, cx)).unwrap());
    let place = Directory::new();
    let options = ClusterOptions::new().kms_timeout(Duration::from_secs(60));
    let failed = Cluster::create(&place.0.join("cluster"), options, Wrappers::one(Lender(Mutex::new(Some(job)))));
    assert!(failed.is_err());
    receive.recv().expect("the job ended without a panic")
}

/// What a wrapper says to a round trip: to the wrap if that fails, else to the unwrap.
fn round_trip(wrapper: &AzureKeyVault) -> Result<WrappedKey, KmsError> {
    let wrapper = wrapper.clone();
    with_payload(move |payload, cx| {
        let wrapped = wrapper.wrap_key(payload, cx)?;
        let opened = wrapper.unwrap_key(&wrapped, cx)?;
        assert!(opened.with_bytes(|new| payload.with_bytes(|old| new == old)).unwrap().unwrap());
        Ok(wrapped)
    })
}

/// Wraps with the service as it is, lets `change` change it, and unwraps.
fn unwrap_after(
    service: &Arc<FakeService>,
    change: impl FnOnce(&FakeService, &mut WrappedKey) + Send + 'static,
) -> Result<(), KmsError> {
    let service = Arc::clone(service);
    with_payload(move |payload, cx| {
        let mut wrapped = service.azure().wrap_key(payload, cx).expect("to wrap works");
        change(&service, &mut wrapped);
        service.azure().unwrap_key(&wrapped, cx).map(drop)
    })
}

fn class<T>(outcome: &Result<T, KmsError>) -> Option<KmsClass> {
    outcome.as_ref().err().map(|error| error.class)
}

fn text<T>(outcome: &Result<T, KmsError>) -> String {
    outcome.as_ref().err().map(|error| error.to_string()).unwrap_or_default()
}

/// A new directory, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pageseal-azure-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn rsa() -> Arc<FakeService> {
    Arc::new(FakeService::start(Kind::Rsa))
}

fn hsm() -> Arc<FakeService> {
    Arc::new(FakeService::start(Kind::Oct))
}

macro_rules! body {
    ($name:literal) => {
        include_str!(concat!("../bodies/azure/", $name))
    };
}

#[test]
fn an_rsa_key_needs_the_expected_cluster_id_and_an_aes_key_does_not() {
    for (service, expected) in [(rsa(), Some(ErrorKind::Misconfigured)), (hsm(), None)] {
        let place = Directory::new();
        let path = place.0.join("cluster");
        let wrappers = || Wrappers::one(service.azure().clone());
        let id = Cluster::create(&path, ClusterOptions::new(), wrappers()).unwrap().id();
        let without = Cluster::open(&path, ClusterOptions::new(), wrappers());
        assert_eq!(without.err().map(|error| error.kind()), expected);
        Cluster::open(&path, ClusterOptions::new().expected_id(id), wrappers()).unwrap();
    }
}

/// The figures of docs/kms/azure.md.
#[test]
fn what_calls_cost() {
    let service = rsa();
    let place = Directory::new();
    let path = place.0.join("cluster");
    let wrappers = || Wrappers::one(service.azure().clone());
    let counted = || {
        let mut world = service.fake.world();
        let count = |end: &str| world.log.iter().filter(|line| line.ends_with(end)).count();
        let counts = (count("/wrapkey"), count("/unwrapkey"), count("/token"));
        world.log.clear();
        counts
    };
    let cluster = Cluster::create(&path, ClusterOptions::new(), wrappers()).unwrap();
    let id = cluster.id();
    let create = counted();
    let orders = cluster.create_database("orders").unwrap();
    let database = counted();
    orders.rotate().unwrap();
    let rotate = counted();
    cluster.check_master_key().unwrap();
    let check = counted();
    cluster.rewrap(wrappers(), &|_| {}).unwrap();
    let rewrap = counted();
    drop((orders, cluster));
    let cluster = Cluster::open(&path, ClusterOptions::new().expected_id(id), wrappers()).unwrap();
    let open = counted();
    cluster.database("orders").unwrap();
    let open_database = counted();
    // (wrap, unwrap, token). The first wrap is sent twice: without a token, to be told for what a token is wanted.
    assert_eq!((create, database, rotate), ((2 + 1, 2, 1), (1, 1, 0), (1, 1, 0)));
    assert_eq!((check, open, open_database), ((0, 1, 0), (0, 1, 0), (0, 2, 0)));
    assert_eq!((rewrap.0, rewrap.2), (2, 0), "{rewrap:?}");
}

#[test]
fn the_version_is_recorded_and_used_after_a_rotation_at_the_service() {
    let service = rsa();
    let first = round_trip(service.azure()).unwrap();
    let current = service.fake.world().new_version(KEY);
    let second = round_trip(service.azure()).unwrap();
    assert_ne!(first.key_version, current);
    assert_eq!(second.key_version, current);
    assert_eq!(first.key_version.len(), 32);

    let outcome = unwrap_after(&service, move |service, wrapped| {
        service.fake.world().new_version(KEY);
        service.fake.world().log.clear();
        assert_eq!(wrapped.key_version, current);
    });
    assert!(outcome.is_ok());
    let expected = format!("POST /keys/{KEY}/{}/unwrapkey", second.key_version);
    assert_eq!(service.fake.world().log, [expected]);
}

#[test]
fn a_pinned_version_wraps_whatever_is_current() {
    let service = rsa();
    let first = round_trip(service.azure()).unwrap().key_version;
    service.fake.world().new_version(KEY);
    let pinned = service.builder(KEY).key_version(&first).build().unwrap();
    assert_eq!(round_trip(&pinned).unwrap().key_version, first);
    let absent = service.builder(KEY).key_version("0123456789abcdef0123456789abcdef").build().unwrap();
    let outcome = round_trip(&absent);
    assert_eq!(class(&outcome), Some(KmsClass::Misconfigured));
    assert!(text(&outcome).contains("PAGESEAL_AZURE_KEY_VERSION"));
    service.fake.world().delete(KEY);
    assert_eq!(class(&round_trip(&pinned)), Some(KmsClass::Deleted));
}

#[test]
fn a_version_that_could_reach_another_path_is_refused_without_a_call() {
    let service = rsa();
    for version in ["", "..", "../other/1", "a/b", "a%2fb", "a?x", "a#x", "a b", "ä", &"a".repeat(65), "{key-version}"]
    {
        let version = version.to_owned();
        let outcome = unwrap_after(&service, move |service, wrapped| {
            wrapped.key_version = version;
            service.fake.world().log.clear();
        });
        assert_eq!(class(&outcome), Some(KmsClass::BadCiphertext));
        assert_eq!(service.fake.world().log, Vec::<String>::new());
    }
}

#[test]
fn a_version_that_does_not_exist_is_no_deletion_while_the_key_is_there() {
    type Change = fn(&FakeService);
    let cases: [(&str, Change, KmsClass); 10] = [
        ("the key can be read", |_| {}, KmsClass::BadCiphertext),
        ("it is disabled", |service| service.fake.world().enable(KEY, false), KmsClass::BadCiphertext),
        ("it cannot be read, but wraps", |service| service.fake.world().may_read = false, KmsClass::BadCiphertext),
        (
            "it cannot be read, and is expired",
            |service| {
                service.fake.world().may_read = false;
                service.fake.world().expire(KEY, true);
            },
            KmsClass::BadCiphertext,
        ),
        (
            "nothing can be found out",
            |service| {
                service.fake.world().may_read = false;
                service.fake.world().may_wrap = false;
            },
            KmsClass::Unclassified,
        ),
        (
            "nothing can be found out, and the key is deleted",
            |service| {
                service.fake.world().may_read = false;
                service.fake.world().may_wrap = false;
                service.fake.world().delete(KEY);
            },
            KmsClass::Unclassified,
        ),
        ("it was deleted", |service| service.fake.world().delete(KEY), KmsClass::Deleted),
        (
            "it was deleted and cannot be read",
            |service| {
                service.fake.world().may_read = false;
                service.fake.world().delete(KEY);
            },
            KmsClass::Deleted,
        ),
        (
            "the vault fails when it is asked",
            |service| {
                let answer = Answer::json("500 Internal Server Error", body!("internal.json"));
                service.fake.world().says.push(("GET /keys/", answer));
            },
            KmsClass::Unreachable,
        ),
        (
            "the vault throttles when it is asked",
            |service| service.fake.world().says.push(("GET /keys/", azure::throttled(Duration::from_secs(3)))),
            KmsClass::Throttled,
        ),
    ];
    for (what, change, expected) in cases {
        let outcome = unwrap_after(&rsa(), move |service, wrapped| {
            wrapped.key_version = "0123456789abcdef0123456789abcdef".into();
            change(service);
        });
        assert_eq!(class(&outcome), Some(expected), "{what}: {}", text(&outcome));
    }
}

#[test]
fn a_record_of_another_key_or_length_is_refused_without_a_call() {
    type Change = fn(&mut WrappedKey);
    let service = rsa();
    let changes: [Change; 4] = [
        |wrapped| wrapped.master_key.key.push('x'),
        |wrapped| wrapped.blob = vec![0; 136],
        |wrapped| wrapped.blob = Vec::new(),
        |wrapped| wrapped.blob = vec![7; 4096],
    ];
    for change in changes {
        let outcome = unwrap_after(&service, move |service, wrapped| {
            change(wrapped);
            service.fake.world().log.clear();
        });
        assert_eq!(class(&outcome), Some(KmsClass::BadCiphertext));
        assert_eq!(service.fake.world().log, Vec::<String>::new());
    }
}

#[test]
fn a_key_of_another_place_is_refused_though_the_vault_unwraps_it() {
    for service in [rsa(), hsm()] {
        let classes = with_payload(move |payload, cx| {
            let wrapped = service.azure().wrap_key(payload, cx).unwrap();
            let mut contexts = vec![*cx; 4];
            contexts[0].generation = Generation::new(9).unwrap();
            contexts[1].cluster = pageseal::ClusterId::from_bytes([9; 16]);
            contexts[2].database = Some(pageseal::DatabaseId::from_bytes([9; 16]));
            contexts[3].purpose = pageseal::Purpose::Data;
            service.fake.world().log.clear();
            let refused: Vec<_> = contexts.iter().map(|cx| class(&service.azure().unwrap_key(&wrapped, cx))).collect();
            assert_eq!(service.fake.world().count("POST /keys/"), 4);
            // And what would never open is not wrapped.
            let wrapping: Vec<_> = contexts.iter().map(|cx| class(&service.azure().wrap_key(payload, cx))).collect();
            assert_eq!(service.fake.world().count("POST /keys/"), 4);
            assert_eq!(refused, wrapping);
            refused
        });
        assert_eq!(classes, [Some(KmsClass::BadCiphertext); 4]);
    }
}

/// Every body of tests/kms/bodies/azure that a vault may send, through the real client.
#[test]
fn every_answer_of_a_vault_has_its_class() {
    use KmsClass::*;
    // File, status, the class for a wrap, the class for an unwrap.
    let cases: [(&str, &str, KmsClass, KmsClass); 25] = [
        ("401 Unauthorized", body!("unauthorized.json"), Denied, Denied),
        ("401 Unauthorized", body!("token-expired.json"), Denied, Denied),
        ("403 Forbidden", body!("disabled.json"), Disabled, Disabled),
        ("403 Forbidden", body!("disabled-inner-error.json"), Disabled, Disabled),
        ("403 Forbidden", body!("disabled-no-inner.json"), Disabled, Disabled),
        ("403 Forbidden", body!("expired.json"), Misconfigured, Disabled),
        ("403 Forbidden", body!("not-yet-valid.json"), Misconfigured, Disabled),
        ("403 Forbidden", body!("operation-forbidden.json"), Denied, Denied),
        ("403 Forbidden", body!("rbac.json"), Denied, Denied),
        ("403 Forbidden", body!("policy.json"), Denied, Denied),
        ("403 Forbidden", body!("forbidden-by-policy.json"), Denied, Denied),
        ("403 Forbidden", body!("firewall.json"), Misconfigured, Misconfigured),
        ("403 Forbidden", body!("connection.json"), Misconfigured, Misconfigured),
        ("403 Forbidden", body!("proxy-403.html"), Unclassified, Unclassified),
        ("404 Not Found", body!("key-not-found.json"), Deleted, Deleted),
        ("404 Not Found", body!("proxy.html"), Unclassified, Unclassified),
        ("409 Conflict", body!("being-deleted.json"), Deleted, Deleted),
        ("409 Conflict", body!("deleted-but-recoverable.json"), Deleted, Deleted),
        ("409 Conflict", body!("being-recovered.json"), Unreachable, Unreachable),
        ("400 Bad Request", body!("bad-oaep.json"), Misconfigured, BadCiphertext),
        ("400 Bad Request", body!("bad-value.json"), Misconfigured, BadCiphertext),
        ("400 Bad Request", body!("bad-request.json"), Misconfigured, BadCiphertext),
        ("400 Bad Request", body!("wrong-algorithm.json"), Misconfigured, Misconfigured),
        ("500 Internal Server Error", body!("internal.json"), Unreachable, Unreachable),
        ("503 Service Unavailable", body!("proxy.html"), Unreachable, Unreachable),
    ];
    let service = rsa();
    let classes = with_payload(move |payload, cx| {
        let wrapped = service.azure().wrap_key(payload, cx).unwrap();
        let mut failures = Vec::new();
        for (status, body, wrap, unwrap) in cases {
            service.fake.world().vault_says = Some(Answer::json(status, body));
            let (wrapping, unwrapping) =
                (service.azure().wrap_key(payload, cx), service.azure().unwrap_key(&wrapped, cx));
            if (class(&wrapping), class(&unwrapping)) != (Some(wrap), Some(unwrap)) {
                let (wrapping, unwrapping) = (text(&wrapping), text(&unwrapping));
                failures.push(format!("{status} {body}: {wrapping} / {unwrapping}"));
            }
        }
        service.fake.world().vault_says = None;
        assert!(service.azure().unwrap_key(&wrapped, cx).is_ok());
        failures
    });
    assert!(classes.is_empty(), "{}", classes.join("\n"));
}

#[test]
fn a_401_that_is_no_verdict_on_the_identity_is_not_taken_for_one() {
    use KmsClass::*;
    let cases = [
        (body!("signing-key-unresolved.json"), Unreachable),
        (body!("wrong-issuer.json"), Misconfigured),
        (body!("wrong-audience.json"), Misconfigured),
    ];
    let service = rsa();
    round_trip(service.azure()).unwrap();
    for (body, expected) in cases {
        service.fake.world().vault_says = Some(Answer::json("401 Unauthorized", body));
        service.fake.world().log.clear();
        let outcome = round_trip(service.azure());
        assert_eq!(class(&outcome), Some(expected), "{}", text(&outcome));
        assert!(text(&outcome).contains("AKV100"), "{}", text(&outcome));
        assert_eq!(service.fake.world().count(&format!("POST /{TENANT}")), 0, "another token would not help");
    }
}

#[test]
fn a_token_endpoint_in_trouble_or_that_is_asked_too_often_refuses_nobody() {
    use KmsClass::*;
    let cases = [
        (body!("token-loop.json"), Throttled),
        (body!("token-issuer-unreachable.json"), Unreachable),
        (body!("token-transient.json"), Unreachable),
    ];
    let service = rsa();
    for (body, expected) in cases {
        service.fake.world().token_says = Some(Answer::json("400 Bad Request", body));
        let outcome = round_trip(service.azure());
        assert_eq!(class(&outcome), Some(expected), "{}", text(&outcome));
    }
}

#[test]
fn tokens_that_the_vault_refuses_are_not_asked_for_without_end() {
    let service = rsa();
    round_trip(service.azure()).unwrap();
    service.fake.world().log.clear();
    // A fresh token is refused, and a little later still is.
    service.fake.world().says.push(("POST /keys/", Answer::json("401 Unauthorized", body!("token-expired.json"))));
    for _ in 0..10 {
        assert_eq!(class(&round_trip(service.azure())), Some(KmsClass::Denied));
    }
    let asked = service.fake.world().count(&format!("POST /{TENANT}"));
    assert!(asked <= 2, "{asked} tokens for ten calls");
    // Other credentials are tried at once.
    service.fake.world().says.clear();
    service.azure().replace_credentials(good_credential()).unwrap();
    assert_eq!(class(&round_trip(service.azure())), None);
}

#[test]
fn a_firewall_is_known_by_its_text_and_an_unknown_refusal_is_no_revocation() {
    use KmsClass::*;
    let service = rsa();
    for (body, expected) in [(body!("firewall-no-inner.json"), Misconfigured), (body!("new-inner.json"), Unclassified)]
    {
        service.fake.world().vault_says = Some(Answer::json("403 Forbidden", body));
        let outcome = round_trip(service.azure());
        assert_eq!(class(&outcome), Some(expected), "{}", text(&outcome));
    }
}

#[test]
fn a_deletion_is_told_without_the_right_to_read_keys_by_a_version_that_was_there() {
    let outcome = unwrap_after(&rsa(), |service, _| {
        service.fake.world().may_read = false;
        service.fake.world().may_wrap = false;
        service.fake.world().delete(KEY);
    });
    assert_eq!(class(&outcome), Some(KmsClass::Deleted), "{}", text(&outcome));
    // A record that was changed is another thing, and says what would help.
    let outcome = unwrap_after(&rsa(), |service, wrapped| {
        service.fake.world().may_read = false;
        service.fake.world().may_wrap = false;
        wrapped.key_version = "0123456789abcdef0123456789abcdef".into();
    });
    assert_eq!(class(&outcome), Some(KmsClass::Unclassified), "{}", text(&outcome));
    assert!(text(&outcome).contains("keys/read"), "{}", text(&outcome));
}

#[test]
fn the_vaults_own_words_are_quoted_on_one_line() {
    let service = rsa();
    service.fake.world().vault_says = Some(Answer::json("403 Forbidden", body!("rbac.json")));
    let said = text(&round_trip(service.azure()));
    assert!(said.contains("HTTP 403 Forbidden/ForbiddenByRbac from Key Vault: Caller is not authorized"), "{said}");
    assert!(said.contains("access denied; check the credentials") && !said.contains(['\r', '\n']), "{said}");
    assert!(said.len() < 600, "{said}");
}

/// Every body that a token endpoint may send, through the real client.
#[test]
fn every_answer_of_the_token_endpoint_has_its_class() {
    use KmsClass::*;
    let cases = [
        ("401 Unauthorized", body!("token-wrong-secret.json"), Denied),
        ("401 Unauthorized", body!("token-expired-secret.json"), Denied),
        ("400 Bad Request", body!("token-no-application.json"), Denied),
        ("401 Unauthorized", body!("token-old-assertion.json"), Denied),
        ("400 Bad Request", body!("token-no-federation.json"), Denied),
        ("400 Bad Request", body!("token-no-tenant.json"), Misconfigured),
        ("400 Bad Request", body!("token-unavailable.json"), Unreachable),
        ("500 Internal Server Error", "", Unreachable),
        ("503 Service Unavailable", body!("proxy.html"), Unreachable),
        ("403 Forbidden", body!("proxy-403.html"), Unclassified),
        ("401 Unauthorized", "not JSON", Unclassified),
        ("200 OK", body!("proxy.html"), Unclassified),
        ("200 OK", "{}", Unclassified),
        ("302 Found", "", Unclassified),
    ];
    let service = rsa();
    for (status, body, expected) in cases {
        service.fake.world().token_says = Some(Answer::json(status, body));
        // Without the token that it has.
        service.azure().replace_credentials(good_credential()).unwrap();
        let outcome = round_trip(service.azure());
        // An empty token is one that the vault refuses.
        let expected = if body == "{}" { Denied } else { expected };
        assert_eq!(class(&outcome), Some(expected), "{status} {body}: {}", text(&outcome));
        assert!(!text(&outcome).contains(SECRET));
        service.fake.world().token_says = None;
        assert_eq!(class(&round_trip(service.azure())), None, "after {status} {body}");
    }
    service.azure().replace_credentials(good_credential()).unwrap();
    service.fake.world().token_says = Some(azure::throttled(Duration::from_secs(9)));
    let error = round_trip(service.azure()).unwrap_err();
    assert_eq!((error.class, error.retry_after), (KmsClass::Throttled, Some(Duration::from_secs(9))));
}

#[test]
fn a_token_endpoint_that_is_not_there_says_nothing_about_the_key() {
    let service = rsa();
    let way = Front::before(service.fake.address()).unwrap();
    let authority = format!("https://{}", way.address());
    for passage in [Passage::Refuse, Passage::Reset, Passage::Open] {
        way.set(passage.clone());
        let key = service.builder(KEY).authority_host(&authority).build().unwrap();
        let expected = (passage != Passage::Open).then_some(KmsClass::Unreachable);
        let outcome = round_trip(&key);
        assert_eq!(class(&outcome), expected, "{passage:?}: {}", text(&outcome));
    }
    way.set(Passage::Hang);
    let key = service.builder(KEY).authority_host(&authority).build().unwrap();
    let (class, took) = with_payload(move |payload, cx| {
        let start = Instant::now();
        let mut cx = *cx;
        cx.deadline = start + Duration::from_millis(400);
        (class(&key.wrap_key(payload, &cx)), start.elapsed())
    });
    assert_eq!(class, Some(KmsClass::Unreachable));
    assert!(took < Duration::from_secs(3), "{took:?}");
}

#[test]
fn a_token_that_was_revoked_while_it_was_kept_is_replaced_and_only_a_fresh_one_is_refused_for_good() {
    let service = rsa();
    assert!(round_trip(service.azure()).is_ok());
    for _ in 0..2 {
        service.fake.world().revoke_tokens();
        assert_eq!(class(&round_trip(service.azure())), None);
    }
    service.fake.world().vault_says = Some(Answer::json("401 Unauthorized", body!("token-expired.json")));
    assert_eq!(class(&round_trip(service.azure())), Some(KmsClass::Denied));
    service.fake.world().vault_says = None;
    assert_eq!(class(&round_trip(service.azure())), None);
    // Somebody in between who knows nothing of Key Vault.
    service.fake.world().vault_says = Some(Answer::json("401 Unauthorized", body!("proxy.html")));
    assert_eq!(class(&round_trip(service.azure())), Some(KmsClass::Unclassified));
}

#[test]
fn one_token_serves_many_calls_and_a_short_one_is_fetched_again() {
    let service = rsa();
    for _ in 0..5 {
        round_trip(service.azure()).unwrap();
    }
    assert_eq!(service.fake.world().count(&format!("POST /{TENANT}")), 1);
    service.fake.world().token_life = 60;
    service.azure().replace_credentials(good_credential()).unwrap();
    for _ in 0..3 {
        round_trip(service.azure()).unwrap();
    }
    assert!(service.fake.world().count(&format!("POST /{TENANT}")) > 3);
}

#[test]
fn credentials_are_replaced_in_every_clone_at_once() {
    let service = rsa();
    let clone = service.azure().clone();
    clone.replace_credentials(AzureCredential::client_secret(TENANT, CLIENT, "wrong")).unwrap();
    assert_eq!(class(&round_trip(service.azure())), Some(KmsClass::Denied));
    let error = service.azure().replace_credentials(AzureCredential::client_secret("no tenant!", CLIENT, SECRET));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Misconfigured);
    service.azure().replace_credentials(good_credential()).unwrap();
    assert_eq!(class(&round_trip(&clone)), None);
}

#[test]
fn a_workload_identity_reads_its_token_file_anew() {
    let service = rsa();
    let place = Directory::new();
    let file = place.0.join("token");
    let credential = AzureCredential::workload_identity(TENANT, CLIENT, &file);
    let key = service.builder(KEY).credential(credential).build().unwrap();
    let outcome = round_trip(&key);
    assert_eq!(class(&outcome), Some(KmsClass::Misconfigured));
    assert!(text(&outcome).contains(file.to_str().unwrap()));
    std::fs::write(&file, "\n").unwrap();
    assert_eq!(class(&round_trip(&key)), Some(KmsClass::Misconfigured));
    std::fs::write(&file, format!("{ASSERTION}\n")).unwrap();
    assert_eq!(class(&round_trip(&key)), None);
    // The platform puts a new one there, and the old one is not taken any more.
    service.fake.world().assertion = "the.next.assertion".into();
    service.fake.world().revoke_tokens();
    assert_eq!(class(&round_trip(&key)), Some(KmsClass::Denied));
    std::fs::write(&file, "the.next.assertion").unwrap();
    assert_eq!(class(&round_trip(&key)), None);
}

#[test]
fn an_expired_key_unwraps_and_says_why_it_does_not_wrap() {
    let service = rsa();
    let outcome = unwrap_after(&service, |service, _| service.fake.world().expire(KEY, true));
    assert_eq!(class(&outcome), None);
    let outcome = round_trip(service.azure());
    assert_eq!(class(&outcome), Some(KmsClass::Misconfigured));
    assert!(text(&outcome).contains("expired key"));
}

#[test]
fn a_disabled_version_is_told_while_others_work() {
    let service = rsa();
    let outcome = unwrap_after(&service, |service, wrapped| {
        service.fake.world().new_version(KEY);
        service.fake.world().enable_version(KEY, &wrapped.key_version, false);
    });
    assert_eq!(class(&outcome), Some(KmsClass::Disabled));
    assert_eq!(class(&round_trip(service.azure())), None);
}

#[test]
fn answers_that_are_not_key_vaults_are_told_and_show_nothing() {
    let service = rsa();
    let host = service.front.address();
    let kid = format!("https://{host}/keys/{KEY}/0123456789abcdef0123456789abcdef");
    let long = format!("{{\"kid\":\"{}\"}}", "x".repeat(70_000));
    let json = |value: String| Answer::json("200 OK", value);
    let answers = [
        json(String::new()),
        json("<html>".into()),
        json("{}".into()),
        json("[]".into()),
        json("null".into()),
        json(r#"{"kid":7,"value":"c2VjcmV0LXNlY3JldA"}"#.into()),
        json(format!(r#"{{"kid":"{kid}"}}"#)),
        json(format!(r#"{{"kid":"{kid}","value":"c2VjcmV0LXNlY3JldA"}}"#)),
        json(format!(r#"{{"kid":"{kid}","value":"*not base64*"}}"#)),
        json(format!(r#"{{"kid":"{kid}","value":"{}"}}"#, "A".repeat(342))),
        json(format!(r#"{{"kid":"https://{host}/keys/another/0123","value":"{}"}}"#, "A".repeat(342))),
        json(format!(r#"{{"kid":"https://{host}/keys/{KEY}/..","value":"{}"}}"#, "A".repeat(342))),
        json(format!(r#"{{"kid":"no URL","value":"{}"}}"#, "A".repeat(342))),
        json(long),
        Answer::json("204 No Content", ""),
        Answer::json("201 Created", r#"{"kid":"x","value":"c2VjcmV0LXNlY3JldA"}"#),
        Answer::json("302 Found", "").header("Location", "https://example.com/"),
    ];
    let failures = with_payload(move |payload, cx| {
        let wrapped = service.azure().wrap_key(payload, cx).unwrap();
        let mut failures = Vec::new();
        for answer in answers {
            service.fake.world().vault_says = Some(answer.clone());
            for outcome in
                [service.azure().wrap_key(payload, cx).map(drop), service.azure().unwrap_key(&wrapped, cx).map(drop)]
            {
                let class = class(&outcome);
                let text = format!("{outcome:?} {}", text(&outcome));
                // What wraps into 256 bytes of nothing is found out by the unwrap with which pageseal verifies each wrap.
                let wrapped_nothing = class.is_none() && answer.body.contains(&kid);
                let told = matches!(class, Some(KmsClass::Unclassified | KmsClass::BadCiphertext));
                if !(told || wrapped_nothing) || text.contains("c2VjcmV0") {
                    failures.push(format!("{:.100}: {text}", answer.body));
                }
            }
        }
        failures
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn an_untrusted_certificate_is_told_with_the_setting() {
    let service = rsa();
    let url = format!("https://{}", service.front.address());
    let key = AzureKeyVault::builder(&url, KEY).credential(good_credential()).authority_host(&url);
    let key = key.accept_any_challenge().build().unwrap();
    let outcome = round_trip(&key);
    assert_eq!(class(&outcome), Some(KmsClass::Misconfigured));
    let said = text(&outcome);
    assert!(said.contains("PAGESEAL_AZURE_CA_FILE") && said.contains("not trusted"), "{said}");
    // The right authority, and a name that the certificate does not have.
    let port = service.front.address().port();
    let key = AzureKeyVault::builder(format!("https://127.0.0.2:{port}"), KEY).ca_file(service.fake.certificate());
    let key = key.credential(good_credential()).accept_any_challenge().build().unwrap();
    // Nobody listens there; where somebody does, the certificate is refused.
    assert!(matches!(class(&round_trip(&key)), Some(KmsClass::Unreachable | KmsClass::Misconfigured)));
}

#[test]
fn a_challenge_for_another_domain_gets_no_token() {
    let service = rsa();
    let url = format!("https://{}", service.front.address());
    let key = AzureKeyVault::builder(&url, KEY).credential(good_credential()).authority_host(&url);
    let key = key.ca_file(service.fake.certificate()).build().unwrap();
    let outcome = round_trip(&key);
    assert_eq!(class(&outcome), Some(KmsClass::Misconfigured));
    assert!(text(&outcome).contains("accept_any_challenge"));
    assert_eq!(service.fake.world().count(&format!("POST /{TENANT}")), 0);
}

#[test]
fn a_wrong_algorithm_is_told() {
    let service = hsm();
    let key = service.builder(KEY).algorithm(pageseal::AzureAlgorithm::RsaOaep256).build().unwrap();
    let outcome = round_trip(&key);
    assert_eq!(class(&outcome), Some(KmsClass::Misconfigured));
    assert!(text(&outcome).contains("algorithm"));
}

#[test]
fn a_server_without_tls_is_told_as_no_connection() {
    let plain = HttpServer::plain(|_| Answer::json("200 OK", "{}"));
    let url = format!("https://{}", plain.address());
    let key = AzureKeyVault::builder(&url, KEY).credential(good_credential()).authority_host(&url);
    let key = key.accept_any_challenge().build().unwrap();
    assert_eq!(class(&round_trip(&key)), Some(KmsClass::Unreachable));
}

#[test]
fn neither_secrets_nor_tokens_are_shown() {
    let service = rsa();
    let shown = format!("{:?} {:?} {:?}", service.azure(), service.builder(KEY), good_credential());
    assert!(!shown.contains(SECRET) && shown.contains(KEY), "{shown}");
    service.azure().replace_credentials(AzureCredential::client_secret(TENANT, CLIENT, "hush-hush")).unwrap();
    let error = round_trip(service.azure()).unwrap_err();
    let mut shown = format!("{error} {error:?}");
    let mut next = std::error::Error::source(&error);
    while let Some(source) = next {
        shown.push_str(&format!("{source} {source:?}"));
        next = source.source();
    }
    assert!(!shown.contains("hush-hush"), "{shown}");
}

#[test]
fn nothing_process_wide_is_installed() {
    round_trip(rsa().azure()).unwrap();
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
}

/// Runs [`child`] as a process of its own, whose environment is this and nothing else, and returns what it said.
fn in_child(fake: &FakeKeyVault, variables: &[(&str, &str)]) -> String {
    let url = format!("https://{}", fake.address());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child", "--nocapture"]).env_clear();
    command.env("PATH", "/usr/bin:/bin").env("TMPDIR", std::env::temp_dir());
    command.env("PAGESEAL_TEST_CHILD", "1").env("PAGESEAL_AZURE_VAULT_URL", &url).env("PAGESEAL_AZURE_KEY", KEY);
    command.env("PAGESEAL_AZURE_ANY_CHALLENGE", "1").env("AZURE_AUTHORITY_HOST", &url);
    command.env("PAGESEAL_AZURE_CA_FILE", fake.certificate());
    command.envs(variables.iter().copied());
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let line = said.lines().find_map(|line| line.split_once("CHILD ")).map(|(_, line)| line.to_owned());
    line.unwrap_or_else(|| panic!("the child said {said} {}", String::from_utf8_lossy(&output.stderr)))
}

/// Not a test: what [`in_child`] runs.
#[test]
fn child() {
    if std::env::var_os("PAGESEAL_TEST_CHILD").is_none() {
        return;
    }
    match AzureKeyVault::from_env() {
        Err(error) => println!("\nCHILD settings {:?} {error}", error.kind()),
        Ok(key) => match round_trip(&key) {
            Ok(wrapped) => println!("\nCHILD ok {}", wrapped.key_version),
            Err(error) => println!("\nCHILD {:?} {error}", error.class),
        },
    }
}

#[test]
fn from_env_uses_the_client_secret_and_nothing_else_if_that_is_refused() {
    let fake = FakeKeyVault::start(Kind::Rsa);
    let identity = fake.identity_url();
    let with = |secret| {
        [
            ("AZURE_TENANT_ID", TENANT),
            ("AZURE_CLIENT_ID", CLIENT),
            ("AZURE_CLIENT_SECRET", secret),
            ("IDENTITY_ENDPOINT", identity.as_str()),
            ("IDENTITY_HEADER", "the-identity-header"),
        ]
    };
    let said = in_child(&fake, &with(SECRET));
    assert!(said.starts_with("ok "), "{said}");
    let said = in_child(&fake, &with("wrong"));
    assert!(said.starts_with("Denied ") && said.contains("AADSTS7000215"), "{said}");
    assert_eq!(fake.world().count("GET /msi/token"), 0);
    let said = in_child(&fake, &[("AZURE_CLIENT_SECRET", SECRET), ("AZURE_CLIENT_ID", CLIENT)]);
    assert!(said.starts_with("settings Misconfigured") && said.contains("AZURE_TENANT_ID"), "{said}");
}

#[test]
fn from_env_uses_a_workload_identity() {
    let fake = FakeKeyVault::start(Kind::Rsa);
    let place = Directory::new();
    let file = place.0.join("token");
    std::fs::write(&file, ASSERTION).unwrap();
    let variables = [
        ("AZURE_TENANT_ID", TENANT),
        ("AZURE_CLIENT_ID", CLIENT),
        ("AZURE_FEDERATED_TOKEN_FILE", file.to_str().unwrap()),
    ];
    let said = in_child(&fake, &variables);
    assert!(said.starts_with("ok "), "{said}");
}

#[test]
fn from_env_uses_a_managed_identity_whose_absence_is_no_verdict_of_the_vault() {
    let fake = FakeKeyVault::start(Kind::Rsa);
    let identity = fake.identity_url();
    let system = [("IDENTITY_ENDPOINT", identity.as_str()), ("IDENTITY_HEADER", "the-identity-header")];
    let said = in_child(&fake, &system);
    assert!(said.starts_with("ok "), "{said}");
    let user = |id| [system[0], system[1], ("AZURE_CLIENT_ID", id)];
    let said = in_child(&fake, &user(CLIENT));
    assert!(said.starts_with("ok "), "{said}");
    let said = in_child(&fake, &user("somebody-else"));
    assert!(said.starts_with("Misconfigured ") && said.contains("No User Assigned"), "{said}");
    let answers = [
        ("Misconfigured", Answer::json("400 Bad Request", body!("identity-not-found.json"))),
        ("Throttled", Answer::json("429 Too Many Requests", body!("identity-throttled.json"))),
        ("Unreachable", Answer::json("500 Internal Server Error", "")),
        ("Unreachable", Answer::json("410 Gone", "")),
        ("Unclassified", Answer::json("403 Forbidden", body!("proxy-403.html"))),
    ];
    for (expected, answer) in answers {
        fake.world().token_says = Some(answer);
        let start = Instant::now();
        let said = in_child(&fake, &system);
        assert!(said.starts_with(expected), "{said}");
        assert!(start.elapsed() < Duration::from_secs(5), "the SDK repeats by itself");
        assert!(said.contains("AZURE_CLIENT_SECRET is not set"), "{said}");
    }
}

#[test]
fn from_env_asks_the_azure_cli_last_and_says_why_nothing_gave_a_token() {
    let fake = FakeKeyVault::start(Kind::Rsa);
    // An identity endpoint where nobody listens, so that the machine's own is not waited for.
    let nobody = format!("http://127.0.0.1:{}/msi/token", pageseal_kms_tests::server::free_port());
    let place = Directory::new();
    let az = place.0.join("az");
    let path = format!("{}:/usr/bin:/bin", place.0.display());
    let variables = [("IDENTITY_ENDPOINT", nobody.as_str()), ("IDENTITY_HEADER", "x"), ("PATH", path.as_str())];
    let said = in_child(&fake, &variables);
    assert!(said.starts_with("Unreachable ") && said.contains("az not found on PATH"), "{said}");
    for part in ["AZURE_CLIENT_SECRET is not set", "AZURE_FEDERATED_TOKEN_FILE is not set", "managed identity: "] {
        assert!(said.contains(part), "{said}");
    }
    let script = |text: String| {
        std::fs::write(&az, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&az, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    };
    script("echo \"ERROR: Please run 'az login' to setup account.\" >&2; exit 1".into());
    let said = in_child(&fake, &variables);
    assert!(said.starts_with("Unreachable ") && said.contains("az login"), "{said}");
    let token = fake.world().give();
    let answer = format!(r#"{{"accessToken": "{token}", "expires_on": 4102444800, "tokenType": "Bearer"}}"#);
    script(format!("echo '{answer}'"));
    let said = in_child(&fake, &variables);
    assert!(said.starts_with("ok "), "{said}");
}

#[test]
fn an_identity_endpoint_in_trouble_lets_nobody_else_answer_for_it() {
    let fake = FakeKeyVault::start(Kind::Rsa);
    let way = Front::before(fake.identity_url()[7..].trim_end_matches("/msi/token").parse().unwrap()).unwrap();
    let identity = format!("http://{}/msi/token", way.address());
    let place = Directory::new();
    // Somebody is logged in to the Azure CLI, and could use the key.
    let (az, marker) = (place.0.join("az"), place.0.join("asked"));
    let token = fake.world().give();
    let script = format!(
        "#!/bin/sh\ntouch {}\necho '{{\"accessToken\": \"{token}\", \"expires_on\": 4102444800, \"tokenType\": \"Bearer\"}}'\n",
        marker.display()
    );
    std::fs::write(&az, script).unwrap();
    std::fs::set_permissions(&az, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let path = format!("{}:/usr/bin:/bin", place.0.display());
    let variables =
        [("IDENTITY_ENDPOINT", identity.as_str()), ("IDENTITY_HEADER", "the-identity-header"), ("PATH", &path)];
    let answers = [
        ("Unreachable", Answer::json("500 Internal Server Error", "")),
        ("Unreachable", Answer::json("410 Gone", "")),
        ("Throttled", Answer::json("429 Too Many Requests", body!("identity-throttled.json"))),
        ("Unclassified", Answer::json("403 Forbidden", body!("proxy-403.html"))),
    ];
    for (expected, answer) in answers {
        fake.world().token_says = Some(answer);
        let said = in_child(&fake, &variables);
        assert!(said.starts_with(expected) && said.contains("Azure CLI: not asked"), "{said}");
    }
    fake.world().token_says = None;
    for passage in [Passage::Hang, Passage::Reset] {
        way.set(passage);
        let said = in_child(&fake, &variables);
        assert!(said.starts_with("Unreachable"), "{said}");
    }
    assert!(!marker.exists());
    // Who has no such identity, as a developer's machine, says so.
    way.set(Passage::Open);
    fake.world().token_says = Some(Answer::json("400 Bad Request", body!("identity-not-found.json")));
    let said = in_child(&fake, &variables);
    assert!(said.starts_with("ok ") && marker.exists(), "{said}");
    // Or is told to ask nobody else.
    let with = |value| [variables[0], variables[1], variables[2], ("AZURE_TOKEN_CREDENTIALS", value)];
    fake.world().token_says = Some(Answer::json("500 Internal Server Error", ""));
    for value in ["dev", "AzureCliCredential"] {
        let said = in_child(&fake, &with(value));
        assert!(said.starts_with("ok "), "{said}");
    }
    fake.world().token_says = Some(Answer::json("400 Bad Request", body!("identity-not-found.json")));
    let said = in_child(&fake, &with("prod"));
    assert!(said.starts_with("Misconfigured ") || said.starts_with("Denied "), "{said}");
    let said = in_child(&fake, &with("VisualStudioCredential"));
    assert!(said.starts_with("settings Misconfigured") && said.contains("AZURE_TOKEN_CREDENTIALS"), "{said}");
}

#[test]
fn from_env_names_the_variable_that_is_wrong() {
    let fake = FakeKeyVault::start(Kind::Oct);
    let cases = [
        ("PAGESEAL_AZURE_VAULT_URL", ""),
        ("PAGESEAL_AZURE_VAULT_URL", "contoso"),
        ("PAGESEAL_AZURE_VAULT_URL", "http://contoso.vault.azure.net"),
        ("PAGESEAL_AZURE_VAULT_URL", "https://contoso.vault.azure.net/keys/k"),
        ("PAGESEAL_AZURE_KEY", "a/b"),
        ("PAGESEAL_AZURE_KEY_VERSION", "a/b"),
        ("PAGESEAL_AZURE_ALGORITHM", "RSA1_5"),
        ("PAGESEAL_AZURE_CA_FILE", "/nonexistent"),
        ("PAGESEAL_AZURE_ANY_CHALLENGE", "yes"),
        ("AZURE_AUTHORITY_HOST", "http://login.example"),
    ];
    for (name, value) in cases {
        let said = in_child(&fake, &[(name, value)]);
        // A file is named by its path.
        let named = said.contains(name) || said.contains("CA file /nonexistent");
        assert!(said.starts_with("settings Misconfigured") && named, "{name}={value}: {said}");
    }
    let variables = [
        ("PAGESEAL_AZURE_ALGORITHM", "A256KW"),
        ("AZURE_TENANT_ID", TENANT),
        ("AZURE_CLIENT_ID", CLIENT),
        ("AZURE_CLIENT_SECRET", SECRET),
    ];
    let said = in_child(&fake, &variables);
    assert!(said.starts_with("ok "), "{said}");
}
