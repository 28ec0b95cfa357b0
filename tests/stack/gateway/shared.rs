//! The state that the connections of a gateway share with its test.

use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

use tokio::sync::watch;

use super::fault::{Fault, Plan};
use super::keys::Keys;
use super::log::{Log, Seen};
use super::upstream::Upstream;
use super::wire::{Reply, Request};

pub struct Shared {
    pub state: Mutex<State>,
    /// Notified of every change of the log.
    pub news: watch::Sender<()>,
    /// Notified when hanging requests must continue.
    pub release: watch::Sender<()>,
    upstream: Upstream,
}

pub struct State {
    pub plan: Plan,
    pub log: Log,
    pub keys: Keys,
    /// The number of rotations of the secret key.
    pub rotations: u32,
}

/// A new request and its fault.
pub struct Arrival<'a> {
    pub under_way: UnderWay<'a>,
    pub fault: Fault,
    /// Subscribed at the time of the decision, so that the request misses no release.
    pub release: watch::Receiver<()>,
}

/// A request whose client waits. The drop of this value ends the request, also if the connection's task ends.
pub struct UnderWay<'a> {
    shared: &'a Shared,
    pub number: u64,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.shared.note(self.number, |seen| seen.ended = Some(Instant::now()));
    }
}

impl Shared {
    pub fn new(upstream: Upstream) -> Self {
        let state = State { plan: Plan::default(), log: Log::default(), keys: Keys::new(0), rotations: 0 };
        Self {
            state: Mutex::new(state),
            news: watch::Sender::new(()),
            release: watch::Sender::new(()),
            upstream,
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("a rule of the test panicked")
    }

    /// Records a request and selects its fault in one step. So the log and the script have the same order.
    pub fn arrive(&self, request: &Request) -> Arrival<'_> {
        let mut state = self.state();
        let seen = state.log.begin(request);
        let fault = state.plan.decide(&seen);
        let release = self.release.subscribe();
        drop(state);
        self.news.send_replace(());
        Arrival { under_way: UnderWay { shared: self, number: seen.number }, fault, release }
    }

    /// Handles the request as Supabase does: finds the route, checks the key and forwards the request.
    pub async fn carry_out(&self, request: &Request, number: u64) -> Reply {
        let Some(path) = request.target.strip_prefix("/rest/v1").filter(|path| path.starts_with('/')) else {
            return Reply::json(404, r#"{"message":"no Route matched with those values"}"#);
        };
        let admitted = self.state().keys.admit(request);
        let caller = match admitted {
            Ok(caller) => caller,
            Err(refusal) => return refusal,
        };
        let reply = self.upstream.forward(request, path, caller).await;
        self.note(number, |seen| seen.carried_out = Some(reply.status));
        reply
    }

    fn note(&self, number: u64, change: impl FnOnce(&mut Seen)) {
        // This also runs in `drop`. A second panic there would hide the first panic.
        let Ok(mut state) = self.state.lock() else { return };
        state.log.entry(number).map(change);
        drop(state);
        self.news.send_replace(());
    }
}
