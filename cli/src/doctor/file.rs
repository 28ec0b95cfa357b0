//! Checks the local file and its disk without changing them.

use std::path::{Path, PathBuf};

use super::path_info::{DiskKind, PathInfo};
use super::report::Report;
use crate::output::{counted, duration, size};
use threadkeep::tools::{
    FileSummary, Inspection, ResolvedConfig, inspect_local, inspect_outage_file, origin_of,
};
use threadkeep::{Backend, Error};

const CHECK: &str = "file";
const MIB: u64 = 1 << 20;
/// A disk with less free space counts as full.
const MIN_FREE: u64 = 16 * MIB;
/// With less free space, the file of the backend `local` may fill the disk soon.
const LOW_FREE: u64 = 256 * MIB;

/// The checked file and its setting.
struct Subject {
    path: PathBuf,
    setting: &'static str,
    is_queue: bool,
}

pub async fn check(config: &ResolvedConfig, report: &mut Report<'_>) {
    let is_queue = config.backend != Backend::Local;
    let (path, setting) = match is_queue {
        true => (&config.queue_path, "CONVERSATION_QUEUE_PATH"),
        false => (&config.local_path, "CONVERSATION_LOCAL_PATH"),
    };
    // The printed path then works in any directory.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let subject = Subject { path, setting, is_queue };
    report.started(CHECK);
    let path = subject.path.clone();
    let inspection = tokio::task::spawn_blocking(move || {
        let inspect = if is_queue { inspect_outage_file } else { inspect_local };
        (PathInfo::of(&path), inspect(&path))
    });
    let (info, inspection) = match inspection.await {
        Ok(found) => found,
        Err(e) => {
            report.failure(CHECK, format!("the inspection panicked: {e}"), "report this as a bug");
            return;
        }
    };
    if config.backend == Backend::Memory {
        return unused_queue(&subject.path, &inspection, report);
    }
    report_inspection(config, &subject, &info, inspection, report);
    if config.backend == Backend::Local {
        let path = config.queue_path.clone();
        if let Ok(inspection) = tokio::task::spawn_blocking(move || inspect_outage_file(&path)).await {
            unused_queue(&config.queue_path, &inspection, report);
        }
    }
    permissions(&info, report);
    quarantined(&subject, &info, report);
    disk_space(config, &subject, &info, report);
    disk(&subject, &info, report);
}

/// Warns about queued writes that the backends `memory` and `local` do not replay.
fn unused_queue(path: &Path, inspection: &Inspection, report: &mut Report<'_>) {
    let (Inspection::Ok(contents) | Inspection::Locked { summary: Some(contents), .. }) = inspection else {
        return;
    };
    if contents.queued.records > 0 {
        let what = format!("{} has {}", path.display(), counted(contents.queued.records, "queued write"));
        let remedy = "set the backend `supabase`, then start the daemon or run `threadkeep queue replay`: no other backend sends the \
             writes to Supabase";
        report.warning(CHECK, what, remedy);
    }
}

fn report_inspection(
    config: &ResolvedConfig,
    subject: &Subject,
    info: &PathInfo,
    inspection: Inspection,
    report: &mut Report<'_>,
) {
    let path = subject.path.display();
    let setting = subject.setting;
    let renamed = info.next_quarantine.display();
    match inspection {
        Inspection::Locked { summary: Some(ref found), .. } | Inspection::Ok(ref found)
            if is_of_another_project(config, subject, found, report) => {}
        Inspection::Locked { holder, summary: found } => {
            let summary = found.as_ref().map(|found| format!("; {}", summary_text(found, subject)));
            let what = format!(
                "{path} is in use by {holder}, as is normal while a daemon runs{}",
                summary.unwrap_or_default()
            );
            report.ok(CHECK, what);
            found.iter().for_each(|found| dead_letters(found, report));
        }
        Inspection::Corrupt(error) => {
            let remedy = match subject.is_queue {
                true => format!(
                    "start the daemon, which renames it to {renamed} and creates a new one; stop it, copy {renamed}, and recover \
                     the copy: `sqlite3 COPY .recover | sqlite3 recovered.db`, then `threadkeep queue import recovered.db`"
                ),
                false => format!("stop the daemon, keep a copy of {path}, and restore it from a backup"),
            };
            report.failure(CHECK, detailed(&error), remedy);
        }
        Inspection::Unusable(error) => {
            let remedy = error.remedy().map_or_else(|| format!("set {setting} to another path"), Into::into);
            report.failure(CHECK, detailed(&error), remedy);
        }
        _ if info.locked.is_some() => {
            let why = info.locked.as_deref().unwrap_or_default();
            let remedy = format!(
                "make the directory and the file writable for the daemon's user (and run doctor as that user), or set \
                 {setting} to a path that is"
            );
            report.failure(CHECK, format!("{path} cannot be written: {why}"), remedy);
        }
        Inspection::Missing => {
            report.ok(CHECK, format!("{path} does not exist yet; a daemon will create it"))
        }
        Inspection::Ok(found) => valid_file(subject, &found, report),
        _ => report.skipped(CHECK, "this version cannot interpret the state of the file"),
    }
}

/// Returns the message of the error with the message of SQLite.
fn detailed(error: &Error) -> String {
    let text = error.message();
    std::error::Error::source(error).map_or_else(|| text.into(), |source| format!("{text} ({source})"))
}

