//! The composition root: from settings to an open cache.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Backend, SETTINGS, Setting, dotenv, key};
use crate::background;
use crate::batch::Batched;
use crate::cache::{Cache, Limits, OnOutage};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::Guard;
#[cfg(feature = "sqlite")]
use crate::local::spool::Spool;
use crate::memory::Memory;
#[cfg(feature = "sqlite")]
use crate::queue_file::QueueFile;
#[cfg(not(feature = "sqlite"))]
use crate::spool::without::Spool;
use crate::spool::{Bounds, Waiting};
use crate::store::Store;
use crate::supabase::{self, KeySource, Supabase};
use crate::version::Clock;

const SECOND: Duration = Duration::from_secs(1);
/// Without SQLite there is no file beside Supabase, and writes are rejected in an outage.
const WITH_SPOOL: bool = cfg!(feature = "sqlite");

/// Shows neither in `Debug` nor anywhere else.
#[derive(Clone)]
pub(super) struct Secret(pub(super) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// A cache that is about to be opened. Setters never fail; [`open`](Self::open) reports all problems together.
#[derive(Debug)]
pub struct Builder {
    pub(super) backend: Backend,
    store: Option<Arc<dyn Store>>,
    pub(super) local_path: PathBuf,
    pub(super) queue_path: PathBuf,
    /// Whether the path was set, so that a store of the caller's gets a queue.
    has_queue: bool,
    is_without_queue: bool,
    pub(super) spool: Bounds,
    pub(super) url: Option<String>,
    pub(super) project: Option<String>,
    pub(super) key: Option<Secret>,
    /// The setting that the key is from.
    pub(super) key_name: &'static str,
    /// The file that the key is from.
    pub(super) key_file: Option<KeySource>,
    key_source: Option<KeySource>,
    pub(super) deadline: Duration,
    pub(super) fresh_for: Duration,
    pub(super) warm_threads: usize,
    /// The same for a store of the caller's.
    custom_warm_threads: usize,
    pub(super) strict: bool,
    pub(super) limits: Limits,
    skew_millis: i64,
    pub(super) problems: Vec<(Option<Backend>, String)>,
    /// What is not wrong, but hardly meant.
    pub(super) doubts: Vec<String>,
}

impl Default for Builder {
    fn default() -> Self {
        let limits = Limits {
            ttl: Duration::ZERO,
            value_bytes: 0,
            memory_bytes: 0,
            in_flight_bytes: 64 << 20,
            fresh_for: None,
            warm_threads: 0,
            patience: Duration::ZERO,
            upkeep_every: Duration::from_secs(60),
            on_outage: OnOutage::Queue,
        };
        let mut builder = Self {
            backend: Backend::Local,
            store: None,
            local_path: PathBuf::new(),
            queue_path: PathBuf::new(),
            has_queue: false,
            is_without_queue: false,
            spool: Bounds { queue: 0, replica: 0 },
            url: None,
            project: None,
            key: None,
            key_name: key::NAME,
            key_file: None,
            key_source: None,
            deadline: Duration::ZERO,
            fresh_for: Duration::ZERO,
            warm_threads: 0,
            custom_warm_threads: 0,
            strict: false,
            limits,
            skew_millis: 0,
            problems: Vec::new(),
            doubts: Vec::new(),
        };
        // The table has the defaults; a test holds that each of them parses.
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            builder.take(setting, setting.default);
        }
        builder
    }
}

impl Builder {
    /// Everything at its default: conversations in `./threadkeep.db`.
    pub fn new() -> Self {
        Self::default()
    }

    /// The settings of the process's environment.
    pub fn from_env() -> Self {
        Self::from_vars(environment())
    }

