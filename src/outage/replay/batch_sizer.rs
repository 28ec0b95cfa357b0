//! The size of replay's batches.

use std::time::Duration;

/// The number of records of the first batch, and of the smallest one.
pub(super) const MIN_BATCH_RECORDS: usize = 32;
const MAX_BATCH_RECORDS: usize = 500;
/// The number of batches after which the shortest time is measured again. The round trip may have become longer.
const RECALIBRATE_EVERY: u32 = 64;

/// Chooses the number of records in a batch.
///
/// Batches are large if the round trip takes most of the time. They are small if the database does, so that live traffic waits
/// for little. The shortest time so far tells the two apart, as in TCP Vegas (Brakmo, O'Malley, and Peterson, "TCP Vegas: New
/// Techniques for Congestion Detection and Avoidance", 1994). The size doubles until a batch takes half as long again as the
/// shortest one. Then the size halves.
#[derive(Debug)]
pub(super) struct BatchSizer {
    records: usize,
    shortest: Duration,
    calls: u32,
}

impl Default for BatchSizer {
    fn default() -> Self {
        Self { records: MIN_BATCH_RECORDS, shortest: Duration::MAX, calls: 0 }
    }
}

impl BatchSizer {
    pub(super) fn records(&self) -> usize {
        self.records
    }

    /// Records the time that a batch took.
    pub(super) fn record(&mut self, took: Duration) {
        self.calls += 1;
        if self.calls == RECALIBRATE_EVERY {
            *self = Self::default();
            return;
        }
        self.shortest = self.shortest.min(took);
        let is_longer = took > self.shortest * 3 / 2;
        let records = if is_longer { self.records / 2 } else { self.records * 2 };
        self.records = records.clamp(MIN_BATCH_RECORDS, MAX_BATCH_RECORDS);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes of batches that take `round_trip`, and `per_record` for each record.
    fn sizes(round_trip: Duration, per_record: Duration) -> impl Iterator<Item = usize> {
        let mut sizer = BatchSizer::default();
        std::iter::from_fn(move || {
            let records = sizer.records;
            sizer.record(round_trip + per_record * u32::try_from(records).ok()?);
            Some(records)
        })
    }

    #[test]
    fn sizer_long_round_trip_makes_large_batches() {
        let far = sizes(Duration::from_millis(50), Duration::from_micros(30));
        assert_eq!(far.take(6).collect::<Vec<_>>(), [32, 64, 128, 256, 500, 500]);
    }

    #[test]
    fn sizer_longer_round_trip_is_measured_again() {
        let mut sizer = BatchSizer::default();
        (0..20).for_each(|_| sizer.record(Duration::from_millis(40)));
        (0..100).for_each(|_| sizer.record(Duration::from_millis(100)));
        assert_eq!(sizer.records, MAX_BATCH_RECORDS, "a longer round trip does not make batches small");
    }

    #[test]
    fn sizer_slow_database_makes_small_batches() {
        let slow: Vec<_> = sizes(Duration::from_millis(1), Duration::from_micros(300)).take(40).collect();
        assert!(slow.iter().all(|records| *records <= 2 * MIN_BATCH_RECORDS), "{slow:?}");
    }
}
