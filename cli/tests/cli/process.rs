//! Runs the command line as a child process in a directory of its own.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;
use threadkeep::Cache;
use threadkeep::store::{Memory, ResilientStore};
use threadkeep::testing::{Fault, FaultStore};

use crate::stack::Gateway;

pub const PROJECT: &str = "project.supabase.co";

pub struct Cli {
    directory: TempDir,
    settings: Vec<(String, String)>,
}

/// The result of a run.
#[derive(Debug)]
pub struct Ended {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Ended {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    pub fn lines(&self) -> Vec<Value> {
        self.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }
}

impl From<Output> for Ended {
    fn from(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        let ended =
            Self { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) };
        assert!(!ended.err.contains("panicked"), "{ended:?}");
        assert!(!ended.err.contains("sb_secret_"), "the output has a secret: {ended:?}");
        ended
    }
}

impl Cli {
    pub fn new(settings: &[(&str, &str)]) -> Self {
        let settings =
            settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Self { directory: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap(), settings }
    }

    /// Uses the settings of a project that does not exist.
    pub fn of_project() -> Self {
        Self::new(&[
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
            ("SUPABASE_URL", &format!("https://{PROJECT}")),
            ("SUPABASE_KEY", "sb_secret_nobodys"),
        ])
    }

    pub fn on(gateway: &Gateway) -> Self {
        Self::new(&[
            ("CONVERSATION_STORAGE_BACKEND", "supabase"),
            ("SUPABASE_URL", &gateway.url()),
            ("SUPABASE_KEY", &gateway.keys().secret),
        ])
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Returns the default path of the outage file.
    pub fn queue(&self) -> PathBuf {
        self.path("threadkeep-queue.db")
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_threadkeep"));
        command.current_dir(self.directory.path()).env_clear().envs(self.settings.iter().cloned());
        command.args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs the command on a blocking thread, because a gateway may use the runtime.
    pub async fn run(&self, arguments: &[&str]) -> Ended {
        let mut command = self.command(arguments);
        tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap().into()
    }

    /// Runs the command and asserts that it succeeds.
    pub async fn ok(&self, arguments: &[&str]) -> Ended {
        let ended = self.run(arguments).await;
        assert_eq!(ended.code, 0, "{arguments:?}: {ended:?}");
        ended
    }

    pub async fn run_with_input(&self, arguments: &[&str], input: &str) -> Ended {
        let (mut command, input) = (self.command(arguments), input.to_owned());
        tokio::task::spawn_blocking(move || {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(input.as_bytes()).ok();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
        .into()
    }
}

/// Opens a cache with this outage file and an unreachable store. Its project is `custom`.
pub async fn cut_off(queue: &Path) -> Cache {
    let faulty = FaultStore::new(Memory::new());
    faulty.faults().always(Fault::Refuse);
    let guard = ResilientStore::new(faulty, std::time::Duration::from_secs(1));
    guard.connect().await.unwrap();
    Cache::builder().store(guard).queue(queue).open().await.unwrap()
}

/// Creates an outage file of the project `custom` with `count` puts, an update, a removal and a `null` value.
pub async fn fill(queue: &Path, count: usize) {
    let cache = cut_off(queue).await;
    for at in 0..count {
        let value = format!("{at} {}", "x".repeat(1_000));
        let put = cache.put(format!("t{at}"), &value).user("u1").metadata(&serde_json::json!({"at": at}));
        assert_eq!(put.await.unwrap(), threadkeep::WriteOutcome::Queued);
    }
    cache.update("t0", |was: Option<String>| Ok(was.map(|was| was + " updated"))).await.unwrap();
    cache.remove("removed").await.unwrap();
    cache.put("nothing", &()).await.unwrap();
    cache.shutdown(std::time::Duration::ZERO).await.unwrap();
}
