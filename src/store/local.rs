//! `Local`: keeps conversations in one SQLite file. It is the embedded default.
//!
//! One OS thread writes with group commit: writes that arrive during a commit share the next commit. Each reader has its own
//! connection and sees committed data only.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::error::{Error, Result};
use crate::model::clock::Clock;
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::record::Record;
use crate::model::version::{TOMBSTONE_TTL, Timestamp, Version};
use crate::model::writer::WriterId;
use crate::resilience::tasks::unblock;
use crate::store::{
    Applied, Decision, ListPage, ListRequest, LoadRequest, Loaded, RowState, Store, Write, WriteHead, decide,
};

use crate::sqlite::database::{Database, LockedDatabase};
use crate::sqlite::error;
use crate::sqlite::file::FileKind;
use crate::sqlite::rows::{COLUMNS, record};
use crate::sqlite::writer::CommitLevel;

pub(crate) const KIND: FileKind = FileKind {
    name: "local",
    schema: include_str!("local.sql"),
    mismatch: (
        "is the outage file of the backend `supabase`, not the conversations of the backend `local`",
        "set CONVERSATION_LOCAL_PATH to another path",
    ),
    conversion: concat!(
        include_str!("local/rename_former.sql"),
        include_str!("local.sql"),
        include_str!("local/copy_former.sql")
    ),
    addition: "",
    first_building: Some(include_str!("local/first_building.sql")),
};

/// Ends a page, so that a page of large records does not fill memory.
const MAX_PAGE_BYTES: usize = 16 << 20;

/// Keeps records in one SQLite file. Only one process may have the file open.
///
/// The store acknowledges a write after the sync to disk. Only the owner can read the file. SQLite overwrites deleted data.
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
    /// Opens the file, and creates it if it does not exist.
    ///
    /// If another process has the file open, the call waits up to 5 seconds. So a rolling restart succeeds.
    ///
    /// # Errors
    /// - [`Locked`](crate::ErrorKind::Locked): another process has the file open.
    /// - [`LocalStorage`](crate::ErrorKind::LocalStorage): the file cannot be opened or written, or belongs to another
    ///   program.
    ///
    /// ```
    /// use threadkeep::store::{Local, Store};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> threadkeep::Result<()> {
    /// # let directory = tempfile::tempdir().unwrap();
    /// let store = Local::open(directory.path().join("conversations.db")).await?;
    /// store.probe().await
    /// # }
    /// ```
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_owned();
        unblock(move || Self::open_blocking(&path)).await?
    }

    fn open_blocking(path: &Path) -> Result<Self> {
        let opened = LockedDatabase::new(path, KIND)?;
        let clock = Arc::new(Clock::authoritative());
        // A machine clock that went back must not issue versions below the stored ones.
        let newest = "select coalesce(max(version), 0) from conversations";
        let newest = opened.connection.query_row(newest, [], |row| row.get(0));
        clock.advance(Version::from_raw(newest.map_err(error::file_error(&opened.path))?));
        Ok(Self { database: Arc::new(Database::start(opened, || {})?), clock })
    }

    /// Returns the canonical path of the file.
    ///
    /// ```
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> threadkeep::Result<()> {
    /// # let directory = tempfile::tempdir().unwrap();
    /// let store = threadkeep::store::Local::open(directory.path().join("conversations.db")).await?;
    /// assert!(store.path().ends_with("conversations.db"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn path(&self) -> &Path {
        self.database.path()
    }
}

