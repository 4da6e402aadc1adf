//! `GoogleKms` against a fake of Google Cloud KMS: conformance, and what the rows do not show.
#![cfg(feature = "gcp")]

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der};
use aws_lc_rs::rsa::{KeyPair, KeySize};
use aws_lc_rs::signature::KeyPair as _;
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use pageseal::testing::conformance::{Front, Passage, context};
use pageseal::{
    Cluster, ClusterOptions, ErrorKind, GoogleCredentials, GoogleKms, KeyPayload, KeyWrapper, KmsClass, KmsError,
    WrappedKey, Wrappers,
};
use pageseal_kms_tests::gcp::{Fake, live, token};
use pageseal_kms_tests::gcp_fake::{BODIES, Corruption, FakeCloudKms, GOOD_TOKEN, KEY, OTHER_KEY, VersionState, body};
use pageseal_kms_tests::http::{Answer, HttpServer, Request};
use pageseal_kms_tests::table;
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(20);

#[test]
fn live_conformance_on_google() {
    match live() {
        Ok(service) => table::hold("gcp", "google", "yes", &*service),
        Err(why) => println!("not run against Google itself: {why}"),
    }
}

#[test]
fn the_test_for_google_itself_works_as_far_as_a_fake_can_show() {
    let fake = FakeCloudKms::start();
    let (url, metadata) = (fake.url(), fake.address().to_string());
    let environment =
        [("PAGESEAL_LIVE_KMS", "1"), ("PAGESEAL_GCP_ENDPOINT", url.as_str()), ("GCE_METADATA_HOST", metadata.as_str())];
    let (said, errors) = run_alone("live_conformance_on_google", &environment);
    assert!(said.contains("server=google real=yes behaviours=22 passed=9 skipped=13"), "{said}\n{errors}");
}

fn payload() -> KeyPayload {
    KeyPayload::from_bytes(&mut [0x5a; 128]).unwrap()
}

fn wrap(wrapper: &GoogleKms) -> Result<WrappedKey, KmsError> {
    wrapper.wrap_key(&payload(), &context(PATIENCE))
}

fn unwrap(wrapper: &GoogleKms, wrapped: &WrappedKey) -> Result<(), KmsError> {
    let opened = wrapper.unwrap_key(wrapped, &context(PATIENCE))?;
    assert!(opened.with_bytes(|bytes| *bytes == [0x5a; 128]).unwrap());
    Ok(())
}

fn class<T>(outcome: &Result<T, KmsError>) -> Option<KmsClass> {
    outcome.as_ref().err().map(|error| error.class)
}

/// A directory of a test's own, removed at its end.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pageseal-gcp-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn an_answer_whose_checks_fail_is_thrown_away_and_the_call_counts_as_unreachable() {
    let fake = Fake::start();
    let good = wrap(fake.google()).unwrap();
    for corruption in [
        Corruption::Unverified,
        Corruption::ContextUnverified,
        Corruption::Ciphertext,
        Corruption::NoCiphertextChecksum,
    ] {
        fake.cloud.corrupt(corruption);
        let error = wrap(fake.google()).unwrap_err();
        assert_eq!(error.class, KmsClass::Unreachable, "{corruption:?}");
        assert!(error.to_string().contains("corrupted in transit"), "{corruption:?}: {error}");
    }
    for corruption in [Corruption::Plaintext, Corruption::NoPlaintextChecksum, Corruption::RequestCiphertext] {
        fake.cloud.corrupt(corruption);
        let error = unwrap(fake.google(), &good).unwrap_err();
        assert_eq!(error.class, KmsClass::Unreachable, "{corruption:?}");
        assert!(error.to_string().contains("corrupted in transit"), "{corruption:?}: {error}");
    }
    fake.cloud.corrupt(None);
    unwrap(fake.google(), &good).unwrap();
}

#[test]
fn an_answer_about_another_key_or_of_another_length_is_refused() {
    let fake = Fake::start();
    let good = wrap(fake.google()).unwrap();
    for corruption in [Corruption::VersionOfAnotherKey, Corruption::NoVersion] {
        fake.cloud.corrupt(corruption);
        assert_eq!(class(&wrap(fake.google())), Some(KmsClass::Unclassified), "{corruption:?}");
    }
    fake.cloud.corrupt(Corruption::ShortPlaintext);
    let error = unwrap(fake.google(), &good).unwrap_err();
    assert_eq!(error.class, KmsClass::BadCiphertext);
    assert!(error.to_string().contains("decrypts to 100 bytes"), "{error}");
}

