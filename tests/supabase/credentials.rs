//! Wrong keys, wrong addresses and missing migrations. Each error names the remedy and contains no secret.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use threadkeep::{BreakerState, Builder, Cache, Error, ErrorKind, Freshness, OnOutage};

use crate::secrets::ProcessLog;
use crate::stack::{Fault, Gateway, Keys, Server, Stack};
use crate::{SECOND, eventually, get, key, queue_path, rejecting, shared};

on_each_server!(
    wrong_key_is_rejected_with_its_setting,
    rotation_retries_concurrent_requests_once,
    rotation_under_traffic_fails_no_call,
    late_or_malformed_key_file_recovers,
    key_in_dotenv_is_read_again_after_rotation,
    open_with_several_keys_uses_the_first,
    key_provider_is_asked_after_rejection,
    open_without_migrations_names_the_remedy,
    open_at_wrong_address_names_the_address,
);

async fn open_error(url: &str, key: &str) -> Error {
    Cache::builder().supabase(url, key).queue(queue_path()).timeout(3 * SECOND).open().await.unwrap_err()
}

fn assert_error(error: &Error, kind: ErrorKind, words: &[&str]) {
    let text = error.to_string();
    assert_eq!(error.kind(), kind, "{text}");
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in: {text}");
    }
}

async fn wrong_key_is_rejected_with_its_setting(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let keys = gateway.keys();
    let wrong = open_error(&gateway.url(), "sb_secret_of_another_project").await;
    assert_error(
        &wrong,
        ErrorKind::Unauthorized,
        &["Invalid API key", "SUPABASE_KEY", "this project's secret"],
    );
    let forged = format!("{}x", keys.service_jwt);
    assert_error(&open_error(&gateway.url(), &forged).await, ErrorKind::Unauthorized, &["SUPABASE_KEY"]);
    // Lite has no roles, so only its keys can be wrong.
    if server != Server::Lite {
        for public in [&keys.anon_jwt, &keys.publishable] {
            let error = open_error(&gateway.url(), public).await;
            assert_error(
                &error,
                ErrorKind::Unauthorized,
                &["anon", "public", "secret (service_role) key instead"],
            );
        }
    }
    // A later rejection of the key is no outage, so the breaker stays closed.
    let cache = rejecting(&gateway).open().await.unwrap();
    gateway.rotate_secret();
    for _ in 0..20 {
        let error = cache.put(key("denied"), "1").await.unwrap_err();
        assert_error(&error, ErrorKind::Unauthorized, &["SUPABASE_KEY"]);
    }
    assert_eq!(cache.health().breaker, Some(threadkeep::BreakerState::Closed));
    let health = cache.health();
    assert!(
        !health.is_available() && health.cause.unwrap().kind() == ErrorKind::Unauthorized,
        "an operator has to know"
    );
}

