//! Raises the operator alert: faults of the store that do not end by themselves.
//!
//! Examples are a rejected key, missing migrations, and a database that accepts no writes.
//!
//! Why three alerts and not one? A successful read does not show that writes work, and a successful probe does not show
//! that real records are accepted. Each kind of evidence therefore raises and ends its own alert.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::error::{Error, ErrorKind, Result, Scope};
use crate::model::key::Key;
use crate::model::outcome::Applied;

/// Number of conversations whose last writes failed with one code, before the store is at fault and not the records.
const MIN_STREAK: usize = 3;
/// A longer pause between two failures ends the streak.
const STREAK_TIMEOUT: Duration = Duration::from_secs(60);

/// The kind of a call to the store that is no write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    /// The store undoes the probe's write, but the probe shows that writes work.
    Probe,
}

/// The evidence that raised an alert, in the order in which the alerts are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Witness {
    /// Writes of several conversations in a row failed. A successful probe does not end this alert.
    Several,
    Write,
    Read,
}

/// Keeps the operator alerts of one store.
///
/// The alerts follow the last calls to the store, and the writes that failed since the store accepted one.
#[derive(Debug, Default)]
pub(crate) struct OperatorAlert {
    state: Mutex<AlertState>,
    /// Counts calls in which the store accepted a write.
    accepted: AtomicU64,
    /// Wakes a waiting replay when the store accepts a write after others failed.
    mended: Notify,
}

#[derive(Debug, Default)]
struct AlertState {
    /// One alert for each witness, so that the success of one does not end the alert of another.
    alerts: BTreeMap<Witness, Error>,
    streak: FailureStreak,
}

/// Conversations in a row whose writes failed with one code.
#[derive(Debug, Default)]
struct FailureStreak {
    code: String,
    keys: Vec<Key>,
    last: Option<Instant>,
}

impl FailureStreak {
    /// Counts a failure. Returns whether [`MIN_STREAK`] conversations in a row met the same code.
    fn note(&mut self, key: &Key, error: &Error) -> bool {
        let code = error.code().unwrap_or(error.kind().as_str());
        if self.code != code || self.is_long_ago() {
            *self = Self { code: code.to_owned(), ..Self::default() };
        }
        self.last = Some(Instant::now());
        if self.keys.len() < MIN_STREAK && !self.keys.contains(key) {
            self.keys.push(key.clone());
        }
        self.keys.len() >= MIN_STREAK
    }

    fn is_long_ago(&self) -> bool {
        self.last.is_none_or(|last| last.elapsed() > STREAK_TIMEOUT)
    }
}

impl OperatorAlert {
    /// Updates the alerts with the result of a read or a probe. A successful read does not show that writes work.
    pub(crate) fn note<T>(&self, call: Access, result: &Result<T>) {
        match (call, result) {
            (Access::Probe, Ok(_)) => {
                let is_long_ago = self.state.lock().streak.is_long_ago();
                self.end_if(false, |witness, _| witness != Witness::Several || is_long_ago);
            }
            (Access::Read, Ok(_)) => self.end_if(false, |witness, alert| match witness {
                Witness::Read => true,
                Witness::Write => is_seen_by_reads(alert),
                Witness::Several => false,
            }),
            (_, Err(error)) if !error.needs_operator() => {}
            (Access::Probe, Err(error)) => self.raise(Witness::Write, error),
            (Access::Read, Err(error)) => self.raise(Witness::Read, error),
        }
    }

    /// Updates the alerts with the results of writes. Only a stored write shows that writes work.
    pub(crate) fn wrote(&self, result: Result<&[Applied], &Error>) {
        match result {
            Ok(applied) if applied.iter().any(is_accepted) => {
                self.accepted.fetch_add(1, SeqCst);
                let streak = std::mem::take(&mut self.state.lock().streak);
                self.end_if(!streak.keys.is_empty(), |_, _| true);
            }
            // The failure of one write is weak evidence, because the record may be at fault. Replay decides that.
            Err(error) if error.needs_operator() && error.scope() != Scope::Request => {
                self.raise(Witness::Write, error);
            }
            _ => {}
        }
    }

