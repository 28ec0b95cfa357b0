//! `QueueFile`: the queue's file without a cache over it, for the command line and for programs of one's own.

mod line;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::local::{Local, spool};
use crate::spool::{DeadLetter, Imported, Incoming, QueuedWrite, Salvage};
use crate::store::{Page, Store};
use crate::version::Clock;

/// What one call reads or writes at most.
const RECORDS: usize = 500;
const BYTES: usize = 8 << 20;

/// The file that keeps writes while Supabase is away, opened by itself: to look at, to export from, and to take writes in
/// that another file holds. Nothing is sent; a [`Cache`](crate::Cache) that is opened with the file later does that.
///
/// The file is locked as long as this lives, so that no daemon can be using it. What is taken in is not held to the bound
/// on queued bytes; beyond that, a cache takes no more writes in an outage until some have been replayed.
#[derive(Debug)]
pub struct QueueFile {
    spool: spool::Spool,
    origin: Option<String>,
}

/// How things stand in the file.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueueStatus {
    /// Where it lies.
    pub path: PathBuf,
    /// The source of truth whose writes these are: the host of the Supabase project.
    pub origin: Option<String>,
    /// Writes that are not yet in the source of truth, and the bytes that they count.
    pub queued: u64,
    /// See `queued`.
    pub queued_bytes: u64,
    /// How long the oldest of them has been waiting, by the system's clock.
    pub oldest: Option<Duration>,
    /// Writes that the source of truth turned out not to take, and the bytes that they count.
    pub dead_letters: u64,
    /// See `dead_letters`.
    pub dead_letters_bytes: u64,
    /// Last known copies, and the bytes that they count.
    pub copies: u64,
    /// See `copies`.
    pub copies_bytes: u64,
}

/// What was read of a file that may be damaged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Salvaged {
    /// What became of that which could be read.
    pub imported: Imported,
    /// Whether the first page was destroyed, and one of an empty file took its place.
    pub had_no_header: bool,
    /// Writes that are known to have been there and could not be read.
    pub lost: u64,
    /// The bytes of these, as far as they are known.
    pub lost_bytes: u64,
    /// Whether there may have been more, of which nothing is known.
    pub may_lack_more: bool,
}

