//! What a socket answered, checked: the text of a microVM's metrics, in the dialect of `prometheus::text`.
//!
//! The whole text is refused for one line that is not as it should be: what is half right is not a microVM of ours, and its
//! samples beside those of others could spoil the page for all. A text that has passed cannot: its families are `chronovisor_`
//! ones that are not the exporter's own, each once, of the type that this program knows it by; its samples belong to them and
//! have no label `socket`, which the exporter adds; names, labels and values are of the format's grammar.
//!
//! Families that this program does not know pass too: a microVM may be of a newer version.

use std::ops::Range;

use crate::prometheus::text::Kind;
use crate::prometheus::vcpus::FAMILIES;

use super::page;

/// What is not as it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}")]
pub(super) struct Malformed {
    /// From 1.
    line: usize,
    what: &'static str,
}

impl Malformed {
    /// It is no text at all.
    pub const NOT_UTF8: Self = Self {
        line: 1,
        what: "not UTF-8",
    };
}

/// More families than that no version will have.
const MAX_FAMILIES: usize = 128;

/// The text, and where its families are.
#[derive(Debug)]
pub(super) struct Metrics {
    text: String,
    families: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    name: Range<usize>,
    help: Range<usize>,
    kind: Kind,
    samples: Range<usize>,
}

/// One family of a text.
#[derive(Clone, Copy, Debug)]
pub(super) struct Family<'a> {
    pub name: &'a str,
    pub kind: Kind,
    /// Escaped, as it came.
    pub help: &'a str,
    /// Whole lines.
    pub samples: &'a str,
}

impl Metrics {
    /// Checks `text`.
    pub fn parse(mut text: String) -> Result<Self, Malformed> {
        let families = check(&text)?;
        text.shrink_to_fit();
        Ok(Self { text, families })
    }

    pub fn families(&self) -> impl Iterator<Item = Family<'_>> {
        self.families.iter().map(|place| Family {
            name: &self.text[place.name.clone()],
            kind: place.kind,
            help: &self.text[place.help.clone()],
            samples: &self.text[place.samples.clone()],
        })
    }

    /// Bytes of the text.
    pub fn size(&self) -> usize {
        self.text.len()
    }
}

/// Lines of samples, each cut where a label may be put first: after the name, which is followed by a brace where there are
/// labels already.
pub(super) fn cut(samples: &str) -> impl Iterator<Item = (&str, &str)> {
    let cut = |line: &str| line.find(['{', ' ']).unwrap_or(line.len());
    samples.split_inclusive('\n').map(move |line| line.split_at(cut(line)))
}

fn check(text: &str) -> Result<Vec<Place>, Malformed> {
    let mut families: Vec<Place> = Vec::new();
    // The name and the help that a TYPE line has to follow.
    let mut helped: Option<(Range<usize>, Range<usize>)> = None;
    let mut begin = 0;
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let refuse = |what| Malformed { line: index + 1, what };
        let end = begin + line.len();
        let line = line.strip_suffix('\n').ok_or(refuse("it has no end"))?;
        // Prometheus's reader takes a NUL for the end.
        if line.bytes().any(|byte| byte.is_ascii_control()) {
            return Err(refuse("a control character"));
        }
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').ok_or(refuse("a HELP without text"))?;
            if helped.is_some() || families.len() == MAX_FAMILIES {
                return Err(refuse("a HELP too many"));
            }
            if families.iter().any(|family| &text[family.name.clone()] == name) {
                return Err(refuse("a family comes twice"));
            }
            name_of_family(name).and_then(|()| escaped(help)).map_err(refuse)?;
            let name_at = begin + "# HELP ".len();
            let help_at = name_at + name.len() + 1;
            helped = Some((name_at..help_at - 1, help_at..end - 1));
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, help) = helped.take().ok_or(refuse("a TYPE without a HELP before it"))?;
            let (named, kind) = rest.split_once(' ').ok_or(refuse("a TYPE without a type"))?;
            if named != &text[name.clone()] {
                return Err(refuse("a TYPE of another name than the HELP before it"));
            }
            let kind = kind_of_family(named, kind).map_err(refuse)?;
            let samples = end..end;
            families.push(Place {
                name,
                help,
                kind,
                samples,
            });
        } else {
            let family = families.last_mut().filter(|_| helped.is_none());
            let family = family.ok_or(refuse("a sample before its HELP and TYPE"))?;
            sample(line, &text[family.name.clone()], family.kind).map_err(refuse)?;
            family.samples.end = end;
        }
        begin = end;
    }
    match families.first() {
        Some(first) if helped.is_none() && &text[first.name.clone()] == FAMILIES[0].name => Ok(families),
        _ => Err(Malformed {
            line: 1,
            what: "no chronovisor_build_info comes first, or the last HELP has no TYPE",
        }),
    }
}

