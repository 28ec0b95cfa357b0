//! A conversation that outlives its daemon: `cargo run --example quickstart`, and once more.
//!
//! It is kept in `./threadkeep.db`, or wherever the settings in `.env.example` put it.

use threadkeep::{Cache, Result};

#[tokio::main]
async fn main() -> Result<()> {
    let cache = Cache::from_env().await?;
    let say = |said: Option<Vec<String>>| {
        let mut said = said.unwrap_or_default();
        said.push(format!("hello for the {}. time", said.len() + 1));
        Ok(Some(said))
    };
    let acknowledged = cache.update("quickstart", say).await?; // compare-and-set: no concurrent turn is lost
    let found = cache.get("quickstart").await?;
    println!("{acknowledged:?}: {}", found.map_or("expired".into(), |found| found.json().to_owned()));
    let _ = cache.shutdown(std::time::Duration::from_secs(5)).await?;
    Ok(())
}
