//! The identity of a writer.

use std::fmt;

/// The bits below the daemon's part of a writer id.
const OPENING_BITS: u32 = 24;
/// The bits of the daemon's part. The whole id stays positive in 64 bits.
const DAEMON_BITS: u32 = 39;

/// The identity of one opening of a daemon's outage file (KIP-98 calls it producer id and epoch).
///
/// The upper part is the same for all openings of the file on one boot of one machine. The lower part is random for each
/// opening, so that versions rise within one writer. If the versions fall with the store's clock, both parts are new.
///
/// ```
/// use threadkeep::store::WriterId;
///
/// assert!(WriterId::random().daemon() > 0 && WriterId::NONE.daemon() == 0);
/// assert_eq!(WriterId::from_raw(7).raw(), 7);
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WriterId(i64);

impl WriterId {
    /// The writer of plain SQL statements.
    pub const NONE: Self = Self(0);

    /// Draws the id of a daemon without an outage file, or with a new one. See [`WriterId`] for an example.
    pub fn random() -> Self {
        Self::draw(&mut fastrand::Rng::new())
    }

    fn draw(rng: &mut fastrand::Rng) -> Self {
        Self(random(DAEMON_BITS, rng) << OPENING_BITS | random(OPENING_BITS, rng))
    }

    /// Draws the id of a further opening by the same daemon.
    pub(crate) fn next_opening(self) -> Self {
        Self(self.daemon() << OPENING_BITS | random(OPENING_BITS, &mut fastrand::Rng::new()))
    }

    /// Returns the id for an era of the clock. Each era but the first has a daemon's part of its own, so the store never compares
    /// the versions of two eras as those of one daemon.
    pub(crate) fn in_era(self, era: u32) -> Self {
        if era == 0 {
            return self;
        }
        Self::draw(&mut fastrand::Rng::with_seed(self.0.unsigned_abs().wrapping_add(u64::from(era))))
    }

    /// Creates the id from the number that stores keep. See [`WriterId`] for an example.
    pub const fn from_raw(raw: i64) -> Self {
        Self(raw)
    }

    /// Returns the number that stores keep. See [`WriterId`] for an example.
    pub const fn raw(self) -> i64 {
        self.0
    }

    /// Returns the daemon's part. It is zero for plain SQL. See [`WriterId`] for an example.
    pub const fn daemon(self) -> i64 {
        self.0 >> OPENING_BITS
    }
}

impl fmt::Display for WriterId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns a random number above zero with at most `bits` bits.
fn random(bits: u32, rng: &mut fastrand::Rng) -> i64 {
    rng.i64(1..1 << bits)
}
