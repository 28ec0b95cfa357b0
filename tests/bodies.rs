//! Endless HTTP responses: a call that gets one fails, and the memory of this process stays bounded (I12).
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use threadkeep::store::{ListRequest, LoadRequest, Loaded, Record, Store, Supabase, Timestamp, Write};
use threadkeep::{Error, ErrorKind, Key, Result, Version};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const MIB: usize = 1 << 20;
/// The beginning of each response of a threadkeep function.
const RESPONSE_START: &str = r#"{"now" : 1764000000000, "revision" : 4, "rows" : ["#;

/// A response: its head, the first bytes of the body, and a part that is repeated `times` times.
#[derive(Debug, Clone)]
struct Response {
    head: String,
    begin: String,
    part: Vec<u8>,
    times: usize,
    end: String,
    is_chunked: bool,
}

impl Response {
    fn endless(head: &str, begin: &str, byte: u8) -> Self {
        Self {
            head: format!("HTTP/1.1 {head}\r\ncontent-type: application/json\r\n\r\n"),
            begin: begin.to_owned(),
            part: vec![byte; 64 << 10],
            times: usize::MAX,
            end: String::new(),
            is_chunked: head.contains("chunked"),
        }
    }

    async fn send(&self, to: &mut TcpStream) -> std::io::Result<()> {
        to.write_all(self.head.as_bytes()).await?;
        self.send_part(to, self.begin.as_bytes()).await?;
        for _ in 0..self.times {
            self.send_part(to, &self.part).await?;
        }
        self.send_part(to, self.end.as_bytes()).await
    }

    async fn send_part(&self, to: &mut TcpStream, part: &[u8]) -> std::io::Result<()> {
        // An empty chunk would end the body.
        if !self.is_chunked || part.is_empty() {
            return to.write_all(part).await;
        }
        to.write_all(format!("{:x}\r\n", part.len()).as_bytes()).await?;
        to.write_all(part).await?;
        to.write_all(b"\r\n").await
    }
}

