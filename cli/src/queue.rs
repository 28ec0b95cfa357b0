//! The commands `queue status`, `queue list` and `queue export`, which read the outage file.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde_json::json;
use threadkeep::tools::{QueueAdmin, QueueStatus, QueuedWrite};
use threadkeep::{Builder, DeadLetter};

use crate::arguments::Export;
use crate::export_line;
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Output, QueueEntry, duration, shown, size};

pub async fn status(settings: Builder, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    let status = file.status().await?;
    let value = json!({
        "path": status.path.display().to_string(), // lossy, because a path need not be UTF-8
        "project": status.project,
        "queued": {
            "records": status.queued,
            "bytes": status.queued_bytes,
            "oldest_seconds": status.oldest.map(|oldest| oldest.as_secs()),
        },
        "dead_letters": {"records": status.dead_letters, "bytes": status.dead_letters_bytes},
        "copies": {"records": status.copies, "bytes": status.copies_bytes},
    });
    out.either(&value, || status_text(&status))?;
    Ok(Outcome::Done)
}

fn status_text(status: &QueueStatus) -> String {
    let oldest =
        status.oldest.map(|oldest| format!(", the oldest {} old", duration(oldest))).unwrap_or_default();
    let hint = if status.dead_letters > 0 { " (see `threadkeep queue dead-letters`)" } else { "" };
    format!(
        "file          {}\nproject       {}\nqueued        {} writes, {}{oldest}\ndead letters  {}, {}{hint}\n\
         copies        {}, {}",
        status.path.display(),
        status.project.as_deref().unwrap_or("none yet"),
        status.queued,
        size(status.queued_bytes),
        status.dead_letters,
        size(status.dead_letters_bytes),
        status.copies,
        size(status.copies_bytes),
    )
}

pub async fn list(settings: Builder, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    for_each_write(&file, async |write| {
        let entry = QueueEntry::new(&write.record, write.queued_at, write.base.is_some());
        out.either(&entry, || {
            format!("{}\t{}\t{} bytes\tqueued {}", shown(entry.key), entry.kind, entry.bytes, entry.queued_at)
        })
    })
    .await?;
    Ok(Outcome::Done)
}

/// Calls `each` with every queued write in queue order, and returns their number.
pub async fn for_each_write(
    file: &QueueAdmin,
    mut each: impl AsyncFnMut(&QueuedWrite) -> Result<(), Failure>,
) -> Result<usize, Failure> {
    let (mut count, mut page) = (0, file.queued(None).await?);
    while let Some(last) = page.last() {
        for write in &page {
            each(write).await?;
        }
        count += page.len();
        page = file.queued(Some(last)).await?;
    }
    Ok(count)
}

/// Calls `each` with every dead letter in order, and returns their number.
pub async fn for_each_letter(
    file: &QueueAdmin,
    mut each: impl AsyncFnMut(&DeadLetter) -> Result<(), Failure>,
) -> Result<usize, Failure> {
    let (mut count, mut page) = (0, file.dead_letters(None).await?);
    while let Some(last) = page.last() {
        for letter in &page {
            each(letter).await?;
        }
        count += page.len();
        page = file.dead_letters(Some(last)).await?;
    }
    Ok(count)
}

pub async fn export(settings: Builder, export: &Export, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue().await?;
    let mut lines = ExportTarget::open(&export.to, out)?;
    let writes =
        for_each_write(&file, async |write| lines.write(&export_line::of_write(write, file.project())?))
            .await?;
    let letters = for_each_letter(&file, async |letter| {
        lines.write(&export_line::of_dead_letter(letter, file.project())?)
    })
    .await?;
    lines.finish()?;
    tell(&format!("exported {writes} queued writes and {letters} dead letters"));
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
