//! Takes the place of Supabase's edge: serves `/rest/v1`, checks keys, and applies the faults of a test.

mod connection;
mod fault;
mod keys;
mod log;
mod shared;
mod upstream;
mod wire;

use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::{Mutex, oneshot};
use tokio::task::{JoinHandle, JoinSet};

pub use fault::Fault;
pub use keys::{JWT_SECRET, Keys, jwt};
pub use log::Seen;
pub use upstream::{LITE_PUBLISHABLE, LITE_SECRET};

use super::{Server, free_port};
use fault::Plan;
use shared::Shared;
use upstream::Upstream;

/// A gateway in front of a stack, on the runtime of its test. The gateway ends with this value.
///
/// Parts of paths select requests: `"threadkeep_load"`, or `""` for all of them.
pub struct Gateway {
    shared: Arc<Shared>,
    port: u16,
    listener: Mutex<Option<Listener>>,
}

/// The open listener. Dropping `close` closes it.
struct Listener {
    close: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Gateway {
    /// Starts a gateway in front of the server at this port.
    pub async fn start(server: Server, port: u16) -> Self {
        let shared = Arc::new(Shared::new(Upstream::new(server, port)));
        let gateway = Self { shared, port: free_port(), listener: Mutex::new(None) };
        gateway.accept().await;
        gateway
    }

    /// Returns the project URL for clients.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Returns the accepted keys.
    pub fn keys(&self) -> Keys {
        self.shared.state().keys.clone()
    }

    /// Replaces the secret key and returns the new key. The gateway rejects the old key from now on.
    pub fn rotate_secret(&self) -> String {
        let mut state = self.shared.state();
        state.rotations += 1;
        state.keys = Keys::new(state.rotations);
        state.keys.secret.clone()
    }

    /// Applies these faults to the next requests in order.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.script_for("", faults);
    }

    /// Applies these faults to the next requests with this part in the path. Other requests do not use the script.
    pub fn script_for(&self, part: &str, faults: impl IntoIterator<Item = Fault>) {
        self.shared.state().plan.extend(part, faults);
    }

    /// Applies this fault to every request that the script does not cover.
    pub fn always(&self, fault: Fault) {
        self.rule(move |_| fault.clone());
    }

    /// Selects the fault of every request that the script does not cover.
    ///
    /// The rule runs under the gateway's lock, so it must not call the gateway.
    pub fn rule(&self, rule: impl FnMut(&Seen) -> Fault + Send + 'static) {
        self.shared.state().plan.set_rule(rule);
    }

    /// Ends all faults and releases all hanging requests. A request whose client has left arrives late.
    pub fn clear(&self) {
        self.shared.state().plan = Plan::default();
        self.release();
    }

    /// Releases the requests that hang now. The faults stay.
    pub fn release(&self) {
        self.shared.release.send_replace(());
    }

    /// Closes the listener and all connections. Clients cannot connect, and hanging requests are lost.
    pub async fn refuse(&self) {
        let Some(listener) = self.listener.lock().await.take() else { return };
        drop(listener.close);
        listener.task.await.expect("the listener does not panic");
    }

    /// Listens again on the same port.
    pub async fn accept(&self) {
        let mut current = self.listener.lock().await;
        if current.is_none() {
            let listener = TcpListener::bind(("127.0.0.1", self.port)).await.expect("its own port");
            let (close, closed) = oneshot::channel();
            let task = tokio::spawn(serve(listener, closed, self.shared.clone()));
            *current = Some(Listener { close, task });
        }
    }

    /// Returns the requests since the start, or since [`Gateway::forget`].
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().log.all().to_vec()
    }

    /// Counts the requests with this part in the path.
    pub fn count(&self, part: &str) -> usize {
        self.shared.state().log.on(part).count()
    }

    /// Returns the largest number of concurrent requests with this part in the path.
    pub fn max_in_flight(&self, part: &str) -> usize {
        self.shared.state().log.max_in_flight(part)
    }

    /// Clears the log. The faults stay.
    pub fn forget(&self) {
        self.shared.state().log.forget();
    }

    /// Waits for `count` requests with this part in the path.
    pub async fn wait_for(&self, count: usize, part: &str) {
        self.wait_until(|seen| on(seen, part).count() >= count).await;
    }

    /// Waits until the server has executed `count` requests with this part in the path.
    ///
    /// The client may not have the answers yet.
    pub async fn wait_for_carried_out(&self, count: usize, part: &str) {
        self.wait_until(|seen| on(seen, part).filter(|seen| seen.carried_out.is_some()).count() >= count)
            .await;
    }

    /// Waits until the log satisfies `enough`. Panics after half a minute and prints the log.
    pub async fn wait_until(&self, mut enough: impl FnMut(&[Seen]) -> bool) {
        let mut news = self.shared.news.subscribe();
        let satisfied = news.wait_for(|()| enough(self.shared.state().log.all()));
        if tokio::time::timeout(Duration::from_secs(30), satisfied).await.is_err() {
            panic!("the expected requests did not arrive; the gateway saw {:#?}", self.seen());
        }
    }
}

fn on<'a>(seen: &'a [Seen], part: &'a str) -> impl Iterator<Item = &'a Seen> {
    seen.iter().filter(move |seen| seen.path.contains(part))
}

async fn serve(listener: TcpListener, mut closed: oneshot::Receiver<()>, shared: Arc<Shared>) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            _ = &mut closed => break,
            accepted = listener.accept() => {
                let Ok((stream, _)) = accepted else { continue };
                connections.spawn(connection::serve(stream, shared.clone()));
            }
            Some(_) = connections.join_next() => {}
        }
    }
    // The listener ends before the connections. Otherwise a client could reconnect at once.
    drop(listener);
    connections.shutdown().await;
}
