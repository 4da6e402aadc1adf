//! Each row passes for a sound wrapper, and fails for one that breaks just its promise.
