//! Every knob in one table, and the composition root that opens a cache from it.
//!
//! Only this module reads the environment. The table drives parsing, the README's list and `.env.example`; a test
//! compares them.

mod builder;
mod dotenv;
mod key;
#[cfg(feature = "cli")]
mod plan;

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::cache::OnOutage;
use crate::record::LARGEST;
use crate::supabase;

pub use builder::Builder;
#[cfg(feature = "cli")]
pub(crate) use plan::Plan;

/// Where conversations are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// One SQLite file.
    Local,
    /// A Supabase project.
    Supabase,
    /// The memory of the process: lost when it ends.
    Memory,
}

/// A setting, as it is documented and parsed.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable.
    pub name: &'static str,
    /// What holds when it is unset or empty; empty where nothing does.
    pub default: &'static str,
    /// What it is for.
    pub what: &'static str,
    /// The backend that it matters to; `None` for all of them.
    pub backend: Option<Backend>,
    /// Takes the value in, or says what would be right.
    set: fn(&mut Builder, &str) -> Result<(), String>,
}

/// What each span may be, whether it comes as text or by a setter.
const TTL: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_secs(100 * 366 * 86_400);
const DEADLINE: RangeInclusive<Duration> = Duration::from_millis(50)..=Duration::from_secs(300);
const FRESH_FOR: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(86_400);
const PATIENCE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);
/// The same for bytes.
const VALUE_BYTES: RangeInclusive<usize> = 1..=LARGEST;
const ANY_BYTES: RangeInclusive<usize> = 0..=usize::MAX;

