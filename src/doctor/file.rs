//! The local file, and the disk that it is on: looked at, and left as it is.

use std::path::PathBuf;

use super::report::{Report, parted};
use crate::blocking::unblock;
use crate::local::look::{self, Contents, Look};
use crate::local::place::{Disk, Place};
use crate::settings::{Backend, Plan};
use crate::supabase;

const CHECK: &str = "file";
const MIB: u64 = 1 << 20;
/// Below this, a disk is as good as full.
const LEAST: u64 = 16 * MIB;
/// Below this, the file of the backend `local` may soon be.
const LITTLE: u64 = 256 * MIB;

/// What a file is for.
struct Subject {
    path: PathBuf,
    setting: &'static str,
    is_queue: bool,
}

pub(super) async fn examine(plan: &Plan, report: &mut Report<'_>) {
    let is_queue = plan.backend != Backend::Local;
    let (path, setting) = match is_queue {
        true => (&plan.queue_path, "CONVERSATION_QUEUE_PATH"),
        false => (&plan.local_path, "CONVERSATION_LOCAL_PATH"),
    };
    // What is said can be used from any directory.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
    let subject = Subject { path, setting, is_queue };
    report.begins(CHECK);
    let path = subject.path.clone();
    let looked = unblock(move || {
        (Place::of(&path), if is_queue { look::at_queue(&path) } else { look::at_truth(&path) })
    });
    let (place, look) = match looked.await {
        Ok(looked) => looked,
        Err(e) => {
            report.failure(CHECK, format!("the look at it ended early: {e}"), "try again");
            return;
        }
    };
    if plan.backend == Backend::Memory {
        return left_behind(&subject, &look, report);
    }
    contents(plan, &subject, &place, look, report);
    surroundings(&subject, &place, report);
    room(plan, &subject, &place, report);
    disk(&subject, &place, report);
}

/// Whoever goes back to memory must not forget what was acknowledged.
fn left_behind(subject: &Subject, look: &Look, report: &mut Report<'_>) {
    let (Look::Whole(contents) | Look::Held(_, Some(contents))) = look else { return };
    if contents.queued.records > 0 {
        let what = format!("{} writes wait in {}", contents.queued.records, subject.path.display());
        let remedy = "they reach Supabase with the backend `supabase` only: set that, and start the daemon or run `threadkeep queue \
             replay`";
        report.warning(CHECK, what, remedy);
    }
}

fn contents(plan: &Plan, subject: &Subject, place: &Place, look: Look, report: &mut Report<'_>) {
    let path = subject.path.display();
    let setting = subject.setting;
    let aside = place.next_aside.display();
    match look {
        Look::Held(_, Some(ref found)) | Look::Whole(ref found)
            if is_of_another_project(plan, subject, found, report) => {}
        Look::Held(holder, found) => {
            let told = found.as_ref().map(|found| format!("; {}", in_words(found, subject)));
            let what = format!(
                "{path} is in use by {holder}, as it is while a daemon runs{}",
                told.unwrap_or_default()
            );
            report.ok(CHECK, what);
            found.iter().for_each(|found| letters(found, report));
        }
        Look::Damaged(error) => {
            let remedy = match subject.is_queue {
                true => format!(
                    "start the daemon, which sets it aside as {aside} and begins a new one; then stop it, and let `threadkeep \
                     queue import {aside}` take what can still be read"
                ),
                false => format!("stop the daemon, keep a copy of {path}, and restore it from a backup"),
            };
            report.failure(CHECK, detailed(&error, ""), remedy);
        }
        Look::Wrong(error) => {
            let (what, remedy) = parted(&error.to_string(), &format!("set {setting} to another path"));
            report.failure(CHECK, detailed(&error, &what), remedy);
        }
        _ if place.locked.is_some() => {
            let why = place.locked.as_deref().unwrap_or_default();
            let remedy = format!(
                "make the directory and the file writable for the daemon's user (and run doctor as that user), or set \
                 {setting} to a place that is"
            );
            report.failure(CHECK, format!("{path} cannot be written: {why}"), remedy);
        }
        Look::Absent => report.ok(CHECK, format!("{path} is not there yet; a daemon will create it")),
        Look::Whole(found) => whole(subject, &found, report),
    }
}

/// With what SQLite says of it.
fn detailed(error: &crate::error::Error, what: &str) -> String {
    let text = if what.is_empty() { parted(&error.to_string(), "").0 } else { what.to_owned() };
    std::error::Error::source(error).map_or(text.clone(), |source| format!("{text} ({source})"))
}

fn whole(subject: &Subject, found: &Contents, report: &mut Report<'_>) {
    let path = subject.path.display();
    if found.unread_log > 0 {
        let what = format!(
            "a process that was killed left {} bytes of log beside {path}: what it holds cannot be told without changing it",
            found.unread_log
        );
        let remedy = match subject.is_queue {
            true => "start the daemon, or run `threadkeep queue status`: both take in the log",
            false => "start the daemon, which takes in the log",
        };
        return report.warning(CHECK, what, remedy);
    }
    let words = in_words(found, subject);
    match found.queued.records {
        0 => report.ok(CHECK, format!("{path} is whole: {words}")),
        _ => report.warning(
            CHECK,
            format!("{path} is whole, and no daemon has it open: {words}"),
            "start the daemon, or run `threadkeep queue replay`: what waits is not in Supabase yet",
        ),
    }
    letters(found, report);
}

