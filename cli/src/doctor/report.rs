//! The findings of a diagnosis.

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Ok,
    /// A daemon works nevertheless.
    Warning,
    /// A daemon does not work, or breaks a promise.
    Failure,
    /// The check did not run.
    Skipped,
}

impl Verdict {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
            Self::Skipped => "skipped",
        }
    }
}

/// The finding of one check. A finding never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The check, such as `dns` or `round trip`. The names stay the same from version to version.
    pub check: &'static str,
    pub verdict: Verdict,
    pub message: String,
    /// Present with each warning and each failure.
    pub remedy: Option<String>,
}

/// An event during a diagnosis.
#[derive(Debug)]
pub enum Event<'a> {
    Started(&'static str),
    Found(&'a Finding),
}

/// The check that failed, so that the checks that need it are skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FailedCheck(pub &'static str);

pub struct Report<'a> {
    on_event: &'a mut dyn FnMut(Event<'_>),
    pub findings: Vec<Finding>,
}

impl<'a> Report<'a> {
    pub fn new(on_event: &'a mut dyn FnMut(Event<'_>)) -> Self {
        Self { on_event, findings: Vec::new() }
    }

    pub fn started(&mut self, check: &'static str) {
        (self.on_event)(Event::Started(check));
    }

    pub fn ok(&mut self, check: &'static str, message: impl Into<String>) {
        self.add(check, Verdict::Ok, message.into(), None);
    }

    pub fn warning(&mut self, check: &'static str, message: impl Into<String>, remedy: impl Into<String>) {
        self.add(check, Verdict::Warning, message.into(), Some(remedy.into()));
    }

    pub fn failure(
        &mut self,
        check: &'static str,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) -> FailedCheck {
        self.add(check, Verdict::Failure, message.into(), Some(remedy.into()));
        FailedCheck(check)
    }

    pub fn skipped(&mut self, check: &'static str, reason: impl Into<String>) {
        self.add(check, Verdict::Skipped, reason.into(), None);
    }

    pub fn has(&self, check: &str) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
    }

    fn add(&mut self, check: &'static str, verdict: Verdict, message: String, remedy: Option<String>) {
        let finding = Finding { check, verdict, message, remedy };
        (self.on_event)(Event::Found(&finding));
        self.findings.push(finding);
    }
}
