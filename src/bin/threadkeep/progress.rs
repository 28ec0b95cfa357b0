//! How far long work is: a bar on a terminal, now and then a line elsewhere. On standard error.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::failure::tell;

/// Between two lines.
const PAUSE: Duration = Duration::from_secs(5);

pub struct Progress {
    bar: Option<ProgressBar>,
    what: &'static str,
    told: Instant,
    at: u64,
}

impl Progress {
    /// Of so much, where that is known.
    pub fn new(what: &'static str, of: Option<u64>) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| bar(what, of));
        Self { bar, what, told: Instant::now(), at: 0 }
    }

    /// So much is done, of so much.
    pub fn set(&mut self, at: u64, of: Option<u64>) {
        if let Some(bar) = &self.bar {
            of.into_iter().for_each(|of| bar.set_length(of));
            return bar.set_position(at);
        }
        if at != self.at && self.told.elapsed() >= PAUSE {
            let of = of.map(|of| format!(" of {of}")).unwrap_or_default();
            tell(&format!("{}: {at}{of}", self.what));
            self.told = Instant::now();
        }
        self.at = at;
    }

    /// Says beside the bar why it does not move.
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

fn bar(what: &'static str, of: Option<u64>) -> ProgressBar {
    let (bar, template) = match of {
        Some(of) => (ProgressBar::new(of), "{prefix} {wide_bar} {pos}/{len} {eta} {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {prefix} {pos} {msg}"),
    };
    bar.set_draw_target(ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(what);
    bar
}