fn is_of_another_project(plan: &Plan, subject: &Subject, found: &Contents, report: &mut Report<'_>) -> bool {
    let own = plan.url.as_deref().and_then(supabase::origin_of);
    let Some((other, own)) = found.origin.as_ref().zip(own).filter(|(other, own)| *other != own) else {
        return false;
    };
    let path = subject.path.display();
    let remedy = format!(
        "set CONVERSATION_QUEUE_PATH to another path, and bring its writes over with `threadkeep queue move {path}` if they \
         belong here; or mend SUPABASE_URL"
    );
    report.failure(CHECK, format!("{path} holds writes for {other}, not for {own}"), remedy);
    true
}

fn letters(found: &Contents, report: &mut Report<'_>) {
    if found.dead_letters.records > 0 {
        let what =
            format!("{} writes became dead letters: Supabase did not take them", found.dead_letters.records);
        report.warning(
            "dead letters",
            what,
            "see `threadkeep queue dead --help`: export and forget, or requeue them",
        );
    }
}

fn in_words(found: &Contents, subject: &Subject) -> String {
    if !subject.is_queue {
        return format!("{} conversations", found.threads);
    }
    let oldest = found.oldest.map(|oldest| format!(" (the first for {} s)", oldest.as_secs()));
    let oldest = oldest.unwrap_or_default();
    format!("{} writes wait{oldest}, {} copies", found.queued.records, found.threads)
}

fn surroundings(subject: &Subject, place: &Place, report: &mut Report<'_>) {
    let listed =
        |paths: &[PathBuf]| paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(" ");
    match place.open_to_others.as_slice() {
        [] if !place.is_there => {}
        [] => report.ok("permissions", "only its owner can read it"),
        open => {
            let what = format!("others than its owner can get at {}: conversations are in it", listed(open));
            report.failure("permissions", what, format!("`chmod 600 {}`", listed(open)));
        }
    }
    if let [first, ..] = place.aside.as_slice() {
        let what = format!("{} damaged files were set aside: {}", place.aside.len(), listed(&place.aside));
        let remedy = match subject.is_queue {
            true => format!(
                "stop the daemon, take what can still be read with `threadkeep queue import {}`, and delete it",
                first.display()
            ),
            false => "delete them once they are not needed any more".into(),
        };
        report.warning("set aside", what, remedy);
    }
}

fn room(plan: &Plan, subject: &Subject, place: &Place, report: &mut Report<'_>) {
    const CHECK: &str = "disk space";
    report.begins(CHECK);
    let Some(free) = place.free else { return report.skipped(CHECK, "it cannot be known here") };
    let has = format!("{} has {} free", place.directory.display(), size(free));
    let (queue, all) = match subject.is_queue {
        true => (plan.bounds.queue, plan.bounds.queue.saturating_add(plan.bounds.replica)),
        false => (0, LITTLE),
    };
    let (room, setting) = (free.saturating_add(place.used), subject.setting);
    let remedy = match subject.is_queue {
        true => format!(
            "free some, set {setting} to a larger disk, or lower CONVERSATION_QUEUE_BYTES and CONVERSATION_REPLICA_BYTES"
        ),
        false => format!("free some, or set {setting} to a larger disk"),
    };
    if free < LEAST || room < queue {
        let need =
            if room < queue { format!(", and the queue may take {}", size(queue)) } else { String::new() };
        report.failure(CHECK, format!("{has}{need}: writes would fail"), remedy);
    } else if room < all {
        let need = if subject.is_queue {
            format!("; queue and copies may take {}", size(all))
        } else {
            String::new()
        };
        report.warning(CHECK, format!("{has}{need}"), remedy);
    } else {
        report.ok(CHECK, has);
    }
}

fn disk(subject: &Subject, place: &Place, report: &mut Report<'_>) {
    let (what, remedy) = match place.disk {
        Disk::Lasting => return,
        Disk::Network(name) => (
            format!("is a network share ({name}), on which SQLite's locks and syncs cannot be relied upon"),
            "a local disk",
        ),
        Disk::Fuse => ("is a FUSE file system, which may be a network share".into(), "a local disk"),
        Disk::Memory => ("is in memory: what is acknowledged is gone after a reboot".into(), "a disk"),
        Disk::Overlay => (
            "is an overlay: in a container, what is acknowledged is gone with the container".into(),
            "a volume that outlives the container",
        ),
    };
    let remedy = format!("set {} to {remedy}", subject.setting);
    report.warning("file system", format!("{} {what}", place.directory.display()), remedy);
}

/// Bytes in the unit that fits.
fn size(bytes: u64) -> String {
    match bytes {
        0..MIB => format!("{} KiB", bytes >> 10),
        MIB..0x4000_0000 => format!("{} MiB", bytes / MIB),
        _ => format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64),
    }
}
