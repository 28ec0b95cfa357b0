//! A chat daemon whose conversations outlive it.
//!
//! `cargo run --release --example daemon` starts it with conversations in `./threadkeep.db`; the settings in
//! `.env.example` put them into Supabase. There is no model behind it: a built-in responder answers.

mod chat;
mod reply;
mod watch;

use std::error::Error;
use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Duration;

use axum::Router;
use axum::http::StatusCode;
use threadkeep::{Builder, Cache, SETTINGS};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// What a request under way, and then the cache, get to finish.
const GRACE: Duration = Duration::from_secs(10);

#[tokio::main]
async fn main() -> ExitCode {
    if let Some(argument) = std::env::args().nth(1) {
        print_help();
        let is_asked_for = matches!(argument.as_str(), "-h" | "--help");
        return if is_asked_for { ExitCode::SUCCESS } else { ExitCode::from(2) };
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
            tracing::error!("the daemon stops: {error}");
            let mut cause = error.source();
            while let Some(error) = cause {
                tracing::error!("  because: {error}");
                cause = error.source();
            }
            ExitCode::FAILURE
        }
    }
}

fn print_help() {
    println!("A chat daemon whose conversations outlive it.\n");
    println!("It takes no arguments; set these in the environment or in a file .env:\n");
    println!("  DAEMON_ADDR (127.0.0.1:8080)\n      where it listens");
    for setting in SETTINGS {
        println!("  {} ({})\n      {}", setting.name, setting.default, setting.what);
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
    let cannot =
        |e| format!("cannot listen on {addr}: {e}; set DAEMON_ADDR to a free address such as 127.0.0.1:8080");
    let listener = TcpListener::bind(&addr).await.map_err(cannot)?;
    // Before the cache, or it would count for nobody.
    let counts = watch::Counts::begin()?;
    let cache = Builder::from_env_and_file(".env").open().await?;
    tracing::info!("listening on http://{}", listener.local_addr()?);
    serve(listener, routes(&cache, counts)).await?;
    let left = cache.shutdown(GRACE).await?;
    tracing::info!(unfinished_writes = left.unfinished, queued_writes = left.still_queued, "stopped");
    Ok(())
}

fn routes(cache: &Cache, counts: watch::Counts) -> Router {
    chat::routes()
        .merge(watch::routes(counts))
        .fallback(async || reply::Failure::new(StatusCode::NOT_FOUND, "no such route; see --help"))
        .method_not_allowed_fallback(async || {
            reply::Failure::new(StatusCode::METHOD_NOT_ALLOWED, "not this method; see --help")
        })
        .with_state(cache.clone())
}

/// Serves until SIGTERM or SIGINT, and then finishes the requests under way.
async fn serve(listener: TcpListener, routes: Router) -> Result<(), Box<dyn Error>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let asked_to_stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping: requests under way are finished");
        stop.send_replace(true);
    };
    let is_overdue = async {
        let mut stopped = stopped;
        stopped.wait_for(|stopped| *stopped).await.ok();
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        served = axum::serve(listener, routes).with_graceful_shutdown(asked_to_stop) => served?,
        () = is_overdue => tracing::warn!("some requests did not finish in time"),
    }
    Ok(())
}

#[allow(clippy::disallowed_methods, reason = "the daemon's own setting")]
fn daemon_addr() -> String {
    let from_file = || {
        let text = std::fs::read_to_string(".env").ok()?;
        let lines = dotenvy::from_read_iter(text.trim_start_matches('\u{feff}').as_bytes());
        lines.map_while(Result::ok).find(|(name, _)| name == "DAEMON_ADDR").map(|(_, addr)| addr)
    };
    let from_env = std::env::var("DAEMON_ADDR").ok();
    from_env.or_else(from_file).filter(|addr| !addr.is_empty()).unwrap_or_else(|| "127.0.0.1:8080".into())
}
