//! What can happen to a request on its way to Supabase and back.

use std::collections::VecDeque;
use std::time::Duration;

use super::Seen;
use super::wire::Reply;

#[derive(Debug, Clone, Default)]
pub enum Fault {
    /// None.
    #[default]
    Pass,
    /// The connection is reset (RST); the request went nowhere.
    Reset,
    /// The request waits for `release` or `heal` and is forwarded then.
    Hang,
    /// The request waits so long and is forwarded then.
    Slow(Duration),
    /// The answer of a gateway; the request went nowhere.
    Status { code: u16, headers: Vec<(String, String)>, body: String },
    /// The request is carried out; half of the answer arrives, then the connection closes.
    Truncate,
    /// The request is carried out; the connection closes without an answer.
    LoseAnswer,
    /// The request is carried out; the answer waits for `release` or `heal`.
    HangAfter,
}

impl Fault {
    /// The error of a PostgREST, with PostgreSQL's code (or one of its own, `PGRST…`).
    pub fn json_error(status: u16, sqlstate: &str) -> Self {
        let body = format!(r#"{{"code":"{sqlstate}","message":"injected","details":null,"hint":null}}"#);
        Self::status(status, "application/json; charset=utf-8", body)
    }

    /// An answer with this body, and perhaps none.
    pub fn answer(status: u16, body: &str) -> Self {
        Self::status(status, "application/json", body.to_owned())
    }

    /// The page of an edge that could not reach its origin.
    pub fn html(status: u16) -> Self {
        Self::status(status, "text/html; charset=UTF-8", Reply::page(status))
    }

    /// A server that says when to come back, in seconds.
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

/// Decides on each request: by the script while it has a line for the path, else by the rule.
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
