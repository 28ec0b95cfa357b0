//! What was seen, printed as benches/PLANS.md has it.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::calls::Call;
use crate::plan::Explained;

/// Indexes become deeper by a level or two, and what was neighbouring lies apart.
const PAGES_MAY_GROW: u64 = 3;

/// One call at one size of the table.
pub struct Seen {
    pub call: &'static Call,
    pub plans: Vec<Explained>,
    pub span: Duration,
}

impl Seen {
    /// Those of the call itself, whose plan comes last and includes what was run within.
    fn pages(&self) -> u64 {
        self.plans.last().map_or(0, Explained::pages)
    }

    fn millis(&self) -> f64 {
        self.span.as_secs_f64() * 1e3
    }

    fn most_rows(&self) -> u64 {
        self.plans.iter().map(Explained::most_rows).max().unwrap_or(0)
    }

    /// The statements on the table, each with how often it was run, how long in all, and its last plan.
    fn statements(&self) -> Vec<(usize, f64, &Explained)> {
        let mut order = Vec::new();
        let mut statements = BTreeMap::<String, (usize, f64, &Explained)>::new();
        for plan in self.plans.iter().filter(|plan| plan.is_on_the_table()) {
            let statement = plan.statement();
            let entry = statements.entry(statement.clone()).or_insert_with(|| {
                order.push(statement);
                (0, 0.0, plan)
            });
            *entry = (entry.0 + 1, entry.1 + plan.millis(), plan);
        }
        order.iter().map(|statement| statements[statement]).collect()
    }
}

/// What grows with the table, and where nothing was seen that could be judged.
pub fn faults(all: &[(usize, Vec<Seen>)]) -> Vec<String> {
    let mut faults = Vec::new();
    for (threads, seen) in all {
        for Seen { call, plans, .. } in seen {
            let mut fault = |what: String| faults.push(format!("{threads} threads, {}: {what}", call.name));
            for plan in plans {
                let found = plan.faults(call.allowed_rows());
                found.into_iter().for_each(|what| fault(format!("{what}: {}", plan.statement())));
            }
            if call.is_on_the_table() != plans.iter().any(Explained::is_on_the_table) {
                fault("its plans were not seen".into());
            }
        }
    }
    for (first, last) in ends(all) {
        let (few, many) = (first.pages(), last.pages());
        if many > PAGES_MAY_GROW * few {
            faults.push(format!(
                "{}: touches {few} pages of a small table and {many} of a large one",
                first.call.name
            ));
        }
    }
    faults.sort();
    faults.dedup();
    faults
}

/// Each call at the least size and at the largest.
fn ends(all: &[(usize, Vec<Seen>)]) -> impl Iterator<Item = (&Seen, &Seen)> {
    all[0].1.iter().zip(&all[all.len() - 1].1)
}

pub fn print_plans((threads, seen): &(usize, Vec<Seen>)) {
    println!("## Plans at {threads} threads\n");
    for seen in seen {
        println!("### {}\n", seen.call.name);
        if seen.statements().is_empty() {
            println!("No statement of it is on the table.\n");
        }
        for (times, millis, plan) in seen.statements() {
            println!(
                "`{}`, {times} times, {millis:.2} ms in all\n\n```text\n{}```\n",
                plan.statement(),
                plan.show()
            );
        }
    }
}

/// Noise does not touch the pages and rows; the times it does.
pub fn print_growth(all: &[(usize, Vec<Seen>)]) {
    let column = |(threads, _): &(usize, Vec<Seen>)| format!(" {threads} threads: ms | pages | most rows |");
    println!(
        "## From size to size\n\n| call |{} ms × | pages × |",
        all.iter().map(column).collect::<String>()
    );
    println!("|---|{}", "---|".repeat(3 * all.len() + 2));
    for (at, (first, last)) in ends(all).enumerate() {
        let cell = |seen: &Seen| format!(" {:.2} | {} | {} |", seen.millis(), seen.pages(), seen.most_rows());
        let cells: String = all.iter().map(|(_, seen)| cell(&seen[at])).collect();
        let pages = last.pages() as f64 / first.pages().max(1) as f64;
        println!("| {} |{cells} {:.1} | {pages:.1} |", first.call.name, last.millis() / first.millis());
    }
    println!();
}
