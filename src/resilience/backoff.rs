//! Waits between attempts: exponential, capped, with full jitter.

use std::time::Duration;

/// Yields endless waits. The n-th wait is random between half a millisecond and `first * 2^n`, at most `most`.
///
/// Full jitter spreads the attempts of many daemons best (Marc Brooker, "Exponential Backoff And Jitter", 2015).
#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    next: Duration,
    most: Duration,
}

impl Backoff {
    /// Begins with waits up to `first`. Each bound is twice the bound before, up to `most`.
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self { next: first.min(most), most }
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let span = u64::try_from(self.next.as_micros()).unwrap_or(u64::MAX).max(500);
        self.next = self.next.saturating_mul(2).min(self.most);
        Some(Duration::from_micros(fastrand::u64(500..=span)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_to_the_bound_and_differs() {
        let bound = Duration::from_secs(2);
        let late: Vec<_> = Backoff::new(Duration::from_millis(1), bound).skip(20).take(200).collect();
        assert!(late.iter().all(|wait| *wait <= bound));
        assert!(late.iter().any(|wait| *wait > bound / 2), "the last waits use the whole span");
        assert!(late.windows(2).any(|pair| pair[0] != pair[1]), "jitter");
        assert!(Backoff::new(Duration::from_millis(4), bound).next() <= Some(Duration::from_millis(4)));
    }
}
