//! `threadkeep doctor` on faults that are planted: each is named, with what to do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

/// Makes two tests of each function that takes a server.
macro_rules! on_both_servers {
    ($($test:ident),* $(,)?) => { $(
        mod $test {
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postrust() {
                super::$test(crate::stack::Server::Postrust).await;
            }
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn lite() {
                super::$test(crate::stack::Server::Lite).await;
            }
        }
    )* };
}

mod database;
mod files;
#[path = "../disk/mount.rs"]
mod mount;
mod patient;
#[allow(dead_code, reason = "the tests of the other commands use the rest")]
#[path = "../cli/process.rs"]
mod process;
#[path = "../stack/mod.rs"]
mod stack;
mod tls;
mod way;