/// Returns the settings of a daemon with its key in a separate file.
pub fn with_key_file(gateway: &Gateway, file: &Path) -> Builder {
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

/// Starts a daemon with its key in a file. Returns the daemon and the folder of the file.
pub async fn daemon_with_key_file(gateway: &Gateway) -> (Cache, tempfile::TempDir) {
    let folder = tempfile::tempdir().unwrap();
    write_key(&folder, gateway.keys().secret);
    (with_key_file(gateway, &folder.path().join("key")).open().await.unwrap(), folder)
}

pub fn write_key(folder: &tempfile::TempDir, content: impl AsRef<[u8]>) {
    std::fs::write(folder.path().join("key"), content).unwrap();
}

/// Returns the key after the next rotation. An operator knows it before the old key ends.
pub fn next_key() -> String {
    Keys::new(1).secret
}

async fn rotation_retries_concurrent_requests_once(server: Server) {
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
    assert_eq!(gateway.count("threadkeep_apply"), 8, "each write must be sent twice");
    assert_eq!(gateway.count("threadkeep_load"), 8, "each read must be sent twice");
    // From now on, the gateway rejects no request.
    gateway.forget();
    for key in keys.iter().step_by(2) {
        assert_eq!(get(&cache, key).await.unwrap().json(), "\"after\"");
    }
    assert_eq!(gateway.count("threadkeep_load"), 4);
}

async fn rotation_under_traffic_fails_no_call(server: Server) {
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

async fn late_or_malformed_key_file_recovers(server: Server) {
    let log = ProcessLog::of_process();
    let (_, gateway, _) = shared(server).await;
    let (cache, folder) = daemon_with_key_file(&gateway).await;
    let key = key("late");
    cache.put(&key, "before").await.unwrap();
    gateway.rotate_secret();
    let denied = async || {
        let error = cache.put(&key, "during").await.unwrap_err();
        assert_error(&error, ErrorKind::Unauthorized, &["SUPABASE_KEY", "Invalid API key"]);
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
    eventually("the cache uses the new key", async || cache.put(&key, "after").await.is_ok()).await;
    assert_eq!(get(&cache, &key).await.unwrap().freshness(), Freshness::Fresh);
    assert!(cache.health().is_available());
}

async fn key_in_dotenv_is_read_again_after_rotation(server: Server) {
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
    // An explicit key wins over the file.
    let by_hand =
        Builder::from_env_and_file(&file).queue(queue_path()).supabase(&gateway.url(), "sb_secret_by_hand");
    assert_eq!(by_hand.open().await.unwrap_err().kind(), ErrorKind::Unauthorized);
}

/// Only the first key is right. The gateway rejects the other keys.
async fn open_with_several_keys_uses_the_first(server: Server) {
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

async fn key_provider_is_asked_after_rejection(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let cache = rejecting(&gateway).key_provider(|| Some(next_key())).open().await.unwrap();
    let panicking = rejecting(&gateway).key_provider(|| panic!("a source")).open().await.unwrap();
    gateway.rotate_secret();
    cache.put(key("source"), "1").await.unwrap();
    for _ in 0..3 {
        let error = panicking.put(key("source"), "1").await.unwrap_err();
        assert_error(&error, ErrorKind::Unauthorized, &["SUPABASE_KEY"]);
    }
    // The cache also asks the provider at the first contact, before it reads the key file.
    let folder = tempfile::tempdir().unwrap();
    write_key(&folder, "sb_secret_of_yesterday");
    let late = with_key_file(&gateway, &folder.path().join("key")).key_provider(|| Some(next_key()));
    late.open().await.unwrap().put(key("source"), "1").await.unwrap();
}

async fn open_without_migrations_names_the_remedy(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start_without_migrations(server)).await.unwrap();
    let gateway = stack.gateway().await;
    let error = open_error(&gateway.url(), &gateway.keys().secret).await;
    let remedy =
        ["threadkeep migrations --dir supabase/migrations", "supabase db push --include-all", "psql"];
    assert_error(&error, ErrorKind::SchemaOutdated, &[&remedy[..], &["apply the migrations"]].concat());
}

async fn open_at_wrong_address_names_the_address(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let keys = gateway.keys();
    // A gateway without the route may be misconfigured, so the daemon starts as in any outage.
    let elsewhere = format!("{}/somewhere/else", gateway.url());
    let elsewhere =
        Cache::builder().supabase(&elsewhere, &keys.secret).queue(queue_path()).open().await.unwrap();
    assert_eq!(elsewhere.put("t", "1").await.unwrap(), threadkeep::WriteOutcome::Queued);
    let cause = elsewhere.health().cause.unwrap();
    assert_error(&cause, ErrorKind::Unavailable, &["SUPABASE_URL", "404", "https://PROJECT.supabase.co"]);
    // An address with the path of the REST API is the same address.
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
        assert_error(
            &error,
            ErrorKind::Unavailable,
            &["cannot be reached", unreachable.strip_prefix("http://").unwrap()],
        );
        assert!(!error.outcome_unknown());
    }
}
