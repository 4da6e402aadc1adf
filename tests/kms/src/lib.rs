//! What the tests of the key service adapters share: servers that they start, fakes where no server can run, and each as a
//! [`KeyService`](pageseal::testing::conformance::KeyService) for the conformance suite.

#[cfg(feature = "aws")]
pub mod aws;
#[cfg(feature = "azure")]
pub mod azure;
#[cfg(feature = "gcp")]
pub mod gcp;
#[cfg(feature = "gcp")]
pub mod gcp_fake;
pub mod http;
pub mod server;
pub mod table;
#[cfg(feature = "vault")]
pub mod vault;