fn load_one(reader: &Connection, request: &LoadRequest, now: Timestamp) -> rusqlite::Result<Loaded> {
    let sql = "select version, value is not null and expires_at > ?2 from conversations where key = ?1";
    let header: Option<(i64, bool)> = reader
        .prepare_cached(sql)?
        .query_row(params![request.key.as_str(), now.0], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    // The value is read only if the caller does not hold it.
    match header.map(|(version, is_live)| (Version::from_raw(version), is_live)) {
        None => Ok(Loaded::Absent(Version::NONE)),
        Some((version, false)) => Ok(Loaded::Absent(version)),
        Some((version, true)) if request.if_none_match == Some(version) => Ok(Loaded::NotModified),
        Some(_) => {
            let sql = format!("select {COLUMNS} from conversations where key = ?1");
            let found = reader.prepare_cached(&sql)?.query_row([request.key.as_str()], record)?;
            Ok(Loaded::Found(Arc::new(found)))
        }
    }
}

fn apply_one(connection: &Connection, write: &Write, clock: &Clock) -> rusqlite::Result<Applied> {
    let head = write.head();
    let state = match decide_one(connection, &write.record.key, &head, clock)? {
        Decision::Answer(answer) => return Ok(answer),
        Decision::Apply(state) => state,
    };
    let (record, applied) = match over(connection, write, &state)? {
        Ok(changed) => changed,
        Err(unsuitable) => return Ok(unsuitable),
    };
    let sql = format!(
        "insert into conversations ({COLUMNS}, base_version, last_writer, run_began, created_at, accessed_at)
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?10)
         on conflict (key) do update set version = ?2, value = ?3, expires_at = ?4, user = ?5, metadata = ?6,
                                         base_version = ?7, last_writer = ?8, run_began = ?9, accessed_at = ?10"
    );
    connection.prepare_cached(&sql)?.execute(params![
        record.key.as_str(),
        state.version.raw(),
        record.value.as_ref().map(Json::as_str),
        state.expires_at.0,
        record.user,
        record.metadata.as_str(),
        state.base_version.raw(),
        state.last_writer.raw(),
        state.run_began.raw(),
        clock.now().0,
    ])?;
    if head.is_counted() {
        let sql = "insert into writers values (?1, ?2, ?3) on conflict do update set version = ?3";
        let noted = params![record.key.as_str(), head.writer.raw(), head.version.raw()];
        connection.prepare_cached(sql)?.execute(noted)?;
    }
    Ok(applied)
}

/// Returns the record after the write. Only an append needs the record before.
fn over(
    connection: &Connection,
    write: &Write,
    state: &RowState,
) -> rusqlite::Result<Result<(Arc<Record>, Applied), Applied>> {
    let mut held = None;
    if write.append.is_some() {
        let sql = format!("select {COLUMNS} from conversations where key = ?1");
        held = connection.prepare_cached(&sql)?.query_row([write.record.key.as_str()], record).optional()?;
    }
    Ok(write.over(held.as_ref(), state.version))
}

fn decide_one(
    connection: &Connection,
    key: &Key,
    head: &WriteHead,
    clock: &Clock,
) -> rusqlite::Result<Decision> {
    let sql = "select version, base_version, last_writer, run_began, expires_at from conversations
               where key = ?1";
    let state = |row: &Row<'_>| {
        Ok(RowState {
            version: Version::from_raw(row.get(0)?),
            base_version: Version::from_raw(row.get(1)?),
            last_writer: WriterId::from_raw(row.get(2)?),
            run_began: Version::from_raw(row.get(3)?),
            expires_at: Timestamp(row.get(4)?),
        })
    };
    let row = connection.prepare_cached(sql)?.query_row([key.as_str()], state).optional()?;
    let mut last = None;
    if head.is_counted() {
        let sql = "select version from writers where key = ?1 and writer = ?2";
        let noted = params![key.as_str(), head.writer.raw()];
        last = connection.prepare_cached(sql)?.query_row(noted, |row| row.get(0)).optional()?;
    }
    let last = last.map_or(Version::NONE, Version::from_raw);
    Ok(decide(head, row.as_ref(), last, clock.now_for_versions()))
}

#[async_trait]
impl Store for Local {
    fn clock(&self) -> &Arc<Clock> {
        &self.clock
    }

    fn fault(&self) -> Option<Error> {
        self.database.fault()
    }

