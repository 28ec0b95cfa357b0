//! `Local`: conversations in one SQLite file, the embedded default.
//!
//! One thread writes and commits in groups (what arrives while a commit is under way goes into the next one);
//! readers have connections of their own and see what is committed.

mod condition;
mod database;
mod file;
#[cfg(feature = "cli")]
pub(crate) mod look;
#[cfg(feature = "cli")]
pub(crate) mod place;
mod readers;
pub(crate) mod spool;
mod writer;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::blocking::unblock;
use crate::error::{Error, Result};
use crate::record::{Json, Key, Record, Want, Write};
use crate::store::{ACCEPTED, Applied, Loaded, Page, Recent, Store, judge};
use crate::version::{Clock, REMEMBERED, Timestamp, Version};

use database::{Database, Opened};
use file::Role;
use writer::Survives;

/// A page ends when it has grown to this.
const PAGE_BYTES: usize = 16 << 20;

/// A store in one SQLite file, which only one process may have open.
///
/// A write is acknowledged when it is committed and synced to disk. The file can be read by its owner only, and what is
/// deleted is overwritten.
#[derive(Clone)]
pub struct Local {
    database: Arc<Database>,
    clock: Arc<Clock>,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Local").field(&self.path()).finish()
    }
}

impl Local {
    /// Opens the file, creating it where it does not exist. Where another process has it open, waits some seconds for
    /// that to end, as in a rolling restart.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`](crate::ErrorKind::InUse) where another process has it open;
    /// [`ErrorKind::Local`](crate::ErrorKind::Local) where it cannot be opened or written, or is not one of threadkeep's.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        unblock(move || Self::open_blocking(&path)).await?
    }

    fn open_blocking(path: &Path) -> Result<Self> {
        let opened = Opened::new(path, Role::Truth)?;
        let clock = Arc::new(Clock::of_truth());
        let newest = "select coalesce(max(version), 0) from threads";
        let newest = opened.connection.query_row(newest, [], |row| row.get(0));
        clock.advance(Version::from_raw(newest.map_err(file::failure(&opened.path))?));
        Ok(Self { database: Arc::new(Database::start(opened, || {})?), clock })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.database.path()
    }
}

const COLUMNS: &str = "key, version, value, expires_at, user, metadata";

fn record(row: &Row<'_>) -> rusqlite::Result<Record> {
    let text = |column: usize| row.get::<_, Option<String>>(column);
    Ok(Record {
        key: key(row)?,
        version: Version::from_raw(row.get(1)?),
        value: text(2)?.map(Json::trusted),
        expires_at: Timestamp(row.get(3)?),
        user: text(4)?.map(Into::into),
        metadata: Json::trusted(row.get::<_, String>(5)?),
    })
}

/// The key in a row's first column.
fn key(row: &Row<'_>) -> rusqlite::Result<Key> {
    Key::new(row.get_ref(0)?.as_str()?)
        .map_err(|e| rusqlite::Error::FromSqlConversionFailure(0, rusqlite::types::Type::Text, Box::new(e)))
}

