//! What was found.

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// It is as it should be.
    Ok,
    /// A daemon can work with it; somebody should look all the same.
    Warning,
    /// A daemon cannot work, or not as it promises.
    Failure,
    /// It was not looked at.
    Skipped,
}

impl Verdict {
    /// The verdict in a word.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Failure => "failure",
            Self::Skipped => "skipped",
        }
    }
}

/// One thing that was looked at. It never holds a secret.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What was looked at, such as `dns` or `round trip`: the same word from version to version.
    pub check: &'static str,
    /// How it ended.
    pub verdict: Verdict,
    /// What was found, or why it was skipped.
    pub what: String,
    /// What to do: always there with a warning or a failure.
    pub remedy: Option<String>,
}

/// What a diagnosis tells while it is being made.
#[derive(Debug)]
#[non_exhaustive]
pub enum Step<'a> {
    /// This check begins.
    Begins(&'static str),
    /// This was found.
    Found(&'a Finding),
}

/// The name of a check that failed, so that what rests on it is skipped.
pub(super) type Failed = &'static str;

pub(super) struct Report<'a> {
    tell: &'a mut dyn FnMut(Step<'_>),
    pub(super) findings: Vec<Finding>,
}

impl<'a> Report<'a> {
    pub(super) fn new(tell: &'a mut dyn FnMut(Step<'_>)) -> Self {
        Self { tell, findings: Vec::new() }
    }

    pub(super) fn begins(&mut self, check: &'static str) {
        (self.tell)(Step::Begins(check));
    }

    pub(super) fn ok(&mut self, check: &'static str, what: impl Into<String>) {
        self.found(check, Verdict::Ok, what.into(), None);
    }

    pub(super) fn warning(
        &mut self,
        check: &'static str,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.found(check, Verdict::Warning, what.into(), Some(remedy.into()));
    }

    pub(super) fn failure(
        &mut self,
        check: &'static str,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Failed {
        self.found(check, Verdict::Failure, what.into(), Some(remedy.into()));
        check
    }

    pub(super) fn skipped(&mut self, check: &'static str, why: impl Into<String>) {
        self.found(check, Verdict::Skipped, why.into(), None);
    }

    /// Whether anything was said about it.
    pub(super) fn has(&self, check: &str) -> bool {
        self.findings.iter().any(|finding| finding.check == check)
    }

    fn found(&mut self, check: &'static str, verdict: Verdict, what: String, remedy: Option<String>) {
        let finding = Finding { check, verdict, what, remedy };
        (self.tell)(Step::Found(&finding));
        self.findings.push(finding);
    }
}

/// A sentence of the form "what happened; what to do", in its parts.
pub(super) fn parted(sentence: &str, otherwise: &str) -> (String, String) {
    let (what, remedy) = sentence.split_once("; ").unwrap_or((sentence, otherwise));
    (what.to_owned(), remedy.to_owned())
}
