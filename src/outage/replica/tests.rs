use std::time::Duration;

use super::*;
use crate::model::clock::Clock;
use crate::model::json::Json;
use crate::outage::{CopyRank, Enqueued, FileLimits};
use crate::store::Write;

fn issue(clock: &Clock) -> Arc<Record> {
    let (key, value) = (Key::new("k").unwrap(), Some(Json::trusted("1")));
    let expires_at = clock.now().plus(Duration::from_secs(60));
    Arc::new(Record { value, expires_at, ..Record::tombstone(key, clock.issue().version) })
}

#[tokio::test]
async fn save_copies_waits_for_writes_queued_before() {
    let (dir, clock) = (tempfile::tempdir().unwrap(), Arc::new(Clock::new()));
    let limits = FileLimits { queue: 1 << 20, replica: 1 << 20 };
    let path = dir.path().join("q.db");
    let (file, _) = OutageFile::open(&path, "here", limits, Arc::clone(&clock)).await.unwrap();
    let (stored, queued) = (issue(&clock), issue(&clock));
    let (committed, on_committed) = oneshot::channel();
    let (release, hold) = std::sync::mpsc::channel::<()>();
    let on_commit = move |_: &Enqueued| {
        committed.send(()).unwrap();
        hold.recv().ok();
    };
    let write = Write::new(queued).with_writer(file.writer());
    let enqueue = async { file.enqueue(write, false, clock.now(), None, on_commit).await.unwrap() };
    let save = async {
        on_committed.await.unwrap();
        let copy = ReplicaRecord { record: stored, confirmed_at: clock.now(), rank: CopyRank::Used };
        let mut save = std::pin::pin!(file.save_copies(vec![copy]));
        tokio::select! {
            () = &mut save => panic!("the copies returned before the index had the queued write"),
            () = tokio::time::sleep(Duration::from_millis(100)) => {}
        }
        release.send(()).unwrap();
        save.await;
    };
    tokio::join!(enqueue, save);
}
