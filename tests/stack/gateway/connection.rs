//! Serves the requests of one client connection in order.

use std::pin::pin;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::sync::watch;

use super::fault::Fault;
use super::shared::{Arrival, Shared};
use super::wire::{Reply, Request, Wire};

/// How a request ends for the client.
enum Ending {
    Reply(Reply),
    HalfReply(Reply),
    Close,
    Reset,
}

/// Serves the connection until either side closes it.
pub async fn serve(stream: TcpStream, shared: Arc<Shared>) {
    let mut wire = Wire::new(stream);
    while let Ok(request) = wire.request().await {
        let Arrival { under_way, fault, release } = shared.arrive(&request);
        let mut ending = pin!(bring_about(fault, release, shared.carry_out(&request, under_way.number)));
        let ending = tokio::select! {
            ending = &mut ending => ending,
            () = wire.gone() => {
                // The client has ended this request, but the request still runs, perhaps late. A network also
                // delivers requests that their senders have abandoned.
                drop(under_way);
                ending.await;
                return;
            }
        };
        // The request ends before the answer goes out. Otherwise the client's next request would seem to overlap.
        drop(under_way);
        match ending {
            Ending::Reply(reply) if wire.reply(&reply).await.is_ok() => {}
            Ending::HalfReply(reply) => return wire.half_reply(&reply).await.unwrap_or_default(),
            Ending::Reset => return wire.reset(),
            Ending::Reply(_) | Ending::Close => return,
        }
    }
}

/// Applies the fault around `carry_out`. The first poll of `carry_out` forwards the request.
async fn bring_about(
    fault: Fault,
    mut release: watch::Receiver<()>,
    carry_out: impl Future<Output = Reply>,
) -> Ending {
    // The task's shared state owns the sender, so waiting cannot fail.
    let mut released = async || drop(release.changed().await);
    match fault {
        Fault::Pass => Ending::Reply(carry_out.await),
        Fault::Reset => Ending::Reset,
        Fault::Hang => {
            released().await;
            Ending::Reply(carry_out.await)
        }
        Fault::Slow(delay) => {
            tokio::time::sleep(delay).await;
            Ending::Reply(carry_out.await)
        }
        Fault::Status { code, headers, body } => {
            Ending::Reply(Reply { status: code, headers, body: body.into() })
        }
        Fault::Truncate => Ending::HalfReply(carry_out.await),
        Fault::DropResponse => {
            carry_out.await;
            Ending::Close
        }
        Fault::HangAfter => {
            let reply = carry_out.await;
            released().await;
            Ending::Reply(reply)
        }
    }
}