    /// The settings of the process's environment and, for what is not set there, of a file such as `.env`. There need
    /// not be one. The environment itself is left as it is. In the file, `$NAME` or `${NAME}` in a value stands for that
    /// variable of the environment or of a line above, or for nothing; in single quotes it stands for itself. If
    /// the key is set there, the file is read again when Supabase refuses the key.
    pub fn from_env_and_file(path: impl AsRef<Path>) -> Self {
        let (vars, problem) = match dotenv::read(path.as_ref()) {
            Ok(vars) => (vars, None),
            Err(problem) => (Vec::new(), Some(problem)),
        };
        let from_env: BTreeMap<_, _> = environment().filter(|(_, value)| !value.is_empty()).collect();
        let mut builder = Self::from_vars(vars.into_iter().chain(from_env.clone()));
        let (name, key_is_ours) = (builder.key_name, !from_env.contains_key(builder.key_name));
        builder.key_file =
            builder.key_file.or_else(|| key_is_ours.then(|| key::of_dotenv(path.as_ref(), name)));
        builder.problems.extend(problem.map(|problem| (None, problem)));
        builder
    }

    /// The settings among these variables; a later one of the same name wins, an empty one counts as unset.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Self {
        let vars: BTreeMap<String, String> = vars.into_iter().collect();
        let mut builder = Self::new();
        for setting in SETTINGS {
            if let Some(text) = vars.get(setting.name).map(|text| text.trim()).filter(|text| !text.is_empty())
            {
                builder.take(setting, text);
            }
        }
        let is_set = |name: &str| vars.get(name).is_some_and(|text| !text.trim().is_empty());
        let key = key::NAMES.into_iter().find(|name| is_set(name));
        if let Some(key) = key.filter(|_| !is_set("CONVERSATION_STORAGE_BACKEND")) {
            builder.doubt(format!(
                "{key} is set, but CONVERSATION_STORAGE_BACKEND is not: the backend is `local`"
            ));
        }
        let is_known = |name: &String| SETTINGS.iter().any(|setting| setting.name == name);
        for name in vars.keys().filter(|name| name.starts_with("CONVERSATION_") && !is_known(name)) {
            builder.doubt(format!("{name} is not a setting of threadkeep: misspelt?"));
        }
        builder
    }

    fn doubt(&mut self, doubt: String) {
        tracing::warn!("a setting may be a mistake: {doubt}");
        self.doubts.push(doubt);
    }

    fn take(&mut self, setting: &Setting, text: &str) {
        let is_text = !text.contains(char::REPLACEMENT_CHARACTER);
        let taken = if is_text { (setting.set)(self, text) } else { Err("use a value that is UTF-8".into()) };
        if let Err(remedy) = taken {
            self.problems.push((setting.backend, format!("{}: {remedy}", setting.name)));
        }
    }

    /// Takes a span in that a setter was given, as it is.
    fn span(
        mut self,
        name: &str,
        span: Duration,
        range: &RangeInclusive<Duration>,
        place: impl FnOnce(&mut Self) -> &mut Duration,
    ) -> Self {
        if range.contains(&span) {
            *place(&mut self) = span;
            return self;
        }
        let (least, most) = (range.start(), range.end());
        self.refuse(name, &format!("{span:?} is not possible; use a time from {least:?} to {most:?}"));
        self
    }

    /// Notes that a setting is wrong.
    fn refuse(&mut self, name: &str, remedy: &str) {
        let backend =
            SETTINGS.iter().find(|setting| setting.name == name).and_then(|setting| setting.backend);
        self.problems.push((backend, format!("{name}: {remedy}")));
    }

    fn set(mut self, name: &str, text: &str) -> Self {
        if let Some(setting) = SETTINGS.iter().find(|setting| setting.name == name) {
            self.take(setting, text);
        }
        self
    }

    pub(super) fn set_key(&mut self, name: &'static str, key: &str, file: Option<KeySource>) {
        (self.key_name, self.key, self.key_file) = (name, Some(Secret(key.into())), file);
    }

    /// Takes the key by a name that Supabase gives it, unless a setting of threadkeep's own has given one.
    pub(super) fn take_key_of_supabase(
        &mut self,
        name: &'static str,
        key: &str,
    ) -> std::result::Result<(), String> {
        let Some(held) = &self.key else {
            supabase::check_key(key)?;
            self.set_key(name, key, None);
            return Ok(());
        };
        if held.0 != key && self.backend == Backend::Supabase {
            let used = self.key_name;
            self.doubt(format!("{used} and {name} hold different keys: the one of {used} is used"));
        }
        Ok(())
    }

    /// Keeps conversations in a SQLite file.
    #[must_use]
    pub fn local(mut self, path: impl Into<PathBuf>) -> Self {
        (self.backend, self.local_path) = (Backend::Local, path.into());
        self
    }

    /// Keeps conversations in a Supabase project: its URL, and its secret (service role) key.
    #[must_use]
    pub fn supabase(mut self, url: &str, key: &str) -> Self {
        self.backend = Backend::Supabase;
        self.set("SUPABASE_URL", url).set("SUPABASE_KEY", key)
    }

    /// Where a new key comes from when Supabase refuses the one in use, as [`Supabase::renew_key_from`] says. The first
    /// key is set as ever. A file that the key was read from is not read again then.
    #[must_use]
    pub fn renew_key_from(mut self, source: impl Fn() -> Option<String> + Send + Sync + 'static) -> Self {
        self.key_source = Some(KeySource::new(source));
        self
    }

    /// Keeps conversations in memory: they are lost when the process ends.
    #[must_use]
    pub fn memory(mut self) -> Self {
        self.backend = Backend::Memory;
        self
    }

    /// Keeps conversations in a store of the caller's. One that can be away belongs into a [`Guard`].
    #[must_use]
    pub fn store(mut self, store: impl Store) -> Self {
        self.store = Some(Arc::new(store));
        self
    }

    /// How long a thread lives, unless a write says otherwise.
    #[must_use]
    pub fn ttl(self, ttl: Duration) -> Self {
        self.span("CONVERSATION_TIMEOUT_HOURS", ttl, &super::TTL, |builder| &mut builder.limits.ttl)
    }

    /// The largest conversation, in bytes of JSON.
    #[must_use]
    pub fn max_bytes(mut self, bytes: usize) -> Self {
        match super::VALUE_BYTES.contains(&bytes) {
            true => self.limits.value_bytes = bytes,
            false => self.refuse("CONVERSATION_MAX_BYTES", &super::wrong_bytes(&super::VALUE_BYTES)),
        }
        self
    }

    /// Bytes of threads in memory.
    #[must_use]
    pub fn cache_bytes(mut self, bytes: usize) -> Self {
        self.limits.memory_bytes = bytes as u64;
        self
    }

    /// How long a thread in memory is handed out before the source of truth is asked about it.
    #[must_use]
    pub fn fresh_for(self, span: Duration) -> Self {
        self.span("CONVERSATION_FRESH_SECONDS", span, &super::FRESH_FOR, |builder| &mut builder.fresh_for)
    }

    /// How many of the newest threads come into memory at the start, in the background and up to half of the memory. A
    /// [store](Self::store) of the caller's is asked for them with this only; those of a local file are read fast enough as they
    /// are.
    #[must_use]
    pub fn warm_threads(mut self, threads: usize) -> Self {
        (self.warm_threads, self.custom_warm_threads) = (threads, threads);
        self
    }

    /// Keeps writes and last known copies in this file while the source of truth is away. The backend `supabase` always
    /// has one; a [store](Self::store) of the caller's has one with this.
    #[must_use]
    pub fn queue(mut self, path: impl Into<PathBuf>) -> Self {
        (self.queue_path, self.has_queue) = (path.into(), true);
        self
    }

    /// Opens no queue's file, so that this works beside a daemon that has it open: in an outage a write is an error, a read
    /// finds only what is in memory, and what waits in the daemon's queue is not seen.
    #[must_use]
    pub fn without_queue(mut self) -> Self {
        self.is_without_queue = true;
        self
    }

    /// Bytes of queued writes and dead letters on disk.
    #[must_use]
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.spool.queue = bytes as u64;
        self
    }

    /// Bytes of last known copies on disk.
    #[must_use]
    pub fn replica_bytes(mut self, bytes: usize) -> Self {
        self.spool.replica = bytes as u64;
        self
    }

    /// What becomes of a write while the source of truth cannot take it.
    #[must_use]
    pub fn on_outage(mut self, choice: OnOutage) -> Self {
        self.limits.on_outage = choice;
        self
    }

    /// How long a read that has a stale copy waits for the source of truth, and a write before it is queued.
    #[must_use]
    pub fn patience(self, span: Duration) -> Self {
        let range = &super::PATIENCE;
        self.span("CONVERSATION_PATIENCE_SECONDS", span, range, |builder| &mut builder.limits.patience)
    }

    /// How long one small request to Supabase may take.
    #[must_use]
    pub fn timeout(self, span: Duration) -> Self {
        self.span("SUPABASE_TIMEOUT_SECONDS", span, &super::DEADLINE, |builder| &mut builder.deadline)
    }

    /// Makes missing credentials an error.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// How often accesses are reported and expired records forgotten: a minute unless set, 10 ms at least, a day at most.
    #[must_use]
    pub fn upkeep_every(mut self, period: Duration) -> Self {
        self.limits.upkeep_every = period.clamp(Duration::from_millis(10), Duration::from_secs(86_400));
        self
    }

    /// Runs as on a machine whose clock is this much ahead (behind, where negative).
    #[cfg(feature = "testing")]
    #[must_use]
    pub fn clock_skew_millis(mut self, by: i64) -> Self {
        self.skew_millis = by;
        self
    }

    /// Opens the cache. Its background work (the probe of the breaker, the replay, the warm-up, the chores) runs on a runtime of
    /// this process's own with two threads. So it goes on while a runtime of one thread stands still between two calls of
    /// `block_on`, and a cache may outlive the runtime on which it was opened. Loads and writes that are under way end with the
    /// caller's runtime, if that has workers.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with all problems of the settings together; [`ErrorKind::Local`] where the file cannot be
    /// used, [`ErrorKind::InUse`] where another process has it open; [`ErrorKind::Denied`] and [`ErrorKind::Schema`] where Supabase refuses the key or lacks the migrations. An
    /// outage is no error here: the cache opens, and works when it is over.
    pub async fn open(mut self) -> Result<Cache> {
        let backend = self.settle()?;
        if let Some(store) = self.store {
            (self.limits.fresh_for, self.limits.warm_threads) =
                (Some(self.fresh_for), self.custom_warm_threads);
            let spool = match self.has_queue && !self.is_without_queue {
                true => Some(open_spool(&self.queue_path, "custom", self.spool, store.clock()).await?),
                false => None,
            };
            // The first answer sets the clock; without one, the first write does.
            let probed = Arc::clone(&store);
            match background::run(async move { probed.probe().await }).await? {
                Err(error) if !error.is_outage() => return Err(error),
                _ => {}
            }
            return Ok(Cache::over(store, "custom", self.limits, spool));
        }
        match backend {
            Backend::Local => {
                name_what_is_left_behind(&self.queue_path);
                open_local(&self.local_path, self.limits).await
            }
            Backend::Memory => {
                tracing::warn!("conversations are kept in memory only: they are lost on restart");
                name_what_is_left_behind(&self.queue_path);
                Ok(Cache::over(Arc::new(Memory::new()), "memory", self.limits, None))
            }
            Backend::Supabase => {
                (self.limits.fresh_for, self.limits.warm_threads) = (Some(self.fresh_for), self.warm_threads);
                let url = self.url.unwrap_or_default();
                let key = self.key.map(|key| key.0).unwrap_or_default();
                let client = Supabase::with_clock(&url, &key, Clock::skewed(self.skew_millis))?;
                let client = client.with_key_source(self.key_source.or(self.key_file));
                let host = client.host().to_owned();
                let spool = match WITH_SPOOL && !self.is_without_queue {
                    true => Some(open_spool(&self.queue_path, &host, self.spool, client.clock()).await?),
                    false => None,
                };
                // The guard comes second: what Supabase notices itself can be said more exactly.
                let guard = Guard::new(client.stall_after(self.deadline), self.deadline + SECOND / 4);
                let contact = async move { guard.first_contact().await.map(|failure| (guard, failure)) };
                let (guard, failure) = background::run(contact).await??;
                tracing::info!(%host, "conversations are kept in Supabase");
                let cache = Cache::over(Arc::new(Batched::new(guard)), "supabase", self.limits, spool);
                failure.into_iter().for_each(|failure| cache.note_first_contact(failure));
                Ok(cache)
            }
        }
    }

    /// The backend that is set.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// The file of the queue as it is set.
    pub fn queue_path(&self) -> &Path {
        &self.queue_path
    }

    /// Opens the queue's file by itself: one that exists, whosever writes it holds.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] where it cannot be known which file that is; otherwise as [`QueueFile::open`].
    #[cfg(feature = "sqlite")]
    pub async fn open_queue_file(self) -> Result<QueueFile> {
        let matters = |backend: Option<Backend>, problem: &str| {
            backend.is_none() || problem.starts_with("CONVERSATION_QUEUE_PATH")
        };
        match self.problems.iter().find(|(backend, problem)| matters(*backend, problem)) {
            Some((_, problem)) => Err(wrong(problem)),
            None => QueueFile::open(self.queue_path).await,
        }
    }

    /// Opens the queue's file of the Supabase project that is set, by itself, and creates it where it does not exist.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] with all problems of the settings together, and where the backend is another; otherwise as
    /// [`QueueFile::open_for`].
    #[cfg(feature = "sqlite")]
    pub async fn open_queue_file_of_origin(mut self) -> Result<QueueFile> {
        self.strict = true;
        if self.settle()? != Backend::Supabase {
            return Err(wrong("CONVERSATION_STORAGE_BACKEND: only `supabase` has a queue; set that"));
        }
        let (url, key) = (self.url.unwrap_or_default(), self.key.map(|key| key.0).unwrap_or_default());
        let origin = Supabase::new(&url, &key)?.host().to_owned();
        QueueFile::open_for(self.queue_path, &origin).await
    }

    /// The backend to open, once everything that it needs is known to be right.
    fn settle(&mut self) -> Result<Backend> {
        self.complete();
        let (mut errors, idle) = self.sorted_problems();
        for problem in idle {
            tracing::warn!(%problem, "a setting that this backend does not use is wrong");
        }
        let missing = self.missing();
        if !missing.is_empty() && !self.strict && errors.is_empty() {
            let missing = missing.join(" not set and ");
            tracing::warn!(
                "CONVERSATION_STORAGE_BACKEND is supabase, but {missing} not set: FALLING BACK TO MEMORY, conversations are lost on restart"
            );
            return Ok(Backend::Memory);
        }
        errors.extend(missing.iter().map(|what| format!("{what} not set")));
        match errors.as_slice() {
            [] => Ok(self.backend),
            [one] => Err(wrong(one)),
            all => {
                let message = format!("{} settings are wrong:\n  {}", all.len(), all.join("\n  "));
                Err(Error::new(ErrorKind::Config, message))
            }
        }
    }

    /// The project gives the URL where that is empty.
    pub(super) fn complete(&mut self) {
        if self.url.is_none() {
            self.url = self.project.as_ref().map(|project| format!("https://{project}.supabase.co"));
        }
    }

    /// The problems of the settings that the backend uses, and those of others: a rollback to another backend must not fail
    /// for what only Supabase needs.
    pub(super) fn sorted_problems(&self) -> (Vec<String>, Vec<String>) {
        let matters = |backend: Option<Backend>| backend.is_none_or(|backend| backend == self.backend);
        let (errors, idle): (Vec<_>, Vec<_>) =
            self.problems.iter().cloned().partition(|(backend, _)| matters(*backend));
        let texts = |problems: Vec<(_, String)>| problems.into_iter().map(|(_, problem)| problem).collect();
        (texts(errors), texts(idle))
    }

    pub(super) fn missing(&self) -> Vec<&'static str> {
        let is_asked = self.backend == Backend::Supabase && self.store.is_none();
        // What is set but wrong is not missing.
        let is_wrong = |name: &str| self.problems.iter().any(|(_, problem)| problem.starts_with(name));
        let no_url = self.url.is_none() && !is_wrong("SUPABASE_URL") && !is_wrong("SUPABASE_PROJECT_ID");
        let no_key = self.key.is_none() && !key::NAMES.into_iter().any(is_wrong);
        let url = no_url.then_some("SUPABASE_URL (or SUPABASE_PROJECT_ID) is");
        let key = no_key.then_some(
            "SUPABASE_KEY (or SUPABASE_KEY_FILE, SUPABASE_SECRET_KEY or SUPABASE_SERVICE_ROLE_KEY) is",
        );
        [url, key].into_iter().flatten().filter(|_| is_asked).collect()
    }
}

