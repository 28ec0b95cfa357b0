//! OS threads that serve a channel until it closes.

use std::thread::{Builder, JoinHandle};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};

/// A channel, and the threads that serve it. Dropping it closes the channel and waits for the threads.
pub(super) struct Worker<S>(Mutex<(Option<S>, Vec<JoinHandle<()>>)>);

impl<S: Clone> Worker<S> {
    pub(super) fn start<F: FnOnce() + Send + 'static>(
        name: &str,
        sender: S,
        functions: impl IntoIterator<Item = F>,
    ) -> Result<Self> {
        let spawn = |function| Builder::new().name(name.into()).spawn(function);
        let threads = functions.into_iter().map(spawn).collect::<std::io::Result<_>>().map_err(|e| {
            Error::new(ErrorKind::LocalStorage, "cannot start the threads of the local file").with_source(e)
        })?;
        Ok(Self(Mutex::new((Some(sender), threads))))
    }

    /// Returns the sender. The threads do not end before the caller drops it.
    pub(super) fn sender(&self) -> Result<S> {
        self.0.lock().0.clone().ok_or_else(closed)
    }
}

impl<S> Worker<S> {
    /// Ends the threads after the waiting work. Blocks.
    pub(super) fn close(&self) {
        let (sender, threads) = std::mem::take(&mut *self.0.lock());
        drop(sender);
        for thread in threads {
            thread.join().ok();
        }
    }
}

impl<S> Drop for Worker<S> {
    fn drop(&mut self) {
        self.close();
    }
}

pub(crate) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the local file is closed")
}
