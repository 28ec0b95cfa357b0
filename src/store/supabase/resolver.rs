//! Resolves host names on an OS thread of its own.
//!
//! reqwest's own resolver uses tokio's blocking pool. An application that fills the pool would look like an outage of
//! Supabase.

use std::net::ToSocketAddrs as _;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::resilience::blocking::unblock;

/// Uses the resolver of the operating system, as reqwest does by default.
#[derive(Debug)]
pub(super) struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // The connector of reqwest sets the port.
            let addresses = unblock(move || (name.as_str(), 0).to_socket_addrs()).await??;
            Ok(Box::new(addresses) as Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::sync::mpsc::channel;
    use std::time::Duration;

    #[test]
    fn resolve_works_while_application_fills_blocking_pool() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().max_blocking_threads(1).enable_all().build().unwrap();
        let listener = TcpListener::bind("localhost:0").unwrap();
        let url = format!("http://localhost:{}", listener.local_addr().unwrap().port());
        let ((release, occupied), (send, connected)) = (channel::<()>(), channel());
        std::thread::spawn(move || send.send(listener.accept().is_ok()));
        runtime.spawn_blocking(move || occupied.recv());
        let client = super::super::http::client().unwrap();
        let call = runtime.spawn(client.get(url).send());
        assert_eq!(connected.recv_timeout(Duration::from_secs(30)), Ok(true));
        call.abort();
        drop(release);
    }
}
