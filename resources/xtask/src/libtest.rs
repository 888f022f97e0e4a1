//! Reads what Rust's test harness prints, `--test-threads=1 --show-output`, and counts.
//!
//! A test may print in between (what a child process prints is not captured), may skip itself, and may take the whole
//! program down with it. So a verdict counts only when the next test, or the summary, has followed it; the summary must
//! agree; and a test without a verdict has failed.

use std::collections::BTreeMap;

/// What became of the tests, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many passed.
    pub passed: usize,
    /// Those that failed.
    pub failed: Vec<String>,
    /// Those that were skipped, and why.
    pub skipped: Vec<(String, String)>,
}

impl Tally {
    /// Adds `other`'s.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
    }
}

/// Verdicts, as the harness prints them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Passed,
    Failed,
    Ignored,
}

/// Follows the output of one test program.
#[derive(Debug, Default)]
pub struct Parser {
    current: Option<(String, Option<Verdict>)>,
    verdicts: Vec<(String, Verdict)>,
    /// `SKIPPED bed: test: why`: test and why.
    skipped: BTreeMap<String, String>,
    /// passed, failed, ignored
    summary: Option<[usize; 3]>,
}

impl Parser {
    /// Takes the next line.
    pub fn line(&mut self, line: &str) {
        if let Some(skip) = line.find("SKIPPED ").and_then(|at| skip(&line[at..])) {
            self.skipped.insert(skip.0.to_owned(), skip.1.to_owned());
        }
        if let Some((name, rest)) = line.strip_prefix("test ").and_then(|line| line.split_once(" ... ")) {
            self.end_current();
            self.current = Some((name.to_owned(), verdict(rest)));
        } else if let Some(rest) = line.strip_prefix("test result: ") {
            self.end_current();
            self.summary = summary(rest);
        } else if let Some((_, current)) = &mut self.current {
            // The last one wins: a test that prints a line "ok" and then fails has failed.
            *current = verdict(line).or(*current);
        }
    }

    /// Ends the program with what it left as its exit status. `program` names what cannot be said of one test.
    pub fn finish(mut self, program: &str, success: bool) -> Tally {
        self.end_current();
        let mut tally = Tally::default();
        for (name, verdict) in &self.verdicts {
            match (verdict, self.skipped.get(name)) {
                (Verdict::Failed, _) => tally.failed.push(name.clone()),
                (Verdict::Passed, Some(why)) => tally.skipped.push((name.clone(), why.clone())),
                (Verdict::Passed, None) => tally.passed += 1,
                (Verdict::Ignored, _) => tally.skipped.push((name.clone(), "ignored".to_owned())),
            }
        }
        let count = |verdict| self.verdicts.iter().filter(|(_, v)| *v == verdict).count();
        let counted = [count(Verdict::Passed), count(Verdict::Failed), count(Verdict::Ignored)];
        match self.summary {
            // Aborted: the test it was at has failed already, for want of a verdict, unless there was none.
            None if tally.failed.is_empty() => tally.failed.push(format!("{program}: ended without a summary")),
            Some(summary) if summary != counted => {
                tally.failed.push(format!(
                    "{program}: its summary says {summary:?}, its lines {counted:?}"
                ));
            }
            _ if !success && tally.failed.is_empty() => tally.failed.push(format!("{program}: its exit status")),
            _ => {}
        }
        tally
    }

    fn end_current(&mut self) {
        if let Some((name, verdict)) = self.current.take() {
            self.verdicts.push((name, verdict.unwrap_or(Verdict::Failed)));
        }
    }
}

fn verdict(line: &str) -> Option<Verdict> {
    match line {
        "ok" => Some(Verdict::Passed),
        "FAILED" => Some(Verdict::Failed),
        "ignored" => Some(Verdict::Ignored),
        _ if line.starts_with("ignored, ") => Some(Verdict::Ignored),
        // Printed behind a line that the test left unfinished.
        _ if line.ends_with("FAILED") => Some(Verdict::Failed),
        _ if line.ends_with("ok") => Some(Verdict::Passed),
        _ => None,
    }
}

/// `SKIPPED bed: test: why`, the test's name possibly a path with `::`.
fn skip(line: &str) -> Option<(&str, &str)> {
    let (_bed, rest) = line.strip_prefix("SKIPPED ")?.split_once(": ")?;
    rest.split_once(": ")
}

/// `ok. 3 passed; 0 failed; 1 ignored; ...`
fn summary(line: &str) -> Option<[usize; 3]> {
    let (_, counts) = line.split_once(". ")?;
    let mut counts = counts
        .split("; ")
        .map(|count| count.split_once(' ').and_then(|(number, _)| number.parse().ok()));
    Some([counts.next()??, counts.next()??, counts.next()??])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(output: &str, success: bool) -> Tally {
        let mut parser = Parser::default();
        output.lines().for_each(|line| parser.line(line));
        parser.finish("program", success)
    }

    #[test]
    fn verdicts_are_counted() {
        let output = "\nrunning 4 tests\ntest a ... ok\ntest m::b ... FAILED\ntest c ... ignored\ntest d ... ignored, slow\n\n\
            test result: FAILED. 1 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let tally = tally(output, false);
        assert_eq!(tally.passed, 1);
        assert_eq!(tally.failed, ["m::b"]);
        assert_eq!(
            tally.skipped,
            [("c".into(), "ignored".into()), ("d".into(), "ignored".into())]
        );
    }

    #[test]
    fn a_test_that_skips_itself_has_not_passed() {
        let output = "running 2 tests\ntest a ... ok\ntest b ... ok\n\nsuccesses:\n\n---- b stdout ----\n\
            SKIPPED kvm: b: no /dev/kvm: load kvm\n\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n";
        let tally = tally(output, true);
        assert_eq!((tally.passed, tally.failed.len()), (1, 0));
        assert_eq!(tally.skipped, [("b".into(), "no /dev/kvm: load kvm".into())]);
    }

    #[test]
    fn what_a_test_prints_is_no_verdict_on_it() {
        let output = "test a ... a line\nok\nbut then\nFAILED\ntest b ... unfinished line ok\ntest c ... SKIPPED kvm: c: why\nok\n\
            test result: FAILED. 2 passed; 1 failed; 0 ignored; 0 measured\n";
        let tally = tally(output, false);
        assert_eq!((tally.passed, tally.failed), (1, vec!["a".to_owned()]));
        assert_eq!(tally.skipped, [("c".into(), "why".into())]);
    }

    #[test]
    fn a_program_that_dies_fails_the_test_it_was_at() {
        assert_eq!(tally("test a ... ok\ntest b ... ", false).failed, ["b"]);
        assert_eq!(tally("", false).failed, ["program: ended without a summary"]);
    }

    #[test]
    fn lines_and_summary_must_agree() {
        let tally = tally(
            "test a ... ok\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured\n",
            true,
        );
        assert_eq!(
            tally.failed,
            ["program: its summary says [2, 0, 0], its lines [1, 0, 0]"]
        );
    }

    #[test]
    fn an_exit_status_that_no_test_explains_is_a_failure() {
        let tally = tally(
            "test a ... ok\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured\n",
            false,
        );
        assert_eq!(tally.failed, ["program: its exit status"]);
    }
}
