//! HTTP/1.1 on the level of bytes, because the gateway must send broken answers.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Supabase's edge rejects a longer head.
const MAX_HEAD: usize = 16 << 10;

pub struct Request {
    pub method: String,
    /// The path and the query, as sent.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn json(status: u16, body: &str) -> Self {
        Self::of(status, "application/json; charset=utf-8", body)
    }

    pub fn html(status: u16) -> Self {
        Self::of(status, "text/html; charset=UTF-8", &Self::page(status))
    }

    pub fn page(status: u16) -> String {
        format!(
            "<!DOCTYPE html>\n<html><head><title>{status}</title></head><body>Error {status}</body></html>\n"
        )
    }

    fn of(status: u16, content_type: &str, body: &str) -> Self {
        let headers = vec![("content-type".to_owned(), content_type.to_owned())];
        Self { status, headers, body: body.into() }
    }

    fn head(&self) -> String {
        let mut head = format!("HTTP/1.1 {} \r\n", self.status);
        for (name, value) in &self.headers {
            head += &format!("{name}: {value}\r\n");
        }
        if self.status != 204 {
            head += &format!("content-length: {}\r\n", self.body.len());
        }
        head + "\r\n"
    }
}

/// A client connection.
pub struct Wire {
    stream: TcpStream,
    /// Bytes that were read but not used yet.
    buffer: Vec<u8>,
}

impl Wire {
    pub fn new(stream: TcpStream) -> Self {
        // Answers go out at once. A failure of this option only costs time.
        let _ = stream.set_nodelay(true);
        Self { stream, buffer: Vec::new() }
    }

    /// Reads the next request. Fails also at the normal end of the connection.
    pub async fn request(&mut self) -> io::Result<Request> {
        let mut request = loop {
            match parse_head(&self.buffer)? {
                Some((request, length)) if length <= MAX_HEAD => {
                    self.buffer.drain(..length);
                    break request;
                }
                None if self.buffer.len() <= MAX_HEAD => self.more().await?,
                _ => return Err(self.refuse_head().await),
            }
        };
        request.body = match (request.header("transfer-encoding"), request.header("content-length")) {
            (Some(_), _) => self.chunks().await?,
            (None, Some(length)) => self.take(length.parse().map_err(|_| garbage())?).await?,
            (None, None) => Vec::new(),
        };
        Ok(request)
    }

    pub async fn reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.stream.write_all(reply.head().as_bytes()).await?;
        self.stream.write_all(&reply.body).await
    }

    /// Announces the full length, but sends only half of the answer.
    pub async fn half_reply(&mut self, reply: &Reply) -> io::Result<()> {
        self.stream.write_all(reply.head().as_bytes()).await?;
        self.stream.write_all(&reply.body[..reply.body.len() / 2]).await?;
        self.stream.shutdown().await
    }

    /// Ends the connection with an RST, as a crashed peer or a firewall does.
    pub fn reset(self) {
        self.stream.set_zero_linger().expect("the socket is open");
    }

    /// Completes when the client closes the connection. Keeps the bytes that arrive before.
    pub async fn gone(&mut self) {
        while self.more().await.is_ok() {}
    }

    async fn refuse_head(&mut self) -> io::Error {
        // The connection closes next, so a failure of this reply does not matter.
        let _ = self.reply(&Reply::html(520)).await;
        garbage()
    }

    async fn more(&mut self) -> io::Result<()> {
        self.buffer.reserve(16 << 10);
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.buffer.len() < length {
            self.more().await?;
        }
        let rest = self.buffer.split_off(length);
        Ok(std::mem::replace(&mut self.buffer, rest))
    }

    async fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            match httparse::parse_chunk_size(&self.buffer).map_err(|_| garbage())? {
                httparse::Status::Partial => self.more().await?,
                httparse::Status::Complete((start, size)) => {
                    let chunk = self.take(start + size as usize + 2).await?;
                    body.extend_from_slice(&chunk[start..chunk.len() - 2]);
                    if size == 0 {
                        return Ok(body);
                    }
                }
            }
        }
    }
}

/// Parses a complete head. Returns the request without its body, and the length of the head.
fn parse_head(bytes: &[u8]) -> io::Result<Option<(Request, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; 100];
    let mut head = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(length) = head.parse(bytes).map_err(|_| garbage())? else {
        return Ok(None);
    };
    let headers = head.headers.iter().map(|header| {
        let value = String::from_utf8_lossy(header.value).into_owned();
        (header.name.to_ascii_lowercase(), value)
    });
    let request = Request {
        method: head.method.unwrap_or_default().to_owned(),
        target: head.path.unwrap_or_default().to_owned(),
        headers: headers.collect(),
        body: Vec::new(),
    };
    Ok(Some((request, length)))
}

fn garbage() -> io::Error {
    io::ErrorKind::InvalidData.into()
}