type Checked = Result<(), &'static str>;

fn name_of_family(name: &str) -> Checked {
    if !name.starts_with("chronovisor_") || page::is_own(name) {
        return Err("a family that no microVM has");
    }
    word(name)
}

/// Letters, digits and underscores; not a digit first. (Colons are for recording rules.)
fn word(name: &str) -> Checked {
    let fits = |byte: u8| byte == b'_' || byte.is_ascii_alphanumeric();
    if name.is_empty() || name.as_bytes()[0].is_ascii_digit() || !name.bytes().all(fits) {
        return Err("not a name");
    }
    Ok(())
}

/// A help's escapes are `\\` and `\n`.
fn escaped(help: &str) -> Checked {
    let mut chars = help.chars();
    while let Some(c) = chars.next() {
        if c == '\\' && !matches!(chars.next(), Some('\\' | 'n')) {
            return Err("an escape that is none");
        }
    }
    Ok(())
}

fn kind_of_family(name: &str, kind: &str) -> Result<Kind, &'static str> {
    let kinds = [Kind::Counter, Kind::Gauge, Kind::Histogram];
    let kind = kinds.into_iter().find(|known| known.name() == kind);
    let kind = kind.ok_or("a type that is not known here")?;
    match FAMILIES.iter().find(|family| family.name == name) {
        Some(known) if known.kind != kind => Err("a family of another type than it has"),
        _ => Ok(kind),
    }
}

fn sample(line: &str, family: &str, kind: Kind) -> Checked {
    let at = line.find(['{', ' ']).ok_or("a sample without a value")?;
    let (name, rest) = line.split_at(at);
    let suffix = name.strip_prefix(family).ok_or("a sample of another family")?;
    match (kind, suffix) {
        (Kind::Counter | Kind::Gauge, "") | (Kind::Histogram, "_bucket" | "_sum" | "_count") => {}
        _ => return Err("a sample of another family"),
    }
    let rest = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => rest,
    };
    let value = rest.strip_prefix(' ').ok_or("a sample without a value")?;
    number(value)
}

/// Digits, and perhaps more of them behind a point: all that is written here. What else Rust takes for a float, Go may not (`-nan`,
/// `1e400`), and Prometheus would refuse the whole page for it.
fn number(text: &str) -> Checked {
    const LONGEST: usize = 40;
    let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if text.len() > LONGEST || !digits(whole) || !digits(part) {
        return Err("a value that is no number");
    }
    Ok(())
}

/// Takes `name="value",...}` off the front of `text`, and gives what is left.
fn labels(mut text: &str) -> Result<&str, &'static str> {
    loop {
        let (name, rest) = text.split_once("=\"").ok_or("a label without a value")?;
        word(name)?;
        if name == page::SOCKET || name.starts_with("__") {
            return Err("a label that is not the microVM's to give");
        }
        let end = end_of_value(rest)?;
        text = &rest[end + 1..];
        match text.as_bytes().first() {
            Some(b'}') => return Ok(&text[1..]),
            Some(b',') => text = &text[1..],
            _ => return Err("labels without an end"),
        }
    }
}

