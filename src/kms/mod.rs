//! Master keys: one file for each key service, each an implementation of [`KeyWrapper`](crate::KeyWrapper).

#[cfg(feature = "tokio")]
pub(crate) mod asynchronous;
pub(crate) mod envelope;
pub(crate) mod local;
#[cfg(any(test, feature = "test-util"))]
pub(crate) mod scripted;
