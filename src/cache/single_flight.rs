//! Single flight: one load of a conversation serves all callers that want it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing::Instrument;

use crate::cache::read_token::{ReadToken, VersionFloors};
use crate::error::{Error, ErrorKind, Result};
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::resilience::tasks;

/// The limit on loads in flight. A caller beyond it gets [`ErrorKind::Overloaded`].
const MAX_LOADS: usize = 10_000;

/// The loads in flight, by key. `T` is the result of a load.
#[derive(Debug)]
pub(crate) struct SingleFlight<T> {
    loads: Arc<Mutex<HashMap<Key, InFlightLoad<T>>>>,
}

#[derive(Debug)]
struct InFlightLoad<T> {
    token: Arc<ReadToken>,
    started_at: Moment,
    receiver: ResultReceiver<T>,
}

type ResultReceiver<T> = watch::Receiver<Option<T>>;

impl<T> Default for SingleFlight<T> {
    fn default() -> Self {
        Self { loads: Arc::default() }
    }
}

impl<T: Clone + Send + Sync + 'static> SingleFlight<T> {
    /// Joins the load of this key that is in flight, or starts one.
    ///
    /// The load runs in a task of its own, so it survives the caller that started it. A caller does not
    /// join a load during which the key's floor rose. The result of that load is probably stale, and
    /// the caller would have to load again.
    pub(crate) fn join_or_start<F>(
        &self,
        key: &Key,
        floors: &VersionFloors,
        load: impl FnOnce(Arc<ReadToken>) -> F,
    ) -> Result<LoadHandle<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut loads = lock(&self.loads);
        if let Some(load_task) = loads.get(key).filter(|load_task| load_task.token.floor(key).is_none()) {
            return Ok(LoadHandle { receiver: load_task.receiver.clone(), started_at: load_task.started_at });
        }
        if loads.len() >= MAX_LOADS {
            return Err(Error::new(ErrorKind::Overloaded, format!("{MAX_LOADS} loads are in flight")));
        }
        // The token is older than the request, so a change during the load shows (I2).
        let token = Arc::new(floors.token());
        let (sender, receiver) = watch::channel(None);
        let started_at = Moment::now();
        let load_task = InFlightLoad { token: Arc::clone(&token), started_at, receiver: receiver.clone() };
        loads.insert(key.clone(), load_task);
        let guard =
            FlightGuard { loads: Arc::clone(&self.loads), key: key.clone(), token: Arc::clone(&token) };
        let work = load(token);
        // A closing runtime drops the task at once, and with it `guard`, which takes this lock.
        drop(loads);
        let load_task = async move {
            let result = work.await;
            // The guard leaves the map before the result is sent. A later caller starts a load of its own.
            drop(guard);
            sender.send_replace(Some(result));
        };
        tasks::spawn(load_task.in_current_span());
        Ok(LoadHandle { receiver, started_at })
    }
}

fn lock<T>(loads: &Mutex<HashMap<Key, InFlightLoad<T>>>) -> MutexGuard<'_, HashMap<Key, InFlightLoad<T>>> {
    loads.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes the load from the map when it ends, also after a panic.
struct FlightGuard<T> {
    loads: Arc<Mutex<HashMap<Key, InFlightLoad<T>>>>,
    key: Key,
    token: Arc<ReadToken>,
}

impl<T> Drop for FlightGuard<T> {
    fn drop(&mut self) {
        let mut loads = lock(&self.loads);
        // A later load may have taken the place.
        if loads.get(&self.key).is_some_and(|load_task| Arc::ptr_eq(&load_task.token, &self.token)) {
            loads.remove(&self.key);
        }
    }
}

/// A caller's share of a load in flight.
#[derive(Debug)]
pub(crate) struct LoadHandle<T> {
    receiver: ResultReceiver<T>,
    /// The time before the request. The store held the result at this time or later.
    pub(crate) started_at: Moment,
}

impl<T: Clone> LoadHandle<T> {
    /// Waits for the result. Cancel-safe.
    pub(crate) async fn wait(&mut self) -> Result<T> {
        // The task drops its sender only if the runtime shuts down or the load panics.
        let ended = || Error::new(ErrorKind::Unavailable, "the load ended without a result");
        let result = self.receiver.wait_for(Option::is_some).await.map_err(|_| ended())?;
        result.clone().ok_or_else(ended)
    }
}
