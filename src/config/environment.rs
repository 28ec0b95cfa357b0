//! Settings as text: from the environment, from a file, and from variables of the caller.

use std::collections::BTreeMap;
use std::path::Path;

use super::builder::Builder;
use super::resolved::Secret;
use super::settings::{SETTINGS, Setting};
use super::{Backend, SettingProblem, dotenv, invalid, key, malformed};
use crate::error::{Error, Result};
use crate::store::supabase::{self, KeyProvider};

impl Builder {
    /// Reads the settings from the environment of the process.
    ///
    /// Invalid values are no error here. [`open`](Self::open) reports them. See [`Builder`] for an example.
    pub fn from_env() -> Self {
        Self::from_vars(environment())
    }

    /// Reads the settings from the environment, and the unset ones from a file such as `.env`.
    ///
    /// The file may be missing. The environment of the process does not change. In the file, `$NAME` and `${NAME}` stand
    /// for a variable of the environment or of an earlier line. An unknown variable gives an empty text. Single quotes
    /// keep the `$`. If the file sets the key, threadkeep reads the file again when Supabase rejects the key.
    /// See [`Builder`] for an example.
    pub fn from_env_and_file(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let (vars, errors) = dotenv::read(path);
        let from_env: BTreeMap<_, _> = environment().filter(|(_, value)| !value.is_empty()).collect();
        let mut builder = Self::from_vars(vars.into_iter().chain(from_env.clone()));
        // A key from the environment cannot change, so only a key from the file is renewed from the file.
        let name = builder.config.key_name;
        if builder.key_file.is_none() && !from_env.contains_key(name) {
            builder.key_file = Some(key::from_dotenv(path, name));
        }
        errors.iter().for_each(|error| builder.reject(path.display().to_string(), error));
        builder
    }

    /// Reads the settings from these variables. The last variable of a name wins. An empty variable counts as unset.
    ///
    /// ```
    /// use threadkeep::{Backend, Builder};
    ///
    /// let builder = Builder::from_vars([("CONVERSATION_STORAGE_BACKEND".into(), "memory".into())]);
    /// assert_eq!(builder.backend(), Backend::Memory);
    /// ```
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Self {
        let vars: BTreeMap<String, String> = vars.into_iter().collect();
        let value_of = |name: &str| vars.get(name).map(|text| text.trim()).filter(|text| !text.is_empty());
        let mut builder = Self::new();
        for setting in SETTINGS {
            if let Some(text) = value_of(setting.name) {
                builder.apply(setting, text);
            }
        }
        let key = key::NAMES.into_iter().find(|name| value_of(name).is_some());
        if let Some(key) = key.filter(|_| value_of("CONVERSATION_STORAGE_BACKEND").is_none()) {
            builder.warn(
                key,
                "is set, but CONVERSATION_STORAGE_BACKEND is not: the backend is `local`",
                "set CONVERSATION_STORAGE_BACKEND",
            );
        }
        let has_interval = value_of("CONVERSATION_FEED_INTERVAL_SECONDS").is_some();
        builder.warn_of_unused_feed(has_interval);
        let is_known = |name: &String| SETTINGS.iter().any(|setting| setting.name == name);
        for name in vars.keys().filter(|name| name.starts_with("CONVERSATION_") && !is_known(name)) {
            builder.warn(name, "is not a setting of threadkeep", "check its spelling");
        }
        builder
    }

    /// Warns if conversations stop being fresh before the next poll of the feed. A freshness period of zero is a choice, unless the
    /// interval is set, too.
    fn warn_of_unused_feed(&mut self, has_interval: bool) {
        let Some(fresh_for) = self.limits.fresh_for else { return };
        let interval = self.limits.feed_interval;
        let is_supabase = self.config.backend == Backend::Supabase;
        let is_meant = fresh_for.is_zero() && !has_interval || interval.is_zero();
        if is_supabase && fresh_for <= interval && !is_meant {
            self.warn(
                "CONVERSATION_FRESH_SECONDS",
                "is not above CONVERSATION_FEED_INTERVAL_SECONDS, so reads ask Supabase in spite of the change feed",
                "raise it, or set CONVERSATION_FEED_INTERVAL_SECONDS=0",
            );
        }
    }

    fn warn(&mut self, setting: &str, message: impl Into<String>, remedy: &'static str) {
        let warning = SettingProblem::new(setting, &invalid(message, remedy));
        tracing::warn!("a setting is probably a mistake: {warning}");
        self.config.warnings.push(warning);
    }

    /// Parses the text of a setting. Keeps a problem for [`open`](Self::open), so that one error reports all problems.
    pub(super) fn apply(&mut self, setting: &Setting, text: &str) {
        let is_utf8 = !text.contains(char::REPLACEMENT_CHARACTER);
        let applied = if is_utf8 { (setting.set)(self, text) } else { Err(malformed("use UTF-8")) };
        if let Err(error) = applied {
            self.reject(setting.name, &error);
        }
    }

    pub(super) fn reject(&mut self, setting: impl Into<String>, error: &Error) {
        self.config.problems.push(SettingProblem::new(setting, error));
    }

    pub(super) fn set_key(&mut self, name: &'static str, key: &str, file: Option<KeyProvider>) {
        (self.config.key_name, self.config.key, self.key_file) = (name, Some(Secret::new(key)), file);
    }

    /// Sets the key from one of Supabase's own names, unless a setting with precedence has set it.
    ///
    /// A different key under another name is probably a forgotten one, so it gives a warning.
    pub(super) fn set_fallback_key(&mut self, name: &'static str, key: &str) -> Result<()> {
        let Some(held) = &self.config.key else {
            supabase::check_key(key)?;
            self.set_key(name, key, None);
            return Ok(());
        };
        if held.expose() != key && self.config.backend == Backend::Supabase {
            let used = self.config.key_name;
            self.warn(name, format!("and {used} hold different keys: {used} is used"), "unset one of them");
        }
        Ok(())
    }
}

/// Returns the variables of the environment. Bytes that are not UTF-8 become replacement characters, and
/// [`Builder::apply`] rejects these.
fn environment() -> impl Iterator<Item = (String, String)> {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    let vars = std::env::vars_os();
    vars.map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
}
