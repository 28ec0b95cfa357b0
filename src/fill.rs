//! Single flight: one load of a thread at a time, however many callers want it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing::Instrument;

use crate::background;
use crate::error::{Error, ErrorKind, Result};
use crate::fence::{Fences, Ticket};
use crate::record::Key;
use crate::version::Moment;

/// Loads under way at most; one more caller is told [`ErrorKind::Busy`].
const MOST: usize = 10_000;

/// The loads under way, by key. `T` is what a load ends with.
#[derive(Debug)]
pub(crate) struct Flights<T> {
    running: Arc<Mutex<HashMap<Key, Flight<T>>>>,
}

#[derive(Debug)]
struct Flight<T> {
    ticket: Arc<Ticket>,
    began: Moment,
    landing: Landing<T>,
}

type Landing<T> = watch::Receiver<Option<T>>;

impl<T> Default for Flights<T> {
    fn default() -> Self {
        Self { running: Arc::default() }
    }
}

impl<T: Clone + Send + Sync + 'static> Flights<T> {
    /// Joins the load of this key that is under way, or starts one.
    ///
    /// The load runs in a task of its own, so that it goes on when the caller who started it does not. One during which
    /// the key changed is not joined any more: it is likely overtaken, and the caller would wait for nothing.
    pub(crate) fn join<F>(
        &self,
        key: &Key,
        fences: &Fences,
        load: impl FnOnce(Arc<Ticket>) -> F,
    ) -> Result<Joined<T>>
    where
        F: Future<Output = T> + Send + 'static,
    {
        let mut running = lock(&self.running);
        if let Some(flight) = running.get(key).filter(|flight| flight.ticket.floor(key).is_none()) {
            return Ok(Joined { landing: flight.landing.clone(), began: flight.began });
        }
        if running.len() >= MOST {
            return Err(Error::new(ErrorKind::Busy, format!("{MOST} loads are under way; try again later")));
        }
        let ticket = Arc::new(fences.begin());
        let (land, landing) = watch::channel(None);
        let began = Moment::now();
        let flight = Flight { ticket: Arc::clone(&ticket), began, landing: landing.clone() };
        running.insert(key.clone(), flight);
        let entry =
            Listed { running: Arc::clone(&self.running), key: key.clone(), ticket: Arc::clone(&ticket) };
        let work = load(ticket);
        // A closing runtime drops the task at once, and with it `entry`, which takes this lock.
        drop(running);
        let flight = async move {
            let result = work.await;
            // Off the list before it lands: who comes now starts a load of his own.
            drop(entry);
            land.send_replace(Some(result));
        };
        background::spawn(flight.in_current_span());
        Ok(Joined { landing, began })
    }
}

fn lock<T>(running: &Mutex<HashMap<Key, Flight<T>>>) -> MutexGuard<'_, HashMap<Key, Flight<T>>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes the flight off the list when it ends, also when it panics.
struct Listed<T> {
    running: Arc<Mutex<HashMap<Key, Flight<T>>>>,
    key: Key,
    ticket: Arc<Ticket>,
}

impl<T> Drop for Listed<T> {
    fn drop(&mut self) {
        let mut running = lock(&self.running);
        // A later flight may stand in its place.
        if running.get(&self.key).is_some_and(|flight| Arc::ptr_eq(&flight.ticket, &self.ticket)) {
            running.remove(&self.key);
        }
    }
}

/// A load that is under way.
#[derive(Debug)]
pub(crate) struct Joined<T> {
    landing: Landing<T>,
    /// What it finds was stored at this moment or later.
    pub(crate) began: Moment,
}

impl<T: Clone> Joined<T> {
    /// Waits for its end; cancel-safe.
    pub(crate) async fn land(&mut self) -> Result<T> {
        let gone =
            |_| Error::new(ErrorKind::Unavailable, "the load was given up: the runtime ends, or a bug");
        let landed = self.landing.wait_for(Option::is_some).await.map_err(gone)?;
        landed.clone().ok_or_else(|| Error::new(ErrorKind::Unavailable, "the load ended without a result"))
    }
}
