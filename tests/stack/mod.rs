//! Real stacks for tests: PostgreSQL with a PostgREST-compatible server, and a gateway in front that injects
//! faults.
//!
//! [`Stack`] starts the processes, [`Gateway`] stands where Supabase's edge stands. Two servers that were
//! written independently run the same tests, since each is wrong somewhere: what passes on both is probably
//! right. PostgREST itself is a third one, if this machine has it. Nothing outlives the test process (see
//! [`leash`]), and a missing server fails the test instead of skipping it; only PostgREST may be missing, and
//! then each of its tests says so.

// Each test binary compiles this module for itself and uses a part of it.
#![allow(dead_code, unused_imports, unused_macros)]
// The environment and deadlines are legal here, and so is a panic: it is how a test says what is wrong.
#![allow(clippy::disallowed_methods, clippy::expect_used)]

mod gateway;
mod leash;
mod postgres;
mod prometheus;
mod server;

use std::hash::{BuildHasher, RandomState};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

pub use gateway::{Fault, Gateway, Keys, Seen, jwt};
pub use prometheus::{Prometheus, promtool};
pub use server::{Server, python};

pub use postgres::{Postgres, SUPERUSER};
use server::Rest;

/// Makes a test on each server of each function that takes a server.
macro_rules! on_each_server {
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
            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgrest() {
                if crate::stack::Server::Postgrest.is_installed() {
                    super::$test(crate::stack::Server::Postgrest).await;
                }
            }
        }
    )* };
}

/// What to do about a server that is not there.
const MISSING: &str = "run tests/install";

/// PostgreSQL as on Supabase with this repository's migrations, and a server that speaks REST.
///
/// The calls block: a stack must not hold on to the runtime of one test, as others share it.
pub struct Stack {
    server: Server,
    rest: Rest, // before the database, so that it is dropped first
    postgres: Postgres,
}

impl Stack {
    /// A stack of one's own, for tests that stop things.
    pub fn start(server: Server) -> Self {
        Self::assemble(server, false, apply_migrations)
    }

    /// A stack whose commits are synced to disk, as those of Supabase are.
    pub fn start_synced(server: Server) -> Self {
        Self::assemble(server, true, apply_migrations)
    }

    /// A stack without threadkeep's schema.
    ///
    /// Lite sees what is created later only after a restart; postrust and PostgREST also by `notify pgrst,
    /// 'reload schema'`.
    pub fn start_without_migrations(server: Server) -> Self {
        Self::assemble(server, false, |_| {})
    }

    /// The stack that the tests of this process share. They keep apart by their thread ids, and leave it
    /// running.
    pub fn shared(server: Server) -> &'static Self {
        static SHARED: [OnceLock<Stack>; Server::ALL.len()] = [const { OnceLock::new() }; Server::ALL.len()];
        SHARED[server as usize].get_or_init(|| Self::start(server))
    }

    fn assemble(server: Server, syncs: bool, prepare: impl FnOnce(&Postgres)) -> Self {
        server.check(); // before a second goes into a cluster
        let postgres = Postgres::start(syncs);
        prepare(&postgres);
        let rest = Rest::start(server, &postgres);
        Self { server, rest, postgres }
    }

    pub fn server(&self) -> Server {
        self.server
    }

    /// Applies `migrations/*.sql` (again) as `supabase db push` does: in the order of their names, as
    /// `postgres`.
    pub fn apply_migrations(&self) {
        apply_migrations(&self.postgres);
    }

    /// Applies the first files of a folder of migrations.
    pub fn apply_first(&self, folder: &str, count: usize) {
        apply_first(&self.postgres, folder, count);
    }

    /// Runs SQL as superuser; the rows come without decoration.
    pub fn psql(&self, sql: &str) -> String {
        self.postgres.psql(SUPERUSER, &["-c", sql])
    }

    /// A connection of the superuser, on the caller's runtime.
    pub async fn sql(&self) -> tokio_postgres::Client {
        let url = self.database_url();
        let (client, connection) =
            tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("PostgreSQL runs");
        tokio::spawn(connection);
        client
    }

    /// Where the superuser connects, for pgbench and the like.
    pub fn database_url(&self) -> String {
        self.postgres.url(SUPERUSER)
    }

    /// Where the REST server itself listens, which checks tokens and knows no `apikey`.
    pub fn server_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.rest.port())
    }

    /// One of PostgreSQL's programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.postgres.program(name)
    }

    /// Ends PostgreSQL as a crash does; the REST server stays and reports an outage.
    pub fn stop_postgres(&self) {
        self.postgres.crash();
    }

    /// Starts PostgreSQL again, on the same port; a REST server that was not killed finds it.
    pub fn start_postgres(&self) {
        self.postgres.resume();
        self.rest.recover();
    }

    /// Kills the REST server.
    pub fn kill_server(&self) {
        self.rest.kill();
    }

    /// Starts the REST server again, on the same port. PostgreSQL has to run.
    pub fn start_server(&self) {
        self.rest.resume();
    }

    /// Where the processes of this stack live.
    pub fn directories(&self) -> [&Path; 2] {
        [self.rest.directory(), self.postgres.directory()]
    }

    /// A gateway of one's own in front of this stack, on the caller's runtime.
    pub async fn gateway(&self) -> Gateway {
        Gateway::start(self.server, self.rest.port()).await
    }
}

fn apply_migrations(postgres: &Postgres) {
    apply_first(postgres, "migrations", usize::MAX);
}

fn apply_first(postgres: &Postgres, folder: &str, count: usize) {
    for file in migrations(folder).into_iter().take(count) {
        postgres.psql("postgres", &["-f", file.to_str().expect("UTF-8")]);
    }
}

/// The files of a folder of migrations, in order.
pub fn migrations(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "sql"));
    files.sort();
    files
}

/// The Supabase CLI. Panics where it is not installed: a test that skips itself proves nothing.
pub fn supabase_cli() -> PathBuf {
    let program = server::stack_directory().join("cli/node_modules/.bin/supabase");
    assert!(program.exists(), "the Supabase CLI is not installed (no {}): {MISSING}", program.display());
    program
}

/// A port nobody listens on, and nobody will: it lies below the range from which Linux takes the ports of
/// outgoing connections, so it stays free while a test has its server stopped.
pub fn free_port() -> u16 {
    const LOWEST: u16 = 15_000;
    const COUNT: u16 = 17_000;
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    // Test processes start at random places, and each walks on, so that two of them rarely look at the same
    // port.
    let next = NEXT.get_or_init(|| AtomicU16::new(RandomState::new().hash_one(std::process::id()) as u16));
    loop {
        let port = LOWEST + next.fetch_add(1, Ordering::Relaxed) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Waits for a process that says nothing when it is ready.
fn wait_until(ready: impl Fn() -> bool, failure: impl Fn() -> String) {
    wait_until_within(Duration::from_secs(60), ready, failure);
}

fn wait_until_within(limit: Duration, ready: impl Fn() -> bool, failure: impl Fn() -> String) {
    let deadline = Instant::now() + limit;
    while !ready() {
        assert!(Instant::now() < deadline, "{}", failure());
        std::thread::sleep(Duration::from_millis(10));
    }
}
