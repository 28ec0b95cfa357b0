//! Each fault, from the side of the client and from the side of the database.

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use crate::stack::{Fault, Server};
use crate::{answer, echoing, said, say};

#[tokio::test]
async fn fault_reset_does_not_reach_the_server() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.script([Fault::Reset]);
        let error = say(&gateway, "reset").send().await.expect_err("no answer");
        assert_eq!(cause(&error), Some(io::ErrorKind::ConnectionReset), "{server:?}: {error:?}");
        assert_eq!(gateway.seen()[0].carried_out, None);
        assert!(!said(echoing(server), "reset"));
    }
}

#[tokio::test]
async fn script_answers_in_order() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.script([
            Fault::json_error(500, "57P01"),
            Fault::html(522),
            Fault::retry_after(503, 7),
            Fault::Pass,
        ]);
        let (status, body) = answer(say(&gateway, "scripted")).await;
        assert!(status == 500 && body.contains(r#""code":"57P01""#), "{status} {body}");
        let (status, body) = answer(say(&gateway, "scripted")).await;
        assert!(status == 522 && body.starts_with("<!DOCTYPE html>"), "{status} {body}");
        let busy = say(&gateway, "scripted").send().await.unwrap();
        assert_eq!((busy.status().as_u16(), &busy.headers()["retry-after"]), (503, &"7".parse().unwrap()));
        assert!(!said(echoing(server), "scripted"));
        assert_eq!(answer(say(&gateway, "scripted")).await.0, 200);
    }
}

#[tokio::test]
async fn scripts_and_rules_select_requests() {
    let gateway = echoing(Server::Postrust).gateway().await;
    gateway.script_for("elsewhere", [Fault::html(525)]);
    gateway.rule(|seen| if seen.body.contains("evil") { Fault::html(524) } else { Fault::Pass });
    assert_eq!(answer(say(&gateway, "good")).await.0, 200);
    assert_eq!(answer(say(&gateway, "evil")).await.0, 524);
    gateway.always(Fault::html(523));
    assert_eq!(answer(say(&gateway, "good")).await.0, 523);
    gateway.clear();
    assert_eq!(answer(say(&gateway, "evil")).await.0, 200);
    gateway.forget();
    assert_eq!(
        (answer(say(&gateway, "good")).await.0, gateway.count("stack_echo"), gateway.count("x")),
        (200, 1, 0)
    );
    assert_eq!(gateway.seen()[0].number, 4);
}

#[tokio::test]
async fn fault_hang_continues_after_release() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.script([Fault::Hang, Fault::Hang]);
        let release = async {
            gateway.wait_for(2, "stack_echo").await;
            assert!(!said(echoing(server), "hanging"));
            gateway.release();
        };
        let ((first, _), (second, _), ()) =
            tokio::join!(answer(say(&gateway, "hanging")), answer(say(&gateway, "hanging")), release);
        assert_eq!((first, second, gateway.max_in_flight("stack_echo")), (200, 200, 2), "{server:?}");
        gateway.forget();
        answer(say(&gateway, "hanging")).await;
        answer(say(&gateway, "hanging")).await;
        assert_eq!(gateway.max_in_flight("stack_echo"), 1, "{server:?}");
    }
}

#[tokio::test]
async fn fault_slow_delays_the_answer() {
    let gateway = echoing(Server::Postrust).gateway().await;
    gateway.script([Fault::Slow(Duration::from_millis(200))]);
    let start = Instant::now();
    assert_eq!(answer(say(&gateway, "slow")).await.0, 200);
    assert!(start.elapsed() >= Duration::from_millis(200));
}

#[tokio::test]
async fn abandoned_request_arrives_late() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.script([Fault::Hang]);
        let impatient = say(&gateway, "late").timeout(Duration::from_millis(50));
        assert!(impatient.send().await.expect_err("no answer").is_timeout());
        gateway.wait_until(|seen| seen.iter().any(|seen| seen.ended.is_some())).await;
        assert!(!said(echoing(server), "late"));
        gateway.clear();
        gateway.wait_for_carried_out(1, "stack_echo").await;
        assert!(said(echoing(server), "late"), "{server:?}");
    }
}

#[tokio::test]
async fn fault_drop_and_truncate_commit_first() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.script([Fault::DropResponse, Fault::Truncate]);
        let error = say(&gateway, "lost").send().await.expect_err("no answer");
        assert!(error.is_request() && !error.is_connect() && !error.is_timeout(), "{server:?}: {error:?}");
        assert!(said(echoing(server), "lost"), "{server:?}");
        let cut = say(&gateway, "cut").send().await.expect("a head");
        assert!(cut.status() == 200 && cut.content_length().is_some_and(|length| length > 0));
        assert!(cut.text().await.is_err(), "{server:?}");
        assert!(said(echoing(server), "cut"), "{server:?}");
    }
}

#[tokio::test]
async fn fault_hang_after_commits_first() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.script([Fault::HangAfter]);
        let release = async {
            gateway.wait_for_carried_out(1, "stack_echo").await;
            assert!(said(echoing(server), "held"), "{server:?}");
            assert_eq!(gateway.seen()[0].ended, None, "{server:?}");
            gateway.clear();
        };
        let ((status, _), ()) = tokio::join!(answer(say(&gateway, "held")), release);
        assert_eq!(status, 200, "{server:?}");
    }
}

#[tokio::test]
async fn gateway_refuse_closes_connections() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        gateway.always(Fault::Hang);
        let refuse = async {
            gateway.wait_for(1, "").await;
            gateway.refuse().await;
        };
        let (hung, ()) = tokio::join!(say(&gateway, "refused").send(), refuse);
        assert!(hung.is_err(), "{server:?}");
        assert!(say(&gateway, "refused").send().await.expect_err("no listener").is_connect(), "{server:?}");
        gateway.accept().await;
        gateway.clear();
        assert_eq!(answer(say(&gateway, "accepted")).await.0, 200, "{server:?}");
        assert!(!said(echoing(server), "refused"), "{server:?}");
    }
}

/// Returns the kind of the I/O error that caused a failed request.
fn cause(error: &reqwest::Error) -> Option<io::ErrorKind> {
    let causes = std::iter::successors(error.source(), |&error| error.source());
    causes.filter_map(|cause| cause.downcast_ref::<io::Error>()).map(io::Error::kind).last()
}