impl QueueFile {
    /// Opens a file that exists; waits some seconds for another process that has it open.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where that goes on; [`ErrorKind::Local`] where there is no such file, or it is not a queue's, or
    /// is damaged. It is left as it is then.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::over(path.as_ref(), None).await
    }

    /// Opens the file of a source of truth, which is created where it does not exist. `origin` is the host of the Supabase
    /// project, with the port where the URL has one.
    ///
    /// # Errors
    /// As for [`open`](Self::open); [`ErrorKind::Local`] also where the file holds the writes of another source of truth.
    pub async fn open_for(path: impl AsRef<Path>, origin: &str) -> Result<Self> {
        Self::over(path.as_ref(), Some(origin.to_owned())).await
    }

    async fn over(path: &Path, origin: Option<String>) -> Result<Self> {
        let spool = spool::Spool::open_offline(path, origin).await?;
        let origin = spool.origin().await?;
        Ok(Self { spool, origin })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        self.spool.path()
    }

    /// The source of truth whose writes these are.
    pub fn origin(&self) -> Option<&str> {
        self.origin.as_deref()
    }

    /// How things stand.
    ///
    /// # Errors
    /// [`ErrorKind::Local`] where the file cannot be read; so in all that follows here.
    pub async fn status(&self) -> Result<QueueStatus> {
        let holdings = self.spool.holdings();
        Ok(QueueStatus {
            path: self.path().to_owned(),
            origin: self.origin.clone(),
            queued: holdings.queue.records,
            queued_bytes: holdings.queue.bytes,
            oldest: self.spool.oldest().await?,
            dead_letters: holdings.dead_letters.records,
            dead_letters_bytes: holdings.dead_letters.bytes,
            copies: holdings.replica.records,
            copies_bytes: holdings.replica.bytes,
        })
    }

    /// Some of the queued writes, in their order: those that come after this one, the last of an earlier call. None where
    /// there are no more.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    pub async fn queued(&self, after: Option<&QueuedWrite>) -> Result<Vec<QueuedWrite>> {
        self.spool.page(after.map_or(0, |write| write.seq), RECORDS, BYTES).await
    }

    /// Some of the dead letters, in the order in which they died: those that come after this one. None where there are no
    /// more.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    pub async fn dead_letters(&self, after: Option<&DeadLetter>) -> Result<Vec<DeadLetter>> {
        self.spool.dead_letters(after.map_or(0, |letter| letter.id), RECORDS).await
    }

    /// Forgets the dead letters up to this one; says how many there were.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    pub async fn forget_dead_letters(&self, last: &DeadLetter) -> Result<usize> {
        self.spool.forget_dead_letters(last.id).await
    }

    /// Queues a dead letter again, as a put (or a remove) of this moment: it then wins over whatever is stored, and lives
    /// for as long as it was to live. Says false, and changes nothing, where a newer write of the thread waits in the queue
    /// or the letter is gone.
    ///
    /// # Errors
    /// See [`status`](Self::status).
    pub async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        self.spool.requeue(letter).await
    }

    /// A queued write as a line of JSON, for [`import`](Self::import).
    ///
    /// # Errors
    /// See [`status`](Self::status).
    pub fn export_write(&self, write: &QueuedWrite) -> Result<String> {
        line::of_write(write, self.origin())
    }

    /// A dead letter as a line of JSON, for [`import`](Self::import).
    ///
    /// # Errors
    /// See [`status`](Self::status).
    pub fn export_letter(&self, letter: &DeadLetter) -> Result<String> {
        line::of_letter(letter, self.origin())
    }

    /// Takes in lines of an export: they are synced to disk when this returns. Versions are kept, so that the same can be
    /// imported again, and what is newer here stays. Lines that are wrong are handed back with the reason; the others are
    /// taken. A line with a version that no clock can have given yet is wrong. A line that was queued for another source of truth is wrong, unless `from_any_origin`.
    ///
    /// # Errors
    /// [`ErrorKind::Local`] where the file cannot be written: nothing was taken.
    pub async fn import(
        &self,
        lines: &[String],
        from_any_origin: bool,
    ) -> Result<(Imported, Vec<(usize, Error)>)> {
        let (mut taken, mut wrong, now) = (Vec::new(), Vec::new(), Clock::new().now());
        for (at, text) in lines.iter().enumerate() {
            match line::parse(text, now)
                .and_then(|(one, origin)| self.check_origin(origin.as_deref(), from_any_origin).map(|()| one))
            {
                Ok(one) => taken.push(one),
                Err(error) => wrong.push((at, error)),
            }
        }
        Ok((self.spool.take_in(taken).await?, wrong))
    }

    fn check_origin(&self, origin: Option<&str>, any: bool) -> Result<()> {
        match (origin, self.origin()) {
            (Some(other), Some(own)) if other != own && !any => Err(Error::new(
                ErrorKind::Invalid,
                format!(
                    "it was queued for {other}, not for {own}: nothing of another project is taken unless asked for"
                ),
            )),
            _ => Ok(()),
        }
    }

    /// Takes in what can still be read of another queue's file, damaged or not, such as one that was set aside as
    /// `….damaged-1`. That file is only read. What is taken in is synced to disk when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where a process has the other file open; [`ErrorKind::Invalid`] where it was of another source of
    /// truth, unless `from_any_origin`; [`ErrorKind::Local`] where nothing can be read, or this file cannot be written.
    pub async fn salvage(&self, path: impl AsRef<Path>, from_any_origin: bool) -> Result<Salvaged> {
        self.check_other(path.as_ref())?;
        let found = spool::salvage(path.as_ref()).await?;
        self.check_origin(found.origin.as_deref(), from_any_origin)?;
        let Salvage { queued, dead_letters, had_no_header, lost, may_lack_more, .. } = found;
        let mut imported = self.take_in(queued.into_iter().map(Incoming::Queued)).await?;
        imported = imported.and(self.take_in(dead_letters.into_iter().map(Incoming::Dead)).await?);
        let (lost, lost_bytes) = (lost.records, lost.bytes);
        Ok(Salvaged { imported, had_no_header, lost, lost_bytes, may_lack_more })
    }

    fn check_other(&self, path: &Path) -> Result<()> {
        if path.canonicalize().is_ok_and(|path| path == self.path()) {
            let message = format!("{} is the queue's file itself; name another one", path.display());
            return Err(Error::new(ErrorKind::Invalid, message));
        }
        Ok(())
    }

    async fn take_in(&self, all: impl Iterator<Item = Incoming>) -> Result<Imported> {
        let (mut all, mut sum) = (all.peekable(), Imported::default());
        while all.peek().is_some() {
            sum = sum.and(self.spool.take_in(all.by_ref().take(RECORDS).collect()).await?);
        }
        Ok(sum)
    }

    /// Takes in all that another file of threadkeep's holds: queued writes and dead letters of another queue, or the live
    /// conversations of the backend `local`. Tells after each portion how many it has looked at.
    ///
    /// Versions and expiries are kept. But a conversation that was last written more than six days ago, which the database
    /// would soon refuse as too old, is stamped anew, as an update that goes on from its own version: it is stored as of
    /// now, unless the database holds something that was written after the conversation was; then that stays, and this one
    /// becomes a dead letter. Whatever is newer here stays, so that the same can be moved again.
    ///
    /// The other file is left as it is; see [`retire`](Self::retire).
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where a process has the other file open; [`ErrorKind::Invalid`] where it is this one;
    /// [`ErrorKind::Local`] where one of them cannot be read or written. What was taken until then stays, and does no harm
    /// when it is taken again.
    pub async fn move_from(&self, path: impl AsRef<Path>, mut tell: impl FnMut(usize)) -> Result<Imported> {
        let path = path.as_ref();
        self.check_other(path)?;
        match spool::is_truth(path).await? {
            true => self.move_conversations(&Local::open(path).await?, &mut tell).await,
            false => self.move_queue(&Self::open(path).await?, &mut tell).await,
        }
    }

    async fn move_conversations(&self, from: &Local, tell: &mut impl FnMut(usize)) -> Result<Imported> {
        let (mut sum, mut seen) = (Imported::default(), 0);
        let mut page = Page { user: None, most: RECORDS, after: None };
        loop {
            let recent = from.recent(&page).await?;
            page.after = recent.records.last().map(|record| (record.version, record.key.clone()));
            seen += recent.records.len();
            sum = sum.and(self.take_in(recent.records.into_iter().map(Incoming::Adopted)).await?);
            tell(seen);
            if recent.is_last || page.after.is_none() {
                return Ok(sum);
            }
        }
    }

    async fn move_queue(&self, from: &Self, tell: &mut impl FnMut(usize)) -> Result<Imported> {
        let (mut sum, mut seen) = (Imported::default(), 0);
        let mut writes = from.queued(None).await?;
        while let Some(last) = writes.last().cloned() {
            seen += writes.len();
            sum = sum.and(self.take_in(writes.into_iter().map(Incoming::Queued)).await?);
            tell(seen);
            writes = from.queued(Some(&last)).await?;
        }
        let mut letters = from.dead_letters(None).await?;
        while let Some(last) = letters.last().cloned() {
            seen += letters.len();
            sum = sum.and(self.take_in(letters.into_iter().map(Incoming::Dead)).await?);
            tell(seen);
            letters = from.dead_letters(Some(&last)).await?;
        }
        from.close().await?;
        Ok(sum)
    }

    /// Gives a file whose contents have been moved the name `FILE.moved`, so that nobody goes on with it by mistake; says
    /// the new name.
    ///
    /// # Errors
    /// [`ErrorKind::InUse`] where a process has it open; [`ErrorKind::Local`] where it cannot be renamed, or there is a file of
    /// that name already.
    pub async fn retire(path: impl AsRef<Path>) -> Result<PathBuf> {
        spool::retire(path.as_ref()).await
    }

    /// Finishes what waits to be written, and lets others open the file, as dropping this does, too.
    ///
    /// # Errors
    /// [`ErrorKind::Local`] where that was given up.
    pub async fn close(&self) -> Result<()> {
        self.spool.close().await
    }
}
