//! The outage files of a world, and the acts of an operator on the file of a daemon that is down.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::history::{FileChange, Moment, Recorder};
use crate::plan::{FileAct, HANDLES, Restart};
use crate::queue;

/// The files that an operator copies. SQLite makes `-shm` again.
const SUFFIXES: [&str; 2] = ["", "-wal"];

#[derive(Debug)]
pub struct Files {
    folder: tempfile::TempDir,
    /// The moment of each handle's last copy.
    backups: Mutex<[Option<Moment>; HANDLES]>,
    changes: Mutex<Vec<FileChange>>,
}

impl Files {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder, backups: Mutex::default(), changes: Mutex::default() }
    }

    pub fn path(&self, handle: usize) -> PathBuf {
        self.folder.path().join(format!("handle-{handle}.db"))
    }

    pub fn changes(&self) -> Vec<FileChange> {
        self.changes.lock().unwrap().clone()
    }

    /// Waits until the last life has closed the file. Reboots, if the machine boots, and carries out the act.
    pub fn restart(&self, handle: usize, Restart { act, reboots, .. }: Restart, recorder: &Recorder) {
        let file = ClosedFile::lock(&self.path(handle));
        if reboots {
            queue::change_boot(&self.path(handle));
            let at = recorder.now();
            self.note(FileChange { handle, at, source: Some((handle, at)) });
        }
        self.act(&file, handle, act, recorder);
    }

    fn act(&self, file: &ClosedFile, handle: usize, act: FileAct, recorder: &Recorder) {
        let mut backups = self.backups.lock().unwrap();
        let other = 1 - handle;
        let source = match act {
            FileAct::Keep => return,
            FileAct::BackUp => {
                file.copy_to(&self.backup_path(handle));
                backups[handle] = Some(recorder.now());
                return;
            }
            FileAct::Move => {
                let (copy, at) = (with_suffix(&self.path(handle), ".moved"), recorder.now());
                file.copy_to(&copy);
                file.replace(&copy);
                Some((handle, at))
            }
            FileAct::RestoreInPlace | FileAct::Restore | FileAct::Clone => {
                let source = if act == FileAct::Clone { other } else { handle };
                let Some(at) = backups[source] else { return };
                match act {
                    FileAct::RestoreInPlace => file.overwrite(&self.backup_path(source)),
                    _ => file.replace(&self.backup_path(source)),
                }
                Some((source, at))
            }
            FileAct::Delete => {
                file.delete();
                None
            }
        };
        self.note(FileChange { handle, at: recorder.now(), source });
    }

    fn note(&self, change: FileChange) {
        self.changes.lock().unwrap().push(change);
    }

    fn backup_path(&self, handle: usize) -> PathBuf {
        with_suffix(&self.path(handle), ".backup")
    }
}

/// The outage file of a daemon that is down. The lock keeps the next life out.
struct ClosedFile {
    path: PathBuf,
    _lock: Option<File>,
}

impl ClosedFile {
    /// Waits until the last life has closed the file.
    fn lock(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(30);
        let lock = File::options().write(true).open(with_suffix(path, ".lock")).ok();
        while let Some(Err(TryLockError::WouldBlock)) = lock.as_ref().map(File::try_lock) {
            assert!(Instant::now() < deadline, "{} is still open", path.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { path: path.to_owned(), _lock: lock }
    }

    /// Copies the file to another path.
    fn copy_to(&self, copy: &Path) {
        copy_files(&self.path, copy);
    }

    /// Replaces the content of the file. The file keeps its inode.
    fn overwrite(&self, copy: &Path) {
        fs::remove_file(with_suffix(&self.path, "-shm")).ok();
        copy_files(copy, &self.path);
    }

    /// Replaces the file by a copy with an inode of its own.
    fn replace(&self, copy: &Path) {
        let new = with_suffix(&self.path, ".new");
        copy_files(copy, &new);
        self.delete();
        for suffix in SUFFIXES {
            let (from, to) = (with_suffix(&new, suffix), with_suffix(&self.path, suffix));
            if from.exists() {
                fs::rename(from, to).unwrap();
            }
        }
    }

    fn delete(&self) {
        for suffix in ["", "-wal", "-shm"] {
            fs::remove_file(with_suffix(&self.path, suffix)).ok();
        }
    }
}

fn copy_files(from: &Path, to: &Path) {
    for suffix in SUFFIXES {
        let (from, to) = (with_suffix(from, suffix), with_suffix(to, suffix));
        if from.exists() {
            fs::copy(from, to).unwrap();
        } else {
            fs::remove_file(to).ok();
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}
