//! Settings and answers, without a network: what a service says through the real client is tested in tests/kms/tests/gcp.rs.

use std::collections::HashMap;

use google_cloud_auth::errors::CredentialsError;
use google_cloud_gax::error::rpc::Status;
use http::HeaderMap;

use super::*;
use crate::error::ErrorKind;
use crate::keys::calls::fixtures::payload;

const KEY: &str = "projects/p/locations/global/keyRings/r/cryptoKeys/k";

fn wrapper() -> GoogleKms {
    GoogleKms::builder(KEY).credentials(GoogleCredentials::anonymous()).build().unwrap()
}

fn from(settings: &[(&str, &str)]) -> Result<GoogleKms> {
    let settings: HashMap<_, _> = settings.iter().copied().collect();
    GoogleKms::from_lookup(&|name| settings.get(name).map(OsString::from))
}

fn refused<T>(outcome: Result<T>) -> String {
    let error = outcome.err().expect("the settings are wrong");
    assert_eq!(error.kind(), ErrorKind::Misconfigured);
    error.to_string()
}

#[test]
fn a_wrong_setting_is_told_with_its_variable_and_an_example() {
    type Case = (&'static [(&'static str, &'static str)], &'static [&'static str]);
    let cases: [Case; 8] = [
        (
            &[("PAGESEAL_GCP_KEY", KEY), ("GOOGLE_CLOUD_UNIVERSE_DOMAIN", "")],
            &["GOOGLE_CLOUD_UNIVERSE_DOMAIN or the universe domain is set to nothing"],
        ),
        (&[], &["PAGESEAL_GCP_KEY is not set", EXAMPLE]),
        (&[("PAGESEAL_GCP_KEY", "")], &["PAGESEAL_GCP_KEY is not set", EXAMPLE]),
        (&[("PAGESEAL_GCP_KEY", "my-key")], &["PAGESEAL_GCP_KEY: piece 1 must be \"projects\"", EXAMPLE]),
        (
            &[("PAGESEAL_GCP_KEY", "projects/p/locations/l/keyRings/r/cryptoKeys/k/cryptoKeyVersions/1")],
            &["PAGESEAL_GCP_KEY: ", "leave /cryptoKeyVersions/N away"],
        ),
        (
            &[("PAGESEAL_GCP_KEY", KEY), ("PAGESEAL_GCP_ENDPOINT", "cloudkms.googleapis.com")],
            &["PAGESEAL_GCP_ENDPOINT \"cloudkms.googleapis.com\" has no scheme", "https://cloudkms."],
        ),
        (
            &[("PAGESEAL_GCP_KEY", KEY), ("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")],
            &["/nowhere/key.json, named by GOOGLE_APPLICATION_CREDENTIALS, cannot be read: No such file"],
        ),
        (
            &[("PAGESEAL_GCP_KEY", KEY), ("GOOGLE_APPLICATION_CREDENTIALS", "")],
            &["GOOGLE_APPLICATION_CREDENTIALS is set to nothing"],
        ),
    ];
    for (settings, expected) in cases {
        let text = refused(from(settings));
        assert!(expected.iter().all(|part| text.contains(part)), "{settings:?}: {text}");
    }
}

#[test]
fn what_is_not_utf8_is_told() {
    use std::os::unix::ffi::OsStringExt;
    let text = refused(GoogleKms::from_lookup(&|name| {
        (name == "PAGESEAL_GCP_KEY").then(|| OsString::from_vec(vec![b'p', 0xff]))
    }));
    assert!(text.contains("PAGESEAL_GCP_KEY is not UTF-8"), "{text}");
}

#[test]
fn the_name_of_the_key_is_the_id() {
    let id = from(&[("PAGESEAL_GCP_KEY", KEY), ("PAGESEAL_GCP_ENDPOINT", "https://10.0.0.1:8443/")]).unwrap().id();
    assert_eq!((id.provider.as_str(), id.key.as_str()), ("google-cloud-kms", KEY));
}

#[test]
fn keys_are_not_sent_in_the_clear_except_to_this_machine() {
    for good in [
        "https://cloudkms.googleapis.com",
        "https://cloudkms.europe-west3.rep.googleapis.com/",
        "https://10.1.2.3:8443",
        "http://127.0.0.1:8080",
        "http://localhost:1",
        "http://[::1]:80",
        "https://[2001:db8::1]",
    ] {
        assert_eq!(check_endpoint(good), Ok(()), "{good}");
    }
    for bad in [
        "",
        "cloudkms.googleapis.com",
        "http://cloudkms.googleapis.com",
        "http://10.1.2.3:8443",
        "http://127.0.0.1.example.com",
        "http://localhost.example.com",
        "http://localhost@example.com",
        "https://user:secret@example.com",
        "https://",
        "https://host/path",
        "https://host?query",
        "https://host:port",
        "https://[::1",
        "ftp://127.0.0.1",
    ] {
        assert!(check_endpoint(bad).is_err(), "{bad}");
    }
}

#[test]
fn wrong_credentials_are_refused_and_leave_the_old_ones_in_place() {
    let wrapper = wrapper();
    let (before, _) = wrapper.0.get_ref().slot.session().unwrap();
    let text = refused(wrapper.replace_credentials(GoogleCredentials::json("SECRET")));
    assert!(text.contains("no JSON") && !text.contains("SECRET"), "{text}");
    let (after, fresh) = wrapper.0.get_ref().slot.session().unwrap();
    assert!(Arc::ptr_eq(&before, &after) && !fresh);
    wrapper.replace_credentials(GoogleCredentials::anonymous()).unwrap();
    assert!(wrapper.0.get_ref().slot.session().unwrap().1);
}

fn answer(ciphertext: &[u8]) -> EncryptResponse {
    EncryptResponse::new()
        .set_name(format!("{KEY}/cryptoKeyVersions/7"))
        .set_ciphertext(Bytes::copy_from_slice(ciphertext))
        .set_ciphertext_crc32c(checksum(ciphertext))
        .set_verified_plaintext_crc32c(true)
        .set_verified_additional_authenticated_data_crc32c(true)
}

#[test]
fn no_answer_counts_whose_checks_fail() {
    let wrapper = wrapper();
    let service = wrapper.0.get_ref();
    let wrapped = service.encrypted(answer(b"ciphertext")).unwrap();
    assert_eq!((wrapped.key_version.as_str(), &wrapped.blob[..]), ("7", &b"ciphertext"[..]));
    let cases = [
        (answer(b"c").set_verified_plaintext_crc32c(false), KmsClass::Unreachable),
        (answer(b"c").set_verified_additional_authenticated_data_crc32c(false), KmsClass::Unreachable),
        (answer(b"c").set_ciphertext_crc32c(checksum(b"d")), KmsClass::Unreachable),
        (answer(b"c").set_or_clear_ciphertext_crc32c(None::<i64>), KmsClass::Unreachable),
        (answer(b"c").set_ciphertext_crc32c(-1), KmsClass::Unreachable),
        (answer(b"c").set_name(KEY), KmsClass::Unclassified),
        (answer(b"c").set_name(format!("{KEY}2/cryptoKeyVersions/7")), KmsClass::Unclassified),
        (answer(b"c").set_name(""), KmsClass::Unclassified),
        (answer(b""), KmsClass::Unclassified),
        (answer(&[7; LONGEST_BLOB + 1]), KmsClass::Unclassified),
    ];
    for (answer, expected) in cases {
        let shown = format!("{answer:?}");
        assert_eq!(service.encrypted(answer).unwrap_err().class, expected, "{shown}");
    }

    let decrypted = |plaintext: &[u8], sum: Option<i64>| {
        let answer = DecryptResponse::new().set_plaintext(Bytes::copy_from_slice(plaintext));
        service.decrypted(answer.set_or_clear_plaintext_crc32c(sum)).map_err(|error| error.class)
    };
    let good = payload(9).with_bytes(|bytes| *bytes).unwrap();
    let opened = decrypted(&good, Some(checksum(&good))).unwrap();
    assert!(opened.with_bytes(|bytes| *bytes == good).unwrap());
    assert_eq!(decrypted(&good, None).err(), Some(KmsClass::Unreachable));
    assert_eq!(decrypted(&good, Some(checksum(&good) ^ 1)).err(), Some(KmsClass::Unreachable));
    for other in [&good[..127], &[&good[..], &[0]].concat(), &[]] {
        assert_eq!(decrypted(other, Some(checksum(other))).err(), Some(KmsClass::BadCiphertext), "{}", other.len());
    }
}

#[test]
fn the_checksum_is_googles() {
    // From RFC 3720, B.4: 32 bytes of zeros; and the check value of CRC-32C.
    assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
    assert_eq!(checksum(b"123456789"), 0xe306_9283);
}

/// What the classifier says to an error object, in decryption of a record of version 7.
fn class_of(code: u16, status: &str, message: &str, details: &str) -> KmsClass {
    let body = format!(
        r#"{{"error": {{"code": {code}, "status": "{status}", "message": "{message}", "details": [{details}]}}}}"#
    );
    let body = Bytes::from(body);
    let error = match Status::try_from(&body) {
        Ok(status) => CallError::service_with_http_metadata(status, Some(code), Some(HeaderMap::new())),
        Err(_) => CallError::http(code, HeaderMap::new(), body),
    };
    let key = KeyName::parse(KEY).unwrap();
    Asked { key: &key, endpoint: "https://e", origin: "o", record: Some("7") }.failed(&error).class
}

fn violation(kind: &str, version: &str) -> String {
    format!(
        r#"{{"@type": "type.googleapis.com/google.rpc.PreconditionFailure",
            "violations": [{{"type": "{kind}", "subject": "{KEY}/cryptoKeyVersions/{version}"}}]}}"#
    )
}

