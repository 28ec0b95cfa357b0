//! Compares `threadkeep_apply` with `decide`: the answers, and the rows that remain.

use std::collections::HashMap;

use serde_json::{Value, json};
use threadkeep::Version;
use threadkeep::store::{
    Append, Applied, Condition, Decision, RowState, Timestamp, WriteHead, WriteKind, WriterId, decide,
};
use tokio_postgres::{Client, Row};

use crate::content::{Content, PATHS, appended, random_document};
use crate::database::Database;

/// The number of random cases of the test with one session.
const CASES: usize = 500;
const DAY: i64 = 86_400_000;

/// What the database holds of one conversation.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Held {
    row: Option<RowState>,
    content: Content,
    is_in_table: bool,
    noted: HashMap<i64, Version>,
}

/// One write of a batch.
#[derive(Debug, Clone)]
pub struct Given {
    pub key: String,
    pub head: WriteHead,
    pub value: Value,
    pub append: Option<Append>,
}

impl Given {
    pub fn json(&self) -> Value {
        let WriteHead { kind, version, writer, condition, expires_at } = self.head;
        let mut json = json!({
            "key": self.key, "version": version.to_string(), "writer": writer.to_string(), "expires_at": expires_at.0,
        });
        if kind != WriteKind::Remove {
            json["value"] = self.value.clone();
            json["user"] = self.user().into();
        }
        if let Some(append) = &self.append {
            json["append"] = serde_json::to_value(append).unwrap();
        }
        if let Condition::IfVersion(base) = condition {
            json["if_version"] = base.to_string().into();
        }
        json
    }

    fn user(&self) -> String {
        self.head.version.to_string()
    }

    /// Returns the content of the row after a put or a remove.
    fn content(&self) -> Content {
        match self.head.kind {
            WriteKind::Remove => Content::default(),
            _ => Content { value: Some(self.value.clone()), user: Some(self.user()) },
        }
    }
}

/// Draws a write. Its condition names one of `bases`.
pub fn draw(rng: &mut fastrand::Rng, key: &str, version: i64, writer: i64, bases: &[i64]) -> Given {
    let version = Version::from_raw(version);
    let kind = match rng.u8(..8) {
        0 | 1 => WriteKind::Remove,
        // Only a batch without bases is plain.
        2..5 if !bases.is_empty() => WriteKind::Append,
        _ => WriteKind::Put,
    };
    let expires_at = match kind {
        WriteKind::Put | WriteKind::Append => {
            Timestamp(version.at().0 + *rng.choice(&[-3, -1, 0, 1, 3, DAY]).unwrap())
        }
        _ => version.at(),
    };
    let mut condition = match rng.choice(bases).filter(|_| rng.bool()) {
        Some(base) => Condition::IfVersion(Version::from_raw(*base)),
        None => Condition::Any,
    };
    let (mut append, mut value) = (None, random_document(rng));
    if kind == WriteKind::Append {
        let path = rng.choice(PATHS).unwrap().iter().copied().collect();
        let mut target = Append::new(path, if rng.u8(..8) == 0 { 1 } else { 1 << 20 });
        target.only_if_present = rng.u8(..4) == 0;
        condition = if target.only_if_present { Condition::IfPresent } else { Condition::Any };
        append = Some(target);
        value = (0..rng.u32(..4)).map(|_| Value::from(rng.u64(1 << 60..1 << 63))).collect();
    }
    let head = WriteHead { kind, version, writer: WriterId::from_raw(writer), condition, expires_at };
    Given { key: key.to_owned(), head, value, append }
}

/// How a call that was compared with `decide` ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compared {
    Agrees,
    /// Another session created or deleted a row that the caller could not lock before.
    Raced,
}

/// Applies the writes in a transaction that holds the locks of all their rows, and compares answers and rows with `decide`.
pub async fn apply_and_compare(client: &Client, writes: &[Given]) -> Vec<Compared> {
    let mut keys: Vec<String> = writes.iter().map(|given| given.key.clone()).collect();
    keys.sort_unstable();
    keys.dedup();
    client.batch_execute("begin").await.unwrap();
    let before = read(client, &keys).await;
    let body: Vec<Value> = writes.iter().map(Given::json).collect();
    let answers = call(client, "threadkeep_apply", &Value::from(body.clone())).await;
    let after = read(client, &keys).await;
    let graves = tombstones(client, &keys).await;
    client.batch_execute("commit").await.unwrap();
    let now = Timestamp(answers["now"].as_i64().unwrap());
    let rows = answers["rows"].as_array().unwrap();
    assert_eq!(rows.len(), writes.len(), "{answers}");

    let mut all = Vec::new();
    for key in &keys {
        let of_key: Vec<(&Given, Applied)> = writes
            .iter()
            .zip(rows)
            .filter(|(given, _)| given.key == *key)
            .map(|(given, row)| (given, applied(given, row)))
            .collect();
        let actual = (of_key.iter().map(|(_, answer)| *answer).collect::<Vec<_>>(), after[key].clone());
        let expected = expect(&of_key, before[key].clone(), now).await;
        if expected == actual {
            all.push(Compared::Agrees);
            continue;
        }
        assert!(
            !before[key].is_in_table,
            "{body:?}\nheld {:?}\nexpected {expected:?}\nfound    {actual:?}",
            before[key]
        );
        // The row that this transaction created is locked, so its tombstone no longer changes.
        let over = Held { row: graves.get(key).copied(), ..before[key].clone() };
        let agrees = expect(&of_key, over, now).await == actual;
        all.push(if agrees { Compared::Agrees } else { Compared::Raced });
    }
    all
}

