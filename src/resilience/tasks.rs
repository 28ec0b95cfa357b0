//! Spawns tasks that continue when their caller stops.
//!
//! A current-thread runtime stands still between two calls of `block_on`, and any runtime may end before a cache does. The
//! tasks and connections of such a runtime then stand still, too. The crate therefore runs probe, replay and maintenance
//! on a background runtime of its own. Loads and writes run on the caller's runtime if it has workers, which saves a
//! change of threads.
//!
//! Why not the background runtime for all work? A load would then cross threads twice, and all loads would share two
//! workers.

use std::future::Future;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime, RuntimeFlavor};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::Instrument;
use tracing::instrument::WithSubscriber;

use crate::error::{Error, ErrorKind, Result};

/// Threads of the background runtime. With one thread, the maintenance of one cache could delay another cache.
const WORKERS: usize = 2;

/// Spawns work on the background runtime.
///
/// The work continues until it ends, is aborted, or the process ends.
///
/// # Panics
/// Outside a tokio runtime if the process cannot start threads.
pub(crate) fn spawn_for_good<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let runtime = if stays() { None } else { background_runtime() }.unwrap_or_else(Handle::current);
    // Tests set a log subscriber for each OS thread.
    if tracing::dispatcher::has_been_set() {
        runtime.spawn(work.with_current_subscriber())
    } else {
        runtime.spawn(work)
    }
}

/// Spawns work of a call: on the caller's runtime if that runtime has workers, else on the background runtime.
///
/// # Panics
/// As [`spawn_for_good`].
pub(crate) fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    match multi_thread_runtime() {
        Some(current) => current.spawn(work),
        None => spawn_for_good(work),
    }
}

/// Runs a store call for a caller. Dropping the future aborts the work.
///
/// # Errors
/// [`ErrorKind::Unavailable`] if the work panics on the background runtime.
pub(crate) async fn run<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T> {
    if stays() || multi_thread_runtime().is_some() {
        return Ok(work.await);
    }
    let mut task = AbortOnDrop(spawn_for_good(work.in_current_span()));
    let panicked =
        |e| Error::new(ErrorKind::Unavailable, "a store call panicked in a background task").with_source(e);
    (&mut task.0).await.map_err(panicked)
}

/// Runs work that blocks on a new OS thread. Callers use it rarely: to open or close a file, and to ask for a key.
///
/// Why not tokio's blocking pool? The application shares that pool. If the application fills the pool, a caller of
/// threadkeep would wait for the application's work, without a deadline.
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

/// Returns the current runtime if it runs tasks without a `block_on`.
fn multi_thread_runtime() -> Option<Handle> {
    Handle::try_current().ok().filter(|current| current.runtime_flavor() == RuntimeFlavor::MultiThread)
}

/// Returns the background runtime, which starts at first use and never ends.
///
/// Returns `None` if the process cannot start threads.
fn background_runtime() -> Option<Handle> {
    static RUNTIME: LazyLock<Option<Runtime>> = LazyLock::new(|| {
        let runtime = Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .thread_name("threadkeep")
            .enable_all()
            .build();
        let warn = |error: &std::io::Error| {
            tracing::warn!(%error, "cannot start threads for the background runtime; background work runs on the caller's runtime and stops with it");
        };
        runtime.inspect_err(warn).ok()
    });
    RUNTIME.as_ref().map(|runtime| runtime.handle().clone())
}

#[cfg(feature = "testing")]
std::thread_local! {
    static STAYS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Keeps all new work of this OS thread on the thread's own runtime.
///
/// A test can then count the work of a call, or repeat a schedule. The setting lasts as long as the OS thread.
///
/// ```
/// threadkeep::testing::stay_on_this_thread();
/// ```
#[cfg(feature = "testing")]
pub fn stay_on_this_thread() {
    STAYS.set(true);
}

#[cfg(feature = "testing")]
fn stays() -> bool {
    STAYS.get()
}

#[cfg(not(feature = "testing"))]
fn stays() -> bool {
    false
}

struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
