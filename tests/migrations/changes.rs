//! `threadkeep_changes` names each change once it is visible: beside open transactions, for plain SQL, and over pages.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_postgres::Client;

use crate::agreement::call;
use crate::database::Database;

/// A client that asks for changes as a daemon does.
pub struct Feed {
    client: Client,
    pub cursor: Value,
}

/// One answer.
pub struct Page {
    pub state: String,
    rows: BTreeMap<String, i64>,
    is_last: bool,
}

impl Feed {
    pub async fn begin(database: &Database) -> Self {
        let client = database.connect().await;
        client.batch_execute("set role service_role").await.unwrap();
        let mut feed = Self { client, cursor: Value::Null };
        assert_eq!(feed.page().await.state, "begun");
        feed
    }

    pub async fn page(&mut self) -> Page {
        let request = json!({ "cursor": self.cursor });
        let said = call(&self.client, "threadkeep_changes", &request).await;
        self.cursor = said["cursor"].clone();
        let row = |row: &Value| {
            (
                row["key"].as_str().unwrap().to_owned(),
                row["version"].as_str().unwrap().parse::<i64>().unwrap(),
            )
        };
        // A key that is in the table and also a tombstone has the higher version.
        let mut rows = BTreeMap::new();
        for (key, version) in said["rows"].as_array().unwrap().iter().map(row) {
            let newest: &mut i64 = rows.entry(key).or_default();
            *newest = version.max(*newest);
        }
        Page {
            state: said["state"].as_str().unwrap().to_owned(),
            rows,
            is_last: said["is_last"].as_bool().unwrap(),
        }
    }

    /// Returns the names of one unbroken page, which is the last one.
    pub async fn names(&mut self) -> Vec<String> {
        let page = self.page().await;
        assert_eq!((&*page.state, page.is_last), ("unbroken", true));
        page.rows.into_keys().collect()
    }
}

const EXPIRY: &str = "now() + interval '1h'";

pub fn insert(key: &str) -> String {
    format!(
        "insert into conversation_threads (thread_id, conversation_data, expires_at) values ('{key}', '[]', {EXPIRY})
         on conflict (thread_id) do update set conversation_data = excluded.conversation_data || '[1]'"
    )
}

fn apply(key: &str, more: &str) -> String {
    format!(
        "select threadkeep_apply(jsonb_build_array(jsonb_build_object('key', '{key}', 'writer', '16777217', 'expires_at', 4000000000000,
             'version', ((extract(epoch from clock_timestamp()) * 1000 * 2097152)::bigint / 2 * 2)::text {more})))"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn each_kind_of_change_is_named_once() {
    for database in [Database::migrated(), Database::partitioned()] {
        each_kind_of_change(&database).await;
    }
}

async fn each_kind_of_change(database: &Database) {
    let mut feed = Feed::begin(database).await;
    assert_eq!(feed.names().await, [""; 0]);
    let append = r#", 'value', '[1]'::jsonb, 'append', '{"at": [], "max_bytes": 100}'::jsonb"#;
    let steps = [
        (insert("a"), &["a"][..]),
        (insert("a"), &["a"]),
        ("update conversation_threads set metadata = '{\"b\": 1}'".into(), &["a"]),
        (
            "select threadkeep_touch('[\"a\"]'); update conversation_threads set accessed_at = now()".into(),
            &[],
        ),
        (insert("b"), &["b"]),
        ("delete from conversation_threads where thread_id = 'b'".into(), &["b"]),
        ("update conversation_threads set thread_id = 'c' where thread_id = 'a'".into(), &["a", "c"]),
        (apply("d", ", 'value', 1"), &["d"]),
        (
            apply(
                "d",
                ", 'value', '[1]'::jsonb, 'if_version', (select version::text from conversation_threads where thread_id = 'd')",
            ),
            &["d"],
        ),
        (apply("d", append), &["d"]),
        (apply("b", append), &["b"]),
        (apply("c", &append.replace("100", "1")), &[]),
        (apply("d", ""), &["d"]),
        (
            format!(
                "begin; savepoint one; {}; rollback to one; savepoint two; {}; release two; commit",
                insert("x"),
                insert("e")
            ),
            &["e"],
        ),
        (format!("begin; {}; rollback", insert("x")), &[]),
        (insert(&"k".repeat(513)), &[]),
        ("select threadkeep_probe()".into(), &[]),
        ("truncate conversation_threads".into(), &["b", "c", "d", "e"]),
    ];
    for (sql, names) in steps {
        database.sql(&sql);
        let named = feed.names().await;
        let named: Vec<&str> = named.iter().map(String::as_str).filter(|name| name.len() < 513).collect();
        assert_eq!(named, names, "{sql}");
        assert_eq!(feed.names().await, [""; 0], "again after {sql}");
    }
}