fn wrong(setting: &str) -> Error {
    Error::new(ErrorKind::Config, format!("a setting is wrong: {setting}"))
}

/// The environment; what is not UTF-8 shows by a replacement character, which [`Builder::take`] refuses.
pub(super) fn environment() -> impl Iterator<Item = (String, String)> {
    #[allow(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    let vars = std::env::vars_os();
    vars.map(|(name, value)| (name.to_string_lossy().into_owned(), value.to_string_lossy().into_owned()))
}

/// After a rollback from Supabase, its queue may still hold writes.
fn name_what_is_left_behind(queue: &Path) {
    if let Some(writes) = Spool::left_behind(queue).filter(|writes| *writes > 0) {
        let path = queue.display();
        tracing::warn!(%path, writes, "acknowledged writes wait in a queue: they reach Supabase with the backend `supabase` only");
    }
}

#[cfg(feature = "sqlite")]
async fn open_local(path: &Path, limits: Limits) -> Result<Cache> {
    let local = crate::local::Local::open(path).await?;
    tracing::info!(path = %path.display(), "conversations are kept in a local file");
    Ok(Cache::over(Arc::new(local), "local", limits, None))
}

/// Opens the file beside the source of truth that `origin` names.
#[cfg(feature = "sqlite")]
async fn open_spool(
    path: &Path,
    origin: &str,
    bounds: Bounds,
    clock: &Arc<Clock>,
) -> Result<(Spool, Vec<Waiting>)> {
    let (spool, waiting) = Spool::open(path, origin, bounds, Arc::clone(clock)).await?;
    if !waiting.is_empty() {
        tracing::info!(path = %path.display(), writes = waiting.len(), "writes wait in the queue from before");
    }
    Ok((spool, waiting))
}

#[cfg(not(feature = "sqlite"))]
async fn open_spool(_: &Path, _: &str, _: Bounds, _: &Arc<Clock>) -> Result<(Spool, Vec<Waiting>)> {
    Err(Error::new(ErrorKind::Config, "this build has no queue (feature `sqlite`)"))
}

#[cfg(not(feature = "sqlite"))]
async fn open_local(_: &Path, _: Limits) -> Result<Cache> {
    let message = "CONVERSATION_STORAGE_BACKEND: this build has no `local` (feature `sqlite`); set `supabase` or `memory`";
    Err(Error::new(ErrorKind::Config, message))
}

impl Cache {
    /// Opens a cache with the settings of the environment; with none, conversations are kept in `./threadkeep.db`.
    ///
    /// # Errors
    /// As [`Builder::open`].
    pub async fn from_env() -> Result<Self> {
        Builder::from_env().open().await
    }

    /// A cache that is about to be opened.
    pub fn builder() -> Builder {
        Builder::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_parses() {
        assert!(Builder::new().problems.is_empty(), "{:?}", Builder::new().problems);
        assert_eq!(Builder::new().limits.ttl, Duration::from_secs(24 * 3600));
    }
}
