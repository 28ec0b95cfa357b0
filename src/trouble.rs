//! The operator alert: what does not mend itself, such as a refused key, missing migrations, or a database that takes no
//! writes.

use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;
use tokio::sync::futures::Notified;

use crate::error::{Error, ErrorKind, Result, Scope};
use crate::record::Key;
use crate::store::Applied;

/// If the last writes of so many threads failed with one code, no record is at fault, but the store.
const SEVERAL: usize = 3;

/// What a call to the origin does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Read,
    Write,
    /// Writes nothing that stays, but shows that writes work.
    Probe,
}

/// Who raised the alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Witness {
    Read,
    Write,
    /// Several threads in a row, whatever a probe says.
    Several,
}

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
    alert: Option<(Witness, Error)>,
    in_a_row: InARow,
}

/// Threads whose writes failed with one code, one after the other.
#[derive(Debug, Default)]
pub(crate) struct InARow {
    code: String,
    keys: Vec<Key>,
}

impl InARow {
    /// Counts a failure; says whether several threads in a row met the same.
    pub(crate) fn note(&mut self, key: &Key, error: &Error) -> bool {
        let code = error.code().unwrap_or(error.kind().as_str());
        if self.code != code {
            *self = Self { code: code.to_owned(), keys: Vec::new() };
        }
        if self.keys.len() < SEVERAL && !self.keys.contains(key) {
            self.keys.push(key.clone());
        }
        self.keys.len() >= SEVERAL
    }
}

impl Trouble {
    /// Takes note of what a call says about the origin. An answer to a read does not show that writes work.
    pub(crate) fn note<T>(&self, call: Call, result: &Result<T>) {
        match result {
            Ok(_) => match call {
                Call::Write => self.write_works(),
                Call::Probe => self.end_if(|witness, _| witness != Witness::Several),
                Call::Read => {
                    self.end_if(|witness, alert| witness == Witness::Read || is_seen_by_reads(alert))
                }
            },
            Err(error) if is_alert(call, error) => {
                self.raise(if call == Call::Read { Witness::Read } else { Witness::Write }, error);
            }
            Err(_) => {}
        }
    }

    /// Takes note of an answer to writes. Only one that was stored shows that writes work.
    pub(crate) fn wrote(&self, result: &Result<Vec<Applied>>) {
        match result {
            Ok(applied) if !applied.contains(&Applied::Stored) => {}
            result => self.note(Call::Write, result),
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
        self.lock().alert.as_ref().map(|(_, error)| error.clone())
    }

    fn write_works(&self) {
        self.accepted.fetch_add(1, SeqCst);
        let had_failed = !std::mem::take(&mut self.lock().in_a_row).keys.is_empty();
        self.end_if(|_, _| true);
        if had_failed {
            self.mended.notify_waiters();
        }
    }

    fn end_if(&self, is_over: impl FnOnce(Witness, &Error) -> bool) {
        let mut state = self.lock();
        if state.alert.as_ref().is_some_and(|(witness, alert)| is_over(*witness, alert)) {
            tracing::info!("the source of truth works again");
            state.alert = None;
            self.mended.notify_waiters();
        }
    }

    fn raise(&self, witness: Witness, error: &Error) {
        let mut state = self.lock();
        if state.alert.is_none() {
            tracing::error!(%error, "the source of truth needs an operator");
        }
        state.alert = Some((witness, error.clone()));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a read would meet this, too.
fn is_seen_by_reads(error: &Error) -> bool {
    matches!(error.scope(), Scope::Everything | Scope::Unknown) && error.kind() != ErrorKind::Local
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
        trouble.wrote(&Ok(vec![Applied::TooOld]));
        assert!(trouble.get().is_some(), "nothing was stored");
        trouble.wrote(&Ok(vec![Applied::Stored]));
        assert!(trouble.get().is_none() && !is_common(4, "23502"));
    }
}