/// All settings.
pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "CONVERSATION_STORAGE_BACKEND",
        default: "local",
        what: "where conversations are kept: `local` (one SQLite file), `supabase`, or `memory` (lost on restart)",
        backend: None,
        set: |builder, text| {
            builder.backend = match text {
                "local" => Backend::Local,
                "supabase" => Backend::Supabase,
                "memory" => Backend::Memory,
                _ => return Err("use `local`, `supabase` or `memory`".into()),
            };
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_TIMEOUT_HOURS",
        default: "24",
        what: "how long a thread lives after its last write, in hours; fractions are possible",
        backend: None,
        set: |builder, text| {
            let hours: f64 = text.parse().unwrap_or(f64::NAN);
            let span = Duration::try_from_secs_f64(hours * 3600.0).ok().filter(|span| TTL.contains(span));
            builder.limits.ttl =
                span.ok_or("use a number of hours above 0 and up to 100 years, such as 24 or 0.5")?;
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_LOCAL_PATH",
        default: "./threadkeep.db",
        what: "the file of the backend `local`; a local disk, not a network share",
        backend: Some(Backend::Local),
        set: |builder, text| {
            builder.local_path = text.into();
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_QUEUE_PATH",
        default: "./threadkeep-queue.db",
        what: "the file that keeps writes and last known copies while Supabase is away; a local disk, not a network share",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            builder.queue_path = text.into();
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_QUEUE_BYTES",
        default: "256MiB",
        what: "queued writes and dead letters in that file: bytes, or KiB, MiB or GiB; beyond it writes are refused",
        backend: Some(Backend::Supabase),
        set: |builder, text| bytes(text, &ANY_BYTES).map(|bytes| builder.spool.queue = bytes as u64),
    },
    Setting {
        name: "CONVERSATION_REPLICA_BYTES",
        default: "256MiB",
        what: "last known copies in that file: bytes, or KiB, MiB or GiB; those written first go first",
        backend: Some(Backend::Supabase),
        set: |builder, text| bytes(text, &ANY_BYTES).map(|bytes| builder.spool.replica = bytes as u64),
    },
    Setting {
        name: "CONVERSATION_ON_OUTAGE",
        default: "queue",
        what: "a write while Supabase is away: `queue` it on disk, or `reject` it",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            builder.limits.on_outage = match text {
                "queue" => OnOutage::Queue,
                "reject" => OnOutage::Reject,
                _ => return Err("use `queue` or `reject`".into()),
            };
            Ok(())
        },
    },
    Setting {
        name: "SUPABASE_URL",
        default: "",
        what: "the project's URL, such as https://PROJECT.supabase.co",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            supabase::check_url(text)?;
            builder.url = Some(text.into());
            Ok(())
        },
    },
    Setting {
        name: "SUPABASE_PROJECT_ID",
        default: "",
        what: "gives the URL where SUPABASE_URL is empty",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                return Err("use the project's reference, which has only letters and digits".into());
            }
            builder.project = Some(text.into());
            Ok(())
        },
    },
    Setting {
        name: key::NAME,
        default: "",
        what: "the secret (service role) key, `sb_secret_…` or the legacy JWT; not the anon key, which is public",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            supabase::check_key(text)?;
            builder.set_key(key::NAME, text, None);
            Ok(())
        },
    },
    Setting {
        name: key::FILE,
        default: "",
        what: "a file that holds the key, instead of SUPABASE_KEY; read again when Supabase refuses the key",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            if builder.key.is_some() {
                return Err("SUPABASE_KEY is set as well; use one of them".into());
            }
            let (found, file) = key::of_file(text)?;
            supabase::check_key(&found)?;
            builder.set_key(key::FILE, &found, Some(file));
            Ok(())
        },
    },
    Setting {
        name: key::SECRET,
        default: "",
        what: "Supabase's own name for the key, `sb_secret_…`; taken if neither SUPABASE_KEY nor SUPABASE_KEY_FILE is set",
        backend: Some(Backend::Supabase),
        set: |builder, text| builder.take_key_of_supabase(key::SECRET, text),
    },
    Setting {
        name: key::SERVICE_ROLE,
        default: "",
        what: "Supabase's own name for the legacy key; taken if none of the three above is set",
        backend: Some(Backend::Supabase),
        set: |builder, text| builder.take_key_of_supabase(key::SERVICE_ROLE, text),
    },
    Setting {
        name: "SUPABASE_TIMEOUT_SECONDS",
        default: "5",
        what: "how long one small request may take; large ones get more",
        backend: Some(Backend::Supabase),
        set: |builder, text| seconds(text, &DEADLINE).map(|span| builder.deadline = span),
    },
    Setting {
        name: "CONVERSATION_STRICT",
        default: "false",
        what: "`true`: `supabase` without URL or key is an error, instead of a warning and the backend `memory`",
        backend: None,
        set: |builder, text| {
            builder.strict = text.parse().map_err(|_| "use `true` or `false`")?;
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_MAX_BYTES",
        default: "8MiB",
        what: "the largest conversation, as JSON: bytes, or KiB or MiB",
        backend: None,
        set: |builder, text| bytes(text, &VALUE_BYTES).map(|bytes| builder.limits.value_bytes = bytes),
    },
    Setting {
        name: "CONVERSATION_CACHE_BYTES",
        default: "256MiB",
        what: "threads in memory: bytes, or KiB, MiB or GiB; the least recently used go first",
        backend: None,
        set: |builder, text| bytes(text, &ANY_BYTES).map(|bytes| builder.limits.memory_bytes = bytes as u64),
    },
    Setting {
        name: "CONVERSATION_WARM_THREADS",
        default: "10000",
        what: "how many of the newest threads come into memory at the start, up to half of the memory; 0 for none",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            builder.warm_threads =
                text.parse().map_err(|_| "use a number of threads, such as 10000, or 0")?;
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_FRESH_SECONDS",
        default: "30",
        what: "how long a thread in memory is handed out before Supabase is asked whether another daemon changed it",
        backend: Some(Backend::Supabase),
        set: |builder, text| seconds(text, &FRESH_FOR).map(|span| builder.fresh_for = span),
    },
    Setting {
        name: "CONVERSATION_PATIENCE_SECONDS",
        default: "1",
        what: "how long a read that has a stale copy waits for Supabase, and a write before it is queued",
        backend: None,
        set: |builder, text| seconds(text, &PATIENCE).map(|span| builder.limits.patience = span),
    },
];

fn seconds(text: &str, range: &RangeInclusive<Duration>) -> Result<Duration, String> {
    let seconds: f64 = text.parse().unwrap_or(f64::NAN);
    let span = Duration::try_from_secs_f64(seconds).ok().filter(|span| range.contains(span));
    span.ok_or_else(|| {
        let (least, most) = (range.start().as_secs_f64(), range.end().as_secs_f64());
        format!("use a number of seconds from {least} to {most}")
    })
}

fn bytes(text: &str, range: &RangeInclusive<usize>) -> Result<usize, String> {
    let (digits, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let unit = match unit.trim() {
        "" => Some(1_usize),
        "KiB" => Some(1 << 10),
        "MiB" => Some(1 << 20),
        "GiB" => Some(1 << 30),
        _ => None,
    };
    let bytes =
        unit.zip(digits.parse().ok()).and_then(|(unit, count): (usize, usize)| count.checked_mul(unit));
    bytes.filter(|bytes| range.contains(bytes)).ok_or_else(|| wrong_bytes(range))
}

fn wrong_bytes(range: &RangeInclusive<usize>) -> String {
    let (least, most) = (range.start(), range.end());
    let most = if *most == usize::MAX { String::new() } else { format!(", at most {most}") };
    format!("use a number of bytes of at least {least}{most}, such as 1048576 or 1MiB")
}