/// A server that sends the configured response to each request, and counts the connections that the client closed.
#[derive(Clone)]
struct Server {
    url: String,
    response: Arc<Mutex<Option<Response>>>,
    closed: Arc<Mutex<usize>>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { url, response: Arc::default(), closed: Arc::default() };
        let this = server.clone();
        tokio::spawn(async move {
            while let Ok((connection, _)) = listener.accept().await {
                tokio::spawn(this.clone().serve(connection));
            }
        });
        server
    }

    async fn serve(self, mut connection: TcpStream) {
        let mut request = vec![0; MIB];
        // Each request of these tests arrives in one part.
        while connection.read(&mut request).await.is_ok_and(|read| read > 0) {
            let response = self.response.lock().unwrap().clone().unwrap();
            if response.send(&mut connection).await.is_err() {
                *self.closed.lock().unwrap() += 1;
                return;
            }
        }
    }

    fn response(&self, response: Response) {
        *self.response.lock().unwrap() = Some(response);
    }

    async fn wait_until_closed(&self, times: usize) {
        for _ in 0..3_000 {
            if *self.closed.lock().unwrap() == times {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the connection stays open: {} of {times}", *self.closed.lock().unwrap());
    }
}

/// Returns the peak memory of this process in bytes.
#[cfg(target_os = "linux")]
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[cfg(not(target_os = "linux"))]
fn peak_memory() -> usize {
    0
}

fn requests() -> Vec<LoadRequest> {
    vec![LoadRequest::from(Key::new("k").unwrap())]
}

fn writes() -> Vec<Write> {
    let record = Record {
        key: Key::new("k").unwrap(),
        version: Version::from_raw(1 << 30),
        value: Some(threadkeep::store::Json::new("1").unwrap()),
        expires_at: Timestamp(i64::MAX >> 21),
        user: None,
        metadata: threadkeep::store::Json::default(),
    };
    vec![record.into()]
}

/// Calls the operation with this number, and returns its name and its error.
async fn operation_error(store: &Supabase, operation: usize) -> (&'static str, Error) {
    fn error<T>(name: &'static str, result: Result<T>) -> (&'static str, Error) {
        (name, result.err().unwrap_or_else(|| panic!("{name} succeeds")))
    }
    match operation {
        0 => error("probe", store.probe().await),
        1 => error("apply", store.apply(&writes()).await),
        2 => error("touch", store.touch(&[Key::new("k").unwrap()]).await),
        3 => error("purge", store.purge(1).await),
        4 => error("load", store.load(&requests()).await),
        _ => error("list", store.list(&ListRequest::new(1)).await),
    }
}

const OPERATIONS: usize = 6;

/// Both checks are one test, because the peak memory is a figure of the whole process.
#[tokio::test]
async fn endless_response_fails_in_bounded_memory() {
    let server = Server::start().await;
    let store = Supabase::new(&server.url, "sb_secret_x").unwrap();
    check_endless_responses(&server, &store).await;
    check_record_larger_than_a_page(&server, &store).await;
}

async fn check_endless_responses(server: &Server, store: &Supabase) {
    let (before, mut times) = (peak_memory(), 0);
    for (head, is_success) in [
        ("200 OK\r\ntransfer-encoding: chunked", true),
        ("200 OK\r\ncontent-length: 99999999999999", true),
        ("200 OK\r\nconnection: close", true),
        ("503 Service Unavailable\r\ntransfer-encoding: chunked", false),
        ("400 Bad Request\r\ncontent-length: 99999999999999", false),
        ("302 Found\r\nconnection: close", false),
    ] {
        for (begin, byte) in [("", b' '), ("<html>", b'x'), ("{\"a\":\"", b'x'), (RESPONSE_START, b' ')] {
            // A body that begins like a response with records may be one, so a load may read much of it.
            let operations = if is_success && begin == RESPONSE_START { 4 } else { OPERATIONS };
            server.response(Response::endless(head, begin, byte));
            for operation in 0..operations {
                let (name, error) = operation_error(store, operation).await;
                let context = format!("{name}, {head:?}, {begin:?}: {error}");
                if is_success {
                    assert_eq!(
                        (error.kind(), error.outcome_unknown()),
                        (ErrorKind::Unavailable, true),
                        "{context}"
                    );
                    assert!(error.to_string().contains("no function of threadkeep gives"), "{context}");
                }
                times += 1;
                server.wait_until_closed(times).await;
            }
        }
    }
    let growth = (peak_memory() - before) / MIB;
    assert!(growth < 48, "{times} endless responses took {growth} MiB");

    // A record may be large, but it must have an end.
    for operation in [4, 5] {
        server.response(Response::endless("200 OK\r\ntransfer-encoding: chunked", RESPONSE_START, b' '));
        let (name, error) = operation_error(store, operation).await;
        assert!(error.is_outage() && error.to_string().contains("no function"), "{name}: {error}");
        times += 1;
        server.wait_until_closed(times).await;
    }
    let growth = (peak_memory() - before) / MIB;
    assert!(growth < 400, "an endless record took {growth} MiB");

    // The client rejects a response by its declared length, before it reads the body.
    server.response(Response::endless("200 OK\r\ncontent-length: 99999999999999", "", b' '));
    let started = std::time::Instant::now();
    assert!(operation_error(store, 4).await.1.is_outage());
    assert!(started.elapsed() < Duration::from_secs(30));
}

async fn check_record_larger_than_a_page(server: &Server, store: &Supabase) {
    let row =
        r#"{"state":"found","key":"k","version":"7","expires_at":9,"user":null,"metadata":{},"value":""#;
    let (begin, end, times) = (format!("{RESPONSE_START}{row}"), r#""}]}"#.to_owned(), 1_440);
    let length = begin.len() + times * (64 << 10) + end.len();
    let response = Response::endless(&format!("200 OK\r\ncontent-length: {length}"), &begin, b'x');
    server.response(Response { times, end, ..response });
    let found = store.load(&requests()).await.unwrap();
    let [Loaded::Found(record)] = &found[..] else { panic!("{found:?}") };
    assert_eq!(record.value.as_ref().unwrap().len(), times * (64 << 10) + 2);
}
