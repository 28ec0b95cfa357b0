//! The faults that a gateway can apply to a request.

use std::collections::VecDeque;
use std::time::Duration;

use super::Seen;
use super::wire::Reply;

#[derive(Debug, Clone, Default)]
pub enum Fault {
    /// No fault.
    #[default]
    Pass,
    /// The gateway resets the connection (RST) and does not forward the request.
    Reset,
    /// The gateway forwards the request after `release` or `clear`.
    Hang,
    /// The gateway forwards the request after this time.
    Slow(Duration),
    /// The gateway sends this answer and does not forward the request.
    Status { code: u16, headers: Vec<(String, String)>, body: String },
    /// The server executes the request. Half of the answer arrives, then the connection closes.
    Truncate,
    /// The server executes the request. The connection closes without an answer.
    DropResponse,
    /// The server executes the request. The answer waits for `release` or `clear`.
    HangAfter,
}

impl Fault {
    /// Returns an error of PostgREST with a code of PostgreSQL or of PostgREST (`PGRST…`).
    pub fn json_error(status: u16, sqlstate: &str) -> Self {
        let body = format!(r#"{{"code":"{sqlstate}","message":"injected","details":null,"hint":null}}"#);
        Self::status(status, "application/json; charset=utf-8", body)
    }

    /// Returns an answer with this body, which may be empty.
    pub fn answer(status: u16, body: &str) -> Self {
        Self::status(status, "application/json", body.to_owned())
    }

    /// Returns the HTML page of an edge that cannot reach its origin.
    pub fn html(status: u16) -> Self {
        Self::status(status, "text/html; charset=UTF-8", Reply::page(status))
    }

    /// Returns an error with the header `retry-after` in seconds.
    pub fn retry_after(status: u16, seconds: u64) -> Self {
        let mut fault = Self::json_error(status, "PGRST002");
        if let Self::Status { headers, .. } = &mut fault {
            headers.push(("retry-after".to_owned(), seconds.to_string()));
        }
        fault
    }

    fn status(code: u16, content_type: &str, body: String) -> Self {
        Self::Status { code, headers: vec![("content-type".to_owned(), content_type.to_owned())], body }
    }
}

/// Selects the fault of each request: the first line of the script for the path, or else the rule.
pub struct Plan {
    script: VecDeque<(String, Fault)>,
    rule: Box<dyn FnMut(&Seen) -> Fault + Send>,
}

impl Default for Plan {
    fn default() -> Self {
        Self { script: VecDeque::new(), rule: Box::new(|_| Fault::Pass) }
    }
}

impl Plan {
    pub fn extend(&mut self, part: &str, faults: impl IntoIterator<Item = Fault>) {
        self.script.extend(faults.into_iter().map(|fault| (part.to_owned(), fault)));
    }

    pub fn set_rule(&mut self, rule: impl FnMut(&Seen) -> Fault + Send + 'static) {
        self.rule = Box::new(rule);
    }

    pub fn decide(&mut self, seen: &Seen) -> Fault {
        let line = self.script.iter().position(|(part, _)| seen.path.contains(part.as_str()));
        match line.and_then(|line| self.script.remove(line)) {
            Some((_, fault)) => fault,
            None => (self.rule)(seen),
        }
    }
}
