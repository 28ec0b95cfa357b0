//! The log of the gateway's requests.

use std::sync::Arc;
use std::time::Instant;

use super::wire::Request;

/// A request that reached the gateway.
#[derive(Debug, Clone)]
pub struct Seen {
    /// Counts the requests of this gateway from 0. `forget` does not reset the count.
    pub number: u64,
    pub method: String,
    /// The path with the query string, as sent.
    pub path: String,
    /// Names in lower case.
    pub headers: Arc<[(String, String)]>,
    pub body: Arc<str>,
    pub started: Instant,
    /// The status of the server's answer, after which the request is committed or failed.
    ///
    /// A fault that does not forward the request leaves the status empty.
    pub carried_out: Option<u16>,
    /// The time at which the answer went out, the connection ended, or the client left.
    pub ended: Option<Instant>,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

#[derive(Default)]
pub struct Log {
    next: u64,
    seen: Vec<Seen>,
}

impl Log {
    pub fn begin(&mut self, request: &Request) -> Seen {
        let seen = Seen {
            number: self.next,
            method: request.method.clone(),
            path: request.target.clone(),
            headers: request.headers.as_slice().into(),
            body: String::from_utf8_lossy(&request.body).into(),
            started: Instant::now(),
            carried_out: None,
            ended: None,
        };
        self.next += 1;
        self.seen.push(seen.clone());
        seen
    }

    /// Returns the entry with this number, unless `forget` removed it.
    pub fn entry(&mut self, number: u64) -> Option<&mut Seen> {
        let place = self.seen.binary_search_by_key(&number, |seen| seen.number).ok()?;
        self.seen.get_mut(place)
    }

    pub fn forget(&mut self) {
        self.seen.clear();
    }

    pub fn all(&self) -> &[Seen] {
        &self.seen
    }

    pub fn on<'a>(&'a self, part: &'a str) -> impl Iterator<Item = &'a Seen> {
        self.seen.iter().filter(move |seen| seen.path.contains(part))
    }

    /// Returns the largest number of concurrent requests.
    ///
    /// In the order of time, each start adds one and each end subtracts one.
    pub fn max_in_flight(&self, part: &str) -> usize {
        let starts = self.on(part).map(|seen| (seen.started, 1));
        let ends = self.on(part).filter_map(|seen| Some((seen.ended?, -1)));
        let mut steps: Vec<(Instant, isize)> = starts.chain(ends).collect();
        steps.sort();
        let running = steps.iter().scan(0, |level: &mut isize, (_, step)| {
            *level += step;
            Some(*level)
        });
        running.max().unwrap_or(0) as usize
    }
}
