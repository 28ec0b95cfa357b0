//! The log of a daemon: spans for slow calls, and one line for each event that an operator needs.
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore, Faults};
use threadkeep::{BreakerState, Cache, WriteOutcome};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Collects the opened spans, each with its parents, and the events.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Captured>>);

#[derive(Debug, Default)]
struct Captured {
    spans: Vec<String>,
    events: Vec<(Level, String)>,
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn on_new_span(&self, _: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let scope = context.span_scope(id).into_iter().flatten();
        let ours = scope.filter(|span| span.metadata().target().starts_with("threadkeep"));
        let names: Vec<&str> = ours.map(|span| span.name()).collect();
        if !names.is_empty() {
            self.0.lock().unwrap().spans.push(names.join(" in "));
        }
    }

    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        if event.metadata().target().starts_with("threadkeep") {
            let mut text = String::new();
            event.record(&mut |field: &tracing::field::Field, value: &dyn std::fmt::Debug| {
                text += &format!("{field}={value:?} ");
            });
            self.0.lock().unwrap().events.push((*event.metadata().level(), text));
        }
    }
}

impl Log {
    fn start() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::registry().with(log.clone());
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn spans(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().spans)
    }

    /// Takes the events of this level and of graver levels.
    fn events(&self, level: Level) -> Vec<String> {
        let events = std::mem::take(&mut self.0.lock().unwrap().events);
        events.into_iter().filter(|(at, _)| *at <= level).map(|(_, text)| text).collect()
    }
}

async fn open(directory: &std::path::Path) -> (Cache, Faults) {
    let faulty = FaultStore::new(Memory::new());
    let faults = faulty.faults();
    let builder = Cache::builder().store(ResilientStore::new(faulty, Duration::from_millis(200)));
    (
        builder.queue(directory.join("queue.db")).fresh_for(Duration::from_secs(60)).open().await.unwrap(),
        faults,
    )
}

async fn wait_for_state(cache: &Cache, state: BreakerState) {
    for _ in 0..2_000 {
        if cache.health().breaker == Some(state)
            && (state == BreakerState::Open || cache.health().queue.unwrap().records == 0)
        {
            return;
        }
        let _ = cache.get("unknown").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("timed out: the breaker becomes {state:?}: {:?}", cache.health());
}

#[tokio::test]
async fn calls_have_spans_except_hits() {
    let (log, _guard) = Log::start();
    let directory = tempfile::tempdir().unwrap();
    let (cache, _) = open(directory.path()).await;
    log.spans();
    cache.put("thread", "value").await.unwrap();
    assert_eq!(log.spans(), ["put", "store in put"]);
    cache.get("thread").await.unwrap().unwrap();
    assert_eq!(log.spans(), Vec::<String>::new(), "a hit opens no span");
    cache.evict("thread").unwrap();
    cache.get("thread").await.unwrap().unwrap();
    assert_eq!(log.spans(), ["get", "store in get"]);
    cache.update("thread", |now: Option<String>| Ok(now)).await.unwrap();
    assert_eq!(log.spans(), ["update", "store in update"]);
    cache.remove("thread").await.unwrap();
    assert_eq!(log.spans(), ["remove", "store in remove"]);
}

#[tokio::test]
async fn outage_logs_one_line_at_its_start_and_one_at_its_end() {
    let (log, _guard) = Log::start();
    let directory = tempfile::tempdir().unwrap();
    let (cache, faults) = open(directory.path()).await;
    log.events(Level::TRACE);
    faults.always(Fault::Refuse);
    wait_for_state(&cache, BreakerState::Open).await;
    for _ in 0..1_000 {
        cache.get("unknown").await.unwrap_err();
    }
    assert_eq!(cache.put("thread", "the value").await.unwrap(), WriteOutcome::Queued);
    let start = log.events(Level::INFO);
    let opened = start.iter().filter(|line| line.contains("circuit breaker opened"));
    assert_eq!(opened.count(), 1, "{start:?}");
    assert!(start.len() <= 2, "only the breaker and the first queued write are logged: {start:?}");
    log.spans();
    faults.clear();
    wait_for_state(&cache, BreakerState::Closed).await;
    assert!(log.spans().iter().any(|span| span == "store in replay"), "replay has a span");
    let end = log.events(Level::TRACE);
    assert_eq!(end.iter().filter(|line| line.contains("circuit breaker closed")).count(), 1, "{end:?}");
    assert!(
        end.iter().all(|line| !line.contains("the value")),
        "the log shows the text of a conversation: {end:?}"
    );
}
