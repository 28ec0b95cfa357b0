//! Writes under faults and by several daemons.

use threadkeep::{Cache, ErrorKind, WriteOutcome};

use crate::stack::{Fault, Server};
use crate::{SECOND, builder, daemon, drained, get, key, rejecting, row, shared};

on_each_server!(
    update_with_lost_response_is_applied_once,
    write_with_lost_response_is_recognised_as_stored,
    put_timed_out_after_commit_leaves_memory_equal_to_store,
    late_put_does_not_replace_a_newer_one,
    writes_of_one_daemon_are_visible_to_another,
    concurrent_updates_of_two_daemons_are_all_kept,
);

async fn update_with_lost_response_is_applied_once(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let cache = builder(&gateway).timeout(10 * SECOND).open().await.unwrap();
    let key = key("updates");
    let faults = [Fault::Pass, Fault::Pass, Fault::DropResponse, Fault::Pass, Fault::Truncate];
    gateway.script_for("threadkeep_apply", (0..20).flat_map(|_| faults.clone()));
    append_turns(&[cache], &key, 64).await;
    assert!(gateway.count("threadkeep_apply") > 64 + 20, "the gateway must drop some responses");
}

async fn write_with_lost_response_is_recognised_as_stored(server: Server) {
    let (stack, gateway, _) = shared(server).await;
    let cache = rejecting(&gateway).timeout(2 * SECOND).open().await.unwrap();
    let key = key("lost answer");
    for (value, fault) in [(1, Fault::DropResponse), (2, Fault::Truncate), (3, Fault::HangAfter)] {
        gateway.script_for("threadkeep_apply", [fault]);
        assert_eq!(cache.put(&key, &value).await.unwrap(), WriteOutcome::Stored);
        assert_eq!(row(stack, &key, "conversation_data"), value.to_string());
        assert_eq!(get(&cache, &key).await.unwrap().json(), value.to_string());
    }
}

async fn put_timed_out_after_commit_leaves_memory_equal_to_store(server: Server) {
    let (stack, gateway, queueing) = shared(server).await;
    let cache = rejecting(&gateway).timeout(2 * SECOND).open().await.unwrap();
    let key = key("timed out");
    cache.put(&key, "before").await.unwrap();
    gateway.rule(|seen| if seen.path.contains("apply") { Fault::HangAfter } else { Fault::Pass });
    let error = cache.put(&key, "after").await.unwrap_err();
    assert_eq!((error.kind(), error.outcome_unknown()), (ErrorKind::Unavailable, true), "{error}");
    gateway.clear();
    assert_eq!(row(stack, &key, "conversation_data"), "\"after\"");
    assert_eq!(get(&cache, &key).await.unwrap().json(), "\"after\"");
    // With a queue, the caller gets `Queued` after the soft timeout, and the store applies the write once.
    gateway.rule(|seen| if seen.path.contains("apply") { Fault::HangAfter } else { Fault::Pass });
    assert_eq!(queueing.put(&key, "queued").await.unwrap(), WriteOutcome::Queued);
    gateway.clear();
    drained("a put that timed out", &queueing).await;
    assert_eq!(row(stack, &key, "conversation_data"), "\"queued\"");
}

/// The gateway holds a put back until its client has timed out and stored a newer put.
async fn late_put_does_not_replace_a_newer_one(server: Server) {
    let (stack, gateway, _) = shared(server).await;
    let cache = rejecting(&gateway).timeout(2 * SECOND).open().await.unwrap();
    let key = key("late");
    gateway.script_for("threadkeep_apply", [Fault::Hang, Fault::Hang]);
    assert!(cache.put(&key, "late").await.unwrap_err().outcome_unknown());
    assert_eq!(cache.put(&key, "newer").await.unwrap(), WriteOutcome::Stored);
    let before = gateway.count("threadkeep_apply");
    gateway.release();
    gateway.wait_for_carried_out(before, "threadkeep_apply").await;
    assert_eq!(row(stack, &key, "conversation_data"), "\"newer\"");
    assert_eq!(get(&cache, &key).await.unwrap().json(), "\"newer\"");
}

async fn writes_of_one_daemon_are_visible_to_another(server: Server) {
    let (stack, gateway, one) = shared(server).await;
    let two = daemon(&gateway).await;
    let key = key("two daemons");
    for round in 0..5 {
        one.put(&key, &round).await.unwrap();
        assert_eq!(get(&two, &key).await.unwrap().json(), round.to_string());
    }
    two.remove(&key).await.unwrap();
    assert!(get(&one, &key).await.is_none());
    // A plain delete carries no version, but both daemons observe it.
    one.put(&key, &1).await.unwrap();
    stack.psql(&format!("delete from conversation_threads where thread_id = '{key}'"));
    assert!(get(&one, &key).await.is_none());
    tokio::time::sleep(2 * SECOND + SECOND / 10).await;
    assert!(get(&two, &key).await.is_none());
}

async fn concurrent_updates_of_two_daemons_are_all_kept(server: Server) {
    let (_, gateway, one) = shared(server).await;
    let two = daemon(&gateway).await;
    let key = key("contended");
    append_turns(&[one, two], &key, 40).await;
}

/// Runs `count` concurrent updates of one conversation, through the daemons in turn. Each must be applied once.
async fn append_turns(daemons: &[Cache], key: &str, count: u32) {
    let updates = (0..count).map(|turn| {
        let (cache, key) = (daemons[turn as usize % daemons.len()].clone(), key.to_owned());
        tokio::spawn(async move {
            let append = |turns: Option<Vec<u32>>| Ok(Some([turns.unwrap_or_default(), vec![turn]].concat()));
            cache.update(&key, append).await
        })
    });
    for update in updates.collect::<Vec<_>>() {
        assert_eq!(update.await.unwrap().unwrap(), WriteOutcome::Stored);
    }
    let mut turns: Vec<u32> = get(&daemons[0], key).await.unwrap().decode().unwrap();
    turns.sort_unstable();
    assert_eq!(turns, (0..count).collect::<Vec<_>>());
}
