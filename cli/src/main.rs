//! The command line of threadkeep: conversations, the queue, the doctor, and the migrations.

mod arguments;
mod conversations;
mod dead_letters;
mod diagnose;
mod doctor;
mod export_line;
mod failure;
mod import;
mod migrations;
mod output;
mod progress;
mod queue;
mod replay;

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::Parser;
use threadkeep::Builder;
use tracing_subscriber::filter::LevelFilter;

use arguments::{Arguments, Command, Queue, QueueCommand};
use failure::{Failure, Outcome};
use output::Output;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return failure::of_usage(&error),
    };
    tracing_subscriber::fmt()
        .with_max_level(level(&arguments))
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let mut out = Output::new(arguments.json);
    let outcome = run(arguments.command, &mut out).await;
    failure::exit_code(outcome.and_then(|outcome| out.finish().map(|()| outcome)))
}

fn level(arguments: &Arguments) -> LevelFilter {
    match arguments.command {
        _ if arguments.verbose => LevelFilter::INFO,
        // The doctor reports every problem as a finding. A log line would repeat it.
        Command::Doctor(_) => LevelFilter::OFF,
        _ => LevelFilter::WARN,
    }
}

async fn run(command: Command, out: &mut Output) -> Result<Outcome, Failure> {
    let settings = Builder::from_env_and_file(".env");
    let settings = match command {
        Command::Doctor(_) => settings,
        // Strict mode turns the fallback to memory into an error. A command that falls back would lose its write.
        _ => settings.strict(),
    };
    match command {
        Command::Doctor(doctor) => diagnose::diagnose(settings, &doctor, out).await,
        Command::Get(get) => conversations::get(settings, &get, out).await,
        Command::Put(put) => conversations::put(settings, &put, out).await,
        Command::Append(append) => conversations::append(settings, &append, out).await,
        Command::Remove(remove) => conversations::remove(settings, &remove, out).await,
        Command::List(list) => conversations::list(settings, &list, out).await,
        Command::Queue(queue) => run_queue(settings, queue, out).await,
        Command::Migrations(migrations) => migrations::migrations(&migrations, out),
    }
}

async fn run_queue(settings: Builder, queue: Queue, out: &mut Output) -> Result<Outcome, Failure> {
    let settings = match queue.file {
        Some(file) => settings.queue(file),
        None => settings,
    };
    match queue.command {
        QueueCommand::Status => queue::status(settings, out).await,
        QueueCommand::List => queue::list(settings, out).await,
        QueueCommand::Export(export) => queue::export(settings, &export, out).await,
        QueueCommand::Import(import) => import::import(settings, &import, out).await,
        QueueCommand::Migrate(from) => import::migrate(settings, &from, out).await,
        QueueCommand::Replay(replay) => replay::replay(settings, &replay, out).await,
        QueueCommand::DeadLetters(letters) => dead_letters::dead_letters(settings, &letters, out).await,
    }
}
