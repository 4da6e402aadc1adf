//! AWS KMS beyond the rows of the conformance suite.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pageseal::testing::conformance::{Front, Passage, context, payload};
use pageseal::{
    AwsCredentials, AwsKms, Cluster, ClusterOptions, KeyPayload, KeyWrapper, KmsClass, WrapContext, WrappedKey,
    Wrappers,
};
use pageseal_kms_tests::aws::fake::{ARN, FakeKms, KEY, ok, refusal};
use pageseal_kms_tests::aws::{Emulator, OTHER_REGION, REGION};
use pageseal_kms_tests::http::{Answer, HttpServer};
use pageseal_kms_tests::server::free_port;
use serde_json::json;

/// Calls `f` with a payload, and a context whose deadline is in `timeout`.
fn on_call<T>(timeout: Duration, f: impl FnOnce(&KeyPayload, &WrapContext<'_>) -> T) -> T {
    f(&payload(), &context(timeout))
}

/// A blob as the adapter makes them.
fn blob(arn: &str, ciphertext: &[u8]) -> Vec<u8> {
    [&[1, arn.len() as u8], arn.as_bytes(), ciphertext].concat()
}

/// The ARN in a blob.
fn arn_in(wrapped: &WrappedKey) -> &str {
    std::str::from_utf8(&wrapped.blob[2..][..usize::from(wrapped.blob[1])]).unwrap()
}

fn ciphertext_in(wrapped: &WrappedKey) -> &[u8] {
    &wrapped.blob[2 + usize::from(wrapped.blob[1])..]
}

const LONG: Duration = Duration::from_secs(30);

struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("pageseal-aws-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn is_same(payload: &KeyPayload, other: &KeyPayload) -> bool {
    payload.with_bytes(|bytes| other.with_bytes(|others| bytes == others).unwrap()).unwrap()
}

/// Wraps with one wrapper and unwraps with another; how that failed.
fn from_to(from: &AwsKms, to: &AwsKms) -> Option<(KmsClass, String)> {
    let (from, to) = (from.clone(), to.clone());
    on_call(LONG, move |payload, cx| {
        let wrapped = from.wrap_key(payload, cx).unwrap();
        match to.unwrap_key(&wrapped, cx) {
            Ok(opened) => {
                assert!(is_same(&opened, payload));
                None
            }
            Err(error) => Some((error.class, error.to_string())),
        }
    })
}

/// How an unwrapping by `wrapper` fails of what it wrapped before `spoil`.
fn refusal_after(wrapper: &AwsKms, spoil: impl FnOnce(&mut WrappedKey) + Send + 'static) -> (KmsClass, String) {
    let wrapper = wrapper.clone();
    on_call(LONG, move |payload, cx| {
        let mut wrapped = wrapper.wrap_key(payload, cx).unwrap();
        spoil(&mut wrapped);
        let error = wrapper.unwrap_key(&wrapped, cx).err().expect("it is refused");
        (error.class, error.to_string())
    })
}

#[test]
fn the_forms_of_a_keys_name_open_each_others_wrappings() {
    let emulator = Emulator::ministack().unwrap();
    let arn = format!("arn:aws:kms:{REGION}:000000000000:key/{}", emulator.key());
    let alias_arn = format!("arn:aws:kms:{REGION}:000000000000:alias/pageseal");
    emulator.call(REGION, "CreateAlias", json!({ "AliasName": "alias/pageseal", "TargetKeyId": emulator.key() }));
    let forms = [emulator.key(), &arn, "alias/pageseal", &alias_arn];
    let wrappers = forms.map(|form| emulator.builder(form).build().unwrap());
    for from in &wrappers {
        for to in &wrappers {
            assert_eq!(from_to(from, to), None, "{from:?} {to:?}");
        }
    }
    let ids = wrappers.each_ref().map(|wrapper| wrapper.id().key);
    assert_eq!(ids, [emulator.key(), emulator.key(), "alias/pageseal", &alias_arn], "an id and its ARN are one key");

    // The alias moves to another key: what it wrapped before still opens, by the key that wrapped it.
    let alias = wrappers[2].clone();
    let next = emulator.make_key(json!({}));
    let by_next = emulator.builder(&next).build().unwrap();
    on_call(LONG, {
        let (emulator, next) = (Arc::new(emulator), next.clone());
        move |payload, cx| {
            let before = alias.wrap_key(payload, cx).unwrap();
            emulator.call(REGION, "UpdateAlias", json!({ "AliasName": "alias/pageseal", "TargetKeyId": next }));
            let after = alias.wrap_key(payload, cx).unwrap();
            assert_ne!(arn_in(&before), arn_in(&after));
            assert!(is_same(&alias.unwrap_key(&before, cx).unwrap(), payload));
            assert!(is_same(&by_next.unwrap_key(&after, cx).unwrap(), payload));
            assert_eq!(by_next.unwrap_key(&before, cx).err().unwrap().class, KmsClass::BadCiphertext);
            let moved = alias.rewrap_key(&before, cx).unwrap();
            assert_eq!(arn_in(&moved), arn_in(&after));
            assert!(is_same(&by_next.unwrap_key(&moved, cx).unwrap(), payload));
        }
    });
}

#[test]
fn a_replica_in_another_region_opens_what_a_multi_region_key_wrapped() {
    let emulator = Emulator::ministack().unwrap();
    let key = emulator.make_key(json!({ "MultiRegion": true }));
    emulator.call(REGION, "ReplicateKey", json!({ "KeyId": key, "ReplicaRegion": OTHER_REGION }));
    let arn = |region: &str| format!("arn:aws:kms:{region}:000000000000:key/{key}");
    let here = [key.clone(), arn(REGION)].map(|name| emulator.builder(&name).build().unwrap());
    let there = |name: &str| {
        let builder = emulator.anonymous(name).region(OTHER_REGION).credentials(emulator.credentials());
        builder.build().unwrap()
    };
    let there = [there(&key), there(&arn(OTHER_REGION))];
    for (from, to) in here.iter().flat_map(|here| there.iter().map(move |there| (here, there))) {
        assert_eq!((from_to(from, to), from_to(to, from)), (None, None), "{from:?} {to:?}");
        assert_eq!(from.id(), to.id());
    }
}

#[test]
fn a_rewrap_is_one_call_that_hands_no_payload_out_and_decrypts_only_where_it_must() {
    let fake = Arc::new(FakeKms::start());
    let wrapper = fake.builder(KEY).build().unwrap();
    on_call(LONG, {
        let fake = Arc::clone(&fake);
        move |payload, cx| {
            let wrapped = wrapper.wrap_key(payload, cx).unwrap();
            fake.calls();
            let rewrapped = wrapper.rewrap_key(&wrapped, cx).unwrap();
            let requests = fake.requests();
            assert_eq!(requests.len(), 1);
            let (call, body) = &requests[0];
            assert_eq!(call, "ReEncrypt");
            assert_eq!((&body["SourceKeyId"], &body["DestinationKeyId"]), (&json!(KEY), &json!(KEY)));
            assert_eq!(body["SourceEncryptionContext"], body["DestinationEncryptionContext"]);
            assert!(is_same(&wrapper.unwrap_key(&rewrapped, cx).unwrap(), payload));
            for code in ["AccessDeniedException", "UnknownOperationException"] {
                fake.script(move |call, _| (call == "ReEncrypt").then(|| refusal(code, "not permitted")));
                fake.calls();
                let rewrapped = wrapper.rewrap_key(&wrapped, cx).unwrap();
                assert_eq!(fake.calls(), ["ReEncrypt", "Decrypt", "Encrypt"]);
                assert!(is_same(&wrapper.unwrap_key(&rewrapped, cx).unwrap(), payload));
            }
            // Without that right too, it is denied.
            fake.script(|call, _| (call != "Encrypt").then(|| refusal("AccessDeniedException", "not permitted")));
            assert_eq!(wrapper.rewrap_key(&wrapped, cx).unwrap_err().class, KmsClass::Denied);
        }
    });
}

#[test]
fn an_error_is_read_in_every_form_that_aws_sends_it_in() {
    let fake = FakeKms::start();
    let wrapper = fake.builder(KEY).build().unwrap();
    let body = |body: &str| Answer { status: "400 Bad Request".into(), headers: Vec::new(), body: body.into() };
    let xml = "<?xml version=\"1.0\"?><ErrorResponse><Error><Code>InvalidClientTokenId</Code><Message>The security token \
               included in the request is invalid.</Message></Error></ErrorResponse>";
    let s3 = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>";
    let html = "<html><body>Forbidden by your administrator</body></html>";
    let with = |status: &str, text: &str| Answer { status: status.into(), ..body(text) };
    let cases: Vec<(Answer, KmsClass, &str)> = vec![
        (refusal("DisabledException", "arn is disabled."), KmsClass::Disabled, "DisabledException: arn is disabled."),
        (refusal("com.amazonaws.kms#DisabledException", "x"), KmsClass::Disabled, "DisabledException: x"),
        (
            body("{\"message\":\"x\"}").header("x-amzn-errortype", "DisabledException:http://internal.amazon.com/"),
            KmsClass::Disabled,
            "DisabledException: x",
        ),
        (
            body("").header("x-amzn-errortype", "com.amazonaws.kms#DisabledException"),
            KmsClass::Disabled,
            "DisabledException",
        ),
        (body("{\"code\":\"DisabledException\",\"Message\":\"x\"}"), KmsClass::Disabled, "DisabledException: x"),
        (
            refusal("DisabledException", "x").header("x-amzn-query-error", "Disabled;Sender"),
            KmsClass::Disabled,
            "Disabled",
        ),
        (with("403 Forbidden", xml), KmsClass::Denied, "InvalidClientTokenId: The security token included"),
        (with("403 Forbidden", s3), KmsClass::Misconfigured, "AccessDenied: Access Denied.; is the endpoint AWS KMS?"),
        (
            with("403 Forbidden", "{\"message\":\"Missing Authentication Token\"}")
                .header("x-amzn-errortype", "MissingAuthenticationTokenException"),
            KmsClass::Misconfigured,
            "is the endpoint AWS KMS?",
        ),
        (with("403 Forbidden", html), KmsClass::Unclassified, "HTTP 403, without an error code of AWS"),
        (with("404 Not Found", html), KmsClass::Misconfigured, "is the endpoint AWS KMS?"),
        (with("502 Bad Gateway", html), KmsClass::Unreachable, "HTTP 502"),
        (with("500 Internal Server Error", ""), KmsClass::Unreachable, "HTTP 500"),
        (with("429 Too Many Requests", "slow down"), KmsClass::Throttled, "HTTP 429"),
        (
            refusal("ExpiredTokenException", "The security token included in the request is expired"),
            KmsClass::Denied,
            "is expired",
        ),
        (refusal("KMSInternalException", ""), KmsClass::Unreachable, "KMSInternalException"),
        (refusal("KeyUnavailableException", ""), KmsClass::Unreachable, "KeyUnavailableException"),
        (refusal("IncorrectKeyException", ""), KmsClass::BadCiphertext, "IncorrectKeyException"),
        (refusal("InvalidKeyUsageException", ""), KmsClass::Misconfigured, "a symmetric encryption key is needed"),
        (refusal("NotFoundException", "Key is not found"), KmsClass::Deleted, "or it never existed in this account"),
        (refusal("SomethingNewException", ""), KmsClass::Unclassified, "SomethingNewException"),
        (with("200 OK", "{\"Plaintext\": garbage"), KmsClass::Unclassified, "an answer that cannot be read"),
        (with("200 OK", html), KmsClass::Unclassified, "an answer that cannot be read"),
        (ok(json!({ "KeyId": ARN })), KmsClass::BadCiphertext, "decrypted it to 0 bytes"),
        (ok(json!({ "KeyId": ARN, "Plaintext": "c2hvcnQ=" })), KmsClass::BadCiphertext, "decrypted it to 5 bytes"),
        (ok(json!({ "KeyId": ARN, "Plaintext": "*not base64*" })), KmsClass::Unclassified, "cannot be read"),
        (
            ok(json!({ "KeyId": ARN.replace("1234abcd", "00000000"), "Plaintext": "c2hvcnQ=" })),
            KmsClass::BadCiphertext,
            "decrypted it under",
        ),
        (ok(json!({ "Plaintext": "c2hvcnQ=" })), KmsClass::BadCiphertext, "decrypted it under"),
        (ok(json!({ "Plaintext": "A".repeat(100_000) })), KmsClass::Unclassified, "longer than 65536 bytes"),
    ];
    for (answer, class, text) in cases {
        let shown = format!("{answer:?}");
        fake.script(move |call, _| (call == "Decrypt").then(|| answer.clone()));
        let (got, said) = refusal_after(&wrapper, |_| ());
        assert!(got == class && said.contains(text), "{shown:.300}: {got:?}: {said}");
    }
}

#[test]
fn an_answer_that_wraps_nothing_is_not_taken() {
    let fake = FakeKms::start();
    let wrapper = fake.builder(KEY).build().unwrap();
    let other = ARN.replace("1234abcd", "00000000");
    for (answer, text) in [
        (json!({ "KeyId": ARN }), "a ciphertext of 0 bytes"),
        (json!({ "KeyId": ARN, "CiphertextBlob": "AAAA".repeat(2000) }), "a ciphertext of 6000 bytes"),
        (json!({ "CiphertextBlob": "AAAA" }), "which is no ARN of a key"),
        (json!({ "KeyId": KEY, "CiphertextBlob": "AAAA" }), "which is no ARN of a key"),
        (json!({ "KeyId": other, "CiphertextBlob": "AAAA" }), "and was asked for"),
        (json!([]), "cannot be read"),
    ] {
        fake.script(move |_, _| Some(ok(answer.clone())));
        let wrapper = wrapper.clone();
        let error = on_call(LONG, move |payload, cx| wrapper.wrap_key(payload, cx).unwrap_err());
        assert_eq!(error.class, KmsClass::Unclassified);
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn the_state_of_a_key_is_asked_for_and_told() {
    let fake = FakeKms::start();
    let wrapper = fake.builder(KEY).build().unwrap();
    let cases = [
        (Some("PendingDeletion"), KmsClass::Deleted, "cancel that"),
        (Some("PendingReplicaDeletion"), KmsClass::Deleted, "its last replica"),
        (Some("PendingImport"), KmsClass::Deleted, "import the same material again"),
        (Some("Disabled"), KmsClass::Disabled, "the key is disabled"),
        (Some("Unavailable"), KmsClass::Unreachable, "key store"),
        (Some("Updating"), KmsClass::Unreachable, "just changing"),
        (Some("Haunted"), KmsClass::Deleted, "is pending deletion"),
        // Without the right to ask, the message counts.
        (None, KmsClass::Deleted, "is pending deletion"),
    ];
    for (state, class, text) in cases {
        fake.script(move |call, _| match (call, state) {
            ("Decrypt", _) => Some(refusal("KMSInvalidStateException", "arn:... is pending deletion.")),
            ("DescribeKey", Some(state)) => {
                Some(ok(json!({ "KeyMetadata": { "KeyId": KEY, "Arn": ARN, "KeyState": state } })))
            }
            ("DescribeKey", None) => Some(refusal("AccessDeniedException", "no")),
            _ => None,
        });
        let (got, said) = refusal_after(&wrapper, |_| ());
        assert!(got == class && said.contains(text), "{state:?}: {got:?}: {said}");
    }
}

#[test]
fn a_changed_record_is_a_bad_one_and_never_a_revocation() {
    let fake = Arc::new(FakeKms::start());
    let by_id = fake.builder(KEY).build().unwrap();
    let by_alias = fake.builder("alias/x").build().unwrap();
    let other = ARN.replace("1234abcd", "00000000");
    // Told without a call.
    let elsewhere = ARN.replace("eu-west-1", "us-east-1");
    let told = [(&by_alias, ""), (&by_alias, "x"), (&by_alias, "alias/x"), (&by_alias, &elsewhere), (&by_id, &other)];
    for (wrapper, arn) in told {
        let (arn, seen) = (arn.to_owned(), Arc::clone(&fake));
        let spoil = move |wrapped: &mut WrappedKey| {
            wrapped.blob = blob(&arn, ciphertext_in(wrapped));
            seen.calls();
        };
        assert_eq!(refusal_after(wrapper, spoil).0, KmsClass::BadCiphertext);
        assert_eq!(fake.calls(), [""; 0]);
    }
    // The right key under a wrong place: it opens, and is refused all the same.
    let spoil = |wrapped: &mut WrappedKey| wrapped.blob = blob(&ARN.replace("1111", "4444"), ciphertext_in(wrapped));
    let (class, text) = refusal_after(&by_id, spoil);
    assert!(class == KmsClass::BadCiphertext && text.contains("decrypted it under"), "{text}");
    // By an alias, the service is asked; a key that is not the alias's cannot revoke.
    for code in ["NotFoundException", "AccessDeniedException"] {
        let theirs = other.clone();
        fake.script(move |_, body| (body["KeyId"] == json!(theirs)).then(|| refusal(code, "no")));
        let theirs = other.clone();
        let (class, text) =
            refusal_after(&by_alias, move |wrapped| wrapped.blob = blob(&theirs, ciphertext_in(wrapped)));
        assert!(class == KmsClass::Misconfigured && text.contains("alias/x points to the key 1234abcd"), "{text}");
    }
    // The alias's own key can.
    for (code, class) in [("NotFoundException", KmsClass::Deleted), ("AccessDeniedException", KmsClass::Denied)] {
        fake.script(move |call, body| (call == "Decrypt" || body["KeyId"] == json!(ARN)).then(|| refusal(code, "no")));
        assert_eq!(refusal_after(&by_alias, |_| ()).0, class);
    }
    // A blob that is denied while a fresh one is not; and a right that is gone.
    fake.script(|call, body| {
        let bad = body["CiphertextBlob"] == json!("YmFk");
        (call == "Decrypt" && bad)
            .then(|| refusal("AccessDeniedException", "The ciphertext refers to a customer master key"))
    });
    let (class, text) = refusal_after(&by_id, |wrapped| wrapped.blob = blob(ARN, b"bad"));
    assert!(class == KmsClass::BadCiphertext && text.contains("a fresh one is not"), "{text}");
    fake.script(|call, _| (call == "Decrypt").then(|| refusal("AccessDeniedException", "no")));
    assert_eq!(refusal_after(&by_id, |_| ()).0, KmsClass::Denied);
}

#[test]
fn a_key_that_an_alias_pointed_to_counts_as_long_as_it_is_known_to_have_wrapped() {
    let fake = FakeKms::start();
    let next = ARN.replace("1234abcd", "00000000");
    let describe = json!({ "KeyMetadata": { "KeyId": &next[next.len() - 36..], "Arn": next, "KeyState": "Enabled" } });
    for (code, class) in [
        ("AccessDeniedException", KmsClass::Denied),
        ("NotFoundException", KmsClass::Deleted),
        ("DisabledException", KmsClass::Disabled),
    ] {
        let wrapper = fake.builder("alias/x").build().unwrap();
        let wrapped = wrapper.wrap_key(&payload(), &context(LONG)).unwrap();
        let describe = describe.clone();
        fake.script(move |call, body| match call {
            "DescribeKey" => Some(ok(describe.clone())),
            _ => (body["KeyId"] == json!(ARN)).then(|| refusal(code, "no")),
        });
        // One that has just started cannot tell it from whatever key was written into the record.
        let started = fake.builder("alias/x").build().unwrap();
        let of = |wrapper: &AwsKms| wrapper.unwrap_key(&wrapped, &context(LONG)).err().unwrap().class;
        assert_eq!((of(&wrapper), of(&started)), (class, KmsClass::Misconfigured), "{code}");
        fake.script(|_, _| None);
        assert!(started.unwrap_key(&wrapped, &context(LONG)).is_ok());
        fake.script(move |call, _| (call != "DescribeKey").then(|| refusal(code, "no")));
        assert_eq!(of(&started), class, "{code}");
        fake.script(|_, _| None);
    }
}

#[test]
fn a_key_of_another_account_opens_nothing_by_an_alias() {
    let fake = FakeKms::start();
    let theirs = ARN.replace("111122223333", "999999999999");
    let plaintext = payload().with_bytes(|bytes| STANDARD.encode(bytes)).unwrap();
    let answer = json!({ "KeyId": theirs, "Plaintext": plaintext });
    let rewrapped = json!({ "KeyId": ARN, "SourceKeyId": theirs, "CiphertextBlob": "AAAA" });
    let script = move |may_describe: bool| {
        let (answer, rewrapped) = (answer.clone(), rewrapped.clone());
        fake.script(move |call, _| match call {
            "Decrypt" => Some(ok(answer.clone())),
            "ReEncrypt" => Some(ok(rewrapped.clone())),
            "DescribeKey" if !may_describe => Some(refusal("AccessDeniedException", "no")),
            _ => None,
        });
        fake.builder("alias/x").build().unwrap()
    };
    let wrapped = |wrapper: &AwsKms| WrappedKey {
        master_key: wrapper.id(),
        key_version: String::new(),
        blob: blob(&theirs, b"chosen by them"),
    };
    let wrapper = script(true);
    let error = wrapper.unwrap_key(&wrapped(&wrapper), &context(LONG)).err().unwrap();
    assert!(error.class == KmsClass::BadCiphertext && error.to_string().contains("another account"), "{error}");
    let wrapper = script(true);
    let error = wrapper.rewrap_key(&wrapped(&wrapper), &context(LONG)).unwrap_err();
    assert!(error.class == KmsClass::BadCiphertext && error.to_string().contains("another account"), "{error}");
    let wrapper = script(false);
    let error = wrapper.unwrap_key(&wrapped(&wrapper), &context(LONG)).err().unwrap();
    assert!(error.class == KmsClass::Misconfigured && error.to_string().contains("kms:DescribeKey"), "{error}");
}

#[test]
fn a_rewrap_tells_of_which_key_it_was_refused() {
    let fake = FakeKms::start();
    let next = ARN.replace("1234abcd", "00000000");
    let wrapper = fake.builder("alias/x").build().unwrap();
    let wrapped = wrapper.wrap_key(&payload(), &context(LONG)).unwrap();
    // The key that the alias points to is scheduled for deletion; the one that wrapped is well.
    fake.script(move |call, body| match (call, &body["KeyId"] == "alias/x") {
        ("ReEncrypt", _) | ("Encrypt", true) => Some(refusal("KMSInvalidStateException", "arn is pending deletion.")),
        ("DescribeKey", true) => {
            Some(ok(json!({ "KeyMetadata": { "KeyId": "x", "Arn": next, "KeyState": "PendingDeletion" } })))
        }
        _ => None,
    });
    let error = wrapper.rewrap_key(&wrapped, &context(LONG)).unwrap_err();
    assert!(error.class == KmsClass::Deleted && error.to_string().contains("cancel that"), "{error}");
    // The alias is gone.
    fake.script(move |call, body| {
        let refused = call == "ReEncrypt" || &body["KeyId"] == "alias/x";
        refused.then(|| refusal("NotFoundException", "Alias alias/x is not found."))
    });
    let error = wrapper.rewrap_key(&wrapped, &context(LONG)).unwrap_err();
    assert!(error.class == KmsClass::Misconfigured && error.to_string().contains("no such alias"), "{error}");
}

#[test]
fn what_an_external_key_store_refuses_is_not_called_a_change_of_state() {
    let fake = FakeKms::start();
    let wrapper = fake.builder(KEY).build().unwrap();
    let message = "The external key manager refused: the external key is disabled in its external key manager";
    fake.script(move |call, _| (call == "Decrypt").then(|| refusal("KMSInvalidStateException", message)));
    let (class, said) = refusal_after(&wrapper, |_| ());
    assert!(class == KmsClass::Unclassified && said.contains("disable the KMS key"), "{class:?} {said}");
}

#[test]
fn an_alias_that_is_not_there_is_a_setting() {
    let fake = FakeKms::start();
    fake.script(|_, _| Some(refusal("NotFoundException", "Alias alias/x is not found.")));
    let wrapper = fake.builder("alias/x").build().unwrap();
    let error = on_call(LONG, move |payload, cx| wrapper.wrap_key(payload, cx).unwrap_err());
    assert_eq!(error.class, KmsClass::Misconfigured);
    assert!(error.to_string().contains("there is no such alias"), "{error}");
}

#[test]
fn a_certificate_is_trusted_by_its_authority_only() {
    let fake = FakeKms::start_tls();
    let trusting = fake.builder(KEY).ca_file(fake.server().certificate().unwrap()).build().unwrap();
    assert_eq!(from_to(&trusting, &trusting), None);
    let wrapper = fake.builder(KEY).build().unwrap();
    let error = on_call(LONG, move |payload, cx| wrapper.wrap_key(payload, cx).unwrap_err());
    assert_eq!(error.class, KmsClass::Misconfigured);
    assert!(error.to_string().contains("AWS_CA_BUNDLE"), "{error}");
}

#[test]
fn what_a_cluster_costs_in_calls() {
    let fake = FakeKms::start();
    let place = Directory::new();
    let wrappers = || Wrappers::one(fake.builder(KEY).build().unwrap());
    // Encrypt, Decrypt, ReEncrypt.
    let cost = || {
        let calls = fake.calls();
        ["Encrypt", "Decrypt", "ReEncrypt"].map(|name| calls.iter().filter(|call| *call == name).count())
    };
    let path = place.0.join("cluster");
    let cluster = Cluster::create(&path, ClusterOptions::new(), wrappers()).unwrap();
    assert_eq!(cost(), [2, 2, 0], "create a cluster");
    let database = cluster.create_database("orders").unwrap();
    assert_eq!(cost(), [1, 1, 0], "create a database");
    cluster.check_master_key().unwrap();
    assert_eq!(cost(), [0, 1, 0], "check");
    database.rotate().unwrap();
    assert_eq!(cost(), [1, 1, 0], "rotate a database");
    let id = cluster.id();
    drop((database, cluster));
    let cluster = Cluster::open(&path, ClusterOptions::new().expected_id(id), wrappers()).unwrap();
    assert_eq!(cost(), [0, 1, 0], "open a cluster");
    let _database = cluster.database("orders").unwrap();
    assert_eq!(cost(), [0, 2, 0], "open a database of two generations");
    cluster.rewrap(wrappers(), &|_| ()).unwrap();
    assert_eq!(
        cost(),
        [0, 6, 4],
        "rewrap cluster key, probe and two data keys: all of them, though AWS names no version"
    );
}

/// What a process of its own says, with nothing in its environment but this: `ok`, or the class and the text.
fn in_child(environment: &[(&str, &str)]) -> String {
    in_child_of("child", environment)
}

fn in_child_of(test: &str, environment: &[(&str, &str)]) -> String {
    let program = std::env::current_exe().unwrap();
    let mut command = Command::new(program);
    command.args(["--exact", test, "--ignored", "--nocapture"]).env_clear().env("HOME", "/nonexistent");
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    let answer = said.lines().find_map(|line| line.split_once("CHILD ")).map(|parts| parts.1.to_owned());
    answer.unwrap_or_else(|| panic!("{said} {}", String::from_utf8_lossy(&output.stderr)))
}

/// Not a test: what [`in_child`] runs. A second call follows a failure, after the file was written that `THEN` names.
#[test]
#[ignore = "run by other tests in a process of its own"]
fn child() {
    let timeout = std::env::var("TIMEOUT_MS").map_or(LONG, |ms| Duration::from_millis(ms.parse().unwrap()));
    let told = match AwsKms::from_env() {
        Err(error) => format!("{:?} {error}", error.kind()),
        Ok(wrapper) => on_call(timeout, move |payload, cx| {
            let start = Instant::now();
            let mut outcome = wrapper.wrap_key(payload, cx);
            if let (Err(_), Ok(then)) = (&outcome, std::env::var("THEN")) {
                let (from, to) = then.split_once(' ').unwrap();
                std::fs::copy(from, to).unwrap();
                outcome = wrapper.wrap_key(payload, cx);
            }
            let opened = outcome.and_then(|wrapped| wrapper.unwrap_key(&wrapped, cx));
            match opened {
                Ok(opened) if is_same(&opened, payload) => "ok".to_owned(),
                Ok(_) => "another payload".to_owned(),
                Err(error) => format!("{:?} {error} [{} ms]", error.class, start.elapsed().as_millis()),
            }
        }),
    };
    println!("CHILD {told}");
}

#[test]
fn credentials_come_from_the_environment_and_from_files_that_may_be_mended() {
    let emulator = Emulator::ministack().unwrap();
    let (url, (id, secret)) = (emulator.url(), emulator.access_key());
    let place = Directory::new();
    let path = |name: &str| place.0.join(name).to_str().unwrap().to_owned();
    let no_metadata = ("AWS_EC2_METADATA_DISABLED", "true");
    let base = [("PAGESEAL_AWS_KEY", emulator.key()), ("AWS_ENDPOINT_URL_KMS", &url), no_metadata];
    let with = |more: &[(&str, &str)]| in_child(&[&base, more].concat());
    let region = ("AWS_REGION", REGION);

    assert_eq!(with(&[region, ("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)]), "ok");
    let wrong = with(&[region, ("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", "wrong")]);
    assert!(wrong.starts_with("Denied") && wrong.contains("InvalidSignatureException"), "{wrong}");

    let profile = |secret: &str| format!("[app]\naws_access_key_id = {id}\naws_secret_access_key = {secret}\n");
    std::fs::write(path("good"), profile(secret)).unwrap();
    std::fs::write(path("bad"), profile("wrong")).unwrap();
    std::fs::write(path("config"), format!("[profile app]\nregion = {REGION}\n")).unwrap();
    let files = |credentials: &str| {
        let config = path("config");
        let then = format!("{} {}", path("good"), path("bad"));
        let files =
            [("AWS_SHARED_CREDENTIALS_FILE", credentials), ("AWS_CONFIG_FILE", &config), ("AWS_PROFILE", "app")];
        with(&[&files[..], &[("THEN", &then)]].concat())
    };
    assert_eq!(files(&path("good")), "ok");
    assert_eq!(files(&path("bad")), "ok", "the file was mended after the first call, and the second takes that up");

    let none = with(&[region]);
    assert!(none.starts_with("Misconfigured"), "{none}");
    for place in [
        "there are no AWS credentials; looked in",
        "Environment:",
        "Profile:",
        "WebIdentityToken:",
        "EcsContainer:",
        "Ec2InstanceMetadata:",
    ] {
        assert!(none.contains(place), "{place} is not in: {none}");
    }
    let no_region = with(&[("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)]);
    assert!(no_region.starts_with("Misconfigured") && no_region.contains("no AWS region is configured"), "{no_region}");
}

#[test]
fn a_denial_is_believed_of_credentials_only_that_were_loaded_for_this_very_call() {
    let fake = Arc::new(FakeKms::start());
    for code in ["UnrecognizedClientException", "ExpiredTokenException", "AccessDeniedException"] {
        fake.script(|_, _| None);
        let wrapper = fake.builder(KEY).build().unwrap();
        let class = |wrapper: &AwsKms| wrapper.wrap_key(&payload(), &context(LONG)).err().map(|error| error.class);
        let times = |count: u32, then: Box<dyn Fn() + Send>| {
            let left = AtomicU32::new(count);
            fake.calls();
            fake.script(move |_, _| {
                left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).ok()?;
                then();
                Some(refusal(code, "no"))
            });
        };
        assert_eq!(class(&wrapper), None);
        times(1, Box::new(|| ()));
        assert_eq!((class(&wrapper), fake.calls().len()), (None, 2), "{code}: others were loaded");
        times(9, Box::new(|| ()));
        assert_eq!((class(&wrapper), fake.calls().len()), (Some(KmsClass::Denied), 2), "{code}: others are no better");
        assert_eq!((class(&wrapper), fake.calls().len()), (Some(KmsClass::Denied), 1), "{code}: these are new");
        // Replaced while the call was under way.
        let other = wrapper.clone();
        times(1, Box::new(move || other.replace_credentials(AwsCredentials::new("AKIAOTHER", "secret")).unwrap()));
        assert_eq!((class(&wrapper), fake.calls().len()), (None, 2), "{code}: they were replaced");
    }
}

/// Not a test: changes the access key in the file that its environment names, and has the service refuse the old one then.
#[test]
#[ignore = "run by other tests in a process of its own"]
fn child_that_changes_its_access_key() {
    let fake = FakeKms::start();
    let file = std::env::var("AWS_SHARED_CREDENTIALS_FILE").unwrap();
    let write =
        |id: &str| std::fs::write(&file, format!("[default]\naws_access_key_id = {id}\naws_secret_access_key = s\n"));
    write("AKIAOLD").unwrap();
    let wrapper = AwsKms::builder(ARN).endpoint_url(fake.url()).build().unwrap();
    let before = wrapper.wrap_key(&payload(), &context(LONG)).map(drop);
    write("AKIANEW").unwrap();
    fake.refuse_access_key("AKIAOLD");
    let after = wrapper.wrap_key(&payload(), &context(LONG)).map(drop);
    println!("CHILD {before:?} {after:?}");
}

#[test]
fn the_old_access_key_may_be_disabled_as_soon_as_the_new_one_is_in_the_file() {
    let place = Directory::new();
    let file = place.0.join("credentials");
    let environment = [("AWS_SHARED_CREDENTIALS_FILE", file.to_str().unwrap()), ("AWS_EC2_METADATA_DISABLED", "true")];
    assert_eq!(in_child_of("child_that_changes_its_access_key", &environment), "Ok(()) Ok(())");
}

#[test]
fn a_file_that_was_missing_or_half_written_is_read_again() {
    let fake = FakeKms::start();
    let place = Directory::new();
    let path = |name: &str| place.0.join(name).to_str().unwrap().to_owned();
    let (good, used, url) = (path("good"), path("used"), fake.url());
    std::fs::write(&good, "[default]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n").unwrap();
    let then = format!("{good} {used}");
    for before in [None, Some("[default\naws_access"), Some("[other]\nregion = eu-west-1\n")] {
        let _ = std::fs::remove_file(&used);
        if let Some(before) = before {
            std::fs::write(&used, before).unwrap();
        }
        let said = in_child(&[
            ("PAGESEAL_AWS_KEY", ARN),
            ("AWS_ENDPOINT_URL_KMS", &url),
            ("AWS_EC2_METADATA_DISABLED", "true"),
            ("AWS_SHARED_CREDENTIALS_FILE", &used),
            ("THEN", &then),
        ]);
        assert_eq!(said, "ok", "{before:?}");
    }
}

#[test]
fn expired_credentials_out_of_the_instance_metadata_are_no_denial() {
    let fake = FakeKms::start();
    fake.script(|_, _| Some(refusal("ExpiredTokenException", "The security token included in the request is expired")));
    let metadata = HttpServer::plain(|request| match request.path() {
        "/latest/api/token" => Answer::json("200 OK", "token").header("x-aws-ec2-metadata-token-ttl-seconds", "21600"),
        path if path.ends_with("/role") => Answer::json(
            "200 OK",
            json!({ "Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIAEXAMPLE", "SecretAccessKey": "secret",
                    "Token": "token", "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "2026-01-01T06:00:00Z" }),
        ),
        _ => Answer::json("200 OK", "role"),
    });
    let (url, metadata) = (fake.url(), format!("http://{}", metadata.address()));
    let base = [("PAGESEAL_AWS_KEY", ARN), ("AWS_ENDPOINT_URL_KMS", url.as_str())];
    let with = |more: &[(&str, &str)]| in_child(&[&base[..], more].concat());
    let said = with(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &metadata)]);
    assert!(said.starts_with("Unreachable") && said.contains("ones that have expired"), "{said}");
    assert!(!fake.calls().is_empty());
    // Nobody renews these.
    let given =
        [("AWS_ACCESS_KEY_ID", "ASIAEXAMPLE"), ("AWS_SECRET_ACCESS_KEY", "secret"), ("AWS_SESSION_TOKEN", "token")];
    let said = with(&given);
    assert!(said.starts_with("Denied") && said.contains("ExpiredTokenException"), "{said}");
}

#[test]
fn a_source_of_credentials_that_does_not_answer_costs_no_more_than_the_deadline_and_says_nothing() {
    let nobody = format!("http://127.0.0.1:{}", free_port());
    let hanging = Front::before(SocketAddr::from(([127, 0, 0, 1], free_port()))).unwrap();
    hanging.set(Passage::Hang);
    let hanging = format!("http://{}", hanging.address());
    let key = [("PAGESEAL_AWS_KEY", ARN), ("AWS_ENDPOINT_URL_KMS", nobody.as_str())];
    let with = |more: &[(&str, &str)]| in_child(&[&key[..], more].concat());
    let took = |said: &str| said.rsplit_once('[').unwrap().1.trim_end_matches(" ms]").parse::<u64>().unwrap();

    // Nobody is there, as on a machine that is no EC2 instance.
    let none = with(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &nobody)]);
    assert!(none.starts_with("Misconfigured") && none.contains("could not communicate with IMDS"), "{none}");
    // Somebody is there, and does not answer.
    let silent = with(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &hanging)]);
    assert!(silent.starts_with("Unreachable") && silent.contains("could not communicate with IMDS"), "{silent}");
    let short = with(&[("AWS_EC2_METADATA_SERVICE_ENDPOINT", &hanging), ("TIMEOUT_MS", "900")]);
    // On a slow machine the certificates of the system may still be loading then.
    assert!(short.starts_with("Unreachable") && short.contains("did not answer within"), "{short}");
    assert!((300..3000).contains(&took(&short)), "{short}");

    let place = Directory::new();
    let config = place.0.join("config");
    let role = "[default]\nregion = eu-west-1\nrole_arn = arn:aws:iam::111122223333:role/r\nsource_profile = base\n\
                [profile base]\naws_access_key_id = AKIAEXAMPLE\naws_secret_access_key = secret\n";
    std::fs::write(&config, role).unwrap();
    let config = config.to_str().unwrap();
    for (endpoint, timeout) in [(&nobody, "30000"), (&hanging, "400")] {
        let said = with(&[("AWS_CONFIG_FILE", config), ("AWS_ENDPOINT_URL_STS", endpoint), ("TIMEOUT_MS", timeout)]);
        assert!(said.starts_with("Unreachable"), "{said}");
        assert!(took(&said) < 5000, "{said}");
    }
    let sts = HttpServer::plain(|_| {
        let body = "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>not authorized to perform: \
                    sts:AssumeRole</Message></Error></ErrorResponse>";
        Answer {
            status: "403 Forbidden".into(),
            headers: vec![("Content-Type".into(), "text/xml".into())],
            body: body.into(),
        }
    });
    let sts = format!("http://{}", sts.address());
    let denied = with(&[("AWS_CONFIG_FILE", config), ("AWS_ENDPOINT_URL_STS", &sts)]);
    assert!(denied.starts_with("Denied") && denied.contains("sts:AssumeRole"), "{denied}");
    std::fs::write(config, "[default\nregion").unwrap();
    let broken = with(&[("AWS_CONFIG_FILE", config)]);
    assert!(broken.starts_with("Misconfigured"), "{broken}");
}
