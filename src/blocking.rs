//! Work that blocks, on a thread of its own.
//!
//! Why not tokio's blocking pool? The application shares that pool. If the application fills the pool, a caller of
//! threadkeep would wait for the application's work, without a deadline.

use tokio::sync::oneshot;

use crate::error::{Error, ErrorKind, Result};

/// Runs `work` on a new thread. Meant for rare calls: opening and closing a file, asking for a key.
///
/// # Errors
/// [`Local`](ErrorKind::Local) if the system gives no thread, or if `work` panics.
pub(crate) async fn unblock<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let (answer, answered) = oneshot::channel();
    let run = move || drop(answer.send(work()));
    let no_thread =
        |e| Error::new(ErrorKind::Local, "the system gives no thread for blocking work").with_source(e);
    std::thread::Builder::new().name("threadkeep-block".into()).spawn(run).map_err(no_thread)?;
    answered.await.map_err(|e| Error::new(ErrorKind::Local, "blocking work was given up").with_source(e))
}
