//! Progress on standard error: a bar on a terminal, and a line every few seconds elsewhere.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::tell;

/// The time between two lines.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

pub struct Progress {
    bar: Option<ProgressBar>,
    label: &'static str,
    printed_at: Instant,
    position: u64,
}

impl Progress {
    /// Starts the progress of `label`, with the total if it is known.
    pub fn new(label: &'static str, total: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(label, total));
        Self { bar, label, printed_at: Instant::now(), position: 0 }
    }

    /// Sets the position, and the total if it is known.
    pub fn set(&mut self, position: u64, total: Option<u64>) {
        if let Some(bar) = &self.bar {
            if let Some(total) = total {
                bar.set_length(total);
            }
            return bar.set_position(position);
        }
        if position != self.position && self.printed_at.elapsed() >= LINE_INTERVAL {
            let total = total.map(|total| format!(" of {total}")).unwrap_or_default();
            tell(&format!("{}: {position}{total}", self.label));
            self.printed_at = Instant::now();
        }
        self.position = position;
    }

    /// Shows a note beside the bar, such as the reason why it does not move.
    pub fn note(&self, text: &str) {
        if let Some(bar) = &self.bar {
            bar.set_message(text.to_owned());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &'static str, total: Option<u64>) -> ProgressBar {
    let (bar, template) = match total {
        Some(total) => (ProgressBar::new(total), "{prefix} {wide_bar} {pos}/{len} {eta} {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {prefix} {pos} {msg}"),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(label);
    bar
}
