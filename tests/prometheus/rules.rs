//! Checks the committed rules and their unit tests with promtool.

use std::path::Path;

use crate::expressions::{dashboards, folder, read};
use crate::stack::promtool;

/// Runs promtool. Panics with its output if it fails.
fn assert_passes(args: &[&str]) {
    let output = promtool(folder(), args);
    let text = [output.stdout, output.stderr].concat();
    assert!(output.status.success(), "promtool {args:?}: {}", String::from_utf8_lossy(&text));
}

/// Returns the alerts: each name with the lines of its rule.
fn alerts(rules: &str) -> Vec<(&str, &str)> {
    let bodies = rules.split("- alert: ").skip(1);
    bodies.map(|rule| (rule.lines().next().unwrap(), rule)).collect()
}

#[test]
fn promtool_accepts_rules_configuration_and_unit_tests() {
    assert_passes(&["check", "rules", "alerts.yml"]);
    assert_passes(&["check", "config", "prometheus.yml"]);
    assert_passes(&["test", "rules", "alerts.test.yml"]);
}

/// Returns whether the unit tests pass with other rules.
fn passes_with(rules: &str) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| std::fs::write(directory.path().join(name), text).unwrap();
    write("alerts.yml", rules);
    write("alerts.test.yml", &read("alerts.test.yml"));
    promtool(directory.path(), &["test", "rules", "alerts.test.yml"]).status.success()
}

#[test]
fn unit_tests_of_alert_that_never_fires_or_too_soon_fail() {
    let rules = read("alerts.yml");
    for (name, rule) in alerts(&rules) {
        let never = rule
            .replace("expr: ", "expr: vector(0) == 1 and ")
            .replace("expr: vector(0) == 1 and |", "expr: |\n          vector(0) == 1 and");
        assert!(
            never != rule && !passes_with(&rules.replace(rule, &never)),
            "the unit tests pass although {name} never fires"
        );
        let has_delay = rule.contains("for: ");
        let at_once: String =
            rule.lines().filter(|line| !line.contains("for: ")).flat_map(|line| [line, "\n"]).collect();
        assert!(
            !has_delay || !passes_with(&rules.replace(rule, &at_once)),
            "the unit tests pass although {name} fires too soon"
        );
    }
}

#[test]
fn every_alert_has_severity_description_and_runbook() {
    let rules = read("alerts.yml");
    assert!(!alerts(&rules).is_empty());
    for (name, rule) in alerts(&rules) {
        assert!(
            ["critical", "warning"].iter().any(|word| rule.contains(&format!("severity: {word}\n"))),
            "{name}"
        );
        assert!(rule.contains("summary: ") && rule.contains("description: "), "{name}");
        let runbook = format!("runbook_url: OPERATIONS.md#{}\n", name.to_lowercase());
        assert!(rule.contains(&runbook), "{name} has no {runbook}");
    }
}

#[test]
fn every_panel_has_description_unit_and_datasource() {
    assert!(Path::new(folder()).is_dir());
    for (name, dashboard) in dashboards() {
        let panels = dashboard["panels"].as_array().unwrap().iter().filter(|panel| panel["type"] != "row");
        for panel in panels {
            let title = &panel["title"];
            assert!(panel["description"].as_str().is_some_and(|text| text.len() > 20), "{name}, {title}");
            assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{name}, {title} has no unit");
            assert_eq!(panel["datasource"]["uid"], "${datasource}", "{name}, {title}");
        }
    }
}
