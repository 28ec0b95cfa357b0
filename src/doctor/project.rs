//! The project itself: whether it answers, takes the key, has the migrations and the grants, and how far away it is.

use std::time::Duration;

use super::report::{Failed, Report};
use super::{key, network, thread};
use crate::record::Key;
use crate::settings::Plan;
use crate::supabase::survey::{Caller, FUNCTIONS, Pulse, SCHEMA, Trouble, Why};
use crate::supabase::{MIGRATE, Supabase};
use crate::version::{Clock, TOLERANCE};

/// Each rests on those before it.
const CHAIN: &[&str] =
    &["dns", "tcp", "tls", "api", "migrations", "clock", "round trip", "grants", "public access", "thread"];
/// Requests to measure by, after a first one that makes the connection.
const ROUNDS: usize = 5;
/// A clock that is off by more is no matter of milliseconds any more.
const FAR_OFF: Duration = Duration::from_secs(300);

pub(super) const GRANT: &str =
    "apply the migrations again, which grant what service_role needs and nobody else anything";

pub(super) async fn examine(plan: &Plan, public_key: Option<&str>, report: &mut Report<'_>) {
    let key = key::examine(plan, report);
    let Err(failed) = chain(plan, key.clone(), public_key, report).await else { return };
    if let Ok(name) = key
        && !report.has(key::CHECK)
    {
        let why =
            format!("{} is {name}; whether it is taken is not known, because {failed} failed", plan.key_name);
        report.skipped(key::CHECK, why);
    }
    for check in CHAIN {
        if !report.has(check) {
            report.skipped(check, format!("because {failed} failed"));
        }
    }
}

async fn chain(
    plan: &Plan,
    key: Result<String, Failed>,
    public_key: Option<&str>,
    report: &mut Report<'_>,
) -> Result<(), Failed> {
    let url = plan.url.as_deref().ok_or("settings")?;
    // The way there can be looked at without a key.
    let project = Supabase::new(url, plan.key().unwrap_or("none")).map_err(|_| "settings")?;
    let project = project.stall_after(plan.deadline);
    let system = Clock::new();
    network::examine(&project, report).await?;
    let name = key?;
    let pulse = answer(&project, plan, &name, report).await?;
    let is_migrated = migrations(&project, &pulse, report).await;
    let pulses = round_trip(&project, plan, report).await?;
    clock(&system, &pulses, report);
    is_migrated?;
    grants(&project, report).await?;
    public_access(&project, public_key, report).await;
    thread::examine(&project, public_key, report).await
}

/// The first answer, which says at once whether the key is taken.
async fn answer(
    project: &Supabase,
    plan: &Plan,
    key: &str,
    report: &mut Report<'_>,
) -> Result<Pulse, Failed> {
    report.begins("api");
    let trouble = match project.pulse(Caller::Daemon, FUNCTIONS[0]).await {
        Ok(pulse) => {
            report.ok("api", format!("{} answers", project.host()));
            report.ok(key::CHECK, format!("Supabase takes it: {key}"));
            return Ok(pulse);
        }
        Err(trouble) => trouble,
    };
    let remedy = match trouble.why {
        Why::Key => {
            report.ok("api", format!("{} answers", project.host()));
            let what = format!("Supabase refuses {}, {key}: {}", plan.key_name, trouble.said);
            let remedy = format!("{}; this one may have been revoked, or be another project's", key::REMEDY);
            return Err(report.failure(key::CHECK, what, remedy));
        }
        Why::Grant => {
            report.ok("api", format!("{} answers", project.host()));
            return Err(report.failure("grants", format!("threadkeep_probe: {}", trouble.said), GRANT));
        }
        Why::Missing => {
            report.ok("api", format!("{} answers", project.host()));
            let missing = missing(project).await;
            let what = format!("the database lacks threadkeep's functions: {missing} ({})", trouble.said);
            return Err(report.failure("migrations", what, MIGRATE));
        }
        why => remedy(why),
    };
    Err(report.failure("api", trouble.said, remedy))
}