fn valid_file(subject: &Subject, found: &FileSummary, report: &mut Report<'_>) {
    let path = subject.path.display();
    if found.unread_log > 0 {
        let what = format!(
            "a killed process left {} of log beside {path}; only a change of the file can read them",
            size(found.unread_log)
        );
        let remedy = match subject.is_queue {
            true => "start the daemon, or run `threadkeep queue status`: both merge the log into the file",
            false => "start the daemon, which merges the log into the file",
        };
        return report.warning(CHECK, what, remedy);
    }
    let summary = summary_text(found, subject);
    match found.queued.records {
        0 => report.ok(CHECK, format!("{path} is valid: {summary}")),
        _ => report.warning(
            CHECK,
            format!("{path} is valid, and no daemon has it open: {summary}"),
            "start the daemon, or run `threadkeep queue replay`: the queued writes are not in Supabase yet",
        ),
    }
    dead_letters(found, report);
}

fn is_of_another_project(
    config: &ResolvedConfig,
    subject: &Subject,
    found: &FileSummary,
    report: &mut Report<'_>,
) -> bool {
    let own = config.url.as_deref().and_then(origin_of);
    let Some((other, own)) = found.project.as_ref().zip(own).filter(|(other, own)| *other != own) else {
        return false;
    };
    let path = subject.path.display();
    let remedy = format!(
        "set CONVERSATION_QUEUE_PATH to another path, and run `threadkeep queue migrate {path}` if its writes belong to this \
         project; or correct SUPABASE_URL"
    );
    report.failure(CHECK, format!("{path} holds writes for {other}, not for {own}"), remedy);
    true
}

fn dead_letters(found: &FileSummary, report: &mut Report<'_>) {
    if found.dead_letters.records > 0 {
        let letters = counted(found.dead_letters.records, "dead letter");
        let what = format!("the file has {letters}: writes that Supabase did not take");
        report.warning(
            "dead letters",
            what,
            "see `threadkeep queue dead-letters --help`: export and delete, or requeue them",
        );
    }
}

fn summary_text(found: &FileSummary, subject: &Subject) -> String {
    if !subject.is_queue {
        return counted(found.conversations.records, "conversation");
    }
    let oldest = found.oldest.map(|oldest| format!(" (the oldest {} old)", duration(oldest)));
    let queued = counted(found.queued.records, "queued write") + &oldest.unwrap_or_default();
    format!("{queued}, {}", counted(found.conversations.records, "copy"))
}

fn listed(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ")
}

fn permissions(info: &PathInfo, report: &mut Report<'_>) {
    match info.open_to_others.as_slice() {
        [] if !info.is_there => {}
        [] => report.ok("permissions", "only the owner can read the file"),
        open => {
            let what = format!("other users can access {}, which holds conversations", listed(open));
            report.failure("permissions", what, format!("`chmod 600 {}`", listed(open)));
        }
    }
}

fn quarantined(subject: &Subject, info: &PathInfo, report: &mut Report<'_>) {
    if let [first, ..] = info.quarantined.as_slice() {
        let files = counted(info.quarantined.len(), "corrupt file");
        let what = format!("a daemon renamed {files}: {}", listed(&info.quarantined));
        let remedy = match subject.is_queue {
            true => format!(
                "stop the daemon, copy {}, recover the copy (`sqlite3 COPY .recover | sqlite3 recovered.db`), run `threadkeep queue \
                 import recovered.db`, and delete the file",
                first.display()
            ),
            false => "delete the files when nobody needs them any more".into(),
        };
        report.warning("set aside", what, remedy);
    }
}

fn disk_space(config: &ResolvedConfig, subject: &Subject, info: &PathInfo, report: &mut Report<'_>) {
    const CHECK: &str = "disk space";
    report.started(CHECK);
    let Some(free) = info.free else {
        return report.skipped(CHECK, "this platform does not report the free space");
    };
    let free_text = format!("{} has {} free", info.directory.display(), size(free));
    let (queue, all) = match subject.is_queue {
        true => (config.queue_max_bytes, config.queue_max_bytes.saturating_add(config.replica_max_bytes)),
        false => (0, LOW_FREE),
    };
    let (capacity, setting) = (free.saturating_add(info.used), subject.setting);
    let remedy = match subject.is_queue {
        true => format!(
            "free some space, set {setting} to a larger disk, or lower CONVERSATION_QUEUE_MAX_BYTES and CONVERSATION_REPLICA_MAX_BYTES"
        ),
        false => format!("free some space, or set {setting} to a larger disk"),
    };
    if free < MIN_FREE || capacity < queue {
        let need = if capacity < queue {
            format!(", and the queue may take {}", size(queue))
        } else {
            String::new()
        };
        report.failure(CHECK, format!("{free_text}{need}: writes would fail"), remedy);
    } else if capacity < all {
        let need = if subject.is_queue {
            format!("; queue and copies may take {}", size(all))
        } else {
            String::new()
        };
        report.warning(CHECK, format!("{free_text}{need}"), remedy);
    } else {
        report.ok(CHECK, free_text);
    }
}

fn disk(subject: &Subject, info: &PathInfo, report: &mut Report<'_>) {
    let (what, remedy) = match info.disk {
        DiskKind::Persistent => return,
        DiskKind::Network(name) => (
            format!("is a network share ({name}), whose locks and syncs are not reliable for SQLite"),
            "a local disk",
        ),
        DiskKind::Fuse => ("is a FUSE file system, which may be a network share".into(), "a local disk"),
        DiskKind::Tmpfs => ("is in memory: a reboot loses acknowledged writes".into(), "a disk"),
        DiskKind::Overlay => (
            "is an overlay: in a container, the end of the container loses acknowledged writes".into(),
            "a volume that outlives the container",
        ),
    };
    let remedy = format!("set {} to {remedy}", subject.setting);
    report.warning("file system", format!("{} {what}", info.directory.display()), remedy);
}