/// Where the quote is that ends a label's value. Its escapes are `\\`, `\"` and `\n`.
fn end_of_value(text: &str) -> Result<usize, &'static str> {
    let mut bytes = text.bytes().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => return Ok(at),
            b'\\' if !matches!(bytes.next(), Some((_, b'\\' | b'"' | b'n'))) => {
                return Err("an escape that is none");
            }
            _ => {}
        }
    }
    Err("a label's value without an end")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOLDEN: &str = include_str!("../prometheus/golden.txt");

    #[test]
    fn what_a_microvm_answers_is_taken_whole() {
        let metrics = Metrics::parse(GOLDEN.to_owned()).unwrap();
        let names: Vec<_> = metrics.families().map(|family| family.name).collect();
        let expected: Vec<_> = FAMILIES.iter().map(|family| family.name).collect();
        assert_eq!(names, expected);
        let again: String = metrics
            .families()
            .map(
                |Family {
                     name,
                     kind,
                     help,
                     samples,
                 }| { format!("# HELP {name} {help}\n# TYPE {name} {}\n{samples}", kind.name()) },
            )
            .collect();
        assert_eq!(again, GOLDEN);
    }

    /// `more` after a family that is as it should be.
    fn with(more: &str) -> Result<Metrics, Malformed> {
        Metrics::parse(format!(
            "# HELP chronovisor_build_info One.\n# TYPE chronovisor_build_info gauge\nchronovisor_build_info 1\n{more}"
        ))
    }

    #[test]
    fn a_newer_microvms_families_pass() {
        let newer = "# HELP chronovisor_new_total A \\\\ and a \\n.\n# TYPE chronovisor_new_total counter\n\
                     chronovisor_new_total{a=\"\\\"}{\\\\\\n,\"} 1\nchronovisor_new_total 2.50\n";
        let metrics = with(newer).unwrap();
        let family = metrics.families().nth(1).unwrap();
        assert_eq!(
            (family.name, family.samples.lines().count()),
            ("chronovisor_new_total", 2)
        );
        let cut: Vec<_> = cut(family.samples).map(|(_, rest)| rest).collect();
        assert_eq!(cut[0], "{a=\"\\\"}{\\\\\\n,\"} 1\n");
        assert_eq!(cut[1], " 2.50\n");
    }

    #[test]
    fn one_line_that_is_wrong_spoils_the_text() {
        let head = "# HELP chronovisor_a A.\n# TYPE chronovisor_a gauge\n";
        let samples = [
            ("chronovisor_a", "value"),
            ("chronovisor_a ", "number"),
            ("chronovisor_a 1 1700000000000", "number"),
            ("chronovisor_a -nan", "number"),
            ("chronovisor_a 1e400", "number"),
            ("chronovisor_a 1.", "number"),
            ("chronovisor_a{a=\"\0\"} 1", "control"),
            ("chronovisor_a 1\r", "control"),
            ("chronovisor_a  1", "number"),
            ("chronovisor_a{} 1", "label"),
            ("chronovisor_a{a=\"b\"}1", "value"),
            ("chronovisor_a{a=\"b\",} 1", "label"),
            ("chronovisor_a{a=\"b} 1", "end"),
            ("chronovisor_a{a=\"b\" 1", "end"),
            ("chronovisor_a{a=\"\\x\"} 1", "escape"),
            ("chronovisor_a{1a=\"b\"} 1", "name"),
            ("chronovisor_a{socket=\"/other\"} 1", "not the microVM's"),
            ("chronovisor_a{__name__=\"up\"} 1", "not the microVM's"),
            ("chronovisor_b 1", "another family"),
            ("chronovisor_a_sum 1", "another family"),
            ("up 1", "another family"),
            ("", "value"),
            ("# a comment", "another family"),
        ];
        for (line, says) in samples {
            let said = with(&format!("{head}{line}\n")).unwrap_err();
            assert!(said.line == 6 && said.what.contains(says), "{line}: {said}");
        }
        let heads = [
            ("# HELP chronovisor_a A.\nchronovisor_a 1\n", "before its"),
            ("# TYPE chronovisor_a gauge\n", "without a HELP"),
            ("# HELP chronovisor_a A.\n# TYPE chronovisor_b gauge\n", "another name"),
            ("# HELP chronovisor_a A.\n# TYPE chronovisor_a summary\n", "not known"),
            ("# HELP chronovisor_a\n", "without text"),
            ("# HELP chronovisor_a A \\t.\n", "escape"),
            ("# HELP chronovisor_a A.\n# HELP chronovisor_b B.\n", "too many"),
            ("# HELP chronovisor_build_info A.\n", "twice"),
            ("# HELP up A.\n", "no microVM has"),
            ("# HELP chronovisor_up A.\n", "no microVM has"),
            ("# HELP chronovisor_exporter_x A.\n", "no microVM has"),
            ("# HELP chronovisor_ä A.\n", "not a name"),
            (
                "# HELP chronovisor_vcpus A.\n# TYPE chronovisor_vcpus counter\n",
                "another type",
            ),
            ("# HELP chronovisor_a A.", "no end"),
        ];
        for (lines, says) in heads {
            let said = with(lines).unwrap_err();
            assert!(said.what.contains(says), "{lines}: {said}");
        }
        for text in ["", "\n", "hello\n", head, "# HELP chronovisor_build_info A.\n"] {
            assert!(Metrics::parse(text.to_owned()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text: String) {
            let _ = Metrics::parse(text.clone());
            let _ = with(&text);
        }

        #[test]
        fn a_damaged_text_is_refused_or_still_of_the_grammar(at in 0..GOLDEN.len(), by in prop::char::any()) {
            let mut text = GOLDEN.to_owned();
            if !text.is_char_boundary(at) {
                return Ok(());
            }
            text.remove(at);
            text.insert(at, by);
            if let Ok(metrics) = Metrics::parse(text) {
                for family in metrics.families() {
                    for (name, rest) in cut(family.samples) {
                        prop_assert!(name.starts_with(family.name), "{}{}", name, rest);
                        let whole = rest.starts_with(['{', ' ']) && rest.ends_with('\n');
                        prop_assert!(whole, "{}", rest);
                    }
                }
            }
        }
    }
}
