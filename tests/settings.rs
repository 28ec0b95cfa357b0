//! Settings: what is wrong is said, all of it, with the remedy; what is missing falls back or fails as asked.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use threadkeep::{Builder, Cache, ErrorKind, SETTINGS};

async fn open(vars: &[(&str, &str)]) -> threadkeep::Result<Cache> {
    // Each has a file of its own, which goes with the directory; the open one lives as long as the cache.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.db");
    let all = [("CONVERSATION_QUEUE_PATH", path.to_str().unwrap())].into_iter().chain(vars.iter().copied());
    Builder::from_vars(all.map(|(name, value)| (name.to_owned(), value.to_owned()))).open().await
}

#[tokio::test]
async fn junk_in_any_setting_is_named_with_a_remedy() {
    let junk = [
        ("CONVERSATION_STORAGE_BACKEND", "redis"),
        ("CONVERSATION_TIMEOUT_HOURS", "0"),
        ("CONVERSATION_TIMEOUT_HOURS", "NaN"),
        ("CONVERSATION_TIMEOUT_HOURS", "1e300"),
        ("CONVERSATION_TIMEOUT_HOURS", "tomorrow"),
        ("SUPABASE_URL", "project.supabase.co"),
        ("SUPABASE_URL", "postgres://localhost"),
        ("SUPABASE_URL", "https://user@localhost"),
        ("SUPABASE_PROJECT_ID", "no/such"),
        ("SUPABASE_KEY", "two\nlines"),
        ("SUPABASE_KEY_FILE", "/no/such/file"),
        ("SUPABASE_KEY_FILE", "/"),
        ("SUPABASE_SECRET_KEY", "two\nlines"),
        ("SUPABASE_SERVICE_ROLE_KEY", "two\nlines"),
        ("SUPABASE_TIMEOUT_SECONDS", "0"),
        ("CONVERSATION_STRICT", "yes"),
        ("CONVERSATION_MAX_BYTES", "0"),
        ("CONVERSATION_MAX_BYTES", "1GiB"),
        ("CONVERSATION_MAX_BYTES", "MiB"),
        ("CONVERSATION_CACHE_BYTES", "-1"),
        ("CONVERSATION_CACHE_BYTES", "99999999999999999999GiB"),
        ("CONVERSATION_FRESH_SECONDS", "-0.1"),
        ("CONVERSATION_QUEUE_BYTES", "-1"),
        ("CONVERSATION_REPLICA_BYTES", "many"),
        ("CONVERSATION_ON_OUTAGE", "wait"),
        ("CONVERSATION_PATIENCE_SECONDS", "inf"),
        ("CONVERSATION_WARM_THREADS", "all"),
    ];
    for (name, value) in junk {
        // As Supabase's settings matter only to that backend.
        let backend = ("CONVERSATION_STORAGE_BACKEND", "supabase");
        let error = open(&[backend, (name, value)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(&format!("{name}: ")), "{error}");
        assert!(["use", "it "].iter().any(|word| error.to_string().contains(word)), "{error}");
    }
    let missed: Vec<_> =
        SETTINGS.iter().filter(|setting| junk.iter().all(|(name, _)| *name != setting.name)).collect();
    let free: Vec<_> = missed.iter().map(|setting| setting.name).collect();
    assert_eq!(free, ["CONVERSATION_LOCAL_PATH", "CONVERSATION_QUEUE_PATH"], "any path may be one");
}

#[tokio::test]
async fn all_problems_are_reported_together() {
    let vars =
        [("CONVERSATION_TIMEOUT_HOURS", "x"), ("CONVERSATION_MAX_BYTES", "x"), ("CONVERSATION_STRICT", "x")];
    let error = open(&vars).await.unwrap_err().to_string();
    assert!(vars.iter().all(|(name, _)| error.contains(name)), "{error}");
    assert!(error.contains("3 settings are wrong"), "{error}");
}

#[tokio::test]
async fn supabase_without_credentials_falls_back_to_memory_and_fails_in_strict_mode() {
    let asked = ("CONVERSATION_STORAGE_BACKEND", "supabase");
    for vars in
        [vec![asked], vec![asked, ("SUPABASE_KEY", "k")], vec![asked, ("SUPABASE_URL", "http://localhost")]]
    {
        assert_eq!(open(&vars).await.unwrap().health().backend, "memory");
        let error = open(&[vars, vec![("CONVERSATION_STRICT", "true")]].concat()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("not set"), "{error}");
    }
    // The message about a missing key has all the names that it can have.
    let error = open(&[asked, ("CONVERSATION_STRICT", "true")]).await.unwrap_err().to_string();
    for name in ["SUPABASE_KEY", "SUPABASE_KEY_FILE", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"] {
        assert!(error.contains(name), "{name} is missing in {error}");
    }
    // An empty variable counts as unset.
    let empty = [asked, ("SUPABASE_URL", " "), ("SUPABASE_KEY", "")];
    assert_eq!(open(&empty).await.unwrap().health().backend, "memory");
}

#[tokio::test]
async fn a_file_may_hold_the_key_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    let in_file = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", "http://127.0.0.1:1"),
        ("SUPABASE_KEY_FILE", file.to_str().unwrap()),
        ("CONVERSATION_STRICT", "true"),
    ];
    std::fs::write(&file, "sb_secret_in_a_file\r\n").unwrap();
    assert_eq!(open(&in_file).await.unwrap().health().backend, "supabase");
    // Empty, it is as if SUPABASE_KEY were not there.
    let with_empty = open(&[&in_file[..], &[("SUPABASE_KEY", "")]].concat()).await;
    assert_eq!(with_empty.unwrap().health().backend, "supabase");
    let both = open(&[&in_file[..], &[("SUPABASE_KEY", "sb_secret_x")]].concat()).await.unwrap_err();
    assert_eq!(both.kind(), ErrorKind::Config);
    assert!(both.to_string().contains("SUPABASE_KEY_FILE: SUPABASE_KEY is set as well"), "{both}");

    let junk: [(&[u8], &str); 4] = [
        (b"", "it is empty"),
        (b" \n", "it is empty"),
        (b"sb_secret_hidden\xff", "characters that no key has"),
        (b"sb_secret_hidden\nsecond line", "characters that no key has"),
    ];
    for (content, wrong) in junk {
        std::fs::write(&file, content).unwrap();
        let error = open(&in_file).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let text = format!("{error} {error:?}");
        assert!(text.contains("SUPABASE_KEY_FILE: it ") && text.contains(wrong), "{text}");
        assert!(!text.contains("hidden") && !text.contains("not set"), "{text}");
    }
    // Another backend does not need it.
    let idle = open(&[("CONVERSATION_STORAGE_BACKEND", "memory"), in_file[2]]).await;
    assert_eq!(idle.unwrap().health().backend, "memory");
}

