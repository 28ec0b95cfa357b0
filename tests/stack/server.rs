//! The servers with PostgREST's protocol.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::gateway;
use super::leash::{self, Leash, Signal};
use super::postgres::Postgres;
use super::{MISSING, free_port, wait_until, wait_until_within};

/// A REST server in front of the database.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Server {
    /// A rewrite of PostgREST in Rust.
    Postrust,
    /// @supabase/lite, in TypeScript.
    Lite,
    /// PostgREST itself. No package registry has it, so tests use it only if this machine has it.
    Postgrest,
}

/// The variable with the path of PostgREST. Without it, tests use `postgrest` on the PATH.
const POSTGREST_BIN: &str = "POSTGREST_BIN";
/// PostgREST reconnects after 1, 2, 4 … and at most 32 s, and then reads the schema.
const POSTGREST_RETRY: Duration = Duration::from_secs(120);

impl Server {
    pub const ALL: [Self; 3] = [Self::Postrust, Self::Lite, Self::Postgrest];

    /// Returns the servers for tests. Leaves out a missing PostgREST.
    pub fn installed() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().filter(|server| server.is_installed())
    }

    /// Tells whether to run a test on this server.
    ///
    /// Only PostgREST may be missing. A note on standard output then bypasses the capture of the test harness.
    /// A missing postrust or lite fails the test later, in [`check`](Self::check).
    pub fn is_installed(self) -> bool {
        let is_installed = self != Self::Postgrest || find_postgrest().is_some();
        if !is_installed {
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            let note = format!(
                "{test}: PostgREST was not found, so its test did not run; set {POSTGREST_BIN} to its program, or put \
                 `postgrest` on the PATH\n"
            );
            std::io::stdout().write_all(note.as_bytes()).expect("standard output is open");
        }
        is_installed
    }

    /// Panics if the server is missing: a skipped test proves nothing.
    pub fn check(self) {
        let program = self.program();
        assert!(program.exists(), "{self:?} is not installed (no {}): {MISSING}", program.display());
    }

    fn program(self) -> PathBuf {
        match self {
            Self::Postrust => stack_directory().join("postrust/bin/postrust"),
            Self::Lite => stack_directory().join("lite/node_modules/.bin/lite"),
            Self::Postgrest => find_postgrest().unwrap_or_else(|| "postgrest".into()),
        }
    }

    /// Returns the prefix of this server's paths, which is `/rest/v1` on Supabase.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Postrust | Self::Postgrest => "",
            Self::Lite => "/rest/v1",
        }
    }
}

/// Finds PostgREST by `POSTGREST_BIN`, and otherwise as `postgrest` on the PATH.
///
/// Panics if the variable names no program, because the caller meant to test with PostgREST.
fn find_postgrest() -> Option<PathBuf> {
    let named = std::env::var_os(POSTGREST_BIN).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(program) = named {
        assert!(
            is_program(&program),
            "{POSTGREST_BIN} is {}, which is not an executable program; set it to the path of postgrest, or unset it",
            program.display()
        );
        // The server runs in another directory.
        return Some(std::path::absolute(program).expect("a path that is not empty"));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join("postgrest")).find(|program| is_program(program))
}

