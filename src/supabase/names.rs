//! Host names are looked up on threads of their own, since reqwest's own look-up uses tokio's blocking pool: an application that
//! fills the pool would look like an outage of Supabase.

use std::net::ToSocketAddrs as _;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::blocking::unblock;

/// Asks the system, as reqwest does by default.
#[derive(Debug)]
pub(super) struct Resolver;

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // The connector sets the port.
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
    fn names_are_found_while_the_applications_work_fills_the_pool() {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().max_blocking_threads(1).enable_all().build().unwrap();
        let listener = TcpListener::bind("localhost:0").unwrap();
        let url = format!("http://localhost:{}", listener.local_addr().unwrap().port());
        let ((end, goes_on), (tell, connected)) = (channel::<()>(), channel());
        std::thread::spawn(move || tell.send(listener.accept().is_ok()));
        runtime.spawn_blocking(move || goes_on.recv());
        let client = super::super::client().unwrap();
        let call = runtime.spawn(client.get(url).send());
        assert_eq!(connected.recv_timeout(Duration::from_secs(30)), Ok(true));
        call.abort();
        drop(end);
    }
}