/// Each body of the key service, with its status, and what it means for a decryption of a record of version 1.
const SERVICE: &[(&str, &str, KmsClass)] = &[
    ("aborted.json", "409 Conflict", KmsClass::Unreachable),
    ("api_not_used_before.json", "400 Bad Request", KmsClass::Unclassified),
    ("billing_disabled.json", "403 Forbidden", KmsClass::Misconfigured),
    ("cancelled.json", "499 Client Closed Request", KmsClass::Unreachable),
    ("checksum_mismatch.json", "400 Bad Request", KmsClass::Unreachable),
    ("ciphertext_invalid.json", "400 Bad Request", KmsClass::BadCiphertext),
    ("ciphertext_wrong_context.json", "400 Bad Request", KmsClass::BadCiphertext),
    ("ciphertext_wrong_key.json", "400 Bad Request", KmsClass::BadCiphertext),
    ("credentials_missing.json", "401 Unauthorized", KmsClass::Denied),
    ("deadline_exceeded.json", "504 Gateway Timeout", KmsClass::Unreachable),
    ("denied_in_a_server_error.json", "503 Service Unavailable", KmsClass::Unreachable),
    ("internal.json", "500 Internal Server Error", KmsClass::Unreachable),
    ("key_not_found.json", "404 Not Found", KmsClass::Misconfigured),
    ("permission_denied.json", "403 Forbidden", KmsClass::Denied),
    ("permission_denied_message_only.json", "403 Forbidden", KmsClass::Denied),
    ("precondition_other.json", "400 Bad Request", KmsClass::Unclassified),
    ("proxy_403.html", "403 Forbidden", KmsClass::Unclassified),
    ("proxy_502.html", "502 Bad Gateway", KmsClass::Unreachable),
    ("quota.json", "429 Too Many Requests", KmsClass::Throttled),
    ("quota_retry_info.json", "429 Too Many Requests", KmsClass::Throttled),
    ("robot_404.html", "404 Not Found", KmsClass::Misconfigured),
    ("scope_insufficient.json", "403 Forbidden", KmsClass::Misconfigured),
    ("service_disabled.json", "403 Forbidden", KmsClass::Misconfigured),
    ("state_contradictory.json", "400 Bad Request", KmsClass::Unclassified),
    ("state_destroy_scheduled.json", "400 Bad Request", KmsClass::Deleted),
    ("state_destroyed.json", "400 Bad Request", KmsClass::Deleted),
    ("state_destroyed_message_only.json", "400 Bad Request", KmsClass::Deleted),
    ("state_disabled.json", "400 Bad Request", KmsClass::Disabled),
    ("state_disabled_message_only.json", "400 Bad Request", KmsClass::Disabled),
    ("state_import_failed.json", "400 Bad Request", KmsClass::Misconfigured),
    ("state_of_another_key.json", "400 Bad Request", KmsClass::Unclassified),
    ("state_of_another_version.json", "400 Bad Request", KmsClass::BadCiphertext),
    ("state_pending_generation.json", "400 Bad Request", KmsClass::Unreachable),
    ("state_pending_import.json", "400 Bad Request", KmsClass::Misconfigured),
    ("state_unknown.json", "400 Bad Request", KmsClass::Unclassified),
    ("unauthenticated.json", "401 Unauthorized", KmsClass::Denied),
    ("unavailable.json", "503 Service Unavailable", KmsClass::Unreachable),
    ("unimplemented.json", "501 Not Implemented", KmsClass::Misconfigured),
    ("unknown.json", "500 Internal Server Error", KmsClass::Unreachable),
    ("user_project_denied.json", "403 Forbidden", KmsClass::Misconfigured),
    ("vpc_service_controls.json", "403 Forbidden", KmsClass::Misconfigured),
    ("without_status.json", "403 Forbidden", KmsClass::Unclassified),
    ("wrong_purpose.json", "400 Bad Request", KmsClass::Misconfigured),
];

/// Each body of an issuer of tokens.
const ISSUER: &[(&str, &str, KmsClass)] = &[
    ("impersonation_denied.json", "403 Forbidden", KmsClass::Denied),
    ("sts_attribute_condition.json", "400 Bad Request", KmsClass::Denied),
    ("sts_invalid_target.json", "400 Bad Request", KmsClass::Misconfigured),
    ("token_invalid_client.json", "401 Unauthorized", KmsClass::Denied),
    ("token_invalid_grant.json", "400 Bad Request", KmsClass::Denied),
    ("token_invalid_rapt.json", "400 Bad Request", KmsClass::Denied),
    ("token_invalid_request.json", "400 Bad Request", KmsClass::Misconfigured),
    ("token_unauthorized_client.json", "400 Bad Request", KmsClass::Denied),
    ("sts_issuer_unreachable.json", "400 Bad Request", KmsClass::Unreachable),
    ("gateway_forbidden.json", "401 Unauthorized", KmsClass::Unclassified),
    ("gateway_forbidden.json", "403 Forbidden", KmsClass::Unclassified),
    ("service_disabled.json", "403 Forbidden", KmsClass::Misconfigured),
    ("proxy_403.html", "403 Forbidden", KmsClass::Unclassified),
    ("proxy_502.html", "502 Bad Gateway", KmsClass::Unreachable),
    ("unavailable.json", "503 Service Unavailable", KmsClass::Unreachable),
    ("quota.json", "429 Too Many Requests", KmsClass::Throttled),
];

/// Asked of a metadata server in `the_environment_decides_where_tokens_come_from`.
const METADATA: &[&str] = &["metadata_403.txt"];

#[test]
fn every_body_is_answered_once_and_its_origin_is_written_down() {
    let tried: HashSet<_> = SERVICE.iter().chain(ISSUER).map(|row| row.0).chain(METADATA.iter().copied()).collect();
    let named: HashSet<_> = BODIES.iter().map(|body| body.0).collect();
    assert_eq!(tried, named);
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("bodies/gcp");
    let files: HashSet<_> = std::fs::read_dir(&directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "README.md")
        .collect();
    assert_eq!(files, named.iter().map(|name| (*name).to_owned()).collect());
    let readme = std::fs::read_to_string(directory.join("README.md")).unwrap();
    assert!(named.iter().all(|name| readme.contains(&format!("`{name}`"))), "the README names every file");
}

