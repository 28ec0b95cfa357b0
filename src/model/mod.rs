//! Pure values: thread ids, JSON, records, versions and clocks.

pub(crate) mod append;
pub(crate) mod clock;
pub(crate) mod json;
pub(crate) mod key;
pub(crate) mod moment;
pub(crate) mod outcome;
pub(crate) mod record;
pub(crate) mod version;
pub(crate) mod writer;
