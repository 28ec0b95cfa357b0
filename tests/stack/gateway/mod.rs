//! Stands where Supabase's edge stands: serves `/rest/v1`, checks keys, and does to requests what a test asks
//! for.

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

/// A gateway in front of a stack, on the runtime of the test that made it; ends with the value.
///
/// Parts of paths select requests: `"threadkeep_load"`, or `""` for all of them.
pub struct Gateway {
    shared: Arc<Shared>,
    port: u16,
    door: Mutex<Option<Door>>,
}

/// The open listener. Dropping `close` closes it.
struct Door {
    close: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Gateway {
    /// A gateway in front of the server at that port.
    pub async fn start(server: Server, port: u16) -> Self {
        let shared = Arc::new(Shared::new(Upstream::new(server, port)));
        let gateway = Self { shared, port: free_port(), door: Mutex::new(None) };
        gateway.accept().await;
        gateway
    }

    /// What a client takes for the URL of its project.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The keys it accepts at present.
    pub fn keys(&self) -> Keys {
        self.shared.state().keys.clone()
    }

    /// Replaces the secret key and returns the new one; the old one is refused from now on.
    pub fn rotate_secret(&self) -> String {
        let mut state = self.shared.state();
        state.rotations += 1;
        state.keys = Keys::new(state.rotations);
        state.keys.secret.clone()
    }

    /// The next requests take these faults in order.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.script_for("", faults);
    }

    /// The next requests to paths with that part take these faults in order; others do not touch the script.
    pub fn script_for(&self, part: &str, faults: impl IntoIterator<Item = Fault>) {
        self.shared.state().plan.extend(part, faults);
    }

    /// What happens to every request that the script does not cover.
    pub fn always(&self, fault: Fault) {
        self.rule(move |_| fault.clone());
    }

    /// Decides on every request that the script does not cover. It runs under the gateway's lock: judge by
    /// what it is given, ask the gateway nothing.
    pub fn rule(&self, rule: impl FnMut(&Seen) -> Fault + Send + 'static) {
        self.shared.state().plan.set_rule(rule);
    }

    /// Ends all faults and lets go of what hangs, including requests whose clients have gone meanwhile: those
    /// arrive late.
    pub fn heal(&self) {
        self.shared.state().plan = Plan::default();
        self.release();
    }

    /// Lets go of what hangs at this moment; faults go on.
    pub fn release(&self) {
        self.shared.release.send_replace(());
    }

    /// Closes the listener and all connections: from now on connecting fails, and what hung is lost for good.
    pub async fn refuse(&self) {
        let Some(door) = self.door.lock().await.take() else { return };
        drop(door.close);
        door.task.await.expect("the listener does not panic");
    }

    /// Listens again, on the same port.
    pub async fn accept(&self) {
        let mut door = self.door.lock().await;
        if door.is_none() {
            let listener = TcpListener::bind(("127.0.0.1", self.port)).await.expect("its own port");
            let (close, closed) = oneshot::channel();
            let task = tokio::spawn(serve(listener, closed, self.shared.clone()));
            *door = Some(Door { close, task });
        }
    }

    /// The requests that arrived since the start, or since [`Gateway::forget`].
    pub fn seen(&self) -> Vec<Seen> {
        self.shared.state().log.all().to_vec()
    }

    /// How many requests to paths with that part arrived.
    pub fn count(&self, part: &str) -> usize {
        self.shared.state().log.on(part).count()
    }

    /// How many requests to paths with that part have been under way at one moment, at most.
    pub fn max_in_flight(&self, part: &str) -> usize {
        self.shared.state().log.max_in_flight(part)
    }

    /// Starts observation anew; faults stay.
    pub fn forget(&self) {
        self.shared.state().log.forget();
    }

    /// Waits until `count` requests to paths with that part have arrived.
    pub async fn wait_for(&self, count: usize, part: &str) {
        self.wait_until(|seen| on(seen, part).count() >= count).await;
    }

    /// Waits until the server has carried out `count` requests to paths with that part, whether or not the
    /// client has heard of it.
    pub async fn wait_for_carried_out(&self, count: usize, part: &str) {
        self.wait_until(|seen| on(seen, part).filter(|seen| seen.carried_out.is_some()).count() >= count)
            .await;
    }

    /// Waits until what was seen satisfies the test; panics after half a minute, naming what was seen.
    pub async fn wait_until(&self, mut enough: impl FnMut(&[Seen]) -> bool) {
        let mut news = self.shared.news.subscribe();
        let satisfied = news.wait_for(|()| enough(self.shared.state().log.all()));
        if tokio::time::timeout(Duration::from_secs(30), satisfied).await.is_err() {
            panic!("the gateway waited in vain; it saw {:#?}", self.seen());
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
    // Before the connections, or a client that reconnects at once would still be let in.
    drop(listener);
    connections.shutdown().await;
}