fn remedy(why: Why) -> &'static str {
    match why {
        Why::Paused => "the project is paused: restore it in the dashboard",
        Why::Restricted => {
            "the project is restricted for what it used or owes: look into the dashboard, Usage and Billing"
        }
        Why::Elsewhere => {
            "SUPABASE_URL does not lead to a Supabase REST API: it should read like https://PROJECT.supabase.co; look for a \
             proxy or a sign-in page on the way, too"
        }
        Why::Silent => {
            "see whether the project is healthy (dashboard, status.supabase.com), and whether SUPABASE_TIMEOUT_SECONDS is \
             enough for the way there"
        }
        _ => {
            "see whether the project is healthy (dashboard, status.supabase.com) and look into its logs; a daemon queues \
             writes meanwhile"
        }
    }
}

/// Says which files were not applied.
async fn missing(project: &Supabase) -> String {
    // Any id will do: the answer is whether the table is there.
    let Ok(key) = Key::new("threadkeep-doctor") else { return String::new() };
    match project.missing_migrations(&key).await {
        [one] => format!("{one} was not applied"),
        all => format!("{} were not applied", all.join(" and ")),
    }
}

async fn migrations(project: &Supabase, pulse: &Pulse, report: &mut Report<'_>) -> Result<(), Failed> {
    report.begins("migrations");
    let found = pulse.schema;
    if found < SCHEMA {
        let missing = missing(project).await;
        let what = format!("the functions have version {found}, and {SCHEMA} is needed: {missing}");
        return Err(report.failure("migrations", what, MIGRATE));
    }
    report.ok("migrations", format!("the functions have version {found} ({SCHEMA} is needed)"));
    Ok(())
}

async fn round_trip(project: &Supabase, plan: &Plan, report: &mut Report<'_>) -> Result<Vec<Pulse>, Failed> {
    const CHECK: &str = "round trip";
    report.begins(CHECK);
    let mut pulses = Vec::new();
    for _ in 0..ROUNDS {
        match project.pulse(Caller::Daemon, FUNCTIONS[0]).await {
            Ok(pulse) => pulses.push(pulse),
            Err(Trouble { why, said }) => return Err(report.failure(CHECK, said, remedy(why))),
        }
    }
    let mut times: Vec<Duration> = pulses.iter().map(Pulse::round_trip).collect();
    times.sort();
    let (median, worst) = (times[ROUNDS / 2], times[ROUNDS - 1]);
    let what = format!("{median:.1?} (the median of {ROUNDS}), {worst:.1?} at worst");
    let (deadline, patience) = (plan.deadline, plan.patience);
    if worst * 2 > deadline {
        let remedy = "raise SUPABASE_TIMEOUT_SECONDS, or run the daemon closer to the project's region: calls that take longer \
                      count as an outage";
        report.warning(CHECK, format!("{what}; SUPABASE_TIMEOUT_SECONDS is {deadline:?}"), remedy);
    } else if median * 2 > patience && !patience.is_zero() {
        let remedy = "raise CONVERSATION_PATIENCE_SECONDS, or run the daemon closer to the project's region: a write that takes \
                      longer is queued, and a read is answered by a stale copy";
        report.warning(CHECK, format!("{what}; CONVERSATION_PATIENCE_SECONDS is {patience:?}"), remedy);
    } else {
        report.ok(CHECK, what);
    }
    Ok(pulses)
}

