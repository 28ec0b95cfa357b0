//! The requests that a healthy gateway forwards, and the requests that it rejects.

use std::io::Write;
use std::net::TcpStream;

use crate::stack::{Server, jwt};
use crate::{answer, bare, echoing, say};

#[tokio::test]
async fn healthy_stack_answers_as_service_role() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        let (status, body) = answer(say(&gateway, "healthy")).await;
        assert_eq!(status, 200, "{server:?}: {body}");
        // The test compares parsed values, because PostgREST keeps PostgreSQL's spaces.
        let body: serde_json::Value = serde_json::from_str(&body).unwrap();
        let expected = serde_json::json!({"said": "healthy", "user": "service_role", "timeout": "8s"});
        assert_eq!(body, expected, "{server:?}");
        let seen = gateway.seen().remove(0);
        assert_eq!((seen.number, seen.carried_out, &*seen.body), (0, Some(200), r#"{"said":"healthy"}"#));
    }
}

#[tokio::test]
async fn keys_are_checked_as_on_supabase() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        let keys = gateway.keys();
        let check = async |headers: &[(&str, &str)], status: u16, part: &str| {
            let mut request = bare(&gateway, "keys");
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            let (found, body) = answer(request).await;
            assert!(found == status && body.contains(part), "{server:?} {headers:?}: {found} {body}");
        };
        let (service, anon) = (format!("Bearer {}", keys.service_jwt), format!("Bearer {}", keys.anon_jwt));
        let (secret, user) = (format!("Bearer {}", keys.secret), format!("Bearer {}", jwt("authenticated")));
        let status_of_users = if server == Server::Postrust { 401 } else { 403 };

        check(&[], 401, "No API key found in request").await;
        check(&[("authorization", &service)], 401, "No API key found in request").await;
        check(&[("authorization", &secret)], 401, "No API key found in request").await;
        check(&[("apikey", "sb_secret_made_up")], 401, "Invalid API key").await;
        check(&[("apikey", &keys.secret)], 200, "service_role").await;
        check(&[("apikey", &keys.secret), ("authorization", &secret)], 200, "service_role").await;
        check(&[("apikey", &keys.secret), ("user-agent", "Mozilla/5.0")], 401, "browser").await;
        check(&[("apikey", &keys.publishable)], 401, "42501").await;
        check(&[("apikey", &keys.service_jwt), ("authorization", &service)], 200, "service_role").await;
        check(&[("apikey", &keys.service_jwt)], 401, "42501").await;
        check(&[("apikey", &keys.anon_jwt), ("authorization", &anon)], 401, "42501").await;
        check(&[("apikey", &keys.secret), ("authorization", &user)], status_of_users, "42501").await;
        check(&[("apikey", &keys.secret), ("authorization", "Bearer made.up")], 401, "").await;

        let fresh = gateway.rotate_secret();
        check(&[("apikey", &keys.secret)], 401, "Invalid API key").await;
        check(&[("apikey", &fresh)], 200, "service_role").await;
        check(&[("apikey", &keys.service_jwt), ("authorization", &service)], 200, "service_role").await;
    }
}

#[tokio::test]
async fn only_rest_v1_is_routed_and_long_heads_are_refused() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        let get = |path: &str| {
            reqwest::Client::new().get(gateway.url() + path).header("apikey", gateway.keys().secret)
        };
        for path in ["/", "/auth/v1/user", "/rest/v10/x"] {
            assert_eq!(answer(get(path)).await.0, 404, "{server:?} {path}");
        }
        assert_eq!(answer(get("/rest/v1/stack_nothing")).await.0, 404, "{server:?}");
        assert_eq!(answer(get(&format!("/rest/v1/x?id={}", "x".repeat(20_000)))).await.0, 520, "{server:?}");
    }
}

#[tokio::test]
async fn large_bodies_arrive() {
    for server in Server::installed() {
        let gateway = echoing(server).gateway().await;
        let large = "x".repeat(16 << 20);
        let (status, body) = answer(say(&gateway, &large)).await;
        assert!(status == 200 && body.len() > large.len(), "{server:?}: {status}");
    }
}

/// Sends two pipelined requests in bytes that no client library sends.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn chunks_and_pipelined_requests_are_understood() {
    let gateway = echoing(Server::Postrust).gateway().await;
    let chunked = format!(
        "POST /rest/v1/rpc/stack_echo HTTP/1.1\r\nHost: x\r\nApiKey: {}\r\nContent-Type: application/json\r\n\
         Transfer-Encoding: chunked\r\n\r\n8\r\n{{\"said\":\r\n9\r\n\"chunked\"\r\n1\r\n}}\r\n0\r\n\r\n",
        gateway.keys().secret
    );
    let mut stream = TcpStream::connect(gateway.url().trim_start_matches("http://")).unwrap();
    stream.write_all((chunked.clone() + &chunked).as_bytes()).unwrap();
    gateway.wait_for_carried_out(2, "stack_echo").await;
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(gateway.seen().iter().all(|seen| seen.carried_out == Some(200)), "{:?}", gateway.seen());
    assert_eq!(gateway.max_in_flight(""), 1, "one connection runs one request at a time");
}
