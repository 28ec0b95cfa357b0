//! A store wrapper with planned faults, by script or by seed.

mod faults;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::key::Key;
use crate::resilience::breaker::Breaker;
use crate::store::{Applied, Changes, Cursor, ListPage, ListRequest, LoadRequest, Loaded, Store, Write};

pub use faults::Faults;

/// A planned fault of one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The call reaches the store and returns its result.
    Pass,
    /// The call fails as an outage and does not reach the store.
    Refuse,
    /// The call reaches the store, but its response is lost: the caller sees an outage with an unknown outcome.
    DropResponse,
    /// The call fails with an error of this kind and does not reach the store.
    Fail(ErrorKind),
    /// The call reaches the store after this time.
    Delay(Duration),
    /// The call reaches the store at once, and its response arrives after this time.
    DelayResponse(Duration),
    /// The call hangs until [`Faults::clear`] or [`Faults::clear_key_faults`], and then fails as an outage.
    Hang,
}

/// Wraps a store and applies the planned [`Faults`] to its calls. See [`Faults`] for an example.
#[derive(Debug)]
pub struct FaultStore<S> {
    store: S,
    faults: Faults,
}

impl<S: Store> FaultStore<S> {
    /// Wraps a store, without faults at first.
    ///
    /// [`faults`](Self::faults) returns the handle that plans faults. See [`Faults`] for an example.
    pub fn new(store: S) -> Self {
        Self { store, faults: Faults::none() }
    }

    /// Returns a handle that plans faults. See [`Faults`] for an example.
    pub fn faults(&self) -> Faults {
        self.faults.clone()
    }

    async fn call<T>(
        &self,
        name: &'static str,
        fault: Fault,
        call: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let _running = self.faults.begin(name);
        let outage = |message| Err(Error::new(ErrorKind::Unavailable, message));
        match fault {
            Fault::Pass => call.await,
            Fault::Refuse => outage("planned fault: the call is refused"),
            Fault::DropResponse => {
                call.await?;
                outage("planned fault: the response is lost").map_err(Error::with_outcome_unknown)
            }
            Fault::Fail(kind) => Err(Error::new(kind, "planned fault")),
            Fault::Delay(span) => {
                tokio::time::sleep(span).await;
                call.await
            }
            Fault::DelayResponse(span) => {
                let result = call.await;
                tokio::time::sleep(span).await;
                result
            }
            Fault::Hang => {
                self.faults.cleared.subscribe().changed().await.ok();
                outage("planned fault: the call hung")
            }
        }
    }
}

#[async_trait]
impl<S: Store> Store for FaultStore<S> {
    fn clock(&self) -> &Arc<Clock> {
        self.store.clock()
    }

    fn breaker(&self) -> Option<&Breaker> {
        self.store.breaker()
    }

    fn fault(&self) -> Option<Error> {
        self.store.fault()
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        self.call("load", self.faults.next(), self.store.load(requests)).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call("apply", self.faults.next_for_writes(writes, false), self.store.apply(writes)).await
    }

    async fn apply_once(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        self.call("apply", self.faults.next_for_writes(writes, true), self.store.apply_once(writes)).await
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let fault = self.faults.next_for_page(page);
        self.call("list", fault, self.store.list(page)).await
    }

    async fn changes(&self, since: Option<&Cursor>) -> Result<Option<Changes>> {
        self.call("changes", self.faults.next(), self.store.changes(since)).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        self.call("touch", self.faults.next(), self.store.touch(keys)).await
    }

    async fn purge(&self, limit: usize) -> Result<usize> {
        self.call("purge", self.faults.next(), self.store.purge(limit)).await
    }

    async fn probe(&self) -> Result<()> {
        self.call("probe", self.faults.next(), self.store.probe()).await
    }
}
