//! Checks the connection to the project: DNS, TCP and TLS.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};

use super::report::{FailedCheck, Report};
use threadkeep::tools::ProjectProbe;

/// A daemon's client waits as long for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A resolver gives up later than a daemon does.
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);

pub async fn check(project: &ProjectProbe, report: &mut Report<'_>) -> Result<(), FailedCheck> {
    let (scheme, host, port) = project.address();
    if let Some(variable) = proxy_variable(scheme) {
        for check in ["dns", "tcp"] {
            report.skipped(check, format!("{variable} is set: the proxy resolves names and connects"));
        }
    } else {
        let addresses = resolve(host, port, report).await?;
        connect(&addresses, host, port, report).await?;
    }
    encrypt(project, report).await
}

/// Returns the variable of the environment that names a proxy for URLs of this scheme.
fn proxy_variable(scheme: &str) -> Option<&'static str> {
    let names = match scheme {
        "https" => ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"],
        _ => ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"],
    };
    #[allow(clippy::disallowed_methods, reason = "the HTTP client reads these variables; no setting does")]
    names.into_iter().find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

async fn resolve(host: &str, port: u16, report: &mut Report<'_>) -> Result<Vec<SocketAddr>, FailedCheck> {
    const CHECK: &str = "dns";
    report.started(CHECK);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let why = tokio::select! {
        found = lookup_host((bare, port)) => match found.map(Iterator::collect::<Vec<_>>) {
            Ok(addresses) if !addresses.is_empty() => {
                report.ok(CHECK, format!("{host} is {}", listed(&addresses)));
                return Ok(addresses);
            }
            Ok(_) => "the name has no address".to_owned(),
            Err(e) => e.to_string(),
        },
        () = tokio::time::sleep(RESOLVE_TIMEOUT) => format!("no answer within {RESOLVE_TIMEOUT:?}"),
    };
    let remedy = match host.ends_with(".supabase.co") {
        true => {
            "open the dashboard: a paused or deleted project has no DNS name (restore it there); otherwise check \
             SUPABASE_URL, and this machine's DNS (`resolvectl status`)"
        }
        false => "check the host in SUPABASE_URL, and this machine's DNS (`resolvectl status`)",
    };
    Err(report.failure(CHECK, format!("{host} cannot be resolved: {why}"), remedy))
}

fn listed(addresses: &[SocketAddr]) -> String {
    let mut all: Vec<String> = addresses.iter().map(|address| address.ip().to_string()).collect();
    all.dedup();
    all.join(", ")
}

async fn connect(
    addresses: &[SocketAddr],
    host: &str,
    port: u16,
    report: &mut Report<'_>,
) -> Result<(), FailedCheck> {
    const CHECK: &str = "tcp";
    report.started(CHECK);
    let mut errors = Vec::new();
    for address in addresses {
        let why = tokio::select! {
            connected = TcpStream::connect(address) => match connected {
                Ok(_) => {
                    report.ok(CHECK, format!("{address} accepts connections"));
                    return Ok(());
                }
                Err(e) => e.to_string(),
            },
            () = tokio::time::sleep(CONNECT_TIMEOUT) => format!("no answer within {CONNECT_TIMEOUT:?}"),
        };
        errors.push(format!("{address}: {why}"));
    }
    let remedy =
        "check the port in SUPABASE_URL, that the server runs, and that no firewall blocks the connection";
    let what = format!("{host} cannot be reached on port {port} ({})", errors.join("; "));
    Err(report.failure(CHECK, what, remedy))
}

async fn encrypt(project: &ProjectProbe, report: &mut Report<'_>) -> Result<(), FailedCheck> {
    const CHECK: &str = "tls";
    report.started(CHECK);
    let (scheme, host, _) = project.address();
    match scheme {
        "https" => match project.check_tls().await {
            Ok(()) => report.ok(CHECK, "the connection is encrypted, and the certificate is trusted"),
            Err(error) => {
                let remedy = "check that SUPABASE_URL has the port of an encrypted (https) service, that its certificate is \
                              valid and known to this machine (`ca-certificates`), and this machine's clock";
                return Err(report.failure(CHECK, error.message(), remedy));
            }
        },
        _ if is_loopback(host) => {
            report.ok(CHECK, "TLS is not used and not needed: the connection stays on this machine")
        }
        _ => report.warning(
            CHECK,
            "SUPABASE_URL is not encrypted (http): the network can read the key and the conversations",
            "use https://, unless you trust the network",
        ),
    }
    Ok(())
}

fn is_loopback(host: &str) -> bool {
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}
