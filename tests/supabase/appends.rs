//! Appends on the wire.

use threadkeep::{Cache, ErrorKind};

use crate::stack::{Gateway, Server};
use crate::{builder, get, key, row, shared};

on_each_server!(
    append_to_long_conversation_sends_as_much_as_to_a_short_one,
    append_has_the_limit_of_an_update
);

/// Appends a message. Returns the bytes of the one request that it takes: its line, headers and body.
async fn append(cache: &Cache, gateway: &Gateway, key: &str, message: usize) -> usize {
    let before = gateway.count("threadkeep_apply");
    let text = format!("message {message:04} {}", "x".repeat(200));
    let appended = cache.append(key, &[text]).at("messages").await.unwrap();
    assert_eq!(appended.length, Some(message as u64));
    // The change feed has requests of its own.
    let mut seen = gateway.seen();
    seen.retain(|seen| seen.path.contains("threadkeep_apply"));
    assert_eq!(seen.len(), before + 1);
    assert_eq!(gateway.count("threadkeep_load"), 0, "an append needs no load");
    let request = seen.last().unwrap();
    let headers: usize = request.headers.iter().map(|(name, value)| name.len() + value.len()).sum();
    request.method.len() + request.path.len() + headers + request.body.len()
}

async fn append_to_long_conversation_sends_as_much_as_to_a_short_one(server: Server) {
    let (stack, gateway, cache) = shared(server).await;
    let key = key("long");
    for message in 1..10 {
        append(&cache, &gateway, &key, message).await;
    }
    let tenth = append(&cache, &gateway, &key, 10).await;
    let many = vec!["y".repeat(200); 989];
    assert_eq!(cache.append(&key, &many).at("messages").await.unwrap().length, Some(999));
    let thousandth = append(&cache, &gateway, &key, 1_000).await;
    assert_eq!(row(stack, &key, "jsonb_array_length(conversation_data -> 'messages')"), "1000");
    assert_eq!(thousandth, tenth);
    println!("{server:?}: the 10th and the 1,000th append each sent {tenth} bytes");
}

/// PostgreSQL writes a space after each comma and colon. The limit does not count those spaces, but those in strings.
async fn append_has_the_limit_of_an_update(server: Server) {
    let (_, gateway, _) = shared(server).await;
    let cache = builder(&gateway).max_value_bytes(1_200).open().await.unwrap();
    let texts = [r#"a, b: "c", \ "#, "xx"];
    for text in texts {
        let (appended, updated) = (key("appended"), key("updated"));
        let mut items = vec![text.to_owned()];
        let has_room = |items: &[String]| serde_json::to_string(items).unwrap().len() <= 1_200;
        while has_room(&items) {
            assert!(cache.append(&appended, &[text]).await.is_ok(), "{} items", items.len());
            items.push(text.to_owned());
        }
        cache.put(&updated, &items[1..]).await.unwrap();
        let rejected = cache.append(&appended, &[text]).await.unwrap_err();
        assert!(rejected.message().contains("would exceed 1200 bytes"), "{rejected}");
        assert_eq!(cache.put(&updated, &items).await.unwrap_err().kind(), ErrorKind::Invalid);
        let length = get(&cache, &appended).await.unwrap().json().len();
        assert_eq!(length, serde_json::to_string(&items[1..]).unwrap().len());
    }
}
