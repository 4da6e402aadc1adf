//! AWS KMS beyond the rows of the conformance suite.

use pageseal::testing::conformance::{Report, run};
use pageseal_kms_tests::aws::{Emulator, MINISTACK_QUIRKS, MOTO_QUIRKS, union};

fn score(server: &str, real: bool, report: &Report) {
    let real = if real { "yes" } else { "fake" };
    let (behaviours, passed, skipped) = (report.rows().len(), report.passed(), report.skipped());
    println!("{report}");
    println!(
        "SCORE kms provider=aws server={server} real={real} behaviours={behaviours} passed={passed} skipped={skipped}"
    );
}

#[test]
fn conformance_on_moto_and_ministack_and_both_together() {
    let moto = std::thread::spawn(|| run(&Emulator::moto().unwrap(), MOTO_QUIRKS));
    let ministack = run(&Emulator::ministack().unwrap(), MINISTACK_QUIRKS);
    let moto = moto.join().unwrap();
    score("moto", false, &moto);
    score("ministack", false, &ministack);
    let (passed, skipped) = union(&[moto.clone(), ministack.clone()]);
    println!(
        "SCORE kms provider=aws server=union real=fake behaviours={} passed={passed} skipped={skipped}",
        passed + skipped
    );
    moto.assert_passed();
    ministack.assert_passed();
    assert_eq!(skipped, 0, "a row is shown by neither emulator");
}
