//! Runs the doctor and checks its findings.

use serde_json::Value;

use crate::process::{Cli, Ended};
use crate::stack::{Gateway, Keys};

/// The output must not have these texts or the keys of the gateway.
const SECRETS: [&str; 3] = ["sb_secret_of", "sb_secret_nobodys", "hunter2"];

/// Uses the settings of a daemon behind this gateway, with long timeouts for a busy machine. `others` override them.
pub fn patient(gateway: &Gateway, others: &[(&str, &str)]) -> Cli {
    let (url, key) = (gateway.url(), gateway.keys().secret);
    let settings = [
        ("CONVERSATION_STORAGE_BACKEND", "supabase"),
        ("SUPABASE_URL", &*url),
        ("SUPABASE_KEY", &*key),
        ("SUPABASE_TIMEOUT_SECONDS", "30"),
        ("CONVERSATION_SOFT_TIMEOUT_SECONDS", "30"),
    ];
    Cli::new(&[&settings, others].concat())
}

/// The findings of one run.
pub struct Diagnosis {
    pub findings: Vec<Value>,
    ended: Ended,
}

impl Diagnosis {
    pub async fn of(cli: &Cli) -> Self {
        Self::with(cli, &[]).await
    }

    /// Runs the doctor with more arguments.
    pub async fn with(cli: &Cli, arguments: &[&str]) -> Self {
        let ended = cli.run(&[&["doctor", "--json"], arguments].concat()).await;
        let Keys { service_jwt, anon_jwt, secret, .. } = Keys::new(0);
        for hidden in SECRETS.into_iter().chain([&*service_jwt, &*anon_jwt, &*secret]) {
            assert!(!format!("{ended:?}").contains(hidden), "the output has {hidden}: {ended:?}");
        }
        let said = ended.json();
        let findings = said["findings"].as_array().unwrap().clone();
        let diagnosis = Self { findings, ended };
        let fails = diagnosis.verdicts("failure").len();
        assert_eq!(said["ok"], fails == 0);
        assert_eq!(diagnosis.ended.code, i32::from(fails > 0), "{:?}", diagnosis.ended);
        assert_eq!(diagnosis.ended.err, "", "with --json, standard error is empty");
        for finding in &diagnosis.findings {
            let needs_remedy = matches!(finding["verdict"].as_str().unwrap(), "failure" | "warning");
            assert_eq!(finding["remedy"].is_string(), needs_remedy, "{finding}");
        }
        diagnosis
    }

    /// Returns the checks with this verdict in order.
    pub fn verdicts(&self, verdict: &str) -> Vec<&str> {
        let all = self.findings.iter().filter(|finding| finding["verdict"] == verdict);
        all.map(|finding| finding["check"].as_str().unwrap()).collect()
    }

    /// Asserts that a finding of this check and verdict has all words.
    pub fn says(&self, check: &str, verdict: &str, words: &[&str]) -> &Self {
        let text = |finding: &Value| {
            format!(
                "{} -> {}",
                finding["message"].as_str().unwrap(),
                finding["remedy"].as_str().unwrap_or_default()
            )
        };
        let has = |finding: &&Value| finding["check"] == check && finding["verdict"] == verdict;
        let mut all = self.findings.iter().filter(has).map(text);
        assert!(
            all.any(|text| words.iter().all(|word| text.contains(word))),
            "no {verdict} of {check} says {words:?}: {:#?}",
            self.findings
        );
        self
    }

    /// Asserts that this check fails, and no other check.
    pub fn only_fails(&self, check: &str, words: &[&str]) -> &Self {
        assert_eq!(self.verdicts("failure"), [check], "{:#?}", self.findings);
        self.says(check, "failure", words)
    }

    /// Asserts that no check fails or warns. The disk of the tests may cause a warning.
    pub fn is_well(&self) -> &Self {
        let mut bad = self.verdicts("failure");
        bad.extend(self.verdicts("warning").iter().filter(|check| **check != "file system"));
        assert!(bad.is_empty(), "{:#?}", self.findings);
        self
    }
}
