//! Keys: who wraps them ([`wrapper`], [`wrappers`], [`rewrap`], [`many`], [`calls`], [`patience`]), where the wrapped ones are
//! kept ([`keystore`]), and where the unwrapped ones are ([`keyring`]).

pub(crate) mod calls;
pub(crate) mod keyring;
pub(crate) mod keystore;
#[allow(dead_code)] // used by cluster.rs
pub(crate) mod many;
pub(crate) mod names;
pub(crate) mod patience;
pub(crate) mod payload;
#[allow(dead_code)] // used by cluster.rs
pub(crate) mod rewrap;
pub(crate) mod wrapper;
pub(crate) mod wrappers;
