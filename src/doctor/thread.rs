//! A thread of the doctor's own: written, read, and removed again whatever happens in between.

use std::fmt::Display;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::project::GRANT;
use super::report::{Failed, Report};
use crate::error::{Error, ErrorKind, Result};
use crate::record::{Json, Key, Record, Want};
use crate::store::{Applied, Loaded, Store};
use crate::supabase::Supabase;
use crate::supabase::survey::{Caller, Trouble, Why};

const CHECK: &str = "thread";
/// What a doctor leaves that is killed in the middle expires after this.
const LIFE: Duration = Duration::from_secs(60);

pub(super) async fn examine(
    project: &Supabase,
    public_key: Option<&str>,
    report: &mut Report<'_>,
) -> Result<(), Failed> {
    report.begins(CHECK);
    let record = record(project).map_err(|e| report.failure(CHECK, e.to_string(), remedy(&e)))?;
    let begun = Instant::now();
    let written = apply(project, record.clone()).await;
    let wrote = begun.elapsed();
    if let Err(error) = &written
        && !error.outcome_unknown()
    {
        return Err(failed("it cannot be written", error, report));
    }
    let begun = Instant::now();
    let read = match &written {
        Ok(()) => read(project, &record).await,
        Err(error) => Err(error.clone()),
    };
    let took = begun.elapsed();
    if let (Ok(()), Some(key)) = (&read, public_key) {
        row(project, key, &record.key, report).await;
    }
    let begun = Instant::now();
    let removed = remove(project, &record).await;
    let rid = begun.elapsed();
    if let Err(said) = &removed {
        let what = format!("the probe thread {} is left behind: {said}", record.key.as_str());
        let remedy = "nothing, if that was an outage: it expires in a minute, and is purged by the daemons";
        report.warning(CHECK, what, remedy);
    }
    match (written, read) {
        (Err(error), _) => Err(failed("it cannot be written", &error, report)),
        (_, Err(error)) => Err(failed("it cannot be read", &error, report)),
        _ if removed.is_err() => Err(CHECK),
        _ => {
            report.ok(CHECK, format!("written in {wrote:.1?}, read in {took:.1?}, removed in {rid:.1?}"));
            Ok(())
        }
    }
}

fn record(project: &Supabase) -> Result<Record> {
    let clock = project.clock();
    Ok(Record {
        key: Key::new(format!("threadkeep-doctor-{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)))?,
        version: clock.stamp().version,
        value: Some(Json::of(&["threadkeep doctor"])?),
        expires_at: clock.now().plus(LIFE),
        user: None,
        metadata: Json::default(),
    })
}

async fn apply(project: &Supabase, record: Record) -> Result<()> {
    match project.apply(&[record.into()]).await?.first() {
        Some(Applied::Stored) => Ok(()),
        other => Err(unexpected(format!("the database answers {other:?}"))),
    }
}

async fn read(project: &Supabase, record: &Record) -> Result<()> {
    let want = Want { key: record.key.clone(), known: None };
    match project.load(&[want]).await?.first() {
        Some(Loaded::Found(found)) if is_same(found, record) => Ok(()),
        Some(Loaded::Found(_)) => Err(unexpected("it is not as it was written".into())),
        _ => Err(unexpected("it is not there".into())),
    }
}

/// `jsonb` spaces a text anew.
fn is_same(found: &Arc<Record>, written: &Record) -> bool {
    let value = |record: &Record| {
        let text = record.value.as_ref().map(Json::as_str);
        text.and_then(|text| serde_json::from_str::<serde_json::Value>(text).ok())
    };
    found.version == written.version && value(found) == value(written)
}

fn unexpected(what: String) -> Error {
    Error::new(ErrorKind::Refused, what)
}

/// As a daemon does, which leaves a row that remembers the deletion; then that row.
async fn remove(project: &Supabase, record: &Record) -> Result<(), String> {
    let version = project.clock().stamp().version;
    let deletion = Record { version, value: None, ..record.clone() };
    let removed = apply(project, deletion).await.map_err(|e| e.to_string());
    let forgotten = project.forget(&record.key).await.map_err(|trouble| trouble.said);
    removed.and(forgotten)
}

/// Whether row level security hides the thread from whoever has the public key.
async fn row(project: &Supabase, public_key: &str, key: &Key, report: &mut Report<'_>) {
    const CHECK: &str = "row level security";
    match project.sees_row(Caller::Public(public_key), key).await {
        Ok(true) => {
            let what = "with the public key, conversations can be read: row level security is off, or a policy lets \
                        everybody in";
            let remedy = "`alter table conversation_threads enable row level security`, drop policies for anon, and apply \
                          the migrations again, which revoke its grants";
            report.failure(CHECK, what, remedy);
        }
        Ok(false) => report.ok(CHECK, "with the public key, no conversation can be seen"),
        Err(Trouble { why: Why::Silent | Why::Away | Why::Key, said }) => report.skipped(CHECK, said),
        Err(_) => report.ok(CHECK, "with the public key, the table cannot be read"),
    }
}

fn failed(what: &str, error: &impl Display, report: &mut Report<'_>) -> Failed {
    report.failure(CHECK, format!("{what}: {error}"), LOOK)
}

const LOOK: &str =
    "look into the database's log, and for triggers and constraints of others on conversation_threads";

fn remedy(error: &Error) -> &'static str {
    if error.kind() == ErrorKind::Denied { GRANT } else { LOOK }
}
