//! The table of settings: name, default, description and parser of each.

use std::ops::RangeInclusive;
use std::time::Duration;

use super::builder::Builder;
use super::{Backend, invalid, key, malformed};
use crate::cache::OnOutage;
use crate::error::Result;
use crate::model::json::LARGEST;
use crate::store::supabase;

/// A setting, with its documentation and its parser.
#[derive(Debug)]
pub struct Setting {
    /// The environment variable.
    pub name: &'static str,
    /// The value of an unset or empty variable. Empty if the setting has no default.
    pub default: &'static str,
    /// The effect of the setting.
    pub description: &'static str,
    /// The backend that uses the setting; `None` if all backends use it.
    pub backend: Option<Backend>,
    /// Parses the text and sets the value.
    pub(super) set: fn(&mut Builder, &str) -> Result<()>,
}

// Texts and setters share these ranges, so both reject the same values.
pub(super) const TTL_RANGE: RangeInclusive<Duration> =
    Duration::from_millis(1)..=Duration::from_secs(100 * 366 * 86_400);
pub(super) const TIMEOUT_RANGE: RangeInclusive<Duration> =
    Duration::from_millis(50)..=Duration::from_secs(300);
pub(super) const FRESH_FOR_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(86_400);
/// Zero turns the feed off, and is no interval.
pub(super) const FEED_INTERVAL_RANGE: RangeInclusive<Duration> =
    Duration::from_millis(10)..=Duration::from_secs(3600);
pub(super) const SOFT_TIMEOUT_RANGE: RangeInclusive<Duration> = Duration::ZERO..=Duration::from_secs(60);
pub(super) const VALUE_BYTES_RANGE: RangeInclusive<usize> = 1..=LARGEST;
const ANY_BYTES: RangeInclusive<usize> = 0..=usize::MAX;

