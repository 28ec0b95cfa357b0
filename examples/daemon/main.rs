//! A chat daemon whose conversations survive restarts.
//!
//! `cargo run --release --example daemon` starts the daemon with the store `./threadkeep.db`. The settings in
//! `.env.example` select Supabase. The daemon has no model: a built-in responder answers.

mod chat;
mod reply;
mod watch;

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use threadkeep::tools::SETTINGS;
use threadkeep::{Builder, Cache};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// The time limit for requests in progress at a shutdown, and then for the cache.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    if let Some(argument) = std::env::args().nth(1) {
        print_help();
        let is_help = matches!(argument.as_str(), "-h" | "--help");
        return if is_help { ExitCode::SUCCESS } else { ExitCode::from(2) };
    }
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("daemon stops: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                tracing::error!("daemon stops: caused by: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn print_help() {
    println!("A chat daemon whose conversations survive restarts.\n");
    println!("The daemon takes no arguments. Set these in the environment or in a file .env:\n");
    println!("  DAEMON_ADDR (127.0.0.1:8080)\n      the address of the daemon");
    for setting in SETTINGS {
        println!("  {} ({})\n      {}", setting.name, setting.default, setting.description);
    }
    println!("\n  POST /chat                  {{\"message\": …, \"continuation_id\"?: …, \"user_id\"?: …}}");
    println!("  GET /conversations/ID       DELETE /conversations/ID");
    println!(
        "  GET /healthz                alive?      GET /readyz                   worth sending requests to?"
    );
    println!("  GET /metrics                for Prometheus, if built with --features prometheus");
}

async fn run() -> Result<(), Box<dyn Error>> {
    let addr = daemon_addr();
    let listen_error =
        |e| format!("cannot listen on {addr}: {e}; set DAEMON_ADDR to a free address such as 127.0.0.1:8080");
    let listener = TcpListener::bind(&addr).await.map_err(listen_error)?;
    // The recorder comes before the cache: a cache that was opened earlier records nothing.
    let exporter = watch::MetricsExporter::install()?;
    let cache = Builder::from_env_and_file(".env").open().await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    serve(listener, routes(&cache, exporter)).await?;
    let report = cache.shutdown(SHUTDOWN_TIMEOUT).await?;
    tracing::info!(
        unfinished_writes = report.unfinished,
        queued_writes = report.still_queued,
        "daemon stopped"
    );
    Ok(())
}

fn routes(cache: &Cache, exporter: watch::MetricsExporter) -> Router {
    chat::routes()
        .merge(watch::routes(exporter))
        .fallback(async || reply::Failure::new(StatusCode::NOT_FOUND, "no such route; see --help"))
        .method_not_allowed_fallback(async || {
            reply::Failure::new(StatusCode::METHOD_NOT_ALLOWED, "not this method; see --help")
        })
        .with_state(cache.clone())
}

/// Serves until SIGTERM or SIGINT, then finishes the requests in progress.
async fn serve(listener: TcpListener, routes: Router) -> Result<(), Box<dyn Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let shutdown_signal = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("daemon stops: it finishes the requests in progress");
        stop.send_replace(true);
    };
    let deadline = async {
        let mut stopped = stopped;
        stopped.wait_for(|stopped| *stopped).await.ok();
        tokio::time::sleep(SHUTDOWN_TIMEOUT).await;
    };
    tokio::select! {
        served = axum::serve(listener, routes).with_graceful_shutdown(shutdown_signal) => served?,
        () = deadline => tracing::warn!("daemon stops: some requests did not finish in time"),
    }
    Ok(())
}

#[allow(clippy::disallowed_methods, reason = "DAEMON_ADDR is a setting of the daemon")]
fn daemon_addr() -> String {
    let from_file = || {
        let text = std::fs::read_to_string(".env").ok()?;
        let lines = dotenvy::from_read_iter(text.trim_start_matches('\u{feff}').as_bytes());
        lines.map_while(Result::ok).find(|(name, _)| name == "DAEMON_ADDR").map(|(_, addr)| addr)
    };
    let from_env = std::env::var("DAEMON_ADDR").ok();
    from_env.or_else(from_file).filter(|addr| !addr.is_empty()).unwrap_or_else(|| "127.0.0.1:8080".into())
}
