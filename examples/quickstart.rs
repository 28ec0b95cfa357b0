//! A conversation that survives a restart: run `cargo run --example quickstart` twice.
//!
//! The store is `./threadkeep.db`. The settings in `.env.example` select another store.

use threadkeep::{Cache, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let cache = Cache::from_env().await?;
    let append = |current: Option<Vec<String>>| {
        let mut messages = current.unwrap_or_default();
        messages.push(format!("hello number {}", messages.len() + 1));
        Ok(Some(messages))
    };
    let outcome = cache.update("quickstart", append).await?; // compare-and-set: no concurrent turn is lost
    let found = cache.get("quickstart").await?;
    println!("{outcome:?}: {}", found.map_or("expired".into(), |found| found.json().to_owned()));
    cache.shutdown(std::time::Duration::from_secs(5)).await?;
    Ok(())
}
