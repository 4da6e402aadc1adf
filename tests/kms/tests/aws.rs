//! AWS KMS beyond the rows of the conformance suite.

use std::sync::OnceLock;

use pageseal::testing::conformance::{Report, run};
use pageseal_kms_tests::aws::{MINISTACK_QUIRKS, MOTO_QUIRKS, ministack, moto, union};

fn score(server: &str, report: &Report) {
    let (behaviours, passed, skipped) = (report.rows().len(), report.passed(), report.skipped());
    println!("{report}");
    println!(
        "SCORE kms provider=aws server={server} real=fake behaviours={behaviours} passed={passed} skipped={skipped}"
    );
}

/// Both emulators are run once.
fn report(server: &str) -> &'static Report {
    static MOTO: OnceLock<Report> = OnceLock::new();
    static MINISTACK: OnceLock<Report> = OnceLock::new();
    match server {
        "moto" => MOTO.get_or_init(|| run(&*moto().unwrap(), MOTO_QUIRKS)),
        _ => MINISTACK.get_or_init(|| run(&*ministack().unwrap(), MINISTACK_QUIRKS)),
    }
}

#[test]
fn conformance_on_moto() {
    score("moto", report("moto"));
    report("moto").assert_passed();
}

#[test]
fn conformance_on_ministack() {
    score("ministack", report("ministack"));
    report("ministack").assert_passed();
}

#[test]
fn every_row_is_shown_by_one_emulator_at_least() {
    let (passed, skipped) = union(&[report("moto").clone(), report("ministack").clone()]);
    println!(
        "SCORE kms provider=aws server=union real=fake behaviours={} passed={passed} skipped={skipped}",
        passed + skipped
    );
    assert_eq!(skipped, 0);
}
