//! What can go wrong, in kinds that tell a caller what to do.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A `Result` whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of failure this is; each names the one reaction that fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The source of truth cannot be asked at present. Try again later; nothing is known about the thread.
    Unavailable,
    /// The source of truth refuses the credentials. An operator must mend the key or the grants.
    Denied,
    /// A bound on work in progress is reached. Try again when some of it is done.
    Busy,
    /// The source of truth cannot be written at present, and the queue on disk is at its bound. The write is not in the
    /// queue; where [`outcome_unknown`](Error::outcome_unknown) says so, it was sent before and may be stored all the same.
    QueueFull,
    /// Another writer won each of the attempts at a compare-and-set.
    Conflict,
    /// The caller's input cannot be stored: key, value, metadata or time to live.
    Invalid,
    /// The source of truth answered, and refuses this request for good.
    Refused,
    /// The database lacks the table or the functions, or has old ones: apply the migrations. A write is queued.
    Schema,
    /// The local file cannot be opened, read or written.
    Local,
    /// Another process has the local file open. Ask that one, or stop it first.
    InUse,
    /// A setting is missing or wrong.
    Config,
    /// The cache was shut down.
    Closed,
    /// What is stored is JSON, but not of the type asked for.
    Mismatch,
    /// The closure given to `update` declined.
    Aborted,
}

impl ErrorKind {
    /// The kind's name as a metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Denied => "denied",
            Self::Busy => "busy",
            Self::QueueFull => "queue_full",
            Self::Conflict => "conflict",
            Self::Invalid => "invalid",
            Self::Refused => "refused",
            Self::Schema => "schema",
            Self::Local => "local",
            Self::InUse => "in_use",
            Self::Config => "config",
            Self::Closed => "closed",
            Self::Mismatch => "mismatch",
            Self::Aborted => "aborted",
        }
    }
}

/// How far the cause of a failure reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scope {
    /// Every call fails.
    Everything,
    /// Every write fails, though reads may work: a full disk, a read-only database.
    Writes,
    /// Perhaps this request alone fails: other bodies or rows may pass.
    Request,
    /// The store does not say.
    Unknown,
}

/// An error with a kind, a sentence for people, and its cause as [`source`](StdError::source).
///
/// It is cheap to clone (all callers who waited for one load get the same error) and never contains a secret.
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    scope: Scope,
    /// The SQLSTATE or the code of PostgREST, if the answer had one.
    code: Option<Box<str>>,
    needs_operator: bool,
    message: String,
    retry_after: Option<Duration>,
    outcome_unknown: bool,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error of a kind. `message` says in lower case, without a full stop, what happened and what to do.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            scope: match kind {
                ErrorKind::Refused | ErrorKind::Invalid | ErrorKind::Busy => Scope::Request,
                ErrorKind::Denied | ErrorKind::Schema => Scope::Unknown,
                _ => Scope::Everything,
            },
            code: None,
            needs_operator: false,
            message: message.into(),
            retry_after: None,
            outcome_unknown: false,
            source: None,
        }))
    }

    /// The closure of an `update` declines with this, so that nothing is written.
    pub fn aborted(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Aborted, message)
    }

    /// The same error with its cause.
    #[must_use]
    pub fn with_source(self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.with(|inner| inner.source = Some(Arc::new(source)))
    }

    /// The same error with the wait that the other side asked for.
    #[must_use]
    pub fn with_retry_after(self, wait: Duration) -> Self {
        self.with(|inner| inner.retry_after = Some(wait))
    }

    /// The same error for a write that may have been carried out all the same.
    #[must_use]
    pub fn with_outcome_unknown(self) -> Self {
        self.with(|inner| inner.outcome_unknown = true)
    }

    pub(crate) fn with_scope(self, scope: Scope) -> Self {
        self.with(|inner| inner.scope = scope)
    }

    pub(crate) fn with_code(self, code: &str) -> Self {
        self.with(|inner| inner.code = (!code.is_empty()).then(|| code.into()))
    }

    /// The same error, which does not mend itself.
    pub(crate) fn with_operator(self) -> Self {
        self.with(|inner| inner.needs_operator = true)
    }

    /// The same failure of a probe or of several records in a row: the store takes no writes at all.
    pub(crate) fn of_all_writes(self) -> Self {
        let message = format!("the store takes no writes: {}", self.0.message);
        let error = self.saying(message).with_scope(Scope::Writes).with_operator();
        error.with(|inner| inner.kind = ErrorKind::Unavailable)
    }

    /// The same error for a call that writes nothing.
    pub(crate) fn of_read(self) -> Self {
        self.with(|inner| inner.outcome_unknown = false)
    }

    /// The same error in other words.
    pub(crate) fn saying(self, message: impl Into<String>) -> Self {
        self.with(|inner| inner.message = message.into())
    }

    fn with(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// What kind of failure this is.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Whether the source of truth could not be asked: the one definition of an outage, which retry and breaker,
    /// stale reads and refused writes all go by.
    pub fn is_outage(&self) -> bool {
        self.0.kind == ErrorKind::Unavailable
    }

    /// Whether this failure counts against the store in the [breaker](crate::Breaker). A store that answers reads stays
    /// reachable, even if it refuses writes.
    pub(crate) fn counts_as_outage(&self) -> bool {
        self.is_outage() && matches!(self.0.scope, Scope::Everything | Scope::Unknown)
    }

    /// Whether other records of the same call might pass without this one.
    pub(crate) fn may_be_of_one(&self) -> bool {
        match self.0.kind {
            // The store has no room for one more call: no record is at fault.
            ErrorKind::Busy => self.0.retry_after.is_none(),
            ErrorKind::Closed | ErrorKind::Local | ErrorKind::Config | ErrorKind::InUse => false,
            _ => matches!(self.0.scope, Scope::Request | Scope::Unknown),
        }
    }

    /// Whether the answer is a verdict on the record that was sent. Only a few SQLSTATE classes can be a record's own
    /// fault; the error of a trigger or of a missing object is not.
    pub(crate) fn is_own_fault(&self) -> bool {
        let is_of_class =
            |code: &str| matches!(code.get(..2), Some("21" | "22" | "23" | "54")) || code == "PGRST102";
        matches!(self.0.kind, ErrorKind::Refused | ErrorKind::Invalid) && self.code().is_none_or(is_of_class)
    }

    /// How far the cause reaches.
    pub(crate) fn scope(&self) -> Scope {
        self.0.scope
    }

    /// The SQLSTATE or the code of PostgREST.
    pub(crate) fn code(&self) -> Option<&str> {
        self.0.code.as_deref()
    }

    /// Whether somebody has to do something before this ends.
    pub(crate) fn needs_operator(&self) -> bool {
        self.0.needs_operator
            || matches!(self.0.kind, ErrorKind::Denied | ErrorKind::Schema | ErrorKind::Local)
    }

    /// How long the other side asked to be left alone, or when the next probe is due.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Whether a failed write may have been carried out all the same: the answer was lost, not the request.
    pub fn outcome_unknown(&self) -> bool {
        self.0.outcome_unknown
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Error");
        out.field("kind", &self.0.kind).field("message", &self.0.message);
        if let Some(wait) = self.0.retry_after {
            out.field("retry_after", &wait);
        }
        if self.0.outcome_unknown {
            out.field("outcome_unknown", &true);
        }
        if let Some(source) = &self.0.source {
            out.field("source", source);
        }
        out.finish()
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
