//! The text of `/proc/PID/task/TID/stat` and `schedstat`, from bytes to figures. What is not as
//! `Documentation/filesystems/proc.rst` has it is refused, never guessed.

/// What `stat` says of a thread, of the fields used here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stat {
    /// Field 3: `b'R'` running or runnable, `b'S'` sleeping, `b'D'` in an uninterruptible sleep, ...
    pub state: u8,
    /// Field 39: the CPU it last ran on.
    pub processor: u32,
    /// Field 43: guest time, in clock ticks of `sysconf(_SC_CLK_TCK)`.
    pub guest_time_clk: u64,
}

/// Why a text was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseError {
    /// No `)` closes the thread's name.
    #[error("no ')' after the thread's name")]
    NoName,
    /// The text ends before this field.
    #[error("field {0} is missing")]
    Missing(usize),
    /// The text ends within this field, or right behind it: how it would go on cannot be told.
    #[error("the text is cut in field {0}")]
    Cut(usize),
    /// This field is not the number it should be.
    #[error("field {0} is not a number")]
    NotANumber(usize),
}

/// Parses `/proc/PID/task/TID/stat`. The name in field 2 may hold anything, brackets and spaces too, so fields are
/// counted from the last `)`.
///
/// # Errors
/// See [`ParseError`].
pub fn parse_stat(text: &[u8]) -> Result<Stat, ParseError> {
    let name_end = text.iter().rposition(|&b| b == b')').ok_or(ParseError::NoName)?;
    let mut fields = Fields {
        words: &text[name_end + 1..],
        next: 3,
    };
    let state = match fields.skip_to(3)? {
        [state] if state.is_ascii_alphabetic() => *state,
        _ => return Err(ParseError::NotANumber(3)),
    };
    let processor = u32::try_from(number(39, fields.skip_to(39)?)?).map_err(|_| ParseError::NotANumber(39))?;
    let guest_time_clk = number(43, fields.skip_to(43)?)?;
    Ok(Stat {
        state,
        processor,
        guest_time_clk,
    })
}

/// Parses `/proc/PID/task/TID/schedstat` and gives its second figure, run_delay, in nanoseconds
/// (`Documentation/scheduler/sched-stats.rst`).
///
/// # Errors
/// See [`ParseError`].
pub fn parse_schedstat(text: &[u8]) -> Result<u64, ParseError> {
    number(2, Fields { words: text, next: 1 }.skip_to(2)?)
}

struct Fields<'a> {
    words: &'a [u8],
    /// The number of the first field left in `words`.
    next: usize,
}

impl<'a> Fields<'a> {
    fn skip_to(&mut self, field: usize) -> Result<&'a [u8], ParseError> {
        loop {
            self.words = self.words.trim_ascii_start();
            if self.words.is_empty() {
                return Err(ParseError::Missing(field));
            }
            let end = self.words.iter().position(u8::is_ascii_whitespace);
            let (word, rest) = self.words.split_at(end.unwrap_or(self.words.len()));
            self.words = rest;
            self.next += 1;
            if self.next > field {
                return end.map(|_| word).ok_or(ParseError::Cut(field));
            }
        }
    }
}

fn number(field: usize, word: &[u8]) -> Result<u64, ParseError> {
    let digits = !word.is_empty() && word.iter().all(u8::is_ascii_digit);
    let text = std::str::from_utf8(word)
        .ok()
        .filter(|_| digits)
        .ok_or(ParseError::NotANumber(field))?;
    text.parse().map_err(|_| ParseError::NotANumber(field))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAT: &str = "4242 (vcpu0) R 1 4242 4242 0 -1 4194368 93 0 0 0 12 34 0 0 20 0 5 0 100 5000000 300 \
         18446744073709551615 1 1 0 0 0 0 0 4096 0 0 0 0 17 3 0 0 0 489 0 0 0 0 0 0 0 0 0\n";

    #[test]
    fn fields_are_found_by_number() {
        let expected = Stat {
            state: b'R',
            processor: 3,
            guest_time_clk: 489,
        };
        assert_eq!(parse_stat(STAT.as_bytes()), Ok(expected));
    }

    #[test]
    fn a_name_with_brackets_and_spaces_shifts_nothing() {
        for name in ["a b", ")", "x) R 1 2", "((", "\u{1f600}"] {
            let text = STAT.replace("vcpu0", name);
            assert_eq!(parse_stat(text.as_bytes()).map(|s| s.guest_time_clk), Ok(489), "{name}");
        }
    }

    #[test]
    fn what_is_not_a_stat_is_refused() {
        let cases: [(&[u8], ParseError); 5] = [
            (b"", ParseError::NoName),
            (b"1 (x", ParseError::NoName),
            (b"1 (x) R 1 2 3", ParseError::Missing(39)),
            (b"1 (x)", ParseError::Missing(3)),
            (b"1 (x) 7 1", ParseError::NotANumber(3)),
        ];
        for (text, error) in cases {
            assert_eq!(parse_stat(text), Err(error), "{}", text.escape_ascii());
        }
        let negative = STAT.replace(" 489 ", " -489 ");
        assert_eq!(parse_stat(negative.as_bytes()), Err(ParseError::NotANumber(43)));
        let huge = STAT.replace(" 489 ", " 18446744073709551616 ");
        assert_eq!(parse_stat(huge.as_bytes()), Err(ParseError::NotANumber(43)));
    }

    #[test]
    fn a_text_cut_anywhere_is_refused_or_whole_up_to_the_last_field() {
        let end = STAT.find(" 489 ").expect("it is there") + 5;
        for cut in 0..STAT.len() {
            let parsed = parse_stat(&STAT.as_bytes()[..cut]);
            assert_eq!(parsed.is_ok(), cut >= end, "cut at {cut}");
        }
    }

    #[test]
    fn run_delay_is_the_second_figure() {
        assert_eq!(parse_schedstat(b"374195 77 3\n"), Ok(77));
        assert_eq!(parse_schedstat(b"374195"), Err(ParseError::Missing(2)));
        assert_eq!(parse_schedstat(b"374195 7"), Err(ParseError::Cut(2)));
        assert_eq!(parse_schedstat(b"374195 -1 3"), Err(ParseError::NotANumber(2)));
    }
}