#[test]
fn every_answer_of_the_key_service_has_its_class_and_no_request_is_repeated_but_with_another_token() {
    let fake = Fake::start();
    let wrapped = wrap(fake.google()).unwrap();
    for &(file, status, expected) in SERVICE {
        fake.cloud.answer_with(move |_| Some(Answer::json(status, body(file))));
        fake.cloud.take_seen();
        let error = unwrap(fake.google(), &wrapped).unwrap_err();
        assert_eq!(error.class, expected, "{file}: {error}");
        // A refused token is not the last one.
        let requests = if status.starts_with("401") { 2 } else { 1 };
        assert_eq!(fake.cloud.take_seen().len(), requests, "{file}");
        // Encrypting has no ciphertext to complain of, and no record to compare with.
        let error = wrap(fake.google()).unwrap_err();
        let expected = match (expected, file) {
            (_, "state_of_another_version.json") => KmsClass::Deleted,
            (KmsClass::BadCiphertext, _) => KmsClass::Misconfigured,
            (expected, _) => expected,
        };
        assert_eq!(error.class, expected, "encrypting, {file}: {error}");
    }
    fake.cloud.answer_itself();
    unwrap(fake.google(), &wrapped).unwrap();
}

#[test]
fn the_service_says_when_to_come_back() {
    let fake = Fake::start();
    let after = |file: &'static str, header: Option<&'static str>| {
        fake.cloud.answer_with(move |_| {
            let answer = Answer::json("429 Too Many Requests", body(file));
            Some(header.into_iter().fold(answer, |answer, value| answer.header("Retry-After", value)))
        });
        let error = wrap(fake.google()).unwrap_err();
        assert_eq!(error.class, KmsClass::Throttled);
        error.retry_after
    };
    assert_eq!(after("quota_retry_info.json", None), Some(Duration::from_millis(3500)));
    assert_eq!(after("quota_retry_info.json", Some("9")), Some(Duration::from_millis(3500)));
    assert_eq!(after("quota.json", Some("9")), Some(Duration::from_secs(9)));
    assert_eq!(after("proxy_502.html", Some("9")), Some(Duration::from_secs(9)));
    assert_eq!(after("quota.json", Some("Wed, 21 Oct 2026 07:28:00 GMT")), None);
    assert_eq!(after("quota.json", None), None);
}

#[test]
fn garbage_is_no_key_and_no_verdict() {
    let fake = Fake::start();
    let wrapped = wrap(fake.google()).unwrap();
    let huge = format!("{{\"plaintext\": \"{}\"}}", "A".repeat(4 << 20));
    let answers = [
        String::new(),
        "{".into(),
        "null".into(),
        "[]".into(),
        "{}".into(),
        "<html>Welcome to the airport</html>".into(),
        r#"{"plaintext": 5, "ciphertext": 5}"#.into(),
        r#"{"plaintext": "!!!", "ciphertext": "!!!"}"#.into(),
        r#"{"plaintext": "AAAA", "plaintextCrc32c": "x", "ciphertext": "AAAA", "ciphertextCrc32c": "x"}"#.into(),
        r#"{"plaintext": null, "name": null}"#.into(),
        format!("{}{}", "[".repeat(100_000), "]".repeat(100_000)),
        huge,
    ];
    for answer in answers {
        let shown = answer.chars().take(60).collect::<String>();
        fake.cloud.answer_with(move |_| Some(Answer::json("200 OK", &answer)));
        for class in [class(&wrap(fake.google())), class(&unwrap(fake.google(), &wrapped))] {
            assert!(matches!(class, Some(KmsClass::Unclassified | KmsClass::Unreachable)), "{shown}: {class:?}");
        }
    }
    for status in ["400 Bad Request", "401 Unauthorized", "403 Forbidden", "418 I'm a teapot", "204 No Content"] {
        for answer in ["", "{", "{}", r#"{"error": "denied"}"#, r#"{"error": {"status": 7, "code": "x"}}"#] {
            fake.cloud.answer_with(move |_| Some(Answer::json(status, answer)));
            let error = unwrap(fake.google(), &wrapped).unwrap_err();
            assert!(!error.class.is_revocation(), "{status} {answer}: {error}");
        }
    }
}

#[test]
fn a_redirection_is_not_followed_and_what_it_says_is_no_verdict() {
    let fake = Fake::start();
    let wrapped = wrap(fake.google()).unwrap();
    let elsewhere = FakeCloudKms::start();
    for status in ["301 Moved Permanently", "302 Found", "303 See Other", "307 Temporary Redirect", "308 Moved"] {
        for text in ["", body("permission_denied.json")] {
            let url = elsewhere.url();
            fake.cloud.answer_with(move |request| {
                Some(Answer::json(status, text).header("Location", &format!("{url}{}", request.target)))
            });
            for error in [wrap(fake.google()).unwrap_err(), unwrap(fake.google(), &wrapped).unwrap_err()] {
                assert_eq!(error.class, KmsClass::Misconfigured, "{status}: {error}");
                assert!(error.to_string().contains("sends requests elsewhere"), "{status}: {error}");
            }
        }
    }
    assert_eq!(elsewhere.take_seen(), [], "nothing goes to another host, least of all a key");
    // Nor is a small answer that unpacks to a huge one asked for.
    for (_, headers) in fake.cloud.take_seen() {
        assert!(!headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("accept-encoding")), "{headers:?}");
    }
}

