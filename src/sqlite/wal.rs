//! Checkpoints of the write-ahead log, and the recovery after a failed fsync.
//!
//! SQLite checkpoints inside a commit by default, so some commits would take long. Here an OS thread of its own copies the
//! log into the file while the writer commits.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use rusqlite::{Connection, ffi};

use crate::error::{Error, Result};
use crate::sqlite::error::file_error;
use crate::sqlite::file;
use crate::sqlite::health::FileHealth;
use crate::sqlite::worker::Worker;

/// The growth of the log after which the checkpoint thread copies it into the file.
const CHECKPOINT_PAGES: i32 = 1_000;
/// Limits the log. Above this size the writer itself copies the log, between two commits. SQLite can restart the log only
/// in a pause of the commits.
const MAX_WAL_PAGES: i32 = 16_000;
/// The interval between two checks of the file's names. The checks go on without traffic.
const NAME_CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// Limits the wait for readers while the log is truncated. Commits wait as long.
const TRUNCATE_TIMEOUT: Duration = Duration::from_millis(250);

/// Watches the size of the log, and decides when to copy it. The writer owns it.
pub(super) struct WalCheckpointer {
    /// The size of the log after the last commit. SQLite's hook sets it.
    pages: Arc<AtomicI32>,
    /// Whether a commit appended to the log. A transaction without changes proves nothing about the disk.
    has_grown: Arc<AtomicBool>,
    /// The size of the log at the last checkpoint.
    checkpointed: Cell<i32>,
    /// A fsync failed (I15). Its pages may never reach the disk, even if the next fsync succeeds.
    fsync_failed: Arc<AtomicBool>,
    /// Requests a checkpoint from the checkpoint thread. Holds one request, because a second one adds nothing.
    worker: Worker<SyncSender<()>>,
}

impl WalCheckpointer {
    /// Installs the hook on the writer's connection, and starts the checkpoint thread.
    pub(super) fn watch(connection: &mut Connection, health: &Arc<FileHealth>) -> Result<Self> {
        let (pages, fsync_failed) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicBool::new(false)));
        let has_grown = Arc::new(AtomicBool::new(false));
        let (counted, grown) = (Arc::clone(&pages), Arc::clone(&has_grown));
        // The hook replaces SQLite's automatic checkpoint.
        let count = move |_: &mut rusqlite::hooks::Wal, pages: i32| {
            counted.store(pages, Relaxed);
            grown.store(true, Relaxed);
            Ok(())
        };
        if let Err(error) = connection.wal_hook(Some(count)) {
            tracing::error!(%error, "cannot watch the write-ahead log; the log may grow without limit");
        }
        let (requests, requested) = sync_channel(1);
        let (health, failed) = (Arc::clone(health), Arc::clone(&fsync_failed));
        // Opened now, while the names still lead to the file.
        let own = file::open_to_checkpoint(&health.path).map_err(file_error(&health.path))?;
        let run = move || run_checkpoints(&requested, &own, &health, &failed);
        let worker = Worker::start("threadkeep-copy", requests, [run])?;
        Ok(Self { pages, has_grown, checkpointed: Cell::new(0), fsync_failed, worker })
    }

    pub(super) fn note_result(&self, error: Option<&Error>, health: &FileHealth) {
        if error.is_some() || self.has_grown.swap(false, Relaxed) {
            health.note_write(error);
        }
    }

    pub(super) fn observe_error(&self, error: &rusqlite::Error) {
        note_fsync(error, &self.fsync_failed);
    }

    /// Writes the whole log again after a failed fsync, before the next commit builds on it (I15).
    pub(super) fn recover_after_fsync_failure(&self, connection: &Connection) -> rusqlite::Result<()> {
        if self.fsync_failed.load(SeqCst) {
            checkpoint_truncate(connection)?;
            // Only after a success. Else the next group tries again (I15).
            self.fsync_failed.store(false, SeqCst);
        }
        Ok(())
    }

    /// Copies the whole log into the file, and truncates the log to zero bytes.
    pub(super) fn truncate(&self, connection: &Connection) {
        let wait = |limit| connection.busy_timeout(limit);
        let truncated = wait(TRUNCATE_TIMEOUT)
            .and_then(|()| checkpoint_truncate(connection))
            .inspect_err(|error| self.observe_error(error));
        // `and` evaluates its argument in both cases. So the writer gets its own limit back after a failure too.
        match truncated.and(wait(file::LOCK_TIMEOUT)) {
            Ok(()) => self.pages.store(0, Relaxed),
            Err(error) => {
                tracing::debug!(%error, "cannot truncate the write-ahead log; the next vacuum tries again");
            }
        }
    }

    /// Copies the log, or requests that, if the log has grown enough.
    pub(super) fn checkpoint_if_due(&self, connection: &Connection) {
        let (pages, checkpointed) = (self.pages.load(Relaxed), self.checkpointed.get());
        if pages > MAX_WAL_PAGES {
            checkpoint_passive(connection).unwrap_or_else(|error| self.observe_error(&error));
        } else if pages >= checkpointed + CHECKPOINT_PAGES {
            if let Ok(requests) = self.worker.sender() {
                requests.try_send(()).ok();
            }
        } else if pages >= checkpointed {
            return;
        }
        // A shrunken log means that SQLite has restarted it.
        self.checkpointed.set(if pages < checkpointed { 0 } else { pages });
    }
}

/// Copies the log on request, and checks the file's names at a fixed interval. Ends with the writer.
fn run_checkpoints(
    requested: &Receiver<()>,
    own: &Connection,
    health: &FileHealth,
    fsync_failed: &AtomicBool,
) {
    let mut is_named = true;
    loop {
        match requested.recv_timeout(NAME_CHECK_INTERVAL) {
            Ok(()) => checkpoint_passive(own).unwrap_or_else(|error| {
                note_fsync(&error, fsync_failed);
                tracing::warn!(%error, "checkpoint of the local file failed; the write-ahead log grows");
            }),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let was_named = std::mem::replace(&mut is_named, health.check_names().is_ok());
        if was_named && !is_named {
            save_log(own, health);
        }
    }
}

/// Copies the log into the file if only the log has lost its name. The next start finds the file, but not the log.
fn save_log(connection: &Connection, health: &FileHealth) {
    if health.has_main_names() {
        checkpoint_passive(connection).unwrap_or_else(|error| {
            tracing::error!(%error, "cannot save the deleted write-ahead log; its commits may be lost with the process");
        });
    }
}

/// Copies as much of the log as readers permit, without a wait.
fn checkpoint_passive(connection: &Connection) -> rusqlite::Result<()> {
    connection.query_row("pragma wal_checkpoint(passive)", [], |_| Ok(()))
}

/// Copies the whole log into the file, syncs the file, and truncates the log.
fn checkpoint_truncate(connection: &Connection) -> rusqlite::Result<()> {
    match connection.query_row("pragma wal_checkpoint(truncate)", [], |row| row.get(0))? {
        0 => Ok(()),
        _ => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_BUSY), None)),
    }
}

/// Sets `fsync_failed` if the error reports a failed fsync (I15).
///
/// Linux reports a failed fsync once. After that, the kernel treats the lost pages as written.
fn note_fsync(error: &rusqlite::Error, fsync_failed: &AtomicBool) {
    let code = error.sqlite_error().map(|error| error.extended_code);
    let is_fsync = matches!(code, Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC));
    fsync_failed.fetch_or(is_fsync, SeqCst);
}
