//! Measures appends against updates: of a long conversation, and of one that several daemons write.

use std::time::Duration;

use threadkeep::{Cache, WriteOutcome};

use crate::table::Goal::{AtLeast, AtMost};
use crate::table::{Table, Unit};
use crate::work::{Conversation, Message, by_tasks, conversation, one_by_one, per_second};
use crate::world::{KIB, World};
use crate::writes::put;

const LONG: usize = 400_000;
const DAEMONS: usize = 8;
/// The concurrent turns of each daemon.
const TASKS: usize = 4;

fn turn() -> Message {
    Message { role: "user".into(), content: "x".repeat(KIB) }
}

async fn append(cache: &Cache, key: &str) {
    assert_eq!(cache.append(key, &[turn()]).await.unwrap().outcome, WriteOutcome::Stored);
}

async fn update(cache: &Cache, key: &str) {
    let push = |current: Option<Conversation>| {
        let mut messages = current.unwrap_or_default();
        messages.push(turn());
        Ok(Some(messages))
    };
    assert_eq!(cache.update(key, push).await.unwrap(), WriteOutcome::Stored);
}

pub async fn to_a_long_conversation(world: &World) -> Table {
    let mut table = Table::new("A turn of 1 KiB in a conversation of 400 KB, local file on", Unit::Span);
    let cache = world.builder().open().await.unwrap();
    let (value, count) = (conversation("a long conversation", LONG), world.scale.of(50, 3));
    for _ in 0..world.scale.rounds {
        put(&cache, "long", &value).await;
        table.note_span("append", one_by_one(count, async |_| append(&cache, "long").await).await);
        put(&cache, "long", &value).await;
        table.note_span("update", one_by_one(count, async |_| update(&cache, "long").await).await);
    }
    table.claim("append", AtMost(1.0 / 1.5), "update");
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    table
}

pub async fn by_8_daemons(world: &World) -> Table {
    let title = format!("{DAEMONS} daemons with {TASKS} turns each at once, one conversation");
    let mut table = Table::new(title, Unit::Rate);
    let mut daemons = Vec::new();
    for _ in 0..DAEMONS {
        daemons.push(world.builder().open().await.unwrap());
    }
    // As many for both, because the conversation grows with each turn.
    let count = world.scale.of(400, 20);
    for _ in 0..world.scale.rounds {
        put(&daemons[0], "hot", &conversation("a hot conversation", KIB)).await;
        let all = daemons.clone();
        let appends = move |at: usize| {
            let daemon = all[at % DAEMONS].clone();
            async move { append(&daemon, "hot").await }
        };
        table.note("append", per_second(count, by_tasks(DAEMONS * TASKS, count, appends).await));
        put(&daemons[0], "hot", &conversation("a hot conversation", KIB)).await;
        let all = daemons.clone();
        let updates = move |at: usize| {
            let daemon = all[at % DAEMONS].clone();
            async move { update(&daemon, "hot").await }
        };
        table.note("update", per_second(count, by_tasks(DAEMONS * TASKS, count, updates).await));
    }
    table.claim("append", AtLeast(5.0), "update");
    for daemon in daemons {
        daemon.shutdown(Duration::from_secs(60)).await.unwrap();
    }
    table
}
