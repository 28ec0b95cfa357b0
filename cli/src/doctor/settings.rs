//! Checks the settings and reports every problem.

use threadkeep::Backend;
use threadkeep::tools::{ResolvedConfig, SettingProblem};

use super::report::Report;

const CHECK: &str = "settings";

pub fn check(config: &ResolvedConfig, report: &mut Report<'_>) {
    report.started(CHECK);
    for problem in &config.problems {
        report.failure(CHECK, text(problem), problem.remedy.clone());
    }
    for problem in &config.missing {
        let consequence = match config.is_strict {
            true => "a daemon does not start",
            false => "a daemon falls back to memory, and a restart loses its conversations",
        };
        let message = format!("the backend is `supabase`, and {}: {consequence}", text(problem));
        report.failure(CHECK, message, format!("{}, in the environment or in .env", problem.remedy));
    }
    for problem in &config.warnings {
        report.warning(CHECK, text(problem), problem.remedy.clone());
    }
    for problem in &config.ignored {
        let message = format!("{} (a setting of another backend, which is not used now)", text(problem));
        report.warning(CHECK, message, problem.remedy.clone());
    }
    if config.backend == Backend::Memory {
        let message = "the backend is `memory`: a restart of the daemon loses all conversations";
        let remedy = "set CONVERSATION_STORAGE_BACKEND to `local` or `supabase`, unless this is intended";
        report.warning(CHECK, message, remedy);
    }
    if !report.has(CHECK) {
        let backend = match config.backend {
            Backend::Local => "local",
            Backend::Supabase => "supabase",
            _ => "memory",
        };
        report.ok(CHECK, format!("all are valid; the backend is `{backend}`"));
    }
}

fn text(problem: &SettingProblem) -> String {
    format!("{} {}", problem.setting, problem.message)
}
