//! Creates a database for each test, in one cluster with the roles of a Supabase project.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use crate::stack::{Postgres, SUPERUSER, migrations, partition_arguments, supabase_cli, test_partitions};

fn cluster() -> &'static Postgres {
    static CLUSTER: OnceLock<Postgres> = OnceLock::new();
    CLUSTER.get_or_init(|| Postgres::start(false))
}

pub struct Database {
    name: String,
}

impl Database {
    pub fn new() -> Self {
        let name = format!("project_{:016x}", fastrand::u64(..));
        cluster().psql(SUPERUSER, &["-c", &format!("create database {name} owner postgres")]);
        let database = Self { name };
        database.sql("grant usage on schema public to anon, authenticated, service_role");
        database
    }

    /// Creates a database and applies the migrations with psql. The table is plain, also with `TEST_PARTITIONS`.
    pub fn plain() -> Self {
        let database = Self::new();
        database.apply("migrations").unwrap();
        database
    }

    /// Creates a database with the migrations. `TEST_PARTITIONS` splits its table.
    pub fn migrated() -> Self {
        let database = Self::plain();
        if let Some(count) = test_partitions() {
            database.partition(count).unwrap();
        }
        database
    }

    /// Creates a database with the migrations and a partitioned table.
    pub fn partitioned() -> Self {
        let database = Self::plain();
        database.partition(16).unwrap();
        database
    }

    /// Splits the table into partitions. 0 makes one plain table.
    pub fn partition(&self, count: impl std::fmt::Display) -> Result<String, String> {
        let [c, set, f, file] = partition_arguments(count);
        self.psql("postgres", &["-1", &c, &set, &f, &file])
    }

    pub fn url(&self, user: &str) -> String {
        let url = cluster().url(user);
        format!("{}/{}", url.rsplit_once('/').unwrap().0, self.name)
    }

    /// Runs SQL as superuser.
    pub fn sql(&self, sql: &str) -> String {
        self.psql(SUPERUSER, &["-c", sql]).unwrap_or_else(|said| panic!("{sql}: {said}"))
    }

    /// Runs SQL as the user that runs migrations.
    pub fn try_sql(&self, sql: &str) -> Result<String, String> {
        self.psql("postgres", &["-c", sql])
    }

    /// Applies the files of a folder by psql, each as one transaction.
    pub fn apply(&self, folder: &str) -> Result<(), String> {
        for file in migrations(folder) {
            self.psql("postgres", &["-1", "-f", file.to_str().unwrap()])?;
        }
        Ok(())
    }

    fn psql(&self, user: &str, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new(cluster().program("psql"));
        command.env_clear().args(["-XqtA", "-v", "ON_ERROR_STOP=1"]).arg(self.url(user)).args(args);
        let output = command.output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
    }

    /// Returns the dump of the schema `public` by pg_dump.
    pub fn schema(&self) -> String {
        let mut command = Command::new(cluster().program("pg_dump"));
        command.env_clear().args(["--schema-only", "--no-owner", "--schema=public"]).arg(self.url(SUPERUSER));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        // Newer versions of pg_dump write a random word after these commands.
        let lines =
            text.lines().filter(|line| !line.starts_with("\\restrict") && !line.starts_with("\\unrestrict"));
        lines.flat_map(|line| [line, "\n"]).collect()
    }

    pub fn indexes(&self) -> Vec<String> {
        let names = self.sql(
            "select indexrelid::regclass from pg_index where indrelid = 'conversation_threads'::regclass",
        );
        let mut names: Vec<String> = names.lines().map(str::to_owned).collect();
        names.sort_unstable();
        names
    }

    pub async fn connect(&self) -> tokio_postgres::Client {
        let (client, connection) =
            tokio_postgres::connect(&self.url(SUPERUSER), tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client
    }
}

/// A working folder for the Supabase CLI, without a linked project.
pub struct Project {
    folder: tempfile::TempDir,
}

impl Project {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(folder.path().join("supabase/migrations")).unwrap();
        Self { folder }
    }

    fn migrations(&self) -> PathBuf {
        self.folder.path().join("supabase/migrations")
    }

    pub fn write(&self, name: &str, sql: &str) {
        std::fs::write(self.migrations().join(name), sql).unwrap();
    }

    /// Copies the migrations of a folder into the project, as the README describes.
    pub fn copy(&self, folder: &str) -> &Self {
        for file in migrations(folder) {
            std::fs::copy(&file, self.migrations().join(file.file_name().unwrap())).unwrap();
        }
        self
    }

    pub fn remove(&self, folder: &str) {
        for file in migrations(folder) {
            std::fs::remove_file(self.migrations().join(file.file_name().unwrap())).unwrap();
        }
    }

    pub fn push(&self, database: &Database) -> Result<String, String> {
        self.cli(database, &["db", "push", "--include-all", "--yes"])
    }

    pub fn lint(&self, database: &Database) -> Result<String, String> {
        // The CLI creates the extension itself, but its role may do so only on Supabase.
        database.sql("create extension if not exists plpgsql_check");
        let linted = self.cli(database, &["db", "lint", "--fail-on", "warning"]);
        database.sql("drop extension plpgsql_check");
        linted
    }

    pub fn cli(&self, database: &Database, args: &[&str]) -> Result<String, String> {
        let mut command = Command::new(supabase_cli());
        command.args(args).arg("--db-url").arg(format!("{}?sslmode=disable", database.url("postgres")));
        command.current_dir(self.folder.path()).env("HOME", self.folder.path());
        command.env("SUPABASE_TELEMETRY_DISABLED", "1").env("DO_NOT_TRACK", "1");
        let Output { status, stdout, stderr } = command.output().unwrap();
        let said = format!("{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        if status.success() { Ok(said) } else { Err(said) }
    }
}

/// Returns the names of the files in `migrations/`.
pub fn names() -> Vec<String> {
    let name = |file: PathBuf| Path::new(&file).file_name().unwrap().to_str().unwrap().to_owned();
    migrations("migrations").into_iter().map(name).collect()
}
