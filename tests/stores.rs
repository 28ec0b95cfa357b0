//! The stores of this process and their wrappers pass the conformance suite.

use std::sync::Arc;
use std::time::Duration;

use threadkeep::store::{BatchingStore, Local, Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, conformance};

#[tokio::test]
async fn memory_store_conforms() {
    conformance(Arc::new(Memory::new())).await;
}

#[tokio::test]
async fn local_store_conforms() {
    let dir = tempfile::tempdir().unwrap();
    conformance(Arc::new(Local::open(dir.path().join("threads.db")).await.unwrap())).await;
}

#[tokio::test]
async fn resilient_store_conforms() {
    conformance(Arc::new(ResilientStore::new(Memory::new(), Duration::from_secs(5)))).await;
}

#[tokio::test]
async fn batching_store_conforms() {
    conformance(Arc::new(BatchingStore::new(Memory::new()))).await;
}

#[tokio::test]
async fn fault_store_without_faults_conforms() {
    conformance(Arc::new(FaultStore::new(Memory::new()))).await;
}

/// One call in three fails: its request is refused, or its response is lost. The retry of `ResilientStore` hides the failure.
#[tokio::test]
async fn resilient_store_with_faults_conforms() {
    let store = FaultStore::new(Memory::new());
    let faults = store.faults();
    // The script covers only the sequential calls of the suite. A retry among concurrent calls could meet the next fault.
    faults.script(
        [Fault::Pass, Fault::DropResponse, Fault::Pass, Fault::Pass, Fault::Refuse, Fault::Pass].repeat(15),
    );
    conformance(Arc::new(ResilientStore::new(store, Duration::from_secs(5)))).await;
    let calls: usize =
        ["load", "apply", "list", "touch", "purge", "probe"].map(|name| faults.calls(name)).iter().sum();
    assert!(calls > 15 * 6, "the suite made fewer calls than the script has faults");
}
