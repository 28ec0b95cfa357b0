//! The import of writes from other files.

mod validate;

use std::path::Path;
use std::sync::Arc;

use rusqlite::{Connection, params};

use super::dead_letters::{self, read_dead_letter};
use super::file::{KIND, OutageFile};
use super::offline::read_kind;
use super::rows::{
    self, copy_version, heads, insert_queued, queued_write, replace_queued, row_bytes, to_i64, value_text,
};
use super::rules::{self, Placement, QueuedHead, is_too_old};
use super::state::WriterState;
use super::{DeadLetter, ImportItem, ImportReport, QueuedWrite};
use crate::error::Result;
use crate::model::clock::Clock;
use crate::model::record::Record;
use crate::model::version::Version;
use crate::resilience::tasks::unblock;
use crate::sqlite::error::{file_error, unusable};
use crate::sqlite::file;
use crate::sqlite::lock::Lock;
use crate::sqlite::rows::{COLUMNS, append_text};
use crate::sqlite::writer::CommitLevel;
use crate::store::Condition;
use crate::store::local::KIND as LOCAL;
pub(super) use validate::validate;

impl OutageFile {
    /// Imports items of another file. They are synced to disk when this returns. Newer writes of this file stay, so the same
    /// items can be imported again.
    pub(super) async fn import(&self, items: Vec<ImportItem>) -> Result<ImportReport> {
        let clock = Arc::clone(&self.clock);
        let work = move |connection: &Connection, state: &mut WriterState| {
            let mut sum = ImportReport::default();
            for item in &items {
                sum += import_item(connection, state, item, &clock)?;
            }
            state.checkpoint.save_provisional(connection, &clock)?;
            Ok(sum)
        };
        self.write(CommitLevel::Acknowledged, work).await
    }

    /// Queues a dead letter again, as a write of this moment with the same time to live. Returns false if the dead letter is gone,
    /// or if a newer write of the conversation is queued, which a put would replace.
    pub(super) async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        let (letter, clock) = (letter.clone(), Arc::clone(&self.clock));
        let work = move |connection: &Connection, state: &mut WriterState| {
            let key = &letter.record.key;
            // SQLite may have given the number of a deleted letter to a later one, so key and version are compared.
            let delete = "delete from dead_letters where id = ?1 and key = ?2 and version = ?3";
            let values = params![letter.id, key.as_str(), letter.record.version.raw()];
            // The requeued write would get the newest version, and so replace the later write. An append replaces nothing.
            let may_follow = letter.append.is_some() || heads(connection, key)?.is_empty();
            if !may_follow || connection.execute(delete, values)? == 0 {
                return Ok(false);
            }
            state.usage.dead_letters.sub(row_bytes(&letter.record));
            let issued = clock.issue_after(copy_version(connection, key)?);
            let (version, now) = (issued.version, issued.shown);
            let ttl = letter.record.expires_at.since(letter.record.version.at());
            let record = Record { version, expires_at: now.plus(ttl), ..letter.record.clone() };
            // Its writer is new, too. So the store does not take it for the write that died.
            let mut queued = QueuedWrite { is_provisional: true, ..QueuedWrite::new(record, now) };
            if let Some(append) = letter.append.clone() {
                queued.write = queued.write.with_append(append);
            }
            insert_queued(connection, state, &queued)?;
            state.checkpoint.save_provisional(connection, &clock)?;
            Ok(true)
        };
        self.write(CommitLevel::Acknowledged, work).await
    }
}

