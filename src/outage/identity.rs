//! The identity of the writer, and the mark above its versions (C6, C8, I7).
//!
//! The daemon part of the writer id belongs to one file on one boot of one machine. After a power cut, and for a copy of the
//! file, it is drawn anew. Such a file may lack its last writes, so its next writes must not pass for the next ones of the same run.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use rusqlite::Connection;

use super::Verdict;
use super::clock_checkpoint::MachineTime;
use super::file::OutageFile;
use super::state::{Settled, WriterState};
use crate::error::{ErrorKind, Result};
use crate::model::clock::Clock;
use crate::model::version::{Timestamp, Version};
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
    clock.continue_above(mark);
    let boot = MachineTime::now().map(|machine| machine.boot);
    let identity = identity(&opened.path);
    // Both the file and its lock file know the session. A restored copy of the file knows another one.
    let origin = |session: &str| format!("{boot:?} {identity:?} {session:?}");
    let saved = file::meta(&opened.connection, WRITER)?;
    let saved = saved.as_deref().and_then(|saved| saved.rsplit_once(' '));
    let last = saved.and_then(|(last, _)| opened.sessions().find(|session| last == origin(session)));
    // Without a boot id nothing tells a power cut from another end.
    let last = last.filter(|_| boot.is_some()).unwrap_or_default().to_owned();
    let daemon = saved.filter(|_| !last.is_empty()).and_then(|(_, raw)| raw.parse().ok());
    let writer = daemon.map(WriterId::from_raw).map_or_else(WriterId::random, WriterId::next_opening);
    let session = fastrand::u32(..).to_string();
    // Both, until the commit has ended: a kill leaves the file with either of them.
    opened.set_sessions(format!("{last} {session}"));
    match file::set_meta(&opened.connection, WRITER, &format!("{} {writer}", origin(&session))) {
        Ok(()) => opened.set_sessions(session),
        Err(error) => tracing::debug!(%error, "the outage file cannot keep the writer id of this start"),
    }
    Ok((writer, mark))
}

fn read_mark(connection: &Connection) -> rusqlite::Result<Version> {
    let mark = file::meta(connection, MARK)?.and_then(|mark| mark.parse().ok());
    Ok(Version::from_raw(mark.unwrap_or(0)))
}

/// Raises the mark in the file to this version. Two writes may come in the other order.
fn raise(connection: &Connection, mark: Version) -> rusqlite::Result<()> {
    if read_mark(connection)? < mark {
        file::set_meta(connection, MARK, &mark.to_string())?;
    }
    Ok(())
}

/// Raises the mark, and the versions of this process, above the queued writes that the store has taken. They may be newer than
/// all versions that live writes have sent.
pub(super) fn rise_above_stored(
    connection: &Connection,
    clock: &Clock,
    settled: &[Settled],
) -> rusqlite::Result<()> {
    let is_stored = |settled: &&Settled| matches!(settled.verdict, Verdict::Stored | Verdict::Appended(_));
    let stored = settled.iter().filter(is_stored).map(|settled| settled.version).max();
    let Some(newest) = stored else { return Ok(()) };
    clock.continue_above(newest);
    raise(connection, newest)
}

impl OutageFile {
    /// Returns the writer of this process in the first era of the clock.
    pub(crate) fn writer(&self) -> WriterId {
        self.writer
    }

    /// Raises the mark in the file above a version that is about to be sent. Later openings issue higher versions only.
    ///
    /// A failure of the disk does not delay the write.
    ///
    /// # Errors
    /// [`Closed`](ErrorKind::Closed) if the file is closed. The next opening would not know the version, so the write is not sent.
    pub(crate) async fn raise_mark(&self, version: Version) -> Result<()> {
        if version.raw() <= self.mark.load(Relaxed) {
            return Ok(());
        }
        // The clock may have jumped since the issue. A mark by a wrong clock would hold up later versions.
        let ahead = self.clock.known_now().map_or(Timestamp(0), |now| now.plus(MARK_LEAD));
        let mark = Version::min_at(ahead.max(version.at().plus(MARK_STEP)));
        let work = move |connection: &Connection, _: &mut WriterState| raise(connection, mark);
        match self.write(CommitLevel::ProcessCrash, work).await {
            Ok(()) => _ = self.mark.fetch_max(mark.raw(), Relaxed),
            Err(closed) if closed.kind() == ErrorKind::Closed => return Err(closed),
            Err(error) => {
                tracing::debug!(%error, "the outage file cannot record the mark; the write is sent without it")
            }
        }
        Ok(())
    }

    /// Returns the writer in the present era.
    pub(super) fn present_writer(&self) -> WriterId {
        self.writer.in_era(self.clock.era())
    }

    /// Lowers the mark to the last version, when no more versions are issued. The next opening then needs no lead. In a later
    /// era the mark still tells the next opening that the versions have fallen.
    pub(super) async fn lower_mark(&self) {
        // From now on, each write raises the mark itself.
        self.mark.store(0, Relaxed);
        let clock = Arc::clone(&self.clock);
        // The last version is read in the transaction: it is above each version that has raised the mark before.
        let work = move |connection: &Connection, _: &mut WriterState| match clock.end_of_first_era() {
            Some(last) if last < read_mark(connection)? => {
                file::set_meta(connection, MARK, &last.to_string())
            }
            _ => Ok(()),
        };
        self.write(CommitLevel::ProcessCrash, work).await.ok();
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::outage::file::KIND;

    fn daemon_of_an_opening(path: &Path, before: impl Fn(&mut Connection)) -> i64 {
        let mut opened = LockedDatabase::new(path, KIND).unwrap();
        before(&mut opened.connection);
        open(&mut opened, &Clock::new()).unwrap().0.daemon()
    }

    #[test]
    fn opening_killed_around_its_commit_keeps_the_daemon_part() {
        let dir = tempfile::tempdir().unwrap();
        let (path, lock) = (dir.path().join("q.db"), dir.path().join("q.db.lock"));
        let daemon = daemon_of_an_opening(&path, |_| {});
        let older = fs::read(&path).unwrap();
        assert_eq!(daemon_of_an_opening(&path, |_| {}), daemon);
        let uncommitted = fs::read(&path).unwrap();
        let at_commit = Arc::new(Mutex::new(Vec::new()));
        let read_lock = |connection: &mut Connection| {
            let (at_commit, lock) = (Arc::clone(&at_commit), lock.clone());
            let read = move || {
                *at_commit.lock().unwrap() = fs::read(&lock).unwrap();
                false
            };
            connection.commit_hook(Some(read)).unwrap();
        };
        assert_eq!(daemon_of_an_opening(&path, read_lock), daemon);
        let committed = fs::read(&path).unwrap();
        for (contents, is_same) in [(&uncommitted, true), (&committed, true), (&older, false)] {
            fs::write(&path, contents).unwrap();
            fs::write(&lock, &*at_commit.lock().unwrap()).unwrap();
            assert_eq!(daemon_of_an_opening(&path, |_| {}) == daemon, is_same);
        }
    }
}
