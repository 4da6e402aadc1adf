//! `GoogleKms` against a fake of Google Cloud KMS: conformance, and what the rows do not show.
#![cfg(feature = "gcp")]

use pageseal::testing::conformance::{Behaviour, KeyService, run};
use pageseal_kms_tests::gcp::{FAKE_QUIRKS, fake, live};

fn conformance(service: &dyn KeyService, server: &str, real: &str, quirks: &[(Behaviour, &str)]) {
    let report = run(service, quirks);
    let (rows, passed, skipped) = (report.rows().len(), report.passed(), report.skipped());
    println!(
        "SCORE kms provider=google-cloud-kms server={server} real={real} behaviours={rows} passed={passed} skipped={skipped}"
    );
    println!("{report}");
    report.assert_passed();
}

#[test]
fn conformance_on_fake() {
    conformance(&*fake().unwrap(), "fake", "fake", FAKE_QUIRKS);
}

#[test]
fn live_conformance_on_google() {
    match live() {
        Ok(service) => conformance(&*service, "google", "yes", &[]),
        Err(why) => println!("not run against Google itself: {why}"),
    }
}
