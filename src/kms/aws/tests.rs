//! The settings, and what is sent.

use std::collections::HashMap;

use super::record::LONGEST_BLOB;
use super::*;
use crate::error::ErrorKind;
use crate::format::wrapped::Purpose;
use crate::ids::{ClusterId, DatabaseId, Generation};

const ARN: &str = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab";

fn context(purpose: Purpose, database: Option<DatabaseId>) -> WrapContext<'static> {
    WrapContext {
        cluster: ClusterId::from_bytes([0xc1; 16]),
        database,
        generation: Generation::new(0x0001_0203).unwrap(),
        purpose,
        deadline: Instant::now(),
        label: "never bound",
    }
}

#[test]
fn golden_encryption_context() {
    let shown = |purpose, database| {
        let mut entries: Vec<_> = encryption_context(&context(purpose, database)).into_iter().collect();
        entries.sort();
        entries.into_iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    };
    let cluster = "pageseal:cluster=c1c1c1c1c1c1c1c1c1c1c1c1c1c1c1c1";
    let rest = "pageseal:generation=66051";
    assert_eq!(
        shown(Purpose::Data, Some(DatabaseId::from_bytes([0xd2; 16]))),
        format!(
            "{cluster} pageseal:database=d2d2d2d2d2d2d2d2d2d2d2d2d2d2d2d2 {rest} pageseal:purpose=data pageseal:version=1"
        )
    );
    assert_eq!(shown(Purpose::Cluster, None), format!("{cluster} {rest} pageseal:purpose=cluster pageseal:version=1"));
    assert_eq!(shown(Purpose::Probe, None), format!("{cluster} {rest} pageseal:purpose=probe pageseal:version=1"));
}

#[test]
fn golden_blob() {
    let arn = KeyArn::parse(ARN).unwrap();
    let blob = framed(&arn, b"ciphertext").unwrap();
    assert_eq!(blob, [b"\x01\x4b", ARN.as_bytes(), b"ciphertext"].concat());
    let key = |blob: &[u8]| WrappedKey {
        master_key: MasterKeyId::new(PROVIDER, "x"),
        key_version: String::new(),
        blob: blob.to_vec(),
    };
    assert_eq!(recorded(&key(&blob)).unwrap(), (arn.clone(), &b"ciphertext"[..]));
    // Cut anywhere but in the ciphertext, with a longer or shorter name, of another format, or with a version.
    for len in 0..blob.len() - b"ciphertext".len() + 1 {
        assert_eq!(recorded(&key(&blob[..len])).unwrap_err().class, KmsClass::BadCiphertext, "{len}");
    }
    for (at, value) in [(0, 0), (0, 2), (1, 0), (1, 0x4a), (1, 0x4c), (1, 255)] {
        let mut other = blob.clone();
        other[at] = value;
        assert_eq!(recorded(&key(&other)).unwrap_err().class, KmsClass::BadCiphertext, "{at} {value}");
    }
    let versioned = WrappedKey { key_version: "1".into(), ..key(&blob) };
    assert_eq!(recorded(&versioned).unwrap_err().class, KmsClass::BadCiphertext);
    let overhead = 2 + ARN.len();
    assert_eq!(framed(&arn, &vec![0; LONGEST_BLOB - overhead]).map(|blob| blob.len()), Some(LONGEST_BLOB));
    assert!(framed(&arn, &vec![0; LONGEST_BLOB - overhead + 1]).is_none() && framed(&arn, b"").is_none());
}

fn refusal(outcome: Result<AwsKms>) -> String {
    let error = outcome.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Misconfigured);
    error.to_string()
}

#[test]
fn a_setting_that_cannot_work_is_told() {
    let good = || AwsKms::builder(ARN);
    let cases = [
        (AwsKms::builder("pageseal"), "an alias is written alias/NAME"),
        (AwsKms::builder(""), "is empty"),
        (good().region("us-east-1"), "is in the region eu-west-1, and the region is set to us-east-1"),
        (good().region(""), "the AWS region \"\" is none"),
        (AwsKms::builder("alias/x").region("Frankfurt"), "the AWS region \"Frankfurt\" is none"),
        (good().endpoint_url("http://kms.internal:80"), "in the clear"),
        (good().endpoint_url(""), "no URL"),
        (good().profile(""), "the AWS profile is empty"),
        (good().credentials(AwsCredentials::new("", "secret")), "the access key id of the AWS credentials is empty"),
        (good().credentials(AwsCredentials::new("AKIA", "")), "the secret access key of the AWS credentials is empty"),
        (good().credentials(AwsCredentials::new("AKIA", "secret\n")), "a line end"),
        (good().credentials(AwsCredentials::new("AKIA", "s").session_token("")), "the session token"),
        (good().ca_file("/nonexistent/ca.pem"), "/nonexistent/ca.pem cannot be read"),
    ];
    for (builder, expected) in cases {
        let text = refusal(builder.build());
        assert!(text.contains(expected), "{text}");
        assert!(!text.contains("secret\n"), "{text}");
    }
    for builder in [good(), good().region("eu-west-1"), good().endpoint_url("http://kms.internal").allow_plain_http()] {
        assert!(builder.build().is_ok());
    }
}