fn import_item(
    connection: &Connection,
    state: &mut WriterState,
    item: &ImportItem,
    clock: &Clock,
) -> rusqlite::Result<ImportReport> {
    match item {
        // Clock sync lifts a provisional version above newer ones. Another file's versions are compared as they are.
        ImportItem::Queued(queued) => {
            let queued = QueuedWrite { is_provisional: false, ..queued.clone() };
            import_write(connection, state, &queued, queued.version())
        }
        ImportItem::LocalRecord(record) => {
            import_write(connection, state, &from_local_record(record, clock), record.version)
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
    let mut queued = QueuedWrite::new(record.clone(), now);
    if is_too_old(record.version, now) {
        let renewed = Record { version: clock.issue().version, ..record.clone() };
        queued.is_provisional = true;
        queued.write.record = renewed.into();
        queued.write.condition = Condition::IfVersion(record.version);
    }
    queued
}

/// Imports a write that was made at the version `made_at`. Its own version may be newer.
fn import_write(
    connection: &Connection,
    state: &mut WriterState,
    queued: &QueuedWrite,
    made_at: Version,
) -> rusqlite::Result<ImportReport> {
    let (rows, stored) = (heads(connection, queued.key())?, copy_version(connection, queued.key())?);
    // An earlier import gave the conversation a new version, and kept the old one as its base.
    let was_renewed = Condition::IfVersion(made_at);
    let is_same = |version: Version, condition: Condition| {
        version == made_at || queued.version() != made_at && condition == was_renewed
    };
    if stored == made_at || rows.iter().any(|row| is_same(row.write.version, row.write.condition)) {
        return Ok(ImportReport { duplicates: 1, ..ImportReport::default() });
    }
    let is_stale = queued.version() != made_at && stored > made_at;
    // The write is older than the import, so a provisional version does not make it the newest.
    let head = QueuedHead { is_provisional: false, ..queued.head() };
    match rules::place(&rows, &head, stored) {
        Placement::Insert { replaced } if !is_stale => {
            replace_queued(connection, state, &replaced, queued)?;
            Ok(ImportReport { queued: 1, ..ImportReport::default() })
        }
        _ => Ok(ImportReport { stale: 1, ..ImportReport::default() }),
    }
}

/// Adds a dead letter. Returns false if the file has a dead letter of the same write.
fn insert_dead_letter(
    connection: &Connection,
    state: &mut WriterState,
    letter: &DeadLetter,
) -> rusqlite::Result<bool> {
    let record = &letter.record;
    let sql = format!(
        "insert into dead_letters ({COLUMNS}, bytes, queued_at, died_at, reason, newer, if_version, append)
         select ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13
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
        rows::if_version(letter.condition),
        append_text(letter.append.as_ref())?,
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
        if is_former(&connection).map_err(file_error(&path))? {
            let remedy = "copy it to the path of an outage file, open that with `threadkeep queue status`, which converts it, and import that";
            return Err(unusable(&path, "has the format of an earlier threadkeep").with_remedy(remedy));
        }
        add_missing_columns(&connection).map_err(file_error(&path))?;
        read_rows(&connection).map_err(file_error(&path))
    })
    .await?
}

/// Whether the file has the tables of format 1. A recovered file has lost the number of its format.
fn is_former(connection: &Connection) -> rusqlite::Result<bool> {
    let sql = "select exists (select 1 from pragma_table_info('records') where name = 'sent_versions')";
    connection.query_row(sql, [], |row| row.get(0))
}

/// Lets a file of format 2, which has no appends, look like one of the present format. The file itself stays as it is.
fn add_missing_columns(connection: &Connection) -> rusqlite::Result<()> {
    let sql = "select exists (select 1 from pragma_table_info('records') where name = 'append')";
    if connection.query_row(sql, [], |row| row.get(0))? {
        return Ok(());
    }
    connection.execute_batch(
        "create temp view records as select *, null as append from main.records;
         create temp view dead_letters as select *, null as append from main.dead_letters;",
    )
}

fn read_rows(connection: &Connection) -> rusqlite::Result<FileContents> {
    let project = file::meta(connection, "project")?;
    let (mut items, mut unreadable) = (Vec::new(), 0);
    let mut add = |item: rusqlite::Result<ImportItem>| match item {
        Ok(item) => items.push(item),
        // One bad row of a recovered file must not stop the import of the others.
        Err(_) => unreadable += 1,
    };
    let mut queued = connection.prepare(&format!("{} where is_queued = 1 order by seq", rows::select()))?;
    for write in queued.query_map([], queued_write)? {
        add(write.map(ImportItem::Queued));
    }
    let mut letters = connection.prepare(&format!("{} order by id", dead_letters::select()))?;
    for letter in letters.query_map([], read_dead_letter)? {
        add(letter.map(ImportItem::DeadLetter));
    }
    Ok(FileContents { project, items, unreadable })
}
