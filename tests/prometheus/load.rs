//! What callers of the daemon do all the while, whatever it answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::process::Client;

/// Conversations that are in use.
pub const HOT: usize = 10;

/// Callers in the background, until this is dropped.
pub struct Load {
    is_wide: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// `ids` are conversations that exist; the first [`HOT`] are in use.
    pub fn begin(client: &Client, ids: &[String]) -> Self {
        let is_wide = Arc::new(AtomicBool::new(false));
        let reads = tokio::spawn(read(client.clone(), ids.to_vec(), Arc::clone(&is_wide)));
        let writes = tokio::spawn(write(client.clone()));
        Self { is_wide, tasks: vec![reads, writes] }
    }

    /// Whether callers use all conversations in turn.
    pub fn widen(&self, is_wide: bool) {
        self.is_wide.store(is_wide, Relaxed);
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

async fn read(client: Client, ids: Vec<String>, is_wide: Arc<AtomicBool>) {
    let mut turn = 0;
    loop {
        turn += 1;
        let among = if is_wide.load(Relaxed) { ids.len() } else { HOT };
        client.try_request("GET", &format!("/conversations/{}", ids[turn % among]), None).await.ok();
        if turn % 16 == 0 {
            client.try_request("GET", &format!("/conversations/unknown-{turn}"), None).await.ok();
            // Not as fast as can be: other tests run beside this one.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// New conversations, each of two turns.
async fn write(client: Client) {
    loop {
        if let Ok(begun) = client.try_chat(&"words ".repeat(50), None).await
            && begun.status == 200
        {
            client.try_chat("and", Some(&begun.id())).await.ok();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
