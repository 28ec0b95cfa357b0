//! A private PostgreSQL cluster with the roles of a Supabase project.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::leash::{self, Leash, Signal};
use super::{MISSING, free_port, wait_until};

/// The superuser, as on Supabase, where `postgres` is not a superuser.
pub const SUPERUSER: &str = "supabase_admin";

/// One cluster. It ends with this value or with the process.
pub struct Postgres {
    leash: Leash,
    binaries: PathBuf,
    port: u16,
}

/// Creates the cluster on the first start, so that the leash also covers the creation.
const SERVE: &str = r#"
    [ -e data/PG_VERSION ] ||
        "$1/initdb" -D data -U "$3" -A trust -E UTF8 --locale=C.UTF-8 --no-sync --no-instructions || exit
    exec "$1/postgres" -D data -p "$2" -k "$PWD" \
        -c listen_addresses=127.0.0.1 -c max_connections=100 -c fsync="$4" -c full_page_writes="$4"
"#;

impl Postgres {
    /// Starts a cluster with the roles of Supabase. With `syncs` the cluster survives a power cut, and is slower.
    pub fn start(syncs: bool) -> Self {
        let binaries = binaries();
        let port = free_port();
        let directory = leash::directory("postgres");
        let mut command = unprivileged(&directory);
        command.args(["sh", "-c", SERVE, "sh"]).arg(&binaries).arg(port.to_string()).arg(SUPERUSER);
        command.arg(if syncs { "on" } else { "off" });
        let leash = Leash::new(directory, Signal::Quit, &command);
        let postgres = Self { leash, binaries, port };
        postgres.resume();
        postgres.psql(SUPERUSER, &["-c", include_str!("supabase.sql")]);
        postgres
    }

    /// Starts the cluster again after [`Postgres::crash`].
    pub fn resume(&self) {
        self.leash.start();
        let ready = || self.run("pg_isready", &["-q", "-d", "postgres"]).status.success();
        wait_until(ready, || format!("PostgreSQL does not start:\n{}", self.leash.log()));
    }

    /// Stops the cluster and all its connections as a crash does. The next start recovers from the log.
    pub fn crash(&self) {
        self.leash.stop();
    }

    pub fn directory(&self) -> &Path {
        self.leash.directory()
    }

    /// Returns the URL for `user`.
    pub fn url(&self, user: &str) -> String {
        format!("postgres://{user}@127.0.0.1:{}/postgres", self.port)
    }

    /// Returns the path of a PostgreSQL program.
    pub fn program(&self, name: &str) -> PathBuf {
        self.binaries.join(name)
    }

    /// Runs psql, which must succeed, and returns its rows without decoration.
    pub fn psql(&self, user: &str, args: &[&str]) -> String {
        let settings = ["-XqtA", "-v", "ON_ERROR_STOP=1", "-d", "postgres", "-U", user];
        let output = self.run("psql", &[&settings, args].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "psql {args:?} as {user} failed:\n{said}");
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    fn run(&self, program: &str, args: &[&str]) -> Output {
        let mut command = Command::new(self.program(program));
        command.env_clear(); // the developer's PGOPTIONS must not apply
        command.args(["-h", "127.0.0.1", "-p", &self.port.to_string()]).args(args);
        command.output().unwrap_or_else(|error| panic!("{program} does not run: {error}; {MISSING}"))
    }
}

/// Drops the rights of root, because PostgreSQL does not run as root. The Debian package creates the user `postgres`.
fn unprivileged(directory: &Path) -> Command {
    let root = std::fs::metadata(directory).expect("made just now").uid() == 0;
    if !root {
        return Command::new("env"); // `env` changes nothing
    }
    let given = Command::new("chown").arg("postgres:").arg(directory).status();
    assert!(given.is_ok_and(|status| status.success()), "the user postgres does not exist: {MISSING}");
    let mut command = Command::new("setpriv");
    command.args(["--reuid=postgres", "--regid=postgres", "--init-groups"]);
    command
}

/// Returns the folder of the newest PostgreSQL. Debian keeps it off the PATH.
fn binaries() -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let installed =
        versions.map(|version| version.path().join("bin")).filter(|bin| bin.join("postgres").exists());
    let number = |bin: &PathBuf| -> Option<u32> { bin.parent()?.file_name()?.to_str()?.parse().ok() };
    installed.max_by_key(number).unwrap_or_else(|| panic!("PostgreSQL is not installed: {MISSING}"))
}
