//! `doctor`: a diagnosis, line by line as it is made.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;
use threadkeep::Builder;
use threadkeep::doctor::{Doctor, Finding, Step, Verdict};

use crate::arguments;
use crate::failure::{Failure, Outcome};
use crate::output::{Output, shown};

pub async fn doctor(
    settings: Builder,
    arguments: &arguments::Doctor,
    out: &mut Output,
) -> Result<Outcome, Failure> {
    let doctor = Doctor::new(settings);
    let doctor = match &arguments.anon_key {
        Some(key) => doctor.public_key(key),
        None => doctor,
    };
    let spinner = spinner();
    let mut printed = Ok(());
    let findings = doctor
        .examine(|step| match step {
            Step::Begins(check) => spinner.set_message(check),
            Step::Found(finding) if !out.is_json && printed.is_ok() => {
                printed = spinner.suspend(|| line(finding, out));
            }
            _ => {}
        })
        .await;
    spinner.finish_and_clear();
    printed?;
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (failures, warnings) = (count(Verdict::Failure), count(Verdict::Warning));
    out.either(&in_json(&findings, failures == 0), || match (failures, warnings) {
        (0, 0) => "\nall is well".into(),
        _ => format!("\nfailures: {failures}, warnings: {warnings}"),
    })?;
    Ok(if failures == 0 { Outcome::Done } else { Outcome::Partly })
}

/// On a terminal, for checks that take a while.
fn spinner() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// At once, so that one sees how far it is.
fn line(finding: &Finding, out: &mut Output) -> Result<(), Failure> {
    out.line(&format!("{:<8} {:<18} {}", finding.verdict.as_str(), finding.check, shown(&finding.what)))?;
    if let Some(remedy) = &finding.remedy {
        out.line(&format!("{:27} -> {}", "", shown(remedy)))?;
    }
    out.finish()
}

fn in_json(findings: &[Finding], is_ok: bool) -> serde_json::Value {
    let one = |finding: &Finding| {
        json!({
            "check": finding.check,
            "verdict": finding.verdict.as_str(),
            "what": finding.what,
            "remedy": finding.remedy,
        })
    };
    json!({"ok": is_ok, "findings": findings.iter().map(one).collect::<Vec<_>>()})
}
