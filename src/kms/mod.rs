//! Master keys: one file for each key service, each an implementation of [`KeyWrapper`](crate::KeyWrapper).

/// Makes a type a [`KeyWrapper`](crate::KeyWrapper) by the one in its field. Every method, also those with a default: else
/// the default would hide the field's own.
/// The names of the trait and of its types must be in scope.
#[cfg(any(feature = "aws", feature = "azure", feature = "gcp"))]
macro_rules! forward_key_wrapper {
    ($type:ty, $field:tt) => {
        impl KeyWrapper for $type {
            fn id(&self) -> MasterKeyId {
                self.$field.id()
            }

            fn wrap_key(&self, key: &KeyPayload, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                self.$field.wrap_key(key, cx)
            }

            fn unwrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<KeyPayload, KmsError> {
                self.$field.unwrap_key(key, cx)
            }

            fn rewrap_key(&self, key: &WrappedKey, cx: &WrapContext<'_>) -> Result<WrappedKey, KmsError> {
                self.$field.rewrap_key(key, cx)
            }

            fn can_rewrap(&self, key: &WrappedKey) -> bool {
                self.$field.can_rewrap(key)
            }

            fn check(&self, probe: &WrappedKey, cx: &WrapContext<'_>) -> Result<(), KmsError> {
                self.$field.check(probe, cx)
            }

            fn wrapping_is_public(&self) -> bool {
                self.$field.wrapping_is_public()
            }
        }
    };
}

#[cfg(feature = "tokio")]
pub(crate) mod asynchronous;
#[cfg(feature = "aws")]
pub(crate) mod aws;
#[cfg(feature = "azure")]
pub(crate) mod azure;
pub(crate) mod envelope;
#[cfg(feature = "gcp")]
pub(crate) mod gcp;
pub(crate) mod local;
#[cfg(any(test, feature = "test-util"))]
pub(crate) mod scripted;
#[cfg(feature = "vault")]
pub(crate) mod vault;