#[test]
fn a_rotation_changes_the_version_of_new_wrappings_and_rewrapping_follows_it() {
    let fake = Fake::start();
    let google = fake.google();
    let first = wrap(google).unwrap();
    assert_eq!(fake.cloud.rotate(), 2);
    let second = wrap(google).unwrap();
    assert_eq!((first.key_version.as_str(), second.key_version.as_str()), ("1", "2"));
    unwrap(google, &first).unwrap();
    let rewrapped = google.rewrap_key(&first, &context(PATIENCE)).unwrap();
    assert_eq!(rewrapped.key_version, "2");

    // Only what was wrapped by version 1 hangs on it.
    for (state, expected) in [
        (VersionState::Disabled, KmsClass::Disabled),
        (VersionState::PendingGeneration, KmsClass::Unreachable),
        (VersionState::DestroyScheduled, KmsClass::Deleted),
        (VersionState::Destroyed, KmsClass::Deleted),
    ] {
        fake.cloud.set_version_state(1, state);
        assert_eq!(class(&unwrap(google, &first)), Some(expected), "{state:?}");
        unwrap(google, &rewrapped).unwrap();
        wrap(google).unwrap();
        // Somebody put the old blob into a record of the new version.
        let swapped = WrappedKey { blob: first.blob.clone(), ..second.clone() };
        assert_eq!(class(&unwrap(google, &swapped)), Some(KmsClass::BadCiphertext), "{state:?}");
    }
}

#[test]
fn what_another_key_wrapped_is_not_sent() {
    let fake = Fake::start();
    let wrapped = wrap(fake.google()).unwrap();
    fake.cloud.take_seen();
    let other =
        GoogleKms::builder(OTHER_KEY).endpoint(fake.cloud.url()).credentials(token(GOOD_TOKEN)).build().unwrap();
    assert_eq!(class(&unwrap(&other, &wrapped)), Some(KmsClass::BadCiphertext));
    for blob in [vec![], vec![7; 4097]] {
        let record = WrappedKey { blob, ..wrapped.clone() };
        assert_eq!(class(&unwrap(fake.google(), &record)), Some(KmsClass::BadCiphertext));
    }
    assert_eq!(fake.cloud.take_seen().len(), 0);
}

#[test]
fn a_request_names_the_program_the_ids_and_the_project_that_pays() {
    let cloud = FakeCloudKms::start();
    let builder = GoogleKms::builder(KEY).endpoint(cloud.url()).credentials(token(GOOD_TOKEN));
    let wrapper = builder.quota_project("paying-project").build().unwrap();
    let mut cx = context(PATIENCE);
    cx.label = "c1c1c1/d2d2d2\r\nX-Evil: 1";
    wrapper.wrap_key(&payload(), &cx).unwrap();
    let seen = cloud.take_seen();
    let headers: HashMap<_, _> = seen[0].1.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    assert_eq!(headers["x-goog-user-project"], "paying-project");
    assert!(headers["user-agent"].starts_with("pageseal/"), "{headers:?}");
    assert!(headers["user-agent"].contains("c1c1c1/d2d2d2") && !headers.contains_key("x-evil"), "{headers:?}");
}

/// A service account of the fake, and its credentials file.
fn service_account(cloud: &FakeCloudKms) -> String {
    let pair = KeyPair::generate(KeySize::Rsa2048).unwrap();
    cloud.accept_account("keeper@my-project.iam.gserviceaccount.com", pair.public_key().as_ref());
    let der: Pkcs8V1Der<'_> = pair.as_der().unwrap();
    let lines = BASE64_STANDARD.encode(der.as_ref());
    let lines: Vec<_> = lines.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect();
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----\n", lines.join("\n"));
    json!({
        "type": "service_account",
        "project_id": "my-project",
        "private_key_id": "0123456789",
        "private_key": pem,
        "client_email": "keeper@my-project.iam.gserviceaccount.com",
    })
    .to_string()
}

fn user(token_uri: &str) -> String {
    json!({
        "type": "authorized_user",
        "client_id": "client.apps.googleusercontent.com",
        "client_secret": "SECRET-OF-THE-CLIENT",
        "refresh_token": "REFRESH-TOKEN",
        "token_uri": token_uri,
    })
    .to_string()
}

#[test]
fn a_service_account_signs_its_tokens_itself() {
    let fake = Fake::start();
    let account = service_account(&fake.cloud);
    let wrapper = fake.wrapper_with(GoogleCredentials::json(account.clone()));
    let wrapped = wrap(&wrapper).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();
    // No other service was asked for a token.
    assert!(fake.cloud.take_seen().iter().all(|(target, _)| target.contains("my-key:")));

    // Its key is taken back: another one has the account's name now.
    service_account(&fake.cloud);
    assert_eq!(class(&unwrap(&wrapper, &wrapped)), Some(KmsClass::Denied));
    // In the file, a new key.
    let directory = Directory::new("account");
    let path = directory.file("key.json", &account);
    let wrapper = fake.wrapper_with(GoogleCredentials::file(&path));
    assert_eq!(class(&unwrap(&wrapper, &wrapped)), Some(KmsClass::Denied));
    std::fs::write(&path, service_account(&fake.cloud)).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();
    // The file goes away: what is in memory still works, until it is refused.
    std::fs::remove_file(&path).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();
    service_account(&fake.cloud);
    let error = unwrap(&wrapper, &wrapped).unwrap_err();
    assert_eq!(error.class, KmsClass::Misconfigured, "{error}");
    assert!(error.to_string().contains("key.json cannot be read"), "{error}");
}

#[test]
fn a_wrong_clock_is_told_and_is_no_verdict() {
    let fake = Fake::start();
    let signing = fake.wrapper_with(GoogleCredentials::json(service_account(&fake.cloud)));
    let dated = |date: &'static str| {
        fake.cloud.answer_with(move |_| {
            Some(Answer::json("401 Unauthorized", body("unauthenticated.json")).header("Date", date))
        });
    };
    for (date, how) in [("Tue, 01 Jan 2019 00:00:00 GMT", "ahead"), ("Thu, 01 Jan 2099 00:00:00 GMT", "behind")] {
        dated(date);
        let error = wrap(&signing).unwrap_err();
        assert_eq!(error.class, KmsClass::Misconfigured, "{error}");
        assert!(error.to_string().contains("clock is ") && error.to_string().contains(how), "{error}");
        // A token that somebody else made says nothing about this clock.
        assert_eq!(class(&wrap(fake.google())), Some(KmsClass::Denied));
    }
    for date in ["", "yesterday"] {
        dated(date);
        assert_eq!(class(&wrap(&signing)), Some(KmsClass::Denied));
    }
}

