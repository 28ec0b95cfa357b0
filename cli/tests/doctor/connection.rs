//! Faults of the settings, the key and the connection to the project.

use std::time::Duration;

use base64::Engine as _;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::diagnosis::{Diagnosis, patient};
use crate::process::Cli;
use crate::stack::{Fault, Gateway, Server, Stack};

async fn shared(server: Server) -> Gateway {
    let stack = tokio::task::spawn_blocking(move || Stack::shared(server)).await.unwrap();
    stack.gateway().await
}

/// Returns a legacy key with these claims. No check reads the signature.
fn legacy(claims: &str) -> String {
    let part = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
    format!("{}.{}.{}", part(r#"{"alg":"HS256","typ":"JWT"}"#), part(claims), part("signature"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_problems_are_named() {
    let junk = Cli::new(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", "hunter2"),
        ("SUPABASE_KEY", "hunter2 \u{7}"),
        ("CONVERSATION_FRESH_SECONDS", "soon"),
        ("CONVERSATION_QUEUE_BITES", "1"),
    ]);
    let diagnosis = Diagnosis::of(&junk).await;
    assert_eq!(diagnosis.verdicts("failure"), ["settings"; 3], "{:#?}", diagnosis.findings);
    diagnosis
        .says("settings", "failure", &["SUPABASE_URL", "https://PROJECT.supabase.co"])
        .says("settings", "failure", &["SUPABASE_KEY", "secret (service_role) key"])
        .says("settings", "failure", &["CONVERSATION_FRESH_SECONDS", "a number of seconds"])
        .says("settings", "warning", &["CONVERSATION_QUEUE_BITES", "check its spelling"])
        .says("dns", "skipped", &["because settings failed"])
        .says("file", "ok", &["does not exist yet"]);

    let bare = [("CONVERSATION_STORAGE_BACKEND", "supabase")];
    Diagnosis::of(&Cli::new(&bare))
        .await
        .says("settings", "failure", &["SUPABASE_URL", "not set", "falls back to memory", ".env"])
        .says("settings", "failure", &["SUPABASE_KEY", "not set"]);
    let strict = [bare[0], ("CONVERSATION_STRICT", "true")];
    Diagnosis::of(&Cli::new(&strict)).await.says("settings", "failure", &["a daemon does not start"]);
    let dotenv = Cli::new(&[]);
    std::fs::write(dotenv.path(".env"), "hunter2 is no line\n").unwrap();
    Diagnosis::of(&dotenv).await.only_fails("settings", &[".env", "NAME=value"]);
    let rollback = Cli::new(&[("CONVERSATION_STORAGE_BACKEND", "memory"), ("SUPABASE_URL", "hunter2")]);
    Diagnosis::of(&rollback).await.says("settings", "warning", &["SUPABASE_URL", "not used now"]).says(
        "settings",
        "warning",
        &["a restart of the daemon loses all conversations"],
    );
    let two = |other| {
        let (url, key) = (("SUPABASE_URL", "http://127.0.0.1:1"), ("SUPABASE_KEY", "sb_secret_nobodys"));
        Cli::new(&[bare[0], url, key, ("SUPABASE_SERVICE_ROLE_KEY", other)])
    };
    let doubt = "SUPABASE_SERVICE_ROLE_KEY and SUPABASE_KEY hold different keys: SUPABASE_KEY is used";
    Diagnosis::of(&two("hunter2")).await.says("settings", "warning", &[doubt]);
    Diagnosis::of(&two("sb_secret_nobodys")).await.says("settings", "ok", &["all are valid"]);
    let forgotten = Cli::new(&[("SUPABASE_KEY", "sb_secret_nobodys")]);
    Diagnosis::of(&forgotten).await.says("settings", "warning", &["CONVERSATION_STORAGE_BACKEND is not"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unreachable_project_is_named() {
    let gateway = shared(Server::Postrust).await;
    let at = |url: &str| patient(&gateway, &[("SUPABASE_URL", url)]);
    Diagnosis::of(&at("http://no-such-host.invalid"))
        .await
        .only_fails("dns", &["no-such-host.invalid cannot be resolved", "SUPABASE_URL"])
        .says("key", "skipped", &["a secret key", "because dns failed"])
        .says("conversation", "skipped", &["because dns failed"]);
    let tls = at(&gateway.url().replace("http://", "https://"));
    Diagnosis::of(&tls).await.only_fails("tls", &["127.0.0.1", "encrypted (https) service", "certificate"]);
    let elsewhere = at(&format!("{}/somewhere/else", gateway.url()));
    Diagnosis::of(&elsewhere).await.only_fails("api", &["404", "https://PROJECT.supabase.co"]);
    gateway.refuse().await;
    Diagnosis::of(&patient(&gateway, &[]))
        .await
        .only_fails("tcp", &["127.0.0.1", "refused", "no firewall"])
        .says("api", "skipped", &["because tcp failed"]);
    let proxied = patient(&gateway, &[("HTTP_PROXY", &gateway.url())]);
    Diagnosis::of(&proxied)
        .await
        .says("dns", "skipped", &["HTTP_PROXY"])
        .only_fails("api", &["cannot be reached"]);
}

/// Returns a host name that no resolver looks up, because a label is too long.
fn nameless() -> String {
    "x".repeat(64)
}

/// A paused project has no DNS name.
#[tokio::test]
async fn hosted_project_without_dns_name_may_be_paused() {
    let paused = Cli::new(&[
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_PROJECT_ID", &*nameless()),
        ("SUPABASE_KEY", "sb_secret_nobodys"),
    ]);
    Diagnosis::of(&paused)
        .await
        .only_fails("dns", &["x.supabase.co cannot be resolved", "paused", "dashboard"]);
}

on_each_server!(wrong_key_is_named, gateway_faults_are_named, slow_connection_is_named);

async fn wrong_key_is_named(server: Server) {
    let gateway = shared(server).await;
    let keys = gateway.keys();
    let with = |key: &str| patient(&gateway, &[("SUPABASE_KEY", key)]);
    Diagnosis::of(&with(&keys.service_jwt)).await.is_well().says("key", "ok", &["service_role"]);
    let advice = "this project's secret (service_role) key";
    Diagnosis::of(&with("sb_secret_of_another_project"))
        .await
        .only_fails("key", &["Invalid API key", advice, "revoked"])
        .says("api", "ok", &["answers"])
        .says("conversation", "skipped", &["because key failed"]);
    Diagnosis::of(&with(&keys.anon_jwt)).await.only_fails("key", &["anon key", "public", advice]);
    Diagnosis::of(&with(&keys.publishable))
        .await
        .only_fails("key", &["publishable", "anon key", advice])
        .says("tcp", "ok", &[])
        .says("api", "skipped", &["because key failed"]);
    let expired = legacy(r#"{"role":"service_role","exp":1700000000}"#);
    Diagnosis::of(&with(&expired)).await.only_fails("key", &["expired on 2023-11-14", advice]);
    let of_supabase = [("SUPABASE_KEY", ""), ("SUPABASE_SECRET_KEY", &*keys.publishable)];
    Diagnosis::of(&patient(&gateway, &of_supabase))
        .await
        .only_fails("key", &["SUPABASE_SECRET_KEY is a pub"]);
    let odd = Diagnosis::of(&with("hunter2")).await;
    odd.only_fails("key", &["rejects"]).says("key", "warning", &["may not be a secret", advice]);
    let others = legacy(r#"{"role":"service_role","ref":"abcdef","exp":4102444800}"#);
    let url = format!("https://{}.supabase.co", nameless());
    let hosted = patient(&gateway, &[("SUPABASE_KEY", &others), ("SUPABASE_URL", &url)]);
    Diagnosis::of(&hosted).await.says("key", "failure", &["project abcdef", &nameless(), advice]);
}

async fn gateway_faults_are_named(server: Server) {
    let gateway = shared(server).await;
    let cli = patient(&gateway, &[]);
    for (fault, words) in [
        (Fault::html(522), &["HTTP 522", "status.supabase.com"][..]),
        (Fault::html(540), &["HTTP 540", "paused", "restore it"]),
        (Fault::html(402), &["HTTP 402", "restricted", "Billing"]),
        (Fault::html(200), &["something else", "sign-in page"]),
        (Fault::retry_after(503, 1), &["PGRST002", "its logs"]),
        (Fault::json_error(400, "22P05"), &["22P05"]),
        (Fault::Reset, &["connection", "healthy"]),
    ] {
        gateway.always(fault);
        let diagnosis = Diagnosis::of(&cli).await;
        diagnosis.only_fails("api", words).says("conversation", "skipped", &["because api failed"]);
        diagnosis.says("file", "ok", &["does not exist yet"]);
    }
    gateway.always(Fault::Hang);
    let cli = patient(&gateway, &[("SUPABASE_TIMEOUT_SECONDS", "0.3")]);
    Diagnosis::of(&cli).await.only_fails("api", &["did not answer within 300", "SUPABASE_TIMEOUT_SECONDS"]);
    gateway.clear();
}

async fn slow_connection_is_named(server: Server) {
    let gateway = shared(server).await;
    let slow = |millis| {
        gateway.rule(move |seen| match seen.path.contains("threadkeep_probe") {
            true => Fault::Slow(Duration::from_millis(millis)),
            false => Fault::Pass,
        });
    };
    slow(300);
    let settings = [("SUPABASE_TIMEOUT_SECONDS", "10"), ("CONVERSATION_SOFT_TIMEOUT_SECONDS", "0.4")];
    let late = Diagnosis::of(&patient(&gateway, &settings)).await;
    late.says("round trip", "warning", &["CONVERSATION_SOFT_TIMEOUT_SECONDS is 400ms", "region"]);
    assert_eq!(late.verdicts("failure"), [""; 0]);
    slow(1_200);
    let later = Diagnosis::of(&patient(&gateway, &[("SUPABASE_TIMEOUT_SECONDS", "2.3")])).await;
    later.says("round trip", "warning", &["SUPABASE_TIMEOUT_SECONDS is 2.3s", "an outage", "region"]);
}

/// Starts a server whose response never ends. Each part follows after `pause`.
async fn endless(status: &'static str, part: &'static [u8], pause: Duration) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut connection, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut request = [0; 4096];
                // A client that sends nothing only tests the port.
                if connection.read(&mut request).await.unwrap_or(0) == 0 {
                    return;
                }
                let head = format!("HTTP/1.1 {status}\r\nconnection: close\r\n\r\n");
                let mut sent = connection.write_all(head.as_bytes()).await;
                while sent.is_ok() {
                    sent = connection.write_all(part).await;
                    tokio::time::sleep(pause).await;
                }
            });
        }
    });
    url
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn endless_response_is_named() {
    let fast = Duration::ZERO;
    let slow = Duration::from_millis(50);
    for (status, part, pause) in [
        ("200 OK", &[b' '; 65_536][..], fast),
        ("404 Not Found", &[b'x'; 65_536], fast),
        ("200 OK", b" ", slow),
    ] {
        let url = endless(status, part, pause).await;
        let cli = Cli::new(&[
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
            ("SUPABASE_URL", &*url),
            ("SUPABASE_KEY", "sb_secret_nobodys"),
            ("SUPABASE_TIMEOUT_SECONDS", "1"),
        ]);
        let ended = tokio::select! {
            diagnosis = Diagnosis::of(&cli) => diagnosis,
            () = tokio::time::sleep(Duration::from_secs(120)) => panic!("the doctor does not end: {status}"),
        };
        assert!(!ended.verdicts("failure").is_empty(), "{:#?}", ended.findings);
    }
}
