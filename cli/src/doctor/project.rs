//! Checks the project: the API, the key, the migrations, the grants, the clock and the round trip.

use std::time::Duration;

use super::report::{FailedCheck, Report};
use super::{conversation, key, network};
use threadkeep::store::{MAX_CLOCK_SKEW, Supabase};
use threadkeep::tools::{Caller, FUNCTIONS, ProbeResponse, ProjectProbe, REVISION, ResolvedConfig};
use threadkeep::{Error, ErrorKind};

/// Each check needs the checks before it.
const CHAIN: &[&str] = &[
    "dns",
    "tcp",
    "tls",
    "api",
    "migrations",
    "clock",
    "round trip",
    "grants",
    "public access",
    "conversation",
];
/// The number of measured requests, after a first request that opens the connection.
const ROUNDS: usize = 5;
/// A clock that differs by more is a failure, not a warning.
const CLOCK_FAILURE: Duration = Duration::from_secs(300);

const APPLY_MIGRATIONS: &str = "apply the migrations: `threadkeep migrations --dir supabase/migrations`, then `supabase db push --include-all`; \
     or `threadkeep migrations | psql`";

pub const GRANT: &str = "apply the migrations again, which grant the needed rights to service_role only";

pub async fn check(config: &ResolvedConfig, anon_key: Option<&str>, report: &mut Report<'_>) {
    let key = key::check(config, report);
    let Err(failed) = chain(config, key.clone(), anon_key, report).await else { return };
    if let Ok(name) = key
        && !report.has(key::CHECK)
    {
        let why = format!(
            "{} is {name}; whether Supabase accepts it is unknown, because {} failed",
            config.key_name, failed.0
        );
        report.skipped(key::CHECK, why);
    }
    for check in CHAIN {
        if !report.has(check) {
            report.skipped(check, format!("because {} failed", failed.0));
        }
    }
}

async fn chain(
    config: &ResolvedConfig,
    key: Result<String, FailedCheck>,
    anon_key: Option<&str>,
    report: &mut Report<'_>,
) -> Result<(), FailedCheck> {
    let url = config.url.as_deref().ok_or(FailedCheck("settings"))?;
    // The network checks need no key.
    let project = Supabase::new(url, config.key.as_ref().map_or("none", |key| key.expose()))
        .map_err(|_| FailedCheck("settings"))?;
    let project = ProjectProbe::new(project.idle_timeout(config.timeout));
    network::check(&project, report).await?;
    let name = key?;
    let response = first_response(&project, config, &name, report).await?;
    let is_migrated = migrations(&project, &response, report).await;
    let responses = round_trip(&project, config, report).await?;
    clock(&responses, report);
    is_migrated?;
    grants(&project, report).await?;
    public_access(&project, anon_key, report).await;
    conversation::check(&project, anon_key, report).await
}

/// Sends the first request. Its response also shows whether Supabase accepts the key.
async fn first_response(
    project: &ProjectProbe,
    config: &ResolvedConfig,
    key: &str,
    report: &mut Report<'_>,
) -> Result<ProbeResponse, FailedCheck> {
    report.started("api");
    let error = match project.call_idle(Caller::ServiceRole, FUNCTIONS[0]).await {
        Ok(response) => {
            report.ok("api", format!("{} answers", project.client().host()));
            report.ok(key::CHECK, format!("Supabase accepts the key: {key}"));
            return Ok(response);
        }
        Err(error) => error,
    };
    if !matches!(error.kind(), ErrorKind::Unauthorized | ErrorKind::SchemaOutdated) {
        return Err(report.failure("api", error.message(), remedy(&error)));
    }
    report.ok("api", format!("{} answers", project.client().host()));
    Err(match error.kind() {
        ErrorKind::SchemaOutdated => {
            let what = format!("{}: {}", error.message(), missing(project).await);
            report.failure("migrations", what, APPLY_MIGRATIONS)
        }
        _ if is_rejected_key(&error) => {
            let what = format!("{}; {} is {key}", error.message(), config.key_name);
            let remedy =
                format!("{}; the present key may be revoked, or belong to another project", key::REMEDY);
            report.failure(key::CHECK, what, remedy)
        }
        _ => report.failure("grants", format!("threadkeep_probe: {}", error.message()), GRANT),
    })
}

