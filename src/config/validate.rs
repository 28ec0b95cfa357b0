//! The checks of all settings together: invalid values, missing values, and settings of another backend.

use super::builder::Builder;
use super::{Backend, SettingProblem, invalid, key};
use crate::error::{Error, ErrorKind, Result};

impl Builder {
    /// Returns the backend to open, if all settings that it needs are valid.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with all problems together.
    pub(super) fn validate(&mut self) -> Result<Backend> {
        self.derive_url();
        let (mut errors, ignored) = self.partition_problems();
        for problem in ignored {
            tracing::warn!(%problem, "a setting of another backend is invalid; threadkeep ignores it");
        }
        let missing = self.missing();
        if !missing.is_empty() && !self.config.is_strict && errors.is_empty() {
            let names: Vec<&str> = missing.iter().map(|problem| problem.setting.as_str()).collect();
            tracing::warn!(
                "CONVERSATION_STORAGE_BACKEND is supabase, but these settings are not set: {}. FALLING BACK TO MEMORY: a restart \
                 loses all conversations",
                names.join(", ")
            );
            return Ok(Backend::Memory);
        }
        errors.extend(missing);
        match errors.as_slice() {
            [] => Ok(self.config.backend),
            [problem] => Err(error_of(problem)),
            problems => {
                let lines: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
                let message = format!("{} settings are invalid:{}", problems.len(), lines.concat());
                Err(Error::new(ErrorKind::Config, message))
            }
        }
    }

    /// Derives the URL from the project's reference, if no URL is set.
    pub(super) fn derive_url(&mut self) {
        if self.config.url.is_none() {
            self.config.url = self.project.as_ref().map(|project| format!("https://{project}.supabase.co"));
        }
    }

    /// Splits the problems into those of the chosen backend and those of other backends.
    ///
    /// A rollback to another backend must not fail because of a setting that only Supabase uses. If the backend itself is
    /// invalid, each problem counts, so that one error has them all.
    pub(super) fn partition_problems(&self) -> (Vec<SettingProblem>, Vec<SettingProblem>) {
        let is_unknown =
            self.config.problems.iter().any(|problem| problem.setting == "CONVERSATION_STORAGE_BACKEND");
        let is_used = |problem: &SettingProblem| {
            is_unknown || problem.backend().is_none_or(|backend| backend == self.config.backend)
        };
        self.config.problems.iter().cloned().partition(is_used)
    }

    /// Returns the settings that Supabase needs and that are not set.
    pub(super) fn missing(&self) -> Vec<SettingProblem> {
        if self.config.backend != Backend::Supabase || self.store.is_some() {
            return Vec::new();
        }
        // A setting with an invalid value is not missing.
        let is_invalid = |names: &[&str]| {
            self.config.problems.iter().any(|problem| names.contains(&problem.setting.as_str()))
        };
        let no_url = self.config.url.is_none() && !is_invalid(&["SUPABASE_URL", "SUPABASE_PROJECT_ID"]);
        let no_key = self.config.key.is_none() && !is_invalid(&key::NAMES);
        let problem = |setting, remedy| SettingProblem::new(setting, &invalid("is not set", remedy));
        let url = no_url.then(|| problem("SUPABASE_URL", "set it or SUPABASE_PROJECT_ID"));
        let remedy = "set it or SUPABASE_KEY_FILE, SUPABASE_SECRET_KEY or SUPABASE_SERVICE_ROLE_KEY";
        let key = no_key.then(|| problem(key::NAME, remedy));
        url.into_iter().chain(key).collect()
    }
}

/// Returns the error for one invalid setting.
pub(super) fn error_of(problem: &SettingProblem) -> Error {
    let message = format!("a setting is invalid: {} {}", problem.setting, problem.message);
    invalid(message, problem.remedy.clone())
}