#[test]
fn a_private_key_that_is_none_is_told_and_not_shown() {
    let fake = Fake::start();
    let account = service_account(&fake.cloud);
    let broken = account.replace("MII", "SECRETMII");
    let error = wrap(&fake.wrapper_with(GoogleCredentials::json(broken))).unwrap_err();
    assert_eq!(error.class, KmsClass::Misconfigured);
    let text = format!("{error} {error:?}");
    assert!(text.contains("malformed") && !text.contains("SECRET"), "{text}");
}

/// A wrapper whose tokens come from the fake's token endpoint behind a front of its own.
fn with_issuer(fake: &Fake) -> (GoogleKms, Front) {
    let front = Front::before(fake.cloud.address()).unwrap();
    let wrapper = fake.wrapper_with(GoogleCredentials::json(user(&format!("http://{}/token", front.address()))));
    (wrapper, front)
}

#[test]
fn a_refused_refresh_token_is_denied_and_the_same_wrapper_works_when_it_is_taken_again() {
    let fake = Fake::start();
    let (wrapper, _front) = with_issuer(&fake);
    let error = wrap(&wrapper).unwrap_err();
    assert_eq!(error.class, KmsClass::Denied);
    let text = format!("{error} {error:?}");
    assert!(text.contains("invalid_grant Token has been expired or revoked."), "{text}");
    assert!(!text.contains("SECRET") && !text.contains("REFRESH-TOKEN"), "{text}");
    fake.cloud.accept_for_exchange("REFRESH-TOKEN");
    wrap(&wrapper).unwrap();
}

#[test]
fn every_answer_of_an_issuer_of_tokens_has_its_class() {
    let fake = Fake::start();
    let wrapped = wrap(fake.google()).unwrap();
    let (wrapper, _front) = with_issuer(&fake);
    for &(file, status, expected) in ISSUER {
        fake.cloud.answer_with(move |request: &Request| {
            (request.path() == "/token").then(|| Answer::json(status, body(file)))
        });
        let error = unwrap(&wrapper, &wrapped).unwrap_err();
        assert_eq!(error.class, expected, "{file}: {error}");
    }
    for garbage in ["", "{}", "<html></html>", r#"{"access_token": "SECRET", "expires_in": "SECRET"}"#] {
        fake.cloud.answer_with(move |request: &Request| {
            (request.path() == "/token").then(|| Answer::json("200 OK", garbage))
        });
        let error = unwrap(&wrapper, &wrapped).unwrap_err();
        assert_eq!(error.class, KmsClass::Unclassified, "{garbage}: {error}");
        assert!(!format!("{error} {error:?}").contains("SECRET"), "{error}");
    }
    fake.cloud.answer_itself();
    fake.cloud.accept_for_exchange("REFRESH-TOKEN");
    unwrap(&wrapper, &wrapped).unwrap();
}

#[test]
fn an_issuer_of_tokens_that_cannot_be_reached_says_nothing_about_the_key() {
    let fake = Fake::start();
    fake.cloud.accept_for_exchange("REFRESH-TOKEN");
    let (wrapper, front) = with_issuer(&fake);
    for passage in [Passage::Refuse, Passage::Reset] {
        front.set(passage.clone());
        let start = Instant::now();
        let error = wrap(&wrapper).unwrap_err();
        assert_eq!(error.class, KmsClass::Unreachable, "{passage:?}: {error}");
        assert!(start.elapsed() < Duration::from_secs(3), "{passage:?}: {:?}", start.elapsed());
    }
    front.set(Passage::Open);
    let wrapped = wrap(&wrapper).unwrap();
    // With a token, nothing of this matters until it is refused or ends.
    front.set(Passage::Refuse);
    unwrap(&wrapper, &wrapped).unwrap();
}

