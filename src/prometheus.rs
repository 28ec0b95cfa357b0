//! Feature `prometheus`: an exporter that is set up for the [series](crate::metrics) of threadkeep.
//!
//! One call, before a cache is opened:
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> threadkeep::Result<()> {
//! threadkeep::prometheus::install(([127, 0, 0, 1], 9464).into())?; // serves http://127.0.0.1:9464/metrics
//! let cache = threadkeep::Cache::from_env().await?;
//! # Ok(())
//! # }
//! ```
//!
//! A daemon that serves HTTP already takes [`install_recorder`] and answers `/metrics` with what
//! [`render`](Exporter::render) says. What else the process counts through the `metrics` facade is exported, too. One that
//! has an exporter of its own needs neither: it takes buckets and descriptions from [`SERIES`].

use std::net::SocketAddr;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::metrics::SERIES;

/// How often what histograms recorded is put into their buckets; until then it takes memory.
const UPKEEP: Duration = Duration::from_secs(5);

/// The content type of what [`Exporter::render`] gives.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What the process counts, as Prometheus reads it.
#[derive(Clone)]
pub struct Exporter(PrometheusHandle);

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exporter")
    }
}

impl Exporter {
    /// All series in Prometheus' text format; to be sent as [`CONTENT_TYPE`].
    pub fn render(&self) -> String {
        self.0.render()
    }
}

/// Counts from now on, and serves what was counted over HTTP at this address, whatever the path.
///
/// # Errors
/// [`ErrorKind::Config`] where the address cannot be listened on, where the process has a recorder already, and outside a
/// tokio runtime.
pub fn install(listen_on: SocketAddr) -> Result<()> {
    let runtime = runtime()?;
    let (recorder, serving) =
        builder()?.with_http_listener(listen_on).upkeep_timeout(UPKEEP).build().map_err(|error| {
            let message =
                format!("cannot serve metrics on {listen_on}: {error}; choose an address that is free");
            Error::new(ErrorKind::Config, message).with_source(error)
        })?;
    metrics::set_global_recorder(recorder).map_err(|_| is_there_already())?;
    describe();
    runtime.spawn(async move {
        if serving.await.is_err() {
            tracing::error!(%listen_on, "metrics are not served any more");
        }
    });
    Ok(())
}

/// Counts from now on; to be served by the daemon itself.
///
/// # Errors
/// [`ErrorKind::Config`] where the process has a recorder already, and outside a tokio runtime.
pub fn install_recorder() -> Result<Exporter> {
    let runtime = runtime()?;
    let recorder = builder()?.build_recorder();
    let exporter = Exporter(recorder.handle());
    metrics::set_global_recorder(recorder).map_err(|_| is_there_already())?;
    describe();
    let handle = exporter.0.clone();
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(UPKEEP).await;
            handle.run_upkeep();
        }
    });
    Ok(exporter)
}

fn runtime() -> Result<Handle> {
    let message = "the exporter needs a tokio runtime: install it inside of one";
    Handle::try_current().map_err(|error| Error::new(ErrorKind::Config, message).with_source(error))
}

/// No idle timeout: it would lose what the handles that a cache holds count later.
fn builder() -> Result<PrometheusBuilder> {
    let wrong =
        |error: BuildError| Error::new(ErrorKind::Config, "the exporter is misconfigured").with_source(error);
    SERIES.iter().filter(|series| !series.buckets.is_empty()).try_fold(
        PrometheusBuilder::new(),
        |builder, series| {
            builder.set_buckets_for_metric(Matcher::Full(series.name.into()), series.buckets).map_err(wrong)
        },
    )
}

fn describe() {
    for series in SERIES {
        let what = format!("{} [{}]", series.what, series.unit);
        match series.kind {
            "counter" => metrics::describe_counter!(series.name, what),
            "gauge" => metrics::describe_gauge!(series.name, what),
            _ => metrics::describe_histogram!(series.name, what),
        }
    }
}

fn is_there_already() -> Error {
    let message = "the process has a metrics recorder already; install one only, before anything else counts";
    Error::new(ErrorKind::Config, message)
}
