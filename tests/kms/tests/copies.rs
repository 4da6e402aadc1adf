//! How many copies of a key each client leaves in memory that is not pageseal's. Measured and reported, for docs/KMS.md: the
//! buffers of an SDK are not ours to wipe. One test, because the whole process is searched.

use pageseal::testing::conformance::copies_left;
use pageseal_kms_tests::table::ENTRIES;
use pageseal_proofs::{score, skipped};

#[test]
fn copies_of_a_key_that_each_client_leaves_are_counted() {
    const TIMES: usize = 20;
    for entry in ENTRIES {
        let name = format!("kms-copies {} on {}", entry.provider, entry.server);
        match (entry.start)() {
            Ok(service) => {
                let copies = copies_left(&*service, TIMES).unwrap_or_else(|error| panic!("{name}: {error}"));
                let (provider, server) = (entry.provider, entry.server);
                let (raw, base64) = (copies.raw, copies.base64);
                score(&format!(
                    "kms-copies provider={provider} server={server} calls={} raw={raw} base64={base64}",
                    2 * TIMES
                ));
            }
            Err(why) => skipped(&name, &why),
        }
    }
}
