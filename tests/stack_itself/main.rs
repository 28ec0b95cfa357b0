//! Tests the stacks and the gateway of the other tests: each server, each key rule and each fault.

#![allow(clippy::unwrap_used, clippy::expect_used)] // also in helper functions, because a panic fails the test

mod faults;
mod processes;
mod requests;
#[path = "../stack/mod.rs"]
mod stack;

use std::sync::OnceLock;

use stack::{Gateway, Server, Stack};

/// A function that stores its argument and returns it.
const ECHO: &str = "
    create table public.stack_echoes (said text);
    alter table public.stack_echoes enable row level security;
    grant insert on public.stack_echoes to service_role;
    create function public.stack_echo(said text) returns json language sql set search_path = '' as $$
        insert into public.stack_echoes values (said);
        select pg_catalog.json_build_object('said', said, 'user', current_user,
            'timeout', pg_catalog.current_setting('statement_timeout'));
    $$;
    revoke execute on function public.stack_echo from public;
    grant execute on function public.stack_echo to service_role;
";

/// Returns the shared stack of the server with the function `stack_echo`.
fn echoing(server: Server) -> &'static Stack {
    static READY: [OnceLock<()>; Server::ALL.len()] = [const { OnceLock::new() }; Server::ALL.len()];
    let stack = Stack::shared(server);
    READY[server as usize].get_or_init(|| teach(stack));
    stack
}

fn teach(stack: &Stack) {
    stack.psql(ECHO);
    // Each server finds new functions at its start. Lite finds them only then.
    stack.kill_server();
    stack.start_server();
}

fn said(stack: &Stack, word: &str) -> bool {
    stack.psql(&format!("select exists (select from stack_echoes where said = '{word}')")) == "t"
}

/// Builds a request with the secret key that echoes `word`.
fn say(gateway: &Gateway, word: &str) -> reqwest::RequestBuilder {
    bare(gateway, word).header("apikey", gateway.keys().secret)
}

/// Builds the same request without a key, on a new connection.
fn bare(gateway: &Gateway, word: &str) -> reqwest::RequestBuilder {
    let url = format!("{}/rest/v1/rpc/stack_echo", gateway.url());
    let body = format!(r#"{{"said":"{word}"}}"#);
    reqwest::Client::new().post(url).header("content-type", "application/json").body(body)
}

async fn answer(request: reqwest::RequestBuilder) -> (u16, String) {
    let answer = request.send().await.expect("an answer");
    (answer.status().as_u16(), answer.text().await.expect("a whole answer"))
}
