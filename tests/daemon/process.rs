//! Runs the example daemon as a child process and calls it. A test binary also needs the module [`crate::stack`].

// Each test binary compiles this module and uses a part of it.
#![allow(dead_code)]

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Child;

use crate::stack::free_port;

/// The limit for each request, also in an outage.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// The limit for a start or stop, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);

pub struct Daemon {
    directory: TempDir,
    settings: Vec<(String, String)>,
    client: Client,
    child: Child,
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    addr: String,
}

#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<u64>,
    pub body: Value,
}

impl Answer {
    pub fn id(&self) -> String {
        self.body["continuation_id"]
            .as_str()
            .unwrap_or_else(|| panic!("the response has no continuation_id: {self:?}"))
            .to_owned()
    }
}

/// Builds the example and returns its path. `cargo test --test NAME` alone does not build examples.
fn binary() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let test = std::env::current_exe().unwrap();
        let [profile, target] = [2, 3].map(|up| test.ancestors().nth(up).unwrap());
        let name = profile.file_name().unwrap().to_str().unwrap();
        let mut build = Command::new(env!("CARGO"));
        build.args(["build", "--quiet", "--locked", "--all-features", "--example", "daemon"]);
        build.args(["--profile", if name == "debug" { "dev" } else { name }, "--target-dir"]).arg(target);
        assert!(build.status().unwrap().success(), "the build of the daemon failed");
        profile.join("examples/daemon")
    })
}

fn spawn(directory: &Path, settings: &[(String, String)]) -> Child {
    let log = std::fs::File::options().create(true).append(true).open(directory.join("log")).unwrap();
    tokio::process::Command::new(binary())
        .current_dir(directory)
        .env_clear()
        .envs(settings.iter().cloned())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

fn owned(settings: &[(&str, &str)]) -> Vec<(String, String)> {
    settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

impl Daemon {
    /// Starts the daemon in an empty directory with exactly these settings.
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_with_file("", settings).await
    }

    /// Starts the daemon as [`Daemon::start`] does, with a file `.env`.
    pub async fn start_with_file(dotenv: &str, settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        if !dotenv.is_empty() {
            std::fs::write(directory.path().join(".env"), dotenv).unwrap();
        }
        let addr = format!("127.0.0.1:{}", free_port());
        let settings = [owned(settings), owned(&[("DAEMON_ADDR", &addr)])].concat();
        let child = spawn(directory.path(), &settings);
        let mut daemon = Self { directory, settings, client: Client::new(addr), child };
        daemon.wait_until_ready().await;
        daemon
    }

    /// Starts the daemon with wrong settings. Returns its exit status and its log.
    pub async fn fail(settings: &[(&str, &str)]) -> (ExitStatus, String) {
        let directory = tempfile::tempdir().unwrap();
        let settings = [owned(settings), owned(&[("DAEMON_ADDR", "127.0.0.1:0")])].concat();
        let mut child = spawn(directory.path(), &settings);
        let ended = tokio::time::timeout(START_TIMEOUT, child.wait()).await;
        let status = ended.expect("the daemon accepted the settings").unwrap();
        (status, std::fs::read_to_string(directory.path().join("log")).unwrap())
    }

    pub async fn restart(&mut self) {
        self.start_again();
        self.wait_until_ready().await;
    }

    /// Starts the daemon again in its directory without a wait.
    pub fn start_again(&mut self) {
        self.child = spawn(self.directory.path(), &self.settings);
    }

    pub async fn wait_until_ready(&mut self) {
        let started = Instant::now();
        while started.elapsed() < START_TIMEOUT {
            self.assert_running();
            let url = format!("http://{}/healthz", self.client.addr);
            if self.client.http.get(url).send().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the daemon does not respond: {}", self.log());
    }

    pub fn assert_running(&mut self) {
        if let Some(status) = self.child.try_wait().unwrap() {
            panic!("the daemon ended ({status}): {}", self.log());
        }
    }

    /// Sends SIGTERM and waits for the exit.
    pub async fn terminate(&mut self) -> ExitStatus {
        let kill = Command::new("kill").arg(self.id().to_string()).status().unwrap();
        assert!(kill.success());
        let ended = tokio::time::timeout(START_TIMEOUT, self.child.wait()).await;
        ended.expect("the daemon does not stop").unwrap()
    }

    /// Sends SIGKILL and waits for the exit.
    pub async fn kill(&mut self) {
        self.child.kill().await.unwrap();
    }

    pub fn id(&self) -> u32 {
        self.child.id().expect("the daemon runs")
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("log")).unwrap()
    }

    pub fn clone_client(&self) -> Client {
        self.client.clone()
    }
}

impl std::ops::Deref for Daemon {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.client
    }
}

impl Client {
    /// Creates a client that sends each request once, so that a test sees each lost response.
    fn new(addr: String) -> Self {
        let http =
            reqwest::Client::builder().no_proxy().retry(reqwest::retry::never()).timeout(REQUEST_TIMEOUT);
        Self { http: http.build().unwrap(), addr }
    }

    /// Returns the address of the daemon.
    pub fn addr(&self) -> &str {
        &self.addr
    }

    pub async fn chat(&self, message: &str, continuation_id: Option<&str>) -> Answer {
        self.try_chat(message, continuation_id).await.unwrap()
    }

    /// Sends a message as [`Client::chat`] does. A killed daemon gives an error.
    pub async fn try_chat(&self, message: &str, continuation_id: Option<&str>) -> reqwest::Result<Answer> {
        let mut body = json!({ "message": message, "user_id": "u1" });
        if let Some(id) = continuation_id {
            body["continuation_id"] = id.into();
        }
        self.try_request("POST", "/chat", Some(&body)).await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Answer {
        self.request("POST", path, Some(body)).await
    }

    pub async fn get(&self, id: &str) -> Answer {
        self.request("GET", &format!("/conversations/{id}"), None).await
    }

    pub async fn delete(&self, id: &str) -> Answer {
        self.request("DELETE", &format!("/conversations/{id}"), None).await
    }

    pub async fn request(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        self.try_request(method, path, body).await.unwrap()
    }

    /// Sends a request as [`Client::request`] does. A killed daemon gives an error.
    pub async fn try_request(
        &self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> reqwest::Result<Answer> {
        let url = format!("http://{}{path}", self.addr);
        let mut request = self.http.request(method.parse().unwrap(), url);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await?;
        let status = response.status().as_u16();
        let retry_after =
            response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
        let text = response.text().await?;
        let body =
            if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap_or(text.into()) };
        Ok(Answer { status, retry_after, body })
    }
}
