//! Single flight: one load of a conversation serves all callers that want it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;
use tracing::Instrument;

use super::copies::{Call, Copies};
use super::key_state::Floor;
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::resilience::tasks;

/// The limit on loads in flight. A caller beyond it gets [`ErrorKind::Overloaded`].
const MAX_LOADS: usize = 10_000;

/// The loads in flight, by key. `T` is the result of a load.
#[derive(Debug)]
pub(super) struct SingleFlight<T> {
    loads: Arc<Mutex<Loads<T>>>,
}

type Loads<T> = HashMap<Key, LoadHandle<T>>;

impl<T> Default for SingleFlight<T> {
    fn default() -> Self {
        Self { loads: Arc::default() }
    }
}

impl<T: Clone + Send + Sync + 'static> SingleFlight<T> {
    /// Joins the load of this key that is in flight, or starts one.
    ///
    /// The load runs in a task of its own, so it survives the caller that started it. A caller does not join a load during
    /// which the key's floor rose. The result of that load is probably stale, and the caller would have to load again.
    pub(super) fn join_or_start<F>(
        &self,
        key: &Key,
        copies: &Copies,
        load: impl FnOnce(Arc<Call>) -> F,
    ) -> Result<LoadHandle<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut loads = self.loads.lock();
        let is_current = |load: &&LoadHandle<T>| load.call.token.floor(key) == Floor::default();
        if let Some(load) = loads.get(key).filter(is_current) {
            return Ok(load.clone());
        }
        if loads.len() >= MAX_LOADS {
            return Err(Error::new(ErrorKind::Overloaded, format!("{MAX_LOADS} loads are in flight")));
        }
        let (sender, receiver) = watch::channel(None);
        let handle = LoadHandle { receiver, call: copies.begin() };
        loads.insert(key.clone(), handle.clone());
        let call = Arc::clone(&handle.call);
        let guard = FlightGuard { loads: Arc::clone(&self.loads), key: key.clone(), call: Arc::clone(&call) };
        let work = load(call);
        // A closing runtime drops the task at once, and with it `guard`, which takes this lock.
        drop(loads);
        let load_task = async move {
            let result = work.await;
            // The guard leaves the map before the result is sent. A later caller starts a load of its own.
            drop(guard);
            sender.send_replace(Some(result));
        };
        tasks::spawn(load_task.in_current_span());
        Ok(handle)
    }
}

/// Removes the load from the map when it ends, also after a panic.
struct FlightGuard<T> {
    loads: Arc<Mutex<Loads<T>>>,
    key: Key,
    call: Arc<Call>,
}

impl<T> Drop for FlightGuard<T> {
    fn drop(&mut self) {
        let mut loads = self.loads.lock();
        // A later load may have taken the place.
        if loads.get(&self.key).is_some_and(|load| Arc::ptr_eq(&load.call, &self.call)) {
            loads.remove(&self.key);
        }
    }
}

/// A caller's share of a load in flight.
#[derive(Debug, Clone)]
pub(super) struct LoadHandle<T> {
    receiver: watch::Receiver<Option<T>>,
    pub(super) call: Arc<Call>,
}

impl<T: Clone> LoadHandle<T> {
    /// Waits for the result. Cancel-safe.
    pub(super) async fn wait(&mut self) -> Result<T> {
        // The task drops its sender only if the runtime shuts down or the load panics.
        let ended = || Error::new(ErrorKind::Unavailable, "the load ended without a result");
        let result = self.receiver.wait_for(Option::is_some).await.map_err(|_| ended())?;
        result.clone().ok_or_else(ended)
    }
}
