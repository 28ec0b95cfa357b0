//! Opens a database session with the settings of a REST server, and reads its plans.

use std::time::{Duration, Instant};

use futures::{StreamExt, stream};
use tokio::sync::mpsc;
use tokio_postgres::types::ToSql;
use tokio_postgres::{AsyncMessage, Client, NoTls};

use crate::plan::Explained;

/// Sets up auto_explain, which needs a superuser. The calls then run with the role and the deadline of a daemon.
const SETUP: &str = "
    load 'auto_explain';
    set auto_explain.log_format = json;
    set auto_explain.log_analyze = on;
    set auto_explain.log_buffers = on;
    set auto_explain.log_nested_statements = on;
    set client_min_messages = log;
    set log_min_messages = fatal; -- keeps the plans out of the server's log
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

    /// Calls the function and returns the time of the call.
    pub async fn call(&self, function: &str, argument: &str) -> Duration {
        let sql = format!("select public.{function}::text");
        let statement = self.client.prepare(&sql).await.unwrap();
        let given: [&(dyn ToSql + Sync); 1] = [&argument];
        let given = &given[..statement.params().len()];
        let began = Instant::now();
        let answer: String = self.client.query_one(&statement, given).await.unwrap().get(0);
        let span = began.elapsed();
        let rejected = ["version_in_future", "too_old", "conflict", "superseded"];
        assert!(answer.contains("\"revision\""), "{function} answered {answer}");
        assert!(!rejected.iter().any(|state| answer.contains(state)), "{function} answered {answer}");
        span
    }

    /// Calls the function and returns its plans: one for each inner statement, and last the plan of the call itself.
    pub async fn explained(&mut self, function: &str, argument: &str) -> Vec<Explained> {
        self.log_plans_above("0").await;
        self.call(function, argument).await;
        self.log_plans_above("-1").await;
        let mut plans = Vec::new();
        while let Ok(notice) = self.notices.try_recv() {
            if let Some((_, plan)) = notice.split_once(" plan:\n") {
                plans.push(serde_json::from_str(plan).unwrap_or_else(|error| panic!("{error}: {plan}")));
            }
        }
        plans
    }

    async fn log_plans_above(&self, millis: &str) {
        let sql = format!("reset role; set auto_explain.log_min_duration = {millis}; set role service_role");
        self.client.batch_execute(&sql).await.unwrap();
    }
}
