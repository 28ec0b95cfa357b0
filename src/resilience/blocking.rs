//! Work that blocks, on a thread of its own.
//!
//! Why not tokio's blocking pool? The application shares that pool. If the application fills the pool, a caller of
//! threadkeep would wait for the application's work, without a deadline.

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};

/// Runs `work` on a new thread. Callers use it rarely: to open or close a file, and to ask for a key.
///
/// # Errors
/// [`ErrorKind::LocalStorage`] if the system gives no thread, or if `work` panics.
pub(crate) async fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (answer, answered) = oneshot::channel();
    let run = move || drop(answer.send(work()));
    let no_thread = |e| {
        Error::new(ErrorKind::LocalStorage, "the system gives no thread for blocking work").with_source(e)
    };
    std::thread::Builder::new().name("threadkeep-block".into()).spawn(run).map_err(no_thread)?;
    answered
        .await
        .map_err(|e| Error::new(ErrorKind::LocalStorage, "blocking work was given up").with_source(e))
}
