//! The one thread that writes, with group commit; the one that answers a group while the next is written; and the one that
//! copies the log into the file meanwhile.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SendError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rusqlite::{Connection, ffi};
use tokio::sync::{mpsc, oneshot};

use super::condition::Condition;
use super::file::{self, failure};
use crate::error::{Error, ErrorKind, Result};

/// How many jobs may wait for the thread; further callers wait for a place.
const WAITING: usize = 1_024;
/// How many jobs share one commit at most.
const GROUP: usize = 512;
/// Whenever the write-ahead log has grown by so many pages, it is copied into the file beside the commits …
const COPIED_PAGES: i32 = 1_000;
/// … and from here on between them: where they never pause, it could not be begun anew otherwise.
const MOST_PAGES: i32 = 16_000;
/// How often the names of the file are looked at, also without traffic.
const LOOK: Duration = Duration::from_millis(200);
/// How long emptying the log waits for readers, while commits wait for it.
const EMPTYING: Duration = Duration::from_millis(250);

/// What a written record must survive before it is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Survives {
    /// The end of the process: the operating system has it.
    Crash,
    /// A power cut: it is synced to disk.
    PowerCut,
    /// A power cut and a new start, because a caller is told that it is kept: refused if the file has lost its name.
    Restart,
}

/// Work inside a group's transaction, answered once it is known whether the group is committed.
trait Job: Send {
    fn survives(&self) -> Survives;
    /// Whether it succeeded. It may be run again, where what it did was undone.
    fn run(&mut self, connection: &Connection, path: &Path) -> bool;
    /// What it failed with when it ran last.
    fn error(&self) -> Option<&Error>;
    fn answer(self: Box<Self>, committed: Result<()>);
}

struct Work<F, T, A> {
    survives: Survives,
    work: F,
    done: Option<Result<T>>,
    announce: A,
    answer: oneshot::Sender<Result<T>>,
}

impl<F, T: Send, A> Job for Work<F, T, A>
where
    F: FnMut(&Connection) -> rusqlite::Result<T> + Send,
    A: FnOnce(&Result<T>) + Send,
{
    fn survives(&self) -> Survives {
        self.survives
    }

    fn run(&mut self, connection: &Connection, path: &Path) -> bool {
        self.done.insert((self.work)(connection).map_err(failure(path))).is_ok()
    }

    fn error(&self) -> Option<&Error> {
        self.done.as_ref().and_then(|done| done.as_ref().err())
    }

    fn answer(self: Box<Self>, committed: Result<()>) {
        let lost = || Error::new(ErrorKind::Local, "the local file was not written");
        let Self { done, announce, answer, .. } = *self;
        let result = match done {
            Some(Err(error)) => Err(error),
            Some(Ok(done)) => committed.map(|()| done),
            None => Err(committed.err().unwrap_or_else(lost)),
        };
        announce(&result);
        // The caller may have gone; the work is done all the same.
        answer.send(result).ok();
    }
}

/// A handle on the thread. Dropping it ends the thread after the jobs that are already waiting.
pub(super) struct Writer {
    /// Whether the log is to be emptied when the next group is answered.
    is_log_to_go: Arc<AtomicBool>,
    jobs: Mutex<Option<mpsc::Sender<Box<dyn Job>>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Writer {
    /// `undone` is called whenever a group's transaction failed, before its jobs hear of it.
    pub(super) fn start(
        connection: Connection,
        condition: Arc<Condition>,
        undone: impl Fn() + Send + 'static,
    ) -> Result<Self> {
        let (jobs, waiting) = mpsc::channel(WAITING);
        let is_log_to_go = Arc::new(AtomicBool::new(false));
        let is_to_go = Arc::clone(&is_log_to_go);
        let thread = std::thread::Builder::new()
            .name("threadkeep-local".into())
            .spawn(move || serve(connection, waiting, &condition, &is_to_go, &undone))
            .map_err(|e| Error::new(ErrorKind::Local, "cannot start the writing thread").with_source(e))?;
        Ok(Self { is_log_to_go, jobs: Mutex::new(Some(jobs)), thread: Mutex::new(Some(thread)) })
    }

    /// Has `work` run in a transaction shared with others; returns when the thread has it, and answers to whoever waits, once
    /// that is committed. `announce` is called before anybody hears of this or of any later work.
    pub(super) async fn hand_over<T: Send + 'static>(
        &self,
        survives: Survives,
        work: impl FnMut(&Connection) -> rusqlite::Result<T> + Send + 'static,
        announce: impl FnOnce(&Result<T>) + Send + 'static,
    ) -> Result<oneshot::Receiver<Result<T>>> {
        let (answer, answered) = oneshot::channel();
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or_else(closed)?;
        let job = Work { survives, work, done: None, announce, answer };
        jobs.send(Box::new(job)).await.map_err(|_| closed())?;
        Ok(answered)
    }