#[test]
fn every_state_of_a_version_has_its_class() {
    let states = [
        ("DISABLED", KmsClass::Disabled),
        ("DESTROYED", KmsClass::Deleted),
        ("DESTROY_SCHEDULED", KmsClass::Deleted),
        ("PENDING_EXTERNAL_DESTRUCTION", KmsClass::Deleted),
        ("EXTERNAL_DESTRUCTION_FAILED", KmsClass::Deleted),
        ("PENDING_GENERATION", KmsClass::Unreachable),
        ("GENERATION_FAILED", KmsClass::Misconfigured),
        ("PENDING_IMPORT", KmsClass::Misconfigured),
        ("IMPORT_FAILED", KmsClass::Misconfigured),
        ("ENABLED", KmsClass::Unclassified),
        ("NEW_STATE", KmsClass::Unclassified),
    ];
    let precondition = |message: &str, details: &str| class_of(400, "FAILED_PRECONDITION", message, details);
    for (state, expected) in states {
        let message = format!("{KEY}/cryptoKeyVersions/7 is not enabled, current state is: {state}.");
        let detail = violation(&format!("KEY_{state}"), "7");
        assert_eq!(precondition(&message, &detail), expected, "{state}, both");
        assert_eq!(precondition(&message, ""), expected, "{state}, message");
        assert_eq!(precondition("Something else.", &detail), expected, "{state}, details");
        // A state of another version than the record's is no verdict on the key.
        let other = message.replace("Versions/7", "Versions/8");
        assert_eq!(precondition(&other, ""), KmsClass::BadCiphertext, "{state}, other version");
        let foreign = message.replace("keyRings/r", "keyRings/s");
        assert_eq!(precondition(&foreign, ""), KmsClass::Unclassified, "{state}, other key");
    }
    let disabled = format!("{KEY}/cryptoKeyVersions/7 is not enabled, current state is: DISABLED.");
    assert_eq!(precondition(&disabled, &violation("KEY_DESTROYED", "7")), KmsClass::Unclassified);
    assert_eq!(precondition(&disabled, &violation("KEY_DISABLED", "8")), KmsClass::Unclassified);
    assert_eq!(precondition("the key is DISABLED", ""), KmsClass::Unclassified);
}

