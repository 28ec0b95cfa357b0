//! Measures tower-sessions with moka in front of Postgres, a ready-made cache for JSON by id.
//!
//! The Postgres store of tower-sessions needs sqlx. sqlx and rusqlite both link SQLite, so one binary cannot have both.
//! The store in this file does the same with tokio-postgres. A hit does not reach the store.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use tokio_postgres::Client;
use tower_sessions_core::session::{Id, Record};
use tower_sessions_core::session_store::{Error, Result};
use tower_sessions_core::{CachingSessionStore, SessionStore};
use tower_sessions_moka_store::MokaStore;

use crate::hits;
use crate::work::{conversation, thread};
use crate::world::{KIB, World};

#[derive(Debug, Clone)]
struct Postgres(Arc<Client>);

fn backend(error: impl std::fmt::Display) -> Error {
    Error::Backend(error.to_string())
}

#[async_trait]
impl SessionStore for Postgres {
    async fn save(&self, record: &Record) -> Result<()> {
        let json = serde_json::to_string(record).map_err(|error| Error::Encode(error.to_string()))?;
        let sql =
            "insert into sessions values ($1, $2) on conflict (id) do update set record = excluded.record";
        self.0.execute(sql, &[&record.id.to_string(), &json]).await.map(drop).map_err(backend)
    }

    async fn load(&self, id: &Id) -> Result<Option<Record>> {
        let sql = "select record from sessions where id = $1";
        let row = self.0.query_opt(sql, &[&id.to_string()]).await.map_err(backend)?;
        let decode = |row: tokio_postgres::Row| serde_json::from_str(row.get(0));
        row.map(decode).transpose().map_err(|error| Error::Decode(error.to_string()))
    }

    async fn delete(&self, id: &Id) -> Result<()> {
        let sql = "delete from sessions where id = $1";
        self.0.execute(sql, &[&id.to_string()]).await.map(drop).map_err(backend)
    }
}

pub struct Sessions {
    store: CachingSessionStore<MokaStore, Postgres>,
    keys: Vec<String>,
}

impl Sessions {
    pub async fn new(world: &World, threads: usize) -> Self {
        let client = world.stack.sql().await;
        let table = "create table if not exists sessions (id text primary key, record text not null)";
        client.batch_execute(table).await.unwrap();
        let store = CachingSessionStore::new(MokaStore::new(None), Postgres(Arc::new(client)));
        let save = async |at: usize| {
            let value = serde_json::to_value(conversation(&thread(at), KIB)).unwrap();
            let expiry_date = std::time::SystemTime::now() + Duration::from_secs(86_400);
            let data = HashMap::from([("conversation".to_owned(), value)]);
            let record = Record { id: Id(at as i128), data, expiry_date: expiry_date.into() };
            store.save(&record).await.unwrap();
        };
        futures::stream::iter(0..threads).for_each_concurrent(64, save).await;
        Self { store, keys: (0..threads).map(|at| at.to_string()).collect() }
    }

    /// Measures the mean time of a load from the cache.
    pub fn hits(&self, gets: usize) -> Duration {
        hits::each(&self.keys, gets, async |key| {
            assert!(self.store.load(&Id(key.parse().unwrap())).await.unwrap().is_some());
        })
    }
}