/// Decides about the writes of one conversation in turn. Returns the answers, and what the database then holds.
async fn expect(writes: &[(&Given, Applied)], mut held: Held, now: Timestamp) -> (Vec<Applied>, Held) {
    let mut answers = Vec::new();
    for (given, _) in writes {
        let head = &given.head;
        let writer = head.writer.raw();
        let last = held.noted.get(&writer).copied().unwrap_or_default();
        answers.push(match decide(head, held.row.as_ref(), last, now) {
            Decision::Answer(answer) => answer,
            Decision::Apply(state) => {
                let over = held.row.map(|row| row.version).unwrap_or_default();
                let is_live = held.row.is_some_and(|row| row.expires_at > head.version.at());
                let (content, answer) = match &given.append {
                    None => (given.content(), Applied::Stored),
                    Some(target) => {
                        let live = held.content.clone().filter(is_live);
                        match appended(live, given.content(), target).await {
                            Err(unsuitable) => {
                                answers.push(unsuitable);
                                continue;
                            }
                            Ok((content, length)) => {
                                (content, Applied::Appended { version: state.version, over, length })
                            }
                        }
                    }
                };
                if head.is_counted() {
                    held.noted.insert(writer, head.version);
                }
                held = Held { row: Some(without_daemon(state)), content, is_in_table: true, ..held };
                answer
            }
        });
    }
    (answers, held)
}

fn applied(given: &Given, row: &Value) -> Applied {
    let version = || Version::from_raw(row["version"].as_str().unwrap().parse().unwrap());
    match row["state"].as_str().unwrap() {
        "stored" => match row["length"].as_u64() {
            Some(length) => {
                let over = Version::from_raw(row["over"].as_str().unwrap().parse().unwrap());
                Applied::Appended { version: version(), over, length }
            }
            None if given.append.is_some() => Applied::AppendedBefore(version()),
            None => Applied::Stored,
        },
        "absent" => Applied::Absent,
        "not_an_array" => Applied::NotAnArray,
        "too_large" => Applied::TooLarge,
        "superseded" => Applied::Superseded(version()),
        "conflict" => Applied::Conflict(version()),
        "version_in_future" => Applied::VersionInFuture,
        "too_old" => Applied::TooOld,
        other => panic!("unknown state {other}"),
    }
}

/// Reads and locks the rows of these conversations.
async fn read(client: &Client, keys: &[String]) -> HashMap<String, Held> {
    let mut all: HashMap<String, Held> = keys.iter().map(|key| (key.clone(), Held::default())).collect();
    let rows = client
        .query(
            "select thread_id, version, coalesce(base_version, version), last_writer, run_began,
                    floor(extract(epoch from expires_at) * 1000)::bigint, conversation_data::text, user_id,
                    conversation_data = 'null' and expires_at <= clock_timestamp()
             from conversation_threads where thread_id = any ($1) order by thread_id collate \"C\" for update",
            &[&keys],
        )
        .await
        .unwrap();
    for row in &rows {
        let held = all.get_mut(row.get::<_, &str>(0)).unwrap();
        (held.row, held.is_in_table) = (Some(state(row)), true);
        let is_tombstone: bool = row.get(8);
        let value = serde_json::from_str(row.get(6)).ok().filter(|_| !is_tombstone);
        held.content = Content { value, user: row.get(7) };
    }
    for (key, grave) in tombstones(client, keys).await {
        let held = all.get_mut(&key).unwrap();
        held.row = held.row.or(Some(grave));
    }
    let noted = "select thread_id, writer, version from threadkeep_writers where thread_id = any ($1)";
    for row in client.query(noted, &[&keys]).await.unwrap() {
        let held = all.get_mut(row.get::<_, &str>(0)).unwrap();
        held.noted.insert(row.get(1), Version::from_raw(row.get(2)));
    }
    all
}

async fn tombstones(client: &Client, keys: &[String]) -> HashMap<String, RowState> {
    let sql = "select thread_id, version, version, 0::bigint, 0::bigint, floor(extract(epoch from removed_at) * 1000)::bigint
               from threadkeep_tombstones where thread_id = any ($1)";
    let rows = client.query(sql, &[&keys]).await.unwrap();
    rows.iter().map(|row| (row.get(0), state(row))).collect()
}

fn state(row: &Row) -> RowState {
    let version = |at: usize| Version::from_raw(row.get(at));
    without_daemon(RowState {
        version: version(1),
        base_version: version(2),
        last_writer: WriterId::from_raw(row.get(3)),
        run_began: version(4),
        expires_at: Timestamp(row.get(5)),
    })
}

