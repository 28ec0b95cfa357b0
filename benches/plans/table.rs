//! Prints the results in the format of benches/PLANS.md.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::calls::Call;
use crate::plan::Explained;

/// Allowed growth of pages. In a large table an index has more levels, and neighbouring rows lie on different pages.
const MAX_PAGE_GROWTH: u64 = 3;

/// The results of one call at one size of the table.
pub struct Measured {
    pub call: &'static Call,
    pub plans: Vec<Explained>,
    pub span: Duration,
}

impl Measured {
    /// Returns the pages of the whole call: the last plan is the call itself and includes the inner statements.
    fn pages(&self) -> u64 {
        self.plans.last().map_or(0, Explained::pages)
    }

    fn millis(&self) -> f64 {
        self.span.as_secs_f64() * 1e3
    }

    fn most_rows(&self) -> u64 {
        self.plans.iter().map(Explained::most_rows).max().unwrap_or(0)
    }

    /// Returns each statement on the table with its count, its total time and its last plan.
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

/// Returns each call whose cost grows with the table, and each call without visible plans.
pub fn faults(all: &[(usize, Vec<Measured>)]) -> Vec<String> {
    let mut faults = Vec::new();
    for (threads, measured) in all {
        for Measured { call, plans, .. } in measured {
            let mut fault =
                |problem: String| faults.push(format!("{threads} conversations, {}: {problem}", call.name));
            for plan in plans {
                let found = plan.faults(call.allowed_rows());
                found.into_iter().for_each(|problem| fault(format!("{problem}: {}", plan.statement())));
            }
            if call.is_on_the_table() != plans.iter().any(Explained::is_on_the_table) {
                fault("auto_explain reported no plan".into());
            }
        }
    }
    for (first, last) in ends(all) {
        let (few, many) = (first.pages(), last.pages());
        if many > MAX_PAGE_GROWTH * few {
            faults.push(format!(
                "{}: touches {few} pages of the small table and {many} of the large one",
                first.call.name
            ));
        }
    }
    faults.sort();
    faults.dedup();
    faults
}

/// Pairs the results of each call at the smallest and at the largest size.
fn ends(all: &[(usize, Vec<Measured>)]) -> impl Iterator<Item = (&Measured, &Measured)> {
    all[0].1.iter().zip(&all[all.len() - 1].1)
}

pub fn print_plans((threads, measured): &(usize, Vec<Measured>)) {
    println!("## Plans at {threads} conversations\n");
    for measured in measured {
        println!("### {}\n", measured.call.name);
        if measured.statements().is_empty() {
            println!("The call has no statement on the table.\n");
        }
        for (times, millis, plan) in measured.statements() {
            println!(
                "`{}`, {times} times, {millis:.2} ms in total\n\n```text\n{}```\n",
                plan.statement(),
                plan.show()
            );
        }
    }
}

/// Prints pages, rows and times for each size. Other programs on the machine affect the times only.
pub fn print_growth(all: &[(usize, Vec<Measured>)]) {
    let column =
        |(threads, _): &(usize, Vec<Measured>)| format!(" {threads} conversations: ms | pages | most rows |");
    println!(
        "## From size to size\n\n| call |{} ms × | pages × |",
        all.iter().map(column).collect::<String>()
    );
    println!("|---|{}", "---|".repeat(3 * all.len() + 2));
    for (at, (first, last)) in ends(all).enumerate() {
        let cell = |measured: &Measured| {
            format!(" {:.2} | {} | {} |", measured.millis(), measured.pages(), measured.most_rows())
        };
        let cells: String = all.iter().map(|(_, measured)| cell(&measured[at])).collect();
        let pages = last.pages() as f64 / first.pages().max(1) as f64;
        println!("| {} |{cells} {:.1} | {pages:.1} |", first.call.name, last.millis() / first.millis());
    }
    println!();
}
