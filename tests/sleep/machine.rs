//! A machine that sleeps: a process of its own, in which `clocks.c` moves the clocks.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// Says in a child whose clocks they are.
const FILE: &str = "CLOCKS_FILE";

/// The clocks of this process.
pub struct Machine {
    file: PathBuf,
}

impl Machine {
    /// Suspend: every clock counts it but the monotonic one.
    pub fn sleeps(&self, span: Duration) {
        self.step(millis(span), millis(span));
    }

    /// A paused virtual machine: no monotonic clock counts it, and the system's clock is set afterwards.
    pub fn is_paused(&self, span: Duration) {
        self.step(millis(span), 0);
    }

    /// The system's clock is set, ahead or back.
    pub fn is_set(&self, by: i64) {
        self.step(by, 0);
    }

    /// Another handle to the same clocks.
    pub fn again(&self) -> Self {
        Self { file: self.file.clone() }
    }

    pub fn step(&self, wall: i64, boot: i64) {
        let mut ahead = [0; 16];
        let file = File::options().read(true).write(true).open(&self.file).unwrap();
        file.read_exact_at(&mut ahead, 0).unwrap();
        let sum = |at: usize, by: i64| i64::from_ne_bytes(ahead[at..at + 8].try_into().unwrap()) + by;
        let sums = [sum(0, wall), sum(8, boot)];
        file.write_all_at(&sums.map(i64::to_ne_bytes).concat(), 0).unwrap();
    }
}

pub fn millis(span: Duration) -> i64 {
    i64::try_from(span.as_millis()).unwrap()
}

/// What a process needs to run on such a machine, whose clocks stand in this file.
pub fn environment(file: &Path) -> [(String, String); 2] {
    std::fs::write(file, [0; 16]).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    [("LD_PRELOAD".to_owned(), text(library())), (FILE.to_owned(), text(file))]
}

pub fn with_clocks(file: &Path) -> Machine {
    Machine { file: file.to_owned() }
}

/// Runs this test of this binary once more, alone, on a machine that can sleep; there it runs the body.
pub fn on_a_machine(test: &str, body: impl AsyncFnOnce(Machine)) {
    if let Some(file) = std::env::var_os(FILE) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return runtime.unwrap().block_on(body(Machine { file: file.into() }));
    }
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).envs(environment(&directory.path().join("clocks")));
    let output = child.output().unwrap();
    let said =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{test}, on a machine that sleeps:\n{said}");
    assert!(said.contains("1 passed"), "there is no test {test}:\n{said}");
}

/// `clocks.c`, compiled.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sleep/clocks.c");
        let (fresh, built) =
            (folder.join(format!("clocks-{}.so", std::process::id())), folder.join("clocks.so"));
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O2", "-o"]).arg(&fresh).arg(source).arg("-ldl");
        assert!(compile.status().unwrap().success(), "clocks.c does not compile");
        // Another run of the tests may have it loaded.
        std::fs::rename(fresh, &built).unwrap();
        built
    })
}
