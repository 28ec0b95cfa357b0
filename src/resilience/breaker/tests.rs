use std::sync::atomic::AtomicBool;

use super::*;

const SOFT_TIMEOUT: Duration = Duration::from_secs(1);

fn outage() -> Result<()> {
    Err(Error::new(ErrorKind::Unavailable, "no answer"))
}

fn record(breaker: &Breaker, result: &Result<()>) {
    let permit = breaker.try_acquire(Duration::ZERO).unwrap();
    breaker.record(&permit, result);
}

fn open() -> Breaker {
    let breaker = Breaker::new(SOFT_TIMEOUT);
    (0..MAX_FAILURES).for_each(|_| record(&breaker, &outage()));
    assert_eq!(breaker.state(), BreakerState::Open);
    breaker
}

/// Probes once failsafe's clock has moved. `during` runs while the breaker is half open.
async fn probe(breaker: &Breaker, result: Result<()>, during: impl Fn()) {
    let was_sent = AtomicBool::new(false);
    while !was_sent.load(SeqCst) {
        let probe = async {
            was_sent.store(true, SeqCst);
            assert_eq!(breaker.state(), BreakerState::HalfOpen);
            during();
            result.clone()
        };
        breaker.probe_once(probe).await;
    }
}

#[test]
fn breaker_opens_on_outages_in_a_row_only() {
    let breaker = Breaker::new(SOFT_TIMEOUT);
    for kind in [ErrorKind::Unauthorized, ErrorKind::Rejected, ErrorKind::SchemaOutdated] {
        (0..100).for_each(|_| record(&breaker, &Err(Error::new(kind, "an answer"))));
    }
    assert_eq!(breaker.state(), BreakerState::Closed);
    (0..MAX_FAILURES - 1).for_each(|_| record(&breaker, &outage()));
    assert_eq!(breaker.state(), BreakerState::Closed);
    record(&breaker, &outage());
    let error = breaker.try_acquire(Duration::ZERO).unwrap_err();
    assert!(error.is_outage() && error.to_string().contains("no answer"), "{error}");
}

#[test]
fn breaker_opens_when_half_of_the_calls_fail() {
    let breaker = Breaker::new(SOFT_TIMEOUT);
    for _ in 0..WINDOW / 4 {
        record(&breaker, &Ok(()));
        record(&breaker, &outage());
    }
    assert_eq!(breaker.state(), BreakerState::Open);
}

#[tokio::test]
async fn breaker_ignores_results_from_before_a_transition() {
    let breaker = Breaker::new(SOFT_TIMEOUT);
    let [late_success, late_failure] = [(); 2].map(|()| breaker.try_acquire(Duration::ZERO).unwrap());
    breaker.trip(&outage().unwrap_err());
    breaker.record(&late_success, &Ok(()));
    assert_eq!(breaker.state(), BreakerState::Open);
    probe(&breaker, Ok(()), || {
        assert!(breaker.try_acquire(Duration::ZERO).is_err(), "half open admits no caller");
        breaker.record(&late_success, &Ok(()));
        assert_eq!(breaker.state(), BreakerState::HalfOpen);
    })
    .await;
    assert_eq!(breaker.state(), BreakerState::Closed);
    (0..100).for_each(|_| breaker.record(&late_failure, &outage()));
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[tokio::test]
async fn failed_probe_reopens_and_rejected_probe_closes() {
    let breaker = open();
    probe(&breaker, outage(), || {}).await;
    assert_eq!(breaker.state(), BreakerState::Open);
    probe(&breaker, Err(Error::new(ErrorKind::Unauthorized, "wrong key")), || {}).await;
    assert_eq!(breaker.state(), BreakerState::Closed);
}

#[test]
fn requested_open_time_is_clamped() {
    for (asked, given) in [(0, 1), (7, 7), (900, 60)] {
        let breaker = Breaker::new(SOFT_TIMEOUT);
        breaker.trip(&outage().unwrap_err().with_retry_after(Duration::from_secs(asked)));
        assert_eq!(breaker.requested_pause(), Some(Duration::from_secs(given)));
        assert_eq!(breaker.check().unwrap_err().retry_after(), Some(Duration::from_secs(given)));
    }
}
