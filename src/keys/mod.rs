pub(crate) mod wrapper;
pub(crate) mod keyring;
