//! Wrong keys, wrong places, missing migrations: each gets a message that tells what to do, and no secret shows.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use threadkeep::{BreakerState, Builder, Cache, Error, ErrorKind, Freshness, OnOutage};

use crate::stack::{Fault, Gateway, Keys, Server, Stack};
use crate::{SECOND, eventually, get, key, queue_path, rejecting, shared};

on_each_server!(
    keys_that_are_refused,
    requests_in_flight_outlive_a_rotation,
    a_rotation_goes_unnoticed_under_traffic,
    a_key_file_that_is_late_or_junk_heals,
    a_key_in_dotenv_is_read_again,
    the_first_of_several_keys_is_used,
    a_source_of_the_embedder_is_asked,
    missing_migrations,
    wrong_places,
    no_secret_shows,
);

async fn refused(url: &str, key: &str) -> Error {
    Cache::builder().supabase(url, key).queue(queue_path()).timeout(3 * SECOND).open().await.unwrap_err()
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
    assert_says(
        &wrong,
        ErrorKind::Unauthorized,
        &["Invalid API key", "SUPABASE_KEY", "this project's secret"],
    );
    let forged = format!("{}x", keys.service_jwt);
    assert_says(&refused(&gateway.url(), &forged).await, ErrorKind::Unauthorized, &["SUPABASE_KEY"]);
    // Lite knows no roles, so only its keys can be wrong.
    if server != Server::Lite {
        for public in [&keys.anon_jwt, &keys.publishable] {
            let error = refused(&gateway.url(), public).await;
            assert_says(
                &error,
                ErrorKind::Unauthorized,
                &["anon", "public", "secret (service_role) key instead"],
            );
        }
    }
    // Denied later is no outage: it does not open the breaker.
    let cache = rejecting(&gateway).open().await.unwrap();
    gateway.rotate_secret();
    for _ in 0..20 {
        let error = cache.put(key("denied"), "1").await.unwrap_err();
        assert_says(&error, ErrorKind::Unauthorized, &["SUPABASE_KEY"]);
    }
    assert_eq!(cache.health().breaker, Some(threadkeep::BreakerState::Closed));
    let health = cache.health();
    assert!(
        !health.is_available() && health.cause.unwrap().kind() == ErrorKind::Unauthorized,
        "an operator has to know"
    );
}

/// Returns the settings of a daemon with its key in a separate file.
fn with_key_file(gateway: &Gateway, file: &Path) -> Builder {
    let settings = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &gateway.url()),
        ("SUPABASE_KEY_FILE", file.to_str().unwrap()),
        ("CONVERSATION_FRESH_SECONDS", "0"),
        ("CONVERSATION_WARMUP_LIMIT", "0"),
    ];
    Builder::from_vars(settings.map(|(name, value)| (name.to_owned(), value.to_owned())))
        .queue(queue_path())
        .on_outage(OnOutage::Reject)
}

/// A daemon with its key in a file, and the folder that the file is in.
async fn daemon_with_key_file(gateway: &Gateway) -> (Cache, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    write_key(&folder, gateway.keys().secret);
    (with_key_file(gateway, &folder.path().join("key")).open().await.unwrap(), folder)
}

fn write_key(folder: &tempfile::TempDir, content: impl AsRef<[u8]>) {
    std::fs::write(folder.path().join("key"), content).unwrap();
}

/// The key after the next rotation, which an operator knows before the old one ends.
fn next_key() -> String {
    Keys::new(1).secret
}

async fn requests_in_flight_outlive_a_rotation(server: Server) {
    let (_, gateway, before) = shared(server).await;
    let keys: Vec<String> = (0..8).map(|_| key("in flight")).collect();
    for key in &keys {
        before.put(key, "before").await.unwrap();
    }
    let (cache, folder) = daemon_with_key_file(&gateway).await;
    gateway.forget();
    gateway.always(Fault::Hang);
    let calls = keys.iter().cloned().enumerate().map(|(at, key)| {
        let cache = cache.clone();
        tokio::spawn(async move {
            if at % 2 == 0 {
                cache.put(&key, "after").await.unwrap();
            } else {
                assert_eq!(get(&cache, &key).await.unwrap().freshness(), Freshness::Fresh);
            }
        })
    });
    let calls: Vec<_> = calls.collect();
    gateway.wait_for(keys.len(), "").await;
    write_key(&folder, format!("{}\n", next_key()));
    assert_eq!(gateway.rotate_secret(), next_key());
    gateway.clear();
    for call in calls {
        call.await.unwrap();
    }
    assert_eq!(gateway.count("threadkeep_apply"), 8, "each write was sent twice");
    assert_eq!(gateway.count("threadkeep_load"), 8, "each read was sent twice");
    // No request is refused from now on.
    gateway.forget();
    for key in keys.iter().step_by(2) {
        assert_eq!(get(&cache, key).await.unwrap().json(), "\"after\"");
    }
    assert_eq!(gateway.count("threadkeep_load"), 4);
}

