//! Detects a failure with a cause outside the records of a batch.

use crate::error::{Error, ErrorKind};

/// After this many equal failures in a row, the cause is not a record, and the rest of the batch is not sent.
const MAX_EQUAL_FAILURES: usize = 8;
/// Counts callers of one batch that failed alone, in a row, with the same error.
#[derive(Default)]
pub(super) struct RepeatedFailure {
    last: Option<Error>,
    count: usize,
}

impl RepeatedFailure {
    pub(super) fn note(&mut self, error: &Error) {
        let is_same = |last: &Error| (last.kind(), last.code()) == (error.kind(), error.code());
        self.count = if self.last.as_ref().is_some_and(is_same) { self.count + 1 } else { 1 };
        self.last = Some(error.clone());
    }

    /// Returns the error of the remaining callers, if the failures have a common cause.
    ///
    /// A verdict about single records is no common cause, however often it repeats.
    pub(super) fn common(&self, was_unknown: bool) -> Option<Error> {
        let is_verdict = |error: &Error| {
            matches!(error.kind(), ErrorKind::Rejected | ErrorKind::Invalid | ErrorKind::Overloaded)
                && error.may_affect_one_record()
        };
        let common = self.last.clone().filter(|error| self.count >= MAX_EQUAL_FAILURES && !is_verdict(error));
        common.map(|error| with_outcome(error, was_unknown))
    }
}

pub(super) fn with_outcome(error: Error, was_unknown: bool) -> Error {
    if was_unknown { error.with_outcome_unknown() } else { error }
}