#[test]
fn an_issuer_that_once_hung_holds_no_later_call_up() {
    let fake = Fake::start();
    let asked = AtomicU64::new(0);
    // The SDK waits for the first answer without a limit, and all calls with it; the connection stays open.
    let issuer = HttpServer::plain(move |_| {
        if asked.fetch_add(1, Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_secs(600));
        }
        Answer::json("200 OK", json!({"access_token": GOOD_TOKEN, "token_type": "Bearer", "expires_in": 3600}))
    });
    let wrapper = fake.wrapper_with(GoogleCredentials::json(user(&format!("http://{}/token", issuer.address()))));
    let start = Instant::now();
    let error = wrapper.wrap_key(&payload(), &context(Duration::from_millis(500))).unwrap_err();
    assert_eq!(error.class, KmsClass::Unreachable);
    assert!(error.to_string().contains("no access token from the credentials JSON"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    wrap(&wrapper).unwrap();
}

#[test]
fn calls_that_come_together_share_one_token() {
    let fake = Fake::start();
    fake.cloud.accept_for_exchange("REFRESH-TOKEN");
    let (wrapper, _front) = with_issuer(&fake);
    std::thread::scope(|scope| {
        let calls: Vec<_> = (0..20).map(|_| scope.spawn(|| wrap(&wrapper).map(drop))).collect();
        calls.into_iter().for_each(|call| call.join().unwrap().unwrap());
    });
    let seen = fake.cloud.take_seen();
    assert_eq!(seen.iter().filter(|(target, _)| target == "/token").count(), 1);
    assert_eq!(seen.len(), 21);
}

#[test]
fn a_token_that_grew_old_in_the_cache_is_renewed_before_anything_is_concluded() {
    let fake = Fake::start();
    fake.cloud.accept_for_exchange("REFRESH-TOKEN");
    let (wrapper, front) = with_issuer(&fake);
    let wrapped = wrap(&wrapper).unwrap();
    fake.cloud.revoke_token(GOOD_TOKEN);
    fake.cloud.issue_token("ya29.the-next-one");
    unwrap(&wrapper, &wrapped).unwrap();
    // If no new one can be had, that is all that is known.
    fake.cloud.revoke_token("ya29.the-next-one");
    front.set(Passage::Refuse);
    assert_eq!(class(&unwrap(&wrapper, &wrapped)), Some(KmsClass::Unreachable));
    front.set(Passage::Open);
    fake.cloud.take_seen();
    assert_eq!(class(&unwrap(&wrapper, &wrapped)), Some(KmsClass::Denied));
    let targets: Vec<_> = fake.cloud.take_seen().into_iter().map(|(target, _)| target).collect();
    assert_eq!(targets.iter().filter(|target| target.contains(":decrypt")).count(), 1, "{targets:?}");
}

#[test]
fn the_callers_function_is_told_of_a_refusal_before_anything_is_concluded() {
    let fake = Fake::start();
    let wrapper = fake.wrapper_with(GoogleCredentials::access_token(|refused| {
        let cached = "ya29.kept-while-the-machine-slept";
        Ok(if refused == Some(cached) { GOOD_TOKEN } else { cached }.into())
    }));
    let wrapped = wrap(&wrapper).unwrap();
    unwrap(&wrapper, &wrapped).unwrap();
    fake.cloud.revoke_token(GOOD_TOKEN);
    assert_eq!(class(&unwrap(&wrapper, &wrapped)), Some(KmsClass::Denied));
    fake.cloud.accept_token(GOOD_TOKEN);
    unwrap(&wrapper, &wrapped).unwrap();
}

#[test]
fn the_callers_function_classifies_its_own_failures() {
    let fake = Fake::start();
    let failing = |class: KmsClass| {
        GoogleCredentials::access_token(move |_| {
            Err(KmsError::with_source(class, "the vault of tokens said so").retry_after(Duration::from_secs(4)))
        })
    };
    for class in [KmsClass::Unreachable, KmsClass::Throttled, KmsClass::Denied, KmsClass::Misconfigured] {
        let error = wrap(&fake.wrapper_with(failing(class))).unwrap_err();
        assert_eq!((error.class, error.retry_after), (class, Some(Duration::from_secs(4))));
        assert!(error.to_string().contains("the vault of tokens said so"), "{error}");
    }
    let error = wrap(&fake.wrapper_with(token("SECRET\r\nX-Evil: 1"))).unwrap_err();
    assert_eq!(error.class, KmsClass::Misconfigured);
    assert!(!format!("{error} {error:?}").contains("SECRET"), "{error:?}");
    assert_eq!(class(&wrap(&fake.wrapper_with(GoogleCredentials::anonymous()))), Some(KmsClass::Denied));
}

#[test]
fn workload_identity_federation_exchanges_the_token_in_a_file() {
    let fake = Fake::start();
    let directory = Directory::new("federation");
    let subject = directory.file("subject", "SUBJECT-TOKEN");
    let config = json!({
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k8s",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": format!("{}/token", fake.cloud.url()),
        "credential_source": {"file": subject},
    });
    let wrapper = fake.wrapper_with(GoogleCredentials::json(config.to_string()));
    let error = wrap(&wrapper).unwrap_err();
    assert_eq!(error.class, KmsClass::Denied, "{error}");
    fake.cloud.accept_for_exchange("SUBJECT-TOKEN");
    wrap(&wrapper).unwrap();
    // A new wrapper without the file.
    std::fs::remove_file(&subject).unwrap();
    let error = wrap(&fake.wrapper_with(GoogleCredentials::json(config.to_string()))).unwrap_err();
    assert_eq!(error.class, KmsClass::Misconfigured, "{error}");
    assert!(error.to_string().contains("No such file"), "{error}");
}

#[test]
fn what_the_source_of_a_subject_token_says_is_no_verdict_and_what_an_impersonation_says_is_one() {
    let fake = Fake::start();
    fake.cloud.accept_for_exchange("SUBJECT-TOKEN");
    let url = |path: &str| format!("{}{path}", fake.cloud.url());
    let config = json!({
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k8s",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": url("/token"),
        "service_account_impersonation_url": url("/impersonate"),
        "credential_source": {"url": url("/subject")},
    });
    let class_with = |path: &'static str, status: &'static str, text: &'static str| {
        fake.cloud.answer_with(move |request: &Request| match request.path() {
            asked if asked == path => Some(Answer::json(status, text)),
            "/subject" => Some(Answer::json("200 OK", "SUBJECT-TOKEN")),
            _ => None,
        });
        let error = wrap(&fake.wrapper_with(GoogleCredentials::json(config.to_string()))).unwrap_err();
        (error.class, error.to_string())
    };
    for file in ["token_invalid_client.json", "impersonation_denied.json", "gateway_forbidden.json", "proxy_403.html"] {
        let (class, said) = class_with("/subject", "403 Forbidden", body(file));
        assert_eq!(class, KmsClass::Unclassified, "{file}: {said}");
    }
    for (file, expected) in [
        ("impersonation_denied.json", KmsClass::Denied),
        ("service_disabled.json", KmsClass::Misconfigured),
        ("gateway_forbidden.json", KmsClass::Unclassified),
        ("proxy_403.html", KmsClass::Unclassified),
    ] {
        let (class, said) = class_with("/impersonate", "403 Forbidden", body(file));
        assert_eq!(class, expected, "{file}: {said}");
    }
}

