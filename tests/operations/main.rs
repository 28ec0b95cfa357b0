//! The operations page: it explains each error, each metric, each alert and each line of the log, and its sums hold.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

mod capacity;
mod lines;
mod page;