    /// Has the log emptied after the next group. If a reader is in its way, the log stays until this is called again.
    pub(super) fn empty_log(&self) {
        self.is_log_to_go.store(true, SeqCst);
    }

    /// Ends the thread after the jobs that are already waiting. Blocks.
    pub(super) fn close(&self) {
        drop(self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            thread.join().ok();
        }
    }
}

pub(super) fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the local file is closed")
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.close();
    }
}

fn serve(
    mut connection: Connection,
    mut waiting: mpsc::Receiver<Box<dyn Job>>,
    condition: &Arc<Condition>,
    is_log_to_go: &AtomicBool,
    undone: &dyn Fn(),
) {
    let log = Log::watch(&mut connection, condition);
    let answers = Answers::start();
    while let Some(first) = waiting.blocking_recv() {
        let more = std::iter::from_fn(|| waiting.try_recv().ok());
        let group: Vec<_> = std::iter::once(first).chain(more).take(GROUP).collect();
        for (group, committed) in serve_named(&connection, group, &log, condition, undone) {
            log.tell(&group, &committed, condition);
            answers.give(group, committed, !waiting.is_empty());
        }
        // After the answers, so that no commit waits for it.
        if is_log_to_go.swap(false, SeqCst) {
            log.empty(&connection);
        } else {
            log.copy(&connection);
        }
    }
}

/// If the log alone has lost its name, writes it into the file, where the next start finds it.
fn save(connection: &Connection, condition: &Condition) {
    if condition.is_found_by_name() {
        let copied = connection.query_row("pragma wal_checkpoint(passive)", [], |_| Ok(()));
        copied.unwrap_or_else(|error| tracing::error!(%error, "the deleted log could not be saved"));
    }
}

/// Whether a caller is told that what the job writes is kept.
fn is_kept(job: &dyn Job) -> bool {
    job.survives() == Survives::Restart
}

/// Commits the jobs; those of which a caller is told that they are kept only while the file has its name.
fn serve_named(
    connection: &Connection,
    group: Group,
    log: &Log,
    condition: &Condition,
    undone: &dyn Fn(),
) -> Vec<(Group, Result<()>)> {
    let serve = |group| serve_group(connection, group, log, condition.path(), undone);
    let looked = if group.iter().any(|job| is_kept(&**job)) { condition.check_name() } else { Ok(()) };
    let Err(nameless) = looked else { return serve(group) };
    let (refused, group): (Group, Group) = group.into_iter().partition(|job| is_kept(&**job));
    let served = if group.is_empty() { Vec::new() } else { serve(group) };
    std::iter::once((refused, Err(nameless))).chain(served).collect()
}

type Group = Vec<Box<dyn Job>>;

/// Commits the jobs together, and says what to answer them. Where one of them fails, that is undone, and each is tried alone:
/// savepoints between them would take a good part of the time in which nothing fails.
fn serve_group(
    connection: &Connection,
    mut group: Group,
    log: &Log,
    path: &Path,
    undone: &dyn Fn(),
) -> Vec<(Group, Result<()>)> {
    let committed =
        log.mend(connection).and_then(|()| commit(connection, &mut group, path)).map_err(|failed| {
            connection.execute_batch("rollback").ok();
            undone();
            let Failed::Transaction { error, reached_disk } = failed else { return None };
            log.heed(&error);
            let error = failure(path)(error);
            tracing::error!(%error, jobs = group.len(), "a local commit failed");
            Some(if reached_disk { error.with_outcome_unknown() } else { error })
        });
    match committed {
        Err(None) if group.len() > 1 => {
            group.into_iter().flat_map(|job| serve_group(connection, vec![job], log, path, undone)).collect()
        }
        // A job that failed alone has an error of its own.
        Ok(()) | Err(None) => vec![(group, Ok(()))],
        Err(Some(error)) => vec![(group, Err(error))],
    }
}

