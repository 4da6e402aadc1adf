//! The conformance suite on every key service: one line each, with its quirks. The table goes into docs/KMS.md, and this test
//! fails while that page says anything else; `PAGESEAL_WRITE_TABLE=1` brings it up to date.

use std::path::Path;
use std::sync::Mutex;
use std::{env, fs, thread};

use std::sync::Arc;

use pageseal::testing::conformance::{Behaviour, Cannot, Fault, KeyService, Outcome, Report, Step, run, try_one};
use pageseal::{KeyPayload, KeyWrapper, KmsClass, KmsError, MasterKeyId, WrapContext, WrappedKey};
use pageseal_kms_tests::table::{ENTRIES, Entry, Kind};
use pageseal_proofs::{score, skipped};

/// What one run over all services brought.
struct Column {
    entry: &'static Entry,
    report: Report,
    /// A wrapper that hides every verdict was seen to fail on this service.
    control: bool,
}

#[test]
fn every_key_service_keeps_every_promise_and_the_page_says_so() {
    let ran: Mutex<Vec<(usize, Column)>> = Mutex::default();
    thread::scope(|scope| {
        for (index, entry) in ENTRIES.iter().enumerate() {
            let ran = &ran;
            scope.spawn(move || match (entry.start)() {
                Ok(service) => {
                    let report = run(&*service, entry.quirks);
                    let control = a_hushed_wrapper_fails(&*service, &report);
                    ran.lock().expect("no run panics").push((index, Column { entry, report, control }));
                }
                Err(why) => skipped(&format!("kms {} on {}", entry.provider, entry.server), &why),
            });
        }
    });
    let mut ran = ran.into_inner().expect("no run panics");
    ran.sort_by_key(|(index, _)| *index);
    let columns: Vec<Column> = ran.into_iter().map(|(_, column)| column).collect();
    for Column { entry, report, control } in &columns {
        println!("{} on {}:\n{report}", entry.provider, entry.server);
        figures(entry, entry.server, report.passed(), report.skipped(), *control);
    }
    union("aws", &columns);
    // Every client was given its TLS provider; none installed one for the process.
    assert!(rustls::crypto::CryptoProvider::get_default().is_none());
    for column in &columns {
        column.report.assert_passed();
        assert!(column.control, "{} on {}: nothing would be noticed", column.entry.provider, column.entry.server);
    }
    if cfg!(all(feature = "aws", feature = "azure", feature = "gcp", feature = "vault"))
        && columns.len() == ENTRIES.len()
    {
        compare_with_the_page(&table(&columns));
    }
}

fn figures(entry: &Entry, server: &str, passed: usize, skipped: usize, control: bool) {
    let real = if entry.kind == Kind::Fake { "fake" } else { "yes" };
    let (provider, all, control) = (entry.provider, Behaviour::ALL.len(), u8::from(control));
    score(&format!(
        "kms provider={provider} server={server} real={real} behaviours={all} passed={passed} skipped={skipped} control={control}"
    ));
}

/// A provider with several servers, each of which shows what the others cannot: together they must show everything.
fn union(provider: &str, columns: &[Column]) {
    let of: Vec<&Column> = columns.iter().filter(|column| column.entry.provider == provider).collect();
    let Some(first) = of.first() else { return };
    let passes = |row: Behaviour| of.iter().any(|column| *column.report.outcome(row) == Outcome::Passed);
    let missing: Vec<Behaviour> = Behaviour::ALL.into_iter().filter(|row| !passes(*row)).collect();
    let passed = Behaviour::ALL.len() - missing.len();
    figures(first.entry, "union", passed, missing.len(), of.iter().all(|column| column.control));
    assert!(missing.is_empty(), "no server of {provider} shows {missing:?}");
}

/// That the suite notices a wrapper that calls every failure unreachable.
fn a_hushed_wrapper_fails(service: &dyn KeyService, report: &Report) -> bool {
    let shown = |row: &Behaviour| *report.outcome(*row) == Outcome::Passed;
    let row = [Behaviour::Denied, Behaviour::Disabled, Behaviour::Tampered].into_iter().find(shown);
    row.is_some_and(|row| matches!(try_one(&Hushed(service), row), Outcome::Failed(_)))
}

struct Hushed<'a>(&'a dyn KeyService);

impl KeyService for Hushed<'_> {
    fn wrapper(&self) -> Arc<dyn KeyWrapper> {
        Arc::new(HushedWrapper(self.0.wrapper()))
    }
    fn perform(&self, step: Step) -> Result<(), Cannot> {
        self.0.perform(step)
    }
    fn inflict(&self, fault: Fault) -> Result<(), Cannot> {
        self.0.inflict(fault)
    }
}

struct HushedWrapper(Arc<dyn KeyWrapper>);

fn hush<T>(outcome: Result<T, KmsError>) -> Result<T, KmsError> {
    outcome.map_err(|_| KmsError::new(KmsClass::Unreachable))
}

impl KeyWrapper for HushedWrapper {
    fn id(&self) -> MasterKeyId {
        self.0.id()
    }
    fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
        hush(self.0.wrap_key(key, cx))
    }
    fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
        hush(self.0.unwrap_key(key, cx))
    }
}

/// The table as Markdown, with a note for each row that a server cannot show.
fn table(columns: &[Column]) -> String {
    let mut notes: Vec<String> = Vec::new();
    let head = |pick: &dyn Fn(&Column) -> String| {
        columns.iter().map(|column| format!(" {} |", pick(column))).collect::<String>()
    };
    let mut out =
        format!("| behaviour |{}\n", head(&|column| format!("{}: {}", column.entry.provider, column.entry.server)));
    out.push_str(&format!("|---|{}\n", head(&|_| "---".into())).replace(" --- |", "---|"));
    out.push_str(&format!("| *what ran* |{}\n", head(&|column| format!("*{}*", column.entry.kind.name()))));
    for row in Behaviour::ALL {
        let cells: String = columns
            .iter()
            .map(|column| match column.report.outcome(row) {
                Outcome::Skipped(why) => {
                    let note = format!("{} on {}: {why}", column.entry.provider, column.entry.server);
                    let number = notes.iter().position(|known| *known == note).unwrap_or_else(|| {
                        notes.push(note);
                        notes.len() - 1
                    });
                    format!(" — [{}] |", number + 1)
                }
                Outcome::Passed => " yes |".to_owned(),
                _ => " FAILED |".to_owned(),
            })
            .collect();
        out.push_str(&format!("| **{row}**: {} |{cells}\n", row.promise()));
    }
    for (index, note) in notes.iter().enumerate() {
        out.push_str(&format!("\n[{}] {note}.\n", index + 1));
    }
    out
}

fn compare_with_the_page(table: &str) {
    const BEGIN: &str = "<!-- The table below is written by tests/kms/tests/conformance.rs. -->\n";
    const END: &str = "<!-- The table above. -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/KMS.md");
    let page = fs::read_to_string(&path).expect("docs/KMS.md is there");
    let (before, rest) = page.split_once(BEGIN).expect("docs/KMS.md has the mark before the table");
    let (written, after) = rest.split_once(END).expect("docs/KMS.md has the mark after the table");
    if env::var_os("PAGESEAL_WRITE_TABLE").is_some() {
        fs::write(&path, format!("{before}{BEGIN}{table}{END}{after}")).expect("docs/KMS.md can be written");
    } else {
        assert!(
            written == table,
            "docs/KMS.md shows another table than what ran; PAGESEAL_WRITE_TABLE=1 mends it:\n{table}"
        );
    }
}
