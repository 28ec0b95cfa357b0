//! The outage file without a cache over it, for command lines and scripts.

mod migrate;

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::file::OutageFile;
use super::import::{self, read_file};
use super::{DeadLetter, ImportItem, ImportReport, QueuedWrite};
use crate::error::{Error, ErrorKind, Result};

/// The limits of one read or write of the file.
const MAX_RECORDS: usize = 500;
const MAX_BYTES: usize = 8 << 20;

/// The outage file of a daemon that is stopped: to inspect it, to export from it, and to import into it.
///
/// Nothing is sent. A [`Cache`](crate::Cache) that opens the file later does that. The file is locked while this value
/// lives, so no daemon can use it. Imports are not held to the limit on queued bytes. A queue beyond the limit takes no more
/// writes in an outage until replay has shortened it.
#[derive(Debug)]
pub struct QueueAdmin {
    file: OutageFile,
    project: Option<String>,
}

/// The contents of an outage file in figures.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct QueueStatus {
    /// The path of the file.
    pub path: PathBuf,
    /// The host of the Supabase project that the writes belong to.
    pub project: Option<String>,
    /// The number of writes that the store does not have yet.
    pub queued: u64,
    /// The bytes that the queued writes count.
    pub queued_bytes: u64,
    /// The age of the oldest queued write, by the system's clock.
    pub oldest: Option<Duration>,
    /// The number of dead letters.
    pub dead_letters: u64,
    /// The bytes that the dead letters count.
    pub dead_letters_bytes: u64,
    /// The number of last known copies.
    pub copies: u64,
    /// The bytes that the copies count.
    pub copies_bytes: u64,
}

