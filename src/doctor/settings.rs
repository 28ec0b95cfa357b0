//! The settings: every problem, not only the first.

use super::report::{Report, parted};
use crate::settings::{Backend, Plan};

const CHECK: &str = "settings";

pub(super) fn examine(plan: &Plan, report: &mut Report<'_>) {
    report.begins(CHECK);
    for problem in &plan.problems {
        let (what, remedy) = in_parts(problem);
        report.failure(CHECK, what, remedy);
    }
    for missing in &plan.missing {
        let then = match plan.is_strict {
            true => "a daemon does not start",
            false => "a daemon falls back to memory, and loses its conversations when it restarts",
        };
        let what = format!("the backend is `supabase`, and {missing} not set: {then}");
        report.failure(CHECK, what, "set it in the environment or in .env (see .env.example)");
    }
    for doubt in &plan.doubts {
        report.warning(CHECK, doubt, "compare it with .env.example");
    }
    for problem in &plan.idle {
        let (what, remedy) = in_parts(problem);
        report.warning(CHECK, format!("{what} (another backend's, so that it does no harm now)"), remedy);
    }
    if plan.backend == Backend::Memory {
        let what = "the backend is `memory`: conversations are lost when the daemon restarts";
        let remedy = "set CONVERSATION_STORAGE_BACKEND to `local` or `supabase`, unless this is meant";
        report.warning(CHECK, what, remedy);
    }
    if !report.has(CHECK) {
        let backend = match plan.backend {
            Backend::Local => "local",
            Backend::Supabase => "supabase",
            Backend::Memory => "memory",
        };
        report.ok(CHECK, format!("all can be used; the backend is `{backend}`"));
    }
}

/// `NAME: what is wrong; what to do`, or `NAME: what to do`.
fn in_parts(problem: &str) -> (String, String) {
    match problem.split_once(": ") {
        Some((name, rest)) if !rest.contains("; ") && rest.starts_with("use ") => {
            (format!("{name} has a value that it cannot have"), rest.to_owned())
        }
        _ => parted(problem, "mend it (see .env.example)"),
    }
}