/// Each answer bounds from both sides by how much the database's clock is ahead.
fn clock(system: &Clock, pulses: &[Pulse], report: &mut Report<'_>) {
    const CHECK: &str = "clock";
    report.begins(CHECK);
    let ahead = |pulse: &Pulse, at| pulse.shown.0 - system.at(at).0;
    let least = pulses.iter().map(|pulse| ahead(pulse, pulse.received)).max().unwrap_or_default();
    let most = pulses.iter().map(|pulse| ahead(pulse, pulse.sent)).min().unwrap_or_default();
    let off = if least <= most { 0.clamp(least, most) } else { least };
    let (by, side) = (Duration::from_millis(off.unsigned_abs()), if off > 0 { "behind" } else { "ahead of" });
    let about = if by < TOLERANCE * 5 { format!("{by:.1?}") } else { format!("{:.0} s", by.as_secs_f64()) };
    let what = format!("this machine's clock is {about} {side} the database's");
    let remedy = "set this machine's clock, and keep it right by NTP (`timedatectl set-ntp true`): threadkeep follows the \
                  database's clock, but not while it has not reached it since the start";
    match by {
        _ if by > FAR_OFF => {
            report.failure(CHECK, what, remedy);
        }
        _ if by > TOLERANCE => report.warning(CHECK, what, remedy),
        Duration::ZERO => report.ok(CHECK, "this machine's clock and the database's agree"),
        _ => report.ok(CHECK, what),
    }
}

/// Each function, called so that it does nothing, also needs the table that it would work on.
async fn grants(project: &Supabase, report: &mut Report<'_>) -> Result<(), Failed> {
    report.begins("grants");
    let (mut denied, mut lacking) = (Vec::new(), Vec::new());
    for function in FUNCTIONS {
        let Trouble { why, said } = match project.pulse(Caller::Daemon, *function).await {
            Ok(pulse) if pulse.schema < SCHEMA => {
                lacking.push(format!("{} has version {}, and {SCHEMA} is needed", function.0, pulse.schema));
                continue;
            }
            Ok(_) => continue,
            Err(trouble) => trouble,
        };
        let told = format!("{}: {said}", function.0);
        match why {
            Why::Key | Why::Grant => denied.push(told),
            Why::Missing => lacking.push(told),
            why => return Err(report.failure("grants", told, remedy(why))),
        }
    }
    if !lacking.is_empty() {
        return Err(report.failure("grants", lacking.join("; "), MIGRATE));
    }
    if !denied.is_empty() {
        return Err(report.failure("grants", denied.join("; "), GRANT));
    }
    report.ok("grants", format!("this key may call all {} functions", FUNCTIONS.len()));
    Ok(())
}

/// Whoever has no key, or the one that everybody may know, must not get at anything.
async fn public_access(project: &Supabase, public_key: Option<&str>, report: &mut Report<'_>) {
    const CHECK: &str = "public access";
    report.begins(CHECK);
    let who = |caller| if caller == Caller::Nobody { "without a key" } else { "with the public key" };
    let callers = [Some(Caller::Nobody), public_key.map(Caller::Public)];
    for caller in callers.into_iter().flatten() {
        let mut let_in = Vec::new();
        for function in FUNCTIONS {
            match project.pulse(caller, *function).await {
                Ok(_) => let_in.push(function.0),
                Err(Trouble { why: Why::Silent | Why::Away, said }) => {
                    return report.skipped(CHECK, format!("{}: {said}", who(caller)));
                }
                Err(Trouble { why: Why::Key, said }) if caller != Caller::Nobody => {
                    let what =
                        format!("the key given as --anon-key is not taken, so it shows nothing: {said}");
                    report.failure(CHECK, what, "give this project's anon or publishable key");
                    return;
                }
                Err(_) => {}
            }
        }
        match let_in.as_slice() {
            [] => report.ok(CHECK, format!("{}, no function can be called", who(caller))),
            all => {
                let what = format!("{}, {} can be called", who(caller), all.join(", "));
                report.failure(CHECK, what, GRANT);
            }
        }
    }
    if public_key.is_none() {
        report.skipped(
            CHECK,
            "whether the anon key is kept out can only be seen with it: give it as --anon-key",
        );
    }
}