/// All settings, in the order of the documentation.
pub const SETTINGS: &[Setting] = &[
    Setting {
        name: "CONVERSATION_STORAGE_BACKEND",
        default: "local",
        description: "the store: `local` (one SQLite file), `supabase`, or `memory` (lost on restart)",
        backend: None,
        set: |builder, text| {
            let backend = match text {
                "local" => Ok(Backend::Local),
                "supabase" => Ok(Backend::Supabase),
                "memory" => Ok(Backend::Memory),
                _ => Err(malformed("use `local`, `supabase` or `memory`")),
            };
            put(&mut builder.config.backend, backend)
        },
    },
    Setting {
        name: "CONVERSATION_TIMEOUT_HOURS",
        default: "24",
        description: "time to live of a conversation after its last write, in hours, such as 24 or 0.5",
        backend: None,
        set: |builder, text| {
            let remedy = "use a number of hours above 0 and up to 100 years, such as 24 or 0.5";
            put(&mut builder.limits.ttl, span(text, 3600.0, &TTL_RANGE).ok_or_else(|| malformed(remedy)))
        },
    },
    Setting {
        name: "CONVERSATION_LOCAL_PATH",
        default: "./threadkeep.db",
        description: "the file of the backend `local`; it needs a local disk, not a network share",
        backend: Some(Backend::Local),
        set: |builder, text| put(&mut builder.config.local_path, Ok(text.into())),
    },
    Setting {
        name: "CONVERSATION_QUEUE_PATH",
        default: "./threadkeep-queue.db",
        description: "the outage file of the backend `supabase`: queue, dead letters and replica; it needs a local disk, not a network share",
        backend: Some(Backend::Supabase),
        set: |builder, text| put(&mut builder.config.queue_path, Ok(text.into())),
    },
    Setting {
        name: "CONVERSATION_QUEUE_MAX_BYTES",
        default: "256MiB",
        description: "limit on queued writes and dead letters in the outage file, in bytes, KiB, MiB or GiB; beyond it, writes are refused",
        backend: Some(Backend::Supabase),
        set: |builder, text| put(&mut builder.config.queue_max_bytes, bytes(text, &ANY_BYTES)),
    },
    Setting {
        name: "CONVERSATION_REPLICA_MAX_BYTES",
        default: "256MiB",
        description: "limit on the replica in the outage file, in bytes, KiB, MiB or GiB; beyond it, the entries written first are evicted",
        backend: Some(Backend::Supabase),
        set: |builder, text| put(&mut builder.config.replica_max_bytes, bytes(text, &ANY_BYTES)),
    },
    Setting {
        name: "CONVERSATION_ON_OUTAGE",
        default: "queue",
        description: "a write while Supabase is unavailable: `queue` it on disk, or `reject` it",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            let choice = match text {
                "queue" => Ok(OnOutage::Queue),
                "reject" => Ok(OnOutage::Reject),
                _ => Err(malformed("use `queue` or `reject`")),
            };
            put(&mut builder.limits.on_outage, choice)
        },
    },
    Setting {
        name: "SUPABASE_URL",
        default: "",
        description: "the project's URL, such as https://PROJECT.supabase.co",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            supabase::check_url(text)?;
            builder.config.url = Some(text.into());
            Ok(())
        },
    },
    Setting {
        name: "SUPABASE_PROJECT_ID",
        default: "",
        description: "the project's reference; it gives the URL if SUPABASE_URL is not set",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
                return Err(malformed("use the project's reference, which has only letters and digits"));
            }
            builder.project = Some(text.into());
            Ok(())
        },
    },
    Setting {
        name: key::NAME,
        default: "",
        description: "the secret (service role) key, `sb_secret_…` or the legacy JWT; not the anon key, which is public",
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
        description: "a file that holds the key, instead of SUPABASE_KEY; threadkeep reads it again if Supabase rejects the key",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            if builder.config.key.is_some() {
                return Err(invalid("and SUPABASE_KEY are both set", "set only one of them"));
            }
            let (key, provider) = key::from_file(text)?;
            supabase::check_key(&key)?;
            builder.set_key(key::FILE, &key, Some(provider));
            Ok(())
        },
    },
    Setting {
        name: key::SECRET,
        default: "",
        description: "Supabase's own name for the key, `sb_secret_…`; used if neither SUPABASE_KEY nor SUPABASE_KEY_FILE is set",
        backend: Some(Backend::Supabase),
        set: |builder, text| builder.set_fallback_key(key::SECRET, text),
    },
    Setting {
        name: key::SERVICE_ROLE,
        default: "",
        description: "Supabase's own name for the legacy key; used if none of the three above is set",
        backend: Some(Backend::Supabase),
        set: |builder, text| builder.set_fallback_key(key::SERVICE_ROLE, text),
    },
    Setting {
        name: "SUPABASE_TIMEOUT_SECONDS",
        default: "5",
        description: "time limit of one small request; large requests get more",
        backend: Some(Backend::Supabase),
        set: |builder, text| put(&mut builder.config.timeout, seconds(text, &TIMEOUT_RANGE)),
    },
    Setting {
        name: "CONVERSATION_STRICT",
        default: "false",
        description: "`true`: `supabase` without URL or key is an error, instead of a warning and the backend `memory`",
        backend: None,
        set: |builder, text| {
            put(&mut builder.config.is_strict, text.parse().map_err(|_| malformed("use `true` or `false`")))
        },
    },
    Setting {
        name: "CONVERSATION_MAX_VALUE_BYTES",
        default: "8MiB",
        description: "limit on one conversation as JSON, in bytes, KiB or MiB",
        backend: None,
        set: |builder, text| put(&mut builder.limits.value_bytes, bytes(text, &VALUE_BYTES_RANGE)),
    },
    Setting {
        name: "CONVERSATION_CACHE_MAX_BYTES",
        default: "256MiB",
        description: "limit on conversations in memory, in bytes, KiB, MiB or GiB; beyond it, the least recently used are evicted",
        backend: None,
        set: |builder, text| put(&mut builder.limits.memory_bytes, bytes(text, &ANY_BYTES)),
    },
    Setting {
        name: "CONVERSATION_WARMUP_LIMIT",
        default: "10000",
        description: "number of newest conversations that warm-up loads into up to half of the memory; 0 disables warm-up",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            builder.limits.warmup_limit =
                text.parse().map_err(|_| malformed("use a number of conversations, such as 10000, or 0"))?;
            Ok(())
        },
    },
    Setting {
        name: "CONVERSATION_FRESH_SECONDS",
        default: "30",
        description: "age up to which a conversation in memory is fresh; later reads ask Supabase for changes of other daemons; 0 turns the change feed off, too",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            put(builder.limits.fresh_for.get_or_insert_default(), seconds(text, &FRESH_FOR_RANGE))
        },
    },
    Setting {
        name: "CONVERSATION_FEED_INTERVAL_SECONDS",
        default: "2",
        description: "interval of the change feed, which keeps unchanged conversations in memory fresh; it must be below CONVERSATION_FRESH_SECONDS; 0 turns the feed off",
        backend: Some(Backend::Supabase),
        set: |builder, text| {
            let is_off = text.parse() == Ok(0.0);
            let interval = is_off.then_some(Duration::ZERO).or_else(|| span(text, 1.0, &FEED_INTERVAL_RANGE));
            let remedy = "use a number of seconds from 0.01 to 3600, or 0";
            put(&mut builder.limits.feed_interval, interval.ok_or_else(|| malformed(remedy)))
        },
    },
    Setting {
        name: "CONVERSATION_SOFT_TIMEOUT_SECONDS",
        default: "1",
        description: "wait for Supabase before a read returns its stale copy, and before a write is queued",
        backend: None,
        set: |builder, text| put(&mut builder.limits.soft_timeout, seconds(text, &SOFT_TIMEOUT_RANGE)),
    },
];

fn put<T>(field: &mut T, value: Result<T>) -> Result<()> {
    *field = value?;
    Ok(())
}

/// Parses a number of units of time, with or without a fraction.
fn span(text: &str, unit_seconds: f64, range: &RangeInclusive<Duration>) -> Option<Duration> {
    let number: f64 = text.parse().ok()?;
    Duration::try_from_secs_f64(number * unit_seconds).ok().filter(|span| range.contains(span))
}

fn seconds(text: &str, range: &RangeInclusive<Duration>) -> Result<Duration> {
    span(text, 1.0, range).ok_or_else(|| {
        let (min, max) = (range.start().as_secs_f64(), range.end().as_secs_f64());
        malformed(format!("use a number of seconds from {min} to {max}"))
    })
}

/// Parses a number of bytes, with an optional unit.
fn bytes<T: TryFrom<usize>>(text: &str, range: &RangeInclusive<usize>) -> Result<T> {
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
    let bytes = bytes.filter(|bytes| range.contains(bytes)).and_then(|bytes| bytes.try_into().ok());
    bytes.ok_or_else(|| malformed(bytes_remedy(range)))
}

pub(super) fn bytes_remedy(range: &RangeInclusive<usize>) -> String {
    let (min, max) = (range.start(), range.end());
    let max = if *max == usize::MAX { String::new() } else { format!(", at most {max}") };
    format!("use a number of bytes of at least {min}{max}, such as 1048576 or 1MiB")
}