/// Answers groups in the order in which they were written.
struct Answers {
    groups: Option<SyncSender<(Group, Result<()>)>>,
    /// How many the other thread has.
    under_way: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Answers {
    fn start() -> Self {
        let (groups, given) = sync_channel::<(Group, Result<()>)>(1);
        let under_way = Arc::new(AtomicUsize::new(0));
        let left = Arc::clone(&under_way);
        let answers = move || {
            for (group, committed) in given {
                answer(group, &committed);
                left.fetch_sub(1, SeqCst);
            }
        };
        let thread = std::thread::Builder::new().name("threadkeep-answer".into()).spawn(answers);
        Self { groups: Some(groups), under_way, thread: thread.ok() }
    }

    /// On the other thread where more work waits for this one, and then after what it has already; else at once, because to
    /// wake another thread would take longer.
    fn give(&self, group: Group, committed: Result<()>, more_waits: bool) {
        let is_elsewhere = more_waits || self.under_way.load(SeqCst) > 0;
        let Some(groups) = self.groups.as_ref().filter(|_| is_elsewhere) else {
            return answer(group, &committed);
        };
        self.under_way.fetch_add(1, SeqCst);
        // Where there is no such thread.
        if let Err(SendError((group, committed))) = groups.send((group, committed)) {
            answer(group, &committed);
        }
    }
}

impl Drop for Answers {
    fn drop(&mut self) {
        drop(self.groups.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

fn answer(group: Group, committed: &Result<()>) {
    group.into_iter().for_each(|job| job.answer(committed.clone()));
}

/// Why a group's transaction is to be undone.
enum Failed {
    /// One of its jobs failed.
    Job,
    Transaction {
        error: rusqlite::Error,
        /// Whether it may be there all the same.
        reached_disk: bool,
    },
}

impl Failed {
    fn before_disk(error: rusqlite::Error) -> Self {
        Self::Transaction { error, reached_disk: false }
    }
}

/// The write-ahead log, as it grows.
struct Log {
    pages: Arc<AtomicI32>,
    /// Whether something was committed since this was asked last: a transaction that changes nothing proves nothing.
    has_grown: Arc<AtomicBool>,
    /// How many pages there were when it was last to be copied.
    seen: AtomicI32,
    /// Whether a sync failed: what it was about may never reach the disk, also where the next one succeeds.
    is_torn: Arc<AtomicBool>,
    /// Asks the other thread to copy.
    ask: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Log {
    fn watch(connection: &mut Connection, condition: &Arc<Condition>) -> Self {
        let (pages, is_torn) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicBool::new(false)));
        let has_grown = Arc::new(AtomicBool::new(false));
        let (counted, grown) = (Arc::clone(&pages), Arc::clone(&has_grown));
        let count = move |_: &mut rusqlite::hooks::Wal, pages: i32| {
            counted.store(pages, Relaxed);
            grown.store(true, Relaxed);
            Ok(())
        };
        if let Err(error) = connection.wal_hook(Some(count)) {
            tracing::error!(%error, "the write-ahead log cannot be watched");
        }
        let (ask, asked) = sync_channel(1);
        let (condition, torn) = (Arc::clone(condition), Arc::clone(&is_torn));
        let copies = move || copy_when_asked(&asked, &condition, &torn);
        let thread = std::thread::Builder::new().name("threadkeep-copy".into()).spawn(copies);
        let seen = AtomicI32::new(0);
        Self { pages, has_grown, seen, is_torn, ask: Some(ask), thread: thread.ok() }
    }

    /// Takes note of what a group says about the file, before anybody hears of it.
    fn tell(&self, group: &Group, committed: &Result<()>, condition: &Condition) {
        let error = committed.as_ref().err().or_else(|| group.iter().find_map(|job| job.error()));
        if error.is_some() || self.has_grown.swap(false, Relaxed) {
            condition.note_write(error);
        }
    }

    /// Takes note of an error.
    fn heed(&self, error: &rusqlite::Error) {
        self.is_torn.fetch_or(is_failed_sync(error), SeqCst);
    }

    /// After a sync that failed, writes all of the log into the file and syncs that, before anything builds on it.
    fn mend(&self, connection: &Connection) -> Result<(), Failed> {
        if self.is_torn.load(SeqCst) {
            begin_log_anew(connection).map_err(Failed::before_disk)?;
            self.is_torn.store(false, SeqCst);
        }
        Ok(())
    }

    /// Copies all of the log into the file, and cuts it to no bytes.
    fn empty(&self, connection: &Connection) {
        let waits = |span| connection.busy_timeout(span);
        let emptied =
            waits(EMPTYING).and_then(|()| begin_log_anew(connection)).inspect_err(|error| self.heed(error));
        match emptied.and(waits(file::PATIENCE)) {
            Ok(()) => self.pages.store(0, Relaxed),
            Err(error) => tracing::debug!(%error, "the write-ahead log could not be emptied"),
        }
    }

    /// Has the log copied where it is time.
    fn copy(&self, connection: &Connection) {
        let (pages, seen) = (self.pages.load(Relaxed), self.seen.load(Relaxed));
        if pages > MOST_PAGES {
            let copied = connection.query_row("pragma wal_checkpoint(passive)", [], |_| Ok(()));
            copied.unwrap_or_else(|error| self.heed(&error));
        } else if pages >= seen + COPIED_PAGES {
            self.ask.iter().for_each(|ask| _ = ask.try_send(()));
        } else if pages >= seen {
            return;
        }
        // Less than before: it was begun anew.
        self.seen.store(if pages < seen { 0 } else { pages }, Relaxed);
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        drop(self.ask.take());
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
    }
}

/// Copies the log when asked, and looks now and then whether the file has its name.
fn copy_when_asked(asked: &Receiver<()>, condition: &Condition, is_torn: &AtomicBool) {
    // Opened by names that are right.
    let (mut own, mut is_named) = (file::open_to_copy(condition.path()).ok(), true);
    loop {
        match asked.recv_timeout(LOOK) {
            Ok(()) => copy_beside(&mut own, condition, is_torn),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
        let was_named = std::mem::replace(&mut is_named, condition.look().is_ok());
        if let Some(own) = own.as_ref().filter(|_| was_named && !is_named) {
            save(own, condition);
        }
    }
}

/// Copies the log into the file; commits go on meanwhile.
fn copy_beside(own: &mut Option<Connection>, condition: &Condition, is_torn: &AtomicBool) {
    if own.is_none() && condition.look().is_ok() {
        let opened = file::open_to_copy(condition.path());
        *own = opened.map_err(|error| uncopied(&error, is_torn)).ok();
    }
    if let Some(own) = own {
        let copied = own.query_row("pragma wal_checkpoint(passive)", [], |_| Ok(()));
        copied.unwrap_or_else(|error| uncopied(&error, is_torn));
    }
}

fn uncopied(error: &rusqlite::Error, is_torn: &AtomicBool) {
    is_torn.fetch_or(is_failed_sync(error), SeqCst);
    tracing::warn!(%error, "the write-ahead log could not be copied into the local file");
}

/// Writes all of the log into the file, syncs that, and begins the log anew.
fn begin_log_anew(connection: &Connection) -> rusqlite::Result<()> {
    match connection.query_row("pragma wal_checkpoint(truncate)", [], |row| row.get(0))? {
        0 => Ok(()),
        _ => Err(rusqlite::Error::SqliteFailure(ffi::Error::new(ffi::SQLITE_BUSY), None)),
    }
}

/// Linux tells of a failed sync once, and takes what could not be written for written from then on.
fn is_failed_sync(error: &rusqlite::Error) -> bool {
    let code = error.sqlite_error().map(|error| error.extended_code);
    matches!(code, Some(ffi::SQLITE_IOERR_FSYNC | ffi::SQLITE_IOERR_DIR_FSYNC))
}

/// Runs the jobs in one transaction.
fn commit(connection: &Connection, group: &mut [Box<dyn Job>], path: &Path) -> Result<(), Failed> {
    let survives = group.iter().map(|job| job.survives()).max().unwrap_or(Survives::PowerCut);
    let synchronous = if survives == Survives::Crash { "normal" } else { "full" };
    connection.pragma_update(None, "synchronous", synchronous).map_err(Failed::before_disk)?;
    connection.execute_batch("begin immediate").map_err(Failed::before_disk)?;
    if !group.iter_mut().all(|job| job.run(connection, path)) {
        return Err(Failed::Job);
    }
    let failed = |error| Failed::Transaction { error, reached_disk: true };
    connection.execute_batch("commit").map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a file with a table of numbers.
    fn started() -> (tempfile::TempDir, Writer) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file.db");
        let connection = Connection::open(&path).unwrap();
        connection.execute_batch("create table numbers (number integer primary key)").unwrap();
        (dir, Writer::start(connection, Arc::new(Condition::of(&path, &path)), || {}).unwrap())
    }

    #[tokio::test]
    async fn a_job_that_fails_takes_nothing_of_its_group_with_it() {
        let (_dir, writer) = started();
        // What comes while the thread is held up is one group.
        let (go_on, held_up) = std::sync::mpsc::channel::<()>();
        let hold_up = move |_: &Connection| Ok(held_up.recv().ok());
        let _held_up = writer.hand_over(Survives::Crash, hold_up, |_| {}).await.unwrap();
        let (runs, announced) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicI32::new(0)));
        let mut answers = Vec::new();
        for number in [1, 2, 2, 3] {
            let (runs, announced) = (Arc::clone(&runs), Arc::clone(&announced));
            let insert = move |connection: &Connection| {
                runs.fetch_add(1, SeqCst);
                connection.execute("insert into numbers values (?1)", [number])
            };
            let announce = move |_: &Result<usize>| _ = announced.fetch_add(1, SeqCst);
            answers.push(writer.hand_over(Survives::Crash, insert, announce).await.unwrap());
        }
        drop(go_on);
        let mut is_done = Vec::new();
        for answer in answers {
            is_done.push(answer.await.unwrap().is_ok());
        }
        assert_eq!(is_done, [true, true, false, true]);
        assert_eq!(runs.load(SeqCst), 3 + 4, "all until the one that failed, then each alone");
        assert_eq!(announced.load(SeqCst), 4);
        let count =
            |c: &Connection| c.query_row("select sum(number) from numbers", [], |row| row.get::<_, i32>(0));
        let sum = writer.hand_over(Survives::Crash, count, |_| {}).await.unwrap().await.unwrap();
        assert_eq!(sum.unwrap(), 1 + 2 + 3);
    }