/// The names that Supabase itself gives the key are taken, each after those that are threadkeep's own.
#[tokio::test]
async fn keys_under_the_names_of_supabase_are_taken_in_their_order() {
    let of_supabase = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", "http://127.0.0.1:1"),
        ("CONVERSATION_STRICT", "true"),
    ];
    for name in ["SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"] {
        let cache = open(&[&of_supabase[..], &[(name, "sb_secret_of_supabase")]].concat()).await.unwrap();
        assert_eq!(cache.health().backend, "supabase", "{name}");
    }
    // A value that is not used may be wrong.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "sb_secret_in_a_file").unwrap();
    let (own, in_file) = (("SUPABASE_KEY", "sb_secret_own"), ("SUPABASE_KEY_FILE", file.to_str().unwrap()));
    for used in [own, in_file, ("SUPABASE_SECRET_KEY", "sb_secret_own")] {
        let junk = ("SUPABASE_SERVICE_ROLE_KEY", "two\nlines");
        open(&[&of_supabase[..], &[used, junk]].concat()).await.unwrap();
    }
}

#[tokio::test]
async fn the_project_gives_the_url_where_there_is_none() {
    let of_project = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_PROJECT_ID", "nosuchproject"),
        ("SUPABASE_KEY", "sb_secret_x"),
        ("SUPABASE_TIMEOUT_SECONDS", "0.2"),
    ];
    let cache = open(&of_project).await.unwrap();
    assert!(format!("{cache:?}").contains("nosuchproject.supabase.co"), "{cache:?}");
    let with_url =
        open(&[&of_project[..], &[("SUPABASE_URL", "http://127.0.0.1:1")]].concat()).await.unwrap();
    assert!(format!("{with_url:?}").contains("127.0.0.1:1"), "{with_url:?}");
}

