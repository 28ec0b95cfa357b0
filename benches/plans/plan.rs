//! Parses the plans of auto_explain, judges them and prints them.

use std::fmt::Write;

use serde::Deserialize;

const TABLE: &str = "conversation_threads";
/// Maximum characters of a printed statement or condition.
const MAX_TEXT: usize = 84;

/// The plan of one executed statement.
#[derive(Debug, Deserialize)]
pub struct Explained {
    #[serde(rename = "Query Text")]
    query: String,
    #[serde(rename = "Plan")]
    plan: Node,
    /// Present if PostgreSQL compiled the statement (JIT) because of a high estimated cost.
    #[serde(rename = "JIT")]
    compiled: Option<serde::de::IgnoredAny>,
}

/// A node of a plan.
///
/// Rows and times are averages of one loop. Pages are sums of all loops and of the nodes below.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Node {
    #[serde(rename = "Node Type")]
    kind: String,
    #[serde(rename = "Operation")]
    operation: Option<String>,
    #[serde(rename = "Relation Name")]
    relation: Option<String>,
    #[serde(rename = "Index Name")]
    index: Option<String>,
    #[serde(rename = "Index Cond")]
    condition: Option<String>,
    #[serde(rename = "Filter")]
    filter: Option<String>,
    #[serde(rename = "Plan Rows")]
    estimated_rows: f64,
    #[serde(rename = "Actual Rows")]
    rows: f64,
    #[serde(rename = "Actual Loops")]
    loops: f64,
    #[serde(rename = "Actual Total Time")]
    millis: f64,
    #[serde(rename = "Rows Removed by Filter")]
    filtered: f64,
    #[serde(rename = "Rows Removed by Join Filter")]
    unjoined: f64,
    #[serde(rename = "Rows Removed by Index Recheck")]
    rechecked: f64,
    #[serde(rename = "Shared Hit Blocks")]
    hit: u64,
    #[serde(rename = "Shared Read Blocks")]
    read: u64,
    #[serde(rename = "Plans")]
    below: Vec<Node>,
}

impl Explained {
    /// Returns the shortened text of the statement.
    pub fn statement(&self) -> String {
        shorten(&self.query)
    }

    pub fn is_on_the_table(&self) -> bool {
        self.plan.any(&Node::reads_the_table)
    }

    pub fn pages(&self) -> u64 {
        self.plan.pages()
    }

    pub fn millis(&self) -> f64 {
        self.plan.millis
    }

    /// Returns the largest number of rows that a step processed.
    pub fn most_rows(&self) -> u64 {
        self.plan.most_rows()
    }

    /// Returns the faults that make the cost grow with the table, for a call that needs `allowed` rows.
    pub fn faults(&self, allowed: u64) -> Vec<String> {
        let mut faults = Vec::new();
        self.plan.faults(allowed, &mut faults);
        faults.extend(
            self.compiled.map(|_| "is compiled (JIT), because its estimated cost is above 100,000".into()),
        );
        faults
    }

    pub fn show(&self) -> String {
        let mut text = String::new();
        self.plan.show(0, &mut text);
        text
    }
}

impl Node {
    fn any(&self, holds: &dyn Fn(&Self) -> bool) -> bool {
        holds(self) || self.below.iter().any(|node| node.any(holds))
    }

    /// Partitions have the name of their table with a number.
    fn reads_the_table(&self) -> bool {
        self.relation.as_deref().is_some_and(|name| name.starts_with(TABLE))
    }

    fn pages(&self) -> u64 {
        self.hit + self.read
    }

    fn dropped(&self) -> u64 {
        ((self.filtered + self.unjoined + self.rechecked) * self.loops) as u64
    }

    fn yielded(&self) -> u64 {
        (self.rows * self.loops) as u64
    }

    fn most_rows(&self) -> u64 {
        let below = self.below.iter().map(Self::most_rows).max();
        below.unwrap_or(0).max(self.yielded() + self.dropped())
    }

    fn faults(&self, allowed: u64, faults: &mut Vec<String>) {
        let met = self.yielded() + self.dropped();
        if self.kind == "Seq Scan" && self.reads_the_table() {
            faults.push(format!("has a Seq Scan on {TABLE}"));
        } else if met > allowed {
            faults.push(format!(
                "has a step that processes {met} rows, and {allowed} are allowed: {}",
                self.name()
            ));
        }
        self.below.iter().for_each(|node| node.faults(allowed, faults));
    }

    fn name(&self) -> String {
        let index = self
            .index
            .as_ref()
            .map(|index| format!(" by {}", index.trim_start_matches("conversation_threads_")));
        let relation = self.relation.as_ref().map(|relation| format!(" on {relation}"));
        let (index, relation) = (index.unwrap_or_default(), relation.unwrap_or_default());
        format!("{}{relation}{index}", self.operation.as_ref().unwrap_or(&self.kind))
    }

    fn show(&self, depth: usize, text: &mut String) {
        let indent = "  ".repeat(depth);
        write!(text, "{indent}{}: rows {}", self.name(), self.yielded()).unwrap();
        if self.estimated_rows != self.rows {
            write!(text, " (estimated {:.0})", self.estimated_rows * self.loops.max(1.0)).unwrap();
        }
        if self.dropped() > 0 {
            write!(text, ", dropped {}", self.dropped()).unwrap();
        }
        writeln!(text, ", pages {}, {:.3} ms", self.pages(), self.millis * self.loops).unwrap();
        for (what, condition) in [("where", &self.condition), ("if", &self.filter)] {
            if let Some(condition) = condition {
                writeln!(text, "{indent}    {what} {}", shorten(condition)).unwrap();
            }
        }
        self.below.iter().for_each(|node| node.show(depth + 1, text));
    }
}

/// Shortens SQL to one line, without comments, types and schema names.
fn shorten(text: &str) -> String {
    let code = text.lines().map(|line| line.split("--").next().unwrap_or_default());
    let line = code.flat_map(str::split_whitespace).collect::<Vec<_>>().join(" ");
    let noise = ["public.", "::timestamp with time zone", "::bigint", "::uuid", "::interval", "::text"];
    let line = noise.iter().fold(line, |line, word| line.replace(word, ""));
    match line.char_indices().nth(MAX_TEXT) {
        Some((end, _)) => format!("{} …", &line[..end]),
        None => line,
    }
}
