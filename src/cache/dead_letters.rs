//! The dead letters of a cache.

use std::future::IntoFuture;

use super::Cache;
use super::put::BoxFuture;
use crate::error::Result;
use crate::outage::DeadLetter;

/// The limit on dead letters of one call.
const MAX_PAGE: usize = 1_000;

/// A call of [`Cache::dead_letters`]. Await it to run it.
///
/// ```
/// # async fn example(cache: threadkeep::Cache) -> threadkeep::Result<()> {
/// let letters = cache.dead_letters().await?;
/// println!("{} writes were not stored", letters.len());
/// if let Some(last) = letters.last() {
///     let next = cache.dead_letters().after(last).await?;
///     let deleted = cache.delete_dead_letters(last).await?;
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "nothing is read before this is awaited"]
pub struct DeadLetters {
    cache: Cache,
    after: i64,
}

impl Cache {
    /// Reads the dead letters, oldest first, at most 1,000 for each call.
    ///
    /// A dead letter is an acknowledged write that the store will not take. Another daemon superseded it, or the store rejected
    /// the record, or the write was too old. After a power cut, an update may lose against an own write. The outage file keeps
    /// the dead letter until [`delete_dead_letters`](Self::delete_dead_letters). A backend without an outage file has none.
    /// See [`DeadLetters`] for an example.
    ///
    /// # Errors
    ///
    /// When awaited: [`ErrorKind::LocalStorage`](crate::ErrorKind::LocalStorage) if the outage file cannot be read.
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) after a shutdown.
    pub fn dead_letters(&self) -> DeadLetters {
        DeadLetters { cache: self.clone(), after: 0 }
    }

    /// Deletes the dead letters up to and including `last`. Returns their number.
    ///
    /// The queue can use their space again. See [`DeadLetters`] for an example.
    ///
    /// # Errors
    ///
    /// [`ErrorKind::LocalStorage`](crate::ErrorKind::LocalStorage) if the outage file cannot be written.
    /// [`ErrorKind::Closed`](crate::ErrorKind::Closed) after a shutdown.
    pub async fn delete_dead_letters(&self, last: &DeadLetter) -> Result<usize> {
        self.0.check_not_shut_down()?;
        match &self.0.copies.file {
            Some(file) => {
                let deleted = file.delete_dead_letters(last.id).await?;
                // Dead letters count against the limit of the queue, which may have space again.
                *self.0.enqueue_error.lock() = None;
                Ok(deleted)
            }
            None => Ok(0),
        }
    }
}

impl DeadLetters {
    /// Starts after `last`, the last dead letter of an earlier call. See [`DeadLetters`] for an example.
    pub fn after(mut self, last: &DeadLetter) -> Self {
        self.after = last.id;
        self
    }
}

impl IntoFuture for DeadLetters {
    type Output = Result<Vec<DeadLetter>>;
    type IntoFuture = BoxFuture<Vec<DeadLetter>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            self.cache.0.check_not_shut_down()?;
            match &self.cache.0.copies.file {
                Some(file) => file.dead_letters(self.after, MAX_PAGE).await,
                None => Ok(Vec::new()),
            }
        })
    }
}