#[tokio::test]
async fn what_only_supabase_needs_does_not_stop_another_backend() {
    let vars =
        [("CONVERSATION_STORAGE_BACKEND", "memory"), ("SUPABASE_URL", "junk"), ("SUPABASE_KEY", "\u{1}")];
    assert_eq!(open(&vars).await.unwrap().health().backend, "memory");
}

#[tokio::test]
async fn the_builder_takes_what_the_environment_takes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::builder().local(dir.path().join("t.db")).ttl(Duration::from_secs(7)).max_bytes(10);
    let cache = cache.cache_bytes(1 << 20).patience(Duration::from_millis(10)).open().await.unwrap();
    let _ = cache.put("t", "12345678").await.unwrap();
    assert_eq!(cache.put("t", "123456789").await.unwrap_err().kind(), ErrorKind::Invalid);
    let found = cache.get("t").await.unwrap().unwrap();
    let version = chrono::DateTime::<chrono::Utc>::from(found.version().at());
    assert!((6..=7).contains(&(found.expires_at() - version).num_seconds()));
    let error = Cache::builder().ttl(Duration::ZERO).max_bytes(0).open().await.unwrap_err();
    assert!(error.to_string().contains("2 settings are wrong"), "{error}");
}

async fn ttl_of(builder: Builder, span: Duration) -> Duration {
    let cache = builder.memory().ttl(span).open().await.unwrap();
    let before = chrono::Utc::now();
    let _ = cache.put("t", &1).await.unwrap();
    let Some(found) = cache.get("t").await.unwrap() else { return Duration::ZERO };
    (found.expires_at() - before).to_std().unwrap_or_default()
}

#[tokio::test]
async fn a_setter_takes_a_span_as_it_is() {
    let short = Duration::from_millis(1);
    assert!(ttl_of(Cache::builder(), short).await < Duration::from_secs(60));
    let long = Duration::from_secs(100 * 366 * 86_400);
    assert!(ttl_of(Cache::builder(), long).await > long - Duration::from_secs(60));
    // 86400 seconds in hours, and back, are 86400 seconds; so is any other span.
    for millis in [2, 3, 7, 999, 1_001, 3_599_999, 86_400_001] {
        let span = Duration::from_millis(millis);
        let builder = Cache::builder().ttl(span).fresh_for(Duration::from_nanos(1)).patience(Duration::ZERO);
        builder.timeout(Duration::from_millis(50)).memory().open().await.unwrap();
    }
}

