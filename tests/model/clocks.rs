//! Jumps of the system clock of this process. All daemons of all worlds share the clock. The stores have the true time.

use std::sync::{LazyLock, Mutex, Once};
use std::time::{Duration, Instant, SystemTime};

use threadkeep::store::Timestamp;

/// The errors of the system clock, in milliseconds. Two of them differ by more than the tolerance of threadkeep (2 s), so each
/// step is a jump.
const ERRORS_MS: [i64; 6] = [0, 3_000, -3_000, 300_000, -300_000, 1_800_000];

static START: LazyLock<(Instant, i64)> = LazyLock::new(|| {
    let system = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    (Instant::now(), i64::try_from(system.as_millis()).unwrap())
});

/// The moment of each jump, and its size in milliseconds.
static JUMPS: Mutex<Vec<(Instant, i64)>> = Mutex::new(Vec::new());

/// Returns the true time. Jumps do not change it.
pub fn true_time() -> Timestamp {
    let (start, system) = *START;
    Timestamp(system + i64::try_from(start.elapsed().as_millis()).unwrap())
}

/// Lets the system clock jump every few seconds until the process ends.
pub fn start_jumps() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        std::thread::spawn(|| {
            let mut error_ms = 0;
            loop {
                std::thread::sleep(Duration::from_millis(fastrand::u64(300..4_000)));
                let next = if fastrand::bool() { 0 } else { ERRORS_MS[fastrand::usize(..ERRORS_MS.len())] };
                if next != error_ms {
                    // The lock makes the list and the clock change at one moment.
                    let mut jumps = JUMPS.lock().unwrap();
                    jumps.push((Instant::now(), next - error_ms));
                    threadkeep::testing::step_system_clock(next - error_ms);
                    drop(jumps);
                    error_ms = next;
                }
            }
        });
    });
}

pub fn jump_count() -> usize {
    JUMPS.lock().unwrap().len()
}

/// Returns the jumps since a moment, oldest first.
pub fn jumps_since(moment: Instant) -> Vec<(Instant, i64)> {
    let jumps = JUMPS.lock().unwrap();
    let first = jumps.partition_point(|(at, _)| *at < moment);
    jumps[first..].to_vec()
}
