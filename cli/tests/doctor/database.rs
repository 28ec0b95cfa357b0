//! Faults in the database, on each server.

use crate::diagnosis::{Diagnosis, patient};
use crate::process::Cli;
use crate::stack::{Fault, Gateway, Server, Stack};

/// A private stack, whose database the test may change.
struct Patient {
    stack: Stack,
    gateway: Gateway,
    cli: Cli,
}

impl Patient {
    async fn new(server: Server) -> Self {
        Self::over(move || Stack::start(server)).await
    }

    async fn over(start: impl FnOnce() -> Stack + Send + 'static) -> Self {
        let stack = tokio::task::spawn_blocking(start).await.unwrap();
        let gateway = stack.gateway().await;
        let cli = patient(&gateway, &[]);
        Self { stack, gateway, cli }
    }

    fn sql(&self, sql: &str) -> String {
        tokio::task::block_in_place(|| self.stack.psql(sql)).trim().to_owned()
    }

    /// Plants a fault, runs the doctor, and repairs the database by the doctor's remedy (the migrations).
    async fn with(&self, sql: &str, arguments: &[&str]) -> Diagnosis {
        self.sql(sql);
        let diagnosis = Diagnosis::with(&self.cli, arguments).await;
        tokio::task::block_in_place(|| self.stack.apply_migrations());
        assert_eq!(self.rows(), "0", "after {sql}: {:#?}", diagnosis.findings);
        diagnosis
    }

    /// Counts the rows that a doctor has left behind.
    fn rows(&self) -> String {
        self.sql("select count(*) from conversation_threads where thread_id like 'threadkeep-doctor-%'")
    }
}

on_each_server!(
    database_faults_are_named,
    probe_conversation_is_removed_after_failures,
    missing_migrations_are_named,
);

const FIRST: &str = "20260101000000_conversation_threads.sql";
const LAST: &str = "20261126000000_threadkeep.sql";
const MIGRATE: [&str; 2] =
    ["threadkeep migrations --dir supabase/migrations", "supabase db push --include-all"];

async fn database_faults_are_named(server: Server) {
    let patient = Patient::new(server).await;
    let well = Diagnosis::of(&patient.cli).await;
    well.is_well().says("conversation", "ok", &["written in", "read in", "removed in"]);
    let all = [
        "settings",
        "dns",
        "tcp",
        "tls",
        "api",
        "key",
        "migrations",
        "round trip",
        "clock",
        "grants",
        "public access",
        "conversation",
        "file",
        "disk space",
    ];
    assert_eq!(well.verdicts("ok"), all);
    assert_eq!(well.verdicts("skipped"), ["public access"], "the test passes no anon key");
    assert_eq!(patient.rows(), "0", "the doctor leaves no row behind");
    assert!(!patient.cli.queue().exists(), "the doctor creates no file");

    let probe = |now: &str, schema: u8| {
        format!(
            "create or replace function public.threadkeep_probe() returns json language sql volatile security invoker
             set search_path = '' as $$ select json_build_object('now', {now}, 'schema', {schema}) $$"
        )
    };
    let now = "public.threadkeep_now()";
    let old = patient.with(&probe(now, 0), &[]).await;
    old.only_fails("migrations", &["version 0", "4 is needed", LAST, MIGRATE[0], MIGRATE[1]]);
    old.says("conversation", "skipped", &["because migrations failed"]);
    let skewed = patient.with(&probe(&format!("{now} + 3600000"), 2), &[]).await;
    skewed.says("clock", "failure", &["behind the database's", "3600 s", "NTP"]);
    let skewed = patient.with(&probe(&format!("{now} - 30000"), 2), &[]).await;
    skewed.says("clock", "warning", &["ahead of the database's", "30 s", "NTP"]);

    let revoked = patient.with("revoke execute on function threadkeep_touch from service_role", &[]).await;
    revoked.only_fails("grants", &["threadkeep_touch", "apply the migrations again"]);
    assert!(
        !format!("{:?}", revoked.findings).contains("threadkeep_purge"),
        "the other functions are granted"
    );
    let revoked = patient.with("revoke execute on function threadkeep_probe from service_role", &[]).await;
    revoked.only_fails("grants", &["threadkeep_probe", "apply the migrations again"]);
    let revoked = patient.with("revoke delete on conversation_threads from service_role", &[]).await;
    revoked.only_fails("grants", &["threadkeep_purge", "conversation_threads", "apply the migrations again"]);
    let revoked = patient.with("revoke insert on conversation_threads from service_role", &[]).await;
    revoked.only_fails("grants", &["threadkeep_probe", "conversation_threads", "apply the migrations again"]);
    Diagnosis::of(&patient.cli).await.is_well();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn partitioned_table_is_well_and_its_faults_are_named() {
    let patient = Patient::over(|| Stack::start_partitioned(Server::Postrust)).await;
    Diagnosis::of(&patient.cli).await.is_well();
    let revoked = patient.with("revoke delete on conversation_threads from service_role", &[]).await;
    revoked.only_fails("grants", &["threadkeep_purge", "conversation_threads", "apply the migrations again"]);
    Diagnosis::of(&patient.cli).await.is_well();
    assert_eq!(patient.sql("select relkind from pg_class where relname = 'conversation_threads'"), "p");
}

async fn probe_conversation_is_removed_after_failures(server: Server) {
    let patient = Patient::new(server).await;
    // The first call checks the grants. The second call has no key.
    let gateway = &patient.gateway;
    for fault in [Fault::json_error(400, "22P05"), Fault::html(502), Fault::DropResponse, Fault::Truncate] {
        gateway.script_for("threadkeep_load", [Fault::Pass, Fault::Pass, fault.clone()]);
        let unread = Diagnosis::of(&patient.cli).await;
        unread.only_fails("conversation", &["cannot be read"]);
        assert_eq!(patient.rows(), "0", "{fault:?}");
        gateway.clear();
        // The name is that of two functions.
        let passes = std::iter::repeat_n(Fault::Pass, 4);
        gateway.script_for("threadkeep_apply", passes.chain([fault.clone()]));
        Diagnosis::of(&patient.cli).await.only_fails("conversation", &["cannot be written"]);
        assert_eq!(patient.rows(), "0", "{fault:?}");
        gateway.clear();
    }
    gateway.script_for("conversation_threads", [Fault::html(502)]);
    let left = Diagnosis::of(&patient.cli).await;
    left.says("conversation", "warning", &["threadkeep-doctor-", "is left behind", "expires in a minute"]);
    assert_eq!(patient.rows(), "1", "the row is left, as the warning says");
}

async fn missing_migrations_are_named(server: Server) {
    let stack = tokio::task::spawn_blocking(move || Stack::start_without_migrations(server)).await.unwrap();
    let gateway = stack.gateway().await;
    let cli = patient(&gateway, &[]);
    let diagnosis = Diagnosis::of(&cli).await;
    let all = format!("{FIRST} and {LAST} are not applied");
    diagnosis
        .only_fails("migrations", &["lacks threadkeep's table or functions", &all, MIGRATE[0], MIGRATE[1]]);
    diagnosis.says("conversation", "skipped", &["because migrations failed"]).says("api", "ok", &[]);

    // Each partial state of the migrations, and then the complete state.
    let last = format!("{LAST} is not applied");
    let apply = |folder: &str, count| tokio::task::block_in_place(|| stack.apply_first(folder, count));
    for (folder, count, said) in [
        ("migrations", 1, "lacks threadkeep's table or functions"),
        ("tests/supabase/first_building", 2, "the functions have version 1, and 4 is needed"),
        ("tests/supabase/first_building", 6, "the functions have version 1, and 4 is needed"),
        ("tests/supabase/revision_2", 1, "the functions have version 2, and 4 is needed"),
    ] {
        apply(folder, count);
        restart(&stack);
        let diagnosis = Diagnosis::of(&cli).await;
        diagnosis.only_fails("migrations", &[said, &last, MIGRATE[0], MIGRATE[1]]);
    }
    apply("migrations", 2);
    restart(&stack);
    Diagnosis::of(&cli).await.is_well();

    // One function of an older version among the new functions.
    tokio::task::block_in_place(|| {
        stack.psql(
            "create or replace function public.threadkeep_touch(keys jsonb) returns json language sql set search_path = ''
             as $$ select json_build_object('now', public.threadkeep_now(), 'schema', 1, 'count', 0) $$",
        )
    });
    Diagnosis::of(&cli)
        .await
        .only_fails("grants", &["threadkeep_touch has version 1", "4 is needed", MIGRATE[0]]);
}

/// Restarts the server, which then reads the schema again.
fn restart(stack: &Stack) {
    tokio::task::block_in_place(|| {
        stack.kill_server();
        stack.start_server();
    });
}

/// Lite has no roles, so only the other servers can reject the public key.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn public_key_access_is_named() {
    for server in Server::installed().filter(|server| *server != Server::Lite) {
        check_public_key(server).await;
    }
}