/// Writers without a daemon are alike. The database writes 1 for 0, because 0 is plain SQL.
fn without_daemon(state: RowState) -> RowState {
    let last_writer = if state.last_writer.daemon() == 0 { WriterId::NONE } else { state.last_writer };
    RowState { last_writer, ..state }
}

pub async fn call(client: &Client, function: &str, argument: &Value) -> Value {
    let sql = format!("select {function}($1::text::jsonb)::text");
    let answer = client.query_one(&sql, &[&argument.to_string()]).await;
    let answer: String = answer.unwrap_or_else(|error| panic!("{function}({argument}): {error:?}")).get(0);
    serde_json::from_str(&answer).unwrap()
}

/// Plants random states of rows, tombstones and writers, and applies random batches over them.
#[tokio::test(flavor = "multi_thread")]
async fn random_writes_over_random_rows_agree_with_decide() {
    agree(&Database::migrated()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn random_writes_on_partitions_agree_with_decide() {
    agree(&Database::partitioned()).await;
}

async fn agree(database: &Database) {
    let client = database.connect().await;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for case in 0..CASES {
        let now: i64 = client.query_one("select threadkeep_now()", &[]).await.unwrap().get(0);
        // Few different versions, so that many are equal.
        let start = now - *rng.choice(&[0, 60_000, 6 * DAY, 9 * DAY]).unwrap() - 100;
        let pool: Vec<i64> = (1..10).map(|at| ((start + at) << 21) + rng.i64(0..3) * 2).collect();
        let writers = [0, 5, 1 << 24, (1 << 24) + 1, 2 << 24];
        let mut writes = Vec::new();
        // One half of the batches is plain, so one statement writes them.
        let is_plain = rng.bool();
        for at in 0..rng.usize(1..4) {
            let key = format!("{case}-{at}");
            let (bases, last_writer) = plant(&mut rng, &client, &key, &pool, &writers).await;
            for _ in 0..if !is_plain && rng.u8(..5) == 0 { 2 } else { 1 } {
                let version = match rng.u8(..20) {
                    0 => (now + 10_000) << 21,
                    1 => (now - 8 * DAY) << 21,
                    2..5 => *rng.choice(&bases[..3]).unwrap().max(&2),
                    5..12 => ((start + rng.i64(10..14)) << 21) + 2 * rng.i64(1..9),
                    _ => *rng.choice(&pool).unwrap(),
                };
                let writer = if rng.bool() { last_writer } else { *rng.choice(&writers).unwrap() };
                writes.push(draw(&mut rng, &key, version, writer, if is_plain { &[] } else { &bases }));
            }
        }
        rng.shuffle(&mut writes);
        let body: Vec<Value> = writes.iter().map(Given::json).collect();
        // The second time the writes are repetitions.
        for _ in 0..2 {
            for compared in apply_and_compare(&client, &writes).await {
                assert_eq!(compared, Compared::Agrees, "{body:?}");
            }
        }
    }
}

/// Plants a row, a tombstone or nothing. Returns the bases that a condition may name, and the writer of the row.
async fn plant(
    rng: &mut fastrand::Rng,
    client: &Client,
    key: &str,
    pool: &[i64],
    writers: &[i64],
) -> (Vec<i64>, i64) {
    let mut three: Vec<i64> = (0..3).map(|_| *rng.choice(pool).unwrap()).collect();
    three.sort_unstable();
    let (run_began, base, version) = (if rng.bool() { three[0] } else { 0 }, three[1], three[2]);
    let last_writer = *rng.choice(writers).unwrap();
    let expiry = (version >> 21) + *rng.choice(&[-2, 0, 1, 2, 5, DAY]).unwrap();
    let purged = ((pool[0] >> 21) - 20 * DAY) << 21;
    let bases = vec![base, version, run_began, 0, *rng.choice(pool).unwrap(), purged];
    let has_row = match rng.u8(..10) {
        0 | 1 => return (bases, last_writer),
        2 => false,
        _ => true,
    };
    let base = if rng.u8(..8) == 0 { "null".into() } else { base.to_string() };
    let mut sql = "begin; set local session_replication_role = replica;".to_owned();
    if has_row {
        sql += &format!(
            "insert into conversation_threads (thread_id, version, base_version, last_writer, run_began, conversation_data, expires_at)
             values ('{key}', {version}, {base}, {last_writer}, {run_began}, '{}', to_timestamp({expiry} / 1000.0));",
            random_document(rng)
        );
    }
    if !has_row || rng.u8(..5) == 0 {
        // A row lies above its tombstone.
        let version = if has_row { pool[0] - 2 } else { version };
        sql += &format!(
            "insert into threadkeep_tombstones values ('{key}', {version}, least(to_timestamp({expiry} / 1000.0), now()));"
        );
    }
    for writer in writers.iter().filter(|writer| **writer >> 24 > 0) {
        // A row lies at or above the noted versions.
        let noted = *rng.choice(pool).unwrap();
        if noted <= version && rng.bool() {
            sql += &format!("insert into threadkeep_writers values ('{key}', {writer}, {noted});");
        }
    }
    client.batch_execute(&(sql + "commit")).await.unwrap();
    (bases, last_writer)
}