fn look_up(reader: &Connection, want: &Want, now: Timestamp) -> rusqlite::Result<Loaded> {
    let sql = "select version, value is not null and expires_at > ?2 from threads where key = ?1";
    let found: Option<(i64, bool)> = reader
        .prepare_cached(sql)?
        .query_row(params![want.key.as_str(), now.0], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    match found.map(|(version, live)| (Version::from_raw(version), live)) {
        None => Ok(Loaded::Absent(Version::NONE)),
        Some((version, false)) => Ok(Loaded::Absent(version)),
        Some((version, true)) if want.known == Some(version) => Ok(Loaded::Same),
        Some(_) => {
            let sql = format!("select {COLUMNS} from threads where key = ?1");
            let found = reader.prepare_cached(&sql)?.query_row([want.key.as_str()], record)?;
            Ok(Loaded::Found(Arc::new(found)))
        }
    }
}

fn write(connection: &Connection, write: &Write, clock: &Clock) -> rusqlite::Result<Applied> {
    let record = &write.record;
    let accepted: Option<String> = connection
        .prepare_cached("select accepted from threads where key = ?1")?
        .query_row([record.key.as_str()], |row| row.get(0))
        .optional()?;
    let mut accepted: Vec<Version> = accepted.iter().flat_map(|list| versions(list)).collect();
    if let Some(verdict) = judge(write, &accepted, clock) {
        return Ok(verdict);
    }
    accepted.insert(0, record.version);
    accepted.truncate(ACCEPTED);
    let list: Vec<String> = accepted.iter().map(Version::to_string).collect();
    let sql = format!(
        "insert into threads ({COLUMNS}, accepted, created_at, accessed_at) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)
         on conflict (key) do update set version = ?2, value = ?3, expires_at = ?4, user = ?5, metadata = ?6,
                                         accepted = ?7, accessed_at = ?8"
    );
    connection.prepare_cached(&sql)?.execute(params![
        record.key.as_str(),
        record.version.raw(),
        record.value.as_ref().map(Json::as_str),
        record.expires_at.0,
        record.user,
        record.metadata.as_str(),
        list.join(" "),
        clock.now().0,
    ])?;
    Ok(Applied::Stored)
}

fn versions(list: &str) -> impl Iterator<Item = Version> {
    list.split(' ').filter_map(|version| version.parse().ok()).map(Version::from_raw)
}

#[async_trait]
impl Store for Local {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    fn fault(&self) -> Option<Error> {
        self.database.fault()
    }

    async fn load(&self, wants: &[Want]) -> Result<Vec<Loaded>> {
        let wants = wants.to_vec();
        let clock = Arc::clone(&self.clock);
        let all = move |reader: &Connection| {
            let now = clock.now();
            wants.iter().map(|want| look_up(reader, want, now)).collect()
        };
        self.database.read(all).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let (writes, clock) = (writes.to_vec(), Arc::clone(&self.clock));
        let all =
            move |connection: &Connection| writes.iter().map(|one| write(connection, one, &clock)).collect();
        self.database.write(Survives::Restart, all).await
    }

    async fn recent(&self, page: &Page) -> Result<Recent> {
        let (page, clock) = (page.clone(), Arc::clone(&self.clock));
        let read = move |reader: &Connection| {
            // Two statements, so that each has its index.
            let whose = if page.user.is_some() { "user = ?2" } else { "?2 is null" };
            let sql = format!(
                "select {COLUMNS} from threads
                 where value is not null and expires_at > ?1 and {whose} and (version, key) < (?3, ?4)
                 order by version desc, key desc limit ?5"
            );
            let after =
                page.after.as_ref().map_or((i64::MAX, ""), |(version, key)| (version.raw(), key.as_str()));
            // One more than asked tells whether there are more.
            let most = i64::try_from(page.most).unwrap_or(i64::MAX).saturating_add(1);
            let mut query = reader.prepare_cached(&sql)?;
            let found = query.query_map(params![clock.now().0, page.user, after.0, after.1, most], record)?;
            let (mut records, mut bytes) = (Vec::new(), 0);
            for record in found {
                if records.len() == page.most || bytes >= PAGE_BYTES {
                    return Ok(Recent { records, is_last: false });
                }
                let record = record?;
                bytes += record.bytes();
                records.push(record);
            }
            Ok(Recent { records, is_last: true })
        };
        self.database.read(read).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        let (keys, now) = (keys.to_vec(), self.clock.now().0);
        let all = move |connection: &Connection| {
            let mut touch =
                connection.prepare_cached("update threads set accessed_at = ?2 where key = ?1")?;
            keys.iter().try_for_each(|key| touch.execute(params![key.as_str(), now]).map(drop))
        };
        self.database.write(Survives::PowerCut, all).await
    }

    async fn purge(&self, most: usize) -> Result<usize> {
        let now = self.clock.now();
        let past = now.minus(REMEMBERED);
        let past_version = Version::lowest(self.clock.now_for_versions().minus(REMEMBERED));
        let most = i64::try_from(most).unwrap_or(i64::MAX);
        let all = move |connection: &Connection| {
            // Of an expired thread only the version is still needed.
            let emptied = connection.execute(
                "update threads set value = null, metadata = '{}', user = null where rowid in
                   (select rowid from threads where expires_at <= ?1 and value is not null limit ?2)",
                params![now.0, most],
            )?;
            let forgotten = connection.execute(
                "delete from threads where rowid in
                   (select rowid from threads where expires_at < ?1 and version < ?2 limit ?3)",
                params![past.0, past_version.raw(), most],
            )?;
            Ok(emptied.max(forgotten))
        };
        let purged = self.database.write(Survives::PowerCut, all).await?;
        self.database.tidy().await?;
        Ok(purged)
    }

    async fn probe(&self) -> Result<()> {
        self.database.prove().await
    }
}
