//! The identity of the writer, and the mark above its versions (C6, C8, I7).
//!
//! The daemon part of the writer id belongs to one file on one boot of one machine. After a power cut, and for a copy of the
//! file, it is drawn anew. Such a file may lack its last writes, so its next writes must not pass for the next ones of the same run.

use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rusqlite::Connection;

use super::clock_checkpoint::MachineTime;
use super::file::OutageFile;
use super::state::WriterState;
use crate::model::clock::Clock;
use crate::model::version::Version;
use crate::model::writer::WriterId;
use crate::sqlite::database::LockedDatabase;
use crate::sqlite::file;
use crate::sqlite::health::identity;
use crate::sqlite::writer::CommitLevel;

/// The lead of the mark over the time. An opening right after a crash issues versions that are this far ahead.
const MARK_LEAD: Duration = Duration::from_secs(1);
/// The least lead of the mark over a version. Larger steps would add up over quick restarts.
const MARK_STEP: Duration = Duration::from_millis(1);
const WRITER: &str = "writer";
const MARK: &str = "mark";

/// Returns the writer of a new opening of the file, and the mark. The clock issues versions above the mark.
pub(super) fn open(opened: &mut LockedDatabase, clock: &Clock) -> rusqlite::Result<(WriterId, Version)> {
    let mark = read_mark(&opened.connection)?;
    clock.observe(mark);
    let boot = MachineTime::now().map(|machine| machine.boot);
    let identity = identity(&opened.path);
    // Both the file and its lock file know the session. A restored copy of the file knows another one.
    let origin = |session: &str| format!("{boot:?} {identity:?} {session:?}");
    let saved = file::meta(&opened.connection, WRITER)?;
    let saved = saved.as_deref().and_then(|saved| saved.rsplit_once(' '));
    // Without a boot id nothing tells a power cut from another end.
    let is_same = boot.is_some() && saved.is_some_and(|(last, _)| last == origin(opened.session()));
    let daemon = saved.filter(|_| is_same).and_then(|(_, raw)| raw.parse().ok()).map(WriterId::from_raw);
    let writer = daemon.map_or_else(WriterId::random, WriterId::next_opening);
    let session = fastrand::u64(..).to_string();
    match file::set_meta(&opened.connection, WRITER, &format!("{} {writer}", origin(&session))) {
        Ok(()) => opened.set_session(session),
        // On a full disk, both keep the last session.
        Err(error) => tracing::debug!(%error, "the outage file cannot keep the writer id of this start"),
    }
    Ok((writer, mark))
}

fn read_mark(connection: &Connection) -> rusqlite::Result<Version> {
    let mark = file::meta(connection, MARK)?.and_then(|mark| mark.parse().ok());
    Ok(Version::from_raw(mark.unwrap_or(0)))
}

impl OutageFile {
    /// Returns the writer of all writes of this process.
    pub(crate) fn writer(&self) -> WriterId {
        self.writer
    }

    pub(super) fn mark(&self) -> Version {
        Version::from_raw(self.mark.load(Relaxed))
    }

    /// Raises the mark in the file above a version that is about to be sent. Later openings issue higher versions only.
    ///
    /// A failure of the disk does not delay the write.
    pub(crate) async fn raise_mark(&self, version: Version) {
        if version <= self.mark() {
            return;
        }
        let at = self.clock.now().plus(MARK_LEAD).max(version.at().plus(MARK_STEP));
        let mark = Version::min_at(at);
        let work = move |connection: &Connection, _: &mut WriterState| {
            // Two writes may come in the other order.
            if read_mark(connection)? < mark {
                file::set_meta(connection, MARK, &mark.to_string())?;
            }
            Ok(())
        };
        match self.write(CommitLevel::ProcessCrash, work).await {
            Ok(()) => _ = self.mark.fetch_max(mark.raw(), Relaxed),
            Err(error) => {
                tracing::debug!(%error, "the outage file cannot record the mark; the write is sent without it")
            }
        }
    }

    /// Lowers the mark to the last version, when no more versions are issued. The next opening then needs no lead.
    pub(super) async fn lower_mark(&self) {
        let last = self.clock.last_version();
        // Only the first close: a later one finds the file closed.
        if self.mark.fetch_min(last.raw(), Relaxed) > last.raw() {
            let work = move |connection: &Connection, _: &mut WriterState| {
                file::set_meta(connection, MARK, &last.to_string())
            };
            self.write(CommitLevel::ProcessCrash, work).await.ok();
        }
    }
}
