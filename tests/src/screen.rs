//! What a terminal shows of what a full-screen program writes: as much of a terminal as such a program uses.

use std::mem::take;

/// The cells of a screen, and where the cursor is.
#[derive(Debug)]
pub struct Screen {
    rows: Vec<Vec<char>>,
    /// Column and row, from 0.
    cursor: (usize, usize),
    /// A control sequence that has not ended, without its ESC.
    sequence: Option<String>,
    /// The first bytes of a character whose others are to come.
    cut: Vec<u8>,
    /// Whether it is the other screen that is shown, which programs take over and give back.
    pub is_other: bool,
}

impl Screen {
    /// An empty one.
    #[must_use]
    pub fn new(columns: usize, rows: usize) -> Self {
        Self {
            rows: vec![vec![' '; columns]; rows],
            cursor: (0, 0),
            sequence: None,
            cut: Vec::new(),
            is_other: false,
        }
    }

    /// Writes to it.
    pub fn write(&mut self, bytes: &[u8]) {
        let mut all = take(&mut self.cut);
        all.extend_from_slice(bytes);
        let whole = match std::str::from_utf8(&all) {
            Err(error) if error.error_len().is_none() => error.valid_up_to(),
            _ => all.len(),
        };
        self.cut = all.split_off(whole);
        String::from_utf8_lossy(&all).chars().for_each(|c| self.put(c));
    }

    fn put(&mut self, c: char) {
        if let Some(mut sequence) = self.sequence.take() {
            sequence.push(c);
            // ESC [, parameters, and a last byte from @ on (ECMA-48, 5.4); other sequences are of two characters.
            match sequence.strip_prefix('[') {
                Some("") => self.sequence = Some(sequence),
                Some(_) if !('@'..='~').contains(&c) => self.sequence = Some(sequence),
                Some(control) => self.control(control),
                None => {}
            }
            return;
        }
        match c {
            '\x1b' => self.sequence = Some(String::new()),
            '\r' => self.cursor.0 = 0,
            '\n' => self.cursor.1 += 1,
            c => {
                let (column, row) = self.cursor;
                if let Some(cell) = self.rows.get_mut(row).and_then(|row| row.get_mut(column)) {
                    *cell = c;
                }
                self.cursor.0 += 1;
            }
        }
    }

    fn control(&mut self, control: &str) {
        let (parameters, last) = control.split_at(control.len() - 1);
        match (parameters, last) {
            (_, "H") => {
                let mut numbers = parameters
                    .split(';')
                    .map(|number| number.parse::<usize>().unwrap_or(1) - 1);
                let row = numbers.next().unwrap_or(0);
                self.cursor = (numbers.next().unwrap_or(0), row);
            }
            ("2", "J") => self.rows.iter_mut().for_each(|row| row.fill(' ')),
            ("?1049", "h") => {
                self.is_other = true;
                self.rows.iter_mut().for_each(|row| row.fill(' '));
            }
            ("?1049", "l") => self.is_other = false,
            _ => {}
        }
    }

    /// What it shows, line by line.
    #[must_use]
    pub fn text(&self) -> String {
        let line = |row: &Vec<char>| row.iter().collect::<String>().trim_end().to_owned() + "\n";
        self.rows.iter().map(line).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_where_it_was_put() {
        let mut screen = Screen::new(10, 3);
        for byte in "\x1b[?1049h\x1b[2;3H\x1b[38;5;2mab▂\x1b[0mc\x1b[1;1Hx\x1b[?25l".bytes() {
            screen.write(&[byte]);
        }
        assert_eq!((screen.text().as_str(), screen.is_other), ("x\n  ab▂c\n\n", true));
        screen.write(b"\x1b[2J\x1b[?1049l");
        assert_eq!((screen.text().as_str(), screen.is_other), ("\n\n\n", false));
    }
}
