//! The example daemon as a child process, and a client for it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::process::Child;

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
            .unwrap_or_else(|| panic!("no conversation: {self:?}"))
            .to_owned()
    }
}

/// Where cargo puts the example; `cargo test` builds it along, a test alone may not.
fn binary() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let path = test.ancestors().nth(2).unwrap().join("examples/daemon");
    if !path.exists() {
        let build =
            Command::new(env!("CARGO")).args(["build", "--all-features", "--example", "daemon"]).status();
        assert!(build.unwrap().success(), "the daemon does not build");
    }
    path
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
    /// Starts it in an empty directory with these settings and no others.
    pub async fn start(settings: &[(&str, &str)]) -> Self {
        Self::start_with_file("", settings).await
    }

    /// As [`Daemon::start`], with a file `.env`.
    pub async fn start_with_file(dotenv: &str, settings: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        if !dotenv.is_empty() {
            std::fs::write(directory.path().join(".env"), dotenv).unwrap();
        }
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let addr = format!("127.0.0.1:{port}");
        let settings = [owned(settings), owned(&[("DAEMON_ADDR", &addr)])].concat();
        let child = spawn(directory.path(), &settings);
        let mut daemon =
            Self { directory, settings, client: Client { http: reqwest::Client::new(), addr }, child };
        daemon.wait_until_ready().await;
        daemon
    }

    /// Starts it with settings that it should not accept: how it ended and what it said.
    pub async fn fail(settings: &[(&str, &str)]) -> (ExitStatus, String) {
        let directory = tempfile::tempdir().unwrap();
        let settings = [owned(settings), owned(&[("DAEMON_ADDR", "127.0.0.1:0")])].concat();
        let mut child = spawn(directory.path(), &settings);
        let ended = tokio::time::timeout(Duration::from_secs(30), child.wait()).await;
        let status = ended.expect("the daemon accepted the settings").unwrap();
        (status, std::fs::read_to_string(directory.path().join("log")).unwrap())
    }

    pub async fn restart(&mut self) {
        self.child = spawn(self.directory.path(), &self.settings);
        self.wait_until_ready().await;
    }

    async fn wait_until_ready(&mut self) {
        for _ in 0..1_000 {
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("the daemon ended ({status}): {}", self.log());
            }
            let url = format!("http://{}/healthz", self.client.addr);
            if self.client.http.get(url).send().await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("the daemon does not answer: {}", self.log());
    }

    /// SIGTERM, and waits for the end.
    pub async fn terminate(&mut self) -> ExitStatus {
        let kill = Command::new("kill").arg(self.id().to_string()).status().unwrap();
        assert!(kill.success());
        let ended = tokio::time::timeout(Duration::from_secs(20), self.child.wait()).await;
        ended.expect("the daemon does not stop").unwrap()
    }

    /// SIGKILL.
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
    pub async fn chat(&self, message: &str, continuation_id: Option<&str>) -> Answer {
        let mut body = json!({ "message": message, "user_id": "u1" });
        if let Some(id) = continuation_id {
            body["continuation_id"] = id.into();
        }
        self.post("/chat", &body).await
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
        let url = format!("http://{}{path}", self.addr);
        let mut request = self.http.request(method.parse().unwrap(), url);
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        let retry_after =
            response.headers().get("retry-after").map(|value| value.to_str().unwrap().parse().unwrap());
        let text = response.text().await.unwrap();
        let body =
            if text.is_empty() { Value::Null } else { serde_json::from_str(&text).unwrap_or(text.into()) };
        Answer { status, retry_after, body }
    }
}
