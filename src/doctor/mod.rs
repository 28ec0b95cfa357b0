//! The doctor: looks at everything that a daemon needs and says what is wrong with it, and what to do (feature `cli`). A
//! diagnosis is data, which `threadkeep doctor` prints.
//!
//! Nothing is altered but a thread of its own, which is removed again.

mod file;
mod key;
mod network;
mod project;
mod report;
mod settings;
mod thread;

use crate::settings::{Backend, Builder, Plan};

use report::Report;
pub use report::{Finding, Step, Verdict};

/// A diagnosis that is about to be made.
///
/// ```
/// use threadkeep::Builder;
/// use threadkeep::doctor::{Doctor, Verdict};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() {
/// let settings = Builder::new().supabase("http://127.0.0.1:1", "sb_publishable_abc");
/// let findings = Doctor::new(settings).examine(|_| {}).await;
/// let key = findings.iter().find(|finding| finding.verdict == Verdict::Failure).unwrap();
/// assert_eq!(key.check, "key");
/// assert!(key.remedy.as_deref().unwrap().contains("secret (service_role) key"));
/// # }
/// ```
#[derive(Debug)]
pub struct Doctor {
    plan: Plan,
    public_key: Option<PublicKey>,
}

/// Everybody may know it; but who knows whether it is one?
struct PublicKey(String);

impl std::fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PublicKey")
    }
}

impl Doctor {
    /// For a daemon with these settings, which need not be right.
    pub fn new(settings: Builder) -> Self {
        Self { plan: settings.plan(), public_key: None }
    }

    /// The project's anon (publishable) key, to see whether conversations are kept from whoever has it.
    #[must_use]
    pub fn public_key(mut self, key: &str) -> Self {
        self.public_key = Some(PublicKey(key.to_owned()));
        self
    }

    /// Looks at everything, one after the other, and tells of each step. What cannot be looked at, because of something
    /// before it, is [`Skipped`](Verdict::Skipped).
    ///
    /// With the backend `supabase`, a thread with an id of its own is written, read and removed. Should the process end in
    /// the middle, it expires a minute later. Files are read, at most.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn examine(self, mut tell: impl FnMut(Step<'_>)) -> Vec<Finding> {
        let Self { plan, public_key } = &self;
        let mut report = Report::new(&mut tell);
        settings::examine(plan, &mut report);
        if plan.backend == Backend::Supabase {
            let public_key = public_key.as_ref().map(|key| key.0.as_str());
            project::examine(plan, public_key, &mut report).await;
        }
        file::examine(plan, &mut report).await;
        report.findings
    }
}