#[tokio::test]
async fn a_setter_that_is_out_of_range_is_named_with_its_range() {
    let nano = Duration::from_nanos(1);
    let day = Duration::from_secs(86_400);
    for (name, builder, words) in [
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(Duration::ZERO), ["0ns", "1ms"]),
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(Duration::from_micros(999)), ["999µs", "1ms"]),
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(Duration::MAX), ["s is not possible", "1ms"]),
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(36_600 * day + nano), ["00001s", "3162240000s"]),
        ("CONVERSATION_FRESH_SECONDS", Cache::builder().fresh_for(day + nano), ["00001s", "86400s"]),
        ("CONVERSATION_FRESH_SECONDS", Cache::builder().fresh_for(Duration::MAX), ["not possible", "86400s"]),
        ("CONVERSATION_PATIENCE_SECONDS", Cache::builder().patience(Duration::MAX), ["not possible", "60s"]),
        ("SUPABASE_TIMEOUT_SECONDS", Cache::builder().timeout(Duration::ZERO), ["0ns", "50ms"]),
        ("SUPABASE_TIMEOUT_SECONDS", Cache::builder().timeout(Duration::MAX), ["not possible", "300s"]),
        ("CONVERSATION_MAX_BYTES", Cache::builder().max_bytes(0), ["at least 1", "67108864"]),
        ("CONVERSATION_MAX_BYTES", Cache::builder().max_bytes(usize::MAX), ["at least 1", "67108864"]),
    ] {
        let error = builder.supabase("http://127.0.0.1:1", "sb_secret_x").open().await.unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::Config && text.contains(&format!("{name}: ")), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    }
    let any = Cache::builder().cache_bytes(usize::MAX).queue_bytes(usize::MAX).replica_bytes(usize::MAX);
    let any = any.cache_bytes(0).cache_bytes(usize::MAX).warm_threads(usize::MAX).upkeep_every(Duration::MAX);
    let cache = any.memory().open().await.unwrap();
    let _ = cache.put("t", &1).ttl(Duration::from_millis(1)).await.unwrap();
    assert_eq!(cache.put("t", &1).ttl(Duration::MAX).await.unwrap_err().kind(), ErrorKind::Invalid);
}

/// A file of settings, or of a key, may be anything, such as a device without an end.
#[tokio::test]
async fn a_file_without_end_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    std::fs::write(&large, "# a comment that is too long\n".repeat(1 << 16)).unwrap();
    let endless = std::path::PathBuf::from("/dev/zero");
    for file in [Some(large), endless.exists().then_some(endless)].into_iter().flatten() {
        let error = Builder::from_env_and_file(&file).memory().open().await.unwrap_err().to_string();
        assert!(error.contains("it is larger than 1 MiB"), "{error}");
        let vars = [
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
            ("SUPABASE_URL", "http://127.0.0.1:1"),
            ("SUPABASE_KEY_FILE", file.to_str().unwrap()),
        ];
        let error = open(&vars).await.unwrap_err().to_string();
        assert!(error.contains("SUPABASE_KEY_FILE: the file is larger than any key"), "{error}");
    }
}

#[tokio::test]
async fn a_file_that_cannot_be_read_is_named_but_not_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(".env");
    assert!(Builder::from_env_and_file(&path).memory().open().await.is_ok(), "there need not be one");
    std::fs::write(&path, "SUPABASE_KEY='sb_secret_unclosed\n").unwrap();
    let error = Builder::from_env_and_file(&path).memory().open().await.unwrap_err().to_string();
    assert!(error.contains(".env: line 1 is not NAME=value") && !error.contains("unclosed"), "{error}");
    std::fs::write(&path, b"CONVERSATION_STRICT=true\nSUPABASE_KEY=sb_secret_hidden\xff\n").unwrap();
    let error = Builder::from_env_and_file(&path).memory().open().await.unwrap_err().to_string();
    assert!(error.contains(".env: line 2 is not UTF-8") && !error.contains("hidden"), "{error}");
    let error = Builder::from_env_and_file(dir.path()).memory().open().await.unwrap_err().to_string();
    assert!(error.contains("it is a directory"), "{error}");
    let local = dir.path().join("with a mark.db");
    std::fs::write(&path, format!("\u{feff}CONVERSATION_LOCAL_PATH='{}'\n", local.display())).unwrap();
    Builder::from_env_and_file(&path).open().await.unwrap();
    assert!(local.exists(), "a byte order mark is passed over");
}