/// A poll that runs beside an open transaction names its rows after the commit, and the rows of others at once.
#[tokio::test(flavor = "multi_thread")]
async fn open_transaction_delays_its_own_changes_only() {
    let database = Database::migrated();
    let mut feed = Feed::begin(&database).await;
    let (early, late) = (database.connect().await, database.connect().await);
    early.batch_execute(&format!("begin; {}", insert("early"))).await.unwrap();
    late.batch_execute(&format!("begin; savepoint one; {}; release one", insert("late"))).await.unwrap();
    for round in 0..3 {
        let key = format!("other-{round}");
        database.sql(&insert(&key));
        assert_eq!(feed.names().await, [key]);
    }
    late.batch_execute("commit").await.unwrap();
    assert_eq!(feed.names().await, ["late"]);
    early.batch_execute("commit").await.unwrap();
    assert_eq!(feed.names().await, ["early"]);
    assert_eq!(feed.names().await, [""; 0]);
}

/// Rows over several pages, with a transaction that was open at the first cursor and commits between two pages.
#[tokio::test(flavor = "multi_thread")]
async fn pages_name_every_change_beside_open_transactions() {
    let database = Database::migrated();
    let many = |from: i32, to: i32| {
        format!(
            "insert into conversation_threads (thread_id, conversation_data, expires_at)
             select 'k' || at, '1', {EXPIRY} from generate_series({from}, {to} - 1) as at"
        )
    };
    let open: Vec<Client> =
        [database.connect().await, database.connect().await, database.connect().await].into();
    for (at, client) in open.iter().enumerate() {
        let from = 100_000 + 10_000 * i32::try_from(at).unwrap();
        client.batch_execute(&format!("begin; {}", many(from, from + 4_000))).await.unwrap();
    }
    let mut feed = Feed::begin(&database).await;
    for at in 0..8 {
        database.sql(&many(at * 3_000, (at + 1) * 3_000));
    }
    for client in &open[..2] {
        client.batch_execute("commit").await.unwrap();
    }
    let mut named = HashMap::<String, usize>::new();
    let mut sizes = Vec::new();
    loop {
        let page = feed.page().await;
        assert_eq!(page.state, "unbroken");
        sizes.push(page.rows.len());
        for key in page.rows.into_keys() {
            *named.entry(key).or_default() += 1;
        }
        if sizes.len() == 1 {
            open[2].batch_execute("commit").await.unwrap();
        }
        if page.is_last {
            break;
        }
    }
    assert!(sizes.iter().all(|size| *size <= 10_000) && sizes.len() > 3, "{sizes:?}");
    assert_eq!(named.len(), 8 * 3_000 + 3 * 4_000, "{sizes:?}");
    assert!(named.values().all(|count| *count == 1), "each change is named once");
    assert_eq!(feed.names().await, [""; 0]);
}

/// A page cannot split one transaction. So the feed begins anew, and goes on after it.
#[tokio::test(flavor = "multi_thread")]
async fn transaction_of_more_than_a_page_begins_anew() {
    let database = Database::migrated();
    let mut feed = Feed::begin(&database).await;
    database.sql(&insert("before"));
    database.sql(&format!(
        "insert into conversation_threads (thread_id, conversation_data, expires_at)
         select 'k' || at, '1', {EXPIRY} from generate_series(1, 10001) as at"
    ));
    let page = feed.page().await;
    assert_eq!((&*page.state, page.rows.len(), page.is_last), ("unbroken", 1, false));
    let page = feed.page().await;
    assert_eq!((&*page.state, page.rows.len(), page.is_last), ("begun", 0, true));
    database.sql(&insert("after"));
    assert_eq!(feed.names().await, ["after"]);
}

