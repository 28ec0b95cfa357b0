//! The body of an answer, which is never taken in beyond a bound: the other side may send without end.

use crate::record::{EXPANSION, LARGEST};

/// Where an answer of `threadkeep_load` or `threadkeep_recent` takes no further record.
const PAGE: usize = 16 << 20;
/// What the keys, users and versions of a page take.
const BESIDE: usize = 2 << 20;
/// The largest text that `jsonb` makes of the largest document: it puts a space behind each comma and each colon, so that
/// `[1,1]` grows by half, and it writes numbers out.
const DOCUMENT: usize = LARGEST / 2 * 3 + EXPANSION;

/// What an answer with records takes at most: a page, and one record with its metadata that crosses the page's end.
pub(super) const RECORDS: usize = PAGE + BESIDE + 2 * DOCUMENT;
/// What any other answer takes at most: 500 verdicts take 50 KiB.
pub(super) const VERDICTS: usize = 1 << 20;
/// What is read of an answer with an error status.
pub(super) const ERROR: usize = 64 << 10;
/// What can be told of an answer by its head.
const HEAD: usize = 64 << 10;

/// A body as far as it was read.
#[derive(Debug)]
pub(super) struct Body {
    bytes: Vec<u8>,
    most: usize,
    is_whole: bool,
}

impl Body {
    /// A body of which at most so many bytes are taken in. The other side `expects` to send so many.
    pub(super) fn new(most: usize, expected: Option<u64>) -> Self {
        let expected = expected.map_or(0, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
        // A page is reserved at most: the other side may expect anything.
        let bytes = Vec::with_capacity(expected.min(most).min(PAGE));
        Self { bytes, most, is_whole: true }
    }

    /// Takes a part in, or says that nothing more is wanted.
    pub(super) fn take(&mut self, part: &[u8]) -> bool {
        let had = self.bytes.len();
        let room = self.most - had;
        self.bytes.extend_from_slice(&part[..part.len().min(room)]);
        let crosses_head = had < HEAD && self.bytes.len() >= HEAD;
        self.is_whole = part.len() <= room && !(crosses_head && self.most > HEAD && !self.is_ours());
        self.is_whole
    }

    /// Whether an answer of the functions begins so. Each says the time before anything that can be long, also if a server
    /// has sorted the names.
    fn is_ours(&self) -> bool {
        const NOW: &[u8] = b"\"now\"";
        let head = self.bytes[..HEAD].trim_ascii_start();
        head.starts_with(b"{") && head.windows(NOW.len()).any(|part| part == NOW)
    }

    /// Whether this is all that was sent.
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

    /// How many of the parts a body takes that are sent for ever.
    fn taken(most: usize, first: &[u8], part: &[u8]) -> (Body, usize) {
        let mut body = Body::new(most, None);
        let mut wanted = body.take(first);
        while wanted {
            wanted = body.take(part);
        }
        let len = body.bytes().len();
        (body, len)
    }

    #[test]
    fn a_body_without_end_is_cut_at_its_bound() {
        for most in [ERROR, VERDICTS, 3 * VERDICTS + 1] {
            let (body, len) = taken(most, br#"{"now" : 1, "schema" : 1, "rows" : [""#, &[b'x'; 100_000]);
            assert!(len == most && !body.is_whole(), "{len} of {most}");
        }
    }

    #[test]
    fn a_body_that_is_none_of_ours_is_cut_at_its_head() {
        let beginnings: [&[u8]; 5] = [b"", b"<html>", b"[", b" ", br#"{"a":""#];
        for beginning in beginnings {
            for part in [&[b' '; 1_000][..], &[b'x'; 10_000], &[0; 7]] {
                let (body, len) = taken(RECORDS, beginning, part);
                assert!(len < HEAD + 10_000 && !body.is_whole(), "{len} of {:?}", &body.bytes()[..9]);
            }
        }
    }

    #[test]
    fn a_body_within_its_bound_is_whole() {
        let mut body = Body::new(10, Some(u64::MAX));
        assert!(body.take(b"12345") && body.take(b"67890") && body.is_whole());
        assert_eq!(body.bytes(), b"1234567890");
        assert!(!body.take(b"1") && !body.is_whole());
        assert_eq!(body.bytes().len(), 10);
    }
}
