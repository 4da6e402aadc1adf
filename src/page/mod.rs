//! Sealing and opening pages: one ([`cipher`]), many ([`batch`], [`pool`], [`threads`]), and what makes their nonces unique ([`session`]).

pub(crate) mod batch;
pub(crate) mod cipher;
pub(crate) mod pool;
pub(crate) mod session;
pub(crate) mod subkeys;
pub(crate) mod threads;
