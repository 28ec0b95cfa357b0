//! Errors, in kinds that tell a caller how to react.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// A `Result` whose error is [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of a failure. Each kind names one reaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The store does not answer. Nothing is known about the conversation. Try again later.
    Unavailable,
    /// The store rejects the credentials. An operator must replace the key or restore the grants.
    Unauthorized,
    /// A limit on work in progress is reached. Try again later.
    Overloaded,
    /// The store takes no writes, and the queue on disk is at its limit. The write is not in the queue.
    /// [`outcome_unknown`](Error::outcome_unknown) says whether the store may hold it nevertheless.
    QueueFull,
    /// Other writers changed the conversation during each attempt of a conditional write.
    Conflict,
    /// The caller's key, value, metadata or time to live cannot be stored.
    Invalid,
    /// The store answered, and rejects this request permanently.
    Rejected,
    /// The database lacks threadkeep's table or functions, or has old ones. Apply the migrations. Writes are queued.
    SchemaOutdated,
    /// The local file cannot be opened, read or written.
    LocalStorage,
    /// Another process has the local file open. Ask that process, or stop it.
    Locked,
    /// A setting is missing or invalid.
    Config,
    /// The cache was shut down.
    Closed,
    /// The stored JSON is not of the requested type.
    Decode,
    /// The closure given to `update` returned [`Error::aborted`].
    Aborted,
}

impl ErrorKind {
    /// Returns the name of this kind, as in the metric labels.
    ///
    /// ```
    /// assert_eq!(threadkeep::ErrorKind::QueueFull.as_str(), "queue_full");
    /// ```
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Unauthorized => "unauthorized",
            Self::Overloaded => "overloaded",
            Self::QueueFull => "queue_full",
            Self::Conflict => "conflict",
            Self::Invalid => "invalid",
            Self::Rejected => "rejected",
            Self::SchemaOutdated => "schema_outdated",
            Self::LocalStorage => "local_storage",
            Self::Locked => "locked",
            Self::Config => "config",
            Self::Closed => "closed",
            Self::Decode => "decode",
            Self::Aborted => "aborted",
        }
    }
}

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

/// An error with a kind, a sentence for people, a remedy, and its cause as [`source`](StdError::source).
///
/// Cloning is cheap: all callers who waited for one load get the same error. An error never contains a secret.
///
/// ```
/// use std::error::Error as _;
/// use std::time::Duration;
/// use threadkeep::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::Unavailable, "the store is down")
///     .with_remedy("start it")
///     .with_key("thread-1")
///     .with_retry_after(Duration::from_secs(2))
///     .with_outcome_unknown()
///     .with_source(std::io::Error::other("connection refused"));
/// assert_eq!(error.to_string(), "the store is down; start it");
/// assert_eq!((error.kind(), error.message()), (ErrorKind::Unavailable, "the store is down"));
/// assert_eq!((error.remedy(), error.key(), error.code()), (Some("start it"), Some("thread-1"), None));
/// assert_eq!(error.retry_after(), Some(Duration::from_secs(2)));
/// assert!(error.is_outage() && error.is_retryable() && error.outcome_unknown());
/// assert_eq!(error.source().unwrap().to_string(), "connection refused");
/// ```
#[derive(Debug, Clone)]
pub struct Error(Arc<Inner>);

#[derive(Debug, Clone)]
struct Inner {
    kind: ErrorKind,
    scope: Scope,
    /// The SQLSTATE or the code of PostgREST, if the response had one.
    code: Option<Box<str>>,
    needs_operator: bool,
    message: String,
    remedy: Option<Cow<'static, str>>,
    key: Option<Box<str>>,
    retry_after: Option<Duration>,
    outcome_unknown: bool,
    source: Option<Arc<dyn StdError + Send + Sync>>,
}

