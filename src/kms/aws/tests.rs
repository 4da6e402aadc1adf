//! The settings, and what is sent.