async fn a_rotation_goes_unnoticed_under_traffic(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let (cache, folder) = daemon_with_key_file(&gateway).await;
    let is_over = Arc::new(AtomicBool::new(false));
    let workers = (0..6).map(|_| {
        let (cache, key, is_over) = (cache.clone(), key("traffic"), Arc::clone(&is_over));
        tokio::spawn(async move {
            for turn in 0_u32.. {
                cache.put(&key, &turn).await.unwrap();
                let found = get(&cache, &key).await.unwrap();
                assert_eq!((found.decode::<u32>().unwrap(), found.freshness()), (turn, Freshness::Fresh));
                if is_over.load(Ordering::SeqCst) {
                    break;
                }
            }
        })
    });
    let workers: Vec<_> = workers.collect();
    gateway.wait_for(50, "threadkeep_apply").await;
    write_key(&folder, next_key());
    gateway.rotate_secret();
    gateway.wait_for(gateway.count("threadkeep_apply") + 50, "threadkeep_apply").await;
    is_over.store(true, Ordering::SeqCst);
    for worker in workers {
        worker.await.unwrap();
    }
    assert_eq!(cache.health().breaker, Some(BreakerState::Closed));
    assert!(cache.health().is_available());
}

async fn a_key_file_that_is_late_or_junk_heals(server: Server) {
    let log = Log::of_the_process();
    let (_, gateway, _) = shared(server).await;
    let (cache, folder) = daemon_with_key_file(&gateway).await;
    let key = key("late");
    cache.put(&key, "before").await.unwrap();
    gateway.rotate_secret();
    let denied = async || {
        let error = cache.put(&key, "during").await.unwrap_err();
        assert_says(&error, ErrorKind::Unauthorized, &["SUPABASE_KEY", "Invalid API key"]);
        assert!(matches!(get(&cache, &key).await.unwrap().freshness(), Freshness::Stale { .. }));
    };
    for _ in 0..10 {
        denied().await;
    }
    let junk: [(Option<&[u8]>, &str); 3] = [
        (Some(b""), "the old one stays: it is empty"),
        (Some(b"\x7fELF\xff\0"), "the old one stays: it has characters that no key has"),
        (None, "SUPABASE_KEY_FILE names a file that cannot be read"),
    ];
    for (content, warning) in junk {
        match content {
            Some(content) => write_key(&folder, content),
            None => std::fs::remove_file(folder.path().join("key")).unwrap(),
        }
        let told = log.text().matches(warning).count();
        eventually(warning, async || {
            denied().await;
            log.text().matches(warning).count() > told
        })
        .await;
    }
    write_key(&folder, format!("  {}\r\n\n", next_key()));
    eventually("the key is taken", async || cache.put(&key, "after").await.is_ok()).await;
    assert_eq!(get(&cache, &key).await.unwrap().freshness(), Freshness::Fresh);
    assert!(cache.health().is_available());
}

async fn a_key_in_dotenv_is_read_again(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join(".env");
    let write = |name: &str, key: &str| {
        let (backend, url) = ("CONVERSATION_STORAGE_BACKEND=supabase", gateway.url());
        std::fs::write(&file, format!("{backend}\nSUPABASE_URL={url}\n{name}='{key}' # secret\n")).unwrap();
    };
    for name in ["SUPABASE_KEY", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"] {
        write(name, &gateway.keys().secret);
        let cache = Builder::from_env_and_file(&file).queue(queue_path()).open().await.unwrap();
        cache.put(key("dotenv"), "before").await.unwrap();
        write(name, &gateway.rotate_secret());
        cache.put(key("dotenv"), "after").await.unwrap();
    }
    // A key that is set by hand is not the file's.
    let by_hand =
        Builder::from_env_and_file(&file).queue(queue_path()).supabase(&gateway.url(), "sb_secret_by_hand");
    assert_eq!(by_hand.open().await.unwrap_err().kind(), ErrorKind::Unauthorized);
}

/// The right key is the one that is to be used; the others would be refused.
async fn the_first_of_several_keys_is_used(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let (url, right) = (gateway.url(), gateway.keys().secret);
    let names = ["SUPABASE_KEY", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"];
    for first in 0..names.len() {
        let keys = names[first..].iter().enumerate().map(|(at, name)| {
            (*name, if at == 0 { right.clone() } else { "sb_secret_of_another_project".to_owned() })
        });
        let fixed = [("CONVERSATION_STORAGE_BACKEND", "supabase".to_owned()), ("SUPABASE_URL", url.clone())];
        let vars = fixed.into_iter().chain(keys).map(|(name, value)| (name.to_owned(), value));
        let cache = Builder::from_vars(vars).queue(queue_path()).warmup_limit(0).open().await.unwrap();
        cache.put(key("several keys"), "1").await.unwrap();
    }
}

async fn a_source_of_the_embedder_is_asked(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let cache = rejecting(&gateway).key_provider(|| Some(next_key())).open().await.unwrap();
    let panicking = rejecting(&gateway).key_provider(|| panic!("a source")).open().await.unwrap();
    gateway.rotate_secret();
    cache.put(key("source"), "1").await.unwrap();
    for _ in 0..3 {
        let error = panicking.put(key("source"), "1").await.unwrap_err();
        assert_says(&error, ErrorKind::Unauthorized, &["SUPABASE_KEY"]);
    }
    // It is asked at the first contact, too, and before the file that the key was from.
    let folder = tempfile::tempdir().unwrap();
    write_key(&folder, "sb_secret_of_yesterday");
    let late = with_key_file(&gateway, &folder.path().join("key")).key_provider(|| Some(next_key()));
    late.open().await.unwrap().put(key("source"), "1").await.unwrap();
}

async fn missing_migrations(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start_without_migrations(server)).await.unwrap();
    let gateway = stack.gateway().await;
    let error = refused(&gateway.url(), &gateway.keys().secret).await;
    let remedy =
        ["threadkeep migrations --dir supabase/migrations", "supabase db push --include-all", "psql"];
    assert_says(&error, ErrorKind::SchemaOutdated, &[&remedy[..], &["apply the migrations"]].concat());
}

