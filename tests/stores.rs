//! The stores in this process, and what wraps them, keep the contract.

use std::sync::Arc;
use std::time::Duration;

use threadkeep::testing::{Fault, Faulty, conformance};
use threadkeep::{Batched, Guard, Local, Memory};

#[tokio::test]
async fn memory_conforms() {
    conformance(Arc::new(Memory::new())).await;
}

#[tokio::test]
async fn local_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conformance(Arc::new(Local::open(dir.path().join("threads.db")).await.unwrap())).await;
}

#[tokio::test]
async fn a_guarded_store_conforms() {
    conformance(Arc::new(Guard::new(Memory::new(), Duration::from_secs(5)))).await;
}

#[tokio::test]
async fn a_batched_store_conforms() {
    conformance(Arc::new(Batched::new(Memory::new()))).await;
}

#[tokio::test]
async fn a_store_without_faults_conforms() {
    conformance(Arc::new(Faulty::new(Memory::new()))).await;
}

/// One call in three is refused, or carried out without an answer; the guard's retry hides it.
#[tokio::test]
async fn a_guarded_store_with_faults_conforms() {
    let store = Faulty::new(Memory::new());
    let faults = store.faults();
    // No more than the suite's calls one after another: a retry among concurrent calls could meet the next fault.
    faults.script(
        [Fault::Pass, Fault::LoseAnswer, Fault::Pass, Fault::Pass, Fault::Refuse, Fault::Pass].repeat(15),
    );
    conformance(Arc::new(Guard::new(store, Duration::from_secs(5)))).await;
    let calls: usize =
        ["load", "apply", "recent", "touch", "purge", "probe"].map(|name| faults.calls(name)).iter().sum();
    assert!(calls > 15 * 6, "the script ended before the suite");
}
