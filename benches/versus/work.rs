//! Builds conversations, and runs calls in tasks, in sequence or at a fixed rate.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// A conversation of a chat daemon.
pub type Conversation = Vec<Message>;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    pub role: String,
    pub content: String,
}

const SENTENCE: &str = "It was the best of times, it was the worst of times, it was the age of wisdom. ";

/// Builds a conversation of about `bytes` bytes of JSON.
pub fn conversation(key: &str, bytes: usize) -> Conversation {
    let turn = |at: usize, content: String| Message {
        role: if at.is_multiple_of(2) { "user" } else { "assistant" }.into(),
        content,
    };
    let body = bytes.saturating_sub(160) / 4;
    let text = SENTENCE.repeat(body / SENTENCE.len() + 1);
    (0..4).map(|at| turn(at, format!("{key}: {}", &text[..body]))).collect()
}

pub fn thread(at: usize) -> String {
    format!("thread-{at:08}")
}

/// Runs `count` calls in `tasks` concurrent tasks and returns the total time.
pub async fn by_tasks<F: Future<Output = ()> + Send>(
    tasks: usize,
    count: usize,
    call: impl Fn(usize) -> F + Clone + Send + 'static,
) -> Duration {
    let began = Instant::now();
    let tasks = (0..tasks).map(|task| {
        let call = call.clone();
        tokio::spawn(async move {
            for at in (task..count).step_by(tasks) {
                call(at).await;
            }
        })
    });
    for task in tasks.collect::<Vec<_>>() {
        task.await.unwrap();
    }
    began.elapsed()
}

/// Runs `count` calls in sequence and returns the median time of a call.
pub async fn one_by_one(count: usize, mut call: impl AsyncFnMut(usize)) -> Duration {
    let mut spans = Vec::with_capacity(count);
    for at in 0..count {
        let began = Instant::now();
        call(at).await;
        spans.push(began.elapsed());
    }
    spans.sort_unstable();
    spans[count / 2]
}

/// Starts calls at a fixed rate, also if earlier calls still run.
///
/// Returns the sorted times of the calls. The time of a call counts from its due time, so that a late start is visible.
pub async fn at_a_rate<F: Future<Output = ()> + Send + 'static>(
    per_second: u32,
    span: Duration,
    call: impl Fn(usize) -> F,
) -> Vec<Duration> {
    let (began, step) = (Instant::now(), Duration::from_secs(1) / per_second);
    let mut calls = Vec::new();
    let mut due = began;
    while due < began + span {
        tokio::time::sleep_until(due.into()).await;
        // The timer's resolution is 1 ms. All calls that became due in this time start at once.
        while due <= Instant::now() {
            let (call, since) = (call(calls.len()), due);
            calls.push(tokio::spawn(async move {
                call.await;
                since.elapsed()
            }));
            due += step;
        }
    }
    let mut spans = Vec::with_capacity(calls.len());
    for call in calls {
        spans.push(call.await.unwrap());
    }
    spans.sort_unstable();
    spans
}

/// Returns the CPU time that this process took during `work`, in steps of 10 ms.
pub async fn cpu_time_of<T>(work: impl Future<Output = T>) -> Duration {
    let ticks = || -> u64 {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        // The name of the process comes first, and may have spaces.
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        fields.skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum()
    };
    let before = ticks();
    work.await;
    Duration::from_millis(10 * (ticks() - before))
}

/// Returns the percentile of sorted times.
pub fn percentile(spans: &[Duration], share: f64) -> Duration {
    spans[((spans.len() - 1) as f64 * share) as usize]
}

pub fn per_second(count: usize, span: Duration) -> f64 {
    count as f64 / span.as_secs_f64()
}
