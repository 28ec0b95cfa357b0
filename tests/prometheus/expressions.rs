//! Reads the expressions of the dashboards and finds the series in them.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;
use threadkeep::metrics::SERIES;

/// An expression and its place: the dashboard and the panel.
pub struct Expression {
    pub place: String,
    pub text: String,
}

/// Returns the folder of the dashboards and alerts.
pub fn folder() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/dashboards"))
}

pub fn read(name: &str) -> String {
    std::fs::read_to_string(folder().join(name)).unwrap()
}

pub fn dashboards() -> Vec<(&'static str, Value)> {
    ["overview.json", "outage.json"].map(|name| (name, serde_json::from_str(&read(name)).unwrap())).into()
}

/// Returns the expressions of all panels, with the dashboard's variables at "all".
pub fn of_panels() -> Vec<Expression> {
    let mut expressions = Vec::new();
    for (name, dashboard) in dashboards() {
        for panel in dashboard["panels"].as_array().unwrap() {
            for target in panel["targets"].as_array().into_iter().flatten() {
                let text = target["expr"].as_str().unwrap();
                let text = text.replace("$job", ".*").replace("$instance", ".*");
                let text = text.replace("$__rate_interval", "3s");
                assert!(!text.contains('$'), "{name}: a variable unknown to the test: {text}");
                expressions.push(Expression { place: format!("{name}, {}", panel["title"]), text });
            }
        }
    }
    expressions
}

/// Finds the names of series in an expression. Skips strings, selectors, ranges, grouping labels, functions, operators
/// and numbers.
pub fn names(expression: &str) -> BTreeSet<String> {
    const WORDS: [&str; 8] = ["and", "or", "unless", "bool", "offset", "inf", "nan", "atan2"];
    const GROUPINGS: [&str; 6] = ["by", "without", "on", "ignoring", "group_left", "group_right"];
    let (mut names, mut rest) = (BTreeSet::new(), expression.trim_start());
    while let Some(first) = rest.chars().next() {
        let is_name = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
        let end = match first {
            '"' => rest[1..].find('"').unwrap() + 2,
            '{' => rest.find('}').unwrap() + 1,
            '[' => rest.find(']').unwrap() + 1,
            c if is_name(c) => rest.find(|c| !is_name(c)).unwrap_or(rest.len()),
            c => c.len_utf8(),
        };
        let (token, mut after) = rest.split_at(end);
        after = after.trim_start();
        if GROUPINGS.contains(&token) {
            after = after[after.find(')').unwrap() + 1..].trim_start();
        } else if first.is_alphabetic() && !WORDS.contains(&token) {
            // A name before arguments or a grouping is a function.
            let word = after.split(|c| !is_name(c)).next().unwrap();
            let is_grouped = GROUPINGS.contains(&word);
            if !after.starts_with('(') && !is_grouped {
                names.insert(token.to_owned());
            }
        }
        rest = after;
    }
    names
}

/// Returns the names of all series in Prometheus: those of the table, and `up`.
pub fn known() -> BTreeSet<String> {
    let names = |name: &str, kind| match kind {
        "histogram" => ["bucket", "count", "sum"].map(|part| format!("{name}_{part}")).to_vec(),
        _ => vec![name.to_owned()],
    };
    SERIES.iter().flat_map(|series| names(series.name, series.kind)).chain(["up".to_owned()]).collect()
}

#[test]
fn names_of_each_expression_are_found() {
    for (expression, expected) in [
        ("up == 0", "up"),
        (r#"a_total{b="c", d=~"e|f"} > 0.8"#, "a_total"),
        (r#"sum by (le, g) (rate(a_bucket{x="y"}[5m])) / (b + sum(c) > 1e3)"#, "a_bucket b c"),
        ("histogram_quantile(0.9, sum(rate(a[1m])) by (le))", "a"),
        (r#"max(a) and sum by(x) (rate(b{z!="(a"}[10m])) > 1 unless on (i) c offset 5m"#, "a b c"),
        ("sum without (x) (a) / on (i) group_left (job) b", "a b"),
    ] {
        assert_eq!(names(expression).into_iter().collect::<Vec<_>>().join(" "), expected, "{expression}");
    }
}
