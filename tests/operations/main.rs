//! Tests OPERATIONS.md: it explains each error, metric, alert and log line, and its formulas hold.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod capacity;
mod lines;
mod page;
