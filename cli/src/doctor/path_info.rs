//! Describes the path of a file: the permissions, the free space and the kind of disk.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use threadkeep::tools::quarantine_path;

/// The facts about a path. Reading them changes nothing.
#[derive(Debug, Default)]
pub struct PathInfo {
    pub directory: PathBuf,
    pub is_there: bool,
    /// The path that this process cannot write, with the reason.
    pub locked: Option<String>,
    /// Files that users other than their owner can read or write.
    pub open_to_others: Vec<PathBuf>,
    /// Corrupt files that a daemon renamed, and the name of the next such file.
    pub quarantined: Vec<PathBuf>,
    pub next_quarantine: PathBuf,
    /// The size of the file and its write-ahead log in bytes.
    pub used: u64,
    /// The free bytes of the disk, if the platform reports them.
    pub free: Option<u64>,
    pub disk: DiskKind,
}

/// The kind of a file system, by its durability.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DiskKind {
    #[default]
    Persistent,
    /// A file system of another machine, with the name of its protocol.
    Network(&'static str),
    /// A FUSE file system, which may be on another machine.
    Fuse,
    /// A file system in memory. A reboot deletes it.
    Tmpfs,
    /// An overlay. In a container, the end of the container deletes it.
    Overlay,
}

impl PathInfo {
    /// Reads the facts about a path. The file need not exist.
    pub fn of(path: &Path) -> Self {
        let path = &path.canonicalize().unwrap_or_else(|_| path.into());
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let data = std::fs::metadata(path);
        let len = |suffix| std::fs::metadata(with_suffix(path, suffix)).map_or(0, |data| data.len());
        Self {
            is_there: data.is_ok(),
            locked: locked(&directory, path, data.is_ok()),
            open_to_others: open_to_others(path),
            quarantined: quarantined(&directory, path),
            next_quarantine: quarantine_path(path),
            used: len("") + len("-wal"),
            free: unix::free(&directory),
            disk: unix::disk(&directory),
            directory,
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

/// Checks the directory and the file, because SQLite also writes beside the file.
fn locked(directory: &Path, path: &Path, is_there: bool) -> Option<String> {
    let no_directory = match std::fs::metadata(directory) {
        Ok(data) if data.is_dir() => None,
        Ok(_) => Some("it is not a directory".to_owned()),
        Err(e) => Some(e.to_string()),
    };
    let text = |path: &Path, why: String| format!("{}: {why}", path.display());
    let of_directory = no_directory.or_else(|| unix::refusal(directory, true));
    let of_file = || is_there.then(|| unix::refusal(path, false)).flatten();
    of_directory.map(|why| text(directory, why)).or_else(|| of_file().map(|why| text(path, why)))
}

fn open_to_others(path: &Path) -> Vec<PathBuf> {
    let files = ["", "-wal", "-shm", ".lock"].map(|suffix| with_suffix(path, suffix));
    // A directory or a device is not a file of the daemon.
    files.into_iter().filter(|path| path.is_file() && unix::is_open_to_others(path)).collect()
}

fn quarantined(directory: &Path, path: &Path) -> Vec<PathBuf> {
    let corrupt = with_suffix(path, ".corrupt-");
    let Some(prefix) = corrupt.file_name() else { return Vec::new() };
    let is_quarantined = |name: &OsStr| {
        let number = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
        number.is_some_and(|number| number.iter().all(u8::is_ascii_digit))
    };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|entry| is_quarantined(&entry.file_name())).map(|entry| entry.path()).collect();
    found.sort();
    found
}

#[cfg(unix)]
mod unix {
    use std::path::Path;

    use rustix::fs::{Access, access, statvfs};

    use super::DiskKind;

    /// Returns the reason why this process cannot write the path.
    pub(super) fn refusal(path: &Path, is_directory: bool) -> Option<String> {
        let wanted = if is_directory { Access::WRITE_OK | Access::EXEC_OK } else { Access::WRITE_OK };
        access(path, wanted | Access::READ_OK).err().map(|e| std::io::Error::from(e).to_string())
    }

    pub(super) fn is_open_to_others(path: &Path) -> bool {
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::metadata(path).is_ok_and(|data| data.permissions().mode() & 0o077 != 0)
    }

    pub(super) fn free(directory: &Path) -> Option<u64> {
        let stat = statvfs(directory).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Finds the kind by the magic numbers of Linux's `statfs(2)`.
    #[cfg(target_os = "linux")]
    pub(super) fn disk(directory: &Path) -> DiskKind {
        let Ok(stat) = rustix::fs::statfs(directory) else { return DiskKind::Persistent };
        // The type of `f_type` differs between architectures. The magic numbers have 32 bits.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        match stat.f_type as u32 {
            0x6969 => DiskKind::Network("NFS"),
            0x517b | 0xff53_4d42 | 0xfe53_4d42 => DiskKind::Network("SMB"),
            0x5346_414f | 0x6b41_4653 => DiskKind::Network("AFS"),
            0x00c3_6400 => DiskKind::Network("Ceph"),
            0x0102_1997 => DiskKind::Network("9P"),
            0x7375_7245 => DiskKind::Network("Coda"),
            0x6573_5546 => DiskKind::Fuse,
            0x0102_1994 | 0x8584_58f6 => DiskKind::Tmpfs,
            0x794c_7630 => DiskKind::Overlay,
            _ => DiskKind::Persistent,
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn disk(_: &Path) -> DiskKind {
        DiskKind::Persistent
    }
}

#[cfg(not(unix))]
mod unix {
    use std::path::Path;

    use super::DiskKind;

    pub(super) fn refusal(_: &Path, _: bool) -> Option<String> {
        None
    }

    pub(super) fn is_open_to_others(_: &Path) -> bool {
        false
    }

    pub(super) fn free(_: &Path) -> Option<u64> {
        None
    }

    pub(super) fn disk(_: &Path) -> DiskKind {
        DiskKind::Persistent
    }
}
