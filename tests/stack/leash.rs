//! Child processes that cannot outlive the test process.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

/// The signal that stops a server.
#[derive(Clone, Copy)]
pub enum Signal {
    /// Stops the server at once, as a crash does.
    Kill,
    /// Causes PostgreSQL's immediate shutdown, which loses the same data as a crash.
    ///
    /// It also stops the backends. They have process groups of their own, and would keep the shared memory.
    Quit,
}

/// One server with its directory. The script `leash` holds both and explains why it is a script.
pub struct Leash {
    holder: Mutex<Holder>,
    directory: PathBuf,
}

struct Holder {
    running: bool,
    process: Child,
    answers: BufReader<ChildStdout>,
}

impl Leash {
    /// Prepares `command` for an empty `directory` (see [`directory`]). [`Leash::start`] runs the command.
    pub fn new(directory: PathBuf, signal: Signal, command: &Command) -> Self {
        let mut process = Command::new("bash")
            .arg(super::root().join("tests/stack/leash"))
            .arg(match signal {
                Signal::Kill => "KILL",
                Signal::Quit => "QUIT",
            })
            .arg(&directory)
            .arg(command.get_program())
            .args(command.get_args())
            // The developer's PGHOST, PORT or NODE_OPTIONS must not reach the servers.
            .env_clear()
            .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
            .envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))))
            .current_dir(&directory)
            // Ctrl-C reaches the whole process group of the terminal. The leash must outlive the test.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("bash runs");
        let answers = BufReader::new(process.stdout.take().expect("piped above"));
        let holder = Mutex::new(Holder { running: false, process, answers });
        Self { holder, directory }
    }

    /// Starts the command and returns at once.
    pub fn start(&self) {
        self.order("start", true);
    }

    /// Stops the command and waits for its end. The directory stays.
    pub fn stop(&self) {
        self.order("stop", false);
    }

    /// Tells whether the last order was `start`. The server may have failed since.
    pub fn is_running(&self) -> bool {
        self.holder.lock().expect("no order panics").running
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Returns the output of the server, for the message of a failing test.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("log")).unwrap_or_default()
    }

    fn order(&self, order: &str, running: bool) {
        let mut holder = self.holder.lock().expect("no order panics");
        let mut answer = String::new();
        let orders = holder.process.stdin.as_mut().expect("piped");
        let obeyed = writeln!(orders, "{order}").and_then(|()| holder.answers.read_line(&mut answer));
        assert!(obeyed.is_ok() && answer == "done\n", "the leash of {} is gone", self.directory.display());
        holder.running = running;
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        let Ok(holder) = self.holder.get_mut() else { return };
        // `wait` first closes the pipe, and the leash then cleans up.
        let _ = holder.process.wait();
    }
}

/// Creates an empty directory for a server. Its [`Leash`] removes the directory.
pub fn directory(name: &str) -> PathBuf {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let (process, count) = (std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(format!("threadkeep-{name}-{process}-{count}"));
    // A leash removes its directory. Only a power cut leaves a directory behind.
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir(&path).unwrap_or_else(|error| panic!("no directory {}: {error}", path.display()));
    path
}
