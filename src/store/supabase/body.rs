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
    bytes: Vec<u8>,
    limit: usize,
    is_whole: bool,
}

impl ResponseBody {
    /// Creates an empty body for at most `limit` bytes. The server announces `expected` bytes.
    pub(super) fn new(limit: usize, expected: Option<u64>) -> Self {
        let expected = expected.map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        // Reserves one page at most, because a server may announce any size.
        let bytes = Vec::with_capacity(expected.min(limit).min(MAX_PAGE_BYTES));
        Self { bytes, limit, is_whole: true }
    }

    /// Appends a part. Returns false if the body is over its limit, or comes from another server than PostgREST.
    pub(super) fn push(&mut self, part: &[u8]) -> bool {
        let had = self.bytes.len();
        let room = self.limit - had;
        self.bytes.extend_from_slice(&part[..part.len().min(room)]);
        // The head decides once, when it is complete. A foreign server may send for ever.
        let crosses_head = had < HEAD_BYTES && self.bytes.len() >= HEAD_BYTES;
        self.is_whole = part.len() <= room
            && !(crosses_head && self.limit > HEAD_BYTES && !self.begins_like_a_response());
        self.is_whole
    }

    /// Whether the head can belong to a response of the functions.
    ///
    /// Such a response has the time before any long field, even if a server has sorted the names.
    fn begins_like_a_response(&self) -> bool {
        const NOW: &[u8] = b"\"now\"";
        let head = self.bytes[..HEAD_BYTES].trim_ascii_start();
        head.starts_with(b"{") && head.windows(NOW.len()).any(|part| part == NOW)
    }

    /// Whether the body is complete, as far as it has been read.
    pub(super) fn is_whole(&self) -> bool {
        self.is_whole
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pushes `part` for ever, and returns the body with its size.
    fn push_endlessly(limit: usize, first: &[u8], part: &[u8]) -> (ResponseBody, usize) {
        let mut body = ResponseBody::new(limit, None);
        let mut goes_on = body.push(first);
        while goes_on {
            goes_on = body.push(part);
        }
        let len = body.bytes().len();
        (body, len)
    }

    #[test]
    fn push_endless_body_stops_at_limit() {
        for limit in [MAX_ERROR_BODY, MAX_OUTCOMES_BODY, 3 * MAX_OUTCOMES_BODY + 1] {
            let (body, len) =
                push_endlessly(limit, br#"{"now" : 1, "revision" : 1, "rows" : [""#, &[b'x'; 100_000]);
            assert!(len == limit && !body.is_whole(), "{len} of {limit}");
        }
    }

    #[test]
    fn push_foreign_body_stops_after_head() {
        let beginnings: [&[u8]; 5] = [b"", b"<html>", b"[", b" ", br#"{"a":""#];
        for beginning in beginnings {
            for part in [&[b' '; 1_000][..], &[b'x'; 10_000], &[0; 7]] {
                let (body, len) = push_endlessly(MAX_RECORDS_BODY, beginning, part);
                assert!(len < HEAD_BYTES + 10_000 && !body.is_whole(), "{len} of {:?}", &body.bytes()[..9]);
            }
        }
    }

    #[test]
    fn push_body_within_limit_is_whole() {
        let mut body = ResponseBody::new(10, Some(u64::MAX));
        assert!(body.push(b"12345") && body.push(b"67890") && body.is_whole());
        assert_eq!(body.bytes(), b"1234567890");
        assert!(!body.push(b"1") && !body.is_whole());
        assert_eq!(body.bytes().len(), 10);
    }
}
