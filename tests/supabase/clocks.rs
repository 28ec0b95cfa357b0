//! Daemons with wrong clocks.

use std::time::Duration;

use threadkeep::WriteOutcome;

use crate::stack::{Fault, Server};
use crate::{SECOND, builder, drained, get, key, row, shared};

on_each_server!(
    clock_five_minutes_off_keeps_expiry_and_write_order,
    queued_write_of_wrong_clock_is_restamped_at_clock_sync
);

const OFF: [i64; 2] = [-300_000, 300_000];

async fn clock_five_minutes_off_keeps_expiry_and_write_order(server: Server) {
    let (stack, gateway, right) = shared(server).await;
    for off in OFF {
        let wrong = builder(&gateway).clock_skew_millis(off).open().await.unwrap();
        let (brief, shared) = (key("brief"), key("shared"));

        // Both the database's clock and the reader's clock apply the expiry exactly.
        wrong.put(&brief, "brief").ttl(8 * SECOND).await.unwrap();
        let left: f64 =
            row(stack, &brief, "extract(epoch from expires_at - clock_timestamp())").parse().unwrap();
        assert!((1.0..8.1).contains(&left), "{off}: {left} s left");
        assert!(get(&wrong, &brief).await.is_some() && get(&right, &brief).await.is_some());
        tokio::time::sleep(Duration::from_millis(8_050)).await;
        assert!(get(&wrong, &brief).await.is_none() && get(&right, &brief).await.is_none(), "{off}");

        // The last write wins, with any clock error of its daemon.
        for round in 0..6 {
            let writer = if round % 2 == 0 { &wrong } else { &right };
            assert_eq!(
                writer.put(&shared, &round).await.unwrap(),
                WriteOutcome::Stored,
                "{off}, round {round}"
            );
            assert_eq!(row(stack, &shared, "conversation_data"), round.to_string());
        }
        wrong.remove(&shared).await.unwrap();
        assert!(get(&right, &shared).await.is_none());
        assert_eq!(right.put(&shared, "back").await.unwrap(), WriteOutcome::Stored);
        assert_eq!(get(&wrong, &shared).await.unwrap().json(), "\"back\"");
    }
}

/// The first contact fails, so that the daemon starts before its first clock sync.
async fn queued_write_of_wrong_clock_is_restamped_at_clock_sync(server: Server) {
    let (stack, gateway, right) = shared(server).await;
    for off in OFF {
        let key = key("clock");
        right.put(&key, "old").await.unwrap();
        // README promises an order between daemons only beyond 2 s plus one round trip.
        tokio::time::sleep(5 * SECOND).await;
        gateway.always(Fault::html(522));
        let wrong = builder(&gateway).clock_skew_millis(off).open().await.unwrap();
        assert!(!wrong.health().is_available());
        // The wrong clock stamps this write. Clock sync corrects the version before the replay (I8).
        assert_eq!(wrong.put(&key, "new").ttl(60 * SECOND).await.unwrap(), WriteOutcome::Queued);
        gateway.clear();
        drained("a wrong clock", &wrong).await;
        let left = "conversation_data, round(extract(epoch from expires_at - clock_timestamp()) / 10)";
        assert_eq!(row(stack, &key, left), "\"new\"|6", "{off}");
    }
}
