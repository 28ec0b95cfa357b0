//! The open outage file.

use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::{RwLock, oneshot, watch};

use super::replica::ReplicaValidity;
use super::state::{QueueChange, WriterState};
use super::{
    FileLimits, FileUsage, QueueFigures, QueueObserver, QueuedKey, clock_checkpoint, clock_sync, identity,
};
use crate::error::{Error, ErrorKind, Result};
use crate::model::clock::{Clock, Correction};
use crate::model::key::Key;
use crate::model::version::Version;
use crate::model::writer::WriterId;
use crate::resilience::tasks::unblock;
use crate::sqlite::database::{Database, LockedDatabase};
use crate::sqlite::error;
use crate::sqlite::file::{self, FileKind};
use crate::sqlite::writer::{CommitLevel, closed};

pub(crate) const KIND: FileKind = FileKind {
    name: "queue",
    schema: include_str!("schema.sql"),
    mismatch: (
        "holds the conversations of the backend `local`, not a queue",
        "set CONVERSATION_QUEUE_PATH to another path, and bring them over with `threadkeep queue migrate`",
    ),
    conversion: concat!(
        "alter table records rename to former; alter table dead_letters rename to former_letters;
         drop index queue; drop index replica;",
        include_str!("schema.sql"),
        include_str!("conversion.sql"),
    ),
    addition: "alter table records add column append text; alter table dead_letters add column append text;",
    // Its binary can export the queue, and this one imports the lines.
    first_building: None,
};

/// The open outage file.
pub(crate) struct OutageFile {
    pub(super) database: Arc<Database>,
    /// Locked by the writer for each transaction, and by readers of the figures.
    pub(super) state: Arc<Mutex<WriterState>>,
    pub(super) clock: Arc<Clock>,
    pub(super) limits: FileLimits,
    pub(super) validity: Arc<ReplicaValidity>,
    /// The bytes of copies that the writer got and may not have committed yet.
    pub(super) copies_in_flight: Arc<AtomicUsize>,
    /// The bytes of writes on their way into the queue.
    pub(super) writes_in_flight: Arc<AtomicUsize>,
    /// The identity of this opening of the file.
    pub(super) writer: WriterId,
    /// The level of verdicts on queued writes. After a power cut, rows of the last daemon part must not come back.
    pub(super) settle_level: CommitLevel,
    /// The version up to which the mark in the file allows versions (C8).
    pub(super) mark: AtomicI64,
    /// Clock sync holds it alone. Each write shares it from the issue of its version to its row in the queue.
    pub(super) sync_gate: RwLock<()>,
    /// The number of clock syncs that gave queued writes other versions.
    pub(super) syncs: AtomicU64,
    pub(super) hooks: Arc<Hooks>,
}

/// The receivers of the queue's changes.
#[derive(Debug, Default)]
pub(super) struct Hooks {
    pub(super) observer: OnceLock<Arc<dyn QueueObserver>>,
    pub(super) figures: watch::Sender<QueueFigures>,
    /// Conversations whose first queued write may be sent now. Replay has perhaps passed it before.
    pub(super) unblocked: Mutex<Vec<Key>>,
}

impl Hooks {
    /// Publishes the changes of a committed job. `on_commit` is the job's own callback.
    fn publish(&self, change: QueueChange, on_commit: impl FnOnce()) {
        let QueueChange { settled, corrected, moved, figures } = change;
        for settled in &settled {
            if let Some(observer) = self.observer.get() {
                observer.settled(&settled.key, settled.version, &settled.verdict, settled.left);
            }
        }
        on_commit();
        if let Some(observer) = self.observer.get().filter(|_| !corrected.is_empty()) {
            observer.corrected(&corrected);
        }
        let left = settled.into_iter().filter(|settled| settled.left.is_some());
        let left = left.map(|settled| settled.key);
        let unblocked: Vec<Key> = left.chain(corrected.into_iter().map(|corrected| corrected.key)).collect();
        // A row of the same size may have replaced another one. A reader waits for that, although the figures are the same.
        let has_changed = moved > 0 || !unblocked.is_empty();
        self.unblocked.lock().extend(unblocked);
        self.figures.send_if_modified(|shown| {
            let figures = QueueFigures { parked: shown.parked, ..figures };
            std::mem::replace(shown, figures) != figures || has_changed
        });
    }
}

impl fmt::Debug for OutageFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OutageFile").field(&self.path()).finish()
    }
}

