//! Settings: each wrong setting is reported with its remedy. A missing setting falls back, or fails in strict mode.
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use threadkeep::store::Timestamp;
use threadkeep::tools::{KeyFacts, KeyKind, SETTINGS};
use threadkeep::{Builder, Cache, ErrorKind};

async fn open(vars: &[(&str, &str)]) -> threadkeep::Result<Cache> {
    // Each cache has its own outage file. The directory is deleted at the end of this function, but the file stays open.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("queue.db");
    let all = [("CONVERSATION_QUEUE_PATH", path.to_str().unwrap())].into_iter().chain(vars.iter().copied());
    Builder::from_vars(all.map(|(name, value)| (name.to_owned(), value.to_owned()))).open().await
}

#[tokio::test]
async fn invalid_backend_hides_no_other_problem() {
    let vars = [
        ("CONVERSATION_STORAGE_BACKEND", "redis"),
        ("SUPABASE_URL", "junk"),
        ("SUPABASE_TIMEOUT_SECONDS", "0"),
    ];
    let message = open(&vars).await.unwrap_err().to_string();
    assert!(vars.iter().all(|(name, _)| message.contains(name)), "{message}");
}

#[tokio::test]
async fn settings_with_junk_are_named_with_a_remedy() {
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
        ("CONVERSATION_MAX_VALUE_BYTES", "0"),
        ("CONVERSATION_MAX_VALUE_BYTES", "1GiB"),
        ("CONVERSATION_MAX_VALUE_BYTES", "MiB"),
        ("CONVERSATION_CACHE_MAX_BYTES", "-1"),
        ("CONVERSATION_CACHE_MAX_BYTES", "99999999999999999999GiB"),
        ("CONVERSATION_FRESH_SECONDS", "-0.1"),
        ("CONVERSATION_QUEUE_MAX_BYTES", "-1"),
        ("CONVERSATION_REPLICA_MAX_BYTES", "many"),
        ("CONVERSATION_ON_OUTAGE", "wait"),
        ("CONVERSATION_SOFT_TIMEOUT_SECONDS", "inf"),
        ("CONVERSATION_WARMUP_LIMIT", "all"),
        ("CONVERSATION_FEED_INTERVAL_SECONDS", "-1"),
        ("CONVERSATION_FEED_INTERVAL_SECONDS", "0.0001"),
        ("CONVERSATION_FEED_INTERVAL_SECONDS", "3601"),
    ];
    for (name, value) in junk {
        // Only the Supabase backend checks the settings of Supabase.
        let backend = ("CONVERSATION_STORAGE_BACKEND", "supabase");
        let error = open(&[backend, (name, value)]).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let text = error.to_string();
        let mut problems =
            text.lines().map(|line| line.trim_start_matches("a setting is invalid:").trim_start());
        let problem = problems.find(|problem| problem.starts_with(&format!("{name} ")));
        assert!(
            problem.is_some_and(|problem| problem.contains("; ")),
            "{name} has no line with a remedy: {text}"
        );
    }
    let unchecked: Vec<_> =
        SETTINGS.iter().filter(|setting| junk.iter().all(|(name, _)| *name != setting.name)).collect();
    let names: Vec<_> = unchecked.iter().map(|setting| setting.name).collect();
    assert_eq!(names, ["CONVERSATION_LOCAL_PATH", "CONVERSATION_QUEUE_PATH"], "a path has no junk value");
}

#[tokio::test]
async fn settings_problems_are_reported_together() {
    let vars = [
        ("CONVERSATION_TIMEOUT_HOURS", "x"),
        ("CONVERSATION_MAX_VALUE_BYTES", "x"),
        ("CONVERSATION_STRICT", "x"),
    ];
    let error = open(&vars).await.unwrap_err().to_string();
    assert!(vars.iter().all(|(name, _)| error.contains(name)), "{error}");
    assert!(error.contains("3 settings are invalid"), "{error}");
}

