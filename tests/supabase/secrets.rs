//! Logs and errors contain no secret.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use threadkeep::{Builder, Cache, Error, OnOutage};

use crate::credentials::{daemon_with_key_file, next_key, with_key_file, write_key};
use crate::stack::{Fault, Gateway, Server};
use crate::{SECOND, eventually, key, queue_path, rejecting, shared};

on_each_server!(logs_and_errors_contain_no_secret);

/// Collects the log lines.
#[derive(Clone, Default)]
pub struct ProcessLog(Arc<Mutex<Vec<u8>>>);

impl ProcessLog {
    pub fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// Many OS threads write log lines, so the process has one log.
    pub fn of_process() -> &'static Self {
        static LOG: OnceLock<ProcessLog> = OnceLock::new();
        LOG.get_or_init(|| {
            let log = Self::default();
            let writer = log.clone();
            let filter = "threadkeep=trace,reqwest=trace,hyper=trace,hyper_util=trace,h2=trace";
            tracing_subscriber::fmt().with_env_filter(filter).with_writer(move || writer.clone()).init();
            log
        })
    }
}

impl Write for ProcessLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Formats the error and its sources.
fn error_texts(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text += &format!(" {error} {error:?}");
        cause = error.source();
    }
    text
}

async fn logs_and_errors_contain_no_secret(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let log = ProcessLog::of_process();
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
            shown += &error_texts(&cache.put(&key, content).await.unwrap_err());
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
        shown += &error_texts(&Builder::from_vars(vars).queue(queue_path()).open().await.unwrap_err());
    }
    shown += &rotation_texts(&gateway).await;
    shown += &log.text();
    assert!(shown.contains("circuit breaker opened"), "the log lacks the breaker's line");
    assert!(shown.contains("the Supabase key was replaced") && shown.contains("key panicked"));
    let body = keys.service_jwt.split('.').nth(2).unwrap();
    let ours = [&*keys.secret, &keys.service_jwt, body, content, &next_key()];
    let bad =
        ["hunter2", "sb_secret_as_url", "sb_secret_\u{7}", "sb_secret_as_path", "sb_secret_and", "panics"];
    for secret in ours.into_iter().chain(bad) {
        assert!(!shown.contains(secret), "the secret {secret:?} is in {shown}");
    }
}

/// Rotates the key with a malformed key file and a panicking provider. Returns the texts of all errors and `Debug`s.
async fn rotation_texts(gateway: &Gateway) -> String {
    let (cache, folder) = daemon_with_key_file(gateway).await;
    let file = folder.path().join("key");
    let panicking = rejecting(gateway).key_provider(|| panic!("{} panics", next_key()));
    let mut shown = format!("{:?} {panicking:?}", with_key_file(gateway, &file));
    let panicking = panicking.open().await.unwrap();
    gateway.rotate_secret();
    shown += &error_texts(&panicking.put(key("secret"), "1").await.unwrap_err());
    write_key(&folder, "sb_secret_and\u{7}");
    shown += &error_texts(&cache.put(key("secret"), "1").await.unwrap_err());
    shown += &error_texts(&with_key_file(gateway, &file).open().await.unwrap_err());
    shown += &error_texts(&with_key_file(gateway, Path::new("sb_secret_as_path")).open().await.unwrap_err());
    write_key(&folder, next_key());
    eventually("the cache uses the new key", async || cache.put(key("secret"), "1").await.is_ok()).await;
    shown + &format!("{cache:?} {:?}", cache.health())
}
