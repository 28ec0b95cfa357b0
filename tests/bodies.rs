//! Answers without end: a call that gets one fails, and this process does not grow.
#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::Duration;

use threadkeep::{
    Error, ErrorKind, Key, Loaded, Page, Record, Result, Store, Supabase, Timestamp, Version, Want, Write,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

const MIB: usize = 1 << 20;
/// How the functions' answers begin.
const OURS: &str = r#"{"now" : 1764000000000, "schema" : 2, "rows" : ["#;

/// An answer: its head, how its body begins, and what follows again and again, so often.
#[derive(Debug, Clone)]
struct Answer {
    head: String,
    begin: String,
    part: Vec<u8>,
    times: usize,
    end: String,
    is_chunked: bool,
}

impl Answer {
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

/// A server that gives each request the answer that is set, and notes how many of its connections the client gave up.
#[derive(Clone)]
struct Server {
    url: String,
    answer: Arc<Mutex<Option<Answer>>>,
    given_up: Arc<Mutex<usize>>,
}

impl Server {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = Self { url, answer: Arc::default(), given_up: Arc::default() };
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
        // The requests of these tests come in one part.
        while connection.read(&mut request).await.is_ok_and(|read| read > 0) {
            let answer = self.answer.lock().unwrap().clone().unwrap();
            if answer.send(&mut connection).await.is_err() {
                *self.given_up.lock().unwrap() += 1;
                return;
            }
        }
    }

    fn answer(&self, answer: Answer) {
        *self.answer.lock().unwrap() = Some(answer);
    }

    async fn is_given_up(&self, times: usize) {
        for _ in 0..3_000 {
            if *self.given_up.lock().unwrap() == times {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the connection stays open: {} of {times}", *self.given_up.lock().unwrap());
    }
}

/// The most memory that this process had so far.
#[cfg(target_os = "linux")]
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10
}

#[cfg(not(target_os = "linux"))]
fn peak() -> usize {
    0
}

fn wants() -> Vec<Want> {
    vec![Want::from(Key::new("k").unwrap())]
}

fn writes() -> Vec<Write> {
    let record = Record {
        key: Key::new("k").unwrap(),
        version: Version::from_raw(1 << 30),
        value: Some(threadkeep::Json::new("1").unwrap()),
        expires_at: Timestamp(i64::MAX >> 21),
        user: None,
        metadata: threadkeep::Json::default(),
    };
    vec![record.into()]
}

/// Each operation of the store, and how it fails.
async fn fails(store: &Supabase, operation: usize) -> (&'static str, Error) {
    fn error<T>(name: &'static str, result: Result<T>) -> (&'static str, Error) {
        (name, result.err().unwrap_or_else(|| panic!("{name} succeeds")))
    }
    match operation {
        0 => error("probe", store.probe().await),
        1 => error("apply", store.apply(&writes()).await),
        2 => error("touch", store.touch(&[Key::new("k").unwrap()]).await),
        3 => error("purge", store.purge(1).await),
        4 => error("load", store.load(&wants()).await),
        _ => error("recent", store.recent(&Page { user: None, most: 1, after: None }).await),
    }
}

const OPERATIONS: usize = 6;

/// In one test: memory is measured for the process.
#[tokio::test]
async fn an_answer_without_end_fails_and_takes_no_memory() {
    let server = Server::start().await;
    let store = Supabase::new(&server.url, "sb_secret_x").unwrap();
    no_answer_is_without_end(&server, &store).await;
    a_record_that_is_larger_than_a_page_is_legal(&server, &store).await;
}

async fn no_answer_is_without_end(server: &Server, store: &Supabase) {
    let (before, mut times) = (peak(), 0);
    for (head, is_success) in [
        ("200 OK\r\ntransfer-encoding: chunked", true),
        ("200 OK\r\ncontent-length: 99999999999999", true),
        ("200 OK\r\nconnection: close", true),
        ("503 Service Unavailable\r\ntransfer-encoding: chunked", false),
        ("400 Bad Request\r\ncontent-length: 99999999999999", false),
        ("302 Found\r\nconnection: close", false),
    ] {
        for (begin, byte) in [("", b' '), ("<html>", b'x'), ("{\"a\":\"", b'x'), (OURS, b' ')] {
            // What begins as an answer with records may be one.
            let operations = if is_success && begin == OURS { 4 } else { OPERATIONS };
            server.answer(Answer::endless(head, begin, byte));
            for operation in 0..operations {
                let (name, error) = fails(store, operation).await;
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
                server.is_given_up(times).await;
            }
        }
    }
    let grown = (peak() - before) / MIB;
    assert!(grown < 48, "{times} answers without end took {grown} MiB");

    // A record may be large, but not without end either.
    for operation in [4, 5] {
        server.answer(Answer::endless("200 OK\r\ntransfer-encoding: chunked", OURS, b' '));
        let (name, error) = fails(store, operation).await;
        assert!(error.is_outage() && error.to_string().contains("no function"), "{name}: {error}");
        times += 1;
        server.is_given_up(times).await;
    }
    let grown = (peak() - before) / MIB;
    assert!(grown < 400, "a record without end took {grown} MiB");

    // A length that is said to be too large is believed.
    server.answer(Answer::endless("200 OK\r\ncontent-length: 99999999999999", "", b' '));
    let began = std::time::Instant::now();
    assert!(fails(store, 4).await.1.is_outage());
    assert!(began.elapsed() < Duration::from_secs(30));
}

async fn a_record_that_is_larger_than_a_page_is_legal(server: &Server, store: &Supabase) {
    let row = r#"{"state":"found","key":"k","version":"7","expires":9,"user":null,"metadata":{},"value":""#;
    let (begin, end, times) = (format!("{OURS}{row}"), r#""}]}"#.to_owned(), 1_440);
    let length = begin.len() + times * (64 << 10) + end.len();
    let answer = Answer::endless(&format!("200 OK\r\ncontent-length: {length}"), &begin, b'x');
    server.answer(Answer { times, end, ..answer });
    let found = store.load(&wants()).await.unwrap();
    let [Loaded::Found(record)] = &found[..] else { panic!("{found:?}") };
    assert_eq!(record.value.as_ref().unwrap().len(), times * (64 << 10) + 2);
}
