pub(crate) mod wrapper;
