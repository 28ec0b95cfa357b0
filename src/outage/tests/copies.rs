//! The order in which the replica evicts copies.

use super::*;
use crate::outage::rows::row_bytes;

/// A replica that is at most half full overwrites copies in their places. From then on, a use renews the place.
#[tokio::test]
async fn copy_used_since_the_half_outlives_older_ones() {
    let dir = tempfile::tempdir().unwrap();
    let clock = Arc::new(Clock::authoritative());
    let copy = |number: u32| ReplicaRecord {
        record: Record::put(
            name(&format!("{number:02}")),
            clock.issue_version(),
            Json::new(format!("{:?}", "x".repeat(1_000))).unwrap(),
            clock.now().plus(HOUR),
        )
        .into(),
        confirmed_at: clock.now(),
        rank: CopyRank::Used,
    };
    let limits = FileLimits { replica: 10 * row_bytes(&copy(0).record), ..LIMITS };
    let path = dir.path().join("q.db");
    let (file, _) = OutageFile::open(&path, "here", limits, Arc::clone(&clock)).await.unwrap();
    // The replica is half full after number 5, and full after number 9. Number 10 takes the place of the oldest one.
    for number in [0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 9, 9, 10] {
        file.save_copies(vec![copy(number)]).await;
    }
    for number in 0..=10 {
        let held = file.lookup_replica(&name(&format!("{number:02}"))).await.unwrap();
        assert_eq!(held.is_some(), number != 1, "copy {number}");
    }
    assert_eq!(file.usage().replica, Usage { records: 10, bytes: limits.replica });
}
