//! Versions, their timestamps, and the limits that a store and its callers share.

use std::fmt;
use std::time::Duration;

use chrono::{DateTime, Utc};

/// The bits below the milliseconds: a 7-bit counter, then 14 random bits of which the last one is zero. The counter starts at a random value (RFC 9562,
/// section 6.2, method 1). So two daemons that write in one millisecond issue the same version once in a million times.
pub(super) const LOW_BITS: u32 = 21;

/// The random bits below the counter.
pub(super) const RANDOM_BITS: u32 = 14;

/// The limit by which a version may be ahead of the store's clock. A clock error within this limit is no error.
pub const MAX_CLOCK_SKEW: Duration = Duration::from_secs(2);

/// The age limit of a version that a store still accepts. A tombstone lives a day longer (I13).
pub const MAX_WRITE_AGE: Duration = Duration::from_secs(7 * 86_400);

/// The life of a tombstone. It outlives every write that the store still accepts, so no late write undoes a delete (I13).
pub const TOMBSTONE_TTL: Duration = Duration::from_secs(8 * 86_400);

/// A time by the store's clock, in milliseconds since the Unix epoch. Sums and differences saturate.
///
/// ```
/// use std::time::Duration;
/// use threadkeep::store::Timestamp;
///
/// let (early, late) = (Timestamp(1_000), Timestamp(3_000));
/// assert_eq!((early.plus(Duration::from_secs(2)), late.minus(Duration::from_secs(2))), (late, early));
/// assert_eq!((late.since(early), early.since(late)), (Duration::from_secs(2), Duration::ZERO));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// Returns the time `span` later. See [`Timestamp`] for an example.
    pub fn plus(self, span: Duration) -> Self {
        Self(self.0.saturating_add(millis(span)))
    }

    /// Returns the time `span` earlier. See [`Timestamp`] for an example.
    pub fn minus(self, span: Duration) -> Self {
        Self(self.0.saturating_sub(millis(span)))
    }

    /// Returns the time that passed since `earlier`, or zero if `earlier` is later than `self`. See [`Timestamp`] for an example.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<Timestamp> for DateTime<Utc> {
    fn from(at: Timestamp) -> Self {
        Self::from_timestamp_millis(at.0).unwrap_or(Self::MAX_UTC)
    }
}

pub(crate) fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap_or(i64::MAX)
}

/// The version of a record. The record with the greater version is newer (I9).
///
/// ```
/// use threadkeep::store::{Timestamp, Version};
///
/// assert!(Version::from_raw(7) > Version::NONE && Version::from_raw(7).raw() == 7);
/// assert_eq!(Version::min_at(Timestamp(60_000)).at(), Timestamp(60_000));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version(pub(super) i64);

impl Version {
    /// The version of a conversation that never existed.
    pub const NONE: Self = Self(0);

    /// Creates the version from the number that stores keep. See [`Version`] for an example.
    pub const fn from_raw(raw: i64) -> Self {
        Self(raw)
    }

    /// Returns the number that stores keep. See [`Version`] for an example.
    pub const fn raw(self) -> i64 {
        self.0
    }

    /// Returns the time at which a clock issued this version. See [`Version`] for an example.
    pub const fn at(self) -> Timestamp {
        Timestamp(self.0 >> LOW_BITS)
    }

    /// Returns the lowest version that a clock can issue at this time. See [`Version`] for an example.
    pub const fn min_at(at: Timestamp) -> Self {
        Self(at.0 << LOW_BITS)
    }

    pub(crate) const fn shifted(self, millis: i64) -> Self {
        Self(self.0.saturating_add(millis.saturating_mul(1 << LOW_BITS)))
    }

    /// Returns the least version above this one that a clock can issue. Issued versions are even, those that a store makes are odd.
    pub(crate) const fn next_issued(self) -> Self {
        Self(self.0.saturating_add(2) & !1)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}
