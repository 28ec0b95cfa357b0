//! Measures puts and gets of conversations of 400 KB.

use std::time::Duration;

use crate::table::Goal::AtMost;
use crate::table::{Table, Unit};
use crate::work::{Conversation, conversation, one_by_one, thread};
use crate::world::World;
use crate::writes::put;

const BYTES: usize = 400_000;
const CONVERSATIONS: usize = 20;

pub async fn puts_and_gets(world: &World) -> Table {
    let mut table = Table::new("Conversations of 400 KB, one task, local file on", Unit::Span);
    let cache = world.builder().open().await.unwrap();
    let value = conversation("a long conversation", BYTES);
    let (key, count) = (|at| thread(at % CONVERSATIONS), world.scale.of(100, 3));
    for _ in 0..world.scale.rounds {
        table.note_span("put", one_by_one(count, async |at| put(&cache, &key(at), &value).await).await);
        table.note_span(
            "one POST",
            one_by_one(count, async |at| world.rest.upsert(&key(at), &value).await).await,
        );
        for at in 0..CONVERSATIONS.min(count) {
            cache.evict(key(at)).unwrap();
        }
        let get = async |at| {
            let found = cache.get(key(at)).await.unwrap().unwrap();
            assert_eq!(found.decode::<Conversation>().unwrap().len(), 4);
            cache.evict(key(at)).unwrap();
        };
        table.note_span("cold get", one_by_one(count, get).await);
        let select = async |at| assert_eq!(world.rest.select(&key(at)).await.len(), 4);
        table.note_span("one GET", one_by_one(count, select).await);
    }
    table.claim("put", AtMost(1.2), "one POST");
    table.claim("cold get", AtMost(1.2), "one GET");
    cache.shutdown(Duration::from_secs(60)).await.unwrap();
    table
}
