//! The command `doctor` prints each finding as soon as its check ends.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::json;
use threadkeep::Builder;

use crate::arguments;
use crate::doctor::{Doctor, Event, Finding, Verdict};
use crate::failure::{Failure, Outcome};
use crate::output::{Output, shown};

pub async fn diagnose(
    settings: Builder,
    arguments: &arguments::DoctorArguments,
    out: &mut Output,
) -> Result<Outcome, Failure> {
    let doctor = Doctor::new(settings, arguments.anon_key.clone());
    let spinner = spinner();
    let mut printed = Ok(());
    let findings = doctor
        .run(|event| match event {
            Event::Started(check) => spinner.set_message(check),
            Event::Found(finding) if !out.is_json && printed.is_ok() => {
                printed = spinner.suspend(|| print(finding, out));
            }
            _ => {}
        })
        .await;
    spinner.finish_and_clear();
    printed?;
    let count = |verdict| findings.iter().filter(|finding| finding.verdict == verdict).count();
    let (failures, warnings) = (count(Verdict::Failure), count(Verdict::Warning));
    out.either(&to_json(&findings, failures == 0), || match (failures, warnings) {
        (0, 0) => "\nno problems found".into(),
        _ => format!("\nfailures: {failures}, warnings: {warnings}"),
    })?;
    Ok(if failures == 0 { Outcome::Done } else { Outcome::Partly })
}

/// Shows the running check, if standard error is a terminal.
fn spinner() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let spinner = ProgressBar::new_spinner();
    spinner.enable_steady_tick(Duration::from_millis(100));
    spinner
}

/// Prints a finding and flushes, so that the user sees the progress.
fn print(finding: &Finding, out: &mut Output) -> Result<(), Failure> {
    out.line(&format!("{:<8} {:<18} {}", finding.verdict.as_str(), finding.check, shown(&finding.message)))?;
    if let Some(remedy) = &finding.remedy {
        out.line(&format!("{:27} -> {}", "", shown(remedy)))?;
    }
    out.finish()
}

fn to_json(findings: &[Finding], is_ok: bool) -> serde_json::Value {
    let one = |finding: &Finding| {
        json!({
            "check": finding.check,
            "verdict": finding.verdict.as_str(),
            "message": finding.message,
            "remedy": finding.remedy,
        })
    };
    json!({"ok": is_ok, "findings": findings.iter().map(one).collect::<Vec<_>>()})
}