impl OutageFile {
    /// Opens the file of a project, and creates it if it does not exist. Returns the conversations with queued writes.
    ///
    /// A corrupt file is quarantined, and a new file takes its place.
    ///
    /// # Errors
    /// [`ErrorKind::LocalStorage`] if the file cannot be used, or holds the writes of another project. [`ErrorKind::Locked`] if
    /// another process has the file open.
    pub(crate) async fn open(
        path: &Path,
        project: &str,
        limits: FileLimits,
        clock: Arc<Clock>,
    ) -> Result<(Self, Vec<QueuedKey>)> {
        let (path, project) = (path.to_owned(), project.to_owned());
        let file = unblock(move || Self::open_blocking(&path, &project, limits, clock)).await??;
        if file.database.had_invalid_copies() {
            file.validity.invalidate();
            let path = file.path().display();
            tracing::warn!(%path, "the last process could not write all copies to the replica; all copies are dropped");
            // On a full disk the replica hands out no copy, but the store may work. So opening the file succeeds.
            if let Err(error) = file.drop_copies(None).await {
                tracing::error!(%path, %error, "the copies of the replica cannot be dropped; the replica hands out none");
            }
        }
        // After the drop, which makes queued writes unverified.
        let queued = file.queued_keys().await?;
        Ok((file, queued))
    }

    fn open_blocking(path: &Path, project: &str, limits: FileLimits, clock: Arc<Clock>) -> Result<Self> {
        let (opened, renamed_to) = LockedDatabase::or_quarantine(path, KIND)?;
        if let Some(renamed_to) = renamed_to {
            tracing::error!(
                file = %path.display(), renamed_to = %renamed_to.display(),
                "the outage file is corrupt and was renamed; a new file takes its place, and replay does not send the old \
                 file's writes; stop the daemon, copy the renamed file, and recover the copy with `sqlite3 FILE .recover` \
                 (OPERATIONS.md, A corrupt outage file)"
            );
        }
        // Before the start, which writes to the file: a foreign file stays unchanged.
        check_project(&opened, project)?;
        Self::start(opened, limits, clock)
    }

    pub(super) fn start(mut opened: LockedDatabase, limits: FileLimits, clock: Arc<Clock>) -> Result<Self> {
        clock.sync_by_file();
        let prepared = prepare(&mut opened, &clock);
        let (writer, mark, mut state) = prepared.map_err(error::file_error(&opened.path))?;
        let settle_level =
            settle_level(&opened.connection, writer).map_err(error::file_error(&opened.path))?;
        let hooks = Arc::<Hooks>::default();
        let change = state.take_change(&opened.connection).map_err(error::file_error(&opened.path))?;
        hooks.publish(change, || {});
        let state = Arc::new(Mutex::new(state));
        // A rollback also undoes the jobs of the group that succeeded, which the figures include.
        let on_rollback = {
            let state = Arc::clone(&state);
            move || state.lock().is_known = false
        };
        let database = Arc::new(Database::start(opened, on_rollback)?);
        let validity = Arc::new(ReplicaValidity::new(database.lock.clone()));
        Ok(Self {
            database,
            state,
            clock,
            limits,
            validity,
            copies_in_flight: Arc::default(),
            writes_in_flight: Arc::default(),
            writer,
            settle_level,
            mark: AtomicI64::new(mark.raw()),
            sync_gate: RwLock::new(()),
            syncs: AtomicU64::new(0),
            hooks,
        })
    }

    /// Names the receiver of the queue's changes. Called once, before any traffic.
    pub(crate) fn set_observer(&self, observer: Arc<dyn QueueObserver>) {
        self.hooks.observer.set(observer).ok();
    }

    /// Counts the queued writes of a file that is not open. Returns `None` if the file does not exist or cannot be read.
    pub(crate) fn count_queued(path: &Path) -> Option<u64> {
        let connection = path.exists().then(|| file::open_to_read(path).ok())??;
        let count = "select count(*) from records where is_queued = 1";
        connection.query_row(count, [], |row| row.get::<_, i64>(0)).ok().map(i64::unsigned_abs)
    }

    pub(crate) fn path(&self) -> &Path {
        self.database.path()
    }

    pub(crate) fn usage(&self) -> FileUsage {
        self.state.lock().usage
    }

    pub(crate) fn limits(&self) -> FileLimits {
        self.limits
    }

    /// Completes the submitted writes, and lets other processes open the file.
    pub(crate) async fn close(&self) -> Result<()> {
        self.lower_mark().await;
        self.database.close().await
    }

    /// Runs `work` in a transaction of the writer, and waits for the commit.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        level: CommitLevel,
        work: impl FnMut(&Connection, &mut WriterState) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T> {
        let written = self.submit(level, work, |_| {}).await?.await.map_err(|_| closed())?;
        if written.is_err() {
            self.reload_state().await.ok();
        }
        written
    }

