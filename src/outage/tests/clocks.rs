//! Clock sync, and the mark after a jump.

use futures::FutureExt;

use super::*;

#[tokio::test]
async fn clock_sync_corrects_all_rows_in_one_step() {
    for skew in [-300_000, 300_000] {
        let dir = tempfile::tempdir().unwrap();
        let world = World::open(&dir.path().join("q.db"), Clock::skewed(skew)).await;
        let put = world.queue("k", "1", None).await;
        let update = world.queue("k", "2", Some(put)).await;
        assert!(world.rows().await.iter().all(|row| row.is_provisional));
        world.sync().await;
        let (rows, now) = (world.rows().await, Clock::authoritative().now());
        assert_eq!(rows[1].write.condition, Condition::IfVersion(rows[0].version()), "{skew}");
        assert!(rows[0].version() < rows[1].version() && rows[1].version() < world.clock.issue_version());
        for (row, issued) in rows.iter().zip([put, update]) {
            assert!(!row.is_provisional && row.version() != issued);
            assert!(
                now.since(row.version().at()) < Duration::from_secs(5) && row.version().at() <= now,
                "{skew}"
            );
            let left = row.write.record.expires_at.since(now);
            assert!(left <= HOUR && left > HOUR - Duration::from_secs(5), "{skew}: {left:?}");
        }
        assert_eq!(world.seen.take(), ["k corrected", "k corrected"]);
        let store = Arc::new(Memory::new());
        world.replay(&store).await;
        assert_eq!(stored(&store, "k").await.as_deref(), Some("2"));
    }
}

/// The second process has another wrong clock, and no checkpoint of a synced clock.
#[tokio::test]
async fn provisional_rows_of_an_earlier_process_get_the_right_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.db");
    let world = World::open(&path, Clock::skewed(-300_000)).await;
    world.queue("k", "1", None).await;
    world.file.close().await.unwrap();
    let world = World::open(&path, Clock::skewed(120_000)).await;
    let first = world.rows().await.remove(0);
    world.queue("k", "2", Some(first.version())).await;
    world.sync().await;
    let (rows, now) = (world.rows().await, Clock::authoritative().now());
    assert_eq!(rows[1].write.condition, Condition::IfVersion(rows[0].version()));
    assert!(
        rows.iter()
            .all(|row| now.since(row.version().at()) < Duration::from_secs(5) && row.version().at() <= now)
    );
}

/// The mark pushes the rows of the second process ahead of its slow clock. The third process has the right clock.
#[tokio::test]
async fn pushed_rows_of_an_earlier_process_push_no_later_version_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q.db");
    let world = World::open(&path, Clock::new()).await;
    world.file.raise_mark(world.clock.issue_version()).await.unwrap();
    world.file.close().await.unwrap();
    let world = World::open(&path, Clock::skewed(-4_000)).await;
    let first = world.queue("k", "1", None).await;
    world.queue("k", "2", Some(first)).await;
    world.file.close().await.unwrap();
    let world = World::open(&path, Clock::new()).await;
    world.sync().await;
    let (rows, next) = (world.rows().await, world.clock.issue_version());
    assert_eq!(rows[1].write.condition, Condition::IfVersion(rows[0].version()));
    assert!(rows[0].version() < rows[1].version() && rows[1].version() < next);
    assert!(next.at() < world.clock.now().plus(Duration::from_secs(1)), "{next}");
}

#[tokio::test]
async fn clock_sync_waits_for_a_version_on_its_way_into_the_queue() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::skewed(300_000)).await;
    let no_sync = world.file.hold_clock_sync().await;
    let issued = world.clock.issue();
    let now = Instant::now();
    world.clock.correct(now, now, Clock::authoritative().now());
    while world.file.sync_gate.try_read().is_ok() {
        tokio::task::yield_now().await;
    }
    assert!(world.clock.settled().now_or_never().is_none());
    let record = Record::tombstone(name("k"), issued.version);
    world.file.enqueue(Write::new(record), issued.is_provisional, issued.shown, None, |_| {}).await.unwrap();
    drop(no_sync);
    assert!(world.clock.settled().await);
    let row = world.rows().await.remove(0);
    assert!(!row.is_provisional && row.version() < issued.version && world.seen.take() == ["k corrected"]);
}

#[tokio::test]
async fn mark_of_a_version_from_before_a_jump_is_not_ahead() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::new()).await;
    world.sync().await;
    let sent = world.clock.issue_version();
    test_clock::step(300_000);
    world.file.raise_mark(sent).await.unwrap();
    world.queue("k", "1", None).await;
    world.sync_to(sent.at()).await;
    let version = world.rows().await[0].version();
    assert!(
        version > sent && version.at() < sent.at().plus(Duration::from_secs(2)),
        "{version} after {sent}"
    );
}

#[tokio::test]
async fn row_of_a_clock_that_was_set_stays_above_earlier_versions() {
    let dir = tempfile::tempdir().unwrap();
    let world = World::open(&dir.path().join("q.db"), Clock::new()).await;
    world.sync().await;
    let before = world.clock.issue_version();
    test_clock::step(300_000);
    world.queue("k", "1", None).await;
    test_clock::step(300_000);
    world.sync_to(before.at()).await;
    assert!(world.rows().await[0].version() > before);
}
