//! The import of writes from other files.

mod validate;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, params};

use super::dead_letters::{self, add_dead_letter, read_dead_letter};
use super::file::{KIND, OutageFile};
use super::offline::{self, queued_write, read_kind};
use super::row::{RowWrite, SUPERSEDED, UNVERIFIED, row_bytes, to_i64, upsert_row, value_text};
use super::writer_state::{self, WriterState};
use super::{DeadLetter, DeadLetterReason, ImportItem, ImportReport, QueuedWrite};
use crate::error::Result;
use crate::model::clock::{Clock, UnsyncedPeriod};
use crate::model::record::Record;
use crate::model::version::{MAX_WRITE_AGE, Timestamp, Version};
use crate::resilience::blocking::unblock;
use crate::sqlite::error::{file_error, unusable};
use crate::sqlite::file;
use crate::sqlite::lock::Lock;
use crate::sqlite::rows::COLUMNS;
use crate::sqlite::writer::CommitLevel;
use crate::store::local::KIND as LOCAL;
pub(super) use validate::validate;

/// The time that an imported write may wait in the queue before the database rejects it as too old. See [`MAX_WRITE_AGE`].
const AGE_MARGIN: Duration = Duration::from_secs(86_400);

impl OutageFile {
    /// Imports items of another file. They are synced to disk when this returns. Newer writes of this file stay, so the same
    /// items can be imported again.
    pub(super) async fn import(&self, items: Vec<ImportItem>) -> Result<ImportReport> {
        let clock = Arc::clone(&self.clock);
        let work = move |connection: &Connection, state: &mut WriterState| {
            let mut sum = ImportReport::default();
            for item in &items {
                sum = sum.plus(import_item(connection, state, item, &clock)?);
            }
            Ok(sum)
        };
        self.write(CommitLevel::Acknowledged, work).await
    }

    /// Queues a dead letter again, as a put of this moment with the same time to live. Returns false if a newer write of the
    /// conversation is queued, or if the dead letter is gone.
    pub(super) async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        let (letter, clock) = (letter.clone(), Arc::clone(&self.clock));
        let work = move |connection: &Connection, state: &mut WriterState| {
            let key = letter.record.key.as_str();
            let queued = "select is_queued from records where key = ?1";
            let queued = connection.query_row(queued, [key], |row| row.get::<_, bool>(0)).optional()?;
            // SQLite may have given the number of a deleted letter to a later one, so key and version are compared.
            let delete = "delete from dead_letters where id = ?1 and key = ?2 and version = ?3";
            let values = params![letter.id, key, letter.record.version.raw()];
            // The requeued write would get the newest version, and so replace the later write.
            if queued == Some(true) || connection.execute(delete, values)? == 0 {
                return Ok(false);
            }
            let now = clock.now();
            let ttl = letter.record.expires_at.since(letter.record.version.at());
            let version = clock.issue().version;
            let record = Record { version, expires_at: now.plus(ttl), ..letter.record.clone() };
            insert(connection, state, &provisional(record, now))?;
            // A dead letter and perhaps a copy are gone, so the figures are read again.
            *state = WriterState::read(connection)?;
            Ok(true)
        };
        self.write(CommitLevel::Acknowledged, work).await
    }
}

/// A put without a condition, with a version of the system's clock.
fn provisional(record: Record, queued_at: Timestamp) -> QueuedWrite {
    QueuedWrite { is_provisional: true, ..QueuedWrite::new(record, queued_at) }
}

fn import_item(
    connection: &Connection,
    state: &mut WriterState,
    item: &ImportItem,
    clock: &Clock,
) -> rusqlite::Result<ImportReport> {
    match item {
        ImportItem::Queued(write) => import_write(connection, state, write, write.record.version, clock),
        ImportItem::LocalRecord(record) => {
            let write = from_local_record(record, clock);
            import_write(connection, state, &write, record.version, clock)
        }
        ImportItem::DeadLetter(letter) => {
            let is_new = insert_dead_letter(connection, state, letter)?;
            let (dead_letters, duplicates) = (usize::from(is_new), usize::from(!is_new));
            Ok(ImportReport { dead_letters, duplicates, ..ImportReport::default() })
        }
    }
}

