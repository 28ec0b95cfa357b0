//! The commands `queue status`, `queue list` and `queue export`, which read the outage file.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde_json::json;
use threadkeep::tools::{FileSummary, QueuedWrite, Usage};
use threadkeep::{Builder, DeadLetter};

use crate::arguments::Export;
use crate::export_line;
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Output, QueueEntry, counted, duration, size};

pub async fn status(settings: Builder, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    let status = file.status().await?;
    let path = file.path().display().to_string(); // lossy, because a path need not be UTF-8
    let usage = |of: Usage| json!({"records": of.records, "bytes": of.bytes});
    let mut queued = usage(status.queued);
    queued["oldest_seconds"] = json!(status.oldest.map(|oldest| oldest.as_secs()));
    let value = json!({
        "path": path,
        "project": status.project,
        "queued": queued,
        "dead_letters": usage(status.dead_letters),
        "copies": usage(status.conversations),
    });
    out.either(&value, || status_text(&path, &status))?;
    Ok(Outcome::Done)
}

fn status_text(path: &str, status: &FileSummary) -> String {
    let FileSummary { project, queued, oldest, dead_letters, conversations: copies, .. } = status;
    let oldest = oldest.map(|oldest| format!(", the oldest {} old", duration(oldest))).unwrap_or_default();
    let hint = if dead_letters.records > 0 { " (see `threadkeep queue dead-letters`)" } else { "" };
    format!(
        "file          {path}\nproject       {}\nqueued        {}, {}{oldest}\ndead letters  {}, {}{hint}\n\
         copies        {}, {}",
        project.as_deref().unwrap_or("none yet"),
        counted(queued.records, "write"),
        size(queued.bytes),
        dead_letters.records,
        size(dead_letters.bytes),
        copies.records,
        size(copies.bytes),
    )
}

pub async fn list(settings: Builder, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    for_each(
        async |last: Option<&QueuedWrite>| file.queued(last).await,
        async |queued| {
            let entry = QueueEntry::of_write(queued);
            out.either(&entry, || entry.text())
        },
    )
    .await?;
    Ok(Outcome::Done)
}

/// Calls `each` with every item of the pages in order, and returns the number of items. `next_page` gets the last item so far.
pub async fn for_each<T>(
    next_page: impl AsyncFn(Option<&T>) -> threadkeep::Result<Vec<T>>,
    mut each: impl AsyncFnMut(&T) -> Result<(), Failure>,
) -> Result<usize, Failure> {
    let (mut count, mut page) = (0, next_page(None).await?);
    while let Some(last) = page.last() {
        for item in &page {
            each(item).await?;
        }
        count += page.len();
        page = next_page(Some(last)).await?;
    }
    Ok(count)
}

pub async fn export(settings: Builder, export: &Export, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    let mut lines = ExportTarget::open(&export.to, out)?;
    let writes = for_each(
        async |last: Option<&QueuedWrite>| file.queued(last).await,
        async |write| lines.write(&export_line::of_write(write, file.project())?),
    )
    .await?;
    let letters = for_each(
        async |last: Option<&DeadLetter>| file.dead_letters(last).await,
        async |letter| lines.write(&export_line::of_dead_letter(letter, file.project())?),
    )
    .await?;
    lines.finish()?;
    let (writes, letters) = (counted(writes, "queued write"), counted(letters, "dead letter"));
    tell(&format!("exported {writes} and {letters}"));
    Ok(Outcome::Done)
}

/// The destination of an export.
pub enum ExportTarget<'a> {
    Out(&'a mut Output),
    File(&'a Path, BufWriter<File>),
}

impl<'a> ExportTarget<'a> {
    /// Opens standard output, or a new file that only its owner can read.
    pub fn open(path: &'a Path, out: &'a mut Output) -> Result<Self, Failure> {
        if path == Path::new("-") {
            return Ok(Self::Out(out));
        }
        let mut options = File::options();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let cannot = |e| Failure::of_file(path, "cannot be created", &e);
        Ok(Self::File(path, BufWriter::new(options.open(path).map_err(cannot)?)))
    }

    pub fn write(&mut self, line: &str) -> Result<(), Failure> {
        match self {
            Self::Out(out) => out.line(line),
            Self::File(path, file) => {
                writeln!(file, "{line}").map_err(|e| Failure::of_file(path, "cannot be written", &e))
            }
        }
    }

    /// Flushes the export. Syncs a file, so that a later deletion of dead letters loses nothing.
    pub fn finish(self) -> Result<(), Failure> {
        match self {
            Self::Out(out) => out.finish(),
            Self::File(path, mut file) => {
                let written = file.flush().and_then(|()| file.get_ref().sync_all());
                written.map_err(|e| Failure::of_file(path, "cannot be written", &e))
            }
        }
    }
}
