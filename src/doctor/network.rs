//! The way to the project: its name, its port, and TLS.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};

use super::report::{Failed, Report};
use crate::settings::Plan;
use crate::supabase::Supabase;

/// As long as a daemon's client waits for a connection.
const CONNECT: Duration = Duration::from_secs(3);
/// A resolver gives up later than a daemon does.
const RESOLVE: Duration = Duration::from_secs(10);

pub(super) async fn examine(project: &Supabase, report: &mut Report<'_>) -> Result<(), Failed> {
    let (scheme, host, port) = project.place();
    if let Some(variable) = Plan::proxy(scheme) {
        for check in ["dns", "tcp"] {
            report.skipped(check, format!("{variable} is set: names and connections are the proxy's affair"));
        }
    } else {
        let addresses = resolve(host, port, report).await?;
        connect(&addresses, host, port, report).await?;
    }
    encrypt(project, report).await
}

async fn resolve(host: &str, port: u16, report: &mut Report<'_>) -> Result<Vec<SocketAddr>, Failed> {
    const CHECK: &str = "dns";
    report.begins(CHECK);
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let why = tokio::select! {
        found = lookup_host((bare, port)) => match found.map(Iterator::collect::<Vec<_>>) {
            Ok(addresses) if !addresses.is_empty() => {
                report.ok(CHECK, format!("{host} is {}", listed(&addresses)));
                return Ok(addresses);
            }
            Ok(_) => "it has no address".to_owned(),
            Err(e) => e.to_string(),
        },
        () = tokio::time::sleep(RESOLVE) => format!("no answer within {RESOLVE:?}"),
    };
    let remedy = match host.ends_with(".supabase.co") {
        true => {
            "look into the dashboard: a project that is paused or deleted has no name (restore it there); otherwise check \
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
) -> Result<(), Failed> {
    const CHECK: &str = "tcp";
    report.begins(CHECK);
    let mut whys = Vec::new();
    for address in addresses {
        let why = tokio::select! {
            connected = TcpStream::connect(address) => match connected {
                Ok(_) => {
                    report.ok(CHECK, format!("{address} takes connections"));
                    return Ok(());
                }
                Err(e) => e.to_string(),
            },
            () = tokio::time::sleep(CONNECT) => format!("no answer within {CONNECT:?}"),
        };
        whys.push(format!("{address}: {why}"));
    }
    let remedy = "check the port in SUPABASE_URL, that the server runs, and that no firewall stands between";
    let what = format!("{host} cannot be reached on port {port} ({})", whys.join("; "));
    Err(report.failure(CHECK, what, remedy))
}

async fn encrypt(project: &Supabase, report: &mut Report<'_>) -> Result<(), Failed> {
    const CHECK: &str = "tls";
    report.begins(CHECK);
    let (scheme, host, _) = project.place();
    match scheme {
        "https" => match project.greet().await {
            Ok(()) => report.ok(CHECK, "the connection is encrypted, and the certificate is trusted"),
            Err(trouble) => {
                let remedy = "check that SUPABASE_URL has the port of an encrypted (https) service, that its certificate is \
                              valid and known to this machine (`ca-certificates`), and this machine's clock";
                return Err(report.failure(CHECK, trouble.said, remedy));
            }
        },
        _ if is_loopback(host) => {
            report.ok(CHECK, "none, and none needed: the connection stays on this machine")
        }
        _ => report.warning(
            CHECK,
            "SUPABASE_URL is not encrypted (http): key and conversations can be read on the way",
            "use https://, unless the network between is trusted",
        ),
    }
    Ok(())
}

fn is_loopback(host: &str) -> bool {
    let ip = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || ip.is_ok_and(|ip| ip.is_loopback())
}