async fn wrong_places(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let keys = gateway.keys();
    // A gateway that knows no such route may be the one that is wrong: the daemon starts, as in any outage.
    let elsewhere = format!("{}/somewhere/else", gateway.url());
    let elsewhere =
        Cache::builder().supabase(&elsewhere, &keys.secret).queue(queue_path()).open().await.unwrap();
    assert_eq!(elsewhere.put("t", "1").await.unwrap(), threadkeep::WriteOutcome::Queued);
    let cause = elsewhere.health().cause.unwrap();
    assert_says(&cause, ErrorKind::Unavailable, &["SUPABASE_URL", "404", "https://PROJECT.supabase.co"]);
    // With the path of the REST API it is the same place.
    let with_path = Cache::builder().supabase(&format!("{}/rest/v1/", gateway.url()), &keys.secret);
    with_path.queue(queue_path()).open().await.unwrap();
    for unreachable in ["http://127.0.0.1:1", "http://no-such-host.invalid"] {
        let cache = Cache::builder()
            .supabase(unreachable, &keys.secret)
            .queue(queue_path())
            .on_outage(OnOutage::Reject)
            .open()
            .await
            .unwrap();
        let error = cache.put("t", "1").await.unwrap_err();
        assert_says(
            &error,
            ErrorKind::Unavailable,
            &["cannot be reached", unreachable.strip_prefix("http://").unwrap()],
        );
        assert!(!error.outcome_unknown());
    }
}

/// Collects the log lines.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

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
            .timeout(SECOND)
            .fresh_for(std::time::Duration::ZERO);
        shown += &format!("{setup:?}");
        let cache = setup.queue(queue_path()).on_outage(OnOutage::Reject).open().await.unwrap();
        let key = key("secret");
        cache.put(&key, content).await.unwrap();
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
        gateway.clear();
    }
    for bad in ["http://user:hunter2@localhost", "sb_secret_as_url", "ftp://secret"] {
        let settings = [
            ("SUPABASE_URL", bad),
            ("SUPABASE_KEY", "sb_secret_\u{7}"),
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ];
        let vars = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        shown += &all_of(&Builder::from_vars(vars).queue(queue_path()).open().await.unwrap_err());
    }
    shown += &through_a_rotation(&gateway).await;
    shown += &log.text();
    assert!(shown.contains("circuit breaker opened"), "the log was collected");
    assert!(shown.contains("the Supabase key was replaced") && shown.contains("key panicked"));
    let body = keys.service_jwt.split('.').nth(2).unwrap();
    let ours = [&*keys.secret, &keys.service_jwt, body, content, &next_key()];
    let bad =
        ["hunter2", "sb_secret_as_url", "sb_secret_\u{7}", "sb_secret_as_path", "sb_secret_and", "panics"];
    for secret in ours.into_iter().chain(bad) {
        assert!(!shown.contains(secret), "{secret:?} shows in {shown}");
    }
}

/// Checks that logs and errors show no key, after junk in the key file and a panic of the provider.
async fn through_a_rotation(gateway: &Gateway) -> String {
    let (cache, folder) = daemon_with_key_file(gateway).await;
    let file = folder.path().join("key");
    let panicking = rejecting(gateway).key_provider(|| panic!("{} panics", next_key()));
    let mut shown = format!("{:?} {panicking:?}", with_key_file(gateway, &file));
    let panicking = panicking.open().await.unwrap();
    gateway.rotate_secret();
    shown += &all_of(&panicking.put(key("secret"), "1").await.unwrap_err());
    write_key(&folder, "sb_secret_and\u{7}");
    shown += &all_of(&cache.put(key("secret"), "1").await.unwrap_err());
    shown += &all_of(&with_key_file(gateway, &file).open().await.unwrap_err());
    shown += &all_of(&with_key_file(gateway, Path::new("sb_secret_as_path")).open().await.unwrap_err());
    write_key(&folder, next_key());
    eventually("the key is taken", async || cache.put(key("secret"), "1").await.is_ok()).await;
    shown + &format!("{cache:?} {:?}", cache.health())
}
