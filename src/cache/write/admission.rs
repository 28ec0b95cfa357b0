//! The admission of writes: a count of all in flight, a budget of their bytes, and the result of each.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::cache::{Shared, within};
use crate::error::{Error, ErrorKind, Result};
use crate::model::json::Json;
use crate::model::outcome::WriteOutcome;
use crate::observe::metrics::WriteResult;

/// The unit of the write budget.
pub(in crate::cache) const KIB: usize = 1024;

/// The room of a write among all writes in flight. An abandoned write keeps it until it ends.
#[derive(Debug)]
pub(in crate::cache) struct AdmittedWrite {
    _budget: OwnedSemaphorePermit,
    _counter: WriteCounter,
}

/// Counts a write in flight until the drop.
#[derive(Debug)]
struct WriteCounter(watch::Sender<usize>);

impl WriteCounter {
    fn begin(count: &watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count.clone())
    }
}

impl Drop for WriteCounter {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Shared {
    /// Counts the result of a write. A failed one has no outcome.
    pub(in crate::cache) fn count_write(&self, outcome: Option<&WriteOutcome>) {
        self.metrics.wrote(match outcome {
            Some(WriteOutcome::Stored) => WriteResult::Stored,
            Some(WriteOutcome::Superseded) => WriteResult::Superseded,
            Some(WriteOutcome::Queued) => WriteResult::Queued,
            Some(WriteOutcome::Volatile) => WriteResult::Volatile,
            Some(WriteOutcome::Absent) => WriteResult::Absent,
            None => WriteResult::Failed,
        });
    }

    /// Checks that a write may begin, counts it, and takes a share of the write budget.
    pub(in crate::cache) async fn admit_write(
        &self,
        value: Option<&Json>,
        metadata: Option<&Json>,
    ) -> Result<AdmittedWrite> {
        // The write is counted before the check. So a shutdown sees this write, or this write sees the shutdown.
        let counter = WriteCounter::begin(&self.writing);
        self.check_not_shut_down()?;
        if let Some(metadata) = metadata {
            self.check_size("the metadata", metadata)?;
        }
        let bytes = value.map_or(0, Json::len) + metadata.map_or(0, Json::len);
        let max_kib = self.limits.in_flight_bytes / KIB;
        let kib = u32::try_from((1 + bytes / KIB).min(max_kib)).unwrap_or(u32::MAX);
        let (limit, budget) = (self.limits.soft_timeout, Arc::clone(&self.write_budget));
        let permit = within(limit, budget.acquire_many_owned(kib)).await.ok_or_else(|| {
            let message = format!("{max_kib} KiB of writes are in flight");
            Error::new(ErrorKind::Overloaded, message).with_retry_after(limit)
        })?;
        Ok(AdmittedWrite { _budget: permit.map_err(|_| crate::cache::closed())?, _counter: counter })
    }
}
