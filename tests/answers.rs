//! The Supabase client over a server with prepared answers: the meaning of each answer, the requests, and the keys.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use threadkeep::store::{
    BreakerState, Json, LoadRequest, Loaded, Record, ResilientStore, Store, Supabase, Timestamp, Write,
    WriterId,
};
use threadkeep::tools::{Caller, FUNCTIONS, KeyFacts, KeyKind, ProjectProbe};
use threadkeep::{Error, ErrorKind, Key, Result, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const ABSENT: &str = r#"{"now":1764000000000,"revision":4,"rows":[{"state":"absent","version":"0"}]}"#;

/// A server that gives the prepared answer to each request with an accepted key.
#[derive(Clone)]
struct Server(Arc<Mutex<State>>);

struct State {
    url: String,
    status: u16,
    body: String,
    /// The only key that the server accepts, if set.
    accepted: Option<String>,
    last_request: String,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (accepted, last_request) = (None, String::new());
        let state = State { url, status: 200, body: ABSENT.into(), accepted, last_request };
        let server = Self(Arc::new(Mutex::new(state)));
        let this = server.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(this.clone().serve(connection));
            }
        });
        server
    }

    async fn serve(self, mut connection: TcpStream) {
        while let Some(request) = read_request(&mut connection).await {
            let answer = {
                let mut state = self.0.lock().unwrap();
                let is_accepted =
                    state.accepted.as_ref().is_none_or(|key| request.contains(&format!("apikey: {key}\r\n")));
                state.last_request = request;
                let rejected = (401, r#"{"message":"Invalid API key"}"#);
                let (status, body) = if is_accepted { (state.status, state.body.as_str()) } else { rejected };
                format!("HTTP/1.1 {status} S\r\ncontent-length: {}\r\n\r\n{body}", body.len())
            };
            if connection.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }

    fn answer(&self, status: u16, body: impl Into<String>) {
        let mut state = self.0.lock().unwrap();
        (state.status, state.body) = (status, body.into());
    }

    fn accept(&self, key: &str) {
        self.0.lock().unwrap().accepted = Some(key.to_owned());
    }

    fn last_request(&self) -> String {
        self.0.lock().unwrap().last_request.clone()
    }

    fn client(&self, key: &str) -> Supabase {
        Supabase::new(&self.0.lock().unwrap().url, key).unwrap()
    }
}

async fn read_request(connection: &mut TcpStream) -> Option<String> {
    let (mut request, mut part) = (Vec::new(), vec![0; 64 << 10]);
    loop {
        let text = String::from_utf8_lossy(&request);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            if body.len() >= length.map_or(0, |length| length.parse().unwrap()) {
                return Some(text.into_owned());
            }
        }
        match connection.read(&mut part).await {
            Ok(read) if read > 0 => request.extend_from_slice(&part[..read]),
            _ => return None,
        }
    }
}

async fn load(store: &Supabase) -> Result<Vec<Loaded>> {
    store.load(&[LoadRequest::new(Key::new("k").unwrap())]).await
}

async fn error(server: &Server, store: &Supabase, status: u16, body: &str) -> Error {
    server.answer(status, body);
    load(store).await.unwrap_err()
}

