//! The log lines about the progress of replay.

use std::time::{Duration, Instant};

/// The interval of progress lines.
const REPORT_INTERVAL: Duration = Duration::from_secs(5);

/// Logs the start, the progress and the end of a replay.
#[derive(Debug, Default)]
pub(super) struct ProgressLog {
    /// The start of the replay, and the largest number of queued writes since.
    replay: Option<(Instant, usize)>,
    reported_at: Option<Instant>,
}

impl ProgressLog {
    pub(super) fn report(&mut self, queued: usize) {
        let now = Instant::now();
        match self.replay {
            None if queued > 0 => {
                tracing::info!(writes = queued, "replay begins: the queue holds writes for the store");
                (self.replay, self.reported_at) = (Some((now, queued)), Some(now));
            }
            Some((start, most)) if queued == 0 => {
                tracing::info!(writes = most, after = ?now - start, "replay is done: the queue is empty");
                *self = Self::default();
            }
            Some((start, most)) => {
                let most = most.max(queued);
                self.replay = Some((start, most));
                if self.reported_at.is_none_or(|reported_at| now - reported_at >= REPORT_INTERVAL) {
                    tracing::info!(queued, of = most, "replay goes on: the queue holds writes for the store");
                    self.reported_at = Some(now);
                }
            }
            None => {}
        }
    }
}
