//! A small file system in memory.

use std::path::Path;
use std::process::Command;

pub struct Mount {
    directory: tempfile::TempDir,
}

impl Mount {
    /// Mounts a tmpfs of this size, in the notation of `mount`.
    pub fn tmpfs(size: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={size},mode=0777");
        let path = directory.path().to_str().unwrap();
        let mounted = as_root(&["mount", "-t", "tmpfs", "-o", &options, "none", path]);
        assert!(
            mounted,
            "cannot mount a small disk; run this test as root or as a user with `sudo -n mount`, and in a container with \
             the capability SYS_ADMIN"
        );
        Self { directory }
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    pub fn remount(&self, option: &str) {
        let path = self.path().to_str().unwrap();
        assert!(as_root(&["mount", "-o", &format!("remount,{option}"), path]), "remount {option}");
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        as_root(&["umount", "-l", self.path().to_str().unwrap()]);
    }
}

/// Runs a command as root, and returns true if it succeeds.
fn as_root(command: &[&str]) -> bool {
    let sudo: &[&str] = if is_root() { &[] } else { &["sudo", "-n"] };
    let all: Vec<&str> = sudo.iter().chain(command).copied().collect();
    Command::new(all[0]).args(&all[1..]).status().is_ok_and(|status| status.success())
}

fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0)
}
