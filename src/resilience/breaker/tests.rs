use super::*;

fn outage() -> Result<()> {
    Err(Error::new(ErrorKind::Unavailable, "no answer"))
}

fn record(breaker: &Breaker, result: &Result<()>) {
    let permit = breaker.try_acquire().unwrap();
    breaker.record(&permit, result);
}

fn open() -> Breaker {
    let breaker = Breaker::new();
    (0..MAX_CONSECUTIVE_FAILURES).for_each(|_| record(&breaker, &outage()));
    assert_eq!(breaker.state(), BreakerState::Open);
    breaker
}

/// Begins a probe once failsafe's clock has moved.
fn begin(breaker: &Breaker) -> Permit {
    (0..1_000_000).find_map(|_| breaker.begin_probe()).unwrap()
}

#[test]
fn breaker_opens_on_outages_in_a_row_only() {
    let breaker = Breaker::new();
    for kind in [ErrorKind::Unauthorized, ErrorKind::Rejected, ErrorKind::SchemaOutdated] {
        (0..100).for_each(|_| record(&breaker, &Err(Error::new(kind, "an answer"))));
    }
    assert_eq!(breaker.state(), BreakerState::Closed);
    (0..MAX_CONSECUTIVE_FAILURES - 1).for_each(|_| record(&breaker, &outage()));
    assert_eq!(breaker.state(), BreakerState::Closed);
    record(&breaker, &outage());
    let error = breaker.try_acquire().unwrap_err();
    assert!(error.is_outage() && error.to_string().contains("no answer"), "{error}");
}

#[test]
fn breaker_opens_when_half_of_the_calls_fail() {
    let breaker = Breaker::new();
    for _ in 0..WINDOW / 4 {
        record(&breaker, &Ok(()));
        record(&breaker, &outage());
    }
    assert_eq!(breaker.state(), BreakerState::Open);
}

#[test]
fn breaker_ignores_results_from_before_a_transition() {
    let breaker = Breaker::new();
    let (late_success, late_failure) = (breaker.try_acquire().unwrap(), breaker.try_acquire().unwrap());
    breaker.trip(&outage().unwrap_err());
    breaker.record(&late_success, &Ok(()));
    assert_eq!(breaker.state(), BreakerState::Open);
    let probe = begin(&breaker);
    assert_eq!(breaker.state(), BreakerState::HalfOpen);
    assert!(breaker.try_acquire().is_err(), "half open admits no caller");
    breaker.record(&late_success, &Ok(()));
    assert_eq!(breaker.state(), BreakerState::HalfOpen);
    breaker.end_probe(&probe, &Ok(()));
    assert_eq!(breaker.state(), BreakerState::Closed);
    (0..100).for_each(|_| breaker.record(&late_failure, &outage()));
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[test]
fn failed_probe_reopens_and_rejected_probe_closes() {
    let breaker = open();
    let probe = begin(&breaker);
    breaker.end_probe(&probe, &outage());
    assert_eq!(breaker.state(), BreakerState::Open);
    let probe = begin(&breaker);
    breaker.end_probe(&probe, &Err(Error::new(ErrorKind::Unauthorized, "wrong key")));
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[test]
fn requested_open_time_is_clamped() {
    for (asked, given) in [(0, 1), (7, 7), (900, 60)] {
        let breaker = Breaker::new();
        breaker.trip(&outage().unwrap_err().with_retry_after(Duration::from_secs(asked)));
        assert_eq!(breaker.requested_pause(), Some(Duration::from_secs(given)));
        assert_eq!(breaker.check().unwrap_err().retry_after(), Some(Duration::from_secs(given)));
    }
}