#[test]
fn freshness_that_ends_before_the_next_poll_is_warned_of() {
    let warnings = |fresh: &str, interval: &str| {
        let vars = [
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
            ("CONVERSATION_FRESH_SECONDS", fresh),
            ("CONVERSATION_FEED_INTERVAL_SECONDS", interval),
        ];
        let config = Builder::from_vars(vars.map(|(name, value)| (name.into(), value.into()))).resolve();
        assert!(config.problems.is_empty(), "{:?}", config.problems);
        config.warnings.into_iter().map(|warning| warning.to_string()).collect::<Vec<_>>()
    };
    for (fresh, interval) in [("", ""), ("2.1", ""), ("0", ""), ("0", "0"), ("1", "0.0"), ("0.02", "0.01")] {
        assert_eq!(warnings(fresh, interval), [""; 0], "{fresh} {interval}");
    }
    for (fresh, interval) in [("2", ""), ("1", "3"), ("", "30"), ("0", "2")] {
        let warnings = warnings(fresh, interval);
        assert!(warnings.len() == 1, "{warnings:?}");
        assert!(warnings[0].starts_with("CONVERSATION_FRESH_SECONDS is not above"), "{warnings:?}");
        assert!(warnings[0].ends_with("or set CONVERSATION_FEED_INTERVAL_SECONDS=0"), "{warnings:?}");
    }
}

#[tokio::test]
async fn supabase_without_key_is_memory_or_fails_if_strict() {
    let backend = ("CONVERSATION_STORAGE_BACKEND", "supabase");
    for vars in [
        vec![backend],
        vec![backend, ("SUPABASE_KEY", "k")],
        vec![backend, ("SUPABASE_URL", "http://localhost")],
    ] {
        assert_eq!(open(&vars).await.unwrap().health().backend, "memory");
        let error = open(&[vars, vec![("CONVERSATION_STRICT", "true")]].concat()).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("not set"), "{error}");
    }
    // The error about a missing key lists each setting that can hold the key.
    let error = open(&[backend, ("CONVERSATION_STRICT", "true")]).await.unwrap_err().to_string();
    for name in ["SUPABASE_KEY", "SUPABASE_KEY_FILE", "SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"] {
        assert!(error.contains(name), "{name} is missing in {error}");
    }
    // An empty variable counts as unset.
    let empty = [backend, ("SUPABASE_URL", " "), ("SUPABASE_KEY", "")];
    assert_eq!(open(&empty).await.unwrap().health().backend, "memory");
}

#[tokio::test]
async fn key_file_must_hold_exactly_one_key() {
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
    // An empty SUPABASE_KEY counts as unset.
    let with_empty = open(&[&in_file[..], &[("SUPABASE_KEY", "")]].concat()).await;
    assert_eq!(with_empty.unwrap().health().backend, "supabase");
    let both = open(&[&in_file[..], &[("SUPABASE_KEY", "sb_secret_x")]].concat()).await.unwrap_err();
    assert_eq!(both.kind(), ErrorKind::Config);
    assert!(both.to_string().contains("SUPABASE_KEY_FILE and SUPABASE_KEY are both set"), "{both}");

    let junk: [(&[u8], &str); 4] = [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"sb_secret_hidden\xff", "characters that no key has"),
        (b"sb_secret_hidden\nsecond line", "characters that no key has"),
    ];
    for (content, wrong) in junk {
        std::fs::write(&file, content).unwrap();
        let error = open(&in_file).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        let text = format!("{error} {error:?}");
        assert!(text.contains(": SUPABASE_KEY_FILE ") && text.contains(wrong), "{text}");
        assert!(!text.contains("hidden") && !text.contains("not set"), "{text}");
    }
    // Another backend does not read the key file.
    let other_backend = open(&[("CONVERSATION_STORAGE_BACKEND", "memory"), in_file[2]]).await;
    assert_eq!(other_backend.unwrap().health().backend, "memory");
}

/// The key may have the names that Supabase itself uses. The names of threadkeep have precedence.
#[tokio::test]
async fn key_names_of_supabase_are_accepted_in_order() {
    let base = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", "http://127.0.0.1:1"),
        ("CONVERSATION_STRICT", "true"),
    ];
    for name in ["SUPABASE_SECRET_KEY", "SUPABASE_SERVICE_ROLE_KEY"] {
        let cache = open(&[&base[..], &[(name, "sb_secret_of_supabase")]].concat()).await.unwrap();
        assert_eq!(cache.health().backend, "supabase", "{name}");
    }
    // A setting that is not used may hold a wrong value.
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("key");
    std::fs::write(&file, "sb_secret_in_a_file").unwrap();
    let (own, in_file) = (("SUPABASE_KEY", "sb_secret_own"), ("SUPABASE_KEY_FILE", file.to_str().unwrap()));
    for used in [own, in_file, ("SUPABASE_SECRET_KEY", "sb_secret_own")] {
        let junk = ("SUPABASE_SERVICE_ROLE_KEY", "two\nlines");
        open(&[&base[..], &[used, junk]].concat()).await.unwrap();
    }
}

