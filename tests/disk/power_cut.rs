//! The changes of a disk, and the content of the disk after a power cut.

use std::collections::{BTreeMap, HashMap};

/// A change of the disk. `file` is the last component of the path.
#[derive(Debug, Clone)]
pub enum Change {
    Write {
        file: String,
        at: usize,
        bytes: Vec<u8>,
    },
    Truncate {
        file: String,
        to: usize,
    },
    Sync {
        file: String,
    },
    /// Earlier changes without a sync may never reach the disk, even if a later sync succeeds.
    SyncFailed {
        file: String,
    },
    Delete {
        file: String,
    },
}

/// Returns the files of a directory after a power cut: all synced changes, and a random part of the other changes.
pub fn after_power_cut(changes: &[Change], rng: &mut fastrand::Rng) -> BTreeMap<String, Vec<u8>> {
    let mut disk = BTreeMap::<String, Vec<u8>>::new();
    let mut unsynced = HashMap::<&str, Vec<&Change>>::new();
    for change in changes {
        match change {
            Change::Write { file, .. } | Change::Truncate { file, .. } => {
                unsynced.entry(file).or_default().push(change);
            }
            Change::Sync { file } => {
                let synced = unsynced.remove(file.as_str()).unwrap_or_default();
                synced.into_iter().for_each(|change| apply(&mut disk, change, usize::MAX));
            }
            Change::SyncFailed { file } => apply_randomly(&mut disk, unsynced.remove(file.as_str()), rng),
            Change::Delete { file } => {
                unsynced.remove(file.as_str());
                disk.remove(file);
            }
        }
    }
    unsynced.into_values().for_each(|left| apply_randomly(&mut disk, Some(left), rng));
    disk
}

/// Applies each change completely, in part, or not at all.
///
/// In one of three calls, it applies all changes up to a random point.
fn apply_randomly(
    disk: &mut BTreeMap<String, Vec<u8>>,
    changes: Option<Vec<&Change>>,
    rng: &mut fastrand::Rng,
) {
    let changes = changes.unwrap_or_default();
    let upto = (rng.u8(..3) == 0).then(|| rng.usize(..=changes.len()));
    for (at, change) in changes.into_iter().enumerate() {
        match upto {
            Some(upto) if at < upto => apply(disk, change, usize::MAX),
            Some(upto) if at == upto => apply(disk, change, rng.usize(..5_000)),
            Some(_) => {}
            None => match rng.u8(..3) {
                0 => {}
                1 => apply(disk, change, usize::MAX),
                _ => apply(disk, change, rng.usize(..5_000)),
            },
        }
    }
}

/// Applies a change. For a write, it applies the first `limit` bytes at most.
fn apply(disk: &mut BTreeMap<String, Vec<u8>>, change: &Change, limit: usize) {
    match change {
        Change::Write { file, at, bytes } => {
            let bytes = &bytes[..bytes.len().min(limit)];
            let file = disk.entry(file.clone()).or_default();
            if file.len() < at + bytes.len() {
                file.resize(at + bytes.len(), 0);
            }
            file[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        Change::Truncate { file, to } => {
            disk.entry(file.clone()).or_default().resize(*to, 0);
        }
        _ => {}
    }
}
