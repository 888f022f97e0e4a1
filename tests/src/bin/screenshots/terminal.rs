//! A terminal's screen as a page: what `tmux capture-pane -e -p` prints, text and SGR sequences (ECMA-48, 8.3.117), as HTML.

use std::fmt::Write;

/// Colours of a dark terminal: the first 16 of 256, xterm's.
const COLOURS: [&str; 16] = [
    "#14171b", "#e05555", "#4fb84f", "#d0b03c", "#5a8fe8", "#c070d0", "#3fb8b8", "#d5d8dc", "#707880", "#ff7b72",
    "#7ee787", "#f2d35c", "#8ab4ff", "#e6a3f0", "#76e3e3", "#ffffff",
];

/// How a cell is drawn.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Style {
    foreground: Option<String>,
    background: Option<String>,
    bold: bool,
    dim: bool,
    italic: bool,
    underlined: bool,
    reversed: bool,
}

impl Style {
    /// Takes the parameters of one sequence.
    fn take(&mut self, parameters: &str) {
        let mut numbers = parameters.split([';', ':']).map(|n| n.parse().unwrap_or(0_u8));
        while let Some(number) = numbers.next() {
            match number {
                0 => *self = Self::default(),
                1 => self.bold = true,
                2 => self.dim = true,
                3 => self.italic = true,
                4 => self.underlined = true,
                7 => self.reversed = true,
                22 => (self.bold, self.dim) = (false, false),
                23 => self.italic = false,
                24 => self.underlined = false,
                27 => self.reversed = false,
                30..=37 => self.foreground = Some(colour(number - 30)),
                38 => self.foreground = extended(&mut numbers),
                39 => self.foreground = None,
                40..=47 => self.background = Some(colour(number - 40)),
                48 => self.background = extended(&mut numbers),
                49 => self.background = None,
                90..=97 => self.foreground = Some(colour(number - 90 + 8)),
                100..=107 => self.background = Some(colour(number - 100 + 8)),
                _ => {}
            }
        }
    }

    fn css(&self) -> String {
        let foreground = self.foreground.as_deref().unwrap_or(COLOURS[7]);
        let background = self.background.as_deref().unwrap_or(COLOURS[0]);
        let (foreground, background) = match self.reversed {
            true => (background, foreground),
            false => (foreground, background),
        };
        let mut css = format!("color:{foreground};background:{background}");
        for (is, says) in [
            (self.bold, ";font-weight:bold"),
            (self.dim, ";opacity:.65"),
            (self.italic, ";font-style:italic"),
            (self.underlined, ";text-decoration:underline"),
        ] {
            css += if is { says } else { "" };
        }
        css
    }
}

/// A colour of the 256: the 16, a cube of 6 by 6 by 6, 24 greys.
fn colour(number: u8) -> String {
    let level = |n: u8| if n == 0 { 0 } else { 55 + 40 * n };
    match number {
        0..=15 => COLOURS[usize::from(number)].to_owned(),
        16..=231 => {
            let n = number - 16;
            format!("rgb({},{},{})", level(n / 36), level(n / 6 % 6), level(n % 6))
        }
        _ => {
            let grey = 8 + 10 * (number - 232);
            format!("rgb({grey},{grey},{grey})")
        }
    }
}

/// What follows 38 or 48: `5;N`, or `2;R;G;B`.
fn extended(numbers: &mut impl Iterator<Item = u8>) -> Option<String> {
    match numbers.next()? {
        5 => numbers.next().map(colour),
        2 => Some(format!(
            "rgb({},{},{})",
            numbers.next()?,
            numbers.next()?,
            numbers.next()?
        )),
        _ => None,
    }
}

/// The page.
pub fn page(screen: &str) -> String {
    let mut html = format!(
        "<!doctype html><meta charset=utf-8><body style='margin:0;background:{}'>\
         <pre style='display:inline-block;margin:0;padding:12px 14px;font:14px/17px \"DejaVu Sans Mono\",monospace'>",
        COLOURS[0]
    );
    let mut style = Style::default();
    // The last line ends with a newline too.
    for line in screen.trim_end_matches('\n').split('\n') {
        let mut pieces = line.split("\x1b[");
        let mut put = |style: &Style, text: &str| {
            if !text.is_empty() {
                let text = text.replace('&', "&amp;").replace('<', "&lt;");
                let _ = write!(html, "<span style='{}'>{text}</span>", style.css());
            }
        };
        put(&style, pieces.next().unwrap_or_default());
        for piece in pieces {
            // tmux writes no sequence but SGR, and shifts in and out of line drawing, which are left out.
            let end = piece.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(piece.len());
            let (parameters, rest) = piece.split_at(end);
            if rest.starts_with('m') {
                style.take(parameters);
            }
            put(&style, rest.get(1..).unwrap_or_default());
        }
        html.push('\n');
    }
    html + "</pre>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_text_and_colours_hold_until_they_are_changed() {
        let html = page("a<b \x1b[1;31mred\nstill\x1b[0m not\n\n");
        assert!(html.contains("a&lt;b "), "{html}");
        assert!(html.contains(&format!(
            "<span style='color:{};background:{};font-weight:bold'>red</span>\n",
            COLOURS[1], COLOURS[0]
        )));
        assert!(html.contains(";font-weight:bold'>still</span>"), "{html}");
        assert!(html.ends_with("'> not</span>\n</pre>"), "{html}");
    }

    #[test]
    fn all_kinds_of_colour_are_understood() {
        for (sequence, css) in [
            ("38;5;196", "color:rgb(255,0,0);"),
            ("38;5;232", "color:rgb(8,8,8);"),
            ("38;5;255", "color:rgb(238,238,238);"),
            ("38;5;9", "color:#ff7b72;"),
            ("38;2;1;2;3", "color:rgb(1,2,3);"),
            ("48;5;16", "background:rgb(0,0,0)"),
            ("94", "color:#8ab4ff;"),
            ("7", "color:#14171b;background:#d5d8dc"),
            ("31;39", "color:#d5d8dc;"),
        ] {
            let mut style = Style::default();
            style.take(sequence);
            assert!(style.css().contains(css), "{sequence}: {}", style.css());
        }
    }
}
