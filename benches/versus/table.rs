//! Tables of measurements: medians of the rounds, and ratios within the rounds.

use std::time::Duration;

/// The samples of one alternative, one for each round.
struct Alternative {
    name: String,
    samples: Vec<f64>,
}

/// The goal for a ratio.
#[derive(Clone, Copy)]
pub enum Goal {
    AtLeast(f64),
    AtMost(f64),
}

use Goal::{AtLeast, AtMost};

#[derive(Clone, Copy)]
pub enum Unit {
    /// Operations per second.
    Rate,
    /// Seconds for one operation.
    Span,
    Count,
    /// A factor.
    Times,
}

pub struct Table {
    title: String,
    unit: Unit,
    alternatives: Vec<Alternative>,
    ratios: Vec<(String, String, Option<Goal>)>,
}

impl Table {
    pub fn new(title: impl Into<String>, unit: Unit) -> Self {
        Self { title: title.into(), unit, alternatives: Vec::new(), ratios: Vec::new() }
    }

    pub fn note(&mut self, way: &str, sample: f64) {
        match self.alternatives.iter_mut().find(|one| one.name == way) {
            Some(way) => way.samples.push(sample),
            None => self.alternatives.push(Alternative { name: way.to_owned(), samples: vec![sample] }),
        }
    }

    pub fn note_span(&mut self, way: &str, span: Duration) {
        self.note(way, span.as_secs_f64());
    }

    /// Adds a ratio with a goal.
    pub fn claim(&mut self, name: &str, goal: Goal, other: &str) {
        self.ratios.push((name.to_owned(), other.to_owned(), Some(goal)));
    }

    /// Adds a ratio without a goal.
    pub fn compare(&mut self, name: &str, other: &str) {
        self.ratios.push((name.to_owned(), other.to_owned(), None));
    }

    /// Prints the table. Returns the number of missed goals, or 0 if `is_judged` is false.
    pub fn print(&self, is_judged: bool) -> usize {
        println!("### {}\n\n| | median | least | most |\n|---|---|---|---|", self.title);
        for way in &self.alternatives {
            let [least, middle, most] = min_median_max(&way.samples).map(|value| self.show(value));
            println!("| {} | {middle} | {least} | {most} |", way.name);
        }
        if !self.ratios.is_empty() {
            println!("\n| ratio | median | wanted | |\n|---|---|---|---|");
        }
        let mut missed = 0;
        for (way, other, wanted) in &self.ratios {
            let ratio = self.ratio(way, other);
            let (wanted, verdict) = match *wanted {
                Some(AtLeast(bound)) => (format!("≥ {bound}"), ratio >= bound),
                Some(AtMost(bound)) => (format!("≤ {bound}"), ratio <= bound),
                None => (String::new(), true),
            };
            let verdict = verdict || !is_judged;
            missed += usize::from(!verdict);
            let verdict = if verdict { "" } else { "**missed**" };
            println!("| {way} / {other} | {ratio:.2} | {wanted} | {verdict} |");
        }
        println!();
        missed
    }

    /// Returns the median of the ratios within the rounds, because the speed of the machine changes between rounds.
    fn ratio(&self, way: &str, other: &str) -> f64 {
        let samples = |name: &str| &self.alternatives.iter().find(|way| way.name == name).unwrap().samples;
        let ratios: Vec<f64> = samples(way).iter().zip(samples(other)).map(|(one, two)| one / two).collect();
        min_median_max(&ratios)[1]
    }

    fn show(&self, value: f64) -> String {
        match self.unit {
            Unit::Rate => format!("{value:.0}/s"),
            Unit::Span => format!("{:.3?}", Duration::from_secs_f64(value)),
            Unit::Count => format!("{value:.0}"),
            Unit::Times => format!("{value:.1}"),
        }
    }
}

/// Returns minimum, median and maximum.
fn min_median_max(samples: &[f64]) -> [f64; 3] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}
