//! Feature `prometheus`: an exporter for the [series](crate::metrics) of threadkeep.
//!
//! Call [`install`] once, before you open a cache:
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
//! A daemon with an HTTP server calls [`install_recorder`] instead, and answers `/metrics` with
//! [`render`](Exporter::render). The exporter also shows the other metrics that the process records through the `metrics`
//! facade. A daemon with another exporter needs neither function: [`SERIES`] has the buckets and descriptions.

use std::net::SocketAddr;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder};
use tokio::runtime::Handle;

use crate::error::{Error, ErrorKind, Result};
use crate::observe::metrics::SERIES;

/// Interval at which the exporter moves samples into the buckets; the samples take memory until then.
const MAINTENANCE_INTERVAL: Duration = Duration::from_secs(5);

/// Content type of the text that [`Exporter::render`] returns.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Renders the metrics of the process in Prometheus' text format.
#[derive(Clone)]
pub struct Exporter(PrometheusHandle);

impl std::fmt::Debug for Exporter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Exporter")
    }
}

impl Exporter {
    /// Returns all series as text; send it with [`CONTENT_TYPE`]. See [`install_recorder`] for an example.
    pub fn render(&self) -> String {
        self.0.render()
    }
}

/// Installs the recorder and serves its metrics over HTTP at `listen_on`.
///
/// The server answers every path, on a task of the current tokio runtime. See the [module](self) for an example.
///
/// # Errors
/// [`ErrorKind::Config`] if the address is not free, if the process already has a recorder, or outside a tokio runtime.
pub fn install(listen_on: SocketAddr) -> Result<()> {
    let runtime = runtime()?;
    let cannot_serve = |error| {
        let message = format!("cannot serve metrics on {listen_on}: {error}");
        Error::new(ErrorKind::Config, message).with_remedy("choose a free address").with_source(error)
    };
    let builder = builder()?.with_http_listener(listen_on).upkeep_timeout(MAINTENANCE_INTERVAL);
    let (recorder, server) = builder.build().map_err(cannot_serve)?;
    set_global(recorder)?;
    runtime.spawn(async move {
        if server.await.is_err() {
            tracing::error!(%listen_on, "metrics exporter: the HTTP listener ended; metrics are no longer served");
        }
    });
    Ok(())
}

/// Installs the recorder for a daemon that serves the metrics itself.
///
/// # Errors
/// [`ErrorKind::Config`] if the process already has a recorder, or outside a tokio runtime.
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> threadkeep::Result<()> {
/// let exporter = threadkeep::prometheus::install_recorder()?;
/// println!("{}", exporter.render());
/// # Ok(())
/// # }
/// ```
pub fn install_recorder() -> Result<Exporter> {
    let runtime = runtime()?;
    let recorder = builder()?.build_recorder();
    let exporter = Exporter(recorder.handle());
    set_global(recorder)?;
    let handle = exporter.0.clone();
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(MAINTENANCE_INTERVAL).await;
            handle.run_upkeep();
        }
    });
    Ok(exporter)
}

fn runtime() -> Result<Handle> {
    Handle::try_current().map_err(|error| {
        Error::new(ErrorKind::Config, "the metrics exporter needs a tokio runtime")
            .with_remedy("install the exporter inside a tokio runtime")
            .with_source(error)
    })
}

/// Sets the buckets of all histograms.
///
/// The builder has no idle timeout. A timeout would drop series whose handles a cache still holds.
fn builder() -> Result<PrometheusBuilder> {
    let mut builder = PrometheusBuilder::new();
    for series in SERIES.iter().filter(|series| !series.buckets.is_empty()) {
        let set = builder.set_buckets_for_metric(Matcher::Full(series.name.into()), series.buckets);
        builder = set.map_err(|error| {
            Error::new(ErrorKind::Config, "the metrics exporter is misconfigured").with_source(error)
        })?;
    }
    Ok(builder)
}

/// Makes the recorder the one of the process, and describes all series to it.
fn set_global(recorder: PrometheusRecorder) -> Result<()> {
    metrics::set_global_recorder(recorder).map_err(|_| {
        Error::new(ErrorKind::Config, "the process already has a metrics recorder")
            .with_remedy("install one recorder only")
    })?;
    for series in SERIES {
        let description = format!("{} [{}]", series.help, series.unit);
        match series.kind {
            "counter" => metrics::describe_counter!(series.name, description),
            "gauge" => metrics::describe_gauge!(series.name, description),
            _ => metrics::describe_histogram!(series.name, description),
        }
    }
    Ok(())
}
