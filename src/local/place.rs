//! Where a file lies: who may write and read there, how much room there is, and what kind of disk it is.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use super::file;

/// What is known of a path without touching it.
#[derive(Debug, Default)]
pub(crate) struct Place {
    pub(crate) directory: PathBuf,
    pub(crate) is_there: bool,
    /// What cannot be written, and why.
    pub(crate) locked: Option<String>,
    /// Files that others than their owner can read or write.
    pub(crate) open_to_others: Vec<PathBuf>,
    /// Damaged files that were set aside, and the name of the next one.
    pub(crate) aside: Vec<PathBuf>,
    pub(crate) next_aside: PathBuf,
    /// Bytes that the file and its log take.
    pub(crate) used: u64,
    /// Bytes that it could grow by, where that can be known.
    pub(crate) free: Option<u64>,
    pub(crate) disk: Disk,
}

/// What a file system is good for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Disk {
    #[default]
    Lasting,
    /// Another machine's, by this name.
    Network(&'static str),
    /// Perhaps another machine's.
    Fuse,
    /// Gone with the next boot.
    Memory,
    /// Gone with the container, where it is one's.
    Overlay,
}

impl Place {
    /// Looks at the surroundings of a file that need not exist.
    pub(crate) fn of(path: &Path) -> Self {
        let path = &path.canonicalize().unwrap_or_else(|_| path.into());
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        let data = std::fs::metadata(path);
        let len = |suffix| std::fs::metadata(file::with_suffix(path, suffix)).map_or(0, |data| data.len());
        Self {
            is_there: data.is_ok(),
            locked: locked(&directory, path, data.is_ok()),
            open_to_others: open_to_others(path),
            aside: aside(&directory, path),
            next_aside: file::name_aside(path),
            used: len("") + len("-wal"),
            free: unix::free(&directory),
            disk: unix::disk(&directory),
            directory,
        }
    }
}

/// SQLite also writes beside the file.
fn locked(directory: &Path, path: &Path, is_there: bool) -> Option<String> {
    let no_directory = match std::fs::metadata(directory) {
        Ok(data) if data.is_dir() => None,
        Ok(_) => Some("it is no directory".to_owned()),
        Err(e) => Some(e.to_string()),
    };
    let told = |path: &Path, why: String| format!("{}: {why}", path.display());
    let of_directory = no_directory.or_else(|| unix::refusal(directory, true));
    let of_file = || is_there.then(|| unix::refusal(path, false)).flatten();
    of_directory.map(|why| told(directory, why)).or_else(|| of_file().map(|why| told(path, why)))
}

fn open_to_others(path: &Path) -> Vec<PathBuf> {
    let files = ["", "-wal", "-shm", ".lock"].map(|suffix| file::with_suffix(path, suffix));
    // What is a directory or a device is none of a daemon's.
    files.into_iter().filter(|path| path.is_file() && file::is_open_to_others(path)).collect()
}

fn aside(directory: &Path, path: &Path) -> Vec<PathBuf> {
    let damaged = file::with_suffix(path, ".damaged-");
    let Some(prefix) = damaged.file_name() else { return Vec::new() };
    let is_one = |name: &OsStr| {
        let number = name.as_encoded_bytes().strip_prefix(prefix.as_encoded_bytes());
        number.is_some_and(|number| number.iter().all(u8::is_ascii_digit))
    };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> =
        entries.filter(|entry| is_one(&entry.file_name())).map(|entry| entry.path()).collect();
    found.sort();
    found
}

#[cfg(unix)]
mod unix {
    use std::path::Path;

    use rustix::fs::{Access, access, statvfs};

    use super::Disk;

    /// Why this process may not write there.
    pub(super) fn refusal(path: &Path, is_directory: bool) -> Option<String> {
        let wanted = if is_directory { Access::WRITE_OK | Access::EXEC_OK } else { Access::WRITE_OK };
        access(path, wanted | Access::READ_OK).err().map(|e| std::io::Error::from(e).to_string())
    }

    pub(super) fn free(directory: &Path) -> Option<u64> {
        let stat = statvfs(directory).ok()?;
        Some(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// By the magic numbers of Linux's `statfs(2)`.
    #[cfg(target_os = "linux")]
    pub(super) fn disk(directory: &Path) -> Disk {
        let Ok(stat) = rustix::fs::statfs(directory) else { return Disk::Lasting };
        // The type differs between architectures; the magic numbers have 32 bits.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        match stat.f_type as u32 {
            0x6969 => Disk::Network("NFS"),
            0x517b | 0xff53_4d42 | 0xfe53_4d42 => Disk::Network("SMB"),
            0x5346_414f | 0x6b41_4653 => Disk::Network("AFS"),
            0x00c3_6400 => Disk::Network("Ceph"),
            0x0102_1997 => Disk::Network("9P"),
            0x7375_7245 => Disk::Network("Coda"),
            0x6573_5546 => Disk::Fuse,
            0x0102_1994 | 0x8584_58f6 => Disk::Memory,
            0x794c_7630 => Disk::Overlay,
            _ => Disk::Lasting,
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub(super) fn disk(_: &Path) -> Disk {
        Disk::Lasting
    }
}

#[cfg(not(unix))]
mod unix {
    use std::path::Path;

    use super::Disk;

    pub(super) fn refusal(_: &Path, _: bool) -> Option<String> {
        None
    }

    pub(super) fn free(_: &Path) -> Option<u64> {
        None
    }

    pub(super) fn disk(_: &Path) -> Disk {
        Disk::Lasting
    }
}