/// Returns the write that brings a conversation of the backend `local` to another store.
///
/// The database rejects an old version. So an old conversation gets a new version, as an update of its own old version. Such an
/// update replaces any older record, as a put does, and loses against every newer one.
fn from_local_record(record: &Record, clock: &Clock) -> QueuedWrite {
    let now = clock.now();
    let write = provisional(record.clone(), now);
    if record.version >= Version::min_at(now.minus(MAX_WRITE_AGE - AGE_MARGIN)) {
        return write;
    }
    let record = Record { version: clock.issue().version, ..record.clone() };
    QueuedWrite { record, base: Some(write.record.version), sent_versions: vec![Version::NONE], ..write }
}

/// Imports a write that was made at the version `made_at`. Its own version may be newer.
fn import_write(
    connection: &Connection,
    state: &mut WriterState,
    write: &QueuedWrite,
    made_at: Version,
    clock: &Clock,
) -> rusqlite::Result<ImportReport> {
    let row = ImportedRow::find(connection, write)?;
    match decide(write, made_at, row.as_ref()) {
        ImportDecision::Duplicate => return Ok(ImportReport { duplicates: 1, ..ImportReport::default() }),
        ImportDecision::Stale => return Ok(ImportReport { stale: 1, ..ImportReport::default() }),
        ImportDecision::Supersede(version) => {
            let text = "superseded: an imported update does not follow this write".into();
            let reason = DeadLetterReason { text, newer: Some(write.record.version) };
            let bytes = add_dead_letter(connection, &write.record.key, version, &reason, clock.now())?;
            state.usage.dead_letters.add(bytes);
        }
        ImportDecision::Insert => {}
    }
    match row {
        Some(row) if row.is_queued => state.usage.queue.sub(row.bytes),
        Some(row) => state.usage.replica.sub(row.bytes),
        None => {}
    }
    insert(connection, state, write)?;
    Ok(ImportReport { queued: 1, ..ImportReport::default() })
}

/// The row that an imported write meets. Its version is as issued, because clock sync has not happened.
struct ImportedRow {
    version: Version,
    is_queued: bool,
    bytes: u64,
    base: Option<Version>,
}

impl ImportedRow {
    fn find(connection: &Connection, write: &QueuedWrite) -> rusqlite::Result<Option<Self>> {
        let sql = "select version, is_queued, bytes, base from records where key = ?1";
        let read = |row: &rusqlite::Row<'_>| {
            Ok(Self {
                version: Version::from_raw(row.get(0)?),
                is_queued: row.get(1)?,
                bytes: row.get::<_, i64>(2)?.unsigned_abs(),
                base: row.get::<_, Option<i64>>(3)?.map(Version::from_raw),
            })
        };
        connection.prepare_cached(sql)?.query_row([write.record.key.as_str()], read).optional()
    }
}

/// The decision about an imported write.
enum ImportDecision {
    /// The write replaces the row, if there is one.
    Insert,
    /// The write replaces the row, a queued write of this version, which becomes a dead letter.
    Supersede(Version),
    /// The file has this very write.
    Duplicate,
    /// The file has a newer write.
    Stale,
}

/// Compares a write that was made at the version `made_at` with the row of its conversation.
fn decide(write: &QueuedWrite, made_at: Version, row: Option<&ImportedRow>) -> ImportDecision {
    let Some(row) = row else { return ImportDecision::Insert };
    // An earlier import gave the conversation a new version, and kept the old one as its base.
    let was_imported = write.record.version != made_at && row.is_queued && row.base == Some(made_at);
    if row.version == made_at || was_imported {
        return ImportDecision::Duplicate;
    }
    // The newest version stays, in any order of imports (I9).
    if row.version > made_at {
        return ImportDecision::Stale;
    }
    let follows_a_put = write.sent_versions.contains(&Version::NONE);
    let follows_row = |base: Version| {
        base == row.version
            || write.sent_versions.contains(&row.version)
            || (follows_a_put && row.version < base)
    };
    if row.is_queued && write.base.is_some_and(|base| !follows_row(base)) {
        // Without a dead letter the queued write would be lost without a trace.
        return ImportDecision::Supersede(row.version);
    }
    ImportDecision::Insert
}

