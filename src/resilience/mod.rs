//! Parts that keep working when the store, or the application's runtime, does not.

pub(crate) mod backoff;
pub(crate) mod breaker;
pub(crate) mod tasks;
