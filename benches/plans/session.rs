//! One session of a REST server, as PostgreSQL sees it, that tells of its plans.

use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::plan::Explained;

/// As the superuser, whom auto_explain asks for; what is called later is called as the daemon's role, and with its deadline.
const SETUP: &str = "
    load 'auto_explain';
    set auto_explain.log_format = json;
    set auto_explain.log_analyze = on;
    set auto_explain.log_buffers = on;
    set auto_explain.log_nested_statements = on;
    set client_min_messages = log;
    set log_min_messages = fatal; -- else the server's log has it all, too
    set statement_timeout = '8s';
    set role service_role";

pub struct Session {
    client: Client,
    notices: mpsc::UnboundedReceiver<String>,
}

impl Session {
    pub async fn open(url: &str) -> Self {
        let (client, mut connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
        let (sender, notices) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
            while let Some(Ok(message)) = messages.next().await {
                if let AsyncMessage::Notice(notice) = message {
                    sender.send(notice.message().to_owned()).ok();
                }
            }
        });
        client.batch_execute(SETUP).await.unwrap();
        Self { client, notices }
    }

    /// Says how long it took.
    pub async fn call(&self, function: &str, argument: &str) -> Duration {
        let sql = format!("select public.{function}::text");
        let statement = self.client.prepare(&sql).await.unwrap();
        let given: [&(dyn ToSql + Sync); 1] = [&argument];
        let given = &given[..statement.params().len()];
        let began = Instant::now();
        let answer: String = self.client.query_one(&statement, given).await.unwrap().get(0);
        let span = began.elapsed();
        let refused = ["ahead", "too old", "conflict", "forgotten", "superseded"];
        assert!(answer.contains("\"schema\""), "{function} answered {answer}");
        assert!(!refused.iter().any(|state| answer.contains(state)), "{function} answered {answer}");
        span
    }

    /// Calls it and tells how: a plan for each statement that was run within, and last that of the call itself.
    pub async fn explained(&mut self, function: &str, argument: &str) -> Vec<Explained> {
        self.log_from("0").await;
        self.call(function, argument).await;
        self.log_from("-1").await;
        let mut plans = Vec::new();
        while let Ok(notice) = self.notices.try_recv() {
            if let Some((_, plan)) = notice.split_once(" plan:\n") {
                plans.push(serde_json::from_str(plan).unwrap_or_else(|error| panic!("{error}: {plan}")));
            }
        }
        plans
    }

    async fn log_from(&self, least: &str) {
        let sql = format!("reset role; set auto_explain.log_min_duration = {least}; set role service_role");
        self.client.batch_execute(&sql).await.unwrap();
    }
}
