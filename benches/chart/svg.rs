//! Writes the SVG elements of the picture. Colours are CSS classes, so that the picture follows light and dark mode.

use std::fmt::Write;

pub const WIDTH: f64 = 860.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 16.0;

/// Styles for light and dark mode. The picture has its own background, so it is readable on every page.
const STYLE: &str = "\
text{font:12px system-ui,-apple-system,'Segoe UI',sans-serif;fill:#24292f}\
.title{font-weight:600}.small{font-size:11px;fill:#57606a}.end{text-anchor:end}.middle{text-anchor:middle}\
.page{fill:#fff;stroke:#d0d7de}.grid{stroke:#eaeef2}.away{fill:#cf222e;opacity:.09}.mark{stroke:#cf222e;stroke-dasharray:4 3}\
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}.thin{stroke-width:1;opacity:.75}\
.s1{stroke:#0969da}.s2{stroke:#bc4c00}.s3{stroke:#8250df}.f1{fill:#0969da}.f2{fill:#bc4c00}.f3{fill:#8250df}\
.a1{fill:#4ac26b}.a2{fill:#54aeff}.a3{fill:#eac54f}.a4{fill:#cf222e}\
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.small{fill:#9198a1}.page{fill:#0d1117;stroke:#30363d}.grid{stroke:#21262d}\
.away{fill:#f85149;opacity:.16}.mark{stroke:#f85149}\
.s1{stroke:#58a6ff}.s2{stroke:#f0883e}.s3{stroke:#bc8cff}.f1{fill:#58a6ff}.f2{fill:#f0883e}.f3{fill:#bc8cff}\
.a1{fill:#2ea043}.a2{fill:#388bfd}.a3{fill:#bb8009}.a4{fill:#f85149}}";

pub struct Picture {
    body: String,
    height: f64,
    span: f64,
}

/// The area of a panel: its position on the page, and the values of its lower and upper edge.
pub struct Frame {
    pub top: f64,
    pub height: f64,
    pub low: f64,
    pub high: f64,
}

impl Frame {
    pub fn y(&self, value: f64) -> f64 {
        let share = (value.clamp(self.low, self.high) - self.low) / (self.high - self.low);
        self.top + self.height * (1.0 - share)
    }
}

impl Picture {
    pub fn new(height: f64, span: f64) -> Self {
        Self { body: String::new(), height, span }
    }

    pub fn x(&self, seconds: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.span
    }

    pub fn text(&mut self, class: &str, x: f64, y: f64, text: &str) {
        let _ = writeln!(self.body, r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{text}</text>"#);
    }

    pub fn rect(&mut self, class: &str, (x, y): (f64, f64), (width, height): (f64, f64)) {
        let size = format!(r#"width="{width:.1}" height="{height:.1}""#);
        let _ = writeln!(self.body, r#"<rect class="{class}" x="{x:.1}" y="{y:.1}" {size}/>"#);
    }

    pub fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = writeln!(
            self.body,
            r#"<line class="{class}" x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}"/>"#,
            from.0, from.1, to.0, to.1
        );
    }

    /// Draws a line through points, in seconds and in the unit of the frame.
    pub fn curve(&mut self, class: &str, frame: &Frame, points: impl Iterator<Item = (f64, f64)>) {
        let points = self.path(frame, points);
        let _ = writeln!(self.body, r#"<polyline class="{class}" points="{points}"/>"#);
    }

    /// Fills the area between two lines.
    pub fn area(&mut self, class: &str, frame: &Frame, lower: &[(f64, f64)], upper: &[(f64, f64)]) {
        let points = self.path(frame, upper.iter().chain(lower.iter().rev()).copied());
        let _ = writeln!(self.body, r#"<polygon class="{class}" points="{points}"/>"#);
    }

    fn path(&self, frame: &Frame, points: impl Iterator<Item = (f64, f64)>) -> String {
        points.map(|(x, y)| format!("{:.1},{:.1} ", self.x(x), frame.y(y))).collect()
    }

    /// Draws a horizontal line with a label.
    pub fn grid(&mut self, frame: &Frame, value: f64, label: &str) {
        let y = frame.y(value);
        self.line("grid", (LEFT, y), (WIDTH - RIGHT, y));
        self.text("small end", LEFT - 6.0, y + 4.0, label);
    }

    pub fn title(&mut self, frame: &Frame, title: &str, legend: &[(&str, &str)]) {
        self.text("title", LEFT, frame.top - 8.0, title);
        let mut x = WIDTH - RIGHT;
        for (class, name) in legend.iter().rev() {
            // A letter of 11 px is about 6 px wide.
            x -= name.chars().count() as f64 * 5.8;
            self.text("small", x, frame.top - 8.0, name);
            x -= 15.0;
            self.rect(class, (x, frame.top - 17.0), (10.0, 10.0));
            x -= 14.0;
        }
    }

    pub fn finish(self, title: &str) -> String {
        let (width, height) = (WIDTH, self.height);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" role=\"img\">\n<title>{title}</title>\n\
             <style>{STYLE}</style>\n<rect class=\"page\" x=\".5\" y=\".5\" width=\"{}\" height=\"{}\" rx=\"6\"/>\n{}</svg>\n",
            width - 1.0,
            height - 1.0,
            self.body
        )
    }
}
