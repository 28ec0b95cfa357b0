//! A client for the HTTP API of Prometheus.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// The limit for each wait of a test.
const MAX_WAIT: Duration = Duration::from_secs(180);

pub struct Api {
    http: reqwest::Client,
    url: String,
}

pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64()
}

impl Api {
    pub fn new(url: String) -> Self {
        Self { http: reqwest::Client::builder().no_proxy().build().unwrap(), url }
    }

    async fn call(&self, path: &str, parameters: &[(&str, &str)]) -> Value {
        let url = format!("{}/api/v1/{path}", self.url);
        let url = reqwest::Url::parse_with_params(&url, parameters).unwrap();
        let text = self.http.get(url).send().await.unwrap().text().await.unwrap();
        let mut answer: Value = serde_json::from_str(&text).unwrap();
        assert_eq!(answer["status"], "success", "{path} {parameters:?}: {text}");
        answer["data"].take()
    }

    /// Evaluates an expression now. Returns the labels and the value of each series.
    pub async fn query(&self, expression: &str) -> Vec<(Value, f64)> {
        let data = self.call("query", &[("query", expression)]).await;
        let number = |value: &Value| value.as_str().unwrap().parse().unwrap();
        let series = data["result"].as_array().unwrap().iter();
        series.map(|sample| (sample["metric"].clone(), number(&sample["value"][1]))).collect()
    }

    /// Evaluates an expression from `start` until now. Returns the numbers of all series.
    pub async fn numbers(&self, expression: &str, start: f64) -> Vec<f64> {
        let (start, end) = (start.to_string(), now().to_string());
        let range = [("query", expression), ("start", &start), ("end", &end), ("step", "0.5")];
        let data = self.call("query_range", &range).await;
        let series = data["result"].as_array().unwrap().iter();
        let values = series.flat_map(|samples| samples["values"].as_array().unwrap());
        let numbers = values.map(|pair| pair[1].as_str().unwrap().parse::<f64>().unwrap());
        numbers.filter(|number| !number.is_nan()).collect()
    }

    /// Returns all loaded rules.
    pub async fn rules(&self) -> Vec<Value> {
        let data = self.call("rules", &[]).await;
        let groups = data["groups"].as_array().unwrap().iter();
        groups.flat_map(|group| group["rules"].as_array().unwrap().clone()).collect()
    }

    /// Returns the pending and the firing alerts.
    pub async fn alerts(&self) -> BTreeSet<String> {
        let data = self.call("alerts", &[]).await;
        let alerts = data["alerts"].as_array().unwrap().iter();
        alerts.map(|alert| alert["labels"]["alertname"].as_str().unwrap().to_owned()).collect()
    }

    /// Returns the alerts that fired since `start`.
    pub async fn fired(&self, start: f64) -> BTreeSet<String> {
        let (start, end) = (start.to_string(), now().to_string());
        let range = [("match[]", "ALERTS{alertstate=\"firing\"}"), ("start", &start), ("end", &end)];
        let data = self.call("label/alertname/values", &range).await;
        data.as_array().unwrap().iter().map(|name| name.as_str().unwrap().to_owned()).collect()
    }

    /// Returns the labels of all scraped series of the library.
    pub async fn series(&self) -> Vec<Value> {
        let data =
            self.call("series", &[("match[]", "{job=\"threadkeep\", __name__=~\"threadkeep_.*\"}")]).await;
        data.as_array().unwrap().clone()
    }

    /// Waits until an alert fires.
    pub async fn wait_for_alert(&self, name: &str) {
        let firing = format!("ALERTS{{alertname=\"{name}\", alertstate=\"firing\"}}");
        wait_until(&format!("{name} to fire"), async || !self.query(&firing).await.is_empty()).await;
    }

    /// Waits until no other alert is pending or firing.
    pub async fn wait_for_no_alerts_but(&self, names: &[&str]) {
        let is_expected = |name: &String| names.contains(&name.as_str());
        let condition = format!("the alerts but {names:?} to end");
        wait_until(&condition, async || self.alerts().await.iter().all(is_expected)).await;
    }
}

/// Polls until the condition holds. Panics after [`MAX_WAIT`].
pub async fn wait_until<F: Future<Output = bool>>(condition: &str, holds: impl Fn() -> F) {
    let deadline = tokio::time::Instant::now() + MAX_WAIT;
    while !holds().await {
        assert!(tokio::time::Instant::now() < deadline, "timed out while waiting for {condition}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
