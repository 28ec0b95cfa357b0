//! Resolves host names on an OS thread of its own.
//!
//! reqwest's own resolver uses tokio's blocking pool. An application that fills the pool would look like an outage of
//! Supabase.

use std::net::ToSocketAddrs as _;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use crate::resilience::tasks::unblock;

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
