//! The operator alert: what does not mend itself, such as a refused key, missing migrations, or a database that takes no
//! writes.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::error::{Error, ErrorKind, Result, Scope};
use crate::record::Key;
use crate::store::Applied;

/// If the last writes of so many threads failed with one code, no record is at fault, but the store.
const SEVERAL: usize = 3;
/// Failures that are so far apart are not in a row.
const MEMORY: Duration = Duration::from_secs(60);

/// What a call to the origin does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    Write,
    /// Writes nothing that stays, but shows that writes work.
    Probe,
}

/// Who raised an alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Witness {
    /// Several threads in a row, whatever a probe says.
    Several,
    Write,
    Read,
}

const WITNESSES: [Witness; 3] = [Witness::Several, Witness::Write, Witness::Read];

/// The alert by the last calls to the origin, whoever made them, and the writes that failed since one was accepted.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    state: Mutex<State>,
    /// Counts the writes that the origin has accepted.
    accepted: AtomicU64,
    /// Wakes a replay that waits, when a write is accepted after others failed.
    mended: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// Each witness has its own: the news of one do not undo those of another.
    alerts: [Option<Error>; WITNESSES.len()],
    in_a_row: InARow,
}

/// Threads whose writes failed with one code, one after the other.
#[derive(Debug, Default)]
struct InARow {
    code: String,
    keys: Vec<Key>,
    last: Option<Instant>,
}

impl InARow {
    /// Counts a failure; says whether several threads in a row met the same.
    fn note(&mut self, key: &Key, error: &Error) -> bool {
        let code = error.code().unwrap_or(error.kind().as_str());
        if self.code != code || self.is_long_ago() {
            *self = Self { code: code.to_owned(), ..Self::default() };
        }
        self.last = Some(Instant::now());
        if self.keys.len() < SEVERAL && !self.keys.contains(key) {
            self.keys.push(key.clone());
        }
        self.keys.len() >= SEVERAL
    }

    fn is_long_ago(&self) -> bool {
        self.last.is_none_or(|last| last.elapsed() > MEMORY)
    }
}

impl State {
    /// Ends the alerts that are over; says whether one was there.
    fn end_if(&mut self, is_over: impl Fn(Witness, &Error) -> bool) -> bool {
        let mut has_ended = false;
        for (witness, alert) in WITNESSES.into_iter().zip(&mut self.alerts) {
            has_ended |= alert.take_if(|alert| is_over(witness, alert)).is_some();
        }
        if has_ended && self.is_quiet() {
            tracing::info!("the source of truth works again");
        }
        has_ended
    }

    fn is_quiet(&self) -> bool {
        self.alerts.iter().all(Option::is_none)
    }
}

impl Trouble {
    /// Takes note of what a call says about the origin. An answer to a read does not show that writes work.
    pub(crate) fn note<T>(&self, call: Call, result: &Result<T>) {
        match result {
            Ok(_) => match call {
                Call::Write => self.write_works(),
                Call::Probe => {
                    let is_long_ago = self.lock().in_a_row.is_long_ago();
                    self.end_if(|witness, _| witness != Witness::Several || is_long_ago);
                }
                Call::Read => self.end_if(|witness, alert| match witness {
                    Witness::Read => true,
                    Witness::Write => is_seen_by_reads(alert),
                    Witness::Several => false,
                }),
            },
            Err(error) if is_alert(call, error) => {
                self.raise(if call == Call::Read { Witness::Read } else { Witness::Write }, error);
            }
            Err(_) => {}
        }
    }

    /// Takes note of an answer to writes. Only one that was stored shows that writes work.
    pub(crate) fn wrote(&self, result: Result<&[Applied], &Error>) {
        match result {
            Ok(applied) if applied.contains(&Applied::Stored) => self.write_works(),
            Ok(_) => {}
            Err(error) => self.note::<()>(Call::Write, &Err(error.clone())),
        }
    }

    /// Counts a write that failed alone. If several threads in a row met the same, the failure is the store's: raises the
    /// alert, and returns the failure as one of all writes.
    pub(crate) fn is_common(&self, key: &Key, error: &Error) -> Option<Error> {
        let is_common = self.lock().in_a_row.note(key, error);
        let common = is_common.then(|| error.clone().of_all_writes());
        common.inspect(|error| self.raise(Witness::Several, error))
    }

    /// How many writes the origin has accepted so far.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(SeqCst)
    }

    /// Waits until a write is accepted after others failed; counts from this call on.
    pub(crate) fn mended(&self) -> Notified<'_> {
        self.mended.notified()
    }

    /// What is to be mended.
    pub(crate) fn get(&self) -> Option<Error> {
        self.lock().alerts.iter().flatten().next().cloned()
    }

    fn write_works(&self) {
        self.accepted.fetch_add(1, SeqCst);
        let mut state = self.lock();
        let had_failed = !std::mem::take(&mut state.in_a_row).keys.is_empty();
        if state.end_if(|_, _| true) || had_failed {
            self.mended.notify_waiters();
        }
    }

    fn end_if(&self, is_over: impl Fn(Witness, &Error) -> bool) {
        if self.lock().end_if(is_over) {
            self.mended.notify_waiters();
        }
    }

    fn raise(&self, witness: Witness, error: &Error) {
        let mut state = self.lock();
        if state.is_quiet() {
            tracing::error!(%error, "the source of truth needs an operator");
        }
        state.alerts[witness as usize] = Some(error.clone());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a read would meet this, too: a refused key, or something else that answers in the store's place.
fn is_seen_by_reads(error: &Error) -> bool {
    matches!(error.scope(), Scope::Everything | Scope::Unknown)
        && matches!(error.kind(), ErrorKind::Denied | ErrorKind::Unavailable)
}

/// Whether a failure does not mend itself. A write that failed by itself says little: replay finds out.
fn is_alert(call: Call, error: &Error) -> bool {
    error.needs_operator() && (call != Call::Write || error.scope() != Scope::Request)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u32) -> Key {
        Key::new(format!("thread {number}")).unwrap()
    }

    #[test]
    fn several_threads_in_a_row_make_a_failure_common() {
        let trouble = Trouble::default();
        let refused = |code| Error::new(ErrorKind::Refused, "m").with_code(code);
        let is_common = |number, code| trouble.is_common(&key(number), &refused(code)).is_some();
        assert!(!is_common(1, "23502") && !is_common(2, "23502"));
        assert!(!is_common(2, "23502"), "the same thread again");
        assert!(!is_common(3, "22P05"), "another code");
        assert!(!is_common(1, "23502") && !is_common(2, "23502") && trouble.get().is_none());
        assert!(is_common(3, "23502"));
        let alert = trouble.get().unwrap();
        assert!(
            alert.is_outage() && !alert.counts_as_outage() && alert.to_string().contains("takes no writes")
        );
        trouble.note(Call::Read, &Ok(()));
        trouble.note(Call::Probe, &Ok(()));
        assert!(trouble.get().is_some(), "neither a read nor a probe shows that these writes work");
        trouble.wrote(Ok(&[Applied::TooOld]));
        assert!(trouble.get().is_some(), "nothing was stored");
        trouble.wrote(Ok(&[Applied::Stored]));
        assert!(trouble.get().is_none() && !is_common(4, "23502"));
    }
}
