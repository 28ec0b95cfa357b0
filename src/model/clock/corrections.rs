//! Unsynced periods of a clock, and the correction that ended each.

use std::collections::VecDeque;

use crate::model::version::{MAX_CLOCK_SKEW, millis};

/// The limit of remembered corrections. Versions of older periods have long been corrected.
const MAX_CORRECTIONS: usize = 1_024;

/// A period in which the store's clock is unknown. It begins at the start of the process or at a jump of this machine's
/// clocks, and ends with the next answer of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct UnsyncedPeriod(pub(crate) u32);

/// The corrections by the answers that ended the unsynced periods.
#[derive(Debug)]
pub(super) struct Corrections {
    /// The value of `Clock::time_at_zero` in the last unsynced period.
    pub(super) assumed: i64,
    /// The correction of each ended period in milliseconds, oldest first.
    applied: VecDeque<i64>,
    /// The number of corrections that were dropped from the front of `applied`.
    forgotten: u32,
    /// The milliseconds that the monotonic clock had missed by the last jump.
    pub(super) missed: i64,
}

impl Corrections {
    pub(super) fn new(assumed: i64, missed: i64) -> Self {
        Self { assumed, applied: VecDeque::new(), forgotten: 0, missed }
    }

    /// Returns the number of periods that have ended.
    pub(super) fn ended(&self) -> u32 {
        self.forgotten.saturating_add(u32::try_from(self.applied.len()).unwrap_or(u32::MAX))
    }

    /// Returns the correction of a period, or `None` while the period lasts. A forgotten correction counts as zero.
    pub(super) fn of(&self, UnsyncedPeriod(number): UnsyncedPeriod) -> Option<i64> {
        let Some(at) = number.checked_sub(self.forgotten) else { return Some(0) };
        self.applied.get(at as usize).copied()
    }

    /// Ends a period with its correction.
    pub(super) fn add(&mut self, correction_ms: i64) {
        self.applied.push_back(correction_ms);
        // Bounds the memory of a machine whose clock jumps often (I12).
        if self.applied.len() > MAX_CORRECTIONS {
            self.applied.pop_front();
            self.forgotten = self.forgotten.saturating_add(1);
        }
    }
}

/// Returns the part of the `missed` milliseconds that did not pass: all of them, or none.
///
/// `shown` is the time of the store's clock if the missed time has passed, and `system` is the time of the system clock. If the
/// system clock agrees only with `shown - missed`, the step made a wrong system clock right. Then no time passed.
pub(crate) fn not_passed(shown: i64, system: i64, missed: i64) -> i64 {
    let is_off = |by: i64| by.abs() > millis(MAX_CLOCK_SKEW);
    if is_off(shown - system) && !is_off(shown - missed - system) { missed } else { 0 }
}
