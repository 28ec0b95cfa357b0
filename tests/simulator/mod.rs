//! Random schedules of the writer protocol over the real `decide` and the real rules of the queue.
//!
//! One conversation has up to four daemons, clients with plain SQL and a network that loses, delays and doubles messages. A
//! failing schedule shrinks to a short trace. A mutant takes one rule away and must fail, too.
//!
//! `SIMULATOR_SCHEDULES` sets the number of schedules for each environment, and `SIMULATOR_SEED` the seed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods, missing_docs)]

mod daemon;
mod oracle;
mod rule;
mod schedule;
mod store;
mod world;

use rule::{Environment, Rule};
use schedule::{Found, first, search};

const STEPS: usize = 24;

const ENVIRONMENTS: [&str; 20] = [
    "1",
    "1 crash",
    "1 crash full",
    "1 crash skew",
    "1 crash expiry",
    "1 crash expiry skew full",
    "1 crash jump",
    "1 crash jump skew full",
    "1 power crash",
    "1 power crash skew full",
    "1 crash purge",
    "1 crash import jump no-append",
    "2",
    "2 crash sql full",
    "2 crash sql skew",
    "2 crash sql expiry skew",
    "2 power crash sql",
    "2 power crash sql skew jump full expiry clone purge",
    "2 crash sql import no-append",
    "3 crash sql skew",
];

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn text(name: &str, off: &[Rule], found: &Found) -> String {
    let Found { schedules, violation, steps, trace } = found;
    let trace = trace.join("\n");
    format!(
        "[{name}] without {off:?}, schedule {schedules}: {}: {} ({steps} steps)\n{trace}\n",
        violation.kind, violation.text
    )
}

#[test]
fn schedules_keep_every_promise() {
    let (count, seed) = (setting("SIMULATOR_SCHEDULES", 1_000), setting("SIMULATOR_SEED", 1));
    let mut failures = Vec::new();
    for name in ENVIRONMENTS {
        let found = search(Environment::parse(name), &[], seed, count, STEPS);
        let verdict = found.as_ref().map_or("kept", |found| found.violation.kind);
        println!("{name:50} {count:>8} schedules: {verdict}");
        failures.extend(found.map(|found| text(name, &[], &found)));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

/// The rules that are taken away, and the environment that shows it.
///
/// `OpeningId` is the second line behind the mark, for a disk on which the mark cannot be written.
#[rustfmt::skip]
const MUTANTS: &[(&[Rule], &str)] = &[
    (&[Rule::AppliesOnce], "1"),
    (&[Rule::PlainByBase], "1"),
    (&[Rule::BaseForPlain], "2"),
    (&[Rule::PlainOwnRun], "1"),
    (&[Rule::CoveredUpdate], "1 full"),
    (&[Rule::OwnRun], "1"),
    (&[Rule::RunBegan], "2"),
    (&[Rule::DaemonPart], "1 crash"),
    (&[Rule::NewestWins], "2"),
    (&[Rule::AppendAboveBase], "2"),
    (&[Rule::OnlyIfPresent], "1"),
    (&[Rule::RemoveRaisesBase], "2"),
    (&[Rule::ExpiryAtVersion], "1 crash expiry"),
    (&[Rule::ExpiryRaisesBase], "2 crash sql expiry skew"),
    (&[Rule::OddVersions], "2 crash sql skew"),
    (&[Rule::PurgedBase], "1 purge no-append"),
    (&[Rule::TooOld], "1 purge"),
    (&[Rule::SqlEndsRun], "2 crash sql full"),
    (&[Rule::SqlRaisesBase], "2 crash sql full"),
    (&[Rule::SqlTombstone], "2 crash sql full"),
    (&[Rule::TombstonesLast], "1 crash purge"),
    (&[Rule::WritersLast], "1 crash purge"),
    (&[Rule::Covered], "2 crash sql full"),
    (&[Rule::Superseded], "2 crash sql full"),
    (&[Rule::PlainReplaces], "1"),
    (&[Rule::UpdateReplaces], "1"),
    (&[Rule::BaseAnchor], "2"),
    (&[Rule::CopyOverRow], "1 crash full"),
    (&[Rule::ExactBehindOldPart], "1 power"),
    (&[Rule::AppendsWait], "1 power"),
    (&[Rule::AppendInCopy], "1"),
    (&[Rule::CorrectedAboveRow], "1 crash jump"),
    (&[Rule::CorrectedBase], "1 crash jump"),
    (&[Rule::CorrectedToNow], "1 crash jump"),
    (&[Rule::Rebase], "1 import no-append"),
    (&[Rule::KeyLock], "1"),
    (&[Rule::QueueFirst], "1"),
    (&[Rule::SortedRows, Rule::Covered], "1"),
    (&[Rule::OneInFlight], "1"),
    (&[Rule::DeadLetterSynced], "1 power sql"),
    (&[Rule::OldPartSynced], "1 power no-append"),
    (&[Rule::OpeningId, Rule::Mark], "2 crash skew"),
    (&[Rule::PartAfterCut], "1 power no-append"),
    (&[Rule::PartAfterClone], "1 clone"),
    (&[Rule::Mark], "1 crash skew"),
    (&[Rule::FileVersions], "1 crash skew"),
    (&[Rule::VersionKept], "1"),
    (&[Rule::ProvisionalWaits], "1 crash jump"),
    (&[Rule::AppendDropsCopy], "1"),
    (&[Rule::CopyBeforeAnswer], "1"),
];

#[test]
fn every_rule_is_missed() {
    let most = 40_000;
    let mut unseen = Vec::new();
    for (off, name) in MUTANTS {
        match first(Environment::parse(name), off, 7, most, STEPS) {
            Some((number, violation)) => println!("{off:?} [{name}]: {number} schedules, {}", violation.kind),
            None => unseen.push(format!("{off:?} [{name}]")),
        }
    }
    assert!(unseen.is_empty(), "no schedule misses these rules: {unseen:#?}");
}