#[test]
fn every_code_has_its_class_and_a_failing_server_is_believed_nothing() {
    use KmsClass::*;
    let cases = [
        (400, "INVALID_ARGUMENT", "Decryption failed: the ciphertext is invalid.", BadCiphertext),
        (400, "INVALID_ARGUMENT", "The checksum in field ciphertext_crc32c did not match.", Unreachable),
        (400, "INVALID_ARGUMENT", "Invalid value at 'name'.", Misconfigured),
        (400, "OUT_OF_RANGE", "", Unclassified),
        (401, "UNAUTHENTICATED", "", Denied),
        (403, "PERMISSION_DENIED", "", Denied),
        (404, "NOT_FOUND", "", Misconfigured),
        (409, "ABORTED", "", Unreachable),
        (409, "ALREADY_EXISTS", "", Unclassified),
        (429, "RESOURCE_EXHAUSTED", "", Throttled),
        (429, "", "", Throttled),
        (499, "CANCELLED", "", Unreachable),
        (500, "INTERNAL", "", Unreachable),
        (500, "DATA_LOSS", "", Unreachable),
        (500, "", "", Unreachable),
        (501, "UNIMPLEMENTED", "", Misconfigured),
        (503, "UNAVAILABLE", "", Unreachable),
        (503, "PERMISSION_DENIED", "", Unreachable),
        (503, "UNAUTHENTICATED", "", Unreachable),
        (504, "DEADLINE_EXCEEDED", "", Unreachable),
        (400, "", "", Unclassified),
        (401, "", "", Unclassified),
        (403, "", "", Unclassified),
        (404, "", "", Misconfigured),
        (302, "", "", Misconfigured),
        (403, "A_NEW_CODE", "", Unclassified),
        (408, "", "", Unreachable),
    ];
    for (code, status, message, expected) in cases {
        assert_eq!(class_of(code, status, message, ""), expected, "{code} {status} {message}");
    }
    let info =
        |reason: &str| format!(r#"{{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "{reason}"}}"#);
    for (reason, expected) in [
        ("IAM_PERMISSION_DENIED", Denied),
        ("A_NEW_REASON", Unclassified),
        ("SECURITY_POLICY_VIOLATED", Misconfigured),
        ("ACCESS_TOKEN_SCOPE_INSUFFICIENT", Misconfigured),
        ("SERVICE_DISABLED", Misconfigured),
        ("BILLING_DISABLED", Misconfigured),
        ("USER_PROJECT_DENIED", Misconfigured),
        ("CONSUMER_SUSPENDED", Misconfigured),
    ] {
        assert_eq!(class_of(403, "PERMISSION_DENIED", "", &info(reason)), expected, "{reason}");
    }
}

#[test]
fn a_date_is_its_second() {
    let seconds =
        |text| failure::parse_date(text).map(|date| date.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs());
    assert_eq!(seconds("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
    assert_eq!(seconds("Sun, 06 Nov 1994 08:49:37 GMT"), Some(784_111_777));
    assert_eq!(seconds("Tue, 29 Feb 2000 12:00:00 GMT"), Some(951_825_600));
    assert_eq!(seconds("Wed, 21 Oct 2026 07:28:00 GMT"), Some(1_792_567_680));
    for wrong in [
        "",
        "x",
        "Wed, 21 Oct",
        "Wed, 21 ctN 2026 07:28:00 GMT",
        "Wed, 1 Jan 1 0:0:0 GMT",
        "a, 99999999999999999999 Jan",
    ] {
        assert_eq!(seconds(wrong), None, "{wrong}");
    }
}

#[test]
fn an_encryption_is_never_a_bad_ciphertext() {
    let status = Status::default().set_code(3).set_message("Decryption failed: how?");
    let error = CallError::service_with_http_metadata(status, Some(400), None);
    let key = KeyName::parse(KEY).unwrap();
    let asked = Asked { key: &key, endpoint: "https://e", origin: "o", record: None };
    assert_eq!(asked.failed(&error).class, KmsClass::Misconfigured);
}

#[test]
fn what_a_service_says_is_quoted_within_bounds_and_on_one_line() {
    let status = Status::default().set_code(7).set_message(format!("a\nb\u{1b}[31m{}", "x".repeat(5000)));
    let error = CallError::service_with_http_metadata(status, Some(403), None);
    let key = KeyName::parse(KEY).unwrap();
    let text = Asked { key: &key, endpoint: "e", origin: "o", record: None }.failed(&error).to_string();
    assert!(text.len() < 500 && !text.chars().any(char::is_control) && text.contains("a b"), "{text}");
}

#[test]
fn a_refusal_of_credentials_that_cannot_fetch_a_token_anew_is_no_verdict() {
    use std::io::{Read, Write};
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 65536]);
            let body = r#"{"error": {"code": 401, "status": "UNAUTHENTICATED", "message": "No."}}"#;
            let head = format!("HTTP/1.1 401 No\r\nConnection: close\r\nContent-Length: {}\r\n\r\n", body.len());
            let _ = stream.write_all((head + body).as_bytes());
        }
    });
    let class = |credentials| {
        let wrapper = GoogleKms::builder(KEY).endpoint(&endpoint).credentials(credentials).build().unwrap();
        let cx = crate::testing::conformance::context(Duration::from_secs(10));
        wrapper.wrap_key(&payload(9), &cx).unwrap_err().class
    };
    let sdk = google_cloud_auth::credentials::anonymous::Builder::new().build();
    assert_eq!(class(GoogleCredentials::sdk(sdk)), KmsClass::Unclassified);
    assert_eq!(class(GoogleCredentials::access_token(|_| Ok("t".into()))), KmsClass::Denied);
    assert_eq!(class(GoogleCredentials::anonymous()), KmsClass::Denied);
}