async fn check_public_key(server: Server) {
    let patient = Patient::new(server).await;
    let keys = patient.gateway.keys();
    for key in [&keys.publishable, &keys.anon_jwt] {
        let ended = patient.cli.run(&["doctor", "--json", "--anon-key", key]).await;
        assert!(!ended.out.contains("skipped") && ended.code == 0, "{ended:?}");
    }
    let arguments = ["--anon-key", &keys.publishable];
    let kept_out = patient.with("select 1", &arguments).await;
    kept_out.is_well().says("row level security", "ok", &["cannot read"]);
    let open = patient.with("grant execute on function threadkeep_load to anon", &arguments).await;
    // The database still denies the function's access to the table.
    open.is_well();
    // A call without a write needs no table, so it is answered.
    let open = patient.with("grant execute on all functions in schema public to anon", &arguments).await;
    open.only_fails(
        "public access",
        &["threadkeep_apply", "with the public key", "apply the migrations again"],
    );
    let probe = "create or replace function public.threadkeep_probe() returns json language sql volatile security invoker
                 set search_path = '' as $$ select json_build_object('now', public.threadkeep_now(), 'revision', 4) $$;
                 grant execute on all functions in schema public to anon";
    let open = patient.with(probe, &arguments).await;
    open.only_fails(
        "public access",
        &["threadkeep_probe", "with the public key", "apply the migrations again"],
    );
    let hidden = patient.with("grant select on conversation_threads to anon", &arguments).await;
    hidden.is_well().says("row level security", "ok", &["shows no conversation"]);
    let unprotected = "grant select on conversation_threads to anon; alter table conversation_threads disable row level security";
    let unprotected = patient.with(unprotected, &arguments).await;
    unprotected.only_fails("row level security", &["can read conversations", "enable row level security"]);
    // A rejected key, such as a key of another project, proves nothing.
    let other = format!("{}wrong", &keys.anon_jwt[..keys.anon_jwt.len() - 5]);
    let open = "grant select on conversation_threads to anon; alter table conversation_threads disable row level security";
    let told = patient.with(open, &["--anon-key", &other]).await;
    told.only_fails("public access", &["rejects the key of --anon-key", "this project's anon"]);
}