/// Whether Supabase rejects the key. With SQLSTATE 42501 it accepts the key, whose role lacks a grant.
pub fn is_rejected_key(error: &Error) -> bool {
    error.kind() == ErrorKind::Unauthorized && error.code() != Some("42501")
}

fn remedy(error: &Error) -> &str {
    error.remedy().unwrap_or(
        "check that the project is healthy (dashboard, status.supabase.com), read its logs, and check that \
         SUPABASE_TIMEOUT_SECONDS is long enough for this connection; a daemon queues writes meanwhile",
    )
}

/// Names the migrations that are not applied.
async fn missing(project: &ProjectProbe) -> String {
    match project.missing_migrations().await {
        [one] => format!("{one} is not applied"),
        all => format!("{} are not applied", all.join(" and ")),
    }
}

async fn migrations(
    project: &ProjectProbe,
    response: &ProbeResponse,
    report: &mut Report<'_>,
) -> Result<(), FailedCheck> {
    report.started("migrations");
    let found = response.revision;
    if found < REVISION {
        let missing = missing(project).await;
        let what = format!("the functions have version {found}, and {REVISION} is needed: {missing}");
        return Err(report.failure("migrations", what, APPLY_MIGRATIONS));
    }
    report.ok("migrations", format!("the functions have version {found} ({REVISION} is needed)"));
    Ok(())
}

async fn round_trip(
    project: &ProjectProbe,
    config: &ResolvedConfig,
    report: &mut Report<'_>,
) -> Result<Vec<ProbeResponse>, FailedCheck> {
    const CHECK: &str = "round trip";
    report.started(CHECK);
    let mut responses = Vec::new();
    for _ in 0..ROUNDS {
        match project.call_idle(Caller::ServiceRole, FUNCTIONS[0]).await {
            Ok(response) => responses.push(response),
            Err(error) => return Err(report.failure(CHECK, error.message(), remedy(&error))),
        }
    }
    let mut times: Vec<Duration> = responses.iter().map(|response| response.round_trip).collect();
    times.sort();
    let (median, worst) = (times[ROUNDS / 2], times[ROUNDS - 1]);
    let what = format!("median {median:.1?} of {ROUNDS} requests, slowest {worst:.1?}");
    let (deadline, soft_timeout) = (config.timeout, config.soft_timeout);
    if worst * 2 > deadline {
        let remedy = "raise SUPABASE_TIMEOUT_SECONDS, or run the daemon closer to the project's region: slower calls count \
                      as an outage";
        report.warning(CHECK, format!("{what}; SUPABASE_TIMEOUT_SECONDS is {deadline:?}"), remedy);
    } else if median * 2 > soft_timeout && !soft_timeout.is_zero() {
        let remedy = "raise CONVERSATION_SOFT_TIMEOUT_SECONDS, or run the daemon closer to the project's region: a slower write \
                      is queued, and a slower read returns a stale copy";
        report.warning(
            CHECK,
            format!("{what}; CONVERSATION_SOFT_TIMEOUT_SECONDS is {soft_timeout:?}"),
            remedy,
        );
    } else {
        report.ok(CHECK, what);
    }
    Ok(responses)
}

