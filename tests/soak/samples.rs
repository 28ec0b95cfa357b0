//! Samples of the daemon's memory and file size, taken after each outage and its replay.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use crate::process::Daemon;

/// The minimum number of samples for a comparison.
const MIN_SAMPLES: usize = 9;
/// The allowed growth in bytes for the allocator and the write-ahead log.
const MAX_GROWTH: u64 = 2 << 20;

pub struct Sample {
    at: Duration,
    resident: u64,
    file: u64,
}

#[derive(Default)]
pub struct Samples(Vec<Sample>);

impl Sample {
    pub fn of(daemon: &Daemon, at: Duration) -> Self {
        let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        let resident = line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024;
        let size = |path: &Path| path.metadata().map_or(0, |file| file.len());
        let path = |name| daemon.directory().join(name);
        let file = size(&path("threadkeep-queue.db")) + size(&path("threadkeep-queue.db-wal"));
        Self { at, resident, file }
    }
}

impl Samples {
    pub fn add(&mut self, sample: Sample) {
        self.0.push(sample);
    }

    /// Asserts that the last third of the samples takes no more than the middle third. The caches fill in the first.
    pub fn assert_flat(&self) {
        if self.0.len() < MIN_SAMPLES {
            return println!("too short to tell whether memory is flat");
        }
        for (subject, size) in
            [("memory", Sample::resident as fn(&Sample) -> u64), ("the file", Sample::file)]
        {
            let (middle, last) = self.thirds(size);
            assert!(
                last <= middle + middle / 20 + MAX_GROWTH,
                "{subject} grows: from {middle} to {last} bytes\n{self}"
            );
        }
    }

    /// Returns the maximum of the middle third and of the last third.
    fn thirds(&self, size: fn(&Sample) -> u64) -> (u64, u64) {
        let third = self.0.len() / 3;
        let max = |samples: &[Sample]| samples.iter().map(size).max().unwrap_or_default();
        (max(&self.0[third..2 * third]), max(&self.0[2 * third..]))
    }
}

impl Sample {
    fn resident(&self) -> u64 {
        self.resident
    }

    fn file(&self) -> u64 {
        self.file
    }
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, resident, file) = (self.at.as_secs(), mib(self.resident), mib(self.file));
        write!(f, "{seconds:>5} s  memory {resident:6.1} MiB  file with log {file:6.1} MiB")
    }
}

impl fmt::Display for Samples {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [memory, file] = [Sample::resident, Sample::file].map(|size| self.thirds(size));
        write!(
            f,
            "{} outages; max memory in the middle third {:.1} MiB, in the last {:.1}; largest file {:.1} MiB, {:.1}",
            self.0.len(),
            mib(memory.0),
            mib(memory.1),
            mib(file.0),
            mib(file.1)
        )
    }
}
