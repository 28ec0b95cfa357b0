//! The log lines of this process.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, Once, PoisonError};

static TEXT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Capture;

impl Write for Capture {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        TEXT.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

pub fn listen() {
    static ONCE: Once = Once::new();
    let subscriber = || tracing_subscriber::fmt().with_ansi(false).with_writer(|| Capture);
    ONCE.call_once(|| subscriber().with_max_level(tracing::Level::WARN).init());
}

/// Returns the log lines that contain the path of `directory`.
pub fn about(directory: &Path) -> Vec<String> {
    let text = TEXT.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let text = String::from_utf8(text).unwrap();
    let name = directory.to_str().unwrap();
    text.lines().filter(|line| line.contains(name)).map(str::to_owned).collect()
}
