//! The reach of a failure: all calls, all writes, or one record.

use super::{Error, ErrorKind};

/// The reach of the cause of a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every call fails.
    Everything,
    /// Every write fails. Reads may work: a full disk, a read-only database.
    Writes,
    /// This request fails. Requests with other bodies or rows may succeed.
    Request,
    /// The store does not say.
    Unknown,
}

impl Error {
    pub(crate) fn with_scope(self, scope: Scope) -> Self {
        self.with(|inner| inner.scope = scope)
    }

    pub(crate) fn with_code(self, code: &str) -> Self {
        self.with(|inner| inner.code = (!code.is_empty()).then(|| code.into()))
    }

    /// Marks a failure that does not end by itself.
    pub(crate) fn needing_operator(self) -> Self {
        self.with(|inner| inner.needs_operator = true)
    }

    /// Turns the failure of a probe, or of several records in a row, into an outage of all writes.
    pub(crate) fn into_write_outage(self) -> Self {
        let message = format!("the store takes no writes: {}", self.0.message);
        let error = self.with_message(message).with_scope(Scope::Writes).needing_operator();
        error.with(|inner| inner.kind = ErrorKind::Unavailable)
    }

    /// Returns true if this failure counts in the [breaker](crate::store::Breaker).
    ///
    /// A store that answers reads is reachable, even if it rejects writes.
    pub(crate) fn counts_as_outage(&self) -> bool {
        self.is_outage() && matches!(self.0.scope, Scope::Everything | Scope::Unknown)
    }

    /// Returns true if the other records of the same call might succeed without this record.
    pub(crate) fn may_affect_one_record(&self) -> bool {
        match self.0.kind {
            // The store has no room for one more call. No record is at fault.
            ErrorKind::Overloaded => self.0.retry_after.is_none(),
            ErrorKind::Closed | ErrorKind::LocalStorage | ErrorKind::Config | ErrorKind::Locked => false,
            _ => matches!(self.0.scope, Scope::Request | Scope::Unknown),
        }
    }

    /// Returns true if the response is a verdict on the sent record (I10).
    ///
    /// Only a few SQLSTATE classes can be a record's own fault. The error of a trigger or of a missing object
    /// is not.
    pub(crate) fn is_record_fault(&self) -> bool {
        let is_of_class =
            |code: &str| matches!(code.get(..2), Some("21" | "22" | "23" | "54")) || code == "PGRST102";
        matches!(self.0.kind, ErrorKind::Rejected | ErrorKind::Invalid) && self.code().is_none_or(is_of_class)
    }

    pub(crate) fn scope(&self) -> Scope {
        self.0.scope
    }

    /// Returns the SQLSTATE or the code of PostgREST.
    pub(crate) fn code(&self) -> Option<&str> {
        self.0.code.as_deref()
    }

    /// Returns true if an operator must act before this failure ends.
    pub(crate) fn needs_operator(&self) -> bool {
        self.0.needs_operator
            || matches!(
                self.0.kind,
                ErrorKind::Unauthorized | ErrorKind::SchemaOutdated | ErrorKind::LocalStorage
            )
    }
}
