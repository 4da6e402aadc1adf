//! Keys: who wraps them ([`wrapper`], [`wrappers`], [`rewrap`], [`many`], [`calls`], [`patience`]), where the wrapped ones are
//! kept ([`keystore`], its bytes in [`chain`], its content in [`catalogue`], its files in [`store`]), and where the unwrapped
//! ones are ([`root`], [`keyring`]), and whether there are any ([`in_memory`]).

pub(crate) mod calls;
pub(crate) mod catalogue;
pub(crate) mod chain;
pub(crate) mod in_memory;
pub(crate) mod keyring;
pub(crate) mod keystore;
pub(crate) mod many;
pub(crate) mod names;
pub(crate) mod patience;
pub(crate) mod payload;
pub(crate) mod rewrap;
pub(crate) mod root;
pub(crate) mod store;
pub(crate) mod wrapper;
pub(crate) mod wrappers;