#[tokio::test]
async fn url_is_derived_from_the_project_id_if_unset() {
    let project = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_PROJECT_ID", "nosuchproject"),
        ("SUPABASE_KEY", "sb_secret_x"),
        ("SUPABASE_TIMEOUT_SECONDS", "0.2"),
    ];
    let cache = open(&project).await.unwrap();
    assert!(format!("{cache:?}").contains("nosuchproject.supabase.co"), "{cache:?}");
    let with_url = open(&[&project[..], &[("SUPABASE_URL", "http://127.0.0.1:1")]].concat()).await.unwrap();
    assert!(format!("{with_url:?}").contains("127.0.0.1:1"), "{with_url:?}");
}

#[tokio::test]
async fn supabase_settings_do_not_stop_another_backend() {
    let vars =
        [("CONVERSATION_STORAGE_BACKEND", "memory"), ("SUPABASE_URL", "junk"), ("SUPABASE_KEY", "\u{1}")];
    assert_eq!(open(&vars).await.unwrap().health().backend, "memory");
}

#[tokio::test]
async fn builder_setters_have_the_effect_of_the_variables() {
    let dir = tempfile::tempdir().unwrap();
    let cache =
        Cache::builder().local(dir.path().join("t.db")).ttl(Duration::from_secs(7)).max_value_bytes(10);
    let cache = cache.cache_max_bytes(1 << 20).soft_timeout(Duration::from_millis(10)).open().await.unwrap();
    cache.put("t", "12345678").await.unwrap();
    assert_eq!(cache.put("t", "123456789").await.unwrap_err().kind(), ErrorKind::Invalid);
    let found = cache.get("t").await.unwrap().unwrap();
    let version = chrono::DateTime::<chrono::Utc>::from(found.version().at());
    assert!((6..=7).contains(&(found.expires_at() - version).num_seconds()));
    let error = Cache::builder().ttl(Duration::ZERO).max_value_bytes(0).open().await.unwrap_err();
    assert!(error.to_string().contains("2 settings are invalid"), "{error}");
}

async fn ttl_of(builder: Builder, duration: Duration) -> Duration {
    let cache = builder.memory().ttl(duration).open().await.unwrap();
    let before = chrono::Utc::now();
    cache.put("t", &1).await.unwrap();
    let Some(found) = cache.get("t").await.unwrap() else { return Duration::ZERO };
    (found.expires_at() - before).to_std().unwrap_or_default()
}

#[tokio::test]
async fn builder_setter_takes_a_duration_unrounded() {
    let short = Duration::from_millis(1);
    assert!(ttl_of(Cache::builder(), short).await < Duration::from_secs(60));
    let long = Duration::from_secs(100 * 366 * 86_400);
    assert!(ttl_of(Cache::builder(), long).await > long - Duration::from_secs(60));
    // The conversion of a duration to the unit of its setting and back is exact.
    for millis in [2, 3, 7, 999, 1_001, 3_599_999, 86_400_001] {
        let duration = Duration::from_millis(millis);
        let builder =
            Cache::builder().ttl(duration).fresh_for(Duration::from_nanos(1)).soft_timeout(Duration::ZERO);
        builder.timeout(Duration::from_millis(50)).memory().open().await.unwrap();
    }
}

