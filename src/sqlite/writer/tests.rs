use std::sync::Mutex;
use std::sync::atomic::AtomicI32;
use std::time::Duration;

use super::*;

/// Starts a writer on a file with one table of numbers.
fn started() -> (tempfile::TempDir, Writer) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file.db");
    let connection = Connection::open(&path).unwrap();
    connection.execute_batch("create table numbers (number integer primary key)").unwrap();
    (dir, Writer::start(connection, Arc::new(FileHealth::of(&path, &path)), || {}).unwrap())
}

#[tokio::test]
async fn group_with_failed_job_commits_the_other_jobs() {
    let (_dir, writer) = started();
    // Jobs that arrive while the thread is held up form one group.
    let (go_on, held_up) = std::sync::mpsc::channel::<()>();
    let (started, is_started) = std::sync::mpsc::channel();
    let hold_up = move |_: &Connection| {
        started.send(()).ok();
        Ok(held_up.recv().ok())
    };
    let _held_up = writer.submit(CommitLevel::ProcessCrash, hold_up, |result| result).await.unwrap();
    is_started.recv().unwrap();
    let (runs, announced) = (Arc::new(AtomicI32::new(0)), Arc::new(AtomicI32::new(0)));
    let mut answers = Vec::new();
    for number in [1, 2, 2, 3] {
        let (runs, announced) = (Arc::clone(&runs), Arc::clone(&announced));
        let insert = move |connection: &Connection| {
            runs.fetch_add(1, SeqCst);
            connection.execute("insert into numbers values (?1)", [number])
        };
        let on_commit = move |result: Result<usize>| {
            announced.fetch_add(1, SeqCst);
            result
        };
        answers.push(writer.submit(CommitLevel::ProcessCrash, insert, on_commit).await.unwrap());
    }
    drop(go_on);
    let mut is_done = Vec::new();
    for answer in answers {
        is_done.push(answer.await.unwrap().is_ok());
    }
    assert_eq!(is_done, [true, true, false, true]);
    assert_eq!(runs.load(SeqCst), 3 + 4, "the group runs up to the failed job, then each job runs alone");
    assert_eq!(announced.load(SeqCst), 4);
    let count =
        |c: &Connection| c.query_row("select sum(number) from numbers", [], |row| row.get::<_, i32>(0));
    let sum = writer.submit(CommitLevel::ProcessCrash, count, |result| result).await.unwrap().await.unwrap();
    assert_eq!(sum.unwrap(), 1 + 2 + 3);
}

#[tokio::test]
async fn later_job_is_answered_after_on_commit_of_earlier_job() {
    let (_dir, writer) = started();
    let (commit, held_up) = std::sync::mpsc::channel::<()>();
    let (on_commit, not_announced) = std::sync::mpsc::channel::<()>();
    let announced = Arc::new(Mutex::new(Vec::new()));
    let note = |number: i32| {
        let announced = Arc::clone(&announced);
        move |result: Result<i32>| {
            announced.lock().unwrap().push(number);
            result
        }
    };
    let first = note(0);
    let slowly = move |result: Result<i32>| {
        not_announced.recv().ok();
        first(result)
    };
    let (tell, begun) = std::sync::mpsc::channel();
    let work = |number: i32| {
        let tell = tell.clone();
        move |_: &Connection| Ok(tell.send(number).map_or(0, |()| number))
    };
    let begins = || begun.recv_timeout(Duration::from_secs(20));
    let begin = work(0);
    let wait = move |connection: &Connection| {
        let number = begin(connection);
        held_up.recv().ok();
        number
    };
    let mut answers = vec![writer.submit(CommitLevel::ProcessCrash, wait, slowly).await.unwrap()];
    assert_eq!(begins(), Ok(0), "the first job runs alone, so that the others form a second group");
    for number in 1..=3 {
        answers.push(writer.submit(CommitLevel::ProcessCrash, work(number), note(number)).await.unwrap());
    }
    commit.send(()).unwrap();
    assert_eq!(
        [begins(), begins(), begins()],
        [Ok(1), Ok(2), Ok(3)],
        "the writer goes on while on_commit blocks"
    );
    // A wrong answer would arrive within this time.
    tokio::time::sleep(Duration::from_millis(50)).await;
    answers.push(writer.submit(CommitLevel::ProcessCrash, work(4), note(4)).await.unwrap());
    assert_eq!(begins(), Ok(4), "the earlier groups are committed");
    let is_unanswered = answers.iter_mut().all(|answer| answer.try_recv().is_err());
    assert!(is_unanswered && announced.lock().unwrap().is_empty());
    on_commit.send(()).unwrap();
    for (number, answer) in (0..).zip(answers) {
        assert_eq!(answer.await.unwrap().unwrap(), number);
    }
    assert_eq!(*announced.lock().unwrap(), [0, 1, 2, 3, 4]);
}

#[tokio::test]
async fn close_answers_waiting_jobs_first() {
    let (_dir, writer) = started();
    let mut answers = Vec::new();
    for number in 0..500 {
        let answer =
            writer.submit(CommitLevel::ProcessCrash, move |_| Ok(number), |result| result).await.unwrap();
        answers.push(answer);
    }
    writer.close();
    for (number, mut answer) in (0..).zip(answers) {
        assert_eq!(answer.try_recv().unwrap().unwrap(), number);
    }
}