impl Error {
    /// Creates an error. `message` says in lower case, without a full stop, what happened.
    /// See [`Error`] for an example.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner {
            kind,
            scope: match kind {
                ErrorKind::Rejected | ErrorKind::Invalid | ErrorKind::Overloaded => Scope::Request,
                ErrorKind::Unauthorized | ErrorKind::SchemaOutdated => Scope::Unknown,
                _ => Scope::Everything,
            },
            code: None,
            needs_operator: false,
            message: message.into(),
            remedy: None,
            key: None,
            retry_after: None,
            outcome_unknown: false,
            source: None,
        }))
    }

    /// Creates the error by which the closure of an `update` declines, so that nothing is written.
    ///
    /// ```
    /// # async fn example(cache: threadkeep::Cache) {
    /// use threadkeep::{Error, ErrorKind};
    ///
    /// let full = |_: Option<Vec<String>>| Err(Error::aborted("the conversation is full"));
    /// assert_eq!(cache.update("thread-1", full).await.unwrap_err().kind(), ErrorKind::Aborted);
    /// # }
    /// ```
    pub fn aborted(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Aborted, message)
    }

    /// Adds the cause. See [`Error`] for an example.
    #[must_use]
    pub fn with_source(self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.with(|inner| inner.source = Some(Arc::new(source)))
    }

    /// Adds the action that ends the failure, as an imperative. See [`Error`] for an example.
    #[must_use]
    pub fn with_remedy(self, remedy: impl Into<Cow<'static, str>>) -> Self {
        self.with(|inner| inner.remedy = Some(remedy.into()))
    }

    /// Adds the thread id that the failure is about. See [`Error`] for an example.
    #[must_use]
    pub fn with_key(self, key: &str) -> Self {
        self.with(|inner| inner.key = Some(key.into()))
    }

    /// Adds the wait that the other side asked for. See [`Error`] for an example.
    #[must_use]
    pub fn with_retry_after(self, wait: Duration) -> Self {
        self.with(|inner| inner.retry_after = Some(wait))
    }

    /// Marks a failed write that the store may hold nevertheless. See [`Error`] for an example.
    #[must_use]
    pub fn with_outcome_unknown(self) -> Self {
        self.with(|inner| inner.outcome_unknown = true)
    }

    /// Removes the mark of an unknown outcome: the call writes nothing.
    pub(crate) fn without_outcome(self) -> Self {
        self.with(|inner| inner.outcome_unknown = false)
    }

    pub(crate) fn with_message(self, message: impl Into<String>) -> Self {
        self.with(|inner| inner.message = message.into())
    }

    fn with(mut self, change: impl FnOnce(&mut Inner)) -> Self {
        change(Arc::make_mut(&mut self.0));
        self
    }

    /// Returns the kind of this failure. See [`Error`] for an example.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the sentence that says what happened, without the remedy. See [`Error`] for an example.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Returns the action that ends the failure, if one is known. See [`Error`] for an example.
    pub fn remedy(&self) -> Option<&str> {
        self.0.remedy.as_deref()
    }

    /// Returns the thread id that the failure is about, if it is about one. See [`Error`] for an example.
    pub fn key(&self) -> Option<&str> {
        self.0.key.as_deref()
    }

    /// Returns the SQLSTATE of PostgreSQL, or the code of PostgREST, if the response had one. See [`Error`] for an example.
    pub fn code(&self) -> Option<&str> {
        self.0.code.as_deref()
    }

    /// Returns true if the store could not be reached.
    ///
    /// Retries, the breaker and stale reads all use this definition of an outage. See [`Error`] for an example.
    pub fn is_outage(&self) -> bool {
        self.0.kind == ErrorKind::Unavailable
    }

    /// Returns true if the same call can succeed later, without a change by the caller.
    ///
    /// [`retry_after`](Self::retry_after) says when. See [`Error`] for an example.
    pub fn is_retryable(&self) -> bool {
        use ErrorKind::{Conflict, Locked, Overloaded, QueueFull, Unavailable};
        matches!(self.0.kind, Unavailable | Overloaded | QueueFull | Conflict | Locked)
    }

    /// Returns the wait that the other side asked for, or the time until the next probe. See [`Error`] for an example.
    pub fn retry_after(&self) -> Option<Duration> {
        self.0.retry_after
    }

    /// Returns true if the store may hold a failed write nevertheless.
    ///
    /// The call lost the response, not necessarily the request. See [`Error`] for an example.
    pub fn outcome_unknown(&self) -> bool {
        self.0.outcome_unknown
    }

    pub(crate) fn with_scope(self, scope: Scope) -> Self {
        self.with(|inner| inner.scope = scope)
    }

    pub(crate) fn with_code(self, code: &str) -> Self {
        self.with(|inner| inner.code = (!code.is_empty()).then(|| code.into()))
    }

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

    /// Returns true if an operator must act before this failure ends.
    pub(crate) fn needs_operator(&self) -> bool {
        self.0.needs_operator
            || matches!(
                self.0.kind,
                ErrorKind::Unauthorized | ErrorKind::SchemaOutdated | ErrorKind::LocalStorage
            )
    }
}

/// The message, then the remedy.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        self.0.remedy.iter().try_for_each(|remedy| write!(f, "; {remedy}"))
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