    /// Submits `work` to the writer. Returns when the writer has the work, with a receiver of the result.
    ///
    /// The writer calls `on_commit` before any caller learns of this transaction or of a later one.
    pub(super) async fn submit<T: Send + 'static>(
        &self,
        level: CommitLevel,
        mut work: impl FnMut(&Connection, &mut WriterState) -> rusqlite::Result<T> + Send + 'static,
        on_commit: impl FnOnce(&Result<T>) + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        let (state, clock, hooks) =
            (Arc::clone(&self.state), Arc::clone(&self.clock), Arc::clone(&self.hooks));
        let work = move |connection: &Connection| {
            let mut state = state.lock();
            if !state.is_known {
                *state = WriterState::read(connection)?;
            }
            // False until the job has succeeded.
            state.is_known = false;
            // Part of this transaction, so that a checkpoint costs no commit of its own.
            state.checkpoint.save(connection, &clock)?;
            let result = work(connection, &mut state)?;
            let change = state.take_change(connection)?;
            identity::rise_above_stored(connection, &clock, &change.settled)?;
            state.is_known = true;
            Ok((result, change))
        };
        let on_commit = move |committed: Result<(T, QueueChange)>| {
            let (result, change) = committed
                .map_or_else(|error| (Err(error), None), |(value, change)| (Ok(value), Some(change)));
            match change {
                Some(change) => hooks.publish(change, || on_commit(&result)),
                None => on_commit(&result),
            }
            result
        };
        self.database.writer.submit(level, work, on_commit).await
    }

    /// Returns free pages to the file system, and empties the log, which may still have deleted text.
    pub(crate) async fn vacuum(&self) -> Result<()> {
        self.database.vacuum().await
    }

    pub(crate) fn fault(&self) -> Option<Error> {
        self.database.fault()
    }

    /// Checks by a write and a read that the file works. Without traffic nothing else would notice.
    pub(crate) async fn check_working(&self) -> Result<()> {
        self.database.check_working().await?;
        // Without traffic no other job would read the figures again after a failed commit.
        self.reload_state().await
    }

    /// Reads the figures from the file again after a failed commit, which they had counted.
    pub(super) async fn reload_state(&self) -> Result<()> {
        self.submit(CommitLevel::ProcessCrash, |_, _| Ok(()), |_| {}).await?.await.map_err(|_| closed())?
    }
}

fn prepare(
    opened: &mut LockedDatabase,
    clock: &Arc<Clock>,
) -> rusqlite::Result<(WriterId, Version, WriterState)> {
    clock_checkpoint::resume(&opened.connection, clock)?;
    // After the resume, because the shift uses the time of the resumed clock.
    clock_sync::shift_provisional(&opened.connection, clock)?;
    let mut state = WriterState::read(&opened.connection)?;
    // After the reads: a corrupt file stays as it is.
    let (writer, mark) = identity::open(opened, clock)?;
    if clock.is_synced() {
        // The rows have the time of this clock now, and no answer will correct them.
        let now = clock.now();
        clock_sync::correct_all(&opened.connection, &mut state, Correction(0), clock.last_final(), now)?;
    }
    Ok((writer, mark, state))
}

fn settle_level(connection: &Connection, writer: WriterId) -> rusqlite::Result<CommitLevel> {
    let sql = "select exists (select 1 from records where is_queued = 1 and writer >> 24 <> ?1)";
    let has_others = connection.query_row(sql, [writer.daemon()], |row| row.get(0))?;
    Ok(if has_others { CommitLevel::PowerCut } else { CommitLevel::ProcessCrash })
}

/// Rejects the file of another project, and records the project in a new file.
pub(super) fn check_project(opened: &LockedDatabase, project: &str) -> Result<()> {
    let fail = error::file_error(&opened.path);
    let Some(other) = file::meta(&opened.connection, "project").map_err(&fail)? else {
        return file::set_meta(&opened.connection, "project", project).map_err(fail);
    };
    if other == project {
        return Ok(());
    }
    let error = error::unusable(&opened.path, &format!("holds writes for {other}, not for {project}"));
    let remedy =
        "set CONVERSATION_QUEUE_PATH to another path, and bring them over with `threadkeep queue migrate`";
    Err(error.with_remedy(remedy))
}

pub(super) fn queue_full(path: &Path, limits: FileLimits, usage: FileUsage) -> Error {
    let FileUsage { queue, dead_letters, .. } = usage;
    let message = format!(
        "the store is unavailable, and the queue {} is full: {} writes with {} bytes and {} dead letters with {} bytes, of {} \
         bytes; this write was not queued",
        path.display(),
        queue.records,
        queue.bytes,
        dead_letters.records,
        dead_letters.bytes,
        limits.queue,
    );
    let remedy = match dead_letters.records {
        0 => "raise CONVERSATION_QUEUE_MAX_BYTES",
        _ => "export and delete the dead letters, or raise CONVERSATION_QUEUE_MAX_BYTES",
    };
    Error::new(ErrorKind::QueueFull, message).with_remedy(remedy)
}
