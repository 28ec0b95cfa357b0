//! A moment that OS threads share without a lock.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Acquire, Release};

use super::{Moment, NANOS_PER_MILLI};

/// The bits of the milliseconds: 278 years. The other 21 bits count jumps.
const MILLI_BITS: u32 = 43;
const MAX_MILLIS: u64 = (1 << MILLI_BITS) - 1;
const MAX_JUMPS: u32 = (1 << (u64::BITS - MILLI_BITS)) - 1;

/// A moment in one word, rounded down to a millisecond.
#[derive(Debug, Default)]
pub(crate) struct AtomicMoment(AtomicU64);

impl AtomicMoment {
    /// Creates a moment that never comes.
    pub(crate) const fn never() -> Self {
        Self(AtomicU64::new(u64::MAX))
    }

    pub(crate) fn store(&self, moment: Moment) {
        let millis = u64::try_from(moment.millis()).unwrap_or(0).min(MAX_MILLIS);
        // Beyond the last number of jumps, the moment compares with no other one. So no value is fresh because of it.
        let jumps = moment.jumps.min(MAX_JUMPS);
        self.0.store(u64::from(jumps) << MILLI_BITS | millis, Release);
    }

    pub(crate) fn load(&self) -> Moment {
        let word = self.0.load(Acquire);
        let nanos = i64::try_from(word & MAX_MILLIS).unwrap_or(i64::MAX).saturating_mul(NANOS_PER_MILLI);
        Moment { nanos, jumps: u32::try_from(word >> MILLI_BITS).unwrap_or(u32::MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn atomic_moment_rounds_down_and_keeps_jumps() {
        let moment = AtomicMoment::never();
        let a_year = Moment { nanos: 365 * 86_400_000 * NANOS_PER_MILLI, jumps: 0 };
        assert!(moment.load() > a_year);
        for (nanos, rounded, jumps) in
            [(1_999_999, 1_000_000, 7), (-5, 0, 0), (3_000_000, 3_000_000, MAX_JUMPS)]
        {
            moment.store(Moment { nanos, jumps });
            assert_eq!(moment.load(), Moment { nanos: rounded, jumps });
        }
        moment.store(Moment { nanos: 0, jumps: u32::MAX });
        assert!(!moment.load().is_comparable_to(Moment { nanos: 0, jumps: u32::MAX }));
    }
}
