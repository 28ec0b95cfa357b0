use super::*;

fn kind(status: u16, body: &str) -> (ErrorKind, bool) {
    let error = error_response(StatusCode::from_u16(status).unwrap(), None, body.as_bytes(), "");
    (error.kind(), error.outcome_unknown())
}

#[test]
fn classify_sqlstate_decides_before_status() {
    use ErrorKind::{Rejected, SchemaOutdated, Unauthorized, Unavailable};
    let code = |code: &str| format!(r#"{{"code":"{code}","message":"m","details":null,"hint":null}}"#);
    for (sqlstate, expected) in [
        ("PGRST000", (Unavailable, false)),
        ("PGRST001", (Unavailable, true)),
        ("PGRST003", (Unavailable, false)),
        ("25006", (Unavailable, false)),
        ("3F000", (Unavailable, false)),
        ("XX001", (Unavailable, false)),
        ("P0001", (Rejected, false)),
        ("PGRSTX00", (Unavailable, true)),
        ("PGRST106", (Unavailable, false)),
        ("PGRST203", (Unavailable, false)),
        ("PGRST102", (Rejected, false)),
        ("40003", (Unavailable, true)),
        ("08006", (Unavailable, true)),
        ("53300", (Unavailable, false)),
        ("53400", (Rejected, false)),
        ("57P01", (Unavailable, true)),
        ("57014", (Unavailable, false)),
        ("40001", (Unavailable, false)),
        ("55P03", (ErrorKind::Overloaded, false)),
        ("58030", (Unavailable, true)),
        ("21000", (Rejected, false)),
        ("22P05", (Rejected, false)),
        ("23505", (Rejected, false)),
        ("42601", (Unavailable, false)),
        ("54000", (Rejected, false)),
        ("PGRST301", (Unauthorized, false)),
        ("42501", (Unauthorized, false)),
        ("PGRST202", (SchemaOutdated, false)),
        ("42P01", (SchemaOutdated, false)),
        ("42883", (SchemaOutdated, false)),
    ] {
        assert_eq!(kind(500, &code(sqlstate)), expected, "{sqlstate}");
        assert_eq!(kind(404, &code(sqlstate)), expected, "{sqlstate}");
    }
}

#[test]
fn classify_response_without_usable_code_is_outage() {
    use ErrorKind::{Unauthorized, Unavailable};
    for body in
        ["", "{}", "<html>", r#"{"code":"","details":null,"hint":null,"message":""}"#, r#"{"code":"nginx"}"#]
    {
        for status in [400, 408, 409, 422, 500, 502, 503, 504, 520, 522, 527, 530, 544] {
            assert_eq!(kind(status, body), (Unavailable, true), "{status} {body}");
        }
        for status in [300, 302, 402, 404, 405, 406, 407, 413, 414, 429, 431, 540] {
            assert_eq!(kind(status, body), (Unavailable, false), "{status} {body}");
        }
        for status in [401, 403] {
            let expected = if body == "<html>" { Unavailable } else { Unauthorized };
            assert_eq!(kind(status, body), (expected, false), "{status} {body}");
        }
    }
    assert_eq!(kind(401, r#"{"message":"Invalid API key"}"#), (Unauthorized, false));
}

#[test]
fn record_fault_is_limited_to_four_classes() {
    let is_record_fault = |code: &str| {
        let body = format!(r#"{{"code":"{code}","message":"m"}}"#);
        error_response(StatusCode::BAD_REQUEST, None, body.as_bytes(), "").is_record_fault()
    };
    for code in ["21000", "22P05", "22001", "23502", "23505", "23514", "54000", "PGRST102"] {
        assert!(is_record_fault(code), "{code}");
    }
    for code in
        ["", "3F000", "42501", "42601", "42883", "P0001", "XX001", "0A000", "53400", "PGRST106", "PGRST202"]
    {
        assert!(!is_record_fault(code), "{code}");
    }
}

#[test]
fn failure_of_writes_only_does_not_count_as_outage() {
    let counts = |status: u16, code: &str| {
        let body = format!(r#"{{"code":"{code}","message":"m"}}"#);
        error_response(StatusCode::from_u16(status).unwrap(), None, body.as_bytes(), "").counts_as_outage()
    };
    for (status, code) in
        [(500, "53100"), (405, "25006"), (400, "3F000"), (413, ""), (500, "XX001"), (401, "")]
    {
        assert!(!counts(status, code), "{status} {code}");
    }
    for (status, code) in
        [(400, ""), (404, ""), (406, "PGRST106"), (300, "PGRST203"), (500, "57014"), (503, "PGRST002")]
    {
        assert!(counts(status, code), "{status} {code}");
    }
}
