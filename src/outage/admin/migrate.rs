//! The migration of another file into an outage file.

use std::path::{Path, PathBuf};

use super::{MAX_RECORDS, QueueAdmin};
use crate::error::Result;
use crate::outage::{ImportItem, ImportReport, offline};
use crate::store::local::Local;
use crate::store::{ListRequest, Store};

impl QueueAdmin {
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
    /// [`Locked`](crate::ErrorKind::Locked) if a process has the other file open. [`Invalid`](crate::ErrorKind::Invalid) if it is this file.
    /// [`LocalStorage`](crate::ErrorKind::LocalStorage) if a file cannot be read or written. Earlier imports stay, and can be repeated without harm.
    ///
    /// ```
    /// # async fn example(admin: threadkeep::tools::QueueAdmin) -> threadkeep::Result<()> {
    /// let report = admin.migrate_from("threadkeep.db", |records| println!("{records}")).await?;
    /// println!("{} imported", report.queued);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn migrate_from(
        &self,
        path: impl AsRef<Path>,
        mut on_progress: impl FnMut(usize),
    ) -> Result<ImportReport> {
        let path = path.as_ref();
        self.check_is_other(path)?;
        if offline::is_local_store(path).await? {
            self.migrate_conversations(&Local::open(path).await?, &mut on_progress).await
        } else {
            self.migrate_queue(&Self::open(path).await?, &mut on_progress).await
        }
    }

    async fn migrate_conversations(
        &self,
        from: &Local,
        on_progress: &mut impl FnMut(usize),
    ) -> Result<ImportReport> {
        let (mut sum, mut records) = (ImportReport::default(), 0);
        let mut request = ListRequest::new(MAX_RECORDS);
        loop {
            let page = from.list(&request).await?;
            request.after = page.records.last().map(|record| (record.version, record.key.clone()));
            records += page.records.len();
            sum = sum.plus(self.insert(page.records.into_iter().map(ImportItem::LocalRecord)).await?);
            on_progress(records);
            // An empty page has no last record. The loop ends there even if the store does not say so (I12).
            if page.is_last || request.after.is_none() {
                return Ok(sum);
            }
        }
    }

    async fn migrate_queue(&self, from: &Self, on_progress: &mut impl FnMut(usize)) -> Result<ImportReport> {
        let (mut sum, mut records) = (ImportReport::default(), 0);
        let mut writes = from.queued(None).await?;
        while let Some(last) = writes.last().cloned() {
            records += writes.len();
            sum = sum.plus(self.insert(writes.into_iter().map(ImportItem::Queued)).await?);
            on_progress(records);
            writes = from.queued(Some(&last)).await?;
        }
        let mut letters = from.dead_letters(None).await?;
        while let Some(last) = letters.last().cloned() {
            records += letters.len();
            sum = sum.plus(self.insert(letters.into_iter().map(ImportItem::DeadLetter)).await?);
            on_progress(records);
            letters = from.dead_letters(Some(&last)).await?;
        }
        // A drop of the file would block this thread until its writer has ended.
        from.close().await?;
        Ok(sum)
    }

    /// Renames a migrated file to `FILE.moved`, so that nobody continues with it by mistake, and returns the new name.
    ///
    /// # Errors
    /// [`Locked`](crate::ErrorKind::Locked) if a process has the file open. [`LocalStorage`](crate::ErrorKind::LocalStorage) if it cannot be renamed, or a file of
    /// that name exists.
    ///
    /// ```
    /// # async fn example() -> threadkeep::Result<()> {
    /// let renamed = threadkeep::tools::QueueAdmin::retire("threadkeep.db").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn retire(path: impl AsRef<Path>) -> Result<PathBuf> {
        offline::retire(path.as_ref()).await
    }
}
