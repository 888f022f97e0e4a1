//! Writing: families with their help and type, samples with their labels, seconds that lose nothing.

use std::fmt::{self, Display, Write as _};

/// What a family's samples are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Never smaller than before, but after a restart.
    Counter,
    /// Any value.
    Gauge,
    /// Counts by upper edges, each with those below it.
    Histogram,
}

impl Kind {
    /// Its name in a TYPE line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// A family of samples: one metric, whatever its labels.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Its name.
    pub name: &'static str,
    /// What its samples are.
    pub kind: Kind,
    /// What they mean, in one line without a backslash: nothing in it is escaped.
    pub help: &'static str,
}

/// A label's name, and its value as it is.
pub type Label<'a> = (&'a str, &'a dyn Display);

/// A text under way.
#[derive(Debug, Default)]
pub struct Text(String);

impl Text {
    /// An empty one with room for `bytes`.
    #[must_use]
    pub fn with_capacity(bytes: usize) -> Self {
        Self(String::with_capacity(bytes))
    }

    /// Begins `family`: its samples follow, and those of no other until the next one begins.
    pub fn family(&mut self, family: &Family) {
        self.begin(family.name, family.kind.name(), family.help);
    }

    /// As [`Text::family`], with a help that is escaped already.
    pub fn begin(&mut self, name: &str, kind: &str, help: &str) {
        self.push(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    /// A sample. `suffix` is a histogram's `_bucket`, `_sum` or `_count`, and empty otherwise.
    pub fn sample(&mut self, name: &str, suffix: &str, labels: &[Label], value: impl Display) {
        self.push(format_args!("{name}{suffix}"));
        for (index, (label, value)) in labels.iter().enumerate() {
            self.0.push(if index == 0 { '{' } else { ',' });
            push_label(&mut self.0, label, value);
        }
        let end = if labels.is_empty() { "" } else { "}" };
        self.push(format_args!("{end} {value}\n"));
    }

    /// Adds what is text in this format already.
    pub fn raw(&mut self, text: &str) {
        self.0.push_str(text);
    }

    /// The text.
    #[must_use]
    pub fn finish(self) -> String {
        self.0
    }

    /// Writing to a string does not fail.
    fn push(&mut self, what: fmt::Arguments) {
        let _ = self.0.write_fmt(what);
    }
}

/// `name="value"`, the value escaped.
#[must_use]
pub fn label(name: &str, value: &dyn Display) -> String {
    let mut text = String::new();
    push_label(&mut text, name, value);
    text
}

fn push_label(text: &mut String, name: &str, value: &dyn Display) {
    text.push_str(name);
    text.push_str("=\"");
    // Writing to a string does not fail.
    let _ = write!(Escaped(text), "{value}");
    text.push('"');
}

/// A label's value on its way into a text: backslash, quote and line feed are escaped.
struct Escaped<'a>(&'a mut String);

impl fmt::Write for Escaped<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for c in text.chars() {
            match c {
                '\\' => self.0.push_str("\\\\"),
                '"' => self.0.push_str("\\\""),
                '\n' => self.0.push_str("\\n"),
                c => self.0.push(c),
            }
        }
        Ok(())
    }
}

/// Nanoseconds, shown in seconds: all nine decimals, or none where they are zeros. Never by way of a float, which holds
/// nanoseconds exactly for 104 days only.
#[derive(Clone, Copy, Debug)]
pub struct Seconds(pub u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (whole, ns) = (self.0 / 1_000_000_000, self.0 % 1_000_000_000);
        match ns {
            0 => write!(f, "{whole}"),
            _ => write!(f, "{whole}.{ns:09}"),
        }
    }
}

/// The inverse of [`Seconds`]; `None` for what it never writes.
#[cfg(test)]
pub(crate) fn ns_of(text: &str) -> Option<u64> {
    let (whole, ns) = text.split_once('.').unwrap_or((text, "000000000"));
    let ns = (ns.len() == 9).then(|| ns.parse::<u64>().ok())??;
    whole.parse::<u64>().ok()?.checked_mul(1_000_000_000)?.checked_add(ns)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn values_of_labels_are_escaped_and_nothing_else_is() {
        let mut text = Text::default();
        text.family(&Family {
            name: "a_total",
            kind: Kind::Counter,
            help: "One.",
        });
        text.sample("a_total", "", &[("l", &"a\\b\"c\nd{e}=é,"), ("m", &7)], 1);
        text.sample("a_total", "", &[], 2);
        assert_eq!(
            text.finish(),
            "# HELP a_total One.\n# TYPE a_total counter\na_total{l=\"a\\\\b\\\"c\\nd{e}=é,\",m=\"7\"} 1\na_total 2\n"
        );
    }

    #[test]
    fn seconds_are_exact_where_floats_are_not() {
        let table = [
            (0, "0"),
            (1, "0.000000001"),
            (1_000_000_000, "1"),
            (1_500_000_000, "1.500000000"),
            // 2^53 + 1, the first integer that a float does not hold.
            (9_007_199_254_740_993, "9007199.254740993"),
            (u64::MAX, "18446744073.709551615"),
        ];
        for (ns, text) in table {
            assert_eq!(Seconds(ns).to_string(), text);
        }
    }

    proptest! {
        #[test]
        fn seconds_can_be_read_back_to_the_nanosecond(ns: u64) {
            prop_assert_eq!(ns_of(&Seconds(ns).to_string()), Some(ns));
        }
    }
}
