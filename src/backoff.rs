//! Waits between attempts: exponential, capped, with full jitter.

use std::time::Duration;

/// An endless iterator of waits. The n-th is drawn evenly between half a millisecond and `first * 2^n`, at most `most`.
///
/// Full jitter spreads the attempts of many daemons best (Marc Brooker, "Exponential Backoff And Jitter", 2015).
///
/// ```
/// use std::time::Duration;
/// use threadkeep::Backoff;
///
/// let waits = Backoff::new(Duration::from_millis(100), Duration::from_secs(30));
/// assert!(waits.take(50).all(|wait| wait <= Duration::from_secs(30)));
/// ```
#[derive(Debug, Clone)]
pub struct Backoff {
    next: Duration,
    most: Duration,
}

impl Backoff {
    /// Waits of up to `first`, then up to twice that, and so on up to `most`.
    pub fn new(first: Duration, most: Duration) -> Self {
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
    fn waits_grow_to_the_bound_and_differ() {
        let bound = Duration::from_secs(2);
        let late: Vec<_> = Backoff::new(Duration::from_millis(1), bound).skip(20).take(200).collect();
        assert!(late.iter().all(|wait| *wait <= bound));
        assert!(late.iter().any(|wait| *wait > bound / 2), "the last waits use the whole span");
        assert!(late.windows(2).any(|pair| pair[0] != pair[1]), "jitter");
        assert!(Backoff::new(Duration::from_millis(4), bound).next() <= Some(Duration::from_millis(4)));
    }
}
