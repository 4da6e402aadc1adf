//! What Azure's adapter does beyond the conformance rows. Everything here is against a **fake**, but for `live_…`, which
//! needs a real vault.
#![cfg(feature = "azure")]

use pageseal::testing::conformance::{Behaviour, KeyService, run};
use pageseal_kms_tests::azure;

fn conformance(server: &str, real: &str, service: &dyn KeyService, quirks: &[(Behaviour, &str)]) {
    let report = run(service, quirks);
    println!("{report}");
    println!(
        "SCORE kms provider=azure-key-vault server={server} real={real} behaviours={} passed={} skipped={}",
        report.rows().len(),
        report.passed(),
        report.skipped()
    );
    report.assert_passed();
}

#[test]
fn conformance_on_fake() {
    conformance("fake", "fake", &*azure::fake().unwrap(), azure::FAKE_QUIRKS);
}

#[test]
fn conformance_on_fake_managed_hsm() {
    conformance("fake-managed-hsm", "fake", &*azure::fake_managed_hsm().unwrap(), azure::FAKE_MANAGED_HSM_QUIRKS);
}
