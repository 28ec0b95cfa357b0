//! A conversation that survives a restart: run `cargo run --example quickstart` twice.
//!
//! The store is `./threadkeep.db`. The settings in `.env.example` select another store.

use threadkeep::{Cache, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let cache = Cache::from_env().await?;
    let count =
        cache.get("quickstart").await?.map_or(Ok(vec![]), |found| found.decode::<Vec<String>>())?.len();
    let hello = format!("hello number {}", count + 1);
    let outcome = cache.append("quickstart", &[hello]).await?.outcome; // no concurrent turn is lost
    let found = cache.get("quickstart").await?;
    println!("{outcome:?}: {}", found.map_or("expired".into(), |found| found.json().to_owned()));
    cache.shutdown(std::time::Duration::from_secs(5)).await?;
    Ok(())
}
