//! The doctor: checks everything that a daemon needs, and names each problem with its remedy.
//!
//! The doctor changes nothing, except for one conversation of its own, which it removes again.

mod conversation;
mod file;
mod key;
mod network;
mod path_info;
mod project;
mod report;
mod settings;

use threadkeep::tools::ResolvedConfig;
use threadkeep::{Backend, Builder};

use report::Report;
pub use report::{Event, Finding, Verdict};

/// A diagnosis of a daemon with these settings.
#[derive(Debug)]
pub struct Doctor {
    config: ResolvedConfig,
    anon_key: Option<String>,
}

impl Doctor {
    /// Takes the settings of a daemon. `anon_key` is the project's public key; the doctor checks that it gives no access.
    pub fn new(settings: Builder, anon_key: Option<String>) -> Self {
        Self { config: settings.resolve(), anon_key }
    }

    /// Runs all checks in order. A check that needs a failed check is [`Skipped`](Verdict::Skipped).
    ///
    /// With the backend `supabase` the doctor writes, reads and removes a conversation with its own id. If the process ends
    /// in between, the conversation expires a minute later. The doctor only reads files.
    pub async fn run(self, mut on_event: impl FnMut(Event<'_>)) -> Vec<Finding> {
        let Self { config, anon_key } = &self;
        let mut report = Report::new(&mut on_event);
        settings::check(config, &mut report);
        if config.backend == Backend::Supabase {
            project::check(config, anon_key.as_deref(), &mut report).await;
        }
        file::check(config, &mut report).await;
        report.findings
    }
}