/// Cursors of another database, of a later state of this one, and of last week.
#[tokio::test(flavor = "multi_thread")]
async fn foreign_and_future_cursors_are_restored_and_old_ones_begin() {
    let (database, other) = (Database::migrated(), Database::migrated());
    let mut feed = Feed::begin(&database).await;
    let (own, foreign) = (feed.cursor.clone(), Feed::begin(&other).await.cursor);
    let parts: Vec<&str> = own.as_str().unwrap().split(' ').collect();
    let [history, at, snapshot] = parts[..] else { panic!("{own}") };
    let last_week = at.parse::<i64>().unwrap() - 8 * 86_400_000;
    let timeline = history.replacen("00000001", "00000002", 1);
    assert_ne!(timeline, history);
    for (cursor, state) in [
        (foreign, "restored"),
        (json!(format!("{timeline} {at} {snapshot}")), "restored"),
        (json!(format!("{history} {at} 9000000:9000000:")), "restored"),
        (json!(format!("{history} {last_week} {snapshot}")), "begun"),
        (json!("of another store"), "restored"),
        (own, "unbroken"),
    ] {
        feed.cursor = cursor.clone();
        let page = feed.page().await;
        assert_eq!((&*page.state, page.rows.len(), page.is_last), (state, 0, true), "{cursor}");
        assert_eq!(feed.names().await, [""; 0]);
    }
    // A copy of the table has another identity.
    database.sql("alter table conversation_threads rename to gone; alter table threadkeep_tombstones rename to gone_too");
    for name in ["conversation_threads", "threadkeep_tombstones"] {
        let gone = if name == "conversation_threads" { "gone" } else { "gone_too" };
        database.sql(&format!("create table {name} as table {gone}; grant all on {name} to service_role"));
    }
    assert_eq!(feed.page().await.state, "restored");
}

/// Eight writers change 50 conversations by every way, some in transactions that stay open. Three feeds with different pace see each
/// committed version.
#[tokio::test(flavor = "multi_thread")]
async fn feeds_beside_writers_miss_nothing() {
    feeds_beside_writers(&Database::migrated()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn feeds_beside_writers_on_partitions_miss_nothing() {
    feeds_beside_writers(&Database::partitioned()).await;
}

async fn feeds_beside_writers(database: &Database) {
    let seconds = std::env::var("SQL_RACE_SECONDS").map_or(5, |seconds| seconds.parse().unwrap());
    // The feeds begin before the first write.
    let has_ended = Arc::new(AtomicBool::new(false));
    let mut feeds = tokio::task::JoinSet::new();
    for pause in [0, 20, 300] {
        let (mut feed, has_ended) = (Feed::begin(database).await, has_ended.clone());
        feeds.spawn(async move {
            let (mut newest, mut named, mut is_over) = (HashMap::<String, i64>::new(), 0, false);
            loop {
                let page = feed.page().await;
                assert_eq!((&*page.state, page.is_last), ("unbroken", true));
                named += page.rows.len();
                for (key, version) in page.rows {
                    let held = newest.entry(key).or_default();
                    *held = version.max(*held);
                }
                if is_over {
                    println!("{named} named");
                    return newest;
                }
                // One poll more after all writers have ended.
                is_over = has_ended.load(Ordering::Relaxed);
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        });
    }
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut writers = tokio::task::JoinSet::new();
    for _ in 0..8 {
        let client = database.connect().await;
        writers.spawn(async move {
            let mut rng = fastrand::Rng::new();
            while Instant::now() < until {
                write_once(&mut rng, &client).await;
            }
        });
    }
    writers.join_all().await;
    has_ended.store(true, Ordering::Relaxed);
    let rows = "select thread_id, max(version)::text from (
                    select thread_id, version from conversation_threads union all select thread_id, version from threadkeep_tombstones) as every
                group by thread_id";
    let present: HashMap<String, i64> = (database.sql(rows).lines())
        .map(|line| line.split_once('|').unwrap())
        .map(|(key, version)| (key.to_owned(), version.parse().unwrap()))
        .collect();
    for newest in feeds.join_all().await {
        for (key, version) in &present {
            assert_eq!(newest.get(key), Some(version), "{key}");
        }
    }
}

async fn write_once(rng: &mut fastrand::Rng, client: &Client) {
    let key = format!("k{}", rng.usize(..50));
    let is_open = rng.u8(..4) == 0;
    if is_open {
        client.batch_execute("begin; set local lock_timeout = '100ms'").await.unwrap();
    }
    let sql = match rng.u8(..8) {
        0 | 1 => insert(&key),
        2 => format!(
            "update conversation_threads set metadata = '{{\"a\": {}}}' where thread_id = '{key}'",
            rng.u32(..)
        ),
        3 => format!("delete from conversation_threads where thread_id = '{key}'"),
        4 => apply(&key, ", 'value', 1"),
        5 => apply(&key, ""),
        6 => apply(&key, r#", 'value', '[1]'::jsonb, 'append', '{"at": [], "max_bytes": 100000}'::jsonb"#),
        _ => format!("savepoint a; {}; rollback to a; {}", insert(&key), insert(&key)),
    };
    let sql = if is_open || !sql.starts_with("savepoint") { sql } else { insert(&key) };
    let wrote = client.batch_execute(&sql).await;
    if is_open {
        tokio::time::sleep(Duration::from_millis(rng.u64(..400))).await;
        let end = if wrote.is_err() || rng.u8(..4) == 0 { "rollback" } else { "commit" };
        client.batch_execute(end).await.unwrap();
    }
}
