//! Wrong keys, wrong places, missing migrations: each gets a message that tells what to do, and no secret shows.

use std::io::Write;
use std::sync::{Arc, Mutex, OnceLock};

use threadkeep::{Cache, Error, ErrorKind};

use crate::stack::{Fault, Server, Stack};
use crate::{SECOND, builder, key, shared};

on_both_servers!(keys_that_are_refused, missing_migrations, wrong_places, no_secret_shows);

async fn refused(url: &str, key: &str) -> Error {
    Cache::builder().supabase(url, key).timeout(3 * SECOND).open().await.unwrap_err()
}

fn assert_says(error: &Error, kind: ErrorKind, words: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

async fn keys_that_are_refused(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let keys = gateway.keys();
    let wrong = refused(&gateway.url(), "sb_secret_of_another_project").await;
    assert_says(&wrong, ErrorKind::Denied, &["Invalid API key", "SUPABASE_KEY", "this project's secret"]);
    let forged = format!("{}x", keys.service_jwt);
    assert_says(&refused(&gateway.url(), &forged).await, ErrorKind::Denied, &["SUPABASE_KEY"]);
    // Lite knows no roles, so only its keys can be wrong.
    if server == Server::Postrust {
        for public in [&keys.anon_jwt, &keys.publishable] {
            let error = refused(&gateway.url(), public).await;
            assert_says(&error, ErrorKind::Denied, &["anon", "public", "secret (service_role) key instead"]);
        }
    }
    // Denied later is no outage: it does not open the breaker.
    let cache = builder(&gateway).open().await.unwrap();
    gateway.rotate_secret();
    for _ in 0..20 {
        let error = cache.put(key("denied"), "1").await.unwrap_err();
        assert_says(&error, ErrorKind::Denied, &["SUPABASE_KEY"]);
    }
    assert_eq!(cache.health().breaker, Some(threadkeep::State::Closed));
    let health = cache.health();
    assert!(
        !health.is_available() && health.cause.unwrap().kind() == ErrorKind::Denied,
        "an operator has to know"
    );
}

async fn missing_migrations(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start_without_migrations(server)).await.unwrap();
    let gateway = stack.gateway().await;
    let error = refused(&gateway.url(), &gateway.keys().secret).await;
    assert_says(&error, ErrorKind::Schema, &["apply the migrations", "supabase db push", "psql"]);
}

async fn wrong_places(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let keys = gateway.keys();
    let error = refused(&format!("{}/somewhere/else", gateway.url()), &keys.secret).await;
    assert_says(&error, ErrorKind::Refused, &["SUPABASE_URL", "404", "https://PROJECT.supabase.co"]);
    // With the path of the REST API it is the same place.
    let with_path = Cache::builder().supabase(&format!("{}/rest/v1/", gateway.url()), &keys.secret);
    with_path.open().await.unwrap();
    for unreachable in ["http://127.0.0.1:1", "http://no-such-host.invalid"] {
        let cache = Cache::builder().supabase(unreachable, &keys.secret).open().await.unwrap();
        let error = cache.put("t", "1").await.unwrap_err();
        assert_says(
            &error,
            ErrorKind::Unavailable,
            &["cannot be reached", unreachable.strip_prefix("http://").unwrap()],
        );
        assert!(!error.outcome_unknown());
    }
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// Work goes on in many threads, so the log is the process's.
    fn of_the_process() -> &'static Self {
        static LOG: OnceLock<Log> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Self::default();
            let writer = log.clone();
            let filter = "threadkeep=trace,reqwest=trace,hyper=trace,hyper_util=trace,h2=trace";
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || writer.clone()).init();
            log
        })
    }
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn all_of(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(" {error} {error:?}");
        cause = error.source();
    }
    text
}

async fn no_secret_shows(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let log = Log::of_the_process();
    let keys = gateway.keys();
    let content = "the content of a conversation";
    let mut shown = String::new();
    for secret in [&keys.secret, &keys.service_jwt] {
        let setup = Cache::builder()
            .supabase(&gateway.url(), secret)
            .timeout(SECOND / 5)
            .fresh_for(std::time::Duration::ZERO);
        shown += &format!("{setup:?}");
        let cache = setup.open().await.unwrap();
        let key = key("secret");
        let _ = cache.put(&key, content).await.unwrap();
        for fault in [
            Fault::html(522),
            Fault::json_error(403, "42501"),
            Fault::json_error(400, "22P05"),
            Fault::Hang,
            Fault::Reset,
        ] {
            gateway.always(fault);
            shown += &all_of(&cache.put(&key, content).await.unwrap_err());
            shown += &format!("{:?} {cache:?}", cache.get(&key).await);
            shown += &format!("{:?}", cache.health());
        }
        gateway.heal();
    }
    for bad in ["http://user:hunter2@localhost", "sb_secret_as_url", "ftp://secret"] {
        let settings = [
            ("SUPABASE_URL", bad),
            ("SUPABASE_KEY", "sb_secret_\u{7}"),
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ];
        let vars = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        shown += &all_of(&threadkeep::Builder::from_vars(vars).open().await.unwrap_err());
    }
    shown += &String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    assert!(shown.contains("circuit breaker opened"), "the log was collected");
    let body = keys.service_jwt.split('.').nth(2).unwrap();
    for secret in
        [&*keys.secret, &keys.service_jwt, body, "hunter2", "sb_secret_as_url", content, "sb_secret_\u{7}"]
    {
        assert!(!shown.contains(secret), "{secret:?} shows in {shown}");
    }
}