    #[tokio::test]
    async fn nobody_hears_of_later_work_before_earlier_work_is_announced() {
        let (_dir, writer) = started();
        let (commit, held_up) = std::sync::mpsc::channel::<()>();
        let (announce, not_announced) = std::sync::mpsc::channel::<()>();
        let announced = Arc::new(Mutex::new(Vec::new()));
        let note = |number: i32| {
            let announced = Arc::clone(&announced);
            move |_: &Result<i32>| announced.lock().unwrap().push(number)
        };
        let first = note(0);
        let slowly = move |result: &Result<i32>| {
            not_announced.recv().ok();
            first(result);
        };
        let (tell, begun) = std::sync::mpsc::channel();
        let work = |number: i32| {
            let tell = tell.clone();
            move |_: &Connection| Ok(tell.send(number).map_or(0, |()| number))
        };
        let begins = || begun.recv_timeout(std::time::Duration::from_secs(20));
        let begin = work(0);
        let wait = move |connection: &Connection| {
            let number = begin(connection);
            held_up.recv().ok();
            number
        };
        let mut answers = vec![writer.hand_over(Survives::Crash, wait, slowly).await.unwrap()];
        assert_eq!(begins(), Ok(0), "alone, so that the others are a group of their own");
        for number in 1..=3 {
            answers.push(writer.hand_over(Survives::Crash, work(number), note(number)).await.unwrap());
        }
        commit.send(()).unwrap();
        assert_eq!([begins(), begins(), begins()], [Ok(1), Ok(2), Ok(3)], "work goes on meanwhile");
        // Time enough for somebody to hear too early.
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        answers.push(writer.hand_over(Survives::Crash, work(4), note(4)).await.unwrap());
        assert_eq!(begins(), Ok(4), "what came before it is committed");
        let is_unheard = answers.iter_mut().all(|answer| answer.try_recv().is_err());
        assert!(is_unheard && announced.lock().unwrap().is_empty());
        announce.send(()).unwrap();
        for (number, answer) in (0..).zip(answers) {
            assert_eq!(answer.await.unwrap().unwrap(), number);
        }
        assert_eq!(*announced.lock().unwrap(), [0, 1, 2, 3, 4]);
    }

    #[tokio::test]
    async fn what_was_handed_over_is_answered_before_the_file_is_closed() {
        let (_dir, writer) = started();
        let mut answers = Vec::new();
        for number in 0..500 {
            let answer = writer.hand_over(Survives::Crash, move |_| Ok(number), |_| {}).await.unwrap();
            answers.push(answer);
        }
        writer.close();
        for (number, mut answer) in (0..).zip(answers) {
            assert_eq!(answer.try_recv().unwrap().unwrap(), number);
        }
    }
}
