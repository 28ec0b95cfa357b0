//! The requests of one write to the store.

use std::time::Duration;

use super::{IssuedWrite, WriteTask};
use crate::cache::copies::Observed;
use crate::cache::key_state::Event;
use crate::error::{Error, ErrorKind, Result};
use crate::model::record::Record;
use crate::model::version::MAX_CLOCK_SKEW;
use crate::store::Applied;

/// The limit on requests of one write whose version is ahead of the store's clock (I12).
const MAX_REQUESTS: usize = 4;
/// The wait beyond the computed time until the store accepts a version that was in its future.
const FUTURE_MARGIN: Duration = Duration::from_millis(50);

impl WriteTask {
    /// Sends the write. If its version is a little ahead of the store's clock, sends it again after a wait.
    pub(super) async fn attempt(
        &self,
        IssuedWrite { write, call, .. }: &IssuedWrite,
    ) -> Result<Observed<Applied>> {
        for _ in 0..MAX_REQUESTS {
            let request = async {
                self.note(&write.record, self.shared.store.apply(std::slice::from_ref(write)).await)
            };
            let applied = self.shared.copies.observe(call, request).await?;
            if applied.value != Applied::VersionInFuture {
                return Ok(applied);
            }
            let now = self.shared.copies.clock.now_for_versions();
            let lead = write.record.version.at().since(now.plus(MAX_CLOCK_SKEW));
            if lead > MAX_CLOCK_SKEW {
                break;
            }
            tokio::time::sleep(lead + FUTURE_MARGIN).await;
        }
        let key = &write.record.key;
        let message =
            format!("conversation {key} was not written: the clocks of the store and this process differ");
        let error = Error::new(ErrorKind::Unavailable, message).with_key(key.as_str());
        Err(error.with_remedy("synchronise this machine's clock").with_retry_after(MAX_CLOCK_SKEW))
    }

    /// Takes the result of a request to the operator alert, and a failure to memory.
    fn note(&self, record: &Record, applied: Result<Vec<Applied>>) -> Result<Applied> {
        let (shared, key) = (&self.shared, &record.key);
        shared.alert.wrote(applied.as_deref());
        let error = match applied.map(|applied| applied.first().copied()) {
            Ok(Some(verdict)) => return Ok(verdict),
            Ok(None) => {
                let message = format!("the store returned no result for conversation {key}");
                let error = Error::new(ErrorKind::SchemaOutdated, message);
                error.with_key(key.as_str()).with_outcome_unknown()
            }
            // Without a queue, each caller gets the error of its own record. With a queue, failures of several records in a row
            // count as an outage of writes.
            Err(e) if e.may_affect_one_record() && shared.queue.is_some() => {
                shared.alert.note_record_failure(key, &e).unwrap_or(e)
            }
            Err(e) => e,
        };
        if error.outcome_unknown() {
            // The store may hold the write, so memory must not answer with an older version (I6).
            shared.copies.memory.tell(key, Event::Unknown(record.version));
        }
        Err(error)
    }
}