#[test]
fn the_end_of_a_call_in_want_of_a_token_throws_the_credentials_away() {
    #[derive(Debug)]
    struct Never;
    impl google_cloud_auth::credentials::CredentialsProvider for Never {
        async fn headers(
            &self,
            _: http::Extensions,
        ) -> std::result::Result<google_cloud_auth::credentials::CacheableResource<HeaderMap>, CredentialsError>
        {
            std::future::pending().await
        }
        async fn universe_domain(&self) -> Option<String> {
            None
        }
    }
    let slot = Slot::new(GoogleCredentials::sdk(Never.into()), None);
    let (session, _) = slot.session().unwrap();
    drop(Abandoned(Some((&slot, &session))));
    let (next, fresh) = slot.session().unwrap();
    assert!(fresh && !Arc::ptr_eq(&session, &next));
    // What was thrown away already costs its successor nothing.
    drop(Abandoned(Some((&slot, &session))));
    assert!(Arc::ptr_eq(&slot.session().unwrap().0, &next));
}

#[test]
fn debug_shows_the_key_and_no_credentials() {
    let builder = GoogleKms::builder(KEY).credentials(GoogleCredentials::access_token(|_| Ok("SECRET".into())));
    let shown = format!("{builder:?} {:?}", builder.clone().build().unwrap());
    assert!(shown.contains(KEY) && !shown.contains("SECRET"), "{shown}");
}
