//! Schedules: their generation, and the shrinking of one that breaks a promise.

use super::oracle::Violation;
use super::rule::{Environment, Rule};
use super::world::World;

/// The choices of a run. The first `steps` steps are free. The rest of the choices orders the arrivals at the end.
#[derive(Debug, Clone)]
pub struct Schedule {
    choices: Vec<u16>,
    steps: usize,
}

/// A schedule that breaks a promise.
pub struct Found {
    pub schedules: u64,
    pub violation: Violation,
    pub steps: usize,
    pub trace: Vec<String>,
}

impl Schedule {
    pub fn random(random: &mut fastrand::Rng, most: usize) -> Self {
        let steps = random.usize(4..=most);
        // A step may pick up to three times.
        let choices = (0..2 * steps + 60).map(|_| random.u16(0..50_400)).collect();
        Self { choices, steps }
    }

    pub fn run(&self, environment: Environment, off: &[Rule]) -> Result<(), Violation> {
        World::new(environment, off, &self.choices).run(self.steps)
    }

    fn trace(&self, environment: Environment, off: &[Rule]) -> Vec<String> {
        let mut world = World::new(environment, off, &self.choices);
        world.trace = Some(Vec::new());
        let _ = world.run(self.steps);
        world.trace.unwrap_or_default()
    }

    /// Removes and lowers choices for as long as the same promise breaks.
    fn shrink(mut self, environment: Environment, off: &[Rule], kind: &str) -> Self {
        let breaks =
            |schedule: &Self| schedule.run(environment, off).is_err_and(|violation| violation.kind == kind);
        loop {
            let smaller = self.smaller().find(&breaks);
            match smaller {
                Some(smaller) => self = smaller,
                None => return self,
            }
        }
    }

    fn smaller(&self) -> impl Iterator<Item = Self> + '_ {
        let removed = (0..self.choices.len().min(3 * self.steps)).flat_map(move |at| {
            [1, 0].into_iter().map(move |fewer| {
                let mut schedule = self.clone();
                schedule.choices.remove(at);
                schedule.steps = schedule.steps.saturating_sub(fewer);
                schedule
            })
        });
        let lowered = (0..self.choices.len()).filter(|at| self.choices[*at] > 0).flat_map(move |at| {
            [0, self.choices[at] / 2].into_iter().map(move |choice| {
                let mut schedule = self.clone();
                schedule.choices[at] = choice;
                schedule
            })
        });
        let shorter = (self.steps > 0).then(|| Self { choices: self.choices.clone(), steps: self.steps - 1 });
        shorter.into_iter().chain(removed.filter(|schedule| !schedule.choices.is_empty())).chain(lowered)
    }
}

/// Runs random schedules until one breaks a promise.
pub fn search(environment: Environment, off: &[Rule], seed: u64, count: u64, steps: usize) -> Option<Found> {
    let mut random = fastrand::Rng::with_seed(seed);
    for number in 1..=count {
        let schedule = Schedule::random(&mut random, steps);
        if let Err(violation) = schedule.run(environment, off) {
            let small = schedule.shrink(environment, off, violation.kind);
            let violation = small.run(environment, off).err().unwrap_or(violation);
            let (trace, steps) = (small.trace(environment, off), small.steps);
            return Some(Found { schedules: number, violation, steps, trace });
        }
    }
    None
}

/// As `search`, without the shrinking.
pub fn first(
    environment: Environment,
    off: &[Rule],
    seed: u64,
    count: u64,
    steps: usize,
) -> Option<(u64, Violation)> {
    let mut random = fastrand::Rng::with_seed(seed);
    (1..=count).find_map(|number| {
        let schedule = Schedule::random(&mut random, steps);
        schedule.run(environment, off).err().map(|violation| (number, violation))
    })
}