/// Repeats loads until one succeeds.
async fn load_in_the_end(store: &Supabase) {
    for _ in 0..600 {
        if load(store).await.is_ok() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the client never uses the new key");
}

fn body_of(code: &str) -> String {
    format!(r#"{{"code":"{code}","message":"m","details":null,"hint":null}}"#)
}

#[tokio::test]
async fn sqlstate_decides_before_status() {
    use ErrorKind::{Overloaded, Rejected, SchemaOutdated, Unauthorized, Unavailable};
    let server = Server::start().await;
    let store = server.client("sb_secret_x");
    for (codes, expected) in [
        (&["PGRST001", "PGRSTX00", "40003", "08006", "57P01", "58030"][..], (Unavailable, true)),
        (&["PGRST000", "PGRST003", "PGRST106", "PGRST203"], (Unavailable, false)),
        (&["25006", "3F000", "XX001", "53300", "57014", "40001", "42601"], (Unavailable, false)),
        (&["P0001", "PGRST102", "53400", "21000", "22P05", "23505", "54000"], (Rejected, false)),
        (&["55P03"], (Overloaded, false)),
        (&["PGRST301", "42501"], (Unauthorized, false)),
        (&["PGRST202", "42P01", "42883"], (SchemaOutdated, false)),
    ] {
        for (code, status) in codes.iter().flat_map(|code| [(code, 500), (code, 404)]) {
            let error = error(&server, &store, status, &body_of(code)).await;
            assert_eq!((error.kind(), error.outcome_unknown()), expected, "{code}");
        }
    }
}

#[tokio::test]
async fn answer_without_usable_code_is_an_outage() {
    use ErrorKind::{Unauthorized, Unavailable};
    let server = Server::start().await;
    let store = server.client("sb_secret_x");
    for body in ["", "{}", "<html>", &body_of(""), r#"{"code":"nginx"}"#] {
        for (statuses, is_unknown) in [
            (&[400, 408, 409, 422, 500, 502, 503, 504, 520, 522, 527, 530, 544][..], true),
            (&[300, 302, 402, 404, 405, 406, 407, 413, 414, 429, 431, 540], false),
        ] {
            for status in statuses {
                let error = error(&server, &store, *status, body).await;
                assert_eq!(
                    (error.kind(), error.outcome_unknown()),
                    (Unavailable, is_unknown),
                    "{status} {body}"
                );
            }
        }
        for status in [401, 403] {
            let expected = if body == "<html>" { Unavailable } else { Unauthorized };
            assert_eq!(error(&server, &store, status, body).await.kind(), expected, "{status} {body}");
        }
    }
}

#[tokio::test]
async fn failure_of_writes_only_leaves_the_breaker_closed() {
    let server = Server::start().await;
    for (is_outage, status, code) in [
        (false, 500, "53100"),
        (false, 405, "25006"),
        (false, 400, "3F000"),
        (false, 413, ""),
        (false, 500, "XX001"),
        (false, 401, ""),
        (true, 400, ""),
        (true, 404, ""),
        (true, 406, "PGRST106"),
        (true, 300, "PGRST203"),
        (true, 500, "57014"),
        (true, 503, "PGRST002"),
    ] {
        server.answer(status, body_of(code));
        let store = ResilientStore::new(server.client("sb_secret_x"), Duration::from_secs(5));
        let write = Write::new(Record::tombstone(Key::new("k").unwrap(), Version::from_raw(1 << 30)));
        for _ in 0..6 {
            store.apply(std::slice::from_ref(&write)).await.unwrap_err();
        }
        let is_closed = store.breaker().unwrap().state() == BreakerState::Closed;
        assert_eq!(is_closed, !is_outage, "{status} {code}");
    }
}

#[tokio::test]
async fn each_failure_of_a_diagnosis_has_its_remedy() {
    use ErrorKind::{Rejected, SchemaOutdated, Unauthorized, Unavailable};
    let server = Server::start().await;
    let probe = ProjectProbe::new(server.client("sb_secret_x"));
    for (status, body, kind, remedy) in [
        (540, "", Unavailable, "restore it"),
        (402, "{}", Unavailable, "Billing"),
        (522, "<html>", Unavailable, ""),
        (503, r#"{"code":"PGRST001"}"#, Unavailable, ""),
        (401, r#"{"message":"Invalid API key"}"#, Unauthorized, "SUPABASE_KEY"),
        (401, r#"{"code":"42501"}"#, Unauthorized, "grant the privilege"),
        (404, r#"{"code":"PGRST202"}"#, SchemaOutdated, "apply the migrations"),
        (404, r#"{"message":"no Route"}"#, Unavailable, "https://PROJECT.supabase.co"),
        (301, "", Unavailable, "https://PROJECT.supabase.co"),
        (403, "<html>", Unavailable, "the rules of the gateway"),
        (200, "<html>", Unavailable, "https://PROJECT.supabase.co"),
        (400, "{}", Unavailable, ""),
        (400, r#"{"code":"22P05"}"#, Rejected, ""),
    ] {
        server.answer(status, body);
        let error = probe.call_idle(Caller::ServiceRole, FUNCTIONS[0]).await.unwrap_err();
        assert_eq!(error.kind(), kind, "{status} {body}");
        assert_eq!(error.remedy().is_none(), remedy.is_empty(), "{status} {body}: {error}");
        assert!(error.remedy().unwrap_or_default().contains(remedy), "{status} {body}: {error}");
    }
    server.answer(404, body_of("PGRST205"));
    let folder = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/migrations")).unwrap();
    let mut names: Vec<_> = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.retain(|name| name.ends_with(".sql"));
    names.sort_unstable();
    assert_eq!(probe.missing_migrations().await, names);
}

#[tokio::test]
async fn request_has_the_value_unchanged() {
    let server = Server::start().await;
    server.answer(200, r#"{"now":1764000000000,"revision":4,"rows":[{"state":"stored"}]}"#);
    let value = Json::new(r#"{"digits":12345678901234567890.10}"#).unwrap();
    let key = Key::new("a \"quoted\" key").unwrap();
    let record = Record::put(key, Version::from_raw(i64::MAX), value, Timestamp(5));
    let write = Write::new(record).with_writer(WriterId::from_raw(1 << 24)).with_if_version(Version::NONE);
    server.client("sb_secret_x").apply(&[write]).await.unwrap();
    let request = server.last_request();
    assert!(request.ends_with(
        r#"{"writes":[{"key":"a \"quoted\" key","version":"9223372036854775807","writer":"16777216","expires_at":5,"metadata":{},"value":{"digits":12345678901234567890.10},"if_version":"0"}]}"#
    ), "{request}");
}

#[tokio::test]
async fn null_is_a_value() {
    let server = Server::start().await;
    let row = r#"{"state":"found","key":"k","version":"7","expires_at":9,"user":null,"metadata":null,"value":null}"#;
    server.answer(200, format!(r#"{{"now":1764000000000,"revision":4,"rows":[{row}]}}"#));
    let found = load(&server.client("sb_secret_x")).await.unwrap();
    let [Loaded::Found(found)] = &found[..] else { panic!("{found:?}") };
    assert_eq!((found.value.as_ref().map(Json::as_str), found.metadata.as_str()), (Some("null"), "{}"));
}

#[tokio::test]
async fn each_form_of_key_has_its_kind_and_headers() {
    let legacy = |role: &str| {
        let claims = URL_SAFE_NO_PAD.encode(format!(r#"{{"iss":"supabase","role":"{role}"}}"#));
        format!("eyJhbGciOiJIUzI1NiJ9.{claims}.c2lnbmF0dXJl")
    };
    let server = Server::start().await;
    for (key, kind, has_bearer) in [
        ("sb_secret_abc".to_owned(), KeyKind::Secret, false),
        ("sb_publishable_abc".into(), KeyKind::Public, false),
        (legacy("service_role"), KeyKind::Secret, true),
        (legacy("anon"), KeyKind::Public, true),
        ("something".into(), KeyKind::Other, false),
    ] {
        let store = server.client(&format!(" {key}\r\n"));
        load(&store).await.unwrap();
        let request = server.last_request();
        assert!(request.contains(&format!("apikey: {key}\r\n")), "{request}");
        assert_eq!(request.contains(&format!("authorization: Bearer {key}\r\n")), has_bearer, "{request}");
        assert_eq!(KeyFacts::of(&key).kind, kind);
        assert!(!format!("{store:?}").contains(&key), "Debug shows the key");
    }
    for junk in ["", " \n", "two words", "two\nlines", "\u{fffd}", "\0"] {
        assert!(Supabase::new("https://abc.supabase.co", junk).is_err(), "{junk:?}");
    }
}

#[tokio::test]
async fn many_rejected_calls_ask_for_one_key() {
    let server = Server::start().await;
    server.accept("new-0");
    let calls = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&calls);
    let provider = move || Some(format!("new-{}", count.fetch_add(1, SeqCst)));
    let store = server.client("old").key_provider(provider);
    for result in futures::future::join_all((0..100).map(|_| load(&store))).await {
        result.unwrap();
    }
    assert_eq!(calls.load(SeqCst), 1);
    let started = std::time::Instant::now();
    server.accept("new-2");
    load_in_the_end(&store).await;
    assert_eq!(calls.load(SeqCst), 3);
    assert!(started.elapsed() > Duration::from_secs(1), "the provider is called once a second at most");
}

#[tokio::test]
async fn unusable_answer_of_provider_keeps_the_key() {
    let server = Server::start().await;
    for answer in [None, Some("old\n"), Some(""), Some(" \n"), Some("two\nlines"), Some("\u{fffd}\0")] {
        let store = server.client("old").key_provider(move || answer.map(str::to_owned));
        server.accept("new");
        assert_eq!(load(&store).await.unwrap_err().kind(), ErrorKind::Unauthorized, "{answer:?}");
        server.accept("old");
        load(&store).await.unwrap();
    }
}

#[tokio::test]
async fn panicking_provider_is_called_again() {
    let server = Server::start().await;
    server.accept("new");
    let count = AtomicUsize::new(0);
    let store = server.client("old").key_provider(move || {
        assert!(count.fetch_add(1, SeqCst) > 0, "the provider panics");
        Some("new".into())
    });
    assert_eq!(load(&store).await.unwrap_err().kind(), ErrorKind::Unauthorized);
    load_in_the_end(&store).await;
}

#[tokio::test]
async fn slow_provider_delivers_its_key_later() {
    let server = Server::start().await;
    server.accept("new");
    let (send, answers) = std::sync::mpsc::channel();
    let answers = Mutex::new(answers);
    let store = server.client("old").key_provider(move || answers.lock().unwrap().recv().ok());
    let store = store.idle_timeout(Duration::from_millis(500));
    for _ in 0..3 {
        assert_eq!(load(&store).await.unwrap_err().kind(), ErrorKind::Unauthorized);
    }
    send.send("new".to_owned()).unwrap();
    load_in_the_end(&store).await;
}
