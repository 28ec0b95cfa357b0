//! The admission of writes: a count of all in flight, and a budget of their bytes.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, watch};

use crate::cache::{Shared, within};
use crate::error::{Error, ErrorKind, Result};
use crate::model::json::Json;

/// The unit of the write budget.
pub(in crate::cache) const KIB: usize = 1024;

/// A write in flight, and its share of the write budget. An abandoned write keeps both until it ends.
#[derive(Debug)]
pub(in crate::cache) struct AdmittedWrite {
    writing: watch::Sender<usize>,
    budget: Option<OwnedSemaphorePermit>,
}

impl Drop for AdmittedWrite {
    fn drop(&mut self) {
        // First the room, because a shutdown waits for the count.
        self.budget = None;
        self.writing.send_modify(|count| *count -= 1);
    }
}

impl Shared {
    /// Checks that a write may begin, counts it, and takes a share of the write budget.
    pub(in crate::cache) async fn admit_write(
        &self,
        value: Option<&Json>,
        metadata: Option<&Json>,
    ) -> Result<AdmittedWrite> {
        // The write is counted before the check. So a shutdown sees this write, or this write sees the shutdown.
        self.writing.send_modify(|count| *count += 1);
        let mut admitted = AdmittedWrite { writing: self.writing.clone(), budget: None };
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
        admitted.budget = Some(permit.map_err(|_| crate::cache::closed())?);
        Ok(admitted)
    }
}
