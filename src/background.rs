//! Where work runs that goes on when its caller does not.
//!
//! A runtime of one thread stands still between two calls of `block_on`, and any runtime may end before a cache does. Tasks on
//! it stand still, too, and so do the connections that were opened on it. So the probe, the replay and the chores run on a
//! runtime of this process's own. Loads and writes run on the caller's if that has workers, which spares a change of threads.
//!
//! Why not the own runtime for all? A load would then cross threads twice, and share two workers with everybody.

use std::future::Future;
use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime, RuntimeFlavor};
use tokio::task::JoinHandle;
use tracing::Instrument;
use tracing::instrument::WithSubscriber;

use crate::error::{Error, ErrorKind, Result};

/// One worker could be held up by the chores of another cache.
const WORKERS: usize = 2;

/// Spawns work that goes on for as long as the process does, or until it is aborted.
///
/// # Panics
/// Outside a tokio runtime if this process can have no more threads.
pub(crate) fn spawn_for_good<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let runtime = if stays() { None } else { ours() };
    spawn_on(&runtime.unwrap_or_else(Handle::current), work)
}

/// Spawns what a call began: on the caller's runtime if that has workers.
///
/// # Panics
/// As [`spawn_for_good`].
pub(crate) fn spawn<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    match with_workers() {
        Some(current) => current.spawn(work),
        None => spawn_for_good(work),
    }
}

/// Spawns what goes on from work that runs here already: on the current runtime, if there is one.
///
/// # Panics
/// As [`spawn_for_good`].
pub(crate) fn spawn_here<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    match Handle::try_current() {
        Ok(current) => current.spawn(work),
        Err(_) => spawn_for_good(work),
    }
}

/// Does what a call needs of the store. Dropping this gives the work up.
///
/// # Errors
/// [`ErrorKind::Unavailable`] where the work panics.
pub(crate) async fn run<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T> {
    if stays() || with_workers().is_some() {
        return Ok(work.await);
    }
    let mut task = GivenUp(spawn_for_good(work.in_current_span()));
    let gone = |e| Error::new(ErrorKind::Unavailable, "a call was given up: a bug").with_source(e);
    (&mut task.0).await.map_err(gone)
}

/// The current runtime, if it goes on while nobody blocks on it.
fn with_workers() -> Option<Handle> {
    Handle::try_current().ok().filter(|current| current.runtime_flavor() == RuntimeFlavor::MultiThread)
}

/// This process's own runtime, which starts when it is first needed and never ends.
fn ours() -> Option<Handle> {
    static OURS: LazyLock<Option<Runtime>> = LazyLock::new(|| {
        let runtime = Builder::new_multi_thread()
            .worker_threads(WORKERS)
            .thread_name("threadkeep")
            .enable_all()
            .build();
        let warn = |error: &std::io::Error| {
            tracing::warn!(%error, "no threads for background work: it runs on the runtime of its caller");
        };
        runtime.inspect_err(warn).ok()
    });
    OURS.as_ref().map(|runtime| runtime.handle().clone())
}

#[cfg(feature = "testing")]
std::thread_local! {
    static STAYS: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// From now on, all work that begins on this thread stays on the runtime there: so a test can count what it does, or repeat a
/// schedule.
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

/// The log that a thread has for itself, which tests have, goes along.
fn spawn_on<T: Send + 'static>(
    runtime: &Handle,
    work: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    match tracing::dispatcher::has_been_set() {
        true => runtime.spawn(work.with_current_subscriber()),
        false => runtime.spawn(work),
    }
}

/// Aborts the task with its caller.
struct GivenUp<T>(JoinHandle<T>);

impl<T> Drop for GivenUp<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
