//! The body of a response, read up to a limit (I12). A server may send without end.

use crate::model::json::{EXPANSION, LARGEST};

/// The size at which a response of `threadkeep_load` or `threadkeep_list` takes no further record.
const MAX_PAGE_BYTES: usize = 16 << 20;
/// The bytes of the keys, users and versions of a page.
const PAGE_OVERHEAD: usize = 2 << 20;
/// The largest text that `jsonb` makes of the largest document.
///
/// `jsonb` adds a space after each comma and each colon, so `[1,1]` grows by half. It also writes numbers in full.
const MAX_DOCUMENT_BYTES: usize = LARGEST / 2 * 3 + EXPANSION;

/// Limits a response with records: one page, and one record with its metadata that crosses the end of the page.
pub(super) const MAX_RECORDS_BODY: usize = MAX_PAGE_BYTES + PAGE_OVERHEAD + 2 * MAX_DOCUMENT_BYTES;
/// Limits any other response. 500 outcomes take 50 KiB.
pub(super) const MAX_OUTCOMES_BODY: usize = 1 << 20;
/// Limits a response with an error status.
pub(super) const MAX_ERROR_BODY: usize = 64 << 10;
/// The size of the head, which tells a response of the functions from any other.
const HEAD_BYTES: usize = 64 << 10;

/// A body, as far as it has been read.
#[derive(Debug)]
pub(super) struct ResponseBody {
    pub(super) bytes: Vec<u8>,
    limit: usize,
}

impl ResponseBody {
    /// Creates an empty body for at most `limit` bytes. The server announces `expected` bytes.
    pub(super) fn new(limit: usize, expected: Option<u64>) -> Self {
        let expected = expected.map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        // Reserves one page at most, because a server may announce any size.
        Self { bytes: Vec::with_capacity(expected.min(limit).min(MAX_PAGE_BYTES)), limit }
    }

    /// Appends a part, up to one byte over the limit. Returns false if the reading must stop: the body exceeds its limit, or its
    /// head cannot belong to a response of the functions.
    ///
    /// Such a response has the time before any long field, even if a server has sorted the names.
    pub(super) fn push(&mut self, part: &[u8]) -> bool {
        const NOW: &[u8] = b"\"now\"";
        let room = self.limit + 1 - self.bytes.len();
        self.bytes.extend_from_slice(&part[..part.len().min(room)]);
        let begins_like_a_response = || {
            let head = self.bytes[..HEAD_BYTES].trim_ascii_start();
            head.starts_with(b"{") && head.windows(NOW.len()).any(|part| part == NOW)
        };
        let is_judged = self.limit > HEAD_BYTES && self.bytes.len() >= HEAD_BYTES;
        self.bytes.len() <= self.limit && (!is_judged || begins_like_a_response())
    }
}
