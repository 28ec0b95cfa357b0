//! `queue status`, `queue list` and `queue export`: what the file holds.

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::Path;

use serde_json::json;
use threadkeep::{Builder, DeadLetter, QueueFile, QueueStatus, QueuedWrite};

use crate::arguments::Export;
use crate::failure::{Failure, Outcome, tell};
use crate::output::{Entry, Output, shown, size, span};

pub async fn status(settings: Builder, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue_file().await?;
    let status = file.status().await?;
    let value = json!({
        "path": status.path.display().to_string(), // which need not be UTF-8, as JSON is
        "origin": status.origin,
        "queued": {
            "records": status.queued,
            "bytes": status.queued_bytes,
            "oldest_seconds": status.oldest.map(|oldest| oldest.as_secs()),
        },
        "dead_letters": {"records": status.dead_letters, "bytes": status.dead_letters_bytes},
        "copies": {"records": status.copies, "bytes": status.copies_bytes},
    });
    out.either(&value, || in_words(&status))?;
    Ok(Outcome::Done)
}

fn in_words(status: &QueueStatus) -> String {
    let oldest = status.oldest.map(|oldest| format!(", the oldest for {}", span(oldest))).unwrap_or_default();
    let look = if status.dead_letters > 0 { " (see `threadkeep queue dead`)" } else { "" };
    format!(
        "file          {}\norigin        {}\nqueued        {} writes, {}{oldest}\ndead letters  {}, {}{look}\n\
         copies        {}, {}",
        status.path.display(),
        status.origin.as_deref().unwrap_or("none yet"),
        status.queued,
        size(status.queued_bytes),
        status.dead_letters,
        size(status.dead_letters_bytes),
        status.copies,
        size(status.copies_bytes),
    )
}

pub async fn list(settings: Builder, out: &mut Output) -> Result<Outcome, Failure> {
    let file = settings.open_queue_file().await?;
    for_each_write(&file, async |write| {
        let entry = Entry::new(&write.record, write.queued_at, write.base.is_some());
        out.either(&entry, || {
            format!("{}\t{}\t{} bytes\tqueued {}", shown(entry.key), entry.kind, entry.bytes, entry.queued_at)
        })
    })
    .await?;
    Ok(Outcome::Done)
}

/// All queued writes in their order.
pub async fn for_each_write(
    file: &QueueFile,
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

/// All dead letters in their order.
pub async fn for_each_letter(
    file: &QueueFile,
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
    let file = settings.open_queue_file().await?;
    let mut lines = Lines::to(&export.to, out)?;
    let writes = for_each_write(&file, async |write| lines.write(&file.export_write(write)?)).await?;
    let letters = for_each_letter(&file, async |letter| lines.write(&file.export_letter(letter)?)).await?;
    lines.finish()?;
    tell(&format!("exported {writes} queued writes and {letters} dead letters"));
    Ok(Outcome::Done)
}

/// Where an export goes.
pub enum Lines<'a> {
    Out(&'a mut Output),
    File(&'a Path, BufWriter<File>),
}

impl<'a> Lines<'a> {
    /// A new file, for its owner's eyes only, or standard output.
    pub fn to(path: &'a Path, out: &'a mut Output) -> Result<Self, Failure> {
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

    /// On disk when this returns.
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
