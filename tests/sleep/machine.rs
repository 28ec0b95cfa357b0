//! A simulated machine: a separate process in which `clocks.c` moves the clocks.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

/// The variable that gives a child process the path of the clock file.
const CLOCKS_FILE_VARIABLE: &str = "CLOCKS_FILE";

/// The clocks of this process.
pub struct Machine {
    file: PathBuf,
}

impl Machine {
    /// Suspends the machine: all clocks except the monotonic clock advance.
    pub fn sleep(&self, duration: Duration) {
        self.step(millis(duration), millis(duration));
    }

    /// Pauses the virtual machine: no monotonic clock advances, and the system clock is set afterwards.
    pub fn pause(&self, duration: Duration) {
        self.step(millis(duration), 0);
    }

    /// Sets the system clock forward or back.
    pub fn set_clock(&self, by: i64) {
        self.step(by, 0);
    }

    /// Returns another handle to the same clocks.
    pub fn handle(&self) -> Self {
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

pub fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap()
}

/// Makes the clock file, and returns the environment of a process with these clocks.
pub fn environment(file: &Path) -> [(String, String); 2] {
    std::fs::write(file, [0; 16]).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    [("LD_PRELOAD".to_owned(), text(library())), (CLOCKS_FILE_VARIABLE.to_owned(), text(file))]
}

pub fn with_clocks(file: &Path) -> Machine {
    Machine { file: file.to_owned() }
}

/// Runs this test again in a child process with simulated clocks. The child process runs the body.
pub fn run_on_machine(test: &str, body: impl AsyncFnOnce(Machine)) {
    if let Some(file) = std::env::var_os(CLOCKS_FILE_VARIABLE) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        return runtime.unwrap().block_on(body(Machine { file: file.into() }));
    }
    let directory = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture"]).envs(environment(&directory.path().join("clocks")));
    let output = child.output().unwrap();
    let output_text =
        [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(output.status.success(), "{test} fails on the simulated machine:\n{output_text}");
    assert!(output_text.contains("1 passed"), "the binary has no test {test}:\n{output_text}");
}

/// Compiles `clocks.c` and returns the path of the library.
fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sleep/clocks.c");
        let (new, built) =
            (folder.join(format!("clocks-{}.so", std::process::id())), folder.join("clocks.so"));
        let mut compile = Command::new("cc");
        compile.args(["-shared", "-fPIC", "-O2", "-o"]).arg(&new).arg(source).arg("-ldl");
        assert!(compile.status().unwrap().success(), "clocks.c does not compile");
        // Another test run may have the old library loaded. A rename leaves that file intact.
        std::fs::rename(new, &built).unwrap();
        built
    })
}