/// Runs one test in a process whose environment is only this, and returns what it said on both channels.
fn run_alone(test: &str, environment: &[(&str, &str)]) -> (String, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", test, "--nocapture"]).env_clear();
    command.env("HOME", "/nonexistent").env("PAGESEAL_GCP_KEY", KEY);
    let output = command.envs(environment.iter().copied()).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr))
}

/// What `in_a_child` says in such a process.
fn child(environment: &[(&str, &str)]) -> String {
    let (said, errors) = run_alone("in_a_child", &[environment, &[("PAGESEAL_GCP_CHILD", "1")]].concat());
    let outcome = said.lines().find_map(|line| line.split_once("OUTCOME ")).map(|(_, outcome)| outcome.to_owned());
    outcome.unwrap_or_else(|| panic!("{said}\n{errors}"))
}

#[test]
fn in_a_child() {
    if std::env::var_os("PAGESEAL_GCP_CHILD").is_none() {
        return;
    }
    match GoogleKms::from_env() {
        Err(error) => println!("OUTCOME not made: {:?}: {error}", error.kind()),
        Ok(wrapper) => match wrap(&wrapper).and_then(|wrapped| unwrap(&wrapper, &wrapped)) {
            Ok(()) => println!("OUTCOME good"),
            Err(error) => println!("OUTCOME {:?}: {error}", error.class),
        },
    }
    // Nothing was chosen for the whole process.
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
}

#[test]
fn the_environment_decides_where_tokens_come_from() {
    let fake = Fake::start();
    let (url, metadata) = (fake.cloud.url(), fake.cloud.address().to_string());
    let from_metadata = [("PAGESEAL_GCP_ENDPOINT", url.as_str()), ("GCE_METADATA_HOST", metadata.as_str())];
    assert_eq!(child(&from_metadata), "good");
    let metadata_says = |status: &'static str, flavor: Option<&'static str>, text: &'static str| {
        fake.cloud.answer_with(move |request: &Request| {
            let answer = Answer::json(status, text);
            let answer = flavor.into_iter().fold(answer, |answer, flavor| answer.header("Metadata-Flavor", flavor));
            request.path().starts_with("/computeMetadata").then_some(answer)
        });
        child(&from_metadata)
    };
    // The SDK takes HTTP_PROXY for the way to the metadata server: a refusal counts only if it is the server's own.
    for (status, flavor, text, expected) in [
        ("403 Forbidden", Some("Google"), body("metadata_403.txt"), "Denied: "),
        ("403 Forbidden", None, body("metadata_403.txt"), "Unclassified: "),
        ("403 Forbidden", Some("Squid"), body("metadata_403.txt"), "Unclassified: "),
        ("403 Forbidden", None, body("proxy_403.html"), "Unclassified: "),
        ("401 Unauthorized", None, "", "Unclassified: "),
        ("404 Not Found", Some("Google"), "", "Misconfigured: "),
        ("500 Internal Server Error", Some("Google"), "", "Unreachable: "),
        ("200 OK", Some("Google"), "<html></html>", "Unclassified: "),
    ] {
        let outcome = metadata_says(status, flavor, text);
        assert!(
            outcome.starts_with(expected) && outcome.contains("the metadata server"),
            "{status} {flavor:?}: {outcome}"
        );
    }
    fake.cloud.answer_itself();
    let nobody = [("PAGESEAL_GCP_ENDPOINT", url.as_str()), ("GCE_METADATA_HOST", "127.0.0.1:1")];
    let outcome = child(&nobody);
    assert!(
        outcome.starts_with("Unreachable: ") && outcome.contains("GOOGLE_APPLICATION_CREDENTIALS is not set"),
        "{outcome}"
    );

    let directory = Directory::new("environment");
    let account = directory.file("account.json", service_account(&fake.cloud));
    let with_file =
        |path: &Path| child(&[nobody[0], nobody[1], ("GOOGLE_APPLICATION_CREDENTIALS", path.to_str().unwrap())]);
    assert_eq!(with_file(&account), "good");
    let outcome =
        with_file(&directory.file("broken.json", "{\"type\": \"service_account\", \"private_key\": \"SECRET\""));
    assert!(outcome.starts_with("not made: Misconfigured: the credentials file "), "{outcome}");
    assert!(outcome.contains("broken.json, named by GOOGLE_APPLICATION_CREDENTIALS, is no JSON"), "{outcome}");
    assert!(!outcome.contains("SECRET"), "{outcome}");
    let outcome = with_file(Path::new("/nonexistent/key.json"));
    assert!(outcome.contains("/nonexistent/key.json") && outcome.contains("cannot be read"), "{outcome}");
}

#[test]
fn the_sdks_log_which_shows_keys_is_refused() {
    let outcome = child(&[("PAGESEAL_GCP_ENDPOINT", "http://127.0.0.1:1"), ("GOOGLE_CLOUD_RUST_LOGGING", "true")]);
    assert!(outcome.starts_with("not made: Misconfigured: GOOGLE_CLOUD_RUST_LOGGING is true"), "{outcome}");
}

