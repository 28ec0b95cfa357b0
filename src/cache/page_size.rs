//! The size of the next page of a list or of the warm-up.

use crate::error::{Error, Result};
use crate::store::Store;

/// Adapts the page size to the store. A page that fails in time is requested again with half the size. After some successes,
/// the size doubles.
#[derive(Debug)]
pub(crate) struct PageSizer {
    size: usize,
    max_size: usize,
    /// The number of successes before the size doubles.
    successes_to_grow: usize,
    /// The number of successes since the size changed.
    successes: usize,
}

/// Each failure doubles the number of successes before the next attempt at a larger page.
const MIN_SUCCESSES_TO_GROW: usize = 2;

const MAX_SUCCESSES_TO_GROW: usize = 64;

impl PageSizer {
    pub(crate) fn new(max_size: usize) -> Self {
        Self { size: max_size, max_size, successes_to_grow: MIN_SUCCESSES_TO_GROW, successes: 0 }
    }

    /// Requests a page of at most `left` conversations, and halves it until the store delivers it in time.
    pub(crate) async fn fetch<T, F: Future<Output = Result<T>>>(
        &mut self,
        store: &dyn Store,
        left: usize,
        request: impl Fn(usize) -> F,
    ) -> Result<T> {
        loop {
            let size = self.size.min(left);
            match request(size).await {
                // `shrink` refuses below a page of one conversation, so the loop ends (I12).
                Err(error) if self.shrink(store, size, &error).await => {}
                page => {
                    self.grow_after(&page);
                    return page;
                }
            }
        }
    }

    /// Doubles the size after enough pages have succeeded.
    fn grow_after<T>(&mut self, page: &Result<T>) {
        self.successes += usize::from(page.is_ok());
        if self.successes == self.successes_to_grow {
            (self.size, self.successes) = (self.max_size.min(self.size * 2), 0);
        }
    }

    /// Halves the size after a page of `size` conversations failed. Returns true if a retry makes sense.
    async fn shrink(&mut self, store: &dyn Store, size: usize, error: &Error) -> bool {
        let is_slow = error.is_outage() && size > 1;
        // If the store answers a probe, only the page was too large.
        let is_too_large = is_slow && answers_probe(store).await;
        if is_too_large {
            (self.size, self.successes) = (size / 2, 0);
            self.successes_to_grow = MAX_SUCCESSES_TO_GROW.min(self.successes_to_grow * 2);
        }
        is_too_large
    }
}

/// Returns true if the store answers, as its breaker knows or its probe finds out. A store without a breaker counts as working.
async fn answers_probe(store: &dyn Store) -> bool {
    match store.breaker() {
        Some(breaker) => breaker.probe_now().await,
        None => true,
    }
}
