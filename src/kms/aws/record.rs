//! What AWS KMS wrapped, as the keystore keeps it, and what it is bound to. Both are part of the format: docs/FORMAT.md.

use std::collections::HashMap;

use super::key::KeyArn;
use crate::error::{KmsClass, KmsError};
use crate::format::wrapped::Purpose;
use crate::keys::wrapper::{WrapContext, WrappedKey};

/// What a keystore stores; of AWS's ciphertexts, which have about 300 bytes, it is less than AWS takes (6,144).
pub(super) const LONGEST_BLOB: usize = 4096;
/// The first byte of every blob.
const BLOB_FORMAT: u8 = 1;

pub(super) fn bad(text: String) -> KmsError {
    KmsError::with_source(KmsClass::BadCiphertext, text)
}

/// A blob: see [`AwsKms`]. `None` if it does not fit.
pub(super) fn framed(arn: &KeyArn, ciphertext: &[u8]) -> Option<Vec<u8>> {
    let arn = arn.to_string();
    let blob = [&[BLOB_FORMAT, u8::try_from(arn.len()).ok()?], arn.as_bytes(), ciphertext].concat();
    (!ciphertext.is_empty() && blob.len() <= LONGEST_BLOB).then_some(blob)
}

/// The ARN of the key that wrapped it, checked before it is sent anywhere, and AWS's ciphertext.
pub(super) fn recorded(key: &WrappedKey) -> Result<(KeyArn, &[u8]), KmsError> {
    if !key.key_version.is_empty() {
        return Err(bad("the record names a version of the key, and AWS KMS names none".into()));
    }
    let parts = match key.blob.as_slice() {
        [BLOB_FORMAT, length, rest @ ..] if key.blob.len() <= LONGEST_BLOB => {
            rest.split_at_checked(usize::from(*length))
        }
        _ => None,
    };
    let arn = parts.and_then(|(arn, _)| KeyArn::parse(std::str::from_utf8(arn).ok()?));
    match (arn, parts) {
        (Some(arn), Some((_, ciphertext @ [_, ..]))) => Ok((arn, ciphertext)),
        _ => Err(bad(format!("its {} bytes are not those of a key wrapped by AWS KMS", key.blob.len()))),
    }
}

/// What a key is bound to, as AWS KMS takes it: part of the format, see [`AwsKms`].
pub(super) fn encryption_context(cx: &WrapContext<'_>) -> HashMap<String, String> {
    let purpose = match cx.purpose {
        Purpose::Data => "data",
        Purpose::Cluster => "cluster",
        Purpose::Probe => "probe",
    };
    let mut context = HashMap::from([
        ("pageseal:version".to_owned(), "1".to_owned()),
        ("pageseal:purpose".to_owned(), purpose.to_owned()),
        ("pageseal:cluster".to_owned(), cx.cluster.to_string()),
        ("pageseal:generation".to_owned(), cx.generation.to_string()),
    ]);
    if let Some(database) = cx.database {
        context.insert("pageseal:database".to_owned(), database.to_string());
    }
    context
}