/// Queues a write. It replaces the row of its conversation.
fn insert(connection: &Connection, state: &mut WriterState, write: &QueuedWrite) -> rusqlite::Result<()> {
    let sent_versions: Vec<String> = write.sent_versions.iter().map(Version::to_string).collect();
    let row = RowWrite {
        record: &write.record,
        seq: state.next_queued_seq(),
        at: write.queued_at,
        is_queued: true,
        base: write.base,
        sent_versions: &sent_versions.join(" "),
        is_dispatched: write.is_dispatched,
        // A lead of zero over the system's clock. The next start shifts the version to its own clock.
        provisional: write.is_provisional.then_some((0, UnsyncedPeriod(0))),
        read_state: match (write.is_superseded, write.is_unverified) {
            (true, _) => SUPERSEDED,
            (false, true) => UNVERIFIED,
            (false, false) => 0,
        },
    };
    upsert_row(connection, &row)?;
    state.usage.queue.add(row_bytes(&write.record));
    Ok(())
}

/// Adds a dead letter. Returns false if the file has a dead letter of the same write.
fn insert_dead_letter(
    connection: &Connection,
    state: &mut WriterState,
    letter: &DeadLetter,
) -> rusqlite::Result<bool> {
    let record = &letter.record;
    let sql = format!(
        "insert into dead_letters ({COLUMNS}, bytes, queued_at, died_at, reason, newer)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11
         where not exists (select 1 from dead_letters where key = ?1 and version = ?2)"
    );
    let added = connection.prepare_cached(&sql)?.execute(params![
        record.key.as_str(),
        record.version.raw(),
        value_text(record),
        record.expires_at.0,
        record.user,
        record.metadata.as_str(),
        to_i64(row_bytes(record)),
        letter.queued_at.0,
        letter.died_at.0,
        letter.reason,
        letter.newer.map(Version::raw),
    ])?;
    if added == 1 {
        state.usage.dead_letters.add(row_bytes(record));
    }
    Ok(added == 1)
}

/// The contents of another outage file.
pub(super) struct FileContents {
    pub(super) project: Option<String>,
    pub(super) items: Vec<ImportItem>,
    /// The number of rows that cannot be read.
    pub(super) unreadable: usize,
}

/// Reads an outage file that no process has open.
pub(super) async fn read_file(path: &Path) -> Result<FileContents> {
    let path = path.to_owned();
    unblock(move || {
        if read_kind(&path)?.as_deref() == Some(LOCAL.name) {
            let (problem, remedy) = KIND.mismatch;
            return Err(unusable(&path, problem).with_remedy(remedy));
        }
        // A quarantined or recovered file has no lock file.
        let _lock = Lock::exists(&path).then(|| Lock::acquire(&path)).transpose()?;
        let connection = file::open_to_read(&path)?;
        read_rows(&connection).map_err(file_error(&path))
    })
    .await?
}

fn read_rows(connection: &Connection) -> rusqlite::Result<FileContents> {
    let project = file::meta(connection, "project")?;
    // Replay may have sent these writes from the other file (I7).
    let dispatched = writer_state::dispatched(connection)?;
    let (mut items, mut unreadable) = (Vec::new(), 0);
    let mut add = |item: rusqlite::Result<ImportItem>| match item {
        Ok(item) => items.push(item),
        // One bad row of a recovered file must not stop the import of the others.
        Err(_) => unreadable += 1,
    };
    let mut queued =
        connection.prepare(&format!("{} where is_queued = 1 order by seq", offline::select()))?;
    for write in queued.query_map([dispatched], queued_write)? {
        add(write.map(ImportItem::Queued));
    }
    let mut letters = connection.prepare(&format!("{} order by id", dead_letters::select()))?;
    for letter in letters.query_map([], read_dead_letter)? {
        add(letter.map(ImportItem::DeadLetter));
    }
    Ok(FileContents { project, items, unreadable })
}
