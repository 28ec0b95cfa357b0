//! Runs `threads.py` as a child process that executes calls in order.

use std::process::Stdio;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::stack::{Gateway, python};

const PROGRAM: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/python/threads.py");

pub struct Python {
    calls: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _child: Child,
}

impl Python {
    /// Starts the changed class with the secret key.
    pub async fn changed(gateway: &Gateway) -> Self {
        Self::start("changed", gateway, &gateway.keys().secret)
    }

    /// Starts the unchanged class with this key.
    pub fn planned(gateway: &Gateway, key: &str) -> Self {
        Self::start("planned", gateway, key)
    }

    fn start(class: &str, gateway: &Gateway, key: &str) -> Self {
        let mut command = Command::new(python());
        // The developer's proxy must not apply.
        command.env_clear().env("PYTHONDONTWRITEBYTECODE", "1");
        command.args([PROGRAM, class, &gateway.url(), key]).kill_on_drop(true);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("python runs");
        let answers = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { calls: child.stdin.take().unwrap(), answers, _child: child }
    }

    /// Calls a method. An error is PostgREST's code or Python's message.
    pub async fn call(&mut self, method: &str, arguments: Value) -> Result<Value, String> {
        let line = format!("{}\n", json!({"method": method, "arguments": arguments}));
        self.calls.write_all(line.as_bytes()).await.unwrap();
        let answer =
            self.answers.next_line().await.unwrap().expect("threads.py answers; see its standard error");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        match answer["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer["ok"].clone()),
        }
    }

    pub async fn set(&mut self, key: &str, data: &Value, ttl: f64) {
        self.call("set", json!({"thread_id": key, "data": data, "ttl": ttl})).await.unwrap();
    }

    pub async fn get(&mut self, key: &str) -> Option<Value> {
        let found = self.call("get", json!({"thread_id": key})).await.unwrap();
        (found != Value::Null).then_some(found)
    }

    pub async fn delete(&mut self, key: &str) {
        self.call("delete", json!({"thread_id": key})).await.unwrap();
    }

    /// Adds a turn. Returns false if the conversation does not exist.
    pub async fn append(&mut self, key: &str, turn: &str) -> bool {
        let arguments = json!({"thread_id": key, "turn": turn, "ttl": crate::HOUR});
        self.call("append", arguments).await.unwrap().as_bool().unwrap()
    }
}