#[test]
fn a_variable_that_is_missing_or_wrong_is_named() {
    let lookup = |set: &[(&str, &str)]| {
        let set: HashMap<String, String> = set.iter().map(|&(name, value)| (name.into(), value.into())).collect();
        AwsKms::from_lookup(move |name| set.get(name).cloned())
    };
    let key = ("PAGESEAL_AWS_KEY", ARN);
    let cases: [(&[(&str, &str)], &str); 9] = [
        (&[], "PAGESEAL_AWS_KEY is not set: it names the master key, for example PAGESEAL_AWS_KEY=arn:aws:kms:"),
        (&[("PAGESEAL_AWS_KEY", "")], "PAGESEAL_AWS_KEY is not set"),
        (&[("PAGESEAL_AWS_KEY", "my-key")], "PAGESEAL_AWS_KEY, \"my-key\", names the key"),
        (&[key, ("AWS_REGION", "Ireland")], "AWS_REGION is \"Ireland\""),
        (&[key, ("AWS_ACCESS_KEY_ID", "AKIA")], "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, one is set"),
        (&[key, ("AWS_SECRET_ACCESS_KEY", "x")], "one is set without the other"),
        (&[key, ("AWS_ENDPOINT_URL", "http://kms.internal")], "AWS_ENDPOINT_URL is http://kms.internal"),
        (&[key, ("AWS_ENDPOINT_URL_KMS", "kms")], "AWS_ENDPOINT_URL_KMS is no URL"),
        (&[key, ("AWS_CA_BUNDLE", "/nonexistent/ca.pem")], "AWS_CA_BUNDLE: the file of certificate authorities"),
    ];
    for (set, expected) in cases {
        let text = refusal(lookup(set));
        assert!(text.contains(expected), "{text}");
    }
    let made = lookup(&[key, ("AWS_REGION", "us-east-1"), ("AWS_ENDPOINT_URL", "http://127.0.0.1:1")]).unwrap();
    assert_eq!(made.id().to_string(), "aws-kms:1234abcd-12ab-34cd-56ef-1234567890ab");
    assert_eq!(made.0.get_ref().region.as_deref(), Some("eu-west-1"), "the ARN's region counts");
}

#[test]
fn no_debug_output_shows_a_secret() {
    let credentials = AwsCredentials::new("AKIAEXAMPLE", "topsecret").session_token("toptoken");
    let builder = AwsKms::builder("alias/x").credentials(credentials.clone());
    let wrapper = builder.clone().build().unwrap();
    for text in
        [format!("{credentials:?}"), format!("{builder:?}"), format!("{wrapper:?}"), format!("{:?}", credentials.0)]
    {
        assert!(!text.contains("topsecret") && !text.contains("toptoken"), "{text}");
    }
}

#[test]
fn credentials_that_cannot_be_ones_replace_nothing() {
    let wrapper = AwsKms::builder("alias/x").credentials(AwsCredentials::new("AKIA", "good")).build().unwrap();
    assert!(wrapper.replace_credentials(AwsCredentials::new("AKIA", "")).is_err());
    let held =
        |wrapper: &AwsKms| wrapper.0.get_ref().state().credentials.as_ref().unwrap().secret_access_key().to_owned();
    assert_eq!(held(&wrapper), "good");
    let clone = wrapper.clone();
    wrapper.replace_credentials(AwsCredentials::new("AKIA", "better")).unwrap();
    assert_eq!(held(&clone), "better");
}

#[test]
fn a_wrapper_rewraps_what_its_own_key_wrapped_under_any_name() {
    let key = |master_key: &str, arn: &str| WrappedKey {
        master_key: MasterKeyId::new(PROVIDER, master_key),
        key_version: String::new(),
        blob: KeyArn::parse(arn).and_then(|arn| framed(&arn, b"x")).unwrap_or_default(),
    };
    let by_id = AwsKms::builder("1234abcd-12ab-34cd-56ef-1234567890ab").build().unwrap();
    let by_alias = AwsKms::builder("alias/x").build().unwrap();
    let other = ARN.replace("1234abcd", "00000000");
    assert!(
        by_id.can_rewrap(&key("alias/x", ARN)) && by_id.can_rewrap(&key("1234abcd-12ab-34cd-56ef-1234567890ab", ""))
    );
    assert!(!by_id.can_rewrap(&key("alias/x", &other)) && !by_id.can_rewrap(&key("alias/x", "")));
    assert!(by_alias.can_rewrap(&key("alias/x", &other)) && !by_alias.can_rewrap(&key("alias/y", ARN)));
    let foreign = WrappedKey { master_key: MasterKeyId::new("gcp-kms", "x"), ..key("x", ARN) };
    assert!(!by_id.can_rewrap(&foreign));
}
