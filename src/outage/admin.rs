//! The outage file without a cache over it, for command lines and scripts.

use std::path::{Path, PathBuf};

use super::file::OutageFile;
use super::import::{self, read_file};
use super::inspect::{FileSummary, summarize};
use super::{DeadLetter, ImportItem, ImportReport, QueuedWrite, offline};
use crate::error::{Error, ErrorKind, Result};
use crate::sqlite::file;
use crate::store::local::Local;
use crate::store::{ListRequest, Store};

/// The limits of one read or write of the file.
const MAX_RECORDS: usize = 500;
const MAX_BYTES: usize = 8 << 20;

/// The outage file of a daemon that is stopped: to inspect it, to export from it, and to import into it.
///
/// Nothing is sent. A [`Cache`](crate::Cache) that opens the file later does that. The file is locked while this value
/// lives, so no daemon can use it. Imports are not held to the limit on queued bytes. A queue beyond the limit takes no more
/// writes in an outage until replay has shortened it. Each call fails with [`ErrorKind::LocalStorage`] if a file cannot be read
/// or written.
///
/// ```
/// use threadkeep::tools::{ImportItem, QueueAdmin};
///
/// # async fn example() -> threadkeep::Result<()> {
/// let from = QueueAdmin::open("threadkeep-queue.db").await?;
/// println!("{} writes are queued for {:?}", from.status().await?.queued.records, from.project());
/// for letter in from.dead_letters(None).await? {
///     println!("{}: {}; queued again: {}", letter.record.key, letter.reason, from.requeue(&letter).await?);
/// }
/// let to = QueueAdmin::open_for("other-queue.db", "abc.supabase.co").await?;
/// let mut page = from.queued(None).await?;
/// while let Some(last) = page.last().cloned() {
///     let (report, invalid) = to.import(page.into_iter().map(ImportItem::Queued).collect()).await?;
///     println!("{} imported, {} invalid", report.queued, invalid.len());
///     page = from.queued(Some(&last)).await?;
/// }
/// to.migrate_from("threadkeep.db", |records| println!("{records}")).await?;
/// to.close().await?;
/// QueueAdmin::retire("threadkeep.db").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct QueueAdmin {
    file: OutageFile,
    project: Option<String>,
}