    /// Counts a write that failed although it was sent alone.
    ///
    /// If several conversations in a row met the same failure, the store is at fault. The function then raises the alert
    /// and returns the failure as an outage of all writes.
    pub(crate) fn note_record_failure(&self, key: &Key, error: &Error) -> Option<Error> {
        let is_common = self.state.lock().streak.note(key, error);
        let outage = is_common.then(|| error.clone().into_write_outage());
        outage.inspect(|error| self.raise(Witness::Several, error))
    }

    /// Returns how many calls with an accepted write the store has answered.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(SeqCst)
    }

    /// Returns a future that ends when the store accepts a write after others failed.
    ///
    /// The future also sees a success between this call and the first poll.
    pub(crate) fn mended(&self) -> Notified<'_> {
        self.mended.notified()
    }

    pub(crate) fn get(&self) -> Option<Error> {
        self.state.lock().alerts.values().next().cloned()
    }

    /// Ends each alert for which `is_over` holds. Wakes replay if an alert ended, or if writes `had_failed`.
    fn end_if(&self, had_failed: bool, is_over: impl Fn(Witness, &Error) -> bool) {
        let mut state = self.state.lock();
        let raised = state.alerts.len();
        state.alerts.retain(|witness, alert| !is_over(*witness, alert));
        let has_ended = state.alerts.len() < raised;
        if has_ended && state.alerts.is_empty() {
            tracing::info!("operator alert ended: the store works again");
        }
        if has_ended || had_failed {
            self.mended.notify_waiters();
        }
    }

    fn raise(&self, witness: Witness, error: &Error) {
        let mut state = self.state.lock();
        if state.alerts.is_empty() {
            tracing::error!(%error, "operator alert: the store does not work until an operator acts");
        }
        state.alerts.insert(witness, error.clone());
    }
}

/// Returns whether a read would fail with this error, too.
///
/// Examples are a rejected key, and another server at the store's address.
fn is_seen_by_reads(error: &Error) -> bool {
    matches!(error.scope(), Scope::Everything | Scope::Unknown)
        && matches!(error.kind(), ErrorKind::Unauthorized | ErrorKind::Unavailable)
}

fn is_accepted(applied: &Applied) -> bool {
    matches!(applied, Applied::Stored | Applied::Appended { .. } | Applied::AppendedBefore(_))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        Key::new(format!("thread {number}")).unwrap()
    }

    #[test]
    fn record_failures_of_several_conversations_raise_alert() {
        let alerts = OperatorAlert::default();
        let rejected = |code| Error::new(ErrorKind::Rejected, "m").with_code(code);
        let is_common = |number, code| alerts.note_record_failure(&key(number), &rejected(code)).is_some();
        assert!(!is_common(1, "23502") && !is_common(2, "23502"));
        assert!(!is_common(2, "23502"), "the same conversation again");
        assert!(!is_common(3, "22P05"), "another code");
        assert!(!is_common(1, "23502") && !is_common(2, "23502") && alerts.get().is_none());
        assert!(is_common(3, "23502"));
        let alert = alerts.get().unwrap();
        assert!(
            alert.is_outage() && !alert.counts_as_outage() && alert.to_string().contains("takes no writes")
        );
        alerts.note(Access::Read, &Ok(()));
        alerts.note(Access::Probe, &Ok(()));
        assert!(alerts.get().is_some(), "neither a read nor a probe shows that these writes work");
        alerts.wrote(Ok(&[Applied::TooOld]));
        assert!(alerts.get().is_some(), "the store kept no write");
        alerts.wrote(Ok(&[Applied::Stored]));
        assert!(alerts.get().is_none() && !is_common(4, "23502"));
    }
}
