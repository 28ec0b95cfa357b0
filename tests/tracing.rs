//! What a daemon's log gets to see: spans for what may take long, one line for each thing that an operator should know.
#![cfg(feature = "sqlite")]
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use threadkeep::testing::{Fault, Faults, Faulty};
use threadkeep::{Cache, Durability, Guard, Memory, State};
use tracing::span::{Attributes, Id};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// Which spans were opened, each with those around it, and which events came.
#[derive(Debug, Clone, Default)]
struct Log(Arc<Mutex<Seen>>);

#[derive(Debug, Default)]
struct Seen {
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
    fn begin() -> (Self, tracing::subscriber::DefaultGuard) {
        let log = Self::default();
        let subscriber = tracing_subscriber::registry().with(log.clone());
        (log, tracing::subscriber::set_default(subscriber))
    }

    fn spans(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap().spans)
    }

    /// What came at this level or a graver one.
    fn events(&self, level: Level) -> Vec<String> {
        let events = std::mem::take(&mut self.0.lock().unwrap().events);
        events.into_iter().filter(|(at, _)| *at <= level).map(|(_, text)| text).collect()
    }
}

async fn open(directory: &std::path::Path) -> (Cache, Faults) {
    let faulty = Faulty::new(Memory::new());
    let faults = faulty.faults();
    let builder = Cache::builder().store(Guard::new(faulty, Duration::from_millis(200)));
    (
        builder.queue(directory.join("queue.db")).fresh_for(Duration::from_secs(60)).open().await.unwrap(),
        faults,
    )
}

async fn becomes(cache: &Cache, state: State) {
    for _ in 0..2_000 {
        if cache.health().breaker == Some(state)
            && (state == State::Open || cache.health().queue.unwrap().records == 0)
        {
            return;
        }
        let _ = cache.get("nobody has this id").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it does not become {state:?}: {:?}", cache.health());
}

#[tokio::test]
async fn calls_and_what_they_cause_have_spans_and_a_hit_has_none() {
    let (log, _guard) = Log::begin();
    let directory = tempfile::tempdir().unwrap();
    let (cache, _) = open(directory.path()).await;
    log.spans();
    let _ = cache.put("thread", "value").await.unwrap();
    assert_eq!(log.spans(), ["put", "origin in put"]);
    cache.get("thread").await.unwrap().unwrap();
    assert_eq!(log.spans(), Vec::<String>::new(), "a hit");
    cache.evict("thread").unwrap();
    cache.get("thread").await.unwrap().unwrap();
    assert_eq!(log.spans(), ["get", "origin in get"]);
    let _ = cache.update("thread", |now: Option<String>| Ok(now)).await.unwrap();
    assert_eq!(log.spans(), ["update", "origin in update"]);
    let _ = cache.remove("thread").await.unwrap();
    assert_eq!(log.spans(), ["remove", "origin in remove"]);
}

#[tokio::test]
async fn an_outage_is_a_line_at_its_begin_and_at_its_end_whatever_is_refused_meanwhile() {
    let (log, _guard) = Log::begin();
    let directory = tempfile::tempdir().unwrap();
    let (cache, faults) = open(directory.path()).await;
    log.events(Level::TRACE);
    faults.always(Fault::Refuse);
    becomes(&cache, State::Open).await;
    for _ in 0..1_000 {
        cache.get("nobody has this id").await.unwrap_err();
    }
    assert_eq!(cache.put("thread", "the value").await.unwrap(), Durability::Queued);
    let begin = log.events(Level::INFO);
    let opened = begin.iter().filter(|line| line.contains("circuit breaker opened"));
    assert_eq!(opened.count(), 1, "{begin:?}");
    assert!(begin.len() <= 2, "the breaker, and that writes wait: {begin:?}");
    log.spans();
    faults.heal();
    becomes(&cache, State::Closed).await;
    assert!(log.spans().iter().any(|span| span == "origin in replay"), "replay has a span");
    let end = log.events(Level::TRACE);
    assert_eq!(end.iter().filter(|line| line.contains("circuit breaker closed")).count(), 1, "{end:?}");
    assert!(end.iter().all(|line| !line.contains("the value")), "a conversation shows: {end:?}");
}