#[test]
fn tls_works_beside_every_other_feature_and_an_unknown_authority_is_told() {
    let cloud = FakeCloudKms::start_with_tls();
    let error = wrap(&GoogleKms::builder(KEY).endpoint(cloud.url()).credentials(token(GOOD_TOKEN)).build().unwrap());
    let error = error.unwrap_err();
    assert_eq!(error.class, KmsClass::Misconfigured, "{error}");
    assert!(error.to_string().contains("the certificate of https://127.0.0.1:"), "{error}");
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());

    let (metadata, url) = (Fake::start(), cloud.url());
    let metadata = metadata.cloud.address().to_string();
    let certificate = cloud.certificate().unwrap().to_str().unwrap();
    let environment = [
        ("PAGESEAL_GCP_ENDPOINT", url.as_str()),
        ("GCE_METADATA_HOST", metadata.as_str()),
        ("SSL_CERT_FILE", certificate),
    ];
    assert_eq!(child(&environment), "good");
}

#[test]
fn what_a_cluster_costs_in_calls() {
    let fake = Fake::start();
    let directory = Directory::new("costs");
    let (home, wrappers) = (directory.0.join("cluster"), || Wrappers::one(fake.google().clone()));
    let calls = |what: &str| {
        let seen = fake.cloud.take_seen();
        let count = |verb: &str| seen.iter().filter(|(target, _)| target.contains(verb)).count();
        let calls = (count(":encrypt"), count(":decrypt"));
        println!("{what}: {} encrypt, {} decrypt", calls.0, calls.1);
        calls
    };
    let cluster = Cluster::create(&home, ClusterOptions::new(), wrappers()).unwrap();
    let id = cluster.id();
    let create = calls("create a cluster");
    let orders = cluster.create_database("orders").unwrap();
    let create_database = calls("create a database");
    orders.rotate().unwrap();
    let rotate = calls("rotate a database");
    cluster.check_master_key().unwrap();
    let check = calls("check the master key");
    fake.cloud.rotate();
    cluster.rewrap(wrappers(), &|_| ()).unwrap();
    let rewrap = calls("rewrap, one database of two generations");
    drop((orders, cluster));
    let cluster = Cluster::open(&home, ClusterOptions::new().expected_id(id), wrappers()).unwrap();
    let open = calls("open a cluster");
    cluster.database("orders").unwrap();
    let open_database = calls("open a database of two generations");
    // As docs/kms/gcp.md says.
    let costs = [create, create_database, rotate, check, rewrap, open, open_database];
    assert_eq!(costs, [(2, 2), (1, 1), (1, 1), (0, 1), (4, 10), (0, 1), (0, 2)]);
}

#[test]
fn an_operator_sees_what_the_documentation_says() {
    let fake = Fake::start();
    let directory = Directory::new("words");
    let home = directory.0.join("cluster");
    let cluster = Cluster::create(&home, ClusterOptions::new(), Wrappers::one(fake.google().clone())).unwrap();
    let id = cluster.id();
    drop(cluster);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/kms/gcp.md");
    let documentation = std::fs::read_to_string(path).unwrap();
    let cases = [
        ("state_disabled.json", ErrorKind::Disabled, "the master key is disabled; enable it to regain the data"),
        ("state_disabled.json", ErrorKind::Disabled, "is not enabled, current state is: DISABLED."),
        ("state_destroy_scheduled.json", ErrorKind::Deleted, "the master key is deleted; restore exactly this key"),
        ("state_destroy_scheduled.json", ErrorKind::Deleted, "current state is: DESTROY_SCHEDULED."),
        ("permission_denied.json", ErrorKind::Denied, "access denied; check the credentials and the key's policy"),
        ("permission_denied.json", ErrorKind::Denied, "Permission 'cloudkms.cryptoKeyVersions.useToDecrypt' denied"),
        ("unauthenticated.json", ErrorKind::Denied, "UNAUTHENTICATED: Request had invalid authentication credentials."),
        ("key_not_found.json", ErrorKind::Misconfigured, "check the key's name"),
        (
            "service_disabled.json",
            ErrorKind::Misconfigured,
            "the project that is charged for the request may not make it: PERMISSION_DENIED",
        ),
        ("robot_404.html", ErrorKind::Misconfigured, "answered 404, not as Cloud KMS does; check the endpoint"),
        (
            "ciphertext_wrong_key.json",
            ErrorKind::BadCiphertext,
            "Decryption failed: verify that 'name' refers to the correct CryptoKey.",
        ),
        ("state_of_another_version.json", ErrorKind::BadCiphertext, "the record says that version"),
        ("checksum_mismatch.json", ErrorKind::Unreachable, "the request was corrupted in transit"),
        ("unavailable.json", ErrorKind::Unreachable, "answered 503: The service is currently unavailable."),
        ("quota.json", ErrorKind::Unreachable, "the key service asked to slow down; try again later"),
        ("proxy_403.html", ErrorKind::Unclassified, "answered 403, not as Cloud KMS does"),
        ("precondition_other.json", ErrorKind::Unclassified, "unclassified failure"),
    ];
    for (file, kind, text) in cases {
        let status = SERVICE.iter().find(|row| row.0 == file).unwrap().1;
        fake.cloud.answer_with(move |_| Some(Answer::json(status, body(file))));
        let options = ClusterOptions::new().expected_id(id).kms_timeout(Duration::from_secs(1));
        let error = Cluster::open(&home, options, Wrappers::one(fake.google().clone())).map(drop).unwrap_err();
        assert_eq!(error.kind(), kind, "{file}: {error}");
        assert!(error.to_string().contains(text), "{file}: {error}");
        assert!(documentation.contains(text), "docs/kms/gcp.md does not say: {text}");
    }
}
