//! What the key says of itself, before anybody is asked.

use std::time::Duration;

use super::report::{Failed, Report};
use crate::settings::Plan;
use crate::supabase::KeyFacts;
use crate::version::{Clock, Timestamp};

pub(super) const CHECK: &str = "key";

/// A key that ends so soon is worth a word.
const SOON: Duration = Duration::from_secs(30 * 86_400);

pub(super) const REMEDY: &str =
    "set SUPABASE_KEY to this project's secret (service_role) key: dashboard, Project Settings, API Keys";

/// Says what is wrong with the key, or what kind it is.
pub(super) fn examine(plan: &Plan, report: &mut Report<'_>) -> Result<String, Failed> {
    let Some(key) = plan.key() else { return Err("settings") };
    report.begins(CHECK);
    let (facts, setting) = (KeyFacts::of(key), plan.key_name);
    if facts.is_public {
        let what = format!("{setting} is {}: that is the anon key, which everybody may know", facts.name);
        return Err(report.failure(CHECK, what, REMEDY));
    }
    let now = Clock::new().now();
    if let Some(end) = facts.expires_at.filter(|end| *end <= now) {
        let what = format!("{setting} is {}, and expired on {}", facts.name, day(end));
        return Err(report.failure(CHECK, what, REMEDY));
    }
    if let Some((own, other)) =
        project(plan).zip(facts.project.as_deref()).filter(|(own, other)| own != other)
    {
        let what = format!("{setting} is a key of the project {other}, and SUPABASE_URL leads to {own}");
        return Err(report.failure(CHECK, what, REMEDY));
    }
    if let Some(end) = facts.expires_at.filter(|end| end.since(now) < SOON) {
        report.warning(CHECK, format!("{setting} expires on {}", day(end)), REMEDY);
    }
    if !facts.is_secret {
        report.warning(
            CHECK,
            format!("{setting} is {}, not known to be a secret (service_role) one", facts.name),
            REMEDY,
        );
    }
    Ok(facts.name)
}

/// The project that a hosted URL leads to.
fn project(plan: &Plan) -> Option<&str> {
    let host = plan.url.as_deref()?.split("://").nth(1)?.split(['/', ':']).next()?;
    host.strip_suffix(".supabase.co")
}

fn day(at: Timestamp) -> String {
    chrono::DateTime::<chrono::Utc>::from(at).format("%Y-%m-%d").to_string()
}
