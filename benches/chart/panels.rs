//! Draws the four panels of the picture, one below the other, over the same time axis.

use threadkeep::BreakerState;

use crate::series::{Bin, Outage, Series};
use crate::svg::{Frame, Picture, WIDTH};

const HEIGHT: f64 = 640.0;
const TOP: f64 = 76.0;
const BOTTOM: f64 = 600.0;
/// Seconds of one point, with enough calls for a percentile.
const BIN: f64 = 0.2;
const TIME_BETWEEN_LABELS: usize = 5;
const LATENCIES: [(f64, &str); 4] = [(0.01, "10 µs"), (1.0, "1 ms"), (100.0, "100 ms"), (10_000.0, "10 s")];

pub fn draw(series: &Series, outage: &Outage) -> String {
    let mut picture = Picture::new(HEIGHT, series.span());
    let bins = series.bins(BIN);
    shade(&mut picture, outage);
    latency(&mut picture, &bins);
    sources(&mut picture, &bins);
    queue(&mut picture, series);
    breaker(&mut picture, series);
    time(&mut picture, series.span());
    picture.finish("A real outage: latency, source of reads, queue and breaker over time")
}

fn shade(picture: &mut Picture, outage: &Outage) {
    let (from, to, recovered) =
        (picture.x(outage.began), picture.x(outage.ended), picture.x(outage.recovered));
    picture.rect("away", (from, TOP - 24.0), (to - from, BOTTOM - TOP + 24.0));
    picture.text("title middle", (from + to) / 2.0, 24.0, "Supabase hangs and answers no request");
    let length = format!("{:.0} s", outage.ended - outage.began);
    picture.text("small middle", (from + to) / 2.0, 42.0, &length);
    picture.line("mark", (from, 48.0), (from, BOTTOM));
    picture.line("mark", (to, 48.0), (to, BOTTOM));
    let replayed = format!("all writes replayed after {:.1} s", outage.recovered - outage.ended);
    picture.text("small", (to + 6.0).min(WIDTH - 180.0), 42.0, &replayed);
    picture.line("grid", (recovered, 48.0), (recovered, BOTTOM));
}

/// Draws latencies on a log scale, because a hit and a waiting call differ by six orders of magnitude.
fn latency(picture: &mut Picture, bins: &[Bin]) {
    let frame = Frame { top: TOP, height: 170.0, low: -3.0, high: 4.0 };
    picture.title(&frame, "latency (thick: the median, thin: 99 %)", &[("f1", "reads"), ("f2", "writes")]);
    for (millis, label) in LATENCIES {
        picture.grid(&frame, millis.log10(), label);
    }
    for (class, of_reads, share) in [
        ("line thin s1", true, 0.99),
        ("line thin s2", false, 0.99),
        ("line s1", true, 0.5),
        ("line s2", false, 0.5),
    ] {
        let points = bins
            .iter()
            .enumerate()
            .filter_map(|(at, bin)| Some(((at as f64 + 0.5) * BIN, bin.latency(of_reads, share)?.log10())));
        picture.curve(class, &frame, points);
    }
}

fn sources(picture: &mut Picture, bins: &[Bin]) {
    let totals = bins.iter().map(|bin| bin.sources.iter().sum::<usize>() as f64 / BIN);
    let max_rate = totals.fold(1.0, f64::max);
    let frame = Frame { top: 286.0, height: 110.0, low: 0.0, high: max_rate };
    let legend =
        [("a1", "fresh"), ("a2", "queued"), ("a3", "stale"), ("a4", "failed (never read here before)")];
    picture.title(&frame, "reads a second, by source", &legend);
    for share in [0.0, 0.5, 1.0] {
        let value = (max_rate * share / 50.0).round() * 50.0;
        picture.grid(&frame, value, &format!("{value:.0}"));
    }
    // Failed reads are at the bottom of the stack, so that they are easy to see.
    let order = [3, 2, 1, 0];
    let mut lower: Vec<(f64, f64)> = (0..bins.len()).map(|at| ((at as f64 + 0.5) * BIN, 0.0)).collect();
    for source in order {
        let add = |((x, y), bin): (&(f64, f64), &Bin)| (*x, y + bin.sources[source] as f64 / BIN);
        let upper: Vec<(f64, f64)> = lower.iter().zip(bins).map(add).collect();
        picture.area(["a1", "a2", "a3", "a4"][source], &frame, &lower, &upper);
        lower = upper;
    }
}

fn queue(picture: &mut Picture, series: &Series) {
    let most = series.samples.iter().map(|sample| sample.queued).max().unwrap_or_default().max(1) as f64;
    let frame = Frame { top: 436.0, height: 80.0, low: 0.0, high: most };
    picture.title(&frame, "writes in the queue on disk (one for each conversation)", &[]);
    for value in [0.0, most] {
        picture.grid(&frame, value, &format!("{value:.0}"));
    }
    let points = series.samples.iter().map(|sample| (sample.at, sample.queued as f64));
    picture.curve("line s3", &frame, points);
}

fn breaker(picture: &mut Picture, series: &Series) {
    let frame = Frame { top: 556.0, height: 36.0, low: 0.0, high: 2.0 };
    picture.title(&frame, "breaker", &[]);
    for (level, name) in [(0.0, "closed"), (1.0, "probing"), (2.0, "open")] {
        picture.grid(&frame, level, name);
    }
    let level = |state| match state {
        BreakerState::Closed => 0.0,
        BreakerState::HalfOpen => 1.0,
        BreakerState::Open => 2.0,
    };
    let starts = std::iter::once(0.0).chain(series.samples.iter().map(|sample| sample.at));
    let steps = series.samples.iter().zip(starts);
    let points = steps.flat_map(|(sample, from)| [from, sample.at].map(|x| (x, level(sample.breaker))));
    picture.curve("line s3", &frame, points);
}

fn time(picture: &mut Picture, span: f64) {
    for seconds in (0..=span as usize).step_by(TIME_BETWEEN_LABELS) {
        let x = picture.x(seconds as f64);
        picture.text("small middle", x, BOTTOM + 14.0, &format!("{seconds} s"));
    }
    picture.text(
        "small end",
        WIDTH - 16.0,
        BOTTOM + 31.0,
        "500 reads and 100 writes a second, through PostgreSQL and a PostgREST-compatible server",
    );
}