fn is_program(path: &Path) -> bool {
    path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// Returns the folder of the servers. `tests/install` computes the same folder.
pub(super) fn stack_directory() -> PathBuf {
    let path = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
    let directory = path("THREADKEEP_STACK_DIR").or_else(|| Some(cache()?.join("threadkeep-stack")));
    directory.expect("HOME or THREADKEEP_STACK_DIR is set")
}

/// Returns the `sqlite3` program of `tests/install`, which can run `.recover`.
pub fn sqlite() -> PathBuf {
    let program = stack_directory().join("sqlite/sqlite3");
    assert!(program.exists(), "sqlite3 is not installed (no {}): {MISSING}", program.display());
    program
}

/// Returns the Python of `tests/install`, which has `supabase-py`.
pub fn python() -> PathBuf {
    let program = stack_directory().join("python/bin/python");
    assert!(program.exists(), "supabase-py is not installed (no {}): {MISSING}", program.display());
    program
}

/// A running server. It ends with this value or with the process.
pub struct Rest {
    leash: Leash,
    server: Server,
    port: u16,
}

impl Rest {
    pub fn start(server: Server, postgres: &Postgres) -> Self {
        let port = free_port();
        let directory = leash::directory("rest");
        let command = match server {
            Server::Postrust => postrust(port, postgres),
            Server::Lite => lite(port, postgres, &directory),
            Server::Postgrest => postgrest(port, postgres),
        };
        let leash = Leash::new(directory, Signal::Kill, &command);
        let rest = Self { leash, server, port };
        rest.resume();
        rest
    }

    /// Starts the server again after [`Rest::kill`].
    pub fn resume(&self) {
        self.leash.start();
        wait_until(|| self.answers(), || format!("{:?} does not start:\n{}", self.server, self.leash.log()));
    }

    pub fn kill(&self) {
        self.leash.stop();
    }

    /// Recovers the server after an outage of PostgreSQL. Postrust connects again at the next request.
    ///
    /// Lite needs a restart: it exits if PostgreSQL stops during a request, and otherwise waits up to 20 s before it
    /// connects again. PostgREST needs time. It answers 400 with an empty code for each dead pooled connection, and 503
    /// until it has read the schema again.
    pub fn recover(&self) {
        if !self.leash.is_running() {
            return;
        }
        match self.server {
            Server::Postrust => {}
            Server::Lite => {
                self.kill();
                self.resume();
            }
            Server::Postgrest => {
                let failure = || format!("PostgREST does not recover from an outage:\n{}", self.leash.log());
                wait_until_within(POSTGREST_RETRY, || self.answers(), failure);
            }
        }
    }

    pub fn directory(&self) -> &Path {
        self.leash.directory()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Tells whether the server executes a request. No runtime is needed, so this uses no client library.
    ///
    /// The request must be real and alone, because lite reads the schema at its first request. If PostgreSQL is down
    /// then, lite never finds a function. Lite also grants rights then, which fails for two concurrent requests.
    fn answers(&self) -> bool {
        let (path, key) = (self.server.prefix(), gateway::LITE_SECRET);
        let request = format!(
            "POST {path}/rpc/ready HTTP/1.1\r\nhost: stack\r\napikey: {key}\r\ncontent-profile: stack\r\n\
             content-type: application/json\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{{}}"
        );
        let mut status = [0; "HTTP/1.1 200".len()];
        let mut ask = || {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.set_read_timeout(Some(Duration::from_secs(5)))?;
            stream.write_all(request.as_bytes())?;
            stream.read_exact(&mut status)
        };
        ask().is_ok() && status.ends_with(b"200")
    }
}

fn postrust(port: u16, postgres: &Postgres) -> Command {
    let mut command = Command::new(Server::Postrust.program());
    command
        .env("DATABASE_URL", postgres.url("authenticator"))
        .env("PGRST_COMPAT_MODE", "true") // otherwise errors carry codes that PostgREST does not have
        .env("PGRST_SERVER_HOST", "127.0.0.1")
        .env("PGRST_SERVER_PORT", port.to_string())
        .env("PGRST_DB_SCHEMAS", "public,stack")
        .env("PGRST_DB_ANON_ROLE", "anon")
        .env("PGRST_DB_CHANNEL_ENABLED", "true") // `notify pgrst, 'reload schema'`
        .env("PGRST_DB_POOL", "10")
        // While PostgreSQL is down, postrust holds every request for this time. PostgREST answers at once.
        .env("PGRST_DB_POOL_TIMEOUT", "2")
        .env("PGRST_JWT_SECRET", gateway::JWT_SECRET)
        .env("PGRST_MAX_BODY_SIZE", (64 << 20).to_string())
        // PostgREST reads these settings from the roles. Postrust needs them here.
        .env("PGRST_ROLE_SETTINGS", r#"{"anon":{"statement_timeout":3000}}"#);
    command
}

/// Configures PostgREST as documented. PostgREST reads `statement_timeout` from the roles.
fn postgrest(port: u16, postgres: &Postgres) -> Command {
    let mut command = Command::new(Server::Postgrest.program());
    command
        .env("PGRST_DB_URI", postgres.url("authenticator"))
        .env("PGRST_DB_SCHEMAS", "public,stack")
        .env("PGRST_DB_ANON_ROLE", "anon")
        .env("PGRST_DB_CHANNEL_ENABLED", "true") // `notify pgrst, 'reload schema'`
        .env("PGRST_DB_POOL", "10")
        .env("PGRST_DB_POOL_ACQUISITION_TIMEOUT", "10")
        .env("PGRST_JWT_SECRET", gateway::JWT_SECRET) // PostgREST needs at least 32 characters
        .env("PGRST_SERVER_HOST", "127.0.0.1") // the default is all interfaces
        .env("PGRST_SERVER_PORT", port.to_string())
        .env("LANG", "C.UTF-8"); // log lines may have characters beyond ASCII
    command
}

fn lite(port: u16, postgres: &Postgres, directory: &Path) -> Command {
    let config = format!(
        r#"
        [api]
        port = {port}
        schemas = ["public", "stack"]
        [db]
        driver = "postgres"
        url = "{database}"
        [auth]
        enabled = true
        jwt_secret = "{jwt_secret}"
        publishable_key = "{publishable}"
        secret_key = "{secret}"
        "#,
        database = postgres.url("lite"),
        jwt_secret = gateway::JWT_SECRET,
        publishable = gateway::LITE_PUBLISHABLE,
        secret = gateway::LITE_SECRET,
    );
    let folder = directory.join("supabase");
    std::fs::create_dir(&folder).expect("a new directory");
    std::fs::write(folder.join("config.toml"), config).expect("a new file");
    let mut command = Command::new(Server::Lite.program());
    command.args(["--no-telemetry", "start", "--no-admin"]).env("HOME", directory);
    command
}