/// Reports the difference of the clocks. Each response gives a lower and an upper bound of the difference.
fn clock(responses: &[ProbeResponse], report: &mut Report<'_>) {
    const CHECK: &str = "clock";
    report.started(CHECK);
    let least = responses.iter().map(|response| response.clock_lead.0).max().unwrap_or_default();
    let most = responses.iter().map(|response| response.clock_lead.1).min().unwrap_or_default();
    let off = if least <= most { 0.clamp(least, most) } else { least };
    let (by, side) = (Duration::from_millis(off.unsigned_abs()), if off > 0 { "behind" } else { "ahead of" });
    let about =
        if by < MAX_CLOCK_SKEW * 5 { format!("{by:.1?}") } else { format!("{:.0} s", by.as_secs_f64()) };
    let what = format!("this machine's clock is {about} {side} the database's");
    let remedy = "set this machine's clock, and synchronise it by NTP (`timedatectl set-ntp true`): threadkeep follows the \
                  database's clock only after its first contact since the start";
    match by {
        _ if by > CLOCK_FAILURE => {
            report.failure(CHECK, what, remedy);
        }
        _ if by > MAX_CLOCK_SKEW => report.warning(CHECK, what, remedy),
        Duration::ZERO => report.ok(CHECK, "this machine's clock and the database's agree"),
        _ => report.ok(CHECK, what),
    }
}

/// Checks the grants with a call of each function that changes nothing. The call also needs the grants of the table.
async fn grants(project: &ProjectProbe, report: &mut Report<'_>) -> Result<(), FailedCheck> {
    report.started("grants");
    let (mut denied, mut lacking) = (Vec::new(), Vec::new());
    for function in FUNCTIONS {
        let error = match project.call_idle(Caller::ServiceRole, *function).await {
            Ok(response) if response.revision < REVISION => {
                lacking.push(format!(
                    "{} has version {}, and {REVISION} is needed",
                    function.0, response.revision
                ));
                continue;
            }
            Ok(_) => continue,
            Err(error) => error,
        };
        let told = format!("{}: {}", function.0, error.message());
        match error.kind() {
            ErrorKind::Unauthorized => denied.push(told),
            ErrorKind::SchemaOutdated => lacking.push(told),
            _ => return Err(report.failure("grants", told, remedy(&error))),
        }
    }
    if !lacking.is_empty() {
        return Err(report.failure("grants", lacking.join("; "), APPLY_MIGRATIONS));
    }
    if !denied.is_empty() {
        return Err(report.failure("grants", denied.join("; "), GRANT));
    }
    report.ok("grants", format!("this key may call all {} functions", FUNCTIONS.len()));
    Ok(())
}

/// Checks that a caller without a key, or with the public key, cannot call any function.
async fn public_access(project: &ProjectProbe, anon_key: Option<&str>, report: &mut Report<'_>) {
    const CHECK: &str = "public access";
    report.started(CHECK);
    let name = |caller| if caller == Caller::Anonymous { "without a key" } else { "with the public key" };
    let callers = [Some(Caller::Anonymous), anon_key.map(Caller::Anon)];
    for caller in callers.into_iter().flatten() {
        let mut callable = Vec::new();
        for function in FUNCTIONS {
            match project.call_idle(caller, *function).await {
                Ok(_) => callable.push(function.0),
                Err(error) if error.is_outage() => {
                    return report.skipped(CHECK, format!("{}: {}", name(caller), error.message()));
                }
                Err(error) if is_rejected_key(&error) && caller != Caller::Anonymous => {
                    let message = error.message();
                    let what = format!(
                        "Supabase rejects the key of --anon-key, so the check proves nothing: {message}"
                    );
                    report.failure(CHECK, what, "pass this project's anon or publishable key");
                    return;
                }
                Err(_) => {}
            }
        }
        match callable.as_slice() {
            [] => report.ok(CHECK, format!("{}, no function can be called", name(caller))),
            all => {
                let what = format!("{}, {} can be called", name(caller), all.join(", "));
                report.failure(CHECK, what, GRANT);
            }
        }
    }
    if anon_key.is_none() {
        report.skipped(CHECK, "the check of the anon key needs the key: pass --anon-key");
    }
}