#[tokio::test]
async fn builder_setter_out_of_range_is_named_with_its_range() {
    let nanosecond = Duration::from_nanos(1);
    let day = Duration::from_secs(86_400);
    for (name, builder, words) in [
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(Duration::ZERO), ["0ns", "1ms"]),
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(Duration::from_micros(999)), ["999µs", "1ms"]),
        ("CONVERSATION_TIMEOUT_HOURS", Cache::builder().ttl(Duration::MAX), ["cannot be", "1ms"]),
        (
            "CONVERSATION_TIMEOUT_HOURS",
            Cache::builder().ttl(36_600 * day + nanosecond),
            ["00001s", "3162240000s"],
        ),
        ("CONVERSATION_FRESH_SECONDS", Cache::builder().fresh_for(day + nanosecond), ["00001s", "86400s"]),
        ("CONVERSATION_FRESH_SECONDS", Cache::builder().fresh_for(Duration::MAX), ["cannot be", "86400s"]),
        (
            "CONVERSATION_FEED_INTERVAL_SECONDS",
            Cache::builder().feed_interval(Duration::from_micros(9_999)),
            ["9.999ms", "10ms"],
        ),
        (
            "CONVERSATION_SOFT_TIMEOUT_SECONDS",
            Cache::builder().soft_timeout(Duration::MAX),
            ["cannot be", "60s"],
        ),
        ("SUPABASE_TIMEOUT_SECONDS", Cache::builder().timeout(Duration::ZERO), ["0ns", "50ms"]),
        ("SUPABASE_TIMEOUT_SECONDS", Cache::builder().timeout(Duration::MAX), ["cannot be", "300s"]),
        ("CONVERSATION_MAX_VALUE_BYTES", Cache::builder().max_value_bytes(0), ["at least 1", "67108864"]),
        (
            "CONVERSATION_MAX_VALUE_BYTES",
            Cache::builder().max_value_bytes(usize::MAX),
            ["at least 1", "67108864"],
        ),
    ] {
        let error = builder.supabase("http://127.0.0.1:1", "sb_secret_x").open().await.unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::Config && text.contains(&format!("invalid: {name} ")), "{text}");
        assert!(words.iter().all(|word| text.contains(word)), "{words:?}: {text}");
    }
    let any = Cache::builder()
        .cache_max_bytes(usize::MAX)
        .queue_max_bytes(usize::MAX)
        .replica_max_bytes(usize::MAX);
    let any = any
        .cache_max_bytes(0)
        .cache_max_bytes(usize::MAX)
        .warmup_limit(usize::MAX)
        .maintenance_interval(Duration::MAX);
    let cache = any.memory().open().await.unwrap();
    cache.put("t", &1).ttl(Duration::from_millis(1)).await.unwrap();
    assert_eq!(cache.put("t", &1).ttl(Duration::MAX).await.unwrap_err().kind(), ErrorKind::Invalid);
}

/// The path of a settings file or of a key file may name any file, for example an endless device.
#[tokio::test]
async fn endless_settings_file_is_rejected() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large");
    std::fs::write(&large, "# a comment that is too long\n".repeat(1 << 16)).unwrap();
    let endless = std::path::PathBuf::from("/dev/zero");
    for file in [Some(large), endless.exists().then_some(endless)].into_iter().flatten() {
        let error = Builder::from_env_and_file(&file).memory().open().await.unwrap_err().to_string();
        assert!(error.contains(" is larger than 1 MiB"), "{error}");
        let vars = [
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
            ("SUPABASE_URL", "http://127.0.0.1:1"),
            ("SUPABASE_KEY_FILE", file.to_str().unwrap()),
        ];
        let error = open(&vars).await.unwrap_err().to_string();
        assert!(error.contains("SUPABASE_KEY_FILE names a file larger than any key"), "{error}");
    }
}

#[tokio::test]
async fn unreadable_settings_file_is_named_without_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(".env");
    assert!(
        Builder::from_env_and_file(&path).memory().open().await.is_ok(),
        "the settings file may be missing"
    );
    std::fs::write(&path, "SUPABASE_KEY='sb_secret_unclosed\n").unwrap();
    let error = Builder::from_env_and_file(&path).memory().open().await.unwrap_err().to_string();
    assert!(
        error.contains(".env has a line 1 that is not NAME=value") && !error.contains("unclosed"),
        "{error}"
    );
    std::fs::write(&path, b"CONVERSATION_STRICT=true\nSUPABASE_KEY=sb_secret_hidden\xff\n").unwrap();
    let error = Builder::from_env_and_file(&path).memory().open().await.unwrap_err().to_string();
    assert!(error.contains(".env has a line 2 that is not UTF-8") && !error.contains("hidden"), "{error}");
    let error = Builder::from_env_and_file(dir.path()).memory().open().await.unwrap_err().to_string();
    assert!(error.contains(" is a directory"), "{error}");
    let local = dir.path().join("with a mark.db");
    std::fs::write(&path, format!("\u{feff}CONVERSATION_LOCAL_PATH='{}'\n", local.display())).unwrap();
    Builder::from_env_and_file(&path).open().await.unwrap();
    assert!(local.exists(), "the parser skips a byte order mark");
}

