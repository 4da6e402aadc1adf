//! Master keys: one file for each key service, each an implementation of [`KeyWrapper`](crate::KeyWrapper).

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
