//! Background callers of the daemon. They ignore its responses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::process::Client;

/// Number of conversations in use.
pub const HOT: usize = 10;

/// The background callers. A drop stops them.
pub struct Load {
    is_wide: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<()>>,
}

impl Load {
    /// Starts the callers. They read the first [`HOT`] conversations of `ids`.
    pub fn begin(client: &Client, ids: &[String]) -> Self {
        let is_wide = Arc::new(AtomicBool::new(false));
        let reads = tokio::spawn(read(client.clone(), ids.to_vec(), Arc::clone(&is_wide)));
        let writes = tokio::spawn(write(client.clone()));
        Self { is_wide, tasks: vec![reads, writes] }
    }

    /// Sets whether callers read all conversations in turn, to lower the hit ratio.
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
    let mut count = 0;
    loop {
        count += 1;
        let width = if is_wide.load(Relaxed) { ids.len() } else { HOT };
        client.try_request("GET", &format!("/conversations/{}", ids[count % width]), None).await.ok();
        if count % 16 == 0 {
            client.try_request("GET", &format!("/conversations/unknown-{count}"), None).await.ok();
            // The pause leaves CPU time to the tests that run in parallel.
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Starts new conversations of two turns each.
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
