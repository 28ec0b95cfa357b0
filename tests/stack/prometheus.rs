//! A private Prometheus, and promtool.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::leash::{self, Leash, Signal};
use super::server::stack_directory;
use super::{MISSING, free_port, wait_until};

/// A running Prometheus. It ends with this value or with the process.
pub struct Prometheus {
    leash: Leash,
    port: u16,
}

impl Prometheus {
    /// Starts Prometheus in a directory with these files. One of them is `prometheus.yml`.
    pub fn start(files: &[(&str, String)]) -> Self {
        let (port, directory) = (free_port(), leash::directory("prometheus"));
        for (name, text) in files {
            std::fs::write(directory.join(name), text).expect("a new file");
        }
        let mut command = Command::new(program("prometheus"));
        command.args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", "--log.level=warn"]);
        command.arg(format!("--web.listen-address=127.0.0.1:{port}"));
        let prometheus = Self { leash: Leash::new(directory, Signal::Kill, &command), port };
        prometheus.leash.start();
        let failure = || format!("Prometheus does not start:\n{}", prometheus.leash.log());
        wait_until(|| prometheus.is_ready(), failure);
        prometheus
    }

    /// Returns the URL of this Prometheus.
    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn is_ready(&self) -> bool {
        let mut status = [0; "HTTP/1.1 200".len()];
        let mut ask = || {
            let mut stream = TcpStream::connect(("127.0.0.1", self.port))?;
            stream.write_all(b"GET /-/ready HTTP/1.1\r\nhost: stack\r\nconnection: close\r\n\r\n")?;
            stream.read_exact(&mut status)
        };
        ask().is_ok() && status.ends_with(b"200")
    }
}

/// Runs promtool in a directory.
pub fn promtool(directory: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(program("promtool"));
    command.args(args).current_dir(directory).output().expect("it is there")
}

/// Panics if the program is missing: a skipped test proves nothing.
fn program(name: &str) -> PathBuf {
    let program = stack_directory().join("prometheus/usr/bin").join(name);
    assert!(program.exists(), "Prometheus is not installed (no {}): {MISSING}", program.display());
    program
}
