//! The key services that the tests run on: one line each, with its quirks.

use pageseal::testing::conformance::{Behaviour, KeyService, run};

/// A key service to run the suite on. A new provider is one more of these in [`ENTRIES`].
pub struct Entry {
    /// As in figures: `aws`.
    pub provider: &'static str,
    /// As in figures: `moto`.
    pub server: &'static str,
    /// How much of a key service the server is.
    pub kind: Kind,
    /// Starts it; or says why it cannot run here.
    pub start: fn() -> Result<Box<dyn KeyService>, String>,
    /// What this server, not pageseal, does otherwise. Each must fail its row, or it is no quirk.
    pub quirks: &'static [(Behaviour, &'static str)],
}

/// How much of a key service a server is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The product itself.
    Product,
    /// Another's implementation of the service's interface.
    Emulator,
    /// Ours, which replays what is documented, because nothing else runs here.
    Fake,
}

impl Kind {
    /// As in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Product => "real",
            Self::Emulator => "emulator",
            Self::Fake => "fake",
        }
    }
}

/// Every key service that runs here.
pub const ENTRIES: &[Entry] = &[
    #[cfg(feature = "aws")]
    Entry {
        provider: "aws",
        server: "moto",
        kind: Kind::Emulator,
        start: crate::aws::moto,
        quirks: crate::aws::MOTO_QUIRKS,
    },
    #[cfg(feature = "aws")]
    Entry {
        provider: "aws",
        server: "ministack",
        kind: Kind::Emulator,
        start: crate::aws::ministack,
        quirks: crate::aws::MINISTACK_QUIRKS,
    },
    #[cfg(feature = "azure")]
    Entry { provider: "azure", server: "fake", kind: Kind::Fake, start: crate::azure::fake, quirks: &[] },
    #[cfg(feature = "azure")]
    Entry {
        provider: "azure",
        server: "fake-managed-hsm",
        kind: Kind::Fake,
        start: crate::azure::fake_managed_hsm,
        quirks: &[],
    },
    #[cfg(feature = "gcp")]
    Entry { provider: "gcp", server: "fake", kind: Kind::Fake, start: crate::gcp::fake, quirks: &[] },
    #[cfg(feature = "vault")]
    Entry { provider: "vault", server: "openbao", kind: Kind::Product, start: crate::vault::openbao, quirks: &[] },
];

/// Holds a service to every row that it can show, and reports: for those that run only where credentials are given.
///
/// # Panics
/// If a row fails.
pub fn hold(provider: &str, server: &str, real: &str, service: &dyn KeyService) {
    let report = run(service, &[]);
    let (behaviours, passed, skipped) = (report.rows().len(), report.passed(), report.skipped());
    println!("{report}");
    println!(
        "SCORE kms provider={provider} server={server} real={real} behaviours={behaviours} passed={passed} skipped={skipped}"
    );
    report.assert_passed();
}