    async fn load(&self, requests: &[LoadRequest]) -> Result<Vec<Loaded>> {
        let requests = requests.to_vec();
        let clock = Arc::clone(&self.clock);
        let load = move |reader: &Connection| {
            let now = clock.now();
            requests.iter().map(|request| load_one(reader, request, now)).collect()
        };
        self.database.read(load).await
    }

    async fn apply(&self, writes: &[Write]) -> Result<Vec<Applied>> {
        let (writes, clock) = (writes.to_vec(), Arc::clone(&self.clock));
        let apply = move |connection: &Connection| {
            writes.iter().map(|write| apply_one(connection, write, &clock)).collect()
        };
        self.database.write(CommitLevel::Acknowledged, apply).await
    }

    async fn list(&self, page: &ListRequest) -> Result<ListPage> {
        let (page, clock) = (page.clone(), Arc::clone(&self.clock));
        let read = move |reader: &Connection| {
            // Two statements instead of one `or`, so that SQLite uses an index for each.
            let user_filter = if page.user.is_some() { "user = ?2" } else { "?2 is null" };
            let sql = format!(
                "select {COLUMNS} from conversations
                 where value is not null and expires_at > ?1 and {user_filter} and (version, key) < (?3, ?4)
                 order by version desc, key desc limit ?5"
            );
            let after =
                page.after.as_ref().map_or((i64::MAX, ""), |(version, key)| (version.raw(), key.as_str()));
            // One record above the limit shows whether a further page exists.
            let limit = i64::try_from(page.limit).unwrap_or(i64::MAX).saturating_add(1);
            let mut query = reader.prepare_cached(&sql)?;
            let found =
                query.query_map(params![clock.now().0, page.user, after.0, after.1, limit], record)?;
            let (mut records, mut bytes) = (Vec::new(), 0);
            for record in found {
                if records.len() == page.limit || bytes >= MAX_PAGE_BYTES {
                    return Ok(ListPage { records, is_last: false });
                }
                let record = record?;
                bytes += record.bytes();
                records.push(record);
            }
            Ok(ListPage { records, is_last: true })
        };
        self.database.read(read).await
    }

    async fn touch(&self, keys: &[Key]) -> Result<()> {
        let (keys, now) = (keys.to_vec(), self.clock.now().0);
        let touch_all = move |connection: &Connection| {
            let mut touch =
                connection.prepare_cached("update conversations set accessed_at = ?2 where key = ?1")?;
            keys.iter().try_for_each(|key| touch.execute(params![key.as_str(), now]).map(drop))
        };
        // No caller gets a promise about an access time, so a lost name does not matter.
        self.database.write(CommitLevel::PowerCut, touch_all).await
    }

    async fn purge(&self, limit: usize) -> Result<usize> {
        let now = self.clock.now();
        let oldest_expiry = now.minus(TOMBSTONE_TTL);
        let oldest_version = Version::min_at(self.clock.now_for_versions().minus(TOMBSTONE_TTL));
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let purge = move |connection: &Connection| {
            // An expired conversation needs its version only.
            let cleared = connection.execute(
                "update conversations set value = null, metadata = '{}', user = null where rowid in
                   (select rowid from conversations where expires_at <= ?1 and value is not null limit ?2)",
                params![now.0, limit],
            )?;
            // A younger version must stay: the store may still accept an older write (I13).
            let deleted = connection.execute(
                "delete from conversations where rowid in
                   (select rowid from conversations where expires_at < ?1 and version < ?2 limit ?3)",
                params![oldest_expiry.0, oldest_version.raw(), limit],
            )?;
            // A repeated write below this version is too old.
            let forgotten = connection.execute(
                "delete from writers where (key, writer) in (select key, writer from writers where version < ?1 limit ?2)",
                params![oldest_version.raw(), limit],
            )?;
            Ok(cleared.max(deleted).max(forgotten))
        };
        let purged = self.database.write(CommitLevel::PowerCut, purge).await?;
        self.database.vacuum().await?;
        Ok(purged)
    }

    async fn probe(&self) -> Result<()> {
        self.database.check_working().await
    }
}
