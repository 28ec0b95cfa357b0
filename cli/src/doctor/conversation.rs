//! Writes, reads and removes a conversation of the doctor. The removal runs even if a step before it fails.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::project::{GRANT, is_rejected_key};
use super::report::{FailedCheck, Report};
use threadkeep::store::{Applied, Json, Key, LoadRequest, Loaded, Record, Store};
use threadkeep::tools::{Caller, ProjectProbe};
use threadkeep::{Error, ErrorKind, Result};

const CHECK: &str = "conversation";
/// If the process is killed before the removal, the conversation expires after this time.
const PROBE_TTL: Duration = Duration::from_secs(60);

pub async fn check(
    project: &ProjectProbe,
    anon_key: Option<&str>,
    report: &mut Report<'_>,
) -> Result<(), FailedCheck> {
    report.started(CHECK);
    let record = record(project).map_err(|e| report.failure(CHECK, e.to_string(), remedy(&e)))?;
    let begun = Instant::now();
    let written = apply(project, record.clone()).await;
    let write_time = begun.elapsed();
    if let Err(error) = &written
        && !error.outcome_unknown()
    {
        return Err(failed("the probe conversation cannot be written", error, report));
    }
    let begun = Instant::now();
    let read = match &written {
        Ok(()) => read(project, &record).await,
        Err(error) => Err(error.clone()),
    };
    let read_time = begun.elapsed();
    if let (Ok(()), Some(key)) = (&read, anon_key) {
        check_row_level_security(project, key, &record.key, report).await;
    }
    let begun = Instant::now();
    let removed = remove(project, &record).await;
    let remove_time = begun.elapsed();
    if let Err(error) = &removed {
        let what = format!("the probe conversation {} is left behind: {error}", record.key.as_str());
        let remedy =
            "nothing after an outage: the conversation expires in a minute, and the daemons purge it";
        report.warning(CHECK, what, remedy);
    }
    match (written, read) {
        (Err(error), _) => Err(failed("the probe conversation cannot be written", &error, report)),
        (_, Err(error)) => Err(failed("the probe conversation cannot be read", &error, report)),
        _ if removed.is_err() => Err(FailedCheck(CHECK)),
        _ => {
            report.ok(
                CHECK,
                format!("written in {write_time:.1?}, read in {read_time:.1?}, removed in {remove_time:.1?}"),
            );
            Ok(())
        }
    }
}

fn record(project: &ProjectProbe) -> Result<Record> {
    let clock = project.client().clock();
    let key = Key::new(format!("threadkeep-doctor-{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)))?;
    let value = Json::of(&["threadkeep doctor"])?;
    Ok(Record::put(key, clock.issue_version(), value, clock.now().plus(PROBE_TTL)))
}

async fn apply(project: &ProjectProbe, record: Record) -> Result<()> {
    match project.client().apply(&[record.into()]).await?.first() {
        Some(Applied::Stored) => Ok(()),
        other => Err(unexpected(format!("the database answers {other:?}"))),
    }
}

async fn read(project: &ProjectProbe, record: &Record) -> Result<()> {
    let request = LoadRequest::from(record.key.clone());
    match project.client().load(&[request]).await?.first() {
        Some(Loaded::Found(found)) if is_same(found, record) => Ok(()),
        Some(Loaded::Found(_)) => Err(unexpected("the database returned another value".into())),
        _ => Err(unexpected("the database returned no record".into())),
    }
}

/// Compares parsed values, because `jsonb` changes the spaces of a text.
fn is_same(found: &Arc<Record>, written: &Record) -> bool {
    let value = |record: &Record| {
        let text = record.value.as_ref().map(Json::as_str);
        text.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok())
    };
    found.version == written.version && value(found) == value(written)
}

fn unexpected(message: String) -> Error {
    Error::new(ErrorKind::Rejected, message)
}

/// Removes the conversation as a daemon does, which leaves a tombstone. Then deletes the row of the tombstone.
async fn remove(project: &ProjectProbe, record: &Record) -> Result<(), String> {
    let version = project.client().clock().issue_version();
    let tombstone = Record::tombstone(record.key.clone(), version);
    let removed = apply(project, tombstone).await.map_err(|e| e.to_string());
    let deleted = project.delete_row(&record.key).await.map_err(|e| e.message().to_owned());
    removed.and(deleted)
}

/// Checks that row level security hides the conversation from a caller with the public key.
async fn check_row_level_security(
    project: &ProjectProbe,
    anon_key: &str,
    key: &Key,
    report: &mut Report<'_>,
) {
    const CHECK: &str = "row level security";
    match project.row_is_visible(Caller::Anon(anon_key), key).await {
        Ok(true) => {
            let what = "the public key can read conversations: row level security is off, or a policy admits \
                        everybody";
            let remedy = "`alter table conversation_threads enable row level security`, drop policies for anon, and apply \
                          the migrations again, which revoke its grants";
            report.failure(CHECK, what, remedy);
        }
        Ok(false) => report.ok(CHECK, "the public key shows no conversation"),
        Err(error) if error.is_outage() || is_rejected_key(&error) => report.skipped(CHECK, error.message()),
        Err(_) => report.ok(CHECK, "the public key cannot read the table"),
    }
}

fn failed(what: &str, error: &impl Display, report: &mut Report<'_>) -> FailedCheck {
    report.failure(CHECK, format!("{what}: {error}"), CHECK_DATABASE)
}

const CHECK_DATABASE: &str =
    "read the database's log, and look for foreign triggers and constraints on conversation_threads";

fn remedy(error: &Error) -> &'static str {
    if error.kind() == ErrorKind::Unauthorized { GRANT } else { CHECK_DATABASE }
}
