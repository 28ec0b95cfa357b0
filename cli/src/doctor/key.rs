//! Checks the text of the key before the first request.

use std::time::Duration;

use super::report::{FailedCheck, Report};
use threadkeep::store::{Clock, Timestamp};
use threadkeep::tools::{KeyFacts, KeyKind, ResolvedConfig};

pub const CHECK: &str = "key";

/// A key that expires within this time causes a warning.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 86_400);

pub const REMEDY: &str =
    "set SUPABASE_KEY to this project's secret (service_role) key: dashboard, Project Settings, API Keys";

/// Returns the name of the key's kind, or reports the problem of the key.
pub fn check(config: &ResolvedConfig, report: &mut Report<'_>) -> Result<String, FailedCheck> {
    let Some(key) = config.key.as_ref() else { return Err(FailedCheck("settings")) };
    report.started(CHECK);
    let (facts, setting) = (KeyFacts::of(key.expose()), config.key_name);
    if facts.kind == KeyKind::Public {
        let what = format!("{setting} is {}: this is the anon key, which is public", facts.name);
        return Err(report.failure(CHECK, what, REMEDY));
    }
    let now = Clock::new().now();
    if let Some(end) = facts.expires_at.filter(|end| *end <= now) {
        let what = format!("{setting} is {}, which expired on {}", facts.name, day(end));
        return Err(report.failure(CHECK, what, REMEDY));
    }
    if let Some((own, other)) =
        project(config).zip(facts.project.as_deref()).filter(|(own, other)| own != other)
    {
        let what = format!("{setting} is a key of the project {other}, and SUPABASE_URL leads to {own}");
        return Err(report.failure(CHECK, what, REMEDY));
    }
    if let Some(end) = facts.expires_at.filter(|end| end.since(now) < EXPIRY_WARNING) {
        report.warning(CHECK, format!("{setting} expires on {}", day(end)), REMEDY);
    }
    if facts.kind != KeyKind::Secret {
        report.warning(
            CHECK,
            format!("{setting} is {}, which may not be a secret (service_role) key", facts.name),
            REMEDY,
        );
    }
    Ok(facts.name)
}

/// Returns the project id in the URL of a hosted project.
fn project(config: &ResolvedConfig) -> Option<&str> {
    let host = config.url.as_deref()?.split("://").nth(1)?.split(['/', ':']).next()?;
    host.strip_suffix(".supabase.co")
}

fn day(at: Timestamp) -> String {
    chrono::DateTime::<chrono::Utc>::from(at).format("%Y-%m-%d").to_string()
}