impl QueueAdmin {
    /// Opens a file that exists. Waits some seconds for another process that has it open.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if the other process goes on. [`ErrorKind::LocalStorage`] if the file does not exist, is no outage
    /// file, or is corrupt. The file stays as it is then.
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// use threadkeep::tools::QueueAdmin;
    ///
    /// let admin = QueueAdmin::open("threadkeep-queue.db").await?;
    /// println!("{} writes are queued", admin.status().await?.queued);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_any(path.as_ref(), None).await
    }

    /// Opens the file of a project, and creates it if it does not exist. `project` is the host of the Supabase project, with the
    /// port if the URL has one.
    ///
    /// # Errors
    /// As for [`open`](Self::open). [`ErrorKind::LocalStorage`] also if the file holds the writes of another project.
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// use threadkeep::tools::QueueAdmin;
    ///
    /// let admin = QueueAdmin::open_for("threadkeep-queue.db", "abc.supabase.co").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn open_for(path: impl AsRef<Path>, project: &str) -> Result<Self> {
        Self::open_any(path.as_ref(), Some(project.to_owned())).await
    }

    async fn open_any(path: &Path, project: Option<String>) -> Result<Self> {
        let file = OutageFile::open_offline(path, project).await?;
        let project = file.project().await?;
        Ok(Self { file, project })
    }

    /// Returns the path of the file.
    ///
    /// ```
    /// # fn example(admin: threadkeep::tools::QueueAdmin) {
    /// println!("{}", admin.path().display());
    /// # }
    /// ```
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Returns the host of the project that the writes belong to.
    ///
    /// ```
    /// # fn example(admin: threadkeep::tools::QueueAdmin) {
    /// println!("{:?}", admin.project());
    /// # }
    /// ```
    pub fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    /// Returns the contents of the file in figures.
    ///
    /// # Errors
    /// [`ErrorKind::LocalStorage`] if the file cannot be read.
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// println!("{} dead letters", admin.status().await?.dead_letters);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn status(&self) -> Result<QueueStatus> {
        let usage = self.file.usage();
        Ok(QueueStatus {
            path: self.path().to_owned(),
            project: self.project.clone(),
            queued: usage.queue.records,
            queued_bytes: usage.queue.bytes,
            oldest: self.file.oldest().await?,
            dead_letters: usage.dead_letters.records,
            dead_letters_bytes: usage.dead_letters.bytes,
            copies: usage.replica.records,
            copies_bytes: usage.replica.bytes,
        })
    }

    /// Returns a page of queued writes in their order, after `after`, the last write of the previous page. An empty page is the
    /// end.
    ///
    /// # Errors
    /// As for [`status`](Self::status).
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// let mut page = admin.queued(None).await?;
    /// while let Some(last) = page.last() {
    ///     page.iter().for_each(|write| println!("{}", write.record.key));
    ///     page = admin.queued(Some(last)).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn queued(&self, after: Option<&QueuedWrite>) -> Result<Vec<QueuedWrite>> {
        self.file.page(after.map_or(0, |write| write.seq), MAX_RECORDS, MAX_BYTES).await
    }

    /// Returns a page of dead letters, oldest first, after `after`, the last letter of the previous page. An empty page is the
    /// end.
    ///
    /// # Errors
    /// As for [`status`](Self::status).
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// for letter in admin.dead_letters(None).await? {
    ///     println!("{}: {}", letter.record.key, letter.reason);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn dead_letters(&self, after: Option<&DeadLetter>) -> Result<Vec<DeadLetter>> {
        self.file.dead_letters(after.map_or(0, |letter| letter.id), MAX_RECORDS).await
    }

    /// Deletes the dead letters up to and including `last`, and returns their number.
    ///
    /// # Errors
    /// As for [`status`](Self::status).
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// if let Some(last) = admin.dead_letters(None).await?.last() {
    ///     admin.delete_dead_letters(last).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn delete_dead_letters(&self, last: &DeadLetter) -> Result<usize> {
        self.file.delete_dead_letters(last.id).await
    }

    /// Queues a dead letter again, as a put or a remove of this moment. It wins over whatever the store holds, and lives as long
    /// as it was meant to live. Returns false, and changes nothing, if a newer write of the conversation is queued or the letter
    /// is gone.
    ///
    /// # Errors
    /// As for [`status`](Self::status).
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// for letter in admin.dead_letters(None).await? {
    ///     let is_queued = admin.requeue(&letter).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        self.file.requeue(letter).await
    }

    /// Imports writes of another file; they are synced to disk when this returns. Versions are kept, and newer writes in this
    /// file stay, so the same items can be imported again. Invalid items come back with their index and the error; the others
    /// are imported.
    ///
    /// # Errors
    /// [`ErrorKind::LocalStorage`] if the file cannot be written. Nothing was imported then.
    ///
    /// ```
    /// use threadkeep::tools::{ImportItem, QueueAdmin};
    ///
    /// # async fn example(from: QueueAdmin, to: QueueAdmin) -> threadkeep::Result<()> {
    /// let writes = from.queued(None).await?;
    /// let (report, invalid) = to.import(writes.into_iter().map(ImportItem::Queued).collect()).await?;
    /// println!("{} imported, {} invalid", report.queued, invalid.len());
    /// # Ok(())
    /// # }
    /// ```
    pub async fn import(&self, items: Vec<ImportItem>) -> Result<(ImportReport, Vec<(usize, Error)>)> {
        let (valid, invalid) = import::validate(items);
        // One transaction, so that an error imports nothing.
        Ok((self.file.import(valid).await?, invalid))
    }

    /// Rejects the writes of another project.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `project` is known and is not the project of this file.
    ///
    /// ```
    /// # fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// admin.check_project(Some("abc.supabase.co"))?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn check_project(&self, project: Option<&str>) -> Result<()> {
        match (project, self.project()) {
            (Some(other), Some(own)) if other != own => {
                let error =
                    Error::new(ErrorKind::Invalid, format!("it was queued for {other}, not for {own}"));
                Err(error.with_remedy("allow writes of other projects if they belong here"))
            }
            _ => Ok(()),
        }
    }

    /// Imports queued writes and dead letters of another outage file, such as one that `sqlite3 FILE .recover` has rebuilt. The
    /// other file is only read. Rows that are no valid writes are counted as `unreadable`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if a process has the other file open. [`ErrorKind::Invalid`] if it belongs to another project,
    /// unless `allow_other_project`, or is this file. [`ErrorKind::LocalStorage`] if a file cannot be read or written.
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// let report = admin.import_file("recovered.db", false).await?;
    /// println!("{} imported, {} unreadable", report.queued, report.unreadable);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn import_file(
        &self,
        path: impl AsRef<Path>,
        allow_other_project: bool,
    ) -> Result<ImportReport> {
        self.check_is_other(path.as_ref())?;
        let contents = read_file(path.as_ref()).await?;
        if !allow_other_project {
            self.check_project(contents.project.as_deref())?;
        }
        let (valid, invalid) = import::validate(contents.items);
        let report = self.insert(valid.into_iter()).await?;
        let unreadable = contents.unreadable + invalid.len();
        Ok(ImportReport { unreadable, ..report })
    }

    fn check_is_other(&self, path: &Path) -> Result<()> {
        if path.canonicalize().is_ok_and(|path| path == self.path()) {
            let error =
                Error::new(ErrorKind::Invalid, format!("{} is the outage file itself", path.display()));
            return Err(error.with_remedy("name another file"));
        }
        Ok(())
    }

    async fn insert(&self, items: impl Iterator<Item = ImportItem>) -> Result<ImportReport> {
        let (mut items, mut sum) = (items.peekable(), ImportReport::default());
        while items.peek().is_some() {
            // Each page is one transaction. After an error a repeat finds the earlier pages as duplicates.
            sum = sum.plus(self.file.import(items.by_ref().take(MAX_RECORDS).collect()).await?);
        }
        Ok(sum)
    }

    /// Completes the submitted writes, and lets others open the file. Dropping the value does the same.
    ///
    /// # Errors
    /// [`ErrorKind::LocalStorage`] if a write failed.
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// admin.close().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn close(&self) -> Result<()> {
        self.file.close().await
    }
}
