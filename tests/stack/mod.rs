//! Real stacks for tests: PostgreSQL, a PostgREST-compatible server, and a gateway in front that injects faults.
//!
//! [`Stack`] starts the processes. [`Gateway`] takes the place of Supabase's edge. Two independent servers run the same
//! tests, because each of them has bugs: a behaviour of both is probably right. PostgREST itself is the third server, if
//! this machine has it. The end of the test process ends all servers (see [`leash`]). A missing server fails the test.
//! Only PostgREST may be missing, and each of its tests then prints a note.

// Each test binary compiles this module for itself and uses a part of it.
#![allow(dead_code, unused_imports, unused_macros)]
// Tests may read the environment, wait for deadlines, and report a failure by a panic.
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
pub use server::{Server, python, sqlite};

pub use postgres::{Postgres, SUPERUSER};
use server::Rest;

/// Makes a test for each server from each function that takes a server.
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

/// The remedy for a missing server.
const MISSING: &str = "run tests/install";

/// PostgreSQL as on Supabase with this repository's migrations, and a REST server.
///
/// The calls block: a stack must not depend on the runtime of one test, because other tests share the stack.
pub struct Stack {
    server: Server,
    rest: Rest, // before the database, so that the server is dropped first
    postgres: Postgres,
}

impl Stack {
    /// Starts a private stack, for tests that stop its processes.
    pub fn start(server: Server) -> Self {
        Self::assemble(server, false, apply_migrations)
    }

    /// Starts a stack that syncs commits to disk, as Supabase does.
    pub fn start_synced(server: Server) -> Self {
        Self::assemble(server, true, apply_migrations)
    }

    /// Starts a private stack with a partitioned table.
    pub fn start_partitioned(server: Server) -> Self {
        Self::assemble(server, false, |postgres| {
            apply_migrations(postgres);
            partition(postgres, 16);
        })
    }

    /// Starts a synced stack with the schema of revision 2, for comparisons.
    pub fn start_synced_at_revision_2(server: Server) -> Self {
        Self::assemble(server, true, |postgres| {
            apply_first(postgres, "migrations", 1);
            apply_first(postgres, "tests/supabase/revision_2", 1);
        })
    }

    /// Starts a stack without threadkeep's schema.
    ///
    /// Lite sees new objects only after a restart. Postrust and PostgREST also reload by `notify pgrst, 'reload schema'`.
    pub fn start_without_migrations(server: Server) -> Self {
        Self::assemble(server, false, |_| {})
    }

    /// Returns the shared stack of this process. The tests use different thread ids, and leave the stack running.
    pub fn shared(server: Server) -> &'static Self {
        static SHARED: [OnceLock<Stack>; Server::ALL.len()] = [const { OnceLock::new() }; Server::ALL.len()];
        SHARED[server as usize].get_or_init(|| Self::start(server))
    }

    fn assemble(server: Server, syncs: bool, prepare: impl FnOnce(&Postgres)) -> Self {
        server.check(); // before the slow start of a cluster
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

    /// Splits the table into partitions. 0 makes one plain table.
    pub fn partition(&self, count: u32) {
        partition(&self.postgres, count);
    }

    /// Runs SQL as superuser, and returns the rows without decoration.
    pub fn psql(&self, sql: &str) -> String {
        self.postgres.psql(SUPERUSER, &["-c", sql])
    }

    /// Opens a connection of the superuser on the caller's runtime.
    pub async fn sql(&self) -> tokio_postgres::Client {
        let url = self.database_url();
        let (client, connection) =
            tokio_postgres::connect(&url, tokio_postgres::NoTls).await.expect("PostgreSQL runs");
        tokio::spawn(connection);
        client
    }

    /// Returns the superuser's URL, for programs such as pgbench.
    pub fn database_url(&self) -> String {
        self.postgres.url(SUPERUSER)
    }

    /// Returns the URL of the REST server, which checks tokens and ignores `apikey`.
    pub fn server_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.rest.port())
    }

    /// Returns the path of a PostgreSQL program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.postgres.program(name)
    }

    /// Stops PostgreSQL as a crash does. The REST server stays and reports an outage.
    pub fn stop_postgres(&self) {
        self.postgres.crash();
    }

    /// Starts PostgreSQL again on the same port. A running REST server connects again.
    pub fn start_postgres(&self) {
        self.postgres.resume();
        self.rest.recover();
    }

    /// Kills the REST server.
    pub fn kill_server(&self) {
        self.rest.kill();
    }

    /// Starts the REST server again on the same port. PostgreSQL must run.
    pub fn start_server(&self) {
        self.rest.resume();
    }

    /// Returns the directories of this stack's processes.
    pub fn directories(&self) -> [&Path; 2] {
        [self.rest.directory(), self.postgres.directory()]
    }

    /// Starts a private gateway in front of this stack on the caller's runtime.
    pub async fn gateway(&self) -> Gateway {
        Gateway::start(self.server, self.rest.port()).await
    }
}

fn apply_migrations(postgres: &Postgres) {
    apply_first(postgres, "migrations", usize::MAX);
    if let Some(count) = test_partitions() {
        partition(postgres, count);
    }
}

fn partition(postgres: &Postgres, count: u32) {
    postgres.psql("postgres", &partition_arguments(count).each_ref().map(String::as_str));
}

/// Returns the number of partitions for all databases of the tests, from `TEST_PARTITIONS`.
pub fn test_partitions() -> Option<u32> {
    std::env::var("TEST_PARTITIONS").ok().map(|count| count.parse().expect("TEST_PARTITIONS is a number"))
}

/// Returns the arguments with which psql splits the table into partitions. 0 makes one plain table.
pub fn partition_arguments(count: impl std::fmt::Display) -> [String; 4] {
    let file = migrations("migrations/optional").remove(0);
    let setting = format!("set threadkeep.partitions = '{count}'");
    ["-c".to_owned(), setting, "-f".to_owned(), file.to_str().expect("UTF-8").to_owned()]
}

fn apply_first(postgres: &Postgres, folder: &str, count: usize) {
    for file in migrations(folder).into_iter().take(count) {
        postgres.psql("postgres", &["-f", file.to_str().expect("UTF-8")]);
    }
}

/// Returns the files of a folder of migrations in order.
pub fn migrations(folder: &str) -> Vec<PathBuf> {
    let folder = root().join(folder);
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "sql"));
    files.sort();
    files
}

/// Returns the folder of the workspace. The tests of the member `cli` use this module too.
pub fn root() -> &'static Path {
    let member = Path::new(env!("CARGO_MANIFEST_DIR"));
    member.ancestors().find(|folder| folder.join("tests/stack/leash").exists()).expect("a checkout")
}

/// Returns the path of the Supabase CLI. Panics if it is missing: a skipped test proves nothing.
pub fn supabase_cli() -> PathBuf {
    let program = server::stack_directory().join("cli/node_modules/.bin/supabase");
    assert!(program.exists(), "the Supabase CLI is not installed (no {}): {MISSING}", program.display());
    program
}

/// Returns a free port below the range that Linux uses for outgoing connections.
///
/// The port therefore stays free while a test has its server stopped.
pub fn free_port() -> u16 {
    const LOWEST: u16 = 15_000;
    const COUNT: u16 = 17_000;
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    // Each test process starts at a random port and counts up, so two processes rarely try the same port.
    let next = NEXT.get_or_init(|| AtomicU16::new(RandomState::new().hash_one(std::process::id()) as u16));
    loop {
        let port = LOWEST + next.fetch_add(1, Ordering::Relaxed) % COUNT;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Waits for a process that does not announce that it is ready.
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