/// Returns the resolved settings of a settings file with this text.
fn resolved(text: &[u8]) -> threadkeep::tools::ResolvedConfig {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(".env");
    std::fs::write(&path, text).unwrap();
    Builder::from_env_and_file(&path).resolve()
}

#[test]
fn settings_file_with_bad_lines_names_each_line() {
    let messages = |text: &[u8]| -> Vec<String> {
        resolved(text).problems.into_iter().map(|problem| problem.message).collect()
    };
    let long = format!("A={}\nB\n", "x".repeat(20_000));
    for (text, lines) in [
        ("A", &[1][..]),
        ("A=1\n\n# B\nB\nC=1\n", &[4]),
        ("A=1\r\nB C=2\r\n", &[2]),
        ("A='1\n2\n3'\nB\n", &[4]),
        ("A=1\nB='2\nC=3\n\n", &[2]),
        ("A=1\nB=\"2\nC=3", &[2]),
        ("A='1\n2' 3\nB=1", &[1]),
        ("B=1\nB \nA=2\nB # x\nB", &[2, 4, 5]),
        (&long, &[2]),
    ] {
        let message = |line| format!("has a line {line} that is not NAME=value, or whose quotes do not end");
        let expected: Vec<String> = lines.iter().map(message).collect();
        assert_eq!(messages(text.as_bytes()), expected, "{text:.20?}");
    }
    assert_eq!(messages(b"A=1\nB=\xff\n"), ["has a line 2 that is not UTF-8"]);
    assert_eq!(messages(b"\xff\xfeA\0"), ["has a line 1 that is not UTF-8"]);
    assert_eq!(messages(&b"B\n".repeat(1_000)).len(), 20);
}

#[test]
fn settings_file_values_are_parsed_as_in_a_shell() {
    let name = "CONVERSATION_LOCAL_PATH";
    for (text, expected) in [
        ("\u{feff}NAME=1", "1"),
        ("NAME=1 ", "1"),
        ("NAME=1\r\n\r\n", "1"),
        ("NAME='1\n2'", "1\n2"),
        ("", "./threadkeep.db"),
        ("A=x\nNAME=${A}.$A\n", "x.x"),
        ("A=x\nNAME='$A'\n", "$A"),
    ] {
        let config = resolved(text.replacen("NAME=", &format!("{name}="), 1).as_bytes());
        assert!(config.problems.is_empty(), "{:?}", config.problems);
        assert_eq!(config.local_path.to_str(), Some(expected), "{text:?}");
    }
}

#[test]
fn defaults_of_all_settings_are_valid() {
    let config = Builder::new().resolve();
    assert!(config.problems.is_empty(), "{:?}", config.problems);
    assert_eq!((config.timeout, config.queue_max_bytes), (Duration::from_secs(5), 256 << 20));
}

#[test]
fn key_facts_contain_claims_but_not_the_key() {
    let facts = |claims: &str| KeyFacts::of(&format!("e30.{}.c2ln", URL_SAFE_NO_PAD.encode(claims)));
    let secret = facts(r#"{"ref":"abcdef","role":"service_role","exp":1700000000}"#);
    assert!(secret.kind == KeyKind::Secret && secret.name.contains("service_role"), "{secret:?}");
    assert_eq!(secret.expires_at, Some(Timestamp(1_700_000_000_000)));
    assert_eq!(secret.project.as_deref(), Some("abcdef"));
    for public in [KeyFacts::of("sb_publishable_hidden"), facts(r#"{"role":"anon"}"#)] {
        assert!(public.kind == KeyKind::Public && public.expires_at.is_none(), "{public:?}");
        assert!(!format!("{public:?}").contains("hidden"));
    }
    let other = KeyFacts::of("hunter2");
    assert!(other.kind == KeyKind::Other && !other.name.contains("hunter2"), "{other:?}");
}
