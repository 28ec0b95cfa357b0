//! Tables of what was measured: medians of rounds in which all ways take their turn, and ratios within the rounds.

use std::time::Duration;

/// What one way of doing it showed, round by round.
struct Way {
    name: String,
    samples: Vec<f64>,
}

/// What a ratio is to be.
#[derive(Clone, Copy)]
pub enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

use Wanted::{AtLeast, AtMost};

#[derive(Clone, Copy)]
pub enum Unit {
    /// So many a second.
    Rate,
    /// So long for each.
    Span,
    Count,
    /// So many times as much.
    Times,
}

pub struct Table {
    title: String,
    unit: Unit,
    ways: Vec<Way>,
    claims: Vec<(String, String, Option<Wanted>)>,
}

impl Table {
    pub fn new(title: impl Into<String>, unit: Unit) -> Self {
        Self { title: title.into(), unit, ways: Vec::new(), claims: Vec::new() }
    }

    pub fn note(&mut self, way: &str, sample: f64) {
        match self.ways.iter_mut().find(|one| one.name == way) {
            Some(way) => way.samples.push(sample),
            None => self.ways.push(Way { name: way.to_owned(), samples: vec![sample] }),
        }
    }

    pub fn note_span(&mut self, way: &str, span: Duration) {
        self.note(way, span.as_secs_f64());
    }

    /// The ratio of two ways is to be so.
    pub fn claim(&mut self, way: &str, wanted: Wanted, other: &str) {
        self.claims.push((way.to_owned(), other.to_owned(), Some(wanted)));
    }

    /// The ratio of two ways is shown, whatever it is.
    pub fn compare(&mut self, way: &str, other: &str) {
        self.claims.push((way.to_owned(), other.to_owned(), None));
    }

    /// Prints it; says how many claims did not come true, if that is to be judged.
    pub fn print(&self, is_judged: bool) -> usize {
        println!("### {}\n\n| | median | least | most |\n|---|---|---|---|", self.title);
        for way in &self.ways {
            let [least, middle, most] = spread(&way.samples).map(|value| self.show(value));
            println!("| {} | {middle} | {least} | {most} |", way.name);
        }
        if !self.claims.is_empty() {
            println!("\n| ratio | median | wanted | |\n|---|---|---|---|");
        }
        let mut missed = 0;
        for (way, other, wanted) in &self.claims {
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

    /// The median of what the ratio was in each round: the machine's speed changes between them.
    fn ratio(&self, way: &str, other: &str) -> f64 {
        let samples = |name: &str| &self.ways.iter().find(|way| way.name == name).unwrap().samples;
        let ratios: Vec<f64> = samples(way).iter().zip(samples(other)).map(|(one, two)| one / two).collect();
        spread(&ratios)[1]
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

/// The least, the median, and the most.
fn spread(samples: &[f64]) -> [f64; 3] {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    [sorted[0], sorted[sorted.len() / 2], sorted[sorted.len() - 1]]
}
