use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;

use super::{Admission, MemoryCache, Observation};
use crate::cache::read_token::VersionFloors;
use crate::model::clock::Clock;
use crate::model::json::Json;
use crate::model::key::Key;
use crate::model::moment::Moment;
use crate::model::record::Record;
use crate::outage::index::QueueIndex;

fn new_write(key: &Key, clock: &Clock) -> Arc<Record> {
    let expires_at = clock.now().plus(Duration::from_secs(60));
    let tombstone = Record::tombstone(key.clone(), clock.issue().version);
    Arc::new(Record { value: Some(Json::trusted("1")), expires_at, ..tombstone })
}

/// A load finds a queued write in the store. A write of unknown outcome makes the load itself stale.
/// Before the fix, the queued entry stayed in memory without a mark in the index. Each read in an outage
/// then looked 1,000 times for the copy behind the entry.
#[test]
fn memory_stale_load_of_queued_write_leaves_no_leftover() {
    let (clock, floors) = (Arc::new(Clock::authoritative()), VersionFloors::default());
    let key = Key::new("k").unwrap();
    let queue_index = Arc::new(QueueIndex::new(Vec::new(), Arc::clone(&clock)));
    let memory = MemoryCache::new(
        1 << 20,
        None,
        floors.clone(),
        Arc::clone(&queue_index),
        Arc::clone(&clock),
        Counter::noop(),
    );
    let load_token = floors.token();
    let queued = new_write(&key, &clock);
    memory.admit_queued(&queued, &floors.token(), None, clock.now());
    memory.invalidate_below(&key, new_write(&key, &clock).version);
    memory.admit_queued_from_disk(&queued, None);
    assert!(memory.get_queued(&key).is_some(), "memory does not hold the queued write");
    let observation = Observation::Found(Arc::clone(&queued));
    let admission = memory.admit(&key, &load_token, Moment::now(), observation);
    assert!(matches!(admission, Admission::BelowFloor), "{admission:?}");
    assert!(
        memory.get_queued(&key).is_none() && memory.peek(&key).is_none(),
        "memory holds a queued entry that the index does not mark"
    );
    let copy = memory.admit_replica(&floors.token(), queued, Duration::ZERO, true);
    assert!(copy.is_some(), "memory rejects the copy of the replica");
}