impl QueueAdmin {
    /// Opens a file that exists. Waits some seconds for another process that has it open.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if the other process goes on. [`ErrorKind::LocalStorage`] if the file does not exist, is no outage
    /// file, or is corrupt. The file stays as it is then. See [`QueueAdmin`] for an example.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_any(path.as_ref(), None).await
    }

    /// Opens the file of a project, and creates it if it does not exist. `project` is the host of the Supabase project, with
    /// the port
    /// if the URL has one.
    ///
    /// # Errors
    /// As for [`open`](Self::open). [`ErrorKind::LocalStorage`] also if the file holds the writes of another project. See
    /// [`QueueAdmin`] for an example.
    pub async fn open_for(path: impl AsRef<Path>, project: &str) -> Result<Self> {
        Self::open_any(path.as_ref(), Some(project.to_owned())).await
    }

    async fn open_any(path: &Path, project: Option<String>) -> Result<Self> {
        let file = OutageFile::open_offline(path, project).await?;
        let project = file.database.read(|connection| file::meta(connection, "project")).await?;
        Ok(Self { file, project })
    }

    /// Returns the path of the file. See [`QueueAdmin`] for an example.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// Returns the host of the project that the writes belong to. See [`QueueAdmin`] for an example.
    pub fn project(&self) -> Option<&str> {
        self.project.as_deref()
    }

    /// Returns the contents of the file in figures. See [`QueueAdmin`] for an example.
    pub async fn status(&self) -> Result<FileSummary> {
        self.file.database.read(summarize).await
    }

    /// Returns a page of queued writes in their order, after `after`, the last write of the previous page. An empty page is the
    /// end. See [`QueueAdmin`] for an example.
    pub async fn queued(&self, after: Option<&QueuedWrite>) -> Result<Vec<QueuedWrite>> {
        self.file.page(after.map_or(0, |write| write.seq), MAX_RECORDS, MAX_BYTES).await
    }

    /// Returns a page of dead letters, oldest first, after `after`, the last letter of the previous page. An empty page is the
    /// end. See [`QueueAdmin`] for an example.
    pub async fn dead_letters(&self, after: Option<&DeadLetter>) -> Result<Vec<DeadLetter>> {
        self.file.dead_letters(after.map_or(0, |letter| letter.id), MAX_RECORDS).await
    }

    /// Deletes the dead letters up to and including `last`, and returns their number.
    /// See [`QueueAdmin`] for an example.
    pub async fn delete_dead_letters(&self, last: &DeadLetter) -> Result<usize> {
        self.file.delete_dead_letters(last.id).await
    }

    /// Queues a dead letter again, as a write of this moment. It lives as long as it was meant to live. A put or remove wins
    /// over whatever the store holds. An append adds its items once more. Returns false, and changes nothing, if the letter
    /// is gone, or if a newer write of the conversation is queued that a put would replace. See [`QueueAdmin`] for an example.
    pub async fn requeue(&self, letter: &DeadLetter) -> Result<bool> {
        self.file.requeue(letter).await
    }

    /// Imports writes of another file; they are synced to disk when this returns. Versions are kept, and newer writes in this
    /// file stay, so the same items can be imported again. Invalid items come back with their index and the error; the others
    /// are imported.
    /// After an error nothing is imported. See [`QueueAdmin`] for an example.
    pub async fn import(&self, items: Vec<ImportItem>) -> Result<(ImportReport, Vec<(usize, Error)>)> {
        let (valid, invalid) = import::validate(items);
        // One transaction, so that an error imports nothing.
        Ok((self.file.import(valid).await?, invalid))
    }

    /// Rejects the writes of another project.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if `project` is known and is not the project of this file. See [`QueueAdmin`] for an example.
    pub fn check_project(&self, project: Option<&str>) -> Result<()> {
        let (Some(other), Some(own)) = (project, self.project()) else { return Ok(()) };
        if other == own {
            return Ok(());
        }
        let error = Error::new(ErrorKind::Invalid, format!("it was queued for {other}, not for {own}"));
        Err(error.with_remedy("allow writes of other projects if they belong here"))
    }

    /// Imports queued writes and dead letters of another outage file, such as one that `sqlite3 FILE .recover` has rebuilt. The
    /// other file is only read. Rows that are no valid writes are counted as `unreadable`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if a process has the other file open. [`ErrorKind::Invalid`] if it belongs to another project,
    /// unless `allow_other_project`, or is this file. See [`QueueAdmin`] for an example.
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
        let unreadable = contents.unreadable + invalid.len();
        let mut sum = ImportReport { unreadable, ..ImportReport::default() };
        let mut valid = valid.into_iter().peekable();
        while valid.peek().is_some() {
            // Each page is one transaction. After an error a repeat finds the earlier pages as duplicates.
            sum += self.file.import(valid.by_ref().take(MAX_RECORDS).collect()).await?;
        }
        Ok(sum)
    }

    fn check_is_other(&self, path: &Path) -> Result<()> {
        if path.canonicalize().is_ok_and(|path| path == self.path()) {
            let error =
                Error::new(ErrorKind::Invalid, format!("{} is the outage file itself", path.display()));
            return Err(error.with_remedy("name another file"));
        }
        Ok(())
    }

    /// Imports everything from another file of threadkeep: queued writes and dead letters of another outage file, or the live
    /// conversations of the backend `local`. Calls `on_progress` with the number of records read so far.
    ///
    /// Versions and expiries are kept, and newer writes in this file stay, so the same file can be migrated again. The database
    /// rejects writes older than 7 days. So a conversation that was last written more than 6 days ago gets a new version, as an
    /// update of its own old version. It is stored as of now, unless the database holds a later write. It becomes a dead letter
    /// then.
    ///
    /// The other file stays as it is; see [`retire`](Self::retire).
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if a process has the other file open. [`ErrorKind::Invalid`] if it is this file. Earlier imports
    /// stay, and can be repeated without harm. See [`QueueAdmin`] for an example.
    pub async fn migrate_from(
        &self,
        path: impl AsRef<Path>,
        mut on_progress: impl FnMut(usize),
    ) -> Result<ImportReport> {
        let path = path.as_ref();
        self.check_is_other(path)?;
        let (mut sum, mut records) = (ImportReport::default(), 0);
        let mut add = async |page: Vec<ImportItem>| {
            records += page.len();
            sum += self.file.import(page).await?;
            on_progress(records);
            Result::Ok(())
        };
        if offline::is_local_store(path).await? {
            read_local(path, add).await?;
            return Ok(sum);
        }
        let from = Self::open(path).await?;
        let mut page = from.queued(None).await?;
        while let Some(last) = page.last().cloned() {
            add(page.into_iter().map(ImportItem::Queued).collect()).await?;
            page = from.queued(Some(&last)).await?;
        }
        let mut page = from.dead_letters(None).await?;
        while let Some(last) = page.last().cloned() {
            add(page.into_iter().map(ImportItem::DeadLetter).collect()).await?;
            page = from.dead_letters(Some(&last)).await?;
        }
        from.close().await?;
        Ok(sum)
    }

    /// Renames a migrated file to `FILE.moved`, so that nobody continues with it by mistake, and returns the new name.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if a process has the file open. [`ErrorKind::LocalStorage`] if it cannot be renamed, or a file of
    /// that name exists. See [`QueueAdmin`] for an example.
    pub async fn retire(path: impl AsRef<Path>) -> Result<PathBuf> {
        offline::retire(path.as_ref()).await
    }

    /// Completes the submitted writes, and lets others open the file. Dropping the value does the same.
    /// See [`QueueAdmin`] for an example.
    pub async fn close(&self) -> Result<()> {
        self.file.close().await
    }
}

/// Hands the conversations of a file of the backend `local` to `add`, page by page.
async fn read_local(path: &Path, mut add: impl AsyncFnMut(Vec<ImportItem>) -> Result<()>) -> Result<()> {
    let (from, mut request) = (Local::open(path).await?, ListRequest::new(MAX_RECORDS));
    loop {
        let page = from.list(&request).await?;
        request.after = page.records.last().map(|record| (record.version, record.key.clone()));
        add(page.records.into_iter().map(ImportItem::LocalRecord).collect()).await?;
        if page.is_last {
            return Ok(());
        }
    }
}
