//! Keys: who wraps them ([`wrapper`], [`wrappers`], [`calls`]), where the wrapped ones are kept ([`keystore`]), and where
//! the unwrapped ones are ([`keyring`]).

pub(crate) mod calls;
pub(crate) mod keyring;
pub(crate) mod keystore;
pub(crate) mod names;
pub(crate) mod payload;
pub(crate) mod wrapper;
pub(crate) mod wrappers;
